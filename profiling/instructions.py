"""What a compiled kernel is made of: its instructions by kind. Counts are of the code as it stands, not as it runs."""

import collections
import itertools
import re

# Kind -> what the opcode begins with, in NVIDIA's SASS. Instructions of no kind are in `total` alone.
_SASS = {
    "tensor_core": ("HMMA", "HGMMA", "QGMMA", "IMMA", "DMMA", "UTCHMMA", "UTCQMMA"),
    "ffma": ("FFMA",),
    "fp32": ("FFMA", "FADD", "FMUL"),
    "ldg": ("LDG", "UTMALDG"),
    "stg": ("STG", "UTMASTG"),
    "tma": ("UTMALDG", "UTMASTG"),
    "lds": ("LDS",),
    "sts": ("STS",),
    "barriers": ("BAR", "SYNCS", "WARPSYNC"),
    "shuffles": ("SHFL",),
    "local": ("LDL", "STL"),
}
# The same for AMD's CDNA.
_CDNA = {
    "tensor_core": ("v_mfma",),
    "ffma": ("v_fma_f32", "v_pk_fma_f32", "v_fmac_f32"),
    "fp32": ("v_fma_f32", "v_pk_fma_f32", "v_fmac_f32", "v_add_f32", "v_mul_f32", "v_pk_add_f32", "v_pk_mul_f32"),
    "ldg": ("global_load", "buffer_load", "flat_load"),
    "stg": ("global_store", "buffer_store", "flat_store"),
    "lds": ("ds_read", "ds_load"),
    "sts": ("ds_write", "ds_store"),
    "barriers": ("s_barrier",),
    "shuffles": ("ds_bpermute", "ds_permute", "ds_swizzle", "v_permlane"),
    "local": ("scratch_load", "scratch_store"),
}
KINDS = ("total", *_SASS, "mufu", "ex2")
"""The keys of a mix. tensor_core: matrix products. ffma: fused multiply-adds in fp32; fp32: those, sums and products.
ldg, stg: global memory, by the TMA unit too; tma: that alone; lds, sts: shared memory. mufu: special functions, ex2:
exponentials of them. local: spills."""


def sass_mix(disassembly: str) -> dict[str, int]:
    """Instructions by kind in what nvdisasm prints, without those that only pad or separate (NOP, LDGDEPBAR)."""
    opcodes = _opcodes(disassembly)
    mix = _count(opcodes, _SASS)
    special = [name for name in opcodes if name.startswith("MUFU")]
    return mix | {"mufu": len(special), "ex2": sum(name.startswith("MUFU.EX2") for name in special)}


def _opcodes(disassembly: str) -> list[str]:
    found = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", disassembly, re.MULTILINE)
    return [name for name in found if not name.startswith(("NOP", "LDGDEPBAR"))]


def hopper_loops(disassembly: str) -> list[tuple[str, int]]:
    """The innermost loops with wgmma (HGMMA): what each does in turn, and how many instructions it is.

    In turn as "H4 W0 E32 H4": products issued, a wait until 0 groups of them are in flight, exponentials, products.

    The source's order and PTX's say nothing of this: ptxas has its own.
    """
    places: dict[str, int] = {}
    lines = disassembly.splitlines()
    jumps = []
    for number, line in enumerate(lines):
        if label := re.match(r"\s*(\.L_\w+):", line):
            places[label.group(1)] = number
        elif (jump := re.search(r"\bBRA(?:\.\w+)* .*`\((\.L_\w+)\)", line)) and jump.group(1) in places:
            jumps.append((places[jump.group(1)], number))
    inner = [jump for jump in jumps if not any(jump[0] <= a and b <= jump[1] for a, b in jumps if (a, b) != jump)]
    loops = [lines[begin : end + 1] for begin, end in inner]
    found = [(_order(loop), len(_opcodes("\n".join(loop)))) for loop in loops]
    return [(order, count) for order, count in found if "H" in order]


def _order(lines: list[str]) -> str:
    steps = []
    for line in lines:
        if re.search(r"\bHGMMA\b", line):
            steps.append("H")
        elif re.search(r"\bMUFU\.EX2\b", line):
            steps.append("E")
        elif wait := re.search(r"\bWARPGROUP\.DEPBAR\.LE gsb0, 0x(\w+)", line):
            steps.append("W" + wait.group(1))
    runs = ((step, len(list(run))) for step, run in itertools.groupby(steps))
    return " ".join(step if step[0] == "W" else f"{step}{length}" for step, length in runs)


def overlapped(order: str) -> tuple[int, int]:
    """(exponentials of a loop that are issued while products are in flight, all of them), from hopper_loops."""
    in_flight, found, total = False, 0, 0
    for turn in range(2):  # what is in flight at the end is so at the beginning
        for step in order.split():
            if step[0] == "H":
                in_flight = True
            elif step == "W0":
                in_flight = False
            elif step[0] == "E" and turn:
                found += int(step[1:]) * in_flight
                total += int(step[1:])
    return found, total


def cdna_mix(assembly: str) -> dict[str, int]:
    """Instructions by kind in AMD's assembly."""
    opcodes = re.findall(r"^\t((?:v|s|ds|global|buffer|flat|scratch)_\w+)", assembly, re.MULTILINE)
    opcodes = [name for name in opcodes if name != "s_nop"]
    special = [name for name in opcodes if re.match(r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_f", name)]
    return _count(opcodes, _CDNA) | {
        "mufu": len(special),
        "ex2": sum(name.startswith("v_exp_f") for name in special),
    }


def _count(opcodes: list[str], kinds: dict[str, tuple[str, ...]]) -> dict[str, int]:
    counts = collections.Counter({"total": len(opcodes)})
    for name in opcodes:
        for kind, begins in kinds.items():
            counts[kind] += name.startswith(begins)
    return {kind: counts[kind] for kind in ("total", *kinds)}
