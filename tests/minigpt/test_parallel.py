"""Several processes that train together: the losses of one alone, one format of checkpoints, errors told once."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
from training_runs import assert_same_run, losses, rows

from minigpt import checkpoint, storage
from minigpt.config import preset
from minigpt.errors import UserError
from minigpt.parallel import ALONE, World, check

ROOT = Path(__file__).resolve().parents[2]
RUNS = Path(__file__).with_name("parallel_runs.py")

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

TOGETHER = {  # run -> the same one in one process
    "ddp_accumulating": "one_accumulating",
    "fsdp_accumulating": "one_accumulating",
    "ddp_passes": "one_passes",
}
INTERPRETED = {"ddp_triton": "one_triton", "fsdp_triton": "one_triton"}
LONG = {
    "ddp": "one",
    "fsdp": "one",
    "fsdp_untied": "one_untied",
    "ddp_checkpointing": "one",
    "fsdp_checkpointing": "one",
    "ddp_compiled": "one",
    "fsdp_compiled": "one",
}
HALF = {"ddp_bf16": "one_bf16", "fsdp_bf16": "one_bf16"}
INTERPRETED_HALF = {"fsdp_bf16_triton": "one_bf16_triton"}
STOPPED = ("fsdp_dropout", "fsdp_dropout_stopped", "fsdp_dropout_stopped@2")
OTHER_SIZES = ("one_stopped", "one_stopped@2+parallel=fsdp", "fsdp_stopped", "fsdp_stopped@1+parallel=none")
FAULTS = ("fsdp_not_finite", "no_text", "full")


def run(folder, *names):
    """What tests/minigpt/parallel_runs.py says of these cases, by name."""
    text = folder / "text.txt"
    text.write_text("".join(f"{number} is {'odd' if number % 2 else 'even'}.\n" for number in range(300)))
    # on a machine with a GPU too, kernels run on the CPU, and nothing of CUDA is there to be forked
    done = forked.run(str(RUNS), str(text), *names, interpret="1", cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """The folder of the runs that the default tests look at, and what was said of each."""
    folder = tmp_path_factory.mktemp("parallel")
    names = dict.fromkeys([*TOGETHER, *TOGETHER.values(), *STOPPED, *OTHER_SIZES, "one", *FAULTS])
    said, errors = run(folder, *names)
    return folder, said, errors


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """The folder of the short runs with kernels in Triton's interpreter, and what was said of each."""
    folder = tmp_path_factory.mktemp("interpreted")
    return folder, run(folder, *dict.fromkeys([*INTERPRETED, *INTERPRETED.values()]))[0]


def assert_same_losses(folder, together, alone, within=1e-5):
    ours, theirs = rows(folder / together), rows(folder / alone)
    assert len(ours) == len(theirs) > 1
    for here, there in zip(ours, theirs, strict=True):
        for name in ("train_loss", "grad_norm", "val_loss"):
            assert (here[name] == "") == (there[name] == "")
            assert float(here[name] or 0) == pytest.approx(float(there[name] or 0), abs=within, rel=0)
    finals = [json.loads((folder / name / "summary.json").read_text()) for name in (together, alone)]
    assert finals[0]["val_loss"] == pytest.approx(finals[1]["val_loss"], abs=within)
    assert finals[0]["val_tokens"] == finals[1]["val_tokens"] and finals[0]["parameters"] == finals[1]["parameters"]


@pytest.mark.parametrize(("together", "alone"), TOGETHER.items())
def test_the_same_global_batch_gives_the_losses_of_one_process(short, together, alone):
    folder, said, _ = short
    assert said[together]["statuses"] == [0, 0]
    assert_same_losses(folder, together, alone)


@pytest.mark.slow
@pytest.mark.interpreter
@pytest.mark.parametrize(("together", "alone"), INTERPRETED.items())
def test_so_it_does_with_our_kernels(interpreted, together, alone):
    folder, said = interpreted
    assert said[together]["statuses"] == [0, 0]
    assert_same_losses(folder, together, alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("exact", "half"), [(LONG, HALF), pytest.param({}, INTERPRETED_HALF, marks=pytest.mark.interpreter)],
    ids=["torch", "triton"],
)  # fmt: skip
def test_so_it_does_with_other_models_precisions_checkpointing_and_compiled(exact, half, tmp_path):
    cases = exact | half
    said, _ = run(tmp_path, *dict.fromkeys([*cases, *cases.values()]))
    for together, alone in cases.items():
        assert said[together]["statuses"] == [0, 0]
        assert_same_losses(tmp_path, together, alone, within=1e-2 if together in half else 1e-5)


def test_a_run_that_goes_on_in_as_many_processes_is_the_same_to_the_last_bit(short):
    folder, said, _ = short
    assert all(said[name]["statuses"] == [0, 0] for name in STOPPED)
    assert_same_run(folder / "fsdp_dropout", folder / "fsdp_dropout_stopped")
    assert "WARNING" not in said["fsdp_dropout_stopped@2"]["said"][0]
    stored = json.loads((folder / "fsdp_dropout" / "last" / "generators.json").read_text())
    assert len(stored["others"]) == 1 and stored["others"][0]["torch"] != stored["torch"]  # other masks in each


@pytest.mark.parametrize("resumed", [name for name in OTHER_SIZES if "@" in name])
def test_it_goes_on_in_another_number_of_processes_and_says_so(short, resumed):
    folder, said, _ = short
    assert set(said[resumed]["statuses"]) == {0}
    assert_same_losses(folder, resumed.partition("@")[0], "one")
    (warning,) = [line for line in said[resumed]["said"][0].splitlines() if "WARNING" in line]
    assert "not bit-exact" in warning and "processes" in warning and "parallel" in warning


def test_a_checkpoint_does_not_show_how_many_wrote_it(short):
    folder, _, _ = short
    for name in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (
            storage.read_tensors(folder / run / "last" / name) for run in ("fsdp_accumulating", "one_accumulating")
        )
        assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
        for key, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[key], rtol=1e-3, atol=1e-5)
    assert checkpoint.load(folder / "fsdp_accumulating" / "last", to_resume=True).state["progress"]["step"] == 6


def test_the_first_process_alone_prints_and_writes(short):
    folder, said, errors = short
    for name, found in said.items():
        assert all(output == "" for output in found["said"][1:]), name
    first = said["fsdp_accumulating"]["said"][0]
    assert "one of 2 processes (fsdp)" in first and first.count("validation:") == 1
    summary = json.loads((folder / "fsdp_accumulating" / "summary.json").read_text())
    assert (summary["parallel"], summary["processes"]) == ("fsdp", 2)
    assert (folder / "fsdp_accumulating" / "samples.txt").read_text().strip()
    with (folder / "fsdp_accumulating" / "metrics.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == list("123456")
    assert "Traceback" not in errors


def test_a_loss_that_is_not_finite_in_one_process_skips_the_step_in_all(short):
    folder, said, _ = short
    assert said["fsdp_not_finite"]["statuses"] == [0, 0]
    found = losses(folder / "fsdp_not_finite")
    assert [value != value for value in found] == [False, True, False, False, False, False]
    # The second step changed nothing, so that the third sees the weights of the first.
    assert found[2] == pytest.approx(found[0], abs=0.1) and found[5] < found[0]


@pytest.mark.parametrize(("name", "words"), [("no_text", "there is no file"), ("full", "the disk is full")])
def test_what_is_wrong_is_told_by_the_first_process_alone(short, name, words):
    folder, said, _ = short
    assert said[name]["statuses"] == [1, 1]
    told, silent = said[name]["errors"]
    assert words in told[1] and not told[2] and silent[2]
    if name == "full":
        checkpoint.load(folder / "full" / "last")  # the one before it is whole
    else:
        assert not (folder / name).exists()


def test_the_windows_of_a_step_are_shared_out():
    def share(size, **options):
        return World("ddp", 0, size).share(preset("shakespeare-cpu", **options))

    assert ALONE.share(preset("shakespeare-cpu", batch_size=7, grad_accumulation=3)) == (7, 3)
    assert share(4, batch_size=7, grad_accumulation=8) == (7, 2)
    assert share(4, batch_size=12, grad_accumulation=3) == (3, 3)
    with pytest.raises(UserError, match="4 processes divide neither --grad-accumulation 6 nor --batch-size 6"):
        share(4, batch_size=6, grad_accumulation=6)


def test_the_command_that_goes_on():
    assert ALONE.command(Path("runs/a b")) == "python train.py --resume 'runs/a b'"
    together = World("fsdp", 0, 2).command(Path("runs/a"))
    assert together == "torchrun --nproc-per-node 2 train.py --resume runs/a --parallel fsdp"


STARTED = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("environment", "options", "said"),
    [
        ({}, {"parallel": "ddp"}, "needs torchrun to start the processes: torchrun --nproc-per-node N train.py"),
        (STARTED, {}, "torchrun has started 2 processes: add --parallel ddp"),
        (STARTED, {"parallel": "ddp", "device": "cuda:1"}, "each process has its own"),
        (STARTED, {"parallel": "fsdp", "dtype": "fp16"}, "take --dtype bf16"),
        (STARTED, {"parallel": "ddp", "cuda_graph": True}, "--cuda-graph is for one process"),
    ],
    ids=str,
)
def test_what_cannot_run_together_is_told(monkeypatch, environment, options, said):
    for name in (*STARTED, "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        check(preset("shakespeare-cpu", **options))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_torchrun_starts_it_and_an_error_is_one_line(small, text, processes):
    options = ["--batch-size=4", "--n-layer=1", "--n-embd=16", "--max-steps=4", "--device=cpu", "--out=run"]
    module = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    command = [*module, str(ROOT / "train.py"), "--parallel=fsdp", f"--data={text}", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=text.parent, env=environment, capture_output=True, text=True)
    if processes == 2:
        assert done.returncode == 0, done.stderr
        assert len(losses(text.parent / "run")) == 4 and done.stdout.count("validation:") == 1
    else:
        assert done.returncode == 1 and done.stderr.count("error: 3 processes divide neither") == 1
