"""What every launch of every plan asks of a GPU: registers, spills, shared memory, instructions. No GPU needed.

Each op's plan is made for each target from meta tensors and compiled (see profiling/compile.py). Launches that come to
the same kernel are compiled once. Occupancy follows from registers, shared memory and warps; the roofline from each
op's own count of operations and bytes and from published peaks: an estimate, not a measurement.

    python -m profiling resources --op layer_norm --arch sm_90 --dtype bfloat16 --json resources.json
    python -m profiling resources --case gpt2 --dtype bfloat16 --tile attention.forward half/64 128 128 8 2 1 0 0 1
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from profiling import figures
from profiling.compile import Source, begin_worker, compile_source, source_of
from profiling.limits import occupancy, roofline
from profiling.outputs import check_folders

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PRODUCTS_BY_PYTORCH = ("linear_cross_entropy",)
"""Ops whose matrix products are PyTorch's: they are on tensor cores, though no kernel of ours is."""


@dataclasses.dataclass
class Use:
    """One compiled launch and the cases whose plans hold it. Bytes are a thread's for spills, a program's for shared.

    `loads` and `stores` count global memory instructions by their width in bits, `instructions` all of them by kind
    (see profiling/instructions.py), `occupancy` is what a processor holds at a time (see profiling/limits.py).
    `tensor_memory`: columns of sm_100's, a program's. `loops`: what those with wgmma do in turn, `loop_instructions`:
    how many they are. `code_bytes`: of the whole cubin.
    """

    op: str
    dtype: str
    arch: str
    kernel: str
    cases: list[str]
    tile: dict[str, Any]
    num_warps: int
    num_stages: int
    registers: int = 0
    spill_bytes: int = 0
    shared_memory: int = 0
    shared_memory_limit: int = 0
    tensor_memory: int = 0
    tensor_core: dict[str, int] = dataclasses.field(default_factory=dict)
    loads: dict[str, int] = dataclasses.field(default_factory=dict)
    stores: dict[str, int] = dataclasses.field(default_factory=dict)
    instructions: dict[str, int] = dataclasses.field(default_factory=dict)
    occupancy: dict[str, Any] = dataclasses.field(default_factory=dict)
    loops: list[str] = dataclasses.field(default_factory=list)
    loop_instructions: list[int] = dataclasses.field(default_factory=list)
    code_bytes: int = 0
    advisories: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    error: str = ""


# ---------------------------------------------------------------- the table


def uses(
    ops: Iterable[Any], archs: Sequence[str], dtypes: Sequence[str], *, cases: str = "sizes", only: Sequence[str] = (),
    trial: str = "", device: Any = None,
) -> dict[Source, Use]:  # fmt: skip
    """The distinct kernels in the ops' plans, not compiled yet. `cases` is the field of Op to take: sizes or cases.

    `trial` is the name under which kernels.tiles.try_out has tiles to take instead of the defaults. With `device`
    plans are made for that, not for a GPU of `archs` in general.
    """
    from kernels.device import TARGETS

    found: dict[Source, Use] = {}
    for op in ops:
        for case in getattr(op, cases):
            if only and case.name not in only:
                continue
            for dtype in dtypes:
                inputs = op.inputs(case, DTYPES[dtype], "meta")
                for arch in archs:
                    planned_for = device or dataclasses.replace(TARGETS[arch], name=trial)
                    for launch in op.plan(inputs, case.options, planned_for):
                        source = source_of(launch, arch)
                        use = found.setdefault(
                            source,
                            Use(
                                op=op.name,
                                dtype=dtype,
                                arch=arch,
                                kernel=launch.name,
                                cases=[],
                                tile={name: _plain(value) for name, value in launch.constexprs.items()},
                                num_warps=launch.num_warps,
                                num_stages=launch.num_stages,
                                shared_memory_limit=planned_for.shared_memory,
                            ),
                        )
                        # a kernel that another op launches too is one row: the first op's
                        label = case.name if use.op == op.name else f"{op.name}/{case.name}"
                        if label not in use.cases:
                            use.cases.append(label)
    return found


def _plain(value):
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def measure(found: dict[Source, Use], workers: int | None = None, keep: bool = False) -> list[Use]:
    """Compile every Source over the machine's cores, and fill in its Use; with `keep`, for launches too.

    One worker alone is this process, whose compiler then stays set up to measure.
    """
    workers = min(len(found), workers or os.cpu_count() or 1)
    if workers == 0:
        return []
    with contextlib.ExitStack() as stack:
        if workers == 1:
            begin_worker()
            every = map
        else:
            # not forked from here: torch has threads by now
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["profiling.compile", "kernels.catalogue", "triton.compiler"])
            pool = concurrent.futures.ProcessPoolExecutor(workers, mp_context=context, initializer=begin_worker)
            every = stack.enter_context(pool).map
        compiling = every(functools.partial(compile_source, keep=keep), found)
        for use, measured in zip(found.values(), compiling, strict=True):
            for name, value in measured.items():
                setattr(use, name, value)
            if not use.error:
                use.occupancy = occupancy(use.arch, use.registers, use.shared_memory, use.num_warps, use.tensor_memory)
    return list(found.values())


def rooflines(ops: Iterable[Any], table: Sequence[Use], cases: str = "sizes") -> list[dict[str, Any]]:
    """The least time of every op's forward and backward pass in `table`, by published peaks. An estimate."""
    known = {(op.name, case.name): (op, case) for op in ops for case in getattr(op, cases)}
    asked = dict.fromkeys(
        (*([use.op, label] if "/" not in label else label.split("/")), use.dtype, use.arch)
        for use in table
        for label in use.cases
    )
    on_tensor_cores = {
        (label.split("/")[0] if "/" in label else use.op, use.dtype, use.arch)
        for use in table
        if use.tensor_core
        for label in use.cases
    }
    found = []
    for name, case_name, dtype, arch in asked:
        op, case = known[name, case_name]
        costs = op.cost(op.inputs(case, DTYPES[dtype], "meta"), case.options)
        by_pytorch = name in PRODUCTS_BY_PYTORCH and dtype != "float32"
        for direction, cost in zip(("forward", "backward"), costs, strict=True):
            if cost is None:
                continue
            bound = roofline(arch, dtype, cost.flops, cost.bytes, by_pytorch or (name, dtype, arch) in on_tensor_cores)
            found.append({"op": name, "case": case_name, "pass": direction, "dtype": dtype, "arch": arch} | bound)
    return found


def versions() -> dict[str, str]:
    import triton

    return {"torch": torch.__version__, "triton": triton.__version__}


# ---------------------------------------------------------------- command


def add_to(commands) -> None:
    """Add `resources` to a command line."""
    parser = commands.add_parser("resources", help=__doc__.split("\n")[0], description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--op", nargs="+", action="extend", default=[], help="ops of the catalogue (default: all)")
    parser.add_argument("--arch", nargs="+", action="extend", help="targets, or `all` (default: sm_90)")
    parser.add_argument("--dtype", nargs="+", action="extend", choices=list(DTYPES), help="default: all")
    parser.add_argument("--cases", choices=["sizes", "cases"], default="sizes", help="real sizes, or the tests' cases")
    parser.add_argument("--case", nargs="+", action="extend", default=[], help="only the cases of these names")
    add_tile_to(parser)
    parser.add_argument(
        "--here", action="store_true",
        help="for this machine's GPU, with its tiles, and into Triton's cache: launches find the kernels compiled",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="write the table here as JSON, `-` for stdout instead of the table")
    parser.add_argument("--workers", type=int, help="compile in this many processes (default: the number of cores)")
    parser.add_argument("--store", action="store_true", help="keep the figures, in place of those in profiling/figures")
    parser.set_defaults(run=run)


def add_tile_to(parser: argparse.ArgumentParser) -> None:
    """The option that `trial_of` reads."""
    parser.add_argument(
        "--tile", nargs="+", action="append", default=[], metavar=("SLOT KEY", "NUMBER"),
        help="take these numbers, as a table of tuned tiles has them: attention.forward half/64 128 128 8 2 1 0 0 1",
    )  # fmt: skip


def trial_of(chosen: list[list[str]], problems: Iterable[tuple], dtypes: Sequence[str], archs: Sequence[str]) -> str:
    """A name under which plans take the tiles of --tile; "" for none.

    Raises UserError for what is no tile, and for a tile that no plan of these problems, (op, case), takes.
    """
    from kernels import tiles
    from minigpt.errors import UserError

    table: dict[str, dict[str, list[int]]] = {}
    for slot, *rest in chosen:
        if len(rest) < 2 or not all(number.isdecimal() for number in rest[1:]):
            raise UserError(f"--tile {' '.join((slot, *rest))}: give a slot, a key and whole numbers")
        table.setdefault(slot, {})[rest[0]] = [int(number) for number in rest[1:]]
    try:
        tiles.try_out(f"--tile {table}", table)
    except ValueError as error:
        raise UserError(str(error)) from None
    for slot, key in ((slot, key) for slot, entries in table.items() for key in entries):
        alone = {slot: {key: table[slot][key]}}
        name = f"--tile {alone}"  # one of its own: plans are remembered by name
        tiles.try_out(name, alone)
        if not any(_changes(problem, dtype, arch, name) for problem in problems for dtype in dtypes for arch in archs):
            raise UserError(
                f"--tile {slot} {key}: nothing that was chosen takes it. A key of attention is half, ieee or tf32, "
                "with -dropout or -grouped if so, and 64, 128 or 256 for heads up to that; of the others a power of "
                "2, or for a norm's backward three quarters of one"
            )
    return f"--tile {table}" if table else ""


def _changes(problem: tuple, dtype: str, arch: str, name: str) -> bool:
    """Whether a plan is another one with the tile that is tried out under `name`."""
    from kernels.device import TARGETS

    op, case = problem
    inputs = op.inputs(case, DTYPES[dtype], "meta")
    with_tile, without = (
        op.plan(inputs, case.options, dataclasses.replace(TARGETS[arch], name=gpu)) for gpu in (name, "")
    )
    return with_tile != without


def _gpu_here(arguments: argparse.Namespace):
    """The GPU that --here means. Raises UserError where there is none, or with options that contradict it."""
    from kernels.device import facts
    from minigpt.errors import UserError

    if arguments.arch or arguments.tile or arguments.store:
        raise UserError("--here has its architecture and its tiles: leave out --arch, --tile and --store")
    if not torch.cuda.is_available():
        raise UserError("--here is for a machine with a GPU; without one, name an architecture: --arch sm_90")
    return facts(torch.device("cuda", torch.cuda.current_device()))


def run(arguments: argparse.Namespace) -> int:
    """The command. Returns 1 if a kernel does not compile, asks for more shared memory than there is, or has become
    worse than its stored figures.

    Raises UserError for what a person can put right.
    """
    if os.environ.get("TRITON_INTERPRET") != "0":
        # with the interpreter chosen, @triton.jit functions cannot be compiled: start over without it
        os.environ["TRITON_INTERPRET"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "profiling", *sys.argv[1:]])
    from kernels import catalogue
    from kernels.device import HAS_TRITON, TARGETS
    from minigpt.errors import UserError, writing

    if not HAS_TRITON:
        raise UserError("compiling kernels needs Triton, which is not installed: pip install triton")
    ops = {op.name: op for op in catalogue.OPS}
    here = _gpu_here(arguments) if arguments.here else None
    archs = list(TARGETS) if arguments.arch == ["all"] else arguments.arch or [here.arch if here else "sm_90"]
    chosen = [ops[name] for name in arguments.op if name in ops] or list(ops.values())
    cases = dict.fromkeys(case.name for op in chosen for case in getattr(op, arguments.cases))
    targets = [here.arch] if here else TARGETS
    for what, asked, there in (("op", arguments.op, ops), ("arch", archs, targets), ("case", arguments.case, cases)):
        unknown = [name for name in asked if name not in there]
        if unknown:
            raise UserError(f"unknown {what} {', '.join(unknown)}: choose from {', '.join(there)}")
    if arguments.workers is not None and arguments.workers < 1:
        raise UserError(f"--workers must be at least 1, not {arguments.workers}")
    to_file = arguments.json not in (None, Path("-"))
    check_folders(arguments.json)
    if arguments.store and (arguments.case or arguments.tile or arguments.cases != "sizes"):
        raise UserError("--store keeps whole ops with their defaults: leave out --case, --cases and --tile")
    dtypes = arguments.dtype or list(DTYPES)
    problems = [(op, case) for op in chosen for case in getattr(op, arguments.cases)]
    problems = [one for one in problems if not arguments.case or one[1].name in arguments.case]
    trial = trial_of(arguments.tile, problems, dtypes, archs)
    found = uses(chosen, archs, dtypes, cases=arguments.cases, only=arguments.case, trial=trial, device=here)
    table = measure(found, arguments.workers, keep=arguments.here)
    document = {"versions": versions(), "kernels": [dataclasses.asdict(use) for use in table]}
    document["rooflines"] = rooflines(chosen, table, arguments.cases)
    if arguments.store:
        figures.store(table, document["versions"]["triton"])
    stored = arguments.cases == "sizes" and not trial and not here
    worse = figures.moved(table, document["versions"]["triton"]) if stored else []
    document["moved"] = worse
    if arguments.json == Path("-"):
        json.dump(document, sys.stdout, indent=1)
        print()
    else:
        from profiling.resource_table import print_rooflines, print_table

        print_table(table, versions())
        print_rooflines(document["rooflines"])
        for line in worse:
            print(line)
        if to_file:
            with writing(arguments.json):
                arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    return int(bool(worse) or any(use.error or use.shared_memory > use.shared_memory_limit for use in table))
