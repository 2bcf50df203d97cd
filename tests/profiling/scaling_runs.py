"""A program that takes training steps under ddp and fsdp, and prints what they held and sent: `... CASE...`, JSON.

fake     one rank of many, on fake tensors and PyTorch's fake process group: every allocation is counted, and every
         collective. PyTorch's own fully_shard decides what is allocated; nothing of it is known here.
gloo     two real processes on a small model: every collective is counted.

A CASE is JSON: {"run": "fake", "gpus": 8, "name": a preset, ...its settings}, or {"run": "gloo", "processes": 2, ...}.
CUDA_VISIBLE_DEVICES must be empty: CUDA, once asked whether there is a GPU, does not work in forked processes.
"""

import collections
import dataclasses
import functools
import importlib
import json
import os
import socket
import sys
import traceback
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.device_mesh
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import kernels  # noqa: F401  first: it chooses Triton's interpreter where there is no GPU
from kernels.device import TARGETS
from minigpt import backends
from minigpt.config import DTYPES, preset
from minigpt.learning import Learner, make_optimizer
from minigpt.model import GPT
from minigpt.parallel import World, join, spread
from profiling import cuda_rules
from profiling.step import make_batch, training_step
from profiling.tracker import Tracker, Workspaces

VOCABULARY = 128


KINDS = {  # op -> its kind, and which argument is the whole tensor
    "c10d._allgather_base_.default": ("all-gather", 0),
    "c10d._reduce_scatter_base_.default": ("reduce-scatter", 1),
    "c10d.allreduce_.default": ("all-reduce", 0),
}


def note(found, func, args):
    """Count an op that is a collective, as "kind bytes-of-the-whole-tensor"."""
    if str(func) in KINDS:
        kind, place = KINDS[str(func)]
        tensors = args[place] if isinstance(args[place], (list, tuple)) else [args[place]]
        found[f"{kind} {sum(tensor.nbytes for tensor in tensors)}"] += 1
    elif getattr(func, "namespace", "") in ("c10d", "_c10d_functional") and "wait" not in str(func):
        found[f"{func} 0"] += 1


class Watching(TorchDispatchMode):
    """Counts the collectives of real tensors."""

    def __init__(self):
        super().__init__()
        self.found = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(hasattr(kind, "full_tensor") for kind in types):
            return NotImplemented  # a DTensor's op comes again as that of its part
        note(self.found, func, args)
        return func(*args, **(kwargs or {}))


class ShardedTracker(Tracker):
    """A Tracker that sees DTensors' parts, and the storages that fully_shard empties and fills again."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.found = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(hasattr(kind, "full_tensor") for kind in types):
            return NotImplemented
        self._look_again()
        if self.phase != "before":
            note(self.found, func, args)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _look_again(self):
        for key, (reference, block) in list(self._known.items()):
            storage = reference()
            if storage is not None and self._rounded(storage.nbytes()) != block.bytes:
                self._tick += 1
                self._forget(key, block)
                block.died = self._tick
                tensor = torch.empty(0, dtype=torch.uint8)
                with mock.patch.object(tensor, "untyped_storage", lambda storage=storage: storage, create=True):
                    self._see(tensor, f"again {block.op}")


def held(tensors) -> int:
    """Bytes of the storages of these tensors' local parts, as an allocator hands them out."""
    local = [tensor._local_tensor if hasattr(tensor, "_local_tensor") else tensor for tensor in tensors]
    storages = {id(tensor.untyped_storage()): tensor.untyped_storage().nbytes() for tensor in local}
    return sum(-(-size // 512) * 512 for size in storages.values())


def fake(gpus, name="tiny", **settings):
    """What one of `gpus` GPUs holds and sends in a step under fsdp."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (gpus,))  # looks at values
    config = preset(name, parallel="fsdp", **settings)
    ours = Workspaces(TARGETS["sm_90"], 512)
    look = lambda *op: next((n for n in (ours(*op), cuda_rules.workspace(*op)) if n is not None), None)  # noqa: E731
    tracker = ShardedTracker(512, look)
    made = functools.partial(mock.patch.object, torch.distributed.device_mesh, "init_device_mesh")
    with FakeTensorMode(allow_non_fake_inputs=True), cuda_rules.as_on_cuda(), made(lambda *_: mesh):
        model = GPT(config.model_config(VOCABULARY), backends.resolve(config.kernels, torch.device("cuda")))
        model.checkpoint_activations = config.checkpoint_activations
        spread(model, World("fsdp", 0, gpus), torch.device("cpu"), DTYPES[config.dtype])
        optimizer = make_optimizer(model, config)
        batch = make_batch(config, VOCABULARY, "cpu")
        parameters = list(model.parameters())
        gradients = {}

        def during(phase):
            if phase == "clipping":
                gradients["bytes"] = held([parameter.grad for parameter in parameters])
            return tracker.during(phase)

        step = functools.partial(
            training_step, model, optimizer, batch, DTYPES[config.dtype], config.grad_clip, config.grad_accumulation
        )
        with tracker:
            for tensor in (*(p._local_tensor for p in parameters), *batch):
                tracker.hold(tensor, "parameters")
            step()  # makes the optimizer's state, which is then tracked
            step(during)
    dist.destroy_process_group()
    tracker.finish()
    timeline = tracker.timeline()
    top = max(timeline, key=lambda point: point.total)
    return {
        "parameters": held(parameters),
        "gradients": gradients["bytes"],
        "optimizer state": held([t for state in optimizer.state.values() for t in state.values()]),
        "peak": top.total, "phase": top.phase, "op": top.op,
        "collectives": tracker.found,
        "largest": [(b.op, b.bytes, b.shape, b.dtype) for b in tracker.alive_at_peak()[:14]],
    }  # fmt: skip


def gloo(processes, **settings):
    """What the first of so many real processes sends in its second step."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (here, there), (wait, go) = os.pipe(), os.pipe()
    children = []

    def tell(rank, found):
        """Say it, and end when all have. Nothing is taken down: gloo's thread has works to let go of that know of the
        dispatch mode, for which it needs Python, and who destroys the group waits for that thread and holds Python.
        """
        os.write(there, json.dumps([rank, found]).encode() + b"\n")
        os.close(there)
        os.read(wait, 1)
        os._exit(0)

    for rank in range(processes):
        if child := os.fork():
            children.append(child)
            continue
        try:
            os.close(go)
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes),
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
            )  # fmt: skip
            _steps_of_a_process(preset("tiny", device="cpu", **settings), tell)
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os.close(there)
    with open(here) as told:
        said = dict(json.loads(line) for line in told)
    os.close(go)
    os.close(wait)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(statuses):
        raise RuntimeError(f"the processes ended with {statuses}")
    return said[0]


class RandomBatches:
    """Batches of any number, as a Learner reads them."""

    def __init__(self, config):
        self.config = config

    def __getitem__(self, index):
        return make_batch(self.config, VOCABULARY, "cpu")

    def expect(self, indices):
        pass


def _steps_of_a_process(config, tell):
    with join(config) as world:
        torch.manual_seed(0)
        model = GPT(config.model_config(VOCABULARY), backends.resolve(config.kernels, torch.device("cpu")))
        spread(model, world, torch.device("cpu"), DTYPES[config.dtype])
        batches = RandomBatches(dataclasses.replace(config, batch_size=world.share(config)[0]))
        learner = Learner(model, config, batches, DTYPES[config.dtype], world)
        learner.step(0)  # ddp makes its buckets anew after it
        with Watching() as watching:
            learner.step(1)
        left, sizes = [], []

        def look(*_):
            left.extend(StorageWeakRef(held) for held in storages(model))
            sizes.append(sum(held.nbytes() for held in storages(model)))

        hook = learner.optimizer.register_step_pre_hook(look)
        learner.step(2)
        hook.remove()
        stay = [not reference.expired() for reference in left]
        tell(world.rank, {"collectives": watching.found, "gradients": sizes[0], "gradients stay": stay})


def storages(model):
    """Those of the gradients, each once."""
    local = [p.grad._local_tensor if hasattr(p.grad, "_local_tensor") else p.grad for p in model.parameters()]
    return list({held.data_ptr(): held for held in (tensor.untyped_storage() for tensor in local)}.values())


def main(*cases):
    torch.set_num_threads(1)
    # What every process would import for itself.
    importlib.import_module("torch.distributed.fsdp")
    torch.optim.AdamW([torch.ones(1)])
    found = []
    for case in cases:
        settings = json.loads(case)
        found.append({"fake": fake, "gloo": gloo}[settings.pop("run")](**settings))
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
