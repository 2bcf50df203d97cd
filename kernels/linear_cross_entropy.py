"""Softmax cross-entropy of a linear layer's output, cross_entropy(linear(input, ...), target), the logits never whole.

With input X (N, H), weights W (V, H), bias b, and the loss of kernels/cross_entropy.py over logits Z = X W^T + b:

    dZ as there        dX = dZ W        dW = dZ^T X        db = sum over rows of dZ

Z and dZ have N * V elements, which for a language model is more than everything else together. So the rows go
through in chunks: a product makes the chunk's logits in a workspace, one Triton kernel takes their losses and
writes dZ over them, two products add the chunk's part to dX and dW. For "mean" and "sum" this happens in
the forward pass: the incoming gradient g is one number, so dX, dW and db are made for g = 1 and backward
multiplies. That takes three products of 2 N H V operations, as many as with the logits kept, and no fourth to
make them again. For "none", where every row has its own g, forward saves two numbers a row, and backward
makes the logits a second time: four products.

For "mean" the division by the sum of the targets' weights waits too: a dZ divided by some ten thousand rows would
vanish in fp16. The chunks' dZ are made with weights w_y scaled to an average of 1, and the division by the
number of rows happens in fp32, in the multiplication that backward does anyway.

Saved for backward: dX in the products' dtype, dW and db in fp32 ("mean", "sum"), or the inputs and those numbers
("none"). dW and db are summed in fp32 from products with fp32 results, and rounded once. The products are PyTorch's.

Chunks whose gradients are made in the forward pass: Liger Kernel, Hsu et al. (2024),
https://arxiv.org/abs/2410.10989. Softmax in one walk: Milakov and Gimelshein (2018), https://arxiv.org/abs/1805.02867.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from kernels import reference
from kernels.cross_entropy import plan_backward as plan_logits_backward
from kernels.device import Device
from kernels.losses import (
    check_options,
    check_shapes,
    check_targets,
    lanes,
    long_row_sums,
    numbers,
    row_losses,
    row_scales,
    row_sums,
    row_targets,
    tile,
    weight_sum,
    write_row_gradients,
    write_rows,
)
from kernels.op import (
    CHECK_VALUES,
    Case,
    Cost,
    Launch,
    Op,
    Specs,
    autocast_dtype,
    cast,
    cdiv,
    check_tensors,
    next_power_of_2,
    plan_only,
    pointers,
    refuse_transforms,
    register,
    run,
    tl,
    triton,
)

# ---------------------------------------------------------------- kernels


@triton.jit
def _linear_cross_entropy_forward(
    logits_ptr, target_ptr, weight_ptr, weight_sum_ptr, factor_ptr, losses_ptr, sums_ptr,
    n_rows, row_stride, ignore_index, smoothing, V,
    BLOCK_V: tl.constexpr, ROWS: tl.constexpr, SMOOTH: tl.constexpr, PADDED: tl.constexpr, GRADIENTS: tl.constexpr,
    LANES: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """A program owns ROWS rows of a chunk: their losses, peaks and totals, and if GRADIENTS dZ, over the logits.

    row_stride is a multiple of 16, so rows are read and written to their end: masks at V would make every access one
    element wide.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = rows < n_rows
    row_ptr = logits_ptr + tl.program_id(0).to(tl.int64) * row_stride
    logits_ptr += rows[:, None] * row_stride
    if ROWS == 1:
        inner = V // UNIT * UNIT
        peak, total, below = long_row_sums(
            row_ptr, row_ptr, 0, inner, weight_ptr, V, BLOCK_V, LANES, UNIT, PADDED, SMOOTH
        )
    else:
        peak, total, below = row_sums(logits_ptr, weight_ptr, in_rows, V, row_stride, BLOCK_V, ROWS, SMOOTH, PADDED)
    target = tl.load(target_ptr + rows, mask=in_rows, other=0)
    target_logit, target_weight = row_targets(logits_ptr, target, weight_ptr, in_rows, ignore_index, V)
    loss = row_losses(
        target, target_logit, target_weight, weight_ptr, weight_sum_ptr, peak, total, below, ignore_index, smoothing, V,
        SMOOTH,
    )  # fmt: skip
    tl.store(losses_ptr + rows, loss, mask=in_rows)
    if sums_ptr is not None:
        tl.store(sums_ptr + 2 * rows, peak, mask=in_rows)
        tl.store(sums_ptr + 2 * rows + 1, total, mask=in_rows)
    if GRADIENTS:
        factor = tl.full([ROWS], 1.0, tl.float32)
        if factor_ptr is not None:
            factor *= tl.load(factor_ptr)
        scales, kept = row_scales(
            target, target_weight, factor, None, peak, total, weight_sum_ptr, ignore_index, smoothing, V, SMOOTH
        )
        if ROWS == 1:
            keeps = tl.load(target_ptr + tl.program_id(0)) != ignore_index
            write_row_gradients(
                row_ptr, row_ptr, row_ptr, row_ptr, 0, row_stride // UNIT * UNIT, row_stride, keeps, scales,
                target_logit, weight_ptr, V, BLOCK_V, LANES * UNIT, UNIT, False, SMOOTH,
            )  # fmt: skip
        else:
            tl.debug_barrier()  # another thread may still be reading its target's logit
            for start in range(0, V, BLOCK_V):
                columns = start + tl.arange(0, BLOCK_V)
                write_rows(logits_ptr, logits_ptr, columns, in_rows, row_stride, kept, scales, weight_ptr, V, SMOOTH)


@triton.jit
def _linear_cross_entropy_backward_scale(grad_ptr, count_ptr, saved_ptr, scaled_ptr, n, BLOCK: tl.constexpr):
    """A program owns BLOCK elements of one gradient: what forward made, times grad, over the count if there is one."""
    elements = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    grad = tl.load(grad_ptr).to(tl.float32)
    if count_ptr is not None:
        grad = grad / tl.load(count_ptr)
    x = tl.load(saved_ptr + elements, mask=elements < n, other=0.0).to(tl.float32)
    tl.store(scaled_ptr + elements, cast(x * grad, scaled_ptr.dtype.element_ty), mask=elements < n)


# ---------------------------------------------------------------- plan

SMALL = 32 << 20  # a chunk's logits may always have as many bytes as this
FEWEST, MOST = 512, 4096  # rows of a chunk: products of fewer are slow, of more no faster


def chunk_rows(n_rows: int, hidden: int, n_classes: int, itemsize: int) -> int:
    """How many of n_rows rows go through at once: a multiple of 128, or all of them.

    An eighth of the logits, or as much as a quarter of the fp32 sum of dW, beside which that does not show; but 512 to
    4096 rows, and more if 32 MiB hold them. Adding a chunk of c rows to dW reads and writes the sum, so it does c / 4
    operations for each byte: few rows would leave a GPU waiting for memory. The chunks come out as even as multiples of
    128 allow.
    """
    row = n_classes * itemsize
    rows = max(SMALL // max(row, 1), min(MOST, max(FEWEST, n_rows // 8, hidden // itemsize))) // 128 * 128
    if rows >= n_rows:
        return n_rows
    return cdiv(cdiv(n_rows, cdiv(n_rows, rows)), 128) * 128


def plan_forward(specs: Specs, options: dict, device: Device) -> list[Launch]:
    """One chunk."""
    n_rows, n_classes = specs["logits"].shape
    block_v, rows, warps = tile(n_rows, n_classes, device, "forward")
    arguments = pointers(specs, "logits", "target", "weight", "weight_sum", "factor", "losses", "sums")
    arguments |= {"n_rows": n_rows, "row_stride": specs["logits"].stride[0]} | numbers(n_classes, options)
    constexprs = {"BLOCK_V": block_v, "ROWS": rows, "SMOOTH": options["label_smoothing"] > 0.0}
    constexprs |= {"PADDED": specs["logits"].stride[0] > n_classes, "GRADIENTS": options["gradients"]}
    constexprs |= lanes(specs["logits"], block_v, warps, device)
    return [Launch(_linear_cross_entropy_forward, (cdiv(n_rows, rows),), arguments, constexprs, warps, 2)]


def plan_scale(specs: Specs, options: dict, device: Device) -> list[Launch]:
    """One gradient."""
    n = math.prod(specs["saved"].shape)
    block = min(max(16, next_power_of_2(n)), 1 << 20) if device.arch == "interpreter" else 2048
    arguments = pointers(specs, "grad", "count", "saved", "scaled") | {"n": n}
    return [Launch(_linear_cross_entropy_backward_scale, (cdiv(n, block),), arguments, {"BLOCK": block}, 4, 1)]


# ---------------------------------------------------------------- products


def _matrix(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor` in `dtype`, its rows contiguous and apart, as BLAS takes it without a copy at every product."""
    tensor = tensor.to(dtype)
    apart = tensor.shape[0] <= 1 or tensor.stride(0) >= tensor.shape[1]
    return tensor if apart and (tensor.shape[1] <= 1 or tensor.stride(1) == 1) else tensor.contiguous()


def _workspace(like: torch.Tensor, n_rows: int, hidden: int, n_classes: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory for one chunk's logits; rows begin at multiples of 16 elements, so that they load and multiply fast."""
    rows = chunk_rows(n_rows, hidden, n_classes, dtype.itemsize)
    return like.new_empty((rows, cdiv(n_classes, 16) * 16), dtype=dtype)[:, :n_classes]


def _chunks(n_rows: int, workspace: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """The rows of each chunk, and its place in the workspace."""
    for start in range(0, n_rows, max(1, workspace.shape[0])):
        rows = slice(start, min(start + workspace.shape[0], n_rows))
        yield rows, workspace[: rows.stop - rows.start]


def _logits(input: torch.Tensor, linear_weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    # the forms with out= everywhere: autocast leaves them alone
    if bias is None:
        torch.mm(input, linear_weight.t(), out=out)
    else:
        torch.addmm(bias, input, linear_weight.t(), out=out)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, first: bool) -> None:
    """total += a @ b in fp32, whatever dtype a and b have; total = a @ b if it is the first."""
    as_is = {}
    if a.dtype != torch.float32:
        if a.is_cuda and torch.version.hip is None:
            as_is = {"out_dtype": torch.float32}
        else:  # elsewhere products of a low precision have results of a low precision
            a, b = a.float(), b.float()
    if first:
        torch.mm(a, b, out=total, **as_is)
    else:
        torch.addmm(total, a, b, out=total, **as_is)


class _Gradients:
    """Sums of the gradients over the chunks: of input in the products' dtype, of weight and bias in fp32."""

    def __init__(self, input: torch.Tensor, linear_weight: torch.Tensor, dtype: torch.dtype, needs: list[bool]):
        self.tensors = _empty_gradients(input, linear_weight, dtype, needs)
        self.needs = needs
        self.empty = True
        if not input.shape[0]:
            for tensor in self.tensors:
                tensor.zero_()

    def add(self, dlogits: torch.Tensor, rows: slice, input: torch.Tensor, linear_weight: torch.Tensor) -> None:
        dinput, dweight, dbias = self.tensors
        if self.needs[0]:
            torch.mm(dlogits, linear_weight, out=dinput[rows])
        if self.needs[1]:
            _add_product(dweight, dlogits.t(), input[rows], self.empty)
        if self.needs[2] and self.empty:
            torch.sum(dlogits, 0, dtype=torch.float32, out=dbias)
        elif self.needs[2]:
            dbias += dlogits.sum(0, dtype=torch.float32)
        self.empty = False


# ---------------------------------------------------------------- registration


def _normalisers(target, weight, n_classes, ignore_index, reduction):
    """For "mean" (what divides the loss, what divides the gradients in the end, what they are made with); else Nones.

    They are made with the average weight's inverse, so that the number of rows is left to divide by.
    """
    if reduction != "mean":
        return None, None, None
    kept = target != ignore_index
    count = kept.sum().to(torch.float32)
    if weight is None:
        return count, count.clamp(min=1.0), None
    kept &= (target >= 0) & (target < n_classes)
    if n_classes:
        divisor = torch.where(kept, weight.to(torch.float32)[torch.where(kept, target, 0)], 0.0).sum()
    else:  # no target weighs anything, and none can be looked up
        divisor = weight.sum(dtype=torch.float32)
    factor, most = count / divisor, torch.finfo(torch.float32).max
    beyond = factor.isinf() & (divisor != 0.0)  # weights next to nothing: then as far as fp32 goes, and less is left
    factor = torch.where(beyond, divisor.sign() * most, factor)
    return divisor, torch.where(beyond, factor * divisor, count.clamp(min=1.0)), factor


def _empty_gradients(input, linear_weight, dtype, needs):
    """What is not needed is an empty tensor: an op cannot return None."""
    n_rows, (n_classes, hidden) = input.shape[0], linear_weight.shape
    return (
        input.new_empty((n_rows, hidden) if needs[0] else 0, dtype=dtype),
        input.new_empty((n_classes, hidden) if needs[1] else 0, dtype=torch.float32),
        input.new_empty(n_classes if needs[2] else 0, dtype=torch.float32),
    )


def _mean(total: torch.Tensor, divisor: torch.Tensor, weight: torch.Tensor | None, label_smoothing: float):
    """The sum of the losses over the sum of the targets' weights, NaN where that is zero."""
    loss = total / divisor
    if weight is not None and label_smoothing > 0.0:  # where no target weighs anything, 0 / 0 is a part of the sum
        loss = torch.where(divisor == 0.0, torch.nan, loss)
    return loss


def _forward(
    input: torch.Tensor,
    linear_weight: torch.Tensor,
    target: torch.Tensor,
    linear_bias: torch.Tensor | None,
    weight: torch.Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(N, H), (V, H), int64 (N,), (V,), (V,) -> loss of `out_dtype`, what backward needs, and the workspace.

    Backward needs the rows' peaks and totals, fp32 (N, 2), for "none"; for "mean" the number of rows that count, at
    least 1, fp32 (); and the gradients that `needs` asks for of input (`dtype`), linear_weight and linear_bias (fp32),
    before that division. The products are in `dtype`, to which autocast may have set them. The workspace is of no use
    to anyone: it is returned because memory trackers see what ops return and nothing else.
    """
    (n_rows, hidden), n_classes = input.shape, linear_weight.shape[0]
    if CHECK_VALUES and not target.is_meta:
        check_targets("linear_cross_entropy", target, n_classes, ignore_index)
    none = reduction == "none"
    divisor, count, factor = _normalisers(target, weight, n_classes, ignore_index, reduction)
    x, w = _matrix(input, dtype), _matrix(linear_weight, dtype)
    bias = None if linear_bias is None else linear_bias.to(dtype)
    losses = input.new_empty(n_rows, dtype=torch.float32)
    sums = input.new_empty((n_rows if none else 0, 2), dtype=torch.float32)
    gradients = _Gradients(input, linear_weight, dtype, needs)
    shared = {"weight": weight, "weight_sum": weight_sum(weight, label_smoothing), "factor": factor}
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "gradients": any(needs)}

    workspace = _workspace(input, n_rows, hidden, n_classes, dtype)
    for rows, logits in _chunks(n_rows, workspace):
        _logits(x[rows], w, bias, logits)
        own = {"logits": logits, "target": target[rows], "losses": losses[rows], "sums": sums[rows] if none else None}
        run(plan_forward, own | shared, **options)
        if any(needs):
            gradients.add(logits, rows, x, w)

    loss = losses if none else losses.sum()
    if reduction == "mean":
        loss = _mean(loss, divisor, weight, label_smoothing)
    return loss.to(out_dtype), sums, input.new_empty(0) if count is None else count, *gradients.tensors, workspace


def _fake_forward(
    input, linear_weight, target, linear_bias, weight, ignore_index, reduction, label_smoothing, dtype, out_dtype, needs
):
    n_rows, none = input.shape[0], reduction == "none"
    loss = input.new_empty(n_rows if none else (), dtype=out_dtype)
    sums = input.new_empty((n_rows if none else 0, 2), dtype=torch.float32)
    if reduction == "mean":
        count = input.new_empty((), dtype=torch.float32)
    else:
        count = input.new_empty(0)
    workspace = _workspace(input, *input.shape, linear_weight.shape[0], dtype)
    return loss, sums, count, *_empty_gradients(input, linear_weight, dtype, needs), workspace


def _rounded(gradients, input, linear_weight, linear_bias):
    like = (input, linear_weight, linear_weight if linear_bias is None else linear_bias)
    return tuple(gradient.to(tensor.dtype) for gradient, tensor in zip(gradients, like, strict=True))


def _scale(
    grad: torch.Tensor,
    count: torch.Tensor,
    dinput: torch.Tensor,
    dweight: torch.Tensor,
    dbias: torch.Tensor,
    input_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For "mean" and "sum": the gradients of input, weight and bias in these dtypes, from those that forward made."""
    results = _fake_scale(grad, count, dinput, dweight, dbias, input_dtype, weight_dtype, bias_dtype, needs)
    count = count if count.numel() else None
    for need, saved, scaled in zip(needs, (dinput, dweight, dbias), results, strict=True):
        if need:
            run(plan_scale, {"grad": grad, "count": count, "saved": saved, "scaled": scaled})
    return results


def _fake_scale(grad, count, dinput, dweight, dbias, input_dtype, weight_dtype, bias_dtype, needs):
    saved = ((dinput, input_dtype), (dweight, weight_dtype), (dbias, bias_dtype))
    return tuple(
        tensor.new_empty(tensor.shape if need else 0, dtype=dtype)
        for (tensor, dtype), need in zip(saved, needs, strict=True)
    )


def _backward(
    grad: torch.Tensor,
    input: torch.Tensor,
    linear_weight: torch.Tensor,
    target: torch.Tensor,
    linear_bias: torch.Tensor | None,
    weight: torch.Tensor | None,
    sums: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    dtype: torch.dtype,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """For "none": the gradients of input, weight and bias that `needs` asks for, and the workspace as in forward."""
    (n_rows, hidden), n_classes = input.shape, linear_weight.shape[0]
    x, w = _matrix(input, dtype), _matrix(linear_weight, dtype)
    bias = None if linear_bias is None else linear_bias.to(dtype)
    gradients = _Gradients(input, linear_weight, dtype, needs)
    shared = {"weight": weight, "weight_sum": weight_sum(weight, label_smoothing), "divisor": None, "changed": None}
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "padded": True}

    workspace = _workspace(input, n_rows, hidden, n_classes, dtype)
    for rows, logits in _chunks(n_rows, workspace):
        _logits(x[rows], w, bias, logits)
        own = {"grad": grad[rows], "logits": logits, "target": target[rows], "sums": sums[rows], "dlogits": logits}
        run(plan_logits_backward, own | shared, **options)
        gradients.add(logits, rows, x, w)

    return *_rounded(gradients.tensors, input, linear_weight, linear_bias), workspace


def _fake_backward(
    grad, input, linear_weight, target, linear_bias, weight, sums, ignore_index, label_smoothing, dtype, needs
):
    gradients = _rounded(_empty_gradients(input, linear_weight, dtype, needs), input, linear_weight, linear_bias)
    return *gradients, _workspace(input, *input.shape, linear_weight.shape[0], dtype)


def _save(ctx, inputs, output):
    input, linear_weight, target, linear_bias, weight, ignore_index, reduction, label_smoothing, dtype, _, made = inputs
    _, sums, count, *gradients, _ = output
    # autograd holds on to what is marked for as long as the loss lives, so neither the workspace nor the gradients are.
    # That they count as differentiable has a use: a second derivative finds its way from them to `scale`, and raises.
    ctx.mark_non_differentiable(sums, count)
    ctx.reduction = reduction
    if reduction == "none":
        ctx.options = (ignore_index, label_smoothing, dtype)
        ctx.save_for_backward(input, linear_weight, target, linear_bias, weight, sums)
        return
    ctx.made = made
    ctx.dtypes = (input.dtype, linear_weight.dtype, dtype if linear_bias is None else linear_bias.dtype)
    ctx.save_for_backward(count, *gradients)


def _gradients(ctx, grad, *_):
    needs = [ctx.needs_input_grad[place] for place in (0, 1, 3)]
    if grad is None:
        return (None,) * 11
    if ctx.reduction == "none":
        *gradients, _ = backward(grad, *ctx.saved_tensors, *ctx.options, needs)
    else:
        for name, need, made in zip(("input", "linear_weight", "linear_bias"), needs, ctx.made, strict=True):
            if need and not made:
                raise RuntimeError(f"linear_cross_entropy: {name} required no gradient in the forward pass")
        gradients = scale(grad, *ctx.saved_tensors, *ctx.dtypes, needs)
    dinput, dweight, dbias = (tensor if need else None for tensor, need in zip(gradients, needs, strict=True))
    return dinput, dweight, None, dbias, *[None] * 7


forward = register("linear_cross_entropy", _forward, _fake_forward, _gradients, _save)
scale = register("linear_cross_entropy_scale", _scale, _fake_scale)
backward = register("linear_cross_entropy_backward", _backward, _fake_backward)


def _flops(input_shape, linear_weight_shape, products: int) -> int:
    return 2 * math.prod(input_shape) * linear_weight_shape[0] * products


@register_flop_formula(torch.ops.kernels.linear_cross_entropy)
def _forward_flops(input_shape, linear_weight_shape, *arguments, **_) -> int:
    needs = arguments[-1]
    return _flops(input_shape, linear_weight_shape, 1 + needs[0] + needs[1])


@register_flop_formula(torch.ops.kernels.linear_cross_entropy_scale)
def _scale_flops(*_, **__) -> int:
    return 0  # no product


@register_flop_formula(torch.ops.kernels.linear_cross_entropy_backward)
def _backward_flops(grad_shape, input_shape, linear_weight_shape, *arguments, **_) -> int:
    needs = arguments[-1]
    return _flops(input_shape, linear_weight_shape, 1 + needs[0] + needs[1])


# ---------------------------------------------------------------- public


def _check(input, linear_weight, target, linear_bias, weight, ignore_index, reduction, label_smoothing):
    name = "linear_cross_entropy"
    probabilities = input.shape[:-1] + linear_weight.shape[:1]
    check_options(name, target, probabilities, ignore_index, reduction, label_smoothing)
    for what, tensor in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        same = tensor is None or tensor.dtype == input.dtype or autocast_dtype(input.device) is not None
        if not same:
            raise RuntimeError(f"{name}: {what} is {tensor.dtype}, input {input.dtype}; they must be of one dtype")
    if input.dim() == 0:
        raise RuntimeError(f"{name}: input must be (H,) or (..., H), got a scalar")
    if linear_weight.dim() < 2:
        raise RuntimeError(f"{name}: linear_weight must be (V, H), got shape {list(linear_weight.shape)}")
    if linear_weight.dim() > 2:
        raise NotImplementedError(
            f"{name}: linear_weight of shape {list(linear_weight.shape)}, a K-dimensional loss, is not implemented; "
            "(V, H) is"
        )
    n_classes, hidden = linear_weight.shape
    if input.shape[-1] != hidden:
        raise RuntimeError(f"{name}: input {list(input.shape)} does not end in linear_weight's {hidden} features")
    check_shapes(name, input, target, input.shape[:-1], n_classes, weight, linear_bias)


def linear_cross_entropy(
    input: torch.Tensor,
    linear_weight: torch.Tensor,
    target: torch.Tensor,
    *,
    linear_bias: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: object = None,
) -> torch.Tensor:
    """`torch.nn.functional.cross_entropy(linear(input, linear_weight, linear_bias), target, ...)`, logits never whole.

    input (..., H), linear_weight (V, H), linear_bias (V,) of one dtype, fp32, fp16 or bf16; int64 targets (...);
    class weights (V,) of any of these dtypes -> the mean or sum, or with reduction="none" the losses in target's
    shape, in input's dtype. Under autocast the products have its dtype, the loss is fp32, and gradients have the dtypes
    of what they belong to. "mean" divides by the sum of the targets' weights, and is NaN where that is zero.
    The signature is that of `torch.nn.functional.linear_cross_entropy` (PyTorch 2.13): ignore_index=None is -100.

    Softmax, losses and the gradients of weight and bias are summed in fp32. With "mean" and "sum" gradients are made in
    the forward pass, of those tensors that require one then; "none" makes the logits again in backward.

    A target outside [0, V) that is not ignore_index makes its row's loss NaN; in the interpreter, and with
    KERNELS_DEBUG=1, it raises IndexError. Raises TypeError for what is no tensor or no number, RuntimeError or
    ValueError for shapes, dtypes, devices and options that do not fit, RuntimeError for a weight that requires a
    gradient, NotImplementedError for probability targets, K-dimensional linear weights, options, other dtypes, second
    derivatives and torch.func's transforms.
    """
    tensors = {"input": input, "linear_weight": linear_weight, "target": target}
    tensors |= {"linear_bias": linear_bias, "weight": weight}
    check_tensors("linear_cross_entropy", tensors, optional=("linear_bias", "weight"), integers=("target",))
    refuse_transforms("linear_cross_entropy", input, linear_weight, linear_bias, weight)
    if options is not None:
        raise NotImplementedError("linear_cross_entropy: options are not implemented; chunk_rows chooses the chunks")
    ignore_index = -100 if ignore_index is None else ignore_index
    if input.dim() == 1 and target.shape == (1,):  # PyTorch takes it for one target without a batch
        target = target.reshape(())
    _check(input, linear_weight, target, linear_bias, weight, ignore_index, reduction, label_smoothing)
    dtype = autocast_dtype(input.device)
    out_dtype, dtype = (input.dtype, input.dtype) if dtype is None else (torch.float32, dtype)
    learns = torch.is_grad_enabled() and reduction != "none"
    needs = [learns and tensor is not None and tensor.requires_grad for tensor in (input, linear_weight, linear_bias)]
    weight = None if weight is None else weight.contiguous()
    labels = target.reshape(-1).to(torch.int64).contiguous()
    rows = input.reshape(labels.shape[0], input.shape[-1])
    loss = forward(
        rows, linear_weight, labels, linear_bias, weight, int(ignore_index), reduction, float(label_smoothing),
        dtype, out_dtype, needs,
    )[0]  # fmt: skip
    return loss.view(target.shape) if reduction == "none" and target.dim() != 1 else loss


# ---------------------------------------------------------------- catalogue


def _torch_function():
    """PyTorch's own function; before PyTorch 2.13 the two that it stands for."""

    def linear_cross_entropy(
        input, linear_weight, target, *, linear_bias=None, weight=None, reduction="mean", ignore_index=None,
        label_smoothing=0.0, options=None,
    ):  # fmt: skip
        ignore_index = -100 if ignore_index is None else ignore_index
        logits = F.linear(input, linear_weight, linear_bias)
        return F.cross_entropy(
            logits, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
        )

    return getattr(F, "linear_cross_entropy", linear_cross_entropy)


def _draw(name: str, shape: tuple[int, ...], case: Case, generator: torch.Generator) -> torch.Tensor | None:
    """Targets are classes, every fifth ignored if the case has an ignore_index; logits are of order 1."""
    if name == "weight":
        return 0.5 + torch.rand(shape, generator=generator)
    if name != "target":
        return None
    target = torch.randint(0, case.shapes["linear_weight"][0], shape, generator=generator)
    if "ignore_index" in case.options:
        target.view(-1)[::5] = case.options["ignore_index"]
    return target


def _plan(inputs: dict, options: dict, device: Device) -> list[Launch]:
    """The launches of a forward and a backward pass in which every gradient is needed."""
    linear_weight, bias, weight = (inputs.get(name) for name in ("linear_weight", "linear_bias", "weight"))
    input = inputs["input"].reshape(-1, linear_weight.shape[1])
    target = inputs["target"].reshape(-1)
    ignore_index, smoothing = options.get("ignore_index", -100), options.get("label_smoothing", 0.0)
    reduction, dtype = options.get("reduction", "mean"), input.dtype
    needs = [True, True, bias is not None]
    none = reduction == "none"
    with plan_only(device) as launches:
        loss, sums, count, *gradients, _ = _forward(
            input, linear_weight, target, bias, weight, ignore_index, reduction, smoothing, dtype, dtype,
            [False] * 3 if none else needs,
        )  # fmt: skip
        if none:
            _backward(loss, input, linear_weight, target, bias, weight, sums, ignore_index, smoothing, dtype, needs)
        else:
            _scale(loss, count, *gradients, dtype, dtype, dtype, needs)
    return launches


def _cost(inputs: dict, options: dict) -> tuple[Cost, Cost]:
    """Operations of the three products that every gradient needs; bytes that ours, the kernels and the sums move.

    For "none" a fourth product saves the logits' memory, and is no work that has to be done.

    A chunk's logits are written by a product, read and written by the kernel (which finds what it reads twice in the
    cache), read by two products. The weights are read twice by every chunk, the fp32 sum of dW read and written.
    """
    input, linear_weight, target = inputs["input"], inputs["linear_weight"], inputs["target"]
    (n_classes, hidden), n_rows = linear_weight.shape, target.numel()
    logits = n_rows * n_classes * input.itemsize
    n_chunks = cdiv(n_rows, max(1, chunk_rows(n_rows, hidden, n_classes, input.itemsize)))
    weights = 4 * linear_weight.numel() * max(0, 2 * n_chunks - 1)
    product = 2 * n_rows * hidden * n_classes
    make = input.nbytes + n_chunks * linear_weight.nbytes + 2 * logits + target.nbytes + 4 * n_rows
    use = 2 * input.nbytes + n_chunks * linear_weight.nbytes + 2 * logits + weights
    if options.get("reduction") == "none":
        rounded = 4 * linear_weight.numel() + linear_weight.nbytes
        return Cost(product, make), Cost(2 * product, make + logits + use + rounded)
    scaled = 2 * input.nbytes + 4 * linear_weight.numel() + linear_weight.nbytes
    return Cost(3 * product, make + logits + use), Cost(0, scaled)


def _case(name: str, n_rows: int | None, hidden: int, n_classes: int, bias=False, weight=False, **options) -> Case:
    lead = () if n_rows is None else (n_rows,)
    shapes = {"input": (*lead, hidden), "linear_weight": (n_classes, hidden), "target": lead}
    shapes |= {"linear_bias": (n_classes,)} if bias else {}
    return Case(name, shapes | ({"weight": (n_classes,)} if weight else {}), options)


OP = Op(
    name="linear_cross_entropy",
    public=linear_cross_entropy,
    reference=reference.linear_cross_entropy,
    torch=_torch_function(),
    plan=_plan,
    cost=_cost,
    cases=(
        _case("one_class", 3, 4, 1),
        _case("one_feature", 5, 1, 7, bias=True),
        _case("no_batch", None, 8, 10),
        _case("one_row", 1, 8, 10, bias=True, reduction="sum"),
        _case("characters", 128, 48, 65),
        _case("prime", 31, 37, 101, reduction="none"),
        _case("bias", 67, 16, 50, bias=True),
        _case("sum", 17, 24, 100, reduction="sum", bias=True),
        _case("none", 17, 24, 100, reduction="none", bias=True),
        _case("ignored", 23, 20, 50, ignore_index=-100),
        _case("ignored_class", 23, 20, 50, ignore_index=3, reduction="none"),
        _case("smooth", 19, 16, 130, label_smoothing=0.1),
        _case("weighted", 19, 16, 130, weight=True),
        _case("weighted_smooth", 19, 16, 130, bias=True, weight=True, label_smoothing=0.3, ignore_index=7),
        _case("vocabulary", 6, 32, 50257),
        _case("long", 2, 8, 262_144, label_smoothing=0.1),
    ),
    sizes=(
        _case("gpt2", 16384, 768, 50304),
        _case("gpt2-none", 16384, 768, 50304, reduction="none"),
        _case("gpt2-50257", 8192, 768, 50257),
        _case("shakespeare", 16384, 384, 65),
        _case("llama3", 4096, 4096, 128256),
        _case("gemma", 2048, 2304, 256000),
        _case("gpt2-smooth-weighted", 8192, 768, 50304, bias=True, weight=True, label_smoothing=0.1),
    ),
    differentiable=("input", "linear_weight", "linear_bias"),
    draw=_draw,
)
