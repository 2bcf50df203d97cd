"""Kernels compiled before they are launched, by Triton itself; the driver alone is a stand-in."""

import subprocess

import forked
import pytest
import torch

import kernels
from kernels.device import HAS_TRITON, INTERPRETED

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")

COMPILED = """
import kernels, torch, triton
from profiling.host import stand_in

driver = stand_in()
cpu, compiled = torch.device("cpu"), []
triton.knobs.runtime.jit_post_compile_hook = lambda **found: compiled.append(found["repr"])
x = torch.randn(2, 70, 32, requires_grad=True)
weight = torch.ones(32, requires_grad=True)

def work():
    y = kernels.layer_norm(x, (32,), weight, None)
    kernels.cross_entropy(y.flatten(0, 1), torch.zeros(140, dtype=torch.int64)).backward()
    kernels.layer_norm(x.detach(), (32,), weight.detach())  # a launch that there was before

driver.launched = []
assert kernels.compile_ahead(work, cpu, threads=2) == 6, "two passes of two ops, two of them in two kernels"
assert len(compiled) == 6 and not driver.launched, (compiled, driver.launched)
work()
assert len(compiled) == 6 and len(driver.launched) == 7, (compiled, driver.launched)
"""

BROKEN = """
import dataclasses, kernels, torch
from kernels import catalogue, op
from kernels.device import TARGETS
from profiling.host import stand_in

driver = stand_in()
tensor = torch.zeros(1, 1, 80, 64)
shapes = dict.fromkeys(("query", "key", "value"), (1, 1, 80, 64))
case = op.Case("broken", shapes)
launch = catalogue.ATTENTION.plan(catalogue.ATTENTION.inputs(case, torch.float32, "meta"), {}, TARGETS["sm_90"])[0]
broken = dataclasses.replace(launch, constexprs=launch.constexprs | {"BLOCK_K": 100})
tensors = {name.removesuffix("_ptr"): tensor for name, value in launch.arguments.items() if hasattr(value, "stride")}

def work():
    op.run(lambda specs, options, device: [broken], tensors)

assert kernels.compile_ahead(work, torch.device("cpu")) == 1
try:
    work()
except Exception as error:
    print("raised:", type(error).__name__)
"""

TRAINING = """
import kernels, torch, triton
from profiling.host import stand_in
from benchmarks import ladder
from minigpt import config

driver, compiled = stand_in(), []
settings = config.preset("tiny", data="pydocs", batch_size=2, dropout=0.1, checkpoint_activations=CHECKPOINT)
training = ladder.Training(settings, ladder.chosen(["triton"])[0], torch.device("cpu"))
learner, before = training.learner, [p.clone() for p in training.model.parameters()]
data, state = learner.data(0), torch.get_rng_state()
assert learner.cold
driver.launched = []
learner.compile_kernels(data)
assert not driver.launched and torch.equal(state, torch.get_rng_state())
assert all(p.grad is None and torch.equal(p, old) for p, old in zip(training.model.parameters(), before))
triton.knobs.runtime.jit_post_compile_hook = lambda **found: compiled.append(found["repr"])
training.step()
assert driver.launched and not compiled, compiled
assert not learner.cold
"""


def _run(program: str) -> subprocess.CompletedProcess:
    done = forked.run("-c", program)
    assert done.returncode == 0, done.stderr
    return done


@needs_triton
def test_launches_find_their_kernels_compiled():
    _run(COMPILED)


@needs_triton
def test_what_does_not_compile_says_so_when_it_is_launched():
    assert "raised: " in _run(BROKEN).stdout


@needs_triton
@pytest.mark.parametrize("checkpoint", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_first_step_compiles_nothing_more_and_is_the_same(checkpoint):
    """A pass for the compiler's sake leaves weights, generators and gradients as they were."""
    _run(TRAINING.replace("CHECKPOINT", str(checkpoint)))


@pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled for the GPU here: TRITON_INTERPRET=1 pytest runs it")
def test_where_kernels_are_interpreted_nothing_is_done():
    assert kernels.compile_ahead(lambda: pytest.fail("work was called"), torch.device("cpu")) == 0
