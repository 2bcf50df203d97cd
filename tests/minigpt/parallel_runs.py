"""A program that trains in two processes under gloo, several times, and prints what came of it: `... TEXT NAME...`.

Each NAME is a case of CASES. The processes are forked, so that PyTorch is imported once; torchrun itself is tested
elsewhere. CUDA_VISIBLE_DEVICES must be empty: CUDA, once asked whether there is a GPU, does not work in forked
processes. Works in the current folder: run NAME goes to the folder NAME.
"""

import importlib
import json
import os
import socket
import sys
import traceback
from contextlib import suppress
from pathlib import Path

import torch
from training_runs import StopAfter

import kernels  # first: it chooses Triton's interpreter where there is no GPU
from minigpt import generators, plots
from minigpt.config import parse, preset
from minigpt.errors import Stopped, UserError
from minigpt.learning import Learner
from minigpt.parallel import join
from minigpt.trainer import Session, train

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 4, "device": "cpu", "seed": 5}
RUN = {"eval_interval": 3, "log_interval": 1, "eval_tokens": 100, "sample_tokens": 8, "warmup_steps": 1}
LONG = SHAPE | RUN | {"max_steps": 6, "learning_rate": 1e-2}
SMALL = LONG | {"max_steps": 2, "eval_interval": 2, "batch_size": 2, "n_layer": 1, "val_tokens": 48, "eval_tokens": 48}
CASES = {
    "one": (1, LONG),
    "ddp": (2, LONG | {"parallel": "ddp"}),
    "fsdp": (2, LONG | {"parallel": "fsdp"}),
    "one_accumulating": (1, LONG | {"grad_accumulation": 3}),
    "ddp_accumulating": (2, LONG | {"grad_accumulation": 3, "parallel": "ddp"}),
    "fsdp_accumulating": (2, LONG | {"grad_accumulation": 3, "parallel": "fsdp"}),
    "ddp_passes": (2, LONG | {"batch_size": 3, "grad_accumulation": 4, "parallel": "ddp"}),
    "one_passes": (1, LONG | {"batch_size": 3, "grad_accumulation": 4}),
    "one_untied": (1, LONG | {"tied_head": False, "head_bias": True, "bias": True, "position": "sinusoidal"}),
    "fsdp_untied": (
        2,
        LONG | {"tied_head": False, "head_bias": True, "bias": True, "position": "sinusoidal", "parallel": "fsdp"},
    ),
    "ddp_checkpointing": (2, LONG | {"checkpoint_activations": True, "parallel": "ddp"}),
    "fsdp_checkpointing": (2, LONG | {"checkpoint_activations": True, "parallel": "fsdp"}),
    "one_triton": (1, SMALL | {"kernels": "triton"}),
    "ddp_triton": (2, SMALL | {"kernels": "triton", "parallel": "ddp"}),
    "fsdp_triton": (2, SMALL | {"kernels": "triton", "parallel": "fsdp"}),
    "ddp_compiled": (2, LONG | {"compile": True, "parallel": "ddp"}),
    "fsdp_compiled": (2, LONG | {"compile": True, "parallel": "fsdp"}),
    "one_bf16": (1, LONG | {"dtype": "bf16", "bias": True}),
    "ddp_bf16": (2, LONG | {"dtype": "bf16", "bias": True, "parallel": "ddp"}),
    "fsdp_bf16": (2, LONG | {"dtype": "bf16", "bias": True, "parallel": "fsdp"}),
    "fsdp_bf16_triton": (2, SMALL | {"dtype": "bf16", "bias": True, "parallel": "fsdp", "kernels": "triton"}),
    "one_bf16_triton": (1, SMALL | {"dtype": "bf16", "bias": True, "kernels": "triton"}),
    "ddp_dropout": (2, LONG | {"dropout": 0.2, "parallel": "ddp"}),
    "ddp_dropout_stopped": (2, LONG | {"dropout": 0.2, "parallel": "ddp"}),
    "fsdp_dropout": (2, LONG | {"dropout": 0.2, "parallel": "fsdp"}),
    "fsdp_dropout_stopped": (2, LONG | {"dropout": 0.2, "parallel": "fsdp"}),
    "one_stopped": (1, LONG),
    "fsdp_stopped": (2, LONG | {"parallel": "fsdp"}),
    "fsdp_not_finite": (2, LONG | {"parallel": "fsdp"}),
    "ddp_not_finite": (2, LONG | {"parallel": "ddp"}),
    "indivisible": (2, LONG | {"batch_size": 3, "parallel": "ddp"}),
    "no_text": (2, LONG | {"data": "missing.txt", "parallel": "ddp"}),
    "full": (2, LONG | {"parallel": "fsdp"}),
}


def settings(name, text):
    return preset("shakespeare-cpu", **({"data": text, "out": Path(name)} | CASES[name][1]))


def work(name, text):
    """What one process does for a case."""
    config = settings(name, text)
    if name.endswith("_stopped"):
        with join(config) as world, Session(config, world) as session:
            stop = StopAfter(session, 3 if world.first else 100)  # one process alone is asked to
            with session.display.running(0), suppress(Stopped):
                session.run(stop)
        generators.seed(99)
        return
    if name.endswith("_not_finite"):
        lose_in_the_last_process()
    if name == "full":
        fill_up_the_disk()
    train(config)


def lose_in_the_last_process():
    """The loss of one process's windows is not finite in the second step."""
    loss, calls = Learner.loss, []

    def broken(self, inputs, targets):
        calls.append(None)
        found = loss(self, inputs, targets)
        return found * float("nan") if self.world.rank and len(calls) == 2 else found

    Learner.loss = broken


def fill_up_the_disk():
    """The third file that is written whole does not fit."""
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(None)
        if len(calls) == 20:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    os.fsync = full


def resume(name, size, **changed):
    """Go on with a run in so many processes."""
    options = [f"--{key}={value}" for key, value in changed.items()]
    return together(size, lambda: train(parse(["--resume", name, *options])))


def together(size, task):
    """Run `task` in so many forked processes; the exit status and the last words on stderr of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(size):
        if child := os.fork():
            children.append(child)
            continue
        if size > 1:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
            )  # fmt: skip
        status = 0
        os.dup2(os.open(f"out.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        try:
            task()
        except UserError as error:
            status = 1
            Path(f"error.{rank}").write_text(json.dumps([type(error).__name__, str(error), error.silent, error.rank]))
        except BaseException:
            status = 2
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    said = [Path(f"out.{rank}").read_text() for rank in range(size)]
    errors = [json.loads(path.read_text()) for path in sorted(Path().glob("error.*"))]
    for path in Path().glob("error.*"):
        path.unlink()
    return {"statuses": statuses, "said": said, "errors": errors}


def main(text, *names):
    torch.set_num_threads(1)
    # What every process would import for itself.
    importlib.import_module("torch.distributed.fsdp")
    torch.optim.AdamW([torch.ones(1)])
    if kernels.device.HAS_TRITON:
        importlib.import_module("triton.experimental.gluon")  # at the first launch
    plots.curves = lambda *_, **__: None
    found = {}
    for name in names:
        run, _, processes = name.partition("@")
        if processes:  # RUN@N+OPTION=VALUE: gone on with in N processes
            size, *options = processes.split("+")
            found[name] = resume(run, int(size), **dict(option.split("=") for option in options))
        else:
            found[name] = together(CASES[run][0], lambda run=run: work(run, text))
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
