"""The TMA unit: maps of tensors, which a kernel makes in memory, and copies of their tiles to shared memory."""

import itertools
import re
from collections.abc import Callable

import numpy as np

from profiling.emulator.conversions import TYPES
from profiling.emulator.memory import UNWRITTEN, Fault
from profiling.emulator.ptx import Instruction, Unsupported

_FIELDS = {  # where a map keeps what tensormap.replace sets: (byte, type). The ISA leaves this to the hardware.
    "global_address": (0, "u8"), "rank": (8, "u4"), "box_dim": (12, "u4"), "global_dim": (32, "u4"),
    "global_stride": (56, "u8"), "element_stride": (88, "u4"), "elemtype": (108, "u4"),
    "interleave_layout": (112, "u4"), "swizzle_mode": (116, "u4"), "fill_mode": (120, "u4"),
}  # fmt: skip
_MAP = 128
_ITEMSIZE = {0: 1, 1: 2, 2: 4, 3: 4, 4: 8, 5: 8, 6: 2, 7: 4, 8: 4, 9: 8, 10: 2}
_SWIZZLED = {0: 0, 1: 1, 2: 3, 3: 7}


def tensormap(instruction: Instruction, machine) -> Callable:
    """tensormap.replace in shared memory, and tensormap.cp_fenceproxy from there to global memory."""
    register, offset = machine.address(instruction.operands[0])
    if instruction.parts[1] == "cp_fenceproxy":
        source, source_offset = machine.address(instruction.operands[1])

        def publish(run, mask):
            lanes = run.chosen(mask)
            lanes = lanes[lanes % 32 == 0]  # one copy a warp
            to, start = run.addresses(register, offset, lanes), run.addresses(source, source_offset, lanes)
            for place in range(0, _MAP, 16):
                run.store("global", to + place, run.load("shared", start + place, 16, lanes), lanes)

        return publish
    byte, kind = _FIELDS[instruction.parts[3]]
    dtype = np.dtype(kind)
    *index, value = instruction.operands[1:]
    byte += dtype.itemsize * (index[0] if index else 0)
    number = machine.place(value, dtype)

    def replace(run, mask):
        lanes = run.chosen(mask)
        data = np.ascontiguousarray(run.full(number, dtype)[lanes])[:, None].view(np.uint8)
        for half in range(0, dtype.itemsize, 4):
            run.store("shared", run.addresses(register, offset, lanes) + byte + half, data[:, half : half + 4], lanes)

    return replace


def _field(data: np.ndarray, name: str, index: int = 0) -> int:
    byte, kind = _FIELDS[name]
    byte += index * np.dtype(kind).itemsize
    return int(data[byte : byte + np.dtype(kind).itemsize].copy().view(kind)[0])


def tile(instruction: Instruction, machine) -> Callable:
    """cp.async.bulk.tensor from global to shared memory, zeros beyond the tensor's edges."""
    rank = re.fullmatch("([1-5])d", instruction.parts[4])
    shared = ("shared_cta", "shared_cluster")  # a program is a cluster of its own
    if rank is None or not any(name in instruction.parts[5] + instruction.parts[6] for name in shared):
        raise Unsupported(instruction.where)
    rank = int(rank.group(1))
    to, source, barrier = instruction.operands
    to_register, to_offset = machine.address(to)
    map_register, map_offset = machine.address(source)
    coordinates = [machine.place(one, TYPES["s32"]) for one in source.coordinates]
    barrier_register, barrier_offset = machine.address(barrier)

    def begin(run, mask):
        lanes = run.chosen(mask)
        maps, targets = run.addresses(map_register, map_offset, lanes), run.addresses(to_register, to_offset, lanes)
        barriers = run.addresses(barrier_register, barrier_offset, lanes)
        places = np.stack([run.full(one, TYPES["s32"])[lanes] for one in coordinates], 1)
        for lane, at, target, barrier, place in zip(lanes, maps, targets, barriers, places, strict=True):
            one = np.array([lane])
            read = [run.load("global", np.array([at + k]), 16, one)[0] for k in range(0, _MAP, 16)]
            offsets, data = _box(run, np.concatenate(read), rank, int(target), place.astype(np.int64), one)
            run.put(None, offsets, np.full_like(data, UNWRITTEN), np.repeat(one, len(data)), engine=True)
            if run.shared_watch is not None:
                run.shared_watch.begin(offsets, 16)
            state = run.barriers.get((int(run.cta[lane]), int(barrier)))
            if state is None:
                raise Fault("a copy for an mbarrier that was not initialised")
            state.flying.append((offsets, data))

    return begin


def _box(run, tensor_map: np.ndarray, rank: int, target: int, begin: np.ndarray, lane: np.ndarray):
    """(offsets in shared memory of 16 bytes each, the bytes) of the box that begins at these coordinates."""
    item = _ITEMSIZE[_field(tensor_map, "elemtype")]
    box = np.array([_field(tensor_map, "box_dim", k) for k in range(rank)])
    sizes = np.array([_field(tensor_map, "global_dim", k) for k in range(rank)])
    strides = np.array([item, *[_field(tensor_map, "global_stride", k) for k in range(rank - 1)]])
    start = _field(tensor_map, "global_address")
    wrong = _field(tensor_map, "rank") != rank - 1 or (strides[1:] % 16).any() or start % 16
    if wrong or box[0] * item % 16 or target % 128:
        raise Fault(
            f"a tensor map of address {start:#x}, strides {strides[1:]}, box {box[::-1]}, or its target {target}"
        )
    outer = np.array(list(itertools.product(*map(range, box[:0:-1])))).reshape(-1, rank - 1)[:, ::-1] + begin[1:]
    data = np.zeros((len(outer), box[0] * item), np.uint8)
    rows = np.flatnonzero(((outer >= 0) & (outer < sizes[1:])).all(1))
    columns = np.arange(max(0, -begin[0]), min(box[0], sizes[0] - begin[0]))
    if len(rows) and len(columns):
        addresses = start + (outer[rows] @ strides[1:])[:, None] + (begin[0] + columns)[None, :] * item
        lanes = np.repeat(lane, addresses.size)
        run.measure("global", addresses.ravel(), item, lanes)
        read = run.load("global", addresses.ravel(), item, lanes).reshape(len(rows), -1)
        data[rows, columns[0] * item : (columns[-1] + 1) * item] = read
    places = target + np.arange(0, data.size, 16)
    places ^= (places >> 7 & _SWIZZLED[_field(tensor_map, "swizzle_mode")]) << 4
    return run.shared_offsets(places, 16, np.repeat(lane, len(places))), data.reshape(-1, 16)
