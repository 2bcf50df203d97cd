"""Runs of untrained models, written in a moment: what the playground's tests play with."""

from dataclasses import replace
from pathlib import Path

import torch

from minigpt import checkpoint
from minigpt.backends import resolve
from minigpt.bpe import ALPHABET, BPETokenizer
from minigpt.config import preset
from minigpt.model import GPT
from minigpt.tokenizers import SPECIAL, CharTokenizer

TEXT = "The quick brown fox jumps over the lazy dog.\n<b>'Twas & 5 euro</b> for caf\u00e9 \u20ac.\n"
CHARACTERS = CharTokenizer.from_text(TEXT)
BYTES = BPETokenizer((*SPECIAL, *ALPHABET), ())
"""BPE that has learnt nothing: every character beyond ASCII is several tokens."""


def write_run(folder: Path, tokenizer=CHARACTERS, *, seed=1, block_size=32, n_layer=2):
    """A run with one checkpoint; its logits differ enough for some tokens to be likely. Gives the model."""
    shape = {"n_layer": n_layer, "n_head": 2, "n_embd": 32, "block_size": block_size, "tied_head": False}
    config = preset("shakespeare-cpu", **shape, device="cpu")
    torch.manual_seed(seed)
    model = GPT(config.model_config(tokenizer.vocab_size), resolve("eager", torch.device("cpu")))
    with torch.no_grad():
        model.head.weight *= 4
    checkpoint.save(folder / "best", model, tokenizer, replace(config, max_steps=7), {"progress": {"step": 7}})
    return model.eval()
