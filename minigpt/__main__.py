"""`python -m minigpt COMMAND`: every command of the package."""

import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from . import errors


class Command(NamedTuple):
    """A command: the function that carries it out, of which module, and what it is for."""

    module: str
    function: str
    meaning: str


COMMANDS = {
    "train": Command("trainer", "run_train", "train a model on a text"),
    "generate": Command("prompting", "generate", "write text with a trained model"),
    "evaluate": Command("commands", "evaluate", "measure how well a model predicts its text"),
    "attention": Command("looking", "run_attention", "show where each head of a model looks"),
    "prepare": Command("preparing", "run_prepare", "make a text of any size ready to train on"),
    "playground": Command("playground", "run_playground", "open a local page to write with a model and look inside"),
    "compare": Command("commands", "run_compare", "check that two backends learn the same"),
    "experiment": Command("experiments.command", "run_experiment", "run experiments and tell what came out"),
    "export": Command("exchange", "run_export", "write a model so that Hugging Face's GPT-2 loads it"),
    "import": Command("exchange", "run_import", "make a run of a GPT-2 of Hugging Face"),
    "showcase": Command("commands", "run_showcase", "show in a minute that everything works here"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that `argv` (None: this program's) names first. Raises UserError for one that there is not."""
    name, *rest = (sys.argv[1:] if argv is None else list(argv)) or [""]
    if name in ("-h", "--help"):
        print("usage: python -m minigpt COMMAND [OPTIONS]\n")
        for command, (_, _, meaning) in COMMANDS.items():
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
    module, function, _ = COMMANDS[name]
    # Each imports what it needs: preparing a text is to stay small beside PyTorch.
    run = getattr(importlib.import_module(f"minigpt.{module}"), function)
    run(rest, f"python -m minigpt {name}")


if __name__ == "__main__":
    errors.door(main)
