"""`python -m benchmarks report FILE`: the tables of a results file, as Markdown; the README holds them as they are."""

import argparse
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import machine, results
from minigpt.errors import UserError

MARKERS = re.compile(r"<!-- benchmarks: (\S+) -->\n(.*?)<!-- /benchmarks -->", re.DOTALL)
"""A section of the README: the path of the file it shows, from the root of the checkout, and the tables."""


def add_to(commands: Any) -> None:
    """Add `report` to a command line."""
    parser = commands.add_parser("report", help="print the tables of a results file", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--pictures", action="store_true", help="draw its pictures beside it again, too")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """The command."""
    document = results.load(arguments.file)
    if arguments.pictures:
        from benchmarks import pictures

        for path in pictures.draw(document, arguments.file):
            print(f"drawn: {path}")
    print(markdown(document))
    return 0


def markdown(document: dict[str, Any]) -> str:
    """The file's tables. They end with what could not be measured, and why."""
    parts = [_heading(document)]
    if document["kind"] == "kernels":
        parts += _kernel_tables(document)
    else:
        parts += _train_tables(document)
    parts += _reasons(document)
    return "\n\n".join(part for part in parts if part) + "\n"


def section(path: str) -> str:
    """The README's section for a results file: the markers, and the tables between them."""
    return f"<!-- benchmarks: {path} -->\n{markdown(results.load(machine.ROOT / path))}<!-- /benchmarks -->"


def stale_sections(text: str) -> list[str]:
    """The results files whose section in `text` differs from what the file says, or which cannot be read."""
    stale = []
    for path, shown in MARKERS.findall(text):
        try:
            same = shown == markdown(results.load(machine.ROOT / path))
        except UserError:
            same = False
        if not same:
            stale.append(path)
    return stale


def _heading(document: dict[str, Any]) -> str:
    versions, here = document["versions"], document["machine"]
    software = ", ".join(
        f"{name} {versions[name]}" for name in ("torch", "triton", "cuda", "cudnn") if name in versions
    )
    commit = document.get("commit") or "unknown"
    changed = " with changes" if document.get("dirty") else ""
    line = f"{here['name']}, {software}; {document['date']} UTC, commit {commit}{changed}."
    ceilings = document["ceilings"]
    if "copy_gbps" in ceilings:
        rates = [
            f"{v:,.4g} TFLOP/s in {k.removeprefix('matmul_tflops_')}" for k, v in ceilings.items() if "matmul" in k
        ]
        line += f" Measured in the same run: a copy moves {ceilings['copy_gbps']:,.4g} GB/s"
        line += f", a matrix product computes {' and '.join(rates)}." if rates else "."
    return line


def _unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def number(value: float) -> str:
    """Three significant digits, without an exponent where people do without one."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value >= 1e-3 else f"{value:.1e}"


# ---------------------------------------------------------------- kernels


def _kernel_tables(document: dict[str, Any]) -> list[str]:
    parts = []
    rows = [row for row in document["rows"] if row["status"] == "ok"]
    for op, dtype in dict.fromkeys((row["op"], row["dtype"]) for row in rows):
        mine = [row for row in rows if (row["op"], row["dtype"]) == (op, dtype)]
        names = [name for name in _unique(row["provider"] for row in mine) if not name.endswith(" again")]
        table = []
        for case, name in dict.fromkeys((row["case"], row["pass"]) for row in mine):
            cells = {row["provider"]: row for row in mine if (row["case"], row["pass"]) == (case, name)}
            shape = next(iter(cells.values())).get("shape", "")
            noise = [
                cells[other]["median_ms"] / cells[other.removesuffix(" again")]["median_ms"]
                for other in cells
                if other.endswith(" again") and other.removesuffix(" again") in cells
            ]
            again = f"{noise[0]:.3f}" if noise else ""
            table.append([case, shape, name, *(_cell(cells.get(provider)) for provider in names), again])
        caption = (
            f"**{op}, {dtype}**: milliseconds a call, median (20th to 80th percentile); x1.2 is 1.2 times our time, "
            "% the share of the roofline. The last column is one variant's second median over its first."
        )
        parts += [caption, _table(["case", "shape", "pass", *names, "again"], table)]
    return parts


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    text = f"{number(row['median_ms'])} ({number(row['p20_ms'])} to {number(row['p80_ms'])})"
    if "over_ours" in row and row["provider"] != "triton":
        text += f" x{row['over_ours']:.2f}"
    if "roofline_percent" in row:
        text += f" {row['roofline_percent']:.0f}%"
    if "host_us" in row:
        text += f", host {number(row['host_us'])} µs"
    if "peak_memory_mib" in row:
        text += f", {row['peak_memory_mib']:,.0f} MiB"
    return text


def _reasons(document: dict[str, Any]) -> list[str]:
    """A line for each thing that has no number: who, where, and why."""
    name, place = ("provider", "op") if document["kind"] == "kernels" else ("configuration", "preset")
    where: dict[tuple[str, str], dict[str, None]] = {}
    for row in document["rows"]:
        if row["status"] != "ok":
            where.setdefault((row[name], row["reason"]), {})[row[place]] = None
    lines = [f"- {who}, {', '.join(places)}: {reason}" for (who, reason), places in where.items()]
    return ["Not measured, and why:", "\n".join(lines)] if lines else []


# ---------------------------------------------------------------- training


def _train_tables(document: dict[str, Any]) -> list[str]:
    parts = []
    rows = [row for row in document["rows"] if row["status"] == "ok"]
    for preset in _unique(row["preset"] for row in rows):
        mine = [row for row in rows if row["preset"] == preset]
        table = [
            [
                row["configuration"],
                f"{number(row['tokens_per_second'])} ({number(row['p20_tokens_per_second'])} to "
                f"{number(row['p80_tokens_per_second'])})",
                f"{row['over_ours']:.2f}" if "over_ours" in row else "",
                f"{row['mfu_percent']:.1f}%" if row.get("mfu_percent") is not None else "unknown",
                f"{row['peak_memory_mib']:,.0f}" if row.get("peak_memory_mib") is not None else "unknown",
                f"{row['last_loss']:.4f}" if row.get("last_loss") is not None else "",
                row.get("note", ""),
            ]
            for row in mine
        ]
        header = [
            "configuration",
            "tokens/s (20th to 80th)",
            f"time / {mine[0].get('ours', 'ours')}",
            "MFU",
            "peak MiB",
            "loss",
            "note",
        ]
        about = f"**{preset}**, {mine[0]['dtype']}, {mine[0]['tokens_per_step']:,} tokens a step, training alone."
        parts += [f"{about} {document.get('mfu_formula', '')}".strip(), _table(header, table)]
    return parts
