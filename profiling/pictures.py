"""Timelines of memory, drawn: a PNG by matplotlib, and SVG written out for a page.

The horizontal axis is progress through the step, counted in allocations. Each part of the step has the same width for
every backend, whatever its number of allocations, so that the parts lie above one another.
"""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

COLOURS = {
    "parameters": "#4e79a7",
    "optimizer state": "#76b7b2",
    "batch and buffers": "#9c9c9c",
    "gradients": "#59a14f",
    "activations": "#f28e2b",
    "temporaries": "#e15759",
}
BACKENDS = {"eager": "#9aa3ad", "torch": "#2f6fbb", "triton": "#d4572a"}
OTHERS = ("#2a9d74", "#b0479b", "#c08a1e", "#5b4db7", "#7a5c3e", "#1b9aaa")
DASHES = (3.5, 2.0)
"""Of the line that is drawn last, on and off, in units of its width: what lies below it shows in the gaps."""
WIDTHS = {"forward": 4.0, "backward": 5.0, "clipping": 0.7, "AdamW": 0.7}


class Line(NamedTuple):
    """A timeline: x in [0, 1], bytes by category at each x, and where each part of the step begins and ends."""

    x: list[float]
    bytes: dict[str, list[int]]
    parts: list[tuple[str, float, float]]

    @property
    def totals(self) -> list[int]:
        return [sum(values) for values in zip(*self.bytes.values(), strict=True)]


class Unit(NamedTuple):
    """What a picture counts memory in."""

    name: str
    bytes: float
    digits: int

    def of(self, size: float) -> str:
        """So many bytes, in words."""
        return f"{size / self.bytes:.{self.digits}f} {self.name}"

    def scaled(self, sizes: Sequence[int]) -> list[float]:
        """Bytes as the axis has them."""
        return [size / self.bytes for size in sizes]


def unit_for(top: float) -> Unit:
    """One unit for all of a picture whose highest value is `top` bytes."""
    return Unit("GB", 1e9, 2) if top >= 1e9 else Unit("MB", 1e6, 1)


class Stroke(NamedTuple):
    """How the line of one backend among several is drawn: those further down are wider, and are seen on both sides."""

    colour: str
    width: float
    dashes: tuple[float, ...]


def strokes(names: Sequence[str]) -> list[Stroke]:
    """One for each of several lines that may lie on one another, in the order that they are drawn in."""
    others, made = iter(OTHERS * len(names)), []
    for index, name in enumerate(names):
        width = 1.4 + 2.2 * (len(names) - 1 - index) / max(1, len(names) - 1)
        dashes = DASHES if 0 < index == len(names) - 1 else ()
        made.append(Stroke(BACKENDS.get(name) or next(others), width, dashes))
    return made


def aligned(row: dict[str, Any]) -> Line:
    """The timeline of one backend in a document of `memory`, its parts stretched to their common widths."""
    runs: list[tuple[str, list]] = []
    for point in row["timeline"]:
        if not runs or runs[-1][0] != point[0]:
            runs.append((point[0], []))
        runs[-1][1].append(point)
    whole = sum(WIDTHS.get(phase, 1.0) for phase, _ in runs)
    x, points, parts, start = [], [], [], 0.0
    for phase, run in runs:
        width = WIDTHS.get(phase, 1.0) / whole
        x += [start + width * (index + 0.5) / len(run) for index in range(len(run))]
        points += run
        parts.append((phase, start, start + width))
        start += width
    columns = {name: [point[2 + index] for point in points] for index, name in enumerate(row["categories"])}
    return Line(x, {name: columns[name] for name in COLOURS}, parts)


# ---------------------------------------------------------------- PNG


def suffixes() -> set[str]:
    """What the name of a picture may end in, for matplotlib to know its format."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    return {f".{name}" for name in FigureCanvasAgg.get_supported_filetypes()}


def memory_png(document: dict[str, Any], path: Path, title: str) -> None:
    """Totals of all backends over one another, and below them each backend by category. In the format of the suffix."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = document["kernels"]
    figure = Figure(figsize=(9, 3.4 + 1.9 * len(rows)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows) + 1, 1, sharex=True, height_ratios=[1.6] + [1.0] * len(rows))
    lines = [aligned(row) for row in rows]
    measured = [row.get("measured", {}) for row in rows]
    top = 1.08 * max(max(row["peak"], found.get("allocated", 0)) for row, found in zip(rows, measured, strict=True))
    unit = unit_for(top)
    for row, line, stroke in zip(rows, lines, strokes([row["kernels"] for row in rows]), strict=True):
        label = f"{row['kernels']}: peak {unit.of(row['peak'])}"
        axes[0].plot(
            line.x, unit.scaled(line.totals), label=label, color=stroke.colour, drawstyle="steps-mid",
            linewidth=stroke.width, linestyle=(0, stroke.dashes) if stroke.dashes else "solid",
        )  # fmt: skip
    axes[0].legend(loc="upper right", fontsize=9, framealpha=0.9, handlelength=3.5)
    axes[0].set_title(title, fontsize=10, loc="left")
    for axis, row, line in zip(axes[1:], rows, lines, strict=True):
        values = [unit.scaled(line.bytes[name]) for name in COLOURS]
        axis.stackplot(line.x, values, colors=COLOURS.values(), labels=COLOURS, step="mid", linewidth=0)
        axis.set_title(row["kernels"], fontsize=10, loc="left")
    for axis, found in zip(axes[1:], measured, strict=True):
        if "timeline" in found:
            line = aligned(found)
            axis.plot(line.x, unit.scaled(line.totals), color="black", linewidth=0.9, label="as a GPU did it")
            peak = found["allocated"] / unit.bytes
            axis.axhline(peak, color="black", linewidth=0.9, linestyle=":", label="measured peak")
    for axis in axes:
        axis.set_ylim(0, top / unit.bytes)
        axis.set_xlim(0, 1)
        axis.set_ylabel(unit.name)
        for _, start, _ in lines[0].parts:
            axis.axvline(start, color="#bbb", linewidth=0.7, zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xticks([(start + end) / 2 for _, start, end in lines[0].parts])
    axes[-1].set_xticklabels([phase for phase, _, _ in lines[0].parts], fontsize=8)
    axes[-1].tick_params(axis="x", length=0)
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    figure.savefig(path, format=path.suffix.lower().removeprefix(".") or "png")


# ---------------------------------------------------------------- SVG

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 1000, 260, 60, 24


def totals_svg(lines: list[tuple[str, Line]], top: float) -> str:
    """The totals of several backends in one picture; `top` is the highest value in bytes."""
    parts, unit = _frame(lines[0][1], top), unit_for(top)
    for index, ((name, line), (colour, width, dashes)) in enumerate(
        zip(lines, strokes([name for name, _ in lines]), strict=True)
    ):
        dashed = f' stroke-dasharray="{" ".join(f"{width * part:g}" for part in dashes)}"' * bool(dashes)
        points = " ".join(f"{_x(x)},{_y(total, top)}" for x, total in zip(line.x, line.totals, strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{width:g}"{dashed}/>')
        y = 18 + 18 * index
        label = html.escape(f"{name}: peak {unit.of(max(line.totals))}")
        parts.append(f'<text x="{_WIDTH - 8}" y="{y}" text-anchor="end" fill="{colour}">{label}</text>')
    return _svg(parts)


def stacked_svg(line: Line, top: float) -> str:
    """One backend's memory by category, one on another."""
    parts, below = _frame(line, top), [0] * len(line.x)
    for name, colour in COLOURS.items():
        above = [low + size for low, size in zip(below, line.bytes[name], strict=True)]
        points = [f"{_x(x)},{_y(size, top)}" for x, size in zip(line.x, above, strict=True)]
        points += [f"{_x(x)},{_y(size, top)}" for x, size in reversed(list(zip(line.x, below, strict=True)))]
        parts.append(
            f'<polygon points="{" ".join(points)}" fill="{colour}"><title>{html.escape(name)}</title></polygon>'
        )
        below = above
    return _svg(parts)


def _x(x: float) -> str:
    return f"{_LEFT + x * (_WIDTH - _LEFT - 4):.1f}"


def _y(size: float, top: float) -> str:
    return f"{(_HEIGHT - _BOTTOM) * (1 - size / (1.05 * top)):.1f}"


def _frame(line: Line, top: float) -> list[str]:
    """The axes: bytes on the left, the parts of the step below."""
    made = []
    for step in range(5):
        size = top * step / 4
        y = _y(size, top)
        made.append(f'<line x1="{_LEFT}" x2="{_WIDTH}" y1="{y}" y2="{y}" stroke="#ddd"/>')
        made.append(f'<text x="{_LEFT - 6}" y="{float(y) + 4:.1f}" text-anchor="end">{unit_for(top).of(size)}</text>')
    for phase, start, end in line.parts:
        made.append(f'<line x1="{_x(start)}" x2="{_x(start)}" y1="0" y2="{_HEIGHT - _BOTTOM}" stroke="#bbb"/>')
        middle, wide = _x((start + end) / 2), end - start > 0.05
        label = html.escape(phase if wide else phase[:1])
        made.append(f'<text x="{middle}" y="{_HEIGHT - 7}" text-anchor="middle">{label}</text>')
    return made


def _svg(parts: list[str]) -> str:
    size = f'viewBox="0 0 {_WIDTH} {_HEIGHT}"'
    return f'<svg {size} font-size="12" role="img">{"".join(parts)}</svg>'
