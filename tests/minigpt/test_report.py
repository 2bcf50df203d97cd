"""What a run writes down: every step once, in order, and never lost."""

import csv
import io
import os

import pytest
import torch
from rich.console import Console

from minigpt import report
from minigpt.report import COLUMNS, Display, Measures, Metrics

CPU = torch.device("cpu")


def rows(path):
    with path.open(newline="") as file:
        return [(row["step"], row["train_loss"]) for row in csv.DictReader(file)]


def test_measures_come_in_order_and_all_of_them():
    measures = Measures(CPU)
    for value in range(3):
        measures.add(torch.tensor([value, 0.5]))
    assert measures.take() == [[0.0, 0.5], [1.0, 0.5], [2.0, 0.5]] and measures.take() == []
    measures.add(torch.tensor([3.0, 0.25]))
    assert measures.take(everything=True) == [[3.0, 0.25]]


@pytest.mark.gpu
def test_measures_come_in_order_from_a_gpu_too():
    measures, found = Measures(torch.device("cuda")), []
    for value in range(10):
        measures.add(torch.tensor([float(value)], device="cuda"))
        if value % 3 == 0:
            found += measures.take()
    assert found + measures.take(everything=True) == [[float(value)] for value in range(10)]


@pytest.fixture
def five(tmp_path):
    """A metrics.csv of five steps."""
    metrics = Metrics(tmp_path / "metrics.csv")
    metrics.write([{"step": step, "train_loss": 1.0 / step} for step in range(1, 6)])
    metrics.close()
    return metrics.path


def test_metrics_continue_after_the_step_of_the_checkpoint(five):
    metrics = Metrics(five, step=3)
    metrics.write([{"step": 4, "train_loss": 9.0}])
    metrics.close()
    assert metrics.kept == 3
    assert rows(five) == [("1", "1"), ("2", "0.5"), ("3", "0.333333333"), ("4", "9")]


def test_a_loss_comes_back_to_the_last_bit(tmp_path):
    values = torch.rand(1000).mul(10).tolist()
    metrics = Metrics(tmp_path / "metrics.csv")
    metrics.write([{"step": step, "train_loss": value} for step, value in enumerate(values, 1)])
    metrics.close()
    assert torch.tensor([float(loss) for _, loss in rows(metrics.path)]).tolist() == values


@pytest.mark.parametrize("cut", range(1, 20))
def test_a_row_that_was_cut_off_is_left_out(five, cut):
    """A killed process or a full disk ends a file anywhere."""
    five.write_bytes(five.read_bytes()[:-cut])
    metrics = Metrics(five, step=4)
    metrics.close()
    whole = [("1", "1"), ("2", "0.5"), ("3", "0.333333333"), ("4", "0.25")]
    assert rows(five) == whole[: metrics.kept] and metrics.kept >= 3


@pytest.mark.parametrize("damage", [b"\x00" * 40, b"\xff\xfe\x80\n", b"1,1,,,,,\r\n", b"six,,,,,,\r\n"])
def test_rows_after_damage_are_left_out(five, damage):
    lines = five.read_bytes().splitlines(keepends=True)
    five.write_bytes(b"".join([*lines[:3], damage, *lines[3:]]))
    metrics = Metrics(five, step=5)
    metrics.close()
    assert metrics.kept == 2 and rows(five) == [("1", "1"), ("2", "0.5")]


def test_a_kill_while_the_rows_are_written_again_loses_none(five, monkeypatch):
    def kill(*_):
        raise KeyboardInterrupt

    for module, name in ((os, "replace"), (report.storage, "sync")):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, name, kill)
            Metrics(five, step=3)
        assert len(rows(five)) == 5


def test_columns_are_those_that_are_promised(five):
    assert five.read_text().splitlines()[0] == ",".join(COLUMNS)


def shown(monkeypatch, *, terminal, **values):
    """What a display says after ten minutes, at step 100 of 1000."""
    now = [0.0]
    monkeypatch.setattr(report.time, "monotonic", lambda: now[0])
    console = Console(file=io.StringIO(), force_terminal=terminal, width=150)
    display = Display(console, 1000)
    with display.running(0):
        now[0] = 600.0
        display.update(100, 2.34567, 12345.6, **values)
    return console.file.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_the_display_says_how_it_goes(monkeypatch, terminal):
    said = shown(monkeypatch, terminal=terminal, mfu=41.234, memory=12_345_678_901)
    assert "loss 2.3457  12,346 tokens/s  MFU 41.2%  12.3 GB" in said and "100/1000" in said
    assert ("1 h 30 min left" in said) is not terminal  # the bar has columns for time
    said = shown(monkeypatch, terminal=terminal, mfu=None, memory=None)
    assert "MFU" not in said and "GB" not in said
