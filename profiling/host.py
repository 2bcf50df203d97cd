"""What a call costs the host: microseconds, launches, Python calls and PyTorch ops, beside PyTorch's own function.

With a GPU the calls run on it, and the queue is emptied between rounds, not between calls. Without one everything runs
as it would for one of sm_90, kernels compiled and all, but the driver that would launch them does nothing: tensors
are a CPU's, and results are whatever was in memory. PyTorch's functions then compute on the CPU, on shapes so small
that this hardly counts.

    python -m profiling host --op layer_norm --json host.json
"""

import argparse
import collections
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch

from profiling.outputs import check_folders, wide_console
from profiling.recording import recorded

ROUNDS, CALLS = 25, 40
PASSES = ("no gradients", "forward", "forward and backward")


@dataclasses.dataclass
class Call:
    """One way to call an op. `forward` is with gradients wanted; `torch_us` is PyTorch's own function's time."""

    op: str
    case: str
    what: str
    us: float
    torch_us: float
    launches: int
    python_calls: int | None  # None: not known
    aten_ops: dict[str, int]
    plans: int  # plans made and kernels looked up by Triton after the first call: 0


class StandIn:
    """Triton's driver of a GPU that is not there: it knows sm_90 and notes what it is told to launch."""

    def __init__(self):
        self.launched: list[tuple] | None = None
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
            load_binary=lambda name, *_: (name, name, 32, 0, 1024),
        )

    def launcher_cls(self, source, metadata) -> Callable:
        from triton.runtime import _allocation

        def launch(*arguments):
            if metadata.global_scratch_size:
                wanted = metadata.global_scratch_size * arguments[0] * arguments[1] * arguments[2]
                _allocation._allocator.get()(wanted, metadata.global_scratch_align, arguments[3])
            if self.launched is not None:
                self.launched.append(arguments)

        return launch

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def stand_in() -> StandIn:
    """Let kernels run on CPU tensors up to the driver's door, in this process and from now on."""
    import triton

    from kernels import device, op

    driver = StandIn()
    triton.runtime.driver.set_active(driver)
    device.why_not = lambda place: None
    op._pretended = device.TARGETS["sm_90"]
    return driver


def problem(op, device: torch.device, dtype: torch.dtype) -> tuple:
    """The op's first case that is not degenerate: (its name, tensors, options)."""
    case = next(case for case in op.cases if max(torch.Size(shape).numel() for shape in case.shapes.values()) > 256)
    return case.name, op.inputs(case, dtype, device), case.options


def ways(op, function: Callable, inputs: dict, options: dict) -> dict[str, Callable[[], object]]:
    """What is timed, by its name in PASSES."""
    leaves = {
        name: tensor.clone().requires_grad_() if name in op.differentiable else tensor
        for name, tensor in inputs.items()
    }
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]

    def forward():
        return function(**leaves, **options)

    def without():
        with torch.no_grad():
            return forward()

    if not wanted:
        return {PASSES[0]: without}
    outputs = forward()
    outputs = (outputs,) if torch.is_tensor(outputs) else outputs
    grads = [torch.ones_like(output) for output in outputs]

    def both():
        outputs = forward()
        torch.autograd.grad((outputs,) if torch.is_tensor(outputs) else outputs, wanted, grads)

    return dict(zip(PASSES, (without, forward, both), strict=True))


def microseconds(calls: list[Callable], rounds: int = ROUNDS) -> list[float]:
    """The median time of each, taken in turns."""
    times = [[] for _ in calls]
    for _ in range(rounds):
        for call, taken in zip(calls, times, strict=True):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(CALLS):
                call()
            taken.append((time.perf_counter() - began) / CALLS * 1e6)
    return [statistics.median(taken) for taken in times]


def python_calls(call: Callable, what: str, device: torch.device) -> int | None:
    """How many Python functions one call enters; None for backward on a GPU, which autograd runs on another thread."""
    if device.type == "cuda" and what == PASSES[2]:
        return None
    count = 0

    def note(frame, event, argument):
        nonlocal count
        count += event == "call"

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count - 1  # `call` itself


def aten_ops(calls: list[Callable]) -> list[dict[str, int]]:
    """How often each call runs each of PyTorch's ops, those that others run among them."""
    with recorded(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profiler:
        for place, call in enumerate(calls):
            with torch.profiler.record_function(f"call {place}"):
                call()
    events = profiler.events()
    found = []
    for place in range(len(calls)):
        span = next(event.time_range for event in events if event.name == f"call {place}")
        inside = (event.name for event in events if span.start <= event.time_range.start <= span.end)
        found.append(dict(collections.Counter(name for name in inside if name.startswith("aten::"))))
    return found


def measure(ops: list, device: torch.device, dtype: torch.dtype, rounds: int = ROUNDS) -> list[Call]:
    """Every way to call each op."""
    from triton.runtime.jit import JITFunction

    from kernels.op import _launches, count_launches

    found, calls = [], []
    for op in ops:
        case, inputs, options = problem(op, device, dtype)
        ours, theirs = ways(op, op.public, inputs, options), ways(op, op.torch, inputs, options)
        calls += [(op.name, case, what, call, theirs[what]) for what, call in ours.items()]
    for name, case, what, call, theirs in calls:
        call()  # plans, compiles
        before, looked_up, run = _launches.cache_info().misses, [], JITFunction.run
        JITFunction.run = lambda *a, looked_up=looked_up, run=run, **k: (looked_up.append(1), run(*a, **k))[1]
        try:
            with count_launches() as launches:
                call()
        finally:
            JITFunction.run = run
        us, torch_us = microseconds([call, theirs], rounds)
        found.append(
            Call(
                op=name,
                case=case,
                what=what,
                us=us,
                torch_us=torch_us,
                launches=sum(launches.values()),
                python_calls=python_calls(call, what, device),
                aten_ops={},
                plans=_launches.cache_info().misses - before + len(looked_up),
            )
        )
    for one, counts in zip(found, aten_ops([call for *_, call, _ in calls]), strict=True):
        one.aten_ops = counts
    return found


# ---------------------------------------------------------------- command


def add_to(commands) -> None:
    """Add `host` to a command line."""
    parser = commands.add_parser("host", help=__doc__.split("\n")[0], description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--op", nargs="+", action="extend", default=[], help="ops of the catalogue (default: all)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"rounds of {CALLS} calls (default: {ROUNDS})")
    parser.add_argument("--json", type=Path, help="write the table here as JSON, `-` for stdout instead of the table")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """The command."""
    gpu = torch.cuda.is_available()
    if os.environ.get("TRITON_INTERPRET") != "0":
        # kernels that are interpreted are launched in another way: start over without that
        os.environ["TRITON_INTERPRET"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "profiling", *sys.argv[1:]])
    from kernels import catalogue
    from minigpt.errors import UserError, writing

    ops = {op.name: op for op in catalogue.OPS}
    if unknown := [name for name in arguments.op if name not in ops]:
        raise UserError(f"unknown op {', '.join(unknown)}: choose from {', '.join(ops)}")
    if arguments.rounds < 1:
        raise UserError("--rounds must be 1 or more")
    check_folders(arguments.json)
    if not gpu:
        stand_in()
    torch.set_num_threads(1)
    device = torch.device("cuda" if gpu else "cpu")
    chosen = [ops[name] for name in arguments.op] or list(ops.values())
    calls = measure(chosen, device, torch.float32, arguments.rounds)
    import triton

    document = {
        "device": torch.cuda.get_device_name() if gpu else "none: launches do nothing",
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "calls": [dataclasses.asdict(call) for call in calls],
    }
    if arguments.json == Path("-"):
        json.dump(document, sys.stdout, indent=1)
        print()
        return 0
    _print(document)
    if arguments.json:
        with writing(arguments.json):
            arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


def _print(document: dict) -> None:
    from rich.table import Table

    caption = f"GPU: {document['device']}; " + ", ".join(" ".join(v) for v in document["versions"].items())
    view = Table(title="What a call costs the host", caption=caption)
    for name in ("op", "case", "pass"):
        view.add_column(name)
    for name in ("us", "PyTorch's us", "launches", "Python calls", "PyTorch ops"):
        view.add_column(name, justify="right")
    for call in document["calls"]:
        view.add_row(
            call["op"], call["case"], call["what"], f"{call['us']:.1f}", f"{call['torch_us']:.1f}",
            str(call["launches"]), "" if call["python_calls"] is None else str(call["python_calls"]),
            str(sum(call["aten_ops"].values())),
        )  # fmt: skip
    wide_console(140).print(view)
