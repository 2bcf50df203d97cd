"""The memory of training steps on a real GPU, to lay beside the estimate.

Two steps warm up, which makes the optimizer's state and compiles kernels. The next is measured as it is. One more runs
with PyTorch's memory history on, for the stacks of what is alive at the peak, and one under the tracker of the
estimate, for the timeline by category.
"""

import contextlib
import gc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from kernels import device as devices
from minigpt import backends, faults
from minigpt.config import DTYPES, TrainConfig
from minigpt.errors import writing
from minigpt.learning import make_optimizer
from minigpt.model import GPT
from profiling.estimate import hold_model, make_tracker, summary, vocabulary
from profiling.step import make_batch, training_step
from profiling.tracker import CATEGORIES

ENTRIES = 1_000_000
"""Allocations and frees that PyTorch is asked to remember."""


def measure(
    config: TrainConfig, passes: int, snapshots: Path | None, device: torch.device | None = None
) -> dict[str, Any]:
    """The memory of a step of `config` on the GPU, bytes throughout; or {"error": why} if it does not fit.

    `requested`, `allocated` and `reserved` are PyTorch's peaks in one step, `before` what was allocated when it began.
    `requested` is what was asked for, `allocated` the blocks given for that, whose rest up to 1 MiB is not split off;
    both have cuBLAS's workspaces in them, which are `cublas` and there throughout. Given `snapshots`, a folder,
    PyTorch's snapshot of a step goes there (open it at https://pytorch.org/memory_viz).
    """
    device = device or torch.device("cuda", torch.cuda.current_device())
    _empty(device)
    try:
        return _measure(config, passes, snapshots, device)
    except (RuntimeError, MemoryError) as error:
        if not faults.is_out_of_memory(error):
            raise
        return {"error": "out of memory"}
    finally:
        _empty(device)


def _measure(config: TrainConfig, passes: int, snapshots: Path | None, device: torch.device) -> dict[str, Any]:
    ops = backends.resolve(config.kernels, device)
    model = GPT(config.model_config(vocabulary(config)), ops).to(device)
    model.checkpoint_activations = config.checkpoint_activations
    optimizer = make_optimizer(model, config)
    batch = make_batch(config, vocabulary(config), device)
    dtype = DTYPES[config.dtype]

    def step(during=lambda phase: contextlib.nullcontext()) -> None:
        training_step(model, optimizer, batch, dtype, config.grad_clip, passes, during)
        torch.cuda.synchronize(device)

    step()
    step()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    found = {
        "gpu": torch.cuda.get_device_name(device),
        "before": before,
        "requested": torch.cuda.memory_stats(device)["requested_bytes.all.peak"],
        "allocated": torch.cuda.max_memory_allocated(device),
        "reserved": torch.cuda.max_memory_reserved(device),
    }
    with _history(device):
        step()
        recorded = torch.cuda.memory._snapshot(device)
        if snapshots:
            path = snapshots / f"{config.kernels.replace('=', '-').replace(',', '+')}.pickle"
            with writing(path):
                snapshots.mkdir(parents=True, exist_ok=True)
                torch.cuda.memory._dump_snapshot(str(path))
            found["snapshot"] = str(path)
    found["stacks"] = stacks_at_peak(recorded["device_traces"][device.index or 0])

    tracker, ours = make_tracker(devices.facts(device), on_cuda=True)
    hold_model(tracker, model, optimizer, batch)
    with tracker:
        step(tracker.during)
    seen = summary(tracker, ops, model, config.kernels, ours.unseen)
    found["categories"] = list(CATEGORIES)
    found["timeline"] = [
        [point.phase, point.op, *(point.bytes[name] for name in CATEGORIES)] for point in seen.timeline
    ]
    found["cublas"] = _let_go_of_cublas(device)
    return found


def _let_go_of_cublas(device: torch.device) -> int:
    """Free cuBLAS's workspaces, which the next product makes anew; the bytes that they were."""
    asked = lambda: torch.cuda.memory_stats(device)["requested_bytes.all.current"]  # noqa: E731
    before = asked()
    torch._C._cuda_clearCublasWorkspaces()
    return before - asked()


def _empty(device: torch.device) -> None:
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()


@contextlib.contextmanager
def _history(device: torch.device):
    torch.cuda.memory._record_memory_history(max_entries=ENTRIES, stacks="python", device=device)
    try:
        yield
    finally:
        torch.cuda.memory._record_memory_history(enabled=None, device=device)


def stacks_at_peak(events: Iterable[dict[str, Any]], top: int = 10) -> list[dict[str, Any]]:
    """What the recorded allocations had alive when they were most, by the place they were made: the largest first.

    `events` are a device's trace in PyTorch's snapshot. Each result has `bytes`, `count` and `frames`, innermost first.
    """
    events = list(events)
    live: dict[int, int] = {}
    total = most = 0
    peak = -1
    for index, event in enumerate(events):
        if event["action"] == "alloc":
            live[event["addr"]] = event["size"]
            total += event["size"]
        elif event["action"] == "free_requested":
            total -= live.pop(event["addr"], 0)  # what was allocated before the history began is not known
        if total > most:
            most, peak = total, index
    alive: dict[int, dict[str, Any]] = {}
    for event in events[: peak + 1]:
        if event["action"] == "alloc":
            alive[event["addr"]] = event
        elif event["action"] == "free_requested":
            alive.pop(event["addr"], None)
    places: dict[tuple[str, ...], list[int]] = {}
    for event in alive.values():
        places.setdefault(tuple(_frames(event.get("frames", []))), []).append(event["size"])
    ranked = sorted(places.items(), key=lambda item: -sum(item[1]))[:top]
    return [{"bytes": sum(sizes), "count": len(sizes), "frames": list(frames)} for frames, sizes in ranked]


def _frames(frames: list[dict[str, Any]], most: int = 3) -> list[str]:
    """The innermost frames outside PyTorch, or PyTorch's own where there are no others (backward has none)."""
    inside = str(Path(torch.__file__).parent)
    ours = [frame for frame in frames if not frame["filename"].startswith((inside, "<", "??"))]
    return [f"{Path(f['filename']).name}:{f['line']} {f['name']}" for f in (ours or frames)[:most]] or ["unknown"]
