"""The GPT, readable top to bottom: Radford et al. 2019 ("Language Models are Unsupervised Multitask Learners").

Shapes: B sequences of T tokens, C = n_embd channels, H = n_head heads of D = C / H, V = vocab_size.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import kernels.attention

from .backends import Backends
from .config import ModelConfig
from .errors import UserError
from .gelu import gelu_linear
from .linear import Linear

IGNORE = -100
"""A target with this value does not count in the loss."""

Attend = Callable[[Tensor], Tensor]
"""queries, keys and values (B, T, 3, H, D) of the tokens at hand -> (B, T, H, D): how they attend, given a cache."""


class LayerNorm(nn.Module):
    """Layer norm over the channels, its bias optional, of what a branch adds to the residual stream."""

    def __init__(self, config: ModelConfig, ops: Backends):
        super().__init__()
        self.ops = ops
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.bias else None

    def forward(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(layer_norm(x + branch), x + branch), both (..., C); without a branch (layer_norm(x), x)."""
        if branch is None:
            return self.ops.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5), x
        return self.ops.add_layer_norm(branch, x, self.weight.shape, self.weight, self.bias, 1e-5)


class Attention(nn.Module):
    """Causal multi-head self-attention, (B, T, C) -> (B, T, C)."""

    def __init__(self, config: ModelConfig, ops: Backends):
        super().__init__()
        self.ops = ops
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.qkv = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.out = Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, attend: Attend | None = None) -> Tensor:
        """With `attend` that decides to what the tokens attend, else to themselves and those before them."""
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)
        if attend is not None:
            y = attend(qkv)
        else:
            y = self.ops.attention(qkv, dropout_p=self.dropout if self.training else 0.0, is_causal=True)
        return self.out(y.flatten(2))


class MLP(nn.Module):
    """Position-wise feed-forward network, four times as wide inside, (B, T, C) -> (B, T, C)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.up = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.down = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return gelu_linear(self.up(x), self.down.weight, self.down.bias)


class Block(nn.Module):
    """One pre-LN transformer block.

    A branch's output joins the residual stream in the norm that follows, where one kernel can do both: a block adds
    what the block before it computed, and leaves its own last branch to the next norm.
    """

    def __init__(self, config: ModelConfig, ops: Backends):
        super().__init__()
        self.dropout = config.dropout
        self.norm1 = LayerNorm(config, ops)
        self.attention = Attention(config, ops)
        self.norm2 = LayerNorm(config, ops)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, branch: Tensor | None, attend: Attend | None = None) -> tuple[Tensor, Tensor]:
        """The residual stream x and the branch yet to be added to it, (B, T, C) each, after this block."""
        y, x = self.norm1(x, branch)
        branch = F.dropout(self.attention(y, attend), self.dropout, self.training)
        y, x = self.norm2(x, branch)
        return x, F.dropout(self.mlp(y), self.dropout, self.training)


class GPT(nn.Module):
    """A decoder-only transformer language model.

    The weights are drawn from PyTorch's default generator on the CPU, so that `torch.manual_seed` gives the same model
    whatever the backend and the device it is moved to. Raises UserError for heads that the chosen kernels do not have.
    """

    def __init__(self, config: ModelConfig, ops: Backends):
        super().__init__()
        largest = kernels.attention.MAX_HEAD_SIZE
        if ops.names["attention"] == "triton" and config.n_embd // config.n_head > largest:
            raise UserError(
                f"heads of {config.n_embd // config.n_head} channels: our attention kernel has heads up to {largest}; "
                "take more heads (--n-head), or --kernels attention=torch"
            )
        self.config = config
        self.ops = ops
        self.checkpoint_activations = False
        """Whether backward computes a block's activations again instead of keeping them (Chen et al. 2016)."""
        self.tokens = nn.Embedding(config.vocab_size, config.n_embd)
        if config.position == "learned":
            self.positions = nn.Parameter(torch.empty(config.block_size, config.n_embd))
        else:
            self.register_buffer("positions", sinusoids(config.block_size, config.n_embd), persistent=False)
        self.blocks = nn.ModuleList(Block(config, ops) for _ in range(config.n_layer))
        self.norm = LayerNorm(config, ops)
        self.head = Linear(config.n_embd, config.vocab_size, bias=config.head_bias)
        if config.tied_head:
            self.head.weight = self.tokens.weight
        self._initialize()

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, *, last_only: bool = False
    ) -> tuple[Tensor | None, Tensor | None]:
        """(logits, None) for tokens idx (B, T) int64, T <= block_size; with targets (None, loss).

        Logits (B, T, V), or with `last_only` those of the last position alone, (B, 1, V), which is what generation
        needs. targets (B, T) int64 are the tokens that follow; those equal to IGNORE do not count. The loss is in nats
        per token, and the logits of a batch need not exist whole for it. Raises ValueError when T is larger than
        block_size.
        """
        T = idx.shape[1]
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens are more than the block size, {self.config.block_size}")
        x = self.tokens(idx) + self.positions[:T]
        x = F.dropout(x, self.config.dropout, self.training)
        branch = None
        for block in self.blocks:
            if self.checkpoint_activations and torch.is_grad_enabled():
                again = {"use_reentrant": False, "preserve_rng_state": self.config.dropout > 0}
                x, branch = checkpoint(block, x, branch, **again)
            else:
                x, branch = block(x, branch)
        if last_only:
            x, branch = x[:, -1:], branch[:, -1:]
        x, _ = self.norm(x, branch)
        if targets is None:
            return self.head(x), None
        head = self.head
        loss = self.ops.loss(
            x.flatten(0, 1), head.weight, targets.flatten(), linear_bias=head.bias, ignore_index=IGNORE
        )
        return None, loss

    def use(self, ops: Backends) -> None:
        """Switch every op of this model to the functions of `ops`; the weights stay as they are."""
        for module in self.modules():
            if hasattr(module, "ops"):
                module.ops = ops

    def parameter_count(self) -> int:
        """The number of parameters, a tied head counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def decay_groups(self, weight_decay: float) -> list[dict]:
        """Parameter groups for the optimizer: matrices decay, vectors (biases and norms) do not."""
        parameters = list(self.parameters())
        return [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]

    @torch.no_grad()
    def _initialize(self) -> None:
        """GPT-2's initialisation, its 0.02 carried over from GPT-2's width to this one.

        0.02 suits matrices of 768 channels; narrower ones need larger values to pass as much on (after Glorot & Bengio
        2010). Where 2 * n_layer branches add up in the residual stream, each starts that much smaller. Positions stay
        small beside the tokens, and so does an embedding that is the head too: it would begin sure that each token
        comes twice.
        """
        width = 0.02 * math.sqrt(768 / self.config.n_embd)
        for name, parameter in self.named_parameters():
            if name.endswith(("attention.out.weight", "mlp.down.weight")):
                nn.init.normal_(parameter, std=width / math.sqrt(2 * self.config.n_layer))
            elif name == "positions" or (name == "tokens.weight" and self.config.tied_head):
                nn.init.normal_(parameter, std=0.02)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=width)
            elif name.endswith(".bias"):
                nn.init.zeros_(parameter)


def sinusoids(length: int, channels: int) -> Tensor:
    """Fixed positions (length, channels) fp32, after Vaswani et al. 2017, sine and cosine side by side.

    Scaled to the size that learned positions start with (0.02 RMS): at the paper's 1 they would drown the embeddings.
    """
    frequencies = torch.exp(torch.arange(0, channels, 2) * (-math.log(10000.0) / channels))
    angles = torch.arange(length)[:, None] * frequencies
    waves = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)[:, :channels]
    return waves * (0.02 * math.sqrt(2))
