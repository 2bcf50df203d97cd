"""One run of an experiment: all that decides its result, and where it happens."""

import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch

from .. import backends, dataset, storage
from ..backends import Backends
from ..config import TrainConfig, pick_device, pick_dtype
from ..dataset import Dataset

Result = dict[str, Any]
"""What a run measured, as JSON values; None stands for what is not a finite number."""

FORMAT = 1
"""Counts up when a run measures something else than before under the same settings."""


@dataclass(frozen=True)
class Run:
    """The settings of one run. Two experiments that need the same one share it."""

    kind: Literal["train", "sample", "cost"] = "train"
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    block_size: int = 64
    batch_size: int = 12
    steps: int = 1000
    learning_rate: float = 1e-3
    position: Literal["learned", "sinusoidal"] = "learned"
    tokenizer: Literal["char", "bpe"] = "char"
    vocab_size: int = 0
    """Tokens to learn, for bpe."""
    variant: str = "plain"
    """A name in variants.VARIANTS."""
    initial: Literal["by width", "0.02"] = "by width"
    kernels: str | None = None
    """The backend, where it is what is compared; None: what the command was told."""
    evaluations: int = 10
    eval_tokens: int = 20480
    """Validation tokens of each evaluation on the way; once more, four times as many, at the end."""
    temperatures: tuple[float, ...] = ()
    sample_tokens: int = 0
    seed: int = 1337

    def config(self) -> TrainConfig:
        """These settings as training knows them: a cosine to a tenth of the learning rate, a tenth of it warm-up."""
        return TrainConfig(
            n_layer=self.n_layer,
            n_head=self.n_head,
            n_embd=self.n_embd,
            block_size=self.block_size,
            batch_size=self.batch_size,
            max_steps=max(1, self.steps),
            learning_rate=self.learning_rate,
            min_learning_rate=self.learning_rate / 10,
            warmup_steps=self.steps // 10,
            position=self.position,
            seed=self.seed,
        )

    @property
    def repeated(self) -> bool:
        """Whether another seed could measure something else; memory alone it could not."""
        return self.steps > 0

    @property
    def work(self) -> float:
        """About how much there is to compute, in any unit: operations, and what each step costs besides."""
        tokens = self.batch_size * self.block_size
        head = 100 if self.tokenizer == "char" else 1024
        step = tokens * (12 * self.n_layer * self.n_embd**2 + head * self.n_embd) + 5e7 * self.n_layer
        evaluated = (self.evaluations + 4) * self.eval_tokens / tokens / 3
        sampled = len(self.temperatures) * self.sample_tokens / 8
        return step * (self.steps + evaluated + sampled)


@dataclass
class Place:
    """What every run of a command shares: the text, the device, the kernels."""

    data: str | None
    device_name: str = "auto"
    kernels: str | None = None
    announce: Callable[[str], None] = print
    stopping: Callable[[], bool] = lambda: False
    """Whether a person has asked to stop: looked at between steps."""
    _datasets: dict[tuple[str, int], Dataset] = field(default_factory=dict)

    @cached_property
    def device(self) -> torch.device:
        """Where runs happen."""
        return pick_device(self.device_name)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The precision of the matrix products."""
        return pick_dtype("auto", self.device)

    def ops(self, kernels: str | None = None) -> Backends:
        """The backend called `kernels`, or the one that the command was told."""
        return backends.resolve(kernels or self.kernels, self.device)

    def dataset(self, tokenizer: str = "char", vocab_size: int = 0) -> Dataset:
        """The text in these tokens, loaded once."""
        key = (tokenizer, vocab_size)
        if key not in self._datasets:
            self._datasets[key] = dataset.load(self.data, tokenizer, vocab_size, announce=self.announce)
        return self._datasets[key]

    def settings(self, run: Run) -> dict[str, Any]:
        """All that the result of `run` depends on here, as JSON values: what was stored with others is another run."""
        found = asdict(run) | {"temperatures": list(run.temperatures)}
        found |= {
            "format": FORMAT,
            "text": self.dataset(run.tokenizer, run.vocab_size).sha256,
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "backends": self.ops(run.kernels).names,
            "torch": storage.versions()["torch"],
        }
        if run.kind == "cost":  # a time is that of one machine
            found |= {"machine": self.machine, "threads": torch.get_num_threads()}
        return found

    @property
    def settings_told(self) -> str:
        """What the runs compute with, in words."""
        count = torch.get_num_threads()
        threads = "" if self.device.type == "cuda" else f" on {count} thread{'s' if count > 1 else ''}"
        return f"torch {storage.versions()['torch']}{threads}, {str(self.dtype).removeprefix('torch.')}"

    @cached_property
    def machine(self) -> str:
        """The name of the GPU, or of the processor."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return processor()


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def with_seeds(run: Run, seeds: int) -> list[Run]:
    """The run with `seeds` seeds, one after the other from its own on."""
    return [replace(run, seed=run.seed + number) for number in range(seeds)]
