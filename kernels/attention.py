"""Scaled dot-product attention: softmax(scale * Q K^T) V without ever writing the scores.

Forward walks the keys in tiles with a running maximum m and sum l of every query's row:

    s = scale * q k^T      m' = max(m, max(s))      p = exp(s - m')
    l' = l * exp(m - m') + sum(p)                   o' = o * exp(m - m') + p v

and ends with o / l and lse = m + log(l), one fp32 number a query. Backward has p = exp(s - lse) again from
saved q, k, v, out and lse, and with delta = sum(out * dout):

    dv = p^T dout     dp = dout v^T     ds = p * (dp - delta)     dq = scale * ds k     dk = scale * ds^T q

Two launches, no atomics: programs that own queries write dq and delta, then programs that own keys write
dk and dv, the heads of a group one after another. Causal: query i sees key j when j <= i + query_offset.
Tiles that are seen whole run in a loop without masks.

Forward takes 4 Tq Tk D operations a head (half of it when causal), backward 10 by count and 14 as run here, as
each of the two kernels needs p. Bytes: q, k, v, out once, far below the operations, so matrix products and
exponentials are the bound.

Dropout keeps an element when its 16 random bits reach the threshold; Philox gives 8 elements a call,
8 keys in a row for one query, by (seed, key // 8, query, batch * head), whatever the tiles.

Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018), https://arxiv.org/abs/1805.02867.
Dao, "FlashAttention-2" (2023), https://arxiv.org/abs/2307.08691.
Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011), for Philox.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from kernels import reference, tiles
from kernels.device import Device, allow_tf32
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
    dot,
    fma,
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

LOG2_E = tl.constexpr(1.4426950408889634)

# ---------------------------------------------------------------- kernels


@triton.jit
def _head(base_ptr, head, n_head, group, stride_batch, stride_head):
    """Where a head's matrix begins; `group` query heads share a key head."""
    batch = (head // n_head).to(tl.int64)
    return base_ptr + batch * stride_batch + (head % n_head // group).to(tl.int64) * stride_head


@triton.jit
def _offsets(BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, stride):
    """Where the elements of a [BLOCK, BLOCK_D] tile lie, from its first."""
    return tl.arange(0, BLOCK)[:, None].to(tl.int64) * stride + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def _matrix(
    head_ptr, n_rows, stride, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, DESCRIPTORS: tl.constexpr
):
    """What _load takes the tiles of a head's [n_rows, D] matrix from: a tensor descriptor of it, or its address."""
    if DESCRIPTORS:
        return tl.make_tensor_descriptor(head_ptr, [n_rows, D], [stride, 1], [BLOCK, BLOCK_D])
    else:
        return head_ptr


@triton.jit
def _load(
    matrix, start, offsets, stride, n_rows,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The [BLOCK, BLOCK_D] tile at row `start`, zero beyond n_rows (if MASKED) and beyond column D.

    Through a descriptor, which knows the bounds, it is zero there without a mask.
    """
    if isinstance(matrix, tl.tensor_descriptor):
        return matrix.load([start, 0])
    else:
        tile = matrix + tl.cast(start, tl.int64) * stride + offsets
        rows = (start + tl.arange(0, BLOCK) < n_rows)[:, None]
        columns = (tl.arange(0, BLOCK_D) < D)[None, :]
        if MASKED and D < BLOCK_D:
            return tl.load(tile, mask=rows & columns, other=0.0)
        elif MASKED:
            return tl.load(tile, mask=rows, other=0.0)
        elif D < BLOCK_D:
            return tl.load(tile, mask=columns, other=0.0)
        else:
            return tl.load(tile)


@triton.jit
def _store(head_ptr, start, offsets, stride, n_rows, tile, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    rows = (start + tl.arange(0, BLOCK) < n_rows)[:, None]
    columns = (tl.arange(0, BLOCK_D) < D)[None, :]
    tile = cast(tile, head_ptr.dtype.element_ty)
    tl.store(head_ptr + tl.cast(start, tl.int64) * stride + offsets, tile, mask=rows & columns)


@triton.jit
def _seen(queries, keys, q_len, k_len, query_offset, IS_CAUSAL: tl.constexpr):
    """Whether a query sees a key; the arguments broadcast."""
    seen = (keys < k_len) & (queries < q_len)
    if IS_CAUSAL:
        seen = seen & (keys <= queries + query_offset)
    return seen


@triton.jit
def _kept_words(seed, heads, queries, groups, threshold, BLOCK_K: tl.constexpr):
    """[rows, BLOCK_K]: what dropout keeps; heads and queries [rows, 1], groups of 8 keys [1, BLOCK_K // 8]."""
    zeros = tl.zeros([queries.shape[0], BLOCK_K // 8], tl.int32)
    a, b, c, d = tl.philox(seed, zeros + groups, zeros + queries, zeros + heads, zeros, n_rounds=7)
    words = tl.join(tl.join(a, b), tl.join(c, d))
    halves = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(halves, [queries.shape[0], BLOCK_K]).to(tl.int32) >= threshold


@triton.jit
def _kept(seed, head, queries, first_key, threshold, BLOCK_K: tl.constexpr):
    """[len(queries), BLOCK_K] of one head: whether dropout keeps an element; first_key is a multiple of 8."""
    groups = first_key // 8 + tl.arange(0, BLOCK_K // 8)
    return _kept_words(seed, head, queries[:, None], groups[None, :], threshold, BLOCK_K)


@triton.jit
def _exp(s, scale, shift, PRECISE: tl.constexpr):
    """exp(s * scale - shift), which for fp16 and bf16 come in base 2 already: one instruction less an element.

    For fp32 the factor comes last, where its rounding weighs as the small exponent does and not as the large score.
    """
    exponent = fma(s, scale, -shift)
    return tl.exp2(exponent * LOG2_E) if PRECISE else tl.exp2(exponent)


@triton.jit
def _key_range(
    first,
    q_len,
    k_len,
    query_offset,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    EVEN: tl.constexpr,
):
    """(full, end): tiles of keys up to `full` need no mask, those from there to `end` do, and the rest is not seen.

    Without a diagonal it is all or nothing: an unmasked loop and then a masked one of a single trip would have ptxas
    serialise the tensor cores (advisory C7515).
    """
    if IS_CAUSAL:
        last = tl.minimum(first + BLOCK_Q, q_len) - 1
        full = tl.maximum(tl.minimum(first + query_offset + 1, k_len), 0) // BLOCK_K * BLOCK_K
        end = tl.maximum(tl.minimum(last + query_offset + 1, k_len), 0)
    else:
        full = k_len if EVEN else 0
        end = k_len
    return full, end


@triton.jit
def _softmax(
    s, peak, total, queries, start, q_len, k_len, query_offset, scale, seed, head, threshold,
    IS_CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """(p, alpha, maximum, sum) of a tile of scores: p relative to the new maximum, alpha that of what came before."""
    if MASKED:
        keys = start + tl.arange(0, s.shape[1])
        s = tl.where(_seen(queries[:, None], keys[None, :], q_len, k_len, query_offset, IS_CAUSAL), s, float("-inf"))
    highest = tl.maximum(peak, tl.max(s, axis=1) * scale)
    base = highest
    if MASKED:  # a query that has seen no key yet must not get inf - inf
        base = tl.where(highest == float("-inf"), 0.0, highest)
    p = _exp(s, scale, base[:, None], PRECISE)
    alpha = _exp(peak, 1.0, base, PRECISE)
    total = total * alpha + tl.sum(p, axis=1)
    if DROPOUT:
        p = tl.where(_kept(seed, head, queries, start, threshold, s.shape[1]), p, 0.0)
    return p, alpha, highest, total


@triton.jit
def _attend(
    state, q, queries, start, keys, values, k_offsets, v_offsets, k_stride, v_stride,
    q_len, k_len, query_offset, scale, seed, head, threshold,
    D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    IS_CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One tile of keys into the state of a tile of queries: the running output, maximum and sum.

    With OVERLAP the state has the p of the tile before, too: its product with the values, which needs nothing of this
    tile, can run on the tensor cores during this tile's softmax.
    """
    k = _load(keys, start, k_offsets, k_stride, k_len, D, BLOCK_K, BLOCK_D, MASKED)
    s = dot(q, tl.trans(k), tl.zeros([q.shape[0], BLOCK_K], tl.float32), PRECISION)
    if OVERLAP:
        acc, peak, total, p = state
        v = _load(values, start - BLOCK_K, v_offsets, v_stride, k_len, D, BLOCK_K, BLOCK_D, False)
        acc = dot(p, v, acc, PRECISION)
    else:
        acc, peak, total = state
    p, alpha, peak, total = _softmax(
        s, peak, total, queries, start, q_len, k_len, query_offset, scale, seed, head, threshold,
        IS_CAUSAL, DROPOUT, q.dtype == tl.float32, MASKED,
    )  # fmt: skip
    if OVERLAP:
        return acc * alpha[:, None], peak, total, cast(p, q.dtype)
    else:
        v = _load(values, start, v_offsets, v_stride, k_len, D, BLOCK_K, BLOCK_D, MASKED)
        return dot(cast(p, v.dtype), v, acc * alpha[:, None], PRECISION), peak, total


@triton.jit
def _attention_forward(
    query_ptr, key_ptr, value_ptr, out_ptr, lse_ptr, seed_ptr,
    q_stride_b, q_stride_h, q_stride, k_stride_b, k_stride_h, k_stride, v_stride_b, v_stride_h, v_stride,
    o_stride_b, o_stride_h, o_stride,
    n_head, group, q_len, k_len, query_offset, exponent_scale, threshold, keep_scale,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr,
    DESCRIPTORS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_Q queries of one head; the last tiles of a head, which see most keys, come first."""
    tiles = tl.cdiv(q_len, BLOCK_Q)
    head = tl.program_id(0) // tiles
    first = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_Q
    query_ptr = _head(query_ptr, head, n_head, 1, q_stride_b, q_stride_h)
    key_ptr = _head(key_ptr, head, n_head, group, k_stride_b, k_stride_h)
    value_ptr = _head(value_ptr, head, n_head, group, v_stride_b, v_stride_h)
    out_ptr = _head(out_ptr, head, n_head, 1, o_stride_b, o_stride_h)
    keys = _matrix(key_ptr, k_len, k_stride, D, BLOCK_K, BLOCK_D, DESCRIPTORS)
    values = _matrix(value_ptr, k_len, v_stride, D, BLOCK_K, BLOCK_D, DESCRIPTORS)
    k_offsets = _offsets(BLOCK_K, BLOCK_D, k_stride)
    v_offsets = _offsets(BLOCK_K, BLOCK_D, v_stride)
    DROPOUT: tl.constexpr = seed_ptr is not None
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)

    queries = first + tl.arange(0, BLOCK_Q)
    q = _matrix(query_ptr, q_len, q_stride, D, BLOCK_Q, BLOCK_D, DESCRIPTORS)
    q = _load(q, first, _offsets(BLOCK_Q, BLOCK_D, q_stride), q_stride, q_len, D, BLOCK_Q, BLOCK_D, True)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    full, end = _key_range(first, q_len, k_len, query_offset, BLOCK_Q, BLOCK_K, IS_CAUSAL, EVEN)
    state = (acc, peak, total)
    begin = 0
    if OVERLAP:  # the first tile's p; the loops begin with the second
        k = _load(keys, 0, k_offsets, k_stride, k_len, D, BLOCK_K, BLOCK_D, True)
        s = dot(q, tl.trans(k), tl.zeros([BLOCK_Q, BLOCK_K], tl.float32), PRECISION)
        p, _, peak, total = _softmax(
            s, peak, total, queries, 0, q_len, k_len, query_offset, exponent_scale, seed, head, threshold,
            IS_CAUSAL, DROPOUT, q.dtype == tl.float32, True,
        )  # fmt: skip
        state = (acc, peak, total, cast(p, q.dtype))
        begin = BLOCK_K
        full = tl.maximum(full, BLOCK_K)
    if IS_CAUSAL or EVEN:
        for start in range(begin, full, BLOCK_K):
            state = _attend(
                state, q, queries, start, keys, values, k_offsets, v_offsets, k_stride, v_stride,
                q_len, k_len, query_offset, exponent_scale, seed, head, threshold,
                D, BLOCK_K, BLOCK_D, IS_CAUSAL, DROPOUT, PRECISION, False, OVERLAP,
            )  # fmt: skip
    if IS_CAUSAL or not EVEN:
        for start in range(full, end, BLOCK_K):
            state = _attend(
                state, q, queries, start, keys, values, k_offsets, v_offsets, k_stride, v_stride,
                q_len, k_len, query_offset, exponent_scale, seed, head, threshold,
                D, BLOCK_K, BLOCK_D, IS_CAUSAL, DROPOUT, PRECISION, True, OVERLAP,
            )  # fmt: skip
    if OVERLAP:  # the last tile's product; where nothing is seen one of zeros, as 0 times an infinite value is NaN
        acc, peak, total, p = state
        last = tl.where(end > 0, (end - 1) // BLOCK_K * BLOCK_K, k_len)
        v = _load(values, last, v_offsets, v_stride, k_len, D, BLOCK_K, BLOCK_D, True)
        acc = dot(p, v, acc, PRECISION)
    else:
        acc, peak, total = state

    acc *= (keep_scale / tl.where(total == 0.0, 1.0, total))[:, None]
    _store(out_ptr, first, _offsets(BLOCK_Q, BLOCK_D, o_stride), o_stride, q_len, acc, D, BLOCK_Q, BLOCK_D)
    if q.dtype == tl.float32:
        lse = peak + tl.log(tl.where(total == 0.0, 1.0, total))
    else:
        lse = (peak + tl.log2(tl.where(total == 0.0, 1.0, total))) / LOG2_E
    tl.store(lse_ptr + head.to(tl.int64) * q_len + queries, lse, mask=queries < q_len)


@triton.jit
def _load_lse(lse_ptr, queries, q_len, PRECISE: tl.constexpr, MASKED: tl.constexpr):
    """lse as _exp takes it; inf, which makes p zero, for a query that sees no key (-inf) or lies beyond q_len."""
    if MASKED:
        lse = tl.load(lse_ptr + queries, mask=queries < q_len, other=float("inf"))
    else:
        lse = tl.load(lse_ptr + queries)
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    return lse if PRECISE else lse * LOG2_E


@triton.jit
def _query_gradient(
    dq, q, dout, lse, delta, queries, start, keys, values, k_offsets, v_offsets, k_stride, v_stride,
    q_len, k_len, query_offset, scale, seed, head, threshold, keep_scale,
    D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    IS_CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dq of a tile of queries plus what one tile of keys gives, without the factor `scale`."""
    k = _load(keys, start, k_offsets, k_stride, k_len, D, BLOCK_K, BLOCK_D, MASKED)
    v = _load(values, start, v_offsets, v_stride, k_len, D, BLOCK_K, BLOCK_D, MASKED)
    zeros = tl.zeros([q.shape[0], BLOCK_K], tl.float32)
    p = _exp(dot(q, tl.trans(k), zeros, PRECISION), scale, lse[:, None], q.dtype == tl.float32)
    dp = dot(dout, tl.trans(v), zeros, PRECISION)
    if MASKED:
        places = start + tl.arange(0, BLOCK_K)
        p = tl.where(_seen(queries[:, None], places[None, :], q_len, k_len, query_offset, IS_CAUSAL), p, 0.0)
    if DROPOUT:
        dp = tl.where(_kept(seed, head, queries, start, threshold, BLOCK_K), dp * keep_scale, 0.0)
    ds = p * (dp - delta[:, None])
    return dot(cast(ds, k.dtype), k, dq, PRECISION)


@triton.jit
def _delta(out, dout, is_query):
    """The sum of out * dout over each row; rows that are no query are zeros.

    The mask says that again for fp32, so that no product is fused into the sum across threads: each thread would round
    all products but its own, and the threads that share a row come to different sums.
    """
    products = out.to(tl.float32) * dout.to(tl.float32)  # exact for halves
    if out.dtype == tl.float32:
        products = tl.where(is_query[:, None], products, 0.0)
    return tl.sum(products, axis=1)


@triton.jit
def _attention_backward_query(
    query_ptr, key_ptr, value_ptr, out_ptr, grad_ptr, lse_ptr, seed_ptr, delta_ptr, dquery_ptr,
    q_stride_b, q_stride_h, q_stride, k_stride_b, k_stride_h, k_stride, v_stride_b, v_stride_h, v_stride,
    o_stride_b, o_stride_h, o_stride, g_stride_b, g_stride_h, g_stride, dq_stride_b, dq_stride_h, dq_stride,
    n_head, group, q_len, k_len, query_offset, exponent_scale, scale, threshold, keep_scale,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_Q queries of one head: their dquery, and their delta for the other kernel."""
    tiles = tl.cdiv(q_len, BLOCK_Q)
    head = tl.program_id(0) // tiles
    first = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_Q
    query_ptr = _head(query_ptr, head, n_head, 1, q_stride_b, q_stride_h)
    key_ptr = _head(key_ptr, head, n_head, group, k_stride_b, k_stride_h)
    value_ptr = _head(value_ptr, head, n_head, group, v_stride_b, v_stride_h)
    out_ptr = _head(out_ptr, head, n_head, 1, o_stride_b, o_stride_h)
    grad_ptr = _head(grad_ptr, head, n_head, 1, g_stride_b, g_stride_h)
    dquery_ptr = _head(dquery_ptr, head, n_head, 1, dq_stride_b, dq_stride_h)
    keys = _matrix(key_ptr, k_len, k_stride, D, BLOCK_K, BLOCK_D, DESCRIPTORS)
    values = _matrix(value_ptr, k_len, v_stride, D, BLOCK_K, BLOCK_D, DESCRIPTORS)
    k_offsets = _offsets(BLOCK_K, BLOCK_D, k_stride)
    v_offsets = _offsets(BLOCK_K, BLOCK_D, v_stride)
    DROPOUT: tl.constexpr = seed_ptr is not None
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)

    queries = first + tl.arange(0, BLOCK_Q)
    q = _matrix(query_ptr, q_len, q_stride, D, BLOCK_Q, BLOCK_D, DESCRIPTORS)
    q = _load(q, first, _offsets(BLOCK_Q, BLOCK_D, q_stride), q_stride, q_len, D, BLOCK_Q, BLOCK_D, True)
    dout = _matrix(grad_ptr, q_len, g_stride, D, BLOCK_Q, BLOCK_D, DESCRIPTORS)
    dout = _load(dout, first, _offsets(BLOCK_Q, BLOCK_D, g_stride), g_stride, q_len, D, BLOCK_Q, BLOCK_D, True)
    out = _load(out_ptr, first, _offsets(BLOCK_Q, BLOCK_D, o_stride), o_stride, q_len, D, BLOCK_Q, BLOCK_D, True)
    delta = _delta(out, dout, queries < q_len)
    tl.store(delta_ptr + head.to(tl.int64) * q_len + queries, delta, mask=queries < q_len)
    lse = _load_lse(lse_ptr + head.to(tl.int64) * q_len, queries, q_len, q.dtype == tl.float32, True)
    dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    full, end = _key_range(first, q_len, k_len, query_offset, BLOCK_Q, BLOCK_K, IS_CAUSAL, EVEN)
    if IS_CAUSAL or EVEN:
        for start in range(0, full, BLOCK_K):
            dq = _query_gradient(
                dq, q, dout, lse, delta, queries, start, keys, values, k_offsets, v_offsets, k_stride, v_stride,
                q_len, k_len, query_offset, exponent_scale, seed, head, threshold, keep_scale,
                D, BLOCK_K, BLOCK_D, IS_CAUSAL, DROPOUT, PRECISION, False,
            )  # fmt: skip
    if IS_CAUSAL or not EVEN:
        for start in range(full, end, BLOCK_K):
            dq = _query_gradient(
                dq, q, dout, lse, delta, queries, start, keys, values, k_offsets, v_offsets, k_stride, v_stride,
                q_len, k_len, query_offset, exponent_scale, seed, head, threshold, keep_scale,
                D, BLOCK_K, BLOCK_D, IS_CAUSAL, DROPOUT, PRECISION, True,
            )  # fmt: skip
    _store(dquery_ptr, first, _offsets(BLOCK_Q, BLOCK_D, dq_stride), dq_stride, q_len, dq * scale, D, BLOCK_Q, BLOCK_D)


@triton.jit
def _key_gradients(
    dk, dv, k, v, keys, first, start, q_matrix, g_matrix, lse_ptr, delta_ptr, q_offsets, g_offsets, q_stride, g_stride,
    q_len, k_len, query_offset, scale, seed, head, threshold, keep_scale,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    IS_CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr, MASKED_ROWS: tl.constexpr,
):  # fmt: skip
    """dk (without the factor `scale`) and dv of a tile of keys plus what one tile of queries gives.

    Scores stand transposed, keys as rows, so that p^T and ds^T enter their products from registers. A query beyond
    q_len has lse = inf, so p = 0; a key beyond k_len only spoils its own row, which is not stored.
    """
    queries = start + tl.arange(0, BLOCK_Q)
    q = _load(q_matrix, start, q_offsets, q_stride, q_len, D, BLOCK_Q, BLOCK_D, MASKED_ROWS)
    dout = _load(g_matrix, start, g_offsets, g_stride, q_len, D, BLOCK_Q, BLOCK_D, MASKED_ROWS)
    lse = _load_lse(lse_ptr, queries, q_len, q.dtype == tl.float32, MASKED_ROWS)
    if MASKED_ROWS:
        delta = tl.load(delta_ptr + queries, mask=queries < q_len, other=0.0)
    else:
        delta = tl.load(delta_ptr + queries)
    zeros = tl.zeros([BLOCK_K, BLOCK_Q], tl.float32)
    p = _exp(dot(k, tl.trans(q), zeros, PRECISION), scale, lse[None, :], q.dtype == tl.float32)
    if MASKED:
        p = tl.where(_seen(queries[None, :], keys[:, None], q_len, k_len, query_offset, IS_CAUSAL), p, 0.0)
    dp = dot(v, tl.trans(dout), zeros, PRECISION)
    dropped = p
    if DROPOUT:
        kept = tl.trans(_kept(seed, head, queries, first, threshold, BLOCK_K))
        dropped = tl.where(kept, p * keep_scale, 0.0)
        dp = tl.where(kept, dp * keep_scale, 0.0)
    dv = dot(cast(dropped, dout.dtype), dout, dv, PRECISION)
    ds = p * (dp - delta[None, :])
    dk = dot(cast(ds, q.dtype), q, dk, PRECISION)
    return dk, dv


@triton.jit
def _attention_backward_key(
    query_ptr, key_ptr, value_ptr, grad_ptr, lse_ptr, seed_ptr, delta_ptr, dkey_ptr, dvalue_ptr,
    q_stride_b, q_stride_h, q_stride, k_stride_b, k_stride_h, k_stride, v_stride_b, v_stride_h, v_stride,
    g_stride_b, g_stride_h, g_stride, dk_stride_b, dk_stride_h, dk_stride, dv_stride_b, dv_stride_h, dv_stride,
    n_head, group, q_len, k_len, query_offset, exponent_scale, scale, threshold, keep_scale,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_K keys of one key head, and walks the queries of every head of its group in order."""
    tiles = tl.cdiv(k_len, BLOCK_K)
    n_key_head = n_head // group
    key_head = tl.program_id(0) // tiles
    first = tl.program_id(0) % tiles * BLOCK_K
    key_ptr = _head(key_ptr, key_head, n_key_head, 1, k_stride_b, k_stride_h)
    value_ptr = _head(value_ptr, key_head, n_key_head, 1, v_stride_b, v_stride_h)
    dkey_ptr = _head(dkey_ptr, key_head, n_key_head, 1, dk_stride_b, dk_stride_h)
    dvalue_ptr = _head(dvalue_ptr, key_head, n_key_head, 1, dv_stride_b, dv_stride_h)
    q_offsets = _offsets(BLOCK_Q, BLOCK_D, q_stride)
    g_offsets = _offsets(BLOCK_Q, BLOCK_D, g_stride)
    DROPOUT: tl.constexpr = seed_ptr is not None
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)

    keys = first + tl.arange(0, BLOCK_K)
    k = _matrix(key_ptr, k_len, k_stride, D, BLOCK_K, BLOCK_D, DESCRIPTORS)
    k = _load(k, first, _offsets(BLOCK_K, BLOCK_D, k_stride), k_stride, k_len, D, BLOCK_K, BLOCK_D, True)
    v = _matrix(value_ptr, k_len, v_stride, D, BLOCK_K, BLOCK_D, DESCRIPTORS)
    v = _load(v, first, _offsets(BLOCK_K, BLOCK_D, v_stride), v_stride, k_len, D, BLOCK_K, BLOCK_D, True)
    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for member in range(0, group):
        head = key_head * group + member  # batch * n_head + h, as key_head is batch * n_key_head + h // group
        q_matrix = _head(query_ptr, head, n_head, 1, q_stride_b, q_stride_h)
        q_matrix = _matrix(q_matrix, q_len, q_stride, D, BLOCK_Q, BLOCK_D, DESCRIPTORS)
        g_matrix = _head(grad_ptr, head, n_head, 1, g_stride_b, g_stride_h)
        g_matrix = _matrix(g_matrix, q_len, g_stride, D, BLOCK_Q, BLOCK_D, DESCRIPTORS)
        head_lse_ptr = lse_ptr + head.to(tl.int64) * q_len
        head_delta_ptr = delta_ptr + head.to(tl.int64) * q_len
        lowest = 0
        if IS_CAUSAL:
            # From the first query that sees a key of the tile, BLOCK_K queries see it in part. The trip count is a
            # constant: with a dynamic one, Triton 3.6 has ptxas serialise the tensor cores (advisory C7515).
            lowest = tl.maximum(first - query_offset, 0)
            for step in range(0, BLOCK_K // BLOCK_Q):
                dk, dv = _key_gradients(
                    dk, dv, k, v, keys, first, lowest + step * BLOCK_Q, q_matrix, g_matrix, head_lse_ptr,
                    head_delta_ptr, q_offsets, g_offsets, q_stride, g_stride,
                    q_len, k_len, query_offset, exponent_scale, seed, head, threshold, keep_scale,
                    D, BLOCK_Q, BLOCK_K, BLOCK_D, IS_CAUSAL, DROPOUT, PRECISION, True, True,
                )  # fmt: skip
            lowest += BLOCK_K
        for start in range(lowest, q_len, BLOCK_Q):
            dk, dv = _key_gradients(
                dk, dv, k, v, keys, first, start, q_matrix, g_matrix, head_lse_ptr,
                head_delta_ptr, q_offsets, g_offsets, q_stride, g_stride,
                q_len, k_len, query_offset, exponent_scale, seed, head, threshold, keep_scale,
                D, BLOCK_Q, BLOCK_K, BLOCK_D, IS_CAUSAL, DROPOUT, PRECISION, False, not EVEN,
            )  # fmt: skip
    dk_offsets = _offsets(BLOCK_K, BLOCK_D, dk_stride)
    dv_offsets = _offsets(BLOCK_K, BLOCK_D, dv_stride)
    _store(dkey_ptr, first, dk_offsets, dk_stride, k_len, dk * scale, D, BLOCK_K, BLOCK_D)
    _store(dvalue_ptr, first, dv_offsets, dv_stride, k_len, dv, D, BLOCK_K, BLOCK_D)


# Short sequences: all queries and keys of a head fit one tile, so several heads share a program, there is no loop over
# tiles, and one launch gives all three gradients.


@triton.jit
def _rows_of_heads(heads, positions, n_head, stride_batch, stride_head, stride):
    """Where rows begin, [BLOCK] int64: each is the row `position` of its own head."""
    head = (heads // n_head).to(tl.int64) * stride_batch + (heads % n_head).to(tl.int64) * stride_head
    return head + positions.to(tl.int64) * stride


@triton.jit
def _load_rows(base_ptr, offsets, valid, D: tl.constexpr, BLOCK_D: tl.constexpr):
    columns = tl.arange(0, BLOCK_D)
    return tl.load(
        base_ptr + offsets[:, None] + columns[None, :], mask=valid[:, None] & (columns < D)[None, :], other=0.0
    )


@triton.jit
def _store_rows(base_ptr, offsets, valid, tile, D: tl.constexpr, BLOCK_D: tl.constexpr):
    columns = tl.arange(0, BLOCK_D)
    tile = cast(tile, base_ptr.dtype.element_ty)
    tl.store(base_ptr + offsets[:, None] + columns[None, :], tile, mask=valid[:, None] & (columns < D)[None, :])


@triton.jit
def _short_seen(slots, positions, q_len, k_len, query_offset, IS_CAUSAL: tl.constexpr):
    """[BLOCK, BLOCK]: whether a query sees a key; each stands at a position of the head in its slot."""
    seen = _seen(positions[:, None], positions[None, :], q_len, k_len, query_offset, IS_CAUSAL)
    return seen & (slots[:, None] == slots[None, :])


@triton.jit
def _short_kept(seed, heads, positions, threshold, LENGTH: tl.constexpr, BLOCK: tl.constexpr):
    """[BLOCK, BLOCK]: what dropout keeps, as _kept has it; the keys are those of the query's own head."""
    groups = (tl.arange(0, BLOCK // 8) % (LENGTH // 8))[None, :]
    return _kept_words(seed, heads[:, None], positions[:, None], groups, threshold, BLOCK)


@triton.jit
def _attention_short_forward(
    query_ptr, key_ptr, value_ptr, out_ptr, lse_ptr, seed_ptr,
    q_stride_b, q_stride_h, q_stride, k_stride_b, k_stride_h, k_stride, v_stride_b, v_stride_h, v_stride,
    o_stride_b, o_stride_h, o_stride,
    n_head, group, q_len, k_len, query_offset, exponent_scale, threshold, keep_scale, key_heads,
    D: tl.constexpr, LENGTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK // LENGTH key heads, and the query heads of their groups."""
    slots, positions = tl.arange(0, BLOCK) // LENGTH, tl.arange(0, BLOCK) % LENGTH
    key_head = tl.program_id(0) * (BLOCK // LENGTH) + slots
    is_query = (key_head < key_heads) & (positions < q_len)
    is_key = (key_head < key_heads) & (positions < k_len)
    n_key_head = n_head // group
    DROPOUT: tl.constexpr = seed_ptr is not None
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)

    k_rows = _rows_of_heads(key_head, positions, n_key_head, k_stride_b, k_stride_h, k_stride)
    v_rows = _rows_of_heads(key_head, positions, n_key_head, v_stride_b, v_stride_h, v_stride)
    k = _load_rows(key_ptr, k_rows, is_key, D, BLOCK_D)
    v = _load_rows(value_ptr, v_rows, is_key, D, BLOCK_D)
    seen = _short_seen(slots, positions, q_len, k_len, query_offset, IS_CAUSAL)
    PRECISE: tl.constexpr = k.dtype == tl.float32
    for member in range(0, group):
        head = key_head * group + member
        q_rows = _rows_of_heads(head, positions, n_head, q_stride_b, q_stride_h, q_stride)
        q = _load_rows(query_ptr, q_rows, is_query, D, BLOCK_D)
        s = tl.where(seen, dot(q, tl.trans(k), tl.zeros([BLOCK, BLOCK], tl.float32), PRECISION), float("-inf"))
        peak = tl.max(s, axis=1) * exponent_scale
        p = _exp(s, exponent_scale, tl.where(peak == float("-inf"), 0.0, peak)[:, None], PRECISE)
        total = tl.sum(p, axis=1)
        if DROPOUT:
            p = tl.where(_short_kept(seed, head, positions, threshold, LENGTH, BLOCK), p, 0.0)
        out = dot(cast(p, v.dtype), v, tl.zeros([BLOCK, BLOCK_D], tl.float32), PRECISION)
        total = tl.where(total == 0.0, 1.0, total)
        out *= (keep_scale / total)[:, None]
        o_rows = _rows_of_heads(head, positions, n_head, o_stride_b, o_stride_h, o_stride)
        _store_rows(out_ptr, o_rows, is_query, out, D, BLOCK_D)
        lse = peak + tl.log(total) if PRECISE else (peak + tl.log2(total)) / LOG2_E
        tl.store(lse_ptr + head.to(tl.int64) * q_len + positions, lse, mask=is_query)


@triton.jit
def _attention_short_backward(
    query_ptr, key_ptr, value_ptr, out_ptr, grad_ptr, lse_ptr, seed_ptr, dquery_ptr, dkey_ptr, dvalue_ptr,
    q_stride_b, q_stride_h, q_stride, k_stride_b, k_stride_h, k_stride, v_stride_b, v_stride_h, v_stride,
    o_stride_b, o_stride_h, o_stride, g_stride_b, g_stride_h, g_stride, dq_stride_b, dq_stride_h, dq_stride,
    dk_stride_b, dk_stride_h, dk_stride, dv_stride_b, dv_stride_h, dv_stride,
    n_head, group, q_len, k_len, query_offset, exponent_scale, scale, threshold, keep_scale, key_heads,
    D: tl.constexpr, LENGTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program owns what it owns in forward: dkey, dvalue, and the dquery of their groups, one head after another."""
    slots, positions = tl.arange(0, BLOCK) // LENGTH, tl.arange(0, BLOCK) % LENGTH
    key_head = tl.program_id(0) * (BLOCK // LENGTH) + slots
    is_query = (key_head < key_heads) & (positions < q_len)
    is_key = (key_head < key_heads) & (positions < k_len)
    n_key_head = n_head // group
    DROPOUT: tl.constexpr = seed_ptr is not None
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)

    k_rows = _rows_of_heads(key_head, positions, n_key_head, k_stride_b, k_stride_h, k_stride)
    v_rows = _rows_of_heads(key_head, positions, n_key_head, v_stride_b, v_stride_h, v_stride)
    k = _load_rows(key_ptr, k_rows, is_key, D, BLOCK_D)
    v = _load_rows(value_ptr, v_rows, is_key, D, BLOCK_D)
    seen = _short_seen(slots, positions, q_len, k_len, query_offset, IS_CAUSAL)
    PRECISE: tl.constexpr = k.dtype == tl.float32
    zeros = tl.zeros([BLOCK, BLOCK], tl.float32)
    dk = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for member in range(0, group):
        head = key_head * group + member
        q_rows = _rows_of_heads(head, positions, n_head, q_stride_b, q_stride_h, q_stride)
        o_rows = _rows_of_heads(head, positions, n_head, o_stride_b, o_stride_h, o_stride)
        g_rows = _rows_of_heads(head, positions, n_head, g_stride_b, g_stride_h, g_stride)
        q = _load_rows(query_ptr, q_rows, is_query, D, BLOCK_D)
        out = _load_rows(out_ptr, o_rows, is_query, D, BLOCK_D)
        dout = _load_rows(grad_ptr, g_rows, is_query, D, BLOCK_D)
        delta = _delta(out, dout, is_query)
        lse = tl.load(lse_ptr + head.to(tl.int64) * q_len + positions, mask=is_query, other=float("inf"))
        lse = tl.where(lse == float("-inf"), float("inf"), lse)  # sees no key: p is zero
        if not PRECISE:
            lse = lse * LOG2_E
        p = _exp(dot(q, tl.trans(k), zeros, PRECISION), exponent_scale, lse[:, None], PRECISE)
        p = tl.where(seen, p, 0.0)
        dp = dot(dout, tl.trans(v), zeros, PRECISION)
        dropped = p
        if DROPOUT:
            kept = _short_kept(seed, head, positions, threshold, LENGTH, BLOCK)
            dropped = tl.where(kept, p * keep_scale, 0.0)
            dp = tl.where(kept, dp * keep_scale, 0.0)
        dv = dot(tl.trans(cast(dropped, dout.dtype)), dout, dv, PRECISION)
        ds = cast(p * (dp - delta[:, None]), q.dtype)
        dk = dot(tl.trans(ds), q, dk, PRECISION)
        dq = dot(ds, k, tl.zeros([BLOCK, BLOCK_D], tl.float32), PRECISION)
        dq_rows = _rows_of_heads(head, positions, n_head, dq_stride_b, dq_stride_h, dq_stride)
        _store_rows(dquery_ptr, dq_rows, is_query, dq * scale, D, BLOCK_D)
    dk_rows = _rows_of_heads(key_head, positions, n_key_head, dk_stride_b, dk_stride_h, dk_stride)
    dv_rows = _rows_of_heads(key_head, positions, n_key_head, dv_stride_b, dv_stride_h, dv_stride)
    _store_rows(dkey_ptr, dk_rows, is_key, dk * scale, D, BLOCK_D)
    _store_rows(dvalue_ptr, dv_rows, is_key, dv, D, BLOCK_D)


# ---------------------------------------------------------------- plan


class Tile(NamedTuple):
    """What a kernel that loops is launched with; the options, 0 or 1, are taken from tuned tables alone."""

    block_q: int
    block_k: int
    warps: int
    stages: int
    descriptors: int = 0  # load through tensor descriptors, by the TMA unit, where _describable
    warpgroups: int = 0  # so many, with a block of rows each, in a kernel of attention_hopper*.py
    turns: int = 0  # at the tensor cores, between those
    overlap: int = 0  # forward: a tile's product p v during the next one's softmax


# (BLOCK_Q, BLOCK_K, warps, stages) by architecture, kind of product and padded head size: tiles that do not spill.
# "half" is fp16 and bf16; fp32 is "ieee", or "tf32" where PyTorch is set to allow it. Random numbers and the loop over
# a group's heads take registers: "-dropout", "-grouped", "-dropout-grouped" where the tile without them would spill.
FORWARD = {
    "sm_80": {
        "half": {64: (128, 64, 8, 3), 128: (128, 32, 8, 3), 256: (64, 32, 8, 2)},
        "tf32": {64: (128, 64, 8, 2), 128: (64, 32, 8, 2), 256: (32, 16, 8, 1)},
        "ieee": {64: (64, 32, 8, 2), 128: (64, 32, 8, 2), 256: (32, 16, 8, 1)},
    },
    "sm_89": {
        "half": {64: (128, 64, 8, 3), 128: (128, 32, 8, 3), 256: (64, 32, 8, 2)},
        "tf32": {64: (128, 64, 8, 2), 128: (64, 32, 8, 2), 256: (32, 16, 8, 1)},
        "ieee": {64: (64, 32, 8, 2), 128: (32, 16, 8, 1), 256: (32, 16, 8, 1)},
    },
    "sm_90": {
        "half": {64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (64, 32, 8, 2)},
        "tf32": {64: (128, 64, 8, 2), 128: (128, 32, 8, 2), 256: (32, 16, 8, 1)},
        "ieee": {64: (64, 32, 8, 2), 128: (32, 16, 8, 1), 256: (32, 16, 8, 1)},
    },
    "gfx942": {
        "half": {64: (128, 64, 4, 1), 128: (128, 64, 4, 1), 256: (64, 32, 4, 1)},
        "tf32": {64: (64, 32, 4, 1), 128: (32, 32, 4, 1), 256: (32, 16, 4, 1)},
        "ieee": {64: (64, 32, 4, 1), 128: (32, 32, 4, 1), 256: (32, 16, 4, 1)},
    },
}
BACKWARD_QUERY = {
    "sm_80": {
        "half": {64: (128, 64, 8, 2), 128: (128, 32, 8, 2), 256: (64, 32, 8, 2)},
        "half-dropout": {64: (128, 32, 8, 2), 128: (64, 32, 8, 2), 256: (64, 32, 8, 2)},
        "tf32": {64: (64, 32, 8, 2), 128: (64, 32, 8, 2), 256: (32, 16, 8, 1)},
        "ieee": {64: (64, 16, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
        "ieee-dropout": {64: (32, 16, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
    },
    "sm_89": {
        "half": {64: (128, 64, 8, 2), 128: (128, 32, 8, 2), 256: (64, 32, 8, 1)},
        "half-dropout": {64: (128, 32, 8, 2), 128: (64, 32, 8, 2), 256: (64, 32, 8, 1)},
        "tf32": {64: (64, 32, 8, 2), 128: (64, 32, 8, 1), 256: (32, 16, 8, 1)},
        "ieee": {64: (64, 16, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
        "ieee-dropout": {64: (32, 16, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
    },
    "sm_90": {
        "half": {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},
        "tf32": {64: (64, 64, 8, 2), 128: (64, 32, 8, 2), 256: (32, 16, 8, 1)},
        "ieee": {64: (64, 16, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
        "ieee-dropout": {64: (32, 16, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
    },
    "gfx942": {
        "half": {64: (64, 64, 4, 1), 128: (64, 32, 4, 1), 256: (32, 32, 4, 1)},
        "tf32": {64: (32, 32, 4, 1), 128: (32, 16, 4, 1), 256: (16, 16, 4, 1)},
        "ieee": {64: (32, 32, 4, 1), 128: (32, 16, 4, 1), 256: (16, 16, 4, 1)},
    },
}
BACKWARD_KEY = {
    "sm_80": {
        "half": {64: (32, 128, 8, 2), 128: (32, 64, 8, 2), 256: (32, 64, 8, 2)},
        "half-dropout": {64: (32, 64, 8, 2), 128: (32, 64, 8, 2), 256: (32, 64, 8, 2)},
        "half-dropout-grouped": {64: (32, 64, 8, 1), 128: (32, 64, 8, 2), 256: (32, 64, 8, 2)},
        "tf32": {64: (32, 32, 8, 2), 128: (32, 64, 8, 2), 256: (16, 16, 8, 1)},
        "ieee": {64: (16, 64, 8, 1), 128: (16, 32, 8, 1), 256: (16, 16, 8, 1)},
    },
    "sm_89": {
        "half": {64: (32, 128, 8, 2), 128: (32, 64, 8, 2), 256: (16, 64, 8, 1)},
        "half-dropout-grouped": {64: (32, 32, 8, 2), 128: (16, 64, 8, 1), 256: (16, 64, 8, 1)},
        "tf32": {64: (32, 32, 8, 2), 128: (16, 32, 4, 1), 256: (16, 16, 8, 1)},
        "ieee": {64: (16, 64, 8, 1), 128: (16, 32, 8, 1), 256: (16, 16, 8, 1)},
    },
    "sm_90": {
        "half": {64: (64, 128, 8, 2), 128: (32, 128, 8, 2), 256: (32, 64, 8, 2)},
        "half-grouped": {64: (64, 128, 8, 2), 128: (32, 64, 8, 1), 256: (32, 64, 8, 2)},
        "half-dropout-grouped": {64: (32, 128, 8, 2), 128: (16, 64, 8, 2), 256: (32, 64, 8, 2)},
        "tf32": {64: (64, 64, 8, 2), 128: (16, 32, 4, 1), 256: (16, 16, 8, 1)},
        "ieee": {64: (16, 64, 8, 1), 128: (16, 32, 8, 1), 256: (16, 16, 8, 1)},
    },
    "gfx942": {
        "half": {64: (32, 64, 4, 1), 128: (32, 64, 4, 1), 256: (16, 32, 4, 1)},
        "tf32": {64: (16, 64, 4, 1), 128: (16, 32, 4, 1), 256: (16, 16, 4, 1)},
        "ieee": {64: (16, 64, 4, 1), 128: (16, 32, 4, 1), 256: (16, 16, 4, 1)},
    },
}
for _table in (FORWARD, BACKWARD_QUERY, BACKWARD_KEY):
    _table["sm_100"] = dict(_table["sm_90"])
    # There, products of 64 rows and more with an operand that comes from tl.join, as dropout's does, are TF32 on the
    # tensor cores even under "ieee" (Triton 3.6 and 3.7 take the operand for a widened 16-bit one): fewer rows.
    for _kind_of in ("ieee", "ieee-dropout"):
        if _kind_of in _table["sm_90"]:
            _table["sm_100"][_kind_of] = _table["sm_90"][_kind_of] | {64: _table["sm_90"][_kind_of][128]}
FORWARD["sm_100"]["half"] = FORWARD["sm_90"]["half"] | {64: (128, 64, 8, 2)}
BACKWARD_KEY["sm_100"]["half-grouped"] = BACKWARD_KEY["sm_90"]["half-grouped"] | {128: (64, 64, 8, 1)}
BACKWARD_KEY["sm_100"]["half-dropout-grouped"] = BACKWARD_KEY["sm_90"]["half-dropout-grouped"] | {128: (32, 64, 8, 1)}


# (BLOCK, warps) of the kernels for short sequences, by kind of product and padded head size: the longest sequence must
# fit BLOCK. Where a tile of 64 spills there is a smaller one, or none, and the kernels that loop take over.
SHORT_FORWARD = {
    "half": {64: (64, 4), 128: (64, 8)},
    "tf32": {64: (32, 4)},
    "ieee": {64: (32, 4)},
}
SHORT_BACKWARD = {
    "half": {64: (64, 4), 128: (32, 8)},
    "tf32": {64: (32, 4)},
    "ieee": {64: (32, 4)},
}


def _short_tile(table: dict, specs: Specs, options: dict, device: Device) -> tuple[int, int, int] | None:
    """(LENGTH, BLOCK, warps) where all queries and keys of a head fit one tile, else None."""
    longest = max(specs["query"].shape[2], specs["key"].shape[2])
    length = max(16, next_power_of_2(longest))
    if device.arch == "interpreter":  # its cost is per program
        return (length, 128, 4) if length <= 64 else None
    sizes = table[_kind(specs["query"], options)]
    block, warps = sizes.get(max(64, next_power_of_2(specs["query"].shape[-1])), (0, 0))
    return (length, block, warps) if length <= block else None


def _kind(spec: Spec, options: dict) -> str:
    """The kind of product that a tile table goes by."""
    return "half" if spec.dtype != torch.float32 else "tf32" if options["allow_tf32"] else "ieee"


def _tile(
    table: dict, spec: Spec, options: dict, device: Device, grouped: bool = False, walked: tuple[Spec, ...] = ()
) -> Tile:
    """The tile of one of the kernels that loop, and walk these (B, H, T, D)."""
    if device.arch == "interpreter":  # its cost is per program
        return Tile(128, 128, 4, 1)
    rows = table[device.tiles]
    kind, size = _kind(spec, options), max(64, next_power_of_2(spec.shape[-1]))
    traits = ["-dropout"] * (options["dropout_p"] > 0.0) + ["-grouped"] * grouped
    exact = kind + "".join(traits)
    slot = "forward" if table is FORWARD else "backward_query" if table is BACKWARD_QUERY else "backward_key"
    if tuned := tiles.tuned(device, f"attention.{slot}", f"{exact}/{size}"):
        tile = Tile(*tuned)
        # those describe all heads together: a head or batch that is another one again has no stride
        apart = all(spec.stride[0] > 0 < spec.stride[1] for spec in walked)
        if not tile.warpgroups or (device.warpgroups and apart and _describable(device, *walked)):
            return tile
    row = next(row for row in (exact, *(kind + trait for trait in traits), kind) if row in rows)
    return Tile(*rows[row][size])


def _describable(device: Device, *matrices: Spec) -> bool:
    """Whether tensor descriptors can be made of the heads of these (B, H, T, D) on the device.

    Every head's matrix must begin at a multiple of 16 bytes, have rows that are 16 bytes or more, do not overlap and
    lie multiples of 16 bytes apart, and not be empty.
    """
    for spec in matrices:
        size = spec.dtype.itemsize
        spaced = all(stride * size % 16 == 0 for stride in spec.stride[:3])
        rows = spec.stride[3] == 1 and spec.stride[2] >= spec.shape[3] and spec.shape[3] * size >= 16
        if not (spec.aligned and spaced and rows and 0 not in spec.shape):
            return False
    return device.descriptors


def _strides(**specs: Spec) -> dict[str, int]:
    """Batch, head and row strides by prefix, as the kernels name them."""
    strides = {}
    for prefix, spec in specs.items():
        strides |= {f"{prefix}_stride_b": spec.stride[0], f"{prefix}_stride_h": spec.stride[1]}
        strides |= {f"{prefix}_stride": spec.stride[2]}
    return strides


def _numbers(specs: Specs, options: dict) -> dict[str, int | float]:
    """The arguments that every kernel here takes, in their order."""
    n_head, q_len = specs["query"].shape[1:3]
    n_key_head, k_len = specs["key"].shape[1:3]
    threshold = round(options["dropout_p"] * 65536)
    return {
        "n_head": n_head,
        "group": n_head // max(1, n_key_head),
        "q_len": q_len,
        "k_len": k_len,
        "query_offset": options["query_offset"],
        "exponent_scale": options["scale"] * (1.0 if specs["query"].dtype == torch.float32 else math.log2(math.e)),
        "scale": options["scale"],
        "threshold": threshold,
        "keep_scale": 65536 / (65536 - threshold) if threshold < 65536 else 0.0,
    }


def _with_diagonal(specs: Specs, options: dict) -> dict:
    """Dropout without a diagonal as dropout with one beyond all keys, which is the same.

    In the kernels that loop, random numbers and no diagonal would have ptxas serialise the tensor cores (C7515).
    """
    if options["is_causal"] or options["dropout_p"] == 0.0:
        return options
    return dict(options) | {"is_causal": True, "query_offset": cdiv(specs["key"].shape[2], 128) * 128}


def _constexprs(specs: Specs, options: dict) -> dict:
    d = specs["query"].shape[-1]
    return {
        "D": d,
        "BLOCK_D": max(16, next_power_of_2(d)),
        "IS_CAUSAL": options["is_causal"],
        "PRECISION": "tf32" if options["allow_tf32"] else "ieee",
    }


def _tile_constexprs(tile: Tile, even: bool, device: Device, *walked: Spec) -> dict:
    """Those of the kernels that loop; the tiles of the (B, H, T, D) `walked` come through descriptors if asked for."""
    descriptors = tile.descriptors == 1 and _describable(device, *walked)
    return {"BLOCK_Q": tile.block_q, "BLOCK_K": tile.block_k, "EVEN": even, "DESCRIPTORS": descriptors}


def _short_launch(kernel, specs: Specs, options: dict, arguments: dict, short: tuple[int, int, int]) -> Launch:
    length, block, warps = short
    key_heads = specs["key"].shape[0] * specs["key"].shape[1]
    constexprs = _constexprs(specs, options) | {"LENGTH": length, "BLOCK": block}
    grid = (cdiv(key_heads, block // length),)
    return Launch(kernel, grid, arguments | {"key_heads": key_heads}, constexprs, warps, 1)


def _hopper_launch(
    name: str, specs: Specs, options: dict, arguments: dict, tile: Tile, device: Device, own: str, even: bool = False
) -> Launch:
    """Of a kernel that goes through tiles of the heads of `own`, query or key, until none is left."""
    from kernels import attention_hopper, attention_hopper_backward  # Gluon is imported where it is used

    kernel = getattr(attention_hopper, name, None) or getattr(attention_hopper_backward, name)
    batches, heads, length, _ = specs[own].shape
    rows = tile.warpgroups * (tile.block_q if own == "query" else tile.block_k)
    of_head = cdiv(length, rows)
    programs = min(of_head * batches * heads, device.processors)
    rounds = cdiv(of_head * batches * heads, max(1, programs))
    unused = ("seed_ptr", "threshold", "keep_scale")
    taken = {argument: value for argument, value in arguments.items() if argument not in unused}
    taken |= {"batches": batches, "n_key_head": specs["key"].shape[1], "tiles": of_head, "rounds": rounds}
    constexprs = _constexprs(specs, options) | {"BLOCK_Q": tile.block_q, "BLOCK_K": tile.block_k, "EVEN": even}
    constexprs |= {"STAGES": tile.stages, "WARPGROUPS": tile.warpgroups, "TURNS": bool(tile.turns)}
    constexprs = {constexpr: constexprs[constexpr] for constexpr in kernel.arg_names[len(taken) :]}
    return Launch(kernel, (programs,), taken, constexprs, tile.warps, tile.stages)


def plan_forward(specs: Specs, options: dict, device: Device) -> list[Launch]:
    batch, n_head, q_len, _ = specs["query"].shape
    numbers = _numbers(specs, options)
    del numbers["scale"]
    arguments = pointers(specs, "query", "key", "value", "out", "lse", "seed")
    arguments |= _strides(q=specs["query"], k=specs["key"], v=specs["value"], o=specs["out"]) | numbers
    if short := _short_tile(SHORT_FORWARD, specs, options, device):
        return [_short_launch(_attention_short_forward, specs, options, arguments, short)]
    options = _with_diagonal(specs, options)
    arguments["query_offset"] = options["query_offset"]
    walked = (specs["query"], specs["key"], specs["value"])
    tile = _tile(FORWARD, specs["query"], options, device, walked=walked)
    even = specs["key"].shape[2] % tile.block_k == 0
    if tile.warpgroups:
        name = "_attention_forward_hopper"
        return [_hopper_launch(name, specs, options, arguments, tile, device, "query", even)]
    constexprs = _constexprs(specs, options) | _tile_constexprs(tile, even, device, *walked)
    constexprs["OVERLAP"] = bool(tile.overlap)
    grid = (cdiv(q_len, tile.block_q) * batch * n_head,)
    return [Launch(_attention_forward, grid, arguments, constexprs, tile.warps, tile.stages)]


def plan_backward(specs: Specs, options: dict, device: Device) -> list[Launch]:
    batch, n_head, q_len, _ = specs["query"].shape
    n_key_head, k_len = specs["key"].shape[1:3]
    inputs = {"q": specs["query"], "k": specs["key"], "v": specs["value"]}
    outputs = {"dq": specs["dquery"], "dk": specs["dkey"], "dv": specs["dvalue"]}
    numbers = _numbers(specs, options)
    if short := _short_tile(SHORT_BACKWARD, specs, options, device):
        names = ("query", "key", "value", "out", "grad", "lse", "seed", "dquery", "dkey", "dvalue")
        arguments = pointers(specs, *names) | _strides(**inputs, o=specs["out"], g=specs["grad"], **outputs) | numbers
        return [_short_launch(_attention_short_backward, specs, options, arguments, short)]

    options = _with_diagonal(specs, options)
    numbers["query_offset"] = options["query_offset"]
    walked = (specs["query"], specs["key"], specs["value"], specs["grad"])
    tile = _tile(BACKWARD_QUERY, specs["query"], options, device, walked=walked)
    names = ("query", "key", "value", "out", "grad", "lse", "seed", "delta", "dquery")
    strides = _strides(**inputs, o=specs["out"], g=specs["grad"], dq=specs["dquery"])
    arguments = pointers(specs, *names) | strides | numbers
    even = k_len % tile.block_k == 0
    if tile.warpgroups:
        name = "_attention_backward_query_hopper"
        by_query = _hopper_launch(name, specs, options, arguments, tile, device, "query", even)
    else:
        by_query = Launch(
            _attention_backward_query,
            (cdiv(q_len, tile.block_q) * batch * n_head,),
            arguments,
            _constexprs(specs, options) | _tile_constexprs(tile, even, device, *walked),
            tile.warps,
            tile.stages,
        )

    tile = _tile(BACKWARD_KEY, specs["query"], options, device, n_head > n_key_head, walked)
    names = ("query", "key", "value", "grad", "lse", "seed", "delta", "dkey", "dvalue")
    strides = _strides(**inputs, g=specs["grad"], dk=specs["dkey"], dv=specs["dvalue"])
    arguments = pointers(specs, *names) | strides | numbers
    even = q_len % tile.block_q == 0 and (not options["is_causal"] or options["query_offset"] % tile.block_q == 0)
    if tile.warpgroups:
        by_key = _hopper_launch("_attention_backward_key_hopper", specs, options, arguments, tile, device, "key")
    else:
        by_key = Launch(
            _attention_backward_key,
            (cdiv(k_len, tile.block_k) * batch * n_key_head,),
            arguments,
            _constexprs(specs, options) | _tile_constexprs(tile, even, device, *walked),
            tile.warps,
            tile.stages,
        )
    return [by_query, by_key]


# ---------------------------------------------------------------- registration


def _like(tensor: torch.Tensor) -> torch.Tensor:
    """Uninitialised (B, H, T, D), laid out as (B, T, H, D): joining the heads again copies nothing."""
    batch, heads, length, size = tensor.shape
    return tensor.new_empty((batch, length, heads, size)).transpose(1, 2)


def _empty_forward(query):
    return _like(query), query.new_empty(query.shape[:3], dtype=torch.float32)


def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seed: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    query_offset: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, H, Tq, D), (B, Hk, Tk, D) twice, scale > 0 -> out (B, H, Tq, D), lse fp32 (B, H, Tq)."""
    out, lse = _empty_forward(query)
    tensors = {"query": rows_of(query), "key": rows_of(key), "value": rows_of(value)}
    tensors |= {"out": out, "lse": lse, "seed": seed}
    run(
        plan_forward, tensors, dropout_p=dropout_p, is_causal=is_causal, scale=scale, query_offset=query_offset,
        allow_tf32=allow_tf32(query),
    )  # fmt: skip
    return out, lse


def _empty_backward(query, key, value):
    return _like(query), _like(key), _like(value)


def _backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    seed: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    query_offset: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value."""
    gradients = _empty_backward(query, key, value)
    write_gradients(
        gradients, grad, query, key, value, out, lse, seed, dropout_p=dropout_p, is_causal=is_causal, scale=scale,
        query_offset=query_offset,
    )  # fmt: skip
    return gradients


def write_gradients(gradients, grad, query, key, value, out, lse, seed, **options):
    """Those of query, key and value into `gradients`, three tensors of their shapes, in memory as they like."""
    dquery, dkey, dvalue = gradients
    tensors = {"query": rows_of(query), "key": rows_of(key), "value": rows_of(value), "out": out}
    tensors |= {"grad": rows_of(grad), "lse": lse, "seed": seed, "delta": torch.empty_like(lse)}
    tensors |= {"dquery": dquery, "dkey": dkey, "dvalue": dvalue}
    run(plan_backward, tensors, **options, allow_tf32=allow_tf32(query))


def _save(ctx, inputs, output):
    query, key, value, seed, *ctx.options = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(query, key, value, out, lse, seed)


def _gradients(ctx, grad, _grad_lse):
    return *backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None, None


forward = register("attention", _forward, lambda query, *_: _empty_forward(query), _gradients, _save)
backward = register(
    "attention_backward", _backward, lambda grad, query, key, value, *_: _empty_backward(query, key, value)
)


def _flops(query_shape, key_shape, is_causal, query_offset) -> int:
    """One product with the scores, or of them: 2 D operations for each that is seen."""

    def rows(n):  # sum of min(m, k_len) for m from 1 to n
        low = max(0, min(n, k_len))
        return low * (low + 1) // 2 + max(0, n - k_len) * k_len

    batch, heads, q_len, size = query_shape
    k_len = key_shape[-2]
    seen = rows(q_len + query_offset) - rows(query_offset) if is_causal else q_len * k_len
    return 2 * size * seen * batch * heads


@register_flop_formula(torch.ops.kernels.attention)
def _forward_flops(query_shape, key_shape, value_shape, seed, dropout_p, is_causal, scale, query_offset, **_) -> int:
    return 2 * _flops(query_shape, key_shape, is_causal, query_offset)


@register_flop_formula(torch.ops.kernels.attention_backward)
def _backward_flops(
    grad_shape, query_shape, key_shape, value_shape, _out, lse_shape, seed, dropout_p, is_causal, scale,
    query_offset, **_,
) -> int:  # fmt: skip
    return 5 * _flops(query_shape, key_shape, is_causal, query_offset)


# ---------------------------------------------------------------- public

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_SIZE = 256


def check_common(op, name, tensor, dropout_p, scale):
    """The dtype and the head size of the op's tensor `name`, and the numbers that every attention takes."""
    if tensor.dtype not in DTYPES:
        raise (NotImplementedError if tensor.dtype.is_floating_point else RuntimeError)(
            f"{op}: {name} is {tensor.dtype}; the kernel has float32, float16, bfloat16"
        )
    size = tensor.shape[-1]
    if not 1 <= size <= MAX_HEAD_SIZE:
        raise NotImplementedError(f"{op}: head size {size}; the kernel has 1 to {MAX_HEAD_SIZE}")
    check_number(op, "dropout_p", dropout_p)
    if scale is not None:
        check_number(op, "scale", scale)
    if not 0.0 <= dropout_p <= 1.0:
        raise RuntimeError(f"{op}: dropout_p must be in [0, 1], got {dropout_p}")


def _check(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, query_offset):
    """Errors as PyTorch has them, and NotImplementedError for what PyTorch can do and the kernel cannot."""
    tensors = {"query": query, "key": key, "value": value}
    if attn_mask is not None:
        raise NotImplementedError("scaled_dot_product_attention: attn_mask is not implemented; is_causal is")
    for name, tensor in tensors.items():
        if tensor.dim() < 2:
            raise RuntimeError(f"scaled_dot_product_attention: {name} must be at least 2-D, got {list(tensor.shape)}")
        if tensor.dtype != query.dtype:
            raise RuntimeError(f"scaled_dot_product_attention: {name} is {tensor.dtype}, query is {query.dtype}")
        if tensor.device != query.device:
            raise RuntimeError(f"scaled_dot_product_attention: {name} is on {tensor.device}, query on {query.device}")
    check_number("scaled_dot_product_attention", "query_offset", query_offset, whole=True)
    if query_offset and not is_causal:
        raise RuntimeError("scaled_dot_product_attention: query_offset moves the causal diagonal; pass is_causal=True")
    size = query.shape[-1]
    if key.shape[-1] != size or key.shape[-2] != value.shape[-2]:
        raise RuntimeError(
            f"scaled_dot_product_attention: query {list(query.shape)}, key {list(key.shape)} and value "
            f"{list(value.shape)} do not fit together: (..., Tq, D), (..., Tk, D), (..., Tk, D)"
        )
    if value.shape[-1] != size:
        raise NotImplementedError(
            f"scaled_dot_product_attention: a value head of another size ({value.shape[-1]}) than query's ({size})"
        )
    check_common("scaled_dot_product_attention", "query", query, dropout_p, scale)
    if enable_gqa:
        if min(tensor.dim() for tensor in tensors.values()) < 3:
            raise RuntimeError("scaled_dot_product_attention: enable_gqa needs a head dimension, (..., H, T, D)")
        heads = query.shape[-3]
        if key.shape[-3] != value.shape[-3] and all(n and heads % n == 0 for n in (key.shape[-3], value.shape[-3])):
            raise NotImplementedError(
                f"scaled_dot_product_attention: {key.shape[-3]} key and {value.shape[-3]} value heads; the kernel has "
                "as many of one as of the other"
            )
        if key.shape[-3] != value.shape[-3] or key.shape[-3] == 0 or heads % key.shape[-3]:
            raise RuntimeError(
                f"scaled_dot_product_attention: {key.shape[-3]} key and {value.shape[-3]} value heads must be equal "
                f"and divide the {heads} query heads"
            )


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    query_offset: int = 0,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`torch.nn.functional.scaled_dot_product_attention`: softmax(scale * query @ key^T) @ value.

    (..., H, Tq, D), (..., Hk, Tk, D), (..., Hk, Tk, D) -> (..., H, Tq, D), D from 1 to 256, fp32, fp16 or bf16; the
    dimensions in front broadcast. Hk = H, or with enable_gqa a divisor of it. scale: 1 / sqrt(D) unless given.
    With is_causal, query i sees key j when j <= i + query_offset: 0 is PyTorch's own meaning, Tk - Tq suits a
    cache. A query that sees no key gives zeros. return_lse adds log(sum(exp(scores))), (..., H, Tq) in fp32,
    -inf where no key is seen, not differentiable. The dropout mask comes from PyTorch's generator on the
    device, dropout_p in steps of 2^-16. Under autocast the inputs are cast as PyTorch's own are.

    Raises RuntimeError or ValueError for inputs that do not fit, NotImplementedError for attn_mask, a value
    head of another size, D above 256 and other dtypes.
    """
    refuse_transforms("scaled_dot_product_attention", query, key, value)
    dtype = autocast_dtype(query.device)
    if dtype is not None and query.dtype.is_floating_point and query.dtype != torch.float64:
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    _check(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, query_offset)

    if enable_gqa:
        lead = _broadcast(query.shape[:-3], key.shape[:-3], value.shape[:-3])
        heads, kv_heads = (*lead, query.shape[-3]), (*lead, key.shape[-3])
    else:
        heads = kv_heads = _broadcast(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    query = _four_dimensions(query, heads)
    key, value = _four_dimensions(key, kv_heads), _four_dimensions(value, kv_heads)

    q_len, k_len, size = query.shape[-2], key.shape[-2], query.shape[-1]
    scale = 1.0 / math.sqrt(size) if scale is None else float(scale)
    if scale <= 0.0:  # the kernel takes the maximum before it scales
        query, scale = (-query, -scale) if scale < 0.0 else (query * 0.0, 1.0)
    query_offset = max(-q_len, min(k_len, query_offset)) if is_causal else 0
    seed = draw_seed(query.device) if dropout_p > 0.0 else None
    out, lse = forward(query, key, value, seed, float(dropout_p), is_causal, scale, query_offset)
    if len(heads) != 2:  # a view would be one more node for autograd
        out, lse = out.reshape(*heads, q_len, size), lse.reshape(*heads, q_len)
    return (out, lse) if return_lse else out


def draw_seed(device: torch.device) -> torch.Tensor:
    """A dropout mask's seed, (1,) int64, from PyTorch's generator on the device."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def _broadcast(first: torch.Size, *others: torch.Size) -> torch.Size:
    # PyTorch's own takes longer than all the rest of a call
    if all(other == first for other in others):
        return first
    try:
        return torch.broadcast_shapes(first, *others)
    except RuntimeError:
        shapes = " and ".join(str(list(shape)) for shape in (first, *others))
        raise RuntimeError(
            f"scaled_dot_product_attention: the dimensions of query, key and value in front of (T, D) must be equal or "
            f"broadcast, got {shapes}; enable_gqa=True lets query heads share a key head"
        ) from None


def _four_dimensions(tensor: torch.Tensor, heads: tuple[int, ...]) -> torch.Tensor:
    """`tensor` as (batch, heads, T, D), its leading dimensions broadcast to `heads`."""
    if tensor.shape[:-2] != heads:
        tensor = tensor.expand(*heads, *tensor.shape[-2:])
    if len(heads) == 2:
        return tensor
    if len(heads) < 2:
        return tensor.reshape((1,) * (2 - len(heads)) + tuple(tensor.shape))
    return tensor.flatten(0, -4)


# ---------------------------------------------------------------- catalogue


def _plan(inputs: dict, options: dict, device: Device) -> list[Launch]:
    """The launches of a forward and a backward pass."""
    query, key, value = inputs["query"], inputs["key"], inputs["value"]
    dropout_p = options.get("dropout_p", 0.0)
    seed = torch.empty(1, dtype=torch.int64, device=query.device) if dropout_p else None
    common = (dropout_p, options.get("is_causal", False), query.shape[-1] ** -0.5, options.get("query_offset", 0))
    with plan_only(device) as launches:
        out, lse = _forward(query, key, value, seed, *common)
        _backward(out, query, key, value, out, lse, seed, *common)
    return launches


def _cost(inputs: dict, options: dict) -> tuple[Cost, Cost]:
    """Two products forward, five backward; q, k, v, out and their gradients, and lse."""
    query, key = inputs["query"], inputs["key"]
    size = query.shape[-1]
    flops = _flops(query.shape, key.shape, options.get("is_causal", False), options.get("query_offset", 0))
    lse = 4 * query.numel() // size
    tensors = 2 * query.nbytes + 2 * key.nbytes
    return Cost(2 * flops, tensors + lse), Cost(5 * flops, 2 * tensors + lse)


def _case(name: str, b: int, h: int, t: int, d: int, *, k_len: int = 0, key_heads: int = 0, **options) -> Case:
    kv = (b, key_heads or h, k_len or t, d)
    return Case(name, {"query": (b, h, t, d), "key": kv, "value": kv}, options)


OP = Op(
    name="scaled_dot_product_attention",
    public=scaled_dot_product_attention,
    reference=reference.scaled_dot_product_attention,
    torch=F.scaled_dot_product_attention,
    plan=_plan,
    cost=_cost,
    cases=(
        _case("one_element", 1, 1, 1, 1),
        _case("small", 2, 3, 17, 16, is_causal=True),
        _case("tiny_model", 2, 4, 64, 16, is_causal=True),
        _case("prime", 1, 2, 131, 37, is_causal=True),
        _case("one_over_a_tile", 1, 1, 129, 64, is_causal=True),
        _case("not_causal", 1, 2, 130, 40),
        _case("more_keys", 1, 2, 33, 64, k_len=150),
        _case("more_queries", 1, 2, 150, 64, k_len=33, is_causal=True),
        _case("cache", 1, 2, 5, 32, k_len=140, is_causal=True, query_offset=135),
        _case("sees_nothing", 1, 1, 40, 32, k_len=20, is_causal=True, query_offset=-7),
        _case("offset", 1, 1, 70, 32, k_len=200, is_causal=True, query_offset=61),
        _case("grouped", 2, 6, 65, 32, key_heads=2, is_causal=True, enable_gqa=True),
        _case("one_key_head", 1, 4, 20, 64, key_heads=1, enable_gqa=True),
        _case("scaled", 1, 2, 30, 24, is_causal=True, scale=0.7),
        _case("negative_scale", 1, 1, 30, 24, scale=-0.3),
        _case("wide_head", 1, 1, 70, 128, is_causal=True),
        _case("widest_head", 1, 1, 66, 256, is_causal=True),
        _case("odd_wide_head", 1, 1, 40, 200),
    ),
    sizes=(
        _case("gpt2", 16, 12, 1024, 64, is_causal=True),
        _case("d16", 2, 4, 64, 16, is_causal=True),
        _case("d32", 12, 4, 64, 32, is_causal=True),
        _case("d64-short", 64, 6, 48, 64, is_causal=True),
        _case("d64-short-dropout", 64, 6, 64, 64, is_causal=True, dropout_p=0.2),
        _case("d128-short-grouped", 16, 8, 32, 128, key_heads=2, is_causal=True, enable_gqa=True),
        _case("d128-short-all", 16, 8, 30, 128, k_len=60, dropout_p=0.1, key_heads=2, enable_gqa=True),
        _case("d64-chunk", 4, 8, 48, 64, k_len=1000, is_causal=True, query_offset=952),
        _case("d64-chunk-all", 4, 8, 48, 64, k_len=1000, dropout_p=0.1, key_heads=2, enable_gqa=True),
        _case("shakespeare", 64, 6, 256, 64, is_causal=True),
        _case("shakespeare-dropout", 64, 6, 256, 64, is_causal=True, dropout_p=0.2),
        _case("d64-full", 4, 16, 4096, 64),
        _case("d64-ragged", 4, 16, 1000, 64),
        _case("d64-ragged-dropout", 4, 16, 1000, 64, dropout_p=0.1),
        _case("d64-ragged-grouped", 4, 16, 1000, 64, key_heads=4, dropout_p=0.1, is_causal=True, enable_gqa=True),
        _case("d128", 4, 16, 4096, 128, is_causal=True),
        _case("d128-dropout", 4, 16, 1000, 128, is_causal=True, dropout_p=0.1),
        _case("d128-grouped", 4, 16, 1000, 128, key_heads=4, is_causal=True, enable_gqa=True),
        _case("d128-grouped-dropout", 4, 16, 1000, 128, key_heads=4, dropout_p=0.1, enable_gqa=True),
        _case("d128-chunk", 4, 8, 32, 128, k_len=1000, is_causal=True, query_offset=968),
        _case("d96", 4, 16, 1024, 96, is_causal=True),
        _case("d256", 2, 8, 2048, 256, is_causal=True),
    ),
    differentiable=("query", "key", "value"),
)
