"""What a compiled kernel is made of: its instructions by kind. Counts are of the code as it stands, not as it runs."""

import collections
import re

# Kind -> what the opcode begins with, in NVIDIA's SASS. Instructions of no kind are in `total` alone.
_SASS = {
    "tensor_core": ("HMMA", "HGMMA", "QGMMA", "IMMA", "DMMA", "UTCHMMA", "UTCQMMA"),
    "ffma": ("FFMA",),
    "fp32": ("FFMA", "FADD", "FMUL"),
    "ldg": ("LDG", "UTMALDG"),
    "stg": ("STG", "UTMASTG"),
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
ldg, stg: global memory; lds, sts: shared memory. mufu: special functions, ex2: exponentials of them. local: spills."""


def sass_mix(disassembly: str) -> dict[str, int]:
    """Instructions by kind in what nvdisasm prints, without those that only pad or separate (NOP, LDGDEPBAR)."""
    found = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", disassembly, re.MULTILINE)
    opcodes = [name for name in found if not name.startswith(("NOP", "LDGDEPBAR"))]
    mix = _count(opcodes, _SASS)
    special = [name for name in opcodes if name.startswith("MUFU")]
    return mix | {"mufu": len(special), "ex2": sum(name.startswith("MUFU.EX2") for name in special)}


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
