"""`python -m minigpt experiment NAME`: the runs that are not stored yet, then table, picture and paragraph."""

import difflib
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from ..allocator import keep_freed_memory
from ..command_line import command_line, warn
from ..errors import Stopped, UserError, stop_requests, writing
from ..lock import Lock
from ..report import write_text
from . import log, paragraphs, pictures, training
from .catalogue import CPU, EXPERIMENTS, GPU, QUICK, Experiment, Scale
from .groups import Group, Groups
from .runs import Place, Result, Run, with_seeds
from .step_cost import step_cost
from .store import Store

ALL = "all"


@dataclass(frozen=True)
class Options:
    """Run an experiment, or all of them: a table, a picture, and what came out in words.

    What is stored already, with the same settings, is not run again.
    """

    name: tyro.conf.Positional[str] = ""
    """Which one, of those that --list names, or all."""
    list: bool = False
    """Say which experiments there are, and run none."""
    data: str | None = None
    """What to train on: shakespeare, pydocs, or a text file. Without one: shakespeare."""
    out: Path | None = None
    """Folder for the results. Without one: runs/experiments, with --quick runs/experiments-quick."""
    seeds: int = 0
    """Seeds of each setting; 0: 3, or 5 where differences are small."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ..., or auto: the GPU if there is one. On a GPU the runs are larger."""
    kernels: str | None = None
    """Backend of the ops, as for training. Without one: the environment's MINIGPT_KERNELS, else auto."""
    log: Path | None = None
    """The log that `all` writes, its pictures in images/experiments beside it. Without one: docs/experiments_log.md,
    with --quick experiments_log.md in the folder for the results."""
    quick: bool = False
    """Ten steps, and windows of 16 tokens: to see that it works. What comes out means nothing."""


@dataclass(frozen=True)
class Planned:
    """An experiment with the runs of its settings, by label, a run for each seed."""

    experiment: Experiment
    runs: dict[str, list[Run]]


def run_experiment(argv: Sequence[str] | None = None, prog: str = "python -m minigpt experiment") -> None:
    """Carry out the command line. Raises UserError for what is wrong with it, and Stopped after Ctrl-C."""
    options = command_line(Options, sys.argv[1:] if argv is None else argv, prog=prog)
    if options.list:
        for experiment in EXPERIMENTS.values():
            print(f"{experiment.name:<12}  {experiment.question}")
        return
    chosen = _chosen(options.name)
    if options.seeds < 0:
        raise UserError(f"seeds is {options.seeds}: it must be 1 or more, or 0 for those of each experiment")
    with stop_requests() as stop:
        place = Place(
            options.data,
            options.device,
            options.kernels or os.environ.get("MINIGPT_KERNELS"),
            announce=warn,
            stopping=lambda: stop.requested,
        )
        if warning := place.ops().warning:
            warn(warning)
        if place.device.type == "cpu":
            keep_freed_memory()
        scale = QUICK if options.quick else GPU if place.device.type == "cuda" else CPU
        out = options.out or Path("runs/experiments-quick" if options.quick else "runs/experiments")
        try:
            _carry_out(chosen, scale, options, place, out)
        except Stopped:
            raise Stopped(f"stopped; the runs that are done are kept in {out}: the same command goes on") from None


def _carry_out(chosen: list[Experiment], scale: Scale, options: Options, place: Place, out: Path) -> None:
    store = Store(out / "results", warn)
    lock = Lock(out / "lock", f"other experiments are running in {out}", "choose another --out")
    try:
        logged = (options.log or _default_log(options, out)) if options.name == ALL else None
        if logged is not None:
            _check_writable(logged)
        planned = plan(chosen, scale, options.seeds, place)
        work = Work(planned, store, place)
        print(work.told, flush=True)
        sections, drawn, seconds = {}, {}, 0.0
        for one in planned:
            groups = work.groups(one)
            name = one.experiment.name
            paragraph = write(one.experiment, groups, out)
            print(f"\n{one.experiment.title}. {paragraph}\n-> {out / name}.csv, .png, .md\n", flush=True)
            drawn[name] = out / f"{name}.png"
            sections[name] = log.section(one.experiment, groups, paragraph, f"{log.picture_folder()}/{name}.png")
        if logged is not None:
            seconds = sum(result["seconds"] for result in work.done.values())
            log.write_log(sections, drawn, logged, place, seconds / 60, options.quick)
            print(f"written to {logged}")
    finally:
        lock.release()


def plan(chosen: Sequence[Experiment], scale: Scale, seeds: int, place: Place) -> list[Planned]:
    """The runs of each experiment; loads the texts that they need."""
    return [
        Planned(
            experiment,
            {
                label: with_seeds(run, experiment.seeds(scale, seeds) if run.repeated else 1)
                for label, run in experiment.runs(scale, place).items()
            },
        )
        for experiment in chosen
    ]


def write(experiment: Experiment, groups: Groups, out: Path) -> str:
    """Write NAME.csv, NAME.png and NAME.md to `out`; the paragraph. Raises UserError when they cannot be written."""
    name = experiment.name
    paragraph = paragraphs.TELL[name](groups)
    log.write_csv(groups, out / f"{name}.csv")
    pictures.draw(name, groups, out / f"{name}.png", experiment.question)
    write_text(out / f"{name}.md", log.section(experiment, groups, paragraph, f"{name}.png"))
    return paragraph


class Work:
    """The runs of a command: those that are stored, those to do, and how long the rest will take."""

    def __init__(self, planned: Sequence[Planned], store: Store, place: Place, announce: Callable[[str], None] = print):
        self._store, self._place, self._announce = store, place, announce
        runs = [run for one in planned for each in one.runs.values() for run in each]
        settings = {run: place.settings(run) for run in runs}
        self._settings = settings
        found = {run: store.load(run, settings[run]) for run in settings}
        self.done: dict[Run, Result] = {run: result for run, result in found.items() if result is not None}
        self._left = [run for run in settings if run not in self.done]
        self._total, self._spent, self._computed = len(settings), 0.0, 0.0

    @property
    def told(self) -> str:
        """How many runs there are, and how many of them are stored."""
        return f"{self._total} runs, {len(self.done)} of them stored already, {len(self._left)} to do"

    def groups(self, one: Planned) -> Groups:
        """The results of an experiment, after the runs that it still lacks, seed by seed."""
        for number in range(max(map(len, one.runs.values()))):
            for label, runs in one.runs.items():
                if number < len(runs) and runs[number] not in self.done:
                    self._do(runs[number], f"{one.experiment.name}: {label}, seed {runs[number].seed}")
        return {label: Group(label, runs[0], [self.done[run] for run in runs]) for label, runs in one.runs.items()}

    def _do(self, run: Run, what: str) -> None:
        if self._place.stopping():
            raise Stopped("stopped")
        began = time.perf_counter()
        result = step_cost(run, self._place) if run.kind == "cost" else training.train(run, self._place)
        self._store.save(run, self._settings[run], result)
        self.done[run] = result
        self._left.remove(run)
        self._spent += time.perf_counter() - began
        self._computed += run.work
        left = sum(other.work for other in self._left) * self._spent / self._computed
        self._announce(f"[{len(self.done)}/{self._total}] {what}: {_outcome(result)}, {_duration(left)} left")


def _outcome(result: Result) -> str:
    seconds = f"{result['seconds']:.1f} s"
    if "final" not in result:
        return f"{result['kept_bytes'] / 2**20:.2f} MiB kept, {seconds}"
    loss = result["final"]["loss"]
    return f"validation loss {'not finite' if loss is None else f'{loss:.4f}'}, {seconds}"


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _chosen(name: str) -> list[Experiment]:
    known = ", ".join((*EXPERIMENTS, ALL))
    if not name:
        raise UserError(f"name an experiment: {known} (--list says what they are)")
    if name == ALL:
        return list(EXPERIMENTS.values())
    if name not in EXPERIMENTS:
        close = difflib.get_close_matches(name, (*EXPERIMENTS, ALL), 1)
        meant = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"unknown experiment {name!r}: there are {known}{meant}")
    return [EXPERIMENTS[name]]


def _check_writable(path: Path) -> None:
    """Raise UserError now, and not after half an hour, where a file cannot be written."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        there = path.exists()
        path.open("a", encoding="utf-8").close()
        if not there:
            path.unlink()


def _default_log(options: Options, out: Path) -> Path:
    return out / "experiments_log.md" if options.quick else Path("docs/experiments_log.md")
