"""Where memory, time and registers go; `python -m profiling COMMAND --help` lists the options of each."""

import argparse
import sys

from minigpt.errors import door
from profiling import host, memory, resources, trace


class _Parser(argparse.ArgumentParser):
    """Tells what is wrong in one line."""

    def error(self, message: str):
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """The command line, of every command."""
    parser = _Parser(prog="python -m profiling", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (resources, memory, trace, host):
        command.add_to(commands)
    return parser


def main() -> None:
    arguments = parser().parse_args()
    sys.exit(arguments.run(arguments))


if __name__ == "__main__":
    door(main)
