"""The tables, the picture and the page that `python -m profiling memory` makes of its document."""

import html
import json
from pathlib import Path
from typing import Any

from minigpt.errors import writing
from profiling.outputs import wide_console
from profiling.pictures import COLOURS, aligned, memory_png, stacked_svg, totals_svg

Document = dict[str, Any]

NOTE = (
    "Bytes of live tensors as the allocator hands them out. Not in it: the CUDA context, workspaces of cuBLAS and "
    "cuDNN, and what the allocator keeps in reserve or loses to fragmentation."
)


def gib(size: float) -> str:
    """So many bytes in GB (1e9 bytes) or MB."""
    return f"{size / 1e9:.2f} GB" if abs(size) >= 1e9 else f"{size / 1e6:.1f} MB"


def title(document: Document) -> str:
    """What the document is about, in a line."""
    s = document["settings"]
    where = f"a GPU ({s['arch']})" if s["device"] == "cuda" else "a CPU"
    accumulated = f", {s['grad_accumulation']} passes a step" if s["grad_accumulation"] > 1 else ""
    accumulated += ", activations computed again" if s["checkpoint_activations"] else ""
    autocast = "fp32" if s["dtype"] == "fp32" else f"fp32 parameters, {s['dtype']} autocast"
    return f"{s['preset']}, {s['batch_size']} x {s['tokens']} tokens{accumulated}, {autocast}: one step on {where}"


def tables(document: Document) -> list[tuple[str, list[str], list[list[str]]]]:
    """The tables of a document: title, headings, rows."""
    rows = document["kernels"]
    against = next((row for row in rows if row["kernels"] == "torch"), rows[0])
    categories = rows[0]["categories"]
    peak = [
        [
            row["kernels"],
            gib(row["peak"]),
            f"{row['peak'] / against['peak']:.3f}",
            *(gib(row["at_peak"][name]) for name in categories),
            f"{row['peak_phase']}, {short(row['peak_op'])}",
        ]
        for row in rows
    ]
    made = [
        (
            f"Estimated peak of {title(document)}",
            ["kernels", "peak", f"/ {against['kernels']}", *categories, "highest at"],
            peak,
        )
    ]
    phases = list(rows[0]["phases"])
    made.append(
        (
            "Highest in each part of the step",
            ["kernels", *phases],
            [[row["kernels"], *(gib(row["phases"].get(phase, 0)) for phase in phases)] for row in rows],
        )
    )
    if document["fit_gb"]:
        limits = [f"{limit:g} GB" for limit in document["fit_gb"]]
        fits = [[row["kernels"], *(str(batch) if batch else "none" for batch in row["fit"])] for row in rows]
        made.append(("Largest batch that fits, by the estimate", ["kernels", *limits], fits))
    measured = [row for row in rows if "measured" in row]
    if measured:
        headings = [
            "kernels", "estimated", "asked for", "cuBLAS", "error", "allocated", "reserved", "fragmentation", "GPU"
        ]  # fmt: skip
        made.append(("Measured beside the estimate", headings, [_measured(row) for row in measured]))
        for row in measured:
            if "error" in row["measured"]:
                continue
            stacks = [[gib(stack["bytes"]), " < ".join(stack["frames"])] for stack in row["measured"]["stacks"]]
            made.append((f"Largest allocations alive at the peak, {row['kernels']}", ["bytes", "where"], stacks))
    for row in rows:
        largest = [
            [gib(block["bytes"]), block["category"], short(block["op"]), str(tuple(block["shape"])), block["dtype"]]
            for block in row["largest"][:6]
        ]
        made.append(
            (f"Largest tensors at the peak, {row['kernels']}", ["bytes", "kind", "op", "shape", "dtype"], largest)
        )
    return made


def short(op: str) -> str:
    """An op's name without its namespace's and overload's default."""
    return op.removeprefix("aten.").removesuffix(".default")


def _measured(row: dict[str, Any]) -> list[str]:
    measured = row["measured"]
    if "error" in measured:
        return [row["kernels"], gib(row["peak"]), measured["error"], *[""] * 6]
    error = row["peak"] / (measured["requested"] - measured["cublas"]) - 1
    fragmentation = 1 - measured["allocated"] / measured["reserved"] if measured["reserved"] else 0.0
    return [
        row["kernels"], gib(row["peak"]), gib(measured["requested"]), gib(measured["cublas"]), f"{error:+.1%}",
        gib(measured["allocated"]), gib(measured["reserved"]), f"{fragmentation:.1%}", measured["gpu"],
    ]  # fmt: skip


def print_tables(document: Document) -> None:
    """Print the tables, and what the estimate could not see."""
    from rich.table import Table

    console = wide_console(200)
    for name, headings, rows in tables(document):
        view = Table(title=name, title_justify="left")
        for index, heading in enumerate(headings):
            view.add_column(heading, justify="left" if index == 0 else "right", overflow="fold")
        for row in rows:
            view.add_row(*row)
        console.print(view)
    console.print(NOTE, highlight=False)
    for warning in warnings(document):
        console.print(warning, style="bold red", highlight=False)


def warnings(document: Document) -> list[str]:
    """What the estimate could not look into."""
    found = []
    for row in document["kernels"]:
        for op, reason in row["unseen"].items():
            found.append(f"{row['kernels']}: what {op} allocates inside is not in the estimate ({reason})")
    return found


def write(document: Document, json_path: Path | None, png: Path | None, page: Path | None) -> None:
    """Write the files that were asked for. Raises UserError where one cannot be written."""
    if json_path and json_path != Path("-"):
        with writing(json_path):
            json_path.write_text(json.dumps(document, indent=1) + "\n")
    if png:
        with writing(png):
            memory_png(document, png, title(document))
    if page:
        with writing(page):
            page.write_text(to_html(document), encoding="utf-8")


def to_html(document: Document) -> str:
    """One page that needs nothing else: the timelines as SVG, then the tables."""
    name = html.escape(title(document))
    lines = [(row["kernels"], aligned(row)) for row in document["kernels"]]
    top = max(row["peak"] for row in document["kernels"])
    parts = [f"<h1>Memory of {name}</h1>", f"<p>{html.escape(NOTE)}</p>"]
    parts += [f'<p class="warning">{html.escape(text)}</p>' for text in warnings(document)]
    parts += ["<h2>All backends</h2>", totals_svg(lines, top)]
    for kernels, line in lines:
        parts += [f"<h2>{html.escape(kernels)}</h2>", stacked_svg(line, top)]
    for row in document["kernels"]:
        if "timeline" in row.get("measured", {}):
            line = aligned(row["measured"])
            heading = html.escape(f"{row['kernels']}, as a GPU did it")
            parts += [f"<h2>{heading}</h2>", stacked_svg(line, max(top, *line.totals))]
    legend = (f'<span style="background:{colour}"></span>{html.escape(kind)}' for kind, colour in COLOURS.items())
    parts.append(f'<p class="legend">{" ".join(legend)}</p>')
    for heading, headings, rows in tables(document):
        head = "".join(f"<th>{html.escape(text)}</th>" for text in headings)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row) + "</tr>" for row in rows)
        parts.append(f"<h2>{html.escape(heading)}</h2><table><tr>{head}</tr>{body}</table>")
    return _PAGE.replace("TITLE", name).replace("BODY", "\n".join(parts))


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Memory of TITLE</title><style>
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em; color: #222; }
h1 { font-size: 1.4em; } h2 { font-size: 1.1em; margin-top: 1.6em; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { border: 1px solid #ccc; padding: 3px 8px; text-align: right; } th { background: #f3f3f3; }
th:first-child, td:first-child { text-align: left; }
svg { width: 100%; height: auto; } .warning { color: #b00020; font-weight: bold; }
.legend span { display: inline-block; width: 1em; height: 1em; margin: 0 .3em 0 1em; vertical-align: -2px; }
</style></head><body>
BODY
</body></html>
"""
