"""Where the memory of a training step goes, by kernel backend: estimated with no GPU, or measured on one.

The estimate takes one step (forward, backward, clipping, AdamW) under fake tensors and counts every allocation. The
standard case is fp32 parameters under bf16 autocast, the optimizer's state present, every activation kept.

    python -m profiling memory --preset gpt2 --kernels torch triton attention=triton,loss=torch --fit 24 80
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from profiling.outputs import check_folders, check_suffix

GB = 1e9
ALL_KERNELS = ("eager", "torch", "triton")


def add_to(commands) -> None:
    """Add `memory` to a command line."""
    parser = commands.add_parser("memory", help=__doc__.split("\n")[0], description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--preset", default="gpt2", help="the model (default: gpt2)")
    parser.add_argument(
        "--kernels",
        nargs="+",
        action="extend",
        metavar="KERNELS",
        help="what to compare, each as training's --kernels has it: torch triton attention=triton,loss=torch "
        "(default: eager torch triton; between whole backends a comma will do, too)",
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help="windows a forward pass (default: the preset's)")
    parser.add_argument("--block-size", type=int, metavar="T", help="tokens a window (default: the preset's)")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16", help="autocast's dtype (default: bf16)")
    parser.add_argument(
        "--grad-accumulation", type=int, default=1, metavar="N", help="forward and backward passes a step (default: 1)"
    )
    parser.add_argument(
        "--checkpoint-activations", action="store_true", help="as in training: compute activations again in backward"
    )
    parser.add_argument("--estimate", action="store_true", help="estimate on a machine with a GPU too")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="what the estimate is for")
    parser.add_argument("--arch", help="GPU that our kernels are planned for (default: the one there is, else sm_90)")
    parser.add_argument(
        "--fit", nargs="+", action="extend", type=float, default=[], metavar="GB", help="largest batch in so many 1e9 B"
    )
    parser.add_argument("--json", type=Path, help="write everything here, `-` for stdout instead of the tables")
    parser.add_argument("--png", type=Path, help="draw the timelines here (or .svg, .pdf: by the name)")
    parser.add_argument("--html", type=Path, help="write a page with the timelines and tables here")
    parser.add_argument("--snapshot", type=Path, metavar="DIR", help="on a GPU: write torch.cuda.memory snapshots here")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """The command. Raises UserError for what a person can put right."""
    import torch

    from minigpt.errors import UserError
    from profiling import memory_report, pictures

    configs = _configs(arguments)
    check_folders(arguments.png, arguments.html, arguments.json)
    check_suffix("--png", arguments.png, pictures.suffixes())
    check_suffix("--html", arguments.html, ("", ".html", ".htm"))  # none: a device, as /dev/stdout
    measuring = torch.cuda.is_available() and not arguments.estimate and arguments.device == "cuda"
    if arguments.snapshot and not measuring:
        raise UserError("--snapshot needs a GPU, and no --estimate: snapshots are of PyTorch's CUDA allocator")
    document = _document(arguments, configs, measuring)
    if arguments.json == Path("-"):
        print(json.dumps(document, indent=1))
    else:
        memory_report.print_tables(document)
    memory_report.write(document, arguments.json, arguments.png, arguments.html)
    return 0


def _configs(arguments: argparse.Namespace) -> dict[str, Any]:
    """The TrainConfig of every backend asked for, by its name."""
    import torch

    from kernels.device import TARGETS, facts
    from minigpt.config import preset
    from minigpt.errors import UserError

    if arguments.arch is None:
        gpu = torch.cuda.is_available()
        arguments.arch = facts(torch.device("cuda", torch.cuda.current_device())).tiles if gpu else "sm_90"
    if arguments.arch not in TARGETS:
        raise UserError(f"unknown architecture {arguments.arch!r}: choose one of {', '.join(TARGETS)}")
    if arguments.grad_accumulation < 1:
        raise UserError(f"--grad-accumulation must be at least 1, not {arguments.grad_accumulation}")
    for limit in arguments.fit:
        if not (math.isfinite(limit) and limit > 0):
            raise UserError(f"--fit must be above 0, not {limit:g}")
    overrides: dict[str, Any] = {"dtype": arguments.dtype, "checkpoint_activations": arguments.checkpoint_activations}
    if arguments.batch_size is not None:
        overrides["batch_size"] = arguments.batch_size
    if arguments.block_size is not None:
        overrides |= {"block_size": arguments.block_size, "window": 0}
    requests = _requests(arguments.kernels or ALL_KERNELS)
    return {request: preset(arguments.preset, kernels=request, **overrides) for request in requests}


def _requests(words: Sequence[str]) -> list[str]:
    """What to compare, each once: a word with `=` is one choice per op, any other may hold several with a comma.

    Raises UserError for a word that is neither, or names what there is not.
    """
    from minigpt.backends import parse_request
    from minigpt.errors import UserError

    found: dict[str, None] = {}
    for word in words:
        parts = [part.strip() for part in word.split(",")]
        if not all(parts):
            raise UserError("--kernels has an empty name: write them as eager,torch,triton")
        choices = ["=" in part for part in parts]
        if any(choices) and not all(choices):
            alone = next(part for part in parts if "=" not in part)
            raise UserError(
                f"--kernels {word}: {alone} is a whole backend, beside choices per op; put spaces between what is "
                "to be compared, as in --kernels torch attention=triton,loss=torch"
            )
        for request in [",".join(parts)] if all(choices) else parts:
            parse_request(request)
            found[request] = None
    return list(found)


def _document(arguments: argparse.Namespace, configs: dict[str, Any], measuring: bool) -> dict[str, Any]:
    """Everything there is to say, as JSON values. Bytes throughout; `gb` is 1e9 bytes."""
    import torch

    from profiling import estimate

    config = next(iter(configs.values()))
    rows = []
    for config in configs.values():
        options = {"device": arguments.device, "arch": arguments.arch, "passes": arguments.grad_accumulation}
        found = estimate.estimate(config, **options)
        row = as_json(found)
        if arguments.fit:
            peaks = lambda n, config=config, options=options: (  # noqa: E731
                estimate.estimate(dataclasses.replace(config, batch_size=n), **options).peak
            )
            row["fit"] = estimate.largest_batches(peaks, [limit * GB for limit in arguments.fit])
        if measuring:
            from profiling import memory_session

            row["measured"] = memory_session.measure(config, arguments.grad_accumulation, arguments.snapshot)
        rows.append(row)
    return {
        "settings": {
            "preset": config.preset,
            "batch_size": config.batch_size,
            "tokens": config.window or config.block_size,
            "vocab_size": estimate.vocabulary(config),
            "parameters": found.parameters,
            "dtype": config.dtype,
            "grad_accumulation": arguments.grad_accumulation,
            "checkpoint_activations": config.checkpoint_activations,
            "device": arguments.device,
            "arch": arguments.arch if arguments.device == "cuda" else None,
            "torch": torch.__version__,
        },
        "fit_gb": arguments.fit,
        "kernels": rows,
    }


def as_json(found) -> dict[str, Any]:
    """An Estimate as plain values: the timeline is a list of [phase, op, bytes of each of `categories`]."""
    from profiling.tracker import CATEGORIES

    phases: dict[str, int] = {}
    for point in found.timeline:
        phases[point.phase] = max(phases.get(point.phase, 0), point.total)
    return {
        "kernels": found.kernels,
        "backends": found.backends,
        "peak": found.peak,
        "at_peak": found.at_peak,
        "peak_phase": found.peak_phase,
        "peak_op": found.peak_op,
        "phases": phases,
        "largest": [
            {name: getattr(block, name) for name in ("bytes", "category", "phase", "op", "shape", "dtype")}
            for block in found.largest
        ],
        "unseen": found.unseen,
        "categories": list(CATEGORIES),
        "timeline": [[point.phase, point.op, *(point.bytes[name] for name in CATEGORIES)] for point in found.timeline],
    }
