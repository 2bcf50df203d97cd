"""How fast, beside whom; `python -m benchmarks COMMAND --help` lists the options of each."""

import kernels  # noqa: F401, I001  first: it chooses Triton's interpreter where there is no GPU

import sys

from benchmarks import comparison, decode, goals, report, stages, start, suite, train, tune
from minigpt import errors


def parser() -> errors.CommandParser:
    """The command line of every command."""
    parser = errors.CommandParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (suite, train, decode, start, tune, comparison, report, goals, stages):
        module.add_to(commands)
    return parser


def main() -> None:
    """Run the command that the command line names. Raises UserError for what a person can put right."""
    arguments = parser().parse_args()
    status = arguments.run(arguments)
    if status:
        sys.stdout.flush()
        raise SystemExit(status)


if __name__ == "__main__":
    errors.door(main)
