"""A processor made of NumPy: runs PTX on the CPU, all threads of several programs at once.

A register is an array with an element a thread, or with one element if all threads have the same. Of the threads that
are not at the same instruction those at the earliest run first, so that they meet again where the code does; at a
barrier, or what is one for a warp, those who are there wait for who may still come, at an mbarrier for its phase's end.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from profiling.emulator import arithmetic, instructions
from profiling.emulator.conversions import TYPES
from profiling.emulator.execution import SPECIAL, Run, low
from profiling.emulator.memory import Global
from profiling.emulator.ptx import Address, Instruction, Program, Unsupported

LANES = 4096
"""Threads that run at once: programs are taken together up to so many."""


@dataclasses.dataclass
class Counts:
    """What the warps of a launch executed, by place in the program.

    `warps` counts instructions, once a warp. `bytes` are asked for and `sectors`, of 32 bytes, are moved for them by
    global accesses; shared ones take `passes`, `conflicts` of them beyond what their width asks for. `programs` ran,
    of `grid`.
    """

    warps: np.ndarray
    programs: int
    grid: int
    bytes: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    sectors: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    passes: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    conflicts: collections.Counter = dataclasses.field(default_factory=collections.Counter)


class Machine:
    """One program of PTX, ready to run."""

    def __init__(self, program: Program, threads: int, shared: int):
        self.program, self.threads = program, threads
        self.shared_bytes = max(shared, program.static_shared)
        self.numbers: dict[str, int] = {}
        self.constants: list[tuple[int, np.ndarray]] = []
        self.steps = [self._step(instruction) for instruction in program.instructions]
        self.barriers = np.full(len(self.steps) + 1, -1)  # the name of the one at each place
        for place, instruction in enumerate(program.instructions):
            if instruction.parts[0] in ("bar", "barrier") and instruction.parts[1] == "sync":
                self.barriers[place], _ = instructions.named_barrier(instruction, self)

    # ------------------------------------------------------------ from instructions to functions

    def place(self, operand, dtype: np.dtype) -> int:
        """The number of the register that holds `operand`; a constant gets one of its own."""
        if isinstance(operand, str) and operand.startswith("%") and not operand.startswith(SPECIAL):
            return self.numbers.setdefault(operand, len(self.numbers))
        if isinstance(operand, str) and operand in self.program.symbols:
            operand = self.program.symbols[operand]
        if isinstance(operand, str) and not operand.startswith("%"):
            raise Unsupported(f"operand {operand}")
        key = f"{operand!r} {dtype}"
        if key not in self.numbers:
            self.numbers[key] = len(self.numbers)
            if not isinstance(operand, str):
                self.constants.append((self.numbers[key], _constant(operand, dtype)))
        return self.numbers[key]

    def address(self, address: Address) -> tuple[int, int]:
        """(the register of its base, its offset)."""
        return self.place(address.base, TYPES["u64"] if isinstance(address.base, int) else TYPES["b32"]), address.offset

    def _step(self, instruction: Instruction) -> tuple:
        """(guard's register or None, what the guard must be, a function of (run, mask))."""
        guard = self.place(instruction.guard, TYPES["pred"]) if instruction.guard else None
        special = instructions.special(instruction, self)
        return guard, not instruction.negated, special or self._computed(instruction)

    def _computed(self, instruction: Instruction) -> Callable:
        found = arithmetic.function_of(instruction.parts)
        two_results = any("|" in str(operand) for operand in instruction.operands)
        if found is None or two_results or any(isinstance(one, tuple | Address) for one in instruction.operands):
            raise Unsupported(instruction.where)
        function, types = found
        target = self.place(instruction.operands[0], types[0])
        sources = []
        for number, operand in enumerate(instruction.operands[1:]):
            dtype = types[min(number, len(types) - 1)]
            sources.append((self.place(operand, dtype), dtype))
        if len(sources) == 1:
            ((a, a_type),) = sources
            if instruction.parts[0] == "cvt":  # may read the low part of a wider register
                return lambda run, mask: run.write(target, function(low(run.R[a], a_type)), mask)
            return lambda run, mask: run.write(target, function(run.R[a].view(a_type)), mask)
        if len(sources) == 2:
            (a, a_type), (b, b_type) = sources
            return lambda run, mask: run.write(target, function(run.R[a].view(a_type), run.R[b].view(b_type)), mask)
        return lambda run, mask: run.write(target, function(*[run.R[s].view(t) for s, t in sources]), mask)

    # ------------------------------------------------------------ running

    def launch(
        self,
        grid: Sequence[int],
        parameters: Sequence,
        memory: Global,
        watched: bool = True,
        measured: bool = False,
        some: int = 0,
        order: int | None = None,
    ) -> Counts:
        """Run every program of the grid, or `some`, evenly spaced. `order` is the seed of a random order of warps.

        Raises Fault, which names the instruction.
        """
        grid = tuple(grid) + (1,) * (3 - len(grid))
        total, together = grid[0] * grid[1] * grid[2], max(1, LANES // self.threads)
        chosen = np.unique(np.linspace(0, total - 1, some).astype(int)) if 0 < some < total else np.arange(total)
        counts = Counts(np.zeros(len(self.steps), np.int64), len(chosen), total)
        for first in range(0, len(chosen), together):
            programs = chosen[first : first + together]
            random = None if order is None else np.random.default_rng(order)
            Run(self, programs, grid, parameters, memory, counts, watched, measured, random).go()
        return counts


def _constant(operand, dtype: np.dtype) -> np.ndarray:
    if isinstance(operand, np.floating):
        return np.array([operand])
    if dtype.kind == "b":
        return np.array([bool(operand)])
    if dtype.kind == "f":  # an integer given to an instruction of floating point is bits
        return np.array([operand & (1 << 8 * dtype.itemsize) - 1], f"u{dtype.itemsize}").view(dtype)
    bits = operand & (1 << 8 * dtype.itemsize) - 1
    return np.array([bits], f"u{dtype.itemsize}").view(dtype)
