"""What generate.py writes: texts as they come, several at once, the best of a search, and a record of their tokens."""

import json
import sys
import time
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any, TextIO

from . import generation, stops
from .beam import beam_search
from .errors import writing
from .generation import Row, Writing
from .model import GPT
from .tokenizers import Tokenizer

TEMPERATURE = 0.8


class Writer:
    """Writes to prompts as the options say, prompting.Generate's; `held` closes the file of --logprobs."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, options: Any, held: ExitStack):
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

    def write(self, prompts: Sequence[str], introduction: str = "") -> None:
        """Print each prompt and what follows it, as often as there are to be samples.

        Raises UserError before anything is printed; the introduction goes to stderr once nothing is wrong.
        """
        began = time.perf_counter()
        search = self.options.beams is not None
        limit = self.options.max_new_tokens
        found = [self._search(prompt, limit) for prompt in prompts] if search else self._writing(*prompts)
        self._open_records()
        if introduction:
            say(introduction)
        block_size = self.model.config.block_size
        for prompt in prompts:
            length = len(generation.encode_prompt(self.tokenizer, prompt))
            if (seen := generation.seen(self.model, length)) < length:
                say(f"the prompt has {length:,} tokens, the block {block_size:,}: the model sees the last {seen:,}")
        texts = self._print_found(prompts, found) if search else self._print_drawn(prompts, found)
        seconds = max(time.perf_counter() - began, 1e-9)
        characters = sum(map(len, texts))
        say(f"{characters} characters, {characters / seconds:,.0f} a second")

    def _writing(self, *prompts: str) -> Writing:
        options = self.options
        return Writing(
            self.model,
            self.tokenizer,
            prompts,
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

    def _print_drawn(self, prompts: Sequence[str], drawing: Writing) -> list[str]:
        """Draw all texts at once: the first is printed as it comes, the others when all are there."""
        of_rows = [prompt for prompt in prompts for _ in range(self.options.num_samples)]
        self._head(0, len(of_rows), of_rows[0])
        try:
            for new in drawing:
                print(self.shown(new[0]), end="", flush=True)
        finally:
            print(flush=True)
            for number, (prompt, row) in enumerate(zip(of_rows, drawing.rows, strict=True)):
                self._record(prompt, number % self.options.num_samples, row)
        for number, row in enumerate(drawing.rows[1:], start=1):
            self._head(number, len(of_rows), of_rows[number])
            print(self.shown(row.text), flush=True)
        return [row.text for row in drawing.rows]

    def _print_found(self, prompts: Sequence[str], found: list[list[tuple[float, Row]]]) -> list[str]:
        """Print the best that were found for each prompt."""
        total = sum(map(len, found))
        written = 0
        for prompt, rows in zip(prompts, found, strict=True):
            for number, (score, row) in enumerate(rows):
                self._head(written, total, prompt, f", score {score:.3f}")
                print(self.shown(row.text), flush=True)
                self._record(prompt, number, row)
                written += 1
        return [row.text for rows in found for _, row in rows]

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

    def _head(self, number: int, total: int, prompt: str, more: str = "") -> None:
        if total > 1:
            print(f"--- {number + 1} of {total}{more}")
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


def say(line: str) -> None:
    """A line for the person, not a part of the text."""
    print(line, file=sys.stderr, flush=True)
