"""A whole training step as one CUDA graph: forward, backward, clipping and optimizer, launched by one call.

A small model keeps a GPU busy for less time than the host needs to launch its kernels one by one; a graph's launches
cost the host nothing. What is captured reads and writes the same addresses each time, so a step's data is copied to
one place, and the learning rate is a tensor.
"""

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .config import TrainConfig
from .errors import UserError

if TYPE_CHECKING:
    from .learning import Data, Learner

WARM_UP = 3
"""Steps that run as they are, before one is captured: they compile kernels and make what is made at first use."""


class CaptureFailed(UserError):
    """Something in a step cannot be captured."""


def check(config: TrainConfig, device: torch.device) -> None:
    """Raise UserError for a step that cannot be captured."""
    if not config.cuda_graph:
        return
    if device.type != "cuda":
        raise UserError(f"--cuda-graph needs a GPU, and this runs on {device}: leave it out")
    if config.checkpoint_activations and config.dropout:
        raise UserError(
            "--cuda-graph cannot capture --checkpoint-activations with dropout, which reads the random generator: "
            "leave out one of the two, or take --dropout 0"
        )


class GraphedStep:
    """Learner.advance, captured at the fourth call and replayed from then on."""

    def __init__(self, learner: "Learner"):
        self._learner = learner
        self._warm = 0
        self._data: Data = []
        self._graph: Any = None
        self._measured = torch.empty(0)

    def __call__(self, data: "Data") -> Tensor:
        """As Learner.advance. Raises CaptureFailed where something in the step cannot be captured."""
        if not self._data:
            # For the warm-up too: for other strides or another alignment the capture would have kernels to compile.
            self._data = [(torch.empty_like(inputs), torch.empty_like(targets)) for inputs, targets in data]
        for kept, new in zip(self._data, data, strict=True):
            for there, here in zip(kept, new, strict=True):
                there.copy_(here)
        if self._warm < WARM_UP:
            self._warm += 1
            return beside(lambda: self._learner.advance(self._data))
        if self._graph is None:
            self._graph, self._measured = capture(
                lambda: self._learner.advance(self._data), "train without --cuda-graph"
            )
        self._graph.replay()
        return self._measured.clone()  # the next replay writes there


def beside(work: Any) -> Tensor:
    """`work` on a stream of its own, as capturing wants it to have been done before."""
    side = _side(torch.cuda.current_device())
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        found = work()
    torch.cuda.current_stream().wait_stream(side)
    return found


@functools.cache
def _side(device: int) -> torch.cuda.Stream:
    """That stream, one for a device: each one has cuBLAS's workspace of its own, and keeps the memory freed on it.

    Captures are there too: PyTorch's own stream for them is one for the process, of whichever device came first.
    """
    return torch.cuda.Stream(device)


class capturing:
    """torch.cuda.graph, with its options. Afterwards the current stream is the one before, whatever has failed: a
    capture that cannot be ended leaves its own.

    No generator: since Python 3.12 one that another error leaves is a cycle with the frame that has the first.
    """

    def __init__(self, graph: torch.cuda.CUDAGraph, **options: Any):
        self._before = torch.cuda.current_stream()
        self._capture = torch.cuda.graph(graph, **options)

    def __enter__(self) -> None:
        try:
            self._capture.__enter__()
        except BaseException:
            torch.cuda.set_stream(self._before)
            raise

    def __exit__(self, *failure: Any) -> None:
        try:
            self._capture.__exit__(*failure)
        finally:
            torch.cuda.set_stream(self._before)


def capture(work: Any, instead: str) -> tuple[Any, Tensor]:
    """The graph of what `work` launches, not yet run, and what it returns.

    Raises CaptureFailed, which says what to do `instead`, where that cannot be.
    """
    first: BaseException | None = None
    try:
        graph = torch.cuda.CUDAGraph()
        # Meanwhile a thread may be pinning memory for the next step's batches, which would end a "global" capture.
        side = _side(torch.cuda.current_device())
        with capturing(graph, stream=side, capture_error_mode="thread_local"):
            try:
                found = work()
            except BaseException as error:
                first = error  # ending a capture that it broke raises another one, which says less
                raise
    except RuntimeError as error:
        first = first or error
        if error is not first:
            error.__traceback__ = None  # a frame of it holds `first`, whose context it becomes: a cycle
        if not isinstance(first, Exception) or isinstance(first, torch.OutOfMemoryError | MemoryError):
            raise first from None
        reason = " ".join(str(first).split("\n")[0].split())
        raise CaptureFailed(f"--cuda-graph cannot capture this step ({reason}): {instead}") from first
    finally:
        del first  # its traceback holds this frame: a cycle too, and the failed step's tensors would stay in memory
    return graph, found
