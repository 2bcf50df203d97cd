"""`python -m benchmarks train`: the ladder, from plain arithmetic to every kernel compiled, as training runs it.

Rungs: eager, torch, torch+compile, triton, triton+compile, three of them as CUDA graphs, and all kernels but one. Every
rung trains the same model from the same weights on the same batches; its losses must agree with PyTorch's, or its speed
is not given. Then steps of all rungs are timed in turns. What counts is a whole optimizer step, forward, backward,
clipping and AdamW; evaluation, saving and the first steps, which compile, are left out.
"""

import argparse
import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import machine, report, results
from minigpt.errors import UserError


def add_to(commands: Any) -> None:
    """Add `train` to a command line."""
    parser = commands.add_parser("train", help="training end to end, one kernel after another", description=__doc__)
    parser.add_argument("--preset", help="of minigpt (default: shakespeare; on a CPU shakespeare-cpu)")
    parser.add_argument(
        "--rung", nargs="+", action="extend", default=[], help="configurations, as `torch` or `triton+compile+graph`"
    )
    parser.add_argument("--steps", type=int, help="steps before the losses are compared (default: 60, --quick 20)")
    parser.add_argument("--rounds", type=int, help="samples of a step of each rung (default: 40, --quick 12)")
    parser.add_argument("--dtype", choices=["auto", "fp32", "bf16", "fp16"], default="auto")
    parser.add_argument("--data", default="pydocs", help="the text (default: pydocs, which needs no network)")
    parser.add_argument("--quick", action="store_true", help="fewer steps, and no gradient accumulation")
    parser.add_argument("--nanogpt", type=Path, metavar="DIR", help="a checkout of nanoGPT, timed in turns with ours")
    parser.add_argument("--out", type=Path, help="folder for the results (default: benchmarks/results)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """The command. Returns 1 if a rung's losses were wrong, or one threw."""
    try:
        from benchmarks import ladder, nanogpt
        from minigpt import config, corpora
    except ModuleNotFoundError as error:  # the kernels' benchmarks do without what minigpt needs
        raise UserError(f"training needs the package {error.name}: pip install -r requirements.txt") from None
    for option in ("steps", "rounds"):
        if getattr(arguments, option) is not None and getattr(arguments, option) < 1:
            raise UserError(f"--{option} must be at least 1, not {getattr(arguments, option)}")
    here = machine.here()
    name = arguments.preset or ("shakespeare" if here.type == "cuda" else "shakespeare-cpu")
    steps = arguments.steps or (20 if arguments.quick else 60)
    rounds = arguments.rounds or (12 if arguments.quick else 40)
    settings = config.preset(name, data=arguments.data, dtype=arguments.dtype)
    if arguments.quick:
        settings = replace(settings, grad_accumulation=1)
    rungs = ladder.chosen(arguments.rung)
    if arguments.nanogpt:
        settings = nanogpt.prepared(arguments.nanogpt, settings)
    corpora.load(settings.data)  # what is wrong with the text is said before anything else
    command = {"name": "train", "preset": name, "quick": arguments.quick, "steps": steps}
    document = results.new("train", command) | {"mfu_formula": ladder.MFU_FORMULA}
    path = results.path_of(document, arguments.out)
    results.prepare(path)
    print(f"{here.name}: {name}, {len(rungs)} configurations; results go to {path}\n{ladder.MFU_FORMULA}", flush=True)
    keep = functools.partial(_keep, document, path)
    if arguments.nanogpt:
        document["rows"] = nanogpt.measure(
            arguments.nanogpt, settings, rungs, here.torch_device, steps, arguments.quick, keep
        )
    else:
        document["rows"] = ladder.measure(settings, rungs, here.torch_device, steps, rounds, keep)
    ladder.finish(document["rows"])
    report.publish(document, path)
    return int(any(row["status"] in ("wrong", "error") for row in document["rows"]))


def _keep(document: dict[str, Any], path: Path, rows: list[dict[str, Any]]) -> None:
    document["rows"] = rows
    results.save(document, path)
