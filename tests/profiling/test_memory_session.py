"""The GPU's session with a CPU in its place and PyTorch's CUDA calls answered by hand: no GPU has run it."""

import pickle

import pytest
import torch

from kernels import device
from minigpt.config import preset
from profiling import __main__, cuda_rules, estimate, memory_report, memory_session, tracker
from profiling.memory_session import stacks_at_peak

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def _event(action: str, addr: int, size: int, *frames: str) -> dict:
    made = [{"filename": file, "line": 1, "name": name} for file, name in (frame.split(":") for frame in frames)]
    return {"action": action, "addr": addr, "size": size, "frames": made}


TRACE = [
    _event("free_requested", 99, 5),  # from before the history
    _event("alloc", 1, 100, "/p/model.py:forward"),
    _event("alloc", 2, 100, "/p/model.py:forward"),
    _event("alloc", 3, 1000, "/p/loss.py:loss", "/p/train.py:step"),
    _event("free_requested", 3, 1000),
    _event("free_completed", 3, 1000),
    _event("alloc", 3, 900, "/p/late.py:late"),
    _event("alloc", 4, 50),
]


def test_the_stacks_are_those_of_the_peak():
    found = stacks_at_peak(TRACE)
    assert [(row["bytes"], row["count"]) for row in found] == [(1000, 1), (200, 2)]
    assert found[0]["frames"] == ["loss.py:1 loss", "train.py:1 step"]
    assert [row["bytes"] for row in stacks_at_peak([*TRACE, _event("alloc", 5, 60)])] == [900, 200, 110]
    assert stacks_at_peak([]) == []


@pytest.fixture
def gpu(monkeypatch):
    """Answers for what the session asks of torch.cuda; the calls that were made, in order."""
    calls = []

    def answer(name, value=None, of=torch.cuda):
        monkeypatch.setattr(of, name, lambda *args, **kwargs: calls.append(name) or value)

    for name, value in {
        "synchronize": None, "empty_cache": None, "reset_peak_memory_stats": None, "memory_allocated": 1_800_000,
        "max_memory_allocated": 4_000_000, "max_memory_reserved": 5_000_000, "get_device_name": "GPU by hand",
    }.items():  # fmt: skip
        answer(name, value)
    stats = {"requested_bytes.all.peak": 3_800_000, "requested_bytes.all.current": 2_000_000}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: dict(stats))
    clear = lambda: stats.update({"requested_bytes.all.current": 1_700_000})  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", clear, raising=False)
    answer("_record_memory_history", None, torch.cuda.memory)
    answer("_snapshot", {"device_traces": [TRACE]}, torch.cuda.memory)

    def dump(path):
        with open(path, "wb") as file:
            pickle.dump(TRACE, file)

    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", dump)
    return calls


def _config(**changes):
    return preset("tiny", kernels="torch", dtype="fp32", n_layer=1, **changes)


def test_a_session_gives_peaks_stacks_and_a_timeline(gpu, tmp_path):
    found = memory_session.measure(_config(), 1, tmp_path / "new", torch.device("cpu"))
    assert (found["before"], found["allocated"], found["reserved"]) == (1_800_000, 4_000_000, 5_000_000)
    assert (found["requested"], found["cublas"]) == (3_800_000, 300_000)
    assert found["stacks"][0]["bytes"] == 1000 and (tmp_path / "new" / "torch.pickle").is_file()
    phases = list(dict.fromkeys(point[0] for point in found["timeline"]))
    assert phases == ["forward", "backward", "clipping", "AdamW"]
    # the peak is reset after warming up and read after the step, outside of the history, which is turned off again
    order = [gpu.index(name) for name in ("reset_peak_memory_stats", "max_memory_allocated", "_record_memory_history")]
    assert order == sorted(order) and gpu.count("_record_memory_history") == 2


def test_the_timeline_has_what_ops_hold_inside(gpu, monkeypatch):
    """As the estimate's has: by the formulas for PyTorch's ops, and for ours planned for that device."""
    inside = lambda func, *_: 5 * 10**7 if func is torch.ops.aten.native_layer_norm.default else None  # noqa: E731
    monkeypatch.setattr(cuda_rules, "workspace", inside)
    planned = []
    monkeypatch.setattr(estimate, "Workspaces", lambda *given: planned.append(given) or tracker.Workspaces(*given))
    found = memory_session.measure(_config(), 1, None, torch.device("cpu"))
    (point, *_) = [point for point in found["timeline"] if point[1] == "inside aten.native_layer_norm.default"]
    assert sum(point[2:]) > 5 * 10**7 and planned == [(device.INTERPRETER, cuda_rules.GRANULARITY)]


FULL = [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    MemoryError(),
]


@pytest.mark.parametrize("error", [*FULL, RuntimeError("CUDA error: an illegal memory access")], ids=repr)
def test_what_does_not_fit_is_a_row_that_says_so(gpu, monkeypatch, error):
    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(memory_session, "training_step", full)
    if error in FULL:
        assert memory_session.measure(_config(), 1, None, torch.device("cpu")) == {"error": "out of memory"}
        return
    with pytest.raises(RuntimeError, match="illegal"):
        memory_session.measure(_config(), 1, None, torch.device("cpu"))


def test_the_prediction_stands_beside_the_measurement(gpu, monkeypatch, capsys, tmp_path):
    """The whole command, as on a GPU: the error is estimate / measured - 1."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    measured = memory_session.measure(_config(), 1, None, torch.device("cpu"))
    monkeypatch.setattr(memory_session, "measure", lambda *_: measured)
    arguments = "memory --preset tiny --kernels torch --dtype fp32 --arch sm_90".split()
    page = tmp_path / "page.html"
    monkeypatch.setattr("sys.argv", ["profiling", *arguments, "--html", str(page)])
    with pytest.raises(SystemExit) as left:
        __main__.main()
    out = capsys.readouterr().out
    assert not left.value.code and "Measured beside the estimate" in out and "GPU by hand" in out and "20.0%" in out
    assert "as a GPU did it" in page.read_text() and "loss.py:1 loss" in page.read_text()


def test_the_error_is_of_the_estimate_against_the_measurement():
    """Less what is cuBLAS's, and without what the allocator rounds up."""
    measured = {"requested": 110, "cublas": 10, "allocated": 120, "reserved": 150, "gpu": "G"}
    row = memory_report._measured({"kernels": "torch", "peak": 90, "measured": measured})
    assert row[4] == "-10.0%" and row[7] == "20.0%"
    full = memory_report._measured({"kernels": "torch", "peak": 90, "measured": {"error": "out of memory"}})
    assert len(full) == len(row)


@pytest.mark.gpu
def test_on_a_gpu_the_estimate_is_near():
    config = preset("shakespeare", kernels="torch", dtype="bf16")
    found = memory_session.measure(config, 1, None)
    assert estimate.estimate(config).peak == pytest.approx(found["requested"] - found["cublas"], rel=0.15)
