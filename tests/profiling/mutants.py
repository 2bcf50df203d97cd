"""Compiled kernels with one barrier or wait taken out, each run in the emulator; prints JSON, needs TRITON_INTERPRET=0.

python tests/profiling/mutants.py sm_90 layer_norm gpt2
python tests/profiling/mutants.py sm_90 scaled_dot_product_attention longer 64 64 4 2 1 2 0 1

Numbers are a tile of attention's forward kernel, which then runs with one program for all.
"""

import dataclasses
import json
import sys

import torch

from kernels import catalogue, tiles
from kernels import op as op_module
from kernels.device import TARGETS
from kernels.op import Case
from profiling.emulator import driver
from profiling.emulator.machine import Machine
from profiling.emulator.memory import Fault, Global
from profiling.emulator.ptx import Instruction

NOTHING = Instruction(("membar", "cta"), ())
WAITS = (
    "bar.sync",
    "cp.async.wait_group",
    "wgmma.wait_group.sync.aligned",
    "mbarrier.try_wait",
    "mbarrier.arrive.shared",
)


def without(instruction: Instruction) -> Instruction:
    """What stands in its place: nothing, or for a wait that says whether it is over that it is."""
    if instruction.parts[:2] == ("mbarrier", "try_wait"):
        return Instruction(("mov", "pred"), (instruction.operands[0], 1))
    return NOTHING


class Recorded:
    """A launch that can be repeated: what its tensors held before, and what they should hold after."""

    def __init__(self, machine, grid, parameters, memory):
        self.machine, self.grid, self.parameters, self.regions = machine, grid, parameters, memory.regions
        self.before = self.contents()

    def contents(self) -> list:
        return [region.bytes[region.lead : region.lead + region.size].copy() for region in self.regions]

    def without(self, place: int | None) -> str:
        """What comes of the kernel without the instruction at this place."""
        for region, held in zip(self.regions, self.before, strict=True):
            region.bytes[region.lead : region.lead + region.size] = held
        program = self.machine.program
        instructions = [without(one) if number == place else one for number, one in enumerate(program.instructions)]
        mutant = Machine(
            dataclasses.replace(program, instructions=instructions), self.machine.threads, self.machine.shared_bytes
        )
        regions = [dataclasses.replace(region, watch=None) for region in self.regions]
        try:
            LAUNCH(mutant, self.grid, self.parameters, Global(regions, mutant.threads // 32 + 1))
        except Fault as fault:
            return str(fault)
        return "unnoticed" if all((a == b).all() for a, b in zip(self.contents(), self.after, strict=True)) else "wrong"


LAUNCH, REGION_OF = Machine.launch, driver.region_of
recorded: list[Recorded] = []
kept: list[torch.Tensor] = []


def launch(machine, grid, parameters, memory, *settings):
    recorded.append(Recorded(machine, grid, parameters, memory))
    counts = LAUNCH(machine, grid, parameters, memory, *settings)
    recorded[-1].after = recorded[-1].contents()
    return counts


def region_of(name, tensor):
    kept.append(tensor)  # its memory must be there when the launch is repeated
    return REGION_OF(name, tensor)


def main(arch: str, name: str, case: str, *numbers: str) -> None:
    Machine.launch, driver.region_of = launch, region_of
    driver.emulate(arch)
    if numbers:
        tiles.try_out("mutants", {"attention.forward": {"half/64": [int(number) for number in numbers]}})
        op_module._pretended = dataclasses.replace(TARGETS[arch], name="mutants", processors=1)
    op = next(op for op in catalogue.OPS if op.name == name)
    longer = Case("longer", dict.fromkeys(("query", "key", "value"), (1, 2, 300, 64)), {"is_causal": True})
    case = next(one for one in (*op.cases, longer) if one.name == case)
    inputs = op.inputs(case, torch.float16, "cpu")
    op.public(**inputs, **case.options)
    found = []
    for one in recorded:
        program = one.machine.program
        assert one.without(None) == "unnoticed"
        waits = [place for place, step in enumerate(program.instructions) if step.name.startswith(WAITS)]
        outcomes = [(program.instructions[place].name, one.without(place)) for place in waits]
        found.append({"kernel": program.name, "outcomes": outcomes})
    json.dump(found, sys.stdout)


main(*sys.argv[1:])
