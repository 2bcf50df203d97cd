"""What a run trains on is the same in memory and mapped from a file."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from training_runs import losses

from minigpt import corpora, dataset, plots, prepare, storage
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


@pytest.fixture
def both_in_bpe(text, tmp_path):
    """The same in BPE."""
    prepare.prepare(text, tmp_path / "bpe", "bpe", 270, workers=1, progress=lambda *_: None)
    return text, tmp_path / "bpe"


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


def test_epochs_of_a_mapped_text_are_those_of_one_in_memory():
    tokens = np.arange(5, 905).astype(np.uint16)
    held, mapped = Batches(torch.from_numpy(tokens.astype(np.int64)), 7, 5, seed=2), Batches(tokens, 7, 5, seed=2)
    for index in (*range(80), 10**5):  # three epochs, and one far away
        for ours, theirs in zip(held[index], mapped[index], strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.gpu
def test_the_same_batches_on_a_gpu(both):
    held, mapped = (Batches(dataset.load(str(path)).train, 16, 4, seed=3, device="cuda") for path in both)
    for ours, theirs in zip(held[5], mapped[5], strict=True):
        assert torch.equal(ours, theirs) and theirs.is_cuda


def test_the_same_run(small, both):
    for name, path in zip(("held", "mapped"), both, strict=True):
        train(small(out=Path(name), data=str(path)))
    assert losses(Path("held")) == losses(Path("mapped"))


def test_the_same_run_in_bpe(small, both_in_bpe):
    text, ready = both_in_bpe
    held = train(small(out=Path("held"), data=str(text), tokenizer="bpe", vocab_size=270))
    mapped = train(small(out=Path("mapped"), data=str(ready)))
    assert losses(Path("held")) == losses(Path("mapped")) and held["vocab_size"] == mapped["vocab_size"] == 270
    assert held["tokenizer"] == mapped["tokenizer"] == "bpe"


def test_every_tokenizer_validates_on_the_same_characters(small, text):
    """All but the first, which no token predicts."""
    found = {name: dataset.load(str(text), name, 270) for name in ("char", "bpe")}
    ends = {name: data.tokenizer.decode(data.validation) for name, data in found.items()}
    assert ends["char"].endswith(ends["bpe"]) and len(ends["char"]) - len(ends["bpe"]) < 10
    summary = train(small(tokenizer="bpe", vocab_size=270))
    first = int(found["bpe"].tokenizer.characters_per_token[found["bpe"].validation[0]])
    assert summary["val_characters"] == len(ends["bpe"]) - first
    assert summary["val_tokens"] == len(found["bpe"].validation) - 1 < summary["val_characters"]
    assert summary["val_loss_per_character"] == pytest.approx(
        summary["val_loss"] * summary["val_tokens"] / summary["val_characters"]
    )


def test_a_text_in_other_tokens_is_another_one(text):
    sums = [dataset.load(str(text), *wanted).sha256 for wanted in (("char",), (None,), ("bpe", 270), ("bpe", 271))]
    assert sums[0] == sums[1] == corpora.load(str(text)).sha256 and len(set(sums)) == 3


@pytest.mark.parametrize(
    ("kind", "wanted"), [("char", ["bpe"]), ("bpe", ["char"]), ("bpe", ["bpe", "269"]), ("bpe", ["bpe", "258"])]
)
def test_a_prepared_text_of_another_tokenizer_is_refused(small, both, both_in_bpe, kind, wanted):
    folder = str(both[1] if kind == "char" else both_in_bpe[1])
    size = int(wanted[1]) if wanted[1:] else 0
    with pytest.raises(UserError, match=f"prepared with another tokenizer.*--tokenizer {wanted[0]}.*leave that out"):
        train(small(data=folder, tokenizer=wanted[0], vocab_size=size))
    assert dataset.load(folder, kind, 280).tokens == dataset.load(folder).tokens


def test_a_text_that_an_older_version_prepared_is_cut_where_it_was(both):
    path = both[1] / "manifest.json"
    before, manifest = dataset.load(str(both[1])), storage.read_json(path)
    assert manifest.pop("train") == len(before.train)
    storage.write_json(path, manifest)
    storage.seal(both[1])
    after = dataset.load(str(both[1]))
    assert len(after.train) == len(before.train) and after.sha256 == before.sha256


def test_characters_need_no_package(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert train(small(max_steps=1))["tokenizer"] == "characters"
    with pytest.raises(UserError, match="pip install tokenizers"):
        train(small(tokenizer="bpe", vocab_size=270))


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
