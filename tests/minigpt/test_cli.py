"""The command lines: what a person types, right and wrong. Wrong input is one line, a status, and no traceback."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
import torch
from safetensors.torch import load_file, save_file

from minigpt import __main__ as command
from minigpt import commands, config, prompting, storage, trainer
from minigpt.model import GPT

ROOT = Path(__file__).resolve().parent.parent.parent
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
TEXT = "The quick brown fox jumps over the lazy dog.\nHow vexingly quick daft zebras jump!\n" * 8
SMALL = ["--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "16", "--batch-size", "4"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a text and, in runs/small, a run that was trained on it by the command line."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(TEXT)
    options = [*SMALL, "--kernels", "torch", "--max-steps", "3", "--sample-tokens", "5", "--seed", "1"]
    command.main(["train", *options, "--data", str(folder / "text.txt"), "--out", str(folder / "runs" / "small")])
    return folder


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    """A copy of that run, to be damaged."""
    return Path(shutil.copytree(trained / "runs" / "small", tmp_path / "copy"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory, monkeypatch):
    """Every test runs in an empty folder of its own, without the environment's choice of kernels."""
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    monkeypatch.delenv("MINIGPT_KERNELS", raising=False)


def train(argv: list[str]) -> None:
    trainer.train(config.parse(argv))


def one_line(result: tuple[int, str, str], *words: str) -> str:
    """Holds a result to what wrong input must give, and returns its line."""
    status, _, error = result
    assert status == 1
    assert error.startswith("error: ") and error.count("\n") == 1 and "Traceback" not in error, error
    for word in words:
        assert word in error, error
    return error


# every command


FULL = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


@pytest.mark.parametrize(
    ("arguments", "instead"),
    [
        (["generate", "--max-new-tokens", "3"], "take fewer --num-samples, --beams or prompts at once"),
        (["evaluate"], "evaluate on the CPU (--device cpu)"),
        (["attention", "--prompt", "fox"], "take a shorter prompt"),
        (["compare", "--a", "eager", "--b", "torch", "--preset", "tiny"], "take a smaller --preset"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_out_of_memory_is_one_line(call, trained, monkeypatch, arguments, instead):
    monkeypatch.chdir(trained)
    broken = lambda *_, **__: (_ for _ in ()).throw(FULL)  # noqa: E731
    monkeypatch.setattr(GPT, "__init__", broken)
    extra = ["--data", "text.txt", "--out", "out"] if arguments[0] == "compare" else []
    one_line(call(command.main, *arguments, *extra), f"out of memory: {instead}", "device with more", "ALLOC_FAILED")


# generate


def test_generate_prints_the_text_and_nothing_else_on_stdout(call, trained):
    options = ["--run", trained / "runs" / "small", "--seed", 5, "--max-new-tokens", 30, "--kernels", "torch"]
    status, out, error = call(prompting.generate, *options, "--prompt", "The fox")
    assert status == 0
    assert out.startswith("The fox") and out.endswith("\n") and len(out) == len("The fox") + 30 + 1
    assert set(out) <= set(TEXT)
    assert "attention=torch" in error and "30 characters" in error
    assert call(prompting.generate, *options, "--prompt", "The fox")[1] == out  # the seed
    checkpoint = [*options[2:], "--run", trained / "runs" / "small" / "best"]
    assert call(prompting.generate, *checkpoint, "--prompt", "The fox")[1] == out


def test_generate_takes_the_newest_run(call, trained, monkeypatch):
    monkeypatch.chdir(trained)
    status, out, error = call(prompting.generate, "--max-new-tokens", 4, "--temperature", 0)
    assert status == 0 and len(out) == 5 and "runs/small" in error.replace("\\", "/")


def test_generate_in_the_folder_of_the_run(call, trained, monkeypatch):
    monkeypatch.chdir(trained / "runs" / "small")
    assert call(prompting.generate, "--run", ".", "--max-new-tokens", 1)[0] == 0
    monkeypatch.chdir("last")
    assert call(prompting.generate, "--run", ".", "--max-new-tokens", 1)[0] == 0


def test_generate_stops_before_the_stop_text(call, trained):
    run = ["--run", trained / "runs" / "small", "--max-new-tokens", 200, "--seed", 1, "--temperature", 5]
    _, whole, _ = call(prompting.generate, *run, "--prompt", "q")
    stop = whole[20:22]
    status, out, _ = call(prompting.generate, *run, "--prompt", "q", "--stop", stop)
    assert status == 0
    assert out == "q" + whole[1 : 1 + whole[1:].index(stop)] + "\n"


def test_kernels_of_the_environment_and_of_the_flag(call, trained, monkeypatch):
    run = ["--run", trained / "runs" / "small", "--max-new-tokens", 1]
    monkeypatch.setenv("MINIGPT_KERNELS", "eager")
    assert "attention=eager" in call(prompting.generate, *run)[2]
    assert (
        "attention=torch, layer_norm=eager"
        in call(prompting.generate, *run, "--kernels", "attention=torch,layer_norm=eager")[2]
    )
    monkeypatch.setenv("MINIGPT_KERNELS", "cuda")
    one_line(call(prompting.generate, *run), "'cuda'", "triton")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prompt", ""], ["prompt is empty", "--prompt"]),
        (["--prompt", "caf\u00e9 5"], ["'\u00e9'", "'5'", "never seen"]),
        (["--prompt", "a\udc80b"], ["never seen"]),
        (["--stop", ""], ["stop text is empty"]),
        (["--stop", "\u2603"], ["stop text"]),
        (["--temperature", "-1"], ["temperature", "-1"]),
        (["--temperature", "nan"], ["temperature"]),
        (["--temperature", "warm"], ["temperature", "warm"]),
        (["--top-k", "-3"], ["top_k"]),
        (["--top-k", "2.5"], ["2.5"]),
        (["--top-p", "0"], ["top_p"]),
        (["--top-p", "1.5"], ["top_p"]),
        (["--max-new-tokens", "-1"], ["max_new_tokens"]),
        (["--seed", "-1"], ["seed"]),
        (["--device", "gpu"], ["'gpu'", "cpu"]),
        (["--device", "cuda:99"], ["cuda:99"]),
        (["--kernels", "cuda"], ["'cuda'", "eager", "torch", "triton"]),
        (["--kernels", "matmul=torch"], ["'matmul'", "attention"]),
        (["--kernels", "attention=fast"], ["'fast'"]),
        (["--tempreature", "1"], ["--tempreature", "--temperature"]),
        (["--temperature"], ["temperature"]),
        (["unexpected"], ["unexpected"]),
    ],
)
def test_generate_with_wrong_options(call, trained, options, words):
    result = call(prompting.generate, "--run", trained / "runs" / "small", *options)
    one_line(result, *words)
    assert result[1] == ""


def test_generate_without_any_run(call, tmp_path):
    one_line(call(prompting.generate), "runs", "train first")
    one_line(call(prompting.generate, "--run", "missing"), "missing", "train first")
    one_line(call(prompting.generate, "--run", tmp_path), "no checkpoint")
    for place in (".", "..", "/", ""):
        one_line(call(prompting.generate, "--run", place), "no checkpoint")
    (tmp_path / "file").write_text("x")
    one_line(call(prompting.generate, "--run", tmp_path / "file"), "no checkpoint")


# checkpoints that are not whole


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def widen(path: Path) -> None:
    settings = json.loads(path.read_text())
    settings["model"]["n_embd"] *= 2
    path.write_text(json.dumps(settings))
    storage.seal(path.parent)


def shorten(path: Path) -> None:
    tokenizer = json.loads(path.read_text())
    tokenizer["characters"] += "\U0010ffff"
    path.write_text(json.dumps(tokenizer))
    storage.seal(path.parent)


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("model.safetensors", Path.unlink, ["model.safetensors", "missing"]),
        ("checksums.json", Path.unlink, ["checksums.json", "missing"]),
        ("model.safetensors", truncate, ["model.safetensors", "damaged"]),
        ("model.safetensors", lambda path: path.write_bytes(b""), ["model.safetensors", "damaged"]),
        ("model.safetensors", lambda path: path.write_bytes(b"\xff" * 1000), ["model.safetensors", "damaged"]),
        ("config.json", Path.unlink, ["config.json", "missing"]),
        ("config.json", truncate, ["config.json", "damaged"]),
        ("config.json", lambda path: path.write_text("[]"), ["config.json", "damaged"]),
        ("config.json", lambda path: path.write_text("{}"), ["config.json", "damaged"]),
        ("config.json", lambda path: path.write_bytes(b"\xff"), ["config.json", "damaged"]),
        ("config.json", widen, ["another shape"]),
        ("tokenizer.json", Path.unlink, ["tokenizer.json", "missing"]),
        ("tokenizer.json", lambda path: path.write_text("{}"), ["tokenizer", "damaged"]),
        ("tokenizer.json", shorten, ["do not belong together"]),
        ("state.json", Path.unlink, ["state.json", "missing"]),
    ],
)
def test_generate_from_a_damaged_checkpoint(call, copy, name, damage, words):
    for checkpoint in ("best", "last", "last.1"):
        damage(copy / checkpoint / name)
    one_line(call(prompting.generate, "--run", copy, "--max-new-tokens", 1), *words)


def test_generate_says_when_it_does_not_take_the_best(call, copy):
    truncate(copy / "best" / "model.safetensors")
    status, out, error = call(prompting.generate, "--run", copy, "--max-new-tokens", 1)
    assert status == 0 and len(out) == 2
    assert error.startswith("WARNING: ") and f"Taking {copy / 'last'} instead" in error


def test_generate_from_a_model_that_has_diverged(call, copy):
    path = copy / "best" / "model.safetensors"
    save_file({name: torch.full_like(tensor, torch.nan) for name, tensor in load_file(path).items()}, path)
    storage.seal(path.parent)
    status, _, error = call(prompting.generate, "--run", copy, "--max-new-tokens", 1)
    assert status == 1
    assert error.splitlines()[-1].startswith("error: ") and "diverged" in error


# evaluate


def test_evaluate_gives_what_training_measured(call, trained):
    summary = json.loads((trained / "runs" / "small" / "summary.json").read_text())
    status, out, _ = call(commands.evaluate, "--run", trained / "runs" / "small" / "last")
    assert status == 0
    found = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert found["tokens"] == f"{summary['val_tokens']:,}"
    assert found["characters"] == found["tokens"] == f"{summary['val_characters']:,}"  # a token is a character here
    assert found["loss"] == "{0:.4f} nats per token, {0:.4f} nats per character".format(summary["val_loss"])
    assert found["bits"] == f"{summary['bits_per_character']:.4f} per character"
    assert found["perplexity"] == f"{summary['perplexity']:.3f} per token"


def test_evaluate_on_another_text(call, trained, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("The fox has 99 balloons.\n" * 20)
    status, out, _ = call(commands.evaluate, "--run", trained / "runs" / "small", "--data", other, "--max-tokens", 7)
    assert status == 0 and "1 kinds of characters are unknown" in out
    assert [line.split()[1] for line in out.splitlines() if line.startswith("tokens")] == ["7"]


def test_evaluate_with_wrong_input(call, trained, copy, tmp_path):
    run = ["--run", trained / "runs" / "small"]
    one_line(call(commands.evaluate, *run, "--max-tokens", -1), "max_tokens")
    one_line(call(commands.evaluate, *run, "--data", "missing.txt"), "missing.txt")
    (tmp_path / "short.txt").write_text("The")
    one_line(call(commands.evaluate, *run, "--data", tmp_path / "short.txt"), "longer text")
    state = json.loads((copy / "best" / "state.json").read_text())
    (copy / "best" / "state.json").write_text(json.dumps(state | {"corpus": "0" * 64}))
    storage.seal(copy / "best")
    one_line(call(commands.evaluate, "--run", copy), "has changed since", "--data")
    one_line(call(commands.evaluate), "train first")


# train: what the command line itself must refuse; tests of the trainer look at the rest


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--preset", "huge"], ["'huge'", "tiny", "shakespeare-cpu", "gpt2-xl"]),
        (["--kernels", "cuda"], ["'cuda'", "eager", "torch", "triton"]),
        (["--kernels", "attention=triton,softmax=torch"], ["'softmax'", "attention", "layer_norm", "loss"]),
        (["--device", "tpu"], ["'tpu'", "cpu"]),
        (["--n-layers", "3"], ["--n-layers", "--n-layer"]),
        (["--max-steps", "many"], ["many"]),
        (["--max-steps"], ["max-steps"]),
        (["--max-steps", "0"], ["max_steps must be at least 1"]),
        (["--max-steps", "-5"], ["max_steps must be at least 1"]),
        (["--eval-interval", "0"], ["eval_interval must be at least 1"]),
        (["--grad-accumulation", "0"], ["grad_accumulation must be at least 1"]),
        (["--batch-size", "-1"], ["batch_size must be at least 1"]),
        (["--keep", "-1"], ["keep must be 0 or more"]),
        (["--warmup-steps", "-1"], ["warmup_steps must be 0 or more"]),
        (["--dtype", "fp8"], ["fp8", "bf16"]),
        (["--block-size", "0"], ["block_size"]),
        (["--n-head", "3"], ["n_head", "n_embd"]),
        (["--data", "missing.txt"], ["missing.txt", "--data"]),
        (["--data", "."], ["folder"]),
        (["--data", "empty.txt"], ["empty.txt", "no text"]),
        (["--data", "latin.txt"], ["latin.txt", "UTF-8"]),
        (["--data", "short.txt"], ["longer text"]),
        (["--data", "text.txt", "--prompt", "\u2603"], ["'\u2603'"]),
        (["--data", "text.txt", "--out", "text.txt/run"], ["text.txt"]),
        (["--data", "text.txt", "--resume", "nowhere"], ["nowhere"]),
    ],
)
def test_train_with_wrong_options(call, options, words):
    Path("text.txt").write_text(TEXT)
    Path("empty.txt").write_text("")
    Path("latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    Path("short.txt").write_text("To be, or not")
    before = sorted(Path().rglob("*"))
    machine = [] if "--device" in options or "--preset" in options else ["--device", "cpu"]  # it decides the preset
    one_line(call(train, *machine, *options), *words)
    assert sorted(Path().rglob("*")) == before  # nothing half-written


# python -m minigpt


def test_help_lists_every_command(call):
    status, out, _ = call(command.main, "--help")
    assert status == 0
    for name in command.COMMANDS:
        assert name in out


@pytest.mark.parametrize("name", command.COMMANDS)
def test_every_command_has_typed_help(call, name):
    status, out, error = call(command.main, name, "--help")
    assert status == 0 and error == ""
    flags = {
        "compare": ["--a", "--device"],
        "prepare": ["--data"],
        "export": ["--to", "--run"],
        "import": ["--from", "--tokenizer"],
        "playground": ["--runs", "--port", "--device"],
    }.get(name, ["--kernels", "--device"])
    assert f"python -m minigpt {name}" in out and all(f"{flag} " in out for flag in flags)
    assert "INT" in out or "PATH" in out


def test_wrong_commands(call):
    one_line(call(command.main), "train", "generate", "evaluate", "showcase")
    one_line(call(command.main, "frobnicate"), "'frobnicate'", "train", "showcase")
    one_line(call(command.main, "genrate"), "did you mean generate?")
    one_line(call(command.main, "showcase", "--out"), "--out")
    one_line(call(command.main, "showcase", "--kernels", "fast"), "'fast'", "triton")


def test_the_showcase_has_a_status(call, tmp_path, monkeypatch):
    monkeypatch.setattr("minigpt.showcase.STEPS", 1)
    result = call(command.main, "showcase", "--kernels", "torch", "--out", tmp_path)
    one_line(result, "2 of 4 stations failed: training, generation")


# The programs themselves


def program(*arguments, **options) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | options.pop("env", {})
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, env=environment, timeout=120, **options
    )
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    return done


def test_a_terminal_that_lacks_a_character_shows_another():
    code = "from minigpt import errors; errors.door(lambda: print('snow\N{SNOWMAN}man'))"
    done = program("-c", code, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and done.stdout.strip() == b"snow?man"


@needs_fork
def test_generate_py(trained):
    arguments = ("--run", str(trained / "runs" / "small"), "--prompt", "fox", "--max-new-tokens", "3")
    done = forked.run(str(ROOT / "generate.py"), *arguments, interpret="1")
    assert done.returncode == 0 and done.stdout.startswith("fox") and "3 characters" in done.stderr


@needs_fork
def test_the_module_says_no_in_one_line():
    done = forked.run("-m", "minigpt", "frobnicate", interpret="1")
    assert done.returncode == 1
    assert done.stderr.startswith("error: unknown command 'frobnicate'") and done.stderr.count("\n") == 1


def test_train_py_says_no_in_one_line(tmp_path):
    done = program(ROOT / "train.py", "--data", tmp_path / "caf\u00e9.txt", env={"LC_ALL": "C"})
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: there is no file") and done.stderr.count(b"\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="pipes close otherwise on Windows")
@pytest.mark.parametrize("after", [0.3, 1.5])
def test_ctrl_c_while_it_starts_leaves_no_traceback(after):
    started = subprocess.Popen([sys.executable, ROOT / "train.py", "--help"], stderr=subprocess.PIPE, text=True)
    time.sleep(after)
    started.send_signal(signal.SIGINT)
    _, said = started.communicate(timeout=60)
    assert "Traceback" not in said and started.returncode in (-signal.SIGINT, 130, 0)


def test_a_closed_pipe_ends_quietly(trained):
    arguments = ["--run", str(trained / "runs" / "small"), "--max-new-tokens", "2000"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, str(ROOT / "generate.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    ) as process:
        process.stdout.read(1)
        process.stdout.close()
        error = process.stderr.read()
        status = process.wait(120)
    assert status == 141 and b"Traceback" not in error and b"Exception ignored" not in error
