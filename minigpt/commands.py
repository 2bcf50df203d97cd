"""What a person does beside training and writing text, as command lines: evaluate, compare, showcase.

Each command is a dataclass of typed options, from which the flags and the --help come, and a function that carries it
out. They raise UserError for whatever a person can put right.
"""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from . import backends, checkpoint, compare, dataset, faults, resume, showcase
from .backends import Backends
from .command_line import command_line, warn
from .config import default_preset, pick_device, pick_dtype, preset
from .errors import UserError
from .evaluate import evaluate as evaluate_model
from .folder import new_folder, remove_if_empty


@dataclass(frozen=True)
class Evaluate:
    """Measure how well a trained model predicts the validation split of its text: the last tenth."""

    run: Path | None = None
    """Folder of the run, or of one of its checkpoints. Without one: the newest run in runs/."""
    data: str | None = None
    """Another text to measure on: shakespeare, pydocs, or a text file. Without one: the text of the run."""
    max_tokens: int = 0
    """Predict so many tokens only; 0: the whole split."""
    kernels: str | None = None
    """Backend of the ops, as for training. Without one: the environment's MINIGPT_KERNELS, else auto."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ..., or auto: the GPU if there is one."""


@dataclass(frozen=True)
class Compare:
    """Train on two backends from the same seeds on the same data; exit status 0 if they agree, 1 if not.

    Without dropout, whatever the preset has: the masks of two backends differ.
    """

    a: str = "triton"
    """Backend of the ops: eager, torch, triton, or one per op, such as attention=triton,layer_norm=torch."""
    b: str = "torch"
    """The backend to compare it with."""
    preset: str | None = None
    """Settings, as for training, but for dropout. Without one: those that training would take."""
    data: str | None = None
    """What to train on: shakespeare, pydocs, or a text file. Without one: shakespeare."""
    steps: int = 50
    """Optimizer steps of each run."""
    seeds: int = 3
    """Runs of each backend, at least 2: their spread says what seeds alone explain."""
    seed: int = 1337
    """The first seed; the others follow it."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ..., or auto: the GPU if there is one."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the matrix products; auto: bf16 on a GPU that has it, else fp32."""
    out: Path | None = None
    """Folder to write to: tables, a summary, a picture. Without one: a new runs/compare-N."""


@dataclass(frozen=True)
class Showcase:
    """Show in a minute that everything works here: tokenizer, transformer, training, generation."""

    out: Path = Path("runs/showcase")
    """Folder to save the trained model in."""
    seed: int = 1337
    """Fixes the initial weights and the sample."""
    kernels: str | None = None
    """Backend of the ops, as for training. Without one: the environment's MINIGPT_KERNELS, else auto."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ..., or auto: the GPU if there is one."""


@faults.memory_told("evaluate on the CPU (--device cpu)")
def evaluate(argv: Sequence[str] | None = None, prog: str = "python -m minigpt evaluate") -> None:
    """Print the loss of a model on the validation split of its text, or of another one."""
    options = command_line(Evaluate, sys.argv[1:] if argv is None else argv, prog=prog)
    if options.max_tokens < 0:
        raise UserError(f"max_tokens is {options.max_tokens}: it must be 0 or more")
    found = checkpoint.find(options.run or checkpoint.newest_run(), warn)
    ops, device = ops_of(options)
    # The text of the run has its tokenizer; another one is read as it is, to be told what the tokenizer does not know.
    corpus = dataset.load(options.data or found.config.data, found.tokenizer if options.data is None else None)
    if options.data is None:
        resume.check_text(found.config.data, found, corpus)
    model, tokenizer = found.model(ops, device), found.tokenizer
    tokens = corpus.validation
    if corpus.tokenizer != tokenizer:
        text = corpus.tokenizer.decode(tokens)
        if unknown := tokenizer.unknown(text):
            print(f"WARNING: {len(unknown)} kinds of characters are unknown to the model, and count as <unk>")
        tokens = torch.from_numpy(tokenizer.encode(text))
    tokens = tokens.to(device)
    began = time.perf_counter()
    if len(tokens) > 1:
        print(f"evaluating {found.folder} on {corpus.source} ...", file=sys.stderr, flush=True)
    dtype = pick_dtype(found.config.dtype, device)
    lengths = tokenizer.characters_per_token
    result = evaluate_model(model, tokens, lengths, max_tokens=options.max_tokens, dtype=dtype)
    rows = {
        "checkpoint": found.folder,
        "kernels": named(ops),
        "text": f"the end of {corpus.source}",
        "tokenizer": tokenizer.kind,
        "tokens": f"{result.tokens:,}",
        "characters": f"{result.characters:,}",
        "loss": f"{result.loss:.4f} nats per token, {result.loss_per_character:.4f} nats per character",
        "bits": f"{result.bits_per_character:.4f} per character",
        "perplexity": f"{result.perplexity:.3f} per token",
        "time": f"{time.perf_counter() - began:.1f} s",
    }
    for name, value in rows.items():
        print(f"{name:<12}{value}")


@faults.memory_told("take a smaller --preset")
def run_compare(argv: Sequence[str] | None = None, prog: str = "python -m minigpt compare") -> None:
    """Print and write how two backends compare; UserError when they do not agree."""
    options = command_line(Compare, sys.argv[1:] if argv is None else argv, prog=prog)
    device = pick_device(options.device)
    # what the interpreter takes, if either of the two would run there
    slower = max((options.a, options.b), key=lambda kernels: backends.will_interpret(kernels, device))
    settings = preset(
        options.preset or default_preset(slower, device),
        data=options.data,
        max_steps=options.steps,
        dropout=0.0,
        seed=options.seed,
        device=options.device,
        dtype=options.dtype,
    )
    for kernels in (options.a, options.b):
        if warning := backends.resolve(kernels, device).warning:
            warn(warning)
            break
    folder = new_folder(options.out, "compare")
    try:
        result = compare.compare(options.a, options.b, settings, options.seeds)
        compare.write(result, options.a, options.b, settings, folder)
    finally:
        remove_if_empty(folder)
    table = Table(title=f"a: {options.a}, b: {options.b}", title_justify="left")
    for heading in ("what", "found", "agrees up to", ""):
        table.add_column(heading)
    for check in result.checks:
        table.add_row(check.what, f"{check.value:.2e}", f"{check.limit:.2e}", "ok" if check.passed else "DIFFERS")
    Console().print(table)
    for side, values in zip((options.a, options.b), result.validation, strict=True):
        print(f"validation loss of {side}: {values.mean():.4f}, from seed to seed +- {values.std(ddof=1):.4f}")
    print(f"written to {folder}")
    if differing := [check.what for check in result.checks if not check.passed]:
        raise UserError(f"{options.a} and {options.b} do not agree: {'; '.join(differing)}")


def run_showcase(argv: Sequence[str] | None = None, prog: str = "python -m minigpt showcase") -> None:
    """Run the stations of the showcase; UserError when one fails."""
    options = command_line(Showcase, sys.argv[1:] if argv is None else argv, prog=prog)
    ops, device = ops_of(options)
    showcase.run(ops, device, options.out, seed=options.seed)


def ops_of(options: Any) -> tuple[Backends, torch.device]:
    """The backends and the device that a command's `kernels` and `device` ask for; they may deserve a warning."""
    device = pick_device(options.device)
    ops = backends.resolve(options.kernels or os.environ.get("MINIGPT_KERNELS"), device)
    if ops.warning:
        warn(ops.warning)
    return ops, device


def named(ops: Backends) -> str:
    """Each op and what it runs on, in one line."""
    return ", ".join(f"{op}={backend}" for op, backend in ops.names.items())
