"""What instructions compute: one function of NumPy arrays for each, an element a thread.

Registers have no type: every instruction views their bits as its own. Where the ISA leaves an approximation open
(ex2.approx, div.full, ...) the result here is the nearest, and fma rounds twice in about one of 2^29 cases. What the
ISA does not specify, as a quotient by zero, is all bits set. A modifier that is not known makes an instruction that
is not known: none is passed over.
"""

import functools
from collections.abc import Callable

import numpy as np

from profiling.emulator.conversions import TYPES, conversion, flushed, from_bf16, to_bf16

# ---------------------------------------------------------------- integers


def _high(a, b):
    """The upper half of a product."""
    size = a.dtype.itemsize * 8
    if size == 64:
        halves = [(int(x) * int(y) >> 64) % (1 << 64) for x, y in np.broadcast(a, b)]
        return np.array(halves, np.uint64).view(a.dtype)
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
    """`b` is unsigned, of 32 bits; shifts of the width and more leave nothing."""
    size = a.dtype.itemsize * 8
    return np.where(b < size, a << (b & (size - 1)).astype(a.dtype), a.dtype.type(0))


def _shifted_right(a, b):
    last = a.dtype.itemsize * 8 - 1
    if a.dtype.kind == "i":
        return a >> np.minimum(b, last).astype(a.dtype)
    return np.where(b <= last, a >> (b & last).astype(a.dtype), a.dtype.type(0))


def _low_bits(count):
    """As many bits set, from the lowest on."""
    return np.where(count >= 64, ~np.uint64(0), (np.uint64(1) << (count & np.uint64(63))) - np.uint64(1))


def _field(a, start, length):
    """bfe: `length` bits from `start` on; beyond them and beyond the top its sign if the type has one, or zeros."""
    size = a.dtype.itemsize * 8
    start, length = start.astype(np.uint64) & np.uint64(255), length.astype(np.uint64) & np.uint64(255)
    bits = a.view(f"u{size // 8}").astype(np.uint64)
    there = np.minimum(length, np.maximum(size, start) - start)  # of the field, within the register
    taken = np.where(start < size, bits >> np.minimum(start, size - 1), np.uint64(0)) & _low_bits(there)
    if a.dtype.kind == "i":
        top = np.minimum(np.maximum(start + length, 1) - np.uint64(1), np.uint64(size - 1))
        negative = (bits >> top & np.uint64(1) == 1) & (length > 0)
        taken = np.where(negative, taken | ~_low_bits(there), taken)
    return taken.astype(f"u{size // 8}").view(a.dtype)


def _inserted(a, b, start, length):
    """bfi: the low `length` bits of a in b, from `start` on."""
    start, length = start.astype(np.uint64) & np.uint64(255), length.astype(np.uint64) & np.uint64(255)
    shift, inside = start & np.uint64(63), start < 64
    mask = np.where(inside, _low_bits(length) << shift, np.uint64(0))
    moved = (a.astype(np.uint64) << shift) & mask
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
    return _fused_long(a, b, c).astype(a.dtype)


def _fused_long(a, b, c):
    return a.astype(np.float64) * b + c


def _long(function: Callable) -> Callable:
    """In fp64, rounded to what came: NumPy's own of fp32 may be off by a bit, as 2 to the 127th is."""
    return lambda a: function(a.astype(np.float64)).astype(a.dtype)


def _smaller(a, b, choose=np.fmin):
    """A number rather than NaN, and -0 below +0."""
    return np.where(a == b, np.where(np.signbit(a), a, b), choose(a, b))


def _larger(a, b, choose=np.fmax):
    return np.where(a == b, np.where(np.signbit(a), b, a), choose(a, b))


_FLOATS: dict[str, Callable] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "fma": _fused, "mad": _fused,
    "neg": np.negative, "abs": np.abs, "sqrt": np.sqrt, "rcp": np.reciprocal, "rsqrt": _long(lambda a: 1 / np.sqrt(a)),
    "ex2": _long(np.exp2), "lg2": _long(np.log2), "tanh": _long(np.tanh), "sin": _long(np.sin), "cos": _long(np.cos),
    "min": _smaller, "max": _larger,
    "copysign": lambda a, b: np.copysign(b, a),
}  # fmt: skip
_INTEGERS: dict[str, Callable] = {
    "add": np.add, "sub": np.subtract, "mul.lo": np.multiply, "mul.hi": _high, "mul.wide": _wide,
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
_OF_FLOATS = frozenset({"rn", "approx", "full", "ftz", "sat", "relu", "NaN"})
_OF_INTEGERS = frozenset({"lo", "hi", "wide", "relu"})


def _reader(kind: str) -> Callable:
    """The fp32 numbers of 16 bits each."""
    return from_bf16 if kind.startswith("bf16") else lambda bits: bits.view(np.float16).astype(np.float32)


def _with_pairs(function: Callable) -> Callable:
    """A function of fp32 for two in a register of 64 bits."""

    def of_bits(*arguments):
        shape = np.broadcast(*arguments).shape
        pairs = [np.broadcast_to(a, shape).copy().view(np.float32) for a in arguments]
        return function(*pairs).view(np.uint64)

    return of_bits


def _with_halves(function: Callable, kind: str) -> Callable:
    """A function of fp32 for operands of 16 bits, one or two in a register: computed longer, rounded once."""
    packed, read = kind.endswith("x2"), _reader(kind)
    write = to_bf16 if kind.startswith("bf16") else lambda numbers: numbers.astype(np.float16).view(np.uint16)

    def of_bits(*arguments):
        if packed:
            shape = np.broadcast(*arguments).shape
            arguments = [np.broadcast_to(a, shape).copy().view(np.uint16) for a in arguments]
        else:
            arguments = [a.view(np.uint16) for a in arguments]
        found = write(function(*[read(a) for a in arguments]))
        return found.view(np.uint32) if packed else found

    return of_bits


def _float(parts: tuple[str, ...], kind: str) -> Callable | None:
    halves = kind not in ("f32", "f64")
    function = _fused_long if halves and parts[0] == "fma" else _FLOATS[parts[0]]
    if "NaN" in parts:
        whole, choose = {"min": (_smaller, np.minimum), "max": (_larger, np.maximum)}[parts[0]]
        function = lambda a, b: whole(a, b, choose)  # noqa: E731
    if parts[0] in ("min", "max"):  # of two numbers or, from sm_100 on, of three
        of_two = function
        function = lambda *a: functools.reduce(of_two, a)  # noqa: E731
    if "relu" in parts:
        before = function
        function = lambda *a: np.maximum(before(*a), np.float32(0))  # noqa: E731
    if "sat" in parts:
        unbounded = function
        function = lambda *a: np.fmin(np.fmax(unbounded(*a), np.float32(0)), np.float32(1))  # noqa: E731
    if "ftz" in parts:
        if kind not in ("f32", "bf16", "bf16x2"):
            return None
        subnormal = function
        function = lambda *a: flushed(subnormal(*map(flushed, a)))  # noqa: E731
    return _with_halves(function, kind) if halves else function


def _comparison(how: str, kind: str) -> Callable:
    read = {"bf16": from_bf16, "f16": lambda bits: bits.view(np.float16)}.get(kind, lambda a: a)
    if how in ("num", "nan"):
        return lambda a, b: ((read(a) != read(a)) | (read(b) != read(b))) == (how == "nan")
    if kind in ("f32", "f64", "f16", "bf16") and how == "ne":  # ordered: false for NaN
        return lambda a, b: (read(a) < read(b)) | (read(a) > read(b))
    if how in _COMPARED:
        compare = _COMPARED[how]
        return lambda a, b: compare(read(a), read(b))
    opposite = _COMPARED[_OPPOSITE[how[:-1]]]  # unordered: true for NaN
    if how == "equ":
        return lambda a, b: ~((read(a) < read(b)) | (read(a) > read(b)))
    return lambda a, b: ~opposite(read(a), read(b))


# ---------------------------------------------------------------- from an instruction to a function


@functools.lru_cache(maxsize=1024)
def function_of(parts: tuple[str, ...]) -> tuple[Callable, tuple[np.dtype, ...]] | None:
    """(the function, the types in which its operands are read), or None for an instruction that is not known.

    The last type stands for all operands that follow.
    """
    verb, kind, modifiers = parts[0], parts[-1], frozenset(parts[1:-1])
    dtype = TYPES.get(kind)
    if verb == "cvt" and len(parts) > 2:
        convert = conversion(parts)
        return convert and (convert, (dtype,))
    if dtype is None:
        return None
    if verb == "cvta" and modifiers <= {"to", "global"}:
        return (lambda a: a), (dtype,)
    if verb == "setp":
        how, *flush = parts[1:-1]
        ordered = how in _COMPARED or (how[:-1] in _OPPOSITE and how[-1] == "u") or how in ("num", "nan")
        return (_comparison(how, kind), (dtype,)) if ordered and not flush else None
    if verb == "selp" and not modifiers:
        return (lambda a, b, p: np.where(p, a, b)), (dtype, dtype, TYPES["pred"])
    if verb == "mov" and not modifiers:
        return (lambda a: a), (dtype,)
    if parts[-2:] in (("f32", "f16"), ("f32", "bf16")) and verb in ("add", "sub", "fma"):  # fp32 but what comes first
        function, read, short = _float(parts[:-2], "f32"), _reader(kind), 2 if verb == "fma" else 1
        mixed = lambda *a: function(*map(read, a[:short]), *a[short:])  # noqa: E731
        return (mixed, (TYPES["b16"],) * short + (TYPES["f32"],)) if modifiers <= {"rn", "sat", "f32"} else None
    if kind in ("f32", "f64", "f16", "bf16", "f16x2", "bf16x2") and verb in _FLOATS:
        if not modifiers <= _OF_FLOATS:
            return None
        function = _float(parts, kind)
        return function and (function, (dtype if kind != "f16" else TYPES["b16"],))
    if kind == "f32x2" and verb in ("add", "sub", "mul", "fma") and modifiers <= {"rn", "ftz"}:
        return _with_pairs(_float(parts, "f32")), (dtype,)
    if kind == "pred" and verb in ("and", "or", "xor", "not") and not modifiers:
        return np.logical_not if verb == "not" else _INTEGERS[verb], (dtype,)
    return _integer(parts, dtype) if modifiers <= _OF_INTEGERS and dtype.kind in "iu" else None


def _integer(parts: tuple[str, ...], dtype: np.dtype):
    function = _INTEGERS.get(".".join(parts[:-1]))
    if function is None:
        return None
    verb, long = parts[0], TYPES["u32"]  # what counts bits has 32 of its own, whatever it counts
    if verb in ("shl", "shr", "bfe"):
        return function, (dtype, long)
    if verb == "bfi":
        return function, (dtype, dtype, long)
    if parts[:2] == ("mad", "wide"):
        return function, (dtype, dtype, _wider(dtype))
    return function, (dtype,)
