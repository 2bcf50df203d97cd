"""The models of a folder of runs: which there are, and which are kept."""

import os
import shutil

import pytest
import torch
from playing_runs import write_run

from minigpt import checkpoint
from minigpt.errors import UserError
from minigpt.models import Models

CPU = torch.device("cpu")


@pytest.fixture
def root(tmp_path):
    write_run(tmp_path / "a")
    return tmp_path


@pytest.fixture
def models(root):
    return Models(root, CPU)


def test_runs_are_those_with_a_checkpoint_newest_first(root, models):
    for number, name in enumerate(("b", "c")):
        shutil.copytree(root / "a", root / name)
        os.utime(root / name / "best" / "model.safetensors", (1e9 + number,) * 2)
    shutil.copytree(root / "a" / "best", root / "half" / "last.writing")  # a first checkpoint that is being written
    (root / "empty").mkdir()
    (root / "file").write_text("x")
    shutil.copytree(root / "a" / "best", root / "b" / "last.1")
    os.utime(root / "b" / "last.1" / "model.safetensors", (2e9,) * 2)
    assert models.runs() == ["b", "a", "c"]
    assert checkpoint.newest_run(root) == root / "b"
    assert Models(root / "none", CPU).runs() == [] and checkpoint.runs(root / "file") == []


@pytest.mark.parametrize("name", ["..", ".", "/", "../a", "a/best", "a/", "b", "<b>", "\x00", "x" * 5000])
def test_only_runs_of_the_list_are_opened(models, name):
    with pytest.raises(UserError, match="is gone: refresh") as refused:
        models.get(name, "torch")
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("name", [None, ""])
def test_no_run(models, tmp_path, name):
    with pytest.raises(UserError, match="choose one"):
        models.get(name, "torch")
    with pytest.raises(UserError, match=r"there is no run in .*train one"):
        Models(tmp_path / "none", CPU).get(name, "torch")


def test_a_backend_that_there_is_not(models):
    with pytest.raises(UserError, match="unknown backend 'cuda'"):
        models.get("a", "cuda")


def test_a_model_is_kept_until_its_checkpoint_changes(root, models):
    first = models.get("a", "torch")
    assert models.get("a", "torch") is first
    trained = write_run(root / "a", seed=2)
    os.utime(root / "a" / "best" / "model.safetensors", (2e9,) * 2)
    second = models.get("a", "torch")
    assert second is not first and torch.equal(second.model.tokens.weight, trained.tokens.weight)


def test_models_are_given_up_when_there_are_many(root, models):
    for name in "bcdefg":
        shutil.copytree(root / "a", root / name)
    first = models.get("a", "torch")
    for name in "bcdefg":
        models.get(name, "torch")
    assert len(models._kept) == 4 and models.get("a", "torch") is not first
