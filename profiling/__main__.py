"""`python -m profiling COMMAND`: see `--help`."""

import argparse

from profiling import resources


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m profiling", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    resources.add_to(commands)
    arguments = parser.parse_args()
    raise SystemExit(arguments.run(arguments))


if __name__ == "__main__":
    main()
