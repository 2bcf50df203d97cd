"""generate.py: a prompt in, text out, as it comes; once, or again and again."""

import json
import sys
import time
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TextIO

import tyro

from . import checkpoint, generation, stops
from .beam import beam_search
from .command_line import command_line, warn
from .commands import named, ops_of
from .errors import UserError, writing
from .generation import Row, Writing
from .model import GPT
from .tokenizers import Tokenizer

TEMPERATURE = 0.8


@dataclass(frozen=True)
class Generate:
    """Write text with a trained model, token by token.

    The text goes to standard output, all else to standard error. What the model sees is the text from its beginning on;
    where that would be longer than the block size, its last half block, and what follows.
    """

    run: Path | None = None
    """Folder of the run, or of one of its checkpoints. Without one: the newest run in runs/."""
    prompt: str | None = None
    """What the text continues. Without one it begins at a new line."""
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


def generate(argv: Sequence[str] | None = None, prog: str = "generate.py") -> None:
    """Print prompts and the texts that a model continues them with, as they come."""
    options = command_line(Generate, sys.argv[1:] if argv is None else argv, prog=prog)
    _check(options)
    prompt = _prompt(options)
    found = checkpoint.find(options.run or checkpoint.newest_run(), warn)
    ops, device = ops_of(options)
    introduction = f"{found.folder}, kernels: {named(ops)}"
    with ExitStack() as held:
        writer = _Writer(found.model(ops, device), found.tokenizer, options, held)
        if options.interactive:
            writer.check()
            _say(f"{introduction}. Ctrl-C ends a text, Ctrl-D the program")
            _ask(writer)
        else:
            writer.write(prompt, introduction)


def _check(options: Generate) -> None:
    """Raise UserError for options that do not go together."""
    given = [
        name
        for name, wanted in {
            "--prompt": options.prompt is not None,
            "--prompt-file": options.prompt_file is not None,
            "--interactive": options.interactive,
        }.items()
        if wanted
    ]
    if len(given) > 1:
        raise UserError(f"{given[0]} and {given[1]} do not go together: choose one")
    if options.prompt == "":
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


def _prompt(options: Generate) -> str:
    if options.prompt_file is None:
        return options.prompt or ""
    path = options.prompt_file
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"there is no {path}: name a text file with --prompt-file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: convert it first") from None
    if not text:
        raise UserError(f"{path} is empty: write a prompt into it, or leave --prompt-file out")
    return text


def _ask(writer: "_Writer") -> None:
    """Write to one prompt after another, until there are no more."""
    terminal = sys.stdin.isatty()
    if terminal:
        try:
            import readline  # noqa: F401  gives input() a line that can be edited
        except ImportError:  # Windows
            pass
    while True:
        try:
            prompt = input("> " if terminal else "")
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
            _say("error: this line is not UTF-8 text")
            continue
        try:
            if not prompt:
                raise UserError("the prompt is empty: type at least one character")
            writer.write(prompt)
        except UserError as error:
            _say(f"error: {error}")
        except KeyboardInterrupt:
            print(flush=True)


class _Writer:
    """Writes to prompts as the options say; `held` closes the file of --logprobs."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, options: Generate, held: ExitStack):
        self.model, self.tokenizer, self.options, self.held = model, tokenizer, options, held
        self.records: TextIO | None = None
        # a terminal obeys what control characters say; a file gets the text as it is
        self.shown = visible if sys.stdout.isatty() else str

    def check(self) -> None:
        """Raise UserError for options that would fail with every prompt."""
        if self.options.beams is None:
            self._writing("")
        else:
            self._search("", min(self.options.max_new_tokens, 0))
        self._open_records()

    def write(self, prompt: str, introduction: str = "") -> None:
        """Print the prompt and what follows it, as often as there are to be samples.

        Raises UserError before anything is printed; the introduction goes to stderr once nothing is wrong.
        """
        began = time.perf_counter()
        search = self.options.beams is not None
        rows = self._search(prompt, self.options.max_new_tokens) if search else self._writing(prompt)
        self._open_records()
        if introduction:
            _say(introduction)
        length = len(generation.encode_prompt(self.tokenizer, prompt))
        block_size = self.model.config.block_size
        if (seen := generation.seen(self.model, length)) < length:
            _say(f"the prompt has {length:,} tokens, the block {block_size:,}: the model sees the last {seen:,}")
        texts = self._print_found(prompt, rows) if search else self._print_drawn(prompt, rows)
        seconds = max(time.perf_counter() - began, 1e-9)
        characters = sum(map(len, texts))
        _say(f"{characters} characters, {characters / seconds:,.0f} a second")

    def _writing(self, prompt: str) -> Writing:
        options = self.options
        return Writing(
            self.model,
            self.tokenizer,
            [prompt],
            stop=options.stop,
            alternatives=options.alternatives if options.logprobs is not None else 0,
            num_samples=options.num_samples,
            max_new_tokens=options.max_new_tokens,
            temperature=TEMPERATURE if options.temperature is None else options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed,
            cache=options.cache,
            cuda_graph=options.cuda_graph,
        )

    def _print_drawn(self, prompt: str, drawing: Writing) -> list[str]:
        """Draw all samples at once: the first is printed as it comes, the others when all are there."""
        self._head(0, prompt)
        try:
            for new in drawing:
                print(self.shown(new[0]), end="", flush=True)
        finally:
            print(flush=True)
            for number, row in enumerate(drawing.rows):
                self._record(prompt, number, row)
        for number, row in enumerate(drawing.rows[1:], start=1):
            self._head(number, prompt)
            print(self.shown(row.text), flush=True)
        return [row.text for row in drawing.rows]

    def _print_found(self, prompt: str, found: list[tuple[float, Row]]) -> list[str]:
        """Print the best that were found."""
        for number, (score, row) in enumerate(found):
            self._head(number, prompt, f", score {score:.3f}")
            print(self.shown(row.text), flush=True)
            self._record(prompt, number, row)
        return [row.text for _, row in found]

    def _search(self, prompt: str, max_new_tokens: int) -> list[tuple[float, Row]]:
        options, tokenizer = self.options, self.tokenizer
        generation.check_stops(tokenizer, options.stop)
        found = beam_search(
            self.model,
            generation.encode_prompt(tokenizer, prompt),
            width=options.beams,
            max_new_tokens=max_new_tokens,
            length_penalty=options.length_penalty,
            ended=lambda ids: stops.cut(tokenizer.decode(ids), options.stop)[1],
            tokenizer=tokenizer,
            cache=options.cache,
            cuda_graph=options.cuda_graph,
        )
        rows = []
        for hypothesis in found[: options.num_samples]:
            text, stopped = stops.cut(tokenizer.decode(hypothesis.ids), options.stop)
            row = Row(text, list(hypothesis.ids), list(hypothesis.logprobs), stopped=stopped)
            rows.append((hypothesis.score, row))
        return rows

    def _head(self, number: int, prompt: str, more: str = "") -> None:
        if self.options.num_samples > 1:
            print(f"--- {number + 1} of {self.options.num_samples}{more}")
        print(self.shown(prompt), end="", flush=True)

    def _open_records(self) -> None:
        path = self.options.logprobs
        if path is not None and self.records is None:
            with writing(path):
                self.records = self.held.enter_context(path.open("w", encoding="utf-8"))

    def _record(self, prompt: str, number: int, row: Row) -> None:
        if self.records is not None:
            lines = _lines(self.tokenizer, prompt, number, row)
            with writing(self.options.logprobs):
                self.records.writelines(json.dumps(line) + "\n" for line in lines)
                self.records.flush()


def _lines(tokenizer: Tokenizer, prompt: str, number: int, row: Row) -> Iterator[dict[str, Any]]:
    """What --logprobs writes of each token; its number counts from the end of the prompt."""
    for place, (token, logprob) in enumerate(zip(row.ids, row.logprobs, strict=True)):
        line = {"prompt": prompt[-80:], "sample": number, "number": place, "id": token}
        line |= {"text": tokenizer.token_text(token), "logprob": round(logprob, 6)}
        if row.alternatives:
            line["alternatives"] = [
                {"id": other, "text": tokenizer.token_text(other), "logprob": round(value, 6)}
                for other, value in row.alternatives[place]
            ]
        yield line


def visible(text: str) -> str:
    """`text` with its control characters and lone surrogates written out, as \\x1b, but for newlines and tabs."""
    return "".join(ascii(c)[1:-1] if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" else c for c in text)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
