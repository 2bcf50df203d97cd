"""The showcase: its stations with every backend, and that a station which fails is noticed."""

import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from minigpt import backends, checkpoint, corpora, showcase
from minigpt.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The models are so small that a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_step(monkeypatch):
    """Too short a training to learn anything."""
    monkeypatch.setattr(showcase, "STEPS", 1)


def run(kernels: str, out, device=CPU) -> str:
    """Everything that the showcase prints, whether it passes or raises."""
    screen = Console(file=io.StringIO(), width=200)
    try:
        showcase.run(backends.resolve(kernels, device), device, out, console=screen)
    finally:
        run.printed = screen.file.getvalue()
    return run.printed


@pytest.mark.parametrize("kernels", ["eager", "torch"])
def test_all_stations_pass_and_print_what_they_measured(kernels, tmp_path):
    printed = run(kernels, tmp_path)
    for fact in (
        f"attention={kernels}",
        "parameters: 145,764",
        "output: (2, 10, 100)",
        "vocabulary: 16",
        "' not to be that is the question'",
        "all 4 stations passed",
    ):
        assert fact in printed
    assert "FAILED" not in printed
    stored = checkpoint.load(tmp_path / "model")
    model, tokenizer = stored.model(backends.resolve("eager", CPU), CPU), stored.tokenizer
    assert model.config.vocab_size == tokenizer.vocab_size == 16


def test_the_transformer_station_on_triton(device):
    checks = showcase.transformer(backends.resolve("triton", device), device, 0)
    assert [check for check in checks if not check.passed] == []


@pytest.mark.slow
def test_all_stations_pass_on_triton(device, tmp_path):
    assert "all 4 stations passed" in run("triton", tmp_path, device)


def test_the_same_seed_gives_the_same_first_loss_with_every_backend(tmp_path, one_step):
    first = {name: showcase.training(backends.resolve(name, CPU), CPU, tmp_path, 3) for name in ("eager", "torch")}
    losses = {check.measured for checks in first.values() for check in checks if check.what == "first loss"}
    assert len(losses) == 1


def test_too_little_training_fails_the_station_and_the_showcase(tmp_path, one_step):
    with pytest.raises(UserError, match="2 of 4 stations failed: training, generation"):
        run("torch", tmp_path)
    assert "FAILED loss after 1 steps" in run.printed


def test_a_wrong_model_fails_the_station(monkeypatch):
    right = showcase.preset
    monkeypatch.setattr(showcase, "preset", lambda name: right(name, head_bias=False))
    failed = [check for check in showcase.transformer(backends.resolve("torch", CPU), CPU, 0) if not check.passed]
    assert [(check.what, check.measured) for check in failed] == [("parameters", "145,664")]


def test_attention_that_looks_ahead_fails_the_station():
    ops = backends.resolve("torch", CPU)

    looks_ahead = replace(ops, attention=lambda qkv, **_: ops.attention(qkv))
    failed = {check.what for check in showcase.transformer(looks_ahead, CPU, 0) if not check.passed}
    assert failed == {"tokens 6 to 9 changed: before them", "against plain arithmetic"}


def test_a_corpus_that_cannot_be_had_fails_its_station_alone(tmp_path, monkeypatch):
    def missing(name):
        raise UserError("no such corpus here")

    monkeypatch.setattr(corpora, "load", missing)
    with pytest.raises(UserError, match="1 of 4 stations failed: tokenizer"):
        run("torch", tmp_path)
    assert "no such corpus here" in run.printed


def test_an_out_folder_that_cannot_be_used(tmp_path, one_step):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="training, generation"):
        run("torch", tmp_path / "file")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "precious.txt").write_text("not ours")
    with pytest.raises(UserError, match="training, generation"):
        run("torch", tmp_path)
    assert "name another folder with --out" in run.printed
    assert (tmp_path / "model" / "precious.txt").read_text() == "not ours"
