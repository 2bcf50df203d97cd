"""A text of any size into a file of token ids that training maps into memory: in parallel, in constant memory.

The text is read twice, in chunks of a few million bytes: once for its characters, once to write their ids where they
belong. What is made is a folder, sealed with checksums as a checkpoint is:

    tokens.bin       the ids, little-endian uint16, or uint32 where the vocabulary needs it
    manifest.json    how many, of which type, from which files
    tokenizer.json   the tokenizer
    checksums.json   the SHA-256 of each of these
"""

import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from . import storage
from .errors import UserError, writing
from .tokenizers import EOS, CharTokenizer

TOKENS, MANIFEST, TOKENIZER = "tokens.bin", "manifest.json", "tokenizer.json"

_CHUNK = 2 << 20  # bytes of text that a process works on at once: some ten times as much memory
_BOM = b"\xef\xbb\xbf"
_NO_TEXT = "give --data a text file, or a folder with *.txt in it"

Progress = Callable[[str, int, int], None]
"""Told what is being done, and how many of how many bytes of text are."""


@dataclass(frozen=True)
class _Chunk:
    """Bytes `begin` to `end` of a file; `followed` where they are its last and another file comes after it."""

    path: Path
    begin: int
    end: int
    followed: bool


def prepare(source: Path, out: Path, *, workers: int, progress: Progress) -> dict[str, Any]:
    """Write the tokens of a text file, or of every *.txt in a folder, to the new folder `out`; its manifest.

    Files of a folder follow each other in the order of their paths, <eos> between them. Every line ends in "\\n",
    wherever it was written. Raises UserError for what is no text, and when `out` is there or cannot be written.
    """
    if workers < 1:
        raise UserError(f"workers is {workers}: it must be at least 1")
    if out.exists():
        raise UserError(f"{out} is there already: remove it, or choose another --out")
    files = _files(source)
    chunks = [chunk for number, path in enumerate(files, 1) for chunk in _chunks(path, number < len(files))]
    draft = out.with_name(out.name + ".writing")
    try:
        with writing(out), _Processes(workers, chunks, progress) as processes:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            counts, tokenizer = _survey(chunks, processes)
            kind = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
            starts = np.concatenate([[0], np.cumsum(counts)]).tolist()
            with (draft / TOKENS).open("wb") as file:
                file.truncate(starts[-1] * kind.itemsize)
            write = partial(_write, path=draft / TOKENS, kind=kind, tokenizer=tokenizer)
            for _ in processes.map("writing the tokens", write, list(zip(chunks, starts[:-1], strict=True))):
                pass
            storage.sync(draft / TOKENS)
            manifest = {"tokens": starts[-1], "dtype": kind.str, "files": [str(path) for path in files]}
            storage.write_json(draft / MANIFEST, manifest)
            storage.write_json(draft / TOKENIZER, tokenizer.to_json())
            storage.seal(draft)
            draft.rename(out)
            storage.sync(out.absolute().parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return manifest


def _files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    files = sorted(path for path in source.rglob("*.txt") if path.is_file()) if source.is_dir() else []
    if not files:
        raise UserError(f"there is no text in {source}: {_NO_TEXT}")
    return files


def _chunks(path: Path, followed: bool) -> Iterator[_Chunk]:
    """The chunks of a file; none begins within a character or between "\\r" and "\\n"."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            begin = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
            while True:
                end = min(size, begin + _CHUNK)
                file.seek(max(0, end - 1))
                around = file.read(4)  # the byte before the end, and what may still belong to its character
                for place in range(1, len(around)):
                    if around[place] & 0xC0 != 0x80 and around[place - 1 : place + 1] != b"\r\n":
                        break
                    end += 1
                yield _Chunk(path, begin, end, followed and end == size)
                if end == size:
                    return
                begin = end
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): make it readable, or leave it out") from None


def _survey(chunks: list[_Chunk], processes: "_Processes") -> tuple[list[int], CharTokenizer]:
    """How many tokens each chunk makes, and the tokenizer that knows all of their characters."""
    characters: set[str] = set()
    counts = []
    for count, seen in processes.map("reading the characters", _characters, chunks):
        counts.append(count)
        characters |= seen
    if not any(character.strip() for character in characters):
        raise UserError(f"there is no text in {chunks[0].path}: {_NO_TEXT}")
    return counts, CharTokenizer.from_text("".join(characters))


def _read(chunk: _Chunk) -> str:
    with chunk.path.open("rb") as file:
        file.seek(chunk.begin)
        data = file.read(chunk.end - chunk.begin)
    try:
        return data.decode().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{chunk.path} is not UTF-8 text (byte {chunk.begin + error.start}): convert it first, "
            "for example with iconv -f LATIN1 -t UTF-8"
        ) from None


def _characters(chunk: _Chunk) -> tuple[int, set[str]]:
    text = _read(chunk)
    return len(text) + chunk.followed, set(text)


def _write(task: tuple[_Chunk, int], path: Path, kind: np.dtype, tokenizer: CharTokenizer) -> None:
    chunk, start = task
    ids = tokenizer.encode(_read(chunk)).astype(kind)
    with path.open("r+b") as file:
        file.seek(start * kind.itemsize)
        file.write(ids.tobytes() + (np.array([EOS], kind).tobytes() if chunk.followed else b""))


class _Processes:
    """Processes that work on the chunks of a text, for a `with` block."""

    def __init__(self, workers: int, chunks: list[_Chunk], progress: Progress):
        # Forked, they need not import PyTorch, which none of them uses.
        how = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
        self._pool = ProcessPoolExecutor(
            workers, multiprocessing.get_context(how), signal.signal, (signal.SIGINT, signal.SIG_IGN)
        )
        self._at_once = 4 * workers
        self._sizes = [chunk.end - chunk.begin for chunk in chunks]
        self._progress = progress

    def __enter__(self) -> "_Processes":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def map(self, what: str, work: Callable[[Any], Any], tasks: list[Any]) -> Iterator[Any]:
        """What `work` makes of each task, one for every chunk, in order; no more than a few are begun at a time."""
        done = 0
        try:
            for first in range(0, len(tasks), self._at_once):
                for number, result in enumerate(self._pool.map(work, tasks[first : first + self._at_once]), first):
                    done += self._sizes[number]
                    self._progress(what, done, sum(self._sizes))
                    yield result
        except BrokenProcessPool:
            raise UserError("a process was killed, perhaps for its memory: take fewer --workers") from None
