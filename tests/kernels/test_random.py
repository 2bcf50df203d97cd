"""Random problems: shapes, options and layouts drawn at once, so that those meet that no list of cases has together.

The default run takes a few of each op, the slow one many; a failure names its seed.
"""

import math
import random

import pytest
import torch
from parity import LAYOUTS, check, differentiate, guarded_allocations, in_float64, incoming, torch_functions

from kernels import catalogue
from kernels.device import INTERPRETED, TARGETS
from kernels.op import Case, plan_for

OPS = {op.name: op for op in catalogue.OPS}
FEW, MANY = 6, 150


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


def _layer_norm(draw: random.Random) -> Case:
    n = draw.choice([draw.randint(2, 40), draw.randint(41, 2000), draw.randint(2001, 20_000)])
    lead = tuple(draw.randint(1, 12 if n < 2000 else 2) for _ in range(draw.randint(0, 2)))
    names = [name for name in ("weight", "bias") if draw.random() < 0.7]
    options = {"normalized_shape": (n,), "eps": draw.choice([1e-5, 1e-2])}
    return Case("random", {"input": (*lead, n)} | dict.fromkeys(names, (n,)), options)


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
    "layer_norm": _layer_norm,
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
}


def _problems() -> list:
    return [
        pytest.param(name, seed, marks=() if seed < FEW else pytest.mark.slow, id=f"{name}-{seed}")
        for name in DRAWS
        for seed in range(MANY)
    ]


def _residue(op, inputs: dict, options: dict) -> dict[str, float]:
    """What rounding leaves where terms cancel. Attention: a query that sees one key copies a value, and has no dq."""
    if op.name == "linear_cross_entropy":
        # a row's G adds up to nothing: with one row of weights for all classes (a layout here) so does its dinput
        return {"dinput": 32 * torch.finfo(torch.float32).eps * inputs["linear_weight"].abs().max().item()}
    if op.name != "scaled_dot_product_attention":
        return {}
    *_, q_len, size = inputs["query"].shape
    sharing = inputs["query"].shape[1] // inputs["key"].shape[1]
    # dp and delta are sums of `size` products each; ds * k is scaled, ds * q is summed over the queries as well
    eps = torch.finfo(torch.float32).eps
    one = 32 * eps * math.sqrt(size) * options.get("scale", 1 / math.sqrt(size))
    return {"output": 4 * eps, "dvalue": 4 * eps, "dquery": one, "dkey": one * math.sqrt(q_len * sharing)}


@pytest.mark.parametrize(("op", "seed"), _problems())
def test_random_problem(op, seed, device):
    """Looser than the listed cases, as luck decides of one draw; what goes wrong here goes wrong by far more."""
    op, draw = OPS[op], random.Random(seed)
    case = DRAWS[op.name](draw)
    dtype = draw.choice([torch.float32, torch.float16, torch.bfloat16])
    inputs = {}
    for name, tensor in op.inputs(case, dtype, device, seed).items():
        inputs[name] = draw.choice(LAYOUTS)(tensor.to(dtype) if tensor.is_floating_point() else tensor)
    grad = draw.choice(LAYOUTS)(incoming(op, inputs, case.options))
    # every other problem with a GPU's tiles, where they can be pretended
    target = TARGETS[draw.choice(list(TARGETS))] if INTERPRETED and seed % 2 else None
    with guarded_allocations():
        if target is None:
            ours = differentiate(op.public, op, inputs, case.options, grad)
        else:
            with plan_for(target):
                ours = differentiate(op.public, op, inputs, case.options, grad)
    truth = differentiate(op.reference, op, in_float64(inputs), case.options, grad.double())
    if not all(value.isfinite().all() for value in truth.values()):
        for quantity, exact in truth.items():  # mean over nothing
            assert torch.equal(ours[quantity].isnan(), exact.isnan()), quantity
        return
    theirs = {quantity: (0.0, 0.0) for quantity in truth}
    for function in (*torch_functions(op), op.reference):
        result = differentiate(function, op, inputs, case.options, grad)
        for quantity, exact in truth.items():
            error = (result[quantity].double() - exact).abs()
            measured = (error.max().item(), error.square().mean().sqrt().item())
            theirs[quantity] = tuple(max(a, 3.0 * b) for a, b in zip(theirs[quantity], measured, strict=True))
    label = f"seed {seed}: {case.shapes} {case.options}"
    check({}, op, label, dtype, ours, theirs, truth, residue=_residue(op, inputs, case.options))
