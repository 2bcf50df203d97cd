"""PyTorch's profiler without what it prints itself."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator

import torch

CHATTER = b"USDT:"
"""How the lines begin that the profiler's C++ writes to stderr whenever it starts and stops."""


@contextlib.contextmanager
def without_chatter() -> Iterator[None]:
    """Keep CHATTER's lines off stderr for a block; all others are written there when it ends, however it ends.

    The file descriptor is redirected, as C++ does not know of sys.stderr.
    """
    sys.stderr.flush()
    try:
        kept = os.dup(2)
    except OSError:  # there is no stderr to keep clean
        yield
        return
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            caught.seek(0)
            if rest := b"".join(line for line in caught if not line.startswith(CHATTER)):
                with open(2, "wb", closefd=False) as stderr:
                    stderr.write(rest)


@contextlib.contextmanager
def recorded(**options) -> Iterator[torch.profiler.profile]:
    """torch.profiler.profile(**options) around a block. What the block itself writes to stderr is not touched."""
    profiler = torch.profiler.profile(**options)
    with without_chatter():
        profiler.start()
    try:
        yield profiler
    finally:
        with without_chatter():
            profiler.stop()
