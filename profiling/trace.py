"""Where the time of training steps goes: a trace by PyTorch's profiler, and tables of it.

Writes DIR/trace.json (open it in https://ui.perfetto.dev or chrome://tracing) and DIR/trace-summary.json, and prints
the ops with the most time, the share of each group of ops, the launches a step, and on a GPU how long it was idle.
A profiled step is slower than one that is not: shares mean something here, speeds do not.

    python -m profiling trace --preset shakespeare-cpu --kernels torch --steps 3 --out traces/torch
"""

import argparse
import collections
import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from profiling.outputs import wide_console

GROUPS = (
    (
        "attention",
        # cuDNN's are `cudnn_generated_..._sdpa_...`, `compute_dot_do_o_specialized` and `convert_dq_to_16bits`
        ("attention", "scaled_dot_product", "flash", "fmha", "sdpa", "dot_do_o", "convert_dq", "_decode_"),
    ),
    ("layer norm", ("layer_norm", "layernorm", "gammabeta", "rowwisemoments")),
    ("loss", ("cross_entropy", "log_softmax", "nll_loss", "softmax")),
    ("optimizer", ("adam", "foreach", "multi_tensor", "vector_norm")),
    (
        "matrix products",
        ("gemm", "::mm", "::bmm", "::addmm", "matmul", "linear_pointwise", "cutlass", "cublas", "nvjet", "xmma",
         "splitk"),
    ),
    ("GELU", ("gelu", "sigmoid")),
    (
        "embedding",
        ("embedding", "index_select", "indexselect", "vectorized_gather", "compute_grad_weight", "sum_and_scatter"),
    ),
    ("dropout", ("dropout", "bernoulli", "masked_scale")),
    ("copies and casts", ("copy", "memcpy", "memset", "cat", "stack", "clone", "_to_copy", "fill_", "zero_")),
)  # fmt: skip
"""Groups of ops and the parts of names that belong to each; the first that fits counts, `other` is the rest."""


@dataclasses.dataclass(frozen=True)
class Span:
    """Work on the device that a step waits for: a CUDA kernel or, on a CPU, an op without the ops inside it. ns."""

    name: str
    start: int
    duration: int
    calls: int = 1


def add_to(commands) -> None:
    """Add `trace` to a command line."""
    parser = commands.add_parser("trace", help=__doc__.split("\n")[0], description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--preset", help="the model (default: gpt2 on a GPU, tiny without)")
    parser.add_argument("--kernels", help="backend, or one per op (default: what MINIGPT_KERNELS or auto give)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="windows a forward pass (default: the preset's)")
    parser.add_argument("--dtype", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: the GPU if there is one)")
    parser.add_argument("--steps", type=int, help="steps to trace (default: 3; 1 in Triton's interpreter)")
    parser.add_argument("--top", type=int, default=15, metavar="N", help="rows of the table of ops (default: 15)")
    parser.add_argument("--out", type=Path, default=Path("traces"), metavar="DIR", help="default: traces")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """The command. Raises UserError for what a person can put right."""
    import os

    from minigpt import backends
    from minigpt.config import pick_device, preset
    from minigpt.errors import UserError, writing

    device = pick_device(arguments.device)
    request = arguments.kernels or os.environ.get("MINIGPT_KERNELS") or backends.AUTO
    ops = backends.resolve(request, device)
    name = arguments.preset or ("gpt2" if device.type == "cuda" else "tiny")
    overrides = {} if arguments.batch_size is None else {"batch_size": arguments.batch_size}
    config = preset(name, kernels=request, dtype=arguments.dtype, **overrides)
    if ops.interpreted and name != "tiny":
        raise UserError(f"Triton's interpreter would take very long for {name}: take --preset tiny, or other --kernels")
    steps = arguments.steps if arguments.steps is not None else 1 if ops.interpreted else 3
    if steps < 1 or arguments.top < 1:
        raise UserError("--steps and --top must be at least 1")
    with writing(arguments.out):
        arguments.out.mkdir(parents=True, exist_ok=True)
    document = trace(config, ops, device, steps, arguments.out / "trace.json")
    path = arguments.out / "trace-summary.json"
    with writing(path):
        path.write_text(json.dumps(document, indent=1) + "\n")
    _print(document, arguments.top)
    print(f"written to {arguments.out}: trace.json for https://ui.perfetto.dev, trace-summary.json")
    return 0


def trace(config, ops, device, steps: int, path: Path) -> dict[str, Any]:
    """Train `steps` steps under the profiler, after two that are not looked at; the trace goes to `path`.

    The first of the two compiles, the second wakes the profiler: what CUPTI does at first would make gaps. Returns what
    trace-summary.json holds; times in microseconds a step. Raises UserError where the profiler saw nothing of the GPU.
    """
    import torch
    from torch.profiler import ProfilerActivity, record_function

    from kernels.op import count_launches
    from minigpt.config import pick_dtype
    from minigpt.errors import writing
    from minigpt.learning import make_optimizer
    from minigpt.model import GPT
    from profiling.estimate import vocabulary
    from profiling.recording import recorded
    from profiling.step import PHASES, make_batch, training_step

    torch.manual_seed(config.seed)
    vocab_size = vocabulary(config)
    model = GPT(config.model_config(vocab_size), ops).to(device)
    optimizer = make_optimizer(model, config)
    batch = make_batch(config, vocab_size, device)
    dtype = pick_dtype(config.dtype, device)

    def step() -> None:
        training_step(model, optimizer, batch, dtype, config.grad_clip, during=lambda phase: record_function(phase))

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    step()
    finish()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with recorded(activities=activities, acc_events=True) as found:
        with record_function("warm-up"):
            step()
        finish()
        with count_launches() as launches:
            for index in range(steps):
                with record_function(f"step {index}"):
                    step()
            finish()

    events = since("step 0", found.events())
    spans = gpu_spans(events) if device.type == "cuda" else cpu_spans(events, [*PHASES, "step "])
    with writing(path):
        found.export_chrome_trace(str(path))
    whole = sum(host_us(events, f"step {index}") for index in range(steps))
    busy, idle, gaps = idleness(spans)
    document = {
        "preset": config.preset,
        "kernels": ops.names,
        "interpreted": ops.interpreted,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "dtype": str(dtype).removeprefix("torch."),
        "steps": steps,
        "step_us": whole / steps,
        "phases_us": {phase: host_us(events, phase) / steps for phase in PHASES},
        "groups": shares(spans, steps),
        "ops": top_ops(spans, steps),
        "our_launches": {name: count / steps for name, count in sorted(launches.items())},
        "our_launches_a_step": sum(launches.values()) / steps,
    }
    if device.type == "cuda":
        document |= {
            "cuda_kernels_a_step": len(spans) / steps,
            "gpu_busy_us": busy / steps / 1e3,
            "gpu_idle_us": idle / steps / 1e3,
            "largest_gaps_us": [gap / 1e3 for gap in gaps[:10]],
        }
    return document


# ---------------------------------------------------------------- spans


def since(name: str, events: Iterable[Any]) -> list[Any]:
    """The events from the beginning of the host's range `name` on; the device has to be idle there."""
    from torch.autograd import DeviceType

    events = list(events)
    start = next(e.time_range.start for e in events if e.name == name and e.device_type == DeviceType.CPU)
    return [event for event in events if event.time_range.start >= start]


def host_us(events: Iterable[Any], name: str) -> float:
    """The host's time in the ranges of this name; the profiler has them once more, as the GPU went through them."""
    from torch.autograd import DeviceType

    named = (event for event in events if event.name == name and event.device_type == DeviceType.CPU)
    return sum(event.time_range.elapsed_us() for event in named)


def cpu_spans(events: Iterable[Any], ranges: Iterable[str]) -> list[Span]:
    """An op's own time, that of the ops it calls left out; not the time of `ranges`, whose names begin so."""
    ranges = tuple(ranges)
    return [
        Span(event.name, int(event.time_range.start * 1e3), int(event.self_cpu_time_total * 1e3))
        for event in events
        if not event.name.startswith(ranges)
    ]


def gpu_spans(events: Iterable[Any]) -> list[Span]:
    """The kernels and copies that ran on a GPU, by their beginning. Raises UserError where there are none."""
    from torch.autograd import DeviceType

    from minigpt.errors import UserError

    spans = [
        Span(event.name, int(event.time_range.start * 1e3), int(event.time_range.elapsed_us() * 1e3))
        for event in events
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    if not spans:
        raise UserError(
            "the profiler saw no kernel on the GPU, CUPTI is missing or busy: end other profilers (nsys, ncu), give a "
            "container the driver's `utility` capability, or install PyTorch with the CUDA packages of its wheels"
        )
    return sorted(spans, key=lambda span: span.start)


def group_of(name: str) -> str:
    """The group that an op or a kernel belongs to."""
    lower = name.lower()
    return next((group for group, parts in GROUPS if any(part in lower for part in parts)), "other")


def shares(spans: list[Span], steps: int) -> list[dict[str, Any]]:
    """Time and calls a step of every group, the longest first."""
    times, calls = collections.Counter(), collections.Counter()
    for span in spans:
        times[group_of(span.name)] += span.duration
        calls[group_of(span.name)] += span.calls
    whole = sum(times.values()) or 1
    return [
        {"group": group, "us": time / steps / 1e3, "share": time / whole, "calls": calls[group] / steps}
        for group, time in times.most_common()
    ]


def top_ops(spans: list[Span], steps: int) -> list[dict[str, Any]]:
    """Time and calls a step of every op or kernel, the longest first."""
    times, calls = collections.Counter(), collections.Counter()
    for span in spans:
        times[span.name] += span.duration
        calls[span.name] += span.calls
    whole = sum(times.values()) or 1
    return [
        {
            "name": name,
            "group": group_of(name),
            "us": time / steps / 1e3,
            "share": time / whole,
            "calls": calls[name] / steps,
        }
        for name, time in times.most_common()
    ]


def idleness(spans: list[Span]) -> tuple[int, int, list[int]]:
    """(ns that anything ran, ns between the first and the last that nothing did, those gaps, the longest first)."""
    busy, gaps, end = 0, [], None
    for span in sorted(spans, key=lambda span: span.start):
        stop = span.start + span.duration
        if end is None:
            busy, end = span.duration, stop
            continue
        if span.start > end:
            gaps.append(span.start - end)
        busy += max(0, stop - max(end, span.start))
        end = max(end, stop)
    return busy, sum(gaps), sorted(gaps, reverse=True)


# ---------------------------------------------------------------- what is printed


def _print(document: dict[str, Any], top: int) -> None:

    from rich.table import Table

    console = wide_console(160)
    what = "kernels on the GPU" if "gpu_idle_us" in document else "ops on the CPU, each without the ops it calls"
    where = f"{document['preset']} on {document['device']}, {document['dtype']}, {document['steps']} step(s) profiled"
    console.print(f"{where}: {what}", highlight=False)
    groups = Table(title="Groups of ops", title_justify="left")
    ops = Table(title="The ops with the most time", title_justify="left")
    for table, first in ((groups, "group"), (ops, "op")):
        table.add_column(first, overflow="ellipsis", no_wrap=True, max_width=80)
        for heading in ("us a step", "share", "calls a step"):
            table.add_column(heading, justify="right")
    for row in document["groups"]:
        groups.add_row(row["group"], f"{row['us']:,.0f}", f"{row['share']:.1%}", f"{row['calls']:,.1f}")
    for row in document["ops"][:top]:
        ops.add_row(row["name"], f"{row['us']:,.0f}", f"{row['share']:.1%}", f"{row['calls']:,.1f}")
    console.print(groups)
    console.print(ops)
    parts = ", ".join(f"{phase} {time:,.0f}" for phase, time in document["phases_us"].items())
    console.print(f"a step: {document['step_us']:,.0f} us on the host ({parts})", highlight=False)
    launches = document["our_launches"]
    named = ", ".join(f"{name.lstrip('_')} {count:g}" for name, count in launches.items()) or "none"
    console.print(f"launches of our kernels a step: {document['our_launches_a_step']:g} ({named})", highlight=False)
    if "gpu_idle_us" in document:
        console.print(
            f"kernels a step: {document['cuda_kernels_a_step']:,.0f}; the GPU was busy {document['gpu_busy_us']:,.0f} "
            f"us and idle {document['gpu_idle_us']:,.0f} us a step",
            highlight=False,
        )
    if document["interpreted"]:
        console.print("Triton's INTERPRETER ran our kernels: their times say nothing of a GPU", style="bold red")
