"""Verdicts on synthetic times whose truth is known."""

import numpy
import pytest

from benchmarks import stats


def times(seed: int, n: int = 30, scale: float = 1.0, spread: float = 0.03) -> list[float]:
    """Times as they come: a narrow middle and a tail of slow ones."""
    random = numpy.random.default_rng(seed)
    slow = random.exponential(spread, n) * (random.random(n) < 0.3)
    return list(scale * abs(1.0 + random.normal(0.0, spread / 3, n) + slow))


def _verdicts(n, pairs, ratio=1.0, spread=0.03):
    return [
        stats.compare(times(2 * seed, n, spread=spread), times(2 * seed + 1, n, ratio, spread)).verdict
        for seed in range(pairs)
    ]


@pytest.mark.parametrize(("n", "same"), [(12, 120), (40, 140)])
def test_the_same_thing_is_seldom_called_different(n, same):
    """At 99% confidence one row in a hundred may be wrong; more than 4 of 150 would come by chance once in 50."""
    verdicts = _verdicts(n, 150)
    assert sum(verdict in ("FASTER", "SLOWER") for verdict in verdicts) <= 4
    assert verdicts.count("SAME") >= same


def test_ten_percent_are_seen():
    assert _verdicts(30, 40, ratio=1.1).count("SLOWER") == 40
    assert _verdicts(30, 40, ratio=1 / 1.1).count("FASTER") == 40


def test_a_verdict_comes_from_the_interval_and_not_from_the_size():
    quiet = [1.0, 1.001, 0.999, 1.0005, 0.9995, 1.0002] * 5
    assert stats.compare(quiet, [1.01 * t for t in quiet]).verdict == "SLOWER"
    wild = times(1, 12, spread=2.0)
    assert stats.compare(wild, [1.1 * t for t in times(2, 12, spread=2.0)]).verdict == "UNCLEAR"


def test_few_samples_say_nothing():
    assert stats.compare([1.0] * 5, [2.0] * 30).verdict == "UNCLEAR"
    assert stats.compare([1.0] * 6, [2.0] * 6).verdict == "SLOWER"


@pytest.mark.parametrize("n", [6, 7, 12])
def test_bounds_of_a_ratio_of_times_are_above_zero(n):
    """Samples that a busy machine has made ten and more times as long, in half of the cases."""
    for seed in range(20):
        random = numpy.random.default_rng(seed)
        a, b = (list(numpy.where(random.random(n) < 0.5, 1.0, random.uniform(10, 60, n))) for _ in range(2))
        ratio, low, high = stats.ratio_interval(a, b)
        assert 0.0 < low <= ratio <= high
        back = stats.compare(b, a)
        assert 0.0 < back.low <= back.ratio <= back.high


def test_a_measurement_is_the_same_as_itself():
    wild = times(1, 12, spread=5.0)
    assert stats.compare(wild, wild[::-1]) == ("SAME", 1.0, 1.0, 1.0)
    assert stats.compare(wild[:5], wild[:5]).verdict == "UNCLEAR"


def test_order_turns_the_verdict_round():
    a, b = times(5), times(6, scale=1.2)
    there, back = stats.compare(a, b), stats.compare(b, a)
    assert (there.verdict, back.verdict) == ("SLOWER", "FASTER")
    assert there.ratio * back.ratio == pytest.approx(1.0) and there.low < there.ratio < there.high


def test_summary():
    assert stats.summarize(range(11)) == (5.0, 2.0, 8.0)
