"""A step as a CUDA graph: the same training; on a CPU with a stand-in that replays what a graph would."""

import gc
from pathlib import Path

import pytest
import torch
from training_runs import losses, rows

from minigpt import graphs, plots
from minigpt.errors import UserError
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
    def capture(work):
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


def test_a_capture_that_fails_is_one_line(monkeypatch):
    class Failing:
        def __init__(self, graph, *, capture_error_mode):
            assert capture_error_mode == "thread_local"  # what other threads do, as pinning memory, must not end it

        def __enter__(self):
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", Failing)
    with pytest.raises(UserError, match=r"this step \(operation not permitted.*capturing\): leave it out"):
        graphs.capture(lambda: torch.ones(2))


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize(
    "options",
    [{}, {"grad_accumulation": 2, "dtype": "bf16"}, {"dtype": "fp16"}, {"checkpoint_activations": True}],
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
