"""What the playground does, without its page: text with what the model thought of it, and attention.

Several people, or tabs, may use one `Models` at once: each has a `Session` of its own.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from . import attention_maps, generation
from .errors import UserError
from .generation import Writing
from .models import Loaded, Models
from .sampling import check, check_seed
from .tokenizers import Tokenizer

ALTERNATIVES = 8
LONGEST_PROMPT = 100_000
"""Characters of a prompt that the page takes."""
MOST_TOKENS = 1000
INTERPRETED_TOKENS = 16
"""Tokens to write at most where Triton's interpreter runs the kernels."""

_MAP_NUMBERS = 1 << 20  # in the attention maps that a page is sent
_MAP_TOKENS = 96


class Token(NamedTuple):
    """A token that was written: its text ("" while a character lacks bytes), its name, and what it was drawn from.

    `bits` is its surprisal, -log2 p; `alternatives` are the names of the likeliest tokens with their probabilities,
    likeliest first. Both are the model's own, at temperature 1.
    """

    id: int
    text: str
    name: str
    bits: float
    alternatives: list[tuple[int, str, float]]


@dataclass
class Text:
    """A text as it grows. `ids` are those of the prompt and of the tokens; `ended` says how, "" while it grows."""

    run: str
    kernels: str
    prompt: str
    ids: list[int]
    notes: list[str]
    tokens: list[Token] = field(default_factory=list)
    ended: str = ""
    stopping: bool = False
    warning: str | None = None
    """What nobody should miss: that Triton's interpreter writes it."""


@dataclass
class Session:
    """What one tab has: its text, once there is one."""

    text: Text | None = None

    def stop(self) -> None:
        """End the text that is being written, before its next token."""
        if self.text is not None:
            self.text.stopping = True


@dataclass(frozen=True)
class Settings:
    """How to draw; the page's sliders. Numbers of any type, None where a field was cleared."""

    temperature: float | None = 0.8
    top_k: float | None = 0
    top_p: float | None = 1.0
    length: float | None = 200
    seed: float | None = 1337

    def checked(self) -> "Settings":
        """These with the right types. Raises UserError for what is missing or makes no sense."""
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise UserError(f"{name} is empty: give it a number")
            if name in ("top_k", "length", "seed") and not (math.isfinite(value) and value == int(value)):
                raise UserError(f"{name} is {value:g}: it must be a whole number")
        check(self.temperature, int(self.top_k), self.top_p)
        check_seed(int(self.seed))
        if not 1 <= self.length <= MOST_TOKENS:
            raise UserError(f"length is {int(self.length)}: it must be between 1 and {MOST_TOKENS} tokens")
        return Settings(float(self.temperature), int(self.top_k), float(self.top_p), int(self.length), int(self.seed))


def write(models: Models, session: Session, run: str | None, kernels: str, prompt: str, settings: Settings) -> Iterator:
    """Write a text into `session`, yielding after each token.

    Ends early when the session is told to stop, or writes another text. Raises UserError before anything is yielded;
    the text that was there stays then.
    """
    loaded = models.get(run, kernels)
    tokenizer = loaded.tokenizer
    prompt = prompt or ""
    if len(prompt) > LONGEST_PROMPT:
        raise UserError(
            f"the prompt has {len(prompt):,} characters, and this page takes {LONGEST_PROMPT:,}: shorten it (the model "
            f"sees only {loaded.model.config.block_size:,} tokens of it), or use generate.py --prompt-file"
        )
    generation.fitting(loaded.model, tokenizer)
    settings = settings.checked()
    length, notes = settings.length, list(loaded.warnings)
    if loaded.ops.interpreted and length > INTERPRETED_TOKENS:
        notes.append(f"{INTERPRETED_TOKENS} tokens are written, not {length:,}: the interpreter is slow")
        length = INTERPRETED_TOKENS
    ids = generation.encode_prompt(tokenizer, prompt)
    if not prompt:
        notes.append("The prompt is empty: the text begins at a new line")
    if (seen := generation.seen(loaded.model, len(ids))) < len(ids):
        block = loaded.model.config.block_size
        notes.append(f"The prompt has {len(ids):,} tokens, the block {block:,}: the model sees the last {seen:,}")
    with models.computing(loaded):
        writing = Writing(
            loaded.model,
            tokenizer,
            [prompt],
            alternatives=min(ALTERNATIVES, tokenizer.vocab_size),
            max_new_tokens=length,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            seed=settings.seed,
        )
    session.stop()  # of an older text, should one still grow
    session.text = Text(run, kernels, prompt, ids, notes, warning=loaded.ops.warning)
    yield from _grow(models, session.text, loaded, writing)


def _grow(models: Models, text: Text, loaded: Loaded, writing: Writing) -> Iterator:
    row, steps = writing.rows[0], iter(writing)
    while not (text.stopping or models.closing):
        with models.computing(loaded):
            piece = next(steps, None)
        if piece is None:
            break
        if len(row.ids) > len(text.tokens):  # the last piece is what was held back, and brings no token
            text.tokens.append(_token(loaded.tokenizer, row, piece[0]))
            text.ids.append(row.ids[-1])
            yield
    text.ended = _told(text)
    yield


def _token(tokenizer: Tokenizer, row: generation.Row, text: str) -> Token:
    alternatives = [(id, tokenizer.token_text(id), math.exp(value)) for id, value in row.alternatives[-1]]
    bits = max(0.0, -row.logprobs[-1] / math.log(2))
    return Token(row.ids[-1], text, tokenizer.token_text(row.ids[-1]), bits, alternatives)


def _told(text: Text) -> str:
    """How a text ended, in one line."""
    count = len(text.tokens)
    told = f"{'Stopped after ' if text.stopping else ''}{count:,} token{'' if count == 1 else 's'}"
    return f"{told}, {sum(token.bits for token in text.tokens) / count:.2f} bits of surprise each" if count else told


def attention(models: Models, session: Session) -> str:
    """A page (HTML) with the attention maps of the text so far, as its model sees its last tokens by themselves.

    Raises UserError while there is no text, and where its run is gone.
    """
    text = session.text
    if text is None:
        raise UserError("there is no text yet: write one first")
    loaded = models.get(text.run, text.kernels)
    config = loaded.model.config
    fitting = math.isqrt(_MAP_NUMBERS // (config.n_layer * config.n_head))
    ids = text.ids[-max(2, min(config.block_size, _MAP_TOKENS, fitting)) :]
    check_ids(loaded, ids)
    with models.computing(loaded):
        maps = attention_maps.attention_maps(loaded.model, torch.tensor(ids))
    labels = [attention_maps.shown(loaded.tokenizer.token_text(token)) for token in ids]
    title = f"The last {len(ids)} tokens" if len(ids) < len(text.ids) else f"All {len(ids)} tokens"
    return attention_maps.page(maps, labels, title=f"{title}, attention by {loaded.ops.names['attention']}")


def check_ids(loaded: Loaded, ids: list[int]) -> None:
    """Raise UserError for ids that the model does not have, as where another one was trained under the same name."""
    if max(ids) >= loaded.model.config.vocab_size:
        raise UserError("the run has another model since the text was written: write a new one first")
