"""What a run trains on: the ids of a text in memory, or of a prepared one mapped into it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import corpora, prepare, storage, tokenizers
from .errors import Damaged, UserError
from .tokenizers import CharTokenizer

_MOST_VALIDATION = 1 << 24
"""Tokens of a prepared text that are validated on: the last tenth, and no more than these."""


@dataclass(frozen=True)
class Dataset:
    """Token ids to train and to validate on, and where they come from (`source`, a phrase to print).

    `train` (N,) is an int64 tensor, or an array of uint16 or uint32 that is mapped from a file; `validation` (M,) is an
    int64 tensor. Both are on the CPU. Two runs with the same `sha256` have the same ones.
    """

    name: str
    source: str
    sha256: str
    tokenizer: CharTokenizer
    train: Tensor | np.ndarray
    validation: Tensor

    @property
    def tokens(self) -> int:
        """How many there are in all."""
        return len(self.train) + len(self.validation)


def load(name_or_path: str | None, *, announce: Callable[[str], None] = print) -> Dataset:
    """The corpus or text file that corpora.load knows, or the folder that prepare has written.

    The first nine tenths are to train on. Raises UserError for what cannot be had, and for a prepared text that has
    changed since.
    """
    if name_or_path is not None and (Path(name_or_path) / storage.SEAL).is_file():
        return _prepared(Path(name_or_path))
    corpus = corpora.load(name_or_path, announce=announce)
    tokenizer = CharTokenizer.from_text(corpus.text)
    ids = torch.from_numpy(tokenizer.encode(corpus.text))
    cut = len(corpus.split()[0])
    return Dataset(corpus.name, corpus.source, corpus.sha256, tokenizer, ids[:cut], ids[cut:])


def _prepared(folder: Path) -> Dataset:
    if not (folder / prepare.MANIFEST).is_file():
        raise UserError(f"{folder} is no prepared text: give --data one, or a text file")
    try:
        sums = storage.verify(folder)
    except Damaged as error:
        raise UserError(f"{error.problem}: prepare the text again") from None
    manifest = storage.read_json(folder / prepare.MANIFEST)
    ids = np.memmap(folder / prepare.TOKENS, dtype=np.dtype(manifest["dtype"]), mode="r", shape=(manifest["tokens"],))
    cut = max(int(0.9 * len(ids)), len(ids) - _MOST_VALIDATION)
    validation = torch.from_numpy(ids[cut:].astype(np.int64))
    tokenizer = tokenizers.load(storage.read_json(folder / prepare.TOKENIZER))
    return Dataset(folder.name, f"the prepared text {folder}", sums[prepare.TOKENS], tokenizer, ids[:cut], validation)
