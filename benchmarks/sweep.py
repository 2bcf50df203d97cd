"""What a sweep of tiles tries: the entries of the table, the candidates for each, and their ahead-of-time compilation.

`python -m benchmarks.sweep ARCH IN OUT WORKERS KEEP` compiles the candidates that IN names, in processes over all
cores, in an interpreter of Python where Triton's is off; OUT gets what became of each.
"""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import machine
from benchmarks.problems import DTYPES
from kernels import tiles
from kernels.device import TARGETS, Device, target
from kernels.op import Case, Op, next_power_of_2


@dataclass(frozen=True)
class Entry:
    """One entry of a table of tiles, and the problem that decides it: an op's case in a dtype, and the pass to time."""

    slot: str
    key: str
    op: str
    case: str
    dtype: str
    timed: str
    small: Case  # the same kernels on a problem that the interpreter can finish

    @property
    def name(self) -> str:
        return f"{self.slot} {self.key}"


@dataclass(frozen=True)
class Candidate:
    """Numbers to try for an entry; none of them for the default that stands beside the op."""

    entry: Entry
    numbers: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.entry.name} {list(self.numbers)}" if self.numbers else f"{self.entry.name} default"

    def device(self, base: Device) -> Device:
        """`base` under a name for which plans take these numbers."""
        if not self.numbers:
            return dataclasses.replace(base, name="")
        tiles.try_out(self.name, {self.entry.slot: {self.entry.key: self.numbers}})
        return dataclasses.replace(base, name=self.name)


# ---------------------------------------------------------------- entries and candidates


def _attention_case(size: int, **options) -> Case:
    kv_heads = 1 if options.get("enable_gqa") else 2
    shapes = {"query": (1, 2, 130, size), "key": (1, kv_heads, 130, size), "value": (1, kv_heads, 130, size)}
    return Case("tune", shapes, {"is_causal": True} | options)


def _attention() -> Iterator[Entry]:
    kinds = [("half", "bfloat16", size, case, {}) for size, case in ((64, "gpt2"), (128, "d128"), (256, "d256"))]
    kinds += [("half-dropout", "bfloat16", 64, "shakespeare-dropout", {"dropout_p": 0.2})]
    kinds += [("half-dropout", "bfloat16", 128, "d128-dropout", {"dropout_p": 0.1})]
    kinds += [("ieee", "float32", 64, "shakespeare", {})]
    for kind, dtype, size, case, options in kinds:
        for which in ("forward", "backward_query", "backward_key"):
            timed = "forward" if which == "forward" else "backward"
            small = _attention_case(size, **options)
            yield Entry(
                f"attention.{which}", f"{kind}/{size}", "scaled_dot_product_attention", case, dtype, timed, small
            )
    small = _attention_case(128, enable_gqa=True)
    yield Entry(
        "attention.backward_key", "half-grouped/128", "scaled_dot_product_attention", "d128-grouped", "bfloat16",
        "backward", small,
    )  # fmt: skip


def _norms() -> Iterator[Entry]:
    for n in (768, 384, 1024, 4096, 8192):
        small = Case("tune", {"input": (9, n), "weight": (n,), "bias": (n,)}, {"normalized_shape": (n,)})
        problem = ("layer_norm", str(n), "bfloat16")
        if n != 1024:  # forward, 768 decides for it too
            yield Entry("layer_norm.forward", str(next_power_of_2(n)), *problem, "forward", small)
        yield Entry("layer_norm.backward", str(n), *problem, "backward", small)


def _losses() -> Iterator[Entry]:
    for v, block in ((65, 128), (50304, 65536), (131072, 131072)):
        for which in ("forward", "backward"):
            small = Case("tune", {"input": (9, v), "target": (9,)})
            # in bf16 forward of long rows makes the gradient, in fp16 backward does, with the kernel that this tunes
            timed, dtype = ("forward+backward", "bfloat16") if which == "forward" else ("backward", "float16")
            yield Entry(f"cross_entropy.{which}", str(block), "cross_entropy", f"v{v}", dtype, timed, small)


LATER = {"half/256", "half-dropout/128", "ieee/64", "half-grouped/128", "4096", "8192", "131072"}
"""Keys of entries that no preset up to gpt2 trains with: minutes on a GPU may end before they have their turn."""


def entries() -> list[Entry]:
    """Every entry that is swept, the most important first."""
    return sorted([*_attention(), *_norms(), *_losses()], key=lambda entry: entry.key in LATER)


def _with_descriptors(slot: str, key: str) -> Iterator[tuple[int, ...]]:
    """Attention's tiles with descriptors, in forward without and with overlap; overlap is tried with descriptors alone.

    Read off what they compile to (docs/kernels/attention.md): a warp owns 16 rows, as a wgmma of four warps has 64.
    With more of them nearly everything spills; by pointers, overlap costs registers and mostly overlaps nothing.
    """
    widest = key.endswith("/256")
    widths = (32, 64) if widest else (64, 128) if slot == "attention.forward" else (32, 64, 128)
    for warps, width, stages in itertools.product((4, 8), widths, (1, 2) if widest else (2, 3)):
        rows = 16 * warps
        block_q, block_k = (width, rows) if slot == "attention.backward_key" else (rows, width)
        if slot == "attention.forward":
            yield block_q, block_k, warps, stages, 1, 0, 0, 0
            yield block_q, block_k, warps, stages, 1, 0, 0, 1
        else:
            yield block_q, block_k, warps, stages, 1, 0, 0


HOPPER = {  # (BLOCK_Q, BLOCK_K, num_stages, WARPGROUPS) of what hardly spills, by slot and head size
    "attention.forward": {
        "64": ((64, 128, 2, 2), (64, 64, 3, 2), (64, 64, 3, 3)),
        "128": ((64, 128, 2, 2), (64, 64, 3, 2), (64, 64, 2, 3)),
        "256": ((64, 64, 2, 2),),
    },
    "attention.backward_query": {"64": ((64, 64, 2, 2), (64, 64, 3, 2)), "128": ((64, 64, 2, 2), (64, 32, 3, 2))},
    "attention.backward_key": {
        "64": ((64, 64, 2, 2), (64, 64, 3, 2)),
        "128": ((32, 64, 3, 2), (64, 64, 2, 2), (32, 64, 2, 2)),
    },
}


def _for_hopper(slot: str, key: str) -> Iterator[tuple[int, ...]]:
    """By warps that copy and warpgroups that compute, with turns between those, and once without."""
    kind, size = key.split("/")
    blocks = HOPPER[slot].get(size, ()) if "dropout" not in kind else ()
    for place, (block_q, block_k, stages, warpgroups) in enumerate(blocks):
        for turns in (1, 0) if place == 0 else (1,):
            yield block_q, block_k, 4, stages, 1, warpgroups, turns, *((1,) if slot == "attention.forward" else ())


def candidates(entry: Entry, device: Device) -> list[Candidate]:
    """The default, and everything else worth compiling for an entry on a device."""
    if entry.slot.startswith("attention"):
        half = entry.key.startswith("half")
        blocks = (32, 64, 128) if half else (16, 32, 64)
        grid = itertools.product(blocks, blocks, (4, 8), (2, 3) if half else (1, 2))
        off = (0,) * (len(tiles.SLOTS[entry.slot]) - 4)
        found = [numbers + off for numbers in grid if numbers[0] * numbers[1] >= (2048 if half else 512)]
        if half and TARGETS[device.tiles].descriptors:
            found += _with_descriptors(entry.slot, entry.key)
        if entry.slot == "attention.backward_key":
            found = [numbers for numbers in found if numbers[0] <= numbers[1]]
        if half and TARGETS[device.tiles].warpgroups:
            found += _for_hopper(entry.slot, entry.key)
    elif entry.slot.startswith("layer_norm"):
        block = int(entry.key)
        grid = itertools.product((1, 2, 4, 8, 16), (1, 2, 4, 8, 16))
        found = [(rows, warps) for rows, warps in grid if 256 * warps <= rows * block <= 2048 * warps]
    else:
        block = min(int(entry.key), 16384)
        grid = itertools.product({block, block // 2, block // 4, block // 8}, (1, 2, 4, 8, 16), (4, 8, 16, 32))
        found = [n for n in sorted(grid) if n[0] >= 128 and 128 * n[2] <= n[0] * n[1] <= 2048 * n[2]]
    return [Candidate(entry), *(Candidate(entry, numbers) for numbers in found)]


def in_gluon(candidate: Candidate, device: Device) -> bool:
    """Whether a launch of the candidate's is of a kernel written in Gluon: no interpreter has ever run it."""
    op, case = case_of(candidate.entry)
    inputs = op.inputs(case, DTYPES[candidate.entry.dtype], "meta")
    return any(launch.gluon for launch in op.plan(inputs, case.options, candidate.device(device)))


# ---------------------------------------------------------------- compiling


def compiled(chosen: list[Candidate], arch: str, workers: int, keep: bool = False) -> dict[str, str]:
    """By candidate's name: "" if it compiles, does not spill, fits into shared memory and leaves the tensor cores to
    work while other things run, else what is wrong with it.

    The default is held to nothing but compiling. Runs in a process of its own: the interpreter, once chosen, stays.
    With `keep` the kernels are in Triton's cache afterwards, so that judging and timing need not compile them again.
    """
    with tempfile.TemporaryDirectory() as folder:
        wanted, found = Path(folder) / "in.json", Path(folder) / "out.json"
        wanted.write_text(json.dumps([[c.entry.name, list(c.numbers)] for c in chosen]))
        environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": machine.import_path()}
        command = [sys.executable, "-m", "benchmarks.sweep", arch, str(wanted), str(found), str(workers), str(keep)]
        process = subprocess.Popen(
            command, cwd=machine.ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        try:
            _, said = process.communicate(timeout=COMPILING)
        except subprocess.TimeoutExpired:
            return {candidate.name: f"not compiled within {COMPILING:.0f} s" for candidate in chosen}
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its workers too
                process.communicate()
        if process.returncode:
            raise RuntimeError(f"compilation ended with status {process.returncode}: {said[-2000:]}")
        return json.loads(found.read_text())


COMPILING = 240.0
"""Seconds for one entry's candidates: a compiler that does not end must not hold up the other entries."""


_ASIDE = 128
"""Bytes that the kernels for Hopper may spill: numbers kept for after a loop, or for the tiles that the diagonal cuts
(docs/kernels/attention.md)."""


def _compile_all(chosen: list[Candidate], arch: str, workers: int, keep: bool) -> dict[str, str]:
    from profiling import resources
    from profiling.compile import SERIALISED

    found: dict = {}
    parts: dict[str, list] = {}
    for candidate in chosen:
        op, case = case_of(candidate.entry)
        inputs = op.inputs(case, DTYPES[candidate.entry.dtype], "meta")
        ordinary = {resources.source_of(x, arch) for x in op.plan(inputs, case.options, target(arch))}
        launches = op.plan(inputs, case.options, candidate.device(target(arch)))
        sources = {resources.source_of(launch, arch): launch for launch in launches}
        own = [source for source in sources if source not in ordinary or not candidate.numbers]
        parts[candidate.name] = own
        for source in own:
            launch = sources[source]
            found.setdefault(source, resources.Use(
                op=op.name, dtype=candidate.entry.dtype, arch=arch, kernel=launch.name, cases=[case.name], tile={},
                num_warps=launch.num_warps, num_stages=launch.num_stages,
                shared_memory_limit=target(arch).shared_memory,
            ))  # fmt: skip
    resources.measure(found, workers, keep)
    outcome = {}
    for candidate in chosen:
        uses = [found[source] for source in parts[candidate.name]]
        wrong = [use.error for use in uses if use.error]
        if candidate.numbers:
            wrong += [
                f"spills {use.spill_bytes} B" for use in uses if use.spill_bytes > _ASIDE * ("hopper" in use.kernel)
            ]
            limits = [(use.shared_memory, use.shared_memory_limit) for use in uses]
            wrong += [f"{used} B of shared memory, there are {there}" for used, there in limits if used > there]
            waits = [code for use in uses for code in use.advisories if code in SERIALISED]
            wrong += [f"a wait after every product on the tensor cores ({code})" for code in dict.fromkeys(waits)]
        outcome[candidate.name] = "; ".join(wrong)
    return outcome


def case_of(entry: Entry) -> tuple[Op, Case]:
    """The op and the real case that decide an entry."""
    from kernels import catalogue

    op = next(op for op in catalogue.OPS if op.name == entry.op)
    return op, next(case for case in op.sizes if case.name == entry.case)


def _main(arch: str, wanted: str, found: str, workers: str, keep: str) -> None:
    known = {entry.name: entry for entry in entries()}
    chosen = [Candidate(known[name], tuple(numbers)) for name, numbers in json.loads(Path(wanted).read_text())]
    Path(found).write_text(json.dumps(_compile_all(chosen, arch, int(workers), keep == "True")))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if hasattr(os, "nice"):
        os.nice(10)  # the entry before is being timed
    _main(*sys.argv[1:])
