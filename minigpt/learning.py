"""How a model learns: the learning rate, the optimizer, and one step of it."""

import math
from contextlib import nullcontext

import torch
from torch import Tensor

import kernels

from . import faults, parallel
from .batches import Batches
from .config import TrainConfig
from .graphs import GraphedStep
from .model import GPT
from .parallel import ALONE, World

Data = list[tuple[Tensor, Tensor]]
"""Inputs and targets, (B, T) int64 each, of the passes of a step."""


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of step 0, 1, ...: a linear warm-up, then a cosine down (Loshchilov & Hutter 2017)."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    part = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    span = config.learning_rate - config.min_learning_rate
    return config.min_learning_rate + span * 0.5 * (1.0 + math.cos(math.pi * min(1.0, part)))


def make_optimizer(model: GPT, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019), fused, in which matrices decay and vectors do not.

    For a CUDA graph the learning rate is a tensor, which a captured step reads anew each time.
    """
    device = next(model.parameters()).device
    rate = torch.tensor(config.learning_rate, device=device) if config.cuda_graph else config.learning_rate
    return torch.optim.AdamW(
        model.decay_groups(config.weight_decay),
        lr=rate,
        betas=(config.beta1, config.beta2),
        fused=True,
        capturable=config.cuda_graph,
    )


class Learner:
    """A model with its optimizer and its data, on the device that they are on; matrix products in `dtype`.

    `batches` are of World.share's windows each. With config.compile the model is compiled; with config.cuda_graph a
    step is captured once and then replayed.
    """

    def __init__(self, model: GPT, config: TrainConfig, batches: Batches, dtype: torch.dtype, world: World = ALONE):
        self.model, self.config, self.batches, self.dtype, self.world = model, config, batches, dtype, world
        model.checkpoint_activations = config.checkpoint_activations
        self.passes = world.share(config)[1]
        self.parameters = list(model.parameters())
        self.device = self.parameters[0].device
        self.run = parallel.wrap(model, world, compiled=config.compile)
        self.optimizer = make_optimizer(model, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        self.graph = GraphedStep(self) if config.cuda_graph else None
        self.cold = world.size == 1 and "triton" in model.ops.names.values()
        """Whether kernels are still to be compiled; several processes each compile at the first launch."""

    def step(self, number: int) -> Tensor:
        """Optimizer step 0, 1, ...: the mean loss of its batches and the norm of their gradient before clipping, (2,).

        Still on the device, which nothing waits for. Where one of the two is not finite, weights and optimizer stay as
        they are.
        """
        self._set_rate(learning_rate(number, self.config))
        data = self.data(number)
        if self.cold:
            self.compile_kernels(data)
            self.cold = False
        return self.advance(data) if self.graph is None else self.graph(data)

    def data(self, number: int) -> Data:
        """The batches of that step, those of this process."""
        found = [self.batches[index] for index in self._indices(number)]
        self.batches.expect(self._indices(number + 1))
        return found

    def compile_kernels(self, data: Data) -> None:
        """Compile the kernels that the first batch takes, side by side; what is left then compiles at its launch.

        PyTorch's part of a pass is run for it, without torch.compile. Where that takes more memory than there is, it
        ends there: the step itself may take less. Weights and random generators are as before, gradients are None, and
        on a GPU the most memory in use is counted anew.
        """

        def one_pass() -> None:
            with self._autocast():
                loss = self.model(*data[0])[1]
            loss.backward()

        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            try:
                kernels.compile_ahead(one_pass, self.device)
            except (RuntimeError, MemoryError) as error:
                if not faults.is_out_of_memory(error):
                    raise
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def advance(self, data: Data) -> Tensor:
        """The part of a step that the device does."""
        loss = self.backward(data)
        self.scaler.unscale_(self.optimizer)
        norm = self._clip()
        # The fused AdamW does nothing where this is 1, as the scaler would have it; under fp16 the scaler sets it anew.
        self.optimizer.found_inf = (loss + norm).isfinite().logical_not().float()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack((loss, norm))

    def backward(self, data: Data) -> Tensor:
        """Add the gradient of these batches to the parameters', times the scaler's scale; the mean loss ()."""
        total: Tensor | None = None
        for index, batch in enumerate(data, 1):
            with parallel.without_averaging(self.run) if index < len(data) else nullcontext():
                loss = self.loss(*batch)
                self.scaler.scale(loss / len(data)).backward()
            total = loss.detach() if total is None else total + loss.detach()
        return self.world.mean(total / len(data))

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The loss () of one batch, (B, T) int64 each, in nats per token."""
        with self._autocast():
            return self.run(inputs, targets)[1]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def _indices(self, number: int) -> range:
        first = (number * self.world.size + self.world.rank) * self.passes
        return range(first, first + self.passes)

    def _set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def _clip(self) -> Tensor:
        """Shorten the gradient to the norm that is allowed; the norm () that it had."""
        if self.config.grad_clip:
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip)
        else:
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        return parallel.whole(norm)
