"""Checkpoints on disk: safetensors for tensors, JSON for the rest; nothing in them can run code.

A checkpoint is a folder:

    config.json            the settings of the model and of the training
    tokenizer.json         the tokenizer
    state.json             how far the run is: step, losses, the text's checksum, what it ran on, ...
    model.safetensors      the weights, by parameter name
    optimizer.safetensors  AdamW's state by parameter name (for --resume, as the next)
    generators.json        where the random generators stand
    checksums.json         the SHA-256 of each of these, the versions that wrote them, the version of the format

What is a function of the step is not stored: the learning rate, and the position in the data.

It is written beside its final place and renamed there once it is whole and on the disk. The one that was there becomes
`last.1`, that one `last.2`, and so on, as many as are to be kept. So a full disk, a crash or a kill at any moment
leaves a whole one, and what is damaged later has one before it to go back to.
"""

import itertools
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import generators, parallel, storage, tokenizers
from .backends import Backends
from .config import ModelConfig, TrainConfig
from .errors import Damaged, UserError, writing
from .model import GPT
from .parallel import ALONE, World
from .tokenizers import Tokenizer

BEST, LAST = "best", "last"
"""The checkpoints of a run: of the lowest validation loss, and of the last step."""

_MODEL, _OPTIMIZER, _GENERATORS = "model.safetensors", "optimizer.safetensors", "generators.json"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint's JSON files say; its tensors stay on the disk until they are asked for."""

    folder: Path
    model_config: ModelConfig
    config: TrainConfig
    tokenizer: Tokenizer
    state: dict[str, Any]

    def model(self, ops: Backends, device: torch.device) -> GPT:
        """The model, on `device` and ready to use. Raises UserError as load_weights."""
        model = GPT(self.model_config, ops)
        self.load_weights(model)
        return model.to(device).eval()

    def load_weights(self, model: GPT) -> None:
        """Copy the weights into `model`. Raises UserError when they are damaged or of another shape."""
        path = self.folder / _MODEL
        stored = storage.read_tensors(path)
        wanted = dict(model.named_parameters())
        for name in sorted(wanted.keys() | stored.keys()):
            there = tuple(stored[name].shape) if name in stored else "nothing"
            needed = tuple(wanted[name].shape) if name in wanted else "nothing"
            if there != needed:
                raise UserError(f"{path} is of another shape than the model: {name} is {there} there, {needed} here")
        with torch.no_grad():
            for name, parameter in wanted.items():
                parameter.copy_(stored[name])

    def load_optimizer(self, model: GPT, optimizer: torch.optim.Optimizer, rank: int = 0) -> None:
        """Put the optimizer and the random generators where the run left them. Raises UserError as load_weights.

        The generators of the process of that `rank`; they stay as they are if the run had fewer processes.
        """
        path = self.folder / _OPTIMIZER
        if stored := storage.read_tensors(path):  # before the first step there is nothing
            states: dict[str, dict[str, Tensor]] = {}
            for key, tensor in stored.items():
                name, _, slot = key.rpartition("/")
                states.setdefault(name, {})[slot] = tensor
            by_parameter = {parameter: states.get(name) for name, parameter in model.named_parameters()}
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            ordered = [by_parameter[parameter] for parameter in parameters]
            for state, parameter in zip(ordered, parameters, strict=True):
                if state is None or any(t.dim() and t.shape != parameter.shape for t in state.values()):
                    raise UserError(f"{path} does not fit the model: take another checkpoint, or train again")
                state |= {slot: parallel.part_of(t, parameter) for slot, t in state.items() if t.dim()}
            optimizer.load_state_dict(
                {"state": dict(enumerate(ordered)), "param_groups": optimizer.state_dict()["param_groups"]}
            )
        found = storage.read_json(self.folder / _GENERATORS)
        states = [found, *found.get("others", [])]
        if rank < len(states):
            generators.restore(states[rank], next(model.parameters()).device)


def save(
    folder: Path,
    model: GPT,
    tokenizer: Tokenizer,
    config: TrainConfig,
    state: dict[str, Any],
    optimizer: torch.optim.Optimizer | None = None,
    *,
    keep: int = 0,
    world: World = ALONE,
) -> None:
    """Write a checkpoint to `folder`; with `optimizer`, all that a resumed run needs.

    The `keep` checkpoints before it stay, as FOLDER.1 (the newest of them), FOLDER.2, ... `state` holds JSON values.
    Raises UserError when it cannot be written, and leaves what was there. Several processes call it together, and the
    first one writes: what a checkpoint holds does not depend on how many they are, or on what each has.
    """
    parallel.only_parts(model)
    files = {_MODEL: _whole(dict(model.named_parameters()), world)}
    described: dict[str, dict[str, Any]] = {
        "config.json": {"model": asdict(model.config), "training": config.to_json()},
        "tokenizer.json": tokenizer.to_json(),
        "state.json": state,
    }
    if optimizer is not None:
        files[_OPTIMIZER] = _whole(_optimizer_tensors(model, optimizer), world)
        mine, *others = world.gather(generators.states(next(model.parameters()).device))
        described[_GENERATORS] = mine | ({"others": others} if others else {})
    world.first_does(lambda: _write(folder, described, files, keep))


def _write(folder: Path, described: dict[str, dict[str, Any]], files: dict[str, dict[str, Tensor]], keep: int) -> None:
    draft = folder.with_name(folder.name + ".writing")
    try:
        with writing(folder):
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            for name, value in described.items():
                storage.write_json(draft / name, value)
            for name, tensors in files.items():
                storage.write_tensors(draft / name, tensors)
            storage.seal(draft)
            _move_in(draft, folder, keep)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _whole(tensors: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """These tensors as they are; those that fsdp has cut up put together, on the host of the first process."""
    if world.kind != "fsdp":
        return tensors
    found = {}
    for name, tensor in tensors.items():
        together = parallel.whole(tensor.detach())  # one after another: the device need not hold all of them
        if world.first:
            found[name] = together.cpu()
    return found


def load(folder: Path, *, to_resume: bool = False) -> Checkpoint:
    """The checkpoint in `folder`, its checksums compared; those that only `to_resume` needs, only for it.

    Raises Damaged when it is not whole, and UserError when it is missing or of a newer version.
    """
    _require_folder(folder)
    storage.verify(folder, leave_out=() if to_resume else (_OPTIMIZER, _GENERATORS))
    return _described(folder)


def stored_config(run: Path) -> TrainConfig:
    """The settings in the last checkpoint of a run; its tensors are not looked at. Raises UserError as `resumable`."""

    def settings(folder: Path) -> TrainConfig:
        storage.verify(folder, leave_out=(_MODEL, _OPTIMIZER))
        return _described(folder).config

    folders = _with_previous(run / LAST)
    if (run / BEST).is_dir() and not any(folder.is_dir() for folder in folders):
        raise UserError(
            f"{run} has nothing to go on with, only its best checkpoint: an imported model has no training to go on "
            "with, and of a run the last checkpoint is needed"
        )
    return _first_whole(folders, settings)[0]


def resumable(run: Path, announce: Callable[[str], None]) -> Checkpoint:
    """The last checkpoint of a run that is whole, for the one training that goes on with it.

    Damaged ones after it are set aside, as last.damaged, and `announce` gets a line about each. Raises UserError when
    there is no whole one, or when a newer version has written it.
    """
    found, damaged = _first_whole(_with_previous(run / LAST), lambda folder: load(folder, to_resume=True))
    if not (run / LAST).exists():
        announce(f"WARNING: {run / LAST} is missing. Going on from the checkpoint before it, {found.folder}")
    for folder, error in damaged:
        aside = folder.with_name(f"{folder.name}.damaged")
        with writing(aside):
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
        announce(
            f"WARNING: {error.problem}. Going on from the checkpoint before it, {found.folder}; "
            f"what is left of the damaged one is {aside}"
        )
    return found


def find(path: Path, announce: Callable[[str], None]) -> Checkpoint:
    """The checkpoint that `path` means: itself, or the best one (else the last) of a run's folder.

    Where that one is damaged, the next one of the run is taken, and `announce` gets a line that says so. Raises
    UserError when there is none that is whole.
    """
    folders = [folder for name in (BEST, LAST) for folder in _with_previous(path / name)]
    folders = [folder for folder in folders if folder.is_dir()]
    if not folders and ((path / storage.SEAL).is_file() or (path / _MODEL).is_file()):
        folders = [path]
    if not folders:
        raise UserError(f"there is no checkpoint in {path}: train first, or name another folder")
    found, damaged = _first_whole(folders, load)
    for _, error in damaged:
        announce(f"WARNING: {error.problem}. Taking {found.folder} instead")
    return found


def runs(root: Path = Path("runs")) -> list[Path]:
    """The folders in `root` that hold a checkpoint, the one whose checkpoint was written last first."""
    newest: dict[Path, float] = {}
    for name, end in itertools.product((BEST, LAST), ("", ".[0-9]*")):
        for path in root.glob(f"*/{name}{end}/{_MODEL}"):
            with suppress(FileNotFoundError):  # a training renames its checkpoints, a person removes them
                run = path.parent.parent
                newest[run] = max(newest.get(run, 0.0), path.stat().st_mtime)
    return sorted(newest, key=lambda run: newest[run], reverse=True)


def newest_run(root: Path = Path("runs")) -> Path:
    """The run under `root` whose checkpoint was written last. Raises UserError when there is none."""
    found = runs(root)
    if not found:
        raise UserError(f"there is no run with a checkpoint in {root}: train first, or name the run's folder")
    return found[0]


def _first_whole(folders: list[Path], read: Callable[[Path], Any]) -> tuple[Any, list[tuple[Path, Damaged]]]:
    """What `read` makes of the first folder that it does not find damaged, and the damaged ones before that."""
    damaged: list[tuple[Path, Damaged]] = []
    for folder in folders:
        _require_folder(folder)
        try:
            return read(folder), damaged
        except Damaged as error:
            damaged.append((folder, error))
    first, *others = (error.problem for _, error in damaged)
    raise Damaged(first + (f" (and so are those before it: {'; '.join(others)})" if others else ""))


def _described(folder: Path) -> Checkpoint:
    config = storage.read_json(folder / "config.json")
    try:
        model_config = ModelConfig(**config["model"])
        training = TrainConfig.from_json(config["training"])
    except (TypeError, KeyError) as error:
        raise Damaged(f"{folder / 'config.json'} is damaged ({error})") from None
    tokenizer = tokenizers.load(storage.read_json(folder / "tokenizer.json"))
    return Checkpoint(folder, model_config, training, tokenizer, storage.read_json(folder / "state.json"))


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"there is no checkpoint {folder}: train first, or name another folder")


def _optimizer_tensors(model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{slot}": value
        for name, parameter in model.named_parameters()
        for slot, value in optimizer.state[parameter].items()
    }


def _previous(folder: Path, age: int) -> Path:
    return folder.with_name(f"{folder.name}.{age}") if age else folder


def _with_previous(folder: Path) -> list[Path]:
    """`folder` and those before it, the newest first, as far as they are there; `folder` alone if none is."""
    ages = [path.name.rpartition(".")[2] for path in folder.parent.glob(f"{folder.name}.*") if path.is_dir()]
    previous = [_previous(folder, age) for age in sorted(int(age) for age in ages if age.isdecimal())]
    return [folder, *previous] if folder.is_dir() or not previous else previous


def _move_in(draft: Path, folder: Path, keep: int) -> None:
    """Put `draft` where `folder` is, and keep so many of those before it.

    Each makes room for the next younger one, up to a gap that an interrupted move has left: at every moment all but the
    draft are there, the newest with the lowest number.
    """
    ages = itertools.takewhile(lambda age: _previous(folder, age).exists(), itertools.count())
    for age in reversed(list(ages)):
        _previous(folder, age).rename(_previous(folder, age + 1))
    draft.rename(folder)
    storage.sync(folder.parent)
    for old in _with_previous(folder)[keep + 1 :]:
        shutil.rmtree(old, ignore_errors=True)
