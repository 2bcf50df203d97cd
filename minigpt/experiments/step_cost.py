"""What a training step costs on one backend: its time, and the bytes that autograd keeps for backward.

A time in Triton's interpreter says nothing, so there is none there; what is kept is the same wherever it is counted.
"""

import time

import torch

from .. import generators, process
from ..batches import Batches
from ..errors import Stopped
from ..learning import Learner
from ..model import GPT
from .runs import Place, Result, Run

_WARM_UP = 5


def step_cost(run: Run, place: Place) -> Result:
    """Carry out a run of kind cost: `kept_bytes`, and where the steps are more than 0, `times` in seconds each.

    On a GPU also `peak_bytes`, the most memory that was in use in a step.
    """
    began = time.perf_counter()
    ops = place.ops(run.kernels)
    found: Result = {}
    with process.threads(1 if ops.interpreted else torch.get_num_threads()):
        generators.seed(run.seed)
        data = place.dataset()
        model = GPT(run.config().model_config(data.tokenizer.vocab_size), ops).to(place.device)
        batches = Batches(data.train, run.block_size, run.batch_size, run.seed, place.device)
        learner = Learner(model, run.config(), batches, place.dtype)
        found["kept_bytes"] = kept_bytes(learner)
        found["tokens"] = run.batch_size * run.block_size
        if run.steps:
            for number in range(min(_WARM_UP, run.steps)):
                learner.step(number)
            if place.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(place.device)
            found["times"] = [_seconds(learner, number, place) for number in range(run.steps)]
            if place.device.type == "cuda":
                found["peak_bytes"] = torch.cuda.max_memory_allocated(place.device)
    found["seconds"] = time.perf_counter() - began
    return found


def kept_bytes(learner: Learner) -> int:
    """The bytes that the forward pass of the learner's first batch leaves for backward.

    Each storage counts once, whoever keeps views of it; parameters are left out, and so is the batch, since both are
    there anyway.
    """
    data = learner.data(0)
    known = {tensor.untyped_storage().data_ptr() for tensor in (*learner.parameters, *data[0])}
    found: dict[int, int] = {}
    alive = []  # a storage that were freed would lend its address to the next

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        learner.loss(*data[0])
    return sum(found.values())


def _seconds(learner: Learner, number: int, place: Place) -> float:
    """The time of one whole step, until the device has done it."""
    if place.stopping():
        raise Stopped("stopped")
    began = time.perf_counter()
    learner.step(number)
    if place.device.type == "cuda":
        torch.cuda.synchronize(place.device)
    return time.perf_counter() - began
