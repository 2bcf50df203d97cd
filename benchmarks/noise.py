"""Rows that a busy machine has spoilt, as far as their own samples tell."""

from typing import Any

from benchmarks import results
from kernels import catalogue

WIDE = 0.2
"""From the 20th to the 80th percentile, over the median: a row that is wider is marked."""
APART = 0.1
"""How far one variant's two medians, or a part's and the whole's, may be from each other."""

WAITED = 0.1
"""Of the time on a CPU, that threads waited for a processor. A thread that waits for one that was put aside does so for
a whole turn of the scheduler, every time: such samples agree with each other, and are wrong."""

AGAIN = " again"


def waited(timer: Any) -> dict[str, float]:
    """The field of a row that tells how long a timer's samples had to wait for other processes; none on a GPU."""
    counted = getattr(timer, "waiting", None)
    return {} if counted is None else {"waited": counted.share}


def disturbed(document: dict[str, Any]) -> set[tuple[str, ...]]:
    """The keys of the timed rows that are not to be relied on.

    Those whose samples spread over more than WIDE or WAITED, those whose second measurement is more than APART
    from the first, and forward or backward passes that took longer than both together: but for backward of an op whose
    gradient can be made in forward, which alone makes all of it, and as a part nothing.
    """
    apart = {op.name for op in catalogue.OPS if op.both}
    timed = {results.key_of(document, row): row for row in document["rows"] if row["status"] == "ok"}
    found = {key for key, row in timed.items() if row["p80_ms"] - row["p20_ms"] > WIDE * row["median_ms"]}
    found |= {key for key, row in timed.items() if row.get("waited", 0.0) > WAITED}
    if document["kind"] != "kernels":
        return found
    for (op, case, dtype, which, provider), row in timed.items():
        twin = (op, case, dtype, which, provider + AGAIN)
        if twin in timed and not 1 / (1 + APART) <= timed[twin]["median_ms"] / row["median_ms"] <= 1 + APART:
            found |= {(op, case, dtype, which, provider), twin}
        if which == "backward" and op in apart:
            continue
        whole = timed.get((op, case, dtype, "forward+backward", provider))
        if whole and row["median_ms"] > (1 + APART) * whole["median_ms"]:
            found.add((op, case, dtype, which, provider))
    return found


def warning(document: dict[str, Any]) -> str:
    """One line that says how many rows are marked and what to do; "" where none is."""
    marked, timed = len(disturbed(document)), sum(row["status"] == "ok" for row in document["rows"])
    if not marked:
        return ""
    return (
        f"The machine was busy: {marked} of {timed} timed rows, marked ~, spread widely, contradict each other "
        "or had to wait for other programs. Measure again when nothing else runs."
    )
