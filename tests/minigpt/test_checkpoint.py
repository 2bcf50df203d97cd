"""Checkpoints: what is written comes back, and nothing is ever half there."""

import json
import os
import resource

import pytest
import torch

from minigpt import checkpoint, storage
from minigpt.backends import resolve
from minigpt.config import preset
from minigpt.errors import Damaged, UserError
from minigpt.learning import make_optimizer
from minigpt.model import GPT
from minigpt.tokenizers import CharTokenizer

OPS = resolve("torch", torch.device("cpu"))
TOKENIZER = CharTokenizer.from_text('abc "ä\n\\ 🎭')
FILES = ("config.json", "tokenizer.json", "state.json", "model.safetensors")
RESUMED = ("optimizer.safetensors", "generators.json")
ALL = (*FILES, *RESUMED, "checksums.json")


def make(seed=0, **options):
    config = preset("shakespeare-cpu", n_layer=1, n_head=2, n_embd=8, block_size=6, **options)
    torch.manual_seed(seed)
    model = GPT(config.model_config(TOKENIZER.vocab_size), OPS)
    return config, model, make_optimizer(model, config)


def step(model, optimizer, seed):
    idx = torch.randint(TOKENIZER.vocab_size, (2, 7), generator=torch.Generator().manual_seed(seed))
    model(idx[:, :-1], idx[:, 1:])[1].backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.fixture
def saved(tmp_path):
    config, model, optimizer = make()
    step(model, optimizer, 0)
    folder = tmp_path / "run" / "last"
    checkpoint.save(folder, model, TOKENIZER, config, {"step": 1}, optimizer)
    return folder, config, model, optimizer


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize(
    "options", [{}, {"tied_head": False, "head_bias": True, "bias": True}, {"position": "sinusoidal"}]
)
def test_everything_comes_back(tmp_path, options):
    config, model, optimizer = make(**options)
    for seed in range(3):
        step(model, optimizer, seed)
    torch.manual_seed(11)
    checkpoint.save(tmp_path / "c", model, TOKENIZER, config, {"step": 3, "loss": 0.1}, optimizer)
    assert sorted(os.listdir(tmp_path)) == ["c"] and sorted(os.listdir(tmp_path / "c")) == sorted(ALL)
    drawn = torch.rand(4)

    found = checkpoint.load(tmp_path / "c")
    assert (found.config, found.model_config, found.state) == (config, model.config, {"step": 3, "loss": 0.1})
    assert found.tokenizer == TOKENIZER
    _, other, other_optimizer = make(seed=5, **options)
    found.load_weights(other)
    found.load_optimizer(other, other_optimizer)
    assert torch.equal(torch.rand(4), drawn)
    assert same(model, other)
    for seed in range(3, 6):
        step(model, optimizer, seed)
        step(other, other_optimizer, seed)
    assert same(model, other)


def test_a_model_alone(saved):
    folder, _, model, _ = saved
    loaded = checkpoint.load(folder).model(OPS, torch.device("cpu"))
    assert same(model, loaded) and not loaded.training


def test_saving_again_replaces_everything(saved):
    folder, config, model, optimizer = saved
    step(model, optimizer, 1)
    checkpoint.save(folder, model, TOKENIZER, config, {"step": 2})
    assert checkpoint.load(folder).state == {"step": 2} and not (folder / "optimizer.safetensors").exists()
    assert os.listdir(folder.parent) == ["last"]


def no_news(line):
    raise AssertionError(line)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("length", [None, 0, 1, 9, -1])
def test_a_missing_or_truncated_file_is_told(saved, name, length):
    folder = saved[0]
    path = folder / name
    if length is None:
        path.unlink()
    else:
        # The last byte of a JSON file is its newline: take the bracket too.
        path.write_bytes(path.read_bytes()[: length if length >= 0 else -3])
    with pytest.raises(Damaged, match=f"{name} is (missing|damaged)") as raised:
        checkpoint.load(folder, to_resume=True)
    assert "\n" not in str(raised.value)
    if name in RESUMED:
        assert checkpoint.load(folder).state == {"step": 1}


@pytest.mark.parametrize("name", ALL)
def test_a_flipped_bit_is_told(saved, name):
    folder = saved[0]
    path = folder / name
    data = path.read_bytes()
    for place in range(0, 8 * len(data.rstrip()), max(1, 8 * len(data) // 37)):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(Damaged, match=f"{name} is (damaged|missing)|\\.\\w+ is missing"):
            checkpoint.load(folder, to_resume=True)
    path.write_bytes(data)
    checkpoint.load(folder, to_resume=True)


def test_a_newer_format_is_refused_and_not_gone_back_from(saved, monkeypatch):
    folder, config, model, optimizer = saved
    with monkeypatch.context() as patch:
        patch.setattr(storage, "FORMAT", storage.FORMAT + 1)
        checkpoint.save(folder, model, TOKENIZER, config, {"step": 2}, optimizer, keep=1)
    newer = rf"{folder} was written by a newer minigpt \(format 2, and this one reads up to 1\): update minigpt"
    for look in (lambda: checkpoint.load(folder), lambda: checkpoint.find(folder.parent, no_news)):
        with pytest.raises(UserError, match=newer):
            look()
    with pytest.raises(UserError, match=newer):
        checkpoint.resumable(folder.parent, no_news)
    assert sorted(os.listdir(folder.parent)) == ["last", "last.1"]


@pytest.mark.parametrize("content", [b"[]", b"null", b"{}", b"\xff\xfe", b'{"model": 3, "training": {}}'])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_json_that_is_something_else_is_told(saved, name, content):
    folder = saved[0]
    (folder / name).write_bytes(content)
    storage.seal(folder)  # as if it had been written so
    with pytest.raises(UserError):
        checkpoint.load(folder)


def test_another_shape_is_told_and_changes_nothing(saved):
    folder, config, *_ = saved
    other = GPT(config.model_config(TOKENIZER.vocab_size + 1), OPS)
    before = [p.clone() for p in other.parameters()]
    with pytest.raises(UserError, match=r"another shape.*tokens\.weight is \(\d+, 8\) there, \(\d+, 8\) here"):
        checkpoint.load(folder).load_weights(other)
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))

    _, deeper, optimizer = make(bias=True)
    with pytest.raises(UserError, match="nothing there"):
        checkpoint.load(folder).load_weights(deeper)
    with pytest.raises(UserError, match="does not fit the model"):
        checkpoint.load(folder).load_optimizer(deeper, optimizer)


@pytest.mark.parametrize("limit", [100, 3000])  # within the first JSON file; within the weights
def test_a_full_disk_leaves_the_checkpoint_before(saved, limit):
    folder, config, model, optimizer = saved
    weights = [p.clone() for p in model.parameters()]
    step(model, optimizer, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(UserError, match=f"{folder}: the file would be larger") as raised:
            checkpoint.save(folder, model, TOKENIZER, config, {"step": 2}, optimizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(raised.value)
    assert os.listdir(folder.parent) == ["last"] and checkpoint.load(folder).state == {"step": 1}
    checkpoint.load(folder).load_weights(model)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


@pytest.mark.parametrize(("keep", "kept"), [(0, 0), (1, 1), (2, 2), (9, 4)])
def test_the_ones_before_stay_as_many_as_are_wanted(saved, keep, kept):
    folder, config, model, optimizer = saved
    for number in range(2, 6):
        checkpoint.save(folder, model, TOKENIZER, config, {"step": number}, optimizer, keep=keep)
    names = ["last", *(f"last.{age}" for age in range(1, kept + 1))]
    assert sorted(os.listdir(folder.parent)) == names
    assert [checkpoint.load(folder.parent / name, to_resume=True).state["step"] for name in names] == [
        5 - age for age in range(kept + 1)
    ]


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_crash_while_moving_in_leaves_all_that_were_there(saved, failing, monkeypatch):
    folder, config, model, optimizer = saved
    checkpoint.save(folder, model, TOKENIZER, config, {"step": 2}, optimizer, keep=1)
    rename, calls = type(folder).rename, []

    def crash(self, target):
        calls.append(self)
        if len(calls) == failing:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(type(folder), "rename", crash)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(folder, model, TOKENIZER, config, {"step": 3}, optimizer, keep=1)
    monkeypatch.undo()
    said = []
    assert checkpoint.resumable(folder.parent, said.append).state == {"step": 2}
    assert [line.partition(": ")[2].partition(". ")[0] for line in said] == [f"{folder} is missing"] * (failing == 3)
    assert checkpoint.find(folder.parent, no_news).state == {"step": 2}
    assert checkpoint.stored_config(folder.parent) == config
    checkpoint.save(folder, model, TOKENIZER, config, {"step": 3}, optimizer, keep=1)
    assert sorted(os.listdir(folder.parent)) == ["last", "last.1"]
    assert [checkpoint.load(folder.parent / name).state["step"] for name in ("last", "last.1")] == [3, 2]


@pytest.mark.parametrize("name", ALL)
def test_going_on_falls_back_to_the_one_before_and_says_so(saved, name):
    folder, config, model, optimizer = saved
    run, said = folder.parent, []
    for number in (2, 3):
        checkpoint.save(folder, model, TOKENIZER, config, {"step": number}, optimizer, keep=2)
    for damaged in (folder, run / "last.1"):
        with (damaged / name).open("r+b") as file:
            file.write(b"@")
    assert checkpoint.stored_config(run) == config and checkpoint.resumable(run, said.append).state == {"step": 1}
    for damaged, line in zip((folder, run / "last.1"), said, strict=True):
        assert line.startswith(f"WARNING: {damaged / name} is damaged")
        assert "last.2" in line and f"{damaged}.damaged" in line
    assert sorted(os.listdir(run)) == ["last.1.damaged", "last.2", "last.damaged"]
    checkpoint.save(folder, model, TOKENIZER, config, {"step": 2}, optimizer, keep=2)
    assert checkpoint.resumable(run, no_news).state == {"step": 2} and (run / "last.2").is_dir()
    for whole in (folder, run / "last.2"):
        (whole / name).write_bytes(b"")
    with pytest.raises(Damaged, match=f"last/{name} is damaged"):
        checkpoint.resumable(run, no_news)
    assert sorted(os.listdir(run)) == ["last", "last.1.damaged", "last.2", "last.damaged"]


def test_text_from_a_run_falls_back_too_and_says_so(saved):
    folder, config, model, _ = saved
    run, said = folder.parent, []
    checkpoint.save(run / "best", model, TOKENIZER, config, {"step": 7})
    with (run / "best" / "model.safetensors").open("ab") as file:
        file.write(b"@")
    assert checkpoint.find(run, said.append).folder == folder
    assert len(said) == 1 and "best/model.safetensors is damaged" in said[0] and f"Taking {folder} instead" in said[0]
    with pytest.raises(Damaged):
        checkpoint.find(run / "best", no_news)  # asked for by name
    assert sorted(os.listdir(run)) == ["best", "last"]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_every_file_follows_the_umask(saved, mask):
    folder, config, model, optimizer = saved
    before = os.umask(mask)
    try:
        checkpoint.save(folder, model, TOKENIZER, config, {"step": 2}, optimizer)
    finally:
        os.umask(before)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in folder.iterdir()}
    assert modes == dict.fromkeys(ALL, oct(0o666 & ~mask))


def test_everything_is_on_the_disk_before_it_moves_in(saved, monkeypatch):
    folder, config, model, optimizer = saved
    events, sync, rename = [], storage.sync, type(folder).rename
    monkeypatch.setattr(storage, "sync", lambda path: (events.append(path), sync(path)))
    monkeypatch.setattr(type(folder), "rename", lambda self, to: (events.append("rename"), rename(self, to)))
    checkpoint.save(folder, model, TOKENIZER, config, {"step": 2}, optimizer)
    draft = folder.with_name("last.writing")
    first = events.index("rename")
    assert set(events[:first]) == {draft, *(draft / name for name in ALL)} and events[first - 1] == draft
    assert events[-1] == folder.parent


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    config, model, _ = make()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a part of the path is a file"):
        checkpoint.save(tmp_path / "file" / "c", model, TOKENIZER, config, {})


def test_find_and_newest_run(saved, tmp_path):
    folder, config, model, _ = saved
    run = folder.parent
    assert checkpoint.find(run, no_news).folder == checkpoint.find(folder, no_news).folder == folder
    checkpoint.save(run / "best", model, TOKENIZER, config, {})
    assert checkpoint.find(run, no_news).folder == run / "best"
    checkpoint.save(tmp_path / "later" / "last", model, TOKENIZER, config, {})
    os.utime(tmp_path / "later" / "last" / "model.safetensors", (2**33, 2**33))
    assert checkpoint.newest_run(tmp_path) == tmp_path / "later"
    (tmp_path / "empty").mkdir()
    for missing in (tmp_path / "empty", tmp_path / "nowhere"):
        for look in (checkpoint.newest_run, checkpoint.load, checkpoint.stored_config):
            with pytest.raises(UserError, match=str(missing)):
                look(missing)
        for look in (checkpoint.find, checkpoint.resumable):
            with pytest.raises(UserError, match=f"no checkpoint.*{missing}"):
                look(missing, no_news)


def test_nothing_in_a_checkpoint_is_a_pickle(saved):
    folder = saved[0]
    for path in folder.iterdir():
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        else:
            data = path.read_bytes()
            json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
