"""Tuned tiles: what a sweep on one GPU found, read before the defaults that stand beside each op.

`tiles/<slug>.json` holds one GPU's: {"schema": 3, "gpu": its name, "tiles": {slot: {key: [numbers]}}}. A slot is a
launch of a plan, SLOTS says what its numbers are, options 0 or 1 at the end; a key is what the op chooses its tile by,
as "half/64". A plan asks `tuned`; without a file, or an entry, it takes its default. `python -m benchmarks tune` writes
the files.
"""

import functools
import json
import re
from pathlib import Path

from kernels.device import Device

FOLDER = Path(__file__).with_name("tiles")
SCHEMA = 3  # 1 had no options, 2 no warpgroups
_ATTENTION = ("BLOCK_Q", "BLOCK_K", "num_warps", "num_stages", "DESCRIPTORS", "WARPGROUPS", "TURNS")
SLOTS: dict[str, tuple[str, ...]] = {
    "attention.forward": (*_ATTENTION, "OVERLAP"),
    "attention.backward_query": _ATTENTION,
    "attention.backward_key": _ATTENTION,
    "layer_norm.forward": ("ROWS", "num_warps"),
    "layer_norm.backward": ("ROWS", "num_warps"),
    "cross_entropy.forward": ("BLOCK_V", "ROWS", "num_warps"),
    "cross_entropy.backward": ("BLOCK_V", "ROWS", "num_warps"),
}
_LIMITS = {
    "BLOCK_Q": (16, 256), "BLOCK_K": (16, 256), "BLOCK_V": (16, 1 << 16), "ROWS": (1, 1024), "num_warps": (1, 32),
    "num_stages": (1, 8), "DESCRIPTORS": (0, 1), "OVERLAP": (0, 1), "WARPGROUPS": (0, 3), "TURNS": (0, 1),
}  # fmt: skip

Table = dict[str, dict[str, tuple[int, ...]]]

_trials: dict[str, Table] = {}


def slug(name: str) -> str:
    """A device's name as a file's: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def tuned(device: Device, slot: str, key: str) -> tuple[int, ...] | None:
    """The numbers for a slot of the device's table, as SLOTS names them; None where nothing was tuned."""
    return table(device.name).get(slot, {}).get(key) if device.name else None


def table(name: str) -> Table:
    """Everything tuned for the device called `name`; empty where there is no file. Raises ValueError for a bad one."""
    return _trials[name] if name in _trials else _load(name)


def try_out(name: str, trial: Table) -> None:
    """Let plans for a Device of this made-up name take the tiles of `trial`: what a sweep measures candidates with."""
    _trials[name] = _checked(trial, name)


@functools.cache
def _load(name: str) -> Table:
    path = FOLDER / f"{slug(name)}.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a table of tiles ({error}): tune again, or remove it") from None
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise ValueError(f'{path} has no "schema": {SCHEMA}, the one read here: tune again, or remove it')
    if document.get("gpu") != name:
        raise ValueError(f"{path} was tuned on {document.get('gpu')!r}, not on {name!r}: tune again, or remove it")
    return _checked(document.get("tiles"), str(path))


def _checked(tiles: object, where: str) -> Table:
    if not isinstance(tiles, dict):
        raise ValueError(f'{where}: "tiles" must be an object of slots, not {tiles!r}')
    checked: Table = {}
    for slot, entries in tiles.items():
        if slot not in SLOTS or not isinstance(entries, dict):
            raise ValueError(f"{where}: {slot!r} is no slot with an object of tiles; there are {', '.join(SLOTS)}")
        for key, numbers in entries.items():
            names = SLOTS[slot]
            if not isinstance(numbers, list | tuple) or len(numbers) != len(names):
                raise ValueError(f"{where}: {slot} {key} must be [{', '.join(names)}], not {numbers!r}")
            for what, number in zip(names, numbers, strict=True):
                low, high = _LIMITS[what]
                whole = isinstance(number, int) and not isinstance(number, bool) and low <= number <= high
                any_whole = what in ("num_stages", "WARPGROUPS")
                if not whole or (not any_whole and number & (number - 1)):
                    kind = "a number" if any_whole else "a power of two"
                    allowed = "0 or 1" if (low, high) == (0, 1) else f"{kind} from {low} to {high}"
                    raise ValueError(f"{where}: {what} of {slot} {key} must be {allowed}, not {number!r}")
            if wrong := _wrong_together(slot, key, dict(zip(names, numbers, strict=True))):
                raise ValueError(f"{where}: {slot} {key} is {list(numbers)}: {wrong}")
            checked.setdefault(slot, {})[key] = tuple(numbers)
    return checked


def _wrong_together(slot: str, key: str, numbers: dict[str, int]) -> str:
    """Why numbers that are right one by one are not together, most of them for kernels/attention_hopper*.py; or ""."""
    if not numbers.get("WARPGROUPS"):
        if slot == "attention.backward_key" and numbers["BLOCK_Q"] > numbers["BLOCK_K"]:
            return "BLOCK_Q must be at most BLOCK_K: the diagonal is walked in whole tiles of queries"
        return "TURNS are between WARPGROUPS" if numbers.get("TURNS") else ""
    many = (2, 3) if slot == "attention.forward" else (2,)
    if numbers["WARPGROUPS"] not in many:
        return f"WARPGROUPS must be 0 or {' or '.join(map(str, many))}"
    if numbers["num_warps"] != 4 or not numbers["DESCRIPTORS"] or not numbers.get("OVERLAP", 1):
        return "with WARPGROUPS num_warps must be 4, a warpgroup's, and DESCRIPTORS and OVERLAP 1"
    own, walked = ("BLOCK_K", "BLOCK_Q") if slot == "attention.backward_key" else ("BLOCK_Q", "BLOCK_K")
    if numbers[own] not in (64, 128) or numbers[walked] < 32:
        return f"with WARPGROUPS {own} must be 64 or 128, a warpgroup's, and {walked} at least 32"
    if slot == "attention.backward_query" and numbers["num_stages"] < 2:
        return "with WARPGROUPS num_stages must be at least 2 here: a tile is still read when the next one is"
    kind = key.split("/")[0]
    return "" if kind in ("half", "half-grouped") else "WARPGROUPS are for fp16 and bf16 without dropout"
