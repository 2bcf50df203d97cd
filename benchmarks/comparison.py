"""`python -m benchmarks compare A B`: which rows of B differ from those of A by more than chance.

A verdict comes from the 99% bootstrap interval of the ratio of the medians, B over A: FASTER or SLOWER where it
leaves 1 out, SAME where it includes 1 and reaches no further than 5% from it, else UNCLEAR. Rows whose samples are
the very same are SAME: that is one measurement and not two. Two runs differ by their surroundings, too (clocks,
neighbours), which no sample of either shows: what matters deserves a second run.
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks import noise, results, stats
from minigpt.errors import UserError


def add_to(commands: Any) -> None:
    """Add `compare` to a command line."""
    parser = commands.add_parser("compare", help="what differs between two results files", description=__doc__)
    parser.add_argument("a", type=Path, metavar="A", help="results file: before")
    parser.add_argument("b", type=Path, metavar="B", help="results file: after")
    parser.add_argument("--force-gpu", action="store_true", help="compare files of two devices all the same")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """The command. Returns 0 whatever the verdicts are: they are a report, not a test."""
    a, b = results.load(arguments.a), results.load(arguments.b)
    comparisons, unmatched = compare(a, b, force_gpu=arguments.force_gpu)
    for warning in differences(a, b):
        print(f"note: {warning}")
    print(table(comparisons))
    counts = {v: sum(c.verdict == v for c in comparisons.values()) for v in ("SAME", "FASTER", "SLOWER", "UNCLEAR")}
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    if unmatched:
        print(f"{len(unmatched)} rows are timed in one of the files only: {'; '.join(unmatched)}")
    return 0


def compare(
    a: dict[str, Any], b: dict[str, Any], *, force_gpu: bool = False
) -> tuple[dict[tuple[str, ...], stats.Comparison], list[str]]:
    """Row by row: the comparisons by key, and the rows that only one file has timed.

    Raises UserError for files of two kinds or, unless forced, of two devices.
    """
    if a["kind"] != b["kind"]:
        raise UserError(f"one file is of {a['kind']}, the other of {b['kind']}: they have no rows in common")
    slugs = a["machine"]["slug"], b["machine"]["slug"]
    if slugs[0] != slugs[1] and not force_gpu:
        raise UserError(f"measured on two devices, {slugs[0]} and {slugs[1]}: --force-gpu compares them all the same")
    timed = [
        {
            results.key_of(document, row): row["samples_ms"]
            for row in document["rows"]
            if row["status"] == "ok" and not row.get("provider", "").endswith(noise.AGAIN)
        }
        for document in (a, b)
    ]
    both = [key for key in timed[0] if key in timed[1]]
    if not both:
        raise UserError("no row is timed in both files")
    unmatched = [" ".join(key) for key in (*timed[0], *timed[1]) if (key in timed[0]) != (key in timed[1])]
    return {key: stats.compare(timed[0][key], timed[1][key]) for key in both}, unmatched


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """What, beside the kernels, two files were measured under and differ in."""
    found = []
    for name in ("versions", "precision"):
        one, other = a.get(name, {}), b.get(name, {})
        for key in sorted(set(one) | set(other)):
            if one.get(key) != other.get(key):
                found.append(f"{name}: {key} is {one.get(key)} in A and {other.get(key)} in B")
    for copy in ("copy_gbps",):
        x, y = a["ceilings"].get(copy), b["ceilings"].get(copy)
        if x and y and abs(x / y - 1.0) > 0.05:
            found.append(f"a plain copy moved {x:,.4g} GB/s in A and {y:,.4g} in B: the device itself was not the same")
    for name, document in (("A", a), ("B", b)):
        if said := noise.warning(document):
            found.append(f"{name}: {said}")
    return found


def table(comparisons: dict[tuple[str, ...], stats.Comparison]) -> str:
    """The comparisons as aligned text: verdict, ratio and interval, row."""
    lines = [f"{'verdict':<8} {'B / A':>7}  {'99% interval':<17} row"]
    for key, (verdict, ratio, low, high) in comparisons.items():
        lines.append(f"{verdict:<8} {ratio:>7.3f}  {f'{low:.3f} to {high:.3f}':<17} {' '.join(key)}")
    return "\n".join(lines)
