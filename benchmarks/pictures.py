"""The pictures of a results file: times with their spread, the roofline, and the speed of training and generation."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from benchmarks import noise, results
from benchmarks.noise import AGAIN
from minigpt.errors import writing
from minigpt.plots import GRID, INK, QUIET, STYLE

COLORS = {
    "triton": "#d4572a", "torch": "#2f6fbb", "eager": "#8a939d", "compile": "#2a9d74", "torch-flash": "#5b4db7",
    "torch-cudnn": "#b0479b", "flex": "#c08a1e", "liger": "#1b9aaa", "cce": "#7a5c3e", "flash_attn": "#4f7942",
    "quack": "#a23b3b", "torch-chunked": "#6d9bd1",
}  # fmt: skip
MARKERS = "osD^vP<>X*h"
BUSY = "the machine was busy: read the report's warning"


def draw(document: dict[str, Any], path: Path) -> list[Path]:
    """Draw what the document has rows for, beside `path`; the files that were written."""
    rows = [row for row in document["rows"] if row["status"] == "ok" and not row.get("provider", "").endswith(AGAIN)]
    drawn = []
    if not rows or document["kind"] == "start":  # a few numbers, which a table tells
        return drawn
    with rc_context(STYLE):
        if document["kind"] != "kernels":
            place, what = {"train": ("preset", "Training"), "decode": ("case", "Generation")}[document["kind"]]
            for name in dict.fromkeys(row[place] for row in rows):
                mine = [row for row in rows if row[place] == name]
                slug = name.replace(", ", "-").replace(" ", "-")
                drawn.append(_save(_speeds(document, mine, f"{what} {name}"), path, slug))
            return drawn
        for op, dtype in dict.fromkeys((row["op"], row["dtype"]) for row in rows):
            mine = [row for row in rows if (row["op"], row["dtype"]) == (op, dtype)]
            drawn.append(_save(_times(document, mine), path, f"{op}-{dtype}"))
        for dtype in dict.fromkeys(row["dtype"] for row in rows):
            mine = [row for row in rows if row["dtype"] == dtype and results.rated(row["op"], row["pass"])]
            mine = [row for row in mine if row["tflops"] > 0 and row["intensity"] > 0]
            if mine and {"copy_gbps", f"matmul_tflops_{dtype}"} <= set(document["ceilings"]):
                drawn.append(_save(_roofline(document, mine, dtype), path, f"roofline-{dtype}"))
    return drawn


def _save(figure: Figure, path: Path, name: str) -> Path:
    target = path.with_name(f"{path.stem}-{name}.png")
    draft = target.with_name(target.name + ".writing")
    with writing(target):
        figure.savefig(draft, format="png")
        os.replace(draft, target)
    return target


def _plain(value: float, _: Any = None) -> str:
    return f"{value:,.10g}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _look(name: str, order: list[str]) -> dict[str, Any]:
    return {"color": COLORS.get(name, INK), "marker": MARKERS[order.index(name) % len(MARKERS)]}


def _title(figure: Figure, document: dict[str, Any], text: str) -> None:
    about = f"{document['machine']['name']}, torch {document['versions']['torch']}, {document['date'][:10]}"
    inch = 1 / figure.get_size_inches()[1]
    figure.text(0.012, 1 - 0.14 * inch, text, fontsize=13, fontweight="bold", color=INK, va="top")
    figure.text(0.012, 1 - 0.43 * inch, about, fontsize=10, color=QUIET, va="top")
    if noise.disturbed(document):
        figure.text(0.988, 1 - 0.43 * inch, BUSY, fontsize=10, color="#b00020", va="top", ha="right")


def _log(axis: Any, formatter: Callable = _plain) -> None:
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(formatter))
    axis.set_minor_formatter(NullFormatter())


# ---------------------------------------------------------------- times


def _times(document: dict[str, Any], rows: list[dict[str, Any]]) -> Figure:
    """A panel for each pass: cases from left to right, one mark a provider with its band, milliseconds upwards."""
    passes = list(dict.fromkeys(row["pass"] for row in rows))
    cases = list(dict.fromkeys(row["case"] for row in rows))
    names = [name for name in COLORS if any(row["provider"] == name for row in rows)]
    names += [name for name in dict.fromkeys(row["provider"] for row in rows) if name not in names]
    stacked = len(cases) > 4  # one panel above the other, where they would be too wide side by side
    rows_of_panels, columns = (len(passes), 1) if stacked else (1, len(passes))
    width = max(4.6, 1.0 * len(cases) + 1.5)
    size = (min(width, 14.0) * columns + 1.4, 2.9 * rows_of_panels + 2.1)
    figure = Figure(figsize=size, dpi=130)
    _title(figure, document, f"{rows[0]['op']}, {rows[0]['dtype']}: milliseconds a call")
    grid = figure.subplots(rows_of_panels, columns, sharey=not stacked, sharex=True, squeeze=False).flatten()
    turned = max(map(len, cases)) * len(cases) > 9 * min(width, 14.0)
    figure.subplots_adjust(
        left=0.9 / size[0], right=1 - 0.15 / size[0], top=1 - 1.05 / size[1], wspace=0.06, hspace=0.22,
        bottom=(1.65 if turned else 0.95) / size[1],
    )  # fmt: skip
    for axes, name in zip(grid, passes, strict=True):
        axes.set_title(name, loc="left", fontsize=11.5)
        _times_panel(axes, [row for row in rows if row["pass"] == name], cases, names, turned)
    handles, labels = [], []
    for axes in grid:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            if label not in labels:
                handles.append(handle)
                labels.append(label)
    figure.legend(handles, labels, loc="lower center", ncols=min(6, len(labels)), frameon=False, fontsize=10.5)
    return figure


def _times_panel(axes: Axes, rows: list[dict[str, Any]], cases: list[str], names: list[str], turned: bool) -> None:
    step = 0.62 / max(1, len(names))
    for place, name in enumerate(names):
        mine = {row["case"]: row for row in rows if row["provider"] == name}
        look = _look(name, names)
        label = name
        for index, case in enumerate(cases):
            if case not in mine:
                continue
            row = mine[case]
            x = index + (place - (len(names) - 1) / 2) * step
            low, high = row["p20_ms"], row["p80_ms"]
            axes.fill_between([x - 0.4 * step, x + 0.4 * step], low, high, color=look["color"], alpha=0.3, linewidth=0)
            axes.plot([x], [row["median_ms"]], linestyle="", markersize=6, label=label, **look)
            label = None
    axes.set_yscale("log")
    axes.tick_params(labelsize=10)
    low, high = min(row["p20_ms"] for row in rows), max(row["p80_ms"] for row in rows)
    bottom, top = axes.get_ylim()
    axes.set_ylim(min(bottom, low / 1.4), max(top, high * 1.4))
    _log(axes.yaxis)
    axes.set_xticks(
        range(len(cases)), cases, fontsize=10, rotation=30 if turned else 0, ha="right" if turned else "center"
    )
    axes.set_xlim(-0.55, len(cases) - 0.45)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for edge in range(1, len(cases)):
        axes.axvline(edge - 0.5, color=GRID, linewidth=0.8)


# ---------------------------------------------------------------- roofline


def _roofline(document: dict[str, Any], rows: list[dict[str, Any]], dtype: str) -> Figure:
    """Operations a byte to the right, operations a second upwards; under the roof made of the two measured ceilings."""
    ceilings = document["ceilings"]
    peak = ceilings[f"matmul_tflops_{dtype}"]
    unit, scale = ("TFLOP/s", 1.0) if peak >= 2 else ("GFLOP/s", 1e3)
    peak, bandwidth = peak * scale, ceilings["copy_gbps"] / 1e3 * scale
    ops = list(dict.fromkeys(row["op"] for row in rows))
    names = [name for name in COLORS if any(row["provider"] == name for row in rows)]
    figure = Figure(figsize=(9.6, 6), dpi=130)
    warm = any(row.get("l2") == "warm" for row in rows)
    _title(figure, document, f"Roofline, {dtype}" + (", caches warm: no roof for what fits into them" if warm else ""))
    axes = figure.subplots()
    figure.subplots_adjust(left=0.1, right=0.71, top=0.86, bottom=0.11)
    ridge = peak / bandwidth
    lowest = min(*(row["intensity"] for row in rows), ridge) / 2
    highest = max(*(row["intensity"] for row in rows), ridge) * 2
    axes.plot([lowest, ridge, highest], [lowest * bandwidth, peak, peak], color=INK, linewidth=1.6)
    axes.annotate(
        f"copy {_short(ceilings['copy_gbps'])} GB/s", (lowest, lowest * bandwidth), xytext=(6, -2),
        textcoords="offset points", fontsize=10, color=INK, va="top",
    )  # fmt: skip
    for row in rows:
        look = {"color": COLORS.get(row["provider"], INK), "marker": MARKERS[ops.index(row["op"]) % len(MARKERS)]}
        hollow = {"markerfacecolor": "white"} if row["pass"] != "forward" else {}
        high, low = (scale * row["tflops"] * row["median_ms"] / row[p] for p in ("p20_ms", "p80_ms"))
        axes.plot([row["intensity"]] * 2, [low, high], color=look["color"], alpha=0.35, linewidth=5)
        axes.plot([row["intensity"]], [scale * row["tflops"]], linestyle="", markersize=6, alpha=0.9, **look, **hollow)
    meanings = {
        "Colour: provider": [(name, {"marker": "o", "color": COLORS.get(name, INK)}) for name in names],
        "Shape: op": [(op, {"marker": MARKERS[ops.index(op) % len(MARKERS)], "color": QUIET}) for op in ops],
        "Filling: pass": [
            ("forward", {"marker": "o", "color": QUIET}),
            ("with backward", {"marker": "o", "color": QUIET, "markerfacecolor": "white"}),
        ],
    }
    top = 0.86
    for title, entries in meanings.items():
        handles = [Line2D([], [], linestyle="", label=label, **look) for label, look in entries]
        legend = figure.legend(
            handles=handles, title=title, loc="upper left", bbox_to_anchor=(0.715, top), frameon=False, fontsize=9.5,
            title_fontproperties={"weight": "bold", "size": 10}, alignment="left", borderaxespad=0.0,
        )  # fmt: skip
        top -= legend.get_window_extent().height / figure.bbox.height + 0.02
    axes.set(xscale="log", yscale="log", xlabel="operations per byte that must move", ylabel=unit)
    axes.set_xlim(lowest, highest)
    highs = [scale * row["tflops"] * row["median_ms"] / row["p20_ms"] for row in rows]
    above = max(peak, *highs)
    axes.set_ylim(None, above * 3.0)
    _log(axes.xaxis)
    _log(axes.yaxis)
    axes.tick_params(labelsize=10)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    label = axes.annotate(
        f"matrix product\n{_short(peak)} {unit}", (highest, peak), xytext=(-4, 6), textcoords="offset points",
        fontsize=10, color=INK, ha="right", va="bottom", zorder=5,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
    )  # fmt: skip
    taken = label.get_window_extent().padded(8)
    drawn = [
        (row["intensity"], y) for row, high in zip(rows, highs, strict=True) for y in (scale * row["tflops"], high)
    ]
    if any(taken.contains(*point) for point in axes.transData.transform(drawn)):
        label.xy = (highest, above)  # where warm caches let rows lie above the roof
    return figure


# ---------------------------------------------------------------- training and generation


def _speeds(document: dict[str, Any], rows: list[dict[str, Any]], what: str) -> Figure:
    """A bar for each configuration, to its median of tokens a second; a thin line from the 20th to the 80th."""
    figure = Figure(figsize=(10, 1.8 + 0.5 * len(rows)), dpi=130)
    _title(
        figure,
        document,
        f"{what}, {rows[0]['dtype']}: tokens a second, 20th to 80th percentile",
    )
    height = figure.get_size_inches()[1]
    axes = figure.subplots()
    longest = max(len(row["configuration"]) for row in rows)
    figure.subplots_adjust(
        left=min(0.5, 0.03 + 0.0086 * longest), right=0.9, top=1 - 0.75 / height, bottom=0.55 / height
    )
    seen = [withStroke(linewidth=3, foreground="white")]  # on dark bars too
    for place, row in enumerate(rows):
        name = row["configuration"].split("+")[0].split()[0]
        color = COLORS.get(name, COLORS["triton"] if "=" in name else INK)
        axes.barh(place, row["tokens_per_second"], color=color, height=0.6)
        low, high = row["p20_tokens_per_second"], row["p80_tokens_per_second"]
        # above the middle, where the number does not lie
        axes.plot(
            [low, high], [place - 0.18] * 2, color=INK, linewidth=1.2, marker="|", markersize=6, path_effects=seen
        )
        axes.annotate(
            f"{row['tokens_per_second']:,.0f}", (row["tokens_per_second"], place + 0.08), xytext=(5, 0),
            textcoords="offset points", va="center", fontsize=10.5,
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [row["configuration"] for row in rows], fontsize=10.5, color=INK)
    axes.invert_yaxis()
    axes.set_xlim(0, None)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.tick_params(axis="x", labelsize=10)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    return figure
