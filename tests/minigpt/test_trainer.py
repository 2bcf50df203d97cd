"""Training: it learns, repeats itself, goes on where it was stopped, and writes what it promises."""

import csv
import io
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from kernels.op import count_launches
from minigpt import checkpoint, trainer
from minigpt.config import parse, preset
from minigpt.errors import Stopped, StopRequest, UserError
from minigpt.report import COLUMNS, Losses, Metrics
from minigpt.tokenizers import CharTokenizer
from minigpt.trainer import Session, learning_rate, make_optimizer, train

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture
def text(tmp_path):
    """A file whose next character the one before nearly gives away."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{number} is {'odd' if number % 2 else 'even'}.\n" for number in range(300)))
    return path


@pytest.fixture
def small(text, tmp_path, monkeypatch):
    """Settings of a run that takes a second; options replace them."""
    monkeypatch.chdir(tmp_path)

    def settings(**options):
        shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 4, "device": "cpu"}
        run = {"max_steps": 12, "warmup_steps": 2, "eval_interval": 5, "log_interval": 2, "sample_tokens": 8}
        return preset("shakespeare-cpu", **({"data": str(text), "learning_rate": 1e-2} | shape | run | options))

    return settings


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def losses(folder):
    return [float(row["train_loss"]) for row in rows(folder)]


def weights(folder):
    model, _ = checkpoint.load_model(folder, trainer.backends.resolve("torch", CPU), CPU)
    return model.state_dict()


def assert_same_weights(a, b):
    assert all(torch.equal(x, y) for x, y in zip(weights(a).values(), weights(b).values(), strict=True))


# ---------------------------------------------------------------- what a run does and writes


def test_it_learns_and_writes_everything(small, capsys):
    summary = train(small(max_steps=150, eval_interval=60, out=Path("a/run")))
    folder = Path("a/run")
    assert sorted(os.listdir(folder)) == ["best", "curves.png", "last", "metrics.csv", "samples.txt", "summary.json"]
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert summary["initial_loss"] == pytest.approx(math.log(summary["vocab_size"]), abs=0.3)
    assert summary["final_train_loss"] < 1.0 and summary["val_loss"] < 1.2
    characters = len(Path("text.txt").read_text())
    assert summary["val_tokens"] == characters - int(0.9 * characters) - 1
    assert summary["perplexity"] == pytest.approx(math.exp(summary["val_loss"]))
    assert summary["bits_per_character"] == pytest.approx(summary["val_loss"] / math.log(2))
    assert summary["kernels"] == {"attention": "torch", "layer_norm": "torch", "loss": "torch"}
    assert (summary["preset"], summary["steps"], summary["device"], summary["dtype"]) == (
        "shakespeare-cpu",
        150,
        "cpu",
        "fp32",
    )
    assert summary["seconds"] > 0 and summary["tokens_per_second"] > 0
    assert summary["vocab_size"] == 3 + len(set(Path("text.txt").read_text()))

    table = rows(folder)
    assert list(table[0]) == list(COLUMNS) and [int(row["step"]) for row in table] == list(range(1, 151))
    assert [int(row["step"]) for row in table if row["val_loss"]] == [60, 120, 150]
    assert float(table[0]["train_loss"]) == pytest.approx(summary["initial_loss"], rel=1e-6)
    assert float(table[-1]["train_loss"]) == pytest.approx(summary["final_train_loss"], rel=1e-6)
    assert min(float(row["val_loss"]) for row in table if row["val_loss"]) == pytest.approx(
        summary["best_val_loss"], rel=1e-6
    )
    assert checkpoint.load(folder / "best").state["progress"]["step"] == summary["best_step"]
    assert checkpoint.load(folder / "last").state["progress"]["step"] == 150

    said = capsys.readouterr().out
    for expected in ("attention", "layer_norm", "loss", "no GPU", "parameters", str(folder), "perplexity", "tokens/s"):
        assert expected in said


def test_new_runs_get_new_folders(small):
    for number in (1, 2, 3):
        train(small(max_steps=1, sample_tokens=0))
        assert (Path("runs") / f"shakespeare-cpu-{number}" / "summary.json").is_file()


def test_the_same_seed_repeats_the_run_and_another_does_not(small):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(small(out=Path(name), seed=seed, dropout=0.1))
    assert losses(Path("a")) == losses(Path("b")) != losses(Path("c"))
    assert_same_weights(Path("a/last"), Path("b/last"))
    assert Path("a/samples.txt").read_text() == Path("b/samples.txt").read_text()


def test_backends_see_the_same_run(small):
    for kernels in ("torch", "eager"):
        train(small(out=Path(kernels), kernels=kernels))
    assert losses(Path("eager")) == pytest.approx(losses(Path("torch")), abs=1e-3)


@pytest.mark.interpreter
def test_triton_kernels_train_the_same_and_run_once_per_op(small):
    options = {
        "max_steps": 2,
        "eval_interval": 2,
        "n_layer": 2,
        "eval_tokens": 16,
        "val_tokens": 16,
        "sample_tokens": 0,
    }
    ours = Session(small(out=Path("triton"), kernels="triton", **options))
    reference = Session(small(out=Path("torch"), kernels="torch", **options))
    config = ours.model.config
    for step in range(2):
        with count_launches() as launches:
            loss = ours._step(step)
        assert loss.item() == pytest.approx(reference._step(step).item(), abs=1e-3)
        # A norm before each branch and one at the end, with the addition before it; an attention a layer; one loss,
        # whose gradients are made in the forward pass and scaled in the backward pass, dX and dW.
        norms = 2 * config.n_layer + 1
        expected = {f"_layer_norm_{name}": norms for name in ("forward", "backward", "backward_reduce")}
        expected |= {f"_attention_short_{name}": config.n_layer for name in ("forward", "backward")}
        assert launches == expected | {"_linear_cross_entropy_forward": 1, "_linear_cross_entropy_backward": 2}


def test_accumulating_halves_is_the_whole_batch(small):
    train(small(out=Path("whole"), batch_size=4))
    train(small(out=Path("halves"), batch_size=2, grad_accumulation=2))
    assert losses(Path("halves")) == pytest.approx(losses(Path("whole")), abs=1e-4)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision(small, dtype):
    summary = train(small(max_steps=40, dtype=dtype))
    assert summary["dtype"] == dtype and summary["final_train_loss"] < 0.8 * summary["initial_loss"]
    name, stored = next(iter(weights(Path("runs/shakespeare-cpu-1/last")).items()))
    assert stored.dtype == torch.float32, name


def test_windows_may_be_shorter_than_the_block_and_the_vocabulary_padded(small):
    summary = train(small(window=5, vocab_size=100))
    assert summary["vocab_size"] == 100 and summary["steps"] == 12


def test_one_step_is_a_run(small):
    summary = train(small(max_steps=1, sample_tokens=0))
    assert summary["initial_loss"] == summary["final_train_loss"] and summary["tokens_per_second"] > 0


# ---------------------------------------------------------------- parts


def test_the_learning_rate_warms_up_and_follows_a_cosine():
    config = preset("shakespeare-cpu", learning_rate=1.0, min_learning_rate=0.2, warmup_steps=9, max_steps=109)
    rates = [learning_rate(step, config) for step in range(109)]
    assert rates[:9] == pytest.approx([0.1 * n for n in range(1, 10)])
    assert rates[9] == 1.0 and rates[59] == pytest.approx(0.6) and rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[34] == pytest.approx(0.2 + 0.8 * (2 + math.sqrt(2)) / 4) and 0.2 < rates[-1] < 0.201
    assert learning_rate(109, config) == learning_rate(10**6, config) == pytest.approx(0.2)
    short = preset("shakespeare-cpu", warmup_steps=50, max_steps=10)
    assert 0 < learning_rate(9, short) < learning_rate(50, short)


def test_the_optimizer_steps_as_the_paper_says(small):
    """One step of decoupled weight decay and bias-corrected moments, computed by hand in float64."""
    config = small(beta1=0.8, beta2=0.9, weight_decay=0.3)
    session = Session(config)
    before = {name: p.detach().double().clone() for name, p in session.model.named_parameters()}
    optimizer = make_optimizer(session.model, config)
    torch.manual_seed(0)
    for p in session.model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    for name, p in session.model.named_parameters():
        decay = 0.3 if p.dim() >= 2 else 0.0
        gradient = p.grad.double()
        expected = before[name] * (1 - 1e-2 * decay) - 1e-2 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(p.detach().double(), expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_is_clipped_to_its_norm(small, monkeypatch):
    norms = []

    def note(model):
        norms.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item())

    for clip in (0.0, 0.01):
        session = Session(small(grad_clip=clip))
        monkeypatch.setattr(session.optimizer, "step", lambda model=session.model: note(model))
        session._step(0)
    assert norms[0] > 0.1 and norms[1] == pytest.approx(0.01, rel=1e-3)


def test_losses_come_in_order_and_all_of_them():
    losses = Losses(CPU)
    for value in range(3):
        losses.add(torch.tensor(float(value)))
    assert losses.take() == [0.0, 1.0, 2.0] and losses.take() == []
    losses.add(torch.tensor(3.0))
    assert losses.take(everything=True) == [3.0]


@pytest.mark.gpu
def test_losses_come_in_order_from_a_gpu_too():
    losses, found = Losses(torch.device("cuda")), []
    for value in range(10):
        losses.add(torch.tensor(float(value), device="cuda"))
        if value % 3 == 0:
            found += losses.take()
    assert found + losses.take(everything=True) == [float(value) for value in range(10)]


def test_metrics_continue_after_the_step_of_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.csv"
    metrics = Metrics(path)
    metrics.write([{"step": step, "train_loss": 1.0 / step} for step in range(1, 6)])
    metrics.close()
    metrics = Metrics(path, step=3)
    metrics.write([{"step": 4, "train_loss": 9.0}])
    metrics.close()
    assert [(row["step"], row["train_loss"]) for row in csv.DictReader(io.StringIO(path.read_text()))] == [
        ("1", "1"), ("2", "0.5"), ("3", "0.3333333"), ("4", "9"),
    ]  # fmt: skip


# ---------------------------------------------------------------- stopping and going on


class StopAfter:
    """A StopRequest that comes up once a session has done so many steps."""

    def __init__(self, session, step):
        self.session, self.step = session, step

    @property
    def requested(self):
        return self.session.progress.step >= self.step


@pytest.mark.parametrize("options", [{}, {"dropout": 0.2, "grad_accumulation": 2}, {"dtype": "bf16"}], ids=str)
@pytest.mark.parametrize("stopped_after", [1, 5, 7])
def test_resuming_gives_the_run_that_was_never_stopped(small, options, stopped_after):
    config = small(max_steps=10, **options)
    whole = train(small(max_steps=10, out=Path("whole"), **options))
    session = Session(small(max_steps=10, out=Path("halved"), **options))
    with pytest.raises(Stopped, match=f"after step {stopped_after} of 10.*--resume halved"):
        session.run(StopAfter(session, stopped_after))
    session.metrics.close()
    torch.rand(100)  # the generators are elsewhere meanwhile
    resumed = train(parse(["--resume", "halved"]))
    assert losses(Path("halved")) == losses(Path("whole")) and len(losses(Path("whole"))) == 10
    assert_same_weights(Path("halved/last"), Path("whole/last"))
    assert_same_weights(Path("halved/best"), Path("whole/best"))
    for name in ("initial_loss", "final_train_loss", "val_loss", "best_val_loss", "best_step", "steps"):
        assert resumed[name] == whole[name]
    assert config.resume is None


def test_a_finished_run_may_be_finished_again_or_extended(small):
    first = train(small(out=Path("r")))
    again = train(parse(["--resume", "r"]))
    assert again["val_loss"] == first["val_loss"] and len(losses(Path("r"))) == 12
    more = train(parse(["--resume", "r", "--max-steps", "20", "--kernels", "eager"]))
    assert more["steps"] == 20 and more["kernels"]["loss"] == "eager" and len(losses(Path("r"))) == 20


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--n-layer", "2"], "leave out --n-layer"),
        (["--seed", "7", "--learning-rate", "0.5"], "leave out --seed, --learning-rate"),
        (["--out", "elsewhere"], "leave out --out"),
        (["--max-steps", "3"], "12 steps already"),
        (["--data", "other.txt"], "another text"),
    ],
)
def test_a_resumed_run_stays_the_same_run(small, arguments, said):
    train(small(out=Path("r"), sample_tokens=0))
    Path("other.txt").write_text("Another text. " * 100)
    before = (Path("r") / "metrics.csv").read_bytes()
    with pytest.raises(UserError, match=said):
        train(parse(["--resume", "r", *arguments]))
    assert (Path("r") / "metrics.csv").read_bytes() == before and not Path("elsewhere").exists()


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(small, number, text, tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), "--data", str(text), "--out", "stopped", "--device", "cpu"]
    command += [
        "--n-layer",
        "1",
        "--n-embd",
        "16",
        "--max-steps",
        "1000000",
        "--eval-interval",
        "1000000",
        "--kernels",
        "torch",
    ]
    running = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        metrics = tmp_path / "stopped" / "metrics.csv"
        deadline = time.monotonic() + 120
        while not (metrics.is_file() and metrics.read_text().count("\n") > 20):
            assert running.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        running.send_signal(number)
        _, said = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 130
    assert said.startswith("stopped after step") and "--resume stopped" in said and said.count("\n") == 1
    step = checkpoint.load(tmp_path / "stopped" / "last").state["progress"]["step"]
    assert step >= 20 and [int(row["step"]) for row in rows(tmp_path / "stopped")] == list(range(1, step + 1))


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"data": "nowhere.txt"}, "nowhere.txt"),
        ({"data": "empty.txt"}, "empty.txt"),
        ({"data": "binary.txt"}, "UTF-8"),
        ({"data": "short.txt"}, "one window needs 17"),
        ({"data": "one.txt", "block_size": 1}, "one window needs 2|too little text"),
        ({"prompt": "Ωß"}, "'Ω' 'ß'"),
        ({"kernels": "cuda"}, "unknown kernels"),
        ({"device": "quantum"}, "unknown device"),
        ({"out": Path("text.txt")}, "text.txt"),
        ({"out": Path("text.txt/run")}, "text.txt/run: a part of the path is a file"),
        ({"out": Path("taken")}, "taken is not empty.*--resume taken"),
        ({"resume": Path("nowhere")}, "no checkpoint nowhere/last"),
    ],
)
def test_bad_input_is_told_in_one_line_and_leaves_nothing(small, options, said):
    Path("empty.txt").write_text("")
    Path("binary.txt").write_bytes(b"\xff\xfe\x00abc" * 50)
    Path("short.txt").write_text("too short")
    Path("one.txt").write_text("ab")
    Path("taken").mkdir()
    Path("taken/file").write_text("")
    before = sorted(map(str, Path().rglob("*")))
    with pytest.raises(UserError, match=said) as raised:
        train(small(**options))
    assert "\n" not in str(raised.value) and sorted(map(str, Path().rglob("*"))) == before


def test_a_loss_that_is_not_finite_ends_the_run(small):
    with pytest.raises(UserError, match=r"training loss is (nan|inf) at step .*--learning-rate"):
        train(small(learning_rate=1e30, max_steps=50, grad_clip=0.0, out=Path("r")))


def test_a_full_disk_keeps_the_checkpoint_before(small):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    session = Session(small(out=Path("r"), max_steps=1000, eval_interval=5, log_interval=1))
    save = session._save

    def save_then_fill(name, optimizer):
        save(name, optimizer)
        if name == "last":
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))

    session._save = save_then_fill
    try:
        with pytest.raises(UserError, match=r"r/(best|last|metrics.csv): the file would be larger"):
            session.run(StopRequest())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    found = checkpoint.load(Path("r/last"))
    found.load_weights(session.model)
    assert found.state["progress"]["step"] == 5
    assert sorted(os.listdir("r")) == ["best", "last", "metrics.csv"]


def test_the_tokenizer_of_a_run_knows_its_whole_text(small):
    train(small(out=Path("r"), max_steps=1, sample_tokens=0))
    assert checkpoint.load(Path("r/last")).tokenizer == CharTokenizer.from_text(Path("text.txt").read_text())
