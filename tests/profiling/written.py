"""PTX written by hand, run in the emulator: what its tests share."""

import numpy as np
import torch

from profiling.emulator.driver import region_of
from profiling.emulator.machine import Counts, Machine
from profiling.emulator.memory import Global
from profiling.emulator.ptx import parse

REGISTER = {1: "%rs", 2: "%rs", 4: "%r", 8: "%rd"}  # by bytes; a byte has none of its own
HEAD = """.version 8.5
.target sm_90
.address_size 64
.file 1 "/somewhere/kernel.py"
.extern .shared .align 16 .b8 global_smem[];
.visible .entry written({parameters})
.reqntid {threads}
{{
.reg .pred %p<99>; .reg .b16 %rs<99>; .reg .b32 %r<99>; .reg .b64 %rd<99>;
{body}
ret;
}}
"""


def launch(body: str, *arrays: np.ndarray, threads: int = 32, grid=(1,), shared: int = 0, **settings) -> Counts:
    """Run a kernel on these arrays, in place. %rd1, %rd2, ... are their addresses and %r1 is the thread's number."""
    parameters = ", ".join(f".param .u64 written_param_{place}" for place in range(len(arrays)))
    loads = [f"ld.param.b64 %rd{place + 1}, [written_param_{place}];" for place in range(len(arrays))]
    text = HEAD.format(parameters=parameters, threads=threads, body="\n".join(["mov.u32 %r1, %tid.x;", *loads, body]))
    # PyTorch's own memory begins at whole sectors, as a GPU's does; NumPy's may not
    tensors = [torch.from_numpy(array.view(np.uint8).reshape(-1)).clone() for array in arrays]
    regions = [region_of(f"array {place}", tensor) for place, tensor in enumerate(tensors)]
    machine = Machine(parse(text), threads, shared)
    memory = Global(regions, machine.threads // 32 + 1)
    counts = machine.launch(grid, [tensor.data_ptr() for tensor in tensors], memory, **settings)
    for array, tensor in zip(arrays, tensors, strict=True):
        array.view(np.uint8).reshape(-1)[:] = tensor.numpy()
    return counts


def compute(instruction: str, to: str, *operands) -> np.ndarray:
    """`instruction` of arrays of the same length, an element a thread; numbers of Python go into its text.

    `to` is the result's dtype, "pred" a truth.
    """
    n = max(len(operand) for operand in operands if isinstance(operand, np.ndarray))
    result = np.zeros(n, bool if to == "pred" else to)
    given = [operand for operand in operands if isinstance(operand, np.ndarray)]
    lines, names = [], []
    for place, operand in enumerate(operands):
        if not isinstance(operand, np.ndarray):
            names.append(str(operand))
            continue
        size, number = operand.dtype.itemsize, 20 + place
        array = 2 + [one is operand for one in given].index(True)
        lines += [
            f"mad.wide.u32 %rd{10 + place}, %r1, {size}, %rd{array};",
            f"ld.global.b{8 * size} {REGISTER[size]}{number}, [%rd{10 + place}];",
        ]
        names.append(f"{REGISTER[size]}{number}")
    size = result.dtype.itemsize
    target = "%p1" if to == "pred" else f"{REGISTER[size]}50"
    stored = "%rs50" if to == "pred" else target
    lines += [
        f"{instruction} {target}, {', '.join(names)};",
        "selp.b16 %rs50, 1, 0, %p1;" if to == "pred" else "",
        f"mad.wide.u32 %rd30, %r1, {size}, %rd1;",
        f"st.global.b{8 * size} [%rd30], {stored};",
    ]
    # whole warps: threads beyond the arrays leave
    body = "\n".join([f"setp.ge.u32 %p9, %r1, {n};", "@%p9 ret;", *lines])
    launch(body, result, *[operand.copy() for operand in given], threads=-(-n // 32) * 32)
    return result
