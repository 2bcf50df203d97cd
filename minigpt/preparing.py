"""`python -m minigpt prepare`, which needs no PyTorch."""

import os
import shlex
import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from . import prepare, tokenizer_choice
from .command_line import command_line, metavar, warn


@dataclass(frozen=True)
class Prepare:
    """Write the tokens of a text of any size to a folder that training maps into memory."""

    data: str
    """A text file, or a folder whose *.txt follow each other."""
    tokenizer: Annotated[str, metavar(tokenizer_choice.METAVAR)] = tokenizer_choice.CHAR
    """How text becomes tokens: char, each character is one; bpe, frequent runs of bytes, learnt from the text; gpt2,
    GPT-2's own, where its files are; or a folder or file with a tokenizer."""
    vocab_size: int = 0
    """With --tokenizer bpe: the tokens to learn, at least 259; 0: 1024."""
    out: Path | None = None
    """Folder to write to, which must not be there yet. Without one: the name of the data, ending in .tokens."""
    workers: int = 0
    """Processes that work on it; 0: one for each processor."""


def run_prepare(argv: Sequence[str], prog: str = "python -m minigpt prepare") -> None:
    """Write the tokens of a text of any size to a folder that training maps into memory."""
    options = command_line(Prepare, argv, prog=prog)
    source = Path(options.data)
    name = f"{source.absolute().name if source.is_dir() else source.stem}.tokens"
    out = options.out or source.absolute().with_name(name)
    began = time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends it as Ctrl-C does, with its processes
    with (
        ExitStack() as held,
        Progress(*columns, console=console, disable=not console.is_terminal, auto_refresh=False) as bar,
    ):
        held.callback(signal.signal, signal.SIGTERM, before)
        tasks: dict[str, TaskID] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, refresh=True)

        manifest = prepare.prepare(
            source,
            out,
            options.tokenizer,
            options.vocab_size,
            workers=options.workers or os.cpu_count() or 1,
            progress=progress,
            announce=warn,
        )
    seconds, files = time.perf_counter() - began, len(manifest["files"])
    print(
        f"{manifest['tokens']:,} tokens of {files} file{'s' * (files != 1)} in {seconds:.1f} s: "
        f"python train.py --data {shlex.quote(str(out))}"
    )
