"""The picture of a run: loss and perplexity, train and validation, over the steps."""

import csv
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from .errors import UserError, writing

INK, QUIET, GRID = "#24292f", "#6e7781", "#e4e7eb"
COLORS = {"train": "#2f6fbb", "validation": "#d4572a"}
STYLE = {
    "font.size": 12,
    "text.color": INK,
    "axes.edgecolor": "#b6bdc5",
    "axes.labelcolor": INK,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
}

Series = tuple[np.ndarray, np.ndarray]
"""Steps and losses in nats per token, (N,) float64 each, in order of step."""


def curves(metrics_csv: Path, png: Path, *, title: str = "") -> None:
    """Draw the run recorded in `metrics_csv` to `png`, 1760 x 720 pixels, with `title` above it.

    The file needs the columns `step`, `train_loss` and `val_loss` (nats per token; empty where nothing was measured).
    Where a step stands there twice, the later line counts. Losses that are not finite are left out. Needs no display.
    Raises UserError when the file is missing or is no such table, and when the picture cannot be written.
    """
    series = {"train": _read(metrics_csv, "train_loss"), "validation": _read(metrics_csv, "val_loss")}
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 4.5), dpi=160, layout="constrained")
        figure.get_layout_engine().set(wspace=0.04, w_pad=0.12, h_pad=0.1)
        if title:
            figure.suptitle(title, x=0.012, ha="left", fontsize=12, color=QUIET)
        loss, perplexity = figure.subplots(1, 2)
        _panel(loss, "Loss", "nats per token", series, lambda losses: losses)
        _panel(perplexity, "Perplexity", "exp(loss), log scale", series, _exp)
        _logarithmic(perplexity)
        for axes in (loss, perplexity):
            _label_ends(axes)
        save(figure, png)


def comparison(losses: tuple[np.ndarray, np.ndarray], names: tuple[str, str], png: Path, *, title: str = "") -> None:
    """Draw the losses of two sets of runs, (seeds, steps) each in nats per token, and how far their means are apart.

    Beside the distance stands the one that seeds alone explain. Raises UserError when the picture cannot be written.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 4.5), dpi=160, layout="constrained")
        figure.get_layout_engine().set(wspace=0.04, w_pad=0.12, h_pad=0.1)
        if title:
            figure.suptitle(title, x=0.012, ha="left", fontsize=12, color=QUIET)
        both, apart = figure.subplots(1, 2)
        steps = np.arange(1, losses[0].shape[1] + 1)
        frame(both, "Training loss", "nats per token: the mean of the seeds, and all of them")
        for values, name, color, style in zip(losses, names, COLORS.values(), ("-", (0, (4, 3))), strict=True):
            both.fill_between(steps, values.min(axis=0), values.max(axis=0), color=color, alpha=0.13, linewidth=0)
            both.plot(steps, values.mean(axis=0), color=color, linestyle=style, linewidth=2.0, label=name)
        both.legend(frameon=False)
        frame(apart, "Distance of the means", "nats per token, log scale")
        distance = np.abs(losses[0].mean(axis=0) - losses[1].mean(axis=0))
        spread = np.sqrt(np.mean([values.var(axis=0, ddof=1) for values in losses], axis=0))
        smallest = 1e-9  # equal bits have a distance too that a logarithm can show
        apart.plot(steps, np.maximum(distance, smallest), color=INK, linewidth=2.0, label="measured")
        explained = 2 * spread * np.sqrt(2 / len(losses[0]))
        apart.plot(steps, np.maximum(explained, smallest), color=QUIET, linestyle=":", label="explained by seeds alone")
        apart.set_yscale("log")
        apart.legend(frameon=False)
        save(figure, png)


def save(figure: Figure, png: Path) -> None:
    """Write a picture whole, or not at all. Raises UserError when it cannot be written."""
    temporary = png.with_name(f"{png.name}.tmp")
    with writing(png):
        try:
            figure.savefig(temporary, format="png")
            os.replace(temporary, png)
        finally:
            temporary.unlink(missing_ok=True)


def _read(path: Path, column: str) -> Series:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            if not {"step", column} <= set(rows.fieldnames or ()):
                raise UserError(f"{path} has no columns step and {column}: it is not the metrics.csv of a run")
            points = {_number(row["step"]): _number(row[column]) for row in rows if row[column]}
    except FileNotFoundError:
        raise UserError(f"there is no {path}: give the folder of a run that has trained") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a table ({error})") from None
    finite = sorted((step, loss) for step, loss in points.items() if math.isfinite(step) and math.isfinite(loss))
    steps, losses = np.array(finite, dtype=np.float64).reshape(-1, 2).T
    return steps, losses


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:  # a line that was cut off while it was written
        return math.nan


def _exp(losses: np.ndarray) -> np.ndarray:
    return np.exp(np.minimum(losses, 100.0))  # a larger one has no place on an axis


def _smooth(values: np.ndarray) -> np.ndarray:
    """The moving average over about a thirtieth of the points.

    The window is centred, and shrinks towards the start: averaged with what follows it alone, the steep beginning would
    look lower than it was.
    """
    index = np.arange(len(values))
    reach = np.minimum(len(values) // 60, index)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low, high = index - reach, np.minimum(index + reach + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def frame(axes: Axes, title: str, unit: str, *, xlabel: str = "step") -> None:
    """Give a panel its title, the unit below it, the name of its horizontal axis, and quiet grid lines."""
    axes.set_title(title, loc="left", pad=22)
    axes.text(0, 1.025, unit, transform=axes.transAxes, color=QUIET, fontsize=10.5)
    axes.set_xlabel(xlabel)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.grid(axis="y", color=GRID, linewidth=0.9)
    axes.set_axisbelow(True)
    axes.margins(x=0.02)


def _panel(axes: Axes, title: str, unit: str, series: dict[str, Series], scale: Callable) -> None:
    frame(axes, title, unit)
    for name, (steps, losses) in series.items():
        if not len(steps):
            continue
        color, average = COLORS[name], _smooth(losses)
        if not np.array_equal(average, losses):
            axes.plot(steps, scale(losses), color=color, alpha=0.22, linewidth=0.8)
        dots = {"marker": "o", "markersize": 4.5} if len(steps) <= 40 else {}
        axes.plot(steps, scale(average), color=color, linewidth=2.0, label=name, solid_capstyle="round", **dots)
    if not axes.lines:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "nothing measured yet", transform=axes.transAxes, ha="center", color=QUIET)
    elif len(shown := {step for line in axes.lines for step in line.get_xdata()}) == 1:
        (step,) = shown
        axes.set_xlim(step - 1, step + 1)


def _logarithmic(axes: Axes) -> None:
    if not axes.lines:
        return
    values = np.concatenate([line.get_ydata() for line in axes.lines])
    low, high = values.min(), values.max()
    room = max((high / low) ** 0.06, 1.1)
    axes.set_yscale("log")
    axes.set_ylim(low / room, high * room)
    # Round numbers as they are said, 20 and not 2 x 10^1.
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 12 * low else (1, 1.5, 2, 3, 4, 5, 7)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _label_ends(axes: Axes) -> None:
    """Write each curve's name and last value to its right, moved apart where they would overlap."""
    labelled = [line for line in axes.lines if line.get_label() in COLORS]
    if not labelled:
        return
    axes.autoscale_view()  # what is drawn last decides the limits, and they the places
    to_fraction = axes.transScale + axes.transLimits
    apart = 0.085  # of the panel's height: one line of text
    ends = sorted(
        ((to_fraction.transform(line.get_xydata()[-1])[1], line) for line in labelled), key=lambda end: end[0]
    )
    places = [place for place, _ in ends]
    if len(places) == 2 and places[1] - places[0] < apart:
        middle = min(max(sum(places) / 2, apart / 2), 1 - apart / 2)
        places = [middle - apart / 2, middle + apart / 2]
    for place, (_, line) in zip(places, ends, strict=True):
        value = line.get_ydata()[-1]
        axes.annotate(
            f"{line.get_label()} {value:#.3g}" if value < 100 else f"{line.get_label()} {value:,.0f}",
            (1.015, place),
            xycoords="axes fraction",
            color=line.get_color(),
            fontweight="bold",
            fontsize=11,
            va="center",
        )
