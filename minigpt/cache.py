"""The cache of keys and values: what a token has once computed is not computed again for the tokens after it.

`prefill` runs whole prompts and keeps the keys and values of every block; `step` runs one new token of each row against
them. A step reads every weight and the filled slots once and computes next to nothing: memory bandwidth is its bound.
"""

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import faults, graphs
from .backends import unpack
from .errors import UserError
from .model import GPT, Attend


class Cache:
    """Slots for the keys and values of `rows` sequences of up to block_size tokens, made once and written in place.

    keys, values: (n_layer, rows, H, block_size, D), of the weights' dtype and on their device. lengths: (rows,) int64
    there too, how many slots of each row are filled; what lies in the slots beyond is finite and means nothing.
    Raises UserError where there is no memory for so many rows.
    """

    def __init__(self, model: GPT, rows: int):
        config, weight = model.config, model.tokens.weight
        shape = (config.n_layer, rows, config.n_head, config.block_size, config.n_embd // config.n_head)
        try:
            self.keys, self.values = (torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in range(2))
        except (RuntimeError, MemoryError) as error:
            size = math.prod(shape) * weight.itemsize
            if size < 2**63 and not faults.is_out_of_memory(error):  # beyond that, PyTorch cannot count the bytes
                raise
            raise UserError(
                f"there is no memory for the keys and values of {rows:,} rows, {2 * size / 1e9:,.1f} GB: take fewer "
                "--num-samples or --beams, or --no-cache"
            ) from error
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=weight.device)
        self.rows = torch.arange(rows, device=weight.device)

    def reorder(self, rows: Sequence[int], filled: int) -> None:
        """Let each row go on from what row rows[i] holds in its first `filled` slots; several may from the same one."""
        index = torch.tensor(rows, device=self.lengths.device)
        for tensor in (self.keys, self.values):
            part = tensor[:, :, :, :filled]
            part.copy_(part.index_select(1, index))
        self.lengths.copy_(self.lengths[index])


def prefill(model: GPT, cache: Cache, contexts: Sequence[Sequence[int]], rows: Sequence[int]) -> Tensor | None:
    """Fill row rows[i] of the cache with the tokens of contexts[i], of different lengths as they like.

    Contexts have 0 to block_size tokens. Gives the logits (len(rows), V) after the last token of each, or None where
    some context has none. The batch is padded on the right, where causal attention does not look; the slots of the
    padding do not count as filled.
    """
    lengths = torch.tensor([len(context) for context in contexts], device=cache.lengths.device)
    index = torch.tensor(rows, device=cache.lengths.device)
    cache.lengths[index] = lengths
    longest = max(map(len, contexts))
    if not longest:
        return None
    idx = torch.zeros(len(contexts), longest, dtype=torch.int64)
    for row, context in zip(idx, contexts, strict=True):
        row[: len(context)] = torch.as_tensor(context)
    idx = idx.to(index.device)

    def attend(layer: int, qkv: Tensor) -> Tensor:
        _, k, v = unpack(qkv)
        cache.keys[layer, index, :, :longest] = k
        cache.values[layer, index, :, :longest] = v
        return model.ops.attention(qkv, is_causal=True)

    x, branch = _blocks(model, model.tokens(idx) + model.positions[:longest], attend)
    if not min(map(len, contexts)):
        return None
    every = torch.arange(len(contexts), device=index.device)
    return _logits(model, x[every, lengths - 1], branch[every, lengths - 1])


def step(model: GPT, cache: Cache, tokens: Tensor) -> Tensor:
    """Append one token to each row, tokens (rows,) int64 on the device; the logits (rows, V) after them.

    No row may be full. Shapes and addresses are the same at every step and nothing waits for the device: a CUDA
    graph can hold it.
    """
    slots = cache.lengths
    filled = slots + 1

    def attend(layer: int, qkv: Tensor) -> Tensor:
        q, k, v = unpack(qkv)
        keys, values = cache.keys[layer], cache.values[layer]
        keys[cache.rows, :, slots] = k[:, :, 0]
        values[cache.rows, :, slots] = v[:, :, 0]
        return model.ops.decode(q, keys, values, filled).transpose(1, 2)

    x, branch = _blocks(model, (model.tokens(tokens) + model.positions[slots])[:, None], attend)
    logits = _logits(model, x[:, 0], branch[:, 0])
    cache.lengths.copy_(filled)
    return logits


class GraphedStep:
    """`step` as one CUDA graph, which a GPU runs without waiting for Python; made while the cache is empty.

    The logits that a call gives are overwritten by the next one. Raises UserError for a model that is not on a GPU,
    and where something in the step cannot be captured.
    """

    def __init__(self, model: GPT, cache: Cache):
        device = cache.lengths.device
        if device.type != "cuda":
            raise UserError(f"a CUDA graph needs a GPU, and the model is on {device}: say --no-cuda-graph")
        self._tokens = torch.zeros_like(cache.lengths)
        with torch.cuda.device(device):  # it need not be the first GPU
            for _ in range(graphs.WARM_UP):  # what compiles or allocates at its first call does so before the capture
                cache.lengths.zero_()
                graphs.beside(lambda: step(model, cache, self._tokens))
            cache.lengths.zero_()
            self._graph, self._logits = graphs.capture(lambda: step(model, cache, self._tokens), "say --no-cuda-graph")
            cache.lengths.zero_()

    def __call__(self, tokens: Tensor) -> Tensor:
        """See `step`."""
        self._tokens.copy_(tokens)
        self._graph.replay()
        return self._logits


def _blocks(model: GPT, x: Tensor, attend: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    branch = None
    for layer, block in enumerate(model.blocks):
        by_layer: Attend = functools.partial(attend, layer)
        x, branch = block(x, branch, by_layer)
    return x, branch


def _logits(model: GPT, x: Tensor, branch: Tensor) -> Tensor:
    """(R, V) of the residual stream and its last branch, (R, C) each."""
    y, _ = model.norm(x, branch)
    return model.head(y)
