"""One kernel compiled ahead of time as Triton's own launcher would compile it, and what is read from the result.

Arguments are specialized with Triton's code (an int 1 becomes a constant, what divides by 16 says so, ...). Registers,
spills and ptxas's advisories come from ptxas's log, everything about instructions from the machine code.
"""

import collections
import contextlib
import dataclasses
import importlib
import io
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from minigpt.errors import UserError
from profiling.instructions import cdna_mix, hopper_loops, sass_mix

TENSOR_CORE = ("mma.sync", "wgmma.mma_async", "tcgen05.mma", "v_mfma")
SERIALISED = ("C7511", "C7512", "C7515")
"""ptxas's advisories that it waits after every wgmma."""


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


# ---------------------------------------------------------------- from a Launch to a Source


def _target(arch: str):
    from triton.backends.compiler import GPUTarget

    if arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


def _hashable(value):
    return tuple(_hashable(item) for item in value) if isinstance(value, list | tuple) else value


def source_of(launch, arch: str) -> Source:
    """`launch` specialized for `arch` by Triton's own code. Empty attributes stay: they are part of the cache's key."""
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from kernels.ahead import arguments_of

    backend = make_backend(_target(arch))
    kernel = launch.kernel
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "debug": False}
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, rest = binder(*arguments_of(launch), **launch.constexprs, **options)
    _, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, rest)
    return Source(
        arch=arch,
        module=kernel.fn.__module__,
        kernel=kernel.fn.__name__,
        signature=tuple(signature.items()),
        constants=tuple(constants.items()),
        attributes=tuple((place, _hashable(attribute)) for place, attribute in attributes.items()),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )


# ---------------------------------------------------------------- compiling (in worker processes)


def begin_worker() -> None:
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


def compile_ahead(source: Source):
    """Triton's compiled kernel."""
    from triton.compiler import ASTSource
    from triton.compiler import compile as triton_compile

    kernel = getattr(importlib.import_module(source.module), source.kernel)
    attributes = {place: [list(pair) for pair in pairs] for place, pairs in source.attributes}
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as ASTSource
    ast = ASTSource(kernel, dict(source.signature), dict(source.constants), attributes)
    options = {"num_warps": source.num_warps, "num_stages": source.num_stages}
    return triton_compile(ast, target=_target(source.arch), options=options)


def why_not_compiled(error: Exception) -> str:
    """A compiler's error in one line: what ptxas says, if it was ptxas."""
    lines = f"{type(error).__name__}: {error}".strip().split("\n")
    return next((line.strip() for line in lines if "fatal" in line), lines[0])


def compile_source(source: Source, keep: bool = False) -> dict[str, Any]:
    """Compile, and return the measured fields of a Use. With `keep` Triton's cache has the kernel afterwards, under the
    key that a launch looks for."""
    log = io.StringIO()
    began = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(log):
            if not keep:
                os.environ["TRITON_CACHE_DIR"] = folder
            compiled = compile_ahead(source)
    except Exception as error:  # whatever a compiler raises is this row's result
        return {"error": why_not_compiled(error)}
    seconds = time.perf_counter() - began
    text = compiled.asm["amdgcn" if "amdgcn" in compiled.asm else "ptx"]
    common = {
        "num_warps": compiled.metadata.num_warps,  # with those that Gluon's kernels start beside their own
        "shared_memory": compiled.metadata.shared,
        "tensor_memory": getattr(compiled.metadata, "tmem_size", 0) or 0,
        "tensor_core": {name: text.count(name) for name in TENSOR_CORE if name in text},
        "seconds": round(seconds, 2),
    }
    if "amdgcn" in compiled.asm:
        return common | {
            "registers": _number(r"\.vgpr_count:\s*(\d+)", text),
            "spill_bytes": 4 * _number(r"\.vgpr_spill_count:\s*(\d+)", text),
            "loads": _amd_widths(text, "load"),
            "stores": _amd_widths(text, "store"),
            "instructions": cdna_mix(text),
        }
    log = log.getvalue()
    if "bytes spill stores" not in log:
        raise RuntimeError(f"no ptxas log came with {source.kernel} for {source.arch}")
    disassembly = _disassemble(compiled.asm["cubin"])
    loops = hopper_loops(disassembly)
    return common | {
        "registers": _number(r"Used (\d+) registers", log),
        "spill_bytes": _number(r"(\d+) bytes spill stores", log),
        "loads": _widths(disassembly, r"(?:LDG|LDGSTS)"),
        "stores": _widths(disassembly, "STG"),
        "instructions": sass_mix(disassembly),
        "loops": [order for order, _ in loops],
        "loop_instructions": [count for _, count in loops],
        "code_bytes": len(compiled.asm["cubin"]),
        "advisories": sorted(set(re.findall(r"\((C\d+)\)", log))),
    }


def _disassemble(cubin: bytes) -> str:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run([knobs.nvidia.nvdisasm.path, "-c", str(path)], capture_output=True, text=True)
    if done.returncode:
        raise UserError(
            f"Triton's nvdisasm cannot read what its ptxas made ({done.stderr.strip()}): set TRITON_NVDISASM_PATH to a "
            "newer one"
        )
    return done.stdout
