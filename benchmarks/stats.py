"""Medians, spreads, and whether two sets of samples differ by more than chance."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy

CONFIDENCE = 0.99  # of the interval of a ratio: a file has many rows, and each is a chance to be wrong
RESAMPLES = 4000
FEWEST = 6  # samples a side, under which nothing is said
RESOLUTION = 0.05  # an interval that includes 1 and reaches further from it could hide a difference worth knowing


class Summary(NamedTuple):
    """The middle of samples and their 20th and 80th percentiles, in the samples' unit."""

    median: float
    p20: float
    p80: float


def summarize(samples: Sequence[float]) -> Summary:
    """Median and 20/80 percentiles of at least one sample."""
    low, middle, high = numpy.quantile(numpy.asarray(samples, dtype=float), (0.2, 0.5, 0.8))
    return Summary(float(middle), float(low), float(high))


class Comparison(NamedTuple):
    """What is known of B's time over A's: below 1, B is faster."""

    verdict: str  # SAME, FASTER (B is), SLOWER (B is) or UNCLEAR
    ratio: float
    low: float
    high: float


def ratio_interval(a: Sequence[float], b: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """(median b / median a, low, high): a bootstrap interval of that ratio of times above 0, at CONFIDENCE.

    Both sides are resampled, and the interval is of percentiles. Medians of few samples take few values, so each
    resampled one is multiplied by a jitter of the spread that it has left out, (log 80th - log 20th) / (2 n) in
    logarithms: a factor, because what is added to a time could make it negative.
    """
    random = numpy.random.default_rng(seed)
    logs = []
    for samples in (numpy.asarray(a, dtype=float), numpy.asarray(b, dtype=float)):
        n = len(samples)
        drawn = numpy.median(samples[random.integers(0, n, (RESAMPLES, n))], axis=1)
        low, high = numpy.log(numpy.quantile(samples, (0.2, 0.8)))
        logs.append(numpy.log(drawn) + random.normal(0.0, (high - low) / (2 * n) + 1e-12, RESAMPLES))
    tail = (1.0 - CONFIDENCE) / 2
    low, high = numpy.exp(numpy.quantile(logs[1] - logs[0], (tail, 1.0 - tail)))
    return float(numpy.median(b) / numpy.median(a)), float(low), float(high)


def compare(a: Sequence[float], b: Sequence[float]) -> Comparison:
    """Whether times `b` differ from times `a`, by the interval of their ratio and not by its size.

    FASTER or SLOWER where the interval leaves 1 out; SAME where it includes 1 and stays within RESOLUTION of it; else,
    and with fewer than FEWEST samples a side, UNCLEAR. The very same samples on both sides are one measurement, not two
    that chance could have set apart: SAME, however widely they spread.
    """
    if min(len(a), len(b)) < FEWEST:
        ratio = summarize(b).median / summarize(a).median if a and b else math.nan
        return Comparison("UNCLEAR", ratio, math.nan, math.nan)
    if sorted(a) == sorted(b):
        return Comparison("SAME", 1.0, 1.0, 1.0)
    ratio, low, high = ratio_interval(a, b)
    if high < 1.0:
        verdict = "FASTER"
    elif low > 1.0:
        verdict = "SLOWER"
    else:
        verdict = "SAME" if low > 1.0 / (1.0 + RESOLUTION) and high < 1.0 + RESOLUTION else "UNCLEAR"
    return Comparison(verdict, ratio, low, high)
