"""The emulator's arithmetic against Python's integers and PyTorch, on the values where it is easily wrong."""

import itertools
import math
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from written import compute

AWKWARD = {
    "s16": [0, 1, -1, 2, -2, 7, -7, 255, 256, 32767, -32768, -32767],
    "s32": [0, 1, -1, 2, -2, 3, 7, -7, 31, 32, 65535, 65536, -65536, 2**31 - 1, -(2**31), 1 - 2**31, 0x12345678],
    "s64": [0, 1, -1, 3, -7, 2**31, 2**32, 2**32 - 1, -(2**32), 2**63 - 1, -(2**63), 0x123456789ABCDEF0],
}
AWKWARD |= {f"u{bits}": [x % 2 ** int(bits) for x in AWKWARD[f"s{bits}"]] for bits in ("16", "32", "64")}


def dtype_of(kind: str) -> np.dtype:
    return np.dtype(f"{'i' if kind[0] == 's' else 'u'}{int(kind[1:]) // 8}")


def pairs(kind: str) -> tuple[np.ndarray, np.ndarray]:
    drawn = random.Random(kind)
    bits = int(kind[1:])
    low = -(1 << bits - 1) if kind[0] == "s" else 0
    values = [*itertools.product(AWKWARD[kind], repeat=2)]
    values += [(drawn.randrange(low, low + (1 << bits)), drawn.randrange(low, low + (1 << bits))) for _ in range(60)]
    return tuple(np.array(column, dtype_of(kind)) for column in zip(*values, strict=True))


def wrapped(numbers, kind: str) -> np.ndarray:
    """Python's integers cut to the width."""
    bits = int(kind[1:])
    return np.array([x % 2**bits for x in numbers], f"u{bits // 8}").view(dtype_of(kind))


def quotient(x: int, y: int) -> int:
    return -1 if y == 0 else abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)


INTEGER = {
    "add": lambda x, y: x + y, "sub": lambda x, y: x - y, "mul.lo": lambda x, y: x * y, "div": quotient,
    "rem": lambda x, y: x - y * quotient(x, y), "min": min, "max": max,
}  # fmt: skip


@pytest.mark.parametrize("kind", AWKWARD)
@pytest.mark.parametrize("verb", [*INTEGER, "mul.hi"])
def test_integers(verb, kind):
    a, b = pairs(kind)
    right = INTEGER.get(verb, lambda x, y: x * y >> int(kind[1:]))
    expected = wrapped([right(int(x), int(y)) for x, y in zip(a, b, strict=True)], kind)
    np.testing.assert_array_equal(compute(f"{verb}.{kind}", dtype_of(kind), a, b), expected)


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32"])
def test_products_of_twice_the_width(kind):
    a, b = pairs(kind)
    long = f"{kind[0]}{2 * int(kind[1:])}"
    products = [int(x) * int(y) for x, y in zip(a, b, strict=True)]
    np.testing.assert_array_equal(compute(f"mul.wide.{kind}", dtype_of(long), a, b), wrapped(products, long))
    c = np.resize(np.array(AWKWARD[long], dtype_of(long)), len(a))
    sums = [product + int(z) for product, z in zip(products, c, strict=True)]
    np.testing.assert_array_equal(compute(f"mad.wide.{kind}", dtype_of(long), a, b, c), wrapped(sums, long))


@pytest.mark.parametrize("kind", ["u32", "s32", "s64", "u64"])
def test_product_and_sum(kind):
    a, b = pairs(kind)
    c = b[::-1].copy()
    for half in ("lo", "hi"):
        shift = int(kind[1:]) if half == "hi" else 0
        expected = wrapped([(int(x) * int(y) >> shift) + int(z) for x, y, z in zip(a, b, c, strict=True)], kind)
        np.testing.assert_array_equal(compute(f"mad.{half}.{kind}", dtype_of(kind), a, b, c), expected)


def test_min_relu():
    a, b = pairs("s32")
    expected = np.maximum(np.minimum(a, b), 0)
    np.testing.assert_array_equal(compute("min.relu.s32", "i4", a, b), expected)


SHIFTS = [0, 1, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 65536, 2**31, 2**32 - 1]


@pytest.mark.parametrize("kind", ["b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64"])
def test_shifts_of_the_width_and_more(kind):
    """Amounts are of 32 bits whatever they shift, and stop at the width."""
    bits = int(kind[1:])
    own = kind.replace("b", "u")
    a, by = zip(*itertools.product(AWKWARD[own], SHIFTS), strict=True)
    values, amounts = np.array(a, dtype_of(own)), np.array(by, np.uint32)
    if kind[0] == "b":
        expected = wrapped([x << y if y < bits else 0 for x, y in zip(a, by, strict=True)], own)
        np.testing.assert_array_equal(compute(f"shl.{kind}", dtype_of(own), values, amounts), expected)
    expected = wrapped([x >> min(y, bits) for x, y in zip(a, by, strict=True)], own)
    np.testing.assert_array_equal(compute(f"shr.{kind}", dtype_of(own), values, amounts), expected)


FIELDS = [*itertools.product([0, 1, 7, 30, 31, 32, 33, 63, 64, 200, 256], [0, 1, 5, 31, 32, 33, 63, 64, 255, 256])]


def bits_of(number: int, width: int) -> list[int]:
    return [number >> place & 1 for place in range(width)]


def number_of(bits: list[int]) -> int:
    return sum(bit << place for place, bit in enumerate(bits))


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bfe(kind):
    """By the ISA's loop, bit for bit."""
    width = int(kind[1:])
    problems = [*itertools.product(AWKWARD[kind], FIELDS)]
    expected = []
    for value, (start, length) in problems:
        start, length, own = start & 255, length & 255, bits_of(value, width)
        sign = own[min(start + length - 1, width - 1)] if kind[0] == "s" and length else 0
        expected.append(number_of([own[start + i] if i < length and start + i < width else sign for i in range(width)]))
    values = np.array([value for value, _ in problems], dtype_of(kind))
    starts, lengths = (np.array([field[i] for _, field in problems], np.uint32) for i in (0, 1))
    for part in np.array_split(np.arange(len(problems)), -(-len(problems) // 1024)):
        found = compute(f"bfe.{kind}", dtype_of(kind), values[part], starts[part], lengths[part])
        np.testing.assert_array_equal(found, wrapped([expected[i] for i in part], kind))


@pytest.mark.parametrize("width", [32, 64])
def test_bfi(width):
    kind = f"u{width}"
    drawn = random.Random(width)
    problems = [(drawn.getrandbits(width), drawn.getrandbits(width), *field) for field in FIELDS for _ in range(3)]
    expected = []
    for value, into, start, length in problems:
        own, result = bits_of(value, width), bits_of(into, width)
        for i in range(length & 255):
            if (start & 255) + i < width and i < width:
                result[(start & 255) + i] = own[i]
        expected.append(number_of(result))
    a, b, c, d = (
        np.array(column, t)
        for column, t in zip(zip(*problems, strict=True), (kind, kind, "u32", "u32"), strict=True)
        for t in [dtype_of(t)]
    )
    np.testing.assert_array_equal(compute(f"bfi.b{width}", dtype_of(kind), a, b, c, d), wrapped(expected, kind))


def test_prmt():
    """Byte by byte; bit 3 of a choice takes the sign instead."""
    drawn = random.Random(0)
    problems = [[drawn.getrandbits(32) for _ in range(3)] for _ in range(200)]
    expected = []
    for low, high, chosen in problems:
        bytes_of = (high << 32 | low).to_bytes(8, "little")
        result = []
        for place in range(4):
            choice = chosen >> 4 * place & 15
            byte = bytes_of[choice & 7]
            result.append((255 if byte & 128 else 0) if choice & 8 else byte)
        expected.append(int.from_bytes(bytes(result), "little"))
    columns = [np.array(column, np.uint32) for column in zip(*problems, strict=True)]
    np.testing.assert_array_equal(compute("prmt.b32", "u4", *columns), np.array(expected, np.uint32))


@pytest.mark.parametrize(
    ("table", "function"),
    [(0xF0 & 0xCC & 0xAA, lambda a, b, c: a & b & c), (0xF0 ^ 0xCC ^ 0xAA, lambda a, b, c: a ^ b ^ c),
     ((0xF0 & ~0xCC | 0xAA) & 255, lambda a, b, c: a & ~b | c), (0, lambda a, b, c: a * 0),
     (255, lambda a, b, c: a | ~a)],
)  # fmt: skip
def test_lop3(table, function):
    a, b = pairs("u32")
    c = np.roll(a, 7) ^ b
    np.testing.assert_array_equal(compute("lop3.b32", "u4", a, b, c, table), function(a, b, c))


@pytest.mark.parametrize("width", [32, 64])
def test_counting_bits(width):
    values = np.array([v % 2**width for v in AWKWARD[f"u{width}"]], f"u{width // 8}")
    zeros = [width - int(v).bit_length() for v in values]
    np.testing.assert_array_equal(compute(f"clz.b{width}", "u4", values), np.array(zeros, np.uint32))
    ones = [bin(int(v)).count("1") for v in values]
    np.testing.assert_array_equal(compute(f"popc.b{width}", "u4", values), np.array(ones, np.uint32))


# ---------------------------------------------------------------- floating point

NAN, INF = math.nan, math.inf
FLOATS = [0.0, -0.0, 1.0, -1.0, 1.5, 3.0, NAN, INF, -INF, 1e-45, -1e-45, 1.17549421e-38, 1.17549435e-38, 3.4028235e38,
          -3.4028235e38, 1 / 3, 65504.0, 65520.0, 1e-7, 6e-8, 2.98e-8, 1e10]  # fmt: skip


def float_pairs() -> tuple[np.ndarray, np.ndarray]:
    values = np.array([*itertools.product(FLOATS, repeat=2)], np.float32)
    return values[:, 0].copy(), values[:, 1].copy()


def same_floats(ours: np.ndarray, right: np.ndarray) -> None:
    """To the bit, signs of zeros too; any NaN for NaN."""
    assert ours.dtype == right.dtype
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(right))
    unsigned = f"u{ours.dtype.itemsize}"
    there = ~np.isnan(right)
    np.testing.assert_array_equal(ours[there].view(unsigned), right[there].view(unsigned))


@pytest.mark.parametrize("instruction", ["add.f32", "sub.f32", "mul.f32", "div.rn.f32", "div.full.f32"])
def test_floats(instruction):
    a, b = float_pairs()
    function = {"add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div}[instruction[:3]]
    same_floats(compute(instruction, "f4", a, b), function(torch.from_numpy(a), torch.from_numpy(b)).numpy())


def test_subnormals_are_flushed_before_and_after():
    a, b = float_pairs()

    def flush(x):
        x = torch.from_numpy(x) if isinstance(x, np.ndarray) else x
        return torch.where(x.abs() < torch.finfo(torch.float32).tiny, torch.zeros_like(x).copysign(x), x)

    same_floats(compute("mul.ftz.f32", "f4", a, b), flush(flush(a) * flush(b)).numpy())
    assert (compute("mul.f32", "f4", a, b) != compute("mul.ftz.f32", "f4", a, b)).sum() > 5
    powers = np.array([0.0, 1.0, -1.0, -126.0, -127.0, -149.0, -150.0, 127.0, 128.0, INF, -INF, NAN], np.float32)
    same_floats(compute("ex2.approx.ftz.f32", "f4", powers), flush(torch.exp2(torch.from_numpy(powers))).numpy())
    same_floats(compute("ex2.approx.f32", "f4", powers), torch.exp2(torch.from_numpy(powers)).numpy())


def test_least_and_greatest_of_nan_and_zeros():
    """A number where there is one; with .NaN, NaN where there is one; -0 is below +0."""
    a, b = float_pairs()
    for verb, choose in (("min", min), ("max", max)):

        def right(x, y, choose=choose):
            if math.isnan(x) or math.isnan(y):
                return y if math.isnan(x) else x
            return choose((x, y), key=lambda one: (one, math.copysign(1, one)))

        expected = np.array([right(float(x), float(y)) for x, y in zip(a, b, strict=True)], np.float32)
        same_floats(compute(f"{verb}.f32", "f4", a, b), expected)
        same_floats(
            compute(f"{verb}.NaN.f32", "f4", a, b), np.where(np.isnan(a) | np.isnan(b), np.float32(NAN), expected)
        )


@pytest.mark.parametrize("verb", ["min", "max"])
@pytest.mark.parametrize("nan", ["", ".NaN"])
def test_least_and_greatest_of_three(verb, nan):
    a, b = float_pairs()
    c = np.roll(b, 5)
    two = f"{verb}{nan}.f32"
    same_floats(compute(two, "f4", a, b, c), compute(two, "f4", compute(two, "f4", a, b), c))


@pytest.mark.parametrize("flush", ["", ".ftz"])
def test_two_floats_in_a_register(flush):
    a, b = float_pairs()
    a, b = a[: len(a) // 2 * 2], b[: len(a) // 2 * 2]
    pairs = [np.ascontiguousarray(one).view(np.uint64) for one in (a, b, np.roll(a, 4))]
    for verb, count in (("add", 2), ("sub", 2), ("mul", 2), ("fma.rn", 3)):
        found = compute(f"{verb}{flush}.f32x2", "u8", *pairs[:count]).view(np.float32)
        same_floats(found, compute(f"{verb}{flush}.f32", "f4", *(pair.view(np.float32) for pair in pairs[:count])))


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_halves_and_floats_in_one_instruction(kind, dtype):
    """The halves are exact in fp32; what follows is an instruction of fp32."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(500, generator=generator).to(dtype) for _ in range(2))
    c = torch.randn(500, generator=generator).numpy()
    short = [t.view(torch.uint16).numpy() for t in (a, b)]
    long = [t.float().numpy() for t in (a, b)]
    for instruction, count in (("add.rn", 1), ("sub.rn", 1), ("add.rn.sat", 1), ("fma.rn", 2)):
        found = compute(f"{instruction}.f32.{kind}", "f4", *short[:count], c)
        np.testing.assert_array_equal(found, compute(f"{instruction}.f32", "f4", *long[:count], c))


def rounded(number: Fraction, digits: int) -> Fraction:
    """To so many binary digits, ties to even."""
    if number == 0:
        return number
    size = abs(number)
    exponent = size.numerator.bit_length() - size.denominator.bit_length() - digits
    unit = Fraction(2) ** exponent
    while size / unit >= 2**digits:
        unit *= 2
    while size / unit < 2 ** (digits - 1):
        unit /= 2
    return round(number / unit) * unit


def test_a_fused_product_is_rounded_once():
    """By exact fractions: the product's low bits are there when the sum takes the high ones away."""
    generator = np.random.default_rng(0)
    a, b, c = generator.standard_normal((3, 500)).astype(np.float32)
    c[:250] = -(a * b)[:250]
    exact = [Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c, strict=True)]
    found = compute("fma.rn.f32", "f4", a, b, c)
    np.testing.assert_array_equal(found, np.array([float(rounded(e, 24)) for e in exact], np.float32))
    assert (found != a * b + c).sum() > 250


@pytest.mark.parametrize(("kind", "dtype", "digits"), [("bf16", torch.bfloat16, 8), ("f16", torch.float16, 11)])
def test_halves_are_rounded_once(kind, dtype, digits):
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(1000, generator=generator).to(dtype) for _ in range(3))
    # ties of the product that a distant addend decides
    a[:64], b[:64] = 1 + torch.arange(64) * 2.0 ** (1 - digits), 1 + 2.0 ** (2 - digits)
    c[:64] = torch.where(torch.arange(64) % 2 == 0, 2.0**-14, -(2.0**-14))

    def bits(t):
        return t.view(torch.uint16).numpy()

    for verb, function in (("add", torch.add), ("mul", torch.mul), ("sub", torch.sub)):
        found = torch.from_numpy(compute(f"{verb}.{kind}", "u2", bits(a), bits(b))).view(dtype)
        assert torch.equal(found, function(a, b))
        one = [np.ascontiguousarray(bits(t)).view(np.uint32) for t in (a, b)]  # two in a register
        found = torch.from_numpy(compute(f"{verb}.{kind}x2", "u4", *one).view(np.uint16)).view(dtype)
        assert torch.equal(found, function(a, b))
    exact = [
        Fraction(x) * Fraction(y) + Fraction(z) for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
    ]
    right = torch.tensor([float(rounded(e, digits)) for e in exact], dtype=torch.float64)
    found = torch.from_numpy(compute(f"fma.rn.{kind}", "u2", bits(a), bits(b), bits(c))).view(dtype)
    normal = right.abs() > torch.finfo(dtype).tiny
    assert normal.sum() > 990 and torch.equal(found.double()[normal], right[normal])


def test_saturated_and_clamped():
    a, b = float_pairs()
    with np.errstate(all="ignore"):
        total = a + b
    same_floats(compute("add.sat.f32", "f4", a, b), np.where(np.isnan(total), np.float32(0), np.clip(total, 0, 1) + 0))
    c = np.roll(a, 3)
    plain = compute("fma.rn.f32", "f4", a, b, c)
    found = compute("fma.rn.relu.f32", "f4", a, b, c)
    np.testing.assert_array_equal(found, np.where(plain < 0, np.float32(0), plain))


ORDERED = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_comparisons_with_nan(kind):
    """Ordered ones are false where there is a NaN, unordered ones true."""
    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[kind]
    a, b = (torch.from_numpy(column).to(dtype) for column in float_pairs())
    given = [t.numpy() if kind == "f32" else t.view(torch.uint16).numpy() for t in (a, b)]
    numbers = list(zip(a.tolist(), b.tolist(), strict=True))
    for how, sign in ORDERED.items():
        right = {"==": float.__eq__, "!=": float.__ne__, "<": float.__lt__, "<=": float.__le__, ">": float.__gt__,
                 ">=": float.__ge__}[sign]  # fmt: skip
        for unordered in ("", "u"):
            expected = [bool(unordered) if math.isnan(x) or math.isnan(y) else right(x, y) for x, y in numbers]
            found = compute(f"setp.{how}{unordered}.{kind}", "pred", *given)
            assert found.tolist() == expected, f"{how}{unordered}"
    either = [math.isnan(x) or math.isnan(y) for x, y in numbers]
    assert compute(f"setp.nan.{kind}", "pred", *given).tolist() == either
    assert compute(f"setp.num.{kind}", "pred", *given).tolist() == [not one for one in either]


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64", "u16", "s16"])
def test_comparisons_of_integers(kind):
    a, b = pairs(kind)
    for how, right in (("lt", a < b), ("le", a <= b), ("gt", a > b), ("ge", a >= b), ("eq", a == b), ("ne", a != b)):
        np.testing.assert_array_equal(compute(f"setp.{how}.{kind}", "pred", a, b), right)


# ---------------------------------------------------------------- conversions

SINGLES = np.array(
    [*FLOATS, 2.5, 3.5, -2.5, 0.5, -0.5, 1.00390625, 1.01171875, 2147483520.0, 2147483648.0, -2147483648.0,
     -2147483904.0, 4294967040.0, 4294967296.0, 9.2233715e18, 9.223372e18, 1.8446743e19, 1.8446744e19, -9.223372e18,
     127.5, 128.0, 255.5, -128.5, 1e-40, 5.9604645e-08, 8.9406967e-08, 6.1035156e-05, 65519.996,
     3.3961775e38, 3.3895314e38],
    np.float32,
)  # fmt: skip


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_to_halves_and_back(kind, dtype):
    """Ties to even, overflow to infinity, subnormals kept: as PyTorch rounds."""
    generator = np.random.default_rng(1)
    some = generator.integers(0, 2**32, 900, dtype=np.uint32).view(np.float32)
    ties = (generator.integers(0, 2**16, 100, dtype=np.uint32) << 16 | 0x8000).view(np.float32)
    values = np.concatenate([SINGLES, some, ties])[:1024]
    right = torch.from_numpy(values).to(dtype)
    found = torch.from_numpy(compute(f"cvt.rn.{kind}.f32", "u2", values)).view(dtype)
    same_floats(found.float().numpy(), right.float().numpy())
    every = np.arange(65536, dtype=np.uint16)[::67].copy()
    back = torch.from_numpy(every).view(dtype).float().numpy()
    same_floats(compute(f"cvt.f32.{kind}", "f4", every), back)
    high, low = values, values[::-1].copy()
    both = compute(f"cvt.rn.{kind}x2.f32", "u4", high, low).view(np.uint16).reshape(-1, 2)
    found = torch.from_numpy(both.copy()).view(dtype).float().numpy()
    same_floats(found[:, 1].copy(), right.float().numpy())
    same_floats(found[:, 0].copy(), right.flip(0).float().numpy())


def test_to_tf32():
    """Ties away from zero; NaN stays NaN."""
    values = np.concatenate([SINGLES, np.array([0x3F801000, 0x3F803000, 0xBF801000, 0x3F800FFF], np.uint32).view("f4")])
    found = compute("cvt.rna.tf32.f32", "u4", values).view(np.float32)
    for ours, value in zip(found.tolist(), values.tolist(), strict=True):
        if math.isnan(value):
            assert math.isnan(ours)
        elif math.isinf(value) or abs(value) < 1e-37 or abs(value) > 3.4e38:
            assert ours == value or abs(value) < 1e-37 or math.isinf(ours)
        else:
            unit = Fraction(2) ** (math.frexp(value)[1] - 11)
            steps = Fraction(value) / unit
            away = math.floor(abs(steps) + Fraction(1, 2)) * (1 if steps > 0 else -1)
            assert Fraction(ours) == away * unit, value


@pytest.mark.parametrize("to", ["s32", "u32", "s64", "u64", "s16", "u16"])
@pytest.mark.parametrize("how", ["rzi", "rni", "rmi", "rpi"])
def test_floats_to_integers(how, to):
    """Beyond the range its end; NaN is 0, or the top bit where there are 64."""
    bits = int(to[1:])
    least, most = (-(1 << bits - 1), (1 << bits - 1) - 1) if to[0] == "s" else (0, (1 << bits) - 1)
    function = {"rzi": math.trunc, "rni": round, "rmi": math.floor, "rpi": math.ceil}[how]
    expected = []
    for value in SINGLES.tolist():
        if math.isnan(value):
            expected.append(1 << bits - 1 if bits == 64 else 0)
        elif math.isinf(value):
            expected.append(most if value > 0 else least)
        else:
            expected.append(min(max(function(value), least), most))
    found = compute(f"cvt.{how}.{to}.f32", dtype_of(to), SINGLES)
    np.testing.assert_array_equal(found, wrapped(expected, to))


@pytest.mark.parametrize("source", ["s32", "u32", "s64", "u64"])
def test_integers_to_floats(source):
    values, _ = pairs(source)
    exact = [Fraction(int(v)) for v in values]
    right = np.array([float(rounded(e, 24)) for e in exact], np.float32)
    np.testing.assert_array_equal(compute(f"cvt.rn.f32.{source}", "f4", values), right)
    right = torch.tensor([float(rounded(e, 8)) for e in exact], dtype=torch.bfloat16)
    found = torch.from_numpy(compute(f"cvt.rn.bf16.{source}", "u2", values)).view(torch.bfloat16)
    assert torch.equal(found, right)


@pytest.mark.parametrize(("to", "source"), [
    ("s64", "s32"), ("u64", "u32"), ("s64", "u32"), ("u64", "s32"), ("u32", "u64"), ("s32", "s64"), ("u16", "u32"),
    ("s32", "s16"), ("u32", "u16"), ("u32", "s16"), ("u16", "u64"), ("u64", "u16"),
])  # fmt: skip
def test_integers_to_integers(to, source):
    values, _ = pairs(source)
    expected = wrapped([int(v) for v in values], to)
    np.testing.assert_array_equal(compute(f"cvt.{to}.{source}", dtype_of(to), values), expected)


def test_integers_saturated():
    values, _ = pairs("s32")
    for to, least, most in (("u16", 0, 65535), ("s16", -32768, 32767), ("u32", 0, 2**32 - 1)):
        expected = [min(max(int(v), least), most) for v in values]
        found = compute(f"cvt.sat.{to}.s32", dtype_of(to), values)
        np.testing.assert_array_equal(found, np.array(expected, dtype_of(to)))
