"""Scaled dot-product attention: softmax(scale * Q K^T) V without ever writing the scores.

Forward walks the keys in tiles with a running maximum m and sum l of every query's row:

    s = scale * q k^T      m' = max(m, max(s))      p = exp(s - m')
    l' = l * exp(m - m') + sum(p)                   o' = o * exp(m - m') + p v

and ends with o / l and lse = m + log(l), one fp32 number a query. Backward has p = exp(s - lse) again from
saved q, k, v, out and lse, and with delta = sum(out * dout):

    dv = p^T dout     dp = dout v^T     ds = p * (dp - delta)     dq = scale * ds k     dk = scale * ds^T q

A gradient of lse, whose derivative by s is p, is taken from delta.

Two launches, no atomics: programs that own queries write dq and delta, then programs that own keys write
dk and dv, the heads of a group one after another. Causal: query i sees key j when j <= i + query_offset.
Tiles that are seen whole run in a loop without masks.

Forward takes 4 Tq Tk D operations a head (half of it when causal), backward 10 by count and 14 as run here, as
each of the two kernels needs p. Bytes: q, k, v, out once, far below the operations, so matrix products and
exponentials are the bound.

The kernels are in attention_kernels.py, for short sequences in attention_short.py, for Hopper in attention_hopper.py
and attention_hopper_backward.py; attention_plan.py says which are launched, with what tiles.

Dropout keeps an element when its 16 random bits reach the threshold; Philox gives 8 elements a call,
8 keys in a row for one query, by (seed, key // 8, query, batch * H + head), whatever the tiles.

Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018), https://arxiv.org/abs/1805.02867.
Dao, "FlashAttention-2" (2023), https://arxiv.org/abs/2307.08691.
Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011), for Philox.
"""

import math

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from kernels import reference
from kernels.attention_plan import plan_backward, plan_forward
from kernels.device import Device, allow_tf32
from kernels.op import (
    Case,
    Cost,
    Launch,
    Op,
    autocast_dtype,
    check_number,
    check_tensors,
    plan_only,
    refuse_transforms,
    register,
    rows_of,
    run,
)

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
    grad_lse: torch.Tensor | None,
    seed: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    query_offset: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value."""
    gradients = _empty_backward(query, key, value)
    write_gradients(
        gradients, grad, query, key, value, out, lse, grad_lse, seed, dropout_p=dropout_p, is_causal=is_causal,
        scale=scale, query_offset=query_offset,
    )  # fmt: skip
    return gradients


def write_gradients(gradients, grad, query, key, value, out, lse, grad_lse, seed, **options):
    """The gradients of query, key and value into the three tensors `gradients`, of the same shapes and any strides."""
    dquery, dkey, dvalue = gradients
    if not query.shape[1]:  # no query head comes to any key
        dkey.zero_()
        dvalue.zero_()
    tensors = {"query": rows_of(query), "key": rows_of(key), "value": rows_of(value), "out": out}
    tensors |= {"grad": rows_of(grad), "lse": lse, "grad_lse": None if grad_lse is None else grad_lse.contiguous()}
    tensors |= {"seed": seed, "statistics": lse.new_empty((*lse.shape, 2))}
    tensors |= {"dquery": dquery, "dkey": dkey, "dvalue": dvalue}
    run(plan_backward, tensors, **options, allow_tf32=allow_tf32(query))


def _save(ctx, inputs, output):
    query, key, value, seed, *ctx.options = inputs
    out, lse = output
    ctx.save_for_backward(query, key, value, out, lse, seed)


def _gradients(ctx, grad, grad_lse):
    *tensors, out, lse, seed = ctx.saved_tensors
    grad = torch.zeros_like(out) if grad is None else grad
    return *backward(grad, *tensors, out, lse, grad_lse, seed, *ctx.options), None, None, None, None, None


forward = register("attention", _forward, lambda query, *_: _empty_forward(query), _gradients, _save)
backward = register(
    "attention_backward", _backward, lambda grad, query, key, value, *_: _empty_backward(query, key, value)
)


def _flops(query_shape, key_shape, is_causal, query_offset) -> int:
    """The operations of one matrix product: 2 D for each pair of a query and a key that it sees."""

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
    grad_shape, query_shape, key_shape, value_shape, _out, lse_shape, _grad_lse, seed, dropout_p, is_causal, scale,
    query_offset, **_,
) -> int:  # fmt: skip
    return 5 * _flops(query_shape, key_shape, is_causal, query_offset)


# ---------------------------------------------------------------- public

MAX_HEAD_SIZE = 256
SMALLEST = torch.finfo(torch.float32).tiny  # a scale below may be zero in the kernels, and -inf times that is NaN


def check_dropout(op: str, dropout_p: float) -> None:
    check_number(op, "dropout_p", dropout_p)
    if not 0.0 <= dropout_p <= 1.0:
        raise RuntimeError(f"{op}: dropout_p must be in [0, 1], got {dropout_p}")


def scale_of(op: str, scale: float | None, size: int) -> float:
    """The scale for heads of `size`, 1 / sqrt(size) unless given; 0, which no kernel takes, for one next to it.

    Raises NotImplementedError for heads that no kernel has, TypeError or ValueError for what is no finite number.
    """
    if not 1 <= size <= MAX_HEAD_SIZE:
        raise NotImplementedError(f"{op}: head size {size}; the kernel has 1 to {MAX_HEAD_SIZE}")
    if scale is None:
        return 1.0 / math.sqrt(size)
    check_number(op, "scale", scale, finite=True)
    return 0.0 if abs(scale) < SMALLEST else float(scale)


def positive_scale(query: torch.Tensor, scale: float) -> tuple[torch.Tensor, float]:
    """(query, scale) of the same scores for a scale of zero or below: kernels take the maximum before they scale."""
    return (-query, -scale) if scale < 0.0 else (query * 0.0, 1.0)


def _check(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa, query_offset):
    """Errors as PyTorch has them, and NotImplementedError for what PyTorch can do and the kernel cannot."""
    tensors = {"query": query, "key": key, "value": value}
    if attn_mask is not None:
        raise NotImplementedError("scaled_dot_product_attention: attn_mask is not implemented; is_causal is")
    for name, tensor in tensors.items():
        if tensor.dim() < 2:
            raise RuntimeError(f"scaled_dot_product_attention: {name} must be at least 2-D, got {list(tensor.shape)}")
        if tensor.dtype != query.dtype:
            raise RuntimeError(f"scaled_dot_product_attention: {name} is {tensor.dtype}, query is {query.dtype}")
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
    check_dropout("scaled_dot_product_attention", dropout_p)
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
    -inf where no key is seen, with its gradient. The dropout mask comes from PyTorch's generator on the device,
    dropout_p in steps of 2^-16. Under autocast query, key and value are cast to its dtype, as with PyTorch's.

    Raises TypeError for what is no tensor or no number; RuntimeError for shapes, dtypes, devices and options that do
    not fit together; ValueError for a scale that is not finite, with which PyTorch's own kernels give one result or
    another; NotImplementedError for attn_mask, a value head of another size, D above 256 and other dtypes, inside
    torch.func's transforms, for forward-mode tangents, and for second derivatives.

    The method is FlashAttention-2 (Dao, 2023).
    """
    check_tensors("scaled_dot_product_attention", {"query": query, "key": key, "value": value})
    refuse_transforms("scaled_dot_product_attention", query, key, value)
    dtype = autocast_dtype(query.device)
    if dtype is not None:
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    _check(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa, query_offset)
    scale = scale_of("scaled_dot_product_attention", scale, query.shape[-1])

    if enable_gqa:
        lead = _broadcast(query.shape[:-3], key.shape[:-3], value.shape[:-3])
        heads, kv_heads = (*lead, query.shape[-3]), (*lead, key.shape[-3])
    else:
        heads = kv_heads = _broadcast(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    query = _four_dimensions(query, heads)
    key, value = _four_dimensions(key, kv_heads), _four_dimensions(value, kv_heads)

    q_len, k_len, size = query.shape[-2], key.shape[-2], query.shape[-1]
    if scale <= 0.0:
        query, scale = positive_scale(query, scale)
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
        _backward(out, query, key, value, out, lse, None, seed, *common)
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
