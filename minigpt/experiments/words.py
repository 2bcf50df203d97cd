"""Sentences from numbers: means with their spread over seeds, and differences that seeds explain or do not."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

# Two-sided 95% quantiles of Student's t distribution for 1, 2, ... degrees of freedom.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


@dataclass(frozen=True)
class Difference:
    """The difference of two settings, seed by seed: mean, standard deviation, 95% interval of the mean (Student's t).

    Infinite interval where one seed says nothing, NaN where a run was not finite.
    """

    mean: float
    sd: float
    low: float
    high: float
    seeds: int

    @classmethod
    def of(cls, a: np.ndarray, b: np.ndarray) -> "Difference":
        """That of a - b, (seeds,) each, the same seeds in both."""
        apart = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
        n, mean = len(apart), float(np.mean(apart))
        if n < 2:
            return cls(mean, math.nan, -math.inf, math.inf, n)
        sd = float(np.std(apart, ddof=1))
        reach = _T95[min(n - 2, len(_T95) - 1)] * sd / math.sqrt(n)
        return cls(mean, sd, mean - reach, mean + reach, n)

    @property
    def sign(self) -> int:
        """-1: a is lower; 1: a is higher; 0: these seeds do not tell."""
        return -1 if self.high < 0 else 1 if self.low > 0 else 0


def number(value: float, digits: int = 3) -> str:
    """A number as it is read: so many decimals, one digit where it would be lost in them; words for none."""
    if not math.isfinite(value):
        return "not a finite number"
    if value != 0 and abs(value) < 0.5 * 10**-digits:
        return f"{value:.1g}"
    return f"{value:,.{digits}f}"


def spread(values: np.ndarray, digits: int = 3) -> str:
    """Mean ± standard deviation; of one value the value alone."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2 or not np.isfinite(values).all():
        return number(float(np.mean(values)), digits)
    return f"{number(float(values.mean()), digits)} ± {number(float(values.std(ddof=1)), digits)}"


def sentence(text: str) -> str:
    """The same with a capital at its beginning."""
    return text[:1].upper() + text[1:]


def seeds_told(seeds: int) -> str:
    """What the ± of a paragraph means."""
    return f"mean ± standard deviation of {seeds} seeds" if seeds > 1 else "one seed, which has no spread"


def compared(
    a: str, values_a: np.ndarray, b: str, values_b: np.ndarray, *, said: int | None = None, digits: int = 3
) -> str:
    """A sentence about how a differs from b, (seeds,) each, lower being better or not.

    `said` is the sign of a - b that is usually said (0: no difference); the sentence ends in whether it is so. The
    names are plural or stand for what is measured: "the losses of 1e-3", "1e-3".
    """
    found = Difference.of(values_a, values_b)
    if math.isnan(found.mean):
        lost = [name for name, values in ((a, values_a), (b, values_b)) if not np.isfinite(values).all()]
        return f"{listed(lost)} did not stay finite in every seed, so there is no difference to speak of."
    if found.seeds < 2:
        return (
            f"{a} is {_than(found.mean, digits)} {b} in this one seed, which says nothing about the next."
            if found.mean
            else f"{a} and {b} are equal in this one seed, which says nothing about the next."
        )
    if found.sign == 0:
        interval = f"{number(found.low, digits)} to {number(found.high, digits)}"
        start = f"{a} and {b} differ by {number(found.mean, digits)} ± {number(found.sd, digits)} seed by seed"
        lower = int((np.asarray(values_a) < np.asarray(values_b)).sum())
        start += f" (lower in {lower} of {found.seeds}; 95% interval of the mean {interval}): "
        ends = {
            None: "these seeds do not tell them apart",
            0: "these seeds do not tell them apart, nor show them equal",
        }
        return start + ends.get(said, "these seeds neither bear out nor contradict what is usually said") + "."
    more = number(abs(found.mean), digits)
    interval = " to ".join(number(abs(value), digits) for value in sorted((found.low, found.high), key=abs))
    start = f"{a} is {'lower' if found.sign < 0 else 'higher'} than {b} by {more} ± {number(found.sd, digits)}"
    start += f" seed by seed (95% interval of the mean {interval})"
    return start + verdict(found.sign, said) + "."


def verdict(sign: int, said: int | None) -> str:
    """How a clear difference of that sign stands to what is usually said."""
    if said is None:
        return ""
    if said == 0:
        return ", where usually no difference is expected"
    return ", as is usually said" if sign == said else ": the opposite of what is usually said"


def _than(mean: float, digits: int) -> str:
    return f"{'lower' if mean < 0 else 'higher'} by {number(abs(mean), digits)} than"


def factor(value: float) -> str:
    """A factor with two digits, however small."""
    return f"{value:.2g}" if math.isfinite(value) else "not a finite number"


def percent(values: np.ndarray) -> str:
    """Mean ± standard deviation of shares, in per cent."""
    return f"{spread(100 * np.asarray(values), 1)}%".replace(" ± ", "% ± ")


def listed(parts: Iterable[str]) -> str:
    """The parts with commas, the last with an "and"."""
    *head, last = list(parts) or ["none"]
    return f"{', '.join(head)} and {last}" if head else last


def paragraph(parts: list[str]) -> str:
    """The sentences after each other, each with a capital but after a colon."""
    return " ".join(
        part if before.endswith(":") else sentence(part) for before, part in zip(["", *parts], parts, strict=False)
    )
