"""The same functions in plain PyTorch arithmetic, no fused call: what every kernel is held to, and the `eager` backend.

Each works in any floating dtype, on any device, and is differentiable. Sums and statistics of fp16
and bf16 inputs are taken in fp32, as the kernels do. Masks, dtypes and shapes are as in
torch.nn.functional.
"""

import math
from collections.abc import Sequence

import torch


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in the dtype that sums are taken in."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


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
    dropout_mask: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale * query @ key^T) @ value, with the probabilities written out.

    (..., H, Tq, D), (..., Hk, Tk, D), (..., Hk, Tk, Dv) -> (..., H, Tq, Dv) [, lse (..., H, Tq) fp32]. Causal:
    query i sees key j when j <= i + query_offset. A query that sees no key gives zeros and lse -inf.
    Dropout is PyTorch's own on the probabilities, or, given dropout_mask (..., H, Tq, Tk), the
    probabilities times that mask, which is 0 or 1 / (1 - dropout_p).
    """
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], dim=-3)
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = _wide(query @ key.transpose(-2, -1)) * scale
    q_len, k_len = scores.shape[-2:]
    if is_causal:
        seen = torch.ones(q_len, k_len, dtype=torch.bool, device=query.device).tril(query_offset)
        scores = scores.masked_fill(~seen, -torch.inf)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    highest = scores.amax(-1, keepdim=True) if k_len else scores.new_zeros(*scores.shape[:-1], 1)
    highest = highest.detach().masked_fill(highest == -torch.inf, 0.0)
    weights = (scores - highest).exp()
    total = weights.sum(-1, keepdim=True)
    probabilities = weights / total.masked_fill(total == 0, 1.0)
    if dropout_mask is not None:
        probabilities = probabilities * dropout_mask
    elif dropout_p > 0.0:
        probabilities = torch.dropout(probabilities, dropout_p, train=True)
    output = probabilities.to(value.dtype) @ value
    if not return_lse:
        return output
    nothing = total == 0
    lse = highest + total.masked_fill(nothing, 1.0).log().masked_fill(nothing, -torch.inf)
    return output, lse.squeeze(-1).float()


def scaled_dot_product_attention_qkvpacked(
    qkv: torch.Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    return_lse: bool = False,
    dropout_mask: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """scaled_dot_product_attention of the parts of qkv (..., T, 3, H, D): (..., T, H, D) [, lse (..., H, T) fp32]."""
    query, key, value = (part.transpose(-2, -3) for part in qkv.unbind(-3))  # (..., H, T, D) each
    result = scaled_dot_product_attention(
        query, key, value, None, dropout_p, is_causal, scale, return_lse=return_lse, dropout_mask=dropout_mask
    )
    if not return_lse:
        return result.transpose(-2, -3)
    out, lse = result
    return out.transpose(-2, -3), lse


def decode_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Attention of one token (B, H, 1, D) to the first lengths[b] slots of caches (B, Hk, Tmax, D): (B, H, 1, D).

    lengths (B,) from 0, which gives zeros, to Tmax. What lies in the other slots does not matter, NaN neither.
    """
    slots = torch.arange(key_cache.shape[2], device=lengths.device)
    filled = (slots < lengths[:, None])[:, None, :, None]
    key, value = (cache.masked_fill(~filled, 0.0) for cache in (key_cache, value_cache))
    return scaled_dot_product_attention(
        query, key, value, attn_mask=filled.transpose(2, 3), scale=scale, enable_gqa=enable_gqa
    )


def layer_norm(
    input: torch.Tensor,
    normalized_shape: int | Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last len(normalized_shape) dimensions."""
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    dims = tuple(range(-len(shape), 0))
    x = _wide(input)
    centred = x - x.mean(dims, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    return y.to(input.dtype)


def add_layer_norm(
    input: torch.Tensor,
    residual: torch.Tensor,
    normalized_shape: int | Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(layer_norm(input + residual), input + residual), the sum in the dtype that PyTorch's has."""
    total = input + residual
    return layer_norm(total, normalized_shape, weight, bias, eps), total


def reduction_of(size_average: bool | None, reduce: bool | None) -> str:
    """What PyTorch's old arguments say of the reduction; either may be left out, which counts as True."""
    if reduce is not None and not reduce:
        return "none"
    return "mean" if size_average is None or size_average else "sum"


def cross_entropy(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Cross-entropy of logits (C,), (N, C) or (N, C, d1, ...) with class indices (), (N,) or (N, d1, ...).

    With smoothing e: (1 - e) * w_y * (lse - x_y) + e / C * sum over c of w_c * (lse - x_c); "mean"
    divides by the sum of w_y over the targets that are not ignored.
    """
    if size_average is not None or reduce is not None:
        reduction = reduction_of(size_average, reduce)
    classes = 0 if input.dim() == 1 else 1
    logits = _wide(input).movedim(classes, -1)
    n_classes = logits.shape[-1]
    w = torch.ones(n_classes, dtype=logits.dtype, device=logits.device) if weight is None else weight.to(logits.dtype)
    highest = logits.detach().amax(-1, keepdim=True)
    highest = highest.masked_fill(highest == -torch.inf, 0.0)
    lse = (logits - highest).exp().sum(-1, keepdim=True).log() + highest
    kept = target != ignore_index
    index = target.masked_fill(~kept, 0).unsqueeze(-1)
    target_weight = w[index].squeeze(-1)
    loss = (1.0 - label_smoothing) * target_weight * (lse - logits.gather(-1, index)).squeeze(-1)
    if label_smoothing > 0.0:
        loss = loss + label_smoothing / n_classes * (w * (lse - logits)).sum(-1)
    loss = loss.masked_fill(~kept, 0.0)
    if reduction == "none":
        return loss.to(input.dtype)
    total = loss.sum()
    if reduction == "mean":
        divisor = target_weight.masked_fill(~kept, 0.0).sum()
        total = total / divisor
        if label_smoothing > 0.0:  # PyTorch divides the two terms apart: 0 / 0 is one of them
            total = torch.where(divisor == 0.0, torch.nan, total)
    return total.to(input.dtype)


def linear_cross_entropy(
    input: torch.Tensor,
    linear_weight: torch.Tensor,
    target: torch.Tensor,
    *,
    linear_bias: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: object = None,
) -> torch.Tensor:
    """cross_entropy of the logits input @ linear_weight^T + linear_bias, which are written out.

    (..., H), (V, H), (...) -> a number, or with reduction="none" losses (...). ignore_index=None is -100;
    options, PyTorch's way to choose chunks, has nothing to choose here.
    """
    logits = input @ linear_weight.t()
    logits = logits if linear_bias is None else logits + linear_bias
    logits, labels = logits.reshape(-1, linear_weight.shape[0]), target.reshape(-1)
    ignore_index = -100 if ignore_index is None else ignore_index
    options = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing}
    loss = cross_entropy(logits, labels, weight, **options)
    return loss.reshape(target.shape) if reduction == "none" else loss
