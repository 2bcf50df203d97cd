"""What attention launches: the tiles by architecture, dtype and head size, and the plans that are made of them."""

import math
from typing import NamedTuple

import torch

from kernels import tiles
from kernels.attention_kernels import _attention_backward_key, _attention_backward_query, _attention_forward
from kernels.attention_short import _attention_short_backward, _attention_short_forward
from kernels.device import Device
from kernels.op import Launch, Spec, Specs, cdiv, next_power_of_2, pointers


class Tile(NamedTuple):
    """What a kernel that loops is launched with; the options, 0 or 1, are taken from tuned tables alone."""

    block_q: int
    block_k: int
    warps: int
    stages: int
    descriptors: int = 0  # load through tensor descriptors, by the TMA unit, where _describable
    warpgroups: int = 0  # so many, with a block of rows each, in a kernel of attention_hopper*.py
    turns: int = 0  # at the tensor cores, between those
    overlap: int = 0  # forward: a tile's product p v during the next one's softmax


# (BLOCK_Q, BLOCK_K, warps, stages) by architecture, kind of product and padded head size: tiles that do not spill.
# "half" is fp16 and bf16; fp32 is "ieee", or "tf32" where PyTorch is set to allow it. Random numbers and the loop over
# a group's heads take registers: "-dropout", "-grouped", "-dropout-grouped" where the tile without them would spill.
FORWARD = {
    "sm_80": {
        "half": {64: (128, 64, 8, 3), 128: (128, 32, 8, 3), 256: (64, 32, 8, 2)},
        "tf32": {64: (128, 64, 8, 2), 128: (64, 32, 8, 2), 256: (32, 16, 8, 1)},
        "ieee": {64: (64, 32, 8, 2), 128: (64, 32, 8, 2), 256: (32, 16, 8, 1)},
    },
    "sm_89": {
        "half": {64: (128, 64, 8, 3), 128: (128, 32, 8, 3), 256: (64, 32, 8, 2)},
        "tf32": {64: (128, 64, 8, 2), 128: (64, 32, 8, 2), 256: (32, 16, 8, 1)},
        "ieee": {64: (64, 32, 8, 2), 128: (32, 16, 8, 1), 256: (32, 16, 8, 1)},
    },
    "sm_90": {
        "half": {64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (64, 32, 8, 2)},
        "tf32": {64: (128, 64, 8, 2), 128: (128, 32, 8, 2), 256: (32, 16, 8, 1)},
        "ieee": {64: (64, 32, 8, 2), 128: (32, 16, 8, 1), 256: (32, 16, 8, 1)},
    },
    "gfx942": {
        "half": {64: (128, 64, 4, 1), 128: (128, 64, 4, 1), 256: (64, 32, 4, 1)},
        "tf32": {64: (64, 32, 4, 1), 128: (32, 32, 4, 1), 256: (32, 16, 4, 1)},
        "ieee": {64: (64, 32, 4, 1), 128: (32, 32, 4, 1), 256: (32, 16, 4, 1)},
    },
}
BACKWARD_QUERY = {
    "sm_80": {
        "half": {64: (128, 64, 8, 2), 128: (128, 32, 8, 2), 256: (64, 32, 8, 2)},
        "half-dropout": {64: (128, 32, 8, 2), 128: (64, 32, 8, 2), 256: (64, 32, 8, 2)},
        "tf32": {64: (64, 32, 8, 2), 128: (64, 32, 8, 2), 256: (32, 16, 8, 1)},
        "ieee": {64: (64, 16, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
        "ieee-dropout": {64: (32, 16, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
    },
    "sm_89": {
        "half": {64: (128, 64, 8, 2), 128: (128, 32, 8, 2), 256: (64, 32, 8, 1)},
        "half-dropout": {64: (128, 32, 8, 2), 128: (64, 32, 8, 2), 256: (64, 32, 8, 1)},
        "tf32": {64: (64, 32, 8, 2), 128: (64, 32, 8, 1), 256: (32, 16, 8, 1)},
        "ieee": {64: (64, 16, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
        "ieee-dropout": {64: (32, 16, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
    },
    "sm_90": {
        "half": {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},
        "tf32": {64: (64, 64, 8, 2), 128: (64, 32, 8, 2), 256: (32, 16, 8, 1)},
        "ieee": {64: (64, 16, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
        "ieee-dropout": {64: (32, 16, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
    },
    "gfx942": {
        "half": {64: (64, 64, 4, 1), 128: (64, 32, 4, 1), 256: (32, 32, 4, 1)},
        "tf32": {64: (32, 32, 4, 1), 128: (32, 16, 4, 1), 256: (16, 16, 4, 1)},
        "ieee": {64: (32, 32, 4, 1), 128: (32, 16, 4, 1), 256: (16, 16, 4, 1)},
    },
}
BACKWARD_KEY = {
    "sm_80": {
        "half": {64: (32, 128, 8, 2), 128: (32, 64, 8, 2), 256: (32, 64, 8, 2)},
        "half-dropout": {64: (32, 64, 8, 2), 128: (32, 64, 8, 2), 256: (32, 64, 8, 2)},
        "half-dropout-grouped": {64: (32, 64, 8, 1), 128: (32, 64, 8, 2), 256: (32, 64, 8, 2)},
        "tf32": {64: (32, 32, 8, 2), 128: (32, 64, 8, 2), 256: (16, 16, 8, 1)},
        "ieee": {64: (16, 64, 8, 1), 128: (16, 32, 8, 1), 256: (16, 16, 8, 1)},
    },
    "sm_89": {
        "half": {64: (32, 128, 8, 2), 128: (32, 64, 8, 2), 256: (16, 64, 8, 1)},
        "half-dropout-grouped": {64: (32, 32, 8, 2), 128: (16, 64, 8, 1), 256: (16, 64, 8, 1)},
        "tf32": {64: (32, 32, 8, 2), 128: (16, 32, 4, 1), 256: (16, 16, 8, 1)},
        "ieee": {64: (16, 64, 8, 1), 128: (16, 32, 8, 1), 256: (16, 16, 8, 1)},
    },
    "sm_90": {
        "half": {64: (64, 128, 8, 2), 128: (32, 128, 8, 2), 256: (32, 64, 8, 2)},
        "half-grouped": {64: (64, 128, 8, 2), 128: (32, 64, 8, 1), 256: (32, 64, 8, 2)},
        "half-dropout-grouped": {64: (32, 128, 8, 2), 128: (16, 64, 8, 2), 256: (32, 64, 8, 2)},
        "tf32": {64: (64, 64, 8, 2), 128: (16, 32, 4, 1), 256: (16, 16, 8, 1)},
        "ieee": {64: (16, 64, 8, 1), 128: (16, 32, 8, 1), 256: (16, 16, 8, 1)},
    },
    "gfx942": {
        "half": {64: (32, 64, 4, 1), 128: (32, 64, 4, 1), 256: (16, 32, 4, 1)},
        "tf32": {64: (16, 64, 4, 1), 128: (16, 32, 4, 1), 256: (16, 16, 4, 1)},
        "ieee": {64: (16, 64, 4, 1), 128: (16, 32, 4, 1), 256: (16, 16, 4, 1)},
    },
}
TILES = {  # by slot, see tiles.py
    "attention.forward": FORWARD,
    "attention.backward_query": BACKWARD_QUERY,
    "attention.backward_key": BACKWARD_KEY,
}
for _table in TILES.values():
    _table["sm_100"] = dict(_table["sm_90"])
    # There, products of 64 rows and more with an operand that comes from tl.join, as dropout's does, are TF32 on the
    # tensor cores even under "ieee" (Triton 3.6 and 3.7 take the operand for a widened 16-bit one): fewer rows.
    for _kind_of in ("ieee", "ieee-dropout"):
        if _kind_of in _table["sm_90"]:
            _table["sm_100"][_kind_of] = _table["sm_90"][_kind_of] | {64: _table["sm_90"][_kind_of][128]}
FORWARD["sm_100"]["half"] = FORWARD["sm_90"]["half"] | {64: (128, 64, 8, 2)}
BACKWARD_KEY["sm_100"]["half-grouped"] = BACKWARD_KEY["sm_90"]["half-grouped"] | {128: (64, 64, 8, 1)}
BACKWARD_KEY["sm_100"]["half-dropout-grouped"] = BACKWARD_KEY["sm_90"]["half-dropout-grouped"] | {128: (32, 64, 8, 1)}


# (BLOCK, warps) of the kernels for short sequences, by kind of product and padded head size: the longest sequence must
# fit BLOCK, and shorter ones have fewer warps. Where a tile of 64 spills there is a smaller one, or none, and the
# kernels that loop take over.
SHORT_FORWARD = {
    "half": {64: (64, 4), 128: (64, 8)},
    "tf32": {64: (32, 4)},
    "ieee": {64: (32, 4)},
}
SHORT_BACKWARD = {
    "half": {64: (64, 4), 128: (32, 8)},
    "tf32": {64: (32, 4)},
    "ieee": {64: (32, 4)},
}


def _short_tile(table: dict, specs: Specs, options: dict, device: Device) -> tuple[int, int, int] | None:
    """(LENGTH, BLOCK, warps) where all queries and keys of a head fit one tile, else None; BLOCK // LENGTH heads do."""
    longest = max(specs["query"].shape[2], specs["key"].shape[2])
    length = max(16, next_power_of_2(longest))
    if device.arch == "interpreter":  # its cost is per program
        return (length, 128, 4) if length <= 64 else None
    sizes = table[kind_of(specs["query"], options)]
    block, warps = sizes.get(max(64, next_power_of_2(specs["query"].shape[-1])), (0, 0))
    return (length, length, max(1, warps * length // block)) if length <= block else None


def precision(options: dict) -> str:
    """What fp32 products are made in; those of 16 bits take no notice."""
    return "tf32" if options["allow_tf32"] else "ieee"


def kind_of(spec: Spec, options: dict) -> str:
    """The kind of product that a tile table goes by."""
    return precision(options) if spec.dtype == torch.float32 else "half"


def exponent_scale(spec: Spec, options: dict) -> float:
    """The scale as _exp in attention_kernels.py takes it: for exponents to base 2 in 16 bits, to base e in fp32."""
    return options["scale"] * (1.0 if spec.dtype == torch.float32 else math.log2(math.e))


def _tile(
    slot: str, spec: Spec, options: dict, device: Device, walked: tuple[Spec, ...], *,
    grouped: bool = False, hopper: bool = True,
) -> Tile:  # fmt: skip
    """The tile of one of the kernels that loop, and walk these (B, H, T, D); `hopper`: those for Hopper will do."""
    if device.arch == "interpreter":  # its cost is per program
        return Tile(128, 128, 4, 1)
    rows = TILES[slot][device.tiles]
    kind, size = kind_of(spec, options), max(64, next_power_of_2(spec.shape[-1]))
    traits = ["-dropout"] * (options["dropout_p"] > 0.0) + ["-grouped"] * grouped
    exact = kind + "".join(traits)
    if tuned := tiles.tuned(device, slot, f"{exact}/{size}"):
        tile = Tile(*tuned)
        # those describe all heads together: a head or batch that is another one again has no stride
        apart = all(spec.stride[0] > 0 < spec.stride[1] for spec in walked)
        if not tile.warpgroups or (hopper and device.warpgroups and apart and _describable(device, *walked)):
            return tile
    row = next(row for row in (exact, *(kind + trait for trait in traits), kind) if row in rows)
    return Tile(*rows[row][size])


def _describable(device: Device, *matrices: Spec) -> bool:
    """Whether tensor descriptors can be made of the heads of these (B, H, T, D) on the device.

    Every head's matrix must begin at a multiple of 16 bytes, have rows that are 16 bytes or more, do not overlap and
    lie multiples of 16 bytes apart, and not be empty.
    """
    for spec in matrices:
        size = spec.dtype.itemsize
        spaced = all(stride * size % 16 == 0 for stride in spec.stride[:3])
        rows = spec.stride[3] == 1 and spec.stride[2] >= spec.shape[3] and spec.shape[3] * size >= 16
        if not (spec.aligned and spaced and rows and 0 not in spec.shape):
            return False
    return device.descriptors


def _strides(specs: Specs, **names: str) -> dict[str, int]:
    """Batch, head and row strides of the tensors of these names, by prefix, as the kernels name them."""
    strides = {}
    for prefix, name in names.items():
        spec = specs[name]
        strides |= {f"{prefix}_stride_b": spec.stride[0], f"{prefix}_stride_h": spec.stride[1]}
        strides |= {f"{prefix}_stride": spec.stride[2]}
    return strides


def _numbers(specs: Specs, options: dict) -> dict[str, int | float]:
    """The arguments that every kernel here takes, in their order."""
    n_head, q_len = specs["query"].shape[1:3]
    n_key_head, k_len = specs["key"].shape[1:3]
    threshold = round(options["dropout_p"] * 65536)
    return {
        "n_head": n_head,
        "group": n_head // max(1, n_key_head),
        "q_len": q_len,
        "k_len": k_len,
        "query_offset": options["query_offset"],
        "exponent_scale": exponent_scale(specs["query"], options),
        "scale": options["scale"],
        "threshold": threshold,
        "keep_scale": 65536 / (65536 - threshold) if threshold < 65536 else 0.0,
    }


def _with_diagonal(specs: Specs, options: dict) -> dict:
    """Dropout without a diagonal as dropout with one beyond all keys, which is the same.

    In the kernels that loop, random numbers and no diagonal would have ptxas serialise the tensor cores (C7515).
    """
    if options["is_causal"] or options["dropout_p"] == 0.0:
        return options
    return dict(options) | {"is_causal": True, "query_offset": cdiv(specs["key"].shape[2], 128) * 128}


def _constexprs(specs: Specs, options: dict) -> dict:
    d = specs["query"].shape[-1]
    return {
        "D": d,
        "BLOCK_D": max(16, next_power_of_2(d)),
        "IS_CAUSAL": options["is_causal"],
        "PRECISION": precision(options),
    }


def _tile_constexprs(tile: Tile, even: bool, device: Device, *walked: Spec) -> dict:
    """Those of the kernels that loop; the tiles of the (B, H, T, D) `walked` come through descriptors if asked for."""
    descriptors = tile.descriptors == 1 and _describable(device, *walked)
    return {"BLOCK_Q": tile.block_q, "BLOCK_K": tile.block_k, "EVEN": even, "DESCRIPTORS": descriptors}


def _copies(tile: Tile, device: Device) -> int:
    """How often each of the statistics is loaded, see _load_statistics; four times spills where it is not Hopper."""
    return min(4 if device.tiles == "sm_90" else 2, max(1, 32 * tile.warps // (2 * tile.block_q)))


def _short_launch(kernel, specs: Specs, options: dict, arguments: dict, short: tuple[int, int, int]) -> Launch:
    length, block, warps = short
    key_heads = specs["key"].shape[0] * specs["key"].shape[1]
    constexprs = _constexprs(specs, options) | {"LENGTH": length, "BLOCK": block}
    grid = (cdiv(key_heads, block // length),)
    return Launch(kernel, grid, arguments | {"key_heads": key_heads}, constexprs, warps, 1)


def _hopper_launch(
    name: str, specs: Specs, options: dict, arguments: dict, tile: Tile, device: Device, own: str, even: bool = False
) -> Launch:
    """Of a kernel that goes through tiles of the heads of `own`, query or key, until none is left."""
    from kernels import attention_hopper, attention_hopper_backward  # Gluon is imported where it is used

    kernel = getattr(attention_hopper, name, None) or getattr(attention_hopper_backward, name)
    batches, heads, length, _ = specs[own].shape
    rows = tile.warpgroups * (tile.block_q if own == "query" else tile.block_k)
    of_head = cdiv(length, rows)
    programs = min(of_head * batches * heads, device.processors)
    rounds = cdiv(of_head * batches * heads, max(1, programs))
    unused = ("grad_lse_ptr", "seed_ptr", "threshold", "keep_scale")
    taken = {argument: value for argument, value in arguments.items() if argument not in unused}
    taken |= {"batches": batches, "n_key_head": specs["key"].shape[1], "tiles": of_head, "rounds": rounds}
    constexprs = _constexprs(specs, options) | {"BLOCK_Q": tile.block_q, "BLOCK_K": tile.block_k, "EVEN": even}
    constexprs |= {"STAGES": tile.stages, "WARPGROUPS": tile.warpgroups, "TURNS": bool(tile.turns)}
    constexprs = {constexpr: constexprs[constexpr] for constexpr in kernel.arg_names[len(taken) :]}
    return Launch(kernel, (programs,), taken, constexprs, tile.warps, tile.stages)


def plan_forward(specs: Specs, options: dict, device: Device) -> list[Launch]:
    batch, n_head, q_len, _ = specs["query"].shape
    if not n_head:  # of 0 heads the kernels cannot make groups
        return []
    numbers = _numbers(specs, options)
    del numbers["scale"]
    arguments = pointers(specs, "query", "key", "value", "out", "lse", "seed")
    arguments |= _strides(specs, q="query", k="key", v="value", o="out") | numbers
    if short := _short_tile(SHORT_FORWARD, specs, options, device):
        return [_short_launch(_attention_short_forward, specs, options, arguments, short)]
    options = _with_diagonal(specs, options)
    arguments["query_offset"] = options["query_offset"]
    walked = (specs["query"], specs["key"], specs["value"])
    tile = _tile("attention.forward", specs["query"], options, device, walked)
    even = specs["key"].shape[2] % tile.block_k == 0
    if tile.warpgroups:
        name = "_attention_forward_hopper"
        return [_hopper_launch(name, specs, options, arguments, tile, device, "query", even)]
    constexprs = _constexprs(specs, options) | _tile_constexprs(tile, even, device, *walked)
    constexprs["OVERLAP"] = bool(tile.overlap)
    grid = (cdiv(q_len, tile.block_q) * batch * n_head,)
    return [Launch(_attention_forward, grid, arguments, constexprs, tile.warps, tile.stages)]


def plan_backward(specs: Specs, options: dict, device: Device) -> list[Launch]:
    if not specs["query"].shape[1]:
        return []
    if short := _short_tile(SHORT_BACKWARD, specs, options, device):
        names = ("query", "key", "value", "out", "grad", "lse", "grad_lse", "seed", "dquery", "dkey", "dvalue")
        strides = _strides(specs, q="query", k="key", v="value", o="out", g="grad", dq="dquery", dk="dkey", dv="dvalue")
        arguments = pointers(specs, *names) | strides | _numbers(specs, options)
        return [_short_launch(_attention_short_backward, specs, options, arguments, short)]
    options = _with_diagonal(specs, options)
    return [_plan_dquery(specs, options, device), _plan_dkey_dvalue(specs, options, device)]


def _plan_dquery(specs: Specs, options: dict, device: Device) -> Launch:
    """dquery, and the statistics that the other launch reads."""
    batch, n_head, q_len, _ = specs["query"].shape
    names = ("query", "key", "value", "out", "grad", "lse", "grad_lse", "seed", "statistics", "dquery")
    strides = _strides(specs, q="query", k="key", v="value", o="out", g="grad", dq="dquery")
    arguments = pointers(specs, *names) | strides | _numbers(specs, options)
    walked = (specs["query"], specs["key"], specs["value"], specs["grad"])
    hopper = specs["grad_lse"] is None
    tile = _tile("attention.backward_query", specs["query"], options, device, walked, hopper=hopper)
    even = specs["key"].shape[2] % tile.block_k == 0
    if tile.warpgroups:
        name = "_attention_backward_query_hopper"
        return _hopper_launch(name, specs, options, arguments, tile, device, "query", even)
    constexprs = _constexprs(specs, options) | _tile_constexprs(tile, even, device, *walked)
    grid = (cdiv(q_len, tile.block_q) * batch * n_head,)
    return Launch(_attention_backward_query, grid, arguments, constexprs, tile.warps, tile.stages)


def _plan_dkey_dvalue(specs: Specs, options: dict, device: Device) -> Launch:
    batch, n_key_head, k_len, _ = specs["key"].shape
    n_head, q_len = specs["query"].shape[1:3]
    names = ("query", "key", "value", "grad", "seed", "statistics", "dkey", "dvalue")
    strides = _strides(specs, q="query", k="key", v="value", g="grad", dk="dkey", dv="dvalue")
    arguments = pointers(specs, *names) | strides | _numbers(specs, options)
    walked = (specs["query"], specs["key"], specs["value"], specs["grad"])
    grouped = n_head > n_key_head
    tile = _tile("attention.backward_key", specs["query"], options, device, walked, grouped=grouped)
    if tile.warpgroups:
        return _hopper_launch("_attention_backward_key_hopper", specs, options, arguments, tile, device, "key")
    even = q_len % tile.block_q == 0 and (not options["is_causal"] or options["query_offset"] % tile.block_q == 0)
    constexprs = _constexprs(specs, options) | _tile_constexprs(tile, even, device, *walked)
    constexprs["COPIES"] = _copies(tile, device)
    grid = (cdiv(k_len, tile.block_k) * batch * n_key_head,)
    return Launch(_attention_backward_key, grid, arguments, constexprs, tile.warps, tile.stages)
