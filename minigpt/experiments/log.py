"""The tables and the log of experiments: a CSV for each, and a Markdown file with all of them."""

import csv
import html
import io
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from ..errors import writing
from ..report import write_text
from .catalogue import Experiment
from .groups import Group, Groups
from .runs import Place, Result
from .words import spread

_SHOWN = 320
"""Characters of a sample that the log shows."""


def write_csv(groups: Groups, path: Path) -> None:
    """One line for each number: variant, seed, quantity, at (a step or a temperature), layer or step of it, value."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("variant", "seed", "quantity", "at", "index", "value"))
    for group in groups.values():
        for number, result in enumerate(group.results):
            for quantity, at, index, value in _numbers(result):
                shown = "" if value is None else f"{value:.9g}"
                writer.writerow((group.label, group.run.seed + number, quantity, at, index, shown))
    write_text(path, table.getvalue())


def section(experiment: Experiment, groups: Groups, paragraph: str, picture: str) -> str:
    """The part of the log about one experiment; `picture` is the path to its picture from there."""
    parts = [
        f"## {experiment.title}",
        experiment.question,
        f"Usually said: {experiment.said}.",
        f"![{experiment.title}]({picture})",
        paragraph,
    ]
    if "validation" in next(iter(groups.values())).results[0]:
        parts.append(_table(groups))
    if samples := [group for group in groups.values() if group.run.kind == "sample"]:
        parts.append(_side_by_side(samples[0]))
    return "\n\n".join(parts) + "\n"


def write_log(
    sections: dict[str, str], pictures: dict[str, Path], log: Path, place: Place, minutes: float, quick: bool = False
) -> None:
    """Write the log, its pictures under images/experiments beside it. Raises UserError when it cannot be written."""
    folder = log.parent / picture_folder()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, picture in pictures.items():
            draft = folder / f"{name}.png.writing"
            shutil.copyfile(picture, draft)
            draft.replace(folder / f"{name}.png")
    where = f"{place.machine}, {'GPU' if place.device.type == 'cuda' else 'CPU'}"
    ops = ", ".join(f"{op}={backend}" for op, backend in place.ops().names.items())
    command = "python -m minigpt experiment all" + " --quick" * quick
    trial = "**A few steps of small models, to see that it works: what is said here means nothing.**\n\n" * quick
    head = (
        f"# A log of experiments\n\n{trial}"
        f"Written by `{command}` on {datetime.now(UTC):%Y-%m-%d} from the numbers that it "
        f"measured, the sentences too: {where}, {place.settings_told}, kernels {ops}. The runs took {minutes:.0f} "
        f"minutes in all. The text is {place.dataset().name}, {place.dataset().tokens:,} characters, the last tenth "
        "of which validates.\n\n"
        "Every comparison is made seed by seed: the same seed means the same order of the text and, where the shapes "
        "are equal, the same initial weights. A difference is called one where its 95% interval (Student's t over "
        "the seeds) leaves out zero; else the text says that the seeds do not tell. Many comparisons are made here, "
        "and one in twenty such intervals misses by chance. What is found holds for models of this size, this text "
        "and so few steps.\n"
    )
    write_text(log, "\n".join([head, *sections.values()]))


def picture_folder() -> str:
    """Where the pictures are, from the folder of the log."""
    return "images/experiments"


def _numbers(result: Result) -> Iterator[tuple[str, float | str, int | str, float | None]]:
    for row in result.get("train", ()):
        yield "training_loss", row["step"], "", row["loss"]
    for row in result.get("validation", ()):
        yield "validation_loss", row["step"], "", row["loss"]
        yield "validation_bits_per_character", row["step"], "", row["bits"]
    for quantity, value in result.get("final", {}).items():
        yield f"final_{quantity}", "", "", value
    for table in ("attention", "gradients"):
        for row in result.get(table, ()):
            for quantity in row.keys() - {"step"}:
                name = "gradient_norm" if quantity == "norm" else quantity
                for layer, value in enumerate(row[quantity], 1):
                    yield name, row["step"], layer, value
    for sample in (*result.get("samples", ()), *([result["reference"]] if "reference" in result else ())):
        for quantity in sample.keys() - {"temperature", "text"}:
            yield quantity, sample.get("temperature", "validation text"), "", sample[quantity]
    for number, seconds in enumerate(result.get("times", ()), 1):
        yield "step_seconds", "", number, seconds
    for quantity in ("kept_bytes", "peak_bytes", "parameters", "tokens", "characters_per_token"):
        if quantity in result:
            yield quantity, "", "", result[quantity]


def _table(groups: Groups) -> str:
    lines = [
        "| | layers, heads, width | parameters | steps | seeds | loss, nats per token | bits per character |",
        "|---|---|---|---|---|---|---|",
    ]
    for group in groups.values():
        run = group.run
        shape = f"{run.n_layer}, {run.n_head}, {run.n_embd}"
        ends = f"{spread(group.final(), 4)} | {spread(group.final('bits'), 4)}"
        lines.append(f"| {group.label} | {shape} | {group.parameters:,} | {run.steps:,} | {group.seeds} | {ends} |")
    return "\n".join(lines)


def _side_by_side(group: Group) -> str:
    """How the samples of the first seed begin, in a table of HTML, since they have lines."""
    samples = group.results[0]["samples"]
    heads = "".join(f"<th>{sample['temperature']:g}</th>" for sample in samples)
    cells = "".join(f'<td valign="top"><pre>{_escaped(sample["text"][:_SHOWN])}</pre></td>' for sample in samples)
    return f"How the texts of the first seed begin:\n\n<table><tr>{heads}</tr><tr>{cells}</tr></table>"


def _escaped(text: str) -> str:
    """For <pre> in Markdown, where an empty line would end the table."""
    return html.escape(text.strip("\n")).replace("\n", "<br>").replace("|", "&#124;").replace("`", "&#96;")
