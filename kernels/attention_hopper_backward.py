"""Attention's backward pass for Hopper GPUs, in Gluon: the two of attention_kernels.py, warps doing different things.

Who copies and who computes is as in attention_hopper.py. For dq a warpgroup owns BLOCK_Q queries and walks the keys:

    issue s = q k^T and dp = dout v^T of this tile, then dq += ds k of the tile before
    p = exp(s - lse), as soon as s is there; ds = p (dp - delta), as soon as dp is; wait for dq

and before that sums delta = sum(out * dout) for itself and for the other kernel. For dk and dv it owns BLOCK_K keys and
walks the queries, of each head of its group. Scores stand transposed, keys as rows, so that p^T and ds^T enter their
products from registers:

    issue s = k q^T and dp = v dout^T
    p = exp(s - lse) while dp is computed, issue dv += p dout; ds = p (dp - delta) meanwhile, issue dk += ds q; wait

Here the accumulators take what registers there are; carrying ds to the next tile, as for dq, spills.

A tuned option (see kernels/tiles.py), off by default: no GPU has run it. For fp16 and bf16 without dropout.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.attention_hopper import (
    barriers,
    buffer,
    copy,
    is_seen,
    issue_product,
    key_tiles,
    last_seen,
    matrices,
    store_rows,
    tile_of_round,
)
from kernels.op import LOG2_E


@gluon.jit
def _load_shift(lse_ptr, queries, q_len):
    """-lse in base 2; -inf, which makes p zero, for a query that sees no key (lse = -inf) or is beyond q_len."""
    lse = gl.load(lse_ptr + queries, mask=queries < q_len, other=float("inf"))
    return gl.where(lse == float("-inf"), float("inf"), lse) * -LOG2_E


# ---------------------------------------------------------------- dq


@gluon.jit
def _score_gradients(
    s, dp, shift, delta, last, start, scale, v_free, waited_for, waited_phase,
    OUTSTANDING: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """ds of a tile, from products under way: s, dp and OUTSTANDING others after those."""
    s = warpgroup_mma_wait(num_outstanding=OUTSTANDING + 1, deps=[s])
    p = gl.exp2(s * scale + shift[:, None])
    if MASKED:
        p = gl.where(is_seen(s, last, start), p, 0.0)
    # over long ago; without something here that it may not pass, ptxas moves the next wait to before the exponentials
    mbarrier.wait(waited_for, waited_phase)
    dp = warpgroup_mma_wait(num_outstanding=OUTSTANDING, deps=[dp])
    mbarrier.arrive(v_free, count=1)
    return p * (dp - delta[:, None])


@gluon.jit
def _query_step(
    state, q, dout, shift, delta, last, tile, k_buffer, v_buffer, k_signals, v_signals, mine, next_one, waited_for,
    waited_phase, scale,
    BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
    TURNS: gl.constexpr, MASKED: gl.constexpr, S_LAYOUT: gl.constexpr, A_LAYOUT: gl.constexpr,
):  # fmt: skip
    """ds of one tile of keys, and dq from that of the tile before."""
    dq, ds, taken = state
    k_full, k_empty = k_signals
    v_full, v_empty = v_signals
    slot, before = taken % STAGES, (taken - 1) % STAGES
    phase = taken // STAGES & 1
    mbarrier.wait(k_full.index(slot), phase)
    mbarrier.wait(v_full.index(slot), phase)
    if TURNS:
        mbarrier.wait(mine, taken & 1)
    s = issue_product(q, k_buffer, slot, BLOCK_Q, BLOCK_K, BLOCK_D, S_LAYOUT)
    dp = issue_product(dout, v_buffer, slot, BLOCK_Q, BLOCK_K, BLOCK_D, S_LAYOUT)
    dq = warpgroup_mma(ds, k_buffer.index(before).reshape([BLOCK_K, BLOCK_D]), dq, is_async=True)
    if TURNS:
        mbarrier.arrive(next_one, count=1)
    ds = _score_gradients(
        s, dp, shift, delta, last, tile * BLOCK_K, scale, v_empty.index(slot), waited_for, waited_phase, 1, MASKED,
    )  # fmt: skip
    ds = gl.convert_layout(ds.to(q.dtype), A_LAYOUT)
    mbarrier.wait(waited_for, waited_phase)
    dq = warpgroup_mma_wait(num_outstanding=0, deps=[dq])
    mbarrier.arrive(k_empty.index(before), count=1)
    return dq, ds, taken + 1


@gluon.jit
def _delta(
    out_ptr, grad_ptr, o_strides, g_strides, batch, head, first, q_len,
    D: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_D: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """The sum of out * dout over each of a warpgroup's rows."""
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    rows = first + gl.arange(0, BLOCK_Q, gl.SliceLayout(1, WIDE))[:, None]
    columns = gl.arange(0, BLOCK_D, gl.SliceLayout(0, WIDE))[None, :]
    mask = (rows < q_len) & (columns < D)
    out_ptr += batch.to(gl.int64) * o_strides[0] + head.to(gl.int64) * o_strides[1]
    grad_ptr += batch.to(gl.int64) * g_strides[0] + head.to(gl.int64) * g_strides[1]
    out = gl.load(out_ptr + rows.to(gl.int64) * o_strides[2] + columns, mask=mask, other=0.0)
    dout = gl.load(grad_ptr + rows.to(gl.int64) * g_strides[2] + columns, mask=mask, other=0.0)
    return gl.convert_layout(gl.sum(out.to(gl.float32) * dout.to(gl.float32), axis=1), LAYOUT)


@gluon.jit
def _compute_query(
    packed, WHICH: gl.constexpr,
    D: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
    WARPGROUPS: gl.constexpr, IS_CAUSAL: gl.constexpr, EVEN: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """Warpgroup WHICH of those that compute; `packed` is what all of them are given, the kernel's `to_compute`."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    A_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    ROWS: gl.constexpr = BLOCK_Q * WARPGROUPS
    FIRST: gl.constexpr = IS_CAUSAL or not EVEN  # whether the first tile has a mask
    pointers, strides, own_buffers, buffers, own_signals, k_signals, v_signals, turns, problem, scales = packed
    out_ptr, grad_ptr, lse_ptr, statistics_ptr, dquery_ptr = pointers
    o_strides, g_strides, dq_strides = strides
    k_buffer, v_buffer = buffers
    own_full, own_empty = own_signals
    k_full, k_empty = k_signals
    v_full, v_empty = v_signals
    batches, n_head, _group, q_len, k_len, query_offset, tiles, rounds = problem
    exponent_scale, scale = scales
    mine, next_one = turns.index(WHICH), turns.index((WHICH + 1) % WARPGROUPS)
    q = own_buffers[0].index(WHICH).reshape([BLOCK_Q, BLOCK_D])
    dout = own_buffers[1].index(WHICH).reshape([BLOCK_Q, BLOCK_D])
    taken = 0  # tiles of keys, since the program began
    for round in range(rounds):
        batch, head, first = tile_of_round(round, tiles, n_head, ROWS, True)
        if batch < batches:
            full, end = key_tiles(first, q_len, k_len, query_offset, ROWS, BLOCK_K, IS_CAUSAL)
            first += WHICH * BLOCK_Q
            queries = first + gl.arange(0, BLOCK_Q, gl.SliceLayout(1, S_LAYOUT))
            place = (batch.to(gl.int64) * n_head + head) * q_len
            last = last_seen(queries, k_len, query_offset, IS_CAUSAL)
            delta = _delta(
                out_ptr, grad_ptr, o_strides, g_strides, batch, head, first, q_len,
                D, BLOCK_Q, BLOCK_D, gl.SliceLayout(1, S_LAYOUT),
            )  # fmt: skip
            shift = _load_shift(lse_ptr + place, queries, q_len)
            pairs = statistics_ptr + (place + queries) * 2
            gl.store(pairs, shift, mask=queries < q_len)
            gl.store(pairs + 1, delta, mask=queries < q_len)
            # the first tile's ds; the loops begin with the second
            slot, phase = taken % STAGES, taken // STAGES & 1
            mbarrier.wait(own_full, round & 1)
            mbarrier.wait(k_full.index(slot), phase)
            mbarrier.wait(v_full.index(slot), phase)
            if TURNS:
                mbarrier.wait(mine, taken & 1)
            s = issue_product(q, k_buffer, slot, BLOCK_Q, BLOCK_K, BLOCK_D, S_LAYOUT)
            dp = issue_product(dout, v_buffer, slot, BLOCK_Q, BLOCK_K, BLOCK_D, S_LAYOUT)
            if TURNS:
                mbarrier.arrive(next_one, count=1)
            ds = _score_gradients(
                s, dp, shift, delta, last, 0, exponent_scale, v_empty.index(slot), own_full, round & 1, 0, FIRST,
            )  # fmt: skip
            dq = gl.zeros([BLOCK_Q, BLOCK_D], gl.float32, O_LAYOUT)
            state = (dq, gl.convert_layout(ds.to(q.dtype), A_LAYOUT), taken + 1)
            full = gl.maximum(full, 1)
            for tile in range(1, full):
                state = _query_step(
                    state, q, dout, shift, delta, last, tile, k_buffer, v_buffer, k_signals, v_signals, mine, next_one,
                    own_full, round & 1, exponent_scale,
                    BLOCK_Q, BLOCK_K, BLOCK_D, STAGES, TURNS, False, S_LAYOUT, A_LAYOUT,
                )  # fmt: skip
            if FIRST:
                for tile in range(full, end):
                    state = _query_step(
                        state, q, dout, shift, delta, last, tile, k_buffer, v_buffer, k_signals, v_signals, mine,
                        next_one, own_full, round & 1, exponent_scale,
                        BLOCK_Q, BLOCK_K, BLOCK_D, STAGES, TURNS, True, S_LAYOUT, A_LAYOUT,
                    )  # fmt: skip
            dq, ds, taken = state
            mbarrier.arrive(own_empty, count=1)
            slot = (taken - 1) % STAGES
            dq = warpgroup_mma(ds, k_buffer.index(slot).reshape([BLOCK_K, BLOCK_D]), dq, is_async=True)
            dq = warpgroup_mma_wait(num_outstanding=0, deps=[dq])
            mbarrier.arrive(k_empty.index(slot), count=1)
            store_rows(dquery_ptr, dq_strides, batch, head, first, dq * scale, q_len, D, BLOCK_Q, BLOCK_D)


@gluon.jit
def _attention_backward_query_hopper(
    query_ptr, key_ptr, value_ptr, out_ptr, grad_ptr, lse_ptr, statistics_ptr, dquery_ptr,
    q_stride_b, q_stride_h, q_stride, k_stride_b, k_stride_h, k_stride, v_stride_b, v_stride_h, v_stride,
    o_stride_b, o_stride_h, o_stride, g_stride_b, g_stride_h, g_stride, dq_stride_b, dq_stride_h, dq_stride,
    n_head, group, q_len, k_len, query_offset, exponent_scale, scale, batches, n_key_head, tiles, rounds,
    D: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
    WARPGROUPS: gl.constexpr, IS_CAUSAL: gl.constexpr, EVEN: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """dquery, and (shift, delta) for the other, of tiles of WARPGROUPS * BLOCK_Q queries, until none is left."""
    queries = matrices(query_ptr, (q_stride_b, q_stride_h, q_stride), batches, n_head, q_len, D, BLOCK_Q, BLOCK_D)
    grads = matrices(grad_ptr, (g_stride_b, g_stride_h, g_stride), batches, n_head, q_len, D, BLOCK_Q, BLOCK_D)
    keys = matrices(key_ptr, (k_stride_b, k_stride_h, k_stride), batches, n_key_head, k_len, D, BLOCK_K, BLOCK_D)
    values = matrices(value_ptr, (v_stride_b, v_stride_h, v_stride), batches, n_key_head, k_len, D, BLOCK_K, BLOCK_D)
    own_buffers = (buffer(queries, WARPGROUPS), buffer(grads, WARPGROUPS))
    buffers = (buffer(keys, STAGES), buffer(values, STAGES))
    own_signals = (barriers(1, 1).index(0), barriers(1, WARPGROUPS).index(0))
    k_signals = (barriers(STAGES, 1), barriers(STAGES, WARPGROUPS))
    v_signals = (barriers(STAGES, 1), barriers(STAGES, WARPGROUPS))
    turns = barriers(WARPGROUPS, 1)
    fence_async_shared()
    mbarrier.arrive(turns.index(0), count=1)
    problem = (batches, n_head, group, q_len, k_len, query_offset, tiles, rounds)
    pointers = (out_ptr, grad_ptr, lse_ptr, statistics_ptr, dquery_ptr)
    strides = (
        (o_stride_b, o_stride_h, o_stride), (g_stride_b, g_stride_h, g_stride), (dq_stride_b, dq_stride_h, dq_stride),
    )  # fmt: skip
    scales = (exponent_scale, scale)
    to_compute = (pointers, strides, own_buffers, buffers, own_signals, k_signals, v_signals, turns, problem, scales)
    to_copy = ((queries, grads), own_buffers, (keys, values), buffers, own_signals, k_signals, v_signals, problem)
    gl.warp_specialize([
        (_compute_query, (to_compute, 0, D, BLOCK_Q, BLOCK_K, BLOCK_D, STAGES, WARPGROUPS, IS_CAUSAL, EVEN, TURNS)),
        (_compute_query, (to_compute, 1, D, BLOCK_Q, BLOCK_K, BLOCK_D, STAGES, WARPGROUPS, IS_CAUSAL, EVEN, TURNS)),
        (copy, (to_copy, BLOCK_Q, BLOCK_K, STAGES, WARPGROUPS, IS_CAUSAL)),
    ], [4, 1], [240, 24])  # fmt: skip


# ---------------------------------------------------------------- dk and dv


@gluon.jit
def _query_tiles(
    first, q_len, query_offset, ROWS: gl.constexpr, BLOCK_Q: gl.constexpr, IS_CAUSAL: gl.constexpr
):  # fmt: skip
    """(begin, full, end): tiles of queries from `begin` on see some of these ROWS keys, those from `full` on all."""
    end = gl.cdiv(q_len, BLOCK_Q)
    begin, full = 0, 0
    if IS_CAUSAL:
        begin = gl.minimum(gl.maximum(first - query_offset, 0) // BLOCK_Q, end)
        full = gl.minimum(gl.cdiv(gl.maximum(first + ROWS - 1 - query_offset, 0), BLOCK_Q), end)
    return begin, full, end


@gluon.jit
def _copy_key(
    packed,
    BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, WARPGROUPS: gl.constexpr,
    IS_CAUSAL: gl.constexpr,
):  # fmt: skip
    """The warp that copies: a tile of keys and values, and the queries and gradients that it is walked with."""
    own, own_buffers, walked, buffers, own_signals, signals, problem = packed
    own_full, own_empty = own_signals
    full, empty = signals
    batches, n_key_head, group, q_len, _k_len, query_offset, tiles, rounds = problem
    ROWS: gl.constexpr = BLOCK_K * WARPGROUPS
    copied = 0  # tiles of queries, since the program began
    for round in range(rounds):
        batch, key_head, first = tile_of_round(round, tiles, n_key_head, ROWS, False)
        if batch < batches:
            begin, _, end = _query_tiles(first, q_len, query_offset, ROWS, BLOCK_Q, IS_CAUSAL)
            mbarrier.wait(own_empty, round & 1 ^ 1)
            mbarrier.expect(own_full, 2 * WARPGROUPS * own[0].block_type.nbytes)
            for which in gl.static_range(2):
                for i in gl.static_range(WARPGROUPS):
                    rows = [batch, key_head, first + i * BLOCK_K, 0]
                    tma.async_copy_global_to_shared(own[which], rows, own_full, own_buffers[which].index(i))
            for head in range(key_head * group, key_head * group + group):
                for tile in range(begin, end):
                    slot = copied % STAGES
                    mbarrier.wait(empty.index(slot), copied // STAGES & 1 ^ 1)
                    mbarrier.expect(full.index(slot), 2 * walked[0].block_type.nbytes)
                    rows = [batch, head, tile * BLOCK_Q, 0]
                    bar = full.index(slot)
                    for which in gl.static_range(2):
                        tma.async_copy_global_to_shared(walked[which], rows, bar, buffers[which].index(slot))
                    copied += 1


@gluon.jit
def _key_step(
    state, k, v, keys, tile, statistics_ptr, buffers, signals, mine, next_one, waited_for, waited_phase,
    q_len, query_offset, scale,
    BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr,
    MASKED: gl.constexpr, S_LAYOUT: gl.constexpr, A_LAYOUT: gl.constexpr,
):  # fmt: skip
    """One tile of queries into dk and dv.

    A query beyond q_len is zeros, and so are its dout and its ds; a key beyond k_len only spoils its own row, which is
    not stored.
    """
    dk, dv, taken = state
    q_buffer, g_buffer = buffers
    full, empty = signals
    slot = taken % STAGES
    # one query to a thread: as the scores have them, a thread would load, and keep addresses for, a quarter of them
    PAIRS: gl.constexpr = gl.BlockedLayout([1, 2], [32, 1], [4, 1], [1, 0])
    queries = gl.arange(0, BLOCK_Q, gl.SliceLayout(1, PAIRS))[:, None]
    places = statistics_ptr + tile.to(gl.int64) * (BLOCK_Q * 2) + queries * 2
    places += gl.arange(0, 2, gl.SliceLayout(0, PAIRS))[None, :]
    shift, delta = gl.split(gl.load(places, mask=tile * BLOCK_Q + queries < q_len, other=0.0))
    mbarrier.wait(full.index(slot), taken // STAGES & 1)
    if TURNS:
        mbarrier.wait(mine, taken & 1)
    s = issue_product(k, q_buffer, slot, BLOCK_K, BLOCK_Q, BLOCK_D, S_LAYOUT)
    dp = issue_product(v, g_buffer, slot, BLOCK_K, BLOCK_Q, BLOCK_D, S_LAYOUT)
    if TURNS:
        mbarrier.arrive(next_one, count=1)
    s = warpgroup_mma_wait(num_outstanding=1, deps=[s])
    p = gl.exp2(s * scale + gl.convert_layout(shift, gl.SliceLayout(0, S_LAYOUT))[None, :])
    if MASKED:
        first_query = keys - query_offset - tile * BLOCK_Q
        p = gl.where(first_query[:, None] <= gl.arange(0, BLOCK_Q, gl.SliceLayout(0, S_LAYOUT))[None, :], p, 0.0)
    a = gl.convert_layout(p.to(k.dtype), A_LAYOUT)
    mbarrier.wait(waited_for, waited_phase)
    dv = warpgroup_mma(a, g_buffer.index(slot).reshape([BLOCK_Q, BLOCK_D]), dv, is_async=True)
    dp = warpgroup_mma_wait(num_outstanding=1, deps=[dp])
    delta = gl.convert_layout(delta, gl.SliceLayout(0, S_LAYOUT))
    a = gl.convert_layout((p * (dp - delta[None, :])).to(k.dtype), A_LAYOUT)
    mbarrier.wait(waited_for, waited_phase)
    dk = warpgroup_mma(a, q_buffer.index(slot).reshape([BLOCK_Q, BLOCK_D]), dk, is_async=True)
    dk, dv = warpgroup_mma_wait(num_outstanding=0, deps=[dk, dv])
    mbarrier.arrive(empty.index(slot), count=1)
    return dk, dv, taken + 1


@gluon.jit
def _compute_key(
    packed, WHICH: gl.constexpr,
    D: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
    WARPGROUPS: gl.constexpr, IS_CAUSAL: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """Warpgroup WHICH of those that compute; `packed` is what all of them are given, the kernel's `to_compute`."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_Q, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    A_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    ROWS: gl.constexpr = BLOCK_K * WARPGROUPS
    pointers, strides, own_buffers, buffers, own_signals, signals, turns, problem, scales = packed
    statistics_ptr, dkey_ptr, dvalue_ptr = pointers
    dk_strides, dv_strides = strides
    own_full, own_empty = own_signals
    batches, n_key_head, group, q_len, k_len, query_offset, tiles, rounds = problem
    exponent_scale, scale = scales
    mine, next_one = turns.index(WHICH), turns.index((WHICH + 1) % WARPGROUPS)
    k = own_buffers[0].index(WHICH).reshape([BLOCK_K, BLOCK_D])
    v = own_buffers[1].index(WHICH).reshape([BLOCK_K, BLOCK_D])
    taken = 0  # tiles of queries, since the program began
    for round in range(rounds):
        batch, key_head, first = tile_of_round(round, tiles, n_key_head, ROWS, False)
        if batch < batches:
            begin, full, end = _query_tiles(first, q_len, query_offset, ROWS, BLOCK_Q, IS_CAUSAL)
            first += WHICH * BLOCK_K
            keys = first + gl.arange(0, BLOCK_K, gl.SliceLayout(1, S_LAYOUT))
            dk = gl.zeros([BLOCK_K, BLOCK_D], gl.float32, O_LAYOUT)
            dv = gl.zeros([BLOCK_K, BLOCK_D], gl.float32, O_LAYOUT)
            state = (dk, dv, taken)
            mbarrier.wait(own_full, round & 1)
            for member in range(group):
                place = ((batch.to(gl.int64) * n_key_head + key_head) * group + member) * q_len * 2
                if IS_CAUSAL:
                    for tile in range(begin, full):
                        state = _key_step(
                            state, k, v, keys, tile, statistics_ptr + place, buffers, signals, mine,
                            next_one, own_full, round & 1, q_len, query_offset, exponent_scale,
                            BLOCK_Q, BLOCK_K, BLOCK_D, STAGES, TURNS, True, S_LAYOUT, A_LAYOUT,
                        )  # fmt: skip
                for tile in range(full, end):
                    state = _key_step(
                        state, k, v, keys, tile, statistics_ptr + place, buffers, signals, mine,
                        next_one, own_full, round & 1, q_len, query_offset, exponent_scale,
                        BLOCK_Q, BLOCK_K, BLOCK_D, STAGES, TURNS, False, S_LAYOUT, A_LAYOUT,
                    )  # fmt: skip
            dk, dv, taken = state
            mbarrier.arrive(own_empty, count=1)
            store_rows(dkey_ptr, dk_strides, batch, key_head, first, dk * scale, k_len, D, BLOCK_K, BLOCK_D)
            store_rows(dvalue_ptr, dv_strides, batch, key_head, first, dv, k_len, D, BLOCK_K, BLOCK_D)


@gluon.jit
def _attention_backward_key_hopper(
    query_ptr, key_ptr, value_ptr, grad_ptr, statistics_ptr, dkey_ptr, dvalue_ptr,
    q_stride_b, q_stride_h, q_stride, k_stride_b, k_stride_h, k_stride, v_stride_b, v_stride_h, v_stride,
    g_stride_b, g_stride_h, g_stride, dk_stride_b, dk_stride_h, dk_stride, dv_stride_b, dv_stride_h, dv_stride,
    n_head, group, q_len, k_len, query_offset, exponent_scale, scale, batches, n_key_head, tiles, rounds,
    D: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
    WARPGROUPS: gl.constexpr, IS_CAUSAL: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """dkey and dvalue of tiles of WARPGROUPS * BLOCK_K keys, until none is left."""
    queries = matrices(query_ptr, (q_stride_b, q_stride_h, q_stride), batches, n_head, q_len, D, BLOCK_Q, BLOCK_D)
    grads = matrices(grad_ptr, (g_stride_b, g_stride_h, g_stride), batches, n_head, q_len, D, BLOCK_Q, BLOCK_D)
    keys = matrices(key_ptr, (k_stride_b, k_stride_h, k_stride), batches, n_key_head, k_len, D, BLOCK_K, BLOCK_D)
    values = matrices(value_ptr, (v_stride_b, v_stride_h, v_stride), batches, n_key_head, k_len, D, BLOCK_K, BLOCK_D)
    own_buffers = (buffer(keys, WARPGROUPS), buffer(values, WARPGROUPS))
    buffers = (buffer(queries, STAGES), buffer(grads, STAGES))
    own_signals = (barriers(1, 1).index(0), barriers(1, WARPGROUPS).index(0))
    signals = (barriers(STAGES, 1), barriers(STAGES, WARPGROUPS))
    turns = barriers(WARPGROUPS, 1)
    fence_async_shared()
    mbarrier.arrive(turns.index(0), count=1)
    problem = (batches, n_key_head, group, q_len, k_len, query_offset, tiles, rounds)
    pointers = (statistics_ptr, dkey_ptr, dvalue_ptr)
    strides = ((dk_stride_b, dk_stride_h, dk_stride), (dv_stride_b, dv_stride_h, dv_stride))
    scales = (exponent_scale, scale)
    to_compute = (pointers, strides, own_buffers, buffers, own_signals, signals, turns, problem, scales)
    to_copy = ((keys, values), own_buffers, (queries, grads), buffers, own_signals, signals, problem)
    gl.warp_specialize([
        (_compute_key, (to_compute, 0, D, BLOCK_Q, BLOCK_K, BLOCK_D, STAGES, WARPGROUPS, IS_CAUSAL, TURNS)),
        (_compute_key, (to_compute, 1, D, BLOCK_Q, BLOCK_K, BLOCK_D, STAGES, WARPGROUPS, IS_CAUSAL, TURNS)),
        (_copy_key, (to_copy, BLOCK_Q, BLOCK_K, STAGES, WARPGROUPS, IS_CAUSAL)),
    ], [4, 1], [240, 24])  # fmt: skip
