"""What came out of each experiment, in words that follow from its numbers and from nothing else."""

import math
from collections.abc import Callable

import numpy as np

from .groups import (
    Groups,
    costs,
    early_point,
    gradient_ratio,
    reached_at,
    sampled,
    training_roughness,
)
from .words import (
    Difference,
    compared,
    factor,
    listed,
    number,
    paragraph,
    percent,
    seeds_told,
    sentence,
    spread,
    verdict,
)

MEASURES = {
    "distinct_1": ("distinct words", 1),
    "distinct_2": ("distinct pairs of words", 1),
    "entropy": ("the entropy of character trigrams", 1),
    "known": ("words that the training text has", -1),
    "repetition": ("words that repeat one of the 16 before", -1),
}
"""What `diversity` measures, and which way it is usually said to go as the temperature rises."""


def rates(groups: Groups) -> str:
    ends = _ends(groups)
    (fast, best), *slower = groups.items()
    parts = [ends]
    for label, group in slower:
        parts.append(compared(f"the loss of {label}", group.final(), f"that of {fast}", best.final(), said=1))
        reached = reached_at(best, group.end())
        if np.isfinite(reached).all():
            told = f"{spread(reached, 0)} of {group.run.steps:,} steps"
            parts.append(f"{fast} had reached the last loss of {label} after {told}.")
    if len(best.results[0]["train"]) < 6:
        return paragraph(parts)  # too few points to be rough
    rough = {label: training_roughness(group) for label, group in groups.items()}
    told = ", ".join(f"{number(float(values.mean()), 4)} at {label}" for label, values in rough.items())
    parts.append(
        "How rough the training loss is in the second half, as the standard deviation from one of its points to the "
        f"next: {told}."
    )
    last = list(groups)[-1]
    parts.append(compared(f"the roughness of {last}", rough[last], f"that of {fast}", rough[fast], said=-1, digits=4))
    return paragraph(parts)


def size(groups: Groups) -> str:
    small, large = groups.values()
    told = f"The models have {small.parameters:,} and {large.parameters:,} parameters. "
    parts = [told + _ends(groups)]
    parts.append(compared("the loss of the larger", large.final(), "that of the smaller", small.final(), said=-1))
    times = large.parameters / small.parameters
    steps, losses = large.curve("validation", "loss")
    at = small.run.steps / times
    same = np.array([np.interp(at, steps, row) for row in losses])
    parts.append(
        f"With the arithmetic of the whole smaller run the larger one gets through {1 / times:.0%} of its steps; "
        f"there, with most of its schedule still to come, it stood at {spread(same)}."
    )
    parts.append(compared("its loss there", same, "that of the smaller at its end", small.end()))
    return paragraph(parts)


def shape(groups: Groups) -> str:
    deep, wide, equal = groups.values()
    told = ", ".join(f"{label} has {group.parameters:,}" for label, group in groups.items())
    parts = [f"Layers times channels is the same in 4 x 128 and 2 x 256, parameters are not: {told}."]
    parts.append(_ends(groups))
    parts.append(compared("the loss of 4 x 128", deep.final(), "that of 2 x 256", wide.final()))
    parts.append("Held to the same number of parameters, depth against width:")
    parts.append(compared("the loss of 4 x 128", deep.final(), "that of 2 x 180", equal.final(), said=0))
    return paragraph(parts)


def positions(groups: Groups) -> str:
    learned, fixed = groups.values()
    parts = [_ends(groups)]
    one, other = "the loss of learned positions", "that of fixed ones"
    parts.append(compared(one, learned.final(), other, fixed.final(), said=0))
    steps, a = learned.curve("validation", "loss")
    _, b = fixed.curve("validation", "loss")
    early = early_point(steps)
    parts.append(f"Early, at step {steps[early]:,}:")
    parts.append(compared(one, a[:, early], other, b[:, early]))
    return paragraph(parts)


def tokens(groups: Groups) -> str:
    chars, steps, same = groups.values()
    each = steps.results[0]["characters_per_token"]
    parts = [
        f"A BPE token stands for {number(each, 2)} characters of the training text, so that a window of as many tokens "
        f"shows the model {number(each, 2)} times the text; the larger vocabulary makes the model "
        f"{steps.parameters:,} parameters for {chars.parameters:,}. Its merges are learnt from all of the text, the "
        "validating tenth too. Bits per character at the end: "
        + listed(f"{label} {spread(group.final('bits'))}" for label, group in groups.items())
        + f" ({seeds_told(chars.seeds)})."
    ]
    for group, what in ((steps, "as many steps"), (same, "as many characters seen")):
        parts.append(f"With {what} ({group.run.steps:,} steps for {chars.run.steps:,}):")
        parts.append(compared("BPE", group.final("bits"), "the model of characters", chars.final("bits"), said=-1))
    return paragraph(parts)


def temperature(groups: Groups) -> str:
    (group,) = groups.values()
    temperatures, measured, reference = sampled(group)
    length = len(group.results[0]["samples"][0]["text"])
    parts = [
        f"Each text is {length:,} characters long, by a model at {spread(group.final())} nats per character "
        f"({seeds_told(group.seeds)})."
    ]
    low, high = temperatures[0], temperatures[-1]
    for name, (words, said) in MEASURES.items():
        values = measured[name]
        unit = (lambda v: spread(v, 2) + " bits") if name == "entropy" else percent
        told = ", ".join(f"{unit(values[:, i])} at {t:g}" for i, t in enumerate(temperatures))
        difference = Difference.of(values[:, -1], values[:, 0])
        if difference.sign:
            way = "rises" if difference.sign > 0 else "falls"
            end = f"from {low:g} to {high:g} it {way}{verdict(difference.sign, said)}"
        else:
            end = f"these seeds do not tell whether it changes from {low:g} to {high:g}"
        parts.append(f"{sentence(words)}: {told}, {unit(reference[name])} in the validation text; {end}.")
    closest = {name: _closest(measured[name], reference[name], temperatures) for name in MEASURES}
    told = listed(f"{MEASURES[name][0]} at {t:g}" for name, t in closest.items() if t is not None)
    parts.append(f"Closest to the validation text, in the mean: {told}.")
    return paragraph(parts)


def scaling(groups: Groups) -> str:
    parts = [_ends(groups)]
    labels = list(groups)
    for with_, without in zip(labels[::2], labels[1::2], strict=True):
        a, b, d = groups[with_], groups[without], groups[with_].run.n_embd // groups[with_].run.n_head
        std = {g.label: [g.layers("attention", "score_std", at).mean(axis=1) for at in (0, -1)] for g in (a, b)}
        entropy = {g.label: [g.layers("attention", "entropy", at).mean(axis=1) for at in (0, -1)] for g in (a, b)}
        parts.append(
            f"With heads of d = {d}, in the mean of the layers: without the division the scores begin "
            f"{spread(std[without][0] / std[with_][0], 2)} times as wide (sqrt(d) = {number(math.sqrt(d), 2)}), with a "
            f"standard deviation of {spread(std[without][0], 2)} for {spread(std[with_][0], 2)}, and end at "
            f"{spread(std[without][1], 2)} for {spread(std[with_][1], 2)}. The entropy of attention, of the most that "
            f"it can be, goes from {percent(entropy[without][0])} to {percent(entropy[without][1])} without it, and "
            f"from {percent(entropy[with_][0])} to {percent(entropy[with_][1])} with it."
        )
        shares = entropy[without][1], entropy[with_][1]
        parts.append(compared("that share at the end without it", shares[0], "that with it", shares[1], said=-1))
        parts.append(compared("the loss at the end without it", b.final(), "that with it", a.final(), said=1))
    return paragraph(parts)


def residuals(groups: Groups) -> str:
    with_, without = groups.values()
    parts = [_ends(groups)]
    parts.append(compared("the loss without residuals", without.final(), "that with them", with_.final(), said=1))
    layers = with_.run.n_layer
    fall = {g.label: [gradient_ratio(g, at) for at in (0, 1, 2)] for g in (with_, without)}
    steps = [row["step"] for row in with_.results[0]["gradients"]]
    for label, values in fall.items():
        means = [float(np.exp(np.log(v).mean())) for v in values]
        told = listed(f"{factor(mean)} at step {step:,}" for mean, step in zip(means, steps, strict=True))
        parts.append(
            f"{sentence(label)} them the norm of the gradient of block 1 is that of block {layers} times {told} "
            "(geometric means)."
        )
    for at, when in ((0, "at the start"), (2, "at the end")):
        logs = [np.log10(fall[g.label][at]) for g in (without, with_)]
        parts.append(f"Does it vanish, {when}, in powers of ten of that ratio:")
        parts.append(compared("the power without them", logs[0], "that with them", logs[1], said=-1, digits=2))
    return paragraph(parts)


def kernels(groups: Groups) -> str:
    timed, kept = costs(groups)
    parts = []
    if timed:
        told = listed(f"{name} {spread(np.median(v, axis=1) * 1e3, 1)} ms" for name, v in timed.items())
        group = groups[f"{next(iter(timed))}, a step"]
        parts.append(
            f"A step of {group.results[0]['tokens']:,} tokens, the median of {group.run.steps} steps, "
            f"measured {group.seeds} times in turns (mean ± standard deviation): {told}."
        )
        a, b = (np.median(timed[name], axis=1) * 1e3 for name in ("torch", "eager"))
        parts.append(compared("the time of torch", a, "that of eager", b, said=-1, digits=1))
        if "triton" in timed:
            c = np.median(timed["triton"], axis=1) * 1e3
            parts.append(compared("the time of triton", c, "that of torch", a, digits=1))
    if "triton" not in kept:
        parts.append("The Triton kernels cannot run on this device, so nothing is said about them.")
    elif "triton" not in timed:
        parts.append(
            "The Triton kernels run in Triton's interpreter here, whose time says nothing about them, so none is given."
        )
    lengths = sorted(kept["torch"])
    told = listed(f"{name} {number(values[lengths[-1]] / 2**20, 2)} MiB" for name, values in kept.items())
    parts.append(f"One window of {lengths[-1]:,} tokens leaves for backward, parameters left out: {told}.")
    growth = listed(f"{name} {number(values[lengths[-1]] / values[lengths[-2]], 2)}" for name, values in kept.items())
    parts.append(f"From {lengths[-2]:,} to {lengths[-1]:,} tokens that grows by these factors: {growth}.")
    for name, against in (("torch", "eager"), ("triton", "torch")):
        if name in kept:
            apart = kept[name][lengths[-1]] / kept[against][lengths[-1]] - 1
            way = "less than" if apart < 0 else "more than" if apart > 0 else "as much as"
            much = f"{abs(apart):.1%} " if apart else ""
            sign = -1 if apart < 0 else 1
            parts.append(f"{sentence(name)} keeps {much}{way} {against}{verdict(sign, -1) if apart else ''}.")
    return paragraph(parts)


def initial(groups: Groups) -> str:
    parts = []
    labels = list(groups)
    outcomes = []
    for by_width, fixed in zip(labels[::2], labels[1::2], strict=True):
        a, b = groups[fixed], groups[by_width]
        steps, small = a.curve("validation", "loss")
        _, large = b.curve("validation", "loss")
        early = early_point(steps)
        signs = [Difference.of(small[:, at], large[:, at]).sign for at in (early, -1)]
        outcomes.append(tuple(signs))
        times = number(math.sqrt(768 / a.run.n_embd), 1)
        parts.append(f"Width {a.run.n_embd}, where 0.02 sqrt(768 / width) is {times} times 0.02:")
        for at in (early, -1):
            parts.append(
                compared(f"at step {steps[at]:,} the loss of 0.02", small[:, at], "that of the larger", large[:, at])
            )
    return paragraph([_crossing(outcomes, seeds_told(groups[labels[0]].seeds)), *parts])


def _crossing(outcomes: list[tuple[int, int]], told: str) -> str:
    """What the signs, early and late, of each width come to."""
    crossed = sum(outcome == (-1, 1) for outcome in outcomes)
    widths = len(outcomes)
    if crossed == widths:
        return (
            f"At every width the smaller standard deviation learns faster at first and ends worse ({told}): the first "
            "steps show the opposite of the end, so that a choice made by them is the wrong one."
        )
    if crossed:
        return (
            f"At {crossed} of {widths} widths the smaller standard deviation learns faster at first and ends worse "
            f"({told}); at the others these seeds do not show that."
        )
    for at, when in ((1, "at the end"), (0, "early")):
        signs = {outcome[at] for outcome in outcomes}
        if signs in ({-1}, {1}):
            better = "smaller" if signs == {-1} else "larger"
            return (
                f"At every width the {better} standard deviation has the lower loss {when} ({told}), with no crossing."
            )
    return f"The two do not differ in one way at every width, neither early nor at the end ({told})."


def _ends(groups: Groups) -> str:
    first = next(iter(groups.values()))
    told = listed(f"{label} {spread(group.final())}" for label, group in groups.items())
    return (
        f"Validation loss after {first.run.steps:,} steps, in nats per character: {told} ({seeds_told(first.seeds)})."
    )


def _closest(measured: np.ndarray, reference: np.ndarray, temperatures: list[float]) -> float | None:
    """The temperature whose mean is nearest to the reference; None where several are, or a text had no words."""
    if not (np.isfinite(measured).all() and np.isfinite(reference).all()):
        return None
    distance = np.abs(measured.mean(axis=0) - reference.mean())
    nearest = np.flatnonzero(distance == distance.min())
    return temperatures[nearest[0]] if len(nearest) == 1 else None


TELL: dict[str, Callable[[Groups], str]] = {
    function.__name__: function
    for function in (rates, size, shape, positions, tokens, temperature, scaling, residuals, kernels, initial)
}
"""The paragraph of each experiment, from its results."""
