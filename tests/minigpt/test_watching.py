"""What else is told of a run gets the rows of metrics.csv, once each, and is closed whatever happens."""

import importlib.util
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from training_runs import StopAfter, rows

from minigpt import plots
from minigpt.config import parse
from minigpt.errors import Stopped, UserError
from minigpt.trainer import Session, train

installed = {name: importlib.util.find_spec(name) is not None for name in ("tensorboard", "wandb")}
needs_tensorboard = pytest.mark.skipif(not installed["tensorboard"], reason="tensorboard is not installed")
needs_wandb = pytest.mark.skipif(not installed["wandb"], reason="wandb is not installed")


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take longer than the runs."""
    monkeypatch.setattr(plots, "curves", lambda *_, **__: None)


@pytest.fixture
def told(monkeypatch):
    """Stand-ins for both packages; what they are told, in order."""
    calls = []

    class Writer:
        def __init__(self, folder, purge_step):
            calls.append(("tensorboard", folder, purge_step))

        def add_scalar(self, name, value, step):
            calls.append((name, value, step))

        def close(self):
            calls.append(("closed",))

    class Run:
        def log(self, values, step):
            calls.append((step, values))

        def finish(self):
            calls.append(("finished",))

    def init(**options):
        calls.append(("wandb", options))
        return Run()

    for name, content in (
        ("tensorboard", {}),
        ("torch.utils.tensorboard", {"SummaryWriter": Writer}),
        ("wandb", {"init": init}),
    ):
        module = types.ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_tensorboard_gets_every_row_once(small, told):
    train(small(out=Path("r"), tensorboard=True))
    assert told[0] == ("tensorboard", "r/tensorboard", None) and told[-1] == ("closed",)
    for name in ("train_loss", "grad_norm", "learning_rate", "val_loss"):
        values = [(float(f"{value:.9g}"), step) for kind, value, step in told[1:-1] if kind == name]
        assert values == [(float(row[name]), int(row["step"])) for row in rows(Path("r")) if row[name]]


def test_wandb_gets_every_row_once_and_no_network(small, told):
    train(small(out=Path("r"), wandb=True))
    options = told[0][1]
    assert options["mode"] == "offline" and options["dir"] == "r" and options["config"]["max_steps"] == 12
    assert [call[0] for call in told[1:-1]] == list(range(1, 13)) and told[-1] == ("finished",)
    assert told[5][1]["val_loss"] > 0 and "val_loss" not in told[4][1] and "step" not in told[4][1]


def test_going_on_continues_after_the_checkpoint(small, told):
    session = Session(small(out=Path("r"), tensorboard=True, wandb=True))
    with session, pytest.raises(Stopped):
        session.run(StopAfter(session, 7))
    assert sorted(told[-2:]) == [("closed",), ("finished",)]
    told.clear()
    train(parse(["--resume", "r"]))
    assert ("tensorboard", "r/tensorboard", 8) in told
    assert [call[1]["name"] for call in told if call[0] == "wandb"] == ["r from step 7"]
    assert [call[0] for call in told if isinstance(call[0], int)] == list(range(8, 13))


def test_they_are_closed_when_training_fails(small, told, monkeypatch):
    def fail(self, number):
        raise KeyError("a bug")

    monkeypatch.setattr("minigpt.learning.Learner.step", fail)
    with pytest.raises(KeyError):
        train(small(out=Path("r"), tensorboard=True, wandb=True))
    assert sorted(told[-2:]) == [("closed",), ("finished",)]


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_missing_package_is_told_before_anything_else(small, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(UserError, match=f"--{package} needs a package: pip install {package}, or say --no-{package}"):
        train(small(out=Path("r"), **{package: True}))
    assert not Path("r").exists()
    train(small(out=Path("r"), max_steps=1))


@needs_tensorboard
def test_tensorboard_itself_reads_what_is_written(small):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(small(out=Path("r"), tensorboard=True))
    events = EventAccumulator("r/tensorboard").Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train_loss")]
    assert losses == [(int(row["step"]), pytest.approx(float(row["train_loss"]))) for row in rows(Path("r"))]


@needs_wandb
def test_wandb_itself_writes_a_run(small):
    train(small(out=Path("r"), wandb=True))
    (written,) = Path("r/wandb").glob("offline-run-*/*.wandb")
    assert written.stat().st_size > 1000
