"""Hard values in every input and incoming gradient: NaN, infinities, denormals, near overflow, sure predictions.

NaN and infinities come out exactly where PyTorch has them, element by element, in outputs and gradients; what is finite
is as near to float64 as PyTorch's is, but for the rounding of large scores: a logarithm of a sum, one fp32 number, is
saved for backward, and 2^-24 of it is an error of the probabilities (so it is in PyTorch's fused attention; its
cross-entropy saves the probabilities' logarithms instead).

PyTorch's own implementations disagree on some, and then one of them must agree:

- attention: its fused kernel for the CPU loses the NaN of a query, the written-out one lets keys that are not seen
  spoil a query (NaN + -inf), and in backward 0 * inf appears where the order of the products has it appear;
- sums in fp16: PyTorch's layer norm for the CPU overflows where fp32, and so the plain reference and we, do not;
- on a GPU its fused kernels are others than on the CPU: both are asked, the CPU's with copies of what the GPU has.

FEWER and OTHERWISE have the rest, where the order of the operations decides what IEEE arithmetic gives.
"""

import dataclasses
import math

import pytest
import torch
from parity import DTYPES, differentiate, guarded, in_float64, incoming, inputs_of, name_of, on_each, torch_functions
from test_parity import laid_out

from kernels import catalogue
from kernels.device import INTERPRETED
from kernels.op import Case


def _put(value: float):
    """One element is `value`."""

    def put(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[tensor.numel() * 2 // 3] = value
        return tensor

    return put


def _row(value: float):
    """The last row but one is `value`; of a vector everything."""

    def put(tensor):
        tensor = tensor.clone()
        rows = tensor.view(-1, tensor.shape[-1]) if tensor.dim() > 1 else tensor.view(1, -1)
        rows[max(0, len(rows) - 2)] = value
        return tensor

    return put


def _half_forbidden(tensor):
    """Every other element is -inf."""
    places = torch.arange(tensor.numel(), device=tensor.device).view(tensor.shape)
    return tensor.masked_fill(places % 2 == 1, -math.inf)


def _sure(tensor):
    """The largest of a row is 1e4, the others are -1e4."""
    if tensor.dim() == 0:
        return tensor
    highest = tensor == tensor.amax(-1, keepdim=True)
    return torch.where(highest, 1e4, -1e4).to(tensor.dtype)


HARD = {
    "nan": _put(math.nan),
    "inf": _put(math.inf),
    "-inf": _put(-math.inf),
    "row of nan": _row(math.nan),
    "row of inf": _row(math.inf),
    "row of -inf": _row(-math.inf),
    "half -inf": _half_forbidden,
    "all equal": lambda tensor: torch.full_like(tensor, 1.5),
    "zeros": torch.zeros_like,
    "denormal": lambda tensor: tensor * (torch.finfo(tensor.dtype).tiny / 8),
    "1e4": lambda tensor: tensor.sign() * 1e4,
    "fp16's largest": lambda tensor: tensor.sign() * 65504.0,
    "sure": _sure,
}


def _attention(**options) -> Case:
    return Case(str(options), dict.fromkeys(("query", "key", "value"), (1, 1, 6, 8)), options)


def _loss(weighted: bool, **options) -> Case:
    shapes = {"input": (6, 9), "target": (6,)} | ({"weight": (9,)} if weighted else {})
    return Case(f"{options} {weighted}", shapes, options | {"ignore_index": 2})


def _linear_loss(bias: bool, weighted: bool, **options) -> Case:
    shapes = {"input": (6, 8), "linear_weight": (9, 8), "target": (6,)} | ({"linear_bias": (9,)} if bias else {})
    return Case(f"{options} {bias} {weighted}", shapes | ({"weight": (9,)} if weighted else {}), options)


CASES = {
    "scaled_dot_product_attention": [_attention(), _attention(is_causal=True)],
    "layer_norm": [Case("rows", {"input": (5, 24), "weight": (24,), "bias": (24,)}, {"normalized_shape": (24,)})],
    "cross_entropy": [
        _loss(False, reduction="none"),
        _loss(True, reduction="mean", label_smoothing=0.1),
        _loss(False, reduction="sum", label_smoothing=0.1),
    ],
    "linear_cross_entropy": [
        _linear_loss(True, False, reduction="none"),
        _linear_loss(False, True, reduction="none", label_smoothing=0.1, ignore_index=2),
        _linear_loss(True, True, reduction="mean", label_smoothing=0.1, ignore_index=2),
        _linear_loss(False, False, reduction="sum", label_smoothing=0.1),
    ],
}
LONG = {  # walked in chunks: other kernels
    "layer_norm": [Case("long", {"input": (2, 17_000), "weight": (17_000,)}, {"normalized_shape": (17_000,)})],
    "cross_entropy": [Case("long", {"input": (2, 70_000), "target": (2,)}, {"reduction": "none"})],
}
NOT_FINITE = ("nan", "inf", "-inf")
INFINITE = ("inf", "-inf", "row of inf", "row of -inf", "half -inf")
# (op, what is hard, in what, quantity): fewer NaN than PyTorch has.
# A row of layer norm's gradient, g - mean(g) - xhat * mean(g * xhat), is then a sum of infinities, of which PyTorch
# adds another pair first.
FEWER = {("layer_norm", hard, where, "dinput") for hard in INFINITE for where in ("weight", "grad")}
FEWER |= {
    ("add_layer_norm", hard, where, quantity)
    for hard in INFINITE
    for where in ("weight", "grad")
    for quantity in ("dinput", "dresidual")
}
# PyTorch adds -grad at the target and grad * p, inf - inf; ours is grad * (p - 1).
FEWER |= {("cross_entropy", hard, "grad", "dinput") for hard in INFINITE}
FEWER |= {
    ("linear_cross_entropy", hard, "grad", quantity)
    for hard in INFINITE
    for quantity in ("dinput", "dlinear_weight", "dlinear_bias")
}
# not finite in the same places or fewer, but NaN for inf or the other way: an infinite class weight under smoothing,
# where PyTorch adds w * (lse - x) and we w * lse and w * x
OTHERWISE = {("cross_entropy", hard, "weight", what) for hard in INFINITE for what in ("output", "dinput")}
OTHERWISE |= {("linear_cross_entropy", hard, "weight", "output") for hard in INFINITE}
# the gradients of both outputs, added in fp32 and rounded once: in fp16 PyTorch's first is infinite by itself
OTHERWISE |= {("add_layer_norm", "fp16's largest", "grad", what) for what in ("dinput", "dresidual")}


def _oracles(op, device: torch.device) -> list:
    functions = torch_functions(op) + ([op.reference] if op.name != "scaled_dot_product_attention" else [])
    return functions + ([on_the_cpu(function) for function in functions] if device.type != "cpu" else [])


def on_the_cpu(function):
    """`function` of copies there, its results and gradients copied back."""

    def elsewhere(**given):
        device = next(value.device for value in given.values() if torch.is_tensor(value))
        copies = {name: value.cpu() if torch.is_tensor(value) else value for name, value in given.items()}
        return on_each(lambda result: result.to(device), function(**copies))

    return elsewhere


def _without_ignored(function):
    """`function` of the rows that are not ignored: the others' losses are 0, and so are their gradients.

    PyTorch multiplies an ignored row's gradient with 0, and the NaN of a logit or of a sum of class weights stays. Here
    it is 0 whatever they are.
    """

    def kept_alone(*, input, target, ignore_index, **options):
        kept = target != ignore_index
        result = function(input=input[kept], target=target[kept], **options)
        return result.new_zeros(target.shape).masked_scatter(kept, result) if result.dim() else result

    return kept_alone


def _theirs(op, case, inputs: dict, grad, where: str) -> list[list[dict]]:
    """By oracle, results of which ours may have any, element by element: PyTorch's first."""
    theirs = []
    for function in _oracles(op, next(iter(inputs.values())).device):
        results = [differentiate(function, op, inputs, case.options, grad)]
        if "ignore_index" in case.options:
            results.append(differentiate(_without_ignored(function), op, inputs, case.options, grad))
        if op.name == "linear_cross_entropy" and case.options["reduction"] != "none" and where == "grad":
            # gradients are made in the forward pass and multiplied with grad in the end: 0 * NaN and 0 * inf are in
            # ignored rows too, where PyTorch has 0, and no infinities are added
            before = differentiate(function, op, inputs, case.options, torch.ones_like(grad))
            results.append({name: one if name == "output" else one * grad for name, one in before.items()})
        theirs.append(results)
    return theirs


def _kinds(tensor: torch.Tensor) -> torch.Tensor:
    """0 for finite, 1 and -1 for infinities, 2 for NaN."""
    kinds = torch.where(tensor.isinf(), tensor.sign(), 0.0).nan_to_num(0.0)
    return torch.where(tensor.isnan(), 2.0, kinds).to(torch.int8)


def _finite_error(result: torch.Tensor, truth: torch.Tensor) -> float:
    error = (result.double() - truth).abs()
    error = error[error.isfinite()]
    return error.max().item() if error.numel() else 0.0


def _agree(kinds: torch.Tensor, theirs: list[list[torch.Tensor]], place: tuple) -> bool:
    """By oracle, the kinds of what ours may be; the first is PyTorch's."""
    if place in OTHERWISE:
        return all(((kinds == 0) | (others[0] != 0)).all() for others in theirs)
    if place in FEWER:
        return any((sum(kinds == other for other in others) + (others[0] == 2)).bool().all() for others in theirs)
    return any(sum(kinds == other for other in others).bool().all() for others in theirs)


def _rounding(op, inputs: dict, quantity: str) -> float:
    """How far the rounding of scores and of their logarithm may carry a gradient, and a 16-bit output."""
    floats = {name: tensor.double().nan_to_num(0.0, 0.0, 0.0) for name, tensor in inputs.items()}
    eps, most = 4 * torch.finfo(torch.float32).eps, {name: t.abs().max().item() for name, t in floats.items()}
    if op.name == "cross_entropy":
        return eps * most["input"] * max(1.0, most.get("weight", 0.0)) if quantity == "dinput" else 0.0
    if op.name == "linear_cross_entropy":
        if quantity == "output":
            return 0.0
        x, w = floats["input"].reshape(-1, inputs["input"].shape[-1]), floats["linear_weight"]
        logits = (x @ w.T + floats.get("linear_bias", 0.0)).abs().max().item()
        # of a row's gradient of the logits, whose sum over classes is what a probability is at most
        row = eps * logits * max(1.0, most.get("weight", 0.0))
        other = {"dinput": most["linear_weight"], "dlinear_weight": len(x) * most["input"], "dlinear_bias": len(x)}
        return row * other[quantity]
    if op.name != "scaled_dot_product_attention":
        return 0.0
    scale = inputs["query"].shape[-1] ** -0.5
    scores = (floats["query"] @ floats["key"].transpose(-2, -1)).abs().max().item() * scale
    probability = eps * (scores + inputs["query"].shape[-1])
    other = {"dquery": scale * most["key"] * most["value"], "dkey": scale * most["query"] * most["value"]}
    # sums over the head and over the keys or queries, with gradients of a few
    return probability * 8 * inputs["query"].shape[-1] * other.get(quantity, most["value"])


def _wrong(op, hard: str, where: str, inputs: dict, ours: dict, theirs: list[list[dict]], truth: dict) -> list[str]:
    """What is wrong, by quantity."""
    wrong = []
    for quantity, exact in truth.items():
        result = ours[quantity]
        kinds, others = _kinds(result), [[_kinds(one[quantity]) for one in their] for their in theirs]
        if not _agree(kinds, others, (op.name, hard, where, quantity)):
            counts = [(kinds != other[0]).sum().item() for other in others]
            wrong.append(f"{quantity}: {counts} of {kinds.numel()} elements are NaN or infinite otherwise")
        if hard == "denormal" and result.dtype == torch.bfloat16 and INTERPRETED:
            continue  # Triton's interpreter widens them wrongly
        finite, information = exact[exact.isfinite()], torch.finfo(result.dtype)
        size = finite.abs().max().item() if finite.numel() else 0.0
        # one draw: what luck there is in PyTorch's error is left to the parity tests
        allowed = 4 * max(_finite_error(one[quantity], exact) for their in theirs for one in their)
        allowed += 4 * information.eps * (size + information.tiny) + _rounding(op, inputs, quantity)
        error = _finite_error(result, exact)
        if error > allowed:
            wrong.append(f"{quantity}: error {error:.3g}, allowed {allowed:.3g}")
    return wrong


def hold_hard_values(op, case, dtype: torch.dtype, device, hard: str) -> None:
    """The values put into each floating input in turn, and into the incoming gradient."""
    drawn = inputs_of(op, case, dtype, device)
    places = [name for name, tensor in drawn.items() if tensor.is_floating_point()]
    wrong = []
    for where in [*places, "grad"] if op.differentiable else places:
        inputs, grad = dict(drawn), incoming(op, drawn, case.options)
        if where == "grad":
            grad = on_each(HARD[hard], grad)
        else:
            inputs[where] = HARD[hard](drawn[where])
        ours = guarded(op, inputs, case.options, grad)
        theirs = _theirs(op, case, inputs, grad, where)
        truth = differentiate(op.reference, op, in_float64(inputs), case.options, in_float64(grad))
        wrong += [f"{where}: {line}" for line in _wrong(op, hard, where, inputs, ours, theirs, truth)]
    assert not wrong, f"{op.name} {case.name} {name_of(dtype)}, {hard} in " + "; ".join(wrong)


def _packed(query, key, value, **options) -> torch.Tensor:
    packed = torch.stack([tensor.transpose(1, 2) for tensor in (query, key, value)], 2)
    return catalogue.ATTENTION_QKVPACKED.public(packed, **options).transpose(1, 2)


def _problems() -> list:
    problems = []
    for listed in catalogue.OPS:
        packed = listed is catalogue.ATTENTION_QKVPACKED  # held as attention is, to each of the three gradients
        op = dataclasses.replace(catalogue.ATTENTION, public=_packed) if packed else listed
        for place, case in enumerate(CASES.get(op.name, [laid_out(op)]) + LONG.get(op.name, [])):
            for dtype in DTYPES:
                for hard in HARD:
                    # by default every kind in fp32; of an op's first case what is not finite in bf16, and in fp16 what
                    # its range makes hard too
                    many = dtype == torch.bfloat16 and hard not in NOT_FINITE
                    many |= dtype == torch.float16 and hard not in (*NOT_FINITE, "fp16's largest", "1e4", "denormal")
                    many = many or ((packed or place > 0) and dtype != torch.float32)
                    many = many or (case.name == "long" and (dtype != torch.float32 or hard not in ("nan", "inf")))
                    marks = pytest.mark.slow if many else ()
                    label = f"{listed.name}-{case.name}-{name_of(dtype)}-{hard}"
                    problems.append(pytest.param(op, case, dtype, hard, marks=marks, id=label))
    return problems


@pytest.mark.parametrize(("op", "case", "dtype", "hard"), _problems())
def test_hard_values(op, case, dtype, hard, device):
    hold_hard_values(op, case, dtype, device, hard)


@pytest.mark.parametrize("value", [math.nan, pytest.param(math.inf, marks=pytest.mark.slow)])
@pytest.mark.parametrize("options", [{}, {"is_causal": True, "enable_gqa": True}, {"dropout_p": 0.3}], ids=str)
@pytest.mark.parametrize("length", [8, 31, pytest.param(60, marks=pytest.mark.slow)])
def test_a_head_does_not_see_what_another_one_has(length, options, value, device):
    """Not even where several share a tile: 0 * NaN between them would be NaN. The other heads are the same bits."""
    heads = 4 if options.get("enable_gqa") else 2
    shapes = {"query": (3, heads, length, 16), "key": (3, 2, length, 16), "value": (3, 2, length, 16)}
    case = Case("heads", shapes, options)
    op = catalogue.ATTENTION
    good = op.inputs(case, torch.float16, device, seed=1)
    grad = torch.randn(shapes["query"], generator=torch.Generator().manual_seed(2)).to(torch.float16).to(device)

    def run(inputs, grad):
        torch.manual_seed(3)
        return differentiate(op.public, op, inputs, options, grad)

    right = run(good, grad)
    for where in (*good, "grad"):
        inputs, given = {name: tensor.clone() for name, tensor in good.items()}, grad.clone()
        spoilt = given if where == "grad" else inputs[where]
        spoilt[1, -1, length // 2, 3] = value
        for quantity, found in run(inputs, given).items():
            same = (found == right[quantity]).flatten(2).all(-1)
            touched = torch.zeros_like(same)
            touched[1, same.shape[1] // 2 :] = True  # key head 1, and its query heads
            assert (same | touched).all(), f"{quantity}, where {where} has {value}"
