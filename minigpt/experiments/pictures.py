"""The picture of each experiment: what was measured, with the spread over seeds as a band or as points."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from ..plots import INK, QUIET, STYLE, frame, save
from .groups import Group, Groups
from .paragraphs import costs, sampled

COLORS = ("#2f6fbb", "#d4572a", "#3a8f5c", "#8a5fbf", "#b8860b", "#5b6770")
_DASHES = ("-", (0, (5, 2)))
_NATS = "nats per character; bands: range of the seeds"
_BITS = "bits per character; bands: range of the seeds"
_DOTS = "points: seeds; lines: their mean"
_TITLES = {
    "distinct_1": "Distinct words",
    "distinct_2": "Distinct pairs",
    "entropy": "Trigram entropy",
    "known": "Known words",
    "repetition": "Repeats",
}


def draw(name: str, groups: Groups, png: Path, title: str) -> None:
    """Draw experiment `name` to `png`, 1760 pixels wide. Raises UserError when it cannot be written."""
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 4.9), dpi=160, layout="constrained")
        figure.get_layout_engine().set(wspace=0.05, w_pad=0.12, h_pad=0.1)
        figure.suptitle(title, x=0.012, ha="left", fontsize=12, color=QUIET)
        _DRAW[name](figure, groups)
        save(figure, png)


def _rates(figure: Figure, groups: Groups) -> None:
    training, validation = figure.subplots(1, 2)
    frame(training, "Training loss", _NATS)
    for color, group in zip(COLORS, groups.values(), strict=False):
        _band(training, *group.curve("train", "loss"), color)
    _losses(validation, groups)
    low = min(axes.get_ylim()[0] for axes in (training, validation))
    high = max(axes.get_ylim()[1] for axes in (training, validation))
    for axes in (training, validation):
        axes.set_ylim(low, high)
    _legend(figure, validation)


def _positions(figure: Figure, groups: Groups) -> None:
    curves, ends = figure.subplots(1, 2, width_ratios=(3, 2))
    _losses(curves, groups)
    _points(ends, {label: group.final() for label, group in groups.items()}, "Validation loss at the end")
    _legend(figure, curves)


def _size(figure: Figure, groups: Groups) -> None:
    left, right = figure.subplots(1, 2)
    named = {f"{label}: {group.parameters:,} parameters": group for label, group in groups.items()}
    _losses(left, named)
    frame(right, "The same over arithmetic", _NATS, xlabel="6 x parameters x tokens, FLOP (log scale)")
    for color, group in zip(COLORS, groups.values(), strict=False):
        steps, values = group.curve("validation", "loss")
        tokens = steps * group.run.batch_size * group.run.block_size
        _band(right, 6.0 * group.parameters * tokens[1:], values[:, 1:], color)
    right.set_xscale("log")
    right.xaxis.set_major_formatter(FuncFormatter(_power))
    right.xaxis.set_minor_formatter(NullFormatter())
    _legend(figure, left)


def _shape(figure: Figure, groups: Groups) -> None:
    curves, ends = figure.subplots(1, 2, width_ratios=(3, 2))
    named = {f"{label}: {group.parameters:,} parameters": group for label, group in groups.items()}
    _losses(curves, named)
    _points(ends, {label: group.final() for label, group in groups.items()}, "Validation loss at the end")
    _legend(figure, curves)


def _tokens(figure: Figure, groups: Groups) -> None:
    left, right = figure.subplots(1, 2)
    _losses(left, groups, "bits", _BITS)
    frame(right, "The same over text", _BITS, xlabel="characters of text seen, millions")
    for color, group in zip(COLORS, groups.values(), strict=False):
        steps, values = group.curve("validation", "bits")
        tokens = steps * group.run.batch_size * group.run.block_size
        _band(right, tokens[1:] * group.results[0]["characters_per_token"] / 1e6, values[:, 1:], color)
    right.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    right.xaxis.set_major_locator(MaxNLocator(6))
    _legend(figure, left)


def _temperature(figure: Figure, groups: Groups) -> None:
    (group,) = groups.values()
    temperatures, measured, reference = sampled(group)
    for axes, (name, title) in zip(figure.subplots(1, len(_TITLES)), _TITLES.items(), strict=True):
        scale = 1 if name == "entropy" else 100
        values = {f"{t:g}": measured[name][:, i] * scale for i, t in enumerate(temperatures)}
        _points(axes, values, title, "bits" if name == "entropy" else "per cent", "temperature")
        line = axes.axhline(reference[name].mean() * scale, color=INK, linestyle=":", linewidth=1.4)
        line.set_label("the validation text, as many characters of it")
    _legend(figure, axes)


def _scaling(figure: Figure, groups: Groups) -> None:
    curves, scores, entropy = figure.subplots(1, 3, width_ratios=(4, 3, 3))
    _losses(curves, groups, pairs=True)
    places = (("score_std", scores, "Width of the scores", "standard deviation"),
              ("entropy", entropy, "Entropy of attention", "share of its largest value"))  # fmt: skip
    for column, axes, title, unit in places:
        frame(axes, title, unit, xlabel="mean of the layers")
        for color, style, group in _paired(groups):
            both = np.stack([group.layers("attention", column, at).mean(axis=1) for at in (0, -1)], axis=1)
            _band(axes, np.array([0, 1]), both, color, style, marker="o")
        axes.set_xticks([0, 1], ["start", "end"])
        axes.set_xlim(-0.15, 1.15)
    _logarithmic(scores)
    _legend(figure, curves)


def _residuals(figure: Figure, groups: Groups) -> None:
    curves, *depths = figure.subplots(1, 3, width_ratios=(4, 3, 3))
    named = {f"{label} residual connections": group for label, group in groups.items()}
    _losses(curves, named)
    rows = next(iter(groups.values())).results[0]["gradients"]
    for axes, at in zip(depths, (0, -1), strict=True):
        frame(axes, f"Gradient, step {rows[at]['step']:,}", "norm by depth, log scale", xlabel="block")
        for color, group in zip(COLORS, groups.values(), strict=False):
            norms = group.layers("gradients", "norm", at)
            _band(axes, np.arange(1, norms.shape[1] + 1), norms, color, marker="o")
        axes.set_yscale("log")
    low = min(axes.get_ylim()[0] for axes in depths)
    high = max(axes.get_ylim()[1] for axes in depths)
    for axes in depths:
        axes.set_ylim(low / 1.5, high * 1.5)
    _legend(figure, curves)


def _kernels(figure: Figure, groups: Groups) -> None:
    timed, kept = costs(groups)
    left, right = figure.subplots(1, 2)
    tokens = next(group.results[0]["tokens"] for group in groups.values() if group.run.steps)
    times = {name: np.median(values, axis=1) * 1e3 for name, values in timed.items()}
    missing = "; triton: no time in the interpreter" if "triton" in kept and "triton" not in timed else ""
    _points(left, times, f"Time of a step of {tokens:,} tokens", f"ms, medians{missing}", zero=True)
    frame(right, "Kept for backward, one window", "MiB, parameters left out, log scales", xlabel="tokens in the window")
    marks = zip(COLORS, kept.items(), ("-", "-", (0, (3, 3))), "so^", strict=False)
    for color, (name, by_length), style, marker in marks:
        sizes = np.array(list(by_length.values())) / 2**20
        right.plot(list(by_length), sizes, color=color, label=name, linestyle=style, marker=marker, linewidth=2)
    right.set_xscale("log", base=2)
    _logarithmic(right)
    lengths = list(kept["torch"])
    right.set_xticks(lengths, [f"{length:,}" for length in lengths])
    _legend(figure, right)


def _initial(figure: Figure, groups: Groups) -> None:
    panels = figure.subplots(1, 2)
    labels = list(groups)
    titles = ("0.02 against 0.02 sqrt(768 / width)", "The same, second half")
    for axes, title, second in zip(panels, titles, (False, True), strict=True):
        frame(axes, title, "difference of validation losses, nats; below 0: 0.02 leads")
        axes.axhline(0, color=INK, linewidth=1)
        for color, by_width, fixed in zip(COLORS, labels[::2], labels[1::2], strict=False):
            steps, small = groups[fixed].curve("validation", "loss")
            apart = small - groups[by_width].curve("validation", "loss")[1]
            first = len(steps) // 2 if second else 1
            _band(axes, steps[first:], apart[:, first:], color, label=f"width {groups[fixed].run.n_embd}")
    _legend(figure, panels[0])


def _losses(axes: Axes, groups: Groups, column: str = "loss", unit: str = _NATS, *, pairs: bool = False) -> None:
    frame(axes, "Validation loss", unit)
    for (color, style, group), label in zip(_paired(groups, pairs), groups, strict=True):
        steps, values = group.curve("validation", column)
        _band(axes, steps[1:], values[:, 1:], color, style, label=label)


def _paired(groups: Groups, pairs: bool = True) -> list[tuple[str, object, Group]]:
    """A colour for each group; with `pairs` for each two, the second of which is dashed."""
    if not pairs:
        return [(color, "-", group) for color, group in zip(COLORS, groups.values(), strict=False)]
    return [(COLORS[i // 2], _DASHES[i % 2], group) for i, group in enumerate(groups.values())]


def _band(
    axes: Axes, x: np.ndarray, values: np.ndarray, color: str, style: object = "-", *, label: str = "", marker: str = ""
) -> None:
    """Mean, and lowest to highest, of values (seeds, points)."""
    axes.fill_between(x, values.min(axis=0), values.max(axis=0), color=color, alpha=0.18, linewidth=0)
    options = {"label": label} if label else {}
    axes.plot(x, values.mean(axis=0), color=color, linestyle=style, linewidth=2, marker=marker, markersize=5, **options)


def _points(
    axes: Axes,
    values: dict[str, np.ndarray],
    title: str,
    unit: str = f"nats per character; {_DOTS}",
    xlabel: str = "",
    *,
    zero: bool = False,
) -> None:
    frame(axes, title, unit, xlabel=xlabel)
    for place, (color, seeds) in enumerate(zip(COLORS, values.values(), strict=False)):
        axes.plot(np.full(len(seeds), place), seeds, "o", color=color, alpha=0.65, markersize=7, markeredgewidth=0)
        mean = float(np.mean(seeds))
        axes.plot([place - 0.25, place + 0.25], [mean, mean], color=color, linewidth=2)
    axes.set_xticks(range(len(values)), [_wrapped(label, 12) for label in values])
    axes.set_xlim(-0.5, len(values) - 0.5)
    if zero:
        axes.set_ylim(0, 1.1 * max(float(np.max(seeds)) for seeds in values.values()))


def _logarithmic(axes: Axes) -> None:
    """A logarithmic axis with round numbers as they are said."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        place = {"loc": "outside lower center", "ncols": min(4, len(labels))}
        figure.legend(handles, labels, frameon=False, fontsize=11, **place)


def _wrapped(text: str, width: int) -> str:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def _power(value: float, _: int) -> str:
    exponent = math.floor(math.log10(value)) if value > 0 else 0
    return f"{value / 10**exponent:.0f}e{exponent}"


_DRAW: dict[str, Callable[[Figure, Groups], None]] = {
    "rates": _rates,
    "size": _size,
    "shape": _shape,
    "positions": _positions,
    "tokens": _tokens,
    "temperature": _temperature,
    "scaling": _scaling,
    "residuals": _residuals,
    "kernels": _kernels,
    "initial": _initial,
}
