"""Which tokenizer --tokenizer means: made from the text that is trained on, or read from files. Nothing is fetched.

What can be read: a tokenizer.json of ours (a checkpoint and a prepared text have one) or of the package tokenizers, and
GPT-2's two files, under their names vocab.json and merges.txt, or encoder.json and vocab.bpe.
"""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from . import bpe, corpora, tokenizers
from .errors import UserError
from .tokenizers import SPECIAL, CharTokenizer, Tokenizer

CHAR, BPE, GPT2 = "char", "bpe", "gpt2"
METAVAR = f"{{{CHAR},{BPE},{GPT2},PATH}}"

_GPT2_SIZE = 50257
_JSON = "tokenizer.json"
_PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))


def choose(
    name: str | None,
    vocab_size: int,
    *,
    alphabet: str,
    texts: Callable[[], Iterable[str]],
    announce: Callable[[str], None],
) -> Tokenizer:
    """The tokenizer called `name` (None: char) for a text that has the characters `alphabet`, in any order.

    char knows those; bpe is learnt from `texts()` up to `vocab_size` tokens (see bpe.train), and `announce` gets a line
    where there are fewer; gpt2 and a path are read, for which `vocab_size` means nothing. Raises UserError for what
    cannot be had, and for a tokenizer that does not know all of the characters.
    """
    if name in (None, CHAR):
        return CharTokenizer.from_text(alphabet)
    if name == BPE:
        made = bpe.train(texts(), vocab_size)
        if made.vocab_size < (wanted := vocab_size or bpe.DEFAULT_SIZE):
            announce(
                f"WARNING: the text is too short for a BPE vocabulary of {wanted:,}: no pair of tokens is left in it "
                f"that turns up twice, so there are {made.vocab_size:,} tokens"
            )
        return made
    found = read(name)
    if unknown := found.unknown(alphabet):
        shown = ", ".join(map(repr, unknown[:10])) + (", ..." if len(unknown) > 10 else "")
        raise UserError(f"the text has characters that the tokenizer {name} does not know ({shown}): take another one")
    return found


def contradicts(name: str | None, vocab_size: int, stored: Tokenizer) -> bool:
    """Whether --tokenizer `name` with --vocab-size `vocab_size` asks for another tokenizer than `stored`.

    Raises UserError for a tokenizer that cannot be read.
    """
    if name is None:
        return False
    if name == CHAR:
        return not isinstance(stored, CharTokenizer)
    if name == BPE:
        # A text that is too short for a size makes a tokenizer of fewer tokens.
        learnt = stored.kind == BPE and stored.special_ids == tuple(range(len(SPECIAL)))
        return not learnt or 0 < vocab_size < stored.vocab_size
    return read(name) != stored


def read(name_or_path: str, *, text: bool = True) -> Tokenizer:
    """GPT-2's tokenizer (`gpt2`), or the one in a folder or a tokenizer.json. Raises UserError where there is none.

    `text`: whether there is one, from which another tokenizer could be made.
    """
    if name_or_path == GPT2:
        return _gpt2()
    path = Path(name_or_path)
    found = _found_in(path) if path.is_dir() else (path,) if path.is_file() else None
    if found is None:
        what = f"no tokenizer in the folder {path}" if path.is_dir() else f"no tokenizer {name_or_path!r}"
        raise UserError(
            f"there is {what}: give --tokenizer {f'{CHAR}, {BPE}, ' * text}{GPT2}, or a folder with {_JSON}, or with "
            f"{' and '.join(_PAIRS[0])}"
        )
    return _read(found)


def _gpt2() -> Tokenizer:
    here = corpora.cache_folder() / GPT2
    for folder in (here, *_hugging_face()):
        if found := _found_in(folder):
            made = _read(found)
            if made.vocab_size != _GPT2_SIZE:
                raise UserError(
                    f"{folder} has {made.vocab_size:,} tokens and not the {_GPT2_SIZE:,} of GPT-2: put GPT-2's files "
                    f"there, or name the folder itself with --tokenizer"
                )
            return made
    raise UserError(
        f"GPT-2's tokenizer is not on this machine: put its {' and '.join(_PAIRS[0])} into {here}, or name the folder "
        "that has them: --tokenizer FOLDER"
    )


def _hugging_face() -> list[Path]:
    """The snapshots of GPT-2 in the cache of the Hugging Face libraries, the newest first."""
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    try:
        hub = hub.expanduser()
    except RuntimeError:  # no home folder
        return []
    names = ("models--openai-community--gpt2", "models--gpt2")
    found = [path for name in names for path in (hub / name / "snapshots").glob("*") if path.is_dir()]
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def _found_in(folder: Path) -> tuple[Path, ...] | None:
    """The files of a tokenizer in `folder`: one, or GPT-2's two; None where there is none."""
    for names in ((_JSON,), *_PAIRS):
        if all((folder / name).is_file() for name in names):
            return tuple(folder / name for name in names)
    return None


def _read(paths: tuple[Path, ...]) -> Tokenizer:
    try:
        if len(paths) == 2:
            vocabulary, lines = _json(paths[0]), paths[1].read_text(encoding="utf-8").split("\n")
            if lines[0].startswith("#version"):
                lines = lines[1:]
            return _made(vocabulary, [line for line in lines if line.strip()])
        data = _json(paths[0])
        return tokenizers.load(data) if "kind" in data else _from_package(data)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        what = f"{getattr(error, 'strerror', None) or error}" + (" is missing" if isinstance(error, KeyError) else "")
        raise UserError(f"{paths[0]} is no tokenizer that can be used here ({what}): name another one") from None


def _json(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _from_package(data: dict[str, Any]) -> bpe.BPETokenizer:
    """The tokenizer in the JSON of the package tokenizers, if it is byte-level BPE that cuts text as GPT-2 does."""
    model, cut = data["model"], data.get("pre_tokenizer") or {}
    added = {token["content"]: token["id"] for token in data.get("added_tokens") or []}
    if model.get("type", "BPE") != "BPE" or cut.get("type") != "ByteLevel":
        raise ValueError("it is not byte-level BPE")
    options = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
    used = [name for name in options if model.get(name)]
    used += ["normalizer"] if data.get("normalizer") else []
    plain = {"add_prefix_space": False, "use_regex": True}
    used += [name for name, value in plain.items() if cut.get(name, value) != value]
    if used:
        raise ValueError(f"it changes the text as GPT-2's does not: {', '.join(used)}")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    made = _made(model["vocab"] | added, merges)
    if ordinary := added.keys() - {made.tokens[number] for number in made.special_ids}:
        raise ValueError(f"it adds the tokens {', '.join(map(repr, sorted(ordinary)))}, which text may have")
    return made


def _made(vocabulary: dict[str, int], merges: list[str]) -> bpe.BPETokenizer:
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise ValueError("its ids are not 0, 1, 2, ... without a gap")
    return bpe.BPETokenizer(tuple(sorted(vocabulary, key=vocabulary.__getitem__)), tuple(merges))
