"""Layer normalization over the last dimensions.

    mean = sum(x) / N          rstd = 1 / sqrt(sum((x - mean)^2) / N + eps)
    xhat = (x - mean) * rstd   y = xhat * weight + bias

With g = dy * weight, a row's gradient is

    dx = rstd * (g - mean(g) - xhat * mean(g * xhat))

and dweight = sum over rows of dy * xhat, dbias = sum over rows of dy. Saved for backward: x, and
mean and rstd in fp32, one of each a row. Forward reads x and writes y; backward reads x and dy and
writes dx; each takes some ten operations an element, so memory bandwidth is the bound.

The parameters' gradients come in two stages without atomics, so that they are bitwise repeatable:
each program sums the rows it owns into one fp32 row of a workspace, a second kernel adds these rows
in order. A row of moderate length stays in registers; a longer one is walked in chunks, whose
means and squared deviations are merged as in Chan, Golub and LeVeque, "Updating formulae and a
pairwise algorithm for computing sample variances" (1979).

The kernels serve add_layer_norm.py too. There x is the sum of input and residual, made and written by the
forward kernel; and the backward kernel adds the gradient that reaches the sum from elsewhere. Without a
residual these pointers are None, which are constants to the compiler, and nothing of it is left.

Ba, Kiros and Hinton, "Layer Normalization" (2016), https://arxiv.org/abs/1607.06450.
"""

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from kernels import reference, tiles
from kernels.device import Device
from kernels.op import (
    Case,
    Cost,
    Launch,
    Op,
    Spec,
    Specs,
    autocast_dtype,
    cast,
    cdiv,
    check_number,
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
def _layer_norm_forward(
    input_ptr, residual_ptr, weight_ptr, bias_ptr, output_ptr, sum_ptr, mean_ptr, rstd_ptr,
    n_rows, row_stride, residual_stride, eps,
    N: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A program owns ROWS whole rows of length N."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_N)
    in_row = (columns < N)[None, :]
    mask = (rows < n_rows)[:, None] & in_row

    x = tl.load(input_ptr + rows[:, None] * row_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual_ptr += rows[:, None] * residual_stride + columns[None, :]
        x = cast(x + tl.load(residual_ptr, mask=mask, other=0.0).to(tl.float32), sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + rows[:, None] * N + columns[None, :], x, mask=mask)
        x = x.to(tl.float32)  # the norm is that of the sum as it was rounded
    mean = tl.sum(x, axis=1) / N
    centred = tl.where(in_row, x - mean[:, None], 0.0)
    # what rounding left out of the mean: without it 1 / sqrt(eps) would make something of a constant row
    rest = tl.div_rn(tl.sum(centred, axis=1), N * 1.0)
    squares = centred * centred
    if BLOCK_N <= 32:  # one element a lane: a product, fused with the sum with another lane's, would differ from theirs
        squares = tl.fma(centred, centred, tl.zeros_like(centred))
    variance = tl.maximum(tl.sum(squares, axis=1) / N - rest * rest, 0.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    rstd = tl.where(variance == float("inf"), float("nan"), rstd)  # overflowed: not a norm, and not zero either
    mean += rest

    y = (centred - rest[:, None]) * rstd[:, None]
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    tl.store(output_ptr + rows[:, None] * N + columns[None, :], cast(y, output_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + rows, mean, mask=rows < n_rows)
    tl.store(rstd_ptr + rows, rstd, mask=rows < n_rows)


@triton.jit
def _layer_norm_forward_long(
    input_ptr, residual_ptr, weight_ptr, bias_ptr, output_ptr, sum_ptr, mean_ptr, rstd_ptr,
    row_stride, residual_stride, N, eps, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program owns one row, and walks it twice in chunks of BLOCK_N."""
    row = tl.program_id(0).to(tl.int64)
    input_ptr += row * row_stride
    if residual_ptr is not None:
        residual_ptr += row * residual_stride
        sum_ptr += row * N
    output_ptr += row * N
    columns = tl.arange(0, BLOCK_N)

    mean = 0.0
    deviations = 0.0  # sum of squared deviations from the mean so far
    for start in range(0, N, BLOCK_N):
        mask = start + columns < N
        x = tl.load(input_ptr + start + columns, mask=mask, other=0.0).to(tl.float32)
        if residual_ptr is not None:
            x += tl.load(residual_ptr + start + columns, mask=mask, other=0.0).to(tl.float32)
            x = cast(x, sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + start + columns, x, mask=mask)
            x = x.to(tl.float32)
        size = tl.minimum(N - start, BLOCK_N).to(tl.float32)
        chunk_mean = tl.sum(x, axis=0) / size
        centred = tl.where(mask, x - chunk_mean, 0.0)
        rest = tl.div_rn(tl.sum(centred, axis=0), size)  # as above
        share = size / (start + size)
        step = chunk_mean + rest - mean
        around = tl.maximum(tl.sum(centred * centred, axis=0) - rest * rest * size, 0.0)
        deviations += around + step * step * start * share
        mean += step * share
    rstd = tl.div_rn(1.0, tl.sqrt_rn(deviations / N + eps))
    rstd = tl.where(deviations == float("inf"), float("nan"), rstd)

    for start in range(0, N, BLOCK_N):
        mask = start + columns < N
        x = tl.load(input_ptr + start + columns, mask=mask, other=0.0).to(tl.float32)
        if residual_ptr is not None:  # added again: reading back what other threads wrote would need a barrier
            x += tl.load(residual_ptr + start + columns, mask=mask, other=0.0).to(tl.float32)
            x = cast(x, sum_ptr.dtype.element_ty).to(tl.float32)
        y = (x - mean) * rstd
        if weight_ptr is not None:
            y *= tl.load(weight_ptr + start + columns, mask=mask, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + start + columns, mask=mask, other=0.0).to(tl.float32)
        tl.store(output_ptr + start + columns, cast(y, output_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _sum_rows(x, WIDTH: tl.constexpr):
    """The sum of x [rows, WIDTH] over its rows, [1, WIDTH], pair by pair.

    tl.sum, with rows in different warps, writes to shared memory with conflicts of up to 32 ways.
    """
    x = tl.trans(x)
    for _ in tl.static_range(16):
        if x.shape[1] > 1:
            even, odd = tl.split(tl.reshape(x, [WIDTH, x.shape[1] // 2, 2]))
            x = even + odd
    return tl.trans(x)


@triton.jit
def _layer_norm_backward(
    grad_ptr, grad_sum_ptr, input_ptr, weight_ptr, mean_ptr, rstd_ptr,
    dinput_ptr, dresidual_ptr, dweight_parts_ptr, dbias_parts_ptr,
    n_rows, grad_stride, grad_sum_stride, row_stride,
    N: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program owns every n-th block of ROWS rows, n the number of programs, and one row of each workspace.

    Rows are held in PARTS of WIDTH columns: N need not be near a power of 2 then, and warps divide rows among them
    rather than columns, whose sums would go through shared memory. STAGES - 2 blocks are under way to shared memory
    while one is computed: Triton copies after the stores, and waits where a block begins.
    """
    columns = tl.arange(0, WIDTH)[None, :]
    every_row = tl.zeros([ROWS, 1], tl.int32)
    weight = ()
    dweight = ()
    dbias = ()
    for i in tl.static_range(PARTS):
        if weight_ptr is not None:  # as a block of equal rows, for its threads to have the columns that those of x have
            own = i * WIDTH + columns + every_row
            weight += (tl.load(weight_ptr + own, mask=own < N, other=0.0).to(tl.float32),)
        dweight += (tl.zeros([ROWS, WIDTH], tl.float32),)
        dbias += (tl.zeros([ROWS, WIDTH], tl.float32),)

    for block in tl.range(tl.program_id(0), tl.cdiv(n_rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        first = tl.cast(block, tl.int64) * ROWS  # apart from the rows: one number for all threads costs none a register
        within = tl.arange(0, ROWS).to(tl.int64)[:, None]
        rows = first + tl.arange(0, ROWS)
        seen = (rows < n_rows)[:, None]
        dys = ()
        xs = ()
        for i in tl.static_range(PARTS):  # all loads before the first use
            at = i * WIDTH + columns
            mask = seen & (at < N)
            dys += (tl.load(grad_ptr + first * grad_stride + within * grad_stride + at, mask=mask, other=0.0),)
            xs += (tl.load(input_ptr + first * row_stride + within * row_stride + at, mask=mask, other=0.0),)
        mean = tl.load(mean_ptr + rows, mask=rows < n_rows, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + rows, mask=rows < n_rows, other=0.0)[:, None]

        sum_g = tl.zeros([ROWS, WIDTH], tl.float32)
        sum_g_xhat = tl.zeros([ROWS, WIDTH], tl.float32)
        gs = ()
        xhats = ()
        dweight_so_far = dweight
        dbias_so_far = dbias
        dweight = ()
        dbias = ()
        for i in tl.static_range(PARTS):  # past the end of a row dy is zero, and so are all products with it
            g = dys[i].to(tl.float32)
            xhat = (xs[i].to(tl.float32) - mean) * rstd
            dweight += (dweight_so_far[i] + g * xhat,)
            dbias += (dbias_so_far[i] + g,)
            if weight_ptr is not None:
                g *= weight[i]
            sum_g += g
            sum_g_xhat += g * xhat
            gs += (g,)
            xhats += (xhat,)
        if dinput_ptr is not None or dresidual_ptr is not None:
            mean_g = tl.sum(sum_g, axis=1)[:, None] / N
            mean_g_xhat = tl.sum(sum_g_xhat, axis=1)[:, None] / N
            sums = ()
            for i in tl.static_range(PARTS if grad_sum_ptr is not None else 0):  # before stores, which no load can pass
                at = i * WIDTH + columns
                sums_ptr = grad_sum_ptr + rows[:, None] * grad_sum_stride + at
                sums += (tl.load(sums_ptr, mask=seen & (at < N), other=0.0),)
            for i in tl.static_range(PARTS):
                at = i * WIDTH + columns
                mask = seen & (at < N)
                dx = rstd * (gs[i] + (xhats[i] * -mean_g_xhat - mean_g))  # an order that spills on no target
                if grad_sum_ptr is not None:
                    dx += sums[i].to(tl.float32)
                places = rows[:, None] * N + at
                if dinput_ptr is not None:
                    tl.store(dinput_ptr + places, cast(dx, dinput_ptr.dtype.element_ty), mask=mask)
                if dresidual_ptr is not None:
                    tl.store(dresidual_ptr + places, cast(dx, dresidual_ptr.dtype.element_ty), mask=mask)

    for i in tl.static_range(PARTS):
        at = i * WIDTH + columns
        places = tl.program_id(0).to(tl.int64) * N + at
        if dweight_parts_ptr is not None:
            tl.store(dweight_parts_ptr + places, _sum_rows(dweight[i], WIDTH), mask=at < N)
        if dbias_parts_ptr is not None:
            tl.store(dbias_parts_ptr + places, _sum_rows(dbias[i], WIDTH), mask=at < N)


@triton.jit
def _layer_norm_backward_long_input(
    grad_ptr, grad_sum_ptr, input_ptr, weight_ptr, mean_ptr, rstd_ptr, dinput_ptr, dresidual_ptr,
    grad_stride, grad_sum_stride, row_stride, N, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program owns one row of dinput and dresidual, and walks it twice in chunks of BLOCK_N."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_N)
    mean = tl.load(mean_ptr + row)
    rstd = tl.load(rstd_ptr + row)
    sum_g = tl.zeros([BLOCK_N], tl.float32)
    sum_g_xhat = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, N, BLOCK_N):
        mask = start + columns < N
        g = tl.load(grad_ptr + row * grad_stride + start + columns, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(input_ptr + row * row_stride + start + columns, mask=mask, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            g *= tl.load(weight_ptr + start + columns, mask=mask, other=0.0).to(tl.float32)
        sum_g += g
        sum_g_xhat += tl.where(mask, g * (x - mean) * rstd, 0.0)
    mean_g = tl.sum(sum_g, axis=0) / N
    mean_g_xhat = tl.sum(sum_g_xhat, axis=0) / N
    for start in range(0, N, BLOCK_N):
        mask = start + columns < N
        g = tl.load(grad_ptr + row * grad_stride + start + columns, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(input_ptr + row * row_stride + start + columns, mask=mask, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            g *= tl.load(weight_ptr + start + columns, mask=mask, other=0.0).to(tl.float32)
        dx = (g - mean_g - (x - mean) * rstd * mean_g_xhat) * rstd
        if grad_sum_ptr is not None:
            places = row * grad_sum_stride + start + columns
            dx += tl.load(grad_sum_ptr + places, mask=mask, other=0.0).to(tl.float32)
        places = row * N + start + columns
        if dinput_ptr is not None:
            tl.store(dinput_ptr + places, cast(dx, dinput_ptr.dtype.element_ty), mask=mask)
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + places, cast(dx, dresidual_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _layer_norm_backward_long_parameters(
    grad_ptr, input_ptr, mean_ptr, rstd_ptr, dweight_parts_ptr, dbias_parts_ptr,
    n_rows, grad_stride, row_stride, N, n_parts, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_N columns of every n_parts-th row, and their places in one row of each workspace."""
    part = (tl.program_id(0) % n_parts).to(tl.int64)
    columns = (tl.program_id(0) // n_parts).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = columns < N
    dweight = tl.zeros([BLOCK_N], tl.float32)
    dbias = tl.zeros([BLOCK_N], tl.float32)
    for row in range(part, n_rows, n_parts):
        dy = tl.load(grad_ptr + row * grad_stride + columns, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(input_ptr + row * row_stride + columns, mask=mask, other=0.0).to(tl.float32)
        dweight += dy * (x - tl.load(mean_ptr + row)) * tl.load(rstd_ptr + row)
        dbias += dy
    if dweight_parts_ptr is not None:
        tl.store(dweight_parts_ptr + part * N + columns, dweight, mask=mask)
    if dbias_parts_ptr is not None:
        tl.store(dbias_parts_ptr + part * N + columns, dbias, mask=mask)


@triton.jit
def _layer_norm_backward_reduce(
    dweight_parts_ptr, dbias_parts_ptr, dweight_ptr, dbias_ptr, n_parts, N,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_N columns of dweight and dbias, and adds the workspaces' rows in order."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dweight = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    dbias = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for start in range(0, n_parts, BLOCK_P):
        parts = start + tl.arange(0, BLOCK_P)
        mask = (parts < n_parts)[:, None] & (columns < N)[None, :]
        places = parts.to(tl.int64)[:, None] * N + columns[None, :]
        if dweight_ptr is not None:
            dweight += tl.load(dweight_parts_ptr + places, mask=mask, other=0.0)
        if dbias_ptr is not None:
            dbias += tl.load(dbias_parts_ptr + places, mask=mask, other=0.0)
    if dweight_ptr is not None:
        total = cast(tl.sum(dweight, axis=0), dweight_ptr.dtype.element_ty)
        tl.store(dweight_ptr + columns, total, mask=columns < N)
    if dbias_ptr is not None:
        total = cast(tl.sum(dbias, axis=0), dbias_ptr.dtype.element_ty)
        tl.store(dbias_ptr + columns, total, mask=columns < N)


# ---------------------------------------------------------------- plan

LONGEST_FORWARD = 16384  # longest row held in registers without spills, by 16 warps on sm_80 to sm_100
LONGEST_BACKWARD = 8192
CHUNK = 4096  # what a program walks a longer row in


def _block(n_rows: int, n: int, device: Device, which: str) -> tuple[int, int, int]:
    """(BLOCK_N, rows a program, warps).

    Forward, a warp has rows up to 1024 to itself: a sum over several warps takes as many instructions as all else, and
    then it is instructions that bound, not bytes. Backward, a thread has 12 to 24 elements: up to 768 columns are
    a warp's own too, 1024 would take all registers. Programs have four warps and more, as each has a workspace.
    """
    block_n = max(16, next_power_of_2(n))
    if device.arch == "interpreter":  # its cost is per program
        return block_n, min(next_power_of_2(n_rows), max(1, (1 << 18) // block_n)), 4
    short = which == "backward" and 4 * n <= 3 * block_n  # backward has no more columns than there are
    if tuned := tiles.tuned(device, f"layer_norm.{which}", str(3 * block_n // 4 if short else block_n)):
        return block_n, *tuned
    if which == "forward":
        return block_n, max(1, 2048 // block_n), max(1, block_n // 1024)
    rows, warps = max(1, 2048 // block_n), min(16, max(4, block_n // 512))
    return block_n, 2 * rows if short and warps == 4 and block_n >= 1024 else rows, warps


def _backward_tile(n_rows: int, n: int, itemsize: int, device: Device) -> tuple[dict[str, int], int]:
    """(Constants of the backward kernel, warps). WIDTH is a vector of 16 bytes for every thread that a row has, or of 8
    where fewer columns are padding then."""
    block_n, rows, warps = _block(n_rows, n, device, "backward")
    width = block_n
    if device.arch != "interpreter":
        width = min(block_n, 32 * max(1, warps // rows) * 16 // itemsize)
        width = min(width, max(16, width // 2), key=lambda width: cdiv(n, width) * width)
    return {"N": n, "WIDTH": width, "PARTS": cdiv(n, width), "ROWS": rows}, warps


@functools.lru_cache(maxsize=4096)
def _programs(n_rows: int, n: int, itemsize: int, device: Device) -> int:
    """How many programs, and so workspace rows, share the parameters' gradients: as many as the device holds."""
    if n > LONGEST_BACKWARD:
        return min(n_rows, max(1, 4 * device.processors * CHUNK // next_power_of_2(n)))
    tile, warps = _backward_tile(n_rows, n, itemsize, device)
    return min(cdiv(n_rows, tile["ROWS"]), device.processors * _held(tile, warps))


def _elements(tile: dict[str, int]) -> int:
    return tile["ROWS"] * tile["PARTS"] * tile["WIDTH"]


def _held(tile: dict[str, int], warps: int) -> int:
    """Programs of the backward kernel that a processor's registers have room for."""
    elements = _elements(tile) // (32 * warps)  # a thread's, with seven registers each
    return max(1, (16 if elements <= 16 else 12 if elements <= 24 else 8) // warps)


def _stages(tile: dict[str, int], warps: int, loaded: Sequence[Spec], device: Device) -> int:
    """Of the backward kernel: 4, which are two blocks of `loaded` under way and one that is computed, or 3 where that
    has no room in shared memory for each program that is held, or in registers. With 2 nothing would be under way."""
    if not device.arch.startswith("sm_"):  # nothing copies to shared memory there while programs go on
        return 1
    if any(spec.stride[0] % 16 for spec in loaded):  # rows then begin anywhere, and a copy takes four bytes at least
        return 1
    deepest = 4 if _elements(tile) <= 16 * 32 * warps else 3
    own = device.shared_memory // _held(tile, warps) - 1024  # what the hardware takes for itself
    blocks = own // (_elements(tile) * sum(spec.dtype.itemsize for spec in loaded))
    return min(deepest, 1 + blocks) if blocks >= 2 else 1


def _row_stride(spec: Spec | None) -> int | None:
    return None if spec is None else spec.stride[0]  # None makes a constant of it


def plan_forward(specs: Specs, options: dict, device: Device) -> list[Launch]:
    n_rows, n = specs["input"].shape
    if n == 0:
        return []
    tensors = pointers(specs, "input", "residual", "weight", "bias", "output", "sum", "mean", "rstd")
    strides = {"row_stride": specs["input"].stride[0], "residual_stride": _row_stride(specs["residual"])}
    if n > LONGEST_FORWARD:
        arguments = tensors | strides | {"N": n, "eps": options["eps"]}
        return [Launch(_layer_norm_forward_long, (n_rows,), arguments, {"BLOCK_N": CHUNK}, 8, 1)]
    block_n, rows, warps = _block(n_rows, n, device, "forward")
    arguments = tensors | {"n_rows": n_rows} | strides | {"eps": options["eps"]}
    constexprs = {"N": n, "BLOCK_N": block_n, "ROWS": rows}
    return [Launch(_layer_norm_forward, (cdiv(n_rows, rows),), arguments, constexprs, warps, 1)]


def plan_backward(specs: Specs, options: dict, device: Device) -> list[Launch]:
    n_rows, n = specs["input"].shape
    if n == 0:
        return []
    grad_stride, row_stride = {"grad_stride": specs["grad"].stride[0]}, {"row_stride": specs["input"].stride[0]}
    strides = grad_stride | {"grad_sum_stride": _row_stride(specs["grad_sum"])} | row_stride
    has_parameters = specs["dweight"] is not None or specs["dbias"] is not None
    itemsize = specs["input"].dtype.itemsize
    n_parts = _programs(n_rows, n, itemsize, device)
    launches = []
    if n > LONGEST_BACKWARD:
        if specs["dinput"] is not None or specs["dresidual"] is not None:
            arguments = pointers(specs, "grad", "grad_sum", "input", "weight", "mean", "rstd", "dinput", "dresidual")
            arguments |= strides | {"N": n}
            launches.append(Launch(_layer_norm_backward_long_input, (n_rows,), arguments, {"BLOCK_N": CHUNK}, 8, 1))
        if has_parameters:
            arguments = pointers(specs, "grad", "input", "mean", "rstd", "dweight_parts", "dbias_parts")
            arguments |= {"n_rows": n_rows} | grad_stride | row_stride | {"N": n, "n_parts": n_parts}
            grid = (cdiv(n, CHUNK) * n_parts,)
            launches.append(Launch(_layer_norm_backward_long_parameters, grid, arguments, {"BLOCK_N": CHUNK}, 8, 1))
    else:
        tile, warps = _backward_tile(n_rows, n, itemsize, device)
        loaded = [specs[name] for name in ("grad", "grad_sum", "input") if specs[name] is not None]
        constexprs = tile | {"STAGES": _stages(tile, warps, loaded, device)}
        arguments = pointers(specs, "grad", "grad_sum", "input", "weight", "mean", "rstd", "dinput", "dresidual")
        arguments |= pointers(specs, "dweight_parts", "dbias_parts") | {"n_rows": n_rows} | strides
        launches.append(Launch(_layer_norm_backward, (n_parts,), arguments, constexprs, warps, 1))
    if has_parameters:
        most = 256 if n % 4 else 1024  # of rows in no vectors each number has an address of its own, in registers too
        block_p, block_n = min(most, max(256, next_power_of_2(n_parts))), 16  # all rows at once: one wait for memory
        if device.arch == "interpreter":
            block_p, block_n = min(256, next_power_of_2(n_parts)), min(1024, next_power_of_2(n))
        arguments = pointers(specs, "dweight_parts", "dbias_parts", "dweight", "dbias")
        arguments |= {"n_parts": n_parts, "N": n}
        constexprs, warps = {"BLOCK_P": block_p, "BLOCK_N": block_n}, max(8 if n % 4 else 4, block_p // 64)
        launches.append(Launch(_layer_norm_backward_reduce, (cdiv(n, block_n),), arguments, constexprs, warps, 1))
    return launches


# ---------------------------------------------------------------- registration


def matrix(tensor: torch.Tensor | None, n_dims: int) -> torch.Tensor | None:
    """(*, the last n_dims dimensions) as (n_rows, N)."""
    if tensor is None:
        return None
    if tensor.dim() != 2 or n_dims != 1:
        first = tensor.dim() - n_dims
        tensor = tensor.reshape(math.prod(tensor.shape[:first]), math.prod(tensor.shape[first:]))
    return rows_of(tensor)


def row(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """A weight or bias as one contiguous row."""
    if tensor is None or (tensor.dim() == 1 and tensor.is_contiguous()):
        return tensor
    return tensor.reshape(-1).contiguous()


def _empty_forward(input, n_dims, out_dtype):
    output = torch.empty_like(input, dtype=out_dtype, memory_format=torch.contiguous_format)
    mean = input.new_empty(math.prod(input.shape[: input.dim() - n_dims]), dtype=torch.float32)
    return output, mean, torch.empty_like(mean)


def _forward(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    n_dims: int,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of the last n_dims dimensions -> output of `out_dtype` in input's shape, mean and rstd fp32 (n_rows,).

    It is given the whole shape, and not rows: views outside the op would be nodes of autograd's.
    """
    output, mean, rstd = _empty_forward(input, n_dims, out_dtype)
    tensors = {"input": matrix(input, n_dims), "residual": None, "weight": weight, "bias": bias}
    tensors |= {"output": matrix(output, n_dims), "sum": None, "mean": mean, "rstd": rstd}
    run(plan_forward, tensors, eps=eps)
    return output, mean, rstd


def _empty_backward(input, weight, bias, needs):
    """A gradient that is not needed is an empty tensor: an op cannot return None."""
    like = [input, weight, bias]
    return tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if need else input.new_empty(0)
        for tensor, need in zip(like, needs, strict=True)
    )


def workspaces(input: torch.Tensor, needs_weight: bool, needs_bias: bool) -> dict[str, torch.Tensor | None]:
    """Where the programs of a backward pass put their sums for the parameters' gradients."""
    n_rows, n = input.shape
    shared = input.new_empty((2, _programs(n_rows, n, input.element_size(), facts_of(input)), n), dtype=torch.float32)
    return {
        "dweight_parts": shared[0] if needs_weight else None,
        "dbias_parts": shared[1] if needs_bias else None,
    }


def _backward(
    grad: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    n_dims: int,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of input, weight and bias, those that `needs` asks for."""
    rows = matrix(input, n_dims)
    gradients = _empty_backward(input, weight, bias, needs)
    dinput, dweight, dbias = (tensor if need else None for tensor, need in zip(gradients, needs, strict=True))
    tensors = {"grad": matrix(grad, n_dims), "grad_sum": None, "input": rows, "weight": weight}
    tensors |= {"mean": mean, "rstd": rstd, "dinput": matrix(dinput, n_dims), "dresidual": None}
    tensors |= {"dweight": dweight, "dbias": dbias}
    run(plan_backward, tensors | workspaces(rows, *needs[1:]))
    return gradients


def _save(ctx, inputs, output):
    input, weight, bias, ctx.n_dims, *_ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(input, weight, bias, mean, rstd)


def _gradients(ctx, grad, _grad_mean, _grad_rstd):
    needs = list(ctx.needs_input_grad[:3])
    gradients = backward(grad, *ctx.saved_tensors, ctx.n_dims, needs)
    return *(tensor if need else None for tensor, need in zip(gradients, needs, strict=True)), None, None, None


forward = register(
    "layer_norm",
    _forward,
    lambda input, weight, bias, n_dims, eps, out_dtype: _empty_forward(input, n_dims, out_dtype),
    _gradients,
    _save,
)
backward = register(
    "layer_norm_backward",
    _backward,
    lambda grad, input, weight, bias, mean, rstd, n_dims, needs: _empty_backward(input, weight, bias, needs),
)

# ---------------------------------------------------------------- public


def check(
    op: str,
    input_shape: Sequence[int],
    normalized_shape: int | Sequence[int],
    eps: float,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> tuple[int, ...]:
    """normalized_shape as a tuple; errors as PyTorch has them."""
    check_number(op, "eps", eps)
    sizes = [normalized_shape] if isinstance(normalized_shape, int | torch.SymInt) else normalized_shape
    if not isinstance(sizes, list | tuple):
        raise TypeError(f"{op}: normalized_shape must be an int or a list of them, not {type(sizes).__name__}")
    for size in sizes:
        check_number(op, "normalized_shape", size, whole=True)
    shape = tuple(sizes)
    if not shape or tuple(input_shape[-len(shape) :]) != shape:
        raise RuntimeError(
            f"{op}: normalized_shape={list(shape)} needs an input of shape [*, {', '.join(map(str, shape))}], "
            f"got {list(input_shape)}"
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise RuntimeError(f"{op}: {name} must have shape {list(shape)}, got {list(tensor.shape)}")
    return shape


def layer_norm(
    input: torch.Tensor,
    normalized_shape: int | Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """`torch.nn.functional.layer_norm`: (*, *normalized_shape) -> the same shape and dtype.

    fp32, fp16 or bf16; weight and bias may have another of these dtypes than input. Statistics and
    sums are fp32. Under autocast the result has autocast's dtype, where PyTorch returns fp32: the
    product that follows would cast it anyway.

    Ba, Kiros and Hinton (2016), https://arxiv.org/abs/1607.06450. Raises TypeError for what is no tensor or no number,
    RuntimeError if a shape does not fit normalized_shape or devices differ, NotImplementedError for other dtypes,
    second derivatives and torch.func's transforms.
    """
    check_tensors("layer_norm", {"input": input, "weight": weight, "bias": bias}, optional=("weight", "bias"))
    refuse_transforms("layer_norm", input, weight, bias)
    shape = check("layer_norm", input.shape, normalized_shape, eps, weight, bias)
    out_dtype = autocast_dtype(input.device) or input.dtype
    return forward(input, row(weight), row(bias), len(shape), float(eps), out_dtype)[0]


# ---------------------------------------------------------------- catalogue


def _plan(inputs: dict, options: dict, device: Device) -> list[Launch]:
    """The launches of a forward and a backward pass in which every gradient is needed."""
    input, weight, bias = inputs["input"], inputs.get("weight"), inputs.get("bias")
    n_dims = len(options["normalized_shape"])
    weight, bias = row(weight), row(bias)
    with plan_only(device) as launches:
        output, mean, rstd = _forward(input, weight, bias, n_dims, 1e-5, input.dtype)
        _backward(output, input, weight, bias, mean, rstd, n_dims, [True, weight is not None, bias is not None])
    return launches


def _cost(inputs: dict, options: dict) -> tuple[Cost, Cost]:
    """Seven operations an element forward, fourteen backward; x read and y written, x and dy read and dx written."""
    input = inputs["input"]
    parameters = sum(inputs[name].nbytes for name in ("weight", "bias") if inputs.get(name) is not None)
    statistics = 8 * (input.numel() // math.prod(options["normalized_shape"]))
    return (
        Cost(7 * input.numel(), 2 * input.nbytes + parameters + statistics),
        Cost(14 * input.numel(), 3 * input.nbytes + 2 * parameters + statistics),
    )


def _case(name: str, *lead: int, shape: tuple[int, ...], weight: bool = True, bias: bool = True) -> Case:
    shapes = {"input": (*lead, *shape)} | ({"weight": shape} if weight else {}) | ({"bias": shape} if bias else {})
    return Case(name, shapes, {"normalized_shape": shape})


OP = Op(
    name="layer_norm",
    public=layer_norm,
    reference=reference.layer_norm,
    torch=F.layer_norm,
    plan=_plan,
    cost=_cost,
    cases=(
        _case("one_element", 3, shape=(1,)),
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
        _case("1024", 16384, shape=(1024,)),
        _case("4096", 4096, shape=(4096,)),
        _case("8192", 4096, shape=(8192,)),
        _case("16384", 2048, shape=(16384,)),
        _case("262144", 256, shape=(262144,)),
    ),
    differentiable=("input", "weight", "bias"),
)
