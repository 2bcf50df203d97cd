"""What the emulator must stop at, and what it must let pass: addresses, races, barriers, copies."""

import numpy as np
import pytest
import torch
from written import launch

from profiling.emulator.driver import merged, region_of
from profiling.emulator.memory import Fault, Global

AT_THREAD = "mad.wide.u32 %rd9, %r1, 4, %rd1;"
WARP = "shr.u32 %r8, %r1, 5;"  # the warp's number
SLOT = "shl.b32 %r9, %r1, 2;"  # a place in shared memory for each thread


def fails(says: str, body: str, *arrays, **settings) -> None:
    with pytest.raises(Fault, match=says):
        launch(body, *arrays, **settings)


def numbers(n: int = 32) -> np.ndarray:
    return np.arange(n, dtype=np.uint32)


# ---------------------------------------------------------------- addresses


def test_beyond_a_tensor():
    """One thread of all, one element too far; the message has the kernel, the instruction, its line and the tensor."""
    read = f"{AT_THREAD}\n.loc 1 7 1\nld.global.b32 %r2, [%rd9];"
    launch(read, numbers())
    told = (
        r"written: `ld.global.b32 %r2, \[%rd9\]` \(kernel.py:7\): 4 bytes outside .* byte 124 of array 0, which has 124"
    )
    fails(told, read, numbers(31))
    fails("byte 124 of array 0, which has 124", f"{AT_THREAD} st.global.b32 [%rd9], 1;", numbers(31))
    fails("outside of every tensor", f"{AT_THREAD} ld.global.b32 %r2, [%rd9+-4];", numbers())
    fails("outside of every tensor", "mov.u64 %rd9, 0; ld.global.b32 %r2, [%rd9];", numbers())
    # the last of several bytes counts
    fails("byte 8 of array 0, which has 12", "ld.global.b64 %rd9, [%rd1+8];", numbers(3))


def test_what_a_guard_holds_back_may_point_anywhere():
    launch(f"{AT_THREAD} setp.lt.u32 %p1, %r1, 31; @%p1 ld.global.b32 %r2, [%rd9];", numbers(31))
    launch("mov.u64 %rd9, 64; setp.lt.u32 %p1, %r1, 0; @%p1 st.global.b32 [%rd9], 1;", numbers())


@pytest.mark.parametrize("kind", ["b16", "b32", "b64", "v2.b32", "v4.b32"])
def test_misaligned(kind):
    registers = {"b16": "%rs2", "b32": "%r2", "b64": "%rd20", "v2.b32": "{%r2, %r3}", "v4.b32": "{%r2, %r3, %r4, %r5}"}
    width = {"b16": 2, "b32": 4, "b64": 8, "v2.b32": 8, "v4.b32": 16}[kind]
    launch(f"ld.global.{kind} {registers[kind]}, [%rd1];", numbers())
    fails(f"that {width} does not divide", f"ld.global.{kind} {registers[kind]}, [%rd1+{width // 2}];", numbers())
    launch(f"mov.u32 %r9, 32; ld.shared.{kind} {registers[kind]}, [%r9];", shared=64)
    half = f"mov.u32 %r9, 32; ld.shared.{kind} {registers[kind]}, [%r9+{width // 2}];"
    fails(f"shared memory that {width} does not divide", half, shared=64)


def test_beyond_shared_memory():
    """Its size is the program's own, though others' lies beside it."""
    write = f"{SLOT} st.shared.b32 [%r9], %r1;"
    launch(write, shared=128, grid=(2,))
    fails("byte 124 of shared memory, of which a program has 127", write, shared=127, grid=(2,))
    fails("byte -4 of shared memory", f"{SLOT} sub.s32 %r9, %r9, 4; ld.shared.b32 %r2, [%r9];", shared=128)


# ---------------------------------------------------------------- races

EXCHANGE = f"""
{SLOT} {AT_THREAD}
st.shared.b32 [%r9], %r1;
{{barrier}}
xor.b32 %r10, %r9, {{across}};
ld.shared.b32 %r2, [%r10];
st.global.b32 [%rd9], %r2;
"""


def test_reading_what_another_warp_wrote_without_a_barrier():
    found = numbers(64)
    launch(EXCHANGE.format(barrier="bar.sync 0;", across=128), found, threads=64, shared=256)
    assert found.tolist() == [t ^ 32 for t in range(64)]
    fails("reads shared memory that another warp writes", EXCHANGE.format(barrier="", across=128), found,
          threads=64, shared=256)  # fmt: skip
    launch(EXCHANGE.format(barrier="bar.warp.sync -1;", across=4), found, threads=64, shared=256)  # its own warp's
    assert found.tolist() == [t ^ 1 for t in range(64)]


READ_THEN_WRITTEN = f"""
{SLOT} {WARP}
mov.u32 %r10, 0;
ld.shared.b32 %r2, [%r10];
{{barrier}}
setp.eq.u32 %p1, %r1, {{writer}};
@%p1 st.shared.b32 [%r10], %r1;
"""


@pytest.mark.parametrize("writer", [0, 33, 64, 127])
def test_writing_what_other_warps_read_without_a_barrier(writer):
    """Whichever of the warps that read together writes: the last one too."""
    launch(READ_THEN_WRITTEN.format(barrier="bar.sync 0;", writer=writer), threads=128, shared=16)
    says = "writes shared memory that another warp reads"
    fails(says, READ_THEN_WRITTEN.format(barrier="", writer=writer), threads=128, shared=16)


def test_writing_what_another_warp_wrote_without_a_barrier():
    """The same value is no race, as when threads hold copies of one element."""
    body = f"""
    {WARP} mov.u32 %r10, 0;
    setp.eq.u32 %p1, %r8, 0;
    @%p1 st.shared.b32 [%r10], 5;
    {{barrier}}
    @!%p1 st.shared.b32 [%r10], {{value}};
    """
    launch(body.format(barrier="bar.sync 0;", value=6), threads=64, shared=16)
    launch(body.format(barrier="", value=5), threads=64, shared=16)
    fails("another warp writes", body.format(barrier="", value=6), threads=64, shared=16)


def test_several_threads_write_one_place():
    launch("st.global.b32 [%rd1], 3;", numbers(4))
    fails("several threads write array 0 in the same place", "st.global.b32 [%rd1], %r1;", numbers(4))
    fails("in the same place", "mov.u32 %r9, 0; st.shared.b32 [%r9], %r1;", shared=16)
    fails("in the same place", "and.b32 %r2, %r1, 15; mad.wide.u32 %rd9, %r2, 4, %rd1; st.global.b32 [%rd9], %r1;",
          numbers())  # fmt: skip


def test_programs_that_touch_one_place():
    """No barrier is there between programs, whether they run at the same time or not (200 do not)."""
    mine = "mov.u32 %r2, %ctaid.x; mad.wide.u32 %rd9, %r2, 4, %rd1; setp.eq.u32 %p1, %r1, 0;"
    own = f"{mine} @%p1 st.global.b32 [%rd9], %r2; ld.global.b32 %r3, [%rd9];"
    first = f"{mine} @%p1 st.global.b32 [%rd9], 1; bar.sync 0; ld.global.b32 %r3, [%rd1];"
    # everyone reads the first place and the last program writes it
    last = f"{mine} setp.eq.u32 %p2, %r2, {{}}; ld.global.b32 %r3, [%rd1]; {{}} @%p2 st.global.b32 [%rd1], 9;"
    for programs in (2, 200):
        launch(own, numbers(200), grid=(programs,))
        launch(f"{mine} st.global.b32 [%rd1], 7;", numbers(200), grid=(programs,))  # all the same
        fails("reads array 0 that another warp writes", first, numbers(200), grid=(programs,))
        fails("writes? array 0", f"{mine} st.global.b32 [%rd1], %r2;", numbers(200), grid=(programs,))
        for barrier in ("", "bar.sync 0;"):
            fails("writes array 0 that another warp reads", last.format(programs - 1, barrier), numbers(200),
                  grid=(programs,))  # fmt: skip


def test_unwatched_nothing_of_that_is_seen():
    """For counts alone; addresses are checked even so."""
    launch(EXCHANGE.format(barrier="", across=128), numbers(64), threads=64, shared=256, watched=False)
    fails("outside of every tensor", f"{AT_THREAD} st.global.b32 [%rd9], 1;", numbers(31), watched=False)


# ---------------------------------------------------------------- barriers


def test_a_barrier_that_some_threads_do_not_reach():
    body = f"{WARP} setp.eq.u32 %p1, %r8, 0; @%p1 bra $past; bar.sync 0; $past: add.u32 %r2, %r1, 1;"
    fails("a barrier that some threads of the program are not at", body, threads=64)
    fails("a barrier that some threads", "setp.lt.u32 %p1, %r1, 5; @%p1 bar.sync 0;")
    fails("a barrier that some threads", f"{WARP} setp.eq.u32 %p1, %r8, 0; @%p1 ret; bar.sync 0;", threads=64)
    # a barrier is its program's alone
    launch("mov.u32 %r2, %ctaid.x; setp.eq.u32 %p1, %r2, 1; @%p1 bra $past; bar.sync 0; $past: bar.sync 0;",
           threads=64, grid=(3,))  # fmt: skip
    # one path has one barrier, the other another: as good for whole warps, and not within one
    body = "setp.lt.u32 %p1, %r1, {}; @%p1 bra $other; bar.sync 0; bra.uni $end; $other: bar.sync 0; $end: ret;"
    launch(body.format(32), threads=64)
    fails("a barrier that some threads", body.format(5), threads=64)


@pytest.mark.parametrize(
    "instruction",
    ["shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;", "bar.warp.sync -1;", "elect.sync %r2|%p2, -1;",
     "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r2}, [%r9];",
     "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r2, %r3, %r4, %r5}, {%r6, %r6, %r6, %r6}, {%r6, %r6}, "
     "{%r7, %r7, %r7, %r7};"],
)  # fmt: skip
def test_threads_of_a_warp_apart_where_it_must_be_whole(instruction):
    before = "mov.u32 %r6, 0; mov.u32 %r7, 0; and.b32 %r9, %r1, 7; shl.b32 %r9, %r9, 4;"
    launch(f"{before} setp.lt.u32 %p1, %r1, 32; @%p1 {instruction}", threads=64, shared=256)
    some = f"{before} setp.lt.u32 %p1, %r1, 40; @%p1 {instruction}"
    fails("threads of one warp are apart", some, threads=64, shared=256)


# ---------------------------------------------------------------- copies

COPY = f"""
{SLOT} {AT_THREAD} mad.wide.u32 %rd10, %r1, 4, %rd2;
mov.u32 %r5, {{taken}};
cp.async.ca.shared.global [%r9], [%rd9], 4, %r5;
cp.async.commit_group;
{{between}}
xor.b32 %r10, %r9, {{across}};
ld.shared.b32 %r2, [%r10];
st.global.b32 [%rd10], %r2;
"""


def copied(between: str, across: int = 0, taken: int = 4) -> list[int]:
    found = numbers(64)
    launch(COPY.format(between=between, across=across, taken=taken), numbers(64) + 100, found, threads=64, shared=256)
    return found.tolist()


def test_reading_what_a_copy_has_not_brought():
    assert copied("cp.async.wait_group 0;") == [t + 100 for t in range(64)]
    assert copied("cp.async.wait_all; bar.sync 0;", across=128) == [(t ^ 32) + 100 for t in range(64)]
    assert copied("cp.async.wait_group 0;", taken=0) == [0] * 64
    before = "before the copy to it has been waited for"
    with pytest.raises(Fault, match=f"reads shared memory {before}"):
        copied("")
    with pytest.raises(Fault, match=before):
        copied("cp.async.wait_group 1;")
    with pytest.raises(Fault, match=before):  # a barrier is no wait
        copied("bar.sync 0;", across=128)
    with pytest.raises(Fault, match="another warp writes"):  # and each thread waits for its own
        copied("cp.async.wait_group 0;", across=128)
    with pytest.raises(Fault, match=f"writes shared memory {before}"):
        copied("st.shared.b32 [%r9], 1; cp.async.wait_group 0;")


def test_groups_are_waited_for_in_order():
    body = f"""
    {SLOT} {AT_THREAD} mad.wide.u32 %rd10, %r1, 4, %rd2;
    cp.async.ca.shared.global [%r9], [%rd9], 4;
    cp.async.commit_group;
    cp.async.ca.shared.global [%r9+128], [%rd9+128], 4;
    cp.async.commit_group;
    cp.async.wait_group 1;
    ld.shared.b32 %r2, [%r9{{place}}];
    st.global.b32 [%rd10], %r2;
    """
    found = numbers()
    launch(body.format(place=""), numbers(64) + 5, found, shared=256)
    assert found.tolist() == [t + 5 for t in range(32)]
    fails("before the copy", body.format(place="+128"), numbers(64), found, shared=256)


def test_a_copy_from_beyond_a_tensor():
    body = COPY.format(between="cp.async.wait_group 0;", across=0, taken=4)
    fails("byte 252 of array 0, which has 252", body, numbers(63), numbers(64), threads=64, shared=256)
    launch(COPY.format(between="cp.async.wait_group 0;", across=0, taken=0), numbers(1), numbers(64),
           threads=64, shared=256)  # of which nothing is read  # fmt: skip


MBARRIER = """
mov.u32 %r2, 0;
setp.eq.u32 %p1, %r1, 0;
{init}
bar.sync 0;
{arrive}
$wait:
mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2], 0;
@!%p2 bra $wait;
"""
INIT = "@%p1 mbarrier.init.shared::cta.b64 [%r2], {};"
ARRIVE = "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r2];"


def test_mbarriers():
    launch(MBARRIER.format(init=INIT.format(1), arrive=ARRIVE), threads=64, shared=16)
    twice = ARRIVE.replace("];", "], 2;")
    launch(MBARRIER.format(init=INIT.format(2), arrive=twice), threads=64, shared=16)
    fails("more arrivals at an mbarrier", MBARRIER.format(init=INIT.format(1), arrive=twice), shared=16)
    fails("was not initialised", MBARRIER.format(init="", arrive=ARRIVE), threads=64, shared=16)
    fails("was not initialised", MBARRIER.format(init="", arrive=""), threads=64, shared=16)


@pytest.mark.parametrize(
    ("count", "arrive"),
    [(1, ""), (2, ARRIVE), (1, "@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 128;")],
)
def test_an_mbarrier_that_nobody_completes(count, arrive):
    """Too few arrivals, or bytes that no copy brings."""
    body = MBARRIER.format(init=INIT.format(count), arrive=arrive)
    fails("waits for an mbarrier that nothing completes", body, threads=64, shared=16)


# ---------------------------------------------------------------- warps that do different things

PARTS = f"""
{WARP} {SLOT} {AT_THREAD}
setp.eq.u32 %p1, %r1, 0;
mov.u32 %r2, 512;
@%p1 mbarrier.init.shared::cta.b64 [%r2], 1;
bar.sync 0;
brx.idx %r8, $parts;
$parts: .branchtargets $first, $second, $second, $third;
$first:
setmaxnreg.dec.sync.aligned.u32 24;
st.shared.b32 [%r9], 7;
{{told}}
@%p1 mbarrier.arrive.shared::cta.b64 _, [%r2];
bra.uni $end;
$second:
{{first_wait}}
and.b32 %r10, %r9, 127;
ld.shared.b32 %r3, [%r10];
st.shared.b32 [%r9+1024], %r3;
{{between}}
xor.b32 %r11, %r9, 384;
ld.shared.b32 %r4, [%r11+1024];
st.global.b32 [%rd9], %r4;
bra.uni $end;
$third:
{{third}}
$end:
bar.sync 0;
"""
WAIT = """
$wait{0}:
mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2], {1};
@!%p2 bra $wait{0};
"""


WAITED = WAIT.format(0, 0)


def parts(told="", first_wait=WAITED, between="bar.sync 3, 64;", third="", order=None) -> list[int]:
    """Warp 0 writes for warps 1 and 2, who exchange what they have read; what they found."""
    found = numbers(128)
    body = PARTS.format(told=told, first_wait=first_wait, between=between, third=third)
    launch(body, found, threads=128, shared=2048, order=order)
    return found.tolist()


@pytest.mark.parametrize("order", [None, *range(5)])
def test_warps_that_do_different_things(order):
    assert parts(order=order) == [*range(32), *[7] * 64, *range(96, 128)]
    with pytest.raises(Fault, match=r"shared memory that another warp (reads|writes), with no barrier between"):
        parts(first_wait="", order=order)


def test_what_orders_warps_is_what_they_waited_for():
    """An mbarrier that somebody else waited for, and a barrier of others, order nothing."""
    raced = "shared memory that another warp writes, with no barrier between"
    with pytest.raises(Fault, match=f"reads {raced}"):
        parts(first_wait="")
    with pytest.raises(Fault, match=f"reads {raced}"):
        parts(between="")
    with pytest.raises(Fault, match=f"reads {raced}"):
        parts(third="and.b32 %r10, %r9, 127; ld.shared.b32 %r3, [%r10];")
    parts(third=WAIT.format(1, 0) + "and.b32 %r10, %r9, 127; ld.shared.b32 %r3, [%r10];")
    with pytest.raises(Fault, match="reads"):  # what is written after arriving is not told
        parts(told="@%p1 mbarrier.arrive.shared::cta.b64 _, [%r2]; st.shared.b32 [%r9], 7; setp.eq.u32 %p1, 1, 2;")


def test_warps_that_wait_for_each_other():
    """Each for what the other does next, and a barrier for more threads than come, and for fewer."""
    stuck = r"waits for an mbarrier that nothing completes|a barrier that some threads"
    with pytest.raises(Fault, match=stuck):
        parts(told="bar.sync 2, 96;")
    with pytest.raises(Fault, match=stuck):
        parts(told=WAIT.format(2, 0))
    with pytest.raises(Fault, match="a barrier that some threads"):
        parts(between="bar.sync 3, 128;")
    with pytest.raises(Fault, match="more threads at a barrier than the 32"):
        parts(between="bar.sync 3, 32;")


def test_a_branch_to_no_label():
    body = "mov.u32 %r2, {}; brx.idx %r2, $list; $list: .branchtargets $a, $b; $a: ret; $b: ret;"
    launch(body.format(1))
    fails("a branch to the label of number 2 of 2", body.format(2))


# ---------------------------------------------------------------- tensors as regions


def test_tensors_that_share_memory_are_one_region_with_both_names():
    """As the parts of a packed tensor are; what lies beyond them is outside, and a padded row's end is not."""
    whole = torch.zeros(4, 24)
    shared = merged([region_of("left", whole[:, :8]), region_of("right", whole[1:, 16:])])
    assert [(one.name, one.start, one.size) for one in shared] == [("left and right", whole.data_ptr(), 4 * 24 * 4)]
    apart = merged([region_of("b", whole[3]), region_of("a", whole[0]), region_of("none", whole[:0])])
    assert [(one.name, one.start - whole.data_ptr(), one.size) for one in apart] == [("a", 0, 96), ("b", 288, 96)]
    memory = Global(apart)
    found = memory.find(whole.data_ptr() + np.array([0, 92, 288]), 4)
    assert [(region.name, part.tolist()) for region, part in found] == [("a", [0, 1]), ("b", [2])]
    with pytest.raises(Fault, match="4 bytes outside of every tensor: byte 96 of a, which has 96"):
        memory.find(whole.data_ptr() + np.array([0, 96]), 4)
    with pytest.raises(Fault, match="no tensor"):
        Global([]).find(np.array([64]), 4)
