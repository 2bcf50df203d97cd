"""The folder of a run: a new one, and the lock that lets one training into it."""

import itertools
import os
from contextlib import suppress
from pathlib import Path

from . import checkpoint
from .errors import UserError, writing

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

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


class Lock:
    """The lock of a folder that exists, from here to `release`, kept by the operating system: a kill lets it go.

    Raises UserError when another training holds it, or when the folder cannot be written to.
    """

    def __init__(self, folder: Path):
        self._path = folder / _LOCK
        self._descriptor = -1
        while self._descriptor < 0:
            with writing(self._path):
                descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            if not _lock(descriptor):
                holder = os.pread(descriptor, 20, 0).decode(errors="replace") if fcntl else ""
                os.close(descriptor)
                raise UserError(
                    f"another training is at work in {folder}{f' (process {holder})' if holder else ''}: wait for it, "
                    "stop it, or choose another --out"
                )
            if self._is_current(descriptor):
                self._descriptor = descriptor
            else:  # its holder released it, and took the file away, after it was opened here
                os.close(descriptor)
        if fcntl:
            try:
                with writing(self._path):
                    os.truncate(self._descriptor, 0)
                    os.write(self._descriptor, str(os.getpid()).encode())
            except UserError:
                self.release()
                raise

    def release(self) -> None:
        """Let others in."""
        if fcntl:
            self._path.unlink(missing_ok=True)
        os.close(self._descriptor)

    def _is_current(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self._path))
        except FileNotFoundError:
            return False


def _lock(descriptor: int) -> bool:
    try:
        if fcntl:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    except BlockingIOError:
        return False
    except PermissionError:  # how Windows says that another process has it
        return False
    return True
