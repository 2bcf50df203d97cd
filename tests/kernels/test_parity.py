"""Every op, case and dtype against PyTorch and float64 by the numerics contract; memory, layouts, repetition."""

import dataclasses
import json
import math

import pytest
import torch
from parity import (
    DTYPES,
    LAYOUTS,
    as_tuple,
    case_of,
    differentiate,
    hold,
    hold_layout,
    hold_repeats,
    hold_retained_graph,
    hold_some_gradients,
    incoming,
    inputs_of,
    name_of,
    read_caps,
    torch_functions,
)

from kernels import catalogue
from kernels.device import INTERPRETED, TARGETS
from kernels.op import Case, plan_for

OPS = {op.name: op for op in catalogue.OPS}
DIFFERENTIABLE = [op for op in catalogue.OPS if op.differentiable]
CASES = [(name, case.name) for name, op in OPS.items() for case in op.cases]


@pytest.fixture(scope="module")
def caps(request, ratios):
    """The committed caps; or none, and the run's errors are written instead, with --measure-caps."""
    path = request.config.getoption("--measure-caps")
    yield None if path else read_caps()
    if path:
        table = {}
        for (op, dtype, quantity), worst in sorted(ratios.items()):
            # a quarter of room: the errors of another CPU and version differ by less
            cap = {measure: float(f"{1.25 * worst[f'error_{measure}']:.3g}") for measure in ("max", "rms")}
            table.setdefault(op, {}).setdefault(dtype, {})[quantity] = cap
        with open(path, "w") as file:
            json.dump({"caps": table}, file, indent=1)


@pytest.mark.parametrize(("op", "case"), CASES, ids=lambda value: value)
def test_reference_is_pytorchs_function_in_float64(op, case):
    op, case = OPS[op], case_of(OPS[op], case)
    inputs = inputs_of(op, case, torch.float64, "cpu")
    grad = incoming(op, inputs, case.options)
    ours = differentiate(op.reference, op, inputs, case.options, grad)
    for function in torch_functions(op):
        theirs = differentiate(function, op, inputs, case.options, grad)
        for quantity, exact in theirs.items():
            torch.testing.assert_close(ours[quantity], exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_the_drawn_inputs_are_what_pytorch_takes(op):
    """Class weights in the logits' dtype among them: benchmarks and compilation see the problem that PyTorch has."""
    for case in op.cases:
        inputs = op.inputs(case, torch.bfloat16, "cpu")
        if sum(tensor.numel() for tensor in inputs.values()) < 50_000:
            torch_functions(op)[0](**inputs, **case.options)
        meta = op.inputs(case, torch.bfloat16, "meta")
        assert {name: tensor.dtype for name, tensor in meta.items()} == {name: t.dtype for name, t in inputs.items()}


def _parity_problems() -> list:
    """By default fp16, which takes the paths and tiles of bf16, with every third of an op's cases."""
    problems = []
    for dtype in DTYPES:
        for name, op in OPS.items():
            for place, case in enumerate(op.cases):
                marks = pytest.mark.slow if dtype == torch.float16 and place % 3 else ()
                label = f"{name}-{case.name}-{name_of(dtype)}"
                problems.append(pytest.param(name, case.name, dtype, marks=marks, id=label))
    return problems


@pytest.mark.parametrize(("op", "case", "dtype"), _parity_problems())
def test_parity(op, case, dtype, device, ratios, caps):
    hold(OPS[op], case_of(OPS[op], case), dtype, device, ratios, caps)


# ---------------------------------------------------------------- the tiles that GPUs get, in the interpreter

TILES = {  # several tiles of every loop, one of them partly filled
    "scaled_dot_product_attention": [
        Case("d64", {"query": (1, 2, 150, 64), "key": (1, 1, 150, 64), "value": (1, 1, 150, 64)},
             {"is_causal": True, "enable_gqa": True}),
        Case("d64-even", {"query": (1, 1, 256, 64), "key": (1, 1, 256, 64), "value": (1, 1, 256, 64)},
             {"is_causal": True}),
        Case("d20-offset", {"query": (1, 1, 70, 20), "key": (1, 1, 203, 20), "value": (1, 1, 203, 20)},
             {"is_causal": True, "query_offset": 91}),
        Case("d16-full", {"query": (2, 1, 40, 16), "key": (2, 1, 77, 16), "value": (2, 1, 77, 16)}, {}),
        Case("d96-back", {"query": (1, 1, 130, 96), "key": (1, 1, 65, 96), "value": (1, 1, 65, 96)},
             {"is_causal": True, "query_offset": -29}),
        Case("d130", {"query": (1, 1, 67, 130), "key": (1, 1, 67, 130), "value": (1, 1, 67, 130)},
             {"is_causal": True}),
    ],
    "scaled_dot_product_attention_qkvpacked": [
        Case("d64", {"qkv": (1, 150, 3, 2, 64)}, {"is_causal": True}), Case("d20", {"qkv": (1, 70, 3, 2, 20)}, {}),
    ],
    "decode_attention": [
        Case(name, {"query": (3, h, 1, d), "key_cache": (3, kv, t, d), "value_cache": (3, kv, t, d), "lengths": (3,)},
             {"enable_gqa": h > kv})
        for name, h, kv, t, d in (
            ("single-d64", 1, 1, 700, 64), ("single-d37", 2, 2, 150, 37), ("group-d128", 3, 1, 300, 128),
            ("group-d16", 6, 2, 150, 16), ("single-d200", 1, 1, 90, 200), ("group-d200", 2, 1, 70, 200),
        )
    ],
    "layer_norm": [
        Case(f"{rows}x{n}", {"input": (rows, n), "weight": (n,), "bias": (n,)}, {"normalized_shape": (n,)})
        for rows, n in ((50, 65), (9, 768), (3, 5000), (2, 8200), (2, 16_500))
    ],
    "add_layer_norm": [
        Case(f"{rows}x{n}", {"input": (rows, n), "residual": (rows, n), "weight": (n,), "bias": (n,)},
             {"normalized_shape": (n,)})
        for rows, n in ((50, 65), (9, 768), (3, 5000), (2, 8200), (2, 16_500))
    ],
    "cross_entropy": [
        Case("65", {"input": (70, 65), "target": (70,)}, {"ignore_index": -100}),
        Case("9001", {"input": (3, 9001), "target": (3,), "weight": (9001,)}, {"label_smoothing": 0.1}),
    ],
    "linear_cross_entropy": [
        Case("65", {"input": (70, 24), "linear_weight": (65, 24), "target": (70,)}, {"ignore_index": -100}),
        Case("9001", {"input": (3, 8), "linear_weight": (9001, 8), "target": (3,), "linear_bias": (9001,),
                      "weight": (9001,)}, {"label_smoothing": 0.1}),
        Case("5000-none", {"input": (3, 8), "linear_weight": (5000, 8), "target": (3,)}, {"reduction": "none"}),
    ],
}  # fmt: skip


def _tile_problems() -> list:
    problems = []
    for name, cases in TILES.items():
        for case in cases:
            for arch in TARGETS:
                for dtype in (torch.float32, torch.bfloat16):
                    # the default run takes the main target; attention's fp32 tiles are small, and many
                    main = arch == "sm_90" and (dtype == torch.bfloat16 or case.name in ("d20-offset", "9x768", "65"))
                    long = case.name == "2x16500" or (name == "add_layer_norm" and case.name == "2x8200")
                    marks = () if main and not long else pytest.mark.slow
                    label = f"{name}-{case.name}-{arch}-{name_of(dtype)}"
                    problems.append(pytest.param(name, case, arch, dtype, marks=marks, id=label))
    return problems


tiles_alone = pytest.mark.skipif(not INTERPRETED, reason="the device's own tiles run in every other test")


@tiles_alone
@pytest.mark.parametrize(("op", "case", "arch", "dtype"), _tile_problems())
def test_parity_of_a_gpus_tiles(op, case, arch, dtype, device):
    with plan_for(TARGETS[arch]):
        hold(OPS[op], case, dtype, device, {})


@tiles_alone
@pytest.mark.parametrize("op", ["layer_norm", "add_layer_norm"])
def test_parity_of_rows_too_long_to_be_held_forward(op, device):
    """The input's gradient alone: of 2 x 8200, above, the parameters' are made by the same kernels and tiles."""
    (case,) = [case for case in TILES[op] if case.name == "2x16500"]
    of_inputs = tuple(name for name in OPS[op].differentiable if name in ("input", "residual"))
    with plan_for(TARGETS["sm_90"]):
        hold(dataclasses.replace(OPS[op], differentiable=of_inputs), case, torch.bfloat16, device, {})


# ---------------------------------------------------------------- layouts

LAID_OUT = {  # every input, several rows, nothing of size 1
    "scaled_dot_product_attention": Case(
        "grouped", {"query": (2, 2, 21, 16), "key": (2, 1, 13, 16), "value": (2, 1, 13, 16)},
        {"is_causal": True, "enable_gqa": True},
    ),
    "scaled_dot_product_attention_qkvpacked": Case("heads", {"qkv": (2, 13, 3, 2, 16)}, {"is_causal": True}),
    "decode_attention": Case(
        "grouped",
        {"query": (3, 4, 1, 16), "key_cache": (3, 2, 13, 16), "value_cache": (3, 2, 13, 16), "lengths": (3,)},
        {"enable_gqa": True},
    ),
    "layer_norm": Case(
        "affine", {"input": (3, 5, 24), "weight": (24,), "bias": (24,)}, {"normalized_shape": (24,)}
    ),
    "add_layer_norm": Case(
        "affine", {"input": (3, 5, 24), "residual": (3, 5, 24), "weight": (24,), "bias": (24,)},
        {"normalized_shape": (24,)},
    ),
    "cross_entropy": Case(
        "pixels", {"input": (5, 24, 3), "target": (5, 3), "weight": (24,)},
        {"reduction": "none", "label_smoothing": 0.1, "ignore_index": 2},
    ),
    "linear_cross_entropy": Case(
        "tokens",
        {"input": (15, 24), "linear_weight": (40, 24), "target": (15,), "linear_bias": (40,), "weight": (40,)},
        {"reduction": "none", "label_smoothing": 0.1, "ignore_index": 2},
    ),
}  # fmt: skip


def laid_out(op) -> Case:
    """A small case of every op: of its own, or one from the catalogue with many inputs and nothing of size 1."""
    if op.name in LAID_OUT:
        return LAID_OUT[op.name]

    def merit(case):
        sizes = [size for shape in case.shapes.values() for size in shape]
        return len(case.shapes), -sizes.count(1), -sum(math.prod(shape) for shape in case.shapes.values())

    return max(op.cases, key=merit)


each_op = pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
# ops without gradients have nothing to show of a backward pass
each_differentiable_op = pytest.mark.parametrize(
    "op", [op for op in OPS.values() if op.differentiable], ids=lambda op: op.name
)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
# a layout is the same to every dtype but for its alignment: the default run takes one
layout_dtype = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, *(pytest.param(d, marks=pytest.mark.slow) for d in DTYPES[:2])], ids=name_of
)


@layout_dtype
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@each_op
def test_any_layout_of_the_inputs(op, layout, dtype, device):
    hold_layout(op, laid_out(op), dtype, device, layout, "inputs")


@layout_dtype
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@each_differentiable_op
def test_any_layout_of_the_incoming_gradient(op, layout, dtype, device):
    hold_layout(op, laid_out(op), dtype, device, layout, "gradient")


# ---------------------------------------------------------------- autograd


def _leaves(op, inputs):
    return {name: tensor.detach().clone().requires_grad_(name in op.differentiable) for name, tensor in inputs.items()}


@pytest.mark.parametrize("times", [3, pytest.param(200, marks=pytest.mark.slow)])
@each_dtype
@each_op
def test_bitwise_the_same_every_time(op, dtype, times, device):
    hold_repeats(op, laid_out(op), dtype, device, times)


@each_dtype
@each_differentiable_op
def test_backward_twice(op, dtype, device):
    hold_retained_graph(op, laid_out(op), dtype, device)


@each_differentiable_op
def test_gradients_of_some_inputs_only(op, device):
    hold_some_gradients(op, laid_out(op), torch.float32, device)
    inputs = inputs_of(op, laid_out(op), torch.float32, device)
    with torch.no_grad():
        result = op.public(**_leaves(op, inputs), **laid_out(op).options)
    assert not any(output.requires_grad for output in as_tuple(result))


@each_differentiable_op
def test_double_backward_raises(op, device):
    case = laid_out(op)
    leaves = _leaves(op, inputs_of(op, case, torch.float32, device))
    wanted = [leaves[name] for name in op.differentiable if name in leaves]
    outputs = as_tuple(op.public(**leaves, **case.options))
    first = torch.autograd.grad(sum(output.square().sum() for output in outputs), wanted, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        torch.autograd.grad(sum(gradient.square().sum() for gradient in first), wanted)


@each_differentiable_op
def test_changing_an_input_before_backward_raises(op, device):
    """Autograd must notice that what was saved is no longer what it was."""
    # no input that is copied at the door
    case = next((case for case in op.cases if case.name in ("small", "prime")), op.cases[0])
    leaves = _leaves(op, inputs_of(op, case, torch.float32, device))
    first = "weight" if op.name == "add_layer_norm" else op.differentiable[0]  # it keeps the sum, not what was added
    changed = leaves[first] * 1.0
    outputs = as_tuple(op.public(**(leaves | {first: changed}), **case.options))
    with torch.no_grad():
        changed += 1.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sum(output.sum() for output in outputs).backward()
