"""`python -m benchmarks report FILE`: the tables of a results file, as Markdown, and the README's section of it."""

import argparse
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import machine, noise, results
from benchmarks.noise import AGAIN
from minigpt.errors import UserError

MARKERS = re.compile(r"<!-- benchmarks ([^:\n]+): (\S+) -->\n(.*?)<!-- /benchmarks -->", re.DOTALL)
"""A section of the README: what was measured, the file it shows, from the root of the checkout, and its tables."""
CHAPTER = "## Benchmarks\n"
ABOVE = 0.05
"""How far a row's rate of operations may be above the measured ceiling before that is doubted: samples vary."""


def add_to(commands: Any) -> None:
    """Add `report` to a command line."""
    parser = commands.add_parser("report", help="print the tables of a results file", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--pictures", action="store_true", help="draw its pictures beside it again, too")
    parser.add_argument("--readme", action="store_true", help="show it in README.md, in the place of one like it")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """The command."""
    document = results.load(arguments.file)
    if arguments.pictures:
        from benchmarks import pictures

        for path in pictures.draw(document, arguments.file):
            print(f"drawn: {path}")
    if arguments.readme:
        readme, file = machine.ROOT / "README.md", arguments.file.resolve()
        if not file.is_relative_to(machine.ROOT):
            raise UserError(
                f"{file} is not in {machine.ROOT}: put it under benchmarks/results, where README can show it"
            )
        results.write(
            readme, with_section(readme.read_text(encoding="utf-8"), file.relative_to(machine.ROOT).as_posix())
        )
        print(f"written: {readme}")
    print(markdown(document))
    return 0


def publish(document: dict[str, Any], path: Path) -> None:
    """End a run: its results to `path`, its tables and pictures beside it, the tables and any warning to the terminal.

    Raises UserError when something cannot be written.
    """
    from benchmarks import pictures  # which take a second to import

    document["clocks"]["end"] = machine.clocks()
    results.save(document, path)
    text = markdown(document)
    results.write(path.with_suffix(".md"), text)
    pictures.draw(document, path)
    print(text)
    if said := noise.warning(document):
        print(f"warning: {said}")


def markdown(document: dict[str, Any]) -> str:
    """The file's tables. They end with what could not be measured, and why."""
    return _joined(_opening(document), _body(document))


def _joined(*parts: list[str]) -> str:
    return "\n\n".join(text for part in parts for text in part if text) + "\n"


def _opening(document: dict[str, Any]) -> list[str]:
    return [_heading(document), noise.warning(document), _ceiling_warning(document)]


def _body(document: dict[str, Any]) -> list[str]:
    return [*TABLES[document["kind"]](document), *_reasons(document)]


# ---------------------------------------------------------------- the README's sections


def title(document: dict[str, Any]) -> str:
    """What a file measured: two of one title and one device take each other's place in the README."""
    if document["kind"] == "kernels":
        ops = _unique(row["op"] for row in document["rows"])
        return f"kernels {ops[0]}" if len(ops) == 1 else "kernels"
    if document["kind"] in ("decode", "start"):
        return f"{document['kind']} {' '.join(_unique(row['preset'] for row in document['rows']))}"
    peer = " beside nanoGPT" * any(row["configuration"] == "nanoGPT" for row in document["rows"])
    return f"train {' '.join(_unique(row['preset'] for row in document['rows']))}{peer}"


def section(path: str) -> str:
    """The README's section for a results file: between markers, its tables (many are folded away) and its pictures.

    Where the kernels were not timed, a link to the tables stands in their place.
    """
    document = results.load(machine.ROOT / path)
    return f"<!-- benchmarks {title(document)}: {path} -->\n{_content(document, path)}<!-- /benchmarks -->"


def _content(document: dict[str, Any], path: str) -> str:
    file = machine.ROOT / path
    drawn = sorted(file.parent.glob(f"{file.stem}-*.png"))
    shown = [f"![{p.stem.removeprefix(file.stem + '-')}]({p.relative_to(machine.ROOT).as_posix()})" for p in drawn]
    if document["kind"] != "kernels":
        return _joined(_opening(document), _body(document), shown)
    if not any(row["provider"] == "triton" and "median_ms" in row for row in document["rows"]):
        # PyTorch's functions by themselves are no news to a reader of the README
        tables = file.with_suffix(".md").relative_to(machine.ROOT).as_posix()
        return _joined(_opening(document), [f"[Every op, pass and provider]({tables}), the pictures beside them."])
    fold = "<details><summary>Every op, pass and provider</summary>"
    return _joined(_opening(document), [fold], _body(document), shown, ["</details>"])


def with_section(text: str, path: str) -> str:
    """The README's text with the section of a results file: where one of its title and device is, else a new one.

    A new one goes to the end of the chapter on benchmarks. Raises UserError where there is no such chapter.
    """
    new, about = section(path), title(results.load(machine.ROOT / path))
    for found in MARKERS.finditer(text):
        if found[1] == about and Path(found[2]).parent == Path(path).parent:
            return text[: found.start()] + new + text[found.end() :]
    _, chapter, rest = text.partition(CHAPTER)
    if not chapter:
        raise UserError(f"README.md has no line {CHAPTER.strip()!r}, under which results are shown: write one")
    end = rest.find("\n## ")
    place = len(text) - len(rest) + (end if end >= 0 else len(rest))
    return f"{text[:place].rstrip()}\n\n{new}\n{text[place:]}"


def stale_sections(text: str) -> list[str]:
    """The results files whose section in `text` differs from what the file says, or which cannot be read."""
    stale = []
    for found in MARKERS.finditer(text):
        try:
            same = found[0] == section(found[2])
        except UserError:
            same = False
        if not same:
            stale.append(found[2])
    return stale


# ---------------------------------------------------------------- what all tables share


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
    if here["type"] == "cpu":
        line += " There was no GPU: **the Triton kernels are not timed here**, and no number says how fast they are."
    return line


def above_ceiling(document: dict[str, Any]) -> set[tuple[str, ...]]:
    """The keys of the rows that compute faster than the matrix product of their run, by more than ABOVE."""
    if document["kind"] != "kernels":
        return set()
    ceilings = {row["dtype"]: document["ceilings"].get(f"matmul_tflops_{row['dtype']}") for row in document["rows"]}
    return {
        results.key_of(document, row)
        for row in document["rows"]
        if row["status"] == "ok" and ceilings[row["dtype"]] and results.rated(row["op"], row["pass"])
        if row["tflops"] > (1 + ABOVE) * ceilings[row["dtype"]]
    }


def _ceiling_warning(document: dict[str, Any]) -> str:
    marked = len(above_ceiling(document))
    many = f"{marked} rows, marked ^, compute" if marked > 1 else "1 row, marked ^, computes"
    return f"{many} faster than the matrix product of the same run: that ceiling was measured too low." * bool(marked)


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
    rows, marked = [row for row in document["rows"] if row["status"] == "ok"], noise.disturbed(document)
    ours, doubted = any("over_ours" in row for row in rows), above_ceiling(document)
    for op, dtype in dict.fromkeys((row["op"], row["dtype"]) for row in rows):
        mine = [row for row in rows if (row["op"], row["dtype"]) == (op, dtype)]
        names = [name for name in _unique(row["provider"] for row in mine) if not name.endswith(AGAIN)]
        shares = any("roofline_percent" in row for row in mine)
        table = []
        for case, name in dict.fromkeys((row["case"], row["pass"]) for row in mine):
            cells = {row["provider"]: row for row in mine if (row["case"], row["pass"]) == (case, name)}
            shape = next(iter(cells.values())).get("shape", "")
            ratios = [
                cells[other]["median_ms"] / cells[other.removesuffix(AGAIN)]["median_ms"]
                for other in cells
                if other.endswith(AGAIN) and other.removesuffix(AGAIN) in cells
            ]
            again = f"{ratios[0]:.3f}" if ratios else ""
            keys = {provider: results.key_of(document, row) for provider, row in cells.items()}
            mark = {provider: "~" * (key in marked) + "^" * (key in doubted) for provider, key in keys.items()}
            shown = [mark[provider] + _cell(cells[provider], shares) if provider in cells else "" for provider in names]
            table.append([case, shape, name, *shown, again])
        caption = f"**{op}, {dtype}**: milliseconds a call, median (20th to 80th percentile)"
        caption += "; x1.2 is 1.2 times our time" * ours
        caption += "; % the share of the roofline" * shares
        if shares and op in results.SPLIT:
            caption += ", of both passes together alone, as gradients may be made in either"
        caption += ". The last column is one variant's second median over its first."
        parts += [caption, _table(["case", "shape", "pass", *names, "again"], table)]
    return parts


def _cell(row: dict[str, Any], shares: bool) -> str:
    text = f"{number(row['median_ms'])} ({number(row['p20_ms'])} to {number(row['p80_ms'])})"
    if "over_ours" in row and row["provider"] != "triton":
        text += f" x{row['over_ours']:.2f}"
    if not results.rated(row["op"], row["pass"]):
        text += " -%" * shares
    elif "roofline_percent" in row:
        text += f" {row['roofline_percent']:.0f}%"
    if "host_us" in row:
        text += f", host {number(row['host_us'])} µs"
    if "peak_memory_mib" in row:
        text += f", {row['peak_memory_mib']:,.0f} MiB"
    return text


def _reasons(document: dict[str, Any]) -> list[str]:
    """A line for each reason why something has no number: who, where, and why."""
    place = {"kernels": "op", "decode": "case"}.get(document["kind"], "preset")
    name = "provider" if document["kind"] == "kernels" else "configuration"
    where: dict[tuple[str, str], dict[str, None]] = {}
    for row in document["rows"]:
        if row["status"] != "ok":
            where.setdefault((row[name], row["reason"]), {})[row[place]] = None
    who: dict[tuple[str, str], list[str]] = {}
    for (name, reason), places in where.items():
        who.setdefault((", ".join(places), reason), []).append(name)
    lines = [f"- {', '.join(names)} ({places}): {reason}" for (places, reason), names in who.items()]
    return ["Not measured, and why:", "\n".join(lines)] if lines else []


# ---------------------------------------------------------------- training


def _train_tables(document: dict[str, Any]) -> list[str]:
    parts = []
    rows, marked = [row for row in document["rows"] if row["status"] == "ok"], noise.disturbed(document)
    for preset in _unique(row["preset"] for row in rows):
        mine = [row for row in rows if row["preset"] == preset]
        columns = {
            "configuration": [row["configuration"] for row in mine],
            "tokens/s (20th to 80th)": [_speed(row, results.key_of(document, row) in marked) for row in mine],
            f"time / {mine[0].get('ours')}": [f"{row['over_ours']:.2f}" if "over_ours" in row else "" for row in mine],
            "MFU": [_known(row.get("mfu_percent"), "{:.1f}%") for row in mine],
            "peak MiB": [_known(row.get("peak_memory_mib"), "{:,.0f}") for row in mine],
            "loss": [f"{row['last_loss']:.4f}" if row.get("last_loss") is not None else "" for row in mine],
            "note": [row.get("note", "") for row in mine],
        }
        about = f"**{preset}**, {mine[0]['dtype']}, {mine[0]['tokens_per_step']:,} tokens a step, training alone."
        parts += [f"{about} {document.get('mfu_formula', '')}".strip(), _columns(columns)]
    return parts


def _speed(row: dict[str, Any], doubted: bool) -> str:
    middle, low, high = (number(row[f"{end}tokens_per_second"]) for end in ("", "p20_", "p80_"))
    return f"{'~' * doubted}{middle} ({low} to {high})"


def _columns(columns: dict[str, list[str]]) -> str:
    """A table of the columns that say something."""
    shown = {heading: cells for heading, cells in columns.items() if any(cells)}
    return _table([*shown], [list(cells) for cells in zip(*shown.values(), strict=True)])


def _known(value: float | None, form: str) -> str:
    return "unknown" if value is None else form.format(value)


# ---------------------------------------------------------------- generation


def _decode_tables(document: dict[str, Any]) -> list[str]:
    parts = []
    rows, marked = [row for row in document["rows"] if row["status"] == "ok"], noise.disturbed(document)
    for case in _unique(row["case"] for row in rows):
        mine = [row for row in rows if row["case"] == case]
        columns = {
            "configuration": [row["configuration"] for row in mine],
            "tokens/s (20th to 80th)": [_speed(row, results.key_of(document, row) in marked) for row in mine],
            "times torch without cache": [f"{row['over_plain']:.2f}" if "over_plain" in row else "" for row in mine],
            "weights and cache, GB/s": [number(row["gbps"]) if "gbps" in row else "" for row in mine],
            "of a copy": [f"{row['copy_percent']:.0f}%" if "copy_percent" in row else "" for row in mine],
        }
        parts += [f"**{case}**, {mine[0]['dtype']}, greedy, from one token until the block is full.", _columns(columns)]
    return parts


# ---------------------------------------------------------------- cold start


def _start_tables(document: dict[str, Any]) -> list[str]:
    parts = []
    rows, marked = [row for row in document["rows"] if row["status"] == "ok"], noise.disturbed(document)
    for preset in _unique(row["preset"] for row in rows):
        mine = [row for row in rows if row["preset"] == preset]
        seconds = lambda row, name: number(row[name] / 1e3) if row.get(name) else ""  # noqa: E731
        columns = {
            "configuration": [row["configuration"] + f" for {row.get('arch')}" * ("arch" in row) for row in mine],
            "seconds (20th to 80th)": [
                "~" * (results.key_of(document, row) in marked)
                + f"{seconds(row, 'median_ms')} ({seconds(row, 'p20_ms')} to {seconds(row, 'p80_ms')})"
                for row in mine
            ],
            "imports": [seconds(row, "imports_ms") for row in mine],
            "model": [seconds(row, "model_ms") for row in mine],
            "first step": [seconds(row, "first_step_ms") for row in mine],
            "second step": [seconds(row, "second_step_ms") for row in mine],
            "kernels compiled": [str(row["kernels"]) if "kernels" in row else "" for row in mine],
        }
        about = f"**{preset}**, a process with empty caches, to the end of its first step"
        parts += [f"{about}; of `compilation alone` the kernels are compiled and not run.", _columns(columns)]
    return parts


TABLES = {"kernels": _kernel_tables, "train": _train_tables, "decode": _decode_tables, "start": _start_tables}
"""By kind of file: what makes its tables."""
