"""The formulas of memory and communication per GPU against what PyTorch does: the estimator, fsdp on fake tensors,
two real processes."""

import argparse
import json
import os
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import forked
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels.device import HAS_TRITON
from minigpt import backends, parallel
from minigpt.config import PRESETS, preset
from minigpt.errors import door
from minigpt.model import GPT
from minigpt.utilization import flops_per_token
from profiling import __main__, estimate, scaling, scaling_command, scaling_memory

ROOT = Path(__file__).resolve().parents[2]
DOC = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


def _step(kind="none", gpus=1, weak=True, name="tiny", **changes):
    return scaling.step_of(preset(name, **({"kernels": "torch", "dtype": "bf16"} | changes)), kind, gpus, weak=weak)


def _peak(step) -> int:
    return sum(scaling_memory.peak(step)[1].values())


# ---------------------------------------------------------------- parameters


@pytest.mark.parametrize(
    ("name", "changes"),
    [(name, {}) for name in PRESETS] + [("tiny", {"bias": False, "position": "sinusoidal", "head_bias": False})],
)
def test_parameters_are_the_models_own_group_by_group(name, changes):
    """The groups are those that minigpt.parallel cuts up one after the other, and the rest."""
    config = preset(name, **changes)
    shape = config.model_config(estimate.vocabulary(config))
    with FakeTensorMode():
        model = GPT(shape, backends.resolve("torch", torch.device("cpu")))
    parts = parallel._parts(model)
    groups = [[tuple(p.shape) for p in part.parameters()] for part in parts]
    inside = {id(p) for part in parts for p in part.parameters()}
    root = [tuple(p.shape) for p in model.parameters() if id(p) not in inside]
    assert groups == [scaling.attention_shapes(shape), scaling.mlp_shapes(shape)] * shape.n_layer
    assert sorted(root) == sorted(scaling.root_shapes(shape))
    assert scaling.count(scaling.all_shapes(shape)) == model.parameter_count()


@pytest.mark.parametrize("gpus", [1, 3, 8, 13, 1024])
def test_a_parameter_is_cut_as_torch_chunk_cuts(gpus):
    shapes = [(5, 3), (12,), (768, 7), (2304, 2), (1,)]
    first = [torch.empty(shape).chunk(gpus)[0] for shape in shapes]
    assert scaling.count(shapes, gpus) == sum(part.numel() for part in first)
    assert scaling.whole(shapes, gpus) >= scaling.count(shapes)


# ---------------------------------------------------------------- memory of one GPU, against the estimator


def _assert_estimated(config, within):
    found = estimate.estimate(config, passes=config.grad_accumulation)
    step = scaling.step_of(config, "none", 1, weak=True)
    assert _peak(step) == pytest.approx(found.peak, rel=within)
    ours, theirs = scaling_memory.memory(step)["AdamW"], [p for p in found.timeline if p.phase == "clipping"][-1].bytes
    for category in ("parameters", "gradients", "optimizer state"):
        assert ours[category] == theirs[category]
    assert ours["batch"] == pytest.approx(theirs["batch and buffers"], abs=1024)


SMALL = [
    {"name": "tiny"},
    {"name": "tiny", "grad_accumulation": 2, "checkpoint_activations": True},
    {"name": "tiny", "dtype": "fp32", "position": "sinusoidal"},
    {"name": "tiny", "n_layer": 1, "checkpoint_activations": True, "batch_size": 8},
    {"name": "tiny", "vocab_size": 8192, "batch_size": 1, "window": 8, "grad_accumulation": 2},
    {"name": "shakespeare", "n_layer": 2},
    {"name": "shakespeare", "n_layer": 3, "dtype": "fp32", "checkpoint_activations": True},
    {"name": "gpt2", "n_layer": 2, "grad_accumulation": 1},
    {"name": "gpt2", "n_layer": 3, "grad_accumulation": 2, "checkpoint_activations": True},
]


@pytest.mark.parametrize("kernels", ["torch", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("changes", SMALL, ids=str)
def test_one_gpu_holds_what_the_estimator_counts(kernels, changes):
    _assert_estimated(preset(**({"kernels": kernels, "dtype": "bf16"} | changes)), within=0.02)


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", PRESETS)
def test_so_it_does_with_the_whole_presets(name, checkpointing, kernels):
    options = {"kernels": kernels, "dtype": "bf16", "checkpoint_activations": checkpointing, "grad_accumulation": 2}
    _assert_estimated(preset(name, **options), within=0.02)


def test_ddp_has_all_gradients_from_the_beginning_as_who_accumulates():
    """Its buckets: that they stay is seen in two real processes, below."""
    one = _step("ddp", 8)
    assert scaling_memory.memory(one) == scaling_memory.memory(_step(grad_accumulation=2))
    assert scaling_memory.memory(one)["loss, forward"]["gradients"] > 0


# ---------------------------------------------------------------- fsdp and ddp, as they run


def _runs(*cases) -> list[dict]:
    """What tests/profiling/scaling_runs.py says of these cases."""
    program = str(Path(__file__).with_name("scaling_runs.py"))
    done = forked.run(program, *map(json.dumps, cases), interpret="1", timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


SHAPE = {"n_layer": 4, "n_embd": 256, "window": 64, "vocab_size": 128, "kernels": "torch", "dtype": "bf16"}
FAKE = [
    {"grad_accumulation": 2, "gpus": 8},
    {"window": 8, "batch_size": 1, "tied_head": True, "head_bias": False, "gpus": 5},
]
FAKE_TOO = [
    {"gpus": 2},
    {"kernels": "triton", "gpus": 8},
    {"kernels": "triton", "gpus": 8, "batch_size": 16, "checkpoint_activations": True},
    {"checkpoint_activations": True, "gpus": 8},
    {"checkpoint_activations": True, "dropout": 0.1, "gpus": 8, "batch_size": 16},
    {"dtype": "fp32", "window": 16, "gpus": 64},
    {"batch_size": 16, "gpus": 1000},
    {"vocab_size": 8192, "batch_size": 1, "window": 16, "tied_head": True, "gpus": 8},
]
PRESETS_CUT = [
    {"name": name, "kernels": kernels, "dtype": "bf16", "gpus": 8, "grad_accumulation": 2, "n_layer": n_layer} | more
    for name, n_layer in (("gpt2", 12), ("gpt2-xl", 6))
    for kernels, more in (("torch", {}), ("triton", {"checkpoint_activations": True}))
]
GLOO = [
    {"parallel": "ddp", "grad_accumulation": 4, "batch_size": 3},
    {"parallel": "fsdp", "grad_accumulation": 4, "batch_size": 3},
]
GLOO_TOO = [
    {"parallel": "ddp"},
    {"parallel": "fsdp"},
    {"parallel": "fsdp", "checkpoint_activations": True},
    {"parallel": "fsdp", "dtype": "fp32", "tied_head": True, "head_bias": False, "bias": False, "n_embd": 36},
]


@pytest.fixture(scope="module")
def default_runs():
    """What was said of each of the cheap cases, fake and real."""
    fakes = [{"run": "fake"} | SHAPE | case for case in FAKE]
    return _runs(*({"run": "gloo", "processes": 2} | SHAPE | {"n_embd": 64} | case for case in GLOO), *fakes)


def _assert_one_rank_of_many(case, found):
    settings = {key: value for key, value in case.items() if key != "gpus"}
    step = _step("fsdp", case["gpus"], **settings)
    ours = scaling_memory.memory(step)["AdamW"]
    assert ours["parameters"] == found["parameters"] and ours["optimizer state"] == found["optimizer state"]
    # those of a group share a storage, which is rounded up once
    assert ours["gradients"] == pytest.approx(found["gradients"], abs=512 * len(scaling.all_shapes(step.model)))
    assert _peak(step) == pytest.approx(found["peak"], rel=0.03)
    assert _large(found) == _by_kind_and_size(step)


def _large(found) -> dict[str, int]:
    """Collectives by kind and size, without those of a number or two."""
    return {name: times for name, times in found["collectives"].items() if int(name.split()[-1]) > 64}


def _by_kind_and_size(step) -> dict[str, int]:
    made = {}
    for one in scaling.collectives(step):
        made[f"{one.kind} {one.size}"] = made.get(f"{one.kind} {one.size}", 0) + one.times
    return made


def _assert_two_processes(case, found):
    settings = SHAPE | {"n_embd": 64} | case
    step = _step(case["parallel"], 2, weak=False, **settings)
    assert _large(found) == _by_kind_and_size(step)
    ours = 4 * scaling.count(scaling.all_shapes(step.model), 2 if case["parallel"] == "fsdp" else 1)
    assert found["gradients"] == ours
    assert set(found["gradients stay"]) == {case["parallel"] == "ddp"}  # ddp keeps its buckets


@needs_fork
@pytest.mark.parametrize("index", range(len(FAKE)))
def test_one_rank_of_many_holds_and_sends_what_fully_shard_does_on_fake_tensors(default_runs, index):
    _assert_one_rank_of_many(SHAPE | FAKE[index], default_runs[len(GLOO) + index])


@needs_fork
@pytest.mark.parametrize("index", range(len(GLOO)))
def test_two_real_processes_send_what_the_formula_says(default_runs, index):
    _assert_two_processes(GLOO[index], default_runs[index])


@pytest.mark.slow
@needs_fork
@needs_triton
def test_so_it_is_in_more_cases():
    fakes = [{"run": "fake"} | SHAPE | case for case in FAKE_TOO]
    reals = [{"run": "gloo", "processes": 2} | SHAPE | {"n_embd": 64} | case for case in GLOO_TOO]
    found = _runs(*reals, *fakes)
    for case, one in zip(GLOO_TOO, found, strict=False):
        _assert_two_processes(case, one)
    for case, one in zip(FAKE_TOO, found[len(GLOO_TOO) :], strict=True):
        _assert_one_rank_of_many(SHAPE | case, one)


@pytest.mark.slow
@needs_triton
def test_so_it_is_with_the_presets_own_sizes():
    for case, one in zip(PRESETS_CUT, _runs(*({"run": "fake"} | case for case in PRESETS_CUT)), strict=True):
        _assert_one_rank_of_many(case, one)


def _ring(kind: str, gpus: int, size: int) -> list[int]:
    """What each GPU sends in a ring, played step by step: chunk c goes on from GPU to GPU, W - 1 times a round."""
    sent = [0] * gpus
    for _ in range(2 if kind == "all-reduce" else 1):
        for step in range(gpus - 1):
            for rank in range(gpus):
                chunk = (rank - step) % gpus
                sent[rank] += len(range(chunk, size, gpus))
    return sent


@pytest.mark.parametrize("kind", ["all-reduce", "all-gather", "reduce-scatter"])
@pytest.mark.parametrize("gpus", [2, 3, 8])
def test_a_ring_sends_that_much(kind, gpus):
    size = 24 * 7
    assert set(_ring(kind, gpus, size)) == {round(scaling.Collective(kind, "x", size, 1).sent(gpus))}


def test_a_pass_of_fsdp_in_bf16_sends_what_a_step_of_ddp_does():
    """8 bytes a parameter of either, but for what rounding adds: half of them twice, and gradients in fp32."""
    steps = [_step(kind, 8, name="gpt2", grad_accumulation=1) for kind in ("ddp", "fsdp")]
    assert scaling.sent(steps[1]) == pytest.approx(scaling.sent(steps[0]), rel=0.001)
    assert scaling.sent(replace(steps[0], passes=5)) == scaling.sent(steps[0])
    assert scaling.sent(replace(steps[1], passes=5)) == 5 * scaling.sent(steps[1])


def test_operations_are_those_of_the_mfu():
    step = _step(name="shakespeare", grad_accumulation=3)
    with FakeTensorMode():
        model = GPT(step.model, backends.resolve("torch", torch.device("cpu")))
    assert scaling.operations(step) == 3 * step.rows * flops_per_token(model, step.tokens)
    head = 6 * step.model.vocab_size * step.model.n_embd * 3 * step.rows
    again = replace(step, checkpointing=True)
    assert 3 * (scaling.operations(again) - head) == pytest.approx(4 * (scaling.operations(step) - head))


# ---------------------------------------------------------------- what fits, and what divides


def test_as_few_gpus_as_fit():
    step = _step("fsdp", 2, name="gpt2-xl", kernels="triton")
    for limit in (11e9, 15e9, 40e9):
        found = scaling_memory.fewest_gpus(step, limit, scaling_command.COUNTS)
        assert _peak(_step("fsdp", found, name="gpt2-xl", kernels="triton")) <= limit
        assert found == 1 or _peak(_step("fsdp", found // 2, name="gpt2-xl", kernels="triton")) > limit
    assert scaling_memory.fewest_gpus(step, 1e9, scaling_command.COUNTS) is None


@pytest.mark.parametrize(("gpus", "cell"), [(1, "16 x 32"), (8, "16 x 4"), (32, "16 x 1"), (64, "do not divide")])
def test_windows_are_shared_as_training_shares_them(gpus, cell, run):
    status, out, _ = run("--preset", "gpt2", "--gpus", str(gpus), "--kernels", "torch")
    line = next(line for line in out.splitlines() if line.startswith("| gpt2 | 16 x 32 |"))
    assert status == 0 and line.endswith(f"| {cell} |")


# ---------------------------------------------------------------- the command and its page


@pytest.fixture
def run(monkeypatch, capsys):
    """The command as a whole program, in this process: (exit status, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["profiling", "scaling", *arguments])
        with pytest.raises(SystemExit) as left:
            door(__main__.main)
        return left.value.code or 0, *capsys.readouterr()

    return run


def test_the_command_writes_what_it_is_asked_for(tmp_path, run):
    asked = ("--preset", "tiny", "--gpus", "4", "1", "--kernels", "torch", "--dtype", "fp32", "--batch-size", "6")
    status, out, err = run(*asked, "--json", str(tmp_path / "a.json"), "--png", str(tmp_path / "a.svg"))
    assert status == 0, err
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [row["parallel"] for row in rows] == ["ddp", "fsdp"]
    weak = {one["gpus"]: one for one in rows[1]["by_gpus"] if one["scaling"] == "weak"}
    step = _step("fsdp", 4, dtype="fp32", batch_size=6)
    assert weak[4]["peak"] == _peak(step) and weak[4]["sent"] == scaling.sent(step) and weak[1]["sent"] == 0
    assert f"| {_peak(step) / 1e9:.2f} |" in out and "<svg" in (tmp_path / "a.svg").read_text()
    strong = [one for one in rows[1]["by_gpus"] if one["scaling"] == "strong"]
    assert [one["divides"] for one in strong] == [True, False]


def test_the_page_has_what_its_commands_make(run):
    """docs/scaling.md: each block between comments is what the command in the comment prints."""
    blocks = re.findall(r"<!-- python -m profiling scaling(.*?) -->\n(.*?)\n<!-- /scaling -->", DOC, re.DOTALL)
    assert len(blocks) >= 2
    for command, shown in blocks:
        status, out, err = run(*shlex.split(command))
        assert status == 0, err
        assert shown == out.strip(), f"make docs/scaling.md anew with python -m profiling scaling{command}"


def test_every_symbol_of_the_page_is_a_number_of_the_code():
    """The activations of a block as the page writes them, for gpt2's numbers."""
    formula = re.search(r"`A_block = (.*?)`", DOC)[1]
    step = _step(name="gpt2")
    numbers = {"n": step.rows, "C": step.model.n_embd, "H": step.model.n_head, "s": step.width}
    text = re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", formula)
    assert eval(text, {"__builtins__": {}}, numbers) == scaling_memory.kept_by_block(step)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--preset", "gpt3"), "gpt2-medium"),
        (("--gpus", "0"), "at least 1"),
        (("--gpus", "many"), "--gpus"),
        (("--kernels", "eager"), "triton"),
        (("--batch-size", "0"), "batch_size"),
        (("--bandwidth", "0"), "above 0"),
        (("--tflops", "nan"), "above 0"),
        (("--png", "no/such/folder/a.png"), "no such folder"),
        (("--png", "a.txt"), "must end in"),
        (("--preset", "tiny", "--json", "/dev/full"), "disk is full"),
    ],
)
def test_bad_input_is_told_in_one_line(arguments, says, run):
    status, _, complaint = run(*arguments)
    assert status == 1 and complaint.count("\n") == 1 and complaint.startswith("error: ") and says in complaint


def test_backends_without_a_formula_are_told():
    from minigpt.errors import UserError

    with pytest.raises(UserError, match="torch and triton"):
        _step(kernels="eager")


def test_a_picture_shows_every_preset(tmp_path):
    from profiling import scaling_tables

    asked = __main__.parser().parse_args(["scaling", "--preset", "tiny", "shakespeare", "--gpus", "1"])
    assert isinstance(asked, argparse.Namespace)
    scaling_tables.draw(scaling_command.find_rows(asked), tmp_path / "a.svg")
    assert (tmp_path / "a.svg").stat().st_size > 1000
