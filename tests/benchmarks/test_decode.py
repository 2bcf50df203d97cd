"""Generation: what is right is timed, what writes other tokens is not, and what a step reads."""

import pytest
import torch

import benchmarks.__main__
from benchmarks import decode, machine, pictures, report, results
from benchmarks.decode import PLAIN, Configuration
from minigpt import backends, config
from minigpt.model import GPT

CPU = torch.device("cpu")
SMALL = config.ModelConfig(vocab_size=30, block_size=8, n_layer=2, n_head=2, n_embd=16)


def made(**options) -> GPT:
    return GPT(config.ModelConfig(**vars(SMALL) | options), backends.resolve("torch", CPU))


def measured(kinds, batch=3):
    return decode.measure(made, "small", batch, kinds, CPU, 6, copy_gbps=10.0)


def test_every_backend_is_held_to_pytorch_without_a_cache():
    names = [kind.name for kind in decode.configurations(["torch", "triton", "torch"])]
    assert names == [PLAIN, "torch", "torch+graph", "triton", "triton+graph"]


def test_rows_of_a_run_on_a_cpu():
    rows = measured(decode.configurations(["torch", "eager", "triton"]))
    found = {row["configuration"]: row for row in rows}
    timed = [name for name, row in found.items() if row["status"] == "ok"]
    assert timed == [PLAIN, "torch", "eager"]
    assert found["torch+graph"]["reason"] == "a CUDA graph needs a GPU" and "interp" in found["triton"]["reason"]
    assert found[PLAIN]["over_plain"] == 1.0 and "gbps" not in found[PLAIN]
    row = found["torch"]
    assert row["tokens_per_second"] == pytest.approx(3 / row["median_ms"] * 1e3, rel=1e-4)
    assert row["gbps"] == pytest.approx((row["weight_bytes"] + row["cache_bytes"]) / row["median_ms"] / 1e6, rel=1e-3)
    assert row["copy_percent"] == pytest.approx(10 * row["gbps"], rel=1e-3)


@pytest.mark.parametrize("slots", [slice(0, 1), slice(3, 4), slice(0, 8)], ids=["first", "fourth", "all"])
@pytest.mark.parametrize("what", ["keys", "values"])
def test_a_cache_that_forgets_gets_no_number(what, slots, monkeypatch):
    """One slot of one block is enough."""
    step = decode.context.step

    def forgetful(model, cache, tokens):
        logits = step(model, cache, tokens)
        getattr(cache, what)[1, :, :, slots] = 0
        return logits

    monkeypatch.setattr(decode.context, "step", forgetful)
    rows = measured([Configuration("torch", cache=False), Configuration("torch")])
    assert [row["status"] for row in rows] == ["ok", "wrong"]
    assert PLAIN in rows[1]["reason"] and "median_ms" not in rows[1]


def test_what_is_wrong():
    ids, values = torch.tensor([[1, 2], [3, 4]]), torch.zeros(2, 2)
    assert decode.judge((ids, values), (ids, values + 2e-4))["status"] == "untimed"
    assert "other tokens" in decode.judge((ids, values), (ids.t(), values))["reason"]
    for off in (4e-4, float("nan")):
        assert "0.0003 is allowed" in decode.judge((ids, values + off), (ids, values))["reason"]


def test_one_that_breaks_is_a_row(monkeypatch):
    monkeypatch.setattr(decode.context, "step", lambda *_: 1 / 0)
    rows = measured([Configuration("torch", cache=False), Configuration("torch")])
    assert [row["status"] for row in rows] == ["ok", "error"] and "division" in rows[1]["reason"]


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_of_a_step(tied):
    """By hand: 12 C^2 and two norms a layer, the last norm, the head; keys and values of half a block."""
    model = made(tied_head=tied, bias=False)
    found = decode.bandwidth(model, 5, 1.0, 1.0)
    assert found["weight_bytes"] == 4 * (2 * (12 * 16**2 + 2 * 16) + 16 + 30 * 16)
    assert found["cache_bytes"] == 4 * 2 * 2 * 16 * 5 * 4.5
    assert found["gbps"] == pytest.approx((found["weight_bytes"] + found["cache_bytes"]) / 1e6, rel=1e-4)


def test_the_command_writes_what_report_reads(tmp_path, capsys, monkeypatch):
    argv = ["decode", "--preset", "tiny", "--block", "4", "--batch", "2", "--kernels", "torch", "--rounds", "6"]
    arguments = benchmarks.__main__.parser().parse_args([*argv, "--out", str(tmp_path)])
    assert arguments.run(arguments) == 0
    (path,) = tmp_path.rglob("*.json")
    document = results.load(path)
    on_gpu = machine.here().type == "cuda"
    assert [row["status"] for row in document["rows"]] == ["ok", "ok", "ok" if on_gpu else "skipped"]
    text = report.markdown(document)
    assert text in capsys.readouterr().out and path.with_suffix(".md").read_text() == text
    assert "**tiny, block 4, batch 2**" in text and "times torch without cache" in text and "a copy moves" in text
    assert ("- torch+graph (tiny, block 4, batch 2): a CUDA graph needs a GPU" in text) != on_gpu
    assert report.title(document) == "decode tiny"
    (drawn,) = pictures.draw(document, path)
    assert drawn.name == f"{path.stem}-tiny-block-4-batch-2.png" and drawn.read_bytes().startswith(b"\x89PNG")
