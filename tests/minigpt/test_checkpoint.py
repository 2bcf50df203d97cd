"""Checkpoints: what is written comes back, and nothing is ever half there."""

import json
import os
import resource

import pytest
import torch

from minigpt import checkpoint
from minigpt.backends import resolve
from minigpt.config import preset
from minigpt.errors import UserError
from minigpt.model import GPT
from minigpt.tokenizers import CharTokenizer
from minigpt.trainer import make_optimizer

OPS = resolve("torch", torch.device("cpu"))
TOKENIZER = CharTokenizer.from_text('abc "ä\n\\ 🎭')
FILES = ("config.json", "tokenizer.json", "state.json", "model.safetensors", "optimizer.safetensors")


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
    assert sorted(os.listdir(tmp_path)) == ["c"] and sorted(os.listdir(tmp_path / "c")) == sorted(FILES)
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
    loaded, tokenizer = checkpoint.load_model(folder, OPS, torch.device("cpu"))
    assert same(model, loaded) and tokenizer == TOKENIZER and not loaded.training


def test_saving_again_replaces_everything(saved):
    folder, config, model, optimizer = saved
    step(model, optimizer, 1)
    checkpoint.save(folder, model, TOKENIZER, config, {"step": 2})
    assert checkpoint.load(folder).state == {"step": 2} and not (folder / "optimizer.safetensors").exists()
    assert os.listdir(folder.parent) == ["last"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("length", [None, 0, 1, 9, -1])
def test_a_missing_or_truncated_file_is_told(saved, name, length):
    folder, _, model, optimizer = saved
    path = folder / name
    if length is None:
        path.unlink()
    else:
        data = path.read_bytes()
        # The last byte of a JSON file is its newline: take the bracket too.
        path.write_bytes(data[: length if length >= 0 else len(data) - 3])
    with pytest.raises(UserError, match=f"{name} is (missing|damaged)") as raised:
        found = checkpoint.load(folder)
        found.load_weights(model)
        found.load_optimizer(model, optimizer)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [b"[]", b"null", b"{}", b"\xff\xfe", b'{"model": 3, "training": {}}'])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_json_that_is_something_else_is_told(saved, name, content):
    folder = saved[0]
    (folder / name).write_bytes(content)
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


@pytest.mark.parametrize("failing", [1, 2])
def test_a_crash_while_replacing_leaves_one_whole_checkpoint(saved, failing, monkeypatch):
    folder, config, model, _ = saved
    rename, calls = type(folder).rename, []

    def crash(self, target):
        calls.append(self)
        if len(calls) == failing:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(type(folder), "rename", crash)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(folder, model, TOKENIZER, config, {"step": 2})
    monkeypatch.undo()
    assert checkpoint.load(folder).state == {"step": 1}
    assert checkpoint.find(folder.parent) == folder
    checkpoint.save(folder, model, TOKENIZER, config, {"step": 2})
    assert checkpoint.load(folder).state == {"step": 2} and os.listdir(folder.parent) == ["last"]


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    config, model, _ = make()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a part of the path is a file"):
        checkpoint.save(tmp_path / "file" / "c", model, TOKENIZER, config, {})


def test_find_and_newest_run(saved, tmp_path):
    folder, config, model, _ = saved
    run = folder.parent
    assert checkpoint.find(run) == checkpoint.find(folder) == folder
    checkpoint.save(run / "best", model, TOKENIZER, config, {})
    assert checkpoint.find(run) == run / "best"
    checkpoint.save(tmp_path / "later" / "last", model, TOKENIZER, config, {})
    os.utime(tmp_path / "later" / "last" / "model.safetensors", (2**33, 2**33))
    assert checkpoint.newest_run(tmp_path) == tmp_path / "later"
    (tmp_path / "empty").mkdir()
    for missing in (tmp_path / "empty", tmp_path / "nowhere"):
        for look in (checkpoint.find, checkpoint.newest_run, checkpoint.load):
            with pytest.raises(UserError, match=str(missing)):
                look(missing)


def test_nothing_in_a_checkpoint_is_a_pickle(saved):
    folder = saved[0]
    for path in folder.iterdir():
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        else:
            data = path.read_bytes()
            json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
