"""Kernels compiled side by side before they are needed. By itself Triton compiles each at its first launch, one after
another: seconds in which a GPU and all but one of the host's cores wait.
"""

import contextlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from kernels import device as devices
from kernels.op import Launch, Spec, facts_of, plan_only, triton


class Pointer:
    """Stands for a tensor where Triton looks for what a kernel is compiled for: its dtype, alignment and size."""

    def __init__(self, spec: Spec):
        self.dtype = spec.dtype
        self._address = 0 if spec.aligned else spec.dtype.itemsize
        places = 1 + sum((size - 1) * stride for size, stride in zip(spec.shape, spec.stride, strict=True))
        self._bytes = places * spec.dtype.itemsize

    def data_ptr(self) -> int:
        return self._address

    def ptr_range(self) -> int:
        return self._bytes


def arguments_of(launch: Launch) -> list:
    """What a launch passes before its constexprs, with a Pointer for each tensor."""
    return [Pointer(value) if isinstance(value, Spec) else value for value in launch.arguments.values()]


def compile_ahead(work: Callable[[], object], device: torch.device, threads: int | None = None) -> int:
    """Compile the kernels of ours that `work()` would launch on `device`, on so many threads (None: one a core), which
    Triton's compiler leaves free to run at once. Returns the number of different launches.

    `work` is called once, and all of it happens but these launches: what they would have written is whatever the memory
    held. So nothing of its results is to be used, and no decision to rest on their values; the caller undoes what it
    does to gradients and random generators. Nor may other threads call kernels meanwhile, which would not be launched
    either. What does not compile raises at its launch, as ever. Where kernels are
    interpreted nothing is compiled, and `work` is not called.
    """
    if devices.INTERPRETED or not devices.HAS_TRITON:
        return 0
    with plan_only(facts_of(torch.empty(0, device=device))) as planned:
        work()
    launches = {id(launch): launch for launch in planned}  # the same plan gives the same objects
    current = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with (
        current,
        ThreadPoolExecutor(threads or os.cpu_count()) as pool,
        triton.AsyncCompileMode(pool, ignore_errors=True),
    ):
        for launch in launches.values():
            _compile(launch)
    return len(launches)


def _compile(launch: Launch) -> None:
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    launch.kernel.run(*arguments_of(launch), grid=launch.grid, warmup=True, **launch.constexprs, **options)
