"""What a run is made of: the model's and the training's settings, the presets, and the command line."""

import dataclasses
import itertools
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from . import backends, storage, tokenizer_choice
from .command_line import command_line, metavar
from .errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a GPT. Raises UserError for a shape that cannot be built."""

    vocab_size: int
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float = 0.0
    bias: bool = True
    position: Literal["learned", "sinusoidal"] = "learned"
    tied_head: bool = True
    head_bias: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")
        _require(
            self.n_embd % self.n_head == 0,
            f"n_head must divide n_embd, but {self.n_head} heads do not divide a width of {self.n_embd}",
        )
        _require(0.0 <= self.dropout < 1.0, f"dropout must be at least 0 and below 1, not {self.dropout}")
        _require(
            self.position in ("learned", "sinusoidal"),
            f"position must be learned or sinusoidal, not {self.position!r}",
        )


# The fields in which each preset differs from TrainConfig's defaults. Shapes, learning rates and batches of gpt2*:
# Radford et al. 2019; Brown et al. 2020, table 2.1. 19,073 steps of 524,288 tokens are 10 billion tokens.
_GPT2 = {
    "block_size": 1024, "vocab_size": 50304, "bias": True, "beta2": 0.95, "warmup_steps": 700, "max_steps": 19073,
    "eval_tokens": 1 << 18,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "n_layer": 2, "n_head": 4, "n_embd": 64, "block_size": 512, "vocab_size": 100, "bias": True,
        "tied_head": False, "head_bias": True, "batch_size": 2, "window": 64, "max_steps": 100, "warmup_steps": 10,
        "learning_rate": 3e-3, "min_learning_rate": 3e-4, "eval_interval": 50, "eval_tokens": 2048, "val_tokens": 8192,
        "sample_tokens": 100,
    },
    "shakespeare-cpu": {"eval_tokens": 20480},
    "shakespeare": {
        "n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "dropout": 0.2, "batch_size": 64,
        "max_steps": 5000,
    },
    "gpt2": _GPT2 | {
        "n_layer": 12, "n_head": 12, "n_embd": 768, "batch_size": 16, "grad_accumulation": 32,
        "learning_rate": 6e-4, "min_learning_rate": 6e-5,
    },
    "gpt2-medium": _GPT2 | {
        "n_layer": 24, "n_head": 16, "n_embd": 1024, "batch_size": 16, "grad_accumulation": 32,
        "learning_rate": 3e-4, "min_learning_rate": 3e-5,
    },
    "gpt2-large": _GPT2 | {
        "n_layer": 36, "n_head": 20, "n_embd": 1280, "batch_size": 8, "grad_accumulation": 64,
        "learning_rate": 2.5e-4, "min_learning_rate": 2.5e-5,
    },
    "gpt2-xl": _GPT2 | {
        "n_layer": 48, "n_head": 25, "n_embd": 1600, "batch_size": 4, "grad_accumulation": 128,
        "learning_rate": 2e-4, "min_learning_rate": 2e-5,
    },
}  # fmt: skip


@dataclass(frozen=True)
class TrainConfig:
    """Train a GPT on a text, and write its checkpoint, metrics, curves and a sample to a folder.

    The defaults are those of the preset; every one of them can be overridden.
    """

    preset: Annotated[str, metavar(f"{{{','.join(PRESETS)}}}")] = "shakespeare-cpu"
    """Settings to start from. Without one: shakespeare on a GPU; shakespeare-cpu without, or tiny when kernels run in
    Triton's interpreter."""
    data: str | None = None
    """What to train on: shakespeare, pydocs, a text file, or a folder that `python -m minigpt prepare` has written.
    Without one: shakespeare."""
    tokenizer: Annotated[str | None, metavar(tokenizer_choice.METAVAR)] = None
    """How text becomes tokens: char, each character is one; bpe, frequent runs of bytes, learnt from the text; gpt2,
    GPT-2's own, where its files are; or a folder or file with a tokenizer. Without one: that of a prepared text, else
    char."""
    out: Path | None = None
    """Folder to write to. Without one: a new runs/PRESET-N."""
    resume: Path | None = None
    """Folder of a run to go on with from its last checkpoint."""
    seed: int = 1337
    """Fixes the initial weights, the order of the data and the dropout."""
    kernels: str = "auto"
    """Backend of the ops attention, layer_norm and loss: auto, eager, torch, triton, or one per op, such as
    attention=triton,layer_norm=torch. Beats the environment's MINIGPT_KERNELS."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ..., or auto: the GPU if there is one."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the matrix products; auto: bf16 on a GPU that has it, else fp32."""
    tf32: bool = False
    """On a GPU, round the inputs of fp32 matrix products to TF32, which has 10 bits for 23."""
    deterministic: bool = False
    """Use only algorithms of PyTorch that give the same bits every time; on a GPU they can be slower."""
    compile: bool = False
    """Compile the model with torch.compile, which fuses what is between the ops."""
    cuda_graph: bool = False
    """On a GPU, capture the whole step as a CUDA graph, which costs the host one launch."""
    checkpoint_activations: bool = False
    """Keep only what goes from block to block for backward, and compute the rest again: less memory, more time."""
    parallel: Literal["none", "ddp", "fsdp"] = "none"
    """How the processes that torchrun has started share the training: ddp, each with the whole model; fsdp, each with a
    part of it. They divide grad_accumulation, or else batch_size, among them."""

    n_layer: int = 4
    """Transformer blocks."""
    n_head: int = 4
    """Attention heads."""
    n_embd: int = 128
    """Width, a multiple of the heads."""
    block_size: int = 64
    """The longest context, in tokens."""
    vocab_size: int = 0
    """Tokens in the vocabulary. With --tokenizer bpe, so many are learnt, at least 259; 0: 1024. Else the vocabulary is
    padded up to so many; 0: only those of the tokenizer."""
    dropout: float = 0.0
    """Share of activations dropped in training."""
    bias: bool = False
    """Biases in the linear layers and the norms."""
    position: Literal["learned", "sinusoidal"] = "learned"
    """Kind of position embedding."""
    tied_head: bool = True
    """Use the token embedding as the output layer too."""
    head_bias: bool = False
    """A bias in the output layer."""

    batch_size: int = 12
    """Windows per forward pass."""
    window: int = 0
    """Tokens per training window, at most block_size; 0: block_size."""
    grad_accumulation: int = 1
    """Forward passes per optimizer step."""
    max_steps: int = 2000
    """Optimizer steps."""
    learning_rate: float = 1e-3
    """Highest learning rate, reached after the warm-up."""
    min_learning_rate: float = 1e-4
    """Learning rate at the end of the cosine."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises from 0."""
    beta1: float = 0.9
    """AdamW's decay of the mean of the gradients."""
    beta2: float = 0.99
    """AdamW's decay of the mean of their squares."""
    weight_decay: float = 0.1
    """AdamW's decay of the matrices; vectors do not decay."""
    grad_clip: float = 1.0
    """Largest norm of the whole gradient; 0: do not clip."""

    log_interval: int = 10
    """Steps between updates of the progress shown."""
    eval_interval: int = 250
    """Steps between evaluations, each followed by a checkpoint."""
    keep: int = 1
    """Checkpoints before the last one that stay, to go back to when it is damaged."""
    eval_tokens: int = 0
    """Validation tokens of each evaluation during training; 0: the whole validation split."""
    val_tokens: int = 0
    """Validation tokens of the final evaluation; 0: the whole validation split."""
    sample_tokens: int = 300
    """Tokens of text to sample at the end; 0: none."""
    prompt: str = ""
    """What the sample continues."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard too; needs the package tensorboard."""
    wandb: bool = False
    """Write the metrics for Weights & Biases too, offline; needs the package wandb."""

    def __post_init__(self) -> None:
        self.model_config(max(1, self.vocab_size))
        for name in ("batch_size", "grad_accumulation", "max_steps", "log_interval", "eval_interval"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")
        whole = ("vocab_size", "window", "warmup_steps", "eval_tokens", "keep", "val_tokens", "sample_tokens")
        for name in (*whole, "weight_decay", "grad_clip", "min_learning_rate"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value >= 0, f"{name} must be 0 or more, not {value}")
        for name in ("beta1", "beta2"):
            _require(0.0 <= getattr(self, name) < 1.0, f"{name} must be at least 0 and below 1")
        _require(0 <= self.seed < 2**63, f"seed must be between 0 and 2**63 - 1, not {self.seed}")
        _require(
            math.isfinite(self.learning_rate) and self.learning_rate > 0,
            f"learning_rate must be above 0, not {self.learning_rate}",
        )
        _require(
            self.min_learning_rate <= self.learning_rate,
            f"min_learning_rate ({self.min_learning_rate:g}) must not exceed learning_rate ({self.learning_rate:g})",
        )
        _require(
            self.window <= self.block_size,
            f"window ({self.window}) must not exceed block_size ({self.block_size})",
        )
        _require(self.dtype in ("auto", *DTYPES), f"dtype must be auto, {', '.join(DTYPES)}, not {self.dtype!r}")

    def to_json(self) -> dict[str, Any]:
        """These settings as plain JSON values; `from_json` reads them."""
        return {name: str(v) if isinstance(v, Path) else v for name, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "TrainConfig":
        """The settings that `to_json` described. Raises UserError when they are not those of this version."""
        try:
            settings = cls(**values)
            paths = {name: Path(values[name]) for name in ("out", "resume") if values.get(name) is not None}
        except TypeError as error:
            raise UserError(f"the stored settings are damaged or of another version of minigpt ({error})") from None
        return dataclasses.replace(settings, **paths)

    def model_config(self, vocab_size: int) -> ModelConfig:
        """The model's part of these settings; a tokenizer's `vocab_size` is padded up to the one in these settings."""
        shared = {field.name for field in dataclasses.fields(ModelConfig)} - {"vocab_size"}
        return ModelConfig(max(vocab_size, self.vocab_size), **{name: getattr(self, name) for name in shared})


def preset(name: str, **overrides: Any) -> TrainConfig:
    """The settings of a preset, with `overrides`. Raises UserError for an unknown name, listing the right ones."""
    _require(name in PRESETS, f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
    return TrainConfig(**({"preset": name} | PRESETS[name] | overrides))


def default_preset(kernels: str | None, device: torch.device) -> str:
    """The preset that suits a device, and Triton's interpreter where `kernels` (the flag's text) means it."""
    if device.type != "cpu":
        return "shakespeare"
    return "tiny" if backends.will_interpret(kernels, device) else "shakespeare-cpu"


def pick_device(name: str) -> torch.device:
    """The device called `name` (auto, cpu, cuda, cuda:1, ...). Raises UserError when this machine does not have it.

    A GPU with a number becomes the current one: streams, events and CUDA graphs are made on that, wherever tensors are.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    usable = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name in usable or (name == "cuda" and len(usable) > 1):
        device = torch.device(name)
        if device.index is not None:
            torch.cuda.set_device(device)
        return device
    hint = "" if len(usable) > 1 else "; PyTorch sees no GPU"
    raise UserError(f"unknown device {name!r}: choose auto, {', '.join(usable)}{hint}")


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The precision called `name`; auto: bf16 on a GPU that computes in it, else fp32."""
    if name == "auto":
        name = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return DTYPES[name]


def parse(argv: Sequence[str] | None = None, prog: str = "train.py") -> TrainConfig:
    """The settings that a command line asks for (None: this program's), over those of its preset.

    Raises UserError for whatever is wrong with it; SystemExit(0) after --help.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    request = _peek(argv, "kernels") or os.environ.get("MINIGPT_KERNELS")
    if (run := _peek(argv, "resume")) is not None:
        from . import checkpoint  # it imports this module

        if (Path(run) / storage.SEAL).is_file():
            raise UserError(f"{run} is a checkpoint, and --resume takes the folder of the run: {Path(run).parent}")
        default = checkpoint.stored_config(Path(run))
        if "WORLD_SIZE" not in os.environ:  # the run may have had several processes; this one is alone
            default = dataclasses.replace(default, parallel="none")
        return command_line(
            TrainConfig, argv, prog=prog, default=dataclasses.replace(default, kernels=request or default.kernels)
        )
    name = _peek(argv, "preset") or default_preset(request, pick_device(_peek(argv, "device") or "auto"))
    return command_line(TrainConfig, argv, prog=prog, default=preset(name, kernels=request or backends.AUTO))


def _peek(argv: Sequence[str], flag: str) -> str | None:
    """The value of --flag in argv, or None: what the defaults depend on is read before everything else."""
    found = None
    for here, after in itertools.pairwise([*argv, None]):
        if here == f"--{flag}":
            found = after
        elif here.startswith(f"--{flag}="):
            found = here.partition("=")[2]
    return found


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)
