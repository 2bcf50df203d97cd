"""What goes on beside the threads: cp.async's copies, and the mbarriers that say how far others are.

What a copy brings is in shared memory when somebody has waited for it, and no sooner: the latest that the ISA allows,
so that a wait that is missing shows. Until then whoever reads the place or writes to it is at fault.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from profiling.emulator import tma
from profiling.emulator.conversions import TYPES
from profiling.emulator.memory import UNWRITTEN, Apart, Fault, grains_of
from profiling.emulator.ptx import Instruction, Unsupported


class Groups:
    """What threads have begun and not waited for, by groups that each thread counts for itself.

    `finish(run, lanes, *arrays)` is what waiting for it does.
    """

    def __init__(self, run, finish: Callable):
        self.run, self.finish, self.committed, self.begun = run, finish, np.zeros(run.lanes, np.int64), []

    def add(self, lanes: np.ndarray, *arrays: np.ndarray) -> None:
        """Begin something of these lanes; the arrays have an entry for each."""
        self.begun.append((self.committed[lanes], lanes, *arrays))

    def commit(self, mask: np.ndarray | None) -> None:
        """Close the group that is open."""
        self.committed += 1 if mask is None else mask

    def wait(self, mask: np.ndarray | None, allowed: int) -> None:
        """Finish, in order, what is not in the last `allowed` groups that these threads closed."""
        kept = []
        for group, lanes, *arrays in self.begun:
            over = self.committed[lanes] - group > allowed
            if mask is not None:
                over &= mask[lanes]
            if over.any():
                self.finish(self.run, lanes[over], *[array[over] for array in arrays])
            if not over.all():
                kept.append(tuple(array[~over] for array in (group, lanes, *arrays)))
        self.begun = kept


# ---------------------------------------------------------------- cp.async


def copy(instruction: Instruction, machine) -> Callable:
    """cp.async of 4 to 16 bytes a thread, its groups, and cp.async.bulk.tensor."""
    parts = instruction.parts
    if parts[:3] == ("cp", "async", "bulk"):
        return (
            tma.tile(instruction, machine) if parts[3] == "tensor" else lambda run, mask: None
        )  # loads need no groups
    if parts[:3] == ("cp", "async", "commit_group"):
        return lambda run, mask: run.copies.commit(mask)
    if parts[:3] in (("cp", "async", "wait_group"), ("cp", "async", "wait_all")):
        allowed = instruction.operands[0] if instruction.operands else -1
        return lambda run, mask: run.copies.wait(mask, allowed)
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
        run.put(None, offsets, np.full_like(data, UNWRITTEN), lanes)
        if run.shared_watch is not None:
            run.shared_watch.begin(offsets, width)
        run.copies.add(lanes, offsets, data)

    return begin


def landed(run, lanes, offsets, data) -> None:
    """cp.async's copies that were waited for: written now."""
    if run.shared_watch is not None:
        run.shared_watch.land(offsets, data.shape[1])
    run.put(None, offsets, data, lanes)


def multiplied(run, lanes, offsets, serials) -> None:
    """wgmma's products that were waited for: until now they may have read what they read. Raises Fault."""
    if run.shared_watch is None:
        return
    if run.shared_watch.rewritten_since(grains_of(offsets, 2), serials):
        raise Fault("shared memory was written while a product that had not been waited for could read it")
    for warp in range(4):  # each has multiplied its rows by all of the second operand
        run.note_reads(None, offsets, 2, lanes + 32 * warp)


# ---------------------------------------------------------------- mbarriers


@dataclass
class Barrier:
    """An mbarrier: arrivals that its phase still needs, bytes that copies still owe it, and those copies.

    `told` is what those who came know (see order.py), `known` what those learn who wait for the phases that are over.
    """

    count: int
    pending: int
    told: np.ndarray
    bytes: int = 0
    phase: int = 0
    flying: list = field(default_factory=list)
    known: np.ndarray | None = None

    def settle(self) -> None:
        """End the phase if nothing is missing."""
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending, self.known = self.phase + 1, self.count, self.told.copy()


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
                run.barriers[key] = Barrier(int(value), int(value), np.zeros(run.warps + 1, np.int64))
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
            np.maximum(state.told, run.order.tell(run.warp[lane]), out=state.told)
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
        missing = np.zeros(run.lanes, bool)
        keys = (run.cta[lanes] << 32) | addresses
        for key in np.unique(keys):
            state = run.barriers.get((int(key) >> 32, int(key) & 0xFFFFFFFF))
            if state is None:
                raise Fault("waits for an mbarrier that was not initialised")
            here = keys == key
            # the phase of this parity is over when the current one has the other parity
            if (state.phase % 2 == wanted[here]).any():
                _arrived(run, state, int(key) >> 32)
            over = state.phase % 2 != wanted[here]
            missing[lanes[here][~over]] = True
            if state.known is not None:
                for warp in np.unique(run.warp[lanes[here][over]]):
                    run.order.learn(warp, state.known)
        run.write(target, ~missing, mask)
        if missing.any():
            raise Apart("waits for an mbarrier that nothing completes", missing)

    return wait


def _arrived(run, state: Barrier, program: int) -> None:
    """Let the copies that owe this mbarrier bytes land."""
    for offsets, data in state.flying:
        run.shared[offsets[:, None] + np.arange(16)] = data
        run.order.landed[program] += 1
        state.told[-1] = run.order.landed[program]
        if run.shared_watch is not None:
            run.shared_watch.delivered(offsets, 16, run.order.landed[program])
        state.bytes -= data.size
    state.flying.clear()
    state.settle()
