"""What kernels were compiled to before, by version of Triton, and which of them have moved since.

`profiling/figures/triton-VERSION.csv` has a row for each kernel of the whole table: registers, spills, shared memory,
tensor-core instructions, widths of loads and stores. `python -m profiling resources` says what has got worse against
it; with `--store` it writes what it measured there.
"""

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("figures")
COLUMNS = (
    "op", "arch", "dtype", "kernel", "cases", "tile", "warps", "stages", "registers", "spill_bytes", "shared_memory",
    "tensor_core", "loads", "stores",
)  # fmt: skip
REGISTERS = 8  # so many more a thread are another kernel; fewer are the compiler's mood


def path(triton: str) -> Path:
    """Where the figures of a version of Triton are."""
    return FOLDER / f"triton-{triton}.csv"


def _counts(counts: dict[str, int]) -> str:
    return " ".join(f"{name}:{count}" for name, count in sorted(counts.items()))


def _row(use: Any) -> dict[str, str]:
    values = {
        "op": use.op,
        "arch": use.arch,
        "dtype": use.dtype,
        "kernel": use.kernel,
        "cases": " ".join(use.cases),
        "tile": " ".join(f"{name}={value}" for name, value in use.tile.items()),
        "warps": use.num_warps,
        "stages": use.num_stages,
        "registers": use.registers,
        "spill_bytes": use.spill_bytes,
        "shared_memory": use.shared_memory,
        "tensor_core": _counts(use.tensor_core),
        "loads": _counts(use.loads),
        "stores": _counts(use.stores),
    }
    return {name: str(values[name]) for name in COLUMNS}


def read(triton: str) -> list[dict[str, str]]:
    """The stored rows of a version of Triton; none where there is no file."""
    file = path(triton)
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def store(uses: Iterable[Any], triton: str) -> Path:
    """Put these profiling.resources.Use in the place of all stored rows of their ops, architectures and dtypes."""
    uses = list(uses)
    renewed = {(use.op, use.arch, use.dtype) for use in uses}
    kept = [row for row in read(triton) if (row["op"], row["arch"], row["dtype"]) not in renewed]
    rows = kept + [_row(use) for use in uses if not use.error]
    FOLDER.mkdir(exist_ok=True)
    with path(triton).open("w", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            sorted(rows, key=lambda row: [row[name] for name in ("arch", "dtype", "kernel", "cases", "tile")])
        )
    return path(triton)


def moved(uses: Iterable[Any], triton: str) -> list[str]:
    """A line for each kernel that asks for more than it did, or has lost tensor cores or wide accesses.

    A kernel is found again by its name and one of its cases. Where nothing is stored for an architecture and dtype,
    nothing is said of it; where something is, a kernel that is not among it is named too.
    """
    stored: dict[tuple, list[dict]] = {}
    known = set()
    for row in read(triton):
        known.add((row["arch"], row["dtype"]))
        for case in row["cases"].split():
            stored.setdefault((row["arch"], row["dtype"], row["kernel"], case.split("/")[-1]), []).append(row)
    lines = []
    for use in uses:
        if use.error or (use.arch, use.dtype) not in known:
            continue
        name = f"{use.kernel} {use.dtype} {use.arch} {use.cases[0]}"
        before = stored.get((use.arch, use.dtype, use.kernel, use.cases[0].split("/")[-1]))
        if before is None:
            lines.append(f"{name} is not among the stored figures: store them with --store")
            continue
        now = _row(use)
        for what, slack in (("registers", REGISTERS), ("spill_bytes", 0), ("shared_memory", 0)):
            most = max(int(row[what]) for row in before)
            if int(now[what]) > most + slack:
                lines.append(f"{name}: {what} {now[what]}, stored {most}")
        lost = {part.split(":")[0] for row in before for part in row["tensor_core"].split()} - set(use.tensor_core)
        if lost and not use.tensor_core:
            lines.append(f"{name}: no tensor cores, stored {' '.join(sorted(lost))}")
        for what, counts in (("loads", use.loads), ("stores", use.stores)):
            widest = min(max((int(part.split(":")[0]) for part in row[what].split()), default=0) for row in before)
            if max(map(int, counts), default=0) < widest:
                lines.append(f"{name}: {what} of at most {max(map(int, counts), default=0)} bits, stored {widest}")
    return lines
