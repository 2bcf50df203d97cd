"""`python -m benchmarks goals [FILE ...]`: what this project means to reach on an H200, how far it is, and the floors.

A bar is a ratio within one run: the peer's time over ours, or our share of the roofline of that run. FILES are results
files of one GPU, of any kind; a case is taken from the newest that has both sides of it. Of a goal with several cases
the worst counts, and it is met when all are there. Where nothing was measured the table says so. Floors are the fewest
bytes and the operations of each case over the ceilings measured in the files, or over published peaks where there are
none. --write puts both tables into docs/performance.md.
"""

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import machine, problems, report, results, suite
from kernels.op import Op
from minigpt.errors import UserError

PAGE = machine.ROOT / "docs" / "performance.md"
MARKERS = re.compile(r"<!-- goals:(.*?) -->\n(.*?)<!-- /goals -->", re.DOTALL)
DTYPE = "bfloat16"
UNMEASURED = "not measured"
NO_GPU = f"{UNMEASURED}: no GPU"
PUBLISHED = "H200 SXM"
BOTH = ("forward", "forward+backward")

ATTENTION = "scaled_dot_product_attention"
LENGTHS = ("d64-1024", "d64-4096", "d64-16384", "d128-1024", "d128", "d128-16384")
NORMS = ("384", "768", "1024", "4096", "8192")
LOSSES = ("v65", "v1024", "v50257", "v50304", "v131072", "v262144")
CACHES = ("gpt2", "gpt2-batch", "d64-16k", "d64-16k-batch", "gqa-1k", "gqa-16k", "gqa-4k-batch")
OURS = ("triton+compile+graph", "triton+graph", "triton+compile", "triton")


class Rows:
    """The timed rows of a document, by what names them, and which providers it says cannot do something."""

    def __init__(self, document: dict[str, Any]):
        self.by_key: dict[tuple[str, ...], dict[str, Any]] = {}
        self.skipped: set[tuple[str, ...]] = set()
        for row in document["rows"]:
            key = (document["kind"], *results.key_of(document, row))
            if row["status"] == "ok":
                self.by_key[key] = row
            elif row["status"] == "skipped":
                self.skipped.add(key)

    def kernel(self, op: str, case: str, which: str, provider: str) -> dict[str, Any] | None:
        """A row of `python -m benchmarks kernels`."""
        return self.by_key.get(("kernels", op, case, DTYPE, which, provider))

    def cannot(self, op: str, case: str, which: str, provider: str) -> bool:
        """Whether the provider was asked and cannot do it, so that nobody need be held to it there."""
        return ("kernels", op, case, DTYPE, which, provider) in self.skipped

    def training(self, preset: str, *configurations: str) -> dict[str, Any] | None:
        """The fastest row of the ladder among the configurations."""
        found = [self.by_key.get(("train", preset, name)) for name in configurations]
        return max(filter(None, found), key=lambda row: row["tokens_per_second"], default=None)


class Reached(NamedTuple):
    """What a case came to, which peers were not there to be held to, and what is to be known of the number."""

    value: float
    without: tuple[str, ...] = ()
    remark: str = ""


@dataclass(frozen=True)
class Bar:
    """A number to reach. `find` gives it by case, for those of a document; with `at_most` less is better."""

    text: str
    bound: float
    find: Callable[[Rows], dict[str, Reached]]
    cases: int = 1
    at_most: bool = False
    form: str = "{:.2f} x"

    def said(self, runs: Sequence[Rows]) -> str:
        """How far it is by these runs, the oldest first: the worst case, and whether that is enough.

        A case is taken from the newest run that has it, with all its peers if any has. One that falls short is a miss;
        nothing is met as long as a case or a peer is not there, which could be worse.
        """
        found: dict[str, Reached] = {}
        for rows in runs:
            for case, reached in self.find(rows).items():
                if case not in found or not reached.without or found[case].without:
                    found[case] = reached
        if not found:
            return UNMEASURED if runs else NO_GPU
        case = (max if self.at_most else min)(found, key=lambda case: found[case].value)
        worst, whole = found[case], sum(not reached.without for reached in found.values())
        enough = worst.value <= self.bound if self.at_most else worst.value >= self.bound
        where = [case + worst.remark + f" without {' and '.join(worst.without)}" * bool(worst.without)]
        where += [f"{whole} of {self.cases} cases"] * (whole < self.cases)
        word = "missed," if not enough else "**met**," if whole == self.cases else "so far"
        return f"{word} {self.form.format(worst.value)}" + f" ({', '.join(where)})" * (self.cases > 1)


@dataclass(frozen=True)
class Goal:
    """Bars for one thing; the last may be a moonshot."""

    what: str
    bars: tuple[Bar, ...]
    moonshot: Bar | None = None


# ---------------------------------------------------------------- what bars are made of


def faster(
    text: str, bound: float, ops: Sequence[str], cases: Sequence[str], passes: Sequence[str], peers: Sequence[str]
) -> Bar:
    """The time of the fastest of `peers` over ours. One whose calls wait for the device has no graph, and that wait in
    its time."""

    def find(rows: Rows) -> dict[str, Reached]:
        found = {}
        for op, case, which, ours in _ours(rows, ops, cases, passes):
            theirs = {peer: row for peer in peers if (row := rows.kernel(op, case, which, peer))}
            if theirs:
                best = min(theirs.values(), key=lambda row: row["median_ms"])
                without = tuple(p for p in peers if p not in theirs and not rows.cannot(op, case, which, p))
                waits = "" if best.get("method") == ours.get("method") else ", waiting for the device included"
                found[_label(ops, op, case, which)] = Reached(best["median_ms"] / ours["median_ms"], without, waits)
        return found

    return Bar(text, bound, find, len(ops) * len(cases) * len(passes))


def share(text: str, bound: float, ops: Sequence[str], cases: Sequence[str], passes: Sequence[str]) -> Bar:
    """The share of the roofline of the run, in percent."""

    def find(rows: Rows) -> dict[str, Reached]:
        return {
            _label(ops, op, case, which): Reached(ours["roofline_percent"])
            for op, case, which, ours in _ours(rows, ops, cases, passes)
            if "roofline_percent" in ours
        }

    return Bar(text, bound, find, len(ops) * len(cases) * len(passes), form="{:.0f}%")


def _ours(rows: Rows, ops, cases, passes) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    for op in ops:
        for case in cases:
            for which in passes:
                if row := rows.kernel(op, case, which, "triton"):
                    yield op, case, which, row


def _label(ops: Sequence[str], op: str, case: str, which: str) -> str:
    return f"{op} {case} {which}" if len(ops) > 1 else f"{case} {which}"


def memory(text: str, bound: float, op: str, case: str) -> Bar:
    """Our peak memory over PyTorch's."""

    def find(rows: Rows) -> dict[str, Reached]:
        return _memory(case, *(rows.kernel(op, case, "forward+backward", name) for name in ("triton", "torch")))

    return Bar(text, bound, find, at_most=True)


def _memory(case: str, *pair: dict[str, Any] | None) -> dict[str, Reached]:
    ours, theirs = ((row or {}).get("peak_memory_mib") for row in pair)
    return {case: Reached(ours / theirs)} if ours and theirs else {}


def training(text: str, bound: float, preset: str) -> Bar:
    """Our tokens/s over nanoGPT's, compiled."""

    def find(rows: Rows) -> dict[str, Reached]:
        ours, theirs = rows.training(preset, *OURS), rows.training(preset, "nanoGPT")
        return {preset: Reached(ours["tokens_per_second"] / theirs["tokens_per_second"])} if ours and theirs else {}

    return Bar(text, bound, find)


def _tokens(rows: Rows) -> dict[str, Reached]:
    ours = rows.training("gpt2", *OURS)
    return {"gpt2": Reached(ours["tokens_per_second"])} if ours else {}


def _step_memory(rows: Rows) -> dict[str, Reached]:
    return _memory("gpt2", rows.training("gpt2", *OURS), rows.training("gpt2", "torch+compile"))


def _start(rows: Rows) -> dict[str, Reached]:
    row = rows.by_key.get(("start", "shakespeare", "triton"))
    return {"shakespeare": Reached(row["median_ms"] / 1e3)} if row else {}


_SDPA = ("torch", "torch-flash", "torch-cudnn")
_HEADS, _DROPPED = ("shakespeare", "gpt2"), ("shakespeare-dropout", "gpt2-dropout")
_BOTH_NORMS = ("layer_norm", "add_layer_norm")
_CASES = {
    ATTENTION: (*LENGTHS, *_HEADS, *_DROPPED), **dict.fromkeys(_BOTH_NORMS, NORMS), "cross_entropy": LOSSES,
    "linear_cross_entropy": ("gpt2",), "decode_attention": CACHES,
}  # fmt: skip

GOALS = (
    Goal(
        "attention, causal, heads of 64 and 128, 1k to 16k tokens",
        (
            faster("1.0 x the best of SDPA-flash and FlexAttention", 1.0, [ATTENTION], LENGTHS, BOTH,
                   ("torch-flash", "flex")),
        ),
        faster("1.0 x SDPA-cuDNN", 1.0, [ATTENTION], LENGTHS, BOTH, ("torch-cudnn",)),
    ),
    Goal(
        "attention at (64, 6, 256, 64) and (16, 12, 1024, 64)",
        (
            faster("1.0 x the best of SDPA", 1.0, [ATTENTION], _HEADS, BOTH, _SDPA),
            faster("with dropout 1.3 x", 1.3, [ATTENTION], _DROPPED, BOTH, _SDPA),
        ),
        faster("1.2 x", 1.2, [ATTENTION], _HEADS, BOTH, _SDPA),
    ),
    Goal(
        "layer_norm and add_layer_norm forward, 384 to 8192",
        (
            share("90% of a clone's bandwidth", 90, _BOTH_NORMS, NORMS, ["forward"]),
            faster("1.0 x torch.compile", 1.0, _BOTH_NORMS, NORMS, ["forward"], ["compile"]),
        ),
        share("95%", 95, _BOTH_NORMS, NORMS, ["forward"]),
    ),
    Goal(
        "their backward",
        (
            share("80%", 80, _BOTH_NORMS, NORMS, ["backward"]),
            faster("1.3 x Liger", 1.3, ["layer_norm"], NORMS, ["backward"], ["liger"]),
        ),
        share("90%", 90, _BOTH_NORMS, NORMS, ["backward"]),
    ),
    Goal(
        "cross_entropy, both passes, 65 to 262,144 classes",
        (
            share("85% of a clone's bandwidth", 85, ["cross_entropy"], LOSSES, ["forward+backward"]),
            faster("1.5 x torch.compile", 1.5, ["cross_entropy"], LOSSES, ["forward+backward"], ["compile"]),
            faster("2 x Liger", 2.0, ["cross_entropy"], LOSSES, ["forward+backward"], ["liger"]),
        ),
        share("92%", 92, ["cross_entropy"], LOSSES, ["forward+backward"]),
    ),
    Goal(
        "linear_cross_entropy, 16k tokens x 768 x 50,304",
        (
            faster("1.0 x eager", 1.0, ["linear_cross_entropy"], ["gpt2"], ["forward+backward"], ["torch"]),
            memory("a tenth of its memory", 0.1, "linear_cross_entropy", "gpt2"),
            faster("1.5 x Liger", 1.5, ["linear_cross_entropy"], ["gpt2"], ["forward+backward"], ["liger"]),
        ),
        faster("1.1 x eager", 1.1, ["linear_cross_entropy"], ["gpt2"], ["forward+backward"], ["torch"]),
    ),
    Goal(
        "decode_attention, 1 and 64 rows, caches of 1k to 16k",
        (faster("1.0 x the best of SDPA", 1.0, ["decode_attention"], CACHES, ["forward"], _SDPA),),
        share("85% of bandwidth", 85, ["decode_attention"], CACHES, ["forward"]),
    ),
    Goal(
        "training `shakespeare`, tokens/s",
        (training("2 x nanoGPT, compiled", 2.0, "shakespeare"),),
        training("3 x", 3.0, "shakespeare"),
    ),
    Goal(
        "training `gpt2`, 16 x 1024",
        (
            training("1.1 x nanoGPT, compiled", 1.1, "gpt2"),
            Bar("peak memory below `torch+compile`'s", 1.0, _step_memory, at_most=True),
        ),
        Bar("500,000 tokens/s", 500e3, _tokens, form="{:,.0f} tokens/s"),
    ),
    Goal(
        "cold start of `shakespeare`, to the end of the first step",
        (Bar("15 s", 15.0, _start, at_most=True, form="{:.1f} s"),),
        Bar("5 s", 5.0, _start, at_most=True, form="{:.1f} s"),
    ),
)  # fmt: skip


def cases(op: Op) -> tuple[str, ...]:
    """The names of an op's cases that the goals are about."""
    return _CASES.get(op.name, ())


# ---------------------------------------------------------------- the command


def add_to(commands: Any) -> None:
    """Add `goals` to a command line."""
    parser = commands.add_parser("goals", help="what is to be reached, and how far it is", description=__doc__)
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE", help="results files of one GPU")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/performance.md")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """The command. Returns 0 whatever was reached: a bar is no test."""
    print(tables([_gpu(path) for path in arguments.files]))
    if arguments.write:
        names = []
        for path in arguments.files:
            if not path.resolve().is_relative_to(machine.ROOT):
                raise UserError(f"{path} is not in {machine.ROOT}: put it under benchmarks/results")
            names.append(path.resolve().relative_to(machine.ROOT).as_posix())
        results.write(PAGE, written(PAGE.read_text(encoding="utf-8"), names))
        print(f"written: {PAGE}")
    return 0


def _gpu(path: Path) -> dict[str, Any]:
    document = results.load(path)
    if document["machine"]["type"] != "cuda":
        raise UserError(f"{path} was measured without a GPU, where these goals mean nothing: name files of a GPU")
    return document


def written(text: str, files: Sequence[str]) -> str:
    """The page with its tables made from these results files. Raises UserError where it has no place for them."""
    documents = [_gpu(machine.ROOT / name) for name in files]
    section = f"<!-- goals:{''.join(f' {name}' for name in files)} -->\n{tables(documents)}\n<!-- /goals -->"
    changed, count = MARKERS.subn(lambda _: section, text)
    if count != 1:
        raise UserError("docs/performance.md has no section between <!-- goals: --> and <!-- /goals -->: write one")
    return changed


def tables(documents: Sequence[dict[str, Any]]) -> str:
    """Goals and floors as Markdown, from documents of one GPU. Raises UserError for those of two."""
    slugs = dict.fromkeys(document["machine"]["slug"] for document in documents)
    if len(slugs) > 1:
        raise UserError(f"measured on two devices, {' and '.join(slugs)}: give files of one")
    runs = [Rows(document) for document in sorted(documents, key=lambda document: document["date"])]
    lines = ["| what | bar | measured |", "|---|---|---|"]
    for goal in GOALS:
        for number, bar in enumerate(goal.bars):
            lines.append(f"| {goal.what if not number else ''} | {bar.text} | {bar.said(runs)} |")
        if goal.moonshot:
            lines.append(f"| | moonshot: {goal.moonshot.text} | {goal.moonshot.said(runs)} |")
    return "\n".join([*lines, "", *_floors(documents)])


def _floors(documents: Sequence[dict[str, Any]]) -> Iterator[str]:
    from profiling.limits import PRODUCTS

    peaks = PRODUCTS[PUBLISHED]
    ceilings = {"copy_gbps": peaks.bandwidth, f"matmul_tflops_{DTYPE}": peaks.tensor[DTYPE]}
    origin = f"published peaks of an {PUBLISHED}"
    for document in documents:
        if document["kind"] == "kernels" and set(ceilings) <= set(document["ceilings"]):
            ceilings, origin = document["ceilings"], f"ceilings measured on {document['machine']['name']}"
    yield (
        f"Floors in microseconds, bf16: the fewest bytes at {ceilings['copy_gbps']:,.0f} GB/s or the operations at "
        f"{ceilings[f'matmul_tflops_{DTYPE}']:,.0f} TFLOP/s, whichever takes longer ({origin}). "
        "A loss's gradient may be made in either pass, so that only both together have a floor."
    )
    yield ""
    yield "| op | case | shape | forward | backward | both |"
    yield "|---|---|---|---|---|---|"
    for op in problems.ops_named([]):
        known = {case.name: case for case in problems.all_cases(op, True, False)}
        for name in cases(op):
            case = known[name]
            costs = problems.costs(op, op.inputs(case, problems.DTYPES[DTYPE], "meta"), case.options)
            shape = " ".join(dict.fromkeys("x".join(map(str, shape)) for shape in case.shapes.values()))
            cells = [
                report.number(1e3 * suite.roofline_ms(cost, DTYPE, ceilings)) if results.rated(op.name, which) else "-"
                for which, cost in costs.items()
            ]
            yield f"| {op.name} | {name} | {shape} | {' | '.join([*cells, '', ''][:3])} |"
