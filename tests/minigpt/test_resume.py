"""Going on with a run: the same bits as one that was never stopped, or a line that says why not."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from training_runs import StopAfter, assert_same_run, losses, rows

from minigpt import bpe, checkpoint, generators, plots, prepare, process, report, storage
from minigpt.backends import resolve
from minigpt.config import parse, preset
from minigpt.errors import Stopped, UserError
from minigpt.resume import another_speed, surroundings, why_not_exact
from minigpt.trainer import Session, train


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take longer than the runs."""
    monkeypatch.setattr(plots, "curves", lambda *_, **__: None)


def stop(config, after):
    """Train so many steps, and be stopped."""
    told = rf"after step {after} of {config.max_steps}.*--resume {config.out}"
    with (
        process.deterministic(config.deterministic),
        Session(config) as session,
        pytest.raises(Stopped, match=told),
        session.display.running(0),
    ):
        session.run(StopAfter(session, after))
    generators.seed(99)  # they are elsewhere meanwhile


def stopped_and_not(small, after, **options):
    """Two runs in the folders `halved` and `whole`; the summaries of both."""
    whole = train(small(out=Path("whole"), **options))
    stop(small(out=Path("halved"), **options), after)
    return train(parse(["--resume", "halved"])), whole


@pytest.mark.parametrize(
    ("after", "options"),
    [
        (1, {}),
        (5, {}),  # an evaluation is due
        (7, {"kernels": "eager"}),
        (5, {"dropout": 0.2, "grad_accumulation": 2, "deterministic": True}),
        (7, {"dtype": "bf16"}),
        (7, {"tokenizer": "bpe", "vocab_size": 270}),
        pytest.param(5, {"compile": True, "deterministic": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_it_gives_the_run_that_was_never_stopped(small, capsys, after, options):
    resumed, whole = stopped_and_not(small, after, max_steps=10, **options)
    assert_same_run(Path("halved"), Path("whole"))
    assert len(losses(Path("whole"))) == 10 and "WARNING" not in capsys.readouterr().out
    for name in ("initial_loss", "final_train_loss", "val_loss", "best_val_loss", "best_step", "steps"):
        assert resumed[name] == whole[name]


def test_a_run_keeps_its_tokenizer(small):
    """The one in its checkpoint: neither the file that it came from nor learning it again is needed."""
    storage.write_json(Path("tokenizer.json"), bpe.train(["is odd, is even. " * 9], 265).to_json())
    train(small(out=Path("r"), max_steps=6, tokenizer="tokenizer.json"))
    Path("tokenizer.json").unlink()
    train(parse(["--resume", "r", "--max-steps", "8"]))
    assert len(losses(Path("r"))) == 8 and checkpoint.load(Path("r/last")).tokenizer.vocab_size == 265
    with pytest.raises(UserError, match=r"leave out --tokenizer \(tokenizer.json there, bpe here\)"):
        train(parse(["--resume", "r", "--tokenizer", "bpe"]))


def test_the_same_ids_of_another_tokenizer_are_another_text(small):
    for name, letters in (("a", "ab"), ("b", "cd")):
        Path(f"{name}.txt").write_text((letters + letters[::-1] + letters) * 40)
        prepare.prepare(Path(f"{name}.txt"), Path(name), workers=1, progress=lambda *_: None)
    assert Path("a/tokens.bin").read_bytes() == Path("b/tokens.bin").read_bytes()
    train(small(out=Path("r"), data="a", max_steps=2))
    with pytest.raises(UserError, match="trained with another tokenizer than that of the prepared text b"):
        train(parse(["--resume", "r", "--data", "b", "--max-steps", "3"]))


@pytest.mark.interpreted
def test_so_it_does_on_triton(small):
    small_steps = {"max_steps": 3, "eval_interval": 2, "eval_tokens": 16, "val_tokens": 16, "sample_tokens": 0}
    stopped_and_not(small, 1, kernels="triton", batch_size=2, dropout=0.1, **small_steps)
    assert_same_run(Path("halved"), Path("whole"))


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"kernels": "triton"}, {"kernels": "torch", "deterministic": True}], ids=str)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_so_it_does_on_a_gpu(small, capsys, options, dtype):
    shape = {"n_embd": 128, "block_size": 128, "dropout": 0.1}
    stopped_and_not(small, 20, device="cuda", dtype=dtype, max_steps=40, **shape, **options)
    assert_same_run(Path("halved"), Path("whole"))
    assert "WARNING" not in capsys.readouterr().out


def test_deterministic_algorithms_change_nothing_on_a_cpu(small):
    for name, wanted in (("a", False), ("b", True)):
        train(small(out=Path(name), deterministic=wanted))
    assert_same_run(Path("a"), Path("b"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dtype", "bf16"], "dtype fp32 before, bf16 now"),
        (["--dtype", "fp16"], "dtype fp32 before, fp16 now"),
        (["--kernels", "attention=eager"], "attention torch before, eager now"),
        (["--max-steps", "15"], "max_steps 10 before, 15 now"),
    ],
)
def test_going_on_elsewhere_works_and_says_that_it_is_not_exact(small, capsys, arguments, said):
    stop(small(out=Path("r"), max_steps=10), 5)
    capsys.readouterr()
    summary = train(parse(["--resume", "r", *arguments]))
    warned = [line for line in capsys.readouterr().out.splitlines() if "WARNING" in line]
    assert warned == [f"WARNING: from here on not bit-exact with the run that was never stopped: {said}"]
    assert len(losses(Path("r"))) == summary["steps"] and summary["final_train_loss"] < summary["initial_loss"]


@pytest.mark.parametrize(
    ("arguments", "speed_from", "steps"),
    [
        ([], 0, 8),  # the first of each part left out
        (["--kernels", "attention=eager"], 5, 4),
    ],
    ids=str,
)
def test_a_speed_is_of_one_backend_and_device(small, capsys, monkeypatch, arguments, speed_from, steps):
    """Of the first part a clock says that it has taken hours."""
    with monkeypatch.context() as patch:
        slow = itertools.count(0.0, 10_000.0)
        patch.setattr(report.time, "perf_counter", lambda: next(slow))
        stop(small(out=Path("r"), max_steps=10), 5)
    summary = train(parse(["--resume", "r", *arguments]))
    progress = checkpoint.load(Path("r/last")).state["progress"]
    assert summary["speed_from_step"] == progress["speed_from"] == speed_from
    assert progress["train_tokens"] == steps * 4 * 16
    assert summary["tokens_per_second"] == round(progress["train_tokens"] / progress["train_seconds"], 1)
    assert (summary["tokens_per_second"] < 1.0) is (speed_from == 0)
    assert ("tokens/s after step 5, 256 tokens in" in capsys.readouterr().out) is (speed_from == 5)
    again = train(parse(["--resume", "r", "--max-steps", "15"]))  # on what it was on last
    assert again["speed_from_step"] == speed_from


def test_sessions_of_one_step_time_nothing(small, capsys):
    """Each of them compiles and warms up: what was told of the run before stays."""
    before = train(small(out=Path("r"), max_steps=10))
    for steps in ("11", "12"):
        again = train(parse(["--resume", "r", "--max-steps", steps]))
        assert again["tokens_per_second"] == before["tokens_per_second"]
    capsys.readouterr()
    other = train(parse(["--resume", "r", "--max-steps", "13", "--kernels", "eager"]))
    assert other["tokens_per_second"] is None and "none of them timed" in capsys.readouterr().out
    assert rows(Path("r"))[-1]["tokens_per_second"] == ""


def test_what_may_change_a_speed(small):
    config, now = small(), {"device": "CPU", "attention": "torch", "max_steps": "12"}
    found = checkpoint.Checkpoint(Path("r"), None, config, None, {"surroundings": now})
    assert not another_speed(found, now) and not another_speed(found, now | {"max_steps": "15"})
    for change in ({"device": "NVIDIA H200"}, {"attention": "eager"}, {"threads": "2"}, {"cuda_graph": "True"}):
        assert another_speed(found, now | change)


def test_a_backend_that_only_evaluates_has_no_speed(small):
    train(small(out=Path("r")))
    Path("r/summary.json").unlink()
    summary = train(parse(["--resume", "r", "--kernels", "eager"]))
    assert summary["tokens_per_second"] is None and summary["mfu_percent"] is None and summary["speed_from_step"] == 12


def test_back_from_fp16_too(small):
    stop(small(out=Path("r"), max_steps=10, dtype="fp16"), 5)
    assert train(parse(["--resume", "r", "--dtype", "fp32"]))["dtype"] == "fp32"


@pytest.mark.gpu
@pytest.mark.parametrize(("there", "here"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_on_another_device_too(small, capsys, there, here):
    stop(small(out=Path("r"), max_steps=10, device=there, dtype="fp32"), 5)
    train(parse(["--resume", "r", "--device", here]))
    assert "not bit-exact" in capsys.readouterr().out and len(losses(Path("r"))) == 10


def test_pytorchs_attention_on_a_gpu_repeats_itself_only_if_told():
    gpu = {"device": "NVIDIA H200", "attention": "torch", "deterministic": "False", "compile": "False"}
    assert "--deterministic" in why_not_exact(gpu, gpu)
    assert why_not_exact(gpu | {"attention": "triton"}, gpu | {"attention": "triton"}) is None
    assert why_not_exact(gpu | {"deterministic": "True"}, gpu | {"deterministic": "True"}) is None
    cpu = gpu | {"device": "CPU (AVX2)", "threads": "2"}
    assert why_not_exact(cpu, cpu) is None
    assert why_not_exact(cpu, cpu | {"device": "NVIDIA H200"}) == "device CPU (AVX2) before, NVIDIA H200 now"
    assert why_not_exact(cpu, cpu | {"triton": "3.7.1"}) == "triton none before, 3.7.1 now"


@pytest.mark.parametrize(
    ("where", "exact"),
    [
        ({"device": "NVIDIA H200"}, False),
        ({"device": "CPU (AVX2)", "threads": "2"}, False),
        ({"device": "CPU (AVX2)", "threads": "1"}, True),
    ],
    ids=str,
)
@pytest.mark.parametrize("attention", ["triton", "eager"])
def test_a_compiled_model_repeats_itself_only_if_told(where, exact, attention):
    now = where | {"attention": attention, "deterministic": "False", "compile": "True"}
    assert why_not_exact(now, now) is None if exact else "torch.compile adds" in why_not_exact(now, now)
    for change in ({"deterministic": "True"}, {"compile": "False"}):
        assert why_not_exact(now | change, now | change) is None


def test_a_captured_step_rounds_otherwise(monkeypatch):
    """Its learning rate is fp32, and not a double."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    ops = resolve("torch", torch.device("cpu"))
    before, now = (
        surroundings(config, ops, torch.device("cuda"), torch.float32, threads=2, processes=1)
        for config in (preset("shakespeare", deterministic=True, cuda_graph=graph) for graph in (False, True))
    )
    assert why_not_exact(before, before) is None and why_not_exact(now, now) is None
    assert why_not_exact(before, now) == "cuda_graph False before, True now"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--n-layer", "2"], r"leave out --n-layer \(1 there, 2 here\)"),
        (
            ["--seed", "7", "--learning-rate", "1"],
            r"--seed \(1337 there, 7 here\), --learning-rate \(0\.01 ",
        ),
        (["--out", "elsewhere"], "leave out --out"),
        (["--max-steps", "3"], "12 steps already"),
        (["--data", "other.txt"], "another text than the file other.txt: name it with --data"),
        (["--data", "missing.txt"], "there is no file 'missing.txt'"),
    ],
)
def test_a_resumed_run_stays_the_same_run(small, arguments, said):
    train(small(out=Path("r"), sample_tokens=0))
    Path("other.txt").write_text("Another text. " * 100)
    before = {path: path.read_bytes() for path in Path("r").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=said):
        train(parse(["--resume", "r", *arguments]))
    assert {path: path.read_bytes() for path in Path("r").rglob("*") if path.is_file()} == before
    assert not Path("elsewhere").exists()


def test_a_text_that_has_changed_is_refused(small, text):
    stop(small(out=Path("r")), 5)
    text.write_text(text.read_text().replace("7 is odd", "7 is not", 1))
    with pytest.raises(UserError, match=r"text.txt has changed since r/last was written \(SHA-256 \w{12} then, \w{12}"):
        train(parse(["--resume", "r"]))


def test_a_finished_run_has_nothing_to_do_and_may_be_extended(small, capsys):
    first = train(small(out=Path("r")))
    before = {path: path.stat().st_mtime_ns for path in Path("r").rglob("*") if path.is_file()}
    capsys.readouterr()
    again = train(parse(["--resume", "r"]))
    assert again == first and "nothing to do: all 12 steps of r are done" in capsys.readouterr().out
    before.pop(Path("r/metrics.csv"))
    assert all(path.stat().st_mtime_ns == time for path, time in before.items()) and len(losses(Path("r"))) == 12
    more = train(parse(["--resume", "r", "--max-steps", "20", "--kernels", "eager"]))
    assert more["steps"] == 20 and more["kernels"]["loss"] == "eager" and len(losses(Path("r"))) == 20


@pytest.mark.parametrize("summary", [None, "{", '{"steps": 3}'])
def test_a_run_that_was_killed_before_its_summary_is_finished(small, summary):
    first = train(small(out=Path("r")))
    Path("r/summary.json").unlink()
    if summary:
        Path("r/summary.json").write_text(summary)
    assert train(parse(["--resume", "r"]))["val_loss"] == first["val_loss"]
    assert json.loads(Path("r/summary.json").read_text())["steps"] == 12


def test_a_damaged_checkpoint_costs_steps_but_not_the_result(small, capsys):
    train(small(out=Path("whole")))
    stop(small(out=Path("r")), 8)
    weights = Path("r/last/model.safetensors")
    data = bytearray(weights.read_bytes())
    data[-7] ^= 4
    weights.write_bytes(data)
    train(parse(["--resume", "r"]))
    said = capsys.readouterr().out
    assert "WARNING: r/last/model.safetensors is damaged" in said and "r/last.1" in said and "from step 5" in said
    assert_same_run(Path("r"), Path("whole"))


@pytest.mark.parametrize("keep", [None, slice(0), slice(1), slice(4, None)], ids=["gone", "empty", "header", "end"])
def test_metrics_that_are_lost_are_told(small, capsys, keep):
    """A file that is gone, is empty, has its header alone, lacks its beginning. What is there stays, next time too."""
    stop(small(out=Path("r")), 5)
    metrics = Path("r/metrics.csv")
    lines = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(b"".join(lines[keep])) if keep else metrics.unlink()
    left, missing = ([4, 5], "1 to 3") if keep and keep.start else ([], "1 to 5")
    for steps in (12, 14):
        capsys.readouterr()
        train(parse(["--resume", "r", "--max-steps", str(steps)]))
        told = (
            f"WARNING: r/metrics.csv lacks steps {missing} of the {5 if steps == 12 else 12} so far. Going on without"
        )
        assert told in capsys.readouterr().out
        assert [int(row["step"]) for row in rows(Path("r"))] == [*left, *range(6, steps + 1)]


def test_metrics_that_cannot_be_read_are_set_aside(small, capsys):
    stop(small(out=Path("r")), 5)
    metrics = Path("r/metrics.csv")
    metrics.write_bytes(there := metrics.read_bytes().replace(b",", b";"))  # as some spreadsheets save it
    train(parse(["--resume", "r"]))
    assert "of the 5 so far; what was there is r/metrics.csv.damaged. Going" in capsys.readouterr().out
    assert Path("r/metrics.csv.damaged").read_bytes() == there and len(losses(Path("r"))) == 7


def test_lines_of_somebody_elses_are_set_aside_and_told(small, capsys):
    stop(small(out=Path("r")), 5)
    with Path("r/metrics.csv").open("a") as file:
        file.write("notes by hand: the rate is too high here\n")
    train(parse(["--resume", "r"]))
    assert (
        "had lines that are no rows of it, which it no longer has; r/metrics.csv.damaged is" in capsys.readouterr().out
    )
    assert "notes by hand" in Path("r/metrics.csv.damaged").read_text() and len(losses(Path("r"))) == 12


def test_a_kill_while_a_row_was_written_is_no_damage(small, capsys):
    stop(small(out=Path("r")), 5)
    with Path("r/metrics.csv").open("a") as file:
        file.write("6,2.1")
    train(parse(["--resume", "r"]))
    assert "metrics.csv" not in capsys.readouterr().out and not Path("r/metrics.csv.damaged").exists()


def test_how_many_checkpoints_stay(small):
    train(small(out=Path("r"), max_steps=8, eval_interval=2, keep=2))
    steps = [checkpoint.load(Path("r") / name).state["progress"]["step"] for name in ("last", "last.1", "last.2")]
    assert steps == [8, 6, 4] and not Path("r/last.3").exists()
    train(parse(["--resume", "r", "--keep", "0", "--max-steps", "9"]))
    assert [path.name for path in Path("r").glob("last*")] == ["last"]


def test_a_newer_format_is_refused(small, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(storage, "FORMAT", 99)
        stop(small(out=Path("r")), 5)
    with pytest.raises(UserError, match=r"newer minigpt \(format 99.*update minigpt"):
        parse(["--resume", "r"])
    with pytest.raises(UserError, match=r"newer minigpt \(format 99.*update minigpt"):
        train(small(resume=Path("r")))


def test_two_trainings_in_one_folder(small):
    with Session(small(out=Path("r"))), pytest.raises(UserError, match="another training is at work in r"):
        train(parse(["--resume", "r"]))
    assert train(parse(["--resume", "r"]))["steps"] == 12  # from step 0, which nothing had followed


def test_the_generators_of_python_and_numpy_go_on_too(small, monkeypatch):
    import random

    import numpy as np

    drawn, step = [], torch.optim.AdamW.step

    def draw(self, *arguments):
        drawn.append((random.random(), np.random.rand()))
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", draw)
    stopped_and_not(small, 4, max_steps=8)
    assert drawn[8:] == drawn[:8] and len(set(drawn)) == 8


def test_a_checkpoint_that_is_missing_is_told(small, capsys):
    train(small(out=Path("r"), max_steps=10))
    shutil.rmtree("r/last")
    train(parse(["--resume", "r"]))
    assert "WARNING: r/last is missing. Going on from the checkpoint before it, r/last.1" in capsys.readouterr().out


def test_where_all_are_damaged_all_are_named(small):
    train(small(out=Path("r"), max_steps=10))
    for name in ("last", "last.1"):
        (Path("r") / name / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"r/last/config\.json.*and so are those before it: r/last\.1/config\.json"):
        parse(["--resume", "r"])


def test_a_checkpoint_in_place_of_a_run_is_told(small):
    train(small(out=Path("r"), max_steps=1))
    with pytest.raises(UserError, match=r"r/last is a checkpoint, and --resume takes the folder of the run: r$"):
        parse(["--resume", "r/last"])


def test_settings_without_effect_on_a_finished_run_are_told(small, capsys):
    train(small(out=Path("r"), max_steps=1))
    train(parse(["--resume", "r", "--prompt", "1", "--sample-tokens", "5"]))
    said = capsys.readouterr().out
    assert "nothing to do" in said and "--sample-tokens, --prompt would change nothing without more steps" in said
