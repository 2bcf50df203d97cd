"""What the playground does, without its page: runs, models, text with what the model thought of it, attention.

`minigpt/playground.py` is the page. Several people, or tabs, may use one `Models` at once: each has a `Session` of its
own, and the models compute one step at a time, in turns.
"""

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from . import attention_maps, backends, checkpoint, generation, process
from .backends import Backends
from .errors import UserError
from .generation import Writing
from .model import GPT
from .sampling import check, check_seed
from .tokenizers import Tokenizer

BACKENDS = ("torch", "triton")
"""What the page's switch offers."""
ALTERNATIVES = 8
LONGEST_PROMPT = 100_000
"""Characters of a prompt that the page takes."""
MOST_TOKENS = 1000
INTERPRETED_TOKENS = 16
"""Tokens to write at most where Triton's interpreter runs the kernels."""

_MODELS = 4  # kept in memory: two runs on both backends
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

    def checked(self, vocab_size: int) -> "Settings":
        """These with the right types. Raises UserError for what is missing or makes no sense."""
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise UserError(f"{name} is empty: give it a number")
            if name in ("top_k", "length", "seed") and not (math.isfinite(value) and value == int(value)):
                raise UserError(f"{name} is {value:g}: it must be a whole number")
        check(vocab_size, self.temperature, int(self.top_k), self.top_p)
        check_seed(int(self.seed))
        if not 1 <= self.length <= MOST_TOKENS:
            raise UserError(f"length is {int(self.length)}: it must be between 1 and {MOST_TOKENS} tokens")
        return Settings(float(self.temperature), int(self.top_k), float(self.top_p), int(self.length), int(self.seed))


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to use, and what there is to say about it."""

    found: checkpoint.Checkpoint
    model: GPT
    ops: Backends
    warnings: list[str]

    @property
    def tokenizer(self) -> Tokenizer:
        """That of the run."""
        return self.found.tokenizer

    @property
    def facts(self) -> str:
        """The model in one line."""
        config, progress = self.model.config, self.found.state.get("progress", {})
        words = [
            f"{self.model.parameter_count():,} parameters",
            f"{config.n_layer} layers x {config.n_head} heads",
            f"sees {config.block_size:,} tokens at once",
            f"{self.tokenizer.vocab_size:,} tokens ({self.tokenizer.kind})",
        ]
        if isinstance(step := progress.get("step"), int):
            words.append(f"trained for {step:,} steps")
        if isinstance(loss := progress.get("best_val_loss"), float) and math.isfinite(loss):
            words.append(f"validation loss {loss:.3f}")
        return ", ".join(words)


class Models:
    """The models of the runs in `root`, loaded when first asked for, the last few kept; safe to use from any thread.

    `turn` is held for every step that a model computes: attention maps swap a model's ops for a moment, and Triton's
    interpreter runs one program at a time.
    """

    def __init__(self, root: Path, device: torch.device):
        self.root, self.device = root, device
        self.turn = threading.RLock()
        self.closing = False
        self._loading = threading.Lock()
        self._kept: OrderedDict[tuple, Loaded] = OrderedDict()

    def runs(self) -> list[str]:
        """The names of the runs with a checkpoint, newest first."""
        return [path.name for path in checkpoint.runs(self.root)]

    def get(self, run: str | None, kernels: str) -> Loaded:
        """The model of a run on a backend; a checkpoint written since is loaded anew.

        Raises UserError for a run that is not, or no longer, in `root`, whose checkpoints are damaged, or where the
        backend cannot run.
        """
        if kernels not in BACKENDS:
            raise UserError(f"unknown backend {str(kernels)[:40]!r}: choose {' or '.join(BACKENDS)}")
        names = self.runs()
        if not names:
            raise UserError(f"there is no run in {self.root}: train one with `python train.py`, then refresh the list")
        if not run:
            raise UserError("no run is chosen: choose one from the list")
        if run not in names:  # never a path that somebody else has typed
            raise UserError(f"the run {run[:80]!r} is gone: refresh the list and choose another")
        with self._loading:
            key = (run, kernels, _written(self.root / run))
            if key not in self._kept:
                for old in [old for old in self._kept if old[:2] == key[:2]]:
                    del self._kept[old]
                self._kept[key] = self._load(self.root / run, kernels)
                if len(self._kept) > _MODELS:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            return self._kept[key]

    def _load(self, folder: Path, kernels: str) -> Loaded:
        warnings: list[str] = []
        found = checkpoint.find(folder, warnings.append)
        ops = backends.resolve(kernels, self.device)
        return Loaded(found, found.model(ops, self.device), ops, warnings)


def _written(run: Path) -> tuple:
    """What changes when a checkpoint of a run does."""
    found = []
    for path in sorted(run.glob("*/model.safetensors")):
        try:
            found.append((path.parent.name, path.stat().st_mtime_ns))
        except FileNotFoundError:
            continue
    return tuple(found)


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
    settings = settings.checked(generation.fitting(loaded.model, tokenizer))
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
    with models.turn:
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
    row, steps, seconds = writing.rows[0], iter(writing), 0.0
    while not (text.stopping or models.closing):
        with models.turn, process.threads(1 if loaded.ops.interpreted else torch.get_num_threads()):
            began = time.perf_counter()
            piece = next(steps, None)
            seconds += time.perf_counter() - began
        if piece is None:
            break
        if len(row.ids) > len(text.tokens):  # the last piece is what was held back, and brings no token
            text.tokens.append(_token(loaded.tokenizer, row, piece[0]))
            text.ids.append(row.ids[-1])
            yield
    text.ended = _told(text, seconds, loaded.ops.interpreted)
    yield


def _token(tokenizer: Tokenizer, row: generation.Row, text: str) -> Token:
    alternatives = [(id, tokenizer.token_text(id), math.exp(value)) for id, value in row.alternatives[-1]]
    bits = max(0.0, -row.logprobs[-1] / math.log(2))
    return Token(row.ids[-1], text, tokenizer.token_text(row.ids[-1]), bits, alternatives)


def _told(text: Text, seconds: float, interpreted: bool) -> str:
    """How a text ended, in one line."""
    tokens = text.tokens
    words = [f"{'Stopped after ' if text.stopping else ''}{len(tokens):,} token{'' if len(tokens) == 1 else 's'}"]
    if tokens:
        words.append(f"{sum(token.bits for token in tokens) / len(tokens):.2f} bits of surprise each")
        if not interpreted:  # an interpreter's time says nothing
            words.append(f"{len(tokens) / max(seconds, 1e-9):,.0f} tokens a second")
    return ", ".join(words)


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
    with models.turn, process.threads(1 if loaded.ops.interpreted else torch.get_num_threads()):
        maps = attention_maps.attention_maps(loaded.model, torch.tensor(ids))
    labels = [attention_maps.shown(loaded.tokenizer.token_text(token)) for token in ids]
    title = f"The last {len(ids)} tokens" if len(ids) < len(text.ids) else f"All {len(ids)} tokens"
    return attention_maps.page(maps, labels, title=f"{title}, attention by {loaded.ops.names['attention']}")


def check_ids(loaded: Loaded, ids: list[int]) -> None:
    """Raise UserError for ids that the model does not have, as where another one was trained under the same name."""
    if max(ids) >= loaded.model.config.vocab_size:
        raise UserError("the run has another model since the text was written: write a new one first")
