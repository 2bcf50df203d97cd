"""Self-attention of q, k and v that lie in one tensor, as the projection of a GPT leaves them; flash-attn's qkvpacked.

    qkv (..., T, 3, H, D) -> softmax(scale * q k^T) v (..., T, H, D)        dqkv (..., T, 3, H, D)

The mathematics, the kernels and their plans are those of attention.py, with q, k and v as views; so are the results,
bit for bit, and the dropout mask of a seed. What differs is the gradient: one tensor, into whose three parts the
backward kernels write. Of three tensors autograd would make that one by a copy: in 16 bits 12 C bytes read and written
a token, C = H D, beside the 16 C that backward must move. Saved for backward: qkv, out, and lse in fp32, one number a
query and head. Forward is 2 products and backward 5, as there.

Dao, "FlashAttention-2" (2023), https://arxiv.org/abs/2307.08691; the layout is that of its qkvpacked functions.
"""

import math

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from kernels import attention, reference
from kernels.device import Device
from kernels.op import (
    Case,
    Cost,
    Launch,
    Op,
    autocast_dtype,
    check_tensors,
    plan_only,
    refuse_transforms,
    register,
    rows_of,
)

# ---------------------------------------------------------------- registration


def _parts(qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Views of (B, T, 3, H, D) as query, key and value, (B, H, T, D) each."""
    return qkv.transpose(1, 3).unbind(2)


def _empty_forward(qkv):
    out, lse = attention._empty_forward(_parts(qkv)[0])
    return out.transpose(1, 2), lse


def _forward(
    qkv: torch.Tensor, seed: torch.Tensor | None, dropout_p: float, is_causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T, 3, H, D), scale > 0 -> out (B, T, H, D), contiguous, and lse fp32 (B, H, T)."""
    out, lse = attention._forward(*_parts(rows_of(qkv)), seed, dropout_p, is_causal, scale, 0)
    return out.transpose(1, 2), lse


def _empty_backward(qkv):
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _backward(
    grad: torch.Tensor,
    qkv: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_lse: torch.Tensor | None,
    seed: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
) -> torch.Tensor:
    """The gradient of qkv."""
    dqkv = _empty_backward(qkv)
    attention.write_gradients(
        _parts(dqkv), grad.transpose(1, 2), *_parts(rows_of(qkv)), out.transpose(1, 2), lse, grad_lse,
        seed, dropout_p=dropout_p, is_causal=is_causal, scale=scale, query_offset=0,
    )  # fmt: skip
    return dqkv


def _save(ctx, inputs, output):
    qkv, seed, *ctx.options = inputs
    out, lse = output
    ctx.save_for_backward(qkv, out, lse, seed)


def _gradients(ctx, grad, grad_lse):
    qkv, out, lse, seed = ctx.saved_tensors
    grad = torch.zeros_like(out) if grad is None else grad
    return backward(grad, qkv, out, lse, grad_lse, seed, *ctx.options), None, None, None, None


forward = register("attention_qkvpacked", _forward, lambda qkv, *_: _empty_forward(qkv), _gradients, _save)
backward = register("attention_qkvpacked_backward", _backward, lambda grad, qkv, *_: _empty_backward(qkv))


def _flops(qkv_shape, is_causal: bool) -> int:
    batch, length, _, heads, size = qkv_shape
    shape = (batch, heads, length, size)
    return attention._flops(shape, shape, is_causal, 0)


@register_flop_formula(torch.ops.kernels.attention_qkvpacked)
def _forward_flops(qkv_shape, seed, dropout_p, is_causal, scale, **_) -> int:
    return 2 * _flops(qkv_shape, is_causal)


@register_flop_formula(torch.ops.kernels.attention_qkvpacked_backward)
def _backward_flops(grad_shape, qkv_shape, _out, lse_shape, _grad_lse, seed, dropout_p, is_causal, scale, **_) -> int:
    return 5 * _flops(qkv_shape, is_causal)


# ---------------------------------------------------------------- public


def scaled_dot_product_attention_qkvpacked(
    qkv: torch.Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """scaled_dot_product_attention of the query, key and value that lie side by side in qkv, to the bit.

    (..., T, 3, H, D) -> (..., T, H, D), as flash-attn's qkvpacked function has them: what a linear layer of 3 H D
    outputs gives, viewed, and what the one after it takes, flattened. D from 1 to 256, fp32, fp16 or bf16. dropout_p,
    is_causal, scale, autocast and return_lse are as in kernels.scaled_dot_product_attention; lse is (..., H, T). The
    gradient of qkv is one tensor, which nothing had to put together.

    Raises TypeError for what is no tensor or no number, RuntimeError for a shape or a dropout_p that does not fit,
    ValueError for a scale that is not finite, NotImplementedError for D above 256 and other dtypes, inside torch.func's
    transforms, for forward-mode tangents, and for second derivatives.

    The method is FlashAttention-2 (Dao, 2023).
    """
    name = "scaled_dot_product_attention_qkvpacked"
    check_tensors(name, {"qkv": qkv})
    refuse_transforms(name, qkv)
    dtype = autocast_dtype(qkv.device)
    if dtype is not None:
        qkv = qkv.to(dtype)
    if qkv.dim() < 4 or qkv.shape[-3] != 3:
        raise RuntimeError(f"{name}: qkv must be (..., T, 3, H, D), got {list(qkv.shape)}")
    attention.check_dropout(name, dropout_p)

    *lead, length, _, heads, size = qkv.shape
    scale = attention.scale_of(name, scale, size)
    if scale <= 0.0:
        query, key, value = qkv.unbind(-3)
        query, scale = attention.positive_scale(query, scale)
        qkv = torch.stack((query, key, value), -3)
    if len(lead) != 1:
        qkv = qkv.reshape(math.prod(lead), length, 3, heads, size)
    seed = attention.draw_seed(qkv.device) if dropout_p > 0.0 else None
    out, lse = forward(qkv, seed, float(dropout_p), is_causal, scale)
    if len(lead) != 1:
        out, lse = out.reshape(*lead, length, heads, size), lse.reshape(*lead, heads, length)
    return (out, lse) if return_lse else out


# ---------------------------------------------------------------- catalogue


def _torch(
    qkv: torch.Tensor, dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None
) -> torch.Tensor:
    """The same in PyTorch's own functions."""
    query, key, value = (part.transpose(-2, -3) for part in qkv.unbind(-3))
    out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout_p, is_causal=is_causal, scale=scale)
    return out.transpose(-2, -3)


def _plan(inputs: dict, options: dict, device: Device) -> list[Launch]:
    """The launches of a forward and a backward pass."""
    qkv, dropout_p = inputs["qkv"], options.get("dropout_p", 0.0)
    seed = torch.empty(1, dtype=torch.int64, device=qkv.device) if dropout_p else None
    common = (dropout_p, options.get("is_causal", False), qkv.shape[-1] ** -0.5)
    with plan_only(device) as launches:
        out, lse = _forward(qkv, seed, *common)
        _backward(out, qkv, out, lse, None, seed, *common)
    return launches


def _cost(inputs: dict, options: dict) -> tuple[Cost, Cost]:
    """Two products forward, five backward; qkv, out and their gradients, and lse."""
    qkv = inputs["qkv"]
    flops = _flops(qkv.shape, options.get("is_causal", False))
    tensors, lse = qkv.nbytes // 3 * 4, 4 * (qkv.numel() // (3 * qkv.shape[-1]))
    return Cost(2 * flops, tensors + lse), Cost(5 * flops, 2 * tensors + lse)


def _case(name: str, b: int, t: int, h: int, d: int, **options) -> Case:
    return Case(name, {"qkv": (b, t, 3, h, d)}, options)


OP = Op(
    name="scaled_dot_product_attention_qkvpacked",
    public=scaled_dot_product_attention_qkvpacked,
    reference=reference.scaled_dot_product_attention_qkvpacked,
    torch=_torch,
    plan=_plan,
    cost=_cost,
    cases=(
        _case("one_element", 1, 1, 1, 1),
        _case("small", 2, 17, 3, 16, is_causal=True),
        _case("tiny_model", 2, 64, 4, 16, is_causal=True),
        _case("prime", 1, 131, 2, 37, is_causal=True),
        _case("not_causal", 1, 130, 2, 40),
        _case("negative_scale", 1, 30, 2, 24, scale=-0.3),
        _case("odd_wide_head", 1, 40, 1, 200, scale=0.1),
    ),
    sizes=(
        _case("gpt2", 16, 1024, 12, 64, is_causal=True),
        _case("d16", 2, 64, 4, 16, is_causal=True),
        _case("shakespeare", 64, 256, 6, 64, is_causal=True),
        _case("shakespeare-dropout", 64, 256, 6, 64, is_causal=True, dropout_p=0.2),
        _case("d128", 4, 4096, 16, 128, is_causal=True),
    ),
    differentiable=("qkv",),
    replaces="`torch.nn.functional.scaled_dot_product_attention` of the parts of one tensor",
)
