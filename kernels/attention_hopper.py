"""Attention's forward pass for Hopper GPUs (compute capability 9.0), in Gluon: warps that do different things at once.

What is computed is what `_attention_forward` in attention_kernels.py computes; here it is said who does it. One warp
copies, through the TMA unit: the queries of a tile, and their keys and values, tile after tile, into buffers that go
round. Two or three warpgroups (four warps, by which a product on Hopper's tensor cores is issued) own BLOCK_Q queries
each and compute:

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

from kernels.op import LOG2_E


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT mbarriers, each for so many arrivals."""
    made = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(made.index(i), count=ARRIVALS)
    return made


@gluon.jit
def matrices(base_ptr, strides, batches, heads, length, D: gl.constexpr, BLOCK: gl.constexpr, BLOCK_D: gl.constexpr):
    """A descriptor of the [length, D] matrices of all heads, for tiles of BLOCK rows."""
    TILE: gl.constexpr = [1, 1, BLOCK, BLOCK_D]
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for(TILE, base_ptr.dtype.element_ty)
    shape = [batches, heads, length, D]
    return tma.make_tensor_descriptor(base_ptr, shape, [strides[0], strides[1], strides[2], 1], TILE, LAYOUT)


@gluon.jit
def buffer(matrices, COUNT: gl.constexpr):
    """Shared memory for COUNT of their tiles."""
    return gl.allocate_shared_memory(matrices.dtype, [COUNT] + matrices.block_type.shape, matrices.layout)  # noqa: RUF005


@gluon.jit
def issue_product(
    a, buffer, slot, BLOCK_A: gl.constexpr, BLOCK_B: gl.constexpr, BLOCK_D: gl.constexpr, LAYOUT: gl.constexpr
):  # fmt: skip
    """a b^T under way, b a tile in a buffer's slot."""
    b = buffer.index(slot).reshape([BLOCK_B, BLOCK_D]).permute((1, 0))
    return warpgroup_mma(a, b, gl.zeros([BLOCK_A, BLOCK_B], gl.float32, LAYOUT), use_acc=False, is_async=True)


@gluon.jit
def store_rows(
    base_ptr, strides, batch, head, first, tile, length, D: gl.constexpr, BLOCK: gl.constexpr, BLOCK_D: gl.constexpr
):
    """Write a warpgroup's [BLOCK, BLOCK_D] tile to the rows of a head from `first` on."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    rows = first + gl.arange(0, BLOCK, gl.SliceLayout(1, LAYOUT))[:, None]
    columns = gl.arange(0, BLOCK_D, gl.SliceLayout(0, LAYOUT))[None, :]
    base = base_ptr + batch.to(gl.int64) * strides[0] + head.to(gl.int64) * strides[1]
    tile = gl.convert_layout(tile.to(base_ptr.dtype.element_ty), LAYOUT)
    gl.store(base + rows.to(gl.int64) * strides[2] + columns, tile, mask=(rows < length) & (columns < D))


@gluon.jit
def tile_of_round(round, tiles, n_head, ROWS: gl.constexpr, LAST_FIRST: gl.constexpr):
    """(batch, head, first row) of this program's tile in this round; a batch beyond the last where none is left.

    Those of a head's tiles that have most to do come first: its last, for queries, or its first. Every other round goes
    through the programs backwards, so that who had more work has less.
    """
    program, programs = gl.program_id(0), gl.num_programs(0)
    index = round * programs + gl.where(round % 2 == 1, programs - 1 - program, program)
    head, tile = index // tiles, index % tiles
    if LAST_FIRST:
        tile = tiles - 1 - tile
    return head // n_head, head % n_head, tile * ROWS


@gluon.jit
def key_tiles(
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
def copy(
    packed,
    BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, WARPGROUPS: gl.constexpr,
    IS_CAUSAL: gl.constexpr,
):  # fmt: skip
    """The warp that copies: a tile of queries of each of the `own` matrices, and its keys and values, tile by tile."""
    own, own_buffers, walked, buffers, own_signals, k_signals, v_signals, problem = packed
    keys, values = walked
    k_buffer, v_buffer = buffers
    own_full, own_empty = own_signals
    k_full, k_empty = k_signals
    v_full, v_empty = v_signals
    batches, n_head, group, q_len, k_len, query_offset, tiles, rounds = problem
    ROWS: gl.constexpr = BLOCK_Q * WARPGROUPS
    OWN: gl.constexpr = len(own)
    copied = 0  # tiles of keys, since the program began
    for round in range(rounds):
        batch, head, first = tile_of_round(round, tiles, n_head, ROWS, True)
        if batch < batches:
            _, end = key_tiles(first, q_len, k_len, query_offset, ROWS, BLOCK_K, IS_CAUSAL)
            mbarrier.wait(own_empty, round & 1 ^ 1)
            mbarrier.expect(own_full, OWN * WARPGROUPS * own[0].block_type.nbytes)
            for which in gl.static_range(OWN):
                for i in gl.static_range(WARPGROUPS):
                    rows = [batch, head, first + i * BLOCK_Q, 0]
                    tma.async_copy_global_to_shared(own[which], rows, own_full, own_buffers[which].index(i))
            for tile in range(gl.maximum(end, 1)):
                slot, phase = copied % STAGES, copied // STAGES & 1
                # where nothing is seen, zeros from beyond the end: 0 times infinity is NaN
                rows = [batch, head // group, gl.where(end > 0, tile * BLOCK_K, k_len), 0]
                mbarrier.wait(k_empty.index(slot), phase ^ 1)
                mbarrier.expect(k_full.index(slot), keys.block_type.nbytes)
                tma.async_copy_global_to_shared(keys, rows, k_full.index(slot), k_buffer.index(slot))
                mbarrier.wait(v_empty.index(slot), phase ^ 1)
                mbarrier.expect(v_full.index(slot), values.block_type.nbytes)
                tma.async_copy_global_to_shared(values, rows, v_full.index(slot), v_buffer.index(slot))
                copied += 1


@gluon.jit
def last_seen(queries, k_len, query_offset, IS_CAUSAL: gl.constexpr):
    """The last key that each query sees, below zero where it sees none."""
    if IS_CAUSAL:
        return gl.minimum(queries + query_offset, k_len - 1)
    else:
        return gl.zeros_like(queries) + (k_len - 1)


@gluon.jit
def is_seen(s, last, start):
    """Which of a tile's keys, from `start` on, each query sees; s is laid out as the scores are.

    The keys are made anew for each tile: their places in it, which are always the same, would stay in registers.
    """
    return (start + gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout)))[None, :] <= last[:, None]


@gluon.jit
def _softmax(s, peak, total, last, start, scale, MASKED: gl.constexpr):
    """(p, alpha, maximum, sum) of a tile of scores: p relative to the new maximum, alpha that of what came before."""
    if MASKED:
        s = gl.where(is_seen(s, last, start), s, float("-inf"))
    highest = gl.maximum(peak, gl.max(s, axis=1) * scale)
    base = highest
    if MASKED:  # a query that has seen no key yet must not get inf - inf
        base = gl.where(highest == float("-inf"), 0.0, highest)
    p = gl.exp2(s * scale - base[:, None])
    alpha = gl.exp2(peak - base)
    return p, alpha, highest, total * alpha + gl.sum(p, axis=1)


@gluon.jit
def _attend(
    state, q, last, tile, k_buffer, v_buffer, k_signals, v_signals, mine, next_one, waited_for, waited_phase, scale,
    BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
    TURNS: gl.constexpr, MASKED: gl.constexpr, S_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr,
):  # fmt: skip
    """The scores of one tile of keys, and the product with the values of the tile before."""
    acc, peak, total, p, taken = state
    k_full, k_empty = k_signals
    v_full, v_empty = v_signals
    slot, before = taken % STAGES, (taken - 1) % STAGES
    mbarrier.wait(k_full.index(slot), taken // STAGES & 1)
    if TURNS:
        mbarrier.wait(mine, taken & 1)
    s = issue_product(q, k_buffer, slot, BLOCK_Q, BLOCK_K, BLOCK_D, S_LAYOUT)
    mbarrier.wait(v_full.index(before), (taken - 1) // STAGES & 1)
    acc = warpgroup_mma(p, v_buffer.index(before).reshape([BLOCK_K, BLOCK_D]), acc, is_async=True)
    if TURNS:
        mbarrier.arrive(next_one, count=1)
    s = warpgroup_mma_wait(num_outstanding=1, deps=[s])
    mbarrier.arrive(k_empty.index(slot), count=1)
    p, alpha, peak, total = _softmax(s, peak, total, last, tile * BLOCK_K, scale, MASKED)
    p = gl.convert_layout(p.to(q.dtype), P_LAYOUT)
    # over long ago; without something here that it may not pass, ptxas moves the next wait to before the softmax
    mbarrier.wait(waited_for, waited_phase)
    acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc])
    mbarrier.arrive(v_empty.index(before), count=1)
    acc *= gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout))[:, None]
    return acc, peak, total, p, taken + 1


@gluon.jit
def _compute(
    packed, WHICH: gl.constexpr,
    D: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
    WARPGROUPS: gl.constexpr, IS_CAUSAL: gl.constexpr, EVEN: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """Warpgroup WHICH of those that compute; `packed` is what all of them are given, the kernel's `to_compute`."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    ROWS: gl.constexpr = BLOCK_Q * WARPGROUPS
    FIRST: gl.constexpr = IS_CAUSAL or not EVEN  # whether the first tile has a mask
    out_ptr, lse_ptr, o_strides, q_buffer, buffers, q_signals, k_signals, v_signals, turns, problem, scale = packed
    k_buffer, v_buffer = buffers
    q_full, q_empty = q_signals
    k_full, k_empty = k_signals
    v_full, v_empty = v_signals
    batches, n_head, _group, q_len, k_len, query_offset, tiles, rounds = problem
    mine, next_one = turns.index(WHICH), turns.index((WHICH + 1) % WARPGROUPS)
    q = q_buffer.index(WHICH).reshape([BLOCK_Q, BLOCK_D])
    taken = 0  # tiles of keys, since the program began
    for round in range(rounds):
        batch, head, first = tile_of_round(round, tiles, n_head, ROWS, True)
        if batch < batches:
            full, end = key_tiles(first, q_len, k_len, query_offset, ROWS, BLOCK_K, IS_CAUSAL)
            first += WHICH * BLOCK_Q
            queries = first + gl.arange(0, BLOCK_Q, gl.SliceLayout(1, S_LAYOUT))
            last = last_seen(queries, k_len, query_offset, IS_CAUSAL)
            # the first tile's p; the loops begin with the second
            slot = taken % STAGES
            mbarrier.wait(q_full, round & 1)
            mbarrier.wait(k_full.index(slot), taken // STAGES & 1)
            if TURNS:
                mbarrier.wait(mine, taken & 1)
            s = issue_product(q, k_buffer, slot, BLOCK_Q, BLOCK_K, BLOCK_D, S_LAYOUT)
            if TURNS:
                mbarrier.arrive(next_one, count=1)
            s = warpgroup_mma_wait(num_outstanding=0, deps=[s])
            mbarrier.arrive(k_empty.index(slot), count=1)
            peak = gl.full([BLOCK_Q], float("-inf"), gl.float32, gl.SliceLayout(1, S_LAYOUT))
            total = gl.zeros([BLOCK_Q], gl.float32, gl.SliceLayout(1, S_LAYOUT))
            p, _alpha, peak, total = _softmax(s, peak, total, last, 0, scale, FIRST)
            acc = gl.zeros([BLOCK_Q, BLOCK_D], gl.float32, O_LAYOUT)
            state = (acc, peak, total, gl.convert_layout(p.to(q.dtype), P_LAYOUT), taken + 1)
            full = gl.maximum(full, 1)
            for tile in range(1, full):
                state = _attend(
                    state, q, last, tile, k_buffer, v_buffer, k_signals, v_signals, mine, next_one, q_full,
                    round & 1, scale,
                    BLOCK_Q, BLOCK_K, BLOCK_D, STAGES, TURNS, False, S_LAYOUT, P_LAYOUT,
                )  # fmt: skip
            if FIRST:
                for tile in range(full, end):
                    state = _attend(
                        state, q, last, tile, k_buffer, v_buffer, k_signals, v_signals, mine, next_one, q_full,
                        round & 1, scale,
                        BLOCK_Q, BLOCK_K, BLOCK_D, STAGES, TURNS, True, S_LAYOUT, P_LAYOUT,
                    )  # fmt: skip
            acc, peak, total, p, taken = state
            mbarrier.arrive(q_empty, count=1)
            slot = (taken - 1) % STAGES
            mbarrier.wait(v_full.index(slot), (taken - 1) // STAGES & 1)
            acc = warpgroup_mma(p, v_buffer.index(slot).reshape([BLOCK_K, BLOCK_D]), acc, is_async=True)
            acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc])
            mbarrier.arrive(v_empty.index(slot), count=1)

            total = gl.where(peak == float("-inf"), 1.0, total)
            lse = lse_ptr + (batch.to(gl.int64) * n_head + head) * q_len
            gl.store(lse + queries, (peak + gl.log2(total)) / LOG2_E, mask=queries < q_len)
            acc *= gl.convert_layout(1.0 / total, gl.SliceLayout(1, O_LAYOUT))[:, None]
            store_rows(out_ptr, o_strides, batch, head, first, acc, q_len, D, BLOCK_Q, BLOCK_D)


@gluon.jit
def _attention_forward_hopper(
    query_ptr, key_ptr, value_ptr, out_ptr, lse_ptr,
    q_stride_b, q_stride_h, q_stride, k_stride_b, k_stride_h, k_stride, v_stride_b, v_stride_h, v_stride,
    o_stride_b, o_stride_h, o_stride,
    n_head, group, q_len, k_len, query_offset, exponent_scale, batches, n_key_head, tiles, rounds,
    D: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
    WARPGROUPS: gl.constexpr, IS_CAUSAL: gl.constexpr, EVEN: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """A program takes tiles of WARPGROUPS * BLOCK_Q queries until none is left."""
    queries = matrices(query_ptr, (q_stride_b, q_stride_h, q_stride), batches, n_head, q_len, D, BLOCK_Q, BLOCK_D)
    keys = matrices(key_ptr, (k_stride_b, k_stride_h, k_stride), batches, n_key_head, k_len, D, BLOCK_K, BLOCK_D)
    values = matrices(value_ptr, (v_stride_b, v_stride_h, v_stride), batches, n_key_head, k_len, D, BLOCK_K, BLOCK_D)
    q_buffer = buffer(queries, WARPGROUPS)
    buffers = (buffer(keys, STAGES), buffer(values, STAGES))
    q_signals = (barriers(1, 1).index(0), barriers(1, WARPGROUPS).index(0))
    k_signals = (barriers(STAGES, 1), barriers(STAGES, WARPGROUPS))
    v_signals = (barriers(STAGES, 1), barriers(STAGES, WARPGROUPS))
    turns = barriers(WARPGROUPS, 1)
    fence_async_shared()
    mbarrier.arrive(turns.index(0), count=1)
    problem = (batches, n_head, group, q_len, k_len, query_offset, tiles, rounds)
    o_strides = (o_stride_b, o_stride_h, o_stride)
    to_compute = (
        out_ptr, lse_ptr, o_strides, q_buffer, buffers, q_signals, k_signals, v_signals, turns, problem, exponent_scale
    )  # fmt: skip
    to_copy = ((queries,), (q_buffer,), (keys, values), buffers, q_signals, k_signals, v_signals, problem)
    # constexprs stay such only if they are written here; registers are a thread's, 64K the processor's
    if WARPGROUPS == 2:
        gl.warp_specialize([
            (_compute, (to_compute, 0, D, BLOCK_Q, BLOCK_K, BLOCK_D, STAGES, WARPGROUPS, IS_CAUSAL, EVEN, TURNS)),
            (_compute, (to_compute, 1, D, BLOCK_Q, BLOCK_K, BLOCK_D, STAGES, WARPGROUPS, IS_CAUSAL, EVEN, TURNS)),
            (copy, (to_copy, BLOCK_Q, BLOCK_K, STAGES, WARPGROUPS, IS_CAUSAL)),
        ], [4, 1], [240, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_compute, (to_compute, 0, D, BLOCK_Q, BLOCK_K, BLOCK_D, STAGES, WARPGROUPS, IS_CAUSAL, EVEN, TURNS)),
            (_compute, (to_compute, 1, D, BLOCK_Q, BLOCK_K, BLOCK_D, STAGES, WARPGROUPS, IS_CAUSAL, EVEN, TURNS)),
            (_compute, (to_compute, 2, D, BLOCK_Q, BLOCK_K, BLOCK_D, STAGES, WARPGROUPS, IS_CAUSAL, EVEN, TURNS)),
            (copy, (to_copy, BLOCK_Q, BLOCK_K, STAGES, WARPGROUPS, IS_CAUSAL)),
        ], [4, 4, 1], [160, 160, 32])  # fmt: skip
