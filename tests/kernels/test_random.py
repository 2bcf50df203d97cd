"""Random problems: shapes, dtypes, options and layouts drawn at once, so that those meet that no list of cases has.

Hypothesis draws them: always the same few in the default run, others every time and many in the slow one. It shrinks a
failure to the smallest problem that fails and prints it.
"""

import contextlib
import dataclasses
import math
import random
import re
from typing import NamedTuple

import pytest
import torch
from parity import (
    DTYPES,
    LAYOUTS,
    as_tuple,
    check,
    differentiate,
    guarded,
    in_float64,
    incoming,
    inputs_of,
    name_of,
    torch_functions,
)

from kernels import catalogue
from kernels.device import INTERPRETED, TARGETS
from kernels.op import Case, plan_for

pytest.importorskip("hypothesis", reason="hypothesis is not installed")
from hypothesis import HealthCheck, given, settings, strategies

OPS = {op.name: op for op in catalogue.OPS}
LAID = {"plain": lambda tensor: tensor} | {layout.__name__: layout for layout in LAYOUTS}
FEW, MANY = 4, 300


def _attention(draw: random.Random) -> Case:
    q_len, k_len = (draw.choice([1, draw.randint(2, 40), draw.randint(41, 260)]) for _ in range(2))
    size = draw.choice([1, 16, 64, draw.randint(2, 80), draw.randint(81, 256)])
    groups, kv_heads = draw.choice([(1, 1), (1, 2), (2, 1), (3, 2)])
    options = {"enable_gqa": True} if groups > 1 else {}
    if draw.random() < 0.7:
        options |= {"is_causal": True, "query_offset": draw.choice([0, 0, k_len - q_len, draw.randint(-q_len, k_len)])}
    if draw.random() < 0.3:
        options["scale"] = draw.choice([0.05, 0.5, 1.0])
    batch = draw.randint(1, 2)
    kv = (batch, kv_heads, k_len, size)
    return Case("random", {"query": (batch, groups * kv_heads, q_len, size), "key": kv, "value": kv}, options)


def _qkvpacked(draw: random.Random) -> Case:
    length, size = draw.choice([1, draw.randint(2, 64), draw.randint(65, 260)]), draw.choice([1, 16, 64, 128])
    size = draw.choice([size, draw.randint(2, 80), draw.randint(81, 256)])
    options = {"is_causal": True} if draw.random() < 0.7 else {}
    if draw.random() < 0.3:
        options["scale"] = draw.choice([0.05, 0.5, 1.0])
    return Case("random", {"qkv": (draw.randint(1, 2), length, 3, draw.randint(1, 3), size)}, options)


def _decode_attention(draw: random.Random) -> Case:
    t_max, size = draw.choice([1, draw.randint(2, 300), draw.randint(301, 900)]), draw.choice([16, 64, 128])
    size = draw.choice([1, size, draw.randint(2, 80), draw.randint(81, 256)])
    groups, kv_heads = draw.choice([(1, 1), (1, 2), (2, 1), (3, 2), (8, 1), (17, 1)])
    options = {"enable_gqa": True} if groups > 1 else {}
    if draw.random() < 0.3:
        options["scale"] = draw.choice([-0.2, 0.05, 0.5, 1.0])
    batch = draw.randint(1, 3)
    cache = (batch, kv_heads, t_max, size)
    shapes = {"query": (batch, groups * kv_heads, 1, size), "key_cache": cache, "value_cache": cache}
    return Case("random", shapes | {"lengths": (batch,)}, options)


def _layer_norm(draw: random.Random) -> Case:
    n = draw.choice([draw.randint(2, 40), draw.randint(41, 2000), draw.randint(2001, 20_000)])
    lead = tuple(draw.randint(1, 12 if n < 2000 else 2) for _ in range(draw.randint(0, 2)))
    names = [name for name in ("weight", "bias") if draw.random() < 0.7]
    options = {"normalized_shape": (n,), "eps": draw.choice([1e-5, 1e-2])}
    return Case("random", {"input": (*lead, n)} | dict.fromkeys(names, (n,)), options)


def _add_layer_norm(draw: random.Random) -> Case:
    case = _layer_norm(draw)
    return case._replace(shapes=case.shapes | {"residual": case.shapes["input"]})


def _cross_entropy(draw: random.Random) -> Case:
    classes = draw.choice([draw.randint(1, 40), draw.randint(41, 5000), draw.randint(5001, 70_000)])
    more = tuple(draw.randint(1, 4) for _ in range(draw.choice([0, 0, 1, 2])))
    rows = draw.randint(1, 30 if classes < 5000 else 3)
    options = {"reduction": draw.choice(["mean", "sum", "none"]), "label_smoothing": draw.choice([0.0, 0.0, 0.1, 1.0])}
    if draw.random() < 0.5:
        options["ignore_index"] = draw.choice([-100, 0, classes - 1])
    weight = {"weight": (classes,)} if draw.random() < 0.4 else {}
    return Case("random", {"input": (rows, classes, *more), "target": (rows, *more)} | weight, options)


def _linear_cross_entropy(draw: random.Random) -> Case:
    classes = draw.choice([draw.randint(1, 40), draw.randint(41, 5000), draw.randint(5001, 70_000)])
    hidden = draw.randint(1, 70)
    rows = draw.choice([draw.randint(1, 30), draw.randint(31, 400)]) if classes < 5000 else draw.randint(1, 3)
    options = {"reduction": draw.choice(["mean", "sum", "none"]), "label_smoothing": draw.choice([0.0, 0.0, 0.1, 1.0])}
    if draw.random() < 0.5:
        options["ignore_index"] = draw.choice([-100, 0, classes - 1])
    shapes = {"input": (rows, hidden), "linear_weight": (classes, hidden), "target": (rows,)}
    for name in ("linear_bias", "weight"):
        if draw.random() < 0.4:
            shapes[name] = (classes,)
    return Case("random", shapes, options)


DRAWS = {
    "scaled_dot_product_attention": _attention,
    "scaled_dot_product_attention_qkvpacked": _qkvpacked,
    "decode_attention": _decode_attention,
    "layer_norm": _layer_norm,
    "add_layer_norm": _add_layer_norm,
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
}


class Problem(NamedTuple):
    """What a failure prints. `tiles`: the GPU whose tiles are taken, as far as they can be pretended."""

    op: str
    shapes: dict[str, tuple[int, ...]]
    options: dict
    dtype: str
    layouts: dict[str, str]
    tiles: str | None
    seed: int

    @property
    def case(self) -> Case:
        return Case("random", self.shapes, self.options)


@strategies.composite
def problems(draw, op) -> Problem:
    """Of an op without a function in DRAWS: one of its cases, in any dtypes and layouts."""
    if op.name in DRAWS:
        case = DRAWS[op.name](draw(strategies.randoms(use_true_random=False)))
    else:
        case = draw(strategies.sampled_from(op.cases))
    names = strategies.sampled_from(list(LAID))
    layouts = {name: draw(names) for name in (*case.shapes, *(f"d{output}" for output in op.outputs))}
    tiles = draw(strategies.sampled_from([*[None] * 5, *TARGETS])) if INTERPRETED else None
    dtype = draw(strategies.sampled_from([name_of(dtype) for dtype in DTYPES]))
    seed = draw(strategies.integers(0, 1000))
    return Problem(op.name, case.shapes, case.options, dtype, layouts, tiles, seed)


def _residue(op, inputs: dict, options: dict, grad) -> dict[str, float]:
    """What rounding leaves where terms cancel. Attention: a query that sees one key copies a value, and has no dq."""
    if op.name == "decode_attention":
        return {"output": 4 * torch.finfo(torch.float32).eps}
    if op.name == "linear_cross_entropy":
        # a row's G adds up to nothing: with one row of weights for all classes (a layout here) so does its dinput
        return {"dinput": 32 * torch.finfo(torch.float32).eps * inputs["linear_weight"].abs().max().item()}
    if op.name == "scaled_dot_product_attention_qkvpacked":
        parts = dict(zip(("query", "key", "value"), inputs["qkv"].transpose(1, 3).unbind(2), strict=True))
        each = _residue(OPS["scaled_dot_product_attention"], parts, options, grad.transpose(1, 2))
        return {"output": each.pop("output"), "dqkv": max(each.values())}
    if op.name != "scaled_dot_product_attention":
        return {}
    query, key, value = (inputs[name].float() for name in ("query", "key", "value"))
    sharing = query.shape[1] // key.shape[1]
    # dp and delta are sums over the head, taken in two ways; ds * k is scaled, ds * q is summed over queries as well
    terms = grad.float().abs() @ value.abs().repeat_interleave(sharing, 1).transpose(-2, -1)
    eps = torch.finfo(torch.float32).eps
    # each rounds up to once a term, all in one direction where the terms are equal (a layout here); and delta is made
    # from the output as it was rounded to its dtype
    rounding = (8 + query.shape[-1] / 8) * eps + torch.finfo(inputs["query"].dtype).eps / 2
    one = rounding * terms.max().item() * options.get("scale", 1 / math.sqrt(query.shape[-1]))
    queries = query.shape[-2] * sharing  # not its root: in a layout of equal rows their errors are equal too
    # p = exp(s - lse), where lse is one fp32 number: its rounding is a relative error of p
    scores = query.abs() @ key.abs().repeat_interleave(sharing, 1).transpose(-2, -1)
    peak = scores.max().item() * options.get("scale", 1 / math.sqrt(query.shape[-1]))
    output = {"output": 4 * eps, "dvalue": eps * (4 + peak * queries * grad.float().abs().max().item())}
    return output | {"dquery": one * key.abs().max().item(), "dkey": one * queries * query.abs().max().item()}


def solve(op, problem: Problem, device) -> None:
    """Looser than the listed cases, as luck decides of one draw; what goes wrong here goes wrong by far more."""
    case, dtype = problem.case, getattr(torch, problem.dtype)
    inputs = {
        name: LAID[problem.layouts[name]](tensor)
        for name, tensor in inputs_of(op, case, dtype, device, problem.seed).items()
    }
    drawn = as_tuple(incoming(op, inputs, case.options))
    grads = tuple(LAID[problem.layouts[f"d{name}"]](one) for name, one in zip(op.outputs, drawn, strict=True))
    grad = grads if len(grads) > 1 else grads[0]
    with plan_for(TARGETS[problem.tiles]) if problem.tiles else contextlib.nullcontext():
        ours = guarded(op, inputs, case.options, grad)
    truth = differentiate(op.reference, op, in_float64(inputs), case.options, in_float64(grad))
    if not all(value.isfinite().all() for value in truth.values()):
        for quantity, exact in truth.items():  # mean over nothing
            assert torch.equal(ours[quantity].isnan(), exact.isnan()), quantity
        return
    theirs = {quantity: (0.0, 0.0) for quantity in truth}
    for function in (*torch_functions(op), op.reference):
        result = differentiate(function, op, inputs, case.options, grad)
        for quantity, exact in truth.items():
            error = (result[quantity].double() - exact).abs()
            measured = (error.max().item(), error.square().mean().sqrt().item()) if error.numel() else (0.0, 0.0)
            theirs[quantity] = tuple(max(a, 3.0 * b) for a, b in zip(theirs[quantity], measured, strict=True))
    residue = _residue(op, inputs, case.options, grad)
    for quantity, exact in truth.items():  # PyTorch may happen to be exact where the largest element is rounded
        largest = exact.abs().max().item() if exact.numel() else 0.0
        residue[quantity] = residue.get(quantity, 0.0) + 2 * torch.finfo(dtype).eps * largest
    check({}, op, "random", dtype, ours, theirs, truth, residue=residue)


# by name: a failure prints it; attention of one tensor has the kernels of attention
each_op = pytest.mark.parametrize(
    "op", [pytest.param(name, marks=pytest.mark.slow if name.endswith("qkvpacked") else ()) for name in OPS]
)
FIXTURES = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
ALWAYS = {"deadline": None, "database": None, "print_blob": True, "suppress_health_check": FIXTURES}


@each_op
@settings(**ALWAYS, max_examples=FEW, derandomize=True)
@given(data=strategies.data())
def test_random_problem(op, data, device):
    solve(OPS[op], data.draw(problems(OPS[op]), label="problem"), device)


@pytest.mark.slow
@each_op
@settings(**ALWAYS, max_examples=MANY)
@given(data=strategies.data())
def test_many_random_problems(op, data, device):
    solve(OPS[op], data.draw(problems(OPS[op]), label="problem"), device)


def test_a_failure_is_shrunk_and_printed():
    """What fails with more than four rows is told of with five, plain and as short as can be."""

    @settings(**ALWAYS, max_examples=200, derandomize=True)
    @given(problem=problems(OPS["layer_norm"]))
    def hold(problem):
        *rows, _ = problem.shapes["input"]
        assert math.prod(rows) <= 4

    with pytest.raises(AssertionError) as failure:
        hold()
    printed = "\n".join(failure.value.__notes__)
    shape = re.search(r"problem=Problem\(.*'input': \(([\d, ]+)\)", printed)
    assert shape, printed
    *rows, length = map(int, filter(None, shape[1].split(",")))
    assert math.prod(rows) == 5 and length == 2 and "'input': 'plain'" in printed, printed
    assert "reproduce_failure" in printed


def test_a_wrong_function_fails(device):
    op = OPS["layer_norm"]

    def wrong(input, *args, **options):
        return op.public(input, *args, **options) * (1.05 if input.shape[0] > 4 else 1.0)

    for rows in (4, 5):
        layouts = {"input": "strided", "doutput": "constant"}
        problem = Problem(op.name, {"input": (rows, 3)}, {"normalized_shape": (3,)}, "float16", layouts, None, 0)
        with pytest.raises(AssertionError, match="output: max error") if rows > 4 else contextlib.nullcontext():
            solve(dataclasses.replace(op, public=wrong), problem, device)
