"""Attention of one new token to a cache: softmax(scale * q K^T) V over the slots of K and V that are filled.

One query a head leaves B * H programs, too few for a GPU, while each would walk thousands of keys alone. So the
keys of a sequence are dealt out to several programs, the splits (flash-decoding). Split i keeps, of its own keys,

    m_i = max(s)      l_i = sum(exp(s - m_i))      o_i = sum(exp(s - m_i) * v),      s = scale * q k^T

and as exp(s - m) = exp(s - m_i) * exp(m_i - m), a second kernel has the softmax over all keys from these alone:

    m = max(m_i)      out = sum(exp(m_i - m) * o_i) / sum(exp(m_i - m) * l_i)

added in the order of the splits, no atomics. Keeping m_i and l_i apart, instead of their m_i + log(l_i), spares the
rounding of a large logarithm. How many splits there are depends on shapes and on the device only; how many keys
each gets, on the sequence's length, which only the kernels read: nothing synchronises, and a CUDA graph stays
right when the lengths change. Splits that get no keys leave at once and are not read. With one split there is no
second kernel.

Query heads that share a key head (GQA) share a program, as the rows of a tensor core's tile, so that every key and
value is read once. A head that has its keys to itself would fill one such row of 16: it runs without matrix products.

4 T D operations a head and 2 T D elements read a key head, T filled slots: with 16-bit caches one operation a byte for
every head of the group, far below what a GPU can do. Bandwidth is the bound. Nothing is saved: there is no backward.

Dao, Haziza, Massa, Sizov, "Flash-Decoding for long-context inference" (2023), https://pytorch.org/blog/flash-decoding/.
Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018), https://arxiv.org/abs/1805.02867.
"""

import functools

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from kernels import reference
from kernels.attention import positive_scale, scale_of
from kernels.attention_kernels import _attend, _exp, _head, _last_seen, _load, _offsets, _store
from kernels.attention_plan import exponent_scale, kind_of, precision
from kernels.device import Device, allow_tf32
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
def _share(lengths_ptr, batch, length_stride, t_max, n_splits, BLOCK_K: tl.constexpr):
    """(filled, chunk, valid): the slots to read, those a split gets, and whether the length was one.

    The tiles that are filled are dealt out evenly, so a long cache with little in it keeps as many programs busy as it
    has tiles. A length that the cache cannot have counts as 0: nothing is read.
    """
    length = tl.load(lengths_ptr + batch.to(tl.int64) * length_stride)
    valid = (length >= 0) & (length <= t_max)
    filled = tl.where(valid, length, 0).to(tl.int32)
    chunk = tl.cdiv(tl.cdiv(filled, BLOCK_K), n_splits) * BLOCK_K
    return filled, chunk, valid


@triton.jit
def _attend_single(
    acc, peak, total, q, start, key_ptr, value_ptr, k_offsets, v_offsets, k_stride, v_stride, end, scale,
    PRECISE: tl.constexpr, D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of keys into the running output, maximum and sum of each of its rows."""
    k = _load(key_ptr, start, k_offsets, k_stride, end, D, BLOCK_K, BLOCK_D, MASKED)
    v = _load(value_ptr, start, v_offsets, v_stride, end, D, BLOCK_K, BLOCK_D, MASKED)
    s = tl.sum(k.to(tl.float32) * q, axis=1)
    if MASKED:
        s = tl.where(start + tl.arange(0, BLOCK_K) < end, s, float("-inf"))
    highest = tl.maximum(peak, s * scale)
    base = tl.where(highest == float("-inf"), 0.0, highest)  # no inf - inf in a row that has had no key yet
    p = _exp(s, scale, -base, PRECISE)
    alpha = _exp(peak, 1.0, -base, PRECISE)
    acc = acc * alpha[:, None] + p[:, None] * v.to(tl.float32)
    return acc, highest, total * alpha + p


@triton.jit
def _decode_single(
    query_ptr, key_cache_ptr, value_cache_ptr, lengths_ptr, out_ptr, partial_ptr, peak_ptr, total_ptr,
    q_stride_b, q_stride_h, k_stride_b, k_stride_h, k_stride, v_stride_b, v_stride_h, v_stride,
    length_stride, n_head, n_splits, t_max, exponent_scale,
    D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program owns one split of one head that shares its keys with no other.

    Each of the BLOCK_K rows of a tile keeps a maximum, sum and output of its own, merged once at the end: threads
    that hold different rows never wait for each other.
    """
    split = tl.program_id(0) % n_splits
    head = tl.program_id(0) // n_splits
    filled, chunk, valid = _share(lengths_ptr, head // n_head, length_stride, t_max, n_splits, BLOCK_K)
    first = split * chunk
    if partial_ptr is not None:
        if first >= filled:
            return
    end = tl.minimum(first + chunk, filled)
    key_ptr = _head(key_cache_ptr, head, n_head, 1, k_stride_b, k_stride_h)
    value_ptr = _head(value_cache_ptr, head, n_head, 1, v_stride_b, v_stride_h)
    k_offsets = _offsets(BLOCK_K, BLOCK_D, k_stride)
    v_offsets = _offsets(BLOCK_K, BLOCK_D, v_stride)
    PRECISE: tl.constexpr = query_ptr.dtype.element_ty == tl.float32

    columns = tl.arange(0, BLOCK_D)
    q_ptr = _head(query_ptr, head, n_head, 1, q_stride_b, q_stride_h)
    q = tl.load(q_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
    acc = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_K], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_K], tl.float32)
    full = first + tl.maximum(end - first, 0) // BLOCK_K * BLOCK_K
    for start in tl.range(first, full, BLOCK_K, num_stages=STAGES):
        acc, peak, total = _attend_single(
            acc, peak, total, q, start, key_ptr, value_ptr, k_offsets, v_offsets, k_stride, v_stride, end,
            exponent_scale, PRECISE, D, BLOCK_K, BLOCK_D, False,
        )  # fmt: skip
    if full < end:
        acc, peak, total = _attend_single(
            acc, peak, total, q, full, key_ptr, value_ptr, k_offsets, v_offsets, k_stride, v_stride, end,
            exponent_scale, PRECISE, D, BLOCK_K, BLOCK_D, True,
        )  # fmt: skip

    highest = tl.max(peak, axis=0)
    weight = _exp(peak, 1.0, -tl.where(highest == float("-inf"), 0.0, highest), PRECISE)
    total = tl.sum(total * weight, axis=0)
    acc = tl.sum(acc * weight[:, None], axis=0)
    if partial_ptr is not None:
        place = head.to(tl.int64) * n_splits + split
        tl.store(partial_ptr + place * D + columns, acc, mask=columns < D)
        tl.store(peak_ptr + place, highest)
        tl.store(total_ptr + place, total)
    else:
        out = acc / tl.where(highest == float("-inf"), 1.0, total)
        out = cast(tl.where(valid, out, float("nan")), out_ptr.dtype.element_ty)
        tl.store(out_ptr + head.to(tl.int64) * D + columns, out, mask=columns < D)


@triton.jit
def _decode_group(
    query_ptr, key_cache_ptr, value_cache_ptr, lengths_ptr, out_ptr, partial_ptr, peak_ptr, total_ptr,
    q_stride_b, q_stride_h, k_stride_b, k_stride_h, k_stride, v_stride_b, v_stride_h, v_stride,
    length_stride, n_head, n_splits, t_max, exponent_scale, group,
    D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program owns one split of BLOCK_H query heads of a key head's group; most groups are one such block."""
    split = tl.program_id(0) % n_splits
    blocks = tl.cdiv(group, BLOCK_H)
    key_head = tl.program_id(0) // n_splits // blocks  # the group's first head of all is key_head * group
    member = tl.program_id(0) // n_splits % blocks * BLOCK_H
    n_key_head = n_head // group
    batch, place_in_batch = key_head // n_key_head, key_head % n_key_head
    filled, chunk, valid = _share(lengths_ptr, batch, length_stride, t_max, n_splits, BLOCK_K)
    first = split * chunk
    if partial_ptr is not None:
        if first >= filled:
            return
    end = tl.minimum(first + chunk, filled)
    query_ptr += batch.to(tl.int64) * q_stride_b + (place_in_batch * group).to(tl.int64) * q_stride_h
    key_ptr = key_cache_ptr + batch.to(tl.int64) * k_stride_b + place_in_batch.to(tl.int64) * k_stride_h
    value_ptr = value_cache_ptr + batch.to(tl.int64) * v_stride_b + place_in_batch.to(tl.int64) * v_stride_h
    k_offsets = _offsets(BLOCK_K, BLOCK_D, k_stride)
    v_offsets = _offsets(BLOCK_K, BLOCK_D, v_stride)

    q_offsets = _offsets(BLOCK_H, BLOCK_D, q_stride_h)
    q = _load(query_ptr, member, q_offsets, q_stride_h, group, D, BLOCK_H, BLOCK_D, True)
    members = member + tl.arange(0, BLOCK_H)
    last = _last_seen(members, end, 0, False)
    acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    for start in tl.range(first, end, BLOCK_K, num_stages=STAGES):
        acc, peak, total = _attend(
            (acc, peak, total), q, members, last, start, key_ptr, value_ptr, k_offsets, v_offsets, k_stride, v_stride,
            end, exponent_scale, 0, 0, 0,
            D, BLOCK_K, BLOCK_D, False, PRECISION, True, False,
        )  # fmt: skip

    if partial_ptr is not None:
        place = key_head.to(tl.int64) * group * n_splits + split
        offsets = _offsets(BLOCK_H, BLOCK_D, n_splits * D)
        _store(partial_ptr + place * D, member, offsets, n_splits * D, group, acc, D, BLOCK_H, BLOCK_D)
        places = place + members.to(tl.int64) * n_splits
        tl.store(peak_ptr + places, peak, mask=members < group)
        tl.store(total_ptr + places, total, mask=members < group)
    else:
        out = acc / tl.where(peak == float("-inf"), 1.0, total)[:, None]
        out = tl.where(valid, out, float("nan"))
        out_ptr += key_head.to(tl.int64) * group * D
        _store(out_ptr, member, _offsets(BLOCK_H, BLOCK_D, D), D, group, out, D, BLOCK_H, BLOCK_D)


@triton.jit
def _decode_merge(
    partial_ptr, peak_ptr, total_ptr, lengths_ptr, out_ptr, length_stride, n_head, n_splits, t_max,
    D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program owns one head: its splits' maxima, sums and outputs, BLOCK_S of them at a time, in order."""
    head = tl.program_id(0)
    filled, chunk, valid = _share(lengths_ptr, head // n_head, length_stride, t_max, n_splits, BLOCK_K)
    used = tl.cdiv(filled, tl.maximum(chunk, 1))  # the splits that got keys; the others have written nothing
    PRECISE: tl.constexpr = out_ptr.dtype.element_ty == tl.float32
    first = head.to(tl.int64) * n_splits
    columns = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    total = 0.0
    peak = float("-inf")
    for start in range(0, used, BLOCK_S):
        splits = start + tl.arange(0, BLOCK_S)
        there = splits < used
        peaks = tl.load(peak_ptr + first + splits, mask=there, other=float("-inf"))
        totals = tl.load(total_ptr + first + splits, mask=there, other=0.0)
        places = (first + splits)[:, None] * D + columns[None, :]
        outputs = tl.load(partial_ptr + places, mask=there[:, None] & (columns < D)[None, :], other=0.0)
        highest = tl.maximum(peak, tl.max(peaks, axis=0))
        base = tl.where(highest == float("-inf"), 0.0, highest)
        weight = _exp(peaks, 1.0, -base, PRECISE)
        alpha = _exp(peak, 1.0, -base, PRECISE)
        total = total * alpha + tl.sum(totals * weight, axis=0)
        acc = acc * alpha + tl.sum(outputs * weight[:, None], axis=0)
        peak = highest
    out = acc / tl.where(peak == float("-inf"), 1.0, total)
    out = cast(tl.where(valid, out, float("nan")), out_ptr.dtype.element_ty)
    tl.store(out_ptr + head.to(tl.int64) * D + columns, out, mask=columns < D)


# ---------------------------------------------------------------- plan

PER_PROCESSOR = 2  # programs that a processor needs to keep its share of the memory busy
LEAST = 8192  # elements of each cache, below which a split is not worth its place in the merge
KEYS_A_ROW = 8  # and keys for each query head: partial results are a quarter of 16-bit keys and values at most
MOST = 256  # splits
TILE = 64  # keys that a program walks at a time, more or less
NEAR = 0.9  # as fast as the best number of splits, see _splits

# (BLOCK_K, warps, stages) of _decode_group by architecture, kind of product and padded head size, as in
# attention_plan.py.
GROUP = {
    "sm_80": {
        "half": {64: (64, 4, 4), 128: (64, 4, 3), 256: (32, 4, 3)},
        "tf32": {64: (64, 4, 2), 128: (32, 4, 2), 256: (16, 4, 2)},
        "ieee": {64: (32, 8, 2), 128: (16, 8, 3), 256: (16, 8, 2)},
    },
    "gfx942": {
        "half": {64: (64, 4, 1), 128: (64, 4, 1), 256: (32, 4, 1)},
        "tf32": {64: (64, 4, 1), 128: (32, 4, 1), 256: (16, 4, 1)},
        "ieee": {64: (32, 4, 1), 128: (32, 4, 1), 256: (16, 4, 1)},
    },
}
GROUP["sm_89"] = GROUP["sm_90"] = GROUP["sm_100"] = GROUP["sm_80"]


@functools.lru_cache(maxsize=4096)
def _splits(programs: int, t_max: int, size: int, group: int, processors: int) -> int:
    """Into how many to split each of `programs`: the fewest that take hardly longer than the best number would.

    Time is the waves of programs, PER_PROCESSOR * processors at once, times the tiles that each walks of a full cache.
    """
    least = max(LEAST // size, KEYS_A_ROW * group)
    most = max(1, min(MOST, t_max // least))
    times = [
        cdiv(programs * splits, PER_PROCESSOR * processors) * cdiv(t_max, TILE * splits)
        for splits in range(1, most + 1)
    ]
    return 1 + next(place for place, time in enumerate(times) if NEAR * time <= min(times))


def _rows(group: int, size: int, dtype: torch.dtype) -> int:
    """Query heads of a program: 16 or more for tensor cores, not more than leave its outputs in registers."""
    most = 64 if dtype != torch.float32 and size <= 128 else 32
    return max(16, min(most, next_power_of_2(group)))


def _group(query, key_cache) -> int:
    """Query heads to a key head."""
    return query.shape[1] // max(1, key_cache.shape[1])


def plan_forward(specs: Specs, options: dict, device: Device) -> list[Launch]:
    batch, n_head, _, size = specs["query"].shape
    n_key_head, t_max = specs["key_cache"].shape[1:3]
    group, splits = _group(specs["query"], specs["key_cache"]), options["splits"]
    block_d = max(16, next_power_of_2(size))
    interpreter = device.arch == "interpreter"  # its cost is per program

    arguments = pointers(
        specs, "query", "key_cache", "value_cache", "lengths", "out", "partial", "peak", "total"
    )  # fmt: skip
    arguments |= {"q_stride_b": specs["query"].stride[0], "q_stride_h": specs["query"].stride[1]}
    for prefix, name in (("k", "key_cache"), ("v", "value_cache")):
        stride_b, stride_h, stride, _ = specs[name].stride
        arguments |= {f"{prefix}_stride_b": stride_b, f"{prefix}_stride_h": stride_h, f"{prefix}_stride": stride}
    shared = {"length_stride": specs["lengths"].stride[0], "n_head": n_head, "n_splits": splits, "t_max": t_max}
    arguments |= shared | {"exponent_scale": exponent_scale(specs["query"], options)}
    constexprs = {"D": size}

    if group == 1:
        # 32 elements a thread, so that outputs, keys and values stay in registers
        block_k, warps, stages = 4096 // block_d, 4, 3 if specs["query"].dtype == torch.float32 else 4
        if device.tiles == "gfx942":
            stages = 1
        if interpreter:
            block_k = 128
        kernel, programs = _decode_single, batch * n_head
        constexprs |= {"BLOCK_K": block_k, "BLOCK_D": block_d, "STAGES": stages}
    else:
        if interpreter:
            block_k, warps, stages = 128, 4, 1
        else:
            block_k, warps, stages = GROUP[device.tiles][kind_of(specs["query"], options)][max(64, block_d)]
        rows = _rows(group, size, specs["query"].dtype)
        kernel, programs = _decode_group, batch * n_key_head * cdiv(group, rows)
        arguments |= {"group": group}
        constexprs |= {"BLOCK_H": rows, "BLOCK_K": block_k, "BLOCK_D": block_d, "STAGES": stages}
        constexprs |= {"PRECISION": precision(options)}
    launches = [Launch(kernel, (programs * splits,), arguments, constexprs, warps, stages)]
    if splits > 1:
        arguments = pointers(specs, "partial", "peak", "total", "lengths", "out") | shared
        constexprs = {"D": size, "BLOCK_S": 32 if not interpreter else 256, "BLOCK_K": block_k, "BLOCK_D": block_d}
        launches.append(Launch(_decode_merge, (batch * n_head,), arguments, constexprs, 4, 1))
    return launches


# ---------------------------------------------------------------- registration


def _check_lengths(lengths: torch.Tensor, t_max: int) -> None:
    outside = (lengths < 0) | (lengths > t_max)
    if outside.any():
        wrong = lengths[outside][0].item()
        raise IndexError(f"decode_attention: length {wrong} is out of bounds for caches of {t_max} slots")


def _empty_forward(query):
    return torch.empty_like(query, memory_format=torch.contiguous_format)


def _forward(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """(B, H, 1, D), (B, Hk, Tmax, D) twice, (B,) int32 or int64, scale > 0 -> (B, H, 1, D)."""
    batch, n_head, _, size = query.shape
    n_key_head, t_max = key_cache.shape[1:3]
    if CHECK_VALUES and not lengths.is_meta:
        _check_lengths(lengths, t_max)
    group = _group(query, key_cache)
    programs = batch * n_key_head * cdiv(group, _rows(group, size, query.dtype))
    splits = _splits(programs, t_max, size, group, facts_of(query).processors)
    out = _empty_forward(query)
    tensors = {"query": rows_of(query), "key_cache": rows_of(key_cache), "value_cache": rows_of(value_cache)}
    tensors |= {"lengths": lengths, "out": out}
    if splits > 1:
        tensors["partial"] = query.new_empty((batch, n_head, splits, size), dtype=torch.float32)
        tensors |= {name: query.new_empty((batch, n_head, splits), dtype=torch.float32) for name in ("peak", "total")}
    else:
        tensors |= dict.fromkeys(("partial", "peak", "total"))
    run(plan_forward, tensors, scale=scale, splits=splits, allow_tf32=allow_tf32(query))
    return out


def _no_gradients(ctx, grad):
    raise NotImplementedError(
        "decode_attention has no gradient: for training use scaled_dot_product_attention with is_causal=True and "
        "query_offset; for generation call it under torch.no_grad()"
    )


forward = register("decode_attention", _forward, lambda query, *_: _empty_forward(query), _no_gradients)


def _flops(query_shape, key_shape) -> int:
    """Two products, 2 D operations for each of all Tmax slots: how many are filled is only known on the device."""
    batch, heads, _, size = query_shape
    return 4 * batch * heads * key_shape[2] * size


@register_flop_formula(torch.ops.kernels.decode_attention)
def _forward_flops(query_shape, key_shape, value_shape, lengths_shape, scale, **_) -> int:
    return _flops(query_shape, key_shape)


# ---------------------------------------------------------------- public


def _check(query, key_cache, value_cache, lengths, enable_gqa):
    """Bad arguments raise at once; lengths' values are on the device, see _check_lengths."""
    tensors = {"query": query, "key_cache": key_cache, "value_cache": value_cache}
    for name, tensor in tensors.items():
        if tensor.dim() != 4:
            raise ValueError(f"decode_attention: {name} must be 4-D, (B, H, T, D), got {list(tensor.shape)}")
        if tensor.dtype != query.dtype:
            raise RuntimeError(f"decode_attention: {name} is {tensor.dtype}, query is {query.dtype}")
    batch, heads, q_len, size = query.shape
    if q_len != 1:
        raise NotImplementedError(
            f"decode_attention: one query token a sequence, got {q_len}; for several use "
            "scaled_dot_product_attention with is_causal=True and query_offset"
        )
    if key_cache.shape[0] != batch or key_cache.shape[3] != size or key_cache.shape[:3] != value_cache.shape[:3]:
        raise RuntimeError(
            f"decode_attention: query {list(query.shape)}, key_cache {list(key_cache.shape)} and value_cache "
            f"{list(value_cache.shape)} do not fit together: (B, H, 1, D), (B, Hk, Tmax, D), (B, Hk, Tmax, D)"
        )
    if value_cache.shape[3] != size:
        raise NotImplementedError(
            f"decode_attention: a value head of another size ({value_cache.shape[3]}) than query's ({size})"
        )
    key_heads = key_cache.shape[1]
    if enable_gqa and (key_heads == 0 or heads % key_heads):
        raise RuntimeError(f"decode_attention: {key_heads} key heads must divide the {heads} query heads")
    if not enable_gqa and key_heads != heads:
        raise RuntimeError(f"decode_attention: {key_heads} key heads for {heads} query heads need enable_gqa=True")
    if lengths.dtype not in (torch.int32, torch.int64):
        raise RuntimeError(f"decode_attention: lengths must be int32 or int64, got {lengths.dtype}")
    if lengths.shape != (batch,):
        raise RuntimeError(f"decode_attention: lengths must have shape [{batch}], got {list(lengths.shape)}")


def decode_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Attention of one new token a sequence to caches of keys and values, split over the cache (flash-decoding).

    query (B, H, 1, D), caches (B, Hk, Tmax, D), D from 1 to 256, fp32, fp16 or bf16; lengths (B,), int32 or int64 on
    the same device, how many slots of each sequence are filled, the new token's own among them -> (B, H, 1, D).
    Slots beyond are never read. A length of 0 gives zeros. Hk = H, or with enable_gqa a divisor of it; scale:
    1 / sqrt(D) unless given. The same as scaled_dot_product_attention of the filled slots. Nothing synchronises:
    lengths may change in place between replays of a CUDA graph.

    Any strides; but a cache whose last dimension is not contiguous is copied whole, at every call. Under autocast the
    caches are not cast, which would copy them at every call: query takes their dtype, the result autocast's.

    A length below 0 or above Tmax makes its sequence's result NaN; in the interpreter, and with KERNELS_DEBUG=1, it
    raises IndexError. Raises TypeError for what is no tensor or no number; RuntimeError for shapes, dtypes and devices
    that do not fit together; ValueError for a tensor that is not 4-D or a scale that is not finite; NotImplementedError
    for any other number of query tokens than one (scaled_dot_product_attention with query_offset takes them), a value
    head of another size, D above 256 and other dtypes, inside torch.func's transforms, for forward-mode tangents, and
    in backward, as there is none.

    The method is flash-decoding (Dao et al., 2023).
    """
    tensors = {"query": query, "key_cache": key_cache, "value_cache": value_cache, "lengths": lengths}
    check_tensors("decode_attention", tensors, integers=("lengths",))
    refuse_transforms("decode_attention", query, key_cache, value_cache)
    dtype = autocast_dtype(query.device)
    if dtype is None:
        dtype = query.dtype
    else:
        query = query.to(key_cache.dtype)
    _check(query, key_cache, value_cache, lengths, enable_gqa)
    scale = scale_of("decode_attention", scale, query.shape[-1])
    if scale <= 0.0:
        query, scale = positive_scale(query, scale)
    return forward(query, key_cache, value_cache, lengths, scale).to(dtype)


# ---------------------------------------------------------------- catalogue


def _masked(query, key_cache, value_cache, lengths, *, scale=None, enable_gqa=False):
    """PyTorch's attention under a mask of the slots that are filled; the others are zeroed, as 0 * NaN is NaN."""
    filled = (torch.arange(key_cache.shape[2], device=lengths.device) < lengths[:, None])[:, None, :, None]
    key, value = (cache.masked_fill(~filled, 0.0) for cache in (key_cache, value_cache))
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=filled.transpose(2, 3), scale=scale, enable_gqa=enable_gqa
    )


_filled: dict[str, tuple[int, ...]] = {}  # by the name of a case below: its lengths


def _draw(name: str, shape: tuple[int, ...], case: Case, generator: torch.Generator) -> torch.Tensor | None:
    """Lengths as the case below has them; of other cases at random, empty and full caches among them."""
    if name != "lengths":
        return None
    if case.name in _filled and shape == (len(_filled[case.name]),):
        return torch.tensor(_filled[case.name], dtype=torch.int32)
    return torch.randint(0, case.shapes["key_cache"][2] + 1, shape, generator=generator, dtype=torch.int32)


def _plan(inputs: dict, options: dict, device: Device) -> list[Launch]:
    """The launches of a call; there is no backward pass."""
    query = inputs["query"]
    with plan_only(device) as launches:
        _forward(*inputs.values(), options.get("scale", query.shape[-1] ** -0.5))
    return launches


def _cost(inputs: dict, options: dict) -> tuple[Cost, None]:
    """Two products over all Tmax slots, and both caches read whole: what it costs when they are full."""
    query, key = inputs["query"], inputs["key_cache"]
    return Cost(_flops(query.shape, key.shape), 2 * query.nbytes + 2 * key.nbytes + inputs["lengths"].nbytes), None


def _case(name: str, h: int, t_max: int, d: int, lengths: tuple[int, ...], *, key_heads: int = 0, **options) -> Case:
    _filled[name] = lengths
    batch, cache = len(lengths), (len(lengths), key_heads or h, t_max, d)
    shapes = {"query": (batch, h, 1, d), "key_cache": cache, "value_cache": cache, "lengths": (batch,)}
    return Case(name, shapes, ({"enable_gqa": True} if key_heads else {}) | options)


OP = Op(
    name="decode_attention",
    public=decode_attention,
    reference=reference.decode_attention,
    torch=_masked,
    replaces="`torch.nn.functional.scaled_dot_product_attention` with a mask made of lengths",
    plan=_plan,
    cost=_cost,
    cases=(
        _case("one_element", 1, 1, 1, (1,)),
        _case("nothing", 2, 5, 16, (0, 0)),
        _case("nothing_split", 1, 300, 64, (0,)),
        _case("ragged", 2, 200, 37, (0, 1, 128, 129)),
        _case("prime", 1, 131, 37, (127,)),
        _case("two_tiles", 1, 256, 64, (256,)),
        _case("one_over_a_tile", 1, 257, 64, (129,)),
        _case("mostly_empty", 1, 1000, 64, (3,)),
        _case("long", 1, 1100, 64, (1003,)),
        _case("small_head", 3, 70, 16, (70, 33)),
        _case("wide_head", 1, 200, 128, (150,)),
        _case("widest_head", 1, 100, 256, (97,)),
        _case("pairs", 4, 140, 64, (140, 0, 131), key_heads=2),
        _case("threes", 6, 60, 40, (17, 60), key_heads=2),
        _case("eights", 16, 300, 128, (300,), key_heads=2),
        _case("one_key_head", 20, 150, 32, (149, 1), key_heads=1),
        _case("widest_group", 66, 40, 16, (39,), key_heads=1),
        _case("grouped_widest_head", 4, 100, 256, (99,), key_heads=2),
        _case("scaled", 2, 50, 24, (50,), scale=0.7),
        _case("negative_scale", 2, 50, 24, (50,), scale=-0.3, key_heads=1),
    ),
    sizes=(
        _case("gpt2", 12, 1024, 64, (1024,)),
        _case("gpt2-batch", 12, 1024, 64, (1024,) * 64),
        _case("shakespeare", 6, 256, 64, (256,)),
        _case("d16", 4, 512, 16, (512,)),
        _case("d64-16k", 12, 16384, 64, (16384,)),
        _case("d64-16k-batch", 12, 16384, 64, (16384,) * 64),
        _case("d128-4k", 32, 4096, 128, (4096,)),
        _case("gqa-1k", 32, 1024, 128, (1024,), key_heads=8),
        _case("gqa-16k", 32, 16384, 128, (16384,), key_heads=8),
        _case("gqa-4k-batch", 32, 4096, 128, (4096,) * 64, key_heads=8),
        _case("gqa-d64", 12, 4096, 64, (4096,) * 8, key_heads=4),
        _case("mqa", 32, 16384, 128, (16384,), key_heads=1),
        _case("mqa-d64", 71, 4096, 64, (4096,), key_heads=1),
        _case("mqa-64", 64, 4096, 128, (4096,), key_heads=1),
        _case("d96", 32, 4096, 96, (4096,)),
        _case("d256", 8, 4096, 256, (4096,)),
        _case("gqa-d256", 8, 4096, 256, (4096,) * 4, key_heads=4),
    ),
    differentiable=(),
    draw=_draw,
)
