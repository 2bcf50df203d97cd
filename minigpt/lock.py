"""A lock between processes, which a kill lets go of."""

import os
from pathlib import Path

from .errors import UserError, writing

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt


class Lock:
    """A file that one process holds, from here to `release`; the operating system keeps it, and a kill lets it go.

    Raises UserError when another process holds it, which begins with `busy` and says `otherwise` what else to do, or
    when the file cannot be written.
    """

    def __init__(self, path: Path, busy: str, otherwise: str):
        self._path = path
        self._descriptor = -1
        while self._descriptor < 0:
            with writing(self._path):
                descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            if not _lock(descriptor):
                holder = os.pread(descriptor, 20, 0).decode(errors="replace") if fcntl else ""
                os.close(descriptor)
                raise UserError(
                    f"{busy}{f' (process {holder})' if holder else ''}: wait for it, stop it, or {otherwise}"
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
