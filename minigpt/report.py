"""What a run shows and writes down: the progress bar, metrics.csv, and small text files."""

import csv
import io
import itertools
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from . import storage
from .errors import writing

COLUMNS = ("step", "train_loss", "grad_norm", "learning_rate", "val_loss", "perplexity", "tokens_per_second")
"""metrics.csv: one row per step; validation loss and perplexity where evaluated, speed where shown, else empty.

The speed is the mean since the run began, or went on otherwise (resume.another_speed)."""

_SECONDS_BETWEEN_LINES = 5.0


class Metrics:
    """The file metrics.csv; `step` keeps the rows up to that one and continues after it (0: from the start).

    `missing` names the steps that were not there, "" for none. `aside` is a copy of a file with other lines than rows,
    else None; a last line without its end, as a kill leaves it, is one only where steps are missing. Raises UserError
    when a file cannot be written.
    """

    def __init__(self, path: Path, step: int = 0):
        self.path = path
        self.aside: Path | None = None
        with writing(path):
            rows, damaged, cut = _rows(path, step) if step and path.is_file() else ([], False, False)
            self.missing = _gaps([int(row["step"]) for row in rows], step)
            if damaged or (cut and self.missing):
                self.aside = path.with_name(f"{path.name}.damaged")
                shutil.copyfile(path, self.aside)
            table = io.StringIO()
            writer = csv.DictWriter(table, COLUMNS, restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
            # Not in place: a kill on the way would take the rows along.
            write_text(path, table.getvalue())
            self._file = path.open("a", newline="", encoding="utf-8")
            self._writer = csv.DictWriter(self._file, COLUMNS, restval="", extrasaction="ignore")

    def write(self, rows: list[dict[str, float]]) -> None:
        """Append rows, and hand them to the operating system. Nine digits give a float32 back to the last bit."""
        with writing(self.path):
            for row in rows:
                self._writer.writerow({name: f"{v:.9g}" if isinstance(v, float) else v for name, v in row.items()})
            self._file.flush()

    def sync(self) -> None:
        """Wait until what was written is on the disk."""
        with writing(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        with writing(self.path):
            self._file.close()


def _rows(path: Path, step: int) -> tuple[list[dict[str, str]], bool, bool]:
    """The whole rows of steps up to `step` in a metrics.csv, in order; whether it has other lines; and one without an
    end, which is no row, as its last number may be cut off.
    """
    *lines, rest = path.read_text(encoding="utf-8", errors="replace").split("\n")
    header = lines[0].split(",") if lines else []
    names = header if "step" in header else COLUMNS
    kept: list[dict[str, str]] = []
    damaged, last = False, 0
    for line in lines[1:] if names is header else lines:
        values = line.split(",")
        row = dict(zip(names, values, strict=False))
        try:
            numbers = [float(value) for value in values if value]
            number = int(row["step"]) if numbers and len(values) == len(names) else 0
        except ValueError:
            number = 0
        if number <= last:
            damaged = True
        elif number <= step:
            kept.append(row)
            last = number
    return kept, damaged, bool(rest)


def _gaps(steps: list[int], last: int) -> str:
    """What is not in `steps`, ascending, from 1 to `last`: "1 to 3, 7"; "" for nothing."""
    around = itertools.pairwise([0, *steps, last + 1])
    gaps = [f"{a + 1} to {b - 1}" if b - a > 2 else str(a + 1) for a, b in around if b - a > 1]
    return ", ".join(gaps[:3]) + (" and others" if len(gaps) > 3 else "")


class Clock:
    """Training time and tokens; what is not between `start` and `stop` (evaluation, saving) does not count."""

    def __init__(self, device: torch.device, seconds: float = 0.0, tokens: int = 0):
        self._device = device
        self._started = 0.0
        self._began: torch.cuda.Event | None = None
        self._asked: tuple[int, torch.cuda.Event] | None = None
        self.seconds = seconds
        self.tokens = tokens

    def start(self) -> None:
        """Begin to count, once the device has done what was asked of it before."""
        self._wait()
        self._started = time.perf_counter()
        if self._device.type == "cuda":
            self._began, self._asked = _event(), None

    def stop(self, tokens: int) -> None:
        """Add the time since `start`, and the `tokens` trained on meanwhile; without any, nothing."""
        self._wait()
        if tokens:
            self.seconds += time.perf_counter() - self._started
            self.tokens += tokens

    @property
    def rate(self) -> float | None:
        """Tokens per second; None where none have been timed."""
        return self.tokens / self.seconds if self.tokens else None

    def rate_now(self, tokens: int) -> float | None:
        """`rate` with the `tokens` since `start` as well; without any, `rate`.

        On a GPU, which may be far behind the host, it is as of the call before this one, as what Measures.take gives.
        """
        seconds = time.perf_counter() - self._started
        if self._began:
            asked, self._asked = self._asked, (tokens, _event())
            if asked is None:
                return self.rate
            tokens, done = asked
            done.synchronize()
            seconds = self._began.elapsed_time(done) / 1000
        return (self.tokens + tokens) / (self.seconds + seconds) if tokens else self.rate

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class Measures:
    """What steps measured, brought from the device without making it wait.

    On a GPU the copy is asynchronous: what `take` gives are the values that the call before it asked for.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._pending: list[Tensor] = []
        self._copy: tuple[Tensor, torch.cuda.Event] | None = None

    def add(self, values: Tensor) -> None:
        """Note the values (K,) of the next step."""
        self._pending.append(values)

    def take(self, *, everything: bool = False) -> list[list[float]]:
        """The values of the next steps that are there, in order; with `everything`, of all of them."""
        found = self._arrived()
        if self._pending:
            values, self._pending = torch.stack(self._pending), []
            if self._device.type == "cuda":
                host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
                host.copy_(values, non_blocking=True)
                event = torch.cuda.Event()
                event.record()
                self._copy = host, event
            else:
                found += values.tolist()
        return found + self._arrived() if everything else found

    def _arrived(self) -> list[list[float]]:
        if self._copy is None:
            return []
        (host, event), self._copy = self._copy, None
        event.synchronize()
        return host.tolist()


class Display:
    """Progress on the terminal: a bar where there is one, a plain line every few seconds where there is not."""

    def __init__(self, console: Console, steps: int):
        self._console = console
        self._steps = steps
        self._bar: Progress | None = None
        self._last_line = time.monotonic()

    @contextmanager
    def running(self, step: int) -> Iterator[None]:
        """Show the bar, `step` steps being done, while the block runs."""
        if not self._console.is_terminal:
            self._begun, self._first = time.monotonic(), step
            yield
            return
        columns = (BarColumn(), TextColumn("{task.completed}/{task.total}"), TextColumn("{task.fields[shown]}"))
        # Refreshed by update() alone: a thread that redraws would take time from the training.
        with Progress(
            *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self._console, auto_refresh=False
        ) as self._bar:
            self._task = self._bar.add_task("train", total=self._steps, completed=step, shown="")
            yield
        self._bar = None

    def update(self, step: int, loss: float, rate: float | None, mfu: float | None, memory: int | None) -> None:
        """Show that `step` steps are done, the latest loss (nats per token) and the speed (tokens per second).

        With the MFU (percent) and the most memory in use so far (bytes). What is not known is left out.
        """
        shown = f"loss {loss:.4f}"
        shown += "" if rate is None else f"  {rate:,.0f} tokens/s"
        shown += "" if mfu is None else f"  MFU {mfu:.1f}%"
        shown += "" if memory is None else f"  {memory / 1e9:.1f} GB"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, shown=shown, refresh=True)
            return
        now = time.monotonic()
        if now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            left = (now - self._begun) / (step - self._first) * (self._steps - step)
            self.line(f"step {step}/{self._steps}  {shown}  {_duration(left)} left")

    def table(self, table: Table) -> None:
        """Print a table."""
        self._console.print(table)

    def line(self, text: str, style: str | None = None) -> None:
        """Print a line that stays."""
        self._console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def write_text(path: Path, text: str) -> None:
    """Write a text file whole, or not at all. Raises UserError when it cannot be written."""
    draft = path.with_name(path.name + ".writing")
    with writing(path):
        try:
            draft.write_text(text, encoding="utf-8", newline="")
            storage.sync(draft)
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
