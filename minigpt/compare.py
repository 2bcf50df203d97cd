"""The gate for a change of kernels: did it change the learning? Two backends, the same data and the same seeds.

Three questions, each with a number and a limit:

1. Gradients, before any step, against a float64 run of plain arithmetic: is one backend further off than the other
   explains? The sharpest of the three: a factor that is wrong by 1% changes a loss curve less than a seed does.
2. Every step: do mean loss and gradient norm differ by more than two sets of seeds would?
3. At the end: does the validation loss?

A difference between the means of two sets of S seeds stays within 2 s sqrt(2 / S) in 19 of 20 cases, s the standard
deviation from seed to seed: what is within that, seeds alone explain.
"""

import csv
import io
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import backends, dataset, generators, plots, process
from .allocator import keep_freed_memory
from .batches import Batches
from .config import TrainConfig, pick_device, pick_dtype
from .errors import UserError
from .evaluate import evaluate
from .learning import Learner
from .model import GPT
from .report import write_text


@dataclass(frozen=True)
class Check:
    """One measured number, and the largest that agrees; `what` says of what."""

    what: str
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether it agrees; what is not a finite number never does."""
        return math.isfinite(self.value) and self.value <= self.limit


@dataclass(frozen=True)
class Error:
    """How far the gradient of one parameter is off: the largest errors of a and b, and what they are relative to."""

    parameter: str
    dtype: str
    a: float
    b: float
    largest: float
    """The largest gradient of the parameters of its kind, in all blocks; 1 where that is zero in mathematics."""


@dataclass(frozen=True)
class Result:
    """What two backends did. Curves are (seeds, steps) float64, losses in nats per token; validation (seeds,)."""

    losses: tuple[np.ndarray, np.ndarray]
    norms: tuple[np.ndarray, np.ndarray]
    validation: tuple[np.ndarray, np.ndarray]
    errors: list[Error]
    checks: list[Check]


class Trial:
    """The data on which runs are compared, and the settings that they share."""

    def __init__(self, config: TrainConfig, announce: Callable[[str], None]):
        self.config = config
        self.device = pick_device(config.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.dtype = pick_dtype(config.dtype, self.device)
        data = dataset.load(config.data, config.tokenizer, config.vocab_size, announce=announce)
        self.tokenizer, self.tokens, self.validation = data.tokenizer, data.train, data.validation.to(self.device)

    def learner(self, kernels: str, seed: int, dtype: torch.dtype) -> Learner:
        """A fresh model on `kernels`, with the weights and the data of `seed`; float64 makes its weights that too."""
        config = replace(self.config, kernels=kernels, seed=seed)
        generators.seed(seed)
        model = GPT(config.model_config(self.tokenizer.vocab_size), backends.resolve(kernels, self.device))
        model.to(self.device, torch.float64 if dtype == torch.float64 else None)
        batches = Batches(self.tokens, config.window or config.block_size, config.batch_size, seed, self.device)
        return Learner(model, config, batches, torch.float32 if dtype == torch.float64 else dtype)

    def train(self, kernels: str, seed: int) -> tuple[np.ndarray, float]:
        """Loss and gradient norm of every step (steps, 2), and the validation loss at the end."""
        learner = self.learner(kernels, seed, self.dtype)
        with process.threads(1 if learner.model.ops.interpreted else torch.get_num_threads()):
            measured = torch.stack([learner.step(number) for number in range(self.config.max_steps)])
            found = evaluate(
                learner.model,
                self.validation,
                self.tokenizer.characters_per_token,
                max_tokens=self.config.eval_tokens,
                dtype=self.dtype,
            )
        return measured.double().cpu().numpy(), found.loss

    def gradients(self, kernels: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """The gradients of the first step by parameter, float64, without dropout; qkv as three parameters."""
        learner = self.learner(kernels, self.config.seed, dtype)
        learner.model.eval()
        if learner.scaler.is_enabled():  # its first scale is found by overflowing
            learner.scaler = torch.amp.GradScaler(self.device.type, init_scale=2.0**8)
        with process.threads(1 if learner.model.ops.interpreted else torch.get_num_threads()):
            learner.backward(learner.data(0))
        learner.scaler.unscale_(learner.optimizer)
        found = {}
        for name, parameter in learner.model.named_parameters():
            head, dot, last = name.rpartition("qkv.")
            parts = zip(("query.", "key.", "value."), parameter.grad.double().chunk(3), strict=True) if dot else ()
            found |= {f"{head}{part}{last}": gradient for part, gradient in parts} or {name: parameter.grad.double()}
        return found


def compare(a: str, b: str, config: TrainConfig, seeds: int, announce: Callable[[str], None] = print) -> Result:
    """Train on both backends for config.max_steps steps with `seeds` seeds from config.seed on.

    `announce` gets a line for each run. Raises UserError for what cannot run, and for fewer than 2 seeds.
    """
    if seeds < 2:
        raise UserError(f"seeds is {seeds}: it takes at least 2 to tell what seeds alone explain")
    for name in (a, b):
        backends.resolve(name, pick_device(config.device))
    trial = Trial(config, announce)
    errors = _gradient_errors(trial, a, b)
    curves: dict[int, list[np.ndarray]] = {0: [], 1: []}
    finals: dict[int, list[float]] = {0: [], 1: []}
    for seed in range(config.seed, config.seed + seeds):
        for side, name in enumerate((a, b)):
            measured, final = trial.train(name, seed)
            curves[side].append(measured)
            finals[side].append(final)
            announce(f"seed {seed}, {name}: training loss {measured[-1, 0]:.4f}, validation loss {final:.4f}")
    stacked = [np.stack(curves[side]) for side in (0, 1)]
    losses, norms = (tuple(side[:, :, index] for side in stacked) for index in (0, 1))
    validation = tuple(np.array(finals[side]) for side in (0, 1))
    checks = [
        *_gradient_checks(errors),
        _seed_check("training loss, the step that differs most", *losses),
        _seed_check("gradient norm, the step that differs most", *norms),
        _seed_check("validation loss", *(values[:, None] for values in validation)),
    ]
    return Result(losses, norms, validation, errors, checks)


def write(result: Result, a: str, b: str, config: TrainConfig, folder: Path) -> None:
    """Write compare.csv, gradients.csv, compare.json and compare.png to `folder`."""
    table = [
        (config.seed + seed, step + 1, *(f"{values[side][seed, step]:.9g}" for values in (result.losses, result.norms)
                                          for side in (0, 1)))
        for seed, step in np.ndindex(result.losses[0].shape)
    ]  # fmt: skip
    _write_csv(folder / "compare.csv", ("seed", "step", "loss_a", "loss_b", "grad_norm_a", "grad_norm_b"), table)
    errors = [(e.parameter, e.dtype, f"{e.a:.3g}", f"{e.b:.3g}", f"{e.largest:.3g}") for e in result.errors]
    _write_csv(folder / "gradients.csv", ("parameter", "dtype", "error_a", "error_b", "relative_to"), errors)
    summary = {
        "a": a,
        "b": b,
        "preset": config.preset,
        "steps": config.max_steps,
        "seeds": list(range(config.seed, config.seed + len(result.validation[0]))),
        "validation_loss": {
            side: _finite(values.tolist()) for side, values in zip("ab", result.validation, strict=True)
        },
        "checks": [_finite(asdict(check)) | {"passed": check.passed} for check in result.checks],
    }
    write_text(folder / "compare.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
    plots.comparison(result.losses, (a, b), folder / "compare.png", title=f"{config.preset}: {a} and {b}")


def _gradient_errors(trial: Trial, a: str, b: str) -> list[Error]:
    exact = trial.gradients("eager", torch.float64)
    found = []
    # In fp32 a wrong factor shows best; half precision, where it is what trains, has kernels of its own.
    for dtype in dict.fromkeys((torch.float32, trial.dtype)):
        sides = [trial.gradients(name, dtype) for name in (a, b)]
        for name, truth in exact.items():
            kind = _kind(name)
            same = [gradient for other, gradient in exact.items() if _kind(other) == kind]
            # Softmax does not see what all keys share: that gradient is nothing but rounding.
            largest = 1.0 if kind.endswith("key.bias") else float(max(gradient.abs().max() for gradient in same))
            off = [float((side[name] - truth).abs().max()) / (largest or 1.0) for side in sides]
            found.append(Error(name, str(dtype).removeprefix("torch."), *off, largest))
    return found


def _kind(parameter: str) -> str:
    """The name of a parameter without the number of its block."""
    return ".".join(part for part in parameter.split(".") if not part.isdecimal())


def _gradient_checks(errors: list[Error]) -> list[Check]:
    """The worst error of a against four times that of b, and the other way round, for each dtype."""
    checks = []
    for dtype in dict.fromkeys(error.dtype for error in errors):
        mine = [error for error in errors if error.dtype == dtype]
        eps = torch.finfo(getattr(torch, dtype)).eps
        for side, other in (("a", "b"), ("b", "a")):
            worst = max(mine, key=lambda error: _or_infinite(getattr(error, side)))
            limit = 4 * max(_or_infinite(getattr(error, other)) for error in mine) + 8 * eps
            checks.append(Check(f"gradient of {side} in {dtype}, {worst.parameter}", getattr(worst, side), limit))
    return checks


def _or_infinite(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _seed_check(what: str, a: np.ndarray, b: np.ndarray) -> Check:
    """The largest difference over the steps between the means of a and b, (seeds, steps) each, and what seeds explain.

    The spread is that of both backends, pooled over the steps: three seeds alone can be close together by chance. What
    is not finite on either side, as where both have skipped a step, is no difference.
    """
    skipped = ~np.isfinite(a) & ~np.isfinite(b)
    a, b = np.where(skipped, 0.0, a), np.where(skipped, 0.0, b)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return Check(what, math.inf, 0.0)
    spread = math.sqrt(np.mean([np.var(side, axis=0, ddof=1).mean() for side in (a, b)]))
    difference = np.abs(a.mean(axis=0) - b.mean(axis=0))
    return Check(what, float(difference.max()), 2 * spread * math.sqrt(2 / len(a)))


def _finite(values: Any) -> Any:
    """JSON has no number for what is not finite."""
    if isinstance(values, dict):
        return {name: _finite(value) for name, value in values.items()}
    if isinstance(values, list):
        return [_finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def _write_csv(path: Path, header: tuple[str, ...], rows: list[tuple]) -> None:
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([header, *rows])
    write_text(path, table.getvalue())
