"""The timers of a GPU with a GPU by hand: calls are counted, and time is what they are said to take."""

import contextlib
import os
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch

from benchmarks import noise, timing


class Device:
    """Answers for what the timers ask of torch.cuda; `now` is in milliseconds."""

    def __init__(self, monkeypatch, call_ms):
        self.now, self.call_ms, self.capturing, self.log = 0.0, call_ms, None, []
        self.stream, self.breaks = Stream(), False
        for name, fake in {
            "Event": lambda enable_timing: Event(self), "synchronize": lambda: None, "CUDAGraph": lambda: Graph(self),
            "stream": lambda stream: contextlib.nullcontext(), "graph": self.capture,
            "_sleep": lambda cycles: self.log.append(("spin", cycles)), "current_stream": lambda: self.stream,
            "set_stream": lambda stream: setattr(self, "stream", stream),
            "set_sync_debug_mode": lambda mode: self.log.append(("debug", mode)),
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, fake)

    @contextlib.contextmanager
    def capture(self, graph, stream, capture_error_mode):
        assert self.capturing is None and capture_error_mode == "relaxed"
        self.capturing, before, self.stream = graph, self.stream, stream
        try:
            yield
        finally:
            self.capturing = None
            if self.breaks:  # the end of the capture fails, and PyTorch's too leaves the stream as it is
                raise RuntimeError("capturing stream has unjoined work")
            self.stream = before

    def call(self):
        """One call of a provider: on the device it takes its time, or is recorded."""
        if self.capturing is not None:
            self.capturing.calls += 1
        else:
            self.now += self.call_ms


class Graph:
    def __init__(self, device):
        self.device, self.calls = device, 0

    def replay(self):
        self.device.log.append(("replay", self.calls))
        self.device.now += self.calls * self.device.call_ms


class Event:
    def __init__(self, device):
        self.device = device

    def record(self):
        self.at = self.device.now

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return end.at - self.at


class Stream:
    def __init__(self):
        self.waited_for = []

    def synchronize(self):
        pass

    def wait_stream(self, other):
        self.waited_for.append(other)


@pytest.fixture
def device(monkeypatch):
    return Device(monkeypatch, call_ms=0.01)


class Calls:
    """Functions for a timer; how many of their outputs were ever alive at a time, and whose they were."""

    def __init__(self, device, count):
        self.device, self.alive, self.most = device, weakref.WeakSet(), 0
        self.functions = [lambda number=number: self.call(number) for number in range(count)]

    def call(self, number):
        self.device.call()
        output = torch.full((2,), float(number), requires_grad=True) * 1.0
        self.alive.add(output)
        self.most = max(self.most, len(self.alive))
        return output


@pytest.mark.parametrize(
    ("call_ms", "count", "calls"), [(0.01, 4, 100), (2.0, 4, 4), (1e-5, 4, 2048), (1e-5, 512, 2048)]
)
def test_a_graph_takes_long_enough_for_its_launch_not_to_count(call_ms, count, calls, monkeypatch):
    device = Device(monkeypatch, call_ms)
    timer = timing.GraphTimer(Calls(device, count).functions, Stream())
    assert timer.calls == calls and timer.sample() == pytest.approx(call_ms)
    assert device.log[-2][0] == "spin" and device.log[-1] == ("replay", calls)


@pytest.mark.parametrize("made", [timing.GraphTimer, timing.EventTimer])
def test_no_output_lies_where_the_one_before_it_lay(made, device):
    calls = Calls(device, 5)
    timer = made(calls.functions, Stream())
    timer.sample()
    assert calls.most >= 5
    assert len(calls.alive) == 0, "memory is given back, but for the answer that is looked at"


@pytest.mark.parametrize("made", [timing.GraphTimer, timing.EventTimer])
def test_what_is_looked_at_is_the_first_ones_answer_and_drags_nothing_along(made, device):
    found = made(Calls(device, 3).functions, Stream()).outputs()
    assert found.tolist() == [0.0, 0.0] and not found.requires_grad
    assert made is timing.EventTimer or device.log[-1][0] == "replay"


def test_events_look_at_an_answer_to_what_was_drawn_last(device):
    """Inputs are drawn on the current stream, and the answer is computed on another."""
    stream = Stream()
    timing.EventTimer(Calls(device, 1).functions, stream).outputs()
    assert len(stream.waited_for) == 1


def test_what_waits_for_the_device_is_timed_by_events(device):
    def reading():
        if device.log and device.log[-1] == ("debug", "error"):
            raise RuntimeError("called a synchronizing CUDA operation")
        device.call()

    timer = timing.cuda_timer([reading] * 3, Stream())
    assert timer.method == "events" and timer.sample() == pytest.approx(0.01) and device.log[-2] == ("debug", "default")


def test_what_cannot_be_captured_is_timed_by_events(device):
    def stubborn():
        if device.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        device.call()

    assert timing.cuda_timer([stubborn] * 3, Stream()).method == "events"

    def greedy():
        raise torch.OutOfMemoryError("too big")

    with pytest.raises(torch.OutOfMemoryError):
        timing.cuda_timer([greedy], Stream())


def test_a_capture_that_cannot_be_ended_does_not_keep_its_stream(device):
    """What is timed next would go there, and inputs be drawn there."""
    device.breaks, before = True, device.stream
    assert timing.cuda_timer(Calls(device, 3).functions, Stream()).method == "events"
    assert device.stream is before


def test_the_hosts_time_is_of_few_enough_calls_for_the_queue(device, monkeypatch):
    calls = Calls(device, 1)
    assert timing.host_microseconds(calls.functions[0]) > 0.0
    assert 3 * 3 < round(device.now / 0.01) <= 1 + 3 * 20


def test_a_process_that_has_to_wait_is_seen(monkeypatch):
    """Every call waits for 20 ms; what happens outside of the samples does not count."""
    waited, clock = [0.0], iter(range(1000))

    def hindered():
        waited[0] += 0.02

    monkeypatch.setattr(timing, "_waited", lambda: waited[0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock) * 0.01)
    timer = timing.CpuTimer(hindered)
    assert timer.calls == 1 and timer.waiting.share == 0.0
    for _ in range(3):
        timer.sample()
        hindered()
    assert timer.waiting.share == pytest.approx(0.06 / 0.09, abs=1e-4)


def test_a_ceiling_is_the_best_of_its_samples_and_sizes(monkeypatch):
    """Samples that a neighbour has made many times as long, most of them, and a large product slower than a small."""
    best = {8: 2.0, 16: 4.0}  # milliseconds
    monkeypatch.setattr(timing, "CPU_SIZES", tuple(best))
    draw = iter([5.0, 9.0, 1.0, 7.0, 3.0] * 100)

    class Hindered:
        def __init__(self, function):
            made = function()
            self.best = best.get(made.shape[0], 10.0)

        def sample(self):
            return self.best * next(draw)

    monkeypatch.setattr(timing, "CpuTimer", Hindered)
    found = timing.ceilings(torch.device("cpu"), [torch.float32], quick=False)
    assert found["copy_gbps"] == pytest.approx(2 * 4 * 2**23 / 10.0 / 1e6, rel=1e-4)
    assert found["matmul_tflops_float32"] == pytest.approx(2 * 16**3 / 4.0 / 1e9, rel=1e-4)


def test_a_thread_that_shares_its_processor_waits():
    """Two processes bound to one processor: each waits about as long as it runs."""
    if not hasattr(os, "sched_setaffinity") or not Path("/proc/self/schedstat").exists():
        assert timing._waited() == 0.0
        return
    there = os.sched_getaffinity(0)
    one = {min(there)}
    other = subprocess.Popen(
        [
            sys.executable,
            "-S",
            "-c",
            f"import os; os.sched_setaffinity(0, {one})\nprint(1, flush=True)\nwhile True: pass",
        ],
        stdout=subprocess.PIPE,
    )
    try:
        other.stdout.read(1)
        os.sched_setaffinity(0, one)
        with (waiting := timing.Waiting()):
            end = time.perf_counter() + 0.3
            while time.perf_counter() < end:
                pass
    finally:
        os.sched_setaffinity(0, there)
        other.kill()
        other.wait()
        other.stdout.close()
    assert waiting.share > noise.WAITED
