"""Attention's forward pass for Hopper GPUs (compute capability 9.0), in Gluon: warps that do different things at once.

What is computed is what `_attention_forward` in attention.py computes; here it is said who does it. One warp copies,
through the TMA unit: the queries of a tile, and their keys and values, tile after tile, into buffers that go round. Two
or three warpgroups (four warps, by which a product on Hopper's tensor cores is issued) own BLOCK_Q queries each and
compute:

    issue s = q k^T of this tile, then acc += p v of the tile before; wait for s alone
    softmax of s, while the product p v runs                         (overlap within a warpgroup)
    wait for p v, acc *= alpha

With TURNS the warpgroups issue products one after another: when one has, the next may, so that the softmax of one runs
during products of another. Every buffer has two mbarriers: `full`, for the bytes that a copy brings, and `empty`, for
the warpgroups that have read it. Programs stay, one to a processor, and take tiles of queries until none is left.

A tuned option (see kernels/tiles.py), off by default: no GPU has run it. For fp16 and bf16 without dropout, of tensors
that descriptors can be made of.

Shah et al., "FlashAttention-3" (2024), https://arxiv.org/abs/2407.08608, for turns and overlap.
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

LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _work(turn, heads, n_head, q_len, ROWS: gl.constexpr):
    """(batch, head, first query) of this program's tile at this turn; a batch beyond the last where none is left.

    A head's last tiles, which see most keys, come first. Every other turn goes through the programs backwards, so that
    who had more work has less.
    """
    program, programs = gl.program_id(0), gl.num_programs(0)
    index = turn * programs + gl.where(turn % 2 == 1, programs - 1 - program, program)
    tiles = gl.cdiv(q_len, ROWS)
    head = index // tiles
    return head // n_head, head % n_head, (tiles - 1 - index % tiles) * ROWS


@gluon.jit
def _turns(heads, q_len, ROWS: gl.constexpr):
    return gl.cdiv(heads * gl.cdiv(q_len, ROWS), gl.num_programs(0))


@gluon.jit
def _key_tiles(
    first, q_len, k_len, query_offset, ROWS: gl.constexpr, BLOCK_K: gl.constexpr, IS_CAUSAL: gl.constexpr
):  # fmt: skip
    """(full, end): tiles of keys before `full` need no mask for these ROWS queries, those before `end` are seen."""
    if IS_CAUSAL:
        last = gl.minimum(first + ROWS, q_len) - 1
        full = gl.maximum(gl.minimum(first + query_offset + 1, k_len), 0) // BLOCK_K
        end = gl.cdiv(gl.maximum(gl.minimum(last + query_offset + 1, k_len), 0), BLOCK_K)
    else:
        full = k_len // BLOCK_K
        end = gl.cdiv(k_len, BLOCK_K)
    return full, end


@gluon.jit
def _copy(
    maps, buffers, q_barriers, k_barriers, v_barriers, problem,
    BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, WARPGROUPS: gl.constexpr,
    IS_CAUSAL: gl.constexpr,
):  # fmt: skip
    """The warp that copies."""
    queries, keys, values = maps
    q_buffer, k_buffer, v_buffer = buffers
    q_full, q_empty = q_barriers
    k_full, k_empty = k_barriers
    v_full, v_empty = v_barriers
    heads, n_head, group, q_len, k_len, query_offset = problem
    ROWS: gl.constexpr = BLOCK_Q * WARPGROUPS
    copied = 0  # tiles of keys, since the program began
    for turn in range(_turns(heads, q_len, ROWS)):
        batch, head, first = _work(turn, heads, n_head, q_len, ROWS)
        if batch * n_head < heads:
            _, end = _key_tiles(first, q_len, k_len, query_offset, ROWS, BLOCK_K, IS_CAUSAL)
            mbarrier.wait(q_empty, turn & 1 ^ 1)
            mbarrier.expect(q_full, WARPGROUPS * queries.block_type.nbytes)
            for i in gl.static_range(WARPGROUPS):
                rows = [batch, head, first + i * BLOCK_Q, 0]
                tma.async_copy_global_to_shared(queries, rows, q_full, q_buffer.index(i))
            for tile in range(gl.maximum(end, 1)):
                slot, phase = copied % STAGES, copied // STAGES & 1
                rows = [batch, head // group, tile * BLOCK_K, 0]
                mbarrier.wait(k_empty.index(slot), phase ^ 1)
                mbarrier.expect(k_full.index(slot), keys.block_type.nbytes)
                tma.async_copy_global_to_shared(keys, rows, k_full.index(slot), k_buffer.index(slot))
                # where nothing is seen, zeros from beyond the end: 0 times an infinite value is NaN
                rows = [batch, head // group, gl.where(end > 0, tile * BLOCK_K, k_len), 0]
                mbarrier.wait(v_empty.index(slot), phase ^ 1)
                mbarrier.expect(v_full.index(slot), values.block_type.nbytes)
                tma.async_copy_global_to_shared(values, rows, v_full.index(slot), v_buffer.index(slot))
                copied += 1


@gluon.jit
def _softmax(s, peak, total, queries, start, k_len, query_offset, scale, IS_CAUSAL: gl.constexpr, MASKED: gl.constexpr):
    """(p, alpha, maximum, sum) of a tile of scores: p relative to the new maximum, alpha that of what came before."""
    if MASKED:
        keys = start + gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout))[None, :]
        seen = keys < k_len
        if IS_CAUSAL:
            seen = seen & (keys <= (queries + query_offset)[:, None])
        s = gl.where(seen, s, float("-inf"))
    highest = gl.maximum(peak, gl.max(s, axis=1) * scale)
    base = highest
    if MASKED:  # a query that has seen no key yet must not get inf - inf
        base = gl.where(highest == float("-inf"), 0.0, highest)
    p = gl.exp2(s * scale - base[:, None])
    alpha = gl.exp2(peak - base)
    return p, alpha, highest, total * alpha + gl.sum(p, axis=1)


@gluon.jit
def _begin_scores(
    q, k_buffer, slot, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, BLOCK_D: gl.constexpr, LAYOUT: gl.constexpr
):
    """q k^T, under way."""
    k = k_buffer.index(slot).reshape([BLOCK_K, BLOCK_D]).permute((1, 0))
    return warpgroup_mma(q, k, gl.zeros([BLOCK_Q, BLOCK_K], gl.float32, LAYOUT), use_acc=False, is_async=True)


@gluon.jit
def _attend(
    state, q, queries, tile, k_buffer, v_buffer, k_barriers, v_barriers, mine, next_one, waited_for, waited_phase,
    k_len, query_offset, scale,
    BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr, IS_CAUSAL: gl.constexpr,
    TURNS: gl.constexpr, MASKED: gl.constexpr, S_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr,
):  # fmt: skip
    """The scores of one tile of keys, and the product with the values of the tile before."""
    acc, peak, total, p, taken = state
    k_full, k_empty = k_barriers
    v_full, v_empty = v_barriers
    slot, before = taken % STAGES, (taken - 1) % STAGES
    mbarrier.wait(k_full.index(slot), taken // STAGES & 1)
    if TURNS:
        mbarrier.wait(mine, taken & 1)
    s = _begin_scores(q, k_buffer, slot, BLOCK_Q, BLOCK_K, BLOCK_D, S_LAYOUT)
    mbarrier.wait(v_full.index(before), (taken - 1) // STAGES & 1)
    acc = warpgroup_mma(p, v_buffer.index(before).reshape([BLOCK_K, BLOCK_D]), acc, is_async=True)
    if TURNS:
        mbarrier.arrive(next_one, count=1)
    s = warpgroup_mma_wait(num_outstanding=1, deps=[s])
    mbarrier.arrive(k_empty.index(slot), count=1)
    p, alpha, peak, total = _softmax(
        s, peak, total, queries, tile * BLOCK_K, k_len, query_offset, scale, IS_CAUSAL, MASKED
    )
    p = gl.convert_layout(p.to(q.dtype), P_LAYOUT)
    # over long ago; without something here that it may not pass, ptxas moves the next wait to before the softmax
    mbarrier.wait(waited_for, waited_phase)
    acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc])
    mbarrier.arrive(v_empty.index(before), count=1)
    acc *= gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout))[:, None]
    return acc, peak, total, p, taken + 1


@gluon.jit
def _compute(
    out_ptr, lse_ptr, o_strides, buffers, q_barriers, k_barriers, v_barriers, turns, problem, scale,
    WHICH: gl.constexpr, D: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr, WARPGROUPS: gl.constexpr, IS_CAUSAL: gl.constexpr, EVEN: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """Warpgroup WHICH of those that compute."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    STORED: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    ROWS: gl.constexpr = BLOCK_Q * WARPGROUPS
    FIRST: gl.constexpr = IS_CAUSAL or not EVEN  # whether the first tile has a mask
    q_buffer, k_buffer, v_buffer = buffers
    q_full, q_empty = q_barriers
    k_full, k_empty = k_barriers
    v_full, v_empty = v_barriers
    heads, n_head, _group, q_len, k_len, query_offset = problem
    mine, next_one = turns.index(WHICH), turns.index((WHICH + 1) % WARPGROUPS)
    q = q_buffer.index(WHICH).reshape([BLOCK_Q, BLOCK_D])
    taken = 0  # tiles of keys, since the program began
    for turn in range(_turns(heads, q_len, ROWS)):
        batch, head, first = _work(turn, heads, n_head, q_len, ROWS)
        if batch * n_head < heads:
            full, end = _key_tiles(first, q_len, k_len, query_offset, ROWS, BLOCK_K, IS_CAUSAL)
            first += WHICH * BLOCK_Q
            queries = first + gl.arange(0, BLOCK_Q, gl.SliceLayout(1, S_LAYOUT))
            # the first tile's p; the loops begin with the second
            slot = taken % STAGES
            mbarrier.wait(q_full, turn & 1)
            mbarrier.wait(k_full.index(slot), taken // STAGES & 1)
            if TURNS:
                mbarrier.wait(mine, taken & 1)
            s = _begin_scores(q, k_buffer, slot, BLOCK_Q, BLOCK_K, BLOCK_D, S_LAYOUT)
            if TURNS:
                mbarrier.arrive(next_one, count=1)
            s = warpgroup_mma_wait(num_outstanding=0, deps=[s])
            mbarrier.arrive(k_empty.index(slot), count=1)
            peak = gl.full([BLOCK_Q], float("-inf"), gl.float32, gl.SliceLayout(1, S_LAYOUT))
            total = gl.zeros([BLOCK_Q], gl.float32, gl.SliceLayout(1, S_LAYOUT))
            p, _alpha, peak, total = _softmax(s, peak, total, queries, 0, k_len, query_offset, scale, IS_CAUSAL, FIRST)
            acc = gl.zeros([BLOCK_Q, BLOCK_D], gl.float32, O_LAYOUT)
            state = (acc, peak, total, gl.convert_layout(p.to(q.dtype), P_LAYOUT), taken + 1)
            full = gl.maximum(full, 1)
            for tile in range(1, full):
                state = _attend(
                    state, q, queries, tile, k_buffer, v_buffer, k_barriers, v_barriers, mine, next_one, q_full,
                    turn & 1, k_len, query_offset, scale,
                    BLOCK_Q, BLOCK_K, BLOCK_D, STAGES, IS_CAUSAL, TURNS, False, S_LAYOUT, P_LAYOUT,
                )  # fmt: skip
            if FIRST:
                for tile in range(full, end):
                    state = _attend(
                        state, q, queries, tile, k_buffer, v_buffer, k_barriers, v_barriers, mine, next_one, q_full,
                        turn & 1, k_len, query_offset, scale,
                        BLOCK_Q, BLOCK_K, BLOCK_D, STAGES, IS_CAUSAL, TURNS, True, S_LAYOUT, P_LAYOUT,
                    )  # fmt: skip
            acc, peak, total, p, taken = state
            mbarrier.arrive(q_empty, count=1)
            slot = (taken - 1) % STAGES
            mbarrier.wait(v_full.index(slot), (taken - 1) // STAGES & 1)
            acc = warpgroup_mma(p, v_buffer.index(slot).reshape([BLOCK_K, BLOCK_D]), acc, is_async=True)
            acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc])
            mbarrier.arrive(v_empty.index(slot), count=1)

            total = gl.where(total == 0.0, 1.0, total)
            lse = lse_ptr + (batch.to(gl.int64) * n_head + head) * q_len
            gl.store(lse + queries, (peak + gl.log2(total)) / LOG2_E, mask=queries < q_len)
            acc *= gl.convert_layout(1.0 / total, gl.SliceLayout(1, O_LAYOUT))[:, None]
            out = out_ptr + batch.to(gl.int64) * o_strides[0] + head.to(gl.int64) * o_strides[1]
            rows = first + gl.arange(0, BLOCK_Q, gl.SliceLayout(1, STORED))[:, None]
            columns = gl.arange(0, BLOCK_D, gl.SliceLayout(0, STORED))[None, :]
            acc = gl.convert_layout(acc.to(out_ptr.dtype.element_ty), STORED)
            gl.store(out + rows.to(gl.int64) * o_strides[2] + columns, acc, mask=(rows < q_len) & (columns < D))


@gluon.jit
def _barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT mbarriers, each for so many arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit
def _attention_forward_hopper(
    query_ptr, key_ptr, value_ptr, out_ptr, lse_ptr,
    q_stride_b, q_stride_h, q_stride, k_stride_b, k_stride_h, k_stride, v_stride_b, v_stride_h, v_stride,
    o_stride_b, o_stride_h, o_stride,
    n_head, group, q_len, k_len, query_offset, exponent_scale, heads,
    D: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
    WARPGROUPS: gl.constexpr, IS_CAUSAL: gl.constexpr, EVEN: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """A program takes tiles of WARPGROUPS * BLOCK_Q queries until none is left."""
    dtype: gl.constexpr = query_ptr.dtype.element_ty
    Q_BLOCK: gl.constexpr = [1, 1, BLOCK_Q, BLOCK_D]
    K_BLOCK: gl.constexpr = [1, 1, BLOCK_K, BLOCK_D]
    Q_SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for(Q_BLOCK, dtype)
    K_SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for(K_BLOCK, dtype)
    batches, key_heads = heads // n_head, n_head // group
    queries = tma.make_tensor_descriptor(
        query_ptr, [batches, n_head, q_len, D], [q_stride_b, q_stride_h, q_stride, 1], Q_BLOCK, Q_SHARED
    )
    keys = tma.make_tensor_descriptor(
        key_ptr, [batches, key_heads, k_len, D], [k_stride_b, k_stride_h, k_stride, 1], K_BLOCK, K_SHARED
    )
    values = tma.make_tensor_descriptor(
        value_ptr, [batches, key_heads, k_len, D], [v_stride_b, v_stride_h, v_stride, 1], K_BLOCK, K_SHARED
    )
    maps = (queries, keys, values)
    buffers = (
        gl.allocate_shared_memory(dtype, [WARPGROUPS, 1, 1, BLOCK_Q, BLOCK_D], Q_SHARED),
        gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_K, BLOCK_D], K_SHARED),
        gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_K, BLOCK_D], K_SHARED),
    )
    q_barriers = (_barriers(1, 1).index(0), _barriers(1, WARPGROUPS).index(0))
    k_barriers = (_barriers(STAGES, 1), _barriers(STAGES, WARPGROUPS))
    v_barriers = (_barriers(STAGES, 1), _barriers(STAGES, WARPGROUPS))
    turns = _barriers(WARPGROUPS, 1)
    fence_async_shared()
    mbarrier.arrive(turns.index(0), count=1)
    problem = (heads, n_head, group, q_len, k_len, query_offset)
    o_strides = (o_stride_b, o_stride_h, o_stride)
    # constexprs stay such only if they are written here; registers are a thread's, 64K the processor's
    if WARPGROUPS == 2:
        gl.warp_specialize([
            (_compute, (out_ptr, lse_ptr, o_strides, buffers, q_barriers, k_barriers, v_barriers, turns, problem,
                        exponent_scale, 0, D, BLOCK_Q, BLOCK_K, BLOCK_D, STAGES, WARPGROUPS, IS_CAUSAL, EVEN,
                        TURNS)),
            (_compute, (out_ptr, lse_ptr, o_strides, buffers, q_barriers, k_barriers, v_barriers, turns, problem,
                        exponent_scale, 1, D, BLOCK_Q, BLOCK_K, BLOCK_D, STAGES, WARPGROUPS, IS_CAUSAL, EVEN,
                        TURNS)),
            (_copy, (maps, buffers, q_barriers, k_barriers, v_barriers, problem,
                     BLOCK_Q, BLOCK_K, STAGES, WARPGROUPS, IS_CAUSAL)),
        ], [4, 1], [240, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_compute, (out_ptr, lse_ptr, o_strides, buffers, q_barriers, k_barriers, v_barriers, turns, problem,
                        exponent_scale, 0, D, BLOCK_Q, BLOCK_K, BLOCK_D, STAGES, WARPGROUPS, IS_CAUSAL, EVEN,
                        TURNS)),
            (_compute, (out_ptr, lse_ptr, o_strides, buffers, q_barriers, k_barriers, v_barriers, turns, problem,
                        exponent_scale, 1, D, BLOCK_Q, BLOCK_K, BLOCK_D, STAGES, WARPGROUPS, IS_CAUSAL, EVEN,
                        TURNS)),
            (_compute, (out_ptr, lse_ptr, o_strides, buffers, q_barriers, k_barriers, v_barriers, turns, problem,
                        exponent_scale, 2, D, BLOCK_Q, BLOCK_K, BLOCK_D, STAGES, WARPGROUPS, IS_CAUSAL, EVEN,
                        TURNS)),
            (_copy, (maps, buffers, q_barriers, k_barriers, v_barriers, problem,
                     BLOCK_Q, BLOCK_K, STAGES, WARPGROUPS, IS_CAUSAL)),
        ], [4, 4, 1], [160, 160, 32])  # fmt: skip
