"""One training step as minigpt's trainer takes it, for whoever wants to look at it from outside."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minigpt.config import TrainConfig
from minigpt.model import GPT

PHASES = ("forward", "backward", "clipping", "AdamW")


def make_batch(config: TrainConfig, vocab_size: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Random tokens and targets, int64 (B, T) each."""
    shape = (config.batch_size, config.window or config.block_size)
    return tuple(torch.randint(0, vocab_size, shape, device=device) for _ in range(2))


def training_step(
    model: GPT,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    grad_clip: float,
    passes: int = 1,
    during: Callable[[str], Any] = lambda phase: contextlib.nullcontext(),
) -> Tensor:
    """One optimizer step over `passes` forward and backward passes of `batch`; the loss () of the last, detached.

    `during(phase)` is a context that each part of the step runs in; its names are those of PHASES.
    """
    parameters = list(model.parameters())
    for _ in range(passes):
        with during("forward"):
            loss = _loss(model, batch, dtype) / passes
        with during("backward"):
            loss.backward()
        loss = loss.detach()
    with during("clipping"):
        if grad_clip:
            torch.nn.utils.clip_grad_norm_(parameters, grad_clip)
    with during("AdamW"):
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss


def _loss(model: GPT, batch: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    # a function of its own, so that the logits are let go of as the trainer lets go of them
    with torch.autocast(batch[0].device.type, dtype=dtype, enabled=dtype != torch.float32):
        return model(*batch)[1]
