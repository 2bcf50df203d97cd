"""Sampling against probabilities computed in plain Python."""

import math
from collections import Counter

import pytest
import torch

from minigpt.errors import UserError
from minigpt.sampling import Uniforms, sample


def expected(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """The probability of each token, the slow way."""
    weights = [math.exp((x - max(logits)) / temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: -weights[i])[: top_k or None]
    total = sum(weights[i] for i in order)
    kept, mass = [], 0.0
    for i in order:
        if mass >= top_p:
            break
        kept.append(i)
        mass += weights[i] / total
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


LOGITS = [0.3, 2.0, -1.0, 1.2, -math.inf, 0.9, -8.0]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1, 0, 1),
        (0.5, 0, 1),
        (3, 0, 1),
        (1, 1, 1),
        (1, 3, 1),
        (1, 7, 1),
        (1, 0, 0.5),
        (1, 0, 0.9),
        (2, 4, 0.8),
        (1, 2, 1e-9),
    ],
)
def test_tokens_come_with_the_probabilities_they_should(temperature, top_k, top_p):
    draws = 20_000
    logits = torch.tensor(LOGITS).expand(draws, -1)
    ids = sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=seeded())
    assert ids.shape == (draws,) and ids.dtype == torch.int64
    found = Counter(ids.tolist())
    for token, p in enumerate(expected(LOGITS, temperature, top_k, top_p)):
        if p == 0:
            assert found[token] == 0
        else:
            # Five standard deviations of a binomial count.
            assert abs(found[token] - draws * p) <= 5 * math.sqrt(draws * p * (1 - p)) + 1e-9


def test_the_smallest_nucleus_that_reaches_top_p():
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64).log().expand(2000, -1)
    assert set(sample(logits, top_p=0.49, generator=seeded()).tolist()) == {0}
    assert set(sample(logits, top_p=0.51, generator=seeded()).tolist()) == {0, 1}
    assert set(sample(logits, top_p=0.74, generator=seeded()).tolist()) == {0, 1}


def test_top_k_above_the_vocabulary_is_all_of_it():
    logits, uniform = torch.randn(50, 6, generator=seeded()), torch.rand(50, dtype=torch.float64, generator=seeded())
    for top_p in (1.0, 0.7):
        whole = sample(logits, top_k=0, top_p=top_p, uniform=uniform)
        assert torch.equal(sample(logits, top_k=7, top_p=top_p, uniform=uniform), whole)


def test_top_k_keeps_exactly_k_of_equal_logits():
    assert len(set(sample(torch.zeros(2000, 10), top_k=3, generator=seeded()).tolist())) == 3


def test_temperature_zero_is_greedy_and_so_is_one_close_to_it():
    logits = torch.randn(50, 33, generator=seeded())
    best = logits.argmax(-1)
    assert torch.equal(sample(logits, temperature=0.0), best)
    for temperature in (1e-6, 1e-300, 5e-324):
        assert torch.equal(sample(logits, temperature=temperature, generator=seeded()), best)


@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 3, 5)])
def test_shapes(shape):
    logits = torch.randn(shape, generator=seeded())
    assert sample(logits, generator=seeded()).shape == shape[:-1]
    assert sample(logits, top_k=2, top_p=0.9, generator=seeded()).shape == shape[:-1]
    assert sample(logits, temperature=0).shape == shape[:-1]


def test_huge_and_half_precision_logits():
    logits = torch.tensor([-60000.0, 60000.0, 59000.0], dtype=torch.float16)
    assert sample(logits, generator=seeded()) == 1
    assert sample(torch.tensor([1e38, -1e38]), temperature=1e-30, generator=seeded()) == 0


BAD = [
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": math.nan}, "temperature"),
    ({"temperature": math.inf}, "temperature"),
    ({"top_k": -1}, "top_k"),
    ({"top_p": 0.0}, "top_p"),
    ({"top_p": 1.01}, "top_p"),
    ({"top_p": -0.5}, "top_p"),
    ({"top_p": math.nan}, "top_p"),
]


@pytest.mark.parametrize(("options", "named"), BAD)
def test_values_that_make_no_sense(options, named):
    with pytest.raises(UserError, match=named):
        sample(torch.zeros(7), **options)


def test_a_number_decides_which_token_is_drawn():
    """The token in whose share of [0, 1) it lies, those without a share left out at both ends."""
    logits = torch.tensor([-math.inf, math.log(0.25), math.log(0.75), -math.inf], dtype=torch.float64)
    numbers = [0.0, 0.1, 0.24, 0.26, 0.5, 1 - 2**-53]
    drawn = sample(logits.expand(6, -1), uniform=torch.tensor(numbers, dtype=torch.float64))
    assert drawn.tolist() == [1, 1, 1, 2, 2, 2]
    kept = sample(logits.expand(6, -1), top_k=1, uniform=torch.tensor(numbers, dtype=torch.float64))
    assert kept.tolist() == [2] * 6


def test_each_row_has_numbers_of_its_own():
    def numbers(seed, rows, count=600):
        uniforms = Uniforms(seed, rows)
        return torch.stack([uniforms.next() for _ in range(count)], 1)

    state = torch.get_rng_state()
    three = numbers(7, 3)
    assert torch.equal(three[1], numbers(8, 1)[0]) and torch.equal(three, numbers(7, 3))
    assert torch.equal(numbers(2**63 - 1, 2)[1], numbers(0, 1)[0])
    assert len({tuple(row.tolist()) for row in (*three, *numbers(None, 2), *numbers(None, 2))}) == 7
    assert 0 <= three.min() and three.max() < 1 and abs(three.mean() - 0.5) < 0.05
    assert torch.equal(torch.get_rng_state(), state)
