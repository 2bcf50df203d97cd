"""Drawing tokens from what a model expects: temperature, top-k, top-p, and random numbers of each row's own."""

import math

import torch
from torch import Tensor

from .errors import UserError

SEEDS = 2**63
"""Seeds are below this."""

_AT_ONCE = 256  # numbers that a generator is asked for together


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    uniform: Tensor | None = None,
) -> Tensor:
    """Token ids (...) int64 drawn from logits (..., V), whose -inf are never drawn.

    The logits are divided by `temperature`; 0 takes the largest instead of drawing. Then only the `top_k` largest are
    kept (Fan et al. 2018; 0: all of them), and of those only the fewest whose probabilities sum to at least `top_p`
    (nucleus sampling, Holtzman et al. 2020). `uniform` (...) float64, numbers in [0, 1), decides which token each row
    gets; without it they are drawn from `generator`. Raises UserError for values that make no sense.
    """
    check(temperature, top_k, top_p)
    if temperature == 0:
        return logits.argmax(-1)
    rows = logits.double().reshape(-1, logits.shape[-1])
    # The largest becomes 0 first: a temperature close to 0 must not turn it into infinity.
    rows = (rows - rows.amax(-1, keepdim=True)) / max(temperature, 1e-300)
    order = None
    if 0 < top_k < rows.shape[-1] or top_p < 1:
        rows, order = rows.topk(min(top_k or rows.shape[-1], rows.shape[-1]), dim=-1)
    probabilities = rows.softmax(-1)
    if top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    if uniform is None:
        uniform = torch.rand(len(rows), dtype=torch.float64, generator=generator)
    drawn = _place(probabilities, uniform.reshape(-1, 1).to(rows.device))
    if order is not None:
        drawn = order.gather(-1, drawn)
    return drawn.reshape(logits.shape[:-1])


def _place(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """(N, 1): the first place in each row at which the running sum of (N, K) is above its share `uniform` (N, 1)."""
    total = probabilities.cumsum(-1)
    whole = total[:, -1:]
    # Strictly below the whole sum: what has probability 0 is never the first to be above.
    wanted = torch.minimum(uniform * whole, torch.nextafter(whole, torch.zeros_like(whole)))
    return torch.searchsorted(total, wanted, right=True).clamp(max=probabilities.shape[-1] - 1)


class Uniforms:
    """Uniform numbers in [0, 1) for `rows` rows, each from a generator of its own.

    Row i of a seed is row 0 of seed + i: what a row draws does not depend on the rows beside it. Without a seed every
    row of every object differs. PyTorch's own generator is neither read nor moved.
    """

    def __init__(self, seed: int | None, rows: int):
        self._generators = [torch.Generator() for _ in range(rows)]
        for row, generator in enumerate(self._generators):
            if seed is None:
                generator.seed()
            else:
                generator.manual_seed((seed + row) % SEEDS)
        self._numbers, self._next = torch.empty(0), _AT_ONCE

    def next(self) -> Tensor:
        """The next number of each row, (rows,) float64, on the CPU."""
        if self._next == _AT_ONCE:
            drawn = [torch.rand(_AT_ONCE, dtype=torch.float64, generator=generator) for generator in self._generators]
            self._numbers, self._next = torch.stack(drawn), 0
        self._next += 1
        return self._numbers[:, self._next - 1]


def check(temperature: float, top_k: int, top_p: float) -> None:
    """Raise UserError for values that make no sense."""
    if not (math.isfinite(temperature) and temperature >= 0):
        raise UserError(f"temperature is {temperature:g}: it must be 0 (always the likeliest token) or more")
    if top_k < 0:
        raise UserError(f"top_k is {top_k}: it must be 1 or more, or 0 for all tokens")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p:g}: it must be above 0 and at most 1")


def check_seed(seed: int | None) -> None:
    """Raise UserError for a seed that is none."""
    if seed is not None and not 0 <= seed < SEEDS:
        raise UserError(f"seed is {seed}: it must be between 0 and 2**63 - 1")
