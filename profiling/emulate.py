"""Compiled kernels run without a GPU, every address checked, and what their warps execute and move counted.

The PTX that Triton compiles for the target runs in an emulator (profiling/emulator): wrong addresses, misaligned ones,
races in shared and global memory, and barriers that not everyone reaches stop it with the line of the source. Results
of whole problems are held to the reference in float64, beside PyTorch's own. Sizes too large for that run a few of
their programs, for the counts alone.

    python -m profiling emulate --op layer_norm --dtype bfloat16
    python -m profiling emulate --op scaled_dot_product_attention --case gpt2 --programs 16 --lines 10
    python -m profiling emulate --case one_over_a_tile --tile attention.forward half/64 64 64 4 2 1 2 1 1
"""

import argparse
import collections
import contextlib
import dataclasses
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from profiling.compile import why_not_compiled
from profiling.emulator.driver import ARCHS
from profiling.limits import PEAKS, PRODUCTS
from profiling.outputs import check_folders, wide_console
from profiling.resources import add_tile_to, trial_of

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
KINDS = {  # what an instruction begins with -> its kind in the table
    "products": ("mma", "wgmma.mma_async"), "exp2": ("ex2",), "shuffles": ("shfl",), "barriers": ("bar.sync",),
}  # fmt: skip


PRODUCTS_OF = {arch: PEAKS[arch].product for arch in ARCHS} | {"sm_90": "H200 SXM"}


def summary(name: str, machine, counts, arch: str) -> dict[str, Any]:
    """One launch: instructions a warp, by kind too; bytes asked for and moved a program; passes of shared memory.

    And for the whole grid, at published peaks, the microseconds that issuing its instructions and moving what it asks
    for take at least; PTX instructions for those that ptxas makes of them.
    """
    instructions = machine.program.instructions
    warps = counts.programs * machine.threads // 32
    executed = {
        kind: int(sum(n for one, n in zip(instructions, counts.warps, strict=True) if one.name.startswith(begins)))
        for kind, begins in KINDS.items()
    }
    asked, moved = sum(counts.bytes.values()), 32 * sum(counts.sectors.values())
    peaks, grids = PRODUCTS[PRODUCTS_OF[arch]], counts.grid / counts.programs
    return {
        "kernel": name,
        "programs": counts.programs,
        "of": counts.grid,
        "warps": machine.threads // 32,
        "instructions": round(int(counts.warps.sum()) / warps),
        **{kind: round(number / warps, 1) for kind, number in executed.items()},
        "bytes": asked // counts.programs,
        "moved": moved // counts.programs,
        "passes": sum(counts.passes.values()) // counts.programs,
        "conflicts": sum(counts.conflicts.values()) // counts.programs,
        "issue_us": int(counts.warps.sum()) * grids / peaks.issued / 1e3,
        "move_us": asked * grids / peaks.bandwidth / 1e3,
        "lines": _by_line(machine, counts),
    }


def _by_line(machine, counts) -> dict[str, dict[str, int]]:
    """By line of the source: warps' instructions, bytes asked for and moved, passes and conflicts, of all programs."""
    lines: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for place, instruction in enumerate(machine.program.instructions):
        line = lines[instruction.line or "?"]
        line["instructions"] += int(counts.warps[place])
        line["bytes"] += counts.bytes[place]
        line["moved"] += 32 * counts.sectors[place]
        line["passes"] += counts.passes[place]
        line["conflicts"] += counts.conflicts[place]
    return {name: dict(line) for name, line in lines.items() if line["instructions"]}


def call(op, function, inputs: dict, options: dict, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Outputs and, of what is differentiable, gradients.

    The incoming ones are drawn from N(0, 1) and rounded to `dtype`, the same every time.
    """
    leaves = {name: one.detach().requires_grad_(name in op.differentiable) for name, one in inputs.items()}
    outputs = function(**leaves, **options)
    outputs = (outputs,) if torch.is_tensor(outputs) else tuple(outputs)
    wanted = [leaves[name] for name in inputs if name in op.differentiable]
    if not wanted:
        return outputs
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(output.shape, generator=generator).to(dtype).to(output.dtype) for output in outputs]
    return (*(output.detach() for output in outputs), *torch.autograd.grad(outputs, wanted, grads))


LUCK = 4.0
"""A largest error may be so many times what the contract allows: on small problems it is a matter of luck."""


def errors(
    op, case, inputs: dict, ours: tuple[torch.Tensor, ...], dtype: torch.dtype
) -> tuple[float, float | None, float]:
    """(our largest error, PyTorch's, ours by what the numerics contract allows), the worst of outputs and gradients.

    Errors are in units of the truth's RMS. None for PyTorch's where it has no such option; the contract then takes that
    of plain arithmetic.
    """
    exact = {name: one.double() if one.is_floating_point() else one for name, one in inputs.items()}
    truth = call(op, op.reference, exact, case.options, dtype)

    def each(results) -> list[float]:
        found = []
        for result, right in zip(results, truth, strict=True):
            scale = right.square().mean().sqrt().item() if right.numel() else 0.0
            found.append((result.double() - right).abs().max().item() / scale if scale else 0.0)
        return found

    known = "query_offset" not in case.options
    peers = each(call(op, op.torch if known else op.reference, inputs, case.options, dtype))
    found = each(ours)
    ratios = [mine / (2 * peer + torch.finfo(dtype).eps) for mine, peer in zip(found, peers, strict=True)]
    # PyTorch's maximum: of NaN and a number it is NaN, Python's is whichever comes first
    largest, of_peers, ratio = (torch.tensor(numbers).max().item() for numbers in (found, peers, ratios))
    return largest, of_peers if known else None, ratio


def measure(driver, op, case, dtype: torch.dtype, whole: bool) -> dict[str, Any]:
    """One problem, emulated; with `whole`, every program, and the result held to the reference."""
    inputs = op.inputs(case, dtype, "cpu")
    inputs = {name: one.to(dtype) if one.is_floating_point() else one for name, one in inputs.items()}
    driver.launched.clear()
    ours = call(op, op.public, inputs, case.options, dtype)
    found = {
        "op": op.name,
        "case": case.name,
        "dtype": str(dtype).removeprefix("torch."),
        "launches": [summary(*launched, driver.arch) for launched in driver.launched],
    }
    if whole:
        found["error"], found["torch_error"], found["ratio"] = errors(op, case, inputs, ours, dtype)
        found["wrong"] = not found["ratio"] <= LUCK
    return found


# ---------------------------------------------------------------- command


def add_to(commands) -> None:
    """Add `emulate` to a command line."""
    parser = commands.add_parser("emulate", help=__doc__.split("\n")[0], description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--op", nargs="+", action="extend", default=[], help="ops of the catalogue (default: all)")
    parser.add_argument("--case", nargs="+", action="extend", default=[], help="only the cases of these names")
    parser.add_argument("--arch", default="sm_90", choices=ARCHS, help="the GPU to emulate (default: sm_90)")
    parser.add_argument("--dtype", nargs="+", action="extend", choices=list(DTYPES), help="default: bfloat16")
    add_tile_to(parser)
    parser.add_argument(
        "--programs", type=int, default=0,
        help="take the real sizes, and run so many programs of each launch (default: the tests' cases, whole)",
    )  # fmt: skip
    parser.add_argument(
        "--order", type=int, metavar="SEED", help="let chance choose which warps run, at every instruction"
    )
    parser.add_argument("--lines", type=int, default=0, help="show so many lines of the source that move the most")
    parser.add_argument("--json", type=Path, help="write all counts here, `-` for stdout instead of the table")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """The command."""
    if os.environ.get("TRITON_INTERPRET") != "0":
        # kernels that are interpreted are not compiled: start over without that
        os.environ["TRITON_INTERPRET"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "profiling", *sys.argv[1:]])
    from kernels import catalogue, device
    from kernels.op import plan_for
    from minigpt.errors import UserError, writing
    from profiling.emulator.driver import emulate
    from profiling.emulator.memory import Fault
    from profiling.emulator.ptx import Unsupported

    if not device.HAS_TRITON:
        raise UserError("Triton compiles the kernels, and is not installed: `pip install triton` (Linux only)")
    from triton.errors import TritonError

    ops = {op.name: op for op in catalogue.OPS}
    if unknown := [name for name in arguments.op if name not in ops]:
        raise UserError(f"unknown op {', '.join(unknown)}: choose from {', '.join(ops)}")
    if min(arguments.programs, arguments.lines, arguments.order or 0) < 0:
        raise UserError("--programs, --lines and --order must be 0 or more")
    check_folders(arguments.json)
    which = "sizes" if arguments.programs else "cases"
    asked = [ops[name] for name in arguments.op] or list(ops.values())
    chosen = [
        (op, case) for op in asked for case in getattr(op, which) if not arguments.case or case.name in arguments.case
    ]
    if not chosen:
        there = dict.fromkeys(case.name for op in asked for case in getattr(op, which))
        more = "" if arguments.programs else "; --programs takes the real sizes"
        raise UserError(f"no case {', '.join(arguments.case)} of these ops: there are {', '.join(there)}{more}")
    torch.set_num_threads(1)
    dtypes = arguments.dtype or ["bfloat16"]
    base = device.TARGETS[arguments.arch]
    base = dataclasses.replace(base, name=trial_of(arguments.tile, chosen, dtypes, [arguments.arch]))
    driver = emulate(arguments.arch, measured=True, some=arguments.programs, order=arguments.order)
    problems, faults = [], 0
    for op, case in chosen:
        for dtype in dtypes:
            try:
                # where ptxas fails, Triton prints the PTX
                with plan_for(base), contextlib.redirect_stdout(io.StringIO()):
                    problems.append(measure(driver, op, case, DTYPES[dtype], not arguments.programs))
            except (Fault, Unsupported, TritonError) as fault:
                faults += 1
                why = why_not_compiled(fault) if isinstance(fault, TritonError) else str(fault)
                problems.append({"op": op.name, "case": case.name, "dtype": dtype, "launches": [], "fault": why})
    import triton

    document = {
        "arch": arguments.arch,
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "problems": problems,
    }
    if arguments.lines:
        document["lines"] = _heaviest(problems, arguments.lines)
    faults += sum(problem.get("wrong", False) for problem in problems)
    if arguments.json == Path("-"):
        json.dump(document, sys.stdout, indent=1)
        print()
        return int(faults > 0)
    _print(document)
    if arguments.json:
        with writing(arguments.json):
            arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    return int(faults > 0)


def _heaviest(problems: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The lines of the source that move the most, heaviest first; 128 bytes of shared memory a pass."""
    lines = [
        {key: problem[key] for key in ("op", "case", "dtype")} | {"kernel": one["kernel"], "line": name} | line
        for problem in problems
        for one in problem["launches"]
        for name, line in one["lines"].items()
    ]
    return sorted(lines, key=lambda line: -(line["moved"] + 128 * line["passes"]))[:count]


def _print(document: dict[str, Any]) -> None:
    from rich.table import Table

    console = wide_console(260)
    versions = ", ".join(" ".join(version) for version in document["versions"].items())
    view = Table(title=f"Compiled for {document['arch']} and emulated", caption=versions)
    for name in ("op", "case", "dtype", "kernel"):
        view.add_column(name, no_wrap=True)
    for name in (
        "programs", "warps", "instructions a warp", *KINDS, "bytes a program", "of moved", "shared passes", "conflicts",
        "us to issue", "us to move", "error", "PyTorch's",
    ):  # fmt: skip
        view.add_column(name, justify="right")
    for problem in document["problems"]:
        head = (problem["op"], problem["case"], problem["dtype"])
        if "fault" in problem:
            view.add_row(*head, "stopped", style="red")
        for place, one in enumerate(problem["launches"]):
            programs = f"{one['programs']} of {one['of']}" if one["programs"] < one["of"] else str(one["of"])
            numbers = [f"{one[kind]:g}" for kind in KINDS]
            share = f"{one['bytes'] / one['moved']:.0%}" if one["moved"] else ""
            last = place == len(problem["launches"]) - 1 and "error" in problem
            errors = [problem[name] for name in ("error", "torch_error")] if last else []
            errors = ["" if error is None else f"{error:.1e}" for error in errors]
            view.add_row(
                *head, one["kernel"], programs, str(one["warps"]), str(one["instructions"]), *numbers,
                f"{one['bytes']:,}", share, f"{one['passes']:,}", f"{one['conflicts']:,}",
                f"{one['issue_us']:.1f}", f"{one['move_us']:.1f}", *errors,
            )  # fmt: skip
    console.print(view)
    for problem in document["problems"]:
        head = f"{problem['op']}, {problem['case']}, {problem['dtype']}"
        if "fault" in problem:
            print(f"stopped: {head}: {problem['fault']}")
        if problem.get("wrong"):
            print(f"wrong: {head}: its error is {problem['ratio']:.1f} times what the numerics contract allows")
    if "lines" in document:
        console.print(_line_table(document["lines"]))


def _line_table(lines: list[dict[str, Any]]):
    from rich.table import Table

    view = Table(title="Lines of the source that move the most, of all programs that ran")
    for name in ("kernel", "line"):
        view.add_column(name, overflow="fold")
    for name in ("instructions", "bytes", "of moved", "shared passes", "conflicts"):
        view.add_column(name, justify="right")
    for line in lines:
        share = f"{line['bytes'] / line['moved']:.0%}" if line["moved"] else ""
        view.add_row(
            line["kernel"], line["line"], f"{line['instructions']:,}", f"{line['bytes']:,}", share,
            f"{line['passes']:,}", f"{line['conflicts']:,}",
        )  # fmt: skip
    return view
