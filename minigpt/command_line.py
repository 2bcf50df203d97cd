"""Command lines: a dataclass of typed options, from which the flags and the --help come."""

import contextlib
import io
import re
from collections.abc import Sequence
from typing import Any, TypeVar

from rich.console import Console

from .errors import UserError

T = TypeVar("T")


def metavar(text: str) -> Any:
    """For Annotated: what the help calls the value of an option.

    Settings can be made without tyro, as benchmarks and profiles do; only a command line needs it.
    """
    try:
        import tyro
    except ModuleNotFoundError:
        return text
    return tyro.conf.arg(metavar=text)


def command_line(kind: type[T], argv: Sequence[str], *, prog: str, default: T | None = None) -> T:
    """An instance of the dataclass `kind` from flags such as --n-layer 2, `default` giving what they leave out.

    Raises UserError, one line, for flags that do not fit; prints the typed help and raises SystemExit(0) for --help.
    """
    try:
        import tyro
    except ModuleNotFoundError:
        raise UserError("reading a command line needs tyro, which is not installed: pip install tyro") from None
    complaint = io.StringIO()
    known = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(kind, prog=prog, args=list(argv), **known)
    except SystemExit as leaving:
        if not leaving.code:
            raise
        raise UserError(_one_line(complaint.getvalue(), prog)) from None


def _one_line(box: str, prog: str) -> str:
    """tyro's boxed complaint as one line: the complaint itself, and the flag that was perhaps meant."""
    lines = [line.strip("│|╭╮╰╯─ ") for line in box.splitlines()]
    lines = ["" if set(line) <= set("+-─") else line for line in lines]  # a border, as a terminal without ─ has it
    first = next((i for i, line in enumerate(lines) if line and i > 0), 0)
    end = next((i for i in range(first, len(lines)) if not lines[i]), len(lines))
    complaint = " ".join(lines[first:end]).rstrip(".")
    meant = re.search(r"Perhaps you meant:.*?(--[\w-]+)", box, re.DOTALL)
    suggestion = f"; did you mean {meant[1]}?" if meant else ""
    return f"{complaint}{suggestion} (see {prog} --help)"


def warn(text: str) -> None:
    """Tell a person something on stderr that they should not miss."""
    Console(stderr=True).print(text, style="bold red", markup=False, highlight=False, soft_wrap=True)
