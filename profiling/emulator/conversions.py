"""The types of PTX as NumPy has them, and cvt: from one to another, with the rounding that an instruction names."""

from collections.abc import Callable

import numpy as np

TYPES = {
    "pred": np.dtype(bool), "b8": np.dtype("u1"), "u8": np.dtype("u1"), "s8": np.dtype("i1"),
    "b16": np.dtype("u2"), "u16": np.dtype("u2"), "s16": np.dtype("i2"), "f16": np.dtype("f2"), "bf16": np.dtype("u2"),
    "b32": np.dtype("u4"), "u32": np.dtype("u4"), "s32": np.dtype("i4"), "f32": np.dtype("f4"), "tf32": np.dtype("u4"),
    "f16x2": np.dtype("u4"), "bf16x2": np.dtype("u4"),
    "b64": np.dtype("u8"), "u64": np.dtype("u8"), "s64": np.dtype("i8"), "f64": np.dtype("f8"),
    "f32x2": np.dtype("u8"),
}  # fmt: skip
_TINY = np.finfo(np.float32).tiny


# ---------------------------------------------------------------- numbers of 16 bits


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """The fp32 numbers of these 16 bits each."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bf16(numbers: np.ndarray) -> np.ndarray:
    """Numbers to the 16 bits of the nearest bf16, ties to even; NaN to 0x7FFF, as the instruction has it."""
    single = numbers if numbers.dtype == np.float32 else _to_odd(numbers.astype(np.float64))
    bits = np.ascontiguousarray(single).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> np.uint32(16)
    return np.where(numbers != numbers, 0x7FFF, rounded).astype(np.uint16)


def _to_odd(numbers: np.ndarray) -> np.ndarray:
    """fp64 cut to fp32, the last bit set if anything was lost: rounding that again is as rounding once."""
    single = numbers.astype(np.float32)
    larger, lost = np.abs(single.astype(np.float64)) > np.abs(numbers), single != numbers
    bits = single.view(np.uint32) - larger.astype(np.uint32)
    return np.where(np.isnan(numbers), single, (bits | lost).astype(np.uint32).view(np.float32))


def to_tf32(numbers: np.ndarray) -> np.ndarray:
    """fp32 rounded to the 10 bits of mantissa that tensor cores read, ties away from zero (cvt.rna)."""
    rounded = ((numbers.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isnan(numbers), np.float32(np.nan), rounded)


def flushed(numbers: np.ndarray) -> np.ndarray:
    """Subnormal numbers as zeros of their sign (.ftz)."""
    return np.where(np.abs(numbers) < _TINY, np.copysign(np.float32(0), numbers), numbers)


# ---------------------------------------------------------------- cvt

_ROUNDINGS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_FLOATING = ("f32", "f64", "f16", "bf16", "tf32")


def _writer(kind: str) -> Callable:
    """A function from numbers to those of `kind`, bf16 as their bits."""
    if kind == "bf16":
        return to_bf16
    if kind == "tf32":
        return to_tf32
    return lambda numbers: numbers.astype(TYPES[kind])


def conversion(parts: tuple[str, ...]) -> Callable | None:
    """cvt, or None for one that is not known."""
    modifiers, (to, source) = set(parts[1:-2]), parts[-2:]
    rounding = next((_ROUNDINGS[part] for part in parts if part in _ROUNDINGS), None)
    if to in ("bf16x2", "f16x2"):  # two numbers into one register, the first on top
        if modifiers != {"rn"} or source != "f32":
            return None
        write = _writer(to[:-2])
        return lambda high, low: (
            (write(high).view(np.uint16).astype(np.uint32) << np.uint32(16)) | write(low).view(np.uint16)
        )
    known = {"rn", "ftz", "rna", *_ROUNDINGS} if source in _FLOATING else {"rn", "sat"}
    if not modifiers <= known or ("rna" in modifiers) != (to == "tf32") or {to, source} - TYPES.keys():
        return None
    read = from_bf16 if source == "bf16" else lambda bits: bits
    if "ftz" in modifiers and source == "f32":
        read = flushed
    if to not in _FLOATING:
        limits = np.iinfo(TYPES[to])
        if source in _FLOATING:
            return _to_integer(read, rounding, limits, source) if rounding else None
        if "sat" in modifiers:
            return lambda numbers: np.minimum(np.maximum(numbers.astype(object), limits.min), limits.max).astype(
                limits.dtype
            )
    write = _writer(to)
    if rounding:
        return lambda numbers: write(rounding(read(numbers)))
    return lambda numbers: write(read(numbers))


def _to_integer(read: Callable, rounding: Callable, limits: np.iinfo, source: str) -> Callable:
    """To the nearest of the type's range; NaN to 0, or where 64 bits take part to the top bit alone."""
    nan = 1 << (limits.bits - 1) if source == "f64" or limits.bits == 64 else 0
    nan = np.array(nan, f"u{limits.bits // 8}").view(limits.dtype)

    def convert(bits):
        numbers = rounding(read(bits).astype(np.float64))
        over, under = numbers >= limits.max, numbers <= limits.min
        whole = np.where(over | under | np.isnan(numbers), 0, numbers).astype(limits.dtype)
        whole = np.where(over, limits.dtype.type(limits.max), whole)
        return np.where(np.isnan(numbers), nan, np.where(under, limits.dtype.type(limits.min), whole))

    return convert
