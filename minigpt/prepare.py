"""A text of any size into a file of token ids that training maps into memory: in parallel, in constant memory.

The text is read twice, in chunks of a million bytes: once for its characters, once to write their tokens. For a BPE
tokenizer that is to be learnt, chunks of it are read in between. What is made is a folder, sealed with checksums as a
checkpoint is:

    tokens.bin       the ids, little-endian uint16, or uint32 where the vocabulary needs it
    manifest.json    how many, of which type, from which files, and how many of them to train on
    tokenizer.json   the tokenizer
    checksums.json   the SHA-256 of each of these
"""

import ctypes
import itertools
import math
import multiprocessing
import os
import shutil
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from . import storage, tokenizer_choice, tokenizers
from .errors import UserError, writing
from .lock import Lock
from .tokenizers import Tokenizer

TOKENS, MANIFEST, TOKENIZER = "tokens.bin", "manifest.json", "tokenizer.json"

_CHUNK = 1 << 20  # bytes of text that a process works on at once: some ten times as much memory
_MOST_TO_LEARN = 64 << 20
"""Bytes of text from which a BPE tokenizer is learnt; of a longer one, chunks spread evenly over it."""
_TO_TRAIN = 0.9  # as of a text in memory
_SPACE = b" \n\r"
_WINDOW = 1 << 12  # bytes that are looked through at once for a place to cut
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


def prepare(
    source: Path,
    out: Path,
    tokenizer: str | None = None,
    vocab_size: int = 0,
    *,
    workers: int,
    progress: Progress,
    announce: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Write the tokens of a text file, or of every *.txt in a folder, to the new folder `out`; its manifest.

    Files of a folder follow each other in the order of their paths, <eos> between them. Every line ends in "\\n",
    wherever it was written. `tokenizer`, `vocab_size` and `announce` as in tokenizer_choice.choose. The tokens are
    those of the whole text, whatever the chunks. Raises UserError for what is no text, for a tokenizer that cannot be
    had, and when `out` is there or cannot be written.
    """
    if workers < 1:
        raise UserError(f"workers is {workers}: it must be at least 1")
    if vocab_size and tokenizer != tokenizer_choice.BPE:
        raise UserError(
            "--vocab-size says how much --tokenizer bpe learns: leave it out; training's pads the vocabulary"
        )
    if out.exists():
        raise UserError(f"{out} is there already: remove it, or choose another --out")
    files = _files(source)
    chunks = [chunk for number, path in enumerate(files, 1) for chunk in _chunks(path, number < len(files))]
    draft = out.with_name(out.name + ".writing")
    with writing(out):
        if not out.parent.exists():
            out.parent.mkdir(parents=True)
    lock = Lock(out.with_name(out.name + ".lock"), f"another process is preparing {out}", "choose another --out")
    try:
        with writing(out), _Processes(workers, chunks, progress) as processes:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            length, alphabet = _survey(chunks, processes)
            made = tokenizer_choice.choose(
                tokenizer,
                vocab_size,
                alphabet=alphabet,
                texts=lambda: _to_learn_from(chunks, progress),
                announce=announce,
            )
            storage.write_json(draft / TOKENIZER, made.to_json())
            kind = np.dtype("<u2" if made.vocab_size <= 1 << 16 else "<u4")
            tokens, train = _write(draft, kind, int(_TO_TRAIN * length), made, chunks, processes)
            manifest = {"tokens": tokens, "train": train, "dtype": kind.str, "files": [_name(path) for path in files]}
            storage.write_json(draft / MANIFEST, manifest)
            storage.seal(draft)
            draft.rename(out)
            storage.sync(out.absolute().parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        lock.release()
    return manifest


def _name(path: Path) -> str:
    return str(path).encode(errors="backslashreplace").decode()  # a name may be no text


def _files(source: Path) -> list[Path]:
    if not source.exists():
        raise UserError(f"there is no {source}: {_NO_TEXT}")
    if source.is_file():
        return [source]
    files = sorted(path for path in source.rglob("*.txt") if path.is_file()) if source.is_dir() else []
    if not files:
        raise UserError(f"there is no text in {source}: {_NO_TEXT}")
    return files


def _chunks(path: Path, followed: bool) -> Iterator[_Chunk]:
    """The chunks of a file. Each but the first begins with white space, before which no other is.

    So none begins within a character, between "\\r" and "\\n", or within what a tokenizer takes for one piece of text.
    A text that has neither a space nor a line break for a long time makes a long chunk.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            begin = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
            while True:
                end = _cut(file, begin + _CHUNK, size)
                yield _Chunk(path, begin, end, followed and end == size)
                if end == size:
                    return
                begin = end
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): make it readable, or leave it out") from None


def _cut(file: BinaryIO, place: int, size: int) -> int:
    """The first place from `place` on where a chunk may end: a space or line break that follows none, or the end."""
    while place < size:
        begin = max(0, place - 4)  # so that the character before is whole
        file.seek(begin)
        data = file.read(_WINDOW)
        for here in range(place - begin, len(data)):
            # An undecodable byte is no white space; the survey tells it.
            if data[here] in _SPACE and not data[max(0, here - 4) : here].decode(errors="replace")[-1:].isspace():
                return begin + here
        place = begin + len(data)
    return size


def _survey(chunks: list[_Chunk], processes: "_Processes") -> tuple[int, str]:
    """The length of the text in characters, each <eos> one of them, and the characters that it has."""
    characters: set[str] = set()
    length = 0
    for count, seen in processes.map("reading the characters", _characters, chunks):
        length += count
        characters |= seen
    if not any(character.strip() for character in characters):
        raise UserError(f"there is no text in {chunks[0].path}: {_NO_TEXT}")
    return length, "".join(characters)


def _to_learn_from(chunks: list[_Chunk], progress: Progress) -> Iterator[str]:
    """The texts from which a tokenizer is learnt: all chunks, or as many as are allowed, evenly spread."""
    step = max(1.0, sum(chunk.end - chunk.begin for chunk in chunks) / _MOST_TO_LEARN)
    chosen = [chunks[int(number * step)] for number in range(math.ceil(len(chunks) / step))]
    total = sum(chunk.end - chunk.begin for chunk in chosen)
    done = 0
    for chunk in chosen:
        yield _read(chunk)
        done += chunk.end - chunk.begin
        progress("learning the tokenizer", done, total)


def _write(
    folder: Path, kind: np.dtype, to_train: int, tokenizer: Tokenizer, chunks: list[_Chunk], processes: "_Processes"
) -> tuple[int, int]:
    """Write the tokens; how many they are, and how many of them belong to the first `to_train` characters."""
    tokens = train = characters = 0
    work = partial(_encode, folder=folder, kind=kind)
    with (folder / TOKENS).open("wb") as file:
        for data, length in processes.map("writing the tokens", work, chunks):
            ids = np.frombuffer(data, kind)
            if characters + length <= to_train:
                train = tokens + len(ids)
            elif characters < to_train:
                train = tokens + tokenizers.tokens_before(tokenizer, ids, to_train - characters)
            file.write(data)
            tokens, characters = tokens + len(ids), characters + length
    storage.sync(folder / TOKENS)
    return tokens, train


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


def _encode(chunk: _Chunk, folder: Path, kind: np.dtype) -> tuple[bytes, int]:
    """The ids of a chunk, and the number of its characters, a following <eos> being one."""
    tokenizer = _stored_tokenizer(folder)
    text = _read(chunk)
    end = [tokenizer.eos] if chunk.followed else []
    return tokenizer.encode(text).astype(kind).tobytes() + np.array(end, kind).tobytes(), len(text) + len(end)


@cache  # a process reads it once, not with every chunk
def _stored_tokenizer(folder: Path) -> Tokenizer:
    return tokenizers.load(storage.read_json(folder / TOKENIZER))


_PR_SET_PDEATHSIG = 1


_STOPS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Let what would end the program wait: amid the pool's own work it would leave processes that nobody ends."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_process(parent: int) -> None:
    """The first that a process does which `parent` has begun."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "pthread_sigmask"):  # it was begun undisturbed
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
    if sys.platform == "linux":  # end with the process that gives it work, however that ends
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it has ended already
            os._exit(1)
    # The package tokenizers would take all processors in each of the processes.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


class _Processes:
    """Processes that work on the chunks of a text, for a `with` block."""

    def __init__(self, workers: int, chunks: list[_Chunk], progress: Progress):
        # Forked, they need not import PyTorch, which none of them uses.
        how = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
        self._pool = ProcessPoolExecutor(workers, multiprocessing.get_context(how), _begin_process, (os.getpid(),))
        self._at_once = workers + 2  # a process never waits for work, and few results wait to be taken
        self._sizes = [chunk.end - chunk.begin for chunk in chunks]
        self._progress = progress

    def __enter__(self) -> "_Processes":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def map(self, what: str, work: Callable[[_Chunk], Any], chunks: list[_Chunk]) -> Iterator[Any]:
        """What `work` makes of each chunk, in order; only a few are begun before the first of them is taken."""
        done, total = 0, sum(self._sizes)
        begun: deque[Future] = deque()
        waiting = iter(chunks)
        try:
            for size in self._sizes:
                for chunk in itertools.islice(waiting, self._at_once - len(begun)):
                    with _undisturbed():
                        begun.append(self._pool.submit(work, chunk))
                result = begun.popleft().result()
                done += size
                self._progress(what, done, total)
                yield result
        except BrokenProcessPool:
            raise UserError("a process was killed, perhaps for its memory: take fewer --workers") from None
