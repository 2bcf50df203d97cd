"""A residual added and the sum normalized, in one kernel; both are returned.

    s = input + residual, rounded to the dtype that PyTorch's sum has       y = layer_norm(s)

With ds' the gradient that reaches s from elsewhere, in a transformer along the residual stream, and dx the
gradient that layer_norm.py has for its input,

    dinput = dresidual = ds' + dx(dy)

is added in fp32 and rounded once; it is one tensor for both where they have one dtype. Saved for
backward: s, and mean and rstd in fp32, one of each a row. Forward reads input and residual and writes s
and y; backward reads s, dy and ds' and writes one gradient, or two of different dtypes. A sum in a kernel of
its own costs one pass over the tensor more forward and two more backward. Memory bandwidth is the bound.

The kernels and their plans are those of layer_norm.py.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from kernels import reference
from kernels.device import Device
from kernels.layer_norm import check, matrix, plan_backward, plan_forward, row, workspaces
from kernels.op import (
    Case,
    Cost,
    Launch,
    Op,
    autocast_dtype,
    check_tensors,
    plan_only,
    refuse_transforms,
    register,
    run,
)

# ---------------------------------------------------------------- registration


def _empty_forward(input, n_dims, sum_dtype, out_dtype):
    output = torch.empty_like(input, dtype=out_dtype, memory_format=torch.contiguous_format)
    mean = input.new_empty(math.prod(input.shape[: input.dim() - n_dims]), dtype=torch.float32)
    return output, torch.empty_like(output, dtype=sum_dtype), mean, torch.empty_like(mean)


def _forward(
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    n_dims: int,
    eps: float,
    sum_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two tensors of one shape -> output of `out_dtype` and sum of `sum_dtype` in that shape, mean and rstd fp32.

    It is given the whole shape, and not rows, as the gradient is one tensor for input and residual: autograd sees
    that two leaves were given one tensor, and copies; it does not see two views of one.
    """
    output, total, mean, rstd = results = _empty_forward(input, n_dims, sum_dtype, out_dtype)
    tensors = {"input": matrix(input, n_dims), "residual": matrix(residual, n_dims), "weight": weight, "bias": bias}
    tensors |= {"output": matrix(output, n_dims), "sum": matrix(total, n_dims), "mean": mean, "rstd": rstd}
    run(plan_forward, tensors, eps=eps)
    return results


def _empty_backward(total, weight, bias, input_dtype, residual_dtype, needs):
    """A gradient that is not asked for is an empty tensor: an op cannot return None."""
    dtypes = [input_dtype, residual_dtype, *(None if tensor is None else tensor.dtype for tensor in (weight, bias))]
    return tuple(
        torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format) if need else total.new_empty(0)
        for tensor, dtype, need in zip([total, total, weight, bias], dtypes, needs, strict=True)
    )


def _those(gradients, needs):
    return (tensor if need else None for tensor, need in zip(gradients, needs, strict=True))


def _backward(
    grad: torch.Tensor,
    grad_sum: torch.Tensor | None,
    total: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    n_dims: int,
    input_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of input, residual, weight and bias, those that `needs` asks for."""
    gradients = _empty_backward(total, weight, bias, input_dtype, residual_dtype, needs)
    dinput, dresidual, dweight, dbias = _those(gradients, needs)
    rows = matrix(total, n_dims)
    tensors = {"grad": matrix(grad, n_dims), "grad_sum": matrix(grad_sum, n_dims), "input": rows}
    tensors |= {"weight": weight, "mean": mean, "rstd": rstd, "dweight": dweight, "dbias": dbias}
    tensors |= {"dinput": matrix(dinput, n_dims), "dresidual": matrix(dresidual, n_dims)}
    run(plan_backward, tensors | workspaces(rows, *needs[2:]))
    return gradients


def _save(ctx, inputs, output):
    input, residual, weight, bias, n_dims, *_ = inputs
    _, total, mean, rstd = output
    # where neither summand requires a gradient, nor does the sum, as PyTorch's
    ctx.mark_non_differentiable(mean, rstd, *([] if any(ctx.needs_input_grad[:2]) else [total]))
    ctx.options = (n_dims, input.dtype, residual.dtype)
    ctx.save_for_backward(total, weight, bias, mean, rstd)


def _gradients(ctx, grad, grad_sum, _grad_mean, _grad_rstd):
    needs_input, needs_residual, needs_weight, needs_bias = ctx.needs_input_grad[:4]
    _, input_dtype, residual_dtype = ctx.options
    if grad is None:  # the norm was not used
        dinput = grad_sum.to(input_dtype) if needs_input else None
        dresidual = grad_sum.to(residual_dtype) if needs_residual else None
        return dinput, dresidual, *[None] * 6
    if not (needs_input or needs_residual):
        grad_sum = None
    shared = input_dtype == residual_dtype  # then one tensor is the gradient of both
    needs = [needs_input or (shared and needs_residual), needs_residual and not shared, needs_weight, needs_bias]
    gradients = backward(grad, grad_sum, *ctx.saved_tensors, *ctx.options, needs)
    dinput, dresidual, dweight, dbias = _those(gradients, needs)
    if shared and needs_residual:
        dinput, dresidual = dinput if needs_input else None, dinput
    return dinput, dresidual, dweight, dbias, *[None] * 4


forward = register(
    "add_layer_norm",
    _forward,
    lambda input, residual, weight, bias, n_dims, eps, sum_dtype, out_dtype: _empty_forward(
        input, n_dims, sum_dtype, out_dtype
    ),
    _gradients,
    _save,
)
backward = register(
    "add_layer_norm_backward",
    _backward,
    lambda grad, grad_sum, total, weight, bias, mean, rstd, n_dims, input_dtype, residual_dtype, needs: _empty_backward(
        total, weight, bias, input_dtype, residual_dtype, needs
    ),
)

# ---------------------------------------------------------------- public


def _sum_dtype(input, residual):
    """torch.result_type, which torch.compile cannot trace, for the dtypes that there are here."""
    if input.dtype == residual.dtype or bool(input.dim()) != bool(residual.dim()):
        return input.dtype if input.dim() else residual.dtype
    return torch.float32


def add_layer_norm(
    input: torch.Tensor,
    residual: torch.Tensor,
    normalized_shape: int | Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(layer_norm(input + residual), input + residual) in one kernel: (*, *normalized_shape) -> twice that shape.

    fp32, fp16 or bf16. The sum is rounded to the dtype that PyTorch's sum would have, so that bf16 added to an
    fp32 residual stream gives fp32, and what is normalized is that rounded sum. The norm has the sum's
    dtype; under autocast it has autocast's, where PyTorch's layer_norm returns fp32, and the
    sum is as without autocast, as PyTorch's is. weight and bias may have another of these dtypes.
    input and residual broadcast as in PyTorch's sum; one that does is copied to its full size first.

    Both results are differentiable; the gradients of the two are added inside the backward kernel.

    Raises TypeError for what is no tensor or no number, RuntimeError if shapes do not fit or devices differ,
    NotImplementedError for other dtypes, second derivatives and torch.func's transforms.
    """
    tensors = {"input": input, "residual": residual, "weight": weight, "bias": bias}
    check_tensors("add_layer_norm", tensors, optional=("weight", "bias"))
    refuse_transforms("add_layer_norm", input, residual, weight, bias)
    full_shape = input.shape
    if residual.shape != full_shape:  # PyTorch's own comparison takes longer than all the rest of a call
        try:
            full_shape = torch.broadcast_shapes(input.shape, residual.shape)
        except RuntimeError:
            raise RuntimeError(
                f"add_layer_norm: input {list(input.shape)} and residual {list(residual.shape)} do not broadcast"
            ) from None
    shape = check("add_layer_norm", full_shape, normalized_shape, eps, weight, bias)
    sum_dtype = _sum_dtype(input, residual)
    out_dtype = autocast_dtype(input.device) or sum_dtype
    if input.shape != full_shape or residual.shape != full_shape:
        input, residual = input.expand(full_shape), residual.expand(full_shape)
    return forward(input, residual, row(weight), row(bias), len(shape), float(eps), sum_dtype, out_dtype)[:2]


# ---------------------------------------------------------------- catalogue


def _torch(
    input: torch.Tensor,
    residual: torch.Tensor,
    normalized_shape: int | Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in PyTorch's own functions."""
    total = input + residual
    return F.layer_norm(total, normalized_shape, weight, bias, eps), total


def _plan(inputs: dict, options: dict, device: Device) -> list[Launch]:
    """The launches of a forward and a backward pass in which both results are used and every gradient is needed."""
    input, residual, shape = inputs["input"], inputs["residual"], options["normalized_shape"]
    n_dims, weight, bias = len(shape), row(inputs.get("weight")), row(inputs.get("bias"))
    dtypes = (input.dtype, residual.dtype)
    with plan_only(device) as launches:
        sum_dtype = _sum_dtype(input, residual)
        output, total, mean, rstd = _forward(input, residual, weight, bias, n_dims, 1e-5, sum_dtype, input.dtype)
        needs = [True, dtypes[0] != dtypes[1], weight is not None, bias is not None]
        _backward(output, total, total, weight, bias, mean, rstd, n_dims, *dtypes, needs)
    return launches


def _cost(inputs: dict, options: dict) -> tuple[Cost, Cost]:
    """Eight operations an element forward, fifteen backward; two tensors read and two written, three read and one."""
    input, residual = inputs["input"], inputs["residual"]
    total = input.numel() * _sum_dtype(input, residual).itemsize
    parameters = sum(inputs[name].nbytes for name in ("weight", "bias") if inputs.get(name) is not None)
    statistics = 8 * (input.numel() // math.prod(options["normalized_shape"]))
    gradients = input.nbytes + (residual.nbytes if input.dtype != residual.dtype else 0)
    return (
        Cost(8 * input.numel(), 2 * input.nbytes + residual.nbytes + total + parameters + statistics),
        Cost(15 * input.numel(), input.nbytes + 2 * total + gradients + 2 * parameters + statistics),
    )


def _case(name: str, *lead: int, shape: tuple[int, ...], weight: bool = True, bias: bool = True, **dtypes) -> Case:
    shapes = {"input": (*lead, *shape), "residual": (*lead, *shape)}
    shapes |= ({"weight": shape} if weight else {}) | ({"bias": shape} if bias else {})
    return Case(name, shapes, {"normalized_shape": shape}, dtypes)


OP = Op(
    name="add_layer_norm",
    public=add_layer_norm,
    reference=reference.add_layer_norm,
    torch=_torch,
    plan=_plan,
    cost=_cost,
    cases=(
        _case("one_row", shape=(64,)),
        _case("prime", 7, 13, shape=(67,)),
        _case("no_weight", 5, shape=(128,), weight=False, bias=False),
        _case("no_bias", 2, 9, shape=(384,), bias=False),
        _case("only_bias", 5, shape=(33,), weight=False),
        _case("two_dimensions", 6, shape=(5, 9)),
        _case("gpt2", 2, 33, shape=(768,)),
        _case("one_over_a_block", 3, shape=(4097,)),
        _case("long", 3, shape=(20_000,)),
    ),
    sizes=(
        _case("vocabulary-65", 16384, shape=(65,)),
        _case("384", 16384, shape=(384,)),
        _case("768", 16384, shape=(768,)),
        _case("768-fp32-stream", 16384, shape=(768,), residual=torch.float32),
        _case("1024", 16384, shape=(1024,)),
        _case("4096", 4096, shape=(4096,)),
        _case("8192", 4096, shape=(8192,)),
        _case("16384", 2048, shape=(16384,)),
        _case("262144", 256, shape=(262144,)),
    ),
    differentiable=("input", "residual", "weight", "bias"),
    outputs=("output", "sum"),
    replaces="`torch.nn.functional.layer_norm` of `input + residual`",
)
