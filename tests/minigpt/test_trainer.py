"""Training: it learns, repeats itself, goes on where it was stopped, and writes what it promises."""

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
from training_runs import StopAfter, Waits, assert_same_run, losses, rows

from kernels.op import count_launches
from minigpt import backends, checkpoint, trainer
from minigpt.config import parse
from minigpt.errors import Stopped, StopRequest, UserError
from minigpt.learning import Learner
from minigpt.model import GPT
from minigpt.report import COLUMNS
from minigpt.tokenizers import CharTokenizer
from minigpt.trainer import Session, train

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def weights(folder):
    return checkpoint.load(folder).model(backends.resolve("torch", CPU), CPU).state_dict()


def assert_same_weights(a, b):
    assert all(torch.equal(x, y) for x, y in zip(weights(a).values(), weights(b).values(), strict=True))


# ---------------------------------------------------------------- what a run does and writes


def test_it_learns_and_writes_everything(small, capsys):
    summary = train(small(max_steps=150, eval_interval=60, out=Path("a/run")))
    folder = Path("a/run")
    written = ["best", "curves.png", "last", "last.1", "metrics.csv", "samples.txt", "summary.json"]
    assert sorted(os.listdir(folder)) == written
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


@pytest.mark.interpreted
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
            measured = ours.learner.step(step)
        assert measured.tolist() == pytest.approx(reference.learner.step(step).tolist(), abs=1e-3)
        # A norm before each branch and one at the end, with the addition before it; an attention a layer; one loss,
        # whose gradients are made in the forward pass and scaled in the backward pass, dX and dW.
        norms = 2 * config.n_layer + 1
        expected = {f"_layer_norm_{name}": norms for name in ("forward", "backward", "backward_reduce")}
        expected |= {f"_attention_short_{name}": config.n_layer for name in ("forward", "backward")}
        assert launches == expected | {"_linear_cross_entropy_forward": 1, "_linear_cross_entropy_backward_scale": 2}


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


def test_the_curves_are_drawn_on_the_way(small, monkeypatch):
    monkeypatch.setattr(trainer, "_SECONDS_BETWEEN_PICTURES", 0.0)
    drawn = []
    monkeypatch.setattr(trainer.plots, "curves", lambda table, png, title: drawn.append((png, len(rows(table.parent)))))
    train(small(out=Path("r")))
    assert drawn == [(Path("r/curves.png"), steps) for steps in (5, 10, 12, 12)]


# ---------------------------------------------------------------- stopping


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_after_its_step(small, number, monkeypatch):
    step = Learner.step

    def struck(self, place):
        if place == 6:
            signal.raise_signal(number)
        return step(self, place)

    monkeypatch.setattr(Learner, "step", struck)
    with pytest.raises(Stopped, match=r"stopped after step 7.*--resume r$") as stopped:
        train(small(out=Path("r")))
    assert stopped.value.exit_status == 130
    assert checkpoint.load(Path("r/last")).state["progress"]["step"] == 7
    assert [int(row["step"]) for row in rows(Path("r"))] == list(range(1, 8))


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
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
        ({"out": Path("taken")}, "taken is not empty, and no run is in it"),
        ({"out": Path("run")}, "run is not empty.*--resume run"),
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
    Path("run/last").mkdir(parents=True)
    before = sorted(map(str, Path().rglob("*")))
    with pytest.raises(UserError, match=said) as raised:
        train(small(**options))
    assert "\n" not in str(raised.value) and sorted(map(str, Path().rglob("*"))) == before


def lose(monkeypatch, *steps, value=math.nan):
    """Make the loss of these steps `value`."""
    step, backward = Learner.step, Learner.backward

    def numbered(self, number):
        self.number = number
        return step(self, number)

    def broken(self, data):
        loss = backward(self, data)
        if self.number not in steps:
            return loss
        for parameter in self.parameters:
            parameter.grad *= value
        return loss * value

    monkeypatch.setattr(Learner, "step", numbered)
    monkeypatch.setattr(Learner, "backward", broken)


def test_a_step_whose_loss_is_not_finite_is_skipped_and_counted(small, monkeypatch, capsys):
    lose(monkeypatch, 0, 6, 7)
    summary = train(small(out=Path("r")))
    said = [line for line in capsys.readouterr().out.splitlines() if "WARNING" in line]
    what = "skipped, weights unchanged: loss nan, norm of the gradient nan;"
    assert said == [
        f"WARNING: step 1 {what} 1 skipped in all",
        f"WARNING: 2 steps up to step 8 {what} 3 skipped in all",
    ]
    assert summary["skipped_steps"] == 3 and summary["final_train_loss"] < summary["initial_loss"]
    table = rows(Path("r"))
    assert [row["step"] for row in table if row["train_loss"] == "nan"] == ["1", "7", "8"] and len(table) == 12
    assert summary["initial_loss"] == pytest.approx(float(table[1]["train_loss"]))


def test_skipped_steps_are_resumed_to_the_last_bit_too(small, monkeypatch):
    lose(monkeypatch, 3, 4, 8)
    train(small(out=Path("whole")))
    session = Session(small(out=Path("r")))
    with session, pytest.raises(Stopped):
        session.run(StopAfter(session, 4))
    assert train(parse(["--resume", "r"]))["skipped_steps"] == 3
    assert_same_run(Path("r"), Path("whole"))


@pytest.mark.parametrize(("dtype", "most", "said"), [("fp32", 10, "--warmup-steps$"), ("fp16", 30, "bf16 or fp32$")])
def test_many_skipped_steps_in_a_row_end_the_run(small, monkeypatch, dtype, most, said):
    lose(monkeypatch, *range(3, 100), value=math.inf)
    with pytest.raises(UserError, match=rf"^{most} steps in a row, up to step {most + 3}, .*--learning-rate.*{said}"):
        train(small(out=Path("r"), max_steps=100, dtype=dtype))
    assert checkpoint.load(Path("r/last"), to_resume=True).state["progress"]["step"] < most + 5
    assert all(weight.isfinite().all() for weight in weights(Path("r/last")).values())


def test_a_run_that_diverges_ends(small):
    with pytest.raises(UserError, match=r"10 steps in a row.*lower --learning-rate"):
        train(small(learning_rate=1e30, max_steps=50, grad_clip=0.0, out=Path("r")))
    assert (Path("r/last")).is_dir()


WHOLE = Learner.loss


def too_large(monkeypatch, limit, error):
    """Make steps of more than `limit` windows run out of memory."""

    def limited(self, inputs, targets):
        if len(inputs) > limit:
            raise error
        return WHOLE(self, inputs, targets)

    monkeypatch.setattr(Learner, "loss", limited)


CPU_ERROR = RuntimeError("[enforce fail at alloc_cpu.cpp:130] . DefaultCPUAllocator: can't allocate memory: ...")


@pytest.mark.parametrize(
    ("error", "limit", "fits", "passes"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), 11, 6, 4),
        (MemoryError(), 4, 4, 6),
        (CPU_ERROR, 1, 1, 24),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), 6, 6, 4),
        (RuntimeError("Triton Error [CUDA]: out of memory"), 6, 6, 4),
    ],
    ids=repr,
)
def test_out_of_memory_says_which_batch_fits(small, monkeypatch, error, limit, fits, passes):
    too_large(monkeypatch, limit, error)
    instead = ["--batch-size", str(fits), "--grad-accumulation", str(passes)]
    with pytest.raises(UserError, match=f"--batch-size 12, and {fits} fits.*: {' '.join(instead)} trains.*--resume r"):
        train(small(out=Path("r"), batch_size=12, grad_accumulation=2))
    train(parse(["--resume", "r", *instead]))
    monkeypatch.setattr(Learner, "loss", WHOLE)
    train(small(out=Path("whole"), batch_size=12, grad_accumulation=2))
    assert losses(Path("r")) == pytest.approx(losses(Path("whole")), abs=1e-4)


def test_out_of_memory_in_the_optimizer_leaves_the_loss_scale_ready_for_another_try(small, monkeypatch):
    """AdamW makes its state in the first step: the scaler has divided the gradients by then, and refuses to again."""
    windows, step = [], torch.optim.AdamW.step

    def loss(self, inputs, targets):
        windows.append(len(inputs))
        return WHOLE(self, inputs, targets)

    def limited(self, *arguments, **options):
        if windows[-1] > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, *arguments, **options)

    monkeypatch.setattr(Learner, "loss", loss)
    monkeypatch.setattr(torch.optim.AdamW, "step", limited)
    with pytest.raises(UserError, match="--batch-size 12, and 6 fits"):
        train(small(out=Path("r"), batch_size=12, dtype="fp16"))


def test_out_of_memory_with_one_window_or_before_any(small, monkeypatch):
    too_large(monkeypatch, 0, torch.OutOfMemoryError())
    with pytest.raises(UserError, match="with a single window too: take a smaller model"):
        train(small(out=Path("r")))
    with pytest.raises(UserError, match="out of memory: take a smaller model"):
        monkeypatch.setattr(GPT, "to", lambda *_: torch.empty(2**60))
        train(small(out=Path("s")))
    assert not Path("s").exists()


def test_a_compiler_that_is_missing_is_one_line(small, monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent")
    from torch._inductor import config as inductor

    monkeypatch.setattr(inductor.cpp, "cxx", (None, "/nonexistent"))
    with pytest.raises(
        UserError, match=r"--compile does not work here \(.*compiler.*\): install what it needs"
    ) as told:
        train(small(out=Path("r"), compile=True))
    assert "\n" not in str(told.value)


def test_other_errors_of_a_step_stay_what_they_are(small, monkeypatch):
    too_large(monkeypatch, 0, RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        train(small(out=Path("r")))


def test_a_full_disk_is_told_before_any_training(small):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(UserError, match="r/last: the file would be larger"):
            train(small(out=Path("r")))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not Path("r").exists()
    assert train(small(out=Path("r"), max_steps=1))["steps"] == 1


def test_a_full_disk_keeps_the_checkpoint_before(small):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    session = Session(small(out=Path("r"), max_steps=1000, eval_interval=5, log_interval=1))
    save = session._save

    def save_then_fill(name):
        save(name)
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
    session.close()
    assert sorted(os.listdir("r")) == ["best", "last", "last.1", "metrics.csv"]


def test_the_tokenizer_of_a_run_knows_its_whole_text(small):
    train(small(out=Path("r"), max_steps=1, sample_tokens=0))
    assert checkpoint.load(Path("r/last")).tokenizer == CharTokenizer.from_text(Path("text.txt").read_text())


def test_the_loop_waits_for_the_device_only_to_report(small):
    before = []
    with Session(small(out=Path("r"), max_steps=21, log_interval=5, eval_interval=100)) as session:
        step = session._step
        session._step = lambda number: (before.append(len(waits.found)), step(number))[1]
        with Waits() as waits, session.display.running(0):
            session.run(StopRequest())
    assert before == [number // 5 for number in range(21)]
    assert waits.found[:4] == ["tolist"] * 4


def test_a_run_that_has_diverged_does_not_end_as_one_that_has_not(small):
    with pytest.raises(UserError, match=r"the training has diverged.*r has what was measured.*lower --learning-rate"):
        train(small(out=Path("r"), max_steps=5, learning_rate=1e30, warmup_steps=0, grad_clip=0.0))
    summary = json.loads(Path("r/summary.json").read_text())
    assert summary["val_loss"] is None and summary["skipped_steps"] == 4
    assert Path("r/curves.png").exists() and not Path("r/samples.txt").exists()
