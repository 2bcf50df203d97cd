"""The cold start: a process with empty caches tells its parts; without a GPU the kernels are compiled alone."""

import pytest
import torch

import benchmarks.__main__
from benchmarks import report, results, start
from minigpt.errors import UserError


def told(**more) -> dict:
    return dict.fromkeys(start.PARTS, 1000.0) | {"kernels": 7} | more


def test_a_row_is_the_middle_of_whole_starts(monkeypatch):
    answers = iter([told(), told(first_step=9000.0), told(first_step=4000.0)])
    monkeypatch.setattr(start, "_process", lambda words: next(answers))
    row = start.measure("tiny", "triton", ["triton"], 3)
    assert row["samples_ms"] == [3000.0, 11000.0, 6000.0] and row["median_ms"] == 6000.0
    assert row["first_step_ms"] == 4000.0 and row["kernels"] == 7


def test_what_fails_is_a_row(monkeypatch):
    def fail(words):
        raise RuntimeError("status 1: no kernel")

    monkeypatch.setattr(start, "_process", fail)
    assert start.measure("tiny", "triton", ["triton"], 3)["status"] == "error"
    with pytest.raises(RuntimeError, match="unknown preset 'nothing'"):
        monkeypatch.undo()
        start._process(["nothing", "torch"])


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_the_command(tmp_path, monkeypatch, capsys):
    """The processes are real: one compiles the kernels of a tiny step, one trains it on the CPU."""
    words = ["start", "--preset", "tiny", "--rounds", "1", "--rung", "torch", "triton", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["benchmarks", *words])
    benchmarks.__main__.main()
    (path,) = tmp_path.rglob("*.json")
    document = results.load(path)
    assert [row["status"] for row in document["rows"]] == ["skipped", "ok"]
    row = document["rows"][1]
    assert row["arch"] == "sm_90" and 5 <= row["kernels"] <= 20 and row["second_step_ms"] == 0.0
    assert row["first_step_ms"] > 50 * row["kernels"]  # nothing came out of a cache
    text = report.markdown(document)
    assert "compilation alone for sm_90" in text and "needs one" in text
    monkeypatch.setattr("sys.argv", ["benchmarks", "start", "--arch", "sm_1"])
    with pytest.raises(UserError, match="unknown architecture 'sm_1'"):
        benchmarks.__main__.main()
    found = start._process(["tiny", "torch"])
    assert found["kernels"] == 0 and min(found[part] for part in start.PARTS) > 0
