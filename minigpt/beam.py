"""Beam search: the likeliest continuations of a prompt, as far as a search of limited width finds them.

At every step each of the `width` beams is continued by every token, and the likeliest `width` of all these stay. A
hypothesis Y ends at a stop text or with the last step. Those that have ended are ranked by

    score(Y) = log P(Y) / lp(Y),    lp(Y) = ((5 + |Y|) / 6) ** length_penalty,

the length penalty of Wu et al. 2016 ("Google's Neural Machine Translation System", equation 14): 0 ranks by probability
alone, which favours short ones. Plain beam search may drop the greedy continuation and end with something less likely
(with 2 to 4 beams it did for 2 of 200 random prompts); here that one is carried along in a row of its own, so the
result never has a lower score than greedy's.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .context import reader
from .errors import UserError
from .generation import fitting, never_drawn
from .model import GPT
from .tokenizers import Tokenizer


@dataclass(frozen=True)
class Hypothesis:
    """A continuation: its ids, the log-probability of each (see generation.Step), and the score it is ranked by."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    score: float


@dataclass(frozen=True)
class _Beam:
    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    total: float = 0.0


@torch.no_grad()
def beam_search(
    model: GPT,
    ids: Sequence[int],
    *,
    width: int,
    max_new_tokens: int,
    length_penalty: float = 0.0,
    ended: Callable[[tuple[int, ...]], bool] = lambda ids: False,
    tokenizer: Tokenizer | None = None,
    cache: bool = True,
    cuda_graph: bool = False,
) -> list[Hypothesis]:
    """The best `width` continuations of `ids` (one or more) that were found, fewer where there are not so many.

    `ended` says whether a continuation is complete before it has `max_new_tokens`. A width of 1 is greedy. What may be
    drawn and what the model sees: as in `generation.steps`. Raises UserError for values that make no sense.
    """
    _check(fitting(model, tokenizer), tokenizer, width, max_new_tokens, length_penalty)
    if not len(ids):
        raise UserError("there is nothing to continue: give at least one token")
    never = never_drawn(model, tokenizer)
    rows = width + (width > 1)  # one more for the greedy continuation

    def penalty(length: int) -> float:
        return ((5 + length) / 6) ** length_penalty

    reading = reader(model, [ids], rows, cache=cache, cuda_graph=cuda_graph)
    beams: list[_Beam | None] = [_Beam(), *[None] * (width - 1), *[_Beam()] * (width > 1)]
    done: dict[tuple[int, ...], Hypothesis] = {}
    logits = reading.first()
    for length in range(1, max_new_tokens + 1):
        children = _grow(beams, logits.cpu().double().log_softmax(-1), never, width)
        beams, parents = [], []
        for group, places in children:
            taken = 0
            for parent, child in group:
                if ended(child.ids) or length == max_new_tokens:
                    done[child.ids] = Hypothesis(child.ids, child.logprobs, child.total / penalty(length))
                elif taken < places:
                    beams.append(child)
                    parents.append(parent)
                    taken += 1
            beams += [None] * (places - taken)  # rows that go on with nothing, where so few are left
            parents += [0] * (places - taken)
        best = sorted((hypothesis.score for hypothesis in done.values()), reverse=True)[:width]
        # a log-probability only falls, and the longest has the largest penalty to be divided by
        bound = max((beam.total for beam in beams if beam), default=-math.inf) / penalty(max_new_tokens)
        if bound == -math.inf or (len(best) == width and best[-1] >= bound):
            break
        reading.reorder(parents)
        logits = reading.next([beam.ids[-1] if beam else int(ids[-1]) for beam in beams])
    if not max_new_tokens:
        return [Hypothesis((), (), 0.0)]
    return sorted(done.values(), key=lambda hypothesis: (-hypothesis.score, hypothesis.ids))[:width]


def _grow(
    beams: list[_Beam | None], table: Tensor, never: Tensor, width: int
) -> list[tuple[list[tuple[int, _Beam]], int]]:
    """The children of the beams, and of the greedy row after them if there is one, with the rows that each group has.

    Children are (row of the parent, child), likeliest first: twice as many as beams, since some may be complete.
    """
    if not all(math.isfinite(float(table[row].amax())) for row, beam in enumerate(beams) if beam):
        raise UserError("the model's logits are not finite: its training has diverged; take another checkpoint")
    allowed = table.masked_fill(never, -math.inf)
    groups = [range(width), range(width, len(beams))]
    found = []
    for group, wanted in zip(groups, (2 * width if width > 1 else 1, 1), strict=True):
        live = [row for row in group if beams[row]]
        children = []
        if live:
            totals = torch.tensor([beams[row].total for row in live], dtype=torch.float64)
            sums = (totals[:, None] + allowed[live]).flatten()
            values, places = sums.topk(min(wanted, sums.numel()))
            for total, place in zip(values.tolist(), places.tolist(), strict=True):
                row, token = live[place // len(never)], place % len(never)
                if total > -math.inf:
                    beam = beams[row]
                    child = _Beam((*beam.ids, token), (*beam.logprobs, float(table[row, token])), total)
                    children.append((row, child))
        found.append((children, len(group)))
    return found


def _check(
    vocab_size: int, tokenizer: Tokenizer | None, width: int, max_new_tokens: int, length_penalty: float
) -> None:
    choices = vocab_size - (len(tokenizer.special_ids) if tokenizer is not None else 0)
    if not 1 <= width <= choices:
        raise UserError(f"the beam width is {width}: it must be between 1 and the {choices} tokens that may be drawn")
    if not (math.isfinite(length_penalty) and length_penalty >= 0):
        raise UserError(f"length_penalty is {length_penalty:g}: it must be 0 (rank by probability alone) or more")
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens is {max_new_tokens}: it must be 0 or more")
