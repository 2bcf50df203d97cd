"""Instructions that are more than arithmetic: control, shuffles, loads and stores.

Each maker takes an Instruction and the Machine, and returns a function of (run, mask): the Run, and which of its lanes
execute, None for all. What that returns is where those go next, None for the next instruction.
"""

import re
from collections.abc import Callable

import numpy as np

from profiling.emulator import asynchronous, matrix, tma
from profiling.emulator.conversions import TYPES
from profiling.emulator.execution import DONE, WARP
from profiling.emulator.memory import Fault
from profiling.emulator.ptx import Instruction, Unsupported

_SIZES = {"%rs": 2, "%h": 2, "%r": 4, "%f": 4, "%rd": 8, "%fd": 8}  # bytes of a register, by its name


def special(instruction: Instruction, machine) -> Callable | None:
    """The function of an instruction that is no arithmetic; None for one that is."""
    parts, operands = instruction.parts, instruction.operands
    verb = parts[0]
    if maker := _MAKERS.get(verb):
        return maker(instruction, machine)
    if verb == "mov" and any(isinstance(operand, tuple) for operand in operands):
        return _packed(instruction, machine)
    return None


def _branch(instruction, machine):
    place = machine.program.labels.get(instruction.operands[0])
    if place is None:
        raise Unsupported(instruction.where)
    return lambda run, mask: place


def _branch_by_number(instruction, machine):
    """brx.idx: to the label of that number in a list."""
    register, names = instruction.operands
    number = machine.place(register, TYPES["u32"])
    places = np.array([machine.program.labels[name] for name in machine.program.targets[names]])

    def branch(run, mask):
        chosen = run.full(number, TYPES["u32"])
        if (chosen[run.chosen(mask)] >= len(places)).any():
            raise Fault(f"a branch to the label of number {chosen.max()} of {len(places)}")
        return places[np.minimum(chosen, len(places) - 1)]

    return branch


def _return(instruction, machine):
    return lambda run, mask: DONE


def _nothing(instruction, machine):
    return lambda run, mask: None


def _barrier(instruction, machine):
    if instruction.parts[1] == "warp":

        def warp(run, mask):
            run.whole_warps(mask)

        return warp
    name, threads = named_barrier(instruction, machine)
    return lambda run, mask: run.barrier(mask, name, threads)


def named_barrier(instruction, machine) -> tuple[int, int]:
    """(its name, the threads that it is for)."""
    name, *threads = instruction.operands
    if instruction.parts[1] != "sync" or not all(isinstance(one, int) for one in (name, *threads)):
        raise Unsupported(instruction.where)
    return name, threads[0] if threads else machine.threads


def _packed(instruction, machine):
    """mov between one register and the several that its bits make."""
    to, source = instruction.operands
    whole = TYPES[instruction.parts[-1]]
    if isinstance(to, tuple):
        part = np.dtype(f"u{whole.itemsize // len(to)}")
        targets = [machine.place(register, part) if register != "_" else None for register in to]
        number = machine.place(source, whole)

        def unpack(run, mask):
            value = np.ascontiguousarray(run.R[number]).view(part).reshape(-1, len(targets))
            for column, target in enumerate(targets):
                if target is not None:
                    run.write(target, value[:, column].copy(), mask)

        return unpack
    part = np.dtype(f"u{whole.itemsize // len(source)}")
    sources, target = [machine.place(register, part) for register in source], machine.place(to, whole)
    # LLVM packs a number that it uses beside one that nobody wrote and nobody reads; NaN, if somebody does
    unwritten = np.full(1, -1).astype(part)

    def pack(run, mask):
        registers = [run.R[number] for number in sources]
        columns = np.broadcast_arrays(*[unwritten if one is None else one.view(part) for one in registers])
        run.write(target, np.stack(columns, 1).view(f"u{whole.itemsize}")[:, 0], mask)

    return pack


def _shuffle(instruction, machine):
    how = instruction.parts[2]
    target, *rest = instruction.operands
    if isinstance(target, tuple) or "|" in str(target):
        raise Unsupported(instruction.where)
    number = machine.place(target, TYPES["b32"])
    source, by, clamp, _ = (machine.place(operand, TYPES["u32"]) for operand in rest)

    def shuffle(run, mask):
        run.whole_warps(mask)
        lane = np.arange(run.lanes) % WARP
        distance = run.full(by, TYPES["u32"]).astype(np.int64) & 31
        control = run.full(clamp, TYPES["u32"]).astype(np.int64)
        segment, last = control >> 8 & 31, control & 31
        lowest = lane & segment
        highest = lowest | (last & ~segment)
        wanted = {"bfly": lane ^ distance, "idx": lowest | (distance & ~segment), "up": lane - distance,
                  "down": lane + distance}[how]  # fmt: skip
        inside = wanted >= highest if how == "up" else wanted <= highest
        taken = np.arange(run.lanes) // WARP * WARP + np.where(inside, wanted, lane)
        run.write(number, run.full(source, TYPES["b32"])[taken], mask)

    return shuffle


def _elected(instruction, machine):
    """elect.sync: the first lane of each warp."""
    chosen = machine.place(instruction.operands[0].split("|")[1], TYPES["pred"])
    leader = machine.place(instruction.operands[0].split("|")[0], TYPES["b32"])

    def elect(run, mask):
        run.whole_warps(mask)
        run.write(leader, np.zeros(1, np.uint32), mask)
        run.write(chosen, np.arange(run.lanes) % WARP == 0, mask)

    return elect


def _space(instruction: Instruction) -> str:
    for part in instruction.parts:
        if part == "local":
            raise Unsupported(instruction.where)
        if part in ("global", "param"):
            return part
        if part.startswith("shared"):
            return "shared"
    return "global"


def _width(parts: tuple[str, ...]) -> tuple[int, np.dtype]:
    count = next((int(part[1:]) for part in parts if part in ("v2", "v4", "v8")), 1)
    return count, TYPES[parts[-1]]


def _load(instruction, machine):
    to, address = instruction.operands[:2]
    count, dtype = _width(instruction.parts)
    unsigned = np.dtype(f"u{dtype.itemsize}")
    targets = [machine.place(register, unsigned) for register in (to if isinstance(to, tuple) else (to,))]
    space = _space(instruction)
    size = _SIZES.get(re.match(r"%[a-z]*", str(to[0] if isinstance(to, tuple) else to)).group(), dtype.itemsize)

    def widened(value):
        """What is narrower than its register fills it, by its sign if it has one."""
        return value.astype(f"{dtype.kind}{size}") if size > dtype.itemsize and dtype.kind in "iu" else value

    if space == "param":
        ((number,), name) = targets, address.base
        kinds = dict(machine.program.parameters)
        floating = kinds[name].startswith("f")

        def read(run, mask):
            value = run.parameters[name]
            if floating:
                array = np.array([value], TYPES[kinds[name]])
            else:
                bits = int(value) & (1 << 8 * dtype.itemsize) - 1
                array = widened(np.array([bits], unsigned).view(dtype))
            run.write(number, array, mask)

        return read
    register, offset = machine.address(address)
    width = count * dtype.itemsize

    def load(run, mask):
        lanes = run.chosen(mask)
        if len(lanes) == 0:
            return
        addresses = run.addresses(register, offset, lanes)
        run.measure(space, addresses, width, lanes)
        data = np.ascontiguousarray(run.load(space, addresses, width, lanes)).view(dtype)
        for column, number in enumerate(targets):
            value = widened(data[:, column])
            if mask is not None:
                whole = np.zeros(run.lanes, value.dtype)
                whole[lanes] = value
                value = whole
            run.write(number, np.ascontiguousarray(value), mask)

    return load


def _store(instruction, machine):
    address, value = instruction.operands[:2]
    _, dtype = _width(instruction.parts)
    unsigned = np.dtype(f"u{dtype.itemsize}")
    sources = [machine.place(register, unsigned) for register in (value if isinstance(value, tuple) else (value,))]
    register, offset = machine.address(address)
    space = _space(instruction)

    def store(run, mask):
        lanes = run.chosen(mask)
        if len(lanes) == 0:
            return
        addresses = run.addresses(register, offset, lanes)
        data = np.stack([run.full(number, unsigned)[lanes] for number in sources], 1).view(np.uint8)
        run.measure(space, addresses, data.shape[1], lanes)
        run.store(space, addresses, data, lanes)

    return store


_MAKERS = {
    "bra": _branch, "brx": _branch_by_number, "ret": _return, "exit": _return, "bar": _barrier, "barrier": _barrier,
    "fence": _nothing, "membar": _nothing, "setmaxnreg": _nothing, "shfl": _shuffle, "elect": _elected, "ld": _load,
    "st": _store, "cp": asynchronous.copy, "mbarrier": asynchronous.mbarrier, "tensormap": tma.tensormap,
    "mma": matrix.mma, "ldmatrix": matrix.ldmatrix, "stmatrix": matrix.stmatrix, "wgmma": matrix.wgmma,
}  # fmt: skip
