"""generate.py: a prompt in, text out, as it comes; once, or again and again."""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from . import checkpoint, faults
from .command_line import command_line, warn
from .commands import named, ops_of
from .errors import UserError
from .writer import Writer, say

_LESS = "take fewer --num-samples, --beams or prompts at once, or a shorter prompt"


@dataclass(frozen=True)
class Generate:
    """Write text with a trained model, token by token.

    The text goes to standard output, all else to standard error. What the model sees is the text from its beginning on;
    where that would be longer than the block size, its last half block, and what follows.
    """

    run: Path | None = None
    """Folder of the run, or of one of its checkpoints. Without one: the newest run in runs/."""
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """What the text continues; may be given several times, and all are continued at once. Without one it begins at a
    new line."""
    prompt_file: Path | None = None
    """A UTF-8 file that the text continues, all of it, a newline at its end included."""
    interactive: bool = False
    """Ask for a prompt, write, and ask again. Ctrl-C ends a text, Ctrl-D the program. Standard input may be a pipe: a
    prompt a line."""
    max_new_tokens: int = 500
    """Tokens to write at most."""
    num_samples: int = 1
    """Texts to write of a prompt. They are written at once; the first is shown as it comes."""
    temperature: float | None = None
    """Below 1 keeps to what is likely, above 1 is more surprising; 0 always takes the likeliest token. Without one:
    0.8."""
    top_k: int = 0
    """Draw from so many of the likeliest tokens only; 0: from all of them."""
    top_p: float = 1.0
    """Draw from the fewest tokens only whose probabilities sum to this."""
    seed: int | None = None
    """The same seed writes the same text; the second of several is the first of seed + 1. Without one, every text is
    new."""
    beams: int | None = None
    """Do not draw, but search for likely texts with so many beams, and write the best --num-samples of them."""
    length_penalty: float = 0.0
    """For --beams and --stop: above 0 prefers longer texts (Wu et al. 2016); 0 ranks by probability alone."""
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Stop before this text; may be given several times."""
    logprobs: Path | None = None
    """Write a line of JSON for each token to this file: its text, log-probability and likeliest alternatives."""
    alternatives: int = 5
    """Alternatives in each line of --logprobs."""
    cache: bool = True
    """Keep keys and values of the tokens so far; without, each token costs a pass over the whole context. The text is
    the same."""
    cuda_graph: bool = False
    """Run each step as one CUDA graph. No GPU has confirmed it yet."""
    kernels: str | None = None
    """Backend of the ops: auto, eager, torch, triton, or one per op, such as attention=triton. Without one: the
    environment's MINIGPT_KERNELS, else auto."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ..., or auto: the GPU if there is one."""


@faults.memory_told(_LESS)
def generate(argv: Sequence[str] | None = None, prog: str = "generate.py") -> None:
    """Print prompts and the texts that a model continues them with, as they come."""
    options = command_line(Generate, sys.argv[1:] if argv is None else argv, prog=prog)
    _check(options)
    prompts = _prompts(options)
    found = checkpoint.find(options.run or checkpoint.newest_run(), warn)
    ops, device = ops_of(options)
    introduction = f"{found.folder}, kernels: {named(ops)}"
    with ExitStack() as held:
        writer = Writer(found.model(ops, device), found.tokenizer, options, held)
        if options.interactive:
            writer.check()
            say(f"{introduction}. Ctrl-C ends a text, Ctrl-D the program")
            _ask(writer)
        else:
            writer.write(prompts, introduction)


def _check(options: Generate) -> None:
    """Raise UserError for options that do not go together."""
    given = [
        name
        for name, wanted in {
            "--prompt": bool(options.prompt),
            "--prompt-file": options.prompt_file is not None,
            "--interactive": options.interactive,
        }.items()
        if wanted
    ]
    if len(given) > 1:
        raise UserError(f"{given[0]} and {given[1]} do not go together: choose one")
    if "" in options.prompt:
        raise UserError("the prompt is empty: give --prompt at least one character, or leave it out")
    if options.num_samples < 1:
        raise UserError(f"num_samples is {options.num_samples}: it must be 1 or more")
    if options.beams is None:
        if options.length_penalty:
            raise UserError("--length-penalty ranks the texts of a beam search: say --beams too, or leave it out")
        return
    drawing = {
        "--temperature": options.temperature is not None,
        "--top-k": options.top_k != 0,
        "--top-p": options.top_p != 1,
        "--seed": options.seed is not None,
    }
    for name, wanted in drawing.items():
        if wanted:
            raise UserError(f"{name} is for drawing, and --beams draws nothing: leave one of them out")
    if options.num_samples > max(options.beams, 1):
        raise UserError(f"--beams {options.beams} finds no {options.num_samples} texts: take more beams or fewer texts")


def _prompts(options: Generate) -> Sequence[str]:
    return (read_prompt(options.prompt_file),) if options.prompt_file is not None else options.prompt or ("",)


def read_prompt(path: Path) -> str:
    """The text of --prompt-file. Raises UserError where there is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"there is no {path}: name a text file with --prompt-file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: convert it first") from None
    if not text:
        raise UserError(f"{path} is empty: write a prompt into it, or leave --prompt-file out")
    return text


def _ask(writer: Writer) -> None:
    """Write to one prompt after another, until there are no more."""
    terminal = sys.stdin.isatty()
    if terminal:
        try:
            import readline  # noqa: F401  gives input() a line that can be edited
        except ImportError:  # Windows
            pass
    while True:
        try:
            prompt = input("> " if terminal else "").removesuffix("\r")
        except EOFError:
            if terminal:
                print()
            return
        except KeyboardInterrupt:
            if not terminal:
                raise
            print()
            continue
        except UnicodeDecodeError:
            say("error: this line is not UTF-8 text")
            continue
        try:
            if not prompt:
                raise UserError("the prompt is empty: type at least one character")
            with faults.memory_told(_LESS):
                writer.write([prompt])
        except UserError as error:
            say(f"error: {error}")
        except KeyboardInterrupt:
            print(flush=True)
