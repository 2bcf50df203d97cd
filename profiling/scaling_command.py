"""Memory and communication per GPU for training on 1 to many GPUs, by formula: ddp and fsdp, for each preset.

Nothing is run. docs/scaling.md has the formulas, what they were held to, and the tables that this makes.

    python -m profiling scaling --preset gpt2 gpt2-xl --gpus 1 8 64 --parallel fsdp --checkpoint-activations
"""

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from profiling.outputs import check_folders, check_suffix

GB = 1e9
FITS = (24, 80, 141)
COUNTS = [2**power for power in range(11)]
"""GPUs looked at for what fits."""
TABLES = ("parameters", "windows", "memory", "peak", "fits", "sent", "seconds")


@dataclass(frozen=True)
class Row:
    """One kind of training of one preset: what each number of GPUs holds and sends."""

    preset: str
    kernels: str
    parallel: str
    steps: dict[int, Any]
    """Each GPU with the windows of one."""
    shared: dict[int, Any]
    """The windows of one shared out; None where they do not divide."""
    fewest: dict[float, int | None]


def add_to(commands) -> None:
    """Add `scaling` to a command line."""
    parser = commands.add_parser("scaling", help=__doc__.split("\n")[0], description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    several = {"nargs": "+", "action": "extend"}
    parser.add_argument("--preset", **several, metavar="NAME", help="models (default: the four gpt2)")
    parser.add_argument("--gpus", **several, type=int, metavar="W", help="default: 1 8 64 512 1024")
    parser.add_argument("--parallel", **several, choices=["ddp", "fsdp"], help="default: both")
    parser.add_argument("--kernels", **several, choices=["torch", "triton"], help="default: both")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16", help="autocast's dtype (default: bf16)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="windows a forward pass (default: the preset's)")
    parser.add_argument(
        "--grad-accumulation", type=int, metavar="N", help="passes a step of one GPU (default: the preset's)"
    )
    parser.add_argument("--checkpoint-activations", action="store_true", help="as in training")
    parser.add_argument(
        "--bandwidth", type=float, default=450.0, metavar="GB/S",
        help="what each GPU sends a second, 1e9 bytes: your number, nothing is measured (default: 450)",
    )  # fmt: skip
    parser.add_argument(
        "--tflops", type=float, metavar="N", help="1e12 operations a second that a GPU reaches in training: your number"
    )
    parser.add_argument("--table", **several, choices=TABLES, help="what to print (default: all)")
    parser.add_argument("--json", type=Path, help="write every number here, `-` for stdout instead of the tables")
    parser.add_argument("--png", type=Path, help="draw memory against GPUs here (or .svg, .pdf: by the name)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """The command. Raises UserError for what a person can put right."""
    from minigpt.errors import UserError, writing
    from profiling import pictures, scaling_tables

    check_folders(arguments.png, arguments.json)
    check_suffix("--png", arguments.png, pictures.suffixes())
    for name in ("bandwidth", "tflops"):
        value = getattr(arguments, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UserError(f"--{name} must be above 0, not {value:g}")
    rows = find_rows(arguments)
    if arguments.json:
        text = json.dumps(as_json(rows), indent=1)
        if arguments.json == Path("-"):
            print(text)
        else:
            with writing(arguments.json):
                arguments.json.write_text(text + "\n")
    if arguments.png:
        with writing(arguments.png):
            scaling_tables.draw(rows, arguments.png)
    if arguments.json != Path("-"):
        print(scaling_tables.markdown(scaling_tables.tables(rows, arguments)))
    return 0


def find_rows(arguments: argparse.Namespace) -> list[Row]:
    """The rows that were asked for, each once and in that order, for GPUs in rising number."""
    from minigpt.config import preset
    from minigpt.errors import UserError
    from profiling.scaling import step_of
    from profiling.scaling_memory import fewest_gpus

    counts = sorted(set(arguments.gpus or (1, 8, 64, 512, 1024)))
    if counts[0] < 1:
        raise UserError(f"--gpus must be at least 1, not {counts[0]}")
    overrides = {"dtype": arguments.dtype, "checkpoint_activations": arguments.checkpoint_activations}
    for name in ("batch_size", "grad_accumulation"):
        if getattr(arguments, name) is not None:
            overrides[name] = getattr(arguments, name)
    rows = []
    for name in dict.fromkeys(arguments.preset or ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")):
        for kernels in dict.fromkeys(arguments.kernels or ("torch", "triton")):
            for parallel in dict.fromkeys(arguments.parallel or ("ddp", "fsdp")):
                config = preset(name, kernels=kernels, **overrides)
                steps = {gpus: step_of(config, parallel, gpus, weak=True) for gpus in counts}
                shared = {gpus: _shared_step(config, parallel, gpus) for gpus in counts}
                one = step_of(config, parallel, 2, weak=True)
                fewest = {limit: fewest_gpus(one, limit * GB, COUNTS) for limit in FITS}
                rows.append(Row(name, kernels, parallel, steps, shared, fewest))
    return rows


def _shared_step(config: Any, parallel: str, gpus: int) -> Any:
    from minigpt.errors import UserError
    from profiling.scaling import step_of

    try:
        return step_of(config, parallel, gpus, weak=False)
    except UserError:
        return None


def as_json(rows: list[Row]) -> dict[str, Any]:
    """Everything there is to say as JSON values. Bytes throughout."""
    from profiling import scaling, scaling_memory

    made = []
    for row in rows:
        by_gpus = []
        kinds = [("weak", *item) for item in row.steps.items()] + [("strong", *item) for item in row.shared.items()]
        for kind, gpus, step in kinds:
            if step is None:
                by_gpus.append({"scaling": kind, "gpus": gpus, "divides": False})
                continue
            moment, found = scaling_memory.peak(step)
            sends = [
                {"kind": one.kind, "what": one.what, "bytes": one.size, "times": one.times, "sent": one.sent(gpus)}
                for one in scaling.collectives(step)
            ]
            by_gpus.append(
                {
                    "scaling": kind,
                    "gpus": gpus,
                    "divides": True,
                    "batch_size": step.batch,
                    "grad_accumulation": step.passes,
                    "tokens": step.tokens,
                }
                | {"peak": sum(found.values()), "at": moment, "at_peak": found, "moments": scaling_memory.memory(step)}
                | {"sent": scaling.sent(step), "collectives": sends, "operations": scaling.operations(step)}
            )
        fewest = {f"{limit:g}": gpus for limit, gpus in row.fewest.items()}
        settings = {"preset": row.preset, "kernels": row.kernels, "parallel": row.parallel}
        made.append(settings | {"fewest_gpus": fewest, "by_gpus": by_gpus})
    return {"fit_gb": list(FITS), "rows": made}
