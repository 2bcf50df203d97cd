"""The folder of a run: a new one, and the lock that lets one training into it."""

import itertools
from contextlib import suppress
from pathlib import Path

from . import checkpoint
from .errors import UserError, writing
from .lock import Lock

_LOCK = "lock"


def new_folder(out: Path | None, name: str) -> Path:
    """Make the folder of a new run: `out`, or the next free runs/NAME-N.

    Raises UserError when it cannot be made, or when something is in it already, but for what a run leaves that was
    killed before its first checkpoint.
    """
    if out is not None:
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
            found = {path.name for path in out.iterdir()} - {_LOCK, f"{checkpoint.LAST}.writing"}
        if found and any(path.startswith(checkpoint.LAST) for path in found):
            raise UserError(f"{out} is not empty: --resume {out} goes on with the run there; or choose another --out")
        if found:
            raise UserError(f"{out} is not empty, and no run is in it that could go on: choose another --out")
        return out
    root = Path("runs")
    with writing(root):
        root.mkdir(exist_ok=True)
        for number in itertools.count(1):
            folder = root / f"{name}-{number}"
            try:
                folder.mkdir()
                return folder
            except FileExistsError:
                continue


def remove_if_empty(folder: Path) -> None:
    """Remove a folder in which there is nothing."""
    with suppress(OSError):
        folder.rmdir()


def hold(folder: Path) -> Lock:
    """The lock of a run's folder, which exists. Raises UserError when another training holds it."""
    return Lock(folder / _LOCK, f"another training is at work in {folder}", "choose another --out")
