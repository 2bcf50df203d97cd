"""How a model learns: the learning rate, the optimizer, and one step of it."""

import math

import torch
from torch import Tensor

from .batches import Batches
from .config import TrainConfig
from .model import GPT


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of step 0, 1, ...: a linear warm-up, then a cosine down (Loshchilov & Hutter 2017)."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    part = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    span = config.learning_rate - config.min_learning_rate
    return config.min_learning_rate + span * 0.5 * (1.0 + math.cos(math.pi * min(1.0, part)))


def make_optimizer(model: GPT, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019), fused, in which matrices decay and vectors do not."""
    groups = model.decay_groups(config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


class Learner:
    """A model with its optimizer and its data, on the device that they are on; matrix products in `dtype`."""

    def __init__(self, model: GPT, config: TrainConfig, batches: Batches, dtype: torch.dtype):
        self.model, self.config, self.batches, self.dtype = model, config, batches, dtype
        self.parameters = list(model.parameters())
        self.device = self.parameters[0].device
        self.optimizer = make_optimizer(model, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)

    def step(self, number: int) -> Tensor:
        """Optimizer step 0, 1, ...: the mean loss of its batches and the norm of their gradient before clipping, (2,).

        Still on the device, which nothing waits for. Where one of the two is not finite, weights and optimizer stay as
        they are.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(number, self.config)
        loss = self.backward(number)
        self.scaler.unscale_(self.optimizer)
        norm = self._clip()
        # The fused AdamW does nothing where this is 1, as the scaler would have it; under fp16 the scaler sets it anew.
        self.optimizer.found_inf = (loss + norm).isfinite().logical_not().float()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack((loss, norm))

    def backward(self, number: int) -> Tensor:
        """Add the gradient of that step's batches to the parameters', times the scaler's scale; the mean loss ()."""
        count = self.config.grad_accumulation
        total: Tensor | None = None
        for index in range(number * count, (number + 1) * count):
            loss = self.loss(*self.batches[index])
            self.scaler.scale(loss / count).backward()
            total = loss.detach() if total is None else total + loss.detach()
        return total / count

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The loss () of one batch, (B, T) int64 each, in nats per token."""
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            return self.model(inputs, targets)[1]

    def _clip(self) -> Tensor:
        """Shorten the gradient to the norm that is allowed; the norm () that it had."""
        if self.config.grad_clip:
            return torch.nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip)
        return torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
