"""`python -m benchmarks all --stage N`: what a run on a GPU does, step by step, in the minutes that there are.

1  versions; every op once, stop if all are wrong; the kernels of real sizes compiled; parity; the losses of short
   trainings; quick kernel benchmarks; the memory of one step of gpt2; a cold start; traces
2  parity; the tile sweep, into kernels/tiles, from where it goes on and what stage 3 measures
3  the kernels of real sizes compiled; the ladder, beside nanoGPT if told where; every kernel benchmark, what the goals
   name first; generation

Each step is a process of its own with a time limit, its share of the minutes that are left, so that a step that takes
too long leaves the later ones theirs; a step that fails ends nothing but itself. What there is is packed
into DIR/stage-N.tar.gz after every step, and while one runs: the machine may go at any time. Without a GPU the same
steps run on the CPU, small, with Triton's interpreter for the kernels: a rehearsal.
"""

import argparse
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import machine, providers, results
from kernels import catalogue, tiles
from minigpt.errors import UserError, writing

PACK_SECONDS = 15.0  # between packings while a step runs
GRACE_SECONDS = 5.0  # between asking a step to end and ending it
RESERVE_SECONDS = 10.0  # of the minutes, for the last packing
LEAST_SECONDS = 10.0  # for a step: with less it would end before its imports have
MOST_PROCESSES = 16  # of parity: each has its own share of the GPU's memory, and its imports


@dataclass(frozen=True)
class Step:
    """One process of a stage. `seconds` is its own limit; where a `vital` step fails, the stage stops."""

    name: str
    command: list[str]
    seconds: float
    vital: bool = False


@dataclass
class Outcome:
    """How a step ended: ok, failed, timed out or skipped, and why."""

    name: str
    status: str
    seconds: float = 0.0
    reason: str = ""


def add_to(commands: Any) -> None:
    """Add `all` to a command line."""
    parser = commands.add_parser("all", help="everything that a run on a GPU does, in stages", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), required=True)
    parser.add_argument("--minutes", type=float, default=8.0, help="for the whole stage, 2 or more (default: 8)")
    parser.add_argument("--nanogpt", type=Path, metavar="DIR", help="stage 3: a checkout that the ladder is beside")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the archive")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """The command. Returns 1 if a step failed or timed out."""
    if not arguments.minutes > 0:
        raise UserError(f"--minutes must be above 0, not {arguments.minutes:g}")
    archive = arguments.out / f"stage-{arguments.stage}.tar.gz"
    results.prepare(archive)
    if arguments.nanogpt:
        from benchmarks import nanogpt

        nanogpt.check(arguments.nanogpt)
    on_gpu = machine.here().type == "cuda"
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
        work = Path(folder)
        outcomes = follow(
            plan(arguments.stage, on_gpu, work, arguments.nanogpt),
            work,
            archive,
            arguments.minutes * 60 - RESERVE_SECONDS,
            also=tiles.FOLDER if arguments.stage == 2 and on_gpu else None,
        )
    print(summary(outcomes))
    print(f"packed: {archive}")
    return int(any(outcome.status in ("failed", "timed out") for outcome in outcomes))


def plan(stage: int, on_gpu: bool, work: Path, nanogpt: Path | None = None) -> list[Step]:
    """The steps of a stage; `work` is the folder that they write to, `nanogpt` a checkout for stage 3."""

    def ours(name: str, seconds: float, *arguments: str) -> Step:
        return Step(name, [sys.executable, "-m", "benchmarks", *arguments, "--out", str(work / "results")], seconds)

    def parity(seconds: float, choice: str) -> Step:
        # a line for each test: of a step that is ended too, the log says what had passed and what had not
        tests = ["tests/kernels/test_parity.py", "-v", "-rfE", "--maxfail", "20" if on_gpu else "1"]
        small = "small or one_row or characters"
        chosen = ["-p", "no:cacheprovider", "-k", choice if on_gpu else f"({small}) and float32"]
        if on_gpu and importlib.util.find_spec("xdist"):  # hundreds of kernels are compiled: one core takes too long
            chosen += ["-n", str(min(_cores(), MOST_PROCESSES))]
        return Step("parity", [sys.executable, "-m", "pytest", *tests, *chosen], seconds)

    python = [sys.executable, "-m"]
    versions = Step("versions", [*python, "benchmarks.versions"], 60)
    first = Step("one-kernel", [*python, "benchmarks.first_kernel"], 120, vital=True)
    whole = [*python, "profiling", "resources", "--here", "--dtype", "bfloat16", "--json", str(work / "resources.json")]
    if stage == 1:
        small = [*python, "profiling", "resources", "--op", "layer_norm", "--dtype", "float32"]
        preset, steps = ("shakespeare", "100") if on_gpu else ("tiny", "3")
        rungs = ["torch", "triton"] if on_gpu else ["eager", "torch"]
        losses = ["--preset", preset, "--steps", steps, "--rounds", "6", "--rung", *rungs]
        memory = ["--preset", "gpt2" if on_gpu else "tiny", "--kernels", "torch", "triton", "--batch-size", "8"]
        memory += [f"--{kind}={work / 'memory'}.{kind}" for kind in ("json", "png", "html")]
        return [
            versions,
            first,
            Step("compile", whole if on_gpu else small, 100),
            parity(150, "float32 or bfloat16"),
            ours("losses", 120, "train", "--quick", *losses),
            ours("kernels", 180, "kernels", "--quick", *([] if on_gpu else _REHEARSED)),
            Step("memory", [*python, "profiling", "memory", *memory], 120),
            ours("start", 30, "start", "--rung", "triton", "--rounds", "1", *([] if on_gpu else ["--preset", "tiny"])),
            *(_trace(backend, on_gpu, work) for backend in ("torch", "triton")),
        ]
    if stage == 2:
        where = [] if on_gpu else ["--out", str(work / "tiles"), "--dry-run", "--quick"]
        return [
            versions,
            first,
            parity(100, "float32 or bfloat16"),
            Step("tune", [*python, "benchmarks", "tune", *where], 420),
        ]
    # ours right after what it is held to, then PyTorch's with all that ours has but the kernels
    rungs = ["torch", "triton+compile+graph", "torch+compile+graph", "torch+compile"] if on_gpu else ["eager", "torch"]
    ladder = ["train", "--quick", "--rung", *rungs, *([] if on_gpu else ["--steps", "3", "--rounds", "6"])]
    ladder += ["--nanogpt", str(nanogpt.resolve())] if nanogpt and on_gpu else []
    rounds = ["--rounds", "15"] if on_gpu else ["--quick", *_REHEARSED]
    others = [op.name for op in catalogue.OPS if op.name not in COSTLY]
    return [
        replace(versions, seconds=10),
        replace(first, seconds=35),
        *([Step("compile", whole, 28)] if on_gpu else []),
        ours("ladder", 120, *ladder, "--preset", "shakespeare" if on_gpu else "tiny"),
        *([ours("ladder-gpt2", 150, *ladder, "--preset", "gpt2")] if on_gpu else []),
        ours("kernels", 65, "kernels", "--op", *COSTLY, *rounds, *(["--provider", *_rivals()] if on_gpu else [])),
        ours("kernels-others", 35, "kernels", "--op", *others, *rounds),
        ours("decode", 27, "decode", "--quick", *([] if on_gpu else ["--preset", "tiny", "--block", "16"])),
    ]


COSTLY = (providers.ATTENTION, providers.QKVPACKED, providers.DECODE, "linear_cross_entropy")
"""The ops whose plain arithmetic, compiled or not, takes far longer than anyone's kernels, and is in no goal."""


def _rivals() -> list[str]:
    """The providers that have some of the COSTLY ops, plain arithmetic left out."""
    return [
        name
        for name, provider in providers.PROVIDERS.items()
        if name not in ("eager", "compile") and (not provider.ops or set(provider.ops) & set(COSTLY))
    ]


def _trace(backend: str, on_gpu: bool, work: Path) -> Step:
    command = [sys.executable, "-m", "profiling", "trace", "--preset", "gpt2" if on_gpu else "tiny"]
    command += ["--batch-size", "8", "--steps", "2", "--kernels", backend, "--out", str(work / f"trace-{backend}")]
    return Step(f"trace-{backend}", command, 25)


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# compilation for a CPU takes longest of all, and is not what is rehearsed
_REHEARSED = ["--provider", "triton", "eager", "torch", "--rounds", "6"]


# ---------------------------------------------------------------- following a plan


def follow(
    steps: list[Step], work: Path, archive: Path, seconds: float, say: Callable[[str], None] = print,
    also: Path | None = None,
) -> list[Outcome]:  # fmt: skip
    """Run the steps within `seconds` altogether, keeping `archive` up to date; how each ended.

    The archive has what is in `work` and, in a folder of that name, in `also`.
    """
    began = time.monotonic()
    outcomes: list[Outcome] = []
    stopped = ""
    for number, step in enumerate(steps, 1):
        left = seconds - (time.monotonic() - began)
        if stopped or left <= 1.0:
            outcomes.append(Outcome(step.name, "skipped", reason=stopped or "no time was left"))
        else:
            limit = _limit(step, steps[number:], left)
            say(f"{number} of {len(steps)}: {step.name}, at most {limit:.0f} s")
            outcome = _run_step(step, number, limit, work, lambda: pack(work, archive, also))
            outcomes.append(outcome)
            say(f"  {outcome.status} after {outcome.seconds:.1f} s{': ' * bool(outcome.reason)}{outcome.reason}")
            if step.vital and outcome.status == "failed":  # one that was too slow says nothing of the others
                stopped = f"{step.name} did not pass, and nothing after it would mean anything"
        _note(work, outcomes)
        pack(work, archive, also)
    return outcomes


def _limit(step: Step, later: list[Step], left: float) -> float:
    """The seconds that a step may take: its share of those `left`, by its own limit beside those of the `later` ones.

    What a step leaves over goes to all that follow. A vital step has its whole limit.
    """
    if step.vital:
        return min(step.seconds, left)
    share = left * step.seconds / (step.seconds + sum(other.seconds for other in later))
    return min(step.seconds, left, max(share, LEAST_SECONDS))


def _note(work: Path, outcomes: list[Outcome]) -> None:
    results.write(work / "steps.json", json.dumps([outcome.__dict__ for outcome in outcomes], indent=1) + "\n")
    results.write(work / "steps.md", summary(outcomes) + "\n")


def _run_step(step: Step, number: int, seconds: float, work: Path, pack_now: Callable[[], None]) -> Outcome:
    log = work / f"{number:02d}-{step.name}.log"
    began = packed = time.monotonic()
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": machine.import_path()}
    with log.open("w", encoding="utf-8") as output:
        try:
            # a session of its own, so that its compilers end with it
            process = subprocess.Popen(
                step.command, cwd=machine.ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return Outcome(step.name, "failed", reason=str(error))
        try:
            while process.poll() is None and time.monotonic() - began < seconds:
                time.sleep(0.1)
                if time.monotonic() - packed > PACK_SECONDS:
                    pack_now()
                    packed = time.monotonic()
        finally:
            timed_out = process.poll() is None
            if timed_out:
                _end(process)
    spent = time.monotonic() - began
    if timed_out:
        return Outcome(step.name, "timed out", spent, f"its limit was {seconds:.0f} s")
    if process.returncode:
        return Outcome(step.name, "failed", spent, f"status {process.returncode}: {_last_line(log)}")
    return Outcome(step.name, "ok", spent)


def _end(process: subprocess.Popen) -> None:
    for kind, wait in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, kind)
        except ProcessLookupError:
            return
        try:
            process.wait(wait)
            return
        except subprocess.TimeoutExpired:
            continue


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else "it said nothing"


def pack(work: Path, archive: Path, also: Path | None = None) -> None:
    """Pack all of `work`, and the folder `also`, into `archive`, which is never there by halves."""
    draft = archive.with_name(archive.name + ".writing")
    with writing(archive):
        with tarfile.open(draft, "w:gz", compresslevel=6) as tar:
            files = [(path, path.relative_to(work)) for path in sorted(work.rglob("*"))]
            if also:
                files += [(path, path.relative_to(also.parent)) for path in sorted(also.rglob("*"))]
            for path, name in files:
                # what is being written now may be gone or of another size in a moment
                if path.is_file() and not path.name.endswith((".writing", ".probe")):
                    try:
                        content = path.read_bytes()
                    except FileNotFoundError:
                        continue
                    _add(tar, str(name), content)
        os.replace(draft, archive)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mtime = len(content), int(time.time())
    tar.addfile(entry, io.BytesIO(content))


def summary(outcomes: list[Outcome]) -> str:
    """The outcomes as a Markdown table."""
    lines = ["| step | status | seconds | why |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {o.name} | {o.status} | {o.seconds:.1f} | {o.reason} |" for o in outcomes)])
