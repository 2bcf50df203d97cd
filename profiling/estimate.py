"""The memory of a training step without running it: fake tensors, every allocation counted.

What is counted are the bytes of live tensors, in the allocator's granularity. Not counted: the CUDA context, workspaces
of cuBLAS and cuDNN (see cuda_rules), and what the allocator holds in reserve or loses to fragmentation.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import device as devices
from minigpt import backends
from minigpt.config import DTYPES, TrainConfig
from minigpt.learning import make_optimizer
from minigpt.model import GPT
from profiling import cuda_rules
from profiling.step import make_batch, training_step
from profiling.tracker import CATEGORIES, Block, Point, Tracker, Workspaces

CHARACTERS = 65
"""Vocabulary of presets that leave it to the text: tinyshakespeare's."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The memory of one step. Bytes throughout; `timeline` has a point for every allocation and every phase's end."""

    kernels: str
    backends: dict[str, str]
    peak: int
    at_peak: dict[str, int]
    peak_phase: str
    peak_op: str
    parameters: int
    timeline: list[Point]
    largest: list[Block]
    ops: list[str]
    unseen: dict[str, str]


def vocabulary(config: TrainConfig) -> int:
    """Tokens in the vocabulary: the preset's, or tinyshakespeare's."""
    return config.vocab_size or CHARACTERS


def estimate(config: TrainConfig, *, device: str = "cuda", arch: str = "sm_90", passes: int = 1) -> Estimate:
    """The memory of one step of `config`, the optimizer's state present from before.

    `device`: "cuda", whose choices are modelled (PyTorch's kernels and allocator, our plans for `arch`), or "cpu".
    `passes`: forward and backward passes a step; from two on, gradients are there while activations are.
    Raises UserError for unknown kernels.
    """
    on_cuda = device == "cuda"
    ops = backends.resolve(config.kernels, torch.device(device))
    tracker, ours = make_tracker(devices.TARGETS[arch] if on_cuda else devices.INTERPRETER, on_cuda)
    dtype = DTYPES[config.dtype]
    with FakeTensorMode(allow_non_fake_inputs=True), cuda_rules.as_on_cuda() if on_cuda else nullcontext():
        model, optimizer, batch = before_a_step(config, ops)
        hold_model(tracker, model, optimizer, batch)
        with tracker:
            training_step(model, optimizer, batch, dtype, config.grad_clip, min(2, passes), tracker.during)
    return summary(tracker, ops, model, config.kernels, ours.unseen)


def make_tracker(planned_for: devices.Device, on_cuda: bool) -> tuple[Tracker, Workspaces]:
    """A tracker that counts what ops hold inside too, and what it asks of ours, whose `unseen` tells what it missed."""
    granularity = cuda_rules.GRANULARITY if on_cuda else 1
    ours = Workspaces(planned_for, granularity)
    return Tracker(granularity, functools.partial(_inside, [ours, cuda_rules.workspace] if on_cuda else [ours])), ours


def before_a_step(
    config: TrainConfig, ops: backends.Backends
) -> tuple[GPT, torch.optim.Optimizer, tuple[torch.Tensor, torch.Tensor]]:
    """What a training step begins with, on fake CPU tensors: the model, its optimizer with state, and a batch."""
    model = GPT(config.model_config(vocabulary(config)), ops)
    model.checkpoint_activations = config.checkpoint_activations
    optimizer = make_optimizer(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()  # makes its state
    optimizer.zero_grad(set_to_none=True)
    return model, optimizer, make_batch(config, vocabulary(config), "cpu")


def hold_model(tracker: Tracker, model: GPT, optimizer: torch.optim.Optimizer, batch: Iterable[torch.Tensor]) -> None:
    """Tell `tracker` what there is before a step, and which tensors will be gradients."""
    for parameter in model.parameters():
        tracker.hold(parameter, "parameters")
        parameter.register_post_accumulate_grad_hook(lambda parameter: tracker.hold(parameter.grad, "gradients"))
    for tensor in (*model.buffers(), *batch):
        tracker.hold(tensor, "batch and buffers")
    for state in optimizer.state.values():
        for tensor in state.values():
            if isinstance(tensor, torch.Tensor):
                tracker.hold(tensor, "optimizer state")


def summary(tracker: Tracker, ops: backends.Backends, model: GPT, request: str, unseen: dict[str, str]) -> Estimate:
    """What a tracker that has seen a step has to say."""
    tracker.finish()
    timeline = tracker.timeline()
    top = max(timeline, key=lambda point: point.total)
    return Estimate(
        kernels=request,
        backends=ops.names,
        peak=top.total,
        at_peak={category: top.bytes[category] for category in CATEGORIES},
        peak_phase=top.phase,
        peak_op=top.op,
        parameters=model.parameter_count(),
        timeline=timeline,
        largest=tracker.alive_at_peak()[:12],
        ops=tracker.ops,
        unseen=unseen,
    )


def largest_batches(peak: Callable[[int], int], limits: Sequence[float]) -> list[int]:
    """`largest_batch` for each of several limits in bytes, no batch estimated twice."""
    cached = functools.cache(peak)
    return [largest_batch(cached, limit) for limit in limits]


def largest_batch(peak: Callable[[int], int], limit: float) -> int:
    """The largest batch size whose `peak` is at most `limit` bytes; 0 if not even one fits. `peak` must not fall.

    Follows the line through the last two batches looked at, nearly right as activations grow with the batch. Ends only
    where a batch fits and one more does not, both looked at.
    """
    if peak(1) > limit:
        return 0
    fits, too_many = 1, math.inf
    last, guess = 1, 8
    while too_many - fits > 1:
        guess = max(fits + 1, min(guess, too_many - 1))
        slope = (peak(guess) - peak(last)) / (guess - last)
        if peak(guess) <= limit:
            fits = guess
        else:
            too_many = guess
        last, guess = guess, guess + math.floor((limit - peak(guess)) / slope) if slope > 0 else 2 * guess
    return fits


def _inside(looks: list[Callable], func, args, kwargs) -> int | None:
    found = (look(func, args, kwargs) for look in looks)
    return next((size for size in found if size is not None), None)
