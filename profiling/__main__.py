"""Where memory, time and registers go; `python -m profiling COMMAND --help` lists the options of each."""

import sys

from minigpt.errors import CommandParser, door
from profiling import emulate, floor, host, memory, resources, scaling_command, trace


def parser() -> CommandParser:
    """The command line, of every command."""
    parser = CommandParser(prog="python -m profiling", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (resources, memory, scaling_command, floor, trace, host, emulate):
        command.add_to(commands)
    return parser


def main() -> None:
    """Run the command that the command line names. Raises UserError for what a person can put right."""
    arguments = parser().parse_args()
    sys.exit(arguments.run(arguments))


if __name__ == "__main__":
    door(main)
