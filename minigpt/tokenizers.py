"""Text to ids and back: what every tokenizer does, and the one that gives each character an id.

A character tokenizer needs no training and loses nothing: decode(encode(text)) == text for every text made of known
characters. The one with an id for frequent runs of bytes is in bpe.py; tokenizer_choice.py says which one a name means.
"""

import codecs
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol

import numpy as np

from .errors import UserError

PAD, UNK, EOS = 0, 1, 2
SPECIAL = ("<pad>", "<unk>", "<eos>")
"""The special ids of a tokenizer that is made here, and their names. No text has them."""

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what <unk>, and an id outside the vocabulary, look like in text


class TextStream(Protocol):
    """The text of ids that come one by one."""

    def feed(self, token: int) -> str:
        """The text that is complete now that `token` is there; "" while a character still lacks bytes."""

    def flush(self) -> str:
        """What is left after the last id: U+FFFD for a character that never got all of its bytes, else ""."""


class Tokenizer(Protocol):
    """What the rest of the package knows of a tokenizer. Two are equal when they encode and decode alike."""

    kind: ClassVar[str]
    """The name under which to_json files it."""

    @property
    def vocab_size(self) -> int:
        """The number of ids; they are 0, 1, ..."""

    @property
    def eos(self) -> int:
        """The id that ends a text."""

    @property
    def special_ids(self) -> tuple[int, ...]:
        """The ids that no text has, so that none of them is to be drawn."""

    @property
    def characters_per_token(self) -> np.ndarray:
        """How many characters each id stands for, (vocab_size,) int64; over a text they sum to its length."""

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, (N,) int64."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` (any integers, of any shape, read in order); TypeError for what is no integer.

        Special ids vanish. <unk>, bytes that are no character, and ids beyond the vocabulary (those with which a model
        pads it) show as U+FFFD.
        """

    def stream(self) -> TextStream:
        """A decoder of ids that come one by one: all it gives, joined, is what `decode` gives."""

    def token_text(self, token: int) -> str:
        """An id to look at: its text, a special one's name, \\xNN for a byte that is no character by itself."""

    def unknown(self, text: str) -> list[str]:
        """The characters of `text` that encode cannot keep, each once, in order of appearance."""

    def to_json(self) -> dict[str, Any]:
        """What `load` needs to make this tokenizer again; plain JSON values."""


def flat_ids(ids: Iterable[int]) -> np.ndarray:
    """Ids of any shape and integer type as (N,) int64. TypeError for what is no integer."""
    if hasattr(ids, "cpu"):  # a tensor, on a GPU perhaps; without PyTorch this works too
        ids = ids.cpu()
    ids = np.asarray(ids if hasattr(ids, "__len__") else list(ids)).reshape(-1)
    if ids.size and ids.dtype.kind not in "iu":
        raise TypeError(f"ids must be integers, not {ids.dtype}")
    return ids.astype(np.int64)


def tokens_before(tokenizer: Tokenizer, ids: np.ndarray, characters: int) -> int:
    """How many of the first `ids` (N,) belong to so many characters; <eos> counts as one.

    So that a text is cut at the same place whatever its tokenizer, but for the rest of a token and of a character.
    """
    lengths = tokenizer.characters_per_token.copy()
    lengths[tokenizer.eos] = 1
    ends = lengths[ids]
    np.cumsum(ends, out=ends)
    # The token with the first character behind the cut; where it has the last before it too, the next with a character.
    found = int(np.searchsorted(ends, characters, side="right"))
    if found < len(ids) and ends[found] - lengths[ids[found]] < characters:
        found = int(np.searchsorted(ends, ends[found], side="right"))
    return found


def load(data: dict[str, Any]) -> Tokenizer:
    """The tokenizer described by `data`, as its `to_json` gave it. UserError where its kind is not known."""
    from .bpe import BPETokenizer  # it imports this module

    kinds = {kind.kind: kind for kind in (CharTokenizer, BPETokenizer)}
    kind = data.get("kind") if isinstance(data, dict) else None
    if kind not in kinds:
        known = ", ".join(map(repr, kinds))
        raise UserError(f"the stored tokenizer is of kind {kind!r}, and this version reads only {known}")
    return kinds[kind].from_json(data)


def damaged(why: str = "") -> UserError:
    """The error for a stored tokenizer that is not whole."""
    return UserError(f"the stored tokenizer is damaged{f' ({why})' if why else ''}: take another checkpoint or file")


def _code_points(text: str) -> np.ndarray:
    """`text` as its code points, (len(text),) uint32. Lone surrogates (an undecodable argument) pass through."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _text(code_points: np.ndarray) -> str:
    return code_points.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")


@dataclass(frozen=True)
class CharTokenizer:
    """Ids 0 <pad>, 1 <unk>, 2 <eos>, then `characters` in ascending order of code point; methods as in Tokenizer.

    `characters` holds every known character once; make one with `from_text`.
    """

    characters: str
    kind: ClassVar[str] = "characters"
    eos: ClassVar[int] = EOS
    special_ids: ClassVar[tuple[int, ...]] = (PAD, UNK, EOS)

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
    def characters_per_token(self) -> np.ndarray:
        """See Tokenizer: one each, also for <unk>; none for <pad> and <eos>."""
        lengths = np.ones(self.vocab_size, dtype=np.int64)
        lengths[[PAD, EOS]] = 0
        return lengths

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
        """See Tokenizer."""
        ids = flat_ids(ids)
        ids = ids[(ids != PAD) & (ids != EOS)]
        return _text(self._point_of[np.where((ids >= 0) & (ids < self.vocab_size), ids, self.vocab_size)])

    def stream(self) -> "CharStream":
        """See Tokenizer."""
        return CharStream(self)

    def token_text(self, token: int) -> str:
        """See Tokenizer."""
        return SPECIAL[token] if 0 <= token < len(SPECIAL) else self.decode([token])

    def unknown(self, text: str) -> list[str]:
        """The characters of `text` that encode would turn into <unk>, each once, in order of appearance."""
        return list(dict.fromkeys(c for c, i in zip(text, self.encode(text), strict=True) if i == UNK))

    def to_json(self) -> dict[str, Any]:
        """See Tokenizer."""
        return {"kind": self.kind, "special": list(SPECIAL), "characters": self.characters}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "CharTokenizer":
        """The tokenizer that `to_json` described. UserError where `data` is not such a description."""
        characters = data.get("characters")
        if not isinstance(characters, str) or data.get("special") != list(SPECIAL):
            raise damaged()
        try:
            return cls(characters)
        except ValueError as error:
            raise damaged(str(error)) from None


class CharStream:
    """The TextStream of characters: each id is complete by itself."""

    def __init__(self, tokenizer: CharTokenizer):
        self._tokenizer = tokenizer

    def feed(self, token: int) -> str:
        """See TextStream."""
        return self._tokenizer.decode([token])

    def flush(self) -> str:
        """See TextStream: nothing is ever left."""
        return ""


class ByteStream:
    """The TextStream of ids that stand for bytes: `table[id]` (bytes), the last entry for ids beyond it."""

    def __init__(self, table: list[bytes]):
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """See TextStream."""
        return self._decoder.decode(self._table[token if 0 <= token < len(self._table) else -1])

    def flush(self) -> str:
        """See TextStream."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest
