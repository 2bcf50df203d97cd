"""A program that trains again and again in processes of its own, and kills them: `python killed.py TIMES EVERY TEXT`.

First with kill -9 at random times, so many of them; then before every EVERY-th call that changes the disk. Each run is
gone on with until it is done, and must then be the run that nobody stopped. The processes are forked, so that none has
to import PyTorch again: a kill comes within the training, not within the imports. CUDA_VISIBLE_DEVICES must be empty:
CUDA, once asked whether there is a GPU, does not work in forked processes.
"""

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from training_runs import assert_same_run

from minigpt import plots
from minigpt.config import parse, preset
from minigpt.trainer import train

SHAPE = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 4, "device": "cpu"}
RUN = {"eval_interval": 2, "log_interval": 1, "eval_tokens": 64, "val_tokens": 64, "sample_tokens": 0, "dropout": 0.1}
CHANGES = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "write", "ftruncate")
KILLED = 77


def settings(text, steps, out):
    out = Path(out)
    if any(path.name.partition(".")[0] == "last" and path.suffix != ".writing" for path in out.glob("last*")):
        return parse(["--resume", str(out)])
    return preset("shakespeare-cpu", data=text, out=out, max_steps=steps, **SHAPE, **RUN)


def start(text, steps, out, fatal=0):
    """The number of a process that trains, and that ends before the `fatal`-th change of the disk."""
    if child := os.fork():
        return child
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if fatal:
            die_at(fatal)
        train(settings(text, steps, out))
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def die_at(fatal):
    left = [fatal]

    def counted(function):
        def call(*arguments, **options):
            left[0] -= 1
            if left[0] == 0:
                os._exit(KILLED)
            return function(*arguments, **options)

        return call

    for name in CHANGES:
        setattr(os, name, counted(getattr(os, name)))


def finish(text, steps, out):
    """Go on until the run is done, and hold it to the one that nobody stopped."""
    assert os.waitpid(start(text, steps, out), 0)[1] == 0
    assert_same_run(Path(out), Path(f"whole{steps}"))


def at_random_times(count, text, steps=40):
    began = time.monotonic()
    assert os.waitpid(start(text, steps, f"whole{steps}"), 0)[1] == 0
    longest = 0.4 * (time.monotonic() - began)
    kills = run = 0
    while kills < count:
        child = start(text, steps, f"run{run}")
        time.sleep(random.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGKILL), status
        kills += status == signal.SIGKILL
        run += status == 0
    for number in range(run + 1):
        finish(text, steps, f"run{number}")
    print(f"{kills} kills at random times")


def at_every_call(every, text, steps=4):
    assert os.waitpid(start(text, steps, f"whole{steps}"), 0)[1] == 0
    kills = 0
    while True:
        shutil.rmtree("run", ignore_errors=True)
        status = os.waitstatus_to_exitcode(os.waitpid(start(text, steps, "run", fatal=1 + every * kills), 0)[1])
        if status == 0:
            break
        assert status == KILLED
        kills += 1
        finish(text, steps, "run")
    print(f"{kills} kills before a call")


if __name__ == "__main__":
    torch.set_num_threads(1)
    plots.curves = lambda *_, **__: None
    at_random_times(int(sys.argv[1]), sys.argv[3])
    at_every_call(int(sys.argv[2]), sys.argv[3])
