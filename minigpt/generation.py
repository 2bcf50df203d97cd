"""Text from a model, token by token: the loop from prompts to ids, and from ids to text."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .context import kept, reader
from .errors import UserError
from .model import GPT
from .sampling import Uniforms, check, check_seed, sample
from .stops import Stops
from .tokenizers import Tokenizer


class Step(NamedTuple):
    """What one step has chosen for each row, on the CPU.

    ids (rows,) int64. logprobs (rows,) float64: natural logarithms of the probabilities that the model gives these,
    at temperature 1 and among all tokens of its vocabulary. table (rows, V) float64, if asked for: the same of
    every token.
    """

    ids: Tensor
    logprobs: Tensor
    table: Tensor | None


def steps(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    num_samples: int = 1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    tokenizer: Tokenizer | None = None,
    table: bool = False,
    cache: bool = True,
    cuda_graph: bool = False,
) -> Iterator[Step]:
    """Continue each of `prompts` (one or more ids each) `num_samples` times; a Step for each new token.

    Rows are in the order of the prompts, the samples of one prompt side by side. All rows go on to `max_new_tokens`;
    close the iterator to end sooner. What the model sees of a long text: `minigpt.context`. `temperature`, `top_k`,
    `top_p` as in `sampling.sample`. A `seed` gives the same ids every time, and row i draws as row 0 does with
    seed + i: but for rounding, which may depend on the size of the batch, a row does not depend on the others. With
    a `tokenizer`, what no text has is never drawn: the special tokens, and the ids with which a vocabulary is padded.

    Raises UserError, before the first token, for values that make no sense, and where `cuda_graph` cannot be had.
    """
    rows = len(prompts) * num_samples
    fitting(model, tokenizer)
    check(temperature, top_k, top_p)
    check_seed(seed)
    if num_samples < 1:
        raise UserError(f"num_samples is {num_samples}: it must be 1 or more")
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens is {max_new_tokens}: it must be 0 or more")
    if not rows or min(map(len, prompts)) == 0:
        raise UserError("there is nothing to continue: give at least one token")
    reading = reader(model, prompts, num_samples, cache=cache, cuda_graph=cuda_graph)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    uniforms = Uniforms(seed, rows) if temperature else None
    # Drawn on the CPU: a seed means the same on every device. The largest is found where the logits are.
    place = torch.device("cpu") if temperature or table else next(model.parameters()).device
    never = never_drawn(model, tokenizer).to(place)

    def run() -> Iterator[Step]:
        chosen = None
        for _ in range(max_new_tokens):
            logits = reading.first() if chosen is None else reading.next(chosen.ids.tolist())
            chosen = _choose(logits, never, uniforms, table, options)
            yield chosen

    return run()


@torch.no_grad()
def _choose(logits: Tensor, never: Tensor, uniforms: Uniforms | None, table: bool, options: dict) -> Step:
    """Draw from logits (rows, V), on the device of `never`."""
    logits = logits.to(never.device)
    ids = sample(logits.masked_fill(never, -math.inf), **options, uniform=uniforms and uniforms.next())
    logprobs = logits.double().log_softmax(-1)
    its = logprobs.gather(-1, ids[:, None])[:, 0].cpu()
    if not its.isfinite().all():  # a NaN, or an infinity
        raise UserError("the model's logits are not finite: its training has diverged; take another checkpoint")
    return Step(ids.cpu(), its, logprobs if table else None)


def never_drawn(model: GPT, tokenizer: Tokenizer | None) -> Tensor:
    """(V,) bool: the ids that no text has, the special ones and those that pad the vocabulary; none, not knowing."""
    never = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    if tokenizer is not None:
        never[list(tokenizer.special_ids)] = True
        never[tokenizer.vocab_size :] = True
    return never


def fitting(model: GPT, tokenizer: Tokenizer | None) -> int:
    """How many ids there are to choose from. Raises UserError where the tokenizer has more than the model."""
    vocab_size = model.config.vocab_size if tokenizer is None else tokenizer.vocab_size
    if vocab_size > model.config.vocab_size:
        raise UserError(
            f"the tokenizer has {vocab_size} tokens and the model only {model.config.vocab_size}: "
            "they do not belong together; take another checkpoint"
        )
    return vocab_size


def generate(model: GPT, ids: Sequence[int] | Tensor, **options) -> Iterator[int]:
    """Token ids that continue `ids`, each as soon as it is known; options and errors as `steps`."""
    found = steps(model, [torch.as_tensor(ids).flatten().tolist()], **options)
    return (int(step.ids) for step in found)


# ---------------------------------------------------------------- text


@dataclass
class Row:
    """One continuation as it grows: its text, and of each token that was drawn for it the id and log-probability.

    `alternatives` has the likeliest ids of each step with their log-probabilities, likeliest first. The text ends
    before the stop text (`stopped`), whose tokens count among the ids.
    """

    text: str = ""
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    alternatives: list[list[tuple[int, float]]] = field(default_factory=list)
    stopped: bool = False


class Writing:
    """Continuations of texts, all at once: iterating gives, for each token, the new text of every row ("": none yet).

    `rows` holds what there is so far, in the order of `steps`. It ends when every row has, at one of the `stop` texts
    or with `max_new_tokens`. `alternatives` is how many likeliest tokens to keep of each step. Other options and errors
    as `steps` and `encode_prompt`.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        prompts: Sequence[str],
        *,
        stop: Sequence[str] = (),
        alternatives: int = 0,
        num_samples: int = 1,
        **options,
    ):
        if not 0 <= alternatives <= tokenizer.vocab_size:
            raise UserError(
                f"alternatives is {alternatives}: it must be between 0 and the {tokenizer.vocab_size} tokens of the "
                "vocabulary"
            )
        ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
        count = len(prompts) * num_samples
        self._stops = [check_stops(tokenizer, stop) for _ in range(count)]
        self._decoders = [tokenizer.stream() for _ in range(count)]
        self._alternatives = alternatives
        self._steps = steps(model, ids, num_samples=num_samples, tokenizer=tokenizer, table=alternatives > 0, **options)
        self.rows = [Row() for _ in range(count)]

    def __iter__(self) -> Iterator[list[str]]:
        for step in self._steps:
            yield [self._extend(number, row, step) for number, row in enumerate(self.rows)]
            if all(row.stopped for row in self.rows):
                self._steps.close()
                return
        yield [self._end(number, row) for number, row in enumerate(self.rows)]

    def _extend(self, number: int, row: Row, step: Step) -> str:
        if row.stopped:
            return ""
        token = int(step.ids[number])
        row.ids.append(token)
        row.logprobs.append(float(step.logprobs[number]))
        if self._alternatives:
            values, ids = step.table[number].topk(self._alternatives)
            row.alternatives.append(list(zip(ids.tolist(), values.tolist(), strict=True)))
        new = self._stops[number].feed(self._decoders[number].feed(token))
        row.text += new
        row.stopped = self._stops[number].found
        return new

    def _end(self, number: int, row: Row) -> str:
        if row.stopped:
            return ""
        stops = self._stops[number]
        new = stops.feed(self._decoders[number].flush())
        row.stopped = stops.found
        new += stops.flush()
        row.text += new
        return new


def stream(
    model: GPT, tokenizer: Tokenizer, prompt: str = "", *, stop: str | Sequence[str] | None = None, **options
) -> Iterator[str]:
    """The text that continues `prompt`, in pieces, as soon as it is certain.

    It ends before `stop`, or the first of several, which is not part of it. Other options and errors as `steps` and
    `encode_prompt`.
    """
    writing = Writing(model, tokenizer, [prompt], stop=as_stops(stop), **options)
    return (new for (new,) in writing if new)


def complete(model: GPT, tokenizer: Tokenizer, prompt: str = "", **options) -> str:
    """`prompt` and the text that continues it, at once; options and errors as `stream`."""
    return prompt + "".join(stream(model, tokenizer, prompt, **options))


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The ids of a prompt. "" begins at a new line, or at <eos> where the text that was trained on has no lines.

    Raises UserError for characters that the model has never seen: they are named.
    """
    if not prompt:
        return [tokenizer.eos] if tokenizer.unknown("\n") else tokenizer.encode("\n").tolist()
    _require_known(tokenizer, prompt, "the prompt")
    return tokenizer.encode(prompt).tolist()


def seen(model: GPT, length: int) -> int:
    """How many of a prompt's `length` ids the model sees: all if they fit the block, else its last half block."""
    return length if length <= model.config.block_size else kept(model.config.block_size)


def as_stops(stop: str | Sequence[str] | None) -> Sequence[str]:
    """One stop text, several or none, as a sequence."""
    return () if stop is None else (stop,) if isinstance(stop, str) else stop


def check_stops(tokenizer: Tokenizer, stop: Sequence[str]) -> Stops:
    """What looks for the stop texts. Raises UserError for an empty one, and for characters that no text would have."""
    stops = Stops(stop)
    for text in stop:
        _require_known(tokenizer, text, "the stop text")
    return stops


def _require_known(tokenizer: Tokenizer, text: str, what: str) -> None:
    if unknown := tokenizer.unknown(text):
        named = ", ".join(map(repr, unknown[:10])) + (", ..." if len(unknown) > 10 else "")
        raise UserError(f"{what} has characters that the model has never seen ({named}): leave them out")
