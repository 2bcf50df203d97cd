"""Attention's kernels for GPUs in general, those that walk tiles of keys or queries; attention.py has the mathematics.

A program of `_attention_forward` and of `_attention_backward_query` owns a tile of queries of one head and walks the
keys; one of `_attention_backward_key` owns a tile of keys and walks the queries. decode_attention.py shares the parts.
"""

from kernels.op import LOG2_E, cast, dot, fma, tl, triton


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
def _last_seen(queries, k_len, query_offset, IS_CAUSAL: tl.constexpr):
    """The last key that each query sees, below zero where it sees none: one comparison an element, for all tiles."""
    if IS_CAUSAL:
        return tl.minimum(queries + query_offset, k_len - 1)
    else:
        return tl.zeros_like(queries) + (k_len - 1)


@triton.jit
def _sees(last, start, BLOCK_K: tl.constexpr):
    """[len(last), BLOCK_K]: whether each query sees a key of the tile at `start`.

    The places of keys in a tile are the same for every tile, and stay in registers; those of more than 64 are too many.
    """
    places = tl.arange(0, BLOCK_K)[None, :]
    if BLOCK_K > 64:
        return start + places <= last[:, None]
    else:
        return places <= (last - start)[:, None]


@triton.jit
def _product(a, b: tl.constexpr):
    """(upper, lower) 32 bits of a * b, by one instruction where tl.philox takes two."""
    product = a.to(tl.uint64) * b
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def _philox(seed, a, b, c, d):
    """Philox-4x32-7 of the counter (a, b, c, d), four numbers for each: what tl.philox gives."""
    key, other_key = seed.to(tl.uint32), (seed.to(tl.uint64) >> 32).to(tl.uint32)
    a, b, c, d = a.to(tl.uint32), b.to(tl.uint32), c.to(tl.uint32), d.to(tl.uint32)
    for _ in tl.static_range(7):
        upper, lower = _product(c, 0xCD9E8D57)
        other_upper, other_lower = _product(a, 0xD2511F53)
        a, b, c, d = upper ^ b ^ key, lower, other_upper ^ d ^ other_key, other_lower
        key += 0x9E3779B9
        other_key += 0xBB67AE85
    return a, b, c, d


@triton.jit
def _compare_halves(words, threshold):
    """In bits 15 and 31: whether the lower, and the upper, half of a word reaches the threshold, below 2^16.

    Without their top bits, a half reaches it where 2^15 + half - threshold does not borrow. The top bits decide where
    they differ: only one of half and difference has to say yes if the threshold's is 0, both if it is 1.
    """
    difference = (words | 0x80008000) - tl.cast(threshold & 0x7FFF, tl.uint32) * 0x10001
    one_suffices = tl.cast(threshold >> 15, tl.uint32) - 1  # all bits, or none
    return (words & difference) | ((words | difference) & one_suffices)


@triton.jit
def _kept_of_groups(seed, heads, queries, groups, threshold, keep_scale, BLOCK_K: tl.constexpr):
    """[rows, BLOCK_K]: keep_scale where dropout keeps, else 0.

    heads and queries [rows, 1], groups of 8 keys [1, BLOCK_K // 8]. The eight answers of a group are bits of one number
    when they go to the threads that hold the scores.
    """
    zeros = tl.zeros([queries.shape[0], BLOCK_K // 8], tl.int32)
    a, b, c, d = _philox(seed, zeros + groups, zeros + queries, zeros + heads, zeros)
    bits = _compare_halves(a, threshold)
    bits = (bits & 0xBFFFBFFF) | ((_compare_halves(c, threshold) >> 1) & 0x40004000)
    bits = (bits & 0xDFFFDFFF) | ((_compare_halves(b, threshold) >> 2) & 0x20002000)
    bits = (bits & 0xEFFFEFFF) | ((_compare_halves(d, threshold) >> 3) & 0x10001000)
    # Changes nothing. Where a sum stands in the way, Triton moves the bits between threads; without it each thread
    # would make all the random numbers again that it needs a part of.
    bits = tl.sum(bits[:, None, :], axis=1)
    keys = tl.arange(0, 8)
    bit = (0x8000 >> (keys // 2)) << (keys % 2 * 16)
    kept = bits.to(tl.int32)[:, :, None] & bit[None, None, :]
    return tl.where(tl.reshape(kept, [queries.shape[0], BLOCK_K]) != 0, keep_scale, 0.0)


@triton.jit
def _kept(seed, head, queries, first_key, threshold, keep_scale, BLOCK_K: tl.constexpr):
    """[len(queries), BLOCK_K] of one head: keep_scale where dropout keeps, else 0; first_key is a multiple of 8."""
    groups = first_key // 8 + tl.arange(0, BLOCK_K // 8)
    return _kept_of_groups(seed, head, queries[:, None], groups[None, :], threshold, keep_scale, BLOCK_K)


@triton.jit
def _exp(s, scale, shift, PRECISE: tl.constexpr):
    """exp(s * scale + shift), which for fp16 and bf16 come in base 2 already: one instruction less an element.

    For fp32 the factor comes last, where its rounding weighs as the small exponent does and not as the large score.
    """
    exponent = fma(s, scale, shift)
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
    s, peak, total, queries, last, start, scale, seed, head, threshold,
    DROPOUT: tl.constexpr, PRECISE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """(p, alpha, maximum, sum) of a tile of scores: p relative to the new maximum, alpha that of what came before."""
    if MASKED:
        s = tl.where(_sees(last, start, s.shape[1]), s, float("-inf"))
    highest = tl.maximum(peak, tl.max(s, axis=1) * scale)
    base = highest
    if MASKED:  # a query that has seen no key yet must not get inf - inf
        base = tl.where(highest == float("-inf"), 0.0, highest)
    p = _exp(s, scale, -base[:, None], PRECISE)
    alpha = _exp(peak, 1.0, -base, PRECISE)
    total = total * alpha + tl.sum(p, axis=1)
    if DROPOUT:
        p *= _kept(seed, head, queries, start, threshold, 1.0, s.shape[1])  # keep_scale comes at the end
    return p, alpha, highest, total


@triton.jit
def _attend(
    state, q, queries, last, start, keys, values, k_offsets, v_offsets, k_stride, v_stride,
    k_len, scale, seed, head, threshold,
    D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr, OVERLAP: tl.constexpr,
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
        s, peak, total, queries, last, start, scale, seed, head, threshold,
        DROPOUT, q.dtype == tl.float32, MASKED,
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
    last = _last_seen(queries, k_len, query_offset, IS_CAUSAL)
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
            s, peak, total, queries, last, 0, exponent_scale, seed, head, threshold,
            DROPOUT, q.dtype == tl.float32, True,
        )  # fmt: skip
        state = (acc, peak, total, cast(p, q.dtype))
        begin = BLOCK_K
        full = tl.maximum(full, BLOCK_K)
    if IS_CAUSAL or EVEN:
        for start in range(begin, full, BLOCK_K):
            state = _attend(
                state, q, queries, last, start, keys, values, k_offsets, v_offsets, k_stride, v_stride,
                k_len, exponent_scale, seed, head, threshold,
                D, BLOCK_K, BLOCK_D, DROPOUT, PRECISION, False, OVERLAP,
            )  # fmt: skip
    if IS_CAUSAL or not EVEN:
        for start in range(full, end, BLOCK_K):
            state = _attend(
                state, q, queries, last, start, keys, values, k_offsets, v_offsets, k_stride, v_stride,
                k_len, exponent_scale, seed, head, threshold,
                D, BLOCK_K, BLOCK_D, DROPOUT, PRECISION, True, OVERLAP,
            )  # fmt: skip
    if OVERLAP:  # the last tile's product; where nothing is seen one of zeros, as 0 times an infinite value is NaN
        acc, peak, total, p = state
        place = tl.where(end > 0, (end - 1) // BLOCK_K * BLOCK_K, k_len)
        v = _load(values, place, v_offsets, v_stride, k_len, D, BLOCK_K, BLOCK_D, True)
        acc = dot(p, v, acc, PRECISION)
    else:
        acc, peak, total = state

    # zeros where no key is seen; a sum that is zero all the same, of scores beyond what fp32 tells apart, makes NaN
    total = tl.where(peak == float("-inf"), 1.0, total)
    acc *= (keep_scale / total)[:, None]
    _store(out_ptr, first, _offsets(BLOCK_Q, BLOCK_D, o_stride), o_stride, q_len, acc, D, BLOCK_Q, BLOCK_D)
    if q.dtype == tl.float32:
        lse = peak + tl.log(total)
    else:
        lse = (peak + tl.log2(total)) / LOG2_E
    tl.store(lse_ptr + head.to(tl.int64) * q_len + queries, lse, mask=queries < q_len)


@triton.jit
def _load_shift(lse_ptr, queries, q_len, PRECISE: tl.constexpr):
    """-lse as _exp takes it; -inf, which makes p zero, for a query that sees no key (lse = -inf) or is beyond q_len."""
    lse = tl.load(lse_ptr + queries, mask=queries < q_len, other=float("inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    return -lse if PRECISE else lse * -LOG2_E


@triton.jit
def _query_gradient(
    dq, q, dout, shift, delta, queries, last, start, keys, values, k_offsets, v_offsets, k_stride, v_stride,
    k_len, scale, seed, head, threshold, keep_scale,
    D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dq of a tile of queries plus what one tile of keys gives, without the factor `scale`."""
    k = _load(keys, start, k_offsets, k_stride, k_len, D, BLOCK_K, BLOCK_D, MASKED)
    v = _load(values, start, v_offsets, v_stride, k_len, D, BLOCK_K, BLOCK_D, MASKED)
    zeros = tl.zeros([q.shape[0], BLOCK_K], tl.float32)
    p = _exp(dot(q, tl.trans(k), zeros, PRECISION), scale, shift[:, None], q.dtype == tl.float32)
    dp = dot(dout, tl.trans(v), zeros, PRECISION)
    if MASKED:
        p = tl.where(_sees(last, start, BLOCK_K), p, 0.0)
    if DROPOUT:
        dp *= _kept(seed, head, queries, start, threshold, keep_scale, BLOCK_K)
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
    query_ptr, key_ptr, value_ptr, out_ptr, grad_ptr, lse_ptr, grad_lse_ptr, seed_ptr, statistics_ptr, dquery_ptr,
    q_stride_b, q_stride_h, q_stride, k_stride_b, k_stride_h, k_stride, v_stride_b, v_stride_h, v_stride,
    o_stride_b, o_stride_h, o_stride, g_stride_b, g_stride_h, g_stride, dq_stride_b, dq_stride_h, dq_stride,
    n_head, group, q_len, k_len, query_offset, exponent_scale, scale, threshold, keep_scale,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_Q queries of one head: their dquery, and for the other kernel their (shift, delta)."""
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
    last = _last_seen(queries, k_len, query_offset, IS_CAUSAL)
    q = _matrix(query_ptr, q_len, q_stride, D, BLOCK_Q, BLOCK_D, DESCRIPTORS)
    q = _load(q, first, _offsets(BLOCK_Q, BLOCK_D, q_stride), q_stride, q_len, D, BLOCK_Q, BLOCK_D, True)
    dout = _matrix(grad_ptr, q_len, g_stride, D, BLOCK_Q, BLOCK_D, DESCRIPTORS)
    dout = _load(dout, first, _offsets(BLOCK_Q, BLOCK_D, g_stride), g_stride, q_len, D, BLOCK_Q, BLOCK_D, True)
    out = _load(out_ptr, first, _offsets(BLOCK_Q, BLOCK_D, o_stride), o_stride, q_len, D, BLOCK_Q, BLOCK_D, True)
    delta = _delta(out, dout, queries < q_len)
    rows = head.to(tl.int64) * q_len
    if grad_lse_ptr is not None:
        delta -= tl.load(grad_lse_ptr + rows + queries, mask=queries < q_len, other=0.0)
    shift = _load_shift(lse_ptr + rows, queries, q_len, q.dtype == tl.float32)
    pairs = statistics_ptr + (rows + queries) * 2
    tl.store(pairs, shift, mask=queries < q_len)
    tl.store(pairs + 1, delta, mask=queries < q_len)
    dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    full, end = _key_range(first, q_len, k_len, query_offset, BLOCK_Q, BLOCK_K, IS_CAUSAL, EVEN)
    if IS_CAUSAL or EVEN:
        for start in range(0, full, BLOCK_K):
            dq = _query_gradient(
                dq, q, dout, shift, delta, queries, last, start, keys, values, k_offsets, v_offsets, k_stride,
                v_stride, k_len, exponent_scale, seed, head, threshold, keep_scale,
                D, BLOCK_K, BLOCK_D, DROPOUT, PRECISION, False,
            )  # fmt: skip
    if IS_CAUSAL or not EVEN:
        for start in range(full, end, BLOCK_K):
            dq = _query_gradient(
                dq, q, dout, shift, delta, queries, last, start, keys, values, k_offsets, v_offsets, k_stride,
                v_stride, k_len, exponent_scale, seed, head, threshold, keep_scale,
                D, BLOCK_K, BLOCK_D, DROPOUT, PRECISION, True,
            )  # fmt: skip
    _store(dquery_ptr, first, _offsets(BLOCK_Q, BLOCK_D, dq_stride), dq_stride, q_len, dq * scale, D, BLOCK_Q, BLOCK_D)


@triton.jit
def _load_statistics(statistics_ptr, start, q_len, BLOCK_Q: tl.constexpr, COPIES: tl.constexpr, MASKED: tl.constexpr):
    """(shift, delta) of the BLOCK_Q queries from `start` on, zeros beyond q_len.

    Each number is loaded COPIES times, and one copy used. A load of fewer numbers than a program has threads counts as
    cheap for Triton, which then has each thread load whatever it will need: 16 loads, with an address each, for one.
    """
    statistics_ptr += tl.cast(start, tl.int64) * 2
    queries = tl.arange(0, BLOCK_Q)[None, :, None]
    places = statistics_ptr + tl.zeros([COPIES, 1, 1], tl.int32) + queries * 2 + tl.arange(0, 2)[None, None]
    if MASKED:
        pairs = tl.load(places, mask=start + queries < q_len, other=0.0)
    else:
        pairs = tl.load(places)
    pairs = tl.permute(pairs, (1, 2, 0))
    if COPIES >= 4:
        pairs, _ = tl.split(tl.reshape(pairs, [BLOCK_Q, 2, COPIES // 2, 2]))
    if COPIES >= 2:
        pairs, _ = tl.split(pairs)
    else:
        pairs = tl.reshape(pairs, [BLOCK_Q, 2])
    return tl.split(pairs)


@triton.jit
def _key_gradients(
    dk, dv, k, v, keys, first, start, q_matrix, g_matrix, statistics_ptr, q_offsets, g_offsets, q_stride, g_stride,
    q_len, query_offset, scale, seed, head, threshold, keep_scale,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    COPIES: tl.constexpr, EVEN: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr, MASKED_ROWS: tl.constexpr,
):  # fmt: skip
    """dk (without the factor `scale`) and dv of a tile of keys plus what one tile of queries gives.

    Scores stand transposed, keys as rows, so that p^T and ds^T enter their products from registers. A query beyond
    q_len is zeros, and so are its dout and its ds; a key beyond k_len only spoils its own row, which is not stored.
    """
    queries = start + tl.arange(0, BLOCK_Q)
    q = _load(q_matrix, start, q_offsets, q_stride, q_len, D, BLOCK_Q, BLOCK_D, MASKED_ROWS)
    dout = _load(g_matrix, start, g_offsets, g_stride, q_len, D, BLOCK_Q, BLOCK_D, MASKED_ROWS)
    shift, delta = _load_statistics(statistics_ptr, start, q_len, BLOCK_Q, COPIES, MASKED_ROWS)
    zeros = tl.zeros([BLOCK_K, BLOCK_Q], tl.float32)
    p = _exp(dot(k, tl.trans(q), zeros, PRECISION), scale, shift[None, :], q.dtype == tl.float32)
    if MASKED:
        if EVEN:  # tiles lie within q_len or beyond it
            first_query = tl.where(start < q_len, keys - query_offset - start, BLOCK_Q)
        else:
            first_query = keys - query_offset - start
        seen = first_query[:, None] <= tl.arange(0, BLOCK_Q)[None, :]
        if not EVEN:
            seen = seen & (queries < q_len)[None, :]
        p = tl.where(seen, p, 0.0)
    dp = dot(v, tl.trans(dout), zeros, PRECISION)
    dropped = p
    if DROPOUT:
        kept = tl.trans(_kept(seed, head, queries, first, threshold, keep_scale, BLOCK_K))
        dropped = p * kept
        dp *= kept
    dv = dot(cast(dropped, dout.dtype), dout, dv, PRECISION)
    ds = p * (dp - delta[None, :])
    dk = dot(cast(ds, q.dtype), q, dk, PRECISION)
    return dk, dv


@triton.jit
def _attention_backward_key(
    query_ptr, key_ptr, value_ptr, grad_ptr, seed_ptr, statistics_ptr, dkey_ptr, dvalue_ptr,
    q_stride_b, q_stride_h, q_stride, k_stride_b, k_stride_h, k_stride, v_stride_b, v_stride_h, v_stride,
    g_stride_b, g_stride_h, g_stride, dk_stride_b, dk_stride_h, dk_stride, dv_stride_b, dv_stride_h, dv_stride,
    n_head, group, q_len, k_len, query_offset, exponent_scale, scale, threshold, keep_scale,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr, DESCRIPTORS: tl.constexpr,
    COPIES: tl.constexpr,
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
        head_statistics_ptr = statistics_ptr + head.to(tl.int64) * q_len * 2
        lowest = 0
        if IS_CAUSAL:
            # From the first query that sees a key of the tile, BLOCK_K queries see it in part. The trip count is a
            # constant: with a dynamic one, Triton 3.6 has ptxas serialise the tensor cores (advisory C7515).
            lowest = tl.maximum(first - query_offset, 0)
            for step in range(0, BLOCK_K // BLOCK_Q):
                dk, dv = _key_gradients(
                    dk, dv, k, v, keys, first, lowest + step * BLOCK_Q, q_matrix, g_matrix,
                    head_statistics_ptr, q_offsets, g_offsets, q_stride, g_stride,
                    q_len, query_offset, exponent_scale, seed, head, threshold, keep_scale,
                    D, BLOCK_Q, BLOCK_K, BLOCK_D, COPIES, EVEN, DROPOUT, PRECISION, True, True,
                )  # fmt: skip
            lowest += BLOCK_K
        for start in range(lowest, q_len, BLOCK_Q):
            dk, dv = _key_gradients(
                dk, dv, k, v, keys, first, start, q_matrix, g_matrix, head_statistics_ptr,
                q_offsets, g_offsets, q_stride, g_stride,
                q_len, query_offset, exponent_scale, seed, head, threshold, keep_scale,
                D, BLOCK_Q, BLOCK_K, BLOCK_D, COPIES, EVEN, DROPOUT, PRECISION, False, not EVEN,
            )  # fmt: skip
    dk_offsets = _offsets(BLOCK_K, BLOCK_D, dk_stride)
    dv_offsets = _offsets(BLOCK_K, BLOCK_D, dv_stride)
    _store(dkey_ptr, first, dk_offsets, dk_stride, k_len, dk * scale, D, BLOCK_K, BLOCK_D)
    _store(dvalue_ptr, first, dv_offsets, dv_stride, k_len, dv, D, BLOCK_K, BLOCK_D)
