"""What instructions compute: one function of NumPy arrays for each, an element a thread.

Registers have no type: every instruction views their bits as its own. Where the ISA leaves an approximation open
(ex2.approx, div.full, ...) the result here is the correctly rounded one, and fma rounds twice in about one of 2^29 cases.
"""

import functools
from collections.abc import Callable

import numpy as np

TYPES = {
    "pred": np.dtype(bool), "b8": np.dtype("u1"), "u8": np.dtype("u1"), "s8": np.dtype("i1"),
    "b16": np.dtype("u2"), "u16": np.dtype("u2"), "s16": np.dtype("i2"), "f16": np.dtype("f2"), "bf16": np.dtype("u2"),
    "b32": np.dtype("u4"), "u32": np.dtype("u4"), "s32": np.dtype("i4"), "f32": np.dtype("f4"), "tf32": np.dtype("u4"),
    "f16x2": np.dtype("u4"), "bf16x2": np.dtype("u4"),
    "b64": np.dtype("u8"), "u64": np.dtype("u8"), "s64": np.dtype("i8"), "f64": np.dtype("f8"),
}  # fmt: skip
_TINY = np.finfo(np.float32).tiny


# ---------------------------------------------------------------- numbers of 16 bits


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """The fp32 numbers of these 16 bits each."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bf16(numbers: np.ndarray) -> np.ndarray:
    """fp32 to the 16 bits of the nearest bf16, ties to even; NaN to 0x7FFF, as the instruction has it."""
    bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> np.uint32(16)
    return np.where(numbers != numbers, 0x7FFF, rounded).astype(np.uint16)


def to_tf32(numbers: np.ndarray) -> np.ndarray:
    """fp32 rounded to the 10 bits of mantissa that tensor cores read, ties away from zero (cvt.rna)."""
    return ((numbers.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def flushed(numbers: np.ndarray) -> np.ndarray:
    """Subnormal numbers as zeros of their sign (.ftz)."""
    return np.where(np.abs(numbers) < _TINY, np.copysign(np.float32(0), numbers), numbers)


# ---------------------------------------------------------------- integers


def _high(a, b):
    """The upper half of a product."""
    size = a.dtype.itemsize * 8
    if size == 64:
        return np.array([(int(x) * int(y)) >> 64 for x, y in np.broadcast(a, b)]).astype(a.dtype)
    wide = _wider(a.dtype)
    return ((a.astype(wide) * b.astype(wide)) >> size).astype(a.dtype)


def _wider(dtype: np.dtype) -> np.dtype:
    return np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")


def _wide(a, b):
    wide = _wider(a.dtype)
    return a.astype(wide) * b.astype(wide)


def _quotient(a, b):
    """Towards zero; by zero, all bits set, as GPUs have it."""
    divisor = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // divisor
    if a.dtype.kind == "i":
        quotient = quotient + ((a % divisor != 0) & ((a < 0) != (divisor < 0)))
    return np.where(b == 0, np.array(-1).astype(a.dtype), quotient).astype(a.dtype)


def _remainder(a, b):
    return (a - _quotient(a, b) * b).astype(a.dtype)


def _shifted_left(a, b):
    size = a.dtype.itemsize * 8
    b = b.astype(a.dtype)
    return np.where(b < size, a << (b & a.dtype.type(size - 1)), a.dtype.type(0))


def _shifted_right(a, b):
    last = a.dtype.itemsize * 8 - 1
    if a.dtype.kind == "i":
        return a >> np.minimum(b.view(np.uint32), last).astype(a.dtype)
    b = b.astype(a.dtype)
    return np.where(b <= last, a >> (b & a.dtype.type(last)), a.dtype.type(0))


def _field(a, start, length):
    """bfe: `length` bits from `start` on, signed if the type is."""
    size = a.dtype.itemsize * 8
    start, length = start.astype(np.int64) & 255, length.astype(np.int64) & 255
    bits = a.astype(np.int64) & ((1 << size) - 1) if size < 64 else a.astype(np.uint64).view(np.int64)
    taken = (bits >> start) & ((np.int64(1) << length) - 1)
    if a.dtype.kind == "i":
        top = np.clip(start + length - 1, 0, size - 1)
        sign = (bits >> top) & 1
        taken = np.where((length > 0) & (sign == 1), taken | (np.int64(-1) << length), taken)
    return taken.astype(a.dtype)


def _inserted(a, b, start, length):
    """bfi: the low `length` bits of a in b, from `start` on."""
    mask = ((np.uint64(1) << length.astype(np.uint64)) - np.uint64(1)) << start.astype(np.uint64)
    moved = (a.astype(np.uint64) << start.astype(np.uint64)) & mask
    return ((b.astype(np.uint64) & ~mask) | moved).astype(b.dtype)


def _permuted(a, b, chosen):
    """prmt: four bytes out of the eight of b:a."""
    both = (b.astype(np.uint64) << np.uint64(32)) | a.astype(np.uint64)
    result = np.zeros(np.broadcast(both, chosen).shape, np.uint64)
    for place in range(4):
        pick = (chosen.astype(np.uint64) >> np.uint64(4 * place)) & np.uint64(15)
        byte = (both >> ((pick & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        result |= np.where(pick & np.uint64(8), sign, byte) << np.uint64(8 * place)
    return result.astype(np.uint32)


def _logic(a, b, c, table):
    """lop3: any function of three bits."""
    table, result = int(table.flat[0]), np.zeros(np.broadcast(a, b, c).shape, a.dtype)
    for case in range(8):
        if table >> case & 1:
            result = result | ((a if case & 4 else ~a) & (b if case & 2 else ~b) & (c if case & 1 else ~c))
    return result


def _leading_zeros(a):
    return (a.dtype.itemsize * 8 - np.array([int(x).bit_length() for x in a])).astype(np.uint32)


def _ones(a):
    return np.array([int(x).bit_count() for x in a], np.uint32)


# ---------------------------------------------------------------- floating point


def _fused(a, b, c):
    return (a.astype(np.float64) * b + c).astype(a.dtype)


def _least(a, b):
    return np.fmin(a, b)


def _greatest(a, b):
    return np.fmax(a, b)


def _tanh(a):
    return np.tanh(a)


_FLOATS: dict[str, Callable] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "fma": _fused, "mad": _fused,
    "neg": np.negative, "abs": np.abs, "sqrt": np.sqrt, "rsqrt": lambda a: 1 / np.sqrt(a), "rcp": lambda a: 1 / a,
    "ex2": np.exp2, "lg2": np.log2, "tanh": np.tanh, "sin": np.sin, "cos": np.cos, "min": np.fmin, "max": np.fmax,
    "copysign": lambda a, b: np.copysign(b, a),
}  # fmt: skip
_INTEGERS: dict[str, Callable] = {
    "add": np.add, "sub": np.subtract, "mul.lo": np.multiply, "mul.hi": _high, "mul.wide": _wide, "mul": np.multiply,
    "div": _quotient, "rem": _remainder, "min": np.minimum, "max": np.maximum, "neg": np.negative, "abs": np.abs,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert, "shl": _shifted_left,
    "shr": _shifted_right, "bfe": _field, "bfi": _inserted, "clz": _leading_zeros, "popc": _ones,
    "mad.lo": lambda a, b, c: a * b + c, "mad.wide": lambda a, b, c: _wide(a, b) + c,
    "mad.hi": lambda a, b, c: _high(a, b) + c, "min.relu": lambda a, b: np.maximum(np.minimum(a, b), a.dtype.type(0)),
    "max.relu": lambda a, b: np.maximum(np.maximum(a, b), a.dtype.type(0)), "lop3": _logic, "prmt": _permuted,
}  # fmt: skip
_COMPARED: dict[str, Callable] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
_OPPOSITE = {"eq": "ne", "ne": "eq", "lt": "ge", "le": "gt", "gt": "le", "ge": "lt"}
_NO_MEANING = frozenset({"rn", "approx", "full", "sync", "aligned", "uni", "ftz", "b32", "lto"})


def _with_halves(function: Callable, kind: str) -> Callable:
    """A function of fp32 for operands of 16 bits, one or two in a register: computed in fp32, rounded once."""
    packed = kind.endswith("x2")
    if kind.startswith("bf16"):
        read, write = from_bf16, to_bf16
    else:
        read = lambda bits: bits.view(np.float16).astype(np.float32)  # noqa: E731
        write = lambda numbers: numbers.astype(np.float16).view(np.uint16)  # noqa: E731

    def of_bits(*arguments):
        if packed:
            shape = np.broadcast(*arguments).shape
            arguments = [np.broadcast_to(a, shape).copy().view(np.uint16) for a in arguments]
        else:
            arguments = [a.view(np.uint16) for a in arguments]
        found = write(function(*[read(a) for a in arguments]))
        return found.view(np.uint32) if packed else found

    return of_bits


def _float(parts: tuple[str, ...], kind: str) -> Callable:
    function = _FLOATS[parts[0]]
    if "NaN" in parts:
        function = {"min": np.minimum, "max": np.maximum}[parts[0]]
    if "relu" in parts:
        before = function
        function = lambda *a: np.maximum(before(*a), np.float32(0))  # noqa: E731
    if "sat" in parts:
        unbounded = function
        function = lambda *a: np.clip(unbounded(*a), np.float32(0), np.float32(1))  # noqa: E731
    if "ftz" in parts:
        subnormal = function
        function = lambda *a: flushed(subnormal(*map(flushed, a)))  # noqa: E731
    return function if kind in ("f32", "f64") else _with_halves(function, kind)


def _comparison(parts: tuple[str, ...], kind: str) -> Callable:
    how = next(part for part in parts[1:] if part in _COMPARED or part[:-1] in _COMPARED or part in ("num", "nan"))
    floating = kind in ("f32", "f64", "f16", "bf16")
    read = {"bf16": from_bf16, "f16": lambda bits: bits.view(np.float16)}.get(kind, lambda a: a)
    if how in ("num", "nan"):
        return lambda a, b: ((read(a) != read(a)) | (read(b) != read(b))) == (how == "nan")
    if floating and how == "ne":  # ordered: false for NaN
        return lambda a, b: (read(a) < read(b)) | (read(a) > read(b))
    if how in _COMPARED:
        compare = _COMPARED[how]
        return lambda a, b: compare(read(a), read(b))
    opposite = _COMPARED[_OPPOSITE[how[:-1]]]  # unordered: true for NaN
    if how == "equ":
        return lambda a, b: ~((read(a) < read(b)) | (read(a) > read(b)))
    return lambda a, b: ~opposite(read(a), read(b))


# ---------------------------------------------------------------- conversions


def _rounded_to(kind: str, source: str) -> Callable:
    """fp32 numbers as an array of the bits of `kind`."""
    if kind == "bf16":
        return to_bf16
    if kind == "tf32":
        return to_tf32
    return lambda numbers: numbers.astype(TYPES[kind])


def _read_as(kind: str) -> Callable:
    return from_bf16 if kind == "bf16" else lambda bits: bits


_ROUNDINGS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _conversion(parts: tuple[str, ...]) -> Callable:
    to, source = parts[-2:]
    if to in ("bf16x2", "f16x2"):  # two numbers into one register, the first on top
        write = _rounded_to(to[:-2], source)
        if "relu" in parts:
            raise NotImplementedError("cvt with relu")
        return lambda high, low: (
            (write(high).view(np.uint16).astype(np.uint32) << np.uint32(16)) | write(low).view(np.uint16)
        )
    read, write = _read_as(source), _rounded_to(to, source)
    rounding = next((_ROUNDINGS[part] for part in parts if part in _ROUNDINGS), None)
    integer = TYPES[to].kind in "iu" and to not in ("bf16", "tf32")
    if integer and source in ("f32", "f64", "f16", "bf16"):
        limits = np.iinfo(TYPES[to])
        rounding = rounding or np.rint

        def to_integer(numbers):
            wide = np.nan_to_num(rounding(read(numbers).astype(np.float64)), nan=0.0)
            inside = np.clip(wide, limits.min, limits.max)
            whole = np.where(inside >= 2.0**63, 0, inside).astype(TYPES[to])
            return np.where(wide >= limits.max, limits.max, whole).astype(TYPES[to])

        return to_integer
    if integer and "sat" in parts:
        limits = np.iinfo(TYPES[to])
        return lambda numbers: np.clip(numbers, limits.min, limits.max).astype(TYPES[to])
    if rounding is not None:
        return lambda numbers: write(rounding(read(numbers)))
    return lambda numbers: write(read(numbers))


# ---------------------------------------------------------------- from an instruction to a function


@functools.lru_cache(maxsize=1024)
def function_of(parts: tuple[str, ...]) -> tuple[Callable, tuple[np.dtype, ...]] | None:
    """(the function, the types in which its operands are read), or None for what computes nothing of its operands alone.

    The last type stands for all operands that follow.
    """
    verb, kind = parts[0], parts[-1]
    if verb == "cvt":
        return _conversion(parts), (TYPES[kind],)
    if verb == "cvta":
        return (lambda a: a), (TYPES[kind],)
    if verb == "setp":
        return _comparison(parts, kind), (TYPES[kind],)
    if verb == "selp":
        return (lambda a, b, p: np.where(p, a, b)), (TYPES[kind], TYPES[kind], TYPES["pred"])
    if verb == "mov" and kind in TYPES:
        return (lambda a: a), (TYPES[kind],)
    if kind in ("f32", "f64", "f16", "bf16", "f16x2", "bf16x2") and verb in _FLOATS:
        dtype = TYPES[kind] if kind != "f16" else TYPES["b16"]
        return _float(parts, kind), (dtype,)
    if kind == "pred" and verb in _INTEGERS:
        return {"not": np.logical_not}.get(verb, _INTEGERS[verb]), (TYPES["pred"],)
    return _integer(verb, parts, kind)


def _integer(verb: str, parts: tuple[str, ...], kind: str):
    how = ".".join(part for part in parts[:-1] if part in ("lo", "hi", "wide", "relu") or part == verb)
    dtype = TYPES.get(kind)
    function = _INTEGERS.get(how) or _INTEGERS.get(verb)
    if function is None or dtype is None:
        return None
    if verb in ("shl", "shr"):
        return function, (dtype, TYPES["u32"])
    if verb in ("bfe",):
        return function, (dtype, TYPES["u32"])
    if verb == "bfi":
        return function, (dtype, dtype, TYPES["u32"])
    if how == "mad.wide":
        return function, (dtype, dtype, _wider(dtype))
    return function, (dtype,)
