"""Softmax cross-entropy of a matrix of logits, the softmax never stored.

With lse = log(sum over c of exp(x_c)), class weights w (1 unless given) and smoothing e over V classes,
a row with target y has

    loss = (1 - e) * w_y * (lse - x_y) + e / V * sum over c of w_c * (lse - x_c)
    dx_c = g * ((1 - e) * w_y * (p_c - [c = y]) + e / V * (p_c * sum(w) - w_c)),   p_c = exp(x_c - lse)

where g is the incoming gradient of the row: for "mean" that of the loss over the sum of w_y. Rows whose target
is ignore_index have loss and gradient zero and no part in that sum. A target outside [0, V) makes its row's
loss and gradient NaN.

Forward walks a row once with a running maximum and sum, its peak and its total, and saves these two: lse, peak +
log(total), would cost p its digits where logits are large. Backward makes p from the logits again, so the only buffer
of the logits' size is their gradient. It reads them and writes the gradient; of long rows forward does, while they are
in the cache, for an incoming gradient of 1, and backward only if another comes. Five to ten operations an element:
bandwidth is the bound.

Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018), https://arxiv.org/abs/1805.02867.
Szegedy et al., "Rethinking the Inception architecture" (2015), https://arxiv.org/abs/1512.00567, for smoothing.
"""

import functools

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode

from kernels import reference
from kernels.device import Device
from kernels.losses import (
    check_options,
    check_shapes,
    check_targets,
    lanes,
    long_row_sums,
    numbers,
    row_alone,
    row_losses,
    row_scales,
    row_sums,
    row_targets,
    target_weights,
    tile,
    weight_sum,
    write_part,
    write_row_ends,
    write_row_gradients,
    write_rows,
    write_target,
    write_whole,
)
from kernels.op import (
    CHECK_VALUES,
    Case,
    Cost,
    Launch,
    Op,
    Spec,
    Specs,
    autocast_dtype,
    cast,
    cdiv,
    check_tensors,
    facts_of,
    next_power_of_2,
    plan_only,
    pointers,
    refuse_transforms,
    register,
    rows_of,
    run,
    tl,
    triton,
)

# ---------------------------------------------------------------- kernels


@triton.jit
def _cross_entropy_weigh(target_ptr, weight_ptr, divisor_ptr, n_rows, ignore_index, V, BLOCK: tl.constexpr):
    """One program adds the weights of the targets in order."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n_rows, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        target = tl.load(target_ptr + rows, mask=rows < n_rows, other=-1)
        total += target_weights(target, weight_ptr, rows < n_rows, ignore_index, V)
    tl.store(divisor_ptr, tl.sum(total, axis=0))


@triton.jit
def _cross_entropy_forward(
    logits_ptr, target_ptr, weight_ptr, weight_sum_ptr, losses_ptr, parts_ptr, sums_ptr, divisor_ptr, dlogits_ptr,
    changed_ptr, n_rows, row_stride, ignore_index, smoothing, V,
    BLOCK_V: tl.constexpr, ROWS: tl.constexpr, SMOOTH: tl.constexpr, LANES: tl.constexpr, UNIT: tl.constexpr,
    ODD: tl.constexpr,
):  # fmt: skip
    """A program owns ROWS rows: their peak and total, and their losses, or its parts of the sums of losses and of
    the targets' weights. One row alone, whose weight is in divisor_ptr already, may have its gradient made too, for an
    incoming gradient of 1.

    LANES, UNIT, ODD: of long_row_sums and row_alone, which such a row takes.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = rows < n_rows
    row_ptr = logits_ptr + rows[:, None] * row_stride
    begin, inner_begin, head, inner = row_alone(tl.program_id(0).to(tl.int64), row_stride, V, UNIT, ODD)
    if ROWS == 1:
        peak, total, below = long_row_sums(
            logits_ptr + begin, logits_ptr + inner_begin, head, inner, weight_ptr, V, BLOCK_V, LANES, UNIT, ODD, SMOOTH
        )
    else:
        peak, total, below = row_sums(row_ptr, weight_ptr, in_rows, V, V, BLOCK_V, ROWS, SMOOTH, False)
    target = tl.load(target_ptr + rows, mask=in_rows, other=0)
    target_logit, target_weight = row_targets(row_ptr, target, weight_ptr, in_rows, ignore_index, V)
    loss = row_losses(
        target, target_logit, target_weight, weight_ptr, weight_sum_ptr, peak, total, below, ignore_index, smoothing, V,
        SMOOTH,
    )  # fmt: skip
    tl.store(sums_ptr + 2 * rows, peak, mask=in_rows)
    tl.store(sums_ptr + 2 * rows + 1, total, mask=in_rows)
    if losses_ptr is not None:
        tl.store(losses_ptr + rows, cast(loss, losses_ptr.dtype.element_ty), mask=in_rows)
    else:
        parts_ptr += tl.program_id(0)
        tl.store(parts_ptr, tl.sum(tl.where(in_rows, loss, 0.0), axis=0))
        if ROWS > 1:
            tl.store(parts_ptr + tl.num_programs(0), tl.sum(tl.where(in_rows, target_weight, 0.0), axis=0))
    if dlogits_ptr is not None:
        if tl.program_id(0) == 0:
            tl.store(changed_ptr, 0.0)
        one = tl.full([ROWS], 1.0, tl.float32)
        scales, _ = row_scales(
            target, target_weight, one, divisor_ptr, peak, total, weight_sum_ptr, ignore_index, smoothing, V, SMOOTH
        )
        kept = tl.load(target_ptr + tl.program_id(0)) != ignore_index
        write_row_gradients(
            logits_ptr + begin, dlogits_ptr + begin, logits_ptr + inner_begin, dlogits_ptr + inner_begin, head, inner,
            V, kept, scales, target_logit, weight_ptr, V, BLOCK_V, LANES * UNIT, UNIT, ODD, SMOOTH,
        )  # fmt: skip


@triton.jit
def _cross_entropy_reduce(
    parts_ptr, divisor_ptr, loss_ptr, n_parts,
    MEAN: tl.constexpr, WEIGHED: tl.constexpr, GUARDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program adds the parts of the losses in order, and those of the weights unless they are WEIGHED already or
    not asked for: the divisor, and the loss, a quotient if MEAN.

    GUARDED: the loss is NaN where the weights add up to zero, whatever the losses do.
    """
    places = tl.arange(0, BLOCK)
    losses = tl.zeros([BLOCK], tl.float32)
    weights = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n_parts, BLOCK):
        mask = start + places < n_parts
        losses += tl.load(parts_ptr + start + places, mask=mask, other=0.0)
        if MEAN and not WEIGHED:
            weights += tl.load(parts_ptr + n_parts + start + places, mask=mask, other=0.0)
    loss = tl.sum(losses, axis=0)
    if MEAN:
        if WEIGHED:
            divisor = tl.load(divisor_ptr)
        else:
            divisor = tl.sum(weights, axis=0)
            tl.store(divisor_ptr, divisor)
        loss = tl.div_rn(loss, divisor)
        if GUARDED:
            loss = tl.where(divisor == 0.0, float("nan"), loss)
    tl.store(loss_ptr, cast(loss, loss_ptr.dtype.element_ty))


@triton.jit
def _cross_entropy_backward(
    grad_ptr, logits_ptr, target_ptr, weight_ptr, weight_sum_ptr, sums_ptr, divisor_ptr, dlogits_ptr, changed_ptr,
    n_rows, grad_stride, row_stride, dlogits_stride, width, ignore_index, smoothing, V,
    BLOCK_V: tl.constexpr, ROWS: tl.constexpr, SMOOTH: tl.constexpr, UNIT: tl.constexpr, ODD: tl.constexpr,
    ALIKE: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_V columns of ROWS rows of dlogits, which may be the logits' own memory.

    width: how many columns to read and write, V or more if the rows are padded. UNIT, ODD: of row_alone; ALIKE: rows
    of dlogits begin as far within 16 bytes as those of the logits. With changed_ptr forward has made dlogits for a
    gradient of 1: if it is that, and none was another before, programs end; else they walk all tiles between them.
    """
    tiles = tl.cdiv(V, BLOCK_V)
    if changed_ptr is not None:
        again = tl.load(grad_ptr).to(tl.float32) != 1.0
        if again:
            tl.store(changed_ptr, 1.0)
        else:
            again = tl.load(changed_ptr) != 0.0
        if again:
            for tile in range(tl.program_id(0), tl.cdiv(n_rows, ROWS) * tiles, tl.num_programs(0)):
                _backward_tile(
                    tile // tiles, tile % tiles, grad_ptr, logits_ptr, target_ptr, weight_ptr, weight_sum_ptr,
                    sums_ptr, divisor_ptr, dlogits_ptr, n_rows, grad_stride, row_stride, dlogits_stride, width,
                    ignore_index, smoothing, V, BLOCK_V, ROWS, SMOOTH, UNIT, ODD, ALIKE,
                )  # fmt: skip
    else:
        _backward_tile(
            tl.program_id(0) // tiles, tl.program_id(0) % tiles, grad_ptr, logits_ptr, target_ptr, weight_ptr,
            weight_sum_ptr, sums_ptr, divisor_ptr, dlogits_ptr, n_rows, grad_stride, row_stride, dlogits_stride,
            width, ignore_index, smoothing, V, BLOCK_V, ROWS, SMOOTH, UNIT, ODD, ALIKE,
        )  # fmt: skip


@triton.jit
def _backward_tile(
    block, tile, grad_ptr, logits_ptr, target_ptr, weight_ptr, weight_sum_ptr, sums_ptr, divisor_ptr, dlogits_ptr,
    n_rows, grad_stride, row_stride, dlogits_stride, width, ignore_index, smoothing, V,
    BLOCK_V: tl.constexpr, ROWS: tl.constexpr, SMOOTH: tl.constexpr, UNIT: tl.constexpr, ODD: tl.constexpr,
    ALIKE: tl.constexpr,
):  # fmt: skip
    """_cross_entropy_backward's tile of one block of rows."""
    first = tl.cast(block, tl.int64) * ROWS
    rows = first + tl.arange(0, ROWS)
    in_rows = rows < n_rows
    target = tl.load(target_ptr + rows, mask=in_rows, other=0)
    grad = tl.load(grad_ptr + rows * grad_stride, mask=in_rows, other=0.0).to(tl.float32)
    peak = tl.load(sums_ptr + 2 * rows, mask=in_rows, other=0.0)
    total = tl.load(sums_ptr + 2 * rows + 1, mask=in_rows, other=1.0)
    target_weight = tl.full([ROWS], 1.0, tl.float32)  # as row_scales asks itself which rows count
    if weight_ptr is not None:
        target_weight = target_weights(target, weight_ptr, in_rows, ignore_index, V)
    scales, kept = row_scales(
        target, target_weight, grad, divisor_ptr, peak, total, weight_sum_ptr, ignore_index, smoothing, V, SMOOTH
    )
    if ROWS == 1:
        _write_tile_of_row(
            first, tile, logits_ptr, dlogits_ptr, tl.load(target_ptr + first), scales, weight_ptr, row_stride,
            dlogits_stride, width, ignore_index, V, BLOCK_V, SMOOTH, UNIT, ODD, ALIKE,
        )  # fmt: skip
    else:
        write_rows(
            logits_ptr + rows[:, None] * row_stride, dlogits_ptr + rows[:, None] * dlogits_stride,
            tile * BLOCK_V + tl.arange(0, BLOCK_V), in_rows, width, kept, scales, weight_ptr, V, SMOOTH,
        )  # fmt: skip


@triton.jit
def _write_tile_of_row(
    row, tile, logits_ptr, dlogits_ptr, target, scales, weight_ptr, row_stride, dlogits_stride, width, ignore_index, V,
    BLOCK_V: tl.constexpr, SMOOTH: tl.constexpr, UNIT: tl.constexpr, ODD: tl.constexpr, ALIKE: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of a row alone. The first has the row's ends too."""
    start = tile * BLOCK_V
    begin, inner_begin, head, inner = row_alone(row, row_stride, width, UNIT, ODD)
    dbegin = row * dlogits_stride
    dinner_begin = dbegin + head
    if ALIKE:
        dinner_begin = tl.cdiv(dbegin, UNIT) * UNIT if ODD else row * (dlogits_stride // UNIT) * UNIT
    kept = target != ignore_index
    holds = (target >= head + start) & (target < head + start + BLOCK_V)
    if ODD:
        ends = (target < head) | (target >= head + inner)
        holds = tl.where(ends, tile == 0, holds)
    place = scales[4]
    there = (place >= 0) & holds
    logit = tl.load(logits_ptr + begin + tl.where(there, place, 0), mask=there, other=0.0).to(tl.float32)
    if holds:
        tl.debug_barrier()  # before another thread writes where this was read
    if ODD:
        if tile == 0:
            write_row_ends(
                logits_ptr + begin, dlogits_ptr + dbegin, head, inner, width, kept, scales, weight_ptr, V, UNIT, SMOOTH
            )
    logits_ptr += inner_begin + start
    tile_ptr = dlogits_ptr + dinner_begin + start
    if start + BLOCK_V <= inner:
        columns = head + start + tl.arange(0, BLOCK_V)
        write_whole(logits_ptr, tile_ptr, columns, kept, scales, weight_ptr, V, SMOOTH)
    else:
        PART: tl.constexpr = BLOCK_V // 4  # what is left may be little
        for part in range(0, inner - start, PART):
            places = part + tl.arange(0, PART)
            columns_of_part = head + start + places
            write_part(
                logits_ptr, tile_ptr, places, places < inner - start, columns_of_part, kept, scales, weight_ptr, V,
                SMOOTH,
            )  # fmt: skip
    if holds:
        write_target(dlogits_ptr + dbegin, scales, logit, there, weight_ptr, V, SMOOTH)


# ---------------------------------------------------------------- plan


@functools.lru_cache(maxsize=4096)
def _programs(n_rows: int, n_classes: int, device: Device) -> tuple[int, bool]:
    """Of the forward kernel: how many, and whether each has a row alone."""
    rows = tile(n_rows, n_classes, device, "forward")[1]
    return cdiv(n_rows, rows), rows == 1


def _can_make_gradient(logits: torch.Tensor, reduction: str, device: Device) -> bool:
    """Whether forward can make the gradient, for one of 1, and backward then is likely to have nothing left to do: of
    rows without gaps that have a program each. In fp16 losses are scaled, so that another gradient comes."""
    if reduction == "none" or logits.dtype == torch.float16 or not logits.is_contiguous():
        return False
    return _programs(*logits.shape, device)[1]


def _odd(logits: Spec, n_classes: int) -> bool:
    """Whether rows begin or end within 16 bytes."""
    unit = 16 // logits.dtype.itemsize
    return n_classes % unit > 0 or logits.stride[0] % unit > 0


def plan_forward(specs: Specs, options: dict, device: Device) -> list[Launch]:
    n_rows, n_classes = specs["logits"].shape
    block_v, rows, warps = tile(n_rows, n_classes, device, "forward")
    if specs["weight"] is not None and options["label_smoothing"] > 0.0:
        warps = max(warps, min(16, block_v // 256))  # with a tile of weights besides, 8 spill on sm_100
    arguments = pointers(specs, "logits", "target", "weight", "weight_sum", "losses", "parts", "sums")
    arguments |= pointers(specs, "divisor", "dlogits", "changed")
    arguments |= {"n_rows": n_rows, "row_stride": specs["logits"].stride[0]} | numbers(n_classes, options)
    constexprs = {"BLOCK_V": block_v, "ROWS": rows, "SMOOTH": options["label_smoothing"] > 0.0}
    constexprs |= lanes(specs["logits"], block_v, warps, device) | {"ODD": _odd(specs["logits"], n_classes)}
    launches = [Launch(_cross_entropy_forward, (cdiv(n_rows, rows),), arguments, constexprs, warps, 2)]
    mean, alone = options["reduction"] == "mean", rows == 1
    if mean and alone:  # a row's gradient needs what its loss is divided by
        block = max(16, min(8192, next_power_of_2(n_rows)))  # many loads at once: one program waits for them all
        arguments = pointers(specs, "target", "weight", "divisor") | {"n_rows": n_rows}
        arguments |= {"ignore_index": options["ignore_index"], "V": n_classes}
        launches.insert(0, Launch(_cross_entropy_weigh, (1,), arguments, {"BLOCK": block}, max(4, block // 512), 1))
    if options["reduction"] != "none":
        n_parts = specs["parts"].shape[1]
        block = max(16, min(8192, next_power_of_2(n_parts)))
        arguments = pointers(specs, "parts", "divisor", "loss") | {"n_parts": n_parts}
        constexprs = {"MEAN": mean, "WEIGHED": alone, "BLOCK": block}
        constexprs["GUARDED"] = specs["weight"] is not None and options["label_smoothing"] > 0.0
        launches.append(Launch(_cross_entropy_reduce, (1,), arguments, constexprs, max(4, block // 512), 1))
    return launches


def plan_backward(specs: Specs, options: dict, device: Device) -> list[Launch]:
    n_rows, n_classes = specs["logits"].shape
    block_v, rows, warps = tile(n_rows, n_classes, device, "backward")
    arguments = pointers(specs, "grad", "logits", "target", "weight", "weight_sum", "sums", "divisor", "dlogits")
    arguments |= pointers(specs, "changed")
    arguments |= {"n_rows": n_rows, "grad_stride": specs["grad"].stride[0] if specs["grad"].shape else 0}
    strides = {"row_stride": specs["logits"].stride[0], "dlogits_stride": specs["dlogits"].stride[0]}
    width = specs["logits"].stride[0] if options.get("padded") else n_classes
    arguments |= strides | {"width": width} | numbers(n_classes, options)
    constexprs = {"BLOCK_V": block_v, "ROWS": rows, "SMOOTH": options["label_smoothing"] > 0.0}
    unit = 16 // specs["logits"].dtype.itemsize
    constexprs |= {"UNIT": unit, "ODD": _odd(specs["logits"], width)}
    constexprs |= {"ALIKE": (strides["row_stride"] - strides["dlogits_stride"]) % unit == 0}
    programs = cdiv(n_rows, rows) * cdiv(n_classes, block_v)
    if specs["changed"]:
        programs = min(programs, 4 * device.processors)
    return [Launch(_cross_entropy_backward, (programs,), arguments, constexprs, warps, 1)]


# ---------------------------------------------------------------- registration


def _empty_forward(logits, reduction, out_dtype, made):
    n_rows, device = logits.shape[0], logits.device
    loss = torch.empty((n_rows,) if reduction == "none" else (), dtype=out_dtype, device=device)
    sums = torch.empty((n_rows, 2), dtype=torch.float32, device=device)
    divisor = torch.empty(() if reduction == "mean" else 0, dtype=torch.float32, device=device)
    changed = torch.empty(() if made else 0, dtype=torch.float32, device=device)
    dlogits = _empty_backward(logits) if made else torch.empty(0, dtype=logits.dtype, device=device)
    return loss, sums, divisor, dlogits, changed


def _forward(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    out_dtype: torch.dtype,
    made: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(n_rows, V), int64 (n_rows,) -> loss of `out_dtype`, peaks and totals fp32 (n_rows, 2), and where they are
    asked for, else empty: for "mean" the sum of the targets' weights, fp32 (); if `made` the logits' gradient for one
    of 1, and zero, fp32 (), which stands for that.
    """
    n_rows, n_classes = logits.shape
    if CHECK_VALUES and not target.is_meta:
        check_targets("cross_entropy", target, n_classes, ignore_index)
    loss, sums, divisor, dlogits, changed = _empty_forward(logits, reduction, out_dtype, made)
    none = reduction == "none"
    parts = None
    if not none:
        programs, alone = _programs(n_rows, n_classes, facts_of(logits))
        parts = torch.empty((1 if alone else 2, programs), dtype=torch.float32, device=logits.device)
    tensors = {"logits": rows_of(logits), "target": target, "weight": weight}
    tensors |= {"weight_sum": weight_sum(weight, label_smoothing), "losses": loss if none else None, "parts": parts}
    tensors |= {
        "sums": sums,
        "divisor": divisor if reduction == "mean" else None,
        "loss": None if none else loss,
    }
    tensors |= {"dlogits": dlogits, "changed": changed} if made else {"dlogits": None, "changed": None}
    run(plan_forward, tensors, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing)
    return loss, sums, divisor, dlogits, changed


def _empty_backward(logits):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _backward(
    grad: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    sums: torch.Tensor,
    divisor: torch.Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> torch.Tensor:
    """Gradient of the logits (n_rows, V)."""
    dlogits = _empty_backward(logits)
    saved = (logits, target, weight, sums, divisor)
    _write_gradient(dlogits, None, grad, *saved, ignore_index, reduction, label_smoothing)
    return dlogits


def _correct(
    dlogits: torch.Tensor,
    changed: torch.Tensor,
    grad: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    sums: torch.Tensor,
    divisor: torch.Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> None:
    """Gradient of the logits (n_rows, V) over that which forward made for a grad of 1, where another came.

    `changed` remembers that: a CUDA graph of this alone may be replayed with one grad after another.
    """
    saved = (logits, target, weight, sums, divisor)
    _write_gradient(dlogits, changed, grad, *saved, ignore_index, reduction, label_smoothing)


def _write_gradient(
    dlogits, changed, grad, logits, target, weight, sums, divisor, ignore_index, reduction, label_smoothing
):
    tensors = {"grad": grad, "logits": rows_of(logits), "target": target, "weight": weight}
    tensors |= {"weight_sum": weight_sum(weight, label_smoothing), "sums": sums}
    tensors |= {"divisor": divisor if reduction == "mean" else None, "dlogits": dlogits, "changed": changed}
    run(plan_backward, tensors, ignore_index=ignore_index, label_smoothing=label_smoothing)


def _save(ctx, inputs, output):
    logits, target, weight, ignore_index, reduction, label_smoothing, _, made = inputs
    _, sums, divisor, dlogits, changed = output
    # autograd holds on to what is marked for as long as the loss lives: the gradient is not
    ctx.mark_non_differentiable(sums, divisor)
    ctx.options = (ignore_index, reduction, label_smoothing)
    # others of the same memory: an output would hold this ctx, and it the output
    ctx.made = (dlogits.detach(), changed.detach(), _captured(logits)) if made else None
    ctx.save_for_backward(logits, target, weight, sums, divisor)


def _gradients(ctx, grad, *_):
    if not ctx.needs_input_grad[0]:
        return (None,) * 8
    made, ctx.made = ctx.made, None  # once: it is its receiver's then, to change or keep
    if made is None or not _can_take(grad, made[2]):
        dlogits = backward(grad, *ctx.saved_tensors, *ctx.options)
    else:
        dlogits, changed, _ = made
        correct(dlogits, changed, grad, *ctx.saved_tensors, *ctx.options)
    return dlogits, *[None] * 7


def _captured(tensor: torch.Tensor) -> bool:
    """Whether a CUDA graph records what is launched."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _can_take(grad: torch.Tensor, captured: bool) -> bool:
    """Whether a backward pass for `grad` can take the gradient that forward made.

    Not if it is to be differentiated, nor for several grads at once, nor where compiled autograd runs it as often as it
    likes, nor where a mode looks on, as above; and not in a graph without the forward pass, whose replays would find
    what the one before has left.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return False
    batched = torch._C._functorch.is_legacy_batchedtensor(grad) or torch._C._functorch.is_functorch_wrapped_tensor(grad)
    return _captured(grad) == captured and not batched


forward = register(
    "cross_entropy",
    _forward,
    lambda logits, target, weight, ignore_index, reduction, label_smoothing, out_dtype, made: _empty_forward(
        logits, reduction, out_dtype, made
    ),
    _gradients,
    _save,
)
backward = register("cross_entropy_backward", _backward, lambda grad, logits, *_: _empty_backward(logits))
correct = register("cross_entropy_correct", _correct, lambda *_: None, changes=("dlogits", "changed"))

# ---------------------------------------------------------------- public


def _check(input, target, weight, ignore_index, reduction, label_smoothing):
    check_options("cross_entropy", target, input.shape, ignore_index, reduction, label_smoothing)
    if input.dim() == 0:
        raise RuntimeError("cross_entropy: input must be (C,), (N, C) or (N, C, d1, ...), got a scalar")
    classes = 0 if input.dim() == 1 else 1
    expected = input.shape[:classes] + input.shape[classes + 1 :]
    check_shapes("cross_entropy", input, target, expected, input.shape[classes], weight)


def _makes_gradient(logits: torch.Tensor, reduction: str) -> bool:
    """Whether forward makes the gradient too. Not where a graph is compiled, or a mode looks on as those that trace do:
    in a graph, backward cannot know whether it runs for the first time. And not where hooks take away what is saved, as
    checkpoints do: they would not see it."""
    if not logits.requires_grad or not torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return False
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        return False
    return _can_make_gradient(logits, reduction, facts_of(logits))


def cross_entropy(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """`torch.nn.functional.cross_entropy` with class indices.

    Logits (C,), (N, C) or (N, C, d1, ...) in fp32, fp16 or bf16 and int64 targets (), (N,) or (N, d1, ...) -> the
    mean or sum, or with reduction="none" the losses in target's shape, in input's dtype; fp32 under autocast.
    "mean" divides by the sum of the targets' weights, and is NaN where that is zero. Sums are fp32. weight may have
    another of these dtypes than input. size_average and reduce are PyTorch's old words for reduction, and replace it.

    A target outside [0, C) that is not ignore_index makes its row's loss NaN; in the interpreter, and with
    KERNELS_DEBUG=1, it raises IndexError. Raises TypeError for what is no tensor or no number, RuntimeError or
    ValueError for shapes, devices and options that do not fit, RuntimeError for a weight that requires a gradient,
    NotImplementedError for probability targets, other dtypes, second derivatives and torch.func's transforms.
    """
    tensors = {"input": input, "target": target, "weight": weight}
    check_tensors("cross_entropy", tensors, optional=("weight",), integers=("target",))
    refuse_transforms("cross_entropy", input, weight)
    if size_average is not None or reduce is not None:
        reduction = reference.reduction_of(size_average, reduce)
    if input.dim() == 1 and target.shape == (1,):  # PyTorch takes it for one target without a batch
        target = target.reshape(())
    _check(input, target, weight, ignore_index, reduction, label_smoothing)
    logits, labels = input, target
    if input.dim() != 2:
        logits = input.movedim(min(1, input.dim() - 1), -1)
        logits = logits.reshape(target.numel(), logits.shape[-1])
        labels = target.reshape(-1)
    out_dtype = torch.float32 if autocast_dtype(input.device) else input.dtype
    weight = None if weight is None else weight.contiguous()
    labels = labels.to(torch.int64).contiguous()
    options = (int(ignore_index), reduction, float(label_smoothing), out_dtype)
    loss = forward(logits, labels, weight, *options, _makes_gradient(logits, reduction))[0]
    return loss.view(target.shape) if reduction == "none" and target.dim() != 1 else loss


# ---------------------------------------------------------------- catalogue


def _draw(name: str, shape: tuple[int, ...], case: Case, generator: torch.Generator) -> torch.Tensor | None:
    """Targets are classes, every fifth ignored if the case has an ignore_index; class weights are positive."""
    if name == "weight":
        return 0.5 + torch.rand(shape, generator=generator)
    if name != "target":
        return None
    n_classes = case.shapes["input"][min(1, len(case.shapes["input"]) - 1)]
    target = torch.randint(0, n_classes, shape, generator=generator)
    if "ignore_index" in case.options:
        target.view(-1)[::5] = case.options["ignore_index"]
    return target


def _plan(inputs: dict, options: dict, device: Device) -> list[Launch]:
    """The launches of a forward and a backward pass."""
    logits, target = inputs["input"].movedim(min(1, inputs["input"].dim() - 1), -1), inputs["target"]
    logits, target, weight = logits.reshape(-1, logits.shape[-1]), target.reshape(-1), inputs.get("weight")
    common = (options.get("ignore_index", -100), options.get("reduction", "mean"), options.get("label_smoothing", 0.0))
    with plan_only(device) as launches:
        made = _can_make_gradient(logits, common[1], device)
        loss, *saved, dlogits, changed = _forward(logits, target, weight, *common, logits.dtype, made)
        if made:
            _correct(dlogits, changed, loss, logits, target, weight, *saved, *common)
        else:
            _backward(loss, logits, target, weight, *saved, *common)
    return launches


def _cost(inputs: dict, options: dict) -> tuple[Cost, Cost]:
    """Five operations an element forward, six backward; logits read, then read again and their gradient written."""
    logits, target = inputs["input"], inputs["target"]
    rows = target.nbytes + 8 * target.numel()
    losses = target.numel() * logits.itemsize if options.get("reduction") == "none" else 0
    return (
        Cost(5 * logits.numel(), logits.nbytes + rows + losses),
        Cost(6 * logits.numel(), 2 * logits.nbytes + rows),
    )


def _both(inputs: dict, options: dict) -> Cost:
    """Forward and backward: logits read once, as their gradient can be made while they are there."""
    forward, backward = _cost(inputs, options)
    return Cost(forward.flops + backward.flops, forward.bytes + inputs["input"].nbytes)


def _case(name: str, *shape: int, weight: bool = False, **options) -> Case:
    target = (shape[0], *shape[2:]) if len(shape) > 1 else ()
    shapes = {"input": shape, "target": target}
    if weight:
        shapes["weight"] = (shape[min(1, len(shape) - 1)],)
    return Case(name, shapes, options)


OP = Op(
    name="cross_entropy",
    public=cross_entropy,
    reference=reference.cross_entropy,
    torch=F.cross_entropy,
    plan=_plan,
    cost=_cost,
    cases=(
        _case("one_class", 3, 1),
        _case("no_batch", 10),
        _case("characters", 128, 65),
        _case("prime", 31, 1009),
        _case("sum", 17, 100, reduction="sum"),
        _case("none", 17, 100, reduction="none"),
        _case("ignored", 23, 50, ignore_index=-100),
        _case("ignored_class", 23, 50, ignore_index=3, reduction="none"),
        _case("smooth", 19, 130, label_smoothing=0.1),
        _case("weighted", 19, 130, weight=True),
        _case("weighted_smooth", 19, 130, weight=True, label_smoothing=0.3, ignore_index=7),
        _case("all_smooth", 9, 40, label_smoothing=1.0),
        _case("pictures", 2, 11, 3, 5, ignore_index=-100),
        _case("gpt2", 6, 50257),
        _case("long", 2, 262_145, label_smoothing=0.1),
    ),
    sizes=(
        _case("v65", 16384, 65),
        _case("v1024", 16384, 1024),
        _case("v4096", 32768, 4096),
        _case("v32768", 4096, 32768),
        _case("v50257", 8192, 50257),
        _case("v50304", 8192, 50304),
        _case("v131072", 4096, 131072),
        _case("v262144", 2048, 262144),
        _case("v50304-smooth", 8192, 50304, label_smoothing=0.1),
        _case("v50304-smooth-weighted", 8192, 50304, weight=True, label_smoothing=0.1),
    ),
    differentiable=("input",),
    draw=_draw,
    both=_both,
)
