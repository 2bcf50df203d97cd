"""Candidates of a sweep judged in a process of their own: a kernel that never ends, or costs its process the GPU, is
that candidate's fault alone.

`python -m benchmarks.trial ENTRY NUMBERS ARCH` judges the candidates of these numbers, given as JSON, a line each.
"""

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator

from benchmarks import machine
from benchmarks.sweep import Candidate, Entry

READY = "ready"
BEGINNING = 120.0  # seconds for a child's imports, its problem and the truth
MOST_ENDLESS = 2


def outcomes(entry: Entry, candidates: list[Candidate], arch: str, seconds: float = 15.0) -> Iterator[tuple[str, str]]:
    """(name, what is wrong or "") of each candidate. One that takes longer than `seconds` is stopped and its process
    with it, and another one goes on with the next; after MOST_ENDLESS of them the rest is not tried."""
    left, endless = list(candidates), 0
    while left:
        for name, why in _one_process(entry, left, arch, seconds):
            yield name, why
            left, endless = left[1:], endless + why.startswith(_ENDLESS)
        if endless == MOST_ENDLESS:
            yield from ((candidate.name, f"not tried: {endless} of its kind did not end") for candidate in left)
            return


_ENDLESS = "did not end"


def _command(entry: Entry, candidates: list[Candidate], arch: str) -> list[str]:
    numbers = json.dumps([candidate.numbers for candidate in candidates])
    return [sys.executable, "-m", "benchmarks.trial", entry.name, numbers, arch]


def _one_process(
    entry: Entry, candidates: list[Candidate], arch: str, seconds: float
) -> Iterator[tuple[str, str]]:  # fmt: skip
    environment = os.environ | {"PYTHONPATH": machine.import_path()}
    command = _command(entry, candidates, arch)
    child = subprocess.Popen(command, cwd=machine.ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in child.stdout:
            lines.put(line.strip())
        lines.put("")

    threading.Thread(target=read, daemon=True).start()
    try:
        ready = False
        for candidate in candidates:
            try:
                while (line := lines.get(timeout=seconds if ready else BEGINNING)) == READY:
                    ready = True
            except queue.Empty:
                yield candidate.name, f"{_ENDLESS} within {seconds if ready else BEGINNING:.0f} s"
                return
            if not line:
                yield candidate.name, f"its process ended with status {child.wait()}"
                return
            yield candidate.name, (why := json.loads(line))
            if _costs_the_gpu(why):
                return
    finally:
        child.kill()
        child.wait()


def _costs_the_gpu(why: str) -> bool:
    """Whether everything else would fail in the process that said so, and not by its own fault."""
    return "CUDA" in why


def _main(name: str, numbers: str, arch: str) -> None:
    from benchmarks import sweep, tune
    from benchmarks.problems import Checker
    from kernels.device import facts, target

    entry = next(entry for entry in sweep.entries() if entry.name == name)
    here = machine.here()
    base = facts(here.torch_device) if here.type == "cuda" else target(arch)
    checker = Checker(tune.problem_of(entry, dry=here.type != "cuda"))
    print(READY, flush=True)
    for one in json.loads(numbers):
        why = tune.judge(Candidate(entry, tuple(one)), base, checker)
        print(json.dumps(why), flush=True)
        if _costs_the_gpu(why):
            os._exit(1)


if __name__ == "__main__":
    _main(*sys.argv[1:])
