"""What the two losses share: walks over rows of logits, in Triton, and what they ask of their arguments.

The mathematics is that of kernels/cross_entropy.py. Two kinds of walk: ROWS rows of a program side by side, for short
ones, and a row that a program has to itself, read by 16 bytes.
"""

import torch

from kernels import tiles
from kernels.device import Device
from kernels.op import Spec, cast, check_number, exp, fma, next_power_of_2, tl, triton

# ---------------------------------------------------------------- kernels


@triton.jit
def row_sums(
    logits_ptr, weight_ptr, in_rows, V, width, BLOCK_V: tl.constexpr, ROWS: tl.constexpr, SMOOTH: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    """One walk over ROWS rows: their largest logit, sum of exp(x - peak), and sum of w_c * (x_c - peak) if SMOOTH.

    logits_ptr: where each of the rows begins (ROWS, 1). A row has V logits and, if PADDED, no logits between V and
    width, a multiple of 16: reading them too keeps the loads wide.
    """
    columns = tl.arange(0, BLOCK_V)[None, :]
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    below = tl.zeros([ROWS], tl.float32)
    weight_so_far = 0.0
    for start in range(0, V, BLOCK_V):
        in_row = start + columns < V
        mask = in_rows[:, None] & (start + columns < width)
        x = tl.load(logits_ptr + start + columns, mask=mask, other=float("-inf")).to(tl.float32)
        if PADDED:
            x = tl.where(in_row, x, float("-inf"))
        peak, total, below, weight_so_far = _add_tile(
            peak, total, below, weight_so_far, x, start + columns, in_row, weight_ptr, tl.minimum(V - start, BLOCK_V),
            SMOOTH,
        )  # fmt: skip
    return peak, total, below


@triton.jit
def _add_tile(peak, total, below, weight_so_far, x, columns, in_row, weight_ptr, count, SMOOTH: tl.constexpr):
    """The running numbers of row_sums, and the weights so far, after the logits x, `count` to a row; -inf where none is
    in_row."""
    highest = tl.maximum(peak, tl.max(x, axis=1))
    base = tl.where(highest == float("-inf"), 0.0, highest)  # no inf - inf before the first finite logit
    total = total * exp(peak - base) + tl.sum(exp(x - base[:, None]), axis=1)
    if SMOOTH:
        below += tl.where(weight_so_far != 0.0, (peak - base) * weight_so_far, 0.0)
        if weight_ptr is not None:
            w = tl.load(weight_ptr + columns, mask=in_row, other=0.0).to(tl.float32)
            below += tl.sum(tl.where(in_row, w * (x - base[:, None]), 0.0), axis=1)
            weight_so_far += tl.sum(w)
        else:
            below += tl.sum(tl.where(in_row, x - base[:, None], 0.0), axis=1)
            weight_so_far += count
    return highest, total, below, weight_so_far


@triton.jit
def row_alone(row, stride, width, UNIT: tl.constexpr, ODD: tl.constexpr):
    """Of a row that a program has to itself: (where it begins, where its first whole 16 bytes do, how many elements are
    between, how many follow in whole 16 bytes). UNIT elements are 16 bytes; if not ODD, rows begin and end so."""
    begin = row * stride
    inner_begin = row * (stride // UNIT) * UNIT  # which divides by UNIT, as the compiler sees
    head = 0
    if ODD:
        inner_begin = tl.cdiv(begin, UNIT) * UNIT
        head = (inner_begin - begin).to(tl.int32)
    return begin, inner_begin, head, tl.maximum(width - head, 0) // UNIT * UNIT


@triton.jit
def _ends_of_row(head, inner, width, UNIT: tl.constexpr):
    """The columns of a row alone that are in no whole 16 bytes, at its begin and its end, and which of them exist."""
    places = tl.arange(0, 2 * UNIT)
    columns = tl.where(places < UNIT, places, head + inner + places - UNIT)
    return columns, ((places >= UNIT) | (places < head)) & (columns < width)


@triton.jit
def long_row_sums(
    row_ptr, inner_ptr, head, inner, weight_ptr, V,
    BLOCK_V: tl.constexpr, LANES: tl.constexpr, UNIT: tl.constexpr, ENDS: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """row_sums of a row alone, in LANES sums of their own that only the end puts together: a lane reads UNIT elements,
    16 bytes, at a time, and is a thread, so that no tile waits for all threads' largest logit.

    inner_ptr: row_ptr + head, where 16 bytes begin; ENDS: whether there may be logits beside the inner ones.
    """
    PART: tl.constexpr = LANES * UNIT
    lanes = tl.arange(0, LANES)[None, :, None] * UNIT + tl.arange(0, UNIT)[None, None, :]
    places = tl.arange(0, BLOCK_V // PART)[:, None, None] * PART + lanes
    peak = tl.full([LANES], float("-inf"), tl.float32)
    total = tl.zeros([LANES], tl.float32)
    below = tl.zeros([LANES], tl.float32)
    weight_so_far = tl.zeros([LANES], tl.float32)
    whole = inner // BLOCK_V * BLOCK_V
    for start in range(0, whole, BLOCK_V):
        x = tl.load(inner_ptr + start + places).to(tl.float32)
        columns = head + start + places
        peak, total, below, weight_so_far = _add_to_lanes(
            peak, total, below, weight_so_far, x, columns, columns >= 0, weight_ptr, BLOCK_V // LANES, SMOOTH
        )
    for start in range(whole, inner, PART):
        mask = start + lanes < inner
        x = tl.load(inner_ptr + start + lanes, mask=mask, other=float("-inf")).to(tl.float32)
        count = tl.where(start + tl.arange(0, LANES) * UNIT < inner, UNIT, 0)
        peak, total, below, weight_so_far = _add_to_lanes(
            peak, total, below, weight_so_far, x, head + start + lanes, mask, weight_ptr, count, SMOOTH
        )
    highest = tl.max(peak, axis=0, keep_dims=True)
    if ENDS:
        columns, there = _ends_of_row(head, inner, V, UNIT)
        x = tl.load(row_ptr + columns, mask=there, other=float("-inf")).to(tl.float32)
        highest = tl.maximum(highest, tl.max(x, axis=0, keep_dims=True))
    base = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(total * exp(peak - base), axis=0, keep_dims=True)
    if SMOOTH:
        below += tl.where(weight_so_far != 0.0, (peak - base) * weight_so_far, 0.0)
        below = tl.sum(below, axis=0, keep_dims=True)
    else:
        below = tl.zeros([1], tl.float32)
    if ENDS:
        total += tl.sum(exp(x - base), axis=0, keep_dims=True)
        if SMOOTH:
            w = there.to(tl.float32)
            if weight_ptr is not None:
                w = tl.load(weight_ptr + columns, mask=there, other=0.0).to(tl.float32)
            below += tl.sum(tl.where(there, w * (x - base), 0.0), axis=0, keep_dims=True)
    return highest, total, below


@triton.jit
def _add_to_lanes(peak, total, below, weight_so_far, x, columns, in_row, weight_ptr, count, SMOOTH: tl.constexpr):
    """_add_tile for each lane, the middle axis of x. A lane without a finite logit has a base of zero, as a row has.

    Without class weights nothing is made of the mask but a choice: a sum of it would go through shared memory.
    """
    highest = tl.maximum(peak, tl.max(tl.max(x, axis=2), axis=0))
    base = tl.where(highest == float("-inf"), 0.0, highest)
    x -= base[None, :, None]
    total = total * exp(peak - base) + tl.sum(tl.sum(exp(x), axis=2), axis=0)
    if SMOOTH:
        below += tl.where(weight_so_far != 0.0, (peak - base) * weight_so_far, 0.0)
        if weight_ptr is not None:
            w = tl.load(weight_ptr + columns, mask=in_row, other=0.0).to(tl.float32)
            below += tl.sum(tl.sum(tl.where(in_row, w * x, 0.0), axis=2), axis=0)
            weight_so_far += tl.sum(tl.sum(w, axis=2), axis=0)
        else:
            below += tl.sum(tl.sum(tl.where(in_row, x, 0.0), axis=2), axis=0)
            weight_so_far += count
    return highest, total, below, weight_so_far


@triton.jit
def row_targets(logits_ptr, target, weight_ptr, in_rows, ignore_index, V):
    """(logit, weight) of the targets of rows that begin at logits_ptr (ROWS, 1), zeros of those that are no class."""
    there = in_rows & (target >= 0) & (target < V)
    logit = tl.load(logits_ptr + tl.where(there, target, 0)[:, None], mask=there[:, None], other=0.0).to(tl.float32)
    return tl.sum(logit, axis=1), target_weights(target, weight_ptr, in_rows, ignore_index, V)


@triton.jit
def target_weights(target, weight_ptr, in_rows, ignore_index, V):
    """Weights of the targets of rows, zeros of those that are no class or ignored."""
    weighs = in_rows & (target >= 0) & (target < V) & (target != ignore_index)
    weight = tl.where(weighs, 1.0, 0.0)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + target, mask=weighs, other=0.0).to(tl.float32)
    return weight


@triton.jit
def row_losses(
    target, target_logit, target_weight, weight_ptr, weight_sum_ptr, peak, total, below, ignore_index, smoothing, V,
    SMOOTH: tl.constexpr,
):  # fmt: skip
    """Losses of rows whose sums are known; lse is peak + log(total)."""
    kept = target != ignore_index
    valid = (target >= 0) & (target < V)
    log_total = tl.log(total)
    loss = target_weight * (log_total + (peak - target_logit))
    if SMOOTH:
        weight_sum = V * 1.0
        if weight_ptr is not None:
            weight_sum = tl.load(weight_sum_ptr)
        loss = (1.0 - smoothing) * loss + smoothing / V * (weight_sum * log_total - below)
    return tl.where(kept, tl.where(valid, loss, float("nan")), 0.0)


@triton.jit
def row_scales(
    target, target_weight, grad, divisor_ptr, peak, total, weight_sum_ptr, ignore_index, smoothing, V,
    SMOOTH: tl.constexpr,
):  # fmt: skip
    """What logit_gradients needs of rows: (the scale of exp(x - peak), what the target's column has less, what every
    class has less, the peak, the target's column or -1), and whether they are kept. With class weights what a class has
    less is by its weight, and the target's column has it besides.

    Ignored rows get zeros, with which their gradients are zeros for any finite logits: loads leave those rows out.
    """
    if divisor_ptr is not None:
        divisor = tl.load(divisor_ptr)
        grad = tl.where(divisor == 0.0, float("nan"), grad / divisor)  # as the loss is, whatever its numerator
    kept = target != ignore_index
    valid = (target >= 0) & (target < V)
    grad = tl.where(kept, tl.where(valid, grad, float("nan")), 0.0)
    scale = target_weight * grad
    less, spread = scale, scale
    if SMOOTH:
        weight_sum = V * 1.0
        if weight_sum_ptr is not None:
            weight_sum = tl.load(weight_sum_ptr)
        spread = smoothing / V * grad
        less = (1.0 - smoothing) * scale
        scale = fma(spread, weight_sum, less)
        if weight_sum_ptr is None:
            less = fma(smoothing / V, grad, less)
    scale = tl.where(kept, scale / total, 0.0)
    place = tl.where(kept & valid, target, -1).to(tl.int32)
    return (scale, less, spread, tl.where(kept, peak, 0.0), place), kept


@triton.jit
def logit_gradients(x, columns, scales, weight_ptr, V, SMOOTH: tl.constexpr, TARGET: tl.constexpr):
    """grad * dloss/dx for the logits x at `columns` of some rows, by what row_scales says of those.

    TARGET: the target of a row may be among the columns. The look for it takes a third of what is left to do for a
    logit, so that a row alone has its target's gradient made apart.
    """
    scale, less, spread, peak, place = scales
    part = exp(x - peak[:, None])  # of the sum that scale is over
    # each product that is added to is a fused one by name: which are fused must not differ from kernel to kernel
    scale, less, spread = scale[:, None], less[:, None], spread[:, None]
    if SMOOTH:
        if weight_ptr is not None:
            w = tl.load(weight_ptr + columns, mask=columns < V, other=0.0).to(tl.float32)[None, :]
            less, spread = fma(w, spread, less), w * spread
        dx = fma(part, scale, -spread)
    else:
        dx = part * scale
    if TARGET:
        dx = tl.where(columns[None, :] == place[:, None], fma(part, scale, -less), dx)
    return dx


@triton.jit
def write_rows(logits_ptr, dlogits_ptr, columns, in_rows, width, kept, scales, weight_ptr, V, SMOOTH: tl.constexpr):
    """Gradients of the columns below width of rows side by side, which begin at these pointers (ROWS, 1)."""
    mask = in_rows[:, None] & (columns < width)[None, :]
    x = tl.load(logits_ptr + columns[None, :], mask=mask & kept[:, None], other=0.0).to(tl.float32)
    dx = logit_gradients(x, columns, scales, weight_ptr, V, SMOOTH, True)
    tl.store(dlogits_ptr + columns[None, :], cast(dx, dlogits_ptr.dtype.element_ty), mask=mask)


@triton.jit
def write_whole(logits_ptr, dlogits_ptr, columns, kept, scales, weight_ptr, V, SMOOTH: tl.constexpr):
    """Gradients of a tile of a row alone, none of them as a target's: zeros of a row that is not kept."""
    places = tl.arange(0, columns.shape[0])[None, :]
    if kept:
        x = tl.load(logits_ptr + places).to(tl.float32)
        dx = logit_gradients(x, columns, scales, weight_ptr, V, SMOOTH, False)
        tl.store(dlogits_ptr + places, cast(dx, dlogits_ptr.dtype.element_ty), cache_modifier=".cs")
    else:
        tl.store(dlogits_ptr + places, tl.zeros([1, columns.shape[0]], dlogits_ptr.dtype.element_ty))


@triton.jit
def write_part(logits_ptr, dlogits_ptr, places, mask, columns, kept, scales, weight_ptr, V, SMOOTH: tl.constexpr):
    """write_whole of the places that the mask has."""
    places, mask = places[None, :], mask[None, :]
    x = tl.load(logits_ptr + places, mask=mask & kept, other=0.0).to(tl.float32)
    dx = logit_gradients(x, columns, scales, weight_ptr, V, SMOOTH, False)
    tl.store(dlogits_ptr + places, cast(dx, dlogits_ptr.dtype.element_ty), mask=mask)


@triton.jit
def write_target(drow_ptr, scales, logit, there, weight_ptr, V, SMOOTH: tl.constexpr):
    """The gradient of the target of a row alone, if it is there, over what was written for it as for any other."""
    place = scales[4]
    dx = logit_gradients(logit[:, None], tl.where(there, place, 0), scales, weight_ptr, V, SMOOTH, True)
    tl.debug_barrier()  # that was another thread
    tl.store(drow_ptr + place[:, None], cast(dx, drow_ptr.dtype.element_ty), mask=there[:, None])


@triton.jit
def write_row_ends(
    row_ptr, drow_ptr, head, inner, width, kept, scales, weight_ptr, V, UNIT: tl.constexpr, SMOOTH: tl.constexpr
):
    """write_whole of the row's _ends_of_row."""
    columns, there = _ends_of_row(head, inner, width, UNIT)
    write_part(row_ptr, drow_ptr, columns, there, columns, kept, scales, weight_ptr, V, SMOOTH)


@triton.jit
def write_row_gradients(
    row_ptr, drow_ptr, inner_ptr, dinner_ptr, head, inner, width, kept, scales, target_logit, weight_ptr, V,
    BLOCK_V: tl.constexpr, PART: tl.constexpr, UNIT: tl.constexpr, ENDS: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """Gradients of a row alone, which may overwrite the logits; `width` of them, V or more, are read and written.

    Pointers, tiles and parts are long_row_sums's, walked back from the row's end: what was read last is in the L2 cache
    still. The target's gradient is made apart, and written last.
    """
    tl.debug_barrier()  # before other threads write where target_logit was read
    if ENDS:
        write_row_ends(row_ptr, drow_ptr, head, inner, width, kept, scales, weight_ptr, V, UNIT, SMOOTH)
    whole = inner // BLOCK_V * BLOCK_V
    for start in range(whole, inner, PART):
        places = start + tl.arange(0, PART)
        write_part(inner_ptr, dinner_ptr, places, places < inner, head + places, kept, scales, weight_ptr, V, SMOOTH)
    for tile in range(0, whole // BLOCK_V):
        start = whole - (tile + 1) * BLOCK_V
        columns = head + start + tl.arange(0, BLOCK_V)
        write_whole(inner_ptr + start, dinner_ptr + start, columns, kept, scales, weight_ptr, V, SMOOTH)
    write_target(drow_ptr, scales, target_logit, scales[4] >= 0, weight_ptr, V, SMOOTH)


# ---------------------------------------------------------------- plan


def tile(n_rows: int, n_classes: int, device: Device, which: str) -> tuple[int, int, int]:
    """(BLOCK_V, rows a program, warps): of short rows as many as have 2,048 elements together.

    Forward, a warp has rows of up to 1,024 to itself: sums over several warps would take as many instructions as all
    else. Longer rows have a program each, and three tiles or four: what every thread does at a row's ends is as much as
    one of them. Of the longest, whose second walk is to find in the L2 cache what its first has read, few are there at
    a time. Backward, a thread has 16 elements of short rows and 32 of long ones: what is done once a program is a third
    of the instructions else.
    """
    if device.arch == "interpreter":  # its cost is per program
        block_v = max(16, min(next_power_of_2(n_classes), 1 << 16))
        rows = min(max(2, next_power_of_2(n_rows)), (1 << 18) // block_v)
        return block_v, 1 if which == "forward" and n_classes > 1024 else rows, 4
    tuned = tiles.tuned(device, f"cross_entropy.{which}", str(max(16, next_power_of_2(n_classes))))
    if tuned:
        return tuned
    if which == "forward" and n_classes > 1024:
        block_v = min(16384, max(1024, next_power_of_2(n_classes) // 4))
        return block_v, 1, block_v // (512 if device.arch.startswith("sm_") else 1024)  # whose warps have 64 threads
    block_v = max(16, min(next_power_of_2(n_classes), 8192))
    warps = 1 if which == "forward" else 8 if block_v > 2048 else 4
    return block_v, max(1, 2048 // block_v), warps


def numbers(n_classes: int, options: dict) -> dict[str, int | float]:
    """Arguments that every kernel of the losses has."""
    return {"ignore_index": options["ignore_index"], "smoothing": options["label_smoothing"], "V": n_classes}


def lanes(logits: Spec, block_v: int, warps: int, device: Device) -> dict[str, int]:
    """What long_row_sums takes of a tile: a lane for each thread, 16 bytes at a time."""
    unit = 16 // logits.dtype.itemsize
    threads = block_v if device.arch == "interpreter" else 32 * warps
    return {"LANES": max(1, min(threads, block_v // unit)), "UNIT": unit}


# ---------------------------------------------------------------- arguments


def check_targets(name: str, target: torch.Tensor, n_classes: int, ignore_index: int) -> None:
    outside = ((target < 0) | (target >= n_classes)) & (target != ignore_index)
    if outside.any():
        wrong = target[outside][0].item()
        raise IndexError(f"{name}: target {wrong} is out of bounds for {n_classes} classes")


def check_options(
    name: str, target: torch.Tensor, probabilities: tuple[int, ...], ignore_index: int, reduction: str,
    label_smoothing: float,
) -> None:  # fmt: skip
    """Errors as PyTorch has them, and NotImplementedError for what PyTorch can do and the kernels cannot.

    probabilities: the shape that a target of probabilities would have.
    """
    check_number(name, "ignore_index", ignore_index, whole=True)
    check_number(name, "label_smoothing", label_smoothing)
    if target.dtype.is_floating_point and target.shape == probabilities:
        raise NotImplementedError(f"{name}: probability targets are not implemented; class indices are")
    if target.dtype not in (torch.int64, torch.uint8):
        raise RuntimeError(f"{name}: target must be int64, got {target.dtype}")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{name}: reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise RuntimeError(f"{name}: label_smoothing must be in [0, 1], got {label_smoothing}")


def check_shapes(
    name: str,
    input: torch.Tensor,
    target: torch.Tensor,
    expected: tuple[int, ...],
    n_classes: int,
    weight: torch.Tensor | None,
    linear_bias: torch.Tensor | None = None,
) -> None:
    """Errors for a target that is not of the `expected` shape and for what has not one element for each class; and for
    class weights that require a gradient: the ops have none for them, nor has PyTorch."""
    for what, tensor in (("linear_bias", linear_bias), ("weight", weight)):
        if tensor is not None and tensor.shape != (n_classes,):
            raise RuntimeError(
                f"{name}: {what} must have one element for each of the {n_classes} classes, got shape "
                f"{list(tensor.shape)}"
            )
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"{name}: not differentiable with respect to weight; pass weight.detach()")
    if target.shape != expected:
        raise (ValueError if input.dim() > 1 and target.shape[:1] != expected[:1] else RuntimeError)(
            f"{name}: input {list(input.shape)} needs a target of shape {list(expected)}, got {list(target.shape)}"
        )


def weight_sum(weight: torch.Tensor | None, label_smoothing: float) -> torch.Tensor | None:
    """What smoothing needs of the class weights, fp32 ()."""
    return weight.sum(dtype=torch.float32) if weight is not None and label_smoothing > 0.0 else None
