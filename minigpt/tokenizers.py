"""Text to ids and back, one id per character.

A character tokenizer needs no training and loses nothing: decode(encode(text)) == text for every text
made of known characters. Ids 0 to 2 are special and are never produced by a character of the text.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from .errors import UserError

PAD, UNK, EOS = 0, 1, 2
SPECIAL = ("<pad>", "<unk>", "<eos>")
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what <unk>, and an id outside the vocabulary, look like in text


def _code_points(text: str) -> np.ndarray:
    """`text` as its code points, (len(text),) uint32. Lone surrogates (an undecodable argument) pass through."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _text(code_points: np.ndarray) -> str:
    return code_points.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")


@dataclass(frozen=True)
class CharTokenizer:
    """Ids 0 <pad>, 1 <unk>, 2 <eos>, then `characters` in ascending order of code point.

    `characters` holds every known character once; make one with `from_text`.
    """

    characters: str

    def __post_init__(self) -> None:
        points = _code_points(self.characters)
        if (points[1:] <= points[:-1]).any():
            raise ValueError("characters must be in ascending order, each once; use CharTokenizer.from_text")

    @classmethod
    def from_text(cls, text: str) -> "CharTokenizer":
        """The tokenizer that knows exactly the characters of `text`."""
        return cls(_text(np.unique(_code_points(text))))

    @property
    def vocab_size(self) -> int:
        """The number of ids: the special ones and the characters."""
        return len(SPECIAL) + len(self.characters)

    @cached_property
    def _id_of(self) -> np.ndarray:
        # Indexed by code point; the last entry stands for every code point above the known ones.
        points = _code_points(self.characters)
        table = np.full(int(points.max(initial=0)) + 2, UNK, dtype=np.int64)
        table[points] = np.arange(len(SPECIAL), self.vocab_size)
        return table

    @cached_property
    def _point_of(self) -> np.ndarray:
        # Indexed by id; the last entry stands for every id outside the vocabulary.
        return _code_points(REPLACEMENT * len(SPECIAL) + self.characters + REPLACEMENT)

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, (len(text),) int64; a character that is not known becomes <unk>."""
        table = self._id_of
        return table[np.minimum(_code_points(text), len(table) - 1)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` (any integers, of any shape, read in order).

        <pad> and <eos> vanish. <unk>, and ids that a vocabulary padded for speed has beyond the tokenizer's, show
        as U+FFFD.
        """
        ids = np.asarray(ids if hasattr(ids, "__len__") else list(ids)).reshape(-1)
        if ids.size and ids.dtype.kind not in "iu":
            raise TypeError(f"ids must be integers, not {ids.dtype}")
        ids = ids.astype(np.int64)
        ids = ids[(ids != PAD) & (ids != EOS)]
        return _text(self._point_of[np.where((ids >= 0) & (ids < self.vocab_size), ids, self.vocab_size)])

    def unknown(self, text: str) -> list[str]:
        """The characters of `text` that encode would turn into <unk>, each once, in order of appearance."""
        return list(dict.fromkeys(c for c, i in zip(text, self.encode(text), strict=True) if i == UNK))

    def to_json(self) -> dict[str, Any]:
        """What `load` needs to make this tokenizer again; plain JSON values."""
        return {"kind": "characters", "special": list(SPECIAL), "characters": self.characters}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "CharTokenizer":
        """The tokenizer that `to_json` described. UserError where `data` is not such a description."""
        characters = data.get("characters") if isinstance(data, dict) else None
        if not isinstance(characters, str) or data.get("special") != list(SPECIAL):
            raise UserError("the stored tokenizer is damaged: take another checkpoint, or train again")
        try:
            return cls(characters)
        except ValueError as error:
            raise UserError(f"the stored tokenizer is damaged ({error}): take another checkpoint") from None


def load(data: dict[str, Any]) -> CharTokenizer:
    """The tokenizer described by `data`, as its `to_json` gave it. UserError where its kind is not known."""
    kind = data.get("kind") if isinstance(data, dict) else None
    if kind != "characters":
        raise UserError(f"the stored tokenizer is of kind {kind!r}, and this version reads only 'characters'")
    return CharTokenizer.from_json(data)
