"""What the tests of the benchmarks share."""

from dataclasses import replace

import pytest
import torch

from benchmarks import machine, results
from benchmarks.problems import Checker, Problem
from kernels import catalogue
from kernels.op import Case

OPS = {op.name: op for op in catalogue.OPS}


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """The tensors here are too small for more, and more wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def on_cpu(monkeypatch) -> None:
    """What is measured is the CPU, GPU or not: for stand-ins of its clock and its timer. Comes before `norm`."""
    here = replace(machine.here(), type="cpu")
    monkeypatch.setattr(machine, "here", lambda: here)


@pytest.fixture
def norm() -> Problem:
    """A layer norm of 37 rows."""
    case = Case("37", {"input": (37, 64), "weight": (64,), "bias": (64,)}, {"normalized_shape": (64,)})
    return Problem(OPS["layer_norm"], case, torch.float32, machine.here().torch_device)


@pytest.fixture
def checker(norm) -> Checker:
    return Checker(norm)


def kernel_row(provider="torch", samples=(1.0, 1.1, 1.2, 1.0, 1.1, 1.3, 1.0), **more) -> dict:
    """A row as `python -m benchmarks kernels` writes it."""
    key = {"op": "layer_norm", "case": "768", "dtype": "float32", "pass": "forward", "provider": provider}
    rates = {"gbps": 1.0, "tflops": 0.5, "intensity": 2.0, "l2": "warm", "shape": "4x768"}
    return key | results.timed(samples) | rates | more


@pytest.fixture
def document() -> dict:
    """A results file's document with three rows."""
    made = results.new("kernels", {"name": "kernels"})
    made["ceilings"] = {"copy_gbps": 10.0, "matmul_tflops_float32": 3.0}
    made["rows"] = [
        kernel_row(),
        kernel_row("eager", (2.0, 2.1, 2.2, 2.0, 2.1, 2.3)),
        {k: v for k, v in kernel_row("triton").items() if k in results.KEYS["kernels"]}
        | {"status": "untimed", "reason": "not timed here"},
    ]
    return made
