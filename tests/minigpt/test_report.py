"""What a run writes down: every step once, in order, and never lost."""

import csv
import io
import os

import pytest
import torch
from rich.console import Console

from minigpt import report
from minigpt.report import COLUMNS, Clock, Display, Measures, Metrics

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


class Gpu:
    """A GPU and its host: when it is on the host, and when the GPU will have done what it was asked for, in seconds."""

    def __init__(self):
        self.now = self.done = 0.0

    def launch(self, *, host, gpu):
        self.now += host
        self.done = max(self.now, self.done) + gpu

    def wait(self, until=None):
        self.now = max(self.now, self.done if until is None else until)

    def event(self, *, enable_timing=False):
        return Event(self, enable_timing)


class Event:
    def __init__(self, gpu, timed):
        self.gpu, self.timed = gpu, timed

    def record(self):
        self.at = max(self.gpu.now, self.gpu.done)

    def synchronize(self):
        self.gpu.wait(self.at)

    def elapsed_time(self, end):
        assert self.timed and end.timed and max(self.at, end.at) <= self.gpu.now  # CUDA raises otherwise
        return 1000 * (end.at - self.at)


@pytest.fixture
def gpu(monkeypatch):
    gpu = Gpu()
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: gpu.wait())
    monkeypatch.setattr(report.time, "perf_counter", lambda: gpu.now)
    return gpu


@pytest.mark.parametrize(("host", "device"), [(0.001, 0.5), (0.5, 0.001)], ids=["the GPU", "the host"])
def test_a_speed_is_of_what_a_gpu_has_done(gpu, host, device):
    """Half a second a step, whichever of the two is the slower one."""
    clock, rates = Clock(torch.device("cuda")), []
    for _ in range(2):
        gpu.launch(host=9.0, gpu=9.0)  # an evaluation
        clock.start()
        for step in range(1, 31):
            gpu.launch(host=host, gpu=device)
            if step % 10 == 0:
                rates.append(clock.rate_now(100 * step))
        clock.stop(3000)
        assert clock.rate == pytest.approx(200, rel=0.01)
    assert rates[0] is None and rates[1:] == pytest.approx([200] * 5, rel=0.01)


def test_on_a_cpu_all_is_done_when_it_is_asked(gpu):
    clock = Clock(CPU)
    clock.start()
    assert clock.rate is None and clock.rate_now(0) is None
    gpu.now = 2.0
    assert clock.rate_now(100) == 50
    clock.stop(100)
    clock.start()
    gpu.now = 3.0
    assert clock.rate_now(0) == clock.rate == 50 and clock.rate_now(50) == 50


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
    assert metrics.missing == ""
    assert rows(five) == [("1", "1"), ("2", "0.5"), ("3", "0.333333333"), ("4", "9")]


def test_a_loss_comes_back_to_the_last_bit(tmp_path):
    values = torch.rand(1000).mul(10).tolist()
    metrics = Metrics(tmp_path / "metrics.csv")
    metrics.write([{"step": step, "train_loss": value} for step, value in enumerate(values, 1)])
    metrics.close()
    assert torch.tensor([float(loss) for _, loss in rows(metrics.path)]).tolist() == values


@pytest.mark.parametrize("cut", range(1, 25))
def test_a_row_that_was_cut_off_is_left_out(five, cut):
    """A killed process or a full disk ends a file anywhere, within its last number too."""
    five.write_bytes(five.read_bytes().replace(b",,,,,\r\n", b",,,,,123.5\r\n")[:-cut])
    metrics = Metrics(five, step=4)
    metrics.close()
    whole = [("1", "1"), ("2", "0.5"), ("3", "0.333333333"), ("4", "0.25")]
    kept = 3 if cut > len("\n5,0.2,,,,,123.5\r\n") else 4  # the end of line 4 too
    assert rows(five) == whole[:kept] and five.read_text().count("123.5\n") == kept
    assert metrics.missing == ("" if kept == 4 else "4")


@pytest.mark.parametrize(
    ("damage", "lost"),
    [(b"\x00" * 40, "3"), (b"\xff\xfe\x80\n", ""), (b"1,1,,,,,\r\n", ""), (b"six,,,,,,\r\n", ""), (b"2.5,", "3")],
    ids=["zeros", "no text", "a step twice", "words", "a line cut and another after it"],
)
def test_rows_around_damage_stay(five, damage, lost):
    lines = five.read_bytes().splitlines(keepends=True)
    five.write_bytes(there := b"".join([*lines[:3], damage, *lines[3:]]))
    metrics = Metrics(five, step=5)
    metrics.close()
    assert five.read_bytes() == b"".join(line for line in lines if not lost or not line.startswith(lost.encode()))
    assert metrics.missing == lost
    aside = five.with_name("metrics.csv.damaged")
    assert metrics.aside == aside and aside.read_bytes() == there


@pytest.mark.parametrize(
    ("keep", "missing"),
    [
        ([], "1 to 5"),
        ([0], "1 to 5"),
        ([1, 2, 3, 4, 5], ""),
        ([0, 4, 5], "1 to 3"),
        ([0, 1, 3, 5], "2, 4"),
        ([0, 1], "2 to 5"),
    ],
    ids=str,
)
def test_steps_that_are_not_there_are_named_and_the_others_stay(five, keep, missing):
    """Line 0 is the header. What is whole is nothing to be set aside."""
    lines = five.read_bytes().splitlines(keepends=True)
    five.write_bytes(b"".join(lines[number] for number in keep))
    metrics = Metrics(five, step=5)
    metrics.write([{"step": 6, "train_loss": 0.5}])
    metrics.close()
    assert metrics.missing == missing and metrics.aside is None
    kept = [str(number) for number in keep if number]
    assert [step for step, _ in rows(five)] == [*kept, "6"]


def test_many_gaps_are_not_all_named(five):
    metrics = Metrics(five)
    metrics.write([{"step": step, "train_loss": 1.0} for step in range(1, 100, 9)])
    metrics.close()
    assert Metrics(five, step=100).missing == "2 to 9, 11 to 18, 20 to 27 and others"


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
