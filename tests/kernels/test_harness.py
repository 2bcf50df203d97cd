"""The harness attacked: functions that are wrong on purpose, each caught by the check that the real tests call.

A wrong function is the kernel's own with one thing spoiled, so that nothing else can be what is noticed; unspoiled, the
same wrapping passes every check.
"""

import contextlib
import dataclasses
import math

import parity
import pytest
import torch
from parity import (
    DTYPES,
    differentiate,
    generator_of,
    hold,
    hold_layout,
    hold_repeats,
    hold_retained_graph,
    hold_some_gradients,
    incoming,
    inputs_of,
    on_each,
    requiring,
    sliced,
)
from test_dropout import hold_one_mask
from test_hard_values import hold_hard_values, on_the_cpu
from test_parity import laid_out

from kernels import catalogue
from kernels.op import Case

OPS = {op.name: op for op in catalogue.OPS if op.differentiable}
each_op = pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)


def small(op) -> Case:
    """Programs cost here, and attention has many: one head's group of the laid out case's two."""
    case = laid_out(op)
    if op.name.startswith("scaled_dot_product_attention"):
        return case._replace(shapes={name: (1, *shape[1:]) for name, shape in case.shapes.items()})
    return case


def _same(tensor):
    return tensor


def spoiled(op, *, inputs=_same, output=_same, gradients=_same):
    """`op` with its public function's inputs, its outputs and its gradients (by name) changed by these functions."""

    def public(*args, **options):
        given = dict(zip(("input", "target"), args, strict=False)) | options
        tensors = {name: value for name, value in given.items() if torch.is_tensor(value)}
        others = {name: value for name, value in given.items() if not torch.is_tensor(value)}
        names = list(tensors)

        class Spoiled(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *values):
                ctx.wanted = [name for name, value in zip(names, values, strict=True) if value.requires_grad]
                with torch.enable_grad():
                    leaves = {
                        name: value.detach().requires_grad_(name in ctx.wanted)
                        for name, value in zip(names, values, strict=True)
                    }
                    ctx.graph = op.public(**inputs(leaves), **others)
                ctx.leaves = [leaves[name] for name in ctx.wanted]
                return on_each(lambda result: output(result.detach().clone()), ctx.graph)

            @staticmethod
            def backward(ctx, *grads):
                graph, grads = zip(*requiring(ctx.graph, grads), strict=True)
                found = torch.autograd.grad(graph, ctx.leaves, grads, retain_graph=True)
                found = gradients(dict(zip(ctx.wanted, found, strict=True)))
                return tuple(found.get(name) for name in names)

        return Spoiled.apply(*tensors.values())

    return dataclasses.replace(op, public=public)


CHECKS = {
    "parity": lambda op, case, dtype, device: hold(op, case, dtype, device, {}),
    "repeats": hold_repeats,
    "retained graph": hold_retained_graph,
    "some gradients": hold_some_gradients,
    "layout": lambda op, case, dtype, device: hold_layout(op, case, dtype, device, sliced, "inputs"),
}


@pytest.mark.parametrize("check", CHECKS)
@each_op
def test_wrapping_alone_is_not_what_is_caught(op, check, device):
    CHECKS[check](spoiled(op), small(op), torch.float32, device)


def _caught(check: str, op, device, says: str, dtype=torch.float32, case=None):
    with pytest.raises(AssertionError, match=says):
        CHECKS[check](op, case or small(op), dtype, device)


# ---------------------------------------------------------------- wrong numbers


def _zeros(tensor):
    return torch.zeros_like(tensor)


def _last_row(tensor):
    """The last row off by a hundredth of the tensor's size: what a mask one row short leaves is more."""
    tensor = tensor.clone(memory_format=torch.contiguous_format)
    rows = tensor.view(-1, tensor.shape[-1]) if tensor.dim() > 1 else tensor.view(-1, 1)
    rows[-1] += 0.01 * tensor.abs().max()
    return tensor


def _last_column(tensor):
    tensor = tensor.clone()
    tensor[..., -1] += 0.01 * tensor.abs().max()
    return tensor


def _scaled(tensor):
    return tensor * 1.01


WRONG = {"zeros": _zeros, "last row": _last_row, "last column": _last_column, "1% too large": _scaled}


@pytest.mark.parametrize("wrong", WRONG)
@each_op
def test_wrong_outputs(op, wrong, device):
    _caught("parity", spoiled(op, output=WRONG[wrong]), device, "output: max error")


@pytest.mark.parametrize("wrong", WRONG)
@each_op
def test_wrong_gradients_of_a_right_output(op, wrong, device):
    """One input's gradient wrong, each in turn."""
    for name in small(op).shapes:
        if name in op.differentiable:

            def change(found, name=name):
                return found | {name: WRONG[wrong](found[name].contiguous())}

            _caught("parity", spoiled(op, gradients=change), device, f"d{name}: max error")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_op
def test_wrong_for_one_dtype_only(op, dtype, device):
    wrong = spoiled(op, output=lambda t: t * (1.05 if t.dtype == dtype else 1.0))
    for other in DTYPES:
        if other == dtype:
            _caught("parity", wrong, device, "output", dtype)
        else:
            CHECKS["parity"](wrong, small(op), other, device)


def test_a_mask_that_is_ignored(device):
    """Attention that sees the future; cross-entropy that counts ignored targets."""
    for name, option in (("scaled_dot_product_attention", "is_causal"), ("cross_entropy", "ignore_index")):
        op = OPS[name]

        def ignorant(*args, op=op, option=option, **options):
            return op.public(*args, **{key: value for key, value in options.items() if key != option})

        _caught("parity", dataclasses.replace(op, public=ignorant), device, "output: max error")


@each_op
def test_an_element_that_is_not_written(op, device):
    def forgets(result):
        out = torch.empty_like(result)
        whole = torch.arange(result.numel(), device=result.device) < result.numel() - 1
        return torch.where(whole.view(result.shape), result, out)

    _caught("parity", spoiled(op, output=forgets), device, "output: max error nan")


class _OnAGpu(torch.Tensor):
    """One on the CPU that says otherwise."""

    device = torch.device("cuda")


@pytest.mark.parametrize(("error", "kind", "caught"), [
    (9e-4, torch.Tensor, False), (2e-3, torch.Tensor, True), (3e-3, _OnAGpu, False), (5e-3, _OnAGpu, True),
])  # fmt: skip
def test_an_error_above_its_cap(error, kind, caught):
    """However wrong PyTorch's own is; on a GPU a cap has more room."""
    exact = torch.ones(8, dtype=torch.float64)
    ours = {"output": (exact + error).float().as_subclass(kind)}
    caps = {"layer_norm": {"float32": {"output": {"max": 1e-3, "rms": 1e-3}}}}
    with pytest.raises(AssertionError, match=r"max error .* above its cap") if caught else contextlib.nullcontext():
        theirs, truth = {"output": (1.0, 1.0)}, {"output": exact}
        parity.check({}, OPS["layer_norm"], "c", torch.float32, ours, theirs, truth, caps=caps)


# ---------------------------------------------------------------- wrong conduct


@each_op
def test_the_output_of_the_last_call(op, device):
    kept = {}

    def stale(result):
        return kept.setdefault((result.shape, result.dtype), result).clone()

    _caught("repeats", spoiled(op, output=stale), device, "other inputs gave the same output")


@each_op
def test_an_output_in_memory_that_the_next_call_takes(op, device):
    """Right when it is returned, and changed by the backward pass: a buffer shared between calls."""
    shared = []

    def keep(result):
        shared.append(result.data)  # as a kernel writes it: autograd does not see it
        return result

    def reuse(found):
        shared[-1].mul_(2.0)
        return found

    _caught("retained graph", spoiled(op, output=keep, gradients=reuse), device, "changed the output")


@each_op
def test_the_last_bit_not_the_same_every_time(op, device):
    calls = []

    def unsteady(result, a_call=1):
        calls.append(None)
        result = result.contiguous()
        if (len(calls) - 1) // a_call % 2:  # in every second call
            result.view(-1).view(torch.int32)[-1] ^= 1
        return result

    def of_every_output(result):
        return unsteady(result, len(op.outputs))

    CHECKS["parity"](spoiled(op, output=of_every_output), small(op), torch.float32, device)  # too little for parity
    calls.clear()
    _caught("repeats", spoiled(op, output=of_every_output), device, "run .: output.* came out otherwise")
    calls.clear()

    def unsteady_gradients(found):
        name = next(iter(found))
        return found | {name: unsteady(found[name].clone())}

    _caught("repeats", spoiled(op, gradients=unsteady_gradients), device, "run .: d.* came out otherwise")
    calls.clear()
    _caught("retained graph", spoiled(op, gradients=unsteady_gradients), device, "second backward pass")


@each_op
def test_a_write_past_the_end(op, device):
    for places in (-1, 1):

        def spills(result, places=places):
            out = torch.empty(result.shape, dtype=result.dtype, device=result.device)
            out.copy_(result)
            beyond = -1 if places < 0 else result.numel()
            # four bytes of zero: no fill that the guards have
            out.as_strided((1,), (1,), out.storage_offset() + beyond).zero_()
            return out

        _caught("parity", spoiled(op, output=spills), device, "wrote out of bounds")


@each_op
def test_an_input_overwritten(op, device):
    """In its own memory, and with what it held but for the sign of a zero; and just past its end."""
    first = op.differentiable[0]

    def overwrites(leaves):
        leaves[first].detach().view(-1)[-1] += 1.0
        return leaves

    _caught("parity", spoiled(op, inputs=overwrites), device, f"input {first} was modified")

    def past_its_end(leaves):
        tensor = leaves[first].detach()
        tensor.as_strided((1,), (1,), tensor.storage_offset() + tensor.numel()).zero_()
        return leaves

    _caught("parity", spoiled(op, inputs=past_its_end), device, "wrote out of bounds")


@each_op
def test_the_incoming_gradient_overwritten(op, device):
    def public(**given):
        class Spoils(torch.autograd.Function):
            @staticmethod
            def forward(ctx, result):
                return result.view_as(result)

            @staticmethod
            def backward(ctx, grad):
                copy = grad.clone()
                grad.mul_(2.0)
                return copy

        result = op.public(**given)
        return tuple(map(Spoils.apply, result)) if isinstance(result, tuple) else Spoils.apply(result)

    wrong = dataclasses.replace(op, public=public)
    for check in ("parity", "retained graph"):
        _caught(check, wrong, device, "incoming gradient was modified")


@each_op
def test_what_lies_beside_the_inputs_is_read(op, device):
    """The element after the last one added to the output, masked in most places: poison spoils it."""
    first = op.differentiable[0]
    beside = []

    def peek(leaves):
        tensor = leaves[first].detach()
        if tensor.untyped_storage().nbytes() > (tensor.storage_offset() + tensor.numel()) * tensor.itemsize:
            beside.append(tensor.as_strided((), (), tensor.storage_offset() + tensor.numel()))
        return leaves

    wrong = spoiled(op, inputs=peek, output=lambda t: t + (0.0 * beside.pop() if beside else 0.0))
    _caught("parity", wrong, device, "output: max error nan")


@each_op
def test_memory_that_was_there_before_is_used(op, device):
    """The allocation's first contents decide the last bit, NaN not let through: what a maximum with NaN does."""

    def remembers(result):
        out = torch.empty_like(result)
        return torch.where(out.isnan(), result, result + 1e-6 * result.abs().max())

    CHECKS["parity"](spoiled(op, output=remembers), small(op), torch.float32, device)
    _caught("repeats", spoiled(op, output=remembers), device, "output.* came out otherwise")


@each_op
def test_a_gradient_that_depends_on_which_are_wanted(op, device):
    """Missing, or another, where the others are frozen."""
    names = [name for name in small(op).shapes if name in op.differentiable]
    if len(names) == 1:  # there is nothing to freeze
        return

    def missing(found):
        return {} if set(found) == {names[0]} else found

    def other(found):
        return {name: 1.01 * value for name, value in found.items()} if set(found) == {names[0]} else found

    _caught("some gradients", spoiled(op, gradients=missing), device, "with only")
    _caught("some gradients", spoiled(op, gradients=other), device, "came out otherwise")


@each_op
def test_strides_that_are_ignored(op, device):
    """Every input walked as if its elements followed each other."""

    def careless(leaves):
        return {
            name: tensor.as_strided(tensor.shape, torch.empty(tensor.shape, device="meta").stride())
            if tensor.is_floating_point()
            else tensor
            for name, tensor in leaves.items()
        }

    _caught("layout", spoiled(op, inputs=careless), device, "came out otherwise")


@pytest.mark.parametrize("spoiled_pass", [None, "backward", "forward"])
def test_another_dropout_mask_in_one_pass(spoiled_pass, device):
    op = OPS["scaled_dot_product_attention"]

    def public(**given):
        tensors = {name: value for name, value in given.items() if torch.is_tensor(value)}
        options = {name: value for name, value in given.items() if name not in tensors}

        class Redrawn(torch.autograd.Function):
            """Forward and backward each compute the output anew, with a seed that was drawn anew."""

            @staticmethod
            def forward(ctx, *values):
                ctx.save_for_backward(*values)
                ctx.state = generator_of(device).get_rng_state()
                return op.public(**dict(zip(tensors, values, strict=True)), **options)

            @staticmethod
            def backward(ctx, grad):
                if spoiled_pass is None:
                    generator_of(device).set_rng_state(ctx.state)
                with torch.enable_grad():
                    leaves = [value.detach().requires_grad_() for value in ctx.saved_tensors]
                    return torch.autograd.grad(
                        op.public(**dict(zip(tensors, leaves, strict=True)), **options), leaves, grad
                    )

        if spoiled_pass == "forward":
            torch.rand(1, device=device)
        return Redrawn.apply(*tensors.values())

    shape, options = {"b": 1, "h": 1, "q": 9, "k": 12, "d": 16}, {"dropout_p": 0.4}
    wrong = dataclasses.replace(op, public=public)
    if spoiled_pass is None:
        hold_one_mask(wrong, shape, options, torch.float32, device)
        return
    with pytest.raises(AssertionError, match=r"dquery|output"):
        hold_one_mask(wrong, shape, options, torch.float32, device)


# ---------------------------------------------------------------- hard values


def test_nan_that_is_lost_or_spreads(device):
    """NaN taken for nothing, a row that spoils its neighbours, an infinity turned into a number."""
    op, case = OPS["layer_norm"], Case("rows", {"input": (5, 24)}, {"normalized_shape": (24,)})
    hold_hard_values(spoiled(op), case, torch.float32, device, "nan")
    wrongs = {
        "nan": [_lost, lambda t: torch.where(t.isnan().any(), math.nan, t)],
        "inf": [_lost, lambda t: torch.where(t.isnan().any(0), math.nan, t)],
    }
    for hard, spoils in wrongs.items():
        for spoil in spoils:
            with pytest.raises(AssertionError, match=r"input: output: .* NaN or infinite otherwise"):
                hold_hard_values(spoiled(op, output=spoil), case, torch.float32, device, hard)
            with pytest.raises(AssertionError, match=r"dinput: .* NaN or infinite otherwise"):
                wrong = spoiled(op, gradients=lambda found, spoil=spoil: {n: spoil(g) for n, g in found.items()})
                hold_hard_values(wrong, case, torch.float32, device, hard)
    infinite = spoiled(op, output=lambda t: t.nan_to_num(math.nan, 3e38, -3e38))
    with pytest.raises(AssertionError, match="bias: output"):
        hold_hard_values(infinite, case._replace(shapes=case.shapes | {"bias": (24,)}), torch.float32, device, "inf")


def _lost(tensor):
    return tensor.nan_to_num(0.0)


def test_an_oracle_on_the_cpu_is_the_same_function():
    """Of several outputs, with gradients."""
    op = OPS["add_layer_norm"]
    case = laid_out(op)
    inputs = inputs_of(op, case, torch.float32, "cpu")
    grad = incoming(op, inputs, case.options)
    here, there = (differentiate(f, op, inputs, case.options, grad) for f in (op.torch, on_the_cpu(op.torch)))
    assert here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in here)
