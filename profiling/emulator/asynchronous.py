"""Copies that go on beside the threads: cp.async, the TMA unit's, and the mbarriers that say when those have landed.

What a copy brings is in shared memory when somebody has waited for it, and no sooner: the latest that the ISA allows,
so that a wait that is missing shows. Until then whoever reads the place or writes to it is at fault.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from profiling.emulator.conversions import TYPES
from profiling.emulator.memory import UNWRITTEN, Fault
from profiling.emulator.ptx import Instruction, Unsupported

SPINS = 10_000
"""So many failed waits in a row are a deadlock."""


class Groups:
    """What threads have begun and not waited for, by groups that each thread counts for itself."""

    def __init__(self, run):
        self.run, self.committed, self.begun = run, np.zeros(run.lanes, np.int64), []

    def add(self, lanes: np.ndarray, *arrays: np.ndarray) -> None:
        """Begin something of these lanes; the arrays have an entry for each."""
        self.begun.append((self.committed[lanes], lanes, *arrays))

    def commit(self, mask: np.ndarray | None) -> None:
        """Close the group that is open."""
        self.committed += 1 if mask is None else mask

    def wait(self, mask: np.ndarray | None, allowed: int, finish: Callable) -> None:
        """Finish, in order, what is not in the last `allowed` groups that these threads closed."""
        kept = []
        for group, lanes, *arrays in self.begun:
            over = self.committed[lanes] - group > allowed
            if mask is not None:
                over &= mask[lanes]
            if over.any():
                finish(self.run, lanes[over], *[array[over] for array in arrays])
            if not over.all():
                kept.append(tuple(array[~over] for array in (group, lanes, *arrays)))
        self.begun = kept


# ---------------------------------------------------------------- cp.async


def copy(instruction: Instruction, machine) -> Callable:
    """cp.async of 4 to 16 bytes a thread, its groups, and cp.async.bulk.tensor."""
    parts = instruction.parts
    if parts[:3] == ("cp", "async", "bulk"):
        return _tile(instruction, machine) if parts[3] == "tensor" else lambda run, mask: None  # loads need no groups
    if parts[:3] == ("cp", "async", "commit_group"):
        return lambda run, mask: run.copies.commit(mask)
    if parts[:3] in (("cp", "async", "wait_group"), ("cp", "async", "wait_all")):
        allowed = instruction.operands[0] if instruction.operands else -1
        return lambda run, mask: run.copies.wait(mask, allowed, _land)
    if parts[2] not in ("ca", "cg"):
        raise Unsupported(instruction.where)
    to, source, width, *taken = instruction.operands
    to_register, to_offset = machine.address(to)
    from_register, from_offset = machine.address(source)
    taken = machine.place(taken[0], TYPES["u32"]) if taken else None

    def begin(run, mask):
        lanes = run.chosen(mask)
        if len(lanes) == 0:
            return
        offsets = run.shared_offsets(run.addresses(to_register, to_offset, lanes), width, lanes)
        addresses = run.addresses(from_register, from_offset, lanes)
        data = np.zeros((len(lanes), width), np.uint8)
        there = np.full(len(lanes), width) if taken is None else run.full(taken, TYPES["u32"])[lanes]
        if not np.isin(there, (0, width)).all():
            raise Fault("a copy of a part of its width")
        some = np.flatnonzero(there)
        run.measure("global", addresses[some], width, lanes[some])
        data[some] = run.load("global", addresses[some], width, lanes[some])
        run.put(run.shared_watch, "shared memory", run.shared, offsets, np.full_like(data, UNWRITTEN), lanes)
        if run.shared_watch is not None:
            run.shared_watch.begin(offsets, width)
        run.copies.add(lanes, offsets, data)

    return begin


def _land(run, lanes, offsets, data) -> None:
    if run.shared_watch is not None:
        run.shared_watch.land(offsets, data.shape[1])
    run.put(run.shared_watch, "shared memory", run.shared, offsets, data, lanes)


# ---------------------------------------------------------------- tensor maps

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


def _tile(instruction: Instruction, machine) -> Callable:
    """cp.async.bulk.tensor.2d from global to shared memory, zeros beyond the tensor's edges."""
    if instruction.parts[4] != "2d" or "shared_cta" not in instruction.parts[5] + instruction.parts[6]:
        raise Unsupported(instruction.where)
    to, source, barrier = instruction.operands
    to_register, to_offset = machine.address(to)
    map_register, map_offset = machine.address(source)
    coordinates = [machine.place(one, TYPES["s32"]) for one in source.coordinates]
    barrier_register, barrier_offset = machine.address(barrier)

    def begin(run, mask):
        lanes = run.chosen(mask)
        maps, targets = run.addresses(map_register, map_offset, lanes), run.addresses(to_register, to_offset, lanes)
        barriers = run.addresses(barrier_register, barrier_offset, lanes)
        places = [run.full(one, TYPES["s32"])[lanes] for one in coordinates]
        for lane, at, target, barrier, x, y in zip(lanes, maps, targets, barriers, *places, strict=True):
            one = np.array([lane])
            read = [run.load("global", np.array([at + k]), 16, one)[0] for k in range(0, _MAP, 16)]
            offsets, data = _box(run, np.concatenate(read), int(target), int(x), int(y), one)
            filler = np.full_like(data, UNWRITTEN)
            run.put(run.shared_watch, "shared memory", run.shared, offsets, filler, np.repeat(one, len(data)), True)
            if run.shared_watch is not None:
                run.shared_watch.begin(offsets, 16)
            state = run.barriers.get((int(run.cta[lane]), int(barrier)))
            if state is None:
                raise Fault("a copy for an mbarrier that was not initialised")
            state.flying.append((offsets, data))

    return begin


def _box(run, tensor_map: np.ndarray, target: int, x: int, y: int, lane: np.ndarray):
    """(offsets in shared memory of 16 bytes each, the bytes) of one box, rows y and on, columns x and on."""
    item = _ITEMSIZE[_field(tensor_map, "elemtype")]
    columns, rows = _field(tensor_map, "box_dim", 0), _field(tensor_map, "box_dim", 1)
    width, height = _field(tensor_map, "global_dim", 0), _field(tensor_map, "global_dim", 1)
    start, stride = _field(tensor_map, "global_address"), _field(tensor_map, "global_stride")
    if _field(tensor_map, "rank") != 1 or columns * item % 16 or start % 16 or stride % 16 or target % 128:
        raise Fault(
            f"a tensor map of address {start:#x}, stride {stride}, box {rows} x {columns}, or its target {target}"
        )
    data = np.zeros((rows, columns * item), np.uint8)
    inside_rows = np.arange(max(0, -y), min(rows, height - y))
    inside = np.arange(max(0, -x), min(columns, width - x))
    if len(inside_rows) and len(inside):
        addresses = start + (y + inside_rows)[:, None] * stride + (x + inside)[None, :] * item
        lanes = np.repeat(lane, addresses.size)
        run.measure("global", addresses.ravel(), item, lanes)
        read = run.load("global", addresses.ravel(), item, lanes).reshape(len(inside_rows), -1)
        data[inside_rows[0] : inside_rows[-1] + 1, inside[0] * item : (inside[-1] + 1) * item] = read
    places = target + np.arange(0, data.size, 16)
    places ^= (places >> 7 & _SWIZZLED[_field(tensor_map, "swizzle_mode")]) << 4
    return run.shared_offsets(places, 16, np.repeat(lane, len(places))), data.reshape(-1, 16)


# ---------------------------------------------------------------- mbarriers


@dataclass
class Barrier:
    """An mbarrier: arrivals that its phase still needs, bytes that copies still owe it, and those copies."""

    count: int
    pending: int
    bytes: int = 0
    phase: int = 0
    flying: list = field(default_factory=list)

    def settle(self) -> None:
        """End the phase if nothing is missing."""
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count


def mbarrier(instruction: Instruction, machine) -> Callable:
    """mbarrier.init, inval, arrive, arrive.expect_tx, try_wait.parity, in shared memory."""
    what = instruction.parts[1]
    if what in ("try_wait", "test_wait"):
        return _wait(instruction, machine)
    operands = instruction.operands if what in ("init", "inval") else instruction.operands[1:]
    register, offset = machine.address(operands[0])
    expects = "expect_tx" in instruction.parts
    number = machine.place(operands[1], TYPES["u32"]) if len(operands) > 1 else None

    def change(run, mask):
        lanes = run.chosen(mask)
        values = np.ones(len(lanes), int) if number is None else run.full(number, TYPES["u32"])[lanes].astype(int)
        for lane, address, value in zip(lanes, run.addresses(register, offset, lanes), values, strict=True):
            key = (int(run.cta[lane]), int(address))
            if what == "init":
                run.shared_offsets(np.array([address]), 8, np.array([lane]))
                run.barriers[key] = Barrier(int(value), int(value))
                continue
            state = run.barriers.get(key)
            if state is None:
                raise Fault("an mbarrier that was not initialised")
            if what == "inval":
                if state.flying:
                    raise Fault("an mbarrier is given up while copies owe it bytes")
                del run.barriers[key]
                continue
            if state.pending < (1 if expects else value):
                raise Fault("more arrivals at an mbarrier than it counts")
            state.pending -= 1 if expects else int(value)
            state.bytes += int(value) if expects else 0
            state.settle()

    return change


def _wait(instruction: Instruction, machine) -> Callable:
    done, address, parity = instruction.operands[:3]
    target = machine.place(done, TYPES["pred"])
    register, offset = machine.address(address)
    parity = machine.place(parity, TYPES["u32"])

    def wait(run, mask):
        lanes = run.chosen(mask)
        addresses, wanted = run.addresses(register, offset, lanes), run.full(parity, TYPES["u32"])[lanes]
        result = np.zeros(run.lanes, bool)
        keys = (run.cta[lanes] << 32) | addresses
        for key in np.unique(keys):
            state = run.barriers.get((int(key) >> 32, int(key) & 0xFFFFFFFF))
            if state is None:
                raise Fault("waits for an mbarrier that was not initialised")
            here = keys == key
            # the phase of this parity is over when the current one has the other parity
            if (state.phase % 2 == wanted[here]).any():
                _arrived(run, state)
            result[lanes[here]] = state.phase % 2 != wanted[here]
        run.spins = 0 if result[lanes].any() else run.spins + 1
        if run.spins > SPINS:
            raise Fault("waits for an mbarrier that nothing completes")
        run.write(target, result, mask)

    return wait


def _arrived(run, state: Barrier) -> None:
    """Let the copies that owe this mbarrier bytes land."""
    for offsets, data in state.flying:
        run.shared[offsets[:, None] + np.arange(16)] = data
        if run.shared_watch is not None:
            run.shared_watch.land(offsets, 16)
            run.shared_watch.release(offsets, 16)
        state.bytes -= data.size
    state.flying.clear()
    state.settle()
