"""Checkpoints on disk: safetensors for tensors, JSON for the rest; nothing in them can run code.

A checkpoint is a folder:

    config.json            the settings of the model and of the training
    tokenizer.json         the tokenizer
    state.json             how far the run is: step, losses, ...
    model.safetensors      the weights, by parameter name
    optimizer.safetensors  AdamW's state by parameter name, and the states of the random generators (for --resume)

It is written beside its final place and renamed there once it is whole and on the disk, so that a full disk, a crash or
a kill never leaves half of one: the one before stays.
"""

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import tokenizers
from .backends import Backends
from .config import ModelConfig, TrainConfig
from .errors import UserError, writing
from .model import GPT
from .tokenizers import CharTokenizer

NAMES = ("best", "last")
"""The checkpoints of a run: of the lowest validation loss, and of the last step."""

_MODEL, _OPTIMIZER = "model.safetensors", "optimizer.safetensors"
_RNG = "random generator "


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint's JSON files say; its tensors stay on the disk until they are asked for."""

    folder: Path
    model_config: ModelConfig
    config: TrainConfig
    tokenizer: CharTokenizer
    state: dict[str, Any]

    def load_weights(self, model: GPT) -> None:
        """Copy the weights into `model`. Raises UserError when they are damaged or of another shape."""
        path = self.folder / _MODEL
        stored = _read_tensors(path)
        wanted = dict(model.named_parameters())
        for name in sorted(wanted.keys() | stored.keys()):
            there = tuple(stored[name].shape) if name in stored else "nothing"
            needed = tuple(wanted[name].shape) if name in wanted else "nothing"
            if there != needed:
                raise UserError(f"{path} is of another shape than the model: {name} is {there} there, {needed} here")
        with torch.no_grad():
            for name, parameter in wanted.items():
                parameter.copy_(stored[name])

    def load_optimizer(self, model: GPT, optimizer: torch.optim.Optimizer) -> None:
        """Put the optimizer and the random generators where the run left them. Raises UserError as load_weights."""
        path = self.folder / _OPTIMIZER
        stored = _read_tensors(path)
        generators = {name: stored.pop(name) for name in list(stored) if name.startswith(_RNG)}
        states: dict[str, dict[str, Tensor]] = {}
        for key, tensor in stored.items():
            name, _, slot = key.rpartition("/")
            states.setdefault(name, {})[slot] = tensor
        by_parameter = {parameter: states.get(name) for name, parameter in model.named_parameters()}
        ordered = [by_parameter[parameter] for group in optimizer.param_groups for parameter in group["params"]]
        shapes = [tuple(parameter.shape) for group in optimizer.param_groups for parameter in group["params"]]
        for state, shape in zip(ordered, shapes, strict=True):
            if state is None or any(t.dim() and tuple(t.shape) != shape for t in state.values()):
                raise UserError(f"{path} does not fit the model: take another checkpoint, or train again")
        optimizer.load_state_dict(
            {"state": dict(enumerate(ordered)), "param_groups": optimizer.state_dict()["param_groups"]}
        )
        _set_generators(generators, next(model.parameters()).device)


def save(
    folder: Path,
    model: GPT,
    tokenizer: CharTokenizer,
    config: TrainConfig,
    state: dict[str, Any],
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Write a checkpoint to `folder`, in place of the one there; with `optimizer`, all that a resumed run needs.

    `state` holds JSON values. Raises UserError when it cannot be written, and leaves what was there.
    """
    draft = folder.with_name(folder.name + ".writing")
    try:
        with writing(folder):
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            _write_json(draft / "config.json", {"model": asdict(model.config), "training": config.to_json()})
            _write_json(draft / "tokenizer.json", tokenizer.to_json())
            _write_json(draft / "state.json", state)
            _write_tensors(draft / _MODEL, dict(model.named_parameters()))
            if optimizer is not None:
                _write_tensors(draft / _OPTIMIZER, _optimizer_tensors(model, optimizer))
            _sync(draft)
            _replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def load(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`. Raises UserError when it is missing or damaged."""
    _finish_replacing(folder)
    if not folder.is_dir():
        raise UserError(f"there is no checkpoint {folder}: train first, or name another folder")
    config = _read_json(folder / "config.json")
    try:
        model_config = ModelConfig(**config["model"])
        training = TrainConfig.from_json(config["training"])
    except (TypeError, KeyError) as error:
        raise UserError(f"{folder / 'config.json'} is damaged ({error}): take another checkpoint") from None
    tokenizer = tokenizers.load(_read_json(folder / "tokenizer.json"))
    return Checkpoint(folder, model_config, training, tokenizer, _read_json(folder / "state.json"))


def load_model(folder: Path, ops: Backends, device: torch.device) -> tuple[GPT, CharTokenizer]:
    """The model of the checkpoint in `folder`, on `device` and ready to use, and its tokenizer. Raises as `load`."""
    found = load(folder)
    model = GPT(found.model_config, ops)
    found.load_weights(model)
    return model.to(device).eval(), found.tokenizer


def find(path: Path) -> Path:
    """The folder of the checkpoint that `path` means: itself, or the best one (else the last) of a run's folder.

    Raises UserError when there is none.
    """
    for folder in (*(path / name for name in NAMES), path):
        _finish_replacing(folder)
        if (folder / _MODEL).is_file():
            return folder
    raise UserError(f"there is no checkpoint in {path}: train first, or name another folder")


def newest_run(root: Path = Path("runs")) -> Path:
    """The run under `root` whose checkpoint was written last. Raises UserError when there is none."""
    found = [path for name in NAMES for path in root.glob(f"*/{name}/{_MODEL}")]
    if not found:
        raise UserError(f"there is no run with a checkpoint in {root}: train first, or name the run's folder")
    return max(found, key=lambda path: path.stat().st_mtime).parent.parent


def _optimizer_tensors(model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {
        f"{name}/{slot}": value
        for name, parameter in model.named_parameters()
        for slot, value in optimizer.state[parameter].items()
    }
    tensors[_RNG + "cpu"] = torch.get_rng_state()
    device = next(model.parameters()).device
    if device.type == "cuda":
        tensors[_RNG + "cuda"] = torch.cuda.get_rng_state(device)
    return tensors


def _set_generators(states: dict[str, Tensor], device: torch.device) -> None:
    if (state := states.get(_RNG + "cpu")) is not None:
        torch.set_rng_state(state)
    if device.type == "cuda" and (state := states.get(_RNG + "cuda")) is not None:
        torch.cuda.set_rng_state(state, device)


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        # safetensors tells the system's errors in words of its own, the number among them.
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else 0, str(error)) from error
    _sync(path)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: take another checkpoint, or train again") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}): take another checkpoint, or train again") from None


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _sync(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: take another checkpoint, or train again") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}): take another checkpoint, or train again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: take another checkpoint, or train again")
    return value


def _sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open a folder
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _previous(folder: Path) -> Path:
    return folder.parent / f"{folder.name}.previous"  # with_name would refuse "."


def _replace(draft: Path, folder: Path) -> None:
    """Put `draft` where `folder` is. Between the two renames the old checkpoint is `_previous(folder)`."""
    previous = _previous(folder)
    shutil.rmtree(previous, ignore_errors=True)
    if folder.exists():
        folder.rename(previous)
    draft.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(previous, ignore_errors=True)


def _finish_replacing(folder: Path) -> None:
    """Undo a `_replace` that was cut off between its two renames."""
    previous = _previous(folder)
    if previous.is_dir() and not folder.exists():
        with writing(folder):
            previous.rename(folder)
