"""Where each head looks: attention maps, made again from queries, keys and the saved log-sum-exp.

The kernels never store attention probabilities. They save, for each query, lse = log sum_j exp(s_ij), with which one
map is p_ij = exp(s_ij - lse_i), s_ij = q_i . k_j / sqrt(D) for j <= i (Dao et al. 2022): what backward does, tile by
tile.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor

import kernels
import kernels.reference

from .backends import unpack
from .model import GPT
from .plots import INK, QUIET, STYLE, save
from .report import write_text

_PAGE = Path(__file__).parent / "pages" / "attention.html"
_LABELLED = 40
"""Tokens up to which a picture has room for a label at each."""


@torch.no_grad()
def attention_maps(model: GPT, idx: Tensor) -> Tensor:
    """The attention of every head for tokens idx (T,) int64: (n_layer, n_head, T, T) fp32 on the CPU.

    Row i is what position i takes from positions 0 to i; it sums to 1. Queries, keys and the log-sum-exp are those of
    the backend that the model runs on. T must not exceed the model's block_size.
    """
    namespace = kernels if model.ops.names["attention"] == "triton" else kernels.reference
    found: list[Tensor] = []

    def recording(qkv: Tensor, *, dropout_p: float, is_causal: bool) -> Tensor:
        out, lse = namespace.scaled_dot_product_attention_qkvpacked(qkv, is_causal=is_causal, return_lse=True)
        query, key, _ = unpack(qkv)
        scores = query.float() @ key.float().transpose(-1, -2) / math.sqrt(query.shape[-1])
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        found.append((scores - lse[..., None]).exp().masked_fill(future, 0.0)[0].cpu())
        return out

    before, was_training = model.ops, model.training
    model.use(replace(before, attention=recording))
    model.eval()
    try:
        model(idx[None].to(next(model.parameters()).device), last_only=True)
    finally:
        model.use(before)
        model.train(was_training)
    return torch.stack(found)


def draw(maps: Tensor, labels: list[str], png: Path, *, title: str = "") -> None:
    """Draw maps (n_layer, n_head, T, T), a row of panels for each layer; `labels` are the T tokens as they are shown.

    Darker is more, on a scale of its own square root, so that small shares are seen. Raises UserError when the picture
    cannot be written.
    """
    n_layer, n_head, length, _ = maps.shape
    side = 3.1 if length <= _LABELLED else 2.4
    with rc_context(STYLE):
        figure = Figure(figsize=(side * n_head + 0.8, side * n_layer + 0.9), dpi=130, layout="constrained")
        if title:
            figure.suptitle(title, x=0.012, ha="left", fontsize=12, color=QUIET)
        panels = figure.subplots(n_layer, n_head, squeeze=False)
        for layer, head in np.ndindex(n_layer, n_head):
            axes = panels[layer, head]
            image = axes.imshow(maps[layer, head].sqrt().numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
            axes.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=10, color=INK, loc="left", pad=4)
            axes.spines[:].set_visible(False)
            ticks = range(length) if length <= _LABELLED else []
            size = min(8.0, 190 / length)
            axes.set_xticks(ticks, labels if ticks else [], fontsize=size, family="monospace")
            axes.set_yticks(ticks, labels if ticks else [], fontsize=size, family="monospace")
            axes.tick_params(length=0, pad=1)
            if layer == n_layer - 1:
                axes.set_xlabel("looked at", fontsize=9, color=QUIET)
            if head == 0:
                axes.set_ylabel("position", fontsize=9, color=QUIET)
        bar = figure.colorbar(image, ax=panels, shrink=0.6, pad=0.01)
        shares = (0.0, 0.05, 0.25, 0.5, 1.0)
        bar.set_ticks([math.sqrt(share) for share in shares], labels=[f"{share:.0%}" for share in shares])
        bar.outline.set_visible(False)
        save(figure, png)


def page(maps: Tensor, labels: list[str], *, title: str = "") -> str:
    """A page, as HTML, that shows maps (n_layer, n_head, T, T) interactively and needs no network."""
    # In thousandths: what an eye can tell apart, in a tenth of the bytes.
    shares = (maps * 1000).round().to(torch.int64).tolist()
    data = json.dumps({"title": title, "labels": labels, "maps": shares}, separators=(",", ":"))
    # In a script, "</" would end it, and what a prompt says must stay text.
    data = data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return _PAGE.read_text(encoding="utf-8").replace('"MAPS"', data)


def write_page(maps: Tensor, labels: list[str], html: Path, *, title: str = "") -> None:
    """Write `page` to a file. Raises UserError when it cannot be written."""
    write_text(html, page(maps, labels, title=title))


def shown(text: str) -> str:
    """A token as a label: one line, and something to see for spaces and control characters."""
    names = {" ": "\u2423", "\n": "\u23ce", "\t": "\u21e5"}
    return "".join(names.get(c, c if c.isprintable() else f"\\x{ord(c):02x}") for c in text) or "\u2205"
