"""What a run trains on is the same in memory and mapped from a file."""

from pathlib import Path

import numpy as np
import pytest
import torch
from training_runs import losses

from minigpt import dataset, plots, prepare
from minigpt.batches import Batches
from minigpt.config import parse
from minigpt.errors import UserError
from minigpt.trainer import train


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take longer than the runs."""
    monkeypatch.setattr(plots, "curves", lambda *_, **__: None)


@pytest.fixture
def both(text, tmp_path):
    """The text as a file, and prepared."""
    prepare.prepare(text, tmp_path / "ready", workers=1, progress=lambda *_: None)
    return text, tmp_path / "ready"


def test_the_same_tokens(both):
    held, mapped = (dataset.load(str(path)) for path in both)
    assert isinstance(mapped.train, np.memmap) and mapped.train.dtype == np.uint16
    assert held.train.tolist() == mapped.train.tolist() and torch.equal(held.validation, mapped.validation)
    assert held.tokenizer == mapped.tokenizer and held.tokens == mapped.tokens == len(both[0].read_text())
    assert len(held.train) == int(0.9 * held.tokens) and str(both[1]) in mapped.source


def test_the_same_batches(both):
    held, mapped = (Batches(dataset.load(str(path)).train, 16, 4, seed=3) for path in both)
    for index in (0, 1, 7, 300):
        for ours, theirs in zip(held[index], mapped[index], strict=True):
            assert torch.equal(ours, theirs) and theirs.dtype == torch.int64 and theirs.shape == (4, 16)


def test_a_tensor_stays_where_it_is_unless_told():
    tokens = torch.arange(100, device="meta")
    assert Batches(tokens, 8, 2, seed=1)[0][0].device.type == "meta"
    assert Batches(torch.arange(100), 8, 2, seed=1, device="meta")[0][0].device.type == "meta"


@pytest.mark.gpu
def test_the_same_batches_on_a_gpu(both):
    held, mapped = (Batches(dataset.load(str(path)).train, 16, 4, seed=3, device="cuda") for path in both)
    for ours, theirs in zip(held[5], mapped[5], strict=True):
        assert torch.equal(ours, theirs) and theirs.is_cuda


def test_the_same_run(small, both):
    for name, path in zip(("held", "mapped"), both, strict=True):
        train(small(out=Path(name), data=str(path)))
    assert losses(Path("held")) == losses(Path("mapped"))


def test_a_prepared_text_that_was_made_anew_is_refused(small, both):
    text, ready = both
    train(small(out=Path("r"), data=str(ready)))
    text.write_text(text.read_text() + "And more.\n")
    prepare.prepare(text, Path("other"), workers=1, progress=lambda *_: None)
    ready.rename("old")
    Path("other").rename(ready)
    with pytest.raises(UserError, match="ready has changed since r/last was written"):
        train(parse(["--resume", "r", "--max-steps", "20"]))


def test_the_end_to_validate_on_is_bounded(both, monkeypatch):
    monkeypatch.setattr(dataset, "_MOST_VALIDATION", 100)
    found = dataset.load(str(both[1]))
    assert len(found.validation) == 100 and len(found.train) == found.tokens - 100


def test_a_checkpoint_is_no_text(small):
    train(small(out=Path("r"), max_steps=1))
    with pytest.raises(UserError, match="r/last is no prepared text"):
        dataset.load("r/last")


def test_batches_of_a_file_are_read_ahead_once_and_in_any_order(both):
    held, mapped = (Batches(dataset.load(str(path)).train, 16, 4, seed=3) for path in both)
    read, reading = [], mapped._read
    mapped._read = lambda index: (read.append(index), reading(index))[1]
    mapped.expect(range(5))
    for index in (3, 0, 9, 4, 9):
        assert torch.equal(held[index][0], mapped[index][0])
    held.expect(range(5))
    # Another batch size is other windows, although the number is the same.
    held.batch_size = mapped.batch_size = 2
    for index in (1, 2):
        assert torch.equal(held[index][1], mapped[index][1])
    assert read == [0, 1, 2, 3, 4, 9, 9, 1, 2]
