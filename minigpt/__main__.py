"""`python -m minigpt COMMAND`: every command of the package."""

import kernels  # noqa: F401, I001  first: it chooses Triton's interpreter where there is no GPU

import difflib
import sys
from collections.abc import Sequence

from . import commands, config, errors


def train(argv: Sequence[str], prog: str) -> None:
    """Train a GPT on a text."""
    from . import trainer

    trainer.train(config.parse(argv, prog))


def experiment(argv: Sequence[str], prog: str) -> None:
    """Run an experiment and tell what came out."""
    from .experiments.command import run_experiment

    run_experiment(argv, prog)


COMMANDS = {
    "train": (train, "train a model on a text"),
    "generate": (commands.generate, "write text with a trained model"),
    "evaluate": (commands.evaluate, "measure how well a model predicts its text"),
    "prepare": (commands.run_prepare, "make a text of any size ready to train on"),
    "compare": (commands.run_compare, "check that two backends learn the same"),
    "experiment": (experiment, "run experiments and tell what came out"),
    "showcase": (commands.run_showcase, "show in a minute that everything works here"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that `argv` (None: this program's) names first. Raises UserError for one that there is not."""
    name, *rest = (sys.argv[1:] if argv is None else list(argv)) or [""]
    if name in ("-h", "--help"):
        print("usage: python -m minigpt COMMAND [OPTIONS]\n")
        for command, (_, meaning) in COMMANDS.items():
            print(f"  {command:<10}  {meaning}")
        print("\npython -m minigpt COMMAND --help lists the options of each.")
        return
    if name not in COMMANDS:
        known = ", ".join(COMMANDS)
        if not name:
            raise errors.UserError(f"name a command: python -m minigpt {{{known}}}")
        close = difflib.get_close_matches(name, COMMANDS, 1)
        meant = f"; did you mean {close[0]}?" if close else ""
        raise errors.UserError(f"unknown command {name!r}: the commands are {known}{meant}")
    run, _ = COMMANDS[name]
    run(rest, f"python -m minigpt {name}")


if __name__ == "__main__":
    errors.door(main)
