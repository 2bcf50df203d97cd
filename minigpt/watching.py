"""Where else a run's metrics go, if wanted: TensorBoard, Weights & Biases without a network.

Both get the rows of metrics.csv as they are written, under the same names, and neither makes the device wait.
"""

import importlib.util
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from .config import TrainConfig
from .errors import UserError


class Watcher(Protocol):
    """What gets the metrics."""

    def write(self, rows: list[dict[str, float]]) -> None:
        """Take rows of metrics.csv, in order of their `step`."""

    def close(self) -> None:
        """Write down what is left."""


def check(config: TrainConfig) -> None:
    """Raise UserError, which says what to install, when a package that `config` needs is missing."""
    for package in ("tensorboard", "wandb"):
        if getattr(config, package) and importlib.util.find_spec(package) is None:
            raise UserError(f"--{package} needs a package: pip install {package}, or say --no-{package}")


def start(config: TrainConfig, folder: Path, step: int, held: ExitStack) -> list[Watcher]:
    """The watchers that `config` asks for, of a run in `folder` that has done `step` steps; `held` closes them."""
    kinds = (TensorBoard,) * config.tensorboard + (WandB,) * config.wandb
    watchers: list[Watcher] = [kind(folder, step, config.to_json()) for kind in kinds]
    for watcher in watchers:
        held.callback(watcher.close)
    return watchers


class TensorBoard:
    """Event files in FOLDER/tensorboard: `tensorboard --logdir FOLDER`. What they say of later steps is forgotten."""

    def __init__(self, folder: Path, step: int, settings: Mapping[str, Any]):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                f"--tensorboard needs a package ({error}): pip install tensorboard, or leave it out"
            ) from None
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, rows: list[dict[str, float]]) -> None:
        """See Watcher."""
        for row in rows:
            for name, value in _values(row).items():
                self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """See Watcher."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases in FOLDER/wandb, offline: `wandb sync` sends it, if that is wanted, later.

    Going on with a run begins another one there, in the group that is named after the folder.
    """

    def __init__(self, folder: Path, step: int, settings: Mapping[str, Any]):
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        name = f"{folder.name} from step {step}" if step else folder.name
        self._run = wandb.init(
            project="minigpt", mode="offline", dir=str(folder), name=name, group=folder.name, config=dict(settings)
        )

    def write(self, rows: list[dict[str, float]]) -> None:
        """See Watcher."""
        for row in rows:
            self._run.log(_values(row), step=int(row["step"]))

    def close(self) -> None:
        """See Watcher."""
        self._run.finish()


def _values(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name != "step"}
