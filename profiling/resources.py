"""What every launch of every plan asks of a GPU: registers, spills, shared memory, instructions. No GPU needed.

Each op's plan is made for each target from meta tensors, specialized with the code that Triton's own
launcher specializes with (an int 1 becomes a constant, what divides by 16 says so, ...), and compiled.
Launches that come to the same kernel are compiled once. Registers, spills and ptxas's advisories are
read from ptxas's log, load and store widths from the machine code.

    python -m profiling resources --op layer_norm --arch sm_90 --dtype bfloat16 --json resources.json
"""

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import importlib
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TENSOR_CORE = ("mma.sync", "wgmma.mma_async", "tcgen05.mma", "v_mfma")


@dataclasses.dataclass(frozen=True)
class Source:
    """A kernel as Triton's launcher would compile it. Holds names, not functions: it travels to other processes."""

    arch: str
    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[tuple[int, ...], Any], ...]
    attributes: tuple[tuple[tuple[int, ...], tuple], ...]
    num_warps: int
    num_stages: int


@dataclasses.dataclass
class Use:
    """One compiled launch and the cases whose plans hold it. Bytes are a thread's for spills, a program's for shared.

    `loads` and `stores` count global memory instructions by their width in bits.
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
    tensor_core: dict[str, int] = dataclasses.field(default_factory=dict)
    loads: dict[str, int] = dataclasses.field(default_factory=dict)
    stores: dict[str, int] = dataclasses.field(default_factory=dict)
    advisories: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    error: str = ""


# ---------------------------------------------------------------- from a Launch to a Source


class _Pointer:
    """Stands for a tensor in Triton's specialization."""

    def __init__(self, spec):
        self.dtype = spec.dtype
        self._address = 0 if spec.aligned else spec.dtype.itemsize
        places = 1 + sum((size - 1) * stride for size, stride in zip(spec.shape, spec.stride, strict=True))
        self._bytes = places * spec.dtype.itemsize

    def data_ptr(self) -> int:
        return self._address

    def ptr_range(self) -> int:
        return self._bytes


def _target(arch: str):
    from triton.backends.compiler import GPUTarget

    if arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


def _hashable(value):
    return tuple(_hashable(item) for item in value) if isinstance(value, list | tuple) else value


def source_of(launch, arch: str) -> Source:
    """`launch` specialized for `arch` by Triton's own code."""
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from kernels.op import Spec

    backend = make_backend(_target(arch))
    kernel = launch.kernel
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "debug": False}
    arguments = [_Pointer(value) if isinstance(value, Spec) else value for value in launch.arguments.values()]
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, rest = binder(*arguments, **launch.constexprs, **options)
    _, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, rest)
    return Source(
        arch=arch,
        module=kernel.fn.__module__,
        kernel=kernel.fn.__name__,
        signature=tuple(signature.items()),
        constants=tuple(constants.items()),
        attributes=tuple((place, _hashable(attribute)) for place, attribute in attributes.items() if attribute),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )


# ---------------------------------------------------------------- compiling (in worker processes)


def _begin_worker() -> None:
    import triton

    # a cached kernel has no ptxas log, and the log is what is wanted
    triton.knobs.compilation.always_compile = True
    triton.knobs.nvidia.dump_ptxas_log = True


def _widths(disassembly: str, instruction: str) -> dict[str, int]:
    """How many global accesses in SASS there are of each width in bits, those of the TMA unit left out."""
    widths = collections.Counter()
    for name in re.findall(rf"\b{instruction}((?:\.\w+)*)(?=\s)", disassembly):
        parts = name.split(".")
        wide = [part for part in parts if part in ("64", "128", "256")]
        narrow = [part[1:] for part in parts if part in ("U8", "S8", "U16", "S16")]
        widths[(wide + narrow + ["32"])[0]] += 1
    return dict(widths)


def _amd_widths(assembly: str, verb: str) -> dict[str, int]:
    bits = {"dwordx4": "128", "dwordx3": "96", "dwordx2": "64", "dword": "32", "short": "16", "ushort": "16"}
    bits |= {"sshort": "16", "byte": "8", "ubyte": "8", "sbyte": "8"}
    names = re.findall(rf"\b(?:global|buffer|flat)_{verb}_([a-z0-9]+)", assembly)
    return dict(collections.Counter(bits.get(name, name) for name in names))


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found.group(1)) if found else 0


def compile_source(source: Source) -> dict[str, Any]:
    """Compile, and return the measured fields of a Use."""
    from triton.compiler import ASTSource
    from triton.compiler import compile as triton_compile

    kernel = getattr(importlib.import_module(source.module), source.kernel)
    attributes = {place: [list(pair) for pair in pairs] for place, pairs in source.attributes}
    ast = ASTSource(kernel, dict(source.signature), dict(source.constants), attributes)
    options = {"num_warps": source.num_warps, "num_stages": source.num_stages}
    log = io.StringIO()
    began = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(log):
            os.environ["TRITON_CACHE_DIR"] = folder
            compiled = triton_compile(ast, target=_target(source.arch), options=options)
    except Exception as error:  # whatever a compiler raises is this row's result
        return {"error": f"{type(error).__name__}: {error}".strip().split("\n")[0]}
    seconds = time.perf_counter() - began
    text = compiled.asm["amdgcn" if "amdgcn" in compiled.asm else "ptx"]
    common = {
        "shared_memory": compiled.metadata.shared,
        "tensor_core": {name: text.count(name) for name in TENSOR_CORE if name in text},
        "seconds": round(seconds, 2),
    }
    if "amdgcn" in compiled.asm:
        return common | {
            "registers": _number(r"\.vgpr_count:\s*(\d+)", text),
            "spill_bytes": 4 * _number(r"\.vgpr_spill_count:\s*(\d+)", text),
            "loads": _amd_widths(text, "load"),
            "stores": _amd_widths(text, "store"),
        }
    log = log.getvalue()
    if "bytes spill stores" not in log:
        raise RuntimeError(f"no ptxas log came with {source.kernel} for {source.arch}")
    disassembly = _disassemble(compiled.asm["cubin"])
    return common | {
        "registers": _number(r"Used (\d+) registers", log),
        "spill_bytes": _number(r"(\d+) bytes spill stores", log),
        "loads": _widths(disassembly, r"(?:LDG|LDGSTS)"),
        "stores": _widths(disassembly, "STG"),
        "advisories": sorted(set(re.findall(r"\((C\d+)\)", log))),
    }


def _disassemble(cubin: bytes) -> str:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.nvdisasm.path, "-c", str(path)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


# ---------------------------------------------------------------- the table


def uses(
    ops: Iterable[Any], archs: Sequence[str], dtypes: Sequence[str], *, cases: str = "sizes", only: Sequence[str] = ()
) -> dict[Source, Use]:
    """The distinct kernels in the ops' plans, not compiled yet. `cases` is the field of Op to take: sizes or cases."""
    from kernels.device import TARGETS

    found: dict[Source, Use] = {}
    for op in ops:
        for case in getattr(op, cases):
            if only and case.name not in only:
                continue
            for dtype in dtypes:
                inputs = op.inputs(case, DTYPES[dtype], "meta")
                for arch in archs:
                    for launch in op.plan(inputs, case.options, TARGETS[arch]):
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
                                shared_memory_limit=TARGETS[arch].shared_memory,
                            ),
                        )
                        if case.name not in use.cases:
                            use.cases.append(case.name)
    return found


def _plain(value):
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def measure(found: dict[Source, Use], workers: int | None = None) -> list[Use]:
    """Compile every Source over the machine's cores, and fill in its Use."""
    workers = min(len(found), workers or os.cpu_count() or 1)
    if workers == 0:
        return []
    # spawned, not forked: torch has threads by now
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker) as pool:
        for use, measured in zip(found.values(), pool.map(compile_source, found), strict=True):
            for name, value in measured.items():
                setattr(use, name, value)
    return list(found.values())


def versions() -> dict[str, str]:
    import triton

    return {"torch": torch.__version__, "triton": triton.__version__}


def _print_table(table: list[Use]) -> None:
    from rich.console import Console
    from rich.table import Table

    def widths(counts: dict[str, int]) -> str:
        return " ".join(f"{width}b:{count}" for width, count in sorted(counts.items(), key=lambda item: -int(item[0])))

    view = Table(title="Kernels compiled ahead of time", caption=", ".join(" ".join(v) for v in versions().items()))
    for name in ("kernel", "dtype", "arch", "tile", "warps", "stages"):
        view.add_column(name, overflow="fold")
    for name in ("regs", "spill B", "shared B"):
        view.add_column(name, justify="right")
    for name in ("tensor cores", "loads", "stores", "notes", "cases"):
        view.add_column(name, overflow="fold")
    for use in table:
        tile = " ".join(f"{name}={value}" for name, value in use.tile.items())
        too_big = use.shared_memory > use.shared_memory_limit
        notes = [*use.advisories, *(["TOO MUCH SHARED"] if too_big else []), *([use.error] if use.error else [])]
        style = "red" if use.error or too_big else "yellow" if use.spill_bytes or use.advisories else None
        mma = " ".join(f"{name}:{count}" for name, count in use.tensor_core.items())
        view.add_row(
            use.kernel, use.dtype, use.arch, tile, str(use.num_warps), str(use.num_stages), str(use.registers),
            str(use.spill_bytes), str(use.shared_memory), mma, widths(use.loads), widths(use.stores), " ".join(notes),
            " ".join(use.cases), style=style,
        )  # fmt: skip
    wide = None if sys.stdout.isatty() else 240
    Console(width=wide).print(view)


# ---------------------------------------------------------------- command


def add_to(commands) -> None:
    """Add `resources` to a command line."""
    parser = commands.add_parser("resources", help=__doc__.split("\n")[0], description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--op", nargs="+", default=[], help="ops of the catalogue (default: all)")
    parser.add_argument("--arch", nargs="+", default=["sm_90"], help="targets, or `all` (default: sm_90)")
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--cases", choices=["sizes", "cases"], default="sizes", help="real sizes, or the tests' cases")
    parser.add_argument("--case", nargs="+", default=[], help="only the cases of these names")
    parser.add_argument("--json", type=Path, help="write the table here as JSON, `-` for stdout instead of the table")
    parser.add_argument("--workers", type=int, help="compile in this many processes (default: the number of cores)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """The command. Returns 1 if a kernel does not compile or asks for more shared memory than there is."""
    if os.environ.get("TRITON_INTERPRET") != "0":
        # with the interpreter chosen, @triton.jit functions cannot be compiled: start over without it
        os.environ["TRITON_INTERPRET"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "profiling", *sys.argv[1:]])
    from kernels import catalogue
    from kernels.device import TARGETS

    ops = {op.name: op for op in catalogue.OPS}
    archs = list(TARGETS) if arguments.arch == ["all"] else arguments.arch
    for asked, there in ((arguments.op, ops), (archs, TARGETS)):
        unknown = [name for name in asked if name not in there]
        if unknown:
            print(f"error: no {', '.join(unknown)}; there are: {', '.join(there)}", file=sys.stderr)
            return 2
    chosen = [ops[name] for name in arguments.op] or list(ops.values())
    found = uses(chosen, archs, arguments.dtype, cases=arguments.cases, only=arguments.case)
    table = measure(found, arguments.workers)
    document = {"versions": versions(), "kernels": [dataclasses.asdict(use) for use in table]}
    if arguments.json == Path("-"):
        json.dump(document, sys.stdout, indent=1)
        print()
    else:
        _print_table(table)
        if arguments.json:
            arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    return int(any(use.error or use.shared_memory > use.shared_memory_limit for use in table))
