"""What can go wrong in a step: a loss or gradient that is not finite, and too little memory."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from .errors import UserError

if TYPE_CHECKING:
    from .learning import Learner
    from .resume import Progress

PATIENCE = 10
"""Steps in a row that may be skipped before training stops."""

FP16_PATIENCE = 30
"""The same under fp16, whose loss scale is found by skipping: halved from 2**16 down to 1, that takes 16 steps."""


def count_skipped(rows: list[dict[str, float]], progress: "Progress", *, fp16: bool) -> str | None:
    """Count in `progress` which steps of metrics.csv's `rows` were skipped; a line about them, or None.

    Raises UserError, which says what to try, once too many in a row were.
    """
    skipped = []
    for row in rows:
        if math.isfinite(row["train_loss"]) and math.isfinite(row["grad_norm"]):
            progress.skipped_in_a_row = 0
            continue
        skipped.append(row)
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        if progress.skipped_in_a_row == (FP16_PATIENCE if fp16 else PATIENCE):
            raise UserError(
                f"{progress.skipped_in_a_row} steps in a row, up to step {row['step']}, were skipped "
                f"({_measured(row)}): start again with a lower --learning-rate, a longer --warmup-steps"
                f"{', or --dtype bf16 or fp32' if fp16 else ''}"
            )
    if not skipped or (fp16 and all(math.isfinite(row["train_loss"]) for row in skipped)):
        return None  # the loss scale of fp16 is found so
    last = skipped[-1]
    which = f"step {last['step']}" if len(skipped) == 1 else f"{len(skipped)} steps up to step {last['step']}"
    return f"WARNING: {which} skipped, weights unchanged: {_measured(last)}; {progress.skipped} skipped in all"


def _measured(row: dict[str, float]) -> str:
    return f"loss {row['train_loss']:.4g}, norm of the gradient {row['grad_norm']:.4g}"


_FULL = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory", "[CUDA]: out of memory")
"""How a lack of memory is told where it has no type of error of its own: by PyTorch's allocator on a CPU, by cuBLAS, by
CUDA itself outside PyTorch's allocator, and by Triton where it loads a kernel."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the machine, has no more memory to give."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in str(error) for words in _FULL)


def of_the_compiler(error: BaseException) -> UserError | None:
    """What to say of an error of torch.compile, which needs more than training does; None for any other."""
    if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return None
    said = [line for line in str(error).split("Set TORCHDYNAMO_VERBOSE")[0].splitlines() if line.strip()]
    reason = " ".join(" ".join(dict.fromkeys((said[0], said[-1]))).split())[:400]
    return UserError(f"--compile does not work here ({reason}): install what it needs, or leave it out")


@contextmanager
def memory_told(instead: str) -> Iterator[None]:
    """Run a block, or decorate a function: out of memory becomes a UserError that says what to do `instead`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        said = " ".join(str(error).split()[:40])
        raise UserError(
            f"out of memory: {instead}, or take a device with more" + (f" ({said})" if said else "")
        ) from error


def check_batch(windows: int, window: int, n_embd: int, device: torch.device) -> None:
    """Raise UserError for a batch of which not even the embeddings and their gradient, in fp32, fit into memory: the
    machine would take minutes to find that out, and might end the process without a word."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if (least := 8 * windows * window * n_embd) > memory:
        raise UserError(
            f"--batch-size {windows} of {window} tokens takes more than {least / 1e9:,.0f} GB, and there are "
            f"{memory / 1e9:,.0f}: take a smaller one, and as much more --grad-accumulation"
        )


def what_fits(learner: "Learner") -> str:
    """What to do when a step of `learner` has run out of memory: found by trying smaller batches, here and now.

    The learner is of no use afterwards.
    """
    config = learner.config
    if learner.world.size > 1:  # the others wait for this one in the middle of a step
        return f"out of memory on {learner.device}: take a smaller --batch-size, and as much more --grad-accumulation"
    learner.graph = None
    for size in range(config.batch_size - 1, 0, -1):
        if config.batch_size % size == 0 and _fits(learner, size):
            passes = config.grad_accumulation * config.batch_size // size
            return (
                f"out of memory on {learner.device} with --batch-size {config.batch_size}, and {size} fits (tried just "
                f"now): --batch-size {size} --grad-accumulation {passes} trains on the same windows"
            )
    return (
        f"out of memory on {learner.device}, with a single window too: take a smaller model (--n-layer, --n-embd), a "
        "shorter --window, or --dtype bf16"
    )


def _fits(learner: "Learner", batch_size: int) -> bool:
    # Two passes: in the second one the gradients of the first are there.
    learner.passes = min(2, learner.config.grad_accumulation * learner.config.batch_size // batch_size)
    learner.batches.batch_size = batch_size
    learner.optimizer.zero_grad(set_to_none=True)
    # a scaler whose step was cut short takes the next one for a part of it
    learner.scaler = torch.amp.GradScaler(learner.device.type, enabled=learner.scaler.is_enabled())
    if learner.device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        learner.step(0).tolist()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True
