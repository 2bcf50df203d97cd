"""A prepared text has the tokens that the text in memory has, however it is cut, and in constant memory."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from minigpt import corpora, dataset, prepare, storage
from minigpt.__main__ import main
from minigpt.errors import UserError
from minigpt.lock import Lock
from minigpt.tokenizers import EOS, SPECIAL, CharTokenizer

ROOT = Path(__file__).resolve().parents[2]
HARD = "\r\nÄ\r\r\n€🎭\n\r" * 7 + "plain\n" + "🎭€ä" * 9 + "\r"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make(source, out="out", *tokenizer, workers=1, said=None, announce=print):
    def progress(*told):
        if said is not None:
            said.append(told)

    return prepare.prepare(Path(source), Path(out), *tokenizer, workers=workers, progress=progress, announce=announce)


def tokens(out="out"):
    kind = storage.read_json(Path(out) / "manifest.json")["dtype"]
    return np.fromfile(Path(out) / "tokens.bin", dtype=np.dtype(kind))


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7, 1000])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_every_cut_gives_the_tokens_of_the_text_in_memory(monkeypatch, chunk, start):
    monkeypatch.setattr(prepare, "_CHUNK", chunk)
    Path("text.txt").write_bytes(start + HARD.encode())
    make("text.txt")
    whole = corpora.load("text.txt").text
    tokenizer = CharTokenizer.from_text(whole)
    assert tokens().tolist() == tokenizer.encode(whole).tolist()
    assert dataset.load("out").tokenizer == tokenizer


@pytest.mark.parametrize("chunk", [1, 3, 30, 1000])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_every_cut_gives_the_same_bpe_and_its_tokens(monkeypatch, chunk, start):
    """The chunks are those in which the tokenizer is learnt, too."""
    monkeypatch.setattr(prepare, "_CHUNK", chunk)
    monkeypatch.setattr(prepare, "_WINDOW", 16)
    text = (HARD + "it's  there,\u3000 \u3000\tit'll be\x85 there\n\n\n  日本語 日本語 ") * 3
    Path("text.txt").write_bytes(start + text.encode())
    manifest = make("text.txt", "out", "bpe", 300, workers=2)
    held, mapped = dataset.load("text.txt", "bpe", 300), dataset.load("out")
    assert mapped.tokenizer == held.tokenizer and held.tokenizer.vocab_size == 300
    whole = held.tokenizer._coder.encode(corpora.load("text.txt").text, add_special_tokens=False).ids
    assert tokens().tolist() == whole and manifest["tokens"] == len(whole)
    assert held.train.tolist() == mapped.train.tolist() == whole[: manifest["train"]]
    assert held.validation.tolist() == mapped.validation.tolist()
    chunks = list(prepare._chunks(Path("text.txt"), False))
    assert len(chunks) > 2 or chunk == 1000
    assert [c.end for c in chunks[:-1]] == [c.begin for c in chunks[1:]] and chunks[0].begin == len(start)


def test_files_of_a_folder_follow_each_other_in_bpe_too(monkeypatch):
    monkeypatch.setattr(prepare, "_CHUNK", 50)
    Path("texts").mkdir()
    texts = {"a.txt": "the end \r\n", "b.txt": "", "c.txt": "\ufeff the end" * 20, "d.txt": "日本語 the end"}
    for name, text in texts.items():
        Path("texts", name).write_bytes(text.encode())
    manifest = make("texts", "out", "bpe", 270)
    tokenizer = dataset.load("out").tokenizer
    clean = [text.removeprefix("\ufeff").replace("\r\n", "\n") for text in texts.values()]
    wanted = [id for text in clean for id in (*tokenizer.encode(text).tolist(), EOS)][:-1]
    assert tokens().tolist() == wanted
    # nine tenths of the characters, of which each <eos> is one
    characters = sum(map(len, clean)) + 3
    before = wanted[: manifest["train"]]
    assert 0 <= len(tokenizer.decode(before)) + before.count(EOS) - int(0.9 * characters) < 10


def test_bpe_is_learnt_from_chunks_all_over_a_long_text(monkeypatch):
    monkeypatch.setattr(prepare, "_CHUNK", 100)
    monkeypatch.setattr(prepare, "_MOST_TO_LEARN", 1200)
    lines = [f"{letter * 3} {letter * 4}\n" * 50 for letter in "abcdefgh"]
    Path("text.txt").write_text("".join(lines))
    said = []
    make("text.txt", "out", "bpe", 1000, said=said, announce=said.append)
    learnt = [now for kind, now, total in (told for told in said if isinstance(told, tuple)) if "learning" in kind]
    assert learnt == sorted(learnt) and 900 < learnt[-1] <= 1200 + 100
    tokenizer = dataset.load("out").tokenizer
    assert {letter * 4 for letter in "abcdefgh"} <= {token.removeprefix("Ġ") for token in tokenizer.tokens}
    assert tokens().tolist() == tokenizer.encode("".join(lines)).tolist()
    assert any("too short for a BPE vocabulary of 1,000" in line for line in said if isinstance(line, str))


def test_a_tokenizer_from_a_file_is_taken_as_it_is():
    Path("one.txt").write_text("abc " * 30)
    make("one.txt", "one")
    Path("two.txt").write_text("cab " * 9)
    make("two.txt", "two", "one")
    assert dataset.load("two").tokenizer == dataset.load("one").tokenizer
    Path("three.txt").write_text("abcd")
    with pytest.raises(UserError, match=r"does not know.*'d'"):
        make("three.txt", "three", "one")
    assert not Path("three").exists()


def test_processes_share_the_work_and_tell_how_far_they_are(monkeypatch):
    monkeypatch.setattr(prepare, "_CHUNK", 100)
    Path("text.txt").write_text("0123456789\n" * 500)
    said = []
    make("text.txt", workers=3, said=said)
    make("text.txt", "alone")
    assert (tokens() == tokens("alone")).all() and len(tokens()) == 5500
    for what in ("reading the characters", "writing the tokens"):
        done = [now for kind, now, total in said if kind == what and total == 5500]
        assert done == sorted(done) and len(done) == 51 and done[-1] == 5500  # cut at the ends of lines


def test_files_of_a_folder_follow_each_other(tmp_path):
    for name, text in (("b.txt", "two"), ("a/z.txt", "one\n"), ("c.txt", ""), ("d.txt", "end"), ("e.md", "not")):
        Path("texts", name).parent.mkdir(parents=True, exist_ok=True)
        Path("texts", name).write_text(text)
    manifest = make("texts")
    assert [Path(path).name for path in manifest["files"]] == ["z.txt", "b.txt", "c.txt", "d.txt"]
    tokenizer = dataset.load("out").tokenizer
    parts = np.split(tokens(), np.flatnonzero(tokens() == EOS))
    assert [tokenizer.decode(part) for part in parts] == ["one\n", "two", "", "end"]
    assert tokenizer.characters == "\ndenotw" and manifest["tokens"] == 13


@pytest.mark.parametrize(("count", "kind"), [(65536 - len(SPECIAL), "<u2"), (65537 - len(SPECIAL), "<u4")])
def test_ids_are_as_wide_as_they_must_be(count, kind):
    Path("text.txt").write_text("".join(chr(0x10000 + number) for number in range(count)))
    assert make("text.txt")["dtype"] == kind
    assert tokens().tolist() == list(range(len(SPECIAL), len(SPECIAL) + count))


def test_what_is_damaged_is_told():
    Path("text.txt").write_text("a text, and more of it\n" * 9)
    make("text.txt")
    for name in ("tokens.bin", "manifest.json", "tokenizer.json", "checksums.json"):
        data = Path("out", name).read_bytes()
        Path("out", name).write_bytes(data[:-3] + b"x" + data[-2:])
        with pytest.raises(UserError, match=f"out/{name} is damaged.*: prepare the text again"):
            dataset.load("out")
        Path("out", name).write_bytes(data)
    assert dataset.load("out").tokens == len(tokens())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "missing"], "there is no missing"),
        (["--data", "empty.txt"], "no text in empty.txt"),
        (["--data", "blank.txt"], "no text in blank.txt"),
        (["--data", "nothing"], "no text in nothing"),
        (["--data", "latin.txt"], r"latin.txt is not UTF-8 text \(byte 2103\).*iconv"),
        (["--data", "text.txt", "--out", "text.txt"], "text.txt is there already"),
        (["--data", "text.txt", "--out", "text.txt/x"], "a part of the path is a file"),
        (["--data", "text.txt", "--workers", "-1"], "at least 1"),
        (["--data", "text.txt", "--tokenizer", "words"], "no tokenizer 'words'"),
        (["--data", "text.txt", "--tokenizer", "bpe", "--vocab-size", "258"], "at least 259"),
        (["--data", "text.txt", "--tokenizer", "bpe", "--vocab-size", "-1"], "at least 259"),
        (["--data", "text.txt", "--vocab-size", "300"], "--vocab-size says how much --tokenizer bpe learns"),
        ([], "--data"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(monkeypatch, arguments, said):
    monkeypatch.setattr(prepare, "_CHUNK", 1000)
    Path("empty.txt").write_text("")
    Path("blank.txt").write_text("\n \n")
    Path("nothing").mkdir()
    Path("latin.txt").write_bytes(b"a" * 2103 + b"\xe9" + b"b" * 100)
    Path("text.txt").write_text("A text.")
    before = sorted(Path().rglob("*"))
    with pytest.raises(UserError, match=said) as raised:
        main(["prepare", *arguments])
    assert "\n" not in str(raised.value) and sorted(Path().rglob("*")) == before


def test_a_full_disk_leaves_nothing():
    Path("text.txt").write_text("to be or not to be\n" * 1000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, before[1]))
    try:
        with pytest.raises(UserError, match="out: the file would be larger"):
            make("text.txt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(os.listdir()) == ["text.txt"]


def test_a_process_that_is_killed_is_told(monkeypatch):
    monkeypatch.setattr(prepare, "_characters", _die)
    Path("text.txt").write_text("A text.")
    with pytest.raises(UserError, match="take fewer --workers"):
        make("text.txt", workers=2)
    assert sorted(os.listdir()) == ["text.txt"]


def _die(chunk):
    os._exit(9)


def test_what_a_kill_left_is_written_anew():
    Path("text.txt").write_text("A text.")
    Path("out.writing").mkdir()
    Path("out.writing/tokens.bin").write_text("rest")
    make("text.txt")
    assert sorted(os.listdir()) == ["out", "text.txt"]


@pytest.mark.parametrize(
    ("megabytes", "tokenizer"),
    [(20, "char"), *(pytest.param(*long, marks=pytest.mark.slow) for long in ((300, "char"), (100, "bpe")))],
)
def test_memory_does_not_grow_with_the_text(megabytes, tokenizer):
    line = "“To be, or not to be”, that is the question — € 5.\n".encode()
    with Path("text.txt").open("wb") as file:
        for _ in range(megabytes):
            file.write(line * (1_000_000 // len(line)))
    code = """
import re, resource, sys
from minigpt.__main__ import main
main(["prepare", "--data", "text.txt", "--workers", "2", "--tokenizer", sys.argv[1]])
# its own, as ru_maxrss would be that of the process that started it
own = int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
print(own // 1024, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024, "torch" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tokenizer],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    peaks, imported = done.stdout.splitlines()[-1].rsplit(maxsplit=1)
    own, child = map(int, peaks.split())
    # A process that was forked has the parent's libraries in its count too.
    assert max(own, child) < 150 and imported == "False"


def test_a_second_one_for_the_same_folder_is_refused(tmp_path):
    Path("text.txt").write_text("A text.\n" * 50)
    lock = Lock(Path("out.lock"), "another process is preparing out", "choose another --out")
    with pytest.raises(UserError, match=r"another process is preparing out \(process \d+\): wait for it, stop it, or"):
        make("text.txt")
    lock.release()
    make("text.txt")
    assert sorted(os.listdir()) == ["out", "text.txt"]


@pytest.mark.skipif(sys.platform != "linux", reason="Linux ends processes with their parent")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_processes_end_with_the_one_that_began_them(number):
    """The signal comes while they are being begun."""
    Path("text.txt").write_text("To be, or not to be: that is the question.\n" * 1_000_000)
    code = "import sys; from minigpt.__main__ import main; main(['prepare', '--data', 'text.txt', '--workers', '2'])"
    begun = subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while len(children(begun.pid)) < 2 and begun.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    of_it = children(begun.pid)
    assert len(of_it) == 2
    begun.send_signal(number)
    begun.wait(timeout=60)
    while any(Path(f"/proc/{child}/stat").exists() for child in of_it) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(Path(f"/proc/{child}/stat").exists() for child in of_it)
    if number == signal.SIGTERM:
        assert os.listdir() == ["text.txt"]


@pytest.mark.skipif(sys.platform != "linux", reason="Linux ends processes with their parent")
def test_a_process_ends_whose_parent_has_ended_before_it_could_ask_to_be_told():
    code = "import os; from minigpt.prepare import _begin_process; _begin_process({}); print('goes on')"
    for parent, said in (("os.getppid()", "goes on"), ("os.getpid()", "")):
        command = [sys.executable, "-c", code.format(parent)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.stdout.strip() == said and done.stderr == ""


def children(pid):
    try:
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return []


def test_the_name_of_what_is_made(capsys):
    Path("texts.v1").mkdir()
    Path("texts.v1/a.txt").write_text("One text.")
    name = os.fsdecode(b"texts.v1/\xff.txt")
    Path(name).write_text("Another.")
    main(["prepare", "--data", "texts.v1", "--workers", "1"])
    assert "of 2 files in" in capsys.readouterr().out
    files = json.loads(Path("texts.v1.tokens/manifest.json").read_text())["files"]
    assert files == ["texts.v1/a.txt", "texts.v1/\\udcff.txt"]
    with pytest.raises(UserError, match="there is no nowhere"):
        main(["prepare", "--data", "nowhere"])
