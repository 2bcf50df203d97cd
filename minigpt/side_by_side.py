"""One text on two backends: how far their outputs are apart, and how fast each one is."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import generation
from .errors import UserError
from .models import BACKENDS, Loaded, Models
from .playing import Session, check_ids

_INTERPRETED = (24, 6)  # tokens to read and to write where Triton's interpreter runs one of the two
_COMPILED = (1024, 32)
_SECONDS = 0.5  # a measurement goes on for so long


@dataclass(frozen=True)
class Side:
    """What one backend did: tokens a second in the fastest of several calls, None where Triton's interpreter ran it."""

    name: str
    interpreted: bool
    read: float | None
    written: float | None
    ids: list[int]
    """What it continues the text with, always taking the likeliest token."""


@dataclass(frozen=True)
class Result:
    """The largest differences over all tokens of the text and the vocabulary, and how many likeliest tokens agree."""

    tokens: int
    sides: tuple[Side, Side]
    logits: float
    logprobs: float
    agreeing: int
    largest: float
    """The largest logit, absolutely: what the difference is to be compared with."""

    @property
    def same_text(self) -> bool:
        """Whether both go on with the same tokens."""
        return self.sides[0].ids == self.sides[1].ids


def side_by_side(models: Models, session: Session) -> Result:
    """Read the last tokens of a session's text with its model on both BACKENDS, and go on from there.

    Raises UserError while there is no text, and as Models.get.
    """
    if session.text is None:
        raise UserError("there is no text yet: write one first")
    loaded = [models.get(session.text.run, name) for name in BACKENDS]
    length, more = _INTERPRETED if any(side.ops.interpreted for side in loaded) else _COMPILED
    ids = session.text.ids[-min(length, loaded[0].model.config.block_size) :]
    check_ids(loaded[0], ids)
    sides, logits = zip(*(_run(models, side, name, ids, more) for side, name in zip(loaded, BACKENDS, strict=True)),
                        strict=True)  # fmt: skip
    a, b = logits
    return Result(
        len(ids),
        sides,
        float((a - b).abs().max()),
        float((a.log_softmax(-1) - b.log_softmax(-1)).abs().max()),
        int((a.argmax(-1) == b.argmax(-1)).sum()),
        float(a.abs().max()),
    )


def _run(models: Models, loaded: Loaded, name: str, ids: list[int], more: int) -> tuple[Side, Tensor]:
    """What one backend does, and its logits (T, V) float64."""
    interpreted, model = loaded.ops.interpreted, loaded.model
    idx = torch.tensor([ids], device=models.device)

    @torch.no_grad()
    def read() -> Tensor:
        logits = model(idx)[0][0]
        if logits.is_cuda:
            torch.cuda.synchronize(logits.device)
        return logits

    def write() -> list[int]:
        return list(generation.generate(model, ids, max_new_tokens=more, temperature=0, tokenizer=loaded.tokenizer))

    with models.computing(loaded):
        logits, written = read().cpu(), write()  # the first call compiles
        rates = (None, None) if interpreted else (_rate(read, len(ids)), _rate(write, more))
    return Side(name, interpreted, *rates, written), logits.double()


def _rate(work: Callable[[], object], tokens: int) -> float:
    """Tokens a second of the fastest of several calls of `work`, which handles so many in each and has run before."""
    fastest, until = float("inf"), time.perf_counter() + _SECONDS
    while fastest == float("inf") or time.perf_counter() < until:
        began = time.perf_counter()
        work()
        fastest = min(fastest, time.perf_counter() - began)
    return tokens / max(fastest, 1e-9)
