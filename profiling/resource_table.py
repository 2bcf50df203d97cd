"""The tables that `python -m profiling resources` prints."""

from typing import Any

from rich.table import Table

from profiling.instructions import KINDS, overlapped
from profiling.outputs import wide_console


def print_table(table: list, versions: dict[str, str]) -> None:
    """Print what every kernel asks for: a list of profiling.resources.Use."""

    def widths(counts: dict[str, int]) -> str:
        return " ".join(f"{width}b:{count}" for width, count in sorted(counts.items(), key=lambda item: -int(item[0])))

    view = Table(title="Kernels compiled ahead of time", caption=", ".join(" ".join(v) for v in versions.items()))
    for name in ("kernel", "dtype", "arch", "tile", "warps", "stages"):
        view.add_column(name, overflow="fold")
    for name in ("regs", "spill B", "shared B"):
        view.add_column(name, justify="right")
    view.add_column("occupancy", justify="right")
    for name in ("tensor cores", "loads", "stores", "notes", "cases"):
        view.add_column(name, overflow="fold")
    for use in table:
        tile = " ".join(f"{name}={value}" for name, value in use.tile.items())
        too_big = use.shared_memory > use.shared_memory_limit
        notes = [*use.advisories, *(["TOO MUCH SHARED"] if too_big else []), *([use.error] if use.error else [])]
        style = "red" if use.error or too_big else "yellow" if use.spill_bytes or use.advisories else None
        mma = " ".join(f"{name}:{count}" for name, count in use.tensor_core.items())
        view.add_row(
            use.kernel, use.dtype, use.arch, tile, str(use.num_warps), str(use.num_stages), str(use.registers),
            str(use.spill_bytes), str(use.shared_memory), _occupancy(use.occupancy), mma, widths(use.loads),
            widths(use.stores), " ".join(notes), " ".join(use.cases), style=style,
        )  # fmt: skip
    console = wide_console(240)
    console.print(view)
    mixes = Table(title="Instructions in the code, each counted once however often it runs")
    for name in ("kernel", "dtype", "arch", "tile"):
        mixes.add_column(name, overflow="fold")
    for kind in KINDS:
        mixes.add_column(kind.replace("_", " "), justify="right")
    header = "loops with wgmma (H): instructions; products, waits (W) and exp2 (E) in turn, of which in flight"
    mixes.add_column(header, overflow="fold")
    for use in table:
        tile = " ".join(f"{name}={value}" for name, value in use.tile.items())
        counts = [str(use.instructions.get(kind, 0)) for kind in KINDS]
        loops = [
            f"{count}; {order}: {found} of {total}"
            for order, count in zip(use.loops, use.loop_instructions, strict=True)
            for found, total in [overlapped(order)]
        ]
        mixes.add_row(use.kernel, use.dtype, use.arch, tile, *counts, "\n".join(loops))
    console.print(mixes)


def _occupancy(found: dict[str, Any]) -> str:
    """Programs a processor, the share of its warps, and what keeps it from more."""
    return f"{found['blocks']} x, {found['share']:.0%} ({', '.join(found['limited_by'])})" if found else ""


def print_rooflines(rows: list[dict[str, Any]]) -> None:
    """Print the least time of every op by the published peaks."""
    view = Table(title="Roofline: the least time by published peaks. An estimate; nothing was run")
    for name in ("op", "case", "pass", "dtype", "product"):
        view.add_column(name, overflow="fold")
    for name in ("GFLOP", "MB", "FLOP/B", "ridge", "least us", "bound by"):
        view.add_column(name, justify="right")
    for row in rows:
        numbers = (row["flops"] / 1e9, row["bytes"] / 1e6, row["intensity"], row["ridge"], row["us"])
        named = (row["op"], row["case"], row["pass"], row["dtype"], f"{row['product']} ({row['arch']})")
        view.add_row(*named, *(f"{number:,.1f}" for number in numbers), row["bound"])
    wide_console(160).print(view)
