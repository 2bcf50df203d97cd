"""A checkout of nanoGPT, run as it is and in turns with our ladder: the same model, vocabulary and biases too, the same
batch, context and precision.

nanoGPT prints the time of each iteration, batch and loss included and evaluation excluded; our steps are timed with the
loss fetched after each, as nanoGPT does. The first iterations of each turn do not count.
"""

import pickle
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import ladder, noise, timing
from minigpt import corpora
from minigpt.config import TrainConfig, pick_dtype
from minigpt.errors import UserError
from minigpt.tokenizers import CharTokenizer

DATA = "shakespeare_char"
DROPPED = 5
NOTE = "its own train.py, as it is: its times include reading each batch and copying it to the device"
_ITERATION = re.compile(r"^iter (\d+): loss ([\d.]+|nan), time ([\d.]+)ms", re.MULTILINE)


def check(folder: Path) -> None:
    """Raise UserError unless `folder` is a checkout of nanoGPT whose characters of Shakespeare are prepared."""
    for name in ("train.py", "model.py", "configurator.py", "config/train_shakespeare_char.py"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} is no checkout of nanoGPT: it has no {name}")
    missing = [name for name in ("train.bin", "val.bin", "meta.pkl") if not (folder / "data" / DATA / name).is_file()]
    if missing:
        raise UserError(
            f"nanoGPT's data is not prepared, data/{DATA} lacks {', '.join(missing)}: "
            f"run python data/{DATA}/prepare.py in {folder}"
        )


def lay_out(folder: Path, vocabulary: int, data: Path) -> None:
    """Make `data` a dataset of nanoGPT's: its tokens, in a vocabulary as large as ours, for a last layer as wide."""
    data.mkdir()
    for name in ("train.bin", "val.bin"):
        (data / name).symlink_to((folder / "data" / DATA / name).resolve())
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocabulary}))


def command(settings: TrainConfig, device: torch.device, iterations: int, data: Path, out: Path) -> list[str]:
    """nanoGPT's own training program, set to our model and batch; compiled on a GPU, where that is its best.

    `data` is an absolute path: nanoGPT joins it to its own folder's.
    """
    dtype = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
    flags = {
        "device": device.type,
        "compile": device.type == "cuda",
        "dtype": dtype[pick_dtype(settings.dtype, device)],
        "out_dir": out,
        "dataset": data,
        "eval_interval": 100000,
        "eval_iters": 1,
        "log_interval": 1,
        "block_size": settings.block_size,
        "batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.grad_accumulation,
        "n_layer": settings.n_layer,
        "n_head": settings.n_head,
        "n_embd": settings.n_embd,
        "max_iters": iterations,
        "lr_decay_iters": 2000,
        "dropout": settings.dropout,
        "bias": settings.bias,
    }
    return [sys.executable, "train.py", "config/train_shakespeare_char.py", *(f"--{k}={v}" for k, v in flags.items())]


def parse(output: str) -> list[float]:
    """Milliseconds of each iteration that nanoGPT's output tells of, the first ones left out."""
    return [float(ms) for number, _, ms in _ITERATION.findall(output) if int(number) >= DROPPED]


def _theirs(folder: Path, settings: TrainConfig, device: torch.device, iterations: int) -> list[float]:
    characters = CharTokenizer.from_text(corpora.load(settings.data).text).vocab_size
    with tempfile.TemporaryDirectory() as own:
        out, data = Path(own) / "out", Path(own) / "data"
        lay_out(folder, settings.model_config(characters).vocab_size, data)
        done = subprocess.run(
            command(settings, device, iterations, data, out), cwd=folder, capture_output=True, text=True, timeout=900
        )
    times = parse(done.stdout)
    if done.returncode or not times:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        raise RuntimeError(f"nanoGPT in {folder} ended with status {done.returncode}: {said}")
    return times


@dataclass
class _Turns:
    """A training of ours, and how long its steps had to wait for other processes."""

    training: ladder.Training
    waiting: timing.Waiting = field(default_factory=timing.Waiting)

    def take(self, iterations: int) -> list[float]:
        times = []
        for _ in range(iterations):
            ladder.wait(self.training.device)
            with self.waiting:
                began = time.perf_counter()
                self.training.step().item()
                times.append((time.perf_counter() - began) * 1e3)
        return times[DROPPED:]


def _early(training: ladder.Training) -> list[float]:
    return _Turns(training).take(DROPPED + ladder.EARLY_SAMPLES)


def measure(
    folder: Path, settings: TrainConfig, rungs: list[ladder.Rung], device: torch.device, steps: int, quick: bool,
    keep: ladder.Keep = lambda rows: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of nanoGPT and of the rungs whose losses agree after `steps` steps, timed in turns; one that fails says why.

    Raises UserError where `folder` is no checkout that could run, or cannot train what the preset does.
    """
    settings = prepared(folder, settings)
    name = "nanoGPT"
    rows, trainings = ladder.trained(settings, rungs, device, steps, _early, keep)
    dtype = next(row["dtype"] for row in rows)
    theirs: dict[str, Any] = {"preset": settings.preset, "configuration": name, "dtype": dtype}
    rows.insert(0, theirs | {"status": "untimed", "reason": "the run ended before this was timed"})
    ours = {rung: _Turns(training) for rung, training in trainings.items()}
    turns, iterations = (2, 40) if quick else (4, 60)
    tokens = settings.batch_size * settings.block_size * settings.grad_accumulation
    samples: dict[str, list[float]] = {**{rung: [] for rung in trainings}, name: []}  # it compiles anew in each turn
    failed: dict[str, Exception] = {}
    for turn in range(turns):
        for variant in list(samples) if turn % 2 == 0 else reversed(list(samples)):
            if variant in failed:
                continue
            try:
                if variant == name:
                    samples[name] += _theirs(folder, settings, device, iterations)
                else:
                    samples[variant] += ours[variant].take(iterations + 1)
            except Exception as error:  # one that fails must not end the others
                failed[variant] = error
            print(f"turn {turn + 1} of {turns}: {variant}", flush=True)
            row = next(row for row in rows if row["configuration"] == variant)
            if variant in failed:
                row |= ladder.failure(failed[variant])
            elif variant == name and not trainings:
                row.pop("reason", None)
                row |= ladder.speed(samples[name], tokens) | {"note": NOTE, "mfu_percent": None}
            elif variant == name:  # of the shape of ours, so of as many operations
                ladder.enter_speed(row, samples[name], next(iter(trainings.values())))
                row["note"] = NOTE
            else:
                ladder.enter_speed(row, samples[variant], trainings[variant])
                row |= noise.waited(ours[variant])
            keep(rows)
    return rows


def prepared(folder: Path, settings: TrainConfig) -> TrainConfig:
    """`settings` with nanoGPT's text, whose vocabulary sizes the last layer. Raises UserError where it cannot run."""
    check(folder)
    if settings.window not in (0, settings.block_size):
        raise UserError(f"preset {settings.preset} trains on windows shorter than its context, which nanoGPT does not")
    text = folder / "data" / DATA / "input.txt"
    return replace(settings, data=str(text)) if text.is_file() else settings
