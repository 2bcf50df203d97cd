"""What commands write to: files, of which much can be known before the work is done, and terminals."""

import sys
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console


def check_folders(*paths: Path | None) -> None:
    """Raise UserError where a file is to go to a folder that is not there, or to be one. None is not asked for, `-` is
    stdout."""
    for path in paths:
        if path in (None, Path("-")):
            continue
        if not path.absolute().parent.is_dir():
            raise UserError(f"{path.absolute().parent}: no such folder; create it, or choose another place")
        if path.is_dir():
            raise UserError(f"{path}: it is a folder; give the name of a file in it")


def check_suffix(option: str, path: Path | None, suffixes: Collection[str]) -> None:
    """Raise UserError where a file's name does not end in one of `suffixes`; "" among them allows none."""
    if path is not None and path.suffix.lower() not in suffixes:
        raise UserError(f"{option} {path}: the name must end in {' or '.join(sorted(filter(None, suffixes)))}")


def wide_console(least: int) -> "Console":
    """The terminal, or a file, for tables that are no use in fewer than so many columns: rich would leave numbers out.

    Where there are fewer a line goes on in the next; `less -S` shows it whole.
    """
    from rich.console import Console

    return Console(width=max(least, Console().width) if sys.stdout.isatty() else least)
