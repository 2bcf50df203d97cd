"""Attention's kernels for short sequences: a tile holds all queries and keys of a head, in the interpreter of several.

There is no running maximum and no loop, and one launch gives dq, dk and dv; attention.py has the mathematics.
"""

from kernels.attention_kernels import _delta, _exp, _kept_of_groups, _last_seen
from kernels.op import LOG2_E, cast, dot, tl, triton


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
    last = tl.where(positions < q_len, _last_seen(positions, k_len, query_offset, IS_CAUSAL), -1)
    return (positions[None, :] <= last[:, None]) & (slots[:, None] == slots[None, :])


@triton.jit
def _short_kept(seed, heads, positions, threshold, keep_scale, LENGTH: tl.constexpr, BLOCK: tl.constexpr):
    """[BLOCK, BLOCK]: keep_scale where dropout keeps, as in _kept; the keys are those of the query's own head."""
    groups = (tl.arange(0, BLOCK // 8) % (LENGTH // 8))[None, :]
    return _kept_of_groups(seed, heads[:, None], positions[:, None], groups, threshold, keep_scale, BLOCK)


@triton.jit
def _dot_by_heads(a, b, acc, slots, LENGTH: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a @ b, where a is zero between one head and another: of b a head sees its own rows, be the others NaN."""
    product = dot(a, b, acc, PRECISION)
    if LENGTH < BLOCK:
        if tl.sum(tl.sum(b.to(tl.float32) * 0.0, axis=1), axis=0) != 0.0:  # something is NaN, or infinite
            for slot in range(0, BLOCK // LENGTH):
                own = (slots == slot)[:, None]
                product = tl.where(own, dot(a, tl.where(own, b, 0.0), acc, PRECISION), product)
    return product


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
        p = _exp(s, exponent_scale, -tl.where(peak == float("-inf"), 0.0, peak)[:, None], PRECISE)
        total = tl.sum(p, axis=1)
        if DROPOUT:
            p *= _short_kept(seed, head, positions, threshold, 1.0, LENGTH, BLOCK)  # keep_scale comes at the end
        out = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        out = _dot_by_heads(cast(p, v.dtype), v, out, slots, LENGTH, BLOCK, PRECISION)
        total = tl.where(peak == float("-inf"), 1.0, total)
        out *= (keep_scale / total)[:, None]
        o_rows = _rows_of_heads(head, positions, n_head, o_stride_b, o_stride_h, o_stride)
        _store_rows(out_ptr, o_rows, is_query, out, D, BLOCK_D)
        lse = peak + tl.log(total) if PRECISE else (peak + tl.log2(total)) / LOG2_E
        tl.store(lse_ptr + head.to(tl.int64) * q_len + positions, lse, mask=is_query)


@triton.jit
def _attention_short_backward(
    query_ptr, key_ptr, value_ptr, out_ptr, grad_ptr, lse_ptr, grad_lse_ptr, seed_ptr, dquery_ptr, dkey_ptr, dvalue_ptr,
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
        rows = head.to(tl.int64) * q_len + positions
        if grad_lse_ptr is not None:
            delta -= tl.load(grad_lse_ptr + rows, mask=is_query, other=0.0)
        lse = tl.load(lse_ptr + rows, mask=is_query, other=float("inf"))
        lse = tl.where(lse == float("-inf"), float("inf"), lse)  # sees no key: p is zero
        if not PRECISE:
            lse = lse * LOG2_E
        p = _exp(dot(q, tl.trans(k), zeros, PRECISION), exponent_scale, -lse[:, None], PRECISE)
        p = tl.where(seen, p, 0.0)
        dp = dot(dout, tl.trans(v), zeros, PRECISION)
        dropped = p
        if DROPOUT:
            kept = _short_kept(seed, head, positions, threshold, keep_scale, LENGTH, BLOCK)
            dropped = p * kept
            dp *= kept
        dv = _dot_by_heads(tl.trans(cast(dropped, dout.dtype)), dout, dv, slots, LENGTH, BLOCK, PRECISION)
        ds = p * (dp - delta[:, None])
        if LENGTH < BLOCK:  # between heads p is zero, and dp may be NaN
            ds = tl.where(slots[:, None] == slots[None, :], ds, 0.0)
        ds = cast(ds, q.dtype)
        dk = _dot_by_heads(tl.trans(ds), q, dk, slots, LENGTH, BLOCK, PRECISION)
        dq = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        dq = _dot_by_heads(ds, k, dq, slots, LENGTH, BLOCK, PRECISION)
        dq_rows = _rows_of_heads(head, positions, n_head, dq_stride_b, dq_stride_h, dq_stride)
        _store_rows(dquery_ptr, dq_rows, is_query, dq * scale, D, BLOCK_D)
    dk_rows = _rows_of_heads(key_head, positions, n_key_head, dk_stride_b, dk_stride_h, dk_stride)
    dv_rows = _rows_of_heads(key_head, positions, n_key_head, dv_stride_b, dv_stride_h, dv_stride)
    _store_rows(dkey_ptr, dk_rows, is_key, dk * scale, D, BLOCK_D)
    _store_rows(dvalue_ptr, dv_rows, is_key, dv, D, BLOCK_D)
