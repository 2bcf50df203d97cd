"""Random generators go on where they stood."""

import json
import random

import numpy as np
import pytest
import torch

from minigpt import generators
from minigpt.errors import UserError

CPU = torch.device("cpu")


def draw():
    return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist()


@pytest.mark.parametrize("number", [0, 1337, 2**63 - 1])
def test_a_seed_starts_all_of_them(number):
    generators.seed(number)
    first = draw()
    draw()
    generators.seed(number)
    assert draw() == first
    generators.seed(number ^ 1)
    other = draw()
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_each_goes_on_where_it_stood():
    generators.seed(5)
    draw()  # an odd number of Gaussian numbers: one of a pair is kept for the next call
    stored = json.loads(json.dumps(generators.states(CPU), allow_nan=False))
    then = draw(), draw()
    generators.seed(6)
    generators.restore(stored, CPU)
    assert (draw(), draw()) == then


@pytest.mark.gpu
def test_that_of_a_gpu_too():
    device = torch.device("cuda")
    stored = generators.states(device)
    then = torch.rand(3, device=device)
    generators.restore(stored, device)
    assert torch.equal(torch.rand(3, device=device), then)


@pytest.mark.parametrize("name", ["python", "numpy", "torch"])
@pytest.mark.parametrize("value", [None, [], "0g", {"state": 1}, [3, [1, 2], None]])
def test_what_is_no_state_is_told(name, value):
    with pytest.raises(UserError, match="random generators"):
        generators.restore(generators.states(CPU) | {name: value}, CPU)
