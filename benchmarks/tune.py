"""`python -m benchmarks tune`: the tile sweep, which writes kernels/tiles/<gpu>.json.

For each entry of the table: candidates are compiled in parallel, while the entry before is judged and timed, those
that spill or exceed shared memory dropped, the rest held to the truth, forward and backward (kernels written in Gluon
in a process of their own, which may hang), and those that are right timed in turns. The best of them is timed against
the default once more, and enters the table if it is faster by more than chance. What is known is stored as
it comes, in <gpu>.partial, and a sweep that was cut short goes on from there; one whose timing hangs ends, and leaves
out what it timed when it goes on. --dry-run does all but the timing,
for a GPU that is not there: kernels run in Triton's interpreter, on small problems.
"""

import argparse
import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, problems, results, stats, suite, sweep, timing, trial
from benchmarks.problems import DTYPES, Checker, Problem, Wrong
from benchmarks.sweep import Candidate, Entry
from kernels import tiles
from kernels.device import TARGETS, Device, facts
from kernels.op import plan_for
from minigpt.errors import UserError


def add_to(commands: Any) -> None:
    """Add `tune` to a command line."""
    parser = commands.add_parser("tune", help="find tiles for this GPU", description=__doc__)
    parser.add_argument(
        "--op", nargs="+", action="extend", default=[], help="ops of the catalogue (default: all that have tiles)"
    )
    parser.add_argument("--quick", action="store_true", help="one entry of each op, three candidates")
    parser.add_argument("--dry-run", action="store_true", help="everything but the timing, no GPU needed")
    parser.add_argument("--arch", choices=[*TARGETS], default="sm_90", help="of a --dry-run (default: sm_90)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that compile")
    parser.add_argument("--out", type=Path, default=tiles.FOLDER, help="folder for the table (default: kernels/tiles)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """The command. Returns 1 if the default of some entry is wrong."""
    names = [op.name for op in problems.ops_named(arguments.op)]
    here = machine.here()
    if here.type != "cuda" and not arguments.dry_run:
        raise UserError("tuning needs a CUDA GPU; --dry-run compiles and checks the candidates without one")
    if arguments.workers < 1:
        raise UserError(f"--workers must be at least 1, not {arguments.workers}")
    base = TARGETS[arguments.arch] if arguments.dry_run else facts(here.torch_device)
    slug = f"dry-run-{arguments.arch}" if arguments.dry_run else here.slug
    partial = Partial(arguments.out / f"{slug}.partial")
    chosen = [entry for entry in sweep.entries() if entry.op in names]
    if arguments.quick:
        chosen = list({entry.op: entry for entry in reversed(chosen)}.values())[::-1]
    table: dict[str, dict[str, list[int]]] = {}
    broken = 0
    for number, (entry, tried) in enumerate(compiled(chosen, base, partial, arguments), 1):
        print(f"{number} of {len(chosen)}: {entry.name}, {len(tried)} candidates", flush=True)
        right = survivors(entry, tried, base, partial, arguments.dry_run)
        broken += Candidate(entry) not in right
        if arguments.dry_run:
            print(f"  right: {', '.join(str(list(c.numbers) or 'default') for c in right)}", flush=True)
        else:
            winner = decide(entry, right, base, partial)
            if winner:
                table.setdefault(entry.slot, {})[entry.key] = list(winner.numbers)
            write_table(table, here.name, arguments.out / f"{slug}.json")
    print("dry run: nothing was timed, and no table written" if arguments.dry_run else f"written: {slug}.json")
    return int(broken > 0)


class Partial:
    """What a sweep knows so far, on disk; it starts anew where the kernels are others than those it knows."""

    def __init__(self, path: Path):
        self.path = path
        results.prepare(path)
        self.known: dict[str, Any] = {"kernels": _kernels_hash(), "compiled": {}, "judged": {}, "decided": {}}
        with contextlib.suppress(FileNotFoundError, ValueError):
            before = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(before, dict) and before.get("kernels") == self.known["kernels"]:
                self.known |= before

    def enter(self, what: str, found: dict[str, Any]) -> None:
        """Add what was found out, and store all of it."""
        self.known[what] |= found
        results.write(self.path, json.dumps(self.known, indent=1) + "\n")


def _kernels_hash() -> str:
    """The sources alone: the table that a sweep writes must not make it start over."""
    digest = hashlib.sha256()
    for path in sorted((machine.ROOT / "kernels").glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def compiled(
    chosen: list[Entry], base: Device, partial: Partial, arguments: argparse.Namespace
) -> Iterator[tuple[Entry, list[Candidate]]]:
    """The entries with their candidates, once what becomes of these in compilation is known. Those of the next entry
    compile while the caller is busy with one."""
    tried: dict[str, list[Candidate]] = {}
    for entry in chosen:
        every = sweep.candidates(entry, base)
        tried[entry.name] = every[:1] + every[len(every) // 2 :][:2] if arguments.quick else every

    def begin(entry: Entry) -> Future[dict[str, str]] | None:
        new = [candidate for candidate in tried[entry.name] if candidate.name not in partial.known["compiled"]]
        keep = not arguments.dry_run
        return beside.submit(sweep.compiled, new, base.arch, arguments.workers, keep) if new else None

    with ThreadPoolExecutor(1) as beside:
        begun = begin(chosen[0]) if chosen else None
        for entry, following in zip(chosen, [*chosen[1:], None], strict=True):
            if begun:
                partial.enter("compiled", begun.result())
            begun = begin(following) if following else None
            yield entry, tried[entry.name]


def survivors(entry: Entry, tried: list[Candidate], base: Device, partial: Partial, dry: bool) -> list[Candidate]:
    """The candidates, whose compilation is known of, that compiled within limits and are right."""
    known = partial.known
    fit = [candidate for candidate in tried if not known["compiled"][candidate.name]]
    for candidate in tried:
        if why := known["compiled"][candidate.name]:
            print(f"  {list(candidate.numbers) or 'default'}: {why}", flush=True)
    unknown = [candidate for candidate in fit if candidate.name not in known["judged"]]
    apart = [candidate for candidate in unknown if sweep.in_gluon(candidate, base)]
    for name, why in trial.outcomes(entry, apart, base.arch):
        partial.enter("judged", {name: why})
    unknown = [candidate for candidate in unknown if candidate not in apart]
    if unknown:
        checker = Checker(problem_of(entry, dry))
        for candidate in unknown:
            partial.enter("judged", {candidate.name: judge(candidate, base, checker)})
        suite.free()
    for candidate in fit:
        if why := known["judged"][candidate.name]:
            print(f"  {list(candidate.numbers) or 'default'}: {why}", flush=True)
    return [candidate for candidate in fit if not known["judged"][candidate.name]]


def problem_of(entry: Entry, dry: bool) -> Problem:
    """The problem that an entry is decided by, or in a dry run its small twin."""
    op, case = sweep.case_of(entry)
    return Problem(op, entry.small if dry else case, DTYPES[entry.dtype], machine.here().torch_device)


def judge(candidate: Candidate, base: Device, checker: Checker) -> str:
    """What is wrong with a candidate's answers; "" if nothing is."""
    try:
        with plan_for(candidate.device(base)):
            checker.check(checker.problem.op.public)
    except Wrong as reason:
        return f"wrong: {reason}"
    except Exception as error:  # a tile that cannot be launched is no reason to stop
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ""


def decide(entry: Entry, right: list[Candidate], base: Device, partial: Partial) -> Candidate | None:
    """Time the candidates that are right; the one that beats the default by more than chance, if there is one."""
    decided = partial.known["decided"]
    if entry.name not in decided:
        with _watched(entry, [candidate for candidate in right if sweep.in_gluon(candidate, base)], partial):
            medians, verdict, best = _timed(entry, right, base)
        partial.enter("decided", {entry.name: {"ms": medians, "verdict": verdict, "best": list(best.numbers)}})
    best = Candidate(entry, tuple(decided[entry.name]["best"]))
    verdict = decided[entry.name]["verdict"]
    print(f"  best: {list(best.numbers) or 'default'}, {verdict}", flush=True)
    return best if best.numbers and verdict == "FASTER" else None


TIMING = 150.0
"""Seconds for timing one entry, several times what it takes. A kernel that hangs once in many launches is met here."""


@contextlib.contextmanager
def _watched(entry: Entry, in_gluon: list[Candidate], partial: Partial) -> Iterator[None]:
    """End the process where what is inside does not end, and have the next go on without what it must have been: the
    candidates written in Gluon, or where there is none, anything but the default."""

    def give_up() -> None:
        why = f"timing did not end within {TIMING:.0f} s"
        if in_gluon:
            partial.enter("judged", {candidate.name: why for candidate in in_gluon})
        else:
            partial.enter("decided", {entry.name: {"ms": {}, "verdict": why, "best": []}})
        print(f"  {why}; the same command goes on from here without what was timed", flush=True)
        os._exit(1)

    watch = threading.Timer(TIMING, give_up)
    watch.daemon = True
    watch.start()
    try:
        yield
    finally:
        watch.cancel()


def _timed(entry: Entry, right: list[Candidate], base: Device) -> tuple[dict[str, float], str, Candidate]:
    """(median milliseconds by candidate, the verdict on the best against the default, the best)."""
    problem = problem_of(entry, dry=False)
    copies = suite.copies_of(problem)
    timers: dict[str, timing.Timer] = {}
    by_name = {candidate.name: candidate for candidate in right}
    for name, candidate in by_name.items():
        device = candidate.device(base)
        with contextlib.suppress(Exception), plan_for(device):  # what cannot be timed is no candidate
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                functions = [suite.closure(entry.timed, copy, problem.op.public) for copy in copies]
            timers[name] = timing.cuda_timer([_planned(function, device) for function in functions], stream)
    samples, _ = timing.interleaved(timers, 12, seconds=8.0)
    medians = {name: stats.summarize(taken).median for name, taken in samples.items()}
    default = Candidate(entry)
    if not medians:
        return {}, "nothing could be timed", default
    best = by_name[min(medians, key=medians.get)]
    if not best.numbers:
        return medians, "SAME", best
    if default.name not in medians:
        return medians, "FASTER", best
    # chosen for being fastest, it was lucky too: what counts is a second measurement
    again, failed = timing.interleaved(
        {name: timers[name] for name in (default.name, best.name)}, 40, seed=1, seconds=8.0
    )
    if failed:
        return medians, "UNCLEAR", best
    return medians, stats.compare(again[default.name], again[best.name]).verdict, best


def _planned(function: Any, device: Device) -> Any:
    def planned():
        with plan_for(device):
            return function()

    return planned


def write_table(table: dict[str, dict[str, list[int]]], gpu: str, path: Path) -> None:
    """Write a table of tiles as kernels.tiles reads it."""
    document = {"schema": tiles.SCHEMA, "gpu": gpu, "versions": machine.versions(), "tiles": table}
    results.write(path, json.dumps(document, indent=1) + "\n")
