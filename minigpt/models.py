"""The models of a folder of runs, loaded when they are asked for and kept, for several threads."""

import math
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from . import backends, checkpoint, faults, process
from .backends import Backends
from .errors import UserError
from .model import GPT
from .tokenizers import Tokenizer

BACKENDS = ("torch", "triton")
"""What the playground's switch offers."""

_LESS = "take a shorter text, or a run of a smaller model"
_MODELS = 4  # kept in memory: two runs on both backends


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
            words.append(f"validation loss {loss:.3f} on a part of the split")
        return ", ".join(words)


class Models:
    """The models of the runs in `root`, loaded when first asked for, the last few kept; safe to use from any thread.

    Models compute in turns, a step at a time: attention maps swap a model's ops for a moment, and Triton's interpreter
    runs one program at a time.
    """

    def __init__(self, root: Path, device: torch.device):
        self.root, self.device = root, device
        self.closing = False
        self._turn = threading.Lock()
        self._loading = threading.Lock()
        self._kept: OrderedDict[tuple, Loaded] = OrderedDict()

    def runs(self) -> list[str]:
        """The names of the runs with a checkpoint, newest first."""
        return [path.name for path in checkpoint.runs(self.root)]

    def get(self, run: str | None, kernels: str) -> Loaded:
        """The model of a run on a backend; a checkpoint written since is loaded anew.

        Raises UserError for a run that is not, or no longer, in `root`, whose checkpoints are damaged, where the
        backend cannot run, or where there is no memory for the model.
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

    @contextmanager
    def computing(self, loaded: Loaded) -> Iterator[None]:
        """A block in which a model computes, and no other does. Raises UserError where it runs out of memory."""
        threads = process.threads(1) if loaded.ops.interpreted else nullcontext()
        with self._turn, threads, faults.memory_told(_LESS):
            yield

    @faults.memory_told(_LESS)
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
