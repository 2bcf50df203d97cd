"""The gate passes what learns the same, and stops what does not, even where a loss curve shows nothing."""

import csv
import json
import types
from pathlib import Path

import numpy as np
import pytest

import kernels
import kernels.reference
from minigpt import __main__, backends, commands
from minigpt.compare import Check, _seed_check, compare, write
from minigpt.config import preset
from minigpt.errors import UserError

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "window": 16, "vocab_size": 0, "device": "cpu"}


@pytest.fixture
def config(text):
    def settings(**options):
        run = {"data": str(text), "max_steps": 6, "eval_tokens": 64, "batch_size": 2}
        return preset("tiny", **(SHAPE | run | options))

    return settings


def quiet(line):
    pass


def failed(result):
    return [check.what for check in result.checks if not check.passed]


def namespace(whole=kernels.reference, **broken):
    """The functions of a backend, some of them replaced."""
    names = (
        "scaled_dot_product_attention_qkvpacked", "decode_attention", "layer_norm", "add_layer_norm",
        "linear_cross_entropy",
    )  # fmt: skip
    return types.SimpleNamespace(**({name: getattr(whole, name) for name in names} | broken))


def attention_off_by(factor, whole=kernels.reference):
    def attention(qkv, **options):
        scale = factor * qkv.shape[-1] ** -0.5
        return whole.scaled_dot_product_attention_qkvpacked(qkv, scale=scale, **options)

    return namespace(whole, scaled_dot_product_attention_qkvpacked=attention)


def norm_off_by(factor):
    def layer_norm(x, shape, weight, bias, eps):
        return kernels.reference.layer_norm(x, shape, factor * weight, bias, eps)

    return namespace(layer_norm=layer_norm)


def loss_off_by(factor):
    def loss(*arguments, **options):
        return factor * kernels.reference.linear_cross_entropy(*arguments, **options)

    return namespace(linear_cross_entropy=loss)


@pytest.mark.parametrize(
    "options", [{}, {"dtype": "bf16"}, {"dtype": "fp16"}, {"tied_head": True, "bias": False}], ids=str
)
def test_backends_that_are_right_agree(config, options):
    result = compare("eager", "torch", config(**options), seeds=2, announce=quiet)
    assert failed(result) == []
    dtypes = {"float32"} | ({"bfloat16" if options["dtype"] == "bf16" else "float16"} if "dtype" in options else set())
    assert {error.dtype for error in result.errors} == dtypes
    worst = max(max(error.a, error.b) for error in result.errors if error.dtype == "float32")
    assert 0 < worst < 1e-5


def test_a_backend_agrees_with_itself_to_the_last_bit(config):
    result = compare("torch", "torch", config(dropout=0.1), seeds=2, announce=quiet)
    assert failed(result) == []
    assert all(np.array_equal(*pair) for pair in (result.losses, result.norms, result.validation))
    assert result.losses[0].shape == (2, 6) and not np.array_equal(result.losses[0][0], result.losses[0][1])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("broken", [attention_off_by, norm_off_by, loss_off_by])
def test_a_factor_that_is_wrong_by_a_hundredth_is_caught(config, monkeypatch, broken, dtype):
    monkeypatch.setitem(backends._NAMESPACES, "torch", broken(1.01))
    found = failed(compare("torch", "eager", config(dtype=dtype), seeds=2, announce=quiet))
    assert any(what.startswith("gradient of a in float32") for what in found)
    assert not any(what.startswith("gradient of b") for what in found)


@pytest.mark.interpreted
@pytest.mark.parametrize(("factor", "agree"), [(1.0, True), (1.01, False)])
def test_so_is_a_kernel_of_ours(config, monkeypatch, factor, agree):
    monkeypatch.setitem(backends._NAMESPACES, "triton", attention_off_by(factor, kernels))
    settings = config(max_steps=1, n_layer=1, eval_tokens=16)
    result = compare("attention=triton", "torch", settings, seeds=2, announce=quiet)
    assert (failed(result) == []) is agree
    if not agree:
        assert failed(result)[0].startswith("gradient of a in float32, blocks.0.attention.")
        assert "training loss, the step that differs most" not in failed(result)  # which alone would have passed it


def test_learning_that_differs_is_caught(config, monkeypatch):
    """Right gradients at the first step, and a loss curve that seeds do not explain."""
    calls = []

    def loss(*arguments, **options):
        calls.append(1)
        return kernels.reference.linear_cross_entropy(*arguments, **options) * (1 if len(calls) <= 1 else 3)

    monkeypatch.setitem(backends._NAMESPACES, "torch", namespace(linear_cross_entropy=loss))
    said = failed(compare("torch", "eager", config(), seeds=2, announce=quiet))
    assert not any("float32" in what for what in said)
    assert {what.split(",")[0] for what in said} >= {"training loss", "gradient norm", "validation loss"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_a_number_never_agrees(value):
    assert not Check("x", value, 1.0).passed and not Check("x", value, value).passed
    assert not Check("x", 1.0, float("nan")).passed
    assert Check("x", 0.0, 0.0).passed


def test_a_step_that_both_skip_is_no_difference_and_one_that_one_skips_is():
    a, b = np.random.default_rng(0).normal(size=(2, 3, 5))
    a[1, 2] = b[1, 2] = np.inf
    assert _seed_check("x", a, a).passed and not _seed_check("x", a, a + 9).passed
    a[0, 0] = np.nan
    assert not _seed_check("x", a, b).passed


def test_the_gradient_of_a_key_bias_is_held_absolutely(config):
    result = compare("eager", "torch", config(), seeds=2, announce=quiet)
    keys = [error for error in result.errors if error.parameter.endswith("key.bias")]
    assert len(keys) == 2 and all(error.largest == 1.0 and error.a < 1e-7 for error in keys)
    others = [error for error in result.errors if error.parameter.endswith("query.bias")]
    assert len({error.largest for error in others}) == 1 and others[0].largest < 1.0


def test_everything_is_written(config, tmp_path):
    settings = config(seed=5)
    result = compare("eager", "torch", settings, seeds=3, announce=quiet)
    (tmp_path / "out").mkdir()
    write(result, "eager", "torch", settings, tmp_path / "out")
    with (tmp_path / "out" / "compare.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["seed"], row["step"]) for row in rows[5:7]] == [("5", "6"), ("6", "1")] and len(rows) == 18
    assert float(rows[7]["loss_b"]) == pytest.approx(result.losses[1][1, 1], rel=1e-8)
    assert float(rows[7]["grad_norm_a"]) == pytest.approx(result.norms[0][1, 1], rel=1e-8)
    summary = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert summary["seeds"] == [5, 6, 7] and all(check["passed"] for check in summary["checks"])
    assert len((tmp_path / "out" / "gradients.csv").read_text().splitlines()) == 1 + len(result.errors)
    assert (tmp_path / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_has_a_status(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["compare", "--a", "eager", "--b", "torch", "--preset", "tiny", "--data", str(text), "--steps", "1"]
    command += ["--seeds", "2", "--device", "cpu"]
    __main__.main(command)
    said = capsys.readouterr().out
    assert "DIFFERS" not in said and "runs/compare-1" in said and "seed 1338, torch" in said
    monkeypatch.setitem(backends._NAMESPACES, "torch", norm_off_by(1.01))
    with pytest.raises(UserError, match="eager and torch do not agree: gradient of b in float32, "):
        commands.run_compare(command[1:])
    assert "DIFFERS" in capsys.readouterr().out and Path("runs/compare-2/compare.json").is_file()


def test_the_command_leaves_dropout_out(text, tmp_path, monkeypatch):
    """The masks of two backends differ, and so would their losses, with nothing wrong."""
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(commands.compare, "compare", lambda a, b, settings, seeds: seen.append(settings) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        commands.run_compare(["--a", "eager", "--preset", "shakespeare", "--data", str(text), "--device", "cpu"])
    assert preset("shakespeare").dropout > 0 and [settings.dropout for settings in seen] == [0.0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--seeds", "1"], "at least 2"),
        (["--seeds", "-3"], "at least 2"),
        (["--steps", "0"], "max_steps must be at least 1"),
        (["--steps", "-1"], "max_steps must be at least 1"),
        (["--a", "cuda"], "unknown kernels 'cuda'"),
        (["--b", "softmax=torch"], "unknown op 'softmax'"),
        (["--preset", "huge"], "unknown preset 'huge'"),
        (["--data", "missing.txt"], "missing.txt"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--out", "taken"], "taken is not empty"),
    ],
)
def test_wrong_options(tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    Path("taken").mkdir()
    Path("taken/file").write_text("")
    with pytest.raises(UserError, match=said):
        commands.run_compare(["--a", "eager", "--preset", "tiny", "--data", "pydocs", "--device", "cpu", *arguments])
    assert not list(Path().glob("runs/*"))
