"""Results files: a run's rows with their raw samples and everything they were measured under, as JSON and as CSV."""

import csv
import datetime
import io
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import machine, stats
from minigpt.errors import UserError, writing

SCHEMA = 1
KINDS = ("kernels", "train", "decode", "start")
FOLDER = machine.ROOT / "benchmarks" / "results"
KEYS = {
    "kernels": ("op", "case", "dtype", "pass", "provider"),
    "train": ("preset", "configuration"),
    "decode": ("case", "configuration"),
    "start": ("preset", "configuration"),
}
"""By kind of file: what names a row."""

_TIMES = ("median_ms", "p20_ms", "p80_ms")
_SPEEDS = ("tokens_per_second", "p20_tokens_per_second", "p80_tokens_per_second", "tokens_per_step")
NUMBERS = {
    "kernels": _TIMES,
    "train": (*_TIMES, *_SPEEDS),
    "decode": (*_TIMES, *_SPEEDS),
    "start": _TIMES,
}
"""By kind of file: the numbers that every timed row has."""
RATES = ("gbps", "tflops", "intensity")
"""... and every row of kernels that `rated` says yes of."""

SPLIT = ("cross_entropy", "linear_cross_entropy")
"""Ops whose gradients some providers make in their forward pass: what a pass by itself computes is each one's own."""

STATUSES = ("ok", "untimed", "skipped", "wrong", "error", "memory")
"""ok: right, and timed. untimed: right, but not timed here. skipped: cannot run this or is not here. wrong: red check.
error: it threw. memory: it ran out of memory. Every status but ok comes with a reason, and only ok with a number."""


def new(kind: str, command: dict[str, Any]) -> dict[str, Any]:
    """A document without rows, for the machine that this runs on."""
    now = datetime.datetime.now(datetime.UTC)
    document = {"schema": SCHEMA, "kind": kind, "date": now.strftime("%Y-%m-%dT%H-%M-%S"), "command": command}
    return document | machine.describe() | {"ceilings": {}, "rows": []}


def path_of(document: dict[str, Any], out: Path | None) -> Path:
    """Where a document goes: <out or benchmarks/results>/<slug>/<date>-<commit>.json."""
    commit = (document["commit"] or "unknown")[:12] + ("-dirty" if document["dirty"] else "")
    return (out or FOLDER) / document["machine"]["slug"] / f"{document['date']}-{commit}.json"


def prepare(path: Path) -> None:
    """Make sure that `path` can be written, before anything is measured. Raises UserError where it cannot."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path.with_name(path.name + ".probe")
        probe.write_text("")
        probe.unlink()


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all: a run may be killed at any time."""
    draft = path.with_name(path.name + ".writing")
    with writing(path):
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, path)


def save(document: dict[str, Any], path: Path) -> None:
    """Write the document, and its rows as a tidy CSV beside it."""
    write(path, json.dumps(document, indent=1) + "\n")
    write(path.with_suffix(".csv"), tidy(document))


def tidy(document: dict[str, Any]) -> str:
    """One line a row: its key, status, numbers and reason; the raw samples are in the JSON alone."""
    columns: dict[str, None] = dict.fromkeys((*KEYS[document["kind"]], "status"))
    flat = []
    for row in document["rows"]:
        plain = {name: value for name, value in row.items() if isinstance(value, bool | int | float | str)}
        columns |= dict.fromkeys(plain)
        flat.append(plain)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def load(path: Path) -> dict[str, Any]:
    """A results file. Raises UserError for what is none, or of another schema."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no {path}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder: name one of the .json files in it") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a results file ({error})") from None
    if not isinstance(document, dict) or "schema" not in document:
        raise UserError(f"{path} is no results file: it has no schema number")
    if document["schema"] != SCHEMA:
        raise UserError(f"{path} has schema {document['schema']}, and {SCHEMA} is the one read here")
    if document.get("kind") not in KINDS:
        raise UserError(f"{path}: unknown kind {document.get('kind')!r}, not one of {', '.join(KINDS)}")
    for name, type_ in (("machine", dict), ("rows", list), ("versions", dict), ("ceilings", dict)):
        if not isinstance(document.get(name), type_):
            raise UserError(f"{path} is damaged: {name} is missing or of another type")
    for name in ("slug", "name", "type"):
        if not isinstance(document["machine"].get(name), str):
            raise UserError(f"{path} is damaged: the machine has no {name}")
    if not isinstance(document.get("date"), str) or not isinstance(document["versions"].get("torch"), str):
        raise UserError(f"{path} is damaged: it has no date, or no version of torch")
    for number, row in enumerate(document["rows"]):
        _check_row(row, document["kind"], f"{path}: row {number}")
    return document


def _check_row(row: Any, kind: str, where: str) -> None:
    keys = KEYS[kind]
    if not isinstance(row, dict) or any(not isinstance(row.get(key), str) for key in keys):
        raise UserError(f"{where} lacks one of {', '.join(keys)}")
    if row.get("status") not in STATUSES:
        raise UserError(f"{where} has the status {row.get('status')!r}, not one of {', '.join(STATUSES)}")
    samples = row.get("samples_ms", [])
    numbers = isinstance(samples, list) and all(isinstance(s, int | float) and s > 0 for s in samples)
    if not numbers or bool(samples) != (row["status"] == "ok"):
        raise UserError(f"{where}: samples above 0 must stand beside the status ok, and there alone")
    if row["status"] != "ok" and not row.get("reason"):
        raise UserError(f"{where} has the status {row['status']} and no reason")
    wanted = (*NUMBERS[kind], *(RATES if kind == "kernels" and rated(row["op"], row["pass"]) else ()))
    missing = [name for name in wanted if not isinstance(row.get(name), int | float)]
    if row["status"] == "ok" and missing:
        raise UserError(f"{where} is timed and lacks {', '.join(missing)}")


def key_of(document: dict[str, Any], row: dict[str, Any]) -> tuple[str, ...]:
    """What names a row of the document."""
    return tuple(row[key] for key in KEYS[document["kind"]])


def rated(op: str, which: str) -> bool:
    """Whether a pass of an op is the same work whoever does it, so that rates and a share of a roofline mean something.

    What older files have of others is not shown."""
    return which == "forward+backward" or op not in SPLIT


def timed(samples_ms: Iterable[float]) -> dict[str, Any]:
    """The fields of a row that come from its samples, milliseconds each."""
    samples = [float(f"{sample:.6g}") for sample in samples_ms]
    summary = stats.summarize(samples)
    return {
        "status": "ok", "median_ms": summary.median, "p20_ms": summary.p20, "p80_ms": summary.p80,
        "samples_ms": samples,
    }  # fmt: skip
