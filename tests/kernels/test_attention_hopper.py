"""Attention's forward kernel for Hopper, which only a tuned table turns on: where it is taken, and that it is right.

It runs on a GPU of compute capability 9.0, or emulated, of which test_compiled.py takes a part:
`KERNELS_EMULATE=sm_90 pytest tests/kernels/test_attention_hopper.py`.
"""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from parity import hold, hold_layout, inputs_of, misaligned, name_of, packed, same_bits
from test_attention_options import BACK, CASES, CONTIGUOUS, EVEN, OPTIONS

from kernels import op, tiles
from kernels.attention import FORWARD, Tile, plan_forward
from kernels.catalogue import ATTENTION, ATTENTION_QKVPACKED
from kernels.device import HAS_TRITON, INTERPRETED, TARGETS, Device
from kernels.op import Spec, plan_for

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
NUMBERS = {  # BLOCK_Q, BLOCK_K, num_warps, num_stages, DESCRIPTORS, OVERLAP, WARPGROUPS, TURNS
    "turns": (64, 64, 4, 2, 1, 1, 2, 1),
    "wide": (64, 128, 4, 2, 1, 1, 2, 0),
    "three": (64, 64, 4, 3, 1, 1, 3, 1),
    "tall": (128, 32, 4, 2, 1, 1, 2, 1),
}


def tuned(which: str, base: Device = TARGETS["sm_90"], processors: int = 3) -> Device:
    """A device whose table has one of NUMBERS; few processors, so that a program has several tiles to do."""
    name = f"warpgroups {which}"
    keys = [f"half/{size}" for size in (64, 128, 256)]
    tiles.try_out(name, {"attention.forward": dict.fromkeys(keys, NUMBERS[which])})
    return replace(base, name=name, processors=processors)


# ---------------------------------------------------------------- where it is taken


def _planned(device: Device, dtype=torch.bfloat16, options=OPTIONS, **changed: Spec) -> op.Launch:
    specs = {name: CONTIGUOUS._replace(dtype=dtype) for name in ("query", "key", "value", "out")} | changed
    specs |= {"lse": Spec(CONTIGUOUS.shape[:3], (1024, 256, 1), torch.float32, True), "seed": None}
    (launch,) = plan_forward(specs, options, device)
    return launch


def test_taken_where_a_table_says_so():
    launch = _planned(tuned("three", processors=132))
    assert launch.name == "_attention_forward_hopper" and launch.gluon and launch.scratch
    assert launch.constexprs["WARPGROUPS"] == 3 and launch.constexprs["STAGES"] == 3 and launch.num_warps == 4
    assert launch.grid == (16,)  # 8 heads, 256 queries in tiles of 3 * 64
    assert _planned(tuned("three")).grid == (3,)
    assert list(launch.arguments) == launch.kernel.arg_names[: len(launch.arguments)]
    assert set(launch.constexprs) == set(launch.kernel.arg_names[len(launch.arguments) :])


@pytest.mark.parametrize(
    "change",
    [{"key": CONTIGUOUS._replace(aligned=False)}, {"query": CONTIGUOUS._replace(stride=(65536, 16384, 68, 1))}],
    ids=["base", "row"],
)
def test_the_default_where_a_descriptor_is_not_legal(change):
    launch = _planned(tuned("turns"), **change)
    default = Tile(*FORWARD["sm_90"]["half"][64])
    assert launch.name == "_attention_forward" and not launch.gluon
    assert (launch.constexprs["BLOCK_Q"], launch.constexprs["BLOCK_K"]) == default[:2]
    assert (launch.num_warps, launch.num_stages) == default[2:4]
    assert not launch.constexprs["DESCRIPTORS"] and not launch.constexprs["OVERLAP"]


def test_taken_on_hopper_and_for_16_bits_without_dropout_alone():
    for arch in ("sm_80", "sm_89", "sm_100", "gfx942"):
        assert not _planned(tuned("turns", TARGETS[arch])).gluon
    assert not _planned(tuned("turns", replace(TARGETS["sm_90"], arch="sm_103"))).gluon
    assert _planned(tuned("turns"), torch.float16).gluon
    assert not _planned(tuned("turns"), torch.float32).gluon
    seed = Spec((1,), (1,), torch.int64, True)
    assert not _planned(tuned("turns"), options=OPTIONS | {"dropout_p": 0.1}, seed=seed).gluon


def test_never_by_default():
    for entry, target in itertools.product((ATTENTION, ATTENTION_QKVPACKED), TARGETS.values()):
        for case in (*entry.cases, *entry.sizes):
            planned = entry.plan(entry.inputs(case, torch.bfloat16, "meta"), case.options, target)
            assert not any(launch.gluon for launch in planned)


@pytest.mark.interpreted
def test_the_interpreter_says_that_it_cannot(device, loops):
    inputs = inputs_of(ATTENTION, EVEN, torch.bfloat16, device)
    with plan_for(tuned("turns")), pytest.raises(RuntimeError, match="Gluon, which Triton's interpreter does not run"):
        ATTENTION.public(**inputs)


# ---------------------------------------------------------------- that it is right

HERE = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
runs = pytest.mark.skipif(INTERPRETED or (torch.cuda.is_available() and not HERE), reason="needs a CUDA GPU of 9.0")
QUICK = ("one_over_a_tile-bfloat16-turns", "sees_nothing-float16-three", "not_causal-bfloat16-wide")


def _problems() -> list:
    cases = [case for case in CASES.values() if "dropout_p" not in case.options]
    found = []
    for case, dtype, which in itertools.product(cases, (torch.float16, torch.bfloat16), NUMBERS):
        if case.shapes["query"][-1] > 128 and which != "turns":
            continue  # needs more shared memory than there is
        name = f"{case.name}-{name_of(dtype)}-{which}"
        found.append(pytest.param(case, dtype, which, id=name, marks=() if name in QUICK else pytest.mark.slow))
    return found


@runs
@pytest.mark.parametrize(("case", "dtype", "which"), _problems())
def test_parity(case, dtype, which, device, loops):
    """Against float64, by the numerics contract, in guarded memory with NaN around every input."""
    with plan_for(tuned(which)):
        hold(ATTENTION, case, dtype, device, {})


@runs
@pytest.mark.parametrize(
    "which", [pytest.param(one, marks=() if one == "turns" else pytest.mark.slow) for one in NUMBERS]
)
def test_log_sum_exp_is_that_of_the_other_kernel(which, device, loops):
    for case in (CASES["offset"], BACK, CASES["grouped"]):
        inputs = inputs_of(ATTENTION, case, torch.bfloat16, device)
        expected = ATTENTION.public(**inputs, **case.options, return_lse=True)[1]
        with plan_for(tuned(which)), op.count_launches() as launched:
            found = ATTENTION.public(**inputs, **case.options, return_lse=True)[1]
        assert list(launched) == ["_attention_forward_hopper"]
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@runs
@pytest.mark.parametrize("which", ["turns", pytest.param("three", marks=pytest.mark.slow)])
def test_infinite_values(which, device, loops):
    """A tile that sees no key has nothing to multiply: 0 times infinity would be NaN. One that is seen is infinite."""
    rows = NUMBERS[which][0] * NUMBERS[which][6]
    shapes = {"query": (1, 1, rows + 100, 64), "key": (1, 1, 65, 64), "value": (1, 1, 65, 64)}
    case = BACK._replace(shapes=shapes, options={"is_causal": True, "query_offset": -rows - 9})
    inputs = inputs_of(ATTENTION, case, torch.bfloat16, device)
    inputs["value"][:] = math.inf
    with plan_for(tuned(which)):
        out = ATTENTION.public(**inputs, **case.options)
    assert (out[:, :, :rows] == 0.0).all()
    inputs = inputs_of(ATTENTION, EVEN, torch.bfloat16, device)
    inputs["value"][0, 0, 3, 5] = math.inf
    with plan_for(tuned(which)):
        out = ATTENTION.public(**inputs)
    assert (out[..., 5] == math.inf).all() and out[..., :5].isfinite().all()


@runs
@pytest.mark.slow
@pytest.mark.parametrize("layout", [misaligned, packed])
def test_other_layouts(layout, device, loops):
    with plan_for(tuned("turns")):
        hold_layout(ATTENTION, CASES["one_over_a_tile"], torch.bfloat16, device, layout, "inputs")


@runs
@pytest.mark.slow
@pytest.mark.parametrize("processors", [1, 2, 7, 132])
def test_the_same_bits_on_any_number_of_processors(processors, device, loops):
    """Who computes a tile changes nothing of it; 2 batches of 6 heads with 5 tiles each."""
    case = CASES["grouped"]._replace(
        shapes={"query": (2, 6, 600, 32), "key": (2, 2, 600, 32), "value": (2, 2, 600, 32)}
    )
    inputs = inputs_of(ATTENTION, case, torch.bfloat16, device)
    found = []
    for several in (3, processors):
        with plan_for(tuned("turns", processors=several)):
            found.append(ATTENTION.public(**inputs, **case.options))
    assert same_bits(*found)
