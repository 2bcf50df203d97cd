"""The random generators of a process: Python's, NumPy's, PyTorch's, and the device's."""

import random
from typing import Any

import numpy as np
import torch

from .errors import Damaged


def seed(number: int) -> None:
    """Start every generator from `number`, 0 to 2**63 - 1."""
    random.seed(number)
    np.random.seed([number & 0xFFFFFFFF, number >> 32])
    torch.manual_seed(number)


def states(device: torch.device) -> dict[str, Any]:
    """Where each generator stands, as JSON values; with that of `device` if it is a GPU."""
    version, words, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    found = {
        "python": [version, list(words), gauss],
        "numpy": numpy | {"state": numpy["state"] | {"key": numpy["state"]["key"].tolist()}},
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
    }
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device).numpy().tobytes().hex()
    return found


def restore(stored: dict[str, Any], device: torch.device) -> None:
    """Put the generators where `states` found them; a GPU's stays where it is if none was stored.

    Raises Damaged for what `states` did not make.
    """
    try:
        version, words, gauss = stored["python"]
        random.setstate((version, tuple(words), gauss))
        np.random.set_state(stored["numpy"])
        torch.set_rng_state(_bytes(stored["torch"]))
        if device.type == "cuda" and "cuda" in stored:
            torch.cuda.set_rng_state(_bytes(stored["cuda"]), device)
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise Damaged(f"the stored random generators cannot be used ({error})") from None


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
