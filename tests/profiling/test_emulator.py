"""The emulator's threads: where they go, what they read and write, what they tell one another, and what is counted."""

import numpy as np
import pytest
from written import compute, launch

from profiling.emulator.ptx import Unsupported, parse

AT_THREAD = "mad.wide.u32 %rd9, %r1, 4, %rd1;"


def numbered(n: int = 32) -> np.ndarray:
    return np.arange(n, dtype=np.uint32)


# ---------------------------------------------------------------- control

COLLATZ = """
mov.u32 %r2, %ctaid.x;
mov.u32 %r3, %ntid.x;
mad.lo.u32 %r4, %r2, %r3, %r1;
add.u32 %r5, %r4, 1;
mov.u32 %r6, 0;
$again:
setp.eq.u32 %p1, %r5, 1;
@%p1 bra $done;
and.b32 %r7, %r5, 1;
setp.eq.u32 %p2, %r7, 1;
@%p2 bra $odd;
shr.u32 %r5, %r5, 1;
bra.uni $next;
$odd:
mad.lo.u32 %r5, %r5, 3, 1;
$next:
add.u32 %r6, %r6, 1;
bra.uni $again;
$done:
mad.wide.u32 %rd9, %r4, 4, %rd1;
st.global.b32 [%rd9], %r6;
"""


def collatz(n: int) -> int:
    steps = 0
    while n != 1:
        n, steps = 3 * n + 1 if n % 2 else n // 2, steps + 1
    return steps


@pytest.mark.parametrize(("threads", "programs"), [(32, 1), (128, 3), (64, 70)])
def test_threads_that_part_and_meet_again(threads, programs):
    """Each takes the steps of its own number, in programs more than run at once."""
    steps = np.zeros(threads * programs, np.uint32)
    launch(COLLATZ, steps, threads=threads, grid=(programs,))
    assert steps.tolist() == [collatz(n) for n in range(1, threads * programs + 1)]


def test_programs_of_different_length_and_a_grid_of_three():
    """A program loops as often as its place in the grid says; barriers are each program's own."""
    counted = np.zeros(2 * 3 * 4, np.uint32)
    body = """
    mov.u32 %r2, %ctaid.x; mov.u32 %r3, %ctaid.y; mov.u32 %r4, %ctaid.z;
    mov.u32 %r5, %nctaid.x; mov.u32 %r6, %nctaid.y;
    mad.lo.u32 %r7, %r4, %r6, %r3;
    mad.lo.u32 %r7, %r7, %r5, %r2;
    mov.u32 %r8, 0;
    $loop:
    setp.ge.u32 %p1, %r8, %r7;
    @%p1 bra $end;
    bar.sync 0;
    add.u32 %r8, %r8, 1;
    bra.uni $loop;
    $end:
    mad.wide.u32 %rd9, %r7, 4, %rd1;
    mul.lo.u32 %r9, %r8, 10;
    st.global.b32 [%rd9], %r9;
    """
    counts = launch(body, counted, threads=64, grid=(2, 3, 4))
    assert counted.tolist() == [10 * place for place in range(24)]
    assert counts.programs == counts.grid == 24


@pytest.mark.parametrize("met", ["bar.sync 0;", "shfl.sync.idx.b32 %r3, %r2, 3, 31, -1;"])
def test_a_rare_path_that_lies_behind_the_place_where_all_meet(met):
    """Compilers put what is seldom taken at the end: those who are at the barrier wait for those who come back."""
    found = numbered(64)
    body = f"""
    {AT_THREAD}
    mov.u32 %r3, 0;
    and.b32 %r4, %r1, 7;
    setp.eq.u32 %p1, %r4, 3;
    mov.u32 %r2, 10;
    @%p1 bra $rare;
    $meet:
    {met}
    add.u32 %r2, %r2, %r3;
    st.global.b32 [%rd9], %r2;
    bra.uni $end;
    $rare:
    mul.lo.u32 %r2, %r1, 100;
    bra.uni $meet;
    $end:
    """
    counts = launch(body, found, threads=64)
    given = [100 * t if t % 8 == 3 else 10 for t in range(64)]
    taken = [given[t // 32 * 32 + 3] if "shfl" in met else 0 for t in range(64)]
    assert found.tolist() == [a + b for a, b in zip(given, taken, strict=True)]
    assert counts.warps[8] == 2  # the meeting is once a warp


def test_some_programs_of_a_launch():
    written = np.zeros(100, np.uint32)
    body = "mov.u32 %r2, %ctaid.x; mad.wide.u32 %rd9, %r2, 4, %rd1; st.global.b32 [%rd9], 1;"
    counts = launch(body, written, grid=(100,), some=5)
    assert (counts.programs, counts.grid) == (5, 100)
    assert np.flatnonzero(written).tolist() == [0, 24, 49, 74, 99]


def test_a_guard_on_everything():
    """What a false guard keeps from running leaves registers and memory alone."""
    found = numbered()
    body = f"""
    and.b32 %r2, %r1, 1;
    setp.eq.u32 %p1, %r2, 1;
    mov.u32 %r3, 7;
    @%p1 add.u32 %r3, %r3, 100;
    @!%p1 mul.lo.u32 %r3, %r3, %r1;
    {AT_THREAD}
    @%p1 st.global.b32 [%rd9], %r3;
    setp.lt.u32 %p2, %r1, 4;
    @%p2 ret;
    mov.u32 %r4, 5;
    @!%p1 st.global.b32 [%rd9], %r4;
    """
    launch(body, found)
    assert found.tolist() == [107 if t % 2 else t if t < 4 else 5 for t in range(32)]


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("width", [1, 2, 4, 8, 16])
def test_loads_and_stores_of_every_width(width, space):
    """A thread's bytes go where the next one's do not."""
    drawn = np.random.default_rng(width).integers(0, 256, 64 * width, dtype=np.uint8)
    copied = np.zeros_like(drawn)
    vectors = {1: ("b8", "%rs2"), 2: ("b16", "%rs2"), 4: ("b32", "%r2"), 8: ("v2.b32", "{%r2, %r3}"),
               16: ("v4.b32", "{%r2, %r3, %r4, %r5}")}  # fmt: skip
    kind, registers = vectors[width]
    body = f"mad.wide.u32 %rd9, %r1, {width}, %rd1; mad.wide.u32 %rd10, %r1, {width}, %rd2;"
    body += f"ld.global.{kind} {registers}, [%rd9];"
    if space == "shared":  # through shared memory, to the thread across
        body += f"""
        mul.lo.u32 %r6, %r1, {width};
        xor.b32 %r8, %r6, {32 * width};
        st.shared.{kind} [%r6], {registers};
        bar.sync 0;
        ld.shared.{kind} {registers}, [%r8];
        """
    body += f"st.global.{kind} [%rd10], {registers};"
    launch(body, drawn, copied, threads=64, shared=64 * width)
    expected = drawn if space == "global" else np.roll(drawn, 32 * width)
    np.testing.assert_array_equal(copied, expected)


def test_a_vector_of_long_words_and_offsets():
    drawn = np.random.default_rng(0).integers(0, 2**63, 64, dtype=np.uint64)
    copied = np.zeros_like(drawn)
    body = """
    mad.wide.u32 %rd9, %r1, 16, %rd1; mad.wide.u32 %rd10, %r1, 16, %rd2;
    ld.global.v2.b64 {%rd11, %rd12}, [%rd9];
    st.global.b64 [%rd10+8], %rd11;
    add.s64 %rd10, %rd10, 32;
    st.global.b64 [%rd10+-32], %rd12;
    """
    launch(body, drawn, copied)
    np.testing.assert_array_equal(copied, drawn.reshape(-1, 2)[:, ::-1].ravel())


@pytest.mark.parametrize(("kind", "dtype"), [("s8", "i1"), ("u8", "u1"), ("s16", "i2"), ("u16", "u2")])
def test_what_is_narrower_than_its_register_fills_it(kind, dtype):
    narrow = np.array([0, 1, -1, 127, -128, 100] * 6, np.int64)[:32].astype(dtype)
    wide = np.zeros(32, np.int32)
    body = f"""
    mad.wide.u32 %rd9, %r1, {narrow.itemsize}, %rd1; mad.wide.u32 %rd10, %r1, 4, %rd2;
    ld.global.{kind} %r2, [%rd9];
    st.global.b32 [%rd10], %r2;
    """
    launch(body, narrow, wide)
    np.testing.assert_array_equal(wide, narrow.astype(np.int32))


def test_packing_and_unpacking():
    """The first register of a vector is the low part."""
    found = np.zeros(64, np.uint32)
    body = """
    mad.wide.u32 %rd9, %r1, 8, %rd1;
    mov.u32 %r2, 0x12345678;
    mov.b32 {%rs1, %rs2}, %r2;
    mov.b32 %r3, {%rs2, %rs1};
    mov.b64 %rd10, {%r1, %r3};
    mov.b64 {%r4, _}, %rd10;
    add.u32 %r4, %r4, 1;
    mov.b64 %rd11, {%r3, %r4};
    st.global.b64 [%rd9], %rd11;
    """
    launch(body, found)
    assert found[0::2].tolist() == [0x56781234] * 32 and found[1::2].tolist() == [t + 1 for t in range(32)]


def test_what_nobody_wrote_is_nan_beside_what_somebody_did():
    found = np.zeros((32, 2), np.float32)
    body = """
    mad.wide.u32 %rd9, %r1, 8, %rd1;
    mov.b32 %r2, 0f3F800000;
    mov.b64 %rd10, {%r2, %r3};
    add.rn.f32x2 %rd10, %rd10, %rd10;
    st.global.b64 [%rd9], %rd10;
    """
    launch(body, found)
    assert (found[:, 0] == 2.0).all() and np.isnan(found[:, 1]).all()


def test_constants_are_as_wide_as_what_takes_them():
    ones = np.ones(32, np.uint64)
    np.testing.assert_array_equal(compute("add.s64", "i8", ones, -3), np.full(32, -2))
    np.testing.assert_array_equal(compute("and.b32", "u4", ones.astype(np.uint32), "0xFFFFFFFF"), np.ones(32))
    np.testing.assert_array_equal(compute("add.f32", "f4", np.ones(32, np.float32), "0f3FC00000"), np.full(32, 2.5))
    np.testing.assert_array_equal(compute("mul.lo.s16", "i2", np.full(32, 300, np.int16), -2), np.full(32, -600))


# ---------------------------------------------------------------- shuffles


def shuffled(how: str, by: int, control: int, lane: int) -> int:
    """The lane that `lane` reads from, by the ISA's own program."""
    clamp, segments = control & 31, control >> 8 & 31
    most, least = lane & segments | clamp & ~segments, lane & segments
    source = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": least | by & ~segments & 31}[how]
    inside = source >= most if how == "up" else source <= most
    return source if inside else lane


@pytest.mark.parametrize("width", [32, 16, 8, 4])
@pytest.mark.parametrize("how", ["up", "down", "bfly", "idx"])
def test_shuffles(how, width):
    """Whole warps and parts of them, each with another number to give."""
    control = (32 - width) << 8 | (0 if how == "up" else 31)
    for by in (0, 1, 2, 5, 16, 31):
        found = np.zeros(64, np.uint32)
        body = f"""
        {AT_THREAD}
        mul.lo.u32 %r2, %r1, 1000;
        shfl.sync.{how}.b32 %r3, %r2, {by}, {control}, -1;
        st.global.b32 [%rd9], %r3;
        """
        launch(body, found, threads=64)
        expected = [1000 * (t // 32 * 32 + shuffled(how, by, control, t % 32)) for t in range(64)]
        assert found.tolist() == expected, f"{how} by {by}"


def test_a_sum_across_a_warp():
    found = np.zeros(64, np.uint32)
    steps = "".join(f"shfl.sync.bfly.b32 %r3, %r2, {by}, 31, -1; add.u32 %r2, %r2, %r3;" for by in (16, 8, 4, 2, 1))
    launch(f"{AT_THREAD} mul.lo.u32 %r2, %r1, %r1; {steps} st.global.b32 [%rd9], %r2;", found, threads=64)
    squares = [t * t for t in range(64)]
    assert found.tolist() == [sum(squares[:32])] * 32 + [sum(squares[32:])] * 32


def test_one_thread_of_each_warp_is_elected():
    found = np.zeros(64, np.uint32)
    body = f"{AT_THREAD} elect.sync %r2|%p1, -1; selp.b32 %r3, 1, 0, %p1; st.global.b32 [%rd9], %r3;"
    launch(body, found, threads=64)
    assert np.flatnonzero(found).tolist() == [0, 32]


# ---------------------------------------------------------------- counts


def totals(body: str, *arrays, **settings):
    return launch(body, *arrays, measured=True, **settings)


@pytest.mark.parametrize(("stride", "sectors"), [(4, 4), (8, 8), (16, 16), (32, 32), (128, 32), (0, 1)])
def test_sectors_of_a_warps_load(stride, sectors):
    """Neighbours share the 32 bytes that are moved for them."""
    read = np.zeros(1024, np.uint32)
    counts = totals(f"mad.wide.u32 %rd9, %r1, {stride}, %rd1; ld.global.b32 %r2, [%rd9];", read)
    assert sum(counts.sectors.values()) == sectors
    assert sum(counts.bytes.values()) == 32 * 4


def test_sectors_of_several_warps_and_of_a_store_under_a_guard():
    read = np.zeros(1024, np.uint32)
    counts = totals("ld.global.b32 %r2, [%rd1];", read, threads=128)
    assert sum(counts.sectors.values()) == 4
    body = f"""
    {AT_THREAD}
    setp.lt.u32 %p1, %r1, 9;
    @%p1 st.global.b32 [%rd9], 1;
    ld.global.b64 %rd10, [%rd1];
    """
    counts = totals(body, read)
    assert sorted(counts.sectors.values()) == [1, 2] and sorted(counts.bytes.values()) == [36, 256]


@pytest.mark.parametrize(
    ("kind", "stride", "passes", "least"),
    [("b32", 4, 1, 1), ("b32", 128, 32, 1), ("b32", 8, 2, 1), ("b32", 132, 1, 1), ("b32", 0, 1, 1), ("b16", 2, 1, 1),
     ("v4.b32", 16, 4, 4), ("v4.b32", 128, 32, 4), ("v4.b32", 144, 4, 4), ("v2.b32", 8, 2, 2), ("b64", 8, 2, 2)],
)  # fmt: skip
def test_passes_of_shared_memory(kind, stride, passes, least):
    """Of a bank, one word a pass; the same word goes to everyone."""
    registers = {"b32": "%r2", "b16": "%rs2", "b64": "%rd2", "v4.b32": "{%r2, %r3, %r4, %r5}", "v2.b32": "{%r2, %r3}"}
    body = f"mul.lo.u32 %r9, %r1, {stride}; ld.shared.{kind} {registers[kind]}, [%r9];"
    counts = totals(body, shared=8192)
    assert sum(counts.passes.values()) == passes
    assert sum(counts.conflicts.values()) == passes - least


def test_instructions_are_counted_once_a_warp():
    """Of warps that part, those that are there; of threads of one warp that part, both ways."""
    body = """
    setp.lt.u32 %p1, %r1, 40;
    @%p1 bra $few;
    add.u32 %r2, %r1, 1;
    $few:
    add.u32 %r3, %r1, 1;
    """
    counts = launch(body, threads=128, grid=(3,))
    assert counts.warps.tolist() == [12, 12, 12, 9, 12, 12]


# ---------------------------------------------------------------- what is not known


@pytest.mark.parametrize(
    "instruction",
    ["frobnicate.b32 %r2, %r1;", "add.sat.s32 %r2, %r1, %r1;", "add.cc.u32 %r2, %r1, %r1;", "add.rz.f32 %r2, %r1, %r1;",
     "cvt.rz.f16.f32 %rs2, %r1;", "cvt.rn.satfinite.e4m3x2.f32 %rs2, %r1, %r1;", "atom.global.add.u32 %r2, [%rd1], 1;",
     "lop3.or.b32 %r2|%p1, %r1, %r1, %r1, 128, %p2;", "setp.lt.s32 %p1|%p2, %r1, 4;",
     "setp.lt.and.s32 %p1, %r1, 4, %p2;", "prmt.b32.f4e %r2, %r1, %r1, %r1;", "bra $nowhere;", "bar.arrive 1, 64;",
     "ld.local.b32 %r2, [%r1];", "mov.u32 %r2, %pm0;",
     "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r2}, {%r3}, {%r4}, {%r5};", "cvt.rn.bf16x2.e4m3x2 %r2, %rs1;"],
)  # fmt: skip
def test_an_instruction_that_is_not_known(instruction):
    """Refused before anything runs, by its own text and its line of the source."""
    with pytest.raises(Unsupported) as told:
        launch(f"\n.loc 1 42 7\n{instruction}")
    assert instruction.split()[0] in str(told.value) or "%pm0" in str(told.value)


def test_the_line_of_the_source_is_named():
    with pytest.raises(Unsupported, match=r"frobnicate.b32 %r2, %r1` \(kernel.py:42\)"):
        launch("\n.loc 1 42 7\nfrobnicate.b32 %r2, %r1;")


def test_what_is_no_ptx():
    with pytest.raises(ValueError, match="no kernel"):
        parse("int main() {}")
    with pytest.raises(ValueError, match="no end"):
        parse(".target sm_90\n.visible .entry k() {\nret;")
    with pytest.raises(ValueError, match="not an instruction"):
        parse(".target sm_90\n.visible .entry k() {\n%r1 = 5;\n}")


def test_scopes_have_registers_of_their_own():
    """As inline assembly declares them, twice the same name."""
    found = np.zeros(32, np.uint32)
    body = f"""
    {AT_THREAD}
    {{ .reg .b32 mine; add.u32 mine, %r1, 5; mov.u32 %r2, mine; }}
    {{ .reg .b32 mine; .reg .pred p; setp.lt.u32 p, %r1, 3; selp.b32 mine, 1, 2, p; add.u32 %r2, %r2, mine; }}
    st.global.b32 [%rd9], %r2;
    """
    launch(body, found)
    assert found.tolist() == [t + 5 + (1 if t < 3 else 2) for t in range(32)]
