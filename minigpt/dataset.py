"""What a run trains on: the ids of a text in memory, or of a prepared one mapped into it."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import corpora, prepare, storage, tokenizer_choice, tokenizers
from .errors import Damaged, UserError
from .tokenizers import CharTokenizer, Tokenizer

_MOST_VALIDATION = 1 << 24
"""Tokens of a prepared text that are validated on: the last tenth, and no more than these."""


@dataclass(frozen=True)
class Dataset:
    """Token ids to train and to validate on, and where they come from (`source`, a phrase to print).

    `train` (N,) is an int64 tensor, or an array of uint16 or uint32 that is mapped from a file; `validation` (M,) is an
    int64 tensor. Both are on the CPU. Two runs with the same `sha256` and the same tokenizer have the same ones; a text
    in memory has another one with another tokenizer.
    """

    name: str
    source: str
    sha256: str
    tokenizer: Tokenizer
    train: Tensor | np.ndarray
    validation: Tensor

    @property
    def tokens(self) -> int:
        """How many there are in all."""
        return len(self.train) + len(self.validation)


def load(
    name_or_path: str | None,
    tokenizer: str | Tokenizer | None = None,
    vocab_size: int = 0,
    *,
    announce: Callable[[str], None] = print,
) -> Dataset:
    """The corpus or text file that corpora.load knows, or the folder that prepare has written.

    `tokenizer` and `vocab_size` as in tokenizer_choice.choose; a prepared text has its own. Or the tokenizer itself:
    then characters that it does not know become <unk>, and a prepared text is not held to it. The first nine tenths of
    the characters are to train on. Raises UserError for what cannot be had, for a prepared text that has changed since,
    and where `tokenizer` names another one than it has.
    """
    if name_or_path is not None and (Path(name_or_path) / storage.SEAL).is_file():
        return _prepared(Path(name_or_path), tokenizer, vocab_size)
    corpus = corpora.load(name_or_path, announce=announce)
    if tokenizer is None or isinstance(tokenizer, str):
        alphabet = "".join(set(corpus.text))
        tokenizer = tokenizer_choice.choose(
            tokenizer, vocab_size, alphabet=alphabet, texts=lambda: [corpus.text], announce=announce
        )
    ids = tokenizer.encode(corpus.text)
    cut = tokenizers.tokens_before(tokenizer, ids, len(corpus.split()[0]))
    ids = torch.from_numpy(ids)
    return Dataset(corpus.name, corpus.source, _sha256(corpus, tokenizer), tokenizer, ids[:cut], ids[cut:])


def _sha256(corpus: corpora.Corpus, tokenizer: Tokenizer) -> str:
    """That of the text where its characters are the tokens, else that of both."""
    if isinstance(tokenizer, CharTokenizer) and set(tokenizer.characters) == set(corpus.text):
        return corpus.sha256
    stored = json.dumps(tokenizer.to_json(), sort_keys=True)
    return hashlib.sha256(f"{corpus.sha256} {stored}".encode(errors="surrogatepass")).hexdigest()


def _prepared(folder: Path, wanted: str | Tokenizer | None, vocab_size: int) -> Dataset:
    if not (folder / prepare.MANIFEST).is_file():
        raise UserError(f"{folder} is no prepared text: give --data one, or a text file")
    try:
        sums = storage.verify(folder)
    except Damaged as error:
        raise UserError(f"{error.problem}: prepare the text again") from None
    tokenizer = tokenizers.load(storage.read_json(folder / prepare.TOKENIZER))
    if (wanted is None or isinstance(wanted, str)) and tokenizer_choice.contradicts(wanted, vocab_size, tokenizer):
        raise UserError(
            f"{folder} was prepared with another tokenizer ({tokenizer.kind}, {tokenizer.vocab_size:,} tokens) than "
            f"--tokenizer {wanted}{f' --vocab-size {vocab_size}' if vocab_size else ''} asks for: leave that out, or "
            "prepare the text anew with it"
        )
    manifest = storage.read_json(folder / prepare.MANIFEST)
    ids = np.memmap(folder / prepare.TOKENS, dtype=np.dtype(manifest["dtype"]), mode="r", shape=(manifest["tokens"],))
    # Those of characters that an older version prepared have no "train": it is the same number.
    cut = max(manifest.get("train", int(0.9 * len(ids))), len(ids) - _MOST_VALIDATION)
    validation = torch.from_numpy(ids[cut:].astype(np.int64))
    return Dataset(folder.name, f"the prepared text {folder}", sums[prepare.TOKENS], tokenizer, ids[:cut], validation)
