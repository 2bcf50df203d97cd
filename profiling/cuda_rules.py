"""What PyTorch does on a CUDA GPU where it does something else on a CPU, for a model that runs on fake CPU tensors.

A tensor that pretends to be on a GPU cannot go backward where PyTorch has no CUDA, so an estimate for a GPU runs on
fake CPU tensors and puts CUDA's choices in the place of the CPU's. Each rule was taken from what PyTorch dispatches
for CUDA tensors; a test compares the two forward passes op by op.
"""

import contextlib
from collections.abc import Iterator
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import minigpt.gelu
import minigpt.linear
import minigpt.model

GRANULARITY = 512
"""PyTorch's CUDA allocator hands memory out in multiples of so many bytes."""


class _Rules(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        rule = _RULES.get(func)
        return rule(*args, **(kwargs or {})) if rule else func(*args, **(kwargs or {}))


def _contexts() -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    """Those of a checkpointed block's two runs: PyTorch lifts the rules during backward, where the second one is."""
    return contextlib.nullcontext(), _Rules()


@contextlib.contextmanager
def as_on_cuda() -> Iterator[None]:
    """Run fake CPU tensors through the ops that a CUDA GPU would run, as far as they allocate otherwise."""
    with (
        _Rules(),
        mock.patch.object(minigpt.linear, "_AVAILABLE", False),
        mock.patch.object(minigpt.gelu, "_on_cpu", lambda x: False),
        mock.patch.object(minigpt.model, "checkpoint", partial(checkpoint, context_fn=_contexts)),
        mock.patch.object(torch.nn.utils, "clip_grad_norm_", partial(torch.nn.utils.clip_grad_norm_, foreach=True)),
    ):
        yield


def workspace(func, args, kwargs) -> int | None:
    """Bytes that FlashAttention holds inside backward, its results included; None for other ops, cuDNN's among them.

    FlashAttention-2 adds dq up in fp32, (B, H, T, D) with T rounded up to 128 and D to 32, beside one fp32 a row.
    """
    if func is not torch.ops.aten._scaled_dot_product_flash_attention_backward.default:
        return None
    query, key, value = args[1:4]
    batch, heads, length, size = query.shape
    rows = batch * heads * -(-length // 128) * 128
    return query.nbytes + key.nbytes + value.nbytes + 4 * rows * (1 + -(-size // 32) * 32)


def _casting() -> torch.dtype | None:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None


def _attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):  # fmt: skip
    """FlashAttention for fp16 and bf16, the memory-efficient kernel for fp32, plain arithmetic for the rest.

    On GPUs of 9.0 and 10.0 PyTorch prefers cuDNN's, where cuDNN is above 9.15, in FlashAttention's place: it saves the
    same tensors, but what it works in is its own, and not known here.
    """
    dtype = _casting()
    if dtype is not None:
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    size = query.shape[-1]
    with torch.autocast("cpu", enabled=False):
        options = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
        if attn_mask is not None or enable_gqa or size > 256:
            return torch.ops.aten._scaled_dot_product_attention_math(
                query, key, value, attn_mask, enable_gqa=enable_gqa, **options
            )[0]
        if query.dtype in (torch.float16, torch.bfloat16):
            padded = -(-size // 8) * 8
            if padded != size:
                options["scale"] = size**-0.5 if scale is None else scale
                query, key, value = (F.pad(tensor, (0, padded - size)) for tensor in (query, key, value))
            out = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, **options)[0]
            return out[..., :size] if padded != size else out
        if size % 4 == 0:
            efficient = torch.ops.aten._scaled_dot_product_efficient_attention
            return efficient(query, key, value, None, compute_log_sumexp=query.requires_grad, **options)[0]
        return torch.ops.aten._scaled_dot_product_attention_math(query, key, value, None, **options)[0]


def _dropout(input, p=0.5, training=True, inplace=False):
    """One kernel that saves a mask of one byte an element, where the CPU saves the noise in the input's dtype."""
    if p == 0.0 or not training or input.numel() == 0:
        return input
    return torch.ops.aten.native_dropout(input, p, True)[0]


def _layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    """fp32 under autocast."""
    if _casting() is None:
        return torch.layer_norm(input, normalized_shape, weight, bias, eps)
    with torch.autocast("cpu", enabled=False):
        weight, bias = (None if tensor is None else tensor.float() for tensor in (weight, bias))
        return torch.layer_norm(input.float(), normalized_shape, weight, bias, eps)


def _cross_entropy(
    input, target, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean", label_smoothing=0.0
):
    """Under autocast the log-softmax stays in the input's dtype, and only the loss that follows is in fp32.

    A CPU's autocast casts the logits instead, and then works in fp32 throughout.
    """
    options = {"ignore_index": ignore_index, "reduction": reduction}
    if _casting() is None:
        return F.cross_entropy(input, target, weight, label_smoothing=label_smoothing, **options)
    if label_smoothing or target.is_floating_point():
        raise NotImplementedError("an estimate for a GPU has no smoothed labels and no probability targets")
    with torch.autocast("cpu", enabled=False):
        log_probabilities = torch.log_softmax(input, 0 if input.dim() == 1 else 1)
        return F.nll_loss(log_probabilities.float(), target, weight, **options)


_RULES = {
    F.scaled_dot_product_attention: _attention,
    F.dropout: _dropout,
    torch.dropout: lambda input, p, train: _dropout(input, p, train),
    F.layer_norm: _layer_norm,
    F.cross_entropy: _cross_entropy,
}
