"""To and from Hugging Face's GPT-2: a folder that GPT2LMHeadModel.from_pretrained loads, and the other way round.

The two compute the same function; they differ in names, and in that GPT-2 stores the matrices of its blocks
transposed. Written and read are config.json and model.safetensors, with no need for transformers itself.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from . import storage
from .config import ModelConfig
from .errors import Damaged, UserError, writing
from .model import GPT
from .tokenizers import EOS

TOKENIZER = "minigpt_tokenizer.json"
"""The tokenizer of an exported model, as checkpoints have it, which GPT-2 has no place for."""

_CONFIG, _MODEL, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# Ours, GPT-2's, whether GPT-2 has it transposed; in each block, then in the model.
_BLOCK = (
    ("norm1", "ln_1", False),
    ("attention.qkv", "attn.c_attn", True),
    ("attention.out", "attn.c_proj", True),
    ("norm2", "ln_2", False),
    ("mlp.up", "mlp.c_fc", True),
    ("mlp.down", "mlp.c_proj", True),
)
_PREFIX = "transformer."


def export(model: GPT, tokenizer: dict[str, Any], folder: Path) -> None:
    """Write `model`, and its `tokenizer` as JSON values, to the new folder.

    Raises UserError for a model that GPT-2 cannot express, and where it cannot be written.
    """
    if model.config.head_bias:
        raise UserError(
            "GPT-2 has no bias in the output layer, and this model has one: train with --no-head-bias to export it"
        )
    if folder.exists():
        raise UserError(f"{folder} is there already: choose another --out")
    draft = folder.with_name(folder.name + ".writing")
    try:
        with writing(folder):
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            storage.write_json(draft / _CONFIG, _described(model.config))
            storage.write_tensors(draft / _MODEL, dict(_renamed(model)), {"format": "pt"})
            storage.write_json(draft / TOKENIZER, tokenizer)
            (draft / _MODEL).chmod((draft / _CONFIG).stat().st_mode)  # others may read the one if they may the other
            draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _described(config: ModelConfig) -> dict[str, Any]:
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout)
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_inner": None,
        **dropout,
        "tie_word_embeddings": config.tied_head,
        "bos_token_id": EOS,
        "eos_token_id": EOS,
        "dtype": "float32",
    }


def _renamed(model: GPT) -> Iterator[tuple[str, Tensor]]:
    """GPT-2's tensors by name. A bias that a model does not have is zero there."""
    yield f"{_PREFIX}wte.weight", model.tokens.weight.detach()
    yield f"{_PREFIX}wpe.weight", model.positions.detach()
    pairs = [
        (block.get_submodule(ours), f"{_PREFIX}h.{number}.{theirs}", transposed)
        for number, block in enumerate(model.blocks)
        for ours, theirs, transposed in _BLOCK
    ]
    for module, name, transposed in [*pairs, (model.norm, f"{_PREFIX}ln_f", False)]:
        weight = module.weight.detach()
        yield f"{name}.weight", weight.T if transposed else weight
        yield f"{name}.bias", weight.new_zeros(len(weight)) if module.bias is None else module.bias.detach()
    if not model.config.tied_head:
        yield "lm_head.weight", model.head.weight.detach()


def read(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The shape of the GPT-2 in a folder, and its parameters by our names, fp32.

    Raises UserError for what is no GPT-2, what ours cannot express, and what is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: name one with config.json and model.safetensors in it")
    config = _read_config(folder)
    stored = _read_tensors(folder)
    found: dict[str, Tensor] = {}

    def take(ours: str, theirs: str, shape: tuple[int, ...]) -> None:
        name = theirs if theirs in stored else _PREFIX + theirs
        there = tuple(stored[name].shape) if name in stored else "nothing"
        if there != shape:
            raise UserError(f"{folder} does not fit its config.json: {theirs} is {there}, and should be {shape}")
        found[ours] = stored.pop(name).float()

    C, V = config.n_embd, config.vocab_size
    take("tokens.weight", "wte.weight", (V, C))
    take("positions", "wpe.weight", (config.block_size, C))
    sizes = {"attention.qkv": (C, 3 * C), "mlp.up": (C, 4 * C), "mlp.down": (4 * C, C)}
    for number in range(config.n_layer):
        for ours, theirs, transposed in _BLOCK:
            shape = sizes.get(ours, (C, C)) if transposed else (C,)
            name = f"blocks.{number}.{ours}"
            take(f"{name}.weight", f"h.{number}.{theirs}.weight", shape)
            take(f"{name}.bias", f"h.{number}.{theirs}.bias", shape[-1:])
            if transposed:
                found[f"{name}.weight"] = found[f"{name}.weight"].T.contiguous()
    take("norm.weight", "ln_f.weight", (C,))
    take("norm.bias", "ln_f.bias", (C,))
    if not config.tied_head:
        take("head.weight", "lm_head.weight", (V, C))
    masks = (".attn.bias", ".attn.masked_bias")  # constants that older versions stored
    left = [name for name in stored if not name.endswith(masks) and name != "lm_head.weight"]
    if left:
        raise UserError(f"{folder} has tensors that GPT-2 does not have: {', '.join(sorted(left)[:5])}")
    return config, found


def _read_config(folder: Path) -> ModelConfig:
    stored = storage.read_json(folder / _CONFIG)
    width = stored.get("n_embd", 768)
    # What GPT2Config has by default, and the one value that ours has.
    needed = {
        "model_type": ("gpt2",),
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "layer_norm_epsilon": (1e-5,),
        "n_inner": (None, 4 * width),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    }
    for name, values in needed.items():
        if name == "model_type" or name in stored:
            value = stored.get(name)
            if value not in values:
                known = " or ".join(map(repr, values))
                raise UserError(f"{folder / _CONFIG}: {name} is {value!r}, and only {known} can be imported")
    try:
        return ModelConfig(
            vocab_size=int(stored.get("vocab_size", 50257)),
            block_size=int(stored.get("n_positions", 1024)),
            n_layer=int(stored.get("n_layer", 12)),
            n_head=int(stored.get("n_head", 12)),
            n_embd=int(width),
            dropout=float(stored.get("resid_pdrop", 0.1)),
            tied_head=bool(stored.get("tie_word_embeddings", True)),
        )
    except (TypeError, ValueError) as error:
        raise Damaged(f"{folder / _CONFIG} is damaged ({error})") from None


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    if (folder / _INDEX).is_file():
        parts = storage.read_json(folder / _INDEX).get("weight_map")
        names = list(parts.values()) if isinstance(parts, dict) else [None]
        if not all(isinstance(part, str) and part == Path(part).name for part in names):
            raise Damaged(f"{folder / _INDEX} is damaged")
        found: dict[str, Tensor] = {}
        for part in sorted(set(names)):
            found |= storage.read_tensors(folder / part)
        return found
    if not (folder / _MODEL).is_file() and any(folder.glob("*.bin")):
        raise UserError(
            f"{folder} has its weights in a pickle, which could run any code: where you trust it, load it with "
            "transformers and save_pretrained it again"
        )
    return storage.read_tensors(folder / _MODEL)
