"""Attention's kernels for Hopper, which only a tuned table turns on: where they are taken, and that they are right.

They run on a GPU of compute capability 9.0, or emulated, of which test_compiled.py takes a part:
`KERNELS_EMULATE=sm_90 pytest tests/kernels/test_attention_hopper.py`.
"""

import itertools
import math
import os
from dataclasses import replace

import pytest
import torch
from parity import differentiate, hold, hold_layout, incoming, inputs_of, misaligned, name_of, packed, same_bits, sliced
from test_attention_options import BACK, CASES, CONTIGUOUS, EVEN, NAMES, OPTIONS

from kernels import op, tiles
from kernels.attention_plan import plan_backward, plan_forward
from kernels.catalogue import ATTENTION, ATTENTION_QKVPACKED
from kernels.device import HAS_TRITON, INTERPRETED, TARGETS, Device
from kernels.op import Spec, plan_for

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
# BLOCK_Q, BLOCK_K, num_warps, num_stages, DESCRIPTORS, WARPGROUPS, TURNS, and forward OVERLAP
FORWARD_NUMBERS = {
    "turns": (64, 64, 4, 2, 1, 2, 1, 1),
    "wide": (64, 128, 4, 2, 1, 2, 0, 1),
    "three": (64, 64, 4, 3, 1, 3, 1, 1),
    "tall": (128, 32, 4, 2, 1, 2, 1, 1),
}
QUERY_NUMBERS = {
    "turns": (64, 64, 4, 2, 1, 2, 1),
    "wide": (64, 128, 4, 2, 1, 2, 0),
    "three": (64, 32, 4, 3, 1, 2, 1),
    "tall": (128, 32, 4, 2, 1, 2, 0),
}
KEY_NUMBERS = {
    "turns": (64, 64, 4, 2, 1, 2, 1),
    "wide": (128, 64, 4, 2, 1, 2, 0),
    "three": (32, 64, 4, 3, 1, 2, 0),
    "tall": (32, 128, 4, 2, 1, 2, 1),
}
KERNELS = {"_attention_forward_hopper", "_attention_backward_query_hopper", "_attention_backward_key_hopper"}


def tuned(which: str, base: Device = TARGETS["sm_90"], processors: int = 3) -> Device:
    """A device whose table has these numbers; few processors, so that a program has several tiles to do.

    Heads above 128 take less of what there is little of, and for dk and dv the kernel of every GPU.
    """
    name = f"warpgroups {which}"
    slots = {}
    numbers = {"forward": FORWARD_NUMBERS, "backward_query": QUERY_NUMBERS, "backward_key": KEY_NUMBERS}
    for slot, of in numbers.items():
        keys = [f"{kind}/{size}" for kind in ("half", "half-grouped") for size in (64, 128)]
        slots[f"attention.{slot}"] = dict.fromkeys(keys, of[which])
    slots["attention.forward"]["half/256"] = FORWARD_NUMBERS["turns"]
    slots["attention.backward_query"]["half/256"] = (64, 32, 4, 2, 1, 2, 1)
    tiles.try_out(name, slots)
    return replace(base, name=name, processors=processors)


# ---------------------------------------------------------------- where it is taken


def _planned(device: Device, dtype=torch.bfloat16, options=OPTIONS, **changed: Spec) -> list[op.Launch]:
    """The launches of both passes."""
    lse = Spec(CONTIGUOUS.shape[:3], (1024, 256, 1), torch.float32, True)
    statistics = Spec((*CONTIGUOUS.shape[:3], 2), (2048, 512, 2, 1), torch.float32, True)
    specs = {name: CONTIGUOUS._replace(dtype=dtype) for name in NAMES} | {
        "lse": lse,
        "statistics": statistics,
        "grad_lse": None,
        "seed": None,
    }
    specs |= changed
    return plan_forward(specs, options, device) + plan_backward(specs, options, device)


def test_taken_where_a_table_says_so():
    forward, by_query, by_key = _planned(tuned("three", processors=132))
    assert [launch.name for launch in (forward, by_query, by_key)] == [
        "_attention_forward_hopper", "_attention_backward_query_hopper", "_attention_backward_key_hopper",
    ]  # fmt: skip
    assert forward.constexprs["WARPGROUPS"] == 3 and forward.constexprs["STAGES"] == 3
    # 8 heads, 256 rows in tiles of 3 or 2 times 64
    assert [launch.grid for launch in (forward, by_query, by_key)] == [(16,)] * 3
    assert [launch.arguments["rounds"] for launch in (forward, by_query, by_key)] == [1] * 3
    for launch in (forward, by_query, by_key):
        assert launch.gluon and launch.scratch and launch.num_warps == 4
        assert [*launch.arguments, *launch.constexprs] == launch.kernel.arg_names
    for launch in _planned(tuned("three")):
        assert launch.grid == (3,) and launch.arguments["rounds"] == 6 and launch.arguments["tiles"] == 2


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({"key": CONTIGUOUS._replace(aligned=False)}, [False, False, False]),
        ({"query": CONTIGUOUS._replace(stride=(65536, 16384, 68, 1))}, [False, False, False]),
        ({"value": CONTIGUOUS._replace(stride=(65536, 0, 64, 1))}, [False, False, False]),
        ({"grad": CONTIGUOUS._replace(stride=(65536, 16384, 0, 1))}, [True, False, False]),
    ],
    ids=["base", "row", "expanded heads", "gradient"],
)
def test_the_default_where_a_descriptor_is_not_legal(change, taken):
    launches = _planned(tuned("turns"), **change)
    assert [launch.gluon for launch in launches] == taken
    for launch, default in zip(launches, _planned(TARGETS["sm_90"], **change), strict=True):
        assert launch.gluon or launch == default


def test_the_default_for_dq_where_lse_has_a_gradient():
    lse = Spec(CONTIGUOUS.shape[:3], (1024, 256, 1), torch.float32, True)
    assert [launch.gluon for launch in _planned(tuned("turns"), grad_lse=lse)] == [True, False, True]


def test_taken_on_hopper_and_for_16_bits_without_dropout_alone():
    def any_taken(device, *arguments, **options) -> bool:
        taken = {launch.gluon for launch in _planned(device, *arguments, **options)}
        assert len(taken) == 1
        return taken.pop()

    for arch in ("sm_80", "sm_89", "sm_100", "gfx942"):
        assert not any_taken(tuned("turns", TARGETS[arch]))
    assert not any_taken(tuned("turns", replace(TARGETS["sm_90"], arch="sm_103")))
    assert any_taken(tuned("turns"), torch.float16)
    assert not any_taken(tuned("turns"), torch.float32)
    seed = Spec((1,), (1,), torch.int64, True)
    assert not any_taken(tuned("turns"), options=OPTIONS | {"dropout_p": 0.1}, seed=seed)


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
EMULATED = os.environ.get("KERNELS_EMULATE") == "sm_90"
runs = pytest.mark.skipif(INTERPRETED or not (HERE or EMULATED), reason="needs a CUDA GPU of 9.0")
QUICK = ("one_over_a_tile-bfloat16-turns", "sees_nothing-float16-three", "not_causal-bfloat16-wide")


def _problems() -> list:
    cases = [case for case in CASES.values() if "dropout_p" not in case.options]
    found = []
    for case, dtype, which in itertools.product(cases, (torch.float16, torch.bfloat16), FORWARD_NUMBERS):
        if case.shapes["query"][-1] > 128 and which != "turns":
            continue  # needs more shared memory than there is
        name = f"{case.name}-{name_of(dtype)}-{which}"
        found.append(pytest.param(case, dtype, which, id=name, marks=() if name in QUICK else pytest.mark.slow))
    return found


@runs
@pytest.mark.parametrize(("case", "dtype", "which"), _problems())
def test_parity(case, dtype, which, device, loops):
    """Against float64, by the numerics contract, in guarded memory with NaN around every input."""
    with plan_for(tuned(which)), op.count_launches() as launched:
        hold(ATTENTION, case, dtype, device, {})
    assert which != "turns" or KERNELS & set(launched) or case.name in ("one_element", "prime")


@runs
@pytest.mark.parametrize(
    "which", [pytest.param(one, marks=() if one == "turns" else pytest.mark.slow) for one in FORWARD_NUMBERS]
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
    rows, rows_of_dq = (numbers[which][0] * numbers[which][5] for numbers in (FORWARD_NUMBERS, QUERY_NUMBERS))
    shapes = {"query": (1, 1, rows + 100, 64), "key": (1, 1, 65, 64), "value": (1, 1, 65, 64)}
    case = BACK._replace(shapes=shapes, options={"is_causal": True, "query_offset": -rows - 9})
    inputs = inputs_of(ATTENTION, case, torch.bfloat16, device)
    inputs["value"][:] = math.inf
    inputs["key"][:] = math.inf
    inputs["query"].requires_grad_()
    with plan_for(tuned(which)):
        out = ATTENTION.public(**inputs, **case.options)
        out[:, :, :rows].sum().backward()
    blind = rows // rows_of_dq * rows_of_dq  # queries of tiles in which none sees a key
    assert (out[:, :, :rows] == 0.0).all() and (inputs["query"].grad[:, :, :blind] == 0.0).all()
    inputs = inputs_of(ATTENTION, EVEN, torch.bfloat16, device)
    inputs["value"][0, 0, 3, 5] = math.inf
    with plan_for(tuned(which)):
        out = ATTENTION.public(**inputs)
    assert (out[..., 5] == math.inf).all() and out[..., :5].isfinite().all()


@runs
@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "of"),
    [(misaligned, "inputs"), (packed, "inputs"), (sliced, "grad")],
    ids=["misaligned", "packed", "sliced"],
)
def test_other_layouts(layout, of, device, loops):
    with plan_for(tuned("turns")):
        hold_layout(ATTENTION, CASES["one_over_a_tile"], torch.bfloat16, device, layout, of)


@runs
@pytest.mark.slow
@pytest.mark.parametrize("processors", [1, 2, 7, 132])
def test_the_same_bits_on_any_number_of_processors(processors, device, loops):
    """Who computes a tile changes nothing of it; 2 batches of 6 heads with 5 tiles each."""
    case = CASES["grouped"]._replace(
        shapes={"query": (2, 6, 600, 32), "key": (2, 2, 600, 32), "value": (2, 2, 600, 32)}
    )
    inputs = inputs_of(ATTENTION, case, torch.bfloat16, device)
    grad = incoming(ATTENTION, inputs, case.options)
    found = []
    for several in (3, processors):
        with plan_for(tuned("turns", processors=several)):
            found.append(differentiate(ATTENTION.public, ATTENTION, inputs, case.options, grad))
    assert all(same_bits(found[0][quantity], found[1][quantity]) for quantity in found[0])
