"""generate.py as a person uses it: what it prints and writes, what it refuses, and how it goes on asking."""

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_cli import one_line

from minigpt import checkpoint, context, generation
from minigpt.backends import resolve
from minigpt.config import preset
from minigpt.model import GPT
from minigpt.prompting import generate
from minigpt.tokenizers import CharTokenizer
from minigpt.writer import visible

ROOT = Path(__file__).resolve().parent.parent.parent
TOKENIZER = CharTokenizer.from_text("\n abcdefghijklmnopqrstuvwxyz\x1b[31m")
OPS = resolve("torch", torch.device("cpu"))


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    """A run with one checkpoint, of a model that has learnt nothing but is sure of itself."""
    folder = tmp_path_factory.mktemp("stored") / "run"
    settings = preset("shakespeare-cpu", n_layer=1, n_head=2, n_embd=16, block_size=16)
    torch.manual_seed(0)
    model = GPT(settings.model_config(TOKENIZER.vocab_size), OPS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    checkpoint.save(folder / "last", model, TOKENIZER, settings, {"step": 0})
    return folder


@pytest.fixture
def write(call, stored, tmp_path, monkeypatch):
    """Runs generate.py on that run, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MINIGPT_KERNELS", raising=False)
    return lambda *options: call(generate, "--run", stored, *options)


def text_of(result) -> str:
    assert result[0] == 0, result
    return result[1]


def test_the_cache_changes_nothing(write):
    """... far past the block of 16."""
    for options in (["--seed", 3], ["--temperature", 0], ["--beams", 3]):
        options = ["--prompt", "abc", "--max-new-tokens", 60, *options]
        assert text_of(write(*options)) == text_of(write(*options, "--no-cache"))


def test_several_samples_are_those_of_the_seeds_that_follow(write):
    options = ["--prompt", "ab", "--max-new-tokens", 30]
    three = text_of(write(*options, "--seed", 7, "--num-samples", 3))
    parts = re.split(r"^--- \d of 3\n", three, flags=re.MULTILINE)[1:]
    assert parts == [text_of(write(*options, "--seed", seed)) for seed in (7, 8, 9)]
    assert len(set(parts)) == 3


def test_beams_come_best_first_with_their_scores(write):
    options = ["--prompt", "ab", "--max-new-tokens", 8]
    text = text_of(write(*options, "--beams", 4, "--num-samples", 3))
    scores = [float(score) for score in re.findall(r"^--- \d of 3, score (-[\d.]+)$", text, re.MULTILINE)]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True)
    assert text_of(write(*options, "--beams", 1)) == text_of(write(*options, "--temperature", 0))


def test_the_first_of_several_stop_texts_ends_it(write):
    options = ["--prompt", "ab", "--max-new-tokens", 200, "--seed", 1]
    whole = text_of(write(*options))[2:-1]
    late, early = whole[90:93], whole[50:52]
    stopped = text_of(write(*options, "--stop", late, "--stop", early))[2:-1]
    assert stopped == generation.Stops([late, early]).feed(whole) and 0 < len(stopped) <= 50
    assert text_of(write(*options, "--stop", "nowhere in it"))[2:-1] == whole


@pytest.mark.parametrize("options", [["--seed", 2, "--num-samples", 2], ["--beams", 2, "--num-samples", 2]])
def test_log_probabilities_are_lines_of_json(write, options):
    write("--prompt", "ab", "--max-new-tokens", 12, "--logprobs", "tokens.jsonl", "--alternatives", 3, *options)
    text = text_of(write("--prompt", "ab", "--max-new-tokens", 12, *options))
    lines = [json.loads(line) for line in Path("tokens.jsonl").read_text().splitlines()]
    assert [(line["sample"], line["number"]) for line in lines] == [(s, n) for s in range(2) for n in range(12)]
    for sample in range(2):
        written = "".join(line["text"] for line in lines if line["sample"] == sample)
        assert f"ab{written}\n" in text
    for line in lines:
        assert TOKENIZER.decode([line["id"]]) == line["text"] and -30 < line["logprob"] < 0
        if "--seed" in options:
            values = [other["logprob"] for other in line["alternatives"]]
            assert len(values) == 3 and values == sorted(values, reverse=True)
            same = [other for other in line["alternatives"] if other["id"] == line["id"]]
            assert all(other["logprob"] == line["logprob"] for other in same)


def test_megabytes_of_prompt(write):
    Path("long.txt").write_text("abc def\n" * 300_000)
    status, out, error = write("--prompt-file", "long.txt", "--max-new-tokens", 5, "--temperature", 0)
    assert status == 0 and len(out) == 8 * 300_000 + 5 + 1
    assert "the prompt has 2,400,000 tokens, the block 16: the model sees the last 8" in error
    short = text_of(write("--prompt-file", "long.txt", "--max-new-tokens", 5, "--temperature", 0))
    Path("short.txt").write_text("abc def\n")
    assert short[-6:] == text_of(write("--prompt-file", "short.txt", "--max-new-tokens", 5, "--temperature", 0))[-6:]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--beams", "0"], ["beam width is 0", "between 1 and"]),
        (["--beams", "-2"], ["beam width is -2"]),
        (["--beams", "1000"], ["beam width is 1000", "32 tokens"]),
        (["--beams", "2", "--temperature", "1"], ["--temperature is for drawing", "--beams"]),
        (["--beams", "2", "--top-k", "3"], ["--top-k is for drawing"]),
        (["--beams", "2", "--top-p", "0"], ["--top-p is for drawing"]),
        (["--beams", "2", "--seed", "3"], ["--seed is for drawing"]),
        (["--beams", "2", "--num-samples", "3"], ["--beams 2 finds no 3 texts"]),
        (["--beams", "2", "--length-penalty", "-1"], ["length_penalty is -1"]),
        (["--beams", "2", "--max-new-tokens", "-1"], ["max_new_tokens is -1"]),
        (["--beams", "2", "--stop", ""], ["stop text is empty"]),
        (["--beams", "2", "--prompt", "\u2603"], ["never seen"]),
        (["--length-penalty", "1"], ["--beams"]),
        (["--num-samples", "0"], ["num_samples is 0"]),
        (["--top-p", "0"], ["top_p is 0"]),
        (["--stop", "a", "--stop", ""], ["stop text is empty"]),
        (["--device", "cpu", "--cuda-graph"], ["needs a GPU", "--no-cuda-graph"]),
        (["--cuda-graph", "--no-cache"], ["leave out"]),
        (["--prompt", "a", "--prompt-file", "b"], ["--prompt and --prompt-file"]),
        (["--prompt", "a", "--interactive"], ["--prompt and --interactive"]),
        (["--prompt-file", "missing.txt"], ["missing.txt", "--prompt-file"]),
        (["--prompt-file", "."], ["folder"]),
        (["--prompt-file", "latin.txt"], ["latin.txt", "UTF-8"]),
        (["--prompt-file", "empty.txt"], ["empty.txt is empty"]),
        (["--logprobs", "a", "--alternatives", "-1"], ["alternatives is -1"]),
        (["--logprobs", "empty.txt/a"], ["a part of the path is a file"]),
        (["--interactive", "--temperature", "-1"], ["temperature is -1"]),
        (["--interactive", "--beams", "0"], ["beam width is 0"]),
    ],
)
def test_wrong_options(write, options, words):
    Path("latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    Path("empty.txt").write_text("")
    before = sorted(Path().rglob("*"))
    result = write(*options)
    one_line(result, *words)
    assert result[1] == "" and sorted(Path().rglob("*")) == before


def test_a_run_that_goes_away_or_was_never_whole(call, stored, tmp_path, monkeypatch):
    run = Path(shutil.copytree(stored, tmp_path / "run"))
    load = checkpoint.Checkpoint.model
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.Checkpoint, "model", lambda *args: (shutil.rmtree(run), load(*args))[1])
        one_line(call(generate, "--run", run), "model.safetensors", "missing")
    one_line(call(generate, "--run", run), "no checkpoint", "train first")
    shutil.copytree(stored / "last", run / "last.writing")
    one_line(call(generate, "--run", run), "no checkpoint", "train first")


# asking again and again


def answers(write, monkeypatch, text: str, *options):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return write("--interactive", "--seed", 4, "--max-new-tokens", 10, *options)


def test_every_line_of_a_pipe_is_a_prompt(write, monkeypatch):
    out = text_of(answers(write, monkeypatch, "abc\nthe end"))
    for prompt in ("abc", "the end"):
        assert text_of(write("--prompt", prompt, "--seed", 4, "--max-new-tokens", 10)) in out
    assert text_of(answers(write, monkeypatch, "")) == ""


def test_a_line_may_end_as_on_windows(write, monkeypatch):
    plain = text_of(answers(write, monkeypatch, "abc\nthe end\n"))
    assert text_of(answers(write, monkeypatch, "abc\r\nthe end\r\n")) == plain


@pytest.mark.parametrize("options", [["--temperature", 0], ["--beams", 2], ["--seed", 3, "--num-samples", 2]])
def test_several_prompts_are_written_to_at_once(options, write):
    """Each gets what it gets alone, in order; seeds count on from text to text."""
    prompts = ["abc", "a", "the long one at the end"]
    asked = [word for prompt in prompts for word in ("--prompt", prompt)]
    options = [*options, "--max-new-tokens", 12]
    out = text_of(write(*asked, *options, "--logprobs", "tokens.jsonl"))
    texts = re.split(r"--- \d of \d[^\n]*\n", out)[1:]
    samples = 2 if "--num-samples" in options else 1
    assert len(texts) == samples * len(prompts)
    for number, prompt in enumerate(prompts):
        alone = (
            [*options[: options.index("--seed")], "--seed", 3 + 2 * number, *options[2:]] if samples == 2 else options
        )
        expected = text_of(write("--prompt", prompt, *alone))
        mine = texts[number * samples : (number + 1) * samples]
        assert [text.strip("\n") for text in re.split(r"--- \d of \d[^\n]*\n", expected) if text] == [
            text.strip("\n") for text in mine
        ]
    records = [json.loads(line) for line in Path("tokens.jsonl").read_text().splitlines()]
    assert {(r["prompt"], r["sample"]) for r in records} == {(p, n) for p in prompts for n in range(samples)}


def test_a_wrong_prompt_is_told_and_the_next_one_answered(write, monkeypatch):
    status, out, error = answers(write, monkeypatch, "\nABC\nabc\n", "--num-samples", 2)
    assert status == 0 and out.count("--- 1 of 2\nabc") == 1
    told = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(told) == 2 and "empty" in told[0] and "'A', 'B', 'C'" in told[1]


def test_a_prompt_that_takes_too_much_memory_is_told_and_the_next_one_answered(write, monkeypatch):
    prefill = context.prefill

    def limited(model, cache, contexts, rows):
        if max(map(len, contexts)) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return prefill(model, cache, contexts, rows)

    monkeypatch.setattr(context, "prefill", limited)
    status, out, error = answers(write, monkeypatch, "abcdefgh\nabc\n")
    assert status == 0 and "\nabc" in out
    assert error.count("error: out of memory: take fewer --num-samples") == 1 and "or a shorter prompt" in error


def test_a_pipe_gets_control_characters_as_they_are(write):
    assert text_of(write("--prompt", "\x1b[31m", "--max-new-tokens", 1)).startswith("\x1b[31m")


def test_a_terminal_is_shown_control_characters():
    assert visible("a\x1b[31m\r\n\tb\x00\x9b\udc80 \u00e9\u200d") == "a\\x1b[31m\\r\n\tb\\x00\\x9b\\udc80 \u00e9\u200d"


def test_on_a_terminal(stored, tmp_path):
    """Ctrl-C ends a text and asks again, control characters do nothing, Ctrl-D leaves."""
    ours, theirs = pty.openpty()
    command = [sys.executable, str(ROOT / "generate.py"), "--run", str(stored), "--interactive"]
    command += ["--max-new-tokens", "100000000", "--kernels", "torch"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "dumb"}
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, env=environment, start_new_session=True
    )
    os.close(theirs)
    seen = b""

    def until(wanted: bytes, more: int = 0, again: bool = False) -> None:
        """Read on to what is wanted, and so many bytes after it; press Ctrl-C `again` while nothing comes."""
        nonlocal seen
        end = time.monotonic() + 120
        while (found := seen.find(wanted)) < 0 or len(seen) < found + len(wanted) + more:
            assert time.monotonic() < end and process.poll() is None, seen
            if select.select([ours], [], [], 2.0)[0]:
                seen += os.read(ours, 4096)
            elif again:
                process.send_signal(signal.SIGINT)
        seen = seen[found + len(wanted) :]

    try:
        until(b"> ")
        os.write(ours, b"abc\n")
        until(b"abc\r\nabc", more=300)
        process.send_signal(signal.SIGINT)
        until(b"\n> ")
        os.write(ours, b"the end\n")
        until(b"the end\r\nthe end", more=3)
        process.send_signal(signal.SIGINT)
        until(b"\n> ")
        # Where there is no text to end. Python's input() misses one that comes just before it begins to wait.
        process.send_signal(signal.SIGINT)
        until(b"\n> ", again=True)
        os.write(ours, b"\x04")
        assert process.wait(60) == 0
        assert b"Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
        os.close(ours)
