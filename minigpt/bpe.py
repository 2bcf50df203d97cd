"""Byte pair encoding over bytes: ids for the runs of bytes that are frequent in a text.

Sennrich, Haddow & Birch 2016, on bytes as in GPT-2 (Radford et al. 2019): text is cut into words, numbers and runs of
other signs, each with the space before it, and within each the merges are carried out in the order in which they were
learnt. Every byte is a token too, so that nothing is ever unknown. The package `tokenizers` (an optional one)
learns and carries out the merges; decoding needs nothing.

Tokens are written as GPT-2 does: one printable character for each byte, so that " the" is "Ġthe".
"""

import importlib.util
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from .errors import UserError
from .tokenizers import REPLACEMENT, SPECIAL, ByteStream, damaged, flat_ids

DEFAULT_SIZE = 1024
SMALLEST_SIZE = len(SPECIAL) + 256
"""Tokens of a tokenizer that has learnt no merge: the special ones and every byte."""

_FEWEST = 2  # a pair that turns up once would make a token that saves nothing anywhere else
_ENDS = ("<|endoftext|>", "<eos>", "</s>")  # names of the token that ends a text
_VANISH = ("<pad>",)

_PIECE = 1 << 14  # characters that are encoded as one: large enough to keep a processor busy
_PIECES_AT_ONCE = 32  # what the package makes of a text takes a hundred times its memory, so not all of it at once
# No pre-token has a sign and white space after it, so before the white space a text can be cut. (Not within white
# space, whose last space belongs to the word behind it.) `re` knows a few more kinds of white space than the package
# does, hence only two of them here.
_CUT = re.compile(r"(?<=\S)[ \n]")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, from an undecodable argument: no text has it


def _alphabet() -> list[str]:
    """The character that stands for each byte: itself where it is printable, else the next from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x100)
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


ALPHABET = _alphabet()
_BYTE = {sign: byte for byte, sign in enumerate(ALPHABET)}


@dataclass(frozen=True)
class BPETokenizer:
    """Methods as in Tokenizer. Raises ValueError for what is no byte-level BPE.

    `tokens` are all of them in the order of their ids; `merges`, such as "t h", in the order in which they are carried
    out. A token that is neither a byte nor what a merge makes is a special one.
    """

    tokens: tuple[str, ...]
    merges: tuple[str, ...]
    kind: ClassVar[str] = "bpe"

    def __post_init__(self) -> None:
        known = set(self.tokens)
        if len(known) < len(self.tokens):
            raise ValueError("a token is there twice")
        if missing := set(ALPHABET) - known:
            raise ValueError(f"{len(missing)} of the 256 bytes have no token")
        for merge in self.merges:
            parts = merge.split(" ")
            if len(parts) != 2 or not {*parts, "".join(parts)} <= known:
                raise ValueError(f"the merge {merge!r} is not of two tokens into a third")
        for token in known - set(self._special):
            if not set(token) <= _BYTE.keys():
                raise ValueError(f"the token {token!r} is not made of bytes")
        if not set(_ENDS) & set(self._special):
            raise ValueError(f"no token ends a text; it would be called {' or '.join(_ENDS)}")

    @cached_property
    def _special(self) -> tuple[str, ...]:
        ordinary = {*ALPHABET, *(merge.replace(" ", "") for merge in self.merges)}
        return tuple(token for token in self.tokens if token not in ordinary)

    @property
    def vocab_size(self) -> int:
        """The number of ids: the special ones, the bytes and the merges."""
        return len(self.tokens)

    @cached_property
    def eos(self) -> int:
        """See Tokenizer."""
        return self.tokens.index(next(name for name in _ENDS if name in self._special))

    @cached_property
    def special_ids(self) -> tuple[int, ...]:
        """See Tokenizer."""
        return tuple(map(self.tokens.index, self._special))

    @cached_property
    def characters_per_token(self) -> np.ndarray:
        """See Tokenizer: the bytes that begin a character in UTF-8."""
        lengths = [sum(byte & 0xC0 != 0x80 for byte in found) for found in self._bytes[:-1]]
        return np.array(lengths, dtype=np.int64)

    @cached_property
    def _bytes(self) -> list[bytes]:
        # Indexed by id; the last entry stands for every id outside the vocabulary.
        special = {token: b"" if token in (*_ENDS, *_VANISH) else REPLACEMENT.encode() for token in self._special}
        found = [special[token] if token in special else _to_bytes(token) for token in self.tokens]
        return [*found, REPLACEMENT.encode()]

    @cached_property
    def _coder(self) -> Any:
        package = _package()
        vocabulary = {token: number for number, token in enumerate(self.tokens)}
        merges = [tuple(merge.split(" ")) for merge in self.merges]
        # Without special tokens, so that their names are ordinary text.
        coder = package.Tokenizer(package.models.BPE(vocabulary, merges))
        coder.pre_tokenizer = _pre_tokenizer(package)
        return coder

    def __getstate__(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "merges": self.merges}

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, (N,) int64. UserError where the package tokenizers is missing."""
        found = [np.empty(0, dtype=np.int64)]
        pieces = _pieces(text)
        while batch := list(itertools.islice(pieces, _PIECES_AT_ONCE)):
            encodings = self._coder.encode_batch_fast(batch, add_special_tokens=False)
            found += [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]
        return np.concatenate(found)

    def decode(self, ids: Iterable[int]) -> str:
        """See Tokenizer."""
        ids, table = flat_ids(ids), self._bytes
        places = np.where((ids >= 0) & (ids < self.vocab_size), ids, self.vocab_size).tolist()
        return b"".join([table[place] for place in places]).decode(errors="replace")

    def stream(self) -> ByteStream:
        """See Tokenizer."""
        return ByteStream(self._bytes)

    def token_text(self, token: int) -> str:
        """See Tokenizer."""
        if token in self.special_ids:
            return self.tokens[token]
        return self._bytes[token if 0 <= token < self.vocab_size else -1].decode(errors="backslashreplace")

    def unknown(self, text: str) -> list[str]:
        """See Tokenizer: none, but for halves of characters, which no text has; encode takes U+FFFD for them."""
        return list(dict.fromkeys(_LONE_SURROGATE.findall(text)))

    def to_json(self) -> dict[str, Any]:
        """See Tokenizer."""
        return {"kind": self.kind, "tokens": list(self.tokens), "merges": list(self.merges)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "BPETokenizer":
        """The tokenizer that `to_json` described. UserError where `data` is not such a description."""
        lists = [data.get(name) for name in ("tokens", "merges")]
        if not all(isinstance(found, list) and all(isinstance(item, str) for item in found) for found in lists):
            raise damaged()
        try:
            return cls(*map(tuple, lists))
        except ValueError as error:
            raise damaged(str(error)) from None


def train(texts: Iterable[str], vocab_size: int = 0) -> BPETokenizer:
    """A tokenizer of `vocab_size` tokens (0: DEFAULT_SIZE) learnt from texts, which are held a few megabytes at a time.

    It has fewer where the texts have fewer pairs that turn up twice. Ids 0 to 2 are SPECIAL, then come the bytes, then
    the merges. The same texts and size give the same tokenizer, with any number of threads and in any order of the
    texts: words are counted, which is exact, and of the pairs that are equally frequent the one with the smaller ids is
    merged first. A text that is cut where `encode` may cut it counts as a whole one. Raises UserError for a size below
    SMALLEST_SIZE, and where the package tokenizers is missing.
    """
    vocab_size = vocab_size or DEFAULT_SIZE
    if vocab_size < SMALLEST_SIZE:
        raise UserError(
            f"vocab_size is {vocab_size}, and a BPE tokenizer has at least {SMALLEST_SIZE} tokens (every byte, and "
            f"{len(SPECIAL)} special ones): give a larger --vocab-size, or --tokenizer char"
        )
    package = _package()
    learner = package.Tokenizer(package.models.BPE())
    learner.pre_tokenizer = _pre_tokenizer(package)
    trainer = package.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=_FEWEST,
        special_tokens=list(SPECIAL),
        initial_alphabet=ALPHABET,
        show_progress=False,
    )
    learner.train_from_iterator((piece for text in texts for piece in _pieces(text)), trainer)
    vocabulary = learner.get_vocab(with_added_tokens=True)
    merges = _merges(learner)
    return BPETokenizer(tuple(sorted(vocabulary, key=vocabulary.__getitem__)), merges)


def _merges(learner: Any) -> tuple[str, ...]:
    """The merges of the package's tokenizer, which only its JSON shows."""
    found = json.loads(learner.to_str())["model"]["merges"]
    return tuple(merge if isinstance(merge, str) else " ".join(merge) for merge in found)


def _pieces(text: str) -> Iterator[str]:
    """`text` in pieces none of which ends within a pre-token."""
    text = _LONE_SURROGATE.sub(REPLACEMENT, text)
    begin = 0
    while begin < len(text):
        cut = _CUT.search(text, begin + _PIECE)
        end = cut.start() if cut else len(text)
        yield text[begin:end]
        begin = end


def _to_bytes(token: str) -> bytes:
    return bytes(_BYTE[sign] for sign in token)


def _pre_tokenizer(package: ModuleType) -> Any:
    return package.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _package() -> ModuleType:
    """The package tokenizers, with the parts of it that are needed here."""
    try:
        import tokenizers
        from tokenizers import models, pre_tokenizers, trainers  # noqa: F401
    except ImportError as error:
        what_to_do = "pip install tokenizers, or take --tokenizer char"
        found = importlib.util.find_spec("tokenizers")
        if found and found.origin and Path(found.origin).parent == Path(__file__).parent:
            what_to_do = f"our own {found.origin} hides it, start from another folder"
        raise UserError(f"a BPE tokenizer needs the package tokenizers ({error}): {what_to_do}") from None
    return tokenizers
