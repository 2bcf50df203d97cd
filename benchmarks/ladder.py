"""The ladder: configurations of training, each right first and timed then, and their speed, MFU and memory."""

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks import noise, results, stats, suite, timing
from minigpt import backends, config, corpora, graphs
from minigpt.allocator import keep_freed_memory
from minigpt.batches import Batches
from minigpt.config import TrainConfig
from minigpt.errors import UserError
from minigpt.learning import Learner
from minigpt.model import GPT
from minigpt.resume import device_name
from minigpt.tokenizers import CharTokenizer
from minigpt.utilization import flops_per_token, mfu_percent

MFU_FORMULA = (
    "MFU = tokens/s x (6 N + 12 L C T) / peak, with N the parameters of the matrix products (embeddings left out, the "
    "head counted), L layers of width C, T tokens of context, peak the data sheet's dense rate for the dtype."
)
INTERPRETED = "Triton's interpreter runs the kernels here, which says nothing about speed"
TOLERANCES = {"fp32": 5e-3, "bf16": 5e-2, "fp16": 5e-2}
"""By dtype: how far, in nats per token, the mean loss of the last tenth of the steps may be from that of `torch`."""
STEPS_A_SAMPLE = 5
EARLY_SAMPLES = 2
EARLY = "timed by itself, before the others had their turns"
DROPOUT_TOLERANCE = 0.1
"""The same for models with dropout, where every backend draws masks of its own."""


@dataclass(frozen=True)
class Rung:
    """One configuration of the ladder: what --kernels is given, whether the model is compiled, the step captured."""

    kernels: str
    compiled: bool = False
    graphed: bool = False

    @property
    def name(self) -> str:
        return self.kernels + "+compile" * self.compiled + "+graph" * self.graphed

    @property
    def has_triton(self) -> bool:
        return "triton" in backends.parse_request(self.kernels).values()


def ladder() -> list[Rung]:
    """Every configuration, in the order that kernels, compilation and graph are added, then each kernel left out."""
    without = [",".join(f"{op}={'torch' if op == out else 'triton'}" for op in backends.OPS) for out in backends.OPS]
    rungs = [Rung("eager"), Rung("torch"), Rung("torch", True), Rung("triton"), Rung("triton", True)]
    graphed = [Rung("torch", True, True), Rung("triton", False, True), Rung("triton", True, True)]
    return [*rungs, *graphed, *map(Rung, without)]


def chosen(names: list[str]) -> list[Rung]:
    """Rungs by name; the whole ladder without one. Any value of --kernels will do, with +compile, +graph or both.

    Raises UserError for what no backend is called.
    """
    rungs = []
    for name in names:
        request, *more = name.split("+")
        if more not in ([], ["compile"], ["graph"], ["compile", "graph"]):
            raise UserError(f"unknown configuration {name!r}: a value of --kernels, with +compile, +graph or neither")
        backends.parse_request(request)
        rungs.append(Rung(request, "compile" in more, "graph" in more))
    return rungs or ladder()


def finish(rows: list[dict[str, Any]]) -> None:
    """Enter each timed row's time over ours: all kernels, compiled if that ran; beside nanoGPT at least `torch`."""
    timed = {row["configuration"]: row for row in rows if row["status"] == "ok"}
    whole = ("triton+compile+graph", "triton+graph", "triton+compile", "triton")
    candidates = (*whole, *(("torch",) if "nanoGPT" in timed else ()))
    ours = next((timed[name] for name in candidates if name in timed), None)
    for row in timed.values() if ours else ():
        row["over_ours"] = float(f"{row['median_ms'] / ours['median_ms']:.4g}")
        row["ours"] = ours["configuration"]


# ---------------------------------------------------------------- one model that trains


class Training:
    """A model, its optimizer and its data: `step` is a step of train.py's, and gives the loss."""

    def __init__(self, settings: TrainConfig, rung: Rung, device: torch.device):
        if device.type == "cpu":
            keep_freed_memory()
        self.device = device
        self.dtype = config.pick_dtype(settings.dtype, device)
        corpus = corpora.load(settings.data)
        tokenizer = CharTokenizer.from_text(corpus.text)
        tokens = torch.from_numpy(tokenizer.encode(corpus.split()[0])).to(device)
        self.batches = Batches(tokens, settings.window or settings.block_size, settings.batch_size, settings.seed)
        self.tokens_per_step = settings.batch_size * self.batches.window * settings.grad_accumulation
        torch.manual_seed(settings.seed)
        ops = backends.resolve(rung.kernels, device)
        self.model = GPT(settings.model_config(tokenizer.vocab_size), ops).to(device)
        settings = dataclasses.replace(settings, compile=rung.compiled, cuda_graph=rung.graphed)
        graphs.check(settings, device)
        self.learner = Learner(self.model, settings, self.batches, self.dtype)
        self.done = 0

    def step(self) -> torch.Tensor:
        """One optimizer step; the mean loss () of its batches, still on the device."""
        loss, _ = self.learner.step(self.done)
        self.done += 1
        return loss


# ---------------------------------------------------------------- measuring


@dataclass
class StepTimer:
    """Steps of one training by the clock, the device's work included; on a GPU several, as training does not wait."""

    training: Training
    method: str = "perf_counter"
    waiting: timing.Waiting = field(default_factory=timing.Waiting)

    def sample(self) -> float:
        steps = STEPS_A_SAMPLE if self.training.device.type == "cuda" else 1
        wait(self.training.device)
        with self.waiting:
            began = time.perf_counter()
            for _ in range(steps):
                self.training.step()
            wait(self.training.device)
            return (time.perf_counter() - began) * 1e3 / steps


def wait(device: torch.device) -> None:
    """Wait until a GPU has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


Keep = Callable[[list[dict[str, Any]]], None]


def measure(
    settings: TrainConfig, rungs: list[Rung], device: torch.device, steps: int, rounds: int,
    keep: Keep = lambda rows: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of the rungs: losses over `steps` steps, then a few timed ones; of those that agree `rounds` more, in turns.

    `keep` is given the rows as they stand whenever there is news.
    """

    def early(training: Training) -> list[float]:
        timer = StepTimer(training)
        return [timer.sample() for _ in range(EARLY_SAMPLES)]

    rows, trainings = trained(settings, rungs, device, steps, early, keep)
    timers = {name: StepTimer(training) for name, training in trainings.items()}

    def enter(samples: dict[str, list[float]]) -> None:
        for row in rows:
            taken = samples.get(row["configuration"], [])
            if len(taken) >= EARLY_SAMPLES or len(taken) == rounds:
                enter_speed(row, taken, trainings[row["configuration"]])
                row |= noise.waited(timers[row["configuration"]])
        keep(rows)

    samples, failed = timing.interleaved(timers, rounds, seconds=240.0, news=enter)
    enter(samples)
    for row in rows:
        if row["configuration"] in failed:
            row |= failure(failed[row["configuration"]])
    return rows


def trained(
    settings: TrainConfig, rungs: list[Rung], device: torch.device, steps: int,
    early: Callable[[Training], list[float]], keep: Keep,
) -> tuple[list[dict[str, Any]], dict[str, Training]]:  # fmt: skip
    """Rows of the rungs after `steps` steps; and by name the trainings whose losses agree.

    A run may end while a later rung compiles: each is timed by itself as soon as its losses are known to agree, by
    `early`, which gives milliseconds of its steps. What all others are held to, `torch`, is trained first.
    """
    rows, trainings = [], {}
    dtype_name = next(n for n, known in config.DTYPES.items() if known == config.pick_dtype(settings.dtype, device))
    place = {rung.name: number for number, rung in enumerate(rungs)}
    for rung in sorted(rungs, key=lambda rung: rung.name != "torch"):
        row: dict[str, Any] = {"preset": settings.preset, "configuration": rung.name, "dtype": dtype_name}
        rows.append(row)
        rows.sort(key=lambda row: place[row["configuration"]])
        if device.type == "cpu" and rung.has_triton:
            row |= {"status": "skipped", "reason": INTERPRETED}
            continue
        try:
            training, found = _first_steps(settings, rung, device, steps)
            row |= found | {"status": "untimed", "reason": "the run ended before this was timed"}
            agree(rows, settings)
            if row["status"] == "untimed":
                enter_speed(row, early(training), training)
                row["note"] = EARLY
                trainings[rung.name] = training
        except Exception as error:
            row |= failure(error)
        training = None  # the memory of one that broke or is wrong is for the others
        gc.collect()
        said = f"loss {row['last_loss']:.4f} after {steps} steps" if "last_loss" in row else row.get("reason")
        print(f"{rung.name}: {said}", flush=True)
        keep(rows)
    return rows, {name: trainings[name] for name in place if name in trainings}


def enter_speed(row: dict[str, Any], samples_ms: list[float], training: Training) -> None:
    """Make a row that waits for its times one that has them, or has more of them now."""
    for name in ("reason", "note"):
        row.pop(name, None)
    row |= speed(samples_ms, training.tokens_per_step)
    flops = flops_per_token(training.model, training.batches.window)
    mfu = mfu_percent(row["tokens_per_second"], flops, device_name(training.device), training.dtype)
    row["mfu_percent"] = None if mfu is None else float(f"{mfu:.4g}")


def failure(error: Exception) -> dict[str, str]:
    """The fields of a row whose configuration threw; what cannot be had here is skipped, what should be is an error."""
    if isinstance(error, UserError) and not isinstance(error, graphs.CaptureFailed):
        return {"status": "skipped", "reason": " ".join(str(error).split())[:200]}
    return suite.failure(error)


def _first_steps(settings: TrainConfig, rung: Rung, device: torch.device, steps: int) -> tuple[Training, dict]:
    """A training after its first `steps` steps, and the fields of its row: losses, and on a GPU peak memory."""
    before = 0
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    training = Training(settings, rung, device)
    losses = [training.step() for _ in range(min(2, steps))]
    if device.type == "cuda" and steps > 2:  # compiling is not training: its memory does not count
        torch.cuda.reset_peak_memory_stats()
    losses = torch.stack([*losses, *(training.step() for _ in range(steps - len(losses)))]).tolist()
    tenth = max(1, steps // 10)
    found = {
        "first_loss": losses[0], "last_loss": statistics.fmean(losses[-tenth:]), "losses": losses,
        "tokens_per_step": training.tokens_per_step, "peak_memory_mib": None,
    }  # fmt: skip
    if device.type == "cuda":
        found["peak_memory_mib"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    return training, found


def agree(rows: list[dict[str, Any]], settings: TrainConfig) -> None:
    """Mark the untimed rows as wrong whose last losses are not finite, or further from those of `torch` than allowed.

    Where `torch` did not run, the first that did stands in for it.
    """
    ran = [row for row in rows if "last_loss" in row]
    truth = next((row for row in ran if row["configuration"] == "torch"), ran[0] if ran else None)
    for row in (row for row in ran if row["status"] == "untimed"):
        tolerance = DROPOUT_TOLERANCE if settings.dropout else TOLERANCES[row["dtype"]]
        apart = abs(row["last_loss"] - truth["last_loss"])
        row["loss_apart"] = float(f"{apart:.3g}")
        if not apart <= tolerance:  # NaN is wrong too
            reason = f"wrong: its loss is {row['last_loss']:.4f}, that of {truth['configuration']} "
            reason += f"{truth['last_loss']:.4f}; {tolerance:g} apart is allowed"
            row |= {"status": "wrong", "reason": reason}


def speed(samples_ms: list[float], tokens_per_step: int) -> dict[str, Any]:
    """The fields of a row that come from the times of its steps; the 20th percentile of speed is a slow step's."""
    row = results.timed(samples_ms)
    summary = stats.Summary(row["median_ms"], row["p20_ms"], row["p80_ms"])
    rates = [tokens_per_step / ms * 1e3 for ms in (summary.median, summary.p80, summary.p20)]
    names = ("tokens_per_second", "p20_tokens_per_second", "p80_tokens_per_second")
    row |= {name: float(f"{rate:.6g}") for name, rate in zip(names, rates, strict=True)}
    return row | {"tokens_per_step": tokens_per_step}
