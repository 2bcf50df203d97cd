"""What an architecture can hold and do at most: occupancy of a kernel, and the roofline of an op.

The peaks are those that the makers publish, dense, for one product of each architecture. A roofline is an estimate from
them and from an op's own count of operations and bytes: no GPU has run anything for it.
"""

from typing import Any, NamedTuple

from kernels.device import target


class Processor(NamedTuple):
    """One streaming multiprocessor, or compute unit. Bytes for memory; registers of 32 bits.

    NVIDIA: CUDA C++ programming guide, technical specifications per compute capability. AMD: CDNA 3 ISA guide.
    """

    warps: int
    blocks: int
    registers: int
    shared_memory: int
    reserved: int  # shared memory that every block takes besides its own
    shared_unit: int
    register_unit: int  # registers a thread are rounded up to


PROCESSORS = {
    "sm_80": Processor(64, 32, 65536, 164 * 1024, 1024, 128, 8),
    "sm_86": Processor(48, 16, 65536, 100 * 1024, 1024, 128, 8),
    "sm_89": Processor(48, 24, 65536, 100 * 1024, 1024, 128, 8),
    "sm_90": Processor(64, 32, 65536, 228 * 1024, 1024, 128, 8),
    "sm_100": Processor(64, 32, 65536, 228 * 1024, 1024, 128, 8),
    "sm_120": Processor(48, 24, 65536, 100 * 1024, 1024, 128, 8),
    "gfx942": Processor(32, 16, 4 * 512 * 64, 64 * 1024, 0, 512, 8),
}


def _known(table: dict[str, Any], arch: str) -> Any:
    """The architecture's, or where there is none that of the one whose tiles it takes."""
    return table[arch if arch in table else target(arch).tiles]


TENSOR_MEMORY = 512
"""Columns of tensor memory in a processor of sm_100."""


def occupancy(arch: str, registers: int, shared_memory: int, num_warps: int, tensor_memory: int = 0) -> dict[str, Any]:
    """How many programs of a kernel a processor holds at a time, the share of its warps, and what sets the limit.

    `registers` a thread; `shared_memory` in bytes, `num_warps` and `tensor_memory` in columns a program. Zero programs:
    it cannot run there.
    """
    p = _known(PROCESSORS, arch)
    lanes = 64 if arch.startswith("gfx") else 32
    rounded = -(-max(registers, 1) // p.register_unit) * p.register_unit
    # a warp's registers lie in one of the processor's four parts
    warps_in_a_part = p.registers // 4 // (rounded * lanes)
    shared = -(-(shared_memory + p.reserved) // p.shared_unit) * p.shared_unit
    limits = {
        "warps": p.warps // num_warps,
        "blocks": p.blocks,
        "registers": 4 * warps_in_a_part // num_warps,
        "shared memory": p.shared_memory // shared if shared else p.blocks,
    }
    if tensor_memory:
        limits["tensor memory"] = TENSOR_MEMORY // tensor_memory
    blocks = min(limits.values())
    return {
        "blocks": blocks,
        "warps": blocks * num_warps,
        "share": blocks * num_warps / p.warps,
        "limited_by": [name for name, limit in limits.items() if limit == blocks],
    }


class Peaks(NamedTuple):
    """Published peaks of a product: 1e12 operations/s on tensor cores by dtype and in fp32 without, 1e9 bytes/s.

    `issued`: 1e9 instructions of a warp a second, four a clock and processor at the boost clock; 0 where not looked up.
    """

    product: str
    tensor: dict[str, float]
    fp32: float
    bandwidth: float
    issued: float = 0.0


PEAKS = {
    "sm_80": Peaks("A100 SXM 80 GB", {"bfloat16": 312, "float16": 312, "float32": 156}, 19.5, 2039, 609),
    "sm_86": Peaks("GeForce RTX 3090", {"bfloat16": 71.0, "float16": 71.0, "float32": 35.6}, 35.6, 936, 556),
    "sm_89": Peaks("GeForce RTX 4090", {"bfloat16": 165.2, "float16": 165.2, "float32": 82.6}, 82.6, 1008, 1290),
    "sm_90": Peaks("H100 SXM", {"bfloat16": 989.4, "float16": 989.4, "float32": 494.7}, 66.9, 3350, 1045),
    "sm_100": Peaks("B200", {"bfloat16": 2250, "float16": 2250, "float32": 1125}, 75, 8000),
    "sm_120": Peaks("GeForce RTX 5090", {"bfloat16": 209.5, "float16": 209.5, "float32": 104.8}, 104.8, 1792, 1637),
    "gfx942": Peaks("MI300X", {"bfloat16": 1307.4, "float16": 1307.4, "float32": 653.7}, 163.4, 5300),
}

PRODUCTS = {peaks.product: peaks for peaks in PEAKS.values()}
PRODUCTS["H200 SXM"] = PEAKS["sm_90"]._replace(product="H200 SXM", bandwidth=4800)
"""Peaks by the product's name; an H200 is an H100 with other memory."""


def roofline(arch: str, dtype: str, flops: int, moved: int, tensor_cores: bool) -> dict[str, Any]:
    """The least time in microseconds that `flops` operations and `moved` bytes can take by the published peaks.

    `tensor_cores`: the operations are matrix products that run there, in `dtype`.
    """
    peaks = _known(PEAKS, arch)
    rate = peaks.tensor[dtype] if tensor_cores else peaks.fp32
    computing, moving = flops / rate / 1e6, moved / peaks.bandwidth / 1e3
    return {
        "product": peaks.product,
        "flops": flops,
        "bytes": moved,
        "intensity": flops / moved if moved else 0.0,
        "ridge": rate * 1e3 / peaks.bandwidth,
        "us": max(computing, moving),
        "bound": "operations" if computing > moving else "bytes",
    }
