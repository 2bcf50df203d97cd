"""What a model sees of a text that it continues, and what it expects next: with a cache of keys and values, or without.

The context is the text from its beginning on. When it would outgrow the block, its last half block is kept and goes
on from there, at position 0: so a cache is filled anew once in half a block, and not at every token. Without a
cache the context is cut in the same places, so both give the same text.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from .cache import Cache, GraphedStep, prefill, step
from .errors import UserError
from .model import GPT


def kept(block_size: int) -> int:
    """The tokens that are kept of a context that has outgrown its block."""
    return max(1, block_size // 2)


class Contexts:
    """The ids that each row's model sees: `samples` rows of each prompt, those of one prompt side by side."""

    def __init__(self, prompts: Sequence[Sequence[int]], samples: int, block_size: int):
        self.block_size = block_size
        cut = [list(prompt if len(prompt) <= block_size else prompt[-kept(block_size) :]) for prompt in prompts]
        self.rows = [list(ids) for ids in cut for _ in range(samples)]

    def append(self, ids: Sequence[int]) -> list[int]:
        """Append one id to each row; the rows that had to be cut."""
        cut = []
        for number, (row, token) in enumerate(zip(self.rows, ids, strict=True)):
            row.append(token)
            if len(row) > self.block_size:
                del row[: -kept(self.block_size)]
                cut.append(number)
        return cut

    def reorder(self, rows: Sequence[int]) -> None:
        """Let each row go on from what row rows[i] holds."""
        self.rows = [list(self.rows[row]) for row in rows]


class Reader(Protocol):
    """Reads tokens as they come, and gives the logits (rows, V) of the next one, on the model's device."""

    def first(self) -> Tensor:
        """The logits after the prompts."""

    def next(self, ids: Sequence[int]) -> Tensor:
        """The logits after one more id a row. What was given before may be overwritten."""

    def reorder(self, rows: Sequence[int]) -> None:
        """Let each row go on from what row rows[i] has read."""


def reader(
    model: GPT, prompts: Sequence[Sequence[int]], samples: int = 1, *, cache: bool = True, cuda_graph: bool = False
) -> Reader:
    """A Reader of `samples` rows for each prompt, prompts of one or more ids each.

    Dropout is off while it reads. With `cuda_graph` the steps are one CUDA graph, which needs the cache, and a GPU:
    UserError otherwise.
    """
    contexts = Contexts(prompts, samples, model.config.block_size)
    if cache:
        return Cached(model, contexts, samples, cuda_graph)
    if cuda_graph:
        raise UserError("a CUDA graph holds a step with a cache: leave out --cuda-graph or --no-cache")
    return Uncached(model, contexts)


class Uncached:
    """Runs the whole model over the whole context for every token: the plain meaning of the cache."""

    def __init__(self, model: GPT, contexts: Contexts):
        self._model, self._contexts = model, contexts

    def first(self) -> Tensor:
        """See Reader. Rows of one length go through the model together."""
        device = next(self._model.parameters()).device
        by_length: dict[int, list[int]] = {}
        for row, ids in enumerate(self._contexts.rows):
            by_length.setdefault(len(ids), []).append(row)
        found: list[Tensor | None] = [None] * len(self._contexts.rows)
        with _reading(self._model):
            for rows in by_length.values():
                idx = torch.tensor([self._contexts.rows[row] for row in rows], device=device)
                logits, _ = self._model(idx, last_only=True)
                for row, its in zip(rows, logits[:, -1], strict=True):
                    found[row] = its
        return torch.stack(found)

    def next(self, ids: Sequence[int]) -> Tensor:
        """See Reader."""
        self._contexts.append(ids)
        return self.first()

    def reorder(self, rows: Sequence[int]) -> None:
        """See Reader."""
        self._contexts.reorder(rows)


class Cached:
    """Runs every token through the model once, and the last half block again where a context is cut."""

    def __init__(self, model: GPT, contexts: Contexts, samples: int, cuda_graph: bool):
        self._model, self._contexts, self._samples = model, contexts, samples
        self._cache = Cache(model, len(contexts.rows))
        with _reading(model):
            self._graph = GraphedStep(model, self._cache) if cuda_graph else None

    def first(self) -> Tensor:
        """See Reader. Each prompt is run once, whatever the number of its rows."""
        rows = list(range(0, len(self._contexts.rows), self._samples))
        with _reading(self._model):
            logits = prefill(self._model, self._cache, [self._contexts.rows[row] for row in rows], rows)
        if self._samples > 1:
            self._reorder([row for row in rows for _ in range(self._samples)])
            logits = logits.repeat_interleave(self._samples, 0)
        return logits

    def next(self, ids: Sequence[int]) -> Tensor:
        """See Reader."""
        cut = self._contexts.append(ids)
        tokens = torch.tensor(ids, device=self._cache.lengths.device)
        with _reading(self._model):
            if cut:  # all but the newest token, which the step below appends as everywhere
                prefill(self._model, self._cache, [self._contexts.rows[row][:-1] for row in cut], cut)
            return self._graph(tokens) if self._graph else step(self._model, self._cache, tokens)

    def reorder(self, rows: Sequence[int]) -> None:
        """See Reader."""
        self._contexts.reorder(rows)
        self._reorder(rows)

    def _reorder(self, rows: Sequence[int]) -> None:
        self._cache.reorder(rows, filled=max(map(len, self._contexts.rows)))


@contextmanager
def _reading(model: GPT) -> Iterator[None]:
    """A block without gradients and without dropout; the model is left as it was."""
    was_training = model.training
    if was_training:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        if was_training:
            model.train()
