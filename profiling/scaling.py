"""A training step on one of W GPUs: its parameters, its communication and its operations, by formula.

Nothing is run. profiling.scaling_memory has what it holds; docs/scaling.md says what both were held to.

Symbols: B windows of T tokens, n = B T; L blocks of width C with H heads; V tokens in the vocabulary; s bytes of an
element of the products (2 in bf16, 4 in fp32); W GPUs.
"""

import math
from dataclasses import dataclass
from typing import Literal

from minigpt.config import ModelConfig, TrainConfig
from minigpt.errors import UserError
from minigpt.parallel import World
from profiling.estimate import vocabulary

Shapes = list[tuple[int, ...]]


@dataclass(frozen=True)
class Step:
    """One training step on one of `gpus` GPUs: `passes` passes over `batch` windows of `tokens` tokens each.

    `backend`: torch or triton, for all ops. `width`: bytes of an element of the products, 2 or 4.
    """

    model: ModelConfig
    backend: Literal["torch", "triton"]
    batch: int
    tokens: int
    passes: int = 1
    parallel: Literal["none", "ddp", "fsdp"] = "none"
    gpus: int = 1
    width: int = 2
    checkpointing: bool = False

    @property
    def rows(self) -> int:
        """Tokens of a pass, n."""
        return self.batch * self.tokens


def step_of(config: TrainConfig, parallel: str, gpus: int, *, weak: bool) -> Step:
    """What one of `gpus` GPUs does of a step of `config`; alone where there is one.

    `weak`: each GPU has config's windows; else they are shared out, and UserError is raised where they do not divide.
    """
    if config.kernels not in ("torch", "triton") or config.dtype not in ("bf16", "fp32"):
        raise UserError("there are formulas for --kernels torch and triton, --dtype bf16 and fp32: choose of those")
    kind = parallel if gpus > 1 else "none"
    batch, passes = World(kind, 0, 1 if weak else gpus).share(config)
    return Step(
        config.model_config(vocabulary(config)), config.kernels, batch, config.window or config.block_size, passes,
        kind, gpus, 4 if config.dtype == "fp32" else 2, config.checkpoint_activations,
    )  # fmt: skip


# ---------------------------------------------------------------- parameters


def attention_shapes(model: ModelConfig) -> Shapes:
    """The parameters of one block's attention."""
    C, bias = model.n_embd, model.bias
    return [(3 * C, C), *[(3 * C,)] * bias, (C, C), *[(C,)] * bias]


def mlp_shapes(model: ModelConfig) -> Shapes:
    """The parameters of one block's MLP."""
    C, bias = model.n_embd, model.bias
    return [(4 * C, C), *[(4 * C,)] * bias, (C, 4 * C), *[(C,)] * bias]


def root_shapes(model: ModelConfig) -> Shapes:
    """The rest: embeddings, norms, head."""
    C, V = model.n_embd, model.vocab_size
    norms = [(C,)] * ((2 * model.n_layer + 1) * (1 + model.bias))
    positions = [(model.block_size, C)] * (model.position == "learned")
    return [*positions, (V, C), *norms, *[(V, C)] * (not model.tied_head), *[(V,)] * model.head_bias]


def all_shapes(model: ModelConfig) -> Shapes:
    """Every parameter."""
    return (attention_shapes(model) + mlp_shapes(model)) * model.n_layer + root_shapes(model)


def count(shapes: Shapes, gpus: int = 1) -> int:
    """The elements that the first of `gpus` GPUs has: each parameter is cut along its first dimension, rounded up."""
    return sum(math.prod((-(-shape[0] // gpus), *shape[1:])) for shape in shapes)


def whole(shapes: Shapes, gpus: int) -> int:
    """The elements of a group put together from its parts, what rounding up adds among them."""
    return gpus * count(shapes, gpus)


# ---------------------------------------------------------------- communication


@dataclass(frozen=True)
class Collective:
    """One kind of collective of a step: `times` a step over `size` bytes, the whole tensor's."""

    kind: Literal["all-reduce", "all-gather", "reduce-scatter"]
    what: str
    size: int
    times: int

    def sent(self, gpus: int) -> float:
        """Bytes that each GPU sends in a step by a ring: (W - 1) / W of the tensor, twice that for an all-reduce."""
        return self.times * self.size * (gpus - 1) / gpus * (2 if self.kind == "all-reduce" else 1)


def collectives(step: Step) -> list[Collective]:
    """What a step sends: gradients, and under fsdp parameters. Left out: a few numbers (loss, gradient's norm)."""
    model = step.model
    if step.parallel == "none":
        return []
    if step.parallel == "ddp":
        return [Collective("all-reduce", "gradients", 4 * count(all_shapes(model)), 1)]
    parts = [("attention", attention_shapes(model)), ("mlp", mlp_shapes(model))]
    found = []
    for name, shapes in parts:
        size, times = whole(shapes, step.gpus), step.passes * model.n_layer
        found.append(Collective("all-gather", name, step.width * size, 2 * times))  # checkpointing needs no third
        found.append(Collective("reduce-scatter", name, 4 * size, times))
    size = 4 * whole(root_shapes(model), step.gpus)
    return [*found, *(Collective(kind, "root", size, step.passes) for kind in ("all-gather", "reduce-scatter"))]


def sent(step: Step) -> float:
    """Bytes that each GPU sends in a step."""
    return sum(one.sent(step.gpus) for one in collectives(step))


def operations(step: Step) -> float:
    """Operations of one GPU in a step: 6 N + 12 L C T a token (Chowdhery et al. 2022), N in matrix products.

    With checkpointing a third more in the blocks. What causality leaves out of attention counts.
    """
    L, C = step.model.n_layer, step.model.n_embd
    blocks = 6 * L * 12 * C**2 + 12 * L * C * step.tokens
    head = 6 * step.model.vocab_size * C
    return step.passes * step.rows * (head + blocks * (4 / 3 if step.checkpointing else 1))
