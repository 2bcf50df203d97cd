"""The tables and the picture that `python -m profiling scaling` makes of its rows."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from profiling import scaling
from profiling.pictures import BACKENDS
from profiling.scaling_command import COUNTS, FITS, GB, TABLES, Row
from profiling.scaling_memory import CATEGORIES, peak

Table = tuple[str, list[str], list[list[str]]]


def tables(rows: list[Row], arguments: argparse.Namespace) -> list[Table]:
    """Title, headings and rows of each table."""

    counts = list(rows[0].steps)
    names = [f"{gpus:,}" for gpus in counts]
    bytes_at = lambda step: sum(peak(step)[1].values())  # noqa: E731
    memory = [[*_kind(row), *(f"{bytes_at(step) / GB:.2f}" for step in row.steps.values())] for row in rows]
    last = counts[-1]
    made_of = []
    for row in rows:
        moment, found = peak(row.steps[last])
        made_of.append([*_kind(row), *(f"{found[name] / GB:.2f}" for name in CATEGORIES), moment])
    fits = [[*_kind(row), *("no" if n is None else f"{n:,}" for n in row.fewest.values())] for row in rows]
    kinds = ["preset", "kernels", "parallel"]
    groups = ["preset", "an attention", "an MLP", "blocks", "root", "all"]
    limits = [f"{limit} GB" for limit in FITS]
    made = {
        "parameters": ("Parameters, millions", groups, _parameters(rows)),
        "windows": ("Windows of a step: of one GPU, and shared out", ["preset", "one GPU", *names], _shared(rows)),
        "memory": ("Peak of memory per GPU, GB, by GPUs", [*kinds, *names], memory),
        "peak": (f"What the peak is made of, GPUs: {last:,}; GB", [*kinds, *CATEGORIES, "at"], made_of),
        "fits": ("Fewest GPUs (a power of two up to 1,024) on which it fits", [*kinds, *limits], fits),
        **_communication(rows, arguments, [gpus for gpus in counts if gpus > 1]),
    }
    return [made[name] for name in arguments.table or TABLES if made[name][2]]


def _kind(row: Row) -> list[str]:
    return [row.preset, row.kernels, row.parallel]


def _parameters(rows: list[Row]) -> list[list[str]]:
    made = {}
    for row in rows:
        model = next(iter(row.steps.values())).model
        attention, mlp = (scaling.count(of(model)) for of in (scaling.attention_shapes, scaling.mlp_shapes))
        root = scaling.count(scaling.root_shapes(model))
        blocks = model.n_layer * (attention + mlp)
        sizes = (attention, mlp, blocks, root, blocks + root)
        made[row.preset] = [row.preset, *(f"{size / 1e6:,.2f}" for size in sizes)]
    return list(made.values())


def _shared(rows: list[Row]) -> list[list[str]]:
    made = {}
    for row in rows:
        one = next(iter(row.steps.values()))
        cells = ["do not divide" if s is None else f"{s.batch} x {s.passes}" for s in row.shared.values()]
        made[row.preset] = [row.preset, f"{one.batch} x {one.passes}", *cells]
    return list(made.values())


def _communication(rows: list[Row], arguments: argparse.Namespace, several: list[int]) -> dict[str, Table]:
    """Bytes sent by each GPU, and the seconds that they take beside those of computing, for a person's own numbers."""
    sizes, times = {}, {}
    for row in rows if several else []:
        for name, steps in (("weak", row.steps), ("strong", row.shared)):
            key = (row.preset, row.parallel, name)
            found = [steps[gpus] for gpus in several]
            sizes[key] = [*key, *("do not divide" if s is None else f"{scaling.sent(s) / GB:.2f}" for s in found)]
            times[key] = [*key, *("do not divide" if s is None else _seconds(s, arguments) for s in found)]
    headings = ["preset", "parallel", "scaling", *(f"{gpus:,}" for gpus in several)]
    at = f"at {arguments.bandwidth:g} GB/s"
    computing = f", and for computing at {arguments.tflops:g} TFLOP/s" if arguments.tflops else ""
    title = f"Seconds of a step for sending {at}{computing}: numbers that were given, not measured"
    return {
        "sent": ("Sent by each GPU in a step, GB, by GPUs", headings, list(sizes.values())),
        "seconds": (title, headings, list(times.values())),
    }


def _seconds(step: Any, arguments: argparse.Namespace) -> str:
    sending = f"{scaling.sent(step) / (arguments.bandwidth * GB):.3g}"
    if not arguments.tflops:
        return sending
    return f"{sending}, {scaling.operations(step) / (arguments.tflops * 1e12):.3g}"


def markdown(found: list[Table]) -> str:
    """The tables as Markdown."""
    parts = []
    for title, headings, lines in found:
        rule = "|".join("---" for _ in headings)
        body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts.append(f"**{title}**\n\n| {' | '.join(headings)} |\n|{rule}|\n{body}")
    return "\n\n".join(parts)


# ---------------------------------------------------------------- the picture


def draw(rows: list[Row], path: Path) -> None:
    """Memory per GPU against the number of GPUs, a field for each preset. In the format of the suffix."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    presets = list(dict.fromkeys(row.preset for row in rows))
    figure = Figure(figsize=(3.1 * len(presets) + 0.6, 3.9), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    fields = dict(zip(presets, figure.subplots(1, len(presets), sharey=True, squeeze=False)[0], strict=True))
    most = max(max(row.steps) for row in rows)
    windows = {row.preset: "{0.batch} x {0.tokens}".format(row.steps[max(row.steps)]) for row in rows}
    counts, top = [n for n in COUNTS if n <= most], 0.0
    for row in rows:
        step = row.steps[max(row.steps)]
        steps = [replace(step, gpus=n, parallel=row.parallel if n > 1 else "none") for n in counts]
        sizes = [sum(peak(step)[1].values()) / GB for step in steps]
        style = {"color": BACKENDS[row.kernels], "linestyle": "--" if row.parallel == "ddp" else "-"}
        top = max(top, *sizes)
        fields[row.preset].plot(counts, sizes, label=f"{row.kernels}, {row.parallel}", linewidth=1.8, **style)
    for name, field in fields.items():
        field.set_title(f"{name}, {windows[name]} tokens a pass", fontsize=10, loc="left")
        field.set_xscale("log", base=2)
        field.set_xticks([n for n in (1, 8, 64, 512) if n <= most], [str(n) for n in (1, 8, 64, 512) if n <= most])
        field.minorticks_off()
        field.set_xlabel("GPUs")
        for limit in FITS:
            if limit < 1.2 * top:
                field.axhline(limit, color="#999", linewidth=0.8, linestyle=":", zorder=0)
                field.annotate(f"{limit} GB", (counts[-1], limit), ha="right", va="top", fontsize=8, color="#777")
        field.spines[["top", "right"]].set_visible(False)
    first = fields[presets[0]]
    first.set_ylim(bottom=0)
    first.set_ylabel("peak per GPU, GB")
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path, format=path.suffix.lower().removeprefix(".") or "png")
