"""Matrix products, and the loads and stores that deal a matrix out to a warp's registers.

Layouts are those of the ISA's figures for mma.m16n8k*, wgmma.m64n*k*, ldmatrix and stmatrix. Products of bf16, fp16
and TF32 are exact in fp32 here, and summed in fp32 (hardware cuts some low bits off).
"""

import functools
import re
from collections.abc import Callable

import numpy as np

from profiling.emulator.conversions import TYPES, from_bf16
from profiling.emulator.memory import Apart
from profiling.emulator.ptx import Instruction, Unsupported

WARP, WARPGROUP = 32, 128
_lane = np.arange(WARP)


def _numbers(bits: np.ndarray, kind: str) -> np.ndarray:
    """fp32 numbers of packed operands, the last axis of 32-bit registers: twice as long for numbers of 16 bits."""
    bits = np.ascontiguousarray(bits)
    if kind == "bf16":
        return from_bf16(bits.view(np.uint16))
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)  # tf32: what is below its mantissa is not read


def _dealt(run, registers, warps) -> np.ndarray:
    """(active warps, 32 lanes, registers) of 32 bits."""
    columns = [run.full(number, TYPES["b32"]).reshape(-1, WARP) for number in registers]
    whole = np.stack(columns, 2)
    return whole if warps is None else whole[warps]


def _gather_back(run, registers, values: np.ndarray, warps, mask) -> None:
    """Write (active warps, 32, registers) to registers."""
    for column, number in enumerate(registers):
        value = np.ascontiguousarray(values[:, :, column])
        if warps is not None:
            whole = np.zeros((len(warps), WARP), value.dtype)
            whole[warps] = value
            value = whole
        run.write(number, value.reshape(-1), mask)


# ---------------------------------------------------------------- mma.sync


def mma(instruction: Instruction, machine) -> Callable:
    """mma.sync.aligned.m16n8kK.row.col.f32.T.T.f32 for T of bf16, f16, tf32."""
    shape = re.fullmatch(r"m16n8k(\d+)", instruction.parts[3])
    to_kind, kind, other, from_kind = instruction.parts[-4:]
    if (
        shape is None
        or instruction.parts[4:6] != ("row", "col")
        or kind != other
        or (to_kind, from_kind) != ("f32",) * 2
    ):
        raise Unsupported(instruction.where)
    d, a, b, c = ([machine.place(r, TYPES["b32"]) for r in operand] for operand in instruction.operands)
    depth = int(shape.group(1))
    each = 1 if kind == "tf32" else 2  # numbers in a register
    group, thread = _lane // 4, _lane % 4
    # register r of a holds rows group + 8 * (r % 2), columns each * (thread + 4 * (r // 2)) and on
    registers = np.arange(len(a))
    rows_a = group[:, None, None] + 8 * (registers % 2)[None, :, None] + np.zeros(each, int)
    columns_a = each * (thread[:, None, None] + 4 * (registers // 2)[None, :, None]) + np.arange(each)
    registers = np.arange(len(b))
    rows_b = each * (thread[:, None, None] + 4 * registers[None, :, None]) + np.arange(each)
    columns_b = group[:, None, None] + np.zeros((len(b), each), int)
    rows_d = group[:, None] + 8 * (np.arange(4) // 2)
    columns_d = 2 * thread[:, None] + np.arange(4) % 2

    def product(run, mask):
        warps = run.whole_warps(mask)
        n = run.lanes // WARP if warps is None else int(warps.sum())
        left, right = np.zeros((n, 16, depth), np.float32), np.zeros((n, depth, 8), np.float32)
        left[:, rows_a, columns_a] = _numbers(_dealt(run, a, warps), kind).reshape(n, WARP, len(a), each)
        right[:, rows_b, columns_b] = _numbers(_dealt(run, b, warps), kind).reshape(n, WARP, len(b), each)
        sums = (left @ right)[:, rows_d, columns_d] + _dealt(run, c, warps).view(np.float32)
        _gather_back(run, d, sums, warps, mask)

    return product


# ---------------------------------------------------------------- ldmatrix, stmatrix


def _matrices(instruction: Instruction) -> tuple[int, bool]:
    """(how many, transposed)."""
    return int(next(p[1:] for p in instruction.parts if re.fullmatch(r"x[124]", p))), "trans" in instruction.parts


def _row_addresses(run, register, offset, count, warps):
    """(offsets in all shared memory, lanes) of the 16 bytes of each matrix's 8 rows: (warps * count * 8,) of each."""
    lanes = np.arange(run.lanes).reshape(-1, WARP)
    lanes = (lanes if warps is None else lanes[warps])[:, : 8 * count].reshape(-1)
    addresses = run.addresses(register, offset, lanes)
    run.measure("shared", addresses, 16, lanes)
    return run.shared_offsets(addresses, 16, lanes), lanes


def ldmatrix(instruction: Instruction, machine) -> Callable:
    """ldmatrix.sync.aligned.m8n8.x{1,2,4}{.trans}.shared.b16."""
    count, transposed = _matrices(instruction)
    to, address = instruction.operands
    targets = [machine.place(r, TYPES["b32"]) for r in (to if isinstance(to, tuple) else (to,))]
    register, offset = machine.address(address)

    def load(run, mask):
        warps = run.whole_warps(mask)
        offsets, lanes = _row_addresses(run, register, offset, count, warps)
        run.note_reads(None, offsets, 16, lanes)
        rows = run.shared[offsets[:, None] + np.arange(16)].view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            rows = rows.swapaxes(2, 3)
        dealt = (
            np.ascontiguousarray(rows).view(np.uint32).reshape(-1, count, WARP)
        )  # lane: row lane // 4, pair lane % 4
        _gather_back(run, targets, dealt.swapaxes(1, 2), warps, mask)

    return load


def stmatrix(instruction: Instruction, machine) -> Callable:
    """stmatrix.sync.aligned.m8n8.x{1,2,4}{.trans}.shared.b16."""
    count, transposed = _matrices(instruction)
    address, value = instruction.operands
    sources = [machine.place(r, TYPES["b32"]) for r in (value if isinstance(value, tuple) else (value,))]
    register, offset = machine.address(address)

    def store(run, mask):
        warps = run.whole_warps(mask)
        dealt = np.ascontiguousarray(_dealt(run, sources, warps).swapaxes(1, 2))  # (warps, count, lanes)
        rows = dealt.view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            rows = rows.swapaxes(2, 3)
        offsets, lanes = _row_addresses(run, register, offset, count, warps)
        data = np.ascontiguousarray(rows).view(np.uint8).reshape(-1, 16)
        run.put(None, offsets, data, lanes)

    return store


# ---------------------------------------------------------------- wgmma


def wgmma(instruction: Instruction, machine) -> Callable:
    """wgmma.mma_async.sync.aligned.m64nNkK.f32.T.T and what orders it.

    The product is there at once, but until it has been waited for, whoever writes what it reads races with it.
    """
    what = instruction.parts[1]
    if what == "fence":
        return lambda run, mask: None
    if what == "commit_group":
        return lambda run, mask: run.products.commit(mask)
    if what == "wait_group":
        return lambda run, mask: run.products.wait(mask, instruction.operands[0])
    kind = instruction.parts[-1]
    shape = re.fullmatch(r"m64n(\d+)k(\d+)", instruction.parts[4])
    if what != "mma_async" or instruction.parts[5] != "f32" or kind not in ("bf16", "f16", "tf32") or shape is None:
        raise Unsupported(instruction.where)
    width, depth = int(shape.group(1)), int(shape.group(2))
    d, a, b, scale, sign_a, sign_b, *transposed = instruction.operands
    if (sign_a, sign_b) != (1, 1):
        raise Unsupported(instruction.where)
    in_registers = isinstance(a, tuple)
    targets = [machine.place(r, TYPES["b32"]) for r in d]
    left = [machine.place(r, TYPES["b32"]) for r in a] if in_registers else machine.place(a, TYPES["u64"])
    right, scale = machine.place(b, TYPES["u64"]), machine.place(scale, TYPES["pred"])
    transposed = ([0, *transposed] if in_registers else [*transposed])[:2] if transposed else [0, 0]
    itemsize = 4 if kind == "tf32" else 2
    rows_d, columns_d = _accumulator_places(width)

    def product(run, mask):
        warps = run.whole_warps(mask)
        groups = np.arange(run.lanes // WARPGROUP)
        if warps is not None:
            active = warps.reshape(-1, 4)
            if (active.any(1) != active.all(1)).any():
                raise Apart("warps of one warp group are apart at a product of the group")
            groups = np.flatnonzero(active[:, 0])
        first = groups * WARPGROUP
        if in_registers:
            dealt = _dealt(run, left, None).reshape(-1, WARPGROUP, len(left))[groups]
            matrix_a = _fragments(_numbers(dealt, kind), depth, kind)
        else:
            matrix_a = _from_shared(
                run, run.full(left, TYPES["u64"])[first], first, 64, depth, itemsize, transposed[0], kind
            )
        matrix_b = _from_shared(
            run, run.full(right, TYPES["u64"])[first], first, width, depth, itemsize, transposed[1], kind
        )
        sums = (matrix_a @ matrix_b.swapaxes(1, 2))[:, rows_d, columns_d]
        keep = np.broadcast_to(run.R[scale], run.lanes)[first]
        before = _dealt_or_zero(run, targets, groups)
        sums = np.where(keep[:, None, None], before + sums, sums)
        for place, target in enumerate(targets):
            value = np.ascontiguousarray(sums[:, :, place])
            if warps is not None:
                whole = np.zeros((run.lanes // WARPGROUP, WARPGROUP), np.float32)
                whole[groups] = value
                value = whole
            run.write(target, value.reshape(-1), mask)

    return product


@functools.cache
def _accumulator_places(width: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows, columns) of a 64 x width product, (128 threads, numbers of each)."""
    lane, number = np.arange(WARPGROUP)[:, None], np.arange(width // 2)
    rows = 16 * (lane // 32) + lane % 32 // 4 + 8 * (number // 2 % 2)
    return rows, 2 * (lane % 4) + 8 * (number // 4) + number % 2


def _dealt_or_zero(run, registers, groups):
    """Accumulators (groups, 128, registers); a product that does not add may be given what nobody wrote."""
    columns = [
        np.zeros(run.lanes, np.float32) if run.R[number] is None else run.full(number, TYPES["f32"])
        for number in registers
    ]
    return np.stack(columns, 1).reshape(-1, WARPGROUP, len(registers))[groups]


def _fragments(numbers: np.ndarray, depth: int, kind: str) -> np.ndarray:
    """(groups, 64, depth) of a wgmma's first operand in registers."""
    groups, _, count = numbers.shape
    lane, number = np.arange(WARPGROUP)[:, None], np.arange(count)
    rows = 16 * (lane // 32) + lane % 32 // 4
    if kind == "tf32":
        rows, columns = rows + 8 * (number % 2), lane % 4 + 4 * (number // 2)
    else:
        rows, columns = rows + 8 * (number // 2 % 2), 2 * (lane % 4) + 8 * (number // 4) + number % 2
    matrix = np.zeros((groups, 64, depth), np.float32)
    matrix[:, np.broadcast_to(rows, (WARPGROUP, count)), columns] = numbers
    return matrix


@functools.lru_cache(maxsize=4096)
def places(descriptor: int, rows: int, depth: int, itemsize: int, transposed: bool) -> np.ndarray:
    """(rows, depth): the address in shared memory of each element of a matrix that a wgmma reads.

    `descriptor` is the ISA's matrix descriptor; `transposed`: the matrix lies with its rows, not its depth, contiguous.
    """
    start = (descriptor & 0x3FFF) << 4
    leading = (descriptor >> 16 & 0x3FFF) << 4
    stride = (descriptor >> 32 & 0x3FFF) << 4
    swizzled = {0: 16, 1: 128, 2: 64, 3: 32}[descriptor >> 62]  # bytes that one row of an atom has
    m, k = np.arange(rows)[:, None], np.arange(depth)[None, :]
    each = swizzled // itemsize
    if not transposed:
        across = k // each * leading + k % each * itemsize
        address = m // 8 * stride + m % 8 * swizzled + across
    elif swizzled == 16:
        address = m % each * itemsize + m // each * stride + k % 8 * 16 + k // 8 * leading
    else:
        address = m % each * itemsize + m // each * leading + k % 8 * swizzled + k // 8 * stride
    address = start + address
    bits = {16: 0, 32: 1, 64: 3, 128: 7}[swizzled]
    return address ^ ((address >> 7 & bits) << 4)


def _from_shared(run, descriptors, lanes, rows, depth, itemsize, transposed, kind) -> np.ndarray:
    """(groups, rows, depth) of fp32 numbers."""
    addresses = np.stack([places(int(one), rows, depth, itemsize, bool(transposed)).ravel() for one in descriptors])
    owners = np.repeat(lanes, rows * depth)
    offsets = run.shared_offsets(addresses.ravel(), itemsize, owners)
    if run.shared_watch is not None:
        run.note_reads(None, offsets, itemsize, owners)
        run.products.add(owners, offsets, np.full(len(offsets), run.shared_watch.writes))
    unit = run.shared[: len(run.shared) // 4 * 4].view(np.uint16 if itemsize == 2 else np.uint32)
    bits = unit[offsets // itemsize].reshape(len(lanes), rows, depth)
    return _numbers(bits, kind)
