"""What a person can get wrong, told in one line; and the door that every program of ours goes through."""

import argparse
import errno
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

# Errors of the system that a person can put right; any other OSError is a bug of ours and keeps its traceback.
_REASONS = {
    errno.ENOSPC: "the disk is full; free some space, or write somewhere else",
    errno.EDQUOT: "the disk quota is used up; free some space, or write somewhere else",
    errno.EFBIG: "the file would be larger than allowed here; write somewhere else",
    errno.EROFS: "the file system is read-only; write somewhere else",
    errno.EACCES: "no permission; choose a place that you may use",
    errno.EPERM: "not permitted; choose a place that you may use",
    errno.ENOTDIR: "a part of the path is a file, not a folder; choose another place",
    errno.EISDIR: "it is a folder, where a file is needed",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.EIO: "the disk reports an input/output error; use another one",
}


_SECONDS_TO_TELL = 10.0
"""How long a process waits for another one to say what is wrong, and to end, before it ends itself."""


class UserError(Exception):
    """Something a person can put right: one line that says what is wrong and what to do."""

    exit_status = 1
    rank: int | None = None
    """Which of several processes it comes from; None: every one has it."""
    silent = False
    """Whether another process tells it."""


class Damaged(UserError):
    """Something stored is missing, cut off or changed; `problem` says what, the message what to do too."""

    def __init__(self, problem: str):
        super().__init__(f"{problem}: take another checkpoint, or train again")
        self.problem = problem


class Stopped(UserError):
    """A person stopped the program, and it has put its work in order: one line that says how to go on."""

    exit_status = 130


class CommandParser(argparse.ArgumentParser):
    """A command line whose mistakes are a UserError each, told in one line as all others are."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Run a block that writes to `path`: a full disk or a missing permission becomes a UserError that names it.

    Needed because the error of a write, unlike that of an open, does not carry the file's name.
    """
    try:
        yield
    except OSError as error:
        raise _told(error, path) from error


@dataclass
class StopRequest:
    """Whether Ctrl-C or SIGTERM has asked the program to stop."""

    requested: bool = False


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turn the first Ctrl-C or SIGTERM during a block into a request that the block looks at when it suits it.

    The second one acts as it always does. Only the main thread gets signals; in another one nothing is ever requested.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def request(number: int, frame: FrameType | None) -> None:
        stop.requested = True
        restore()

    for number in before:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        restore()


def door(main: Callable[[], None]) -> None:
    """Run `main` as a whole program: print what a person caused as one line on stderr, and exit with the right status.

    UserError, full disks and missing permissions end with status 1, Ctrl-C with 130, a closed pipe (`... | head`)
    quietly with 141. A bug of ours keeps its traceback. Where the terminal lacks a character, "?" is shown.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the doors leave it to the system while they import
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        if error.silent or (error.rank is None and _rank() > 0):
            # torchrun ends all processes as soon as one of them has failed
            time.sleep(min(_SECONDS_TO_TELL, 1.0) if isinstance(error, Stopped) else _SECONDS_TO_TELL)
            sys.exit(error.exit_status)
        where = f"[rank {error.rank}] " if error.rank else ""
        _fail(where + ("" if isinstance(error, Stopped) else "error: "), str(error), error.exit_status)
    except KeyboardInterrupt:
        _fail("", "stopped by Ctrl-C", 130)
    except BrokenPipeError:
        _end_at_a_closed_pipe()
    except SystemExit as leaving:
        if not isinstance(leaving.__context__, BrokenPipeError):  # which rich makes an exit of its own of
            raise
        _end_at_a_closed_pipe()
    except OSError as error:
        if error.errno not in _REASONS:
            raise
        _fail("error: ", str(_told(error, None)), 1)


def _end_at_a_closed_pipe() -> NoReturn:
    # Python flushes stdout once more while it shuts down; what is left must go nowhere.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(141)


def _rank() -> int:
    """Which of the processes that torchrun has started this one is; 0 without it."""
    return int(os.environ.get("RANK", "0"))


def _told(error: OSError, path: Path | None) -> UserError:
    named = error.filename if error.filename is not None else path
    reason = _REASONS.get(error.errno or 0, f"{error.strerror or error}; choose another place")
    return UserError(f"{named}: {reason}" if named is not None else reason)


def _fail(prefix: str, message: str, status: int) -> None:
    sys.stdout.flush()
    print(prefix + " ".join(message.split()), file=sys.stderr, flush=True)
    sys.exit(status)
