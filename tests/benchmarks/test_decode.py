"""Generation: what is right is timed, what writes other tokens is not, and what a step reads."""

import pytest
import torch

import benchmarks.__main__
from benchmarks import decode, machine, pictures, report, results, timing
from benchmarks.decode import PLAIN, Configuration, Drawn
from minigpt import backends, config, graphs
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
    ids, values, edges = torch.tensor([[1, 2], [3, 4]]), torch.zeros(2, 2), torch.full((2, 2), 0.1)
    truth = Drawn(ids, values, edges)
    assert decode.judge(truth, Drawn(ids, values + 2e-4, edges))["status"] == "untimed"
    assert "other tokens" in decode.judge(truth, Drawn(ids.t(), values, edges))["reason"]
    for off in (4e-4, float("nan")):
        assert "0.0003 is allowed" in decode.judge(Drawn(ids, values + off, edges), truth)["reason"]


def test_a_number_between_two_tokens_may_draw_either():
    """The rest of that row is another text, and is not looked at; all other rows are."""
    ids = torch.arange(64 * 48).view(64, 48)
    truth = Drawn(ids, torch.zeros(64, 48), torch.full((64, 48), 0.1))
    found = Drawn(*(part.clone() for part in truth))
    found.ids[3, 20:] += 1
    found.logprobs[3, 20:] = -9.0
    for side in (found, truth):
        assert "other tokens than torch without cache, from number 21 on" in decode.judge(found, truth)["reason"]
        side.edges[3, 20] = 1e-6
    assert decode.judge(found, truth)["status"] == decode.judge(truth, found)["status"] == "untimed"
    found.ids[5, 47] += 1  # and one that no rounding explains
    assert "from number 48 on" in decode.judge(found, truth)["reason"]


def test_too_little_that_can_be_judged_is_wrong():
    truth = Drawn(torch.zeros(1, 9, dtype=torch.int64), torch.zeros(1, 9), torch.full((1, 9), 1e-6))
    found = truth._replace(ids=truth.ids + (torch.arange(9) >= 4))
    assert "most tokens are others" in decode.judge(found, truth)["reason"]
    assert decode.judge(truth._replace(ids=truth.ids + (torch.arange(9) >= 5)), truth)["status"] == "untimed"


def test_edges_are_how_far_a_draw_is_from_the_next_token(monkeypatch):
    """A draw moved by more than that gives another token, and by less the same one."""
    torch.manual_seed(0)
    numbers = decode.sampling.Uniforms.next
    found = decode.drawn(made(), Configuration("torch"), 3, CPU)
    for part, same in ((0.99, True), (1.01, False)):
        others = []
        for sign in (-1, 1):
            moved = found.edges[:, 0] * part * sign
            monkeypatch.setattr(decode.sampling.Uniforms, "next", lambda self, moved=moved: numbers(self) + moved)
            torch.manual_seed(0)
            others.append(decode.drawn(made(), Configuration("torch"), 3, CPU).ids[:, 0])
        kept = (others[0] == found.ids[:, 0]) & (others[1] == found.ids[:, 0])
        assert kept.all() if same else not kept.any()


def test_the_longest_block_and_one_row_come_first():
    assert decode.cases([64, 256], [64, 1]) == [(256, 1), (256, 64), (64, 1), (64, 64)]


def test_a_run_that_is_ended_leaves_what_it_has(tmp_path, monkeypatch):
    """The rows of whole cases, those of this one that were timed so far, and what was yet to be timed."""
    inner = timing.interleaved

    def ended(timers, rounds, seconds, news=None):
        samples, failed = inner(timers, rounds, seconds=seconds)
        if news is None or next(iter(timers.values())).batch == 1:  # the ceilings, and the first case
            return samples, failed
        news({PLAIN: samples[PLAIN]})
        raise KeyboardInterrupt

    monkeypatch.setattr(timing, "interleaved", ended)
    argv = ["decode", "--preset", "tiny", "--block", "4", "--batch", "2", "1", "--kernels", "torch", "--rounds", "6"]
    arguments = benchmarks.__main__.parser().parse_args([*argv, "--out", str(tmp_path)])
    with pytest.raises(KeyboardInterrupt):
        arguments.run(arguments)
    (path,) = tmp_path.rglob("*.json")
    found = {(row["batch"], row["configuration"]): row["status"] for row in results.load(path)["rows"]}
    assert [found[1, name] for name in (PLAIN, "torch")] == ["ok", "ok"]
    assert [found[2, name] for name in (PLAIN, "torch")] == ["ok", "untimed"]


@pytest.mark.parametrize(("batch", "lengths"), [(1, [1]), (2, [1, 8]), (3, [1, 4, 8]), (64, list(range(1, 9)))])
def test_prompts_of_many_rows_have_few_lengths(batch, lengths, monkeypatch):
    """Each costs the generation without a cache, which the others are held to, a forward pass for every token."""
    given = []
    monkeypatch.setattr(decode, "_steps", lambda model, kind, prompts, device, **_: given.append(prompts) or iter(()))
    with pytest.raises(TypeError, match="missing"):  # for want of a step
        decode.drawn(made(), Configuration("torch"), batch, CPU)
    assert sorted({len(prompt) for prompt in given[0]}) == lengths and len(given[0]) == batch


def test_a_step_that_cannot_be_captured_is_an_error(monkeypatch):
    """Not a row that is left out, as one on a machine without a GPU is."""

    def broken(*_):
        raise graphs.CaptureFailed("--cuda-graph cannot capture this step (operation not permitted)")

    monkeypatch.setattr(decode.context, "step", broken)
    (row,) = measured([Configuration("torch")])
    assert row["status"] == "error" and "cannot capture this step" in row["reason"]


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
