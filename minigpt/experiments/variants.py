"""What is changed in the model for an experiment, and what looks into the model; model.py stays as it is.

A variant is a `Backends` with some of its functions replaced: everything that is left out here passes through them.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..backends import Backends, unpack
from ..learning import Data, Learner
from ..model import GPT


def without_residuals(ops: Backends) -> Backends:
    """Ops with which no block sees its input stream: what a norm adds to its branch is zero instead."""

    def add_layer_norm(branch: Tensor, stream: Tensor, *rest, **options) -> tuple[Tensor, Tensor]:
        return ops.add_layer_norm(branch, torch.zeros_like(stream), *rest, **options)

    return replace(ops, add_layer_norm=add_layer_norm)


def without_scaling(ops: Backends) -> Backends:
    """Ops whose attention takes the softmax of q.k instead of q.k / sqrt(D)."""

    def attention(qkv: Tensor, **options) -> Tensor:
        query, key, value = qkv.unbind(2)
        scaled = query * math.sqrt(query.shape[-1])
        return ops.attention(torch.stack((scaled, key, value), 2), **options)

    return replace(ops, attention=attention)


VARIANTS: dict[str, Callable[[Backends], Backends]] = {
    "plain": lambda ops: ops,
    "no residuals": without_residuals,
    "no scaling": without_scaling,
}


@torch.no_grad()
def same_deviation_at_every_width(model: GPT) -> None:
    """Give a fresh model GPT-2's own initialisation: 0.02 whatever its width, where ours is 0.02 * sqrt(768 / width).

    The draws stay the same, so the two differ by a factor alone.
    """
    embedding = model.tokens.weight if model.config.tied_head else None
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and name != "positions" and parameter is not embedding:
            parameter.mul_(math.sqrt(model.config.n_embd / 768))


@torch.no_grad()
def attention_statistics(
    model: GPT, ops: Backends, variant: Callable[[Backends], Backends], idx: Tensor
) -> dict[str, list[float]]:
    """Per layer, for tokens idx (B, T) int64: the standard deviation of the scores, and the entropy of attention.

    `score_std`: of what the softmax gets, over all pairs that the causal mask allows. `entropy`: of the attention of
    each query, as a share of the most that it can be, log of the keys it sees; the mean over queries, the first left
    out. `ops` are the plain ones, and `variant` what is changed in them; the model's own stay as they were.
    """
    found: dict[str, list[float]] = {"score_std": [], "entropy": []}

    def recording(qkv: Tensor, **options) -> Tensor:
        query, key, _ = unpack(qkv)
        scores = query.float() @ key.float().transpose(-1, -2) / math.sqrt(query.shape[-1])
        T = scores.shape[-1]
        seen = torch.ones(T, T, dtype=torch.bool, device=scores.device).tril()
        found["score_std"].append(scores[..., seen].std().item())
        logs = scores.masked_fill(~seen, -math.inf).log_softmax(-1)
        entropy = -(logs.exp() * logs.masked_fill(~seen, 0.0)).sum(-1)[..., 1:]
        found["entropy"].append((entropy / torch.arange(2, T + 1, device=scores.device).log()).mean().item())
        return ops.attention(qkv, **options)

    before, was_training = model.ops, model.training
    model.use(variant(replace(ops, attention=recording)))
    model.eval()
    try:
        model(idx)
    finally:
        model.use(before)
        model.train(was_training)
    return found


def gradient_norms(learner: Learner, data: Data) -> list[float]:
    """The norm of the gradient of each block's parameters on one batch, from the first block to the last."""
    blocks = [list(block.parameters()) for block in learner.model.blocks]
    gradients = torch.autograd.grad(learner.loss(*data[0]), [p for block in blocks for p in block])
    parts = iter(gradients)
    return [torch.nn.utils.get_total_norm([next(parts) for _ in block]).item() for block in blocks]
