"""Going on with a run: what it may change, how far it is, and whether it repeats the run that was never stopped."""

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from . import storage
from .backends import Backends
from .checkpoint import Checkpoint
from .config import DTYPES, TrainConfig
from .dataset import Dataset
from .errors import UserError

# What --resume may change: where and how the run computes and reports, and how far it goes, but not what it computes.
_CHANGEABLE = {
    "resume", "out", "data", "kernels", "device", "dtype", "tf32", "deterministic", "compile", "cuda_graph",
    "checkpoint_activations", "parallel", "max_steps", "log_interval", "eval_interval", "eval_tokens", "keep",
    "val_tokens", "sample_tokens", "prompt", "tensorboard", "wandb",
}  # fmt: skip
# Their product says which windows a step trains on; how it is cut up, the memory of the device.
_CUTS = ("batch_size", "grad_accumulation")


@dataclass
class Progress:
    """How far a run is, as its state.json holds it."""

    step: int = 0
    """Optimizer steps done."""
    initial_loss: float | None = None
    """Training loss of the first step whose loss was finite."""
    train_loss: float | None = None
    """Training loss of the last such step."""
    best_val_loss: float | None = None
    best_step: int = 0
    seconds: float = 0.0
    """Wall time since the run began, of every session of it."""
    train_seconds: float = 0.0
    """Time in training steps alone since `speed_from`, Session.untimed of each session left out."""
    train_tokens: int = 0
    """Tokens trained on in that time."""
    speed_from: int = 0
    """The step after which all was computed on what the run is on now, and as now: a speed is of those steps."""
    skipped: int = 0
    """Steps whose loss or gradient was not finite, so that they changed nothing."""
    skipped_in_a_row: int = 0
    """Those of them just before this step."""


def check(config: TrainConfig, found: Checkpoint) -> None:
    """Raise UserError where `config` is not that of the run in `found`, saying what differs."""
    if config.out is not None:
        raise UserError("--resume goes on in the folder that it names: leave out --out")
    changeable, changed = set(_CHANGEABLE), []
    if _windows_per_step(config) == _windows_per_step(found.config):
        changeable |= set(_CUTS)
    for name in (field.name for field in fields(config) if field.name not in changeable):
        here, there = getattr(config, name), getattr(found.config, name)
        if here != there:
            changed.append(f"--{name.replace('_', '-')} ({there} there, {here} here)")
    if changed:
        raise UserError(f"--resume goes on with the same run: leave out {', '.join(changed)}, or start a new run")
    done = found.state["progress"]["step"]
    if config.max_steps < done:
        raise UserError(f"{config.resume} has done {done} steps already, more than --max-steps {config.max_steps}")


def _windows_per_step(config: TrainConfig) -> int:
    return math.prod(getattr(config, name) for name in _CUTS)


def finished(folder: Path, steps: int) -> dict[str, Any] | None:
    """The summary in a run's folder if it is of so many steps, else None."""
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return summary if isinstance(summary, dict) and summary.get("steps") == steps else None


def without_effect(config: TrainConfig, found: Checkpoint) -> str:
    """The settings that `config` asks for anew of a run that is finished, as the end of a sentence; "" for none."""
    told = [f"--{name.replace('_', '-')}" for name in ("val_tokens", "sample_tokens", "prompt", "eval_tokens")
            if getattr(config, name) != getattr(found.config, name)]  # fmt: skip
    return f"; {', '.join(told)} would change nothing without more steps" if told else ""


def surroundings(
    config: TrainConfig, ops: Backends, device: torch.device, dtype: torch.dtype, threads: int, processes: int
) -> dict[str, str]:
    """All that decides how a run rounds and that `check` lets change: where it differs, so may the last bits."""
    found = {"device": device_name(device), "dtype": dtype_name(dtype), **ops.names}
    rounding = ("tf32", "deterministic", "compile", "checkpoint_activations", "parallel", "max_steps", *_CUTS)
    found |= {name: str(getattr(config, name)) for name in rounding} | {"processes": str(processes)}
    # A captured step has its learning rate in fp32, and any other one as a double.
    found |= {"threads": str(threads)} if device.type == "cpu" else {"cuda_graph": str(config.cuda_graph)}
    known = storage.versions()
    libraries = ("torch", "triton", "numpy") if "triton" in ops.names.values() else ("torch", "numpy")
    return found | {name: known[name] for name in libraries if name in known}


def why_not_exact(before: dict[str, str], now: dict[str, str]) -> str | None:
    """Why a run that goes on may differ from one that was never stopped; None when it is the same to the last bit."""
    changed = [name for name in before | now if before.get(name) != now.get(name)]
    if changed:
        return ", ".join(f"{name} {before.get(name, 'none')} before, {now.get(name, 'none')} now" for name in changed)
    if now["deterministic"] == "True":
        return None
    on_cpu = now["device"].startswith("CPU")
    if now["compile"] == "True" and not (on_cpu and now["threads"] == "1"):
        return "torch.compile adds the gradients of embeddings in no fixed order; --deterministic gives it one"
    if not on_cpu and now["attention"] == "torch":
        return "PyTorch's attention on a GPU adds gradients in no fixed order; --deterministic gives it one"
    return None


def another_speed(found: Checkpoint, now: dict[str, str]) -> bool:
    """Whether a run that goes on may be faster or slower than it was."""
    before = found.state["surroundings"]
    return any(before.get(name) != now.get(name) for name in (before | now).keys() - {"max_steps"})


def device_name(device: torch.device) -> str:
    """What a device is: a GPU's name, or CPU and the widest vectors that PyTorch uses on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.backends.cpu.get_cpu_capability()})"


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a precision in the settings."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def check_text(data: str | None, found: Checkpoint, corpus: Dataset) -> None:
    """Raise UserError where `corpus`, which --data `data` gave, is not what the run in `found` trained on."""
    stored = str(found.state.get("corpus"))
    if stored == corpus.sha256:
        if corpus.tokenizer != found.tokenizer:
            raise UserError(f"{found.folder} was trained with another tokenizer than that of {corpus.source}")
        return
    if data is not None and data == found.config.data:
        raise UserError(
            f"{corpus.source} has changed since {found.folder} was written (SHA-256 {stored[:12]} then, "
            f"{corpus.sha256[:12]} now): put the text back, name it with --data, or start a new run"
        )
    if "corpus" not in found.state:
        raise UserError(f"{found.folder} was not trained here, and does not tell its text: name one with --data")
    raise UserError(f"{found.folder} was trained on another text than {corpus.source}: name it with --data")
