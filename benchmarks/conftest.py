"""Settings of `pytest benchmarks`: results stored by device, a timer that waits for the GPU, and no empty success."""

import kernels  # noqa: F401, I001  first: it chooses Triton's interpreter where there is no GPU

import time
from pathlib import Path

import pytest
import torch

from benchmarks import machine, timing
from benchmarks.problems import DTYPES

try:
    import pytest_benchmark  # noqa: F401
except ImportError:
    raise pytest.UsageError("these benchmarks need pytest-benchmark: pip install pytest-benchmark") from None

CEILINGS = pytest.StashKey[dict]()
RAN = pytest.StashKey[list]()


def synchronised() -> float:
    """Seconds, once the GPU has done what it was asked to."""
    if machine.here().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    config.stash[RAN] = []
    chosen = config.invocation_params.args
    if not any(str(argument).startswith("--benchmark-storage") for argument in chosen):
        # results of two devices must not be compared with each other
        config.option.benchmark_storage = f"file://{Path(config.rootpath) / '.benchmarks' / machine.here().slug}"


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info |= {"device": machine.here().name, "versions": machine.versions(), "settings": machine.settings()}


@pytest.fixture(scope="session")
def dtype() -> torch.dtype:
    """What is benchmarked in: bf16, on a CPU fp32."""
    return DTYPES["bfloat16" if machine.here().type == "cuda" else "float32"]


@pytest.fixture(scope="session")
def ceilings(dtype) -> dict[str, float]:
    """The measured ceilings of this device, as timing.ceilings has them."""
    return timing.ceilings(machine.here().torch_device, [dtype], quick=True)


@pytest.fixture
def ran(request) -> list:
    """Where a benchmark that was timed enters its name."""
    return request.config.stash[RAN]


def pytest_sessionfinish(session):
    if not session.config.stash[RAN] and not session.config.option.collectonly:
        print("\nno benchmark ran at all: this run fails")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
