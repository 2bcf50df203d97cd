"""Several processes that train one model together, on PyTorch's own engine.

torchrun starts them and tells each its rank through the environment. Each trains on its share of a step's windows:

    ddp   every process has the whole model; the gradients are averaged while backward still runs (Li et al. 2020)
    fsdp  parameters, gradients and optimizer state are cut up among the processes (FSDP2's fully_shard, after
          Rajbhandari et al. 2020, ZeRO-3); a block's parameters are whole only while it computes

Together they take the same steps as one process alone, up to rounding.
"""

import os
import shlex
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .config import TrainConfig
from .errors import UserError
from .model import GPT

T = TypeVar("T")

_HOW = "torchrun --nproc-per-node N train.py --parallel ddp"
_SECONDS_TO_LET_GO = 0.2
# How the engines say that another process is gone.
_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")


@dataclass(frozen=True)
class World:
    """The processes of one training, and which of them this one is: the one of `rank`, 0 to size - 1.

    What its methods do, all processes do together: each has to call them, in the same order.
    """

    kind: str = "none"
    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints for all of them."""
        return self.rank == 0

    def share(self, config: TrainConfig) -> tuple[int, int]:
        """Windows per forward pass, and passes per step, of each process. Raises UserError when it does not divide."""
        if config.grad_accumulation % self.size == 0:
            return config.batch_size, config.grad_accumulation // self.size
        if config.batch_size % self.size == 0:
            return config.batch_size // self.size, config.grad_accumulation
        raise UserError(
            f"{self.size} processes divide neither --grad-accumulation {config.grad_accumulation} nor --batch-size "
            f"{config.batch_size}: take a multiple of {self.size} for one of them, or another number of processes"
        )

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the processes of a tensor that each has; nothing waits for it."""
        return self.sum(value) / self.size if self.size > 1 else value

    def sum(self, value: Tensor) -> Tensor:
        """The sum over the processes of a tensor that each has; nothing waits for it."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def command(self, run: Path) -> str:
        """What a person types to go on with a run in as many processes."""
        resume = f"train.py --resume {shlex.quote(str(run))}"
        if self.size == 1:
            return f"python {resume}"
        return f"torchrun --nproc-per-node {self.size} {resume} --parallel {self.kind}"

    def first_does(self, work: Callable[[], T]) -> T:
        """What `work` gives in the first process, in every one. A UserError of it is raised in every one."""
        if self.size == 1:
            return work()
        found: list[Any] = [None, None]
        if self.first:
            try:
                found[0] = work()
            except UserError as error:
                found[1] = error
        told = [found[0], str(found[1]) if found[1] else None]
        dist.broadcast_object_list(told)
        if self.first and found[1]:
            raise found[1]
        if told[1]:
            raise Elsewhere(told[1])
        return told[0]

    def in_turn(self, work: Callable[[], T]) -> T:
        """What `work` gives in this process; the first one does it before the others, and they only if it could."""
        done: list[T] = []
        self.first_does(lambda: done.append(work()))
        return done[0] if done else work()

    def gather(self, value: Any) -> list[Any]:
        """What each process has, in order of rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found


ALONE = World()


class Agreement:
    """A question that several processes ask each other at every step, without waiting for the answer."""

    def __init__(self, world: World):
        self._world = world
        self._asked: tuple[Tensor, dist.Work] | None = None

    def some(self, flag: bool) -> bool:
        """Whether some process had a true `flag` when it was asked last, the same in all; alone, `flag` itself."""
        if self._world.size == 1:
            return flag
        before, self._asked = self._asked, None
        found = torch.tensor(int(flag))
        self._asked = found, dist.all_reduce(found, dist.ReduceOp.MAX, async_op=True)
        if before is None:
            return False
        before[1].wait()
        return bool(before[0])

    def end(self) -> None:
        """Wait for the last answer."""
        if self._asked:
            self._asked[1].wait()
            self._asked = None


class Elsewhere(UserError):
    """What another process has told the person."""

    silent = True


def check(config: TrainConfig) -> None:
    """Raise UserError where `config` is not for what torchrun has started, or for what --parallel cannot do."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if config.parallel == "none":
        if started > 1:
            raise UserError(f"torchrun has started {started} processes: add --parallel ddp or --parallel fsdp")
        return
    if not os.environ.keys() >= {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}:
        raise UserError(f"--parallel {config.parallel} needs torchrun to start the processes: {_HOW}")
    if not dist.is_available():
        raise UserError("--parallel needs torch.distributed, which this build of PyTorch lacks: install another build")
    if config.device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {config.device} is one device, and each process has its own: leave it out")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if _uses_gpus(config) and here > torch.cuda.device_count():
        raise UserError(
            f"{here} processes on a machine with {torch.cuda.device_count()} GPUs: take --nproc-per-node "
            f"{torch.cuda.device_count()}, or --device cpu"
        )
    if config.parallel == "fsdp" and config.dtype == "fp16":
        raise UserError("--parallel fsdp has no loss scale, which fp16 needs: take --dtype bf16, or --parallel ddp")
    if config.cuda_graph:
        raise UserError(f"--cuda-graph is for one process: leave out either it or --parallel {config.parallel}")


@contextmanager
def join(config: TrainConfig) -> Iterator[World]:
    """Join the processes that torchrun has started, for a block; without --parallel this process is alone.

    Raises UserError as `check` and `World.share`, and when another process has ended before its time.
    """
    check(config)
    if config.parallel == "none":
        yield ALONE
        return
    world = World(config.parallel, *(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    world.share(config)
    if _uses_gpus(config):
        torch.cuda.set_device(world.local_rank)
    # What the hosts agree on goes through gloo: NCCL would wait for the kernels.
    dist.init_process_group("cpu:gloo,cuda:nccl" if _uses_gpus(config) else "gloo")
    try:
        yield world
    except UserError as error:
        error.rank = world.rank
        raise
    except RuntimeError as error:
        if not any(words in str(error) for words in _GONE):
            raise
        told = UserError("another process of this training has ended before its time")
        told.silent = not world.first
        raise told from error
    finally:
        # gloo's threads may need Python once more, to let go of the tensors of the last exchange. Ending gloo waits for
        # them and keeps Python to itself meanwhile, so they go first.
        time.sleep(_SECONDS_TO_LET_GO)
        dist.destroy_process_group()


def device_of(config: TrainConfig, world: World) -> str:
    """The name of this process's device."""
    return f"cuda:{world.local_rank}" if world.kind != "none" and _uses_gpus(config) else config.device


def spread(model: GPT, world: World, device: torch.device, dtype: torch.dtype) -> None:
    """Put `model` on `device`; under fsdp, this process's part of it. Before an optimizer is made.

    Cut up are attention and MLP of each block, one after the other, and the rest: embeddings, norms, head. Parameters
    of the former go round in `dtype`, which is what autocast makes of them (it would keep that copy for backward,
    whole); all gradients are added up in fp32.
    """
    if world.kind != "fsdp":
        model.to(device)
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (world.size,))
    # What a part returns is only added to out of place.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
    half = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    policy = {} if dtype == torch.float32 else {"mp_policy": half}
    for part in _parts(model):
        fully_shard(part, mesh=mesh, **policy)  # moves what it cuts up
    fully_shard(model, mesh=mesh)


def wrap(model: GPT, world: World, *, compiled: bool) -> nn.Module:
    """What to call in place of `model`: its gradients are averaged over the processes; `compiled` if that is wanted."""
    if compiled and world.kind == "fsdp":
        for part in _parts(model):  # parameters come and go between them
            part.compile()
        return model
    module = torch.compile(model) if compiled else model
    if world.kind != "ddp":
        return module
    return nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True)


def without_averaging(module: nn.Module) -> AbstractContextManager[None]:
    """Around a pass that is not a step's last: gradients only add up. Under fsdp they are averaged, to stay cut up."""
    return module.no_sync() if isinstance(module, nn.parallel.DistributedDataParallel) else nullcontext()


def only_parts(model: GPT) -> None:
    """Let model.parameters() be those that the optimizer has: under fsdp, some stay whole after a pass."""
    if hasattr(model, "reshard"):
        model.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A tensor that fsdp has cut up, put together in every process; any other as it is."""
    return tensor.full_tensor() if _is_cut_up(tensor) else tensor


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole `value`, cut up as `like` is, with its dtype and device."""
    if not _is_cut_up(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    # Every process has the same value already.
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _parts(model: GPT) -> list[nn.Module]:
    return [part for block in model.blocks for part in (block.attention, block.mlp)]


def _is_cut_up(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # a DTensor, whose module takes a second to import


def _uses_gpus(config: TrainConfig) -> bool:
    return config.device != "cpu" and torch.cuda.is_available()
