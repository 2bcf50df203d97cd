"""`python -m benchmarks.first_step BEGAN PRESET RUNG [--ahead ARCH]`: one cold start, told as a line of JSON.

BEGAN is the time.time() at which the process was asked for. With --ahead the kernels of the step are compiled for ARCH,
side by side as a first step does, and not run.
"""

import kernels  # noqa: F401, I001  first: it chooses Triton's interpreter where there is no GPU

import itertools
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor


def main(began: str, preset: str, rung: str, ahead: str = "", arch: str = "") -> None:
    """Tell the milliseconds of each part, and how many kernels Triton compiled."""
    from benchmarks import ladder, machine
    from minigpt import config

    settings = config.preset(preset, data="pydocs")
    device = machine.here().torch_device
    clock = [float(began), time.time()]
    if ahead:
        clock += compile_ahead(settings, rung, arch)
        compiled = clock.pop()
    else:
        training = ladder.Training(settings, ladder.chosen([rung])[0], device)
        ladder.wait(device)
        clock.append(time.time())
        for _ in range(2):
            training.step()
            ladder.wait(device)
            clock.append(time.time())
        compiled = _compiled_kernels()
    parts = [1e3 * (after - before) for before, after in itertools.pairwise(clock)]
    names = ("imports", "model", "first_step", "second_step")
    print(json.dumps(dict(zip(names, parts, strict=True)) | {"kernels": compiled}))


def compile_ahead(settings, rung: str, arch: str) -> tuple[float, float, float, int]:
    """(when the step was planned, when its kernels were compiled, the same again, how many there are)."""
    from dataclasses import replace

    from profiling import floor
    from profiling.compile import compile_ahead, source_of

    dtype = "bf16" if settings.dtype == "auto" else settings.dtype
    step = floor.count(replace(settings, kernels=rung, dtype=dtype), arch)
    sources = dict.fromkeys(source_of(launch, arch) for launch in step.planned)
    planned = time.time()
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(compile_ahead, sources))
    done = time.time()
    return planned, done, done, len(sources)


def _compiled_kernels() -> int:
    """How many kernels of ours Triton has compiled in this process."""
    from triton.runtime.jit import JITFunction

    modules = [module for name, module in list(sys.modules.items()) if name.startswith("kernels.")]
    functions = {
        function for module in modules for function in vars(module).values() if isinstance(function, JITFunction)
    }
    return sum(len(found[0]) for function in functions for found in function.device_caches.values())


if __name__ == "__main__":
    main(*sys.argv[1:])
