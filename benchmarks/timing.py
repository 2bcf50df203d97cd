"""Timing calls: on a GPU with cold caches by CUDA graphs or events, on a CPU by the clock. All times in milliseconds.

A Timer is one variant, ready to run: `sample` gives one time per call. `interleaved` takes samples of several in turns,
so that a clock that drifts, or a neighbour who wakes up, meets them all.
"""

import collections
import contextlib
import functools
import math
import random
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from minigpt import graphs

COLD_FACTOR = 5  # the copies that calls rotate among exceed the L2 cache this many times
LARGEST_L2 = 128 << 20  # bytes, taken where PyTorch does not say how large the cache is
MOST_COPIES = 512
MOST_CALLS = 2048  # in one CUDA graph
GRAPH_MS = 1.0  # a graph is to take so long, so that what its launch costs does not count
LATE_SECONDS = 100e-6
NEWS_SECONDS = 5.0
GPU_SIZES, CPU_SIZES = (4096, 8192, 12288), (512, 1024, 2048)  # of the square products that a ceiling is the best of
CYCLES = 2e9  # a second, of a kernel that spins: no GPU's clock is above that by much


Name = TypeVar("Name", bound=Hashable)


class Late(Exception):
    """Work was still going on when the stream said that it was done: its time would be wrong."""


class Timer(Protocol):
    """One variant, ready to be timed."""

    method: str

    def sample(self) -> float:
        """Milliseconds per call, by one measurement."""

    def outputs(self) -> object:
        """What the first function gives when that which is timed is run once more, inputs as they are now."""


class Waiting:
    """How long threads of this process were ready to run and others ran instead, within blocks it is put around."""

    def __init__(self):
        self.waited, self.seconds = 0.0, 0.0

    def __enter__(self):
        self._before = _waited(), time.perf_counter()

    def __exit__(self, *_):
        self.waited += _waited() - self._before[0]
        self.seconds += time.perf_counter() - self._before[1]

    @property
    def share(self) -> float:
        """Of the blocks' time, all threads together, so that it may be above 1; 0 where the system does not tell."""
        return round(self.waited / self.seconds, 4) if self.seconds else 0.0


def _waited() -> float:
    """Seconds that this process's threads have waited for a processor since they began."""
    total = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # the thread has ended in the meantime
            total += int(path.read_text().split()[1])
    return total / 1e9


@dataclass
class CpuTimer:
    """Calls `function` often enough for one sample to take `target` seconds. Caches are warm: there is one problem."""

    function: Callable[[], object]
    target: float = 2e-3
    method: str = field(default="perf_counter", init=False)
    waiting: Waiting = field(default_factory=Waiting, init=False)

    def __post_init__(self):
        self.function()
        began = time.perf_counter()
        self.function()
        self.calls = max(1, math.ceil(self.target / max(time.perf_counter() - began, 1e-9)))
        self.calls = min(self.calls, 10_000)

    def sample(self) -> float:
        with self.waiting:
            began = time.perf_counter()
            for _ in range(self.calls):
                self.function()
            return (time.perf_counter() - began) * 1e3 / self.calls

    def outputs(self) -> object:
        return self.function()


class GraphTimer:
    """One CUDA graph that calls every function, each on its own copy of the inputs; a sample is one replay.

    A graph that is done in less than GRAPH_MS goes through the functions several times. What the calls return is kept
    for as long as it takes to come round again, or all of them would write to the same memory, which the L2 cache has.
    What autograd runs goes to the stream of its forward pass: `functions` are made on `stream`, which captures too.
    """

    method = "graph"

    def __init__(self, functions: Sequence[Callable[[], object]], stream: torch.cuda.Stream):
        self.functions, self.stream = list(functions), stream
        with torch.cuda.stream(stream):
            for function in self.functions[:2]:
                function()
        self._capture(1)
        start, end = self._replay()
        end.synchronize()
        once = max(start.elapsed_time(end), 1e-6)
        rounds = min(math.ceil(GRAPH_MS / once), MOST_CALLS // len(self.functions))
        if rounds > 1:
            self._capture(rounds)

    def _capture(self, rounds: int) -> None:
        torch.cuda.synchronize()
        self.graph = self.first = None  # gone before the capture of the next
        self.graph = torch.cuda.CUDAGraph()
        self.calls = rounds * len(self.functions)
        kept: collections.deque = collections.deque(maxlen=len(self.functions))
        # relaxed: memory that is got on a stream that is not captured must not end the capture; what was computed there
        # is not in the graph, and found wrong
        with graphs.capturing(self.graph, stream=self.stream, capture_error_mode="relaxed"):
            self.first = detached(self.functions[0]())
            for number in range(1, self.calls):
                kept.append(self.functions[number % len(self.functions)]())
        kept.clear()
        self.graph.replay()
        torch.cuda.synchronize()
        began = time.perf_counter()
        self.graph.replay()
        self.spin = _spin(time.perf_counter() - began)
        torch.cuda.synchronize()

    def _replay(self) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(self.spin)
        start.record()
        self.graph.replay()
        end.record()
        return start, end

    def sample(self) -> float:
        return _elapsed(*self._replay()) / self.calls

    def outputs(self) -> object:
        self.graph.replay()
        torch.cuda.synchronize()
        return self.first


class EventTimer:
    """A pair of events around one call of every function, behind a kernel that spins until the host has queued them.

    Without the spin, a call shorter than its launch would be timed by the host and not by the device.
    """

    method = "events"

    def __init__(self, functions: Sequence[Callable[[], object]], stream: torch.cuda.Stream | None = None):
        self.functions = list(functions)[:64]  # launches beyond about a thousand would wait for the queue
        self.stream = stream or torch.cuda.current_stream()
        with torch.cuda.stream(self.stream):
            for function in self.functions:
                function()
            torch.cuda.synchronize()
            began = time.perf_counter()
            kept = [function() for function in self.functions]
            self.spin = _spin(time.perf_counter() - began)
            del kept
        torch.cuda.synchronize()

    def sample(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self.stream):
            torch.cuda._sleep(self.spin)
            start.record()
            kept = [function() for function in self.functions]  # or all would write to the same memory
            end.record()
        del kept
        return _elapsed(start, end) / len(self.functions)

    def outputs(self) -> object:
        self.stream.wait_stream(torch.cuda.current_stream())  # which may be writing the inputs
        with torch.cuda.stream(self.stream):
            found = detached(self.functions[0]())
        self.stream.synchronize()
        return found


def _spin(queued: float) -> int:
    """Cycles to spin while the host queues what took it `queued` seconds."""
    return int(min(1.5 * queued + 50e-6, 0.5) * CYCLES)


def detached(result: object) -> object:
    """A call's tensors without the graph that made them, and so without what that keeps."""
    if isinstance(result, torch.Tensor):
        return result.detach()
    return tuple(map(detached, result)) if isinstance(result, tuple | list) else result


@functools.cache
def _idle_seconds() -> float:
    """What waiting for an idle device takes: under some drivers more than LATE_SECONDS."""
    taken = []
    for _ in range(20):
        torch.cuda.synchronize()
        began = time.perf_counter()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return sorted(taken)[-5]


def _elapsed(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
    end.synchronize()
    began = time.perf_counter()
    torch.cuda.synchronize()
    milliseconds = start.elapsed_time(end)
    if time.perf_counter() - began > max(LATE_SECONDS, 5 * _idle_seconds(), 0.2e-3 * milliseconds):
        raise Late("work on another stream went on after the timed stream was done")
    return milliseconds


def cuda_timer(functions: Sequence[Callable[[], object]], stream: torch.cuda.Stream) -> Timer:
    """A graph of the calls where they can be captured, else events."""
    if _waits(functions[0], stream):  # a capture that fails may leave the allocator unusable: do not try
        return EventTimer(functions, stream)
    try:
        return GraphTimer(functions, stream)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever keeps a provider from being captured, events do without
        torch.cuda.synchronize()
        return EventTimer(functions, stream)


def _waits(function: Callable[[], object], stream: torch.cuda.Stream) -> bool:
    """Whether a call makes the host wait for the device, as reading a number from it does."""
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        function()  # compilation may wait, and comes once
        torch.cuda.set_sync_debug_mode("error")
        try:
            function()
        except RuntimeError:
            return True
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    return False


def copies_needed(problem_bytes: int, l2: int, free: int) -> int:
    """How many copies of a problem of so many bytes to rotate among; limited by `free` bytes and MOST_COPIES."""
    wanted = math.ceil(COLD_FACTOR * (l2 or LARGEST_L2) / max(1, problem_bytes)) + 1
    return max(1, min(wanted, MOST_COPIES, free // max(1, problem_bytes)))


def host_microseconds(function: Callable[[], object], repeats: int = 3) -> float:
    """What a call costs the host on a GPU, in microseconds: the least of several means, with the queue empty before.

    A mean is over 20 calls, or as many as the device does in 20 ms: a longer queue would be full, and the device timed.
    """
    torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    torch.cuda.synchronize()
    calls = max(3, min(20, int(0.02 / (time.perf_counter() - began))))
    best = math.inf
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            function()
        best = min(best, time.perf_counter() - began)
    torch.cuda.synchronize()
    return best / calls * 1e6


def interleaved(
    timers: dict[Name, Timer], rounds: int, seed: int = 0, seconds: float = math.inf,
    news: Callable[[dict[Name, list[float]]], None] = lambda samples: None,
) -> tuple[dict[Name, list[float]], dict[Name, Exception]]:  # fmt: skip
    """Samples in milliseconds, one per round of each timer, the order drawn anew for each round; and what failed.

    One round before them does not count: it finds clocks low and caches full of something else. Stops early once
    `seconds` have passed and there are samples enough to say anything. A sample that is Late does not count; where a
    third of them are, the timer has failed. `news` is given the samples so far, every NEWS_SECONDS.
    """
    order, draw = list(timers), random.Random(seed)
    samples: dict[Name, list[float]] = {name: [] for name in order}
    failed: dict[Name, Exception] = {}
    late = dict.fromkeys(order, 0)
    began = told = time.perf_counter()
    for number in range(-1, rounds):
        if number >= min(rounds, 6) and time.perf_counter() - began > seconds:
            break
        draw.shuffle(order)
        for name in order:
            if name in failed:
                continue
            try:
                taken = timers[name].sample()
                if number >= 0:
                    samples[name].append(taken)
            except Late as error:  # once, it may have been the host that was late
                late[name] += 1
                if late[name] > max(2, rounds // 3):
                    failed[name] = error
            except Exception as error:  # one variant's failure must not end the others
                failed[name] = error
        if time.perf_counter() - told > NEWS_SECONDS:
            news({name: taken for name, taken in samples.items() if taken and name not in failed})
            told = time.perf_counter()
    for name, taken in samples.items():
        if not taken and name not in failed:
            failed[name] = Late("no sample was in time")
    return {name: taken for name, taken in samples.items() if name not in failed}, failed


# ---------------------------------------------------------------- ceilings


def ceilings(device: torch.device, dtypes: Sequence[torch.dtype], quick: bool) -> dict[str, float]:
    """What this device reaches here and now: copy_gbps by clone, and matmul_tflops_<dtype> of a square product.

    Bytes of a copy are those read and those written. A ceiling is a maximum: the best of all samples, taken in turns,
    and of several sizes, as the largest product is not the fastest everywhere. On a CPU PyTorch's threads are those
    that the rows run over. One that cannot be timed is told and left out; rows that need it have no roofline.
    """
    on_gpu = device.type == "cuda"
    source = torch.randn((1 << 28) if on_gpu else (1 << 23), device=device)
    functions = {("copy_gbps", 0): source.clone}
    work = {("copy_gbps", 0): 2 * source.nbytes / 1e6}  # over milliseconds: GB/s, and TFLOP/s below
    for dtype in dtypes:
        for size in GPU_SIZES if on_gpu else CPU_SIZES:
            key = f"matmul_tflops_{str(dtype).removeprefix('torch.')}", size
            a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
            functions[key] = lambda a=a, b=b: a @ b
            work[key] = 2 * size**3 / 1e9
    timers = {key: EventTimer([function] * 3) if on_gpu else CpuTimer(function) for key, function in functions.items()}
    samples, failed = interleaved(timers, 10 if quick else 30, seconds=3.0 if quick else 10.0)
    for (name, size), error in failed.items():
        print(f"{name}{f' at {size}' if size else ''} was not measured: {error}", flush=True)
    found: dict[str, float] = {}
    for key, taken in samples.items():
        found[key[0]] = max(found.get(key[0], 0.0), work[key] / min(taken))
    return {name: float(f"{value:.6g}") for name, value in found.items()}
