"""Training end to end: the rungs, what makes a row wrong, and nanoGPT beside ours."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import benchmarks.__main__
from benchmarks import ladder, machine, nanogpt, timing
from minigpt import backends, config, corpora, graphs
from minigpt.errors import UserError
from minigpt.tokenizers import CharTokenizer

CPU = torch.device("cpu")
SMALL = {"n_layer": 1, "n_head": 2, "n_embd": 16, "batch_size": 2, "data": "pydocs"}


def test_the_ladder_leaves_each_kernel_out():
    names = [rung.name for rung in ladder.ladder()]
    assert names[:5] == ["eager", "torch", "torch+compile", "triton", "triton+compile"]
    for op in backends.OPS:
        (without,) = [n for n in names if f"{op}=torch" in n]
        assert without.count("triton") == len(backends.OPS) - 1
    assert {"triton+graph", "triton+compile+graph"} <= set(names)
    for name in ("torch+compile", "torch+graph", "attention=triton+compile+graph"):
        assert [rung.name for rung in ladder.chosen([name])] == [name]
    for wrong in ("cuda", "torch+graphs", "torch+graph+compile", "attention=fast"):
        with pytest.raises(UserError):
            ladder.chosen([wrong])


def row(name, loss):
    return {"configuration": name, "preset": "p", "dtype": "fp32", "status": "untimed", "reason": "", "last_loss": loss}


def test_losses_must_agree():
    settings = config.preset("tiny")
    rows = [row("eager", 2.004), row("torch", 2.0), row("triton", 2.02), row("torch+compile", float("nan"))]
    ladder.agree(rows, settings)
    assert [r["status"] for r in rows] == ["untimed", "untimed", "wrong", "wrong"]
    assert "2.0200, that of torch 2.0000; 0.005 apart is allowed" in rows[2]["reason"]


def test_a_rung_trains_as_the_trainer_does(tmp_path):
    """The same losses as `python train.py`, step by step."""
    from minigpt import trainer

    settings = config.preset(
        "tiny", **SMALL, max_steps=4, eval_interval=4, eval_tokens=64, log_interval=1, sample_tokens=0, val_tokens=64
    )
    settings = config.TrainConfig(**vars(settings) | {"out": tmp_path / "run", "kernels": "torch", "device": "cpu"})
    trainer.train(settings)
    theirs = [float(line.split(",")[1]) for line in (tmp_path / "run" / "metrics.csv").read_text().split()[1:]]
    training = ladder.Training(settings, ladder.Rung("torch"), CPU)
    assert [training.step().item() for _ in range(4)] == pytest.approx(theirs, rel=1e-5)


def test_rows_of_a_run_on_a_cpu(monkeypatch):
    gpu = replace(machine.here(), name="NVIDIA H200", type="cuda")
    monkeypatch.setattr(machine, "here", lambda: gpu)  # which is not what they ran on
    settings = config.preset("tiny", **SMALL)
    rungs = ladder.chosen(["eager", "torch", "triton", "torch+graph"])
    rows = ladder.measure(settings, rungs, CPU, steps=2, rounds=6)
    assert [r["status"] for r in rows] == ["ok", "ok", "skipped", "skipped"]
    assert "--cuda-graph needs a GPU" in rows[3]["reason"]
    assert "interpreter" in rows[2]["reason"] and "tokens_per_second" not in rows[2]
    assert rows[0]["mfu_percent"] is None and len(rows[1]["samples_ms"]) == 6
    assert rows[1]["tokens_per_second"] == pytest.approx(128 / rows[1]["median_ms"] * 1e3, rel=1e-4)
    assert rows[1]["p20_tokens_per_second"] <= rows[1]["tokens_per_second"] <= rows[1]["p80_tokens_per_second"]


def test_rows_have_speeds_before_all_is_timed(monkeypatch):
    """A run that is ended leaves what it has."""
    monkeypatch.setattr(timing, "NEWS_SECONDS", 0.0)
    news = []
    keep = lambda rows: news.append([len(row.get("samples_ms", [])) for row in rows])  # noqa: E731
    rungs = ladder.chosen(["eager", "torch"])
    rows = ladder.measure(config.preset("tiny", **SMALL), rungs, CPU, steps=2, rounds=6, keep=keep)
    assert [2, 2] in news and news[-1] == [6, 6] and all(r["status"] == "ok" for r in rows)


class Ended(BaseException):
    """What ends a process: nothing that a ladder catches."""


def _ended_at(monkeypatch, rung):
    first_steps = ladder._first_steps

    def broken(settings, this, device, steps):
        if this.name == rung:
            raise Ended
        return first_steps(settings, this, device, steps)

    monkeypatch.setattr(ladder, "_first_steps", broken)


def test_a_run_that_ends_while_a_rung_compiles_has_timed_the_rungs_before(monkeypatch, tmp_path):
    """Also `torch`, which all others are held to, wherever it is asked for."""
    _ended_at(monkeypatch, "eager")
    command = ["train", "--rung", "eager", "torch", "--preset", "tiny", "--steps", "2", "--out", str(tmp_path)]
    arguments = benchmarks.__main__.parser().parse_args(command)
    with pytest.raises(Ended):
        arguments.run(arguments)
    (path,) = tmp_path.rglob("*.json")
    (found,) = [row for row in json.loads(path.read_text())["rows"] if row["configuration"] == "torch"]
    assert found["status"] == "ok" and len(found["samples_ms"]) == 2 and found["tokens_per_second"] > 0
    assert found["note"] == ladder.EARLY


def test_so_it_has_beside_nanogpt(monkeypatch, tmp_path):
    _ended_at(monkeypatch, "eager")
    news = []
    with pytest.raises(Ended):
        _beside(checkout(tmp_path / "nano"), ["torch", "eager"], lambda rows: news.append([dict(r) for r in rows]))
    (found,) = [row for row in news[-1] if row["configuration"] == "torch"]
    assert found["status"] == "ok" and len(found["samples_ms"]) == 2 and found["note"] == ladder.EARLY


def test_only_rungs_that_are_right_have_times_of_their_own(monkeypatch):
    """And none says that it was timed by itself once it was timed in turns."""
    agree = ladder.agree

    def judge(rows, settings):
        for row in rows:
            if row["configuration"] == "eager" and "last_loss" in row:
                row["last_loss"] = 99.0
        agree(rows, settings)

    monkeypatch.setattr(ladder, "agree", judge)
    rows = ladder.measure(config.preset("tiny", **SMALL), ladder.chosen(["eager", "torch"]), CPU, steps=2, rounds=6)
    assert [row["status"] for row in rows] == ["wrong", "ok"]
    assert "median_ms" not in rows[0] and "note" not in rows[1]


def test_a_rung_that_breaks_is_a_row(monkeypatch):
    monkeypatch.setattr(ladder.Training, "step", lambda self: 1 / 0)
    (found,) = ladder.measure(config.preset("tiny", **SMALL), [ladder.Rung("torch")], CPU, 2, 6)
    assert found["status"] == "error" and "division by zero" in found["reason"] and "median_ms" not in found


def test_a_step_that_cannot_be_captured_is_an_error_and_what_cannot_be_had_is_left_out():
    assert ladder.failure(graphs.CaptureFailed("cannot capture this step"))["status"] == "error"
    assert ladder.failure(UserError("--cuda-graph needs a GPU"))["status"] == "skipped"


def test_ratios_are_theirs_over_ours():
    rows = [
        {"configuration": name, "preset": "p", "status": "ok", "median_ms": ms}
        for name, ms in (("nanoGPT", 3.0), ("torch", 2.0))
    ]
    ladder.finish(rows)
    assert [r["over_ours"] for r in rows] == [1.5, 1.0]
    rows.append({"configuration": "triton", "preset": "p", "status": "ok", "median_ms": 1.0})
    ladder.finish(rows)
    assert [r["over_ours"] for r in rows] == [3.0, 2.0, 1.0]


# ---------------------------------------------------------------- nanoGPT


def checkout(folder: Path, train: str = "", prepared: bool = True) -> Path:
    for name in ("model.py", "configurator.py", "config/train_shakespeare_char.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    (folder / "train.py").write_text(train)
    data = folder / "data" / "shakespeare_char"
    data.mkdir(parents=True)
    for name in ("train.bin", "val.bin", "meta.pkl") if prepared else ():
        (data / name).write_text(f"the tokens of {name}")
    return folder


PROGRAM = """
import os, pickle, sys
settings = dict(word[2:].split("=") for word in sys.argv[2:])
assert settings["device"] == "cpu" and settings["compile"] == "False" and settings["dtype"] == "float32"
data = os.path.join("data", settings["dataset"])
assert open(os.path.join(data, "train.bin")).read() == "the tokens of train.bin"
vocabulary = pickle.load(open(os.path.join(data, "meta.pkl"), "rb"))["vocab_size"]
assert (vocabulary, settings["bias"]) == (VOCABULARY, "BIAS"), (vocabulary, settings["bias"])
print("step 0: train loss 4.1, val loss 4.2")
for i in range(int(settings["max_iters"]) + 1):
    print(f"iter {i}: loss 3.9, time {900.0 if i < 5 else 40.5}ms, mfu -100.00%")
"""


def _beside(folder, rungs=("torch",), keep=lambda rows: None, **changes):
    settings = config.preset("shakespeare-cpu", **SMALL, block_size=16, **changes)
    return nanogpt.measure(folder, settings, ladder.chosen(list(rungs)), CPU, steps=2, quick=True, keep=keep)


@pytest.mark.parametrize(("vocabulary", "bias"), [(0, False), (300, True)])
def test_nanogpt_has_our_vocabulary_and_our_biases(vocabulary, bias, tmp_path):
    """A last layer of 65 classes beside one of 50,304 would be another model."""
    width = vocabulary or CharTokenizer.from_text(corpora.load("pydocs").text).vocab_size
    program = PROGRAM.replace("VOCABULARY", str(width)).replace("BIAS", str(bias))
    theirs, _ = _beside(checkout(tmp_path / "nano", program), vocab_size=vocabulary, bias=bias)
    assert theirs["status"] == "ok", theirs


def test_nanogpt_is_run_and_read_beside_the_ladder(tmp_path, capsys):
    news = []
    program = PROGRAM.replace("VOCABULARY", "vocabulary").replace('"BIAS"', 'settings["bias"]')
    rows = _beside(
        checkout(tmp_path / "nano", program), ["eager", "torch", "triton"],
        lambda rows: news.append([len(row.get("samples_ms", [])) for row in rows]),
    )  # fmt: skip
    assert [r["configuration"] for r in rows] == ["nanoGPT", "eager", "torch", "triton"]
    assert rows[0]["samples_ms"] == [40.5] * 72 and rows[0]["tokens_per_step"] == 32
    assert [len(r.get("samples_ms", [])) for r in rows] == [72, 72, 72, 0] and rows[3]["status"] == "skipped"
    assert [0, 36, 36, 0] in news, "what a run that is ended leaves behind"
    assert "last_loss" in rows[1] and "loss_apart" in rows[1]
    turns = [line.split(": ")[1] for line in capsys.readouterr().out.splitlines() if line.startswith("turn")]
    assert turns == ["eager", "torch", "nanoGPT", "nanoGPT", "torch", "eager"], "ours first: theirs compiles each time"


def test_nanogpt_has_a_share_of_the_peak_as_ours_has(tmp_path, monkeypatch):
    """The same shape, so as many operations a token."""
    monkeypatch.setattr(ladder, "device_name", lambda device: "NVIDIA H200")
    program = PROGRAM.replace("VOCABULARY", "vocabulary").replace('"BIAS"', 'settings["bias"]')
    theirs, ours = _beside(checkout(tmp_path / "nano", program))
    assert theirs["mfu_percent"] * theirs["median_ms"] == pytest.approx(ours["mfu_percent"] * ours["median_ms"], 1e-2)
    assert "copying" in theirs["note"] and "note" not in ours


@pytest.mark.parametrize(
    ("program", "said"),
    [("raise SystemExit('no CUDA')", "status 1: no CUDA"), ("print('nothing')", "status 0: nothing")],
)
def test_nanogpt_that_fails_is_a_row_that_says_why(program, said, tmp_path):
    theirs, ours = _beside(checkout(tmp_path / "nano", program))
    assert theirs["status"] == "error" and said in theirs["reason"] and "median_ms" not in theirs
    assert ours["status"] == "ok"


def test_what_is_no_checkout_of_nanogpt_is_told(tmp_path):
    with pytest.raises(UserError, match=r"it has no train\.py"):
        nanogpt.check(tmp_path)
    with pytest.raises(UserError, match=r"not prepared, data/shakespeare_char lacks train\.bin"):
        _beside(checkout(tmp_path / "nano", "", prepared=False))
    with pytest.raises(UserError, match="shorter than its context"):
        nanogpt.prepared(checkout(tmp_path / "other"), config.preset("tiny"))
