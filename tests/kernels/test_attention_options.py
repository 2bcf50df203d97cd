"""Attention with descriptors and overlap, the options that only a tuned table turns on: as right as without, to the bit
in the interpreter; descriptors only where they are legal; and compiled, the TMA unit and the caller's allocator.
"""

import itertools
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import forked
import pytest
import torch
from parity import (
    DTYPES,
    differentiate,
    hold,
    hold_layout,
    incoming,
    inputs_of,
    misaligned,
    name_of,
    packed,
    same_bits,
    sliced,
)

from kernels import tiles
from kernels.attention_plan import plan_backward, plan_forward
from kernels.catalogue import ATTENTION
from kernels.device import INTERPRETED, TARGETS, Device, facts
from kernels.op import Case, Spec, plan_for

ROOT = Path(__file__).resolve().parents[2]
KINDS = [kind + traits for kind in ("half", "ieee") for traits in ("", "-dropout", "-grouped", "-dropout-grouped")]


def tuned(descriptors: int, overlap: int, base: Device | None = None, block_q: int = 64, block_k: int = 32) -> Device:
    """A device whose table has these options for every kernel, with tiles small enough for several of each loop."""
    backward = [block_q // 2, block_q, 4, 2, descriptors, 0, 0]
    slots = {
        "attention.forward": [block_q, block_k, 4, 2, descriptors, 0, 0, overlap],
        "attention.backward_query": [block_q, block_k, 4, 2, descriptors, 0, 0],
        "attention.backward_key": backward,
    }
    keys = [f"{kind}/{size}" for kind, size in itertools.product(KINDS, (64, 128, 256))]
    name = f"descriptors {descriptors} overlap {overlap} {block_q} {block_k}"
    tiles.try_out(name, {slot: dict.fromkeys(keys, numbers) for slot, numbers in slots.items()})
    emulated = os.environ.get("KERNELS_EMULATE") or "sm_90"
    base = base or (facts(torch.device("cuda")) if torch.cuda.is_available() else TARGETS[emulated])
    return replace(base, name=name)


# ---------------------------------------------------------------- the same numbers

DROPOUT = Case("dropout", {"query": (1, 2, 66, 24), "key": (1, 1, 50, 24), "value": (1, 1, 50, 24)},
               {"dropout_p": 0.3, "enable_gqa": True})  # fmt: skip
# a whole tile of queries sees nothing
BACK = Case("back", {"query": (1, 1, 130, 64), "key": (1, 1, 65, 64), "value": (1, 1, 65, 64)},
            {"is_causal": True, "query_offset": -70})  # fmt: skip
EVEN = Case("even", {"query": (1, 1, 64, 16), "key": (1, 1, 128, 16), "value": (1, 1, 128, 16)}, {})
CASES = {case.name: case for case in (*ATTENTION.cases, DROPOUT, BACK, EVEN)}
QUICK = {
    "float32": ("sees_nothing", "back"),
    "float16": ("offset",),
    "bfloat16": ("one_over_a_tile", "cache", "even", "dropout"),
}


def _each_case(quick: dict) -> list:
    def problem(dtype, name):
        marks = () if name in quick.get(name_of(dtype), ()) else pytest.mark.slow
        return pytest.param(CASES[name], dtype, marks=marks, id=f"{name}-{name_of(dtype)}")

    return [problem(dtype, name) for dtype, name in itertools.product(DTYPES, CASES)]


@pytest.mark.parametrize(("case", "dtype"), _each_case(QUICK))
def test_the_options_change_nothing(case, dtype, device, loops):
    """Output and gradients, bit for bit in the interpreter, where the products' sums are the same."""
    inputs = inputs_of(ATTENTION, case, dtype, device)
    grad = incoming(ATTENTION, inputs, case.options)
    found = []
    for descriptors, overlap in itertools.product((0, 1), (0, 1)):
        torch.manual_seed(5)
        with plan_for(tuned(descriptors, overlap)):
            found.append(differentiate(ATTENTION.public, ATTENTION, inputs, case.options, grad))
    for other, (quantity, plain) in itertools.product(found[1:], found[0].items()):
        if INTERPRETED:
            assert same_bits(other[quantity], plain), quantity
        else:
            torch.testing.assert_close(other[quantity], plain)


QUICK_PARITY = {"float32": ("offset",), "bfloat16": ("one_over_a_tile",), "float16": ("sees_nothing",)}


@pytest.mark.parametrize(("case", "dtype"), _each_case(QUICK_PARITY))
def test_parity_with_both(case, dtype, device, loops):
    """Against float64, by the numerics contract, in guarded memory with NaN around every input."""
    if "dropout_p" in case.options:
        case = case._replace(options={name: value for name, value in case.options.items() if name != "dropout_p"})
    with plan_for(tuned(1, 1)):
        hold(ATTENTION, case, dtype, device, {})


@pytest.mark.parametrize("descriptors", [0, 1])
def test_where_nothing_is_seen_infinite_values_are_not_either(descriptors, device, loops):
    """Tiles of queries that see no key have nothing left to multiply: 0 times infinity would be NaN."""
    inputs = inputs_of(ATTENTION, BACK, torch.float32, device)
    inputs["value"][:] = math.inf
    with plan_for(tuned(descriptors, 1)):
        out = ATTENTION.public(**inputs, **BACK.options)
    assert (out[:, :, :64] == 0.0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_an_infinite_value_is_no_nan(dtype, device, loops):
    """The first tile's values are multiplied by its own p alone, not by zeros that stand for a tile before it."""
    inputs = inputs_of(ATTENTION, EVEN, dtype, device)
    inputs["value"][0, 0, 3, 5] = math.inf
    with plan_for(tuned(1, 1)):
        out = ATTENTION.public(**inputs)
    assert (out[..., 5] == math.inf).all() and out[..., :5].isfinite().all()


# ---------------------------------------------------------------- where descriptors are legal

CONTIGUOUS = Spec((2, 4, 256, 64), (65536, 16384, 64, 1), torch.bfloat16, True)
OPTIONS = {"dropout_p": 0.0, "is_causal": True, "scale": 0.125, "query_offset": 0, "allow_tf32": False}
NAMES = ("query", "key", "value", "out", "grad", "dquery", "dkey", "dvalue")


def _descriptors(device: Device, **changed: Spec) -> list[bool]:
    """Whether each launch of both passes takes them, from specs that are CONTIGUOUS but for these."""
    specs = dict.fromkeys(NAMES, CONTIGUOUS) | changed
    lse = Spec(CONTIGUOUS.shape[:3], (1024, 256, 1), torch.float32, True)
    statistics = Spec((*CONTIGUOUS.shape[:3], 2), (2048, 512, 2, 1), torch.float32, True)
    specs |= {"lse": lse, "statistics": statistics, "grad_lse": None, "seed": None}
    planned = plan_forward(specs, OPTIONS, device) + plan_backward(specs, OPTIONS, device)
    assert all(launch.scratch == launch.constexprs["DESCRIPTORS"] for launch in planned)
    return [launch.constexprs["DESCRIPTORS"] for launch in planned]


@pytest.mark.parametrize("name", ["query", "key", "value", "grad"])
@pytest.mark.parametrize(
    "change",
    [
        {"aligned": False},
        {"stride": (65540, 16384, 64, 1)},
        {"stride": (65536, 16388, 64, 1)},
        {"stride": (65536, 16384, 68, 1)},
        {"stride": (65536, 16384, 0, 1)},
        {"stride": (131072, 32768, 128, 2)},
    ],
    ids=["base", "batch", "head", "row", "rows that overlap", "within a row"],
)
def test_pointers_where_a_descriptor_is_not_legal(name, change):
    found = _descriptors(tuned(1, 1, TARGETS["sm_90"]), **{name: CONTIGUOUS._replace(**change)})
    assert found == ([True, False, False] if name == "grad" else [False, False, False])


def test_pointers_for_what_is_too_small():
    """Rows below 16 bytes, and no rows at all."""
    narrow, empty = (CONTIGUOUS._replace(shape=shape) for shape in ((2, 4, 256, 4), (2, 4, 0, 64)))
    for small in (dict.fromkeys(("query", "key", "value", "grad"), narrow), {"key": empty, "value": empty}):
        assert not any(_descriptors(tuned(1, 1, TARGETS["sm_90"]), **small))


def test_descriptors_from_compute_capability_9_on():
    def on(arch):
        return _descriptors(tuned(1, 0, replace(TARGETS[arch if arch in TARGETS else "sm_90"], arch=arch)))

    assert all(on("sm_90")) and all(on("sm_100")) and all(on("sm_103"))
    assert not any(on("sm_80") + on("sm_89") + on("gfx942"))


def test_none_by_default():
    assert not any(any(_descriptors(target)) for target in TARGETS.values())
    for case, target in itertools.product(ATTENTION.sizes, TARGETS.values()):
        planned = ATTENTION.plan(ATTENTION.inputs(case, torch.bfloat16, "meta"), case.options, target)
        assert not any(launch.scratch or launch.constexprs.get("OVERLAP") for launch in planned)


@pytest.mark.parametrize(
    ("layout", "of"),
    [(misaligned, "inputs"), (sliced, "grad"), (packed, "inputs")],
    ids=["misaligned", "sliced", "packed"],
)
def test_other_layouts_come_out_the_same(layout, of, device, loops):
    """The interpreter refuses a descriptor that is not legal; packed keys, as a GPT has them, are."""
    case = Case("layout", dict.fromkeys(("query", "key", "value"), (1, 2, 40, 24)), {"is_causal": True})
    with plan_for(tuned(1, 1)):
        hold_layout(ATTENTION, case, torch.float32, device, layout, of)


# ---------------------------------------------------------------- compiled

COMPILED = """
import dataclasses, json
import torch, triton
from triton.runtime import _allocation
from kernels import catalogue, op, tiles
from kernels.device import TARGETS
from profiling.compile import _disassemble
from profiling.host import stand_in
from profiling.instructions import sass_mix

tiles.try_out("trial", {"attention.forward": {"half/64": [128, 64, 8, 2, 1, 0, 0, 1]}})
driver, cubins = stand_in(), []
known = driver.utils.load_binary
driver.utils.load_binary = lambda name, cubin, *rest: (cubins.append(cubin), known(name, cubin, *rest))[1]
op._pretended = dataclasses.replace(TARGETS["sm_90"], name="trial")
attention = catalogue.ATTENTION
case = op.Case("c", dict.fromkeys(("query", "key", "value"), (1, 2, 256, 64)), {"is_causal": True})
inputs = attention.inputs(case, torch.bfloat16, "cpu")

def mine(size, alignment, stream):
    raise AssertionError("the caller's allocator was asked")

triton.set_allocator(mine)
asked, empty = [], torch.empty
def counted(*shape, **options):
    if options.get("dtype") == torch.uint8:
        asked.append((shape[0], str(options["device"])))
    return empty(*shape, **options)
torch.empty = counted
launched, counts = [], []
for turn in ("through Triton", "directly"):
    asked.clear()
    driver.launched = []
    attention.public(**inputs, **case.options)
    counts.append(list(asked))
    launched.append([len(one) for one in driver.launched])
    assert _allocation._allocator.get() is mine
(cubin,) = cubins
print(json.dumps({"asked": counts, "launched": launched, "instructions": sass_mix(_disassemble(cubin))}))
"""


def test_compiled_it_loads_by_the_tma_unit_with_memory_from_pytorch():
    """Compiled for sm_90 and started twice, the second time past Triton's launcher; the driver alone is a stand-in."""
    done = forked.run("-c", COMPILED)
    assert done.returncode == 0, done.stderr[-2000:]
    document = json.loads(done.stdout.splitlines()[-1])
    first, second = document["asked"]
    assert first == second and first == [[4 * 3 * 128, "cpu"]], first  # programs, tensors, bytes
    assert document["launched"][0] == document["launched"][1] and len(document["launched"][0]) == 1
    found = document["instructions"]
    assert found["tma"] == found["ldg"] >= 3 and found["tensor_core"] and not found["local"], found
