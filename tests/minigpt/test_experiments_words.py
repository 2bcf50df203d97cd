"""What is said follows from the numbers: made-up results with either outcome, and with none."""

import math

import numpy as np
import pytest

from minigpt.experiments.catalogue import CPU, EXPERIMENTS
from minigpt.experiments.groups import Group
from minigpt.experiments.paragraphs import TELL
from minigpt.experiments.runs import Place
from minigpt.experiments.words import _T95, Difference, compared, number, spread

SAID, OPPOSITE, OPEN = "as is usually said", "the opposite of what is usually said", "neither bear out nor contradict"
NOISE = (-0.01, 0.0, 0.01)


def result(
    loss=2.0, *, early=None, bits=None, parameters=1000, gradients=((1, 1),) * 3, inside=((1, 0.9),) * 2, train=()
):
    """A result of a run of 100 steps, whose validation loss falls in a line from `early` to `loss`."""
    steps = [0, *range(10, 101, 10)]
    losses = [4.0, *np.linspace(loss + 0.5 if early is None else early, loss, 10)]
    return {
        "validation": [{"step": s, "loss": v, "bits": v / math.log(2)} for s, v in zip(steps, losses, strict=True)],
        "final": {"loss": loss, "bits": loss / math.log(2) if bits is None else bits},
        "train": [{"step": i, "loss": v} for i, v in enumerate(train or [2.0] * 10)],
        "gradients": [{"step": 50 * i, "norm": list(norms)} for i, norms in enumerate(gradients)],
        "attention": [{"step": 100 * i, "score_std": [s] * 2, "entropy": [e] * 2} for i, (s, e) in enumerate(inside)],
        "parameters": parameters,
        "characters_per_token": 2.5,
        "seconds": 1.0,
    }


@pytest.fixture
def told(text):
    """The paragraph of an experiment whose settings have these results, a function of the seed's noise each."""
    place = Place(str(text), "cpu")

    def paragraph(name, *results, noise=NOISE):
        runs = EXPERIMENTS[name].runs(CPU, place)
        assert len(runs) == len(results)
        groups = {
            label: Group(label, run, [make(shift) for shift in noise])
            for (label, run), make in zip(runs.items(), results, strict=True)
        }
        return TELL[name](groups)

    return paragraph


def ending(loss, **options):
    """Seeds shift every setting alike, so that differences are sharp."""
    return lambda shift: result(loss + shift, **options)


def scattered(loss):
    """Seeds shift this setting otherwise than the others."""
    return lambda shift: result(loss - 3 * shift)


@pytest.mark.parametrize("degrees", range(1, len(_T95) + 1))
def test_the_quantiles_are_students(degrees):
    """Against an integral of the density over [-t, t]."""
    t = np.tan(np.linspace(-1, 1, 400_001) * math.atan(_T95[degrees - 1]))
    scale = math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2) / math.sqrt(degrees * math.pi)
    assert np.trapezoid(scale * (1 + t * t / degrees) ** (-(degrees + 1) / 2), t) == pytest.approx(0.95, abs=2e-4)


def test_a_difference_is_taken_seed_by_seed():
    found = Difference.of(np.array([11.0, 22.0, 33.0]), np.array([10.0, 20.0, 30.0]))
    assert (found.mean, found.sd) == (2.0, 1.0) and found.high - found.mean == pytest.approx(4.303 / math.sqrt(3))
    assert found.sign == 0
    assert Difference.of(np.array([11.0, 21.1, 31.0]), np.array([10.0, 20.0, 30.0])).sign == 1
    assert Difference.of(np.array([1.0]), np.array([2.0])).sign == 0
    assert Difference.of(np.array([1.0, 1.0]), np.array([1.0, 1.0])).sign == 0
    assert Difference.of(np.array([1.0, math.nan]), np.array([1.0, 1.0])).sign == 0


def test_a_comparison_in_words():
    a, b = np.array([1.0, 1.1, 1.2]), np.array([1.5, 1.6, 1.71])
    assert compared("x", a, "y", b, said=-1).startswith("x is lower than y by 0.503 ± 0.006 seed by seed")
    assert compared("x", a, "y", b, said=-1).endswith(f", {SAID}.")
    assert compared("x", a, "y", b, said=1).endswith(f": {OPPOSITE}.")
    assert compared("y", b, "x", a, said=1).endswith(f", {SAID}.")
    assert compared("x", a, "y", b, said=0).endswith("where usually no difference is expected.")
    assert "lower in 1 of 3" in compared("x", a, "y", a[::-1]) and "do not tell them apart." in compared(
        "x", a, "y", a[::-1]
    )
    assert "nor show them equal" in compared("x", a, "y", a[::-1], said=0)
    assert OPEN in compared("x", a, "y", a[::-1], said=1)
    alone = compared("x", a[:1], "y", b[:1], said=-1)
    assert alone.startswith("x is lower by 0.500 than y in this one seed, which says nothing") and SAID not in alone
    assert "y did not stay finite" in compared("x", a, "y", np.array([1.0, math.nan, 1.0]), said=1)


def test_numbers_keep_a_digit():
    assert number(1234.5678) == "1,234.568" and number(0.00001) == "1e-05" and number(0.0) == "0.000"
    assert number(math.nan) == "not a finite number"
    assert spread(np.array([1.0, 2.0])) == "1.500 ± 0.707" and spread(np.array([1.0])) == "1.000"


def test_rates(told):
    rough, smooth = [2.0, 2.5] * 5, [2.0, 2.01] * 5
    usual = told("rates", ending(1.5, train=rough), ending(2.0, train=smooth), ending(2.5, train=smooth))
    assert usual.count(SAID) == 3 and OPPOSITE not in usual and "1e-3 had reached the last loss of 1e-4" in usual
    other = told("rates", ending(2.5), ending(2.0), ending(1.5))
    assert other.count(OPPOSITE) == 2 and "had reached" not in other
    assert "rough" not in told("rates", *[lambda s: result(2.0 + s, train=[1.0, 2.0])] * 3)  # two points have none
    assert told("rates", ending(2.0), scattered(2.0), ending(2.0)).count(OPEN) >= 1
    assert "1e-3 1.500 ± 0.010, 1e-4 2.000 ± 0.010 and 1e-5 2.500 ± 0.010" in usual


def test_size(told):
    small, large = ending(2.0, parameters=100), ending(1.5, early=2.5, parameters=700)
    usual = told("size", small, large)
    # A seventh of the 700 steps of the run is step 100, the last of these points.
    assert SAID in usual and "gets through 14% of its steps; there" in usual and "it stood at 1.500 ± 0.010" in usual
    assert OPPOSITE in told("size", ending(1.5), ending(2.0)) and OPEN in told("size", ending(2.0), scattered(2.0))


def test_shape_and_positions(told):
    alike = told("shape", ending(2.0), ending(1.8), scattered(2.0))
    assert "4 x 128 is higher than that of 2 x 256 by 0.200" in alike and "nor show them equal" in alike
    assert "where usually no difference is expected" in told("shape", ending(2.0), ending(1.8), ending(2.3))
    assert "nor show them equal" in told("positions", ending(2.0), scattered(2.0))
    for learned, word in ((1.9, "lower"), (2.1, "higher")):
        said = told("positions", ending(learned), ending(2.0))
        assert f"learned positions is {word} than" in said and "where usually no difference is expected" in said


def test_tokens(told):
    mixed = told("tokens", *(lambda s, b=b: result(2.0 + s, bits=b + s) for b in (2.0, 1.8, 2.2)))
    steps, characters = mixed.split("With as many characters seen")
    assert SAID in steps and OPPOSITE in characters and "2.50 characters" in steps


def samples(values, reference, shift):
    names = ("distinct_1", "distinct_2", "entropy", "known", "repetition")
    made = [{"temperature": t, "text": "x" * 9} | {n: v + shift for n in names} for t, v in zip((0.5, 1, 1.5), values,
            strict=True)]  # fmt: skip
    return result() | {"samples": made, "reference": dict.fromkeys(names, reference)}


def test_temperature(told):
    def jitter(values):
        return lambda s: samples([values[0] + s / 10, *values[1:]], 0.71, s)

    rising = told("temperature", jitter((0.2, 0.7, 0.8)))
    assert rising.count(f"it rises, {SAID}") == 3 and rising.count(f"it rises: {OPPOSITE}") == 2
    falling = told("temperature", jitter((0.8, 0.7, 0.2)))
    assert falling.count(f"it falls, {SAID}") == 2 and falling.count(f"it falls: {OPPOSITE}") == 3
    assert "distinct words at 1," in rising
    flat = told("temperature", lambda s: samples([0.5 + 3 * s, 0.5, 0.5 - 3 * s], 0.5, 0))
    assert flat.count("these seeds do not tell whether") == 5


def test_scaling(told):
    def inside(loss, std, entropy):
        return lambda s: result(loss + s, inside=((std + s, 0.9), (std + s, entropy + s / 10)))

    usual = told("scaling", *(inside(2.0, 0.3, 0.8), inside(2.3, 1.7, 0.4)) * 2)
    assert usual.count(SAID) == 4 and OPPOSITE not in usual and "from 90.0% ± 0.0% to 80.0% ± 0.1% with it" in usual
    other = told("scaling", *(inside(2.3, 0.3, 0.4), inside(2.0, 1.7, 0.8)) * 2)
    assert other.count(OPPOSITE) == 4 and SAID + "." not in other
    assert "sqrt(d) = 5.66" in usual and "sqrt(d) = 11.31" in usual


def test_residuals(told):
    def depth(loss, first, last):
        return lambda s: result(loss + s, gradients=((first + s, 1.0),) * 2 + ((last + s / 100, 1.0),))

    usual = told("residuals", depth(2.0, 2.0, 1.0), depth(3.0, 1.0, 0.01))
    assert usual.count(SAID) == 3
    other = told("residuals", depth(3.0, 1.0, 0.01), depth(2.0, 2.0, 1.0))
    assert other.count(OPPOSITE) == 3


def costs(times, kept):
    """Results for the groups of the kernels experiment, in its order: seconds by backend, and bytes by backend."""

    def timed(seconds):
        return lambda s: {"kept_bytes": 1, "tokens": 768, "times": [seconds + s / 100] * 3, "seconds": 1.0}

    def counted(size):
        return lambda s: {"kept_bytes": size, "tokens": 1, "seconds": 1.0}

    made = []
    for backend, size in kept.items():
        made += [timed(times[backend])] if backend in times else []
        made += [counted(size * length) for length in CPU.lengths]
    return made


def test_kernels(told, monkeypatch):
    monkeypatch.setattr("minigpt.experiments.catalogue.backends_here", lambda place: ["eager", "torch", "triton"])
    usual = told("kernels", *costs({"eager": 0.3, "torch": 0.2}, {"eager": 300, "torch": 200, "triton": 100}))
    assert "interpreter here, whose time says nothing" in usual and "Torch keeps 33.3% less than eager" in usual
    assert "Triton keeps 50.0% less than torch, as" in usual and OPPOSITE not in usual
    assert "triton 2.00" in usual and "eager 300.0 ± 0.1 ms and torch 200.0 ± 0.1 ms." in usual
    other = told("kernels", *costs({"eager": 0.2, "torch": 0.3}, {"eager": 200, "torch": 300, "triton": 300}))
    assert "Torch keeps 50.0% more than eager: the opposite" in other and "Triton keeps as much as torch." in other
    assert "torch is higher than that of eager by 100.0" in other
    monkeypatch.setattr("minigpt.experiments.catalogue.backends_here", lambda place: ["eager", "torch"])
    assert "cannot run on this device" in told(
        "kernels", *costs({"eager": 0.3, "torch": 0.2}, {"eager": 3, "torch": 2})
    )


def test_initial(told):
    def both(early, late):
        """The larger, then 0.02, whose losses are lower by these early and late."""
        return (
            lambda s: result(2.0 + s, early=3.0),
            lambda s: result(2.0 + 1.1 * s - late, early=3.0 + s / 10 - early),
        )

    crossing, behind, ahead = both(0.2, -0.1), both(-0.2, -0.1), both(0.2, 0.1)
    assert "At every width the smaller standard deviation learns faster at first and ends worse" in told(
        "initial", *crossing * 3
    )
    assert "At 1 of 3 widths the smaller" in told("initial", *crossing, *behind * 2)
    assert "At every width the larger standard deviation has the lower loss at the end" in told("initial", *behind * 3)
    assert "At every width the smaller standard deviation has the lower loss at the end" in told("initial", *ahead * 3)
    assert "do not differ in one way" in told("initial", *behind, *both(-0.2, 0.1), *ahead)


def test_every_experiment_is_told(told):
    assert list(TELL) == list(EXPERIMENTS)
