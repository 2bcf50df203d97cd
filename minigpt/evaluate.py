"""How well a model predicts a text, over all of it: nats per token, perplexity, and bits per character.

Only what is per character compares models of different tokenizers.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .errors import UserError
from .model import GPT
from .parallel import ALONE, World

# On a CPU, so many that their activations stay in its caches.
_TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 16384}


@dataclass(frozen=True)
class Evaluation:
    """The mean over the tokens of a text, or over the characters that they stand for."""

    loss: float
    """Nats per token."""
    tokens: int
    """How many tokens were predicted."""
    characters: int
    """How many characters they stand for: of each, the token that has its first byte."""

    @property
    def loss_per_character(self) -> float:
        """Nats per character; infinite where there is none."""
        return self.loss * self.tokens / self.characters if self.characters else math.inf

    @property
    def bits_per_character(self) -> float:
        """loss_per_character in bits."""
        return self.loss_per_character / math.log(2)

    @property
    def perplexity(self) -> float:
        """exp(loss), per token; infinite where that is beyond a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def evaluate(
    model: GPT,
    tokens: Tensor,
    characters_per_token: np.ndarray,
    *,
    max_tokens: int = 0,
    dtype: torch.dtype = torch.float32,
    world: World = ALONE,
) -> Evaluation:
    """The mean loss of `model` in predicting `tokens` (N,) int64, on the model's device.

    Non-overlapping windows of block_size, the last one shorter where they do not fit, so that each of the N - 1 tokens
    after the first counts once. With `max_tokens`, no more than that many, in windows spread evenly over the text.
    `characters_per_token` (V,), of the tokenizer, says how many characters each id stands for.
    Matrix products in `dtype`. Dropout is off meanwhile. Several processes call it together, and share the windows.
    Raises UserError when there is nothing to predict.
    """
    windows = list(_windows(tokens, model.config.block_size, max_tokens))
    count = sum(targets.numel() for _, targets in windows)
    if count == 0:
        raise UserError("the text to validate on needs at least 2 tokens: take a longer text")

    lengths = torch.from_numpy(characters_per_token).to(tokens.device)

    def loss_sum(window: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = window
        with torch.no_grad(), torch.autocast(tokens.device.type, dtype=dtype, enabled=dtype != torch.float32):
            return model(inputs, targets)[1].double() * targets.numel()

    was_training = model.training
    model.eval()
    # Summed on the device in double precision: one synchronisation at the end.
    total = torch.zeros((), dtype=torch.float64, device=tokens.device)
    try:
        for first in range(0, len(windows), world.size):
            mine = first + world.rank
            # Where none is left, one more that does not count: under fsdp all have to go through the model.
            found = loss_sum(windows[min(mine, len(windows) - 1)])
            total += found if mine < len(windows) else 0.0
    finally:
        model.train(was_training)
    characters = sum((lengths[targets].sum() for _, targets in windows), torch.zeros_like(lengths[0]))
    return Evaluation(world.sum(total).item() / count, count, int(characters))


def _windows(tokens: Tensor, block: int, max_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets, (n, T) int64 each, of the windows to evaluate, several at once."""
    count = len(tokens) - 1
    if not 0 < max_tokens < count:
        whole = count // block
        inputs, targets = tokens[: whole * block].view(whole, block), tokens[1 : whole * block + 1].view(whole, block)
        rest = tokens[None, whole * block : count], tokens[None, whole * block + 1 :]
    else:
        block = min(block, max_tokens)
        inputs, targets = tokens[:count].unfold(0, block, block), tokens[1:].unfold(0, block, block)
        chosen = torch.linspace(0, len(inputs) - 1, max_tokens // block, dtype=torch.float64).long().to(tokens.device)
        inputs, targets = inputs[chosen], targets[chosen]
        rest = tokens[None, :0], tokens[None, :0]
    rows = max(1, _TOKENS_AT_ONCE[tokens.device.type] // block)
    for part in (*zip(inputs.split(rows), targets.split(rows), strict=True), rest):
        if part[0].numel():
            yield part
