"""A step as a CUDA graph: the same training; on a CPU with a stand-in that replays what a graph would."""

import functools
import gc
import weakref
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from training_runs import losses, rows

from minigpt import cache, checkpoint, graphs, plots
from minigpt.config import parse
from minigpt.errors import UserError
from minigpt.learning import Learner
from minigpt.trainer import train


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take longer than the runs."""
    monkeypatch.setattr(plots, "curves", lambda *_, **__: None)


class StandIn:
    """A graph that runs its work anew at each replay, on whatever lies where the captured work had its inputs."""

    replays = 0

    def __init__(self, work):
        self.work, self.measured = work, torch.full((2,), -1.0)

    def replay(self):
        type(self).replays += 1
        self.measured.copy_(self.work())


@pytest.fixture
def stand_in(monkeypatch):
    def capture(work, _):
        graph = StandIn(work)
        return graph, graph.measured

    monkeypatch.setattr(StandIn, "replays", 0)
    monkeypatch.setattr(graphs, "check", lambda *_: None)
    monkeypatch.setattr(graphs, "beside", lambda work: work())
    monkeypatch.setattr(graphs, "capture", capture)


@pytest.mark.parametrize("options", [{}, {"grad_accumulation": 3, "dropout": 0.1}, {"dtype": "fp16"}], ids=str)
def test_replays_train_on_the_data_and_with_the_rate_of_their_step(small, stand_in, options):
    whole = train(small(out=Path("whole"), **options))
    graphed = train(small(out=Path("graphed"), cuda_graph=True, **options))
    assert StandIn.replays == 12 - graphs.WARM_UP
    assert [row["learning_rate"] for row in rows(Path("whole"))] == [r["learning_rate"] for r in rows(Path("graphed"))]
    assert losses(Path("graphed")) == pytest.approx(losses(Path("whole")), abs=1e-5)
    assert graphed["val_loss"] == pytest.approx(whole["val_loss"], abs=1e-5)
    assert len(set(losses(Path("graphed")))) == 12


@pytest.mark.parametrize("batch_size", [1, 3])
def test_warm_up_and_capture_work_at_the_same_place(small, stand_in, monkeypatch, batch_size):
    """A kernel that another alignment or other strides specialise anew cannot be compiled in a capture."""
    loss, seen = Learner.loss, []

    def noting(self, *batch):
        seen.append([(tensor.data_ptr(), tensor.stride()) for tensor in batch])
        return loss(self, *batch)

    monkeypatch.setattr(Learner, "loss", noting)
    train(small(out=Path("r"), cuda_graph=True, batch_size=batch_size))
    assert len(seen) == 12 and all(place == seen[0] for place in seen)


def test_a_compiled_model_is_compiled_once(small, stand_in, monkeypatch):
    """In the capture it could not be: Dynamo asks for the state of the GPU's random generator."""
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    with torch._dynamo.config.patch(error_on_recompile=True):
        train(small(out=Path("r"), cuda_graph=True, compile=True))
    assert counter.frame_count == 1 and StandIn.replays == 12 - graphs.WARM_UP


@pytest.mark.parametrize(("eval_interval", "log_interval"), [(5, 1), (3, 2), (100, 100)])
def test_warm_up_and_capture_are_not_timed(small, stand_in, capsys, eval_interval, log_interval):
    """Nor where an evaluation comes in between."""
    train(small(out=Path("r"), cuda_graph=True, eval_interval=eval_interval, log_interval=log_interval))
    steps = 12 - graphs.WARM_UP - 1
    assert checkpoint.load(Path("r/last")).state["progress"]["train_tokens"] == steps * 4 * 16
    assert "evaluation, saving and the first 4 steps of each session left out" in capsys.readouterr().out
    told = [int(row["step"]) for row in rows(Path("r")) if row["tokens_per_second"]]
    assert told and min(told) > 4 and max(told) == 12


def test_a_run_that_is_warm_up_alone_has_no_speed(small, stand_in):
    assert train(small(out=Path("r"), cuda_graph=True, max_steps=4))["tokens_per_second"] is None
    assert train(parse(["--resume", "r", "--max-steps", "8"]))["tokens_per_second"] is None
    assert train(parse(["--resume", "r", "--max-steps", "13"]))["tokens_per_second"] > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "--cuda-graph needs a GPU, and this runs on cpu: leave it out"),
        ({"device": "gpu"}, "cannot capture --checkpoint-activations with dropout.*take --dropout 0"),
    ],
    ids=str,
)
def test_what_cannot_be_captured_is_told(small, options, said):
    config = small(cuda_graph=True, checkpoint_activations=True, dropout=0.1)
    with pytest.raises(UserError, match=said):
        graphs.check(config, torch.device("cuda" if options else "cpu"))
    with pytest.raises(UserError, match="needs a GPU"):
        train(config)
    assert not Path("runs").exists()


@pytest.fixture
def streams():
    """The stream that work goes to."""
    return ["first"]


@pytest.fixture
def failing(monkeypatch, streams):
    """Captures in which the calls of these names raise these errors, as the calls of a GPU that cannot."""

    def let(**errors):
        def call(name):
            if name in errors:
                raise errors.pop(name)

        class Graph:
            def __init__(self):
                call("make")

        class Capture:
            def __init__(self, graph, *, stream, capture_error_mode):
                assert stream == "the side of 3"  # of the device that work is on, whichever came first
                assert capture_error_mode == "thread_local"  # what other threads do, as pinning memory, must not end it

            def __enter__(self):
                self.before, streams[0] = streams[0], "capturing"
                call("begin")

            def __exit__(self, *_):
                call("end")  # where it raises, PyTorch's too leaves the stream as it is
                streams[0] = self.before

        monkeypatch.setattr(graphs, "check", lambda *_: None)
        monkeypatch.setattr(graphs, "beside", lambda work: work())
        monkeypatch.setattr(graphs, "_side", lambda device: f"the side of {device}")
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", Capture)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams[0])
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: streams.__setitem__(0, stream))
        return lambda: call("work")

    return let


def test_a_device_has_one_stream_to_warm_up_on(monkeypatch):
    """Each one keeps the memory of what ran on it."""

    class Stream:
        def __init__(self, device):
            self.device, self.waited = device, []

        def wait_stream(self, other):
            self.waited.append(other)

    first, on, used = Stream(None), [0], []
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: on[0])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: first)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: used.append(stream) or nullcontext())
    monkeypatch.setattr(graphs, "_side", functools.cache(graphs._side.__wrapped__))
    for on[0] in (0, 1, 0, 0, 1):
        assert graphs.beside(lambda: "done") == "done"
    assert [stream.device for stream in used] == [0, 1, 0, 0, 1] and len(set(used)) == 2
    assert first.waited == used and used[0].waited == [first] * 3 and used[1].waited == [first] * 2


REASON = RuntimeError("operation not permitted when stream is capturing\nand more")
AFTER = RuntimeError("operation failed due to a previous error during capture")


@pytest.mark.parametrize(
    "errors",
    [{"make": REASON}, {"begin": REASON}, {"end": REASON}, {"work": REASON}, {"work": REASON, "end": AFTER}],
    ids="+".join,
)
def test_a_capture_that_fails_is_one_line(failing, streams, errors):
    """With the reason of the error that came first: after one in a capture, its end fails too. What is done next goes
    where it went before."""
    work = failing(**errors)
    said = r"this step \(operation not permitted.*capturing\): train without --cuda-graph$"
    with pytest.raises(graphs.CaptureFailed, match=said) as told:
        graphs.capture(work, "train without --cuda-graph")
    assert told.value.__cause__ is REASON and streams == ["first"]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), MemoryError(), KeyboardInterrupt()], ids=repr)
def test_what_is_no_fault_of_the_capture_stays_what_it_is(failing, streams, error):
    for errors in ({"work": error}, {"work": error, "end": AFTER}):
        with pytest.raises(type(error)) as raised:
            graphs.capture(failing(**errors), "train without --cuda-graph")
        assert raised.value is error and streams == ["first"]


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError, KeyboardInterrupt])
def test_nothing_holds_what_a_failed_capture_had(failing, kind, ends):
    """Smaller batches are tried next, and need its memory."""
    failing(**({} if ends else {"end": RuntimeError("failed due to a previous error")}))
    held = weakref.WeakSet()

    def work():
        activations = torch.empty(1)
        held.add(activations)
        raise kind("full")

    gc.disable()  # which finds cycles, at a time of its own
    try:
        graphs.capture(work, "train without --cuda-graph")
    except (UserError, kind) as error:
        assert isinstance(error, kind if kind is not RuntimeError else UserError) and len(held) == 1
    finally:
        gc.enable()
    assert not held


def test_a_training_whose_step_cannot_be_captured(small, failing, call):
    failing(end=REASON)
    config = small(out=Path("r"), cuda_graph=True)
    status, _, stderr = call(lambda _: train(config))
    assert status == 1 and stderr == (
        "error: --cuda-graph cannot capture this step (operation not permitted when stream is capturing): "
        "train without --cuda-graph\n"
    )
    assert train(parse(["--resume", "r", "--no-cuda-graph"]))["steps"] == 12


class OnAGpu(torch.Tensor):
    """One on a CPU that says otherwise."""

    device = torch.device("cuda")


def test_a_generation_whose_step_cannot_be_captured(failing, monkeypatch):
    failing(begin=REASON)
    steps = []
    monkeypatch.setattr(cache, "step", lambda *_: steps.append(1))
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    lengths = torch.zeros(2, dtype=torch.int64).as_subclass(OnAGpu)
    with pytest.raises(UserError, match=r"this step \(operation not permitted.*capturing\): say --no-cuda-graph$"):
        cache.GraphedStep(None, SimpleNamespace(lengths=lengths))
    assert len(steps) == 3


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"grad_accumulation": 2, "dtype": "bf16"},
        {"dtype": "fp16"},
        {"checkpoint_activations": True},
        {"compile": True},
        {"batch_size": 1},
    ],
    ids=str,
)
def test_a_captured_step_trains_the_same_on_a_gpu(small, kernels, options):
    for name, graph in (("whole", False), ("graphed", True)):
        train(small(out=Path(name), device="cuda", kernels=kernels, cuda_graph=graph, **options))
        gc.collect()
    assert losses(Path("graphed")) == pytest.approx(losses(Path("whole")), abs=1e-3)


@pytest.mark.gpu
def test_replays_drop_other_activations_each(small):
    """The learning rate is next to nothing, and a batch is the whole text: only dropout makes the losses differ."""
    train(small(out=Path("r"), device="cuda", kernels="triton", cuda_graph=True, dropout=0.5, learning_rate=1e-12,
                min_learning_rate=0.0, batch_size=200))  # fmt: skip
    found = losses(Path("r"))
    assert len(set(found)) == len(found)
