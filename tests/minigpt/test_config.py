"""Settings: presets, precedence, every field on the command line, and bad values told in one line."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from minigpt import config
from minigpt.config import PRESETS, ModelConfig, TrainConfig, parse, pick_device, pick_dtype, preset
from minigpt.errors import UserError
from minigpt.faults import check_batch


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("MINIGPT_KERNELS", raising=False)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


def flag(field, value):
    name = "--" + field.name.replace("_", "-")
    if isinstance(value, bool):
        return [name if value else name.replace("--", "--no-")]
    return [name, str(value)]


def other_value(field, now):
    """A valid value of a field that differs from the one it has."""
    special = {
        "preset": "tiny", "data": "pydocs", "tokenizer": "bpe", "out": Path("a/b"), "kernels": "eager",
        "device": "cpu", "dtype": "bf16", "position": "sinusoidal", "prompt": "--x", "n_head": 2, "window": 3,
        "dropout": 0.25, "beta1": 0.5, "beta2": 0.5, "min_learning_rate": 1e-9, "parallel": "ddp",
    }  # fmt: skip
    if field.name in special:
        return special[field.name]
    return not now if isinstance(now, bool) else now * 2 + 1 if isinstance(now, int) else now * 2


@pytest.mark.parametrize(
    "field", [f for f in dataclasses.fields(TrainConfig) if f.name != "resume"], ids=lambda f: f.name
)
def test_every_field_can_be_overridden(field, no_gpu):
    before = preset("shakespeare-cpu")
    value = other_value(field, getattr(before, field.name))
    if field.name == "n_embd":
        value = 64
    if field.name == "prompt":
        arguments = [f"--prompt={value}"]
    else:
        arguments = flag(field, value)
    assert getattr(parse(arguments), field.name) == value != getattr(before, field.name)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_gives_the_defaults_and_flags_win(name, no_gpu):
    assert parse(["--preset", name]) == parse([f"--preset={name}"]) == preset(name)
    changed = parse(["--max-steps", "7", "--preset", name])
    assert changed == dataclasses.replace(preset(name), max_steps=7)


def test_the_recipe_of_the_shakespeare_presets():
    for name in ("shakespeare", "shakespeare-cpu"):
        c = preset(name)
        assert (c.learning_rate, c.min_learning_rate, c.warmup_steps) == (1e-3, 1e-4, 100)
        assert (c.beta1, c.beta2, c.weight_decay, c.grad_clip) == (0.9, 0.99, 0.1, 1.0)
    c = preset("shakespeare-cpu")
    assert (c.n_layer, c.n_head, c.n_embd, c.block_size, c.batch_size, c.max_steps) == (4, 4, 128, 64, 12, 2000)
    assert c.val_tokens == 0 and c.dropout == 0.0
    c = preset("shakespeare")
    assert (c.n_layer, c.n_head, c.n_embd, c.block_size, c.batch_size, c.max_steps) == (6, 6, 384, 256, 64, 5000)
    assert c.dropout == 0.2
    c = preset("tiny")
    assert (c.batch_size, c.window, c.block_size, c.vocab_size, c.dropout) == (2, 64, 512, 100, 0.0)


def test_the_flag_beats_the_environment_and_the_environment_beats_the_preset(monkeypatch, no_gpu):
    assert parse([]).kernels == "auto"
    monkeypatch.setenv("MINIGPT_KERNELS", "eager")
    assert parse([]).kernels == "eager"
    assert parse(["--kernels", "torch"]).kernels == "torch"
    assert parse(["--kernels=attention=eager"]).kernels == "attention=eager"


def test_the_default_preset_follows_the_machine(monkeypatch, no_gpu):
    monkeypatch.setattr(kernels.device, "INTERPRETED", True)
    monkeypatch.setattr(kernels.device, "why_not", lambda device: None)
    assert parse([]).preset == "shakespeare-cpu"
    for request in ("triton", "loss=triton"):
        monkeypatch.setenv("MINIGPT_KERNELS", request)
        assert (parse([]).preset, parse([]).max_steps) == ("tiny", 100)
        assert parse(["--preset", "shakespeare-cpu"]).preset == "shakespeare-cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("MINIGPT_KERNELS")
    assert parse([]).preset == "shakespeare"
    assert parse(["--device", "cpu"]).preset == "shakespeare-cpu"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--preset big", "unknown preset 'big'.*tiny, shakespeare-cpu, shakespeare, gpt2"),
        ("--preset", "--preset"),
        ("--device quantum", "unknown device 'quantum'.*cpu"),
        ("--device cuda:9", "unknown device 'cuda:9'"),
        ("--nlayer 3", "--nlayer.*did you mean --n-layer"),
        ("--n-layer x", "--n-layer.*'x'"),
        ("--n-layer", "--n-layer"),
        ("--n-layer 2.5", "--n-layer"),
        ("surplus", "surplus"),
        ("--position rotary", "rotary.*learned.*sinusoidal"),
        ("--dtype int8", "int8.*bf16"),
        ("--block-size 0", "block_size must be at least 1, not 0"),
        ("--n-head 5", "5 heads do not divide a width of 128"),
        ("--n-head 0", "n_head must be at least 1"),
        ("--n-embd -128", "n_embd must be at least 1"),
        ("--n-layer 0", "n_layer must be at least 1"),
        ("--batch-size 0", "batch_size"),
        ("--max-steps 0", "max_steps"),
        ("--grad-accumulation 0", "grad_accumulation"),
        ("--eval-interval 0", "eval_interval"),
        ("--window 65", "window .65. must not exceed block_size .64."),
        ("--window -1", "window"),
        ("--dropout 1", "dropout"),
        ("--dropout -0.1", "dropout"),
        ("--dropout nan", "dropout"),
        ("--learning-rate 0", "learning_rate"),
        ("--learning-rate nan", "learning_rate"),
        ("--learning-rate inf", "learning_rate"),
        ("--learning-rate 1e-5", "min_learning_rate .0.0001. must not exceed"),
        ("--beta2 1", "beta2"),
        ("--weight-decay -1", "weight_decay"),
        ("--grad-clip nan", "grad_clip"),
        ("--seed -1", "seed"),
        ("--vocab-size -5", "vocab_size"),
        ("--resume /nowhere/at/all", "no checkpoint /nowhere/at/all/last"),
    ],
)
def test_bad_command_lines_are_told_in_one_line(arguments, said, no_gpu):
    with pytest.raises(UserError, match=said) as raised:
        parse(arguments.split())
    assert "\n" not in str(raised.value)


def test_help_shows_every_flag_and_the_defaults_of_the_preset(capsys, no_gpu):
    with pytest.raises(SystemExit) as leaving:
        parse(["--preset", "gpt2-xl", "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert leaving.value.code == 0
    for field in dataclasses.fields(TrainConfig):
        assert "--" + field.name.replace("_", "-") in text
    assert "Transformer blocks. (default: 48)" in text and "gpt2-medium" in text


def test_settings_survive_json():
    before = preset("gpt2", out=Path("runs/ä b"), prompt='\n\t"', data="pydocs", learning_rate=0.1 + 0.2)
    assert TrainConfig.from_json(json.loads(json.dumps(before.to_json()))) == before
    older = {name: value for name, value in before.to_json().items() if name != "tokenizer"}
    assert TrainConfig.from_json(older) == before  # runs of before there was a choice
    with pytest.raises(UserError, match="another version"):
        TrainConfig.from_json(before.to_json() | {"n_legs": 4})


def test_the_vocabulary_is_padded_but_never_cut():
    assert preset("tiny").model_config(66).vocab_size == 100
    assert preset("tiny").model_config(120).vocab_size == 120
    assert preset("shakespeare").model_config(68).vocab_size == 68


def test_a_model_that_cannot_be_built_is_refused():
    good = {"vocab_size": 5, "block_size": 4, "n_layer": 1, "n_head": 1, "n_embd": 1}
    ModelConfig(**good)
    for name in good:
        with pytest.raises(UserError, match=name):
            ModelConfig(**(good | {name: 0}))
    with pytest.raises(UserError, match="position"):
        ModelConfig(**good, position="rotary")


def test_device_and_dtype(monkeypatch, no_gpu):
    assert pick_device("auto") == torch.device("cpu")
    assert pick_dtype("auto", torch.device("cpu")) == torch.float32
    assert pick_dtype("fp16", torch.device("cpu")) == torch.float16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda") and pick_device("cpu").type == "cpu"
    assert not current
    # on another GPU, an event on the current stream would be over before the work that it stands for
    assert pick_device("cuda:1") == torch.device("cuda:1") and current == [torch.device("cuda:1")]
    with pytest.raises(UserError, match="cuda:0, cuda:1"):
        pick_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: False)
    assert config.pick_dtype("auto", torch.device("cuda")) == torch.float32


WITHOUT_TYRO = """
import sys
sys.modules["tyro"] = None
import kernels
from minigpt import config, errors, trainer
assert config.preset("tiny", max_steps=3).max_steps == 3
errors.door(lambda: config.parse(["--max-steps", "3", "--device", "cpu"]))
"""


def test_settings_are_there_without_what_reads_a_command_line():
    """Benchmarks and profiles make theirs themselves, on machines that may have little more than PyTorch."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_TYRO], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert "pip install tyro" in done.stderr


def test_a_batch_that_cannot_fit_is_refused_before_anything_is_computed():
    """Its embeddings and their gradient are 8 bytes for each number; a batch that is merely large is taken."""
    check_batch(64, 256, 384, torch.device("cpu"))
    with pytest.raises(
        UserError, match="--batch-size 1000000000 of 64 tokens takes more than 32,768 GB, and there are"
    ):
        check_batch(10**9, 64, 64, torch.device("cpu"))
