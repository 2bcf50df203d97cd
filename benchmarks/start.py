"""`python -m benchmarks start`: seconds from nothing to the first trained step, with nothing compiled beforehand.

Every sample is a process of its own with empty caches for Triton and torch.compile: its imports, the model, the first
step, and the second for comparison. Without a GPU the kernels of that step are compiled for --arch, side by
side as the first step does, and nothing is run: that is the part of a cold start that needs no GPU.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import machine, report, results
from minigpt.errors import UserError

PARTS = ("imports", "model", "first_step", "second_step")
"""What a process tells the milliseconds of; the first three are the cold start."""
COMPILED = "triton, compilation alone"


def add_to(commands: Any) -> None:
    """Add `start` to a command line."""
    parser = commands.add_parser("start", help="the first step, with empty caches", description=__doc__)
    parser.add_argument("--preset", default="shakespeare", help="of minigpt (default: shakespeare)")
    parser.add_argument("--rung", nargs="+", help="configurations (default: torch triton torch+compile)")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each configuration (default: 3)")
    parser.add_argument("--arch", default="sm_90", help="what is compiled for where there is no GPU (default: sm_90)")
    parser.add_argument("--out", type=Path, help="folder for the results (default: benchmarks/results)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """The command. Returns 1 if a process failed."""
    from benchmarks import ladder
    from kernels.device import TARGETS
    from minigpt import config

    if arguments.rounds < 1:
        raise UserError(f"--rounds must be at least 1, not {arguments.rounds}")
    if arguments.arch not in TARGETS:
        raise UserError(f"unknown architecture {arguments.arch!r}: choose one of {', '.join(TARGETS)}")
    config.preset(arguments.preset)
    rungs = ladder.chosen(arguments.rung or ["torch", "triton", "torch+compile"])
    here = machine.here()
    document = results.new("start", {"name": "start", "preset": arguments.preset})
    path = results.path_of(document, arguments.out)
    results.prepare(path)
    print(f"{here.name}: {arguments.preset}, {arguments.rounds} processes each; results go to {path}", flush=True)
    for rung in rungs:
        if here.type == "cuda":
            document["rows"].append(measure(arguments.preset, rung.name, [rung.name], arguments.rounds))
        elif rung.has_triton:
            document["rows"].append(
                measure(arguments.preset, COMPILED, [rung.kernels, "--ahead", arguments.arch], arguments.rounds)
                | {"arch": arguments.arch}
            )
        else:
            document["rows"].append({
                "preset": arguments.preset, "configuration": rung.name, "status": "skipped",
                "reason": "the first step of a GPU needs one",
            })  # fmt: skip
        row = document["rows"][-1]
        said = f"{row['median_ms'] / 1e3:.1f} s" if row["status"] == "ok" else row["reason"]
        print(f"{row['configuration']}: {said}", flush=True)
        results.save(document, path)
    report.publish(document, path)
    return int(any(row["status"] == "error" for row in document["rows"]))


def measure(preset: str, name: str, words: list[str], rounds: int) -> dict[str, Any]:
    """The row of one configuration; its samples are whole cold starts, its parts those of the middle one."""
    row: dict[str, Any] = {"preset": preset, "configuration": name}
    told = []
    for _ in range(rounds):
        try:
            told.append(_process([preset, *words]))
        except (RuntimeError, OSError, subprocess.TimeoutExpired, ValueError) as error:
            return row | {"status": "error", "reason": f"{type(error).__name__}: {error}"[:300]}
    row |= results.timed([sum(found[part] for part in PARTS[:3]) for found in told])
    middle = sorted(told, key=lambda found: sum(found[part] for part in PARTS[:3]))[len(told) // 2]
    return row | {f"{part}_ms": round(middle[part], 1) for part in PARTS} | {"kernels": middle["kernels"]}


def _process(words: list[str]) -> dict[str, Any]:
    """What one process with empty caches tells. Raises RuntimeError where it fails."""
    with tempfile.TemporaryDirectory() as empty:
        caches = {"TRITON_CACHE_DIR": f"{empty}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{empty}/inductor"}
        if "--ahead" in words:
            caches["TRITON_INTERPRET"] = "0"
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.first_step", str(time.time()), *words],
            cwd=machine.ROOT, env=os.environ | caches | {"PYTHONPATH": machine.import_path()}, capture_output=True,
            text=True, timeout=600,
        )  # fmt: skip
    if done.returncode or not done.stdout.strip():
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        raise RuntimeError(f"status {done.returncode}: {said}")
    return json.loads(done.stdout.splitlines()[-1])
