"""The least time that a training step can take, by kernel backend, counted without a GPU: bytes and operations.

The step runs under fake tensors with the ops that CUDA would run. Each op reads its inputs and writes its results once,
at the published bandwidth, or computes at the published rate, whichever takes longer; the sum is the floor of a step
whose kernels run one after another. How far a backend can get without merging ops, and where its time must go.

    python -m profiling floor --preset gpt2 --batch-size 16 --kernels torch triton
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from profiling.limits import PEAKS, PRODUCTS, Peaks
from profiling.outputs import check_folders, wide_console
from profiling.trace import group_of

NO_KERNEL = frozenset({
    "aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided",
    "aten::detach", "aten::alias", "aten::_unsafe_view", "aten::_reshape_alias", "aten::lift_fresh",
    "aten::is_same_size", "aten::sym_size", "aten::split_with_sizes", "aten::split", "aten::unbind",
})  # fmt: skip
"""Ops that launch nothing, beside views."""
LOOKUPS = frozenset({"aten::embedding", "aten::gather", "aten::index_select", "aten::index"})
"""Ops that read of their first input only what they return."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What one op has to do. `launches` are at least so many kernels; `dtype` is that of its products."""

    op: str
    phase: str
    launches: int
    bytes: int
    flops: int
    dtype: str

    def us(self, peaks: Peaks) -> float:
        """The least time in microseconds by the published peaks."""
        rate = peaks.fp32 if self.dtype == "float32" else peaks.tensor[self.dtype]
        return max(self.flops / rate / 1e6, self.bytes / peaks.bandwidth / 1e3)


class Counter(TorchDispatchMode):
    """Notes the Work of every op that would launch something while it is active; `phase` is set by who runs it."""

    def __init__(self, arch: str):
        super().__init__()
        self.arch = arch
        self.phase = ""
        self.work: list[Work] = []
        self.planned: list = []
        """The Launches of our ops, one after another."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.name().split(".")[0]
        if func.namespace != "prim" and not func.is_view and name not in NO_KERNEL:
            inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            written = outputs or _written(func, args, kwargs)
            read = inputs[1:] + written if name in LOOKUPS else inputs
            formula = flop_registry.get(func._overloadpacket)
            self.work.append(
                Work(
                    op=name,
                    phase=self.phase,
                    launches=self._launches(func, args, kwargs),
                    bytes=sum(map(_moved, read)) + sum(map(_moved, written)),
                    flops=int(formula(*args, **kwargs, out_val=result)) if formula else 0,
                    dtype=str(next((t.dtype for t in inputs if t.is_floating_point()), torch.float32))[6:],
                )
            )
        return result

    def _launches(self, func, args, kwargs) -> int:
        """One kernel, or of our ops as many as their plan has and PyTorch ops that they call."""
        if func.namespace != "kernels":
            return 1
        from kernels.device import TARGETS
        from kernels.op import IMPLEMENTATIONS, plan_only

        with _disable_current_modes(), torch.no_grad(), plan_only(TARGETS[self.arch]) as launches:
            meta = lambda tensor: torch.empty_strided(  # noqa: E731
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"
            )
            args, kwargs = tree_map_only(torch.Tensor, meta, (args, kwargs))
            with Counter(self.arch) as inside:
                IMPLEMENTATIONS[func._opname](*args, **kwargs)
        self.planned += launches
        return len(launches) + sum(work.launches for work in inside.work)


def _written(func, args, kwargs) -> list[torch.Tensor]:
    """The inputs that an op without results overwrites."""
    names = {**dict(zip([argument.name for argument in func._schema.arguments], args, strict=False)), **kwargs}
    mutated = [
        argument.name for argument in func._schema.arguments if argument.alias_info and argument.alias_info.is_write
    ]
    return [leaf for name in mutated for leaf in tree_leaves(names.get(name)) if isinstance(leaf, torch.Tensor)]


def _moved(tensor: torch.Tensor) -> int:
    """Bytes of the elements that a tensor has in memory: an expanded one has fewer than it shows."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or size == 0)
    return math.prod(sizes) * tensor.itemsize


def count(config: Any, arch: str = "sm_90") -> Counter:
    """What one training step of `config` has to do, op by op, as a CUDA GPU of `arch` would run it.

    Raises UserError for unknown kernels.
    """
    import contextlib

    from torch._subclasses.fake_tensor import FakeTensorMode

    from minigpt import backends
    from minigpt.config import DTYPES
    from profiling import cuda_rules
    from profiling.estimate import before_a_step
    from profiling.step import training_step

    counter = Counter(arch)

    @contextlib.contextmanager
    def during(phase: str):
        counter.phase = phase
        yield

    ops = backends.resolve(config.kernels, torch.device("cuda"))
    with FakeTensorMode(allow_non_fake_inputs=True), cuda_rules.as_on_cuda():
        model, optimizer, batch = before_a_step(config, ops)
        with counter:
            training_step(model, optimizer, batch, DTYPES[config.dtype], config.grad_clip, during=during)
    return counter


# ---------------------------------------------------------------- the command


def add_to(commands) -> None:
    """Add `floor` to a command line."""
    parser = commands.add_parser("floor", help=__doc__.split("\n")[0], description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--preset", default="gpt2", help="the model (default: gpt2)")
    parser.add_argument(
        "--kernels",
        nargs="+",
        default=["eager", "torch", "triton"],
        help="what to compare (default: eager torch triton)",
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help="windows a step (default: the preset's)")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16", help="autocast's dtype (default: bf16)")
    parser.add_argument(
        "--gpu", choices=[*PRODUCTS], default="H200 SXM", help="whose published peaks (default: H200 SXM)"
    )
    parser.add_argument("--json", type=Path, help="write everything here, `-` for stdout instead of the tables")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """The command. Raises UserError for what a person can put right."""
    from minigpt.config import preset
    from minigpt.errors import writing

    check_folders(arguments.json)
    overrides = {} if arguments.batch_size is None else {"batch_size": arguments.batch_size}
    configs = [
        preset(arguments.preset, kernels=name, dtype=arguments.dtype, **overrides)
        for name in dict.fromkeys(arguments.kernels)
    ]
    document = floors(configs, arguments.gpu)
    text = json.dumps(document, indent=1) + "\n"
    if arguments.json == Path("-"):
        print(text, end="")
        return 0
    if arguments.json:
        with writing(arguments.json):
            arguments.json.write_text(text)
    _print(document)
    return 0


def floors(configs: Sequence[Any], gpu: str = "H200 SXM") -> dict[str, Any]:
    """What the command tells, for TrainConfigs of one preset: per backend the sums, and those of each group of ops."""
    from minigpt import utilization
    from minigpt.backends import resolve
    from minigpt.model import GPT
    from profiling.estimate import vocabulary

    peaks = PRODUCTS[gpu]
    arch = next((arch for arch, there in PEAKS.items() if there.tensor == peaks.tensor), "sm_90")
    rows = []
    for config in configs:
        work = count(config, arch).work
        tokens = config.batch_size * (config.window or config.block_size)
        us = sum(each.us(peaks) for each in work)
        groups = {}
        for each in work:
            group = groups.setdefault(group_of(each.op), {"launches": 0, "bytes": 0, "flops": 0, "us": 0.0})
            for name, value in (("launches", each.launches), ("bytes", each.bytes), ("flops", each.flops)):
                group[name] += value
            group["us"] += each.us(peaks)
        rows.append({
            "kernels": config.kernels, "ops": len(work), "launches": sum(each.launches for each in work),
            "bytes": sum(each.bytes for each in work), "flops": sum(each.flops for each in work),
            "us": us, "tokens_per_second": tokens / us * 1e6,
            "groups": dict(sorted(groups.items(), key=lambda item: -item[1]["us"])),
        })  # fmt: skip
    with torch.device("meta"):
        model = GPT(config.model_config(vocabulary(config)), resolve("torch", torch.device("cpu")))
    model_flops = utilization.flops_per_token(model, config.window or config.block_size)
    peak = peaks.tensor["bfloat16"] if config.dtype == "bf16" else peaks.fp32
    for row in rows:
        row["mfu_percent"] = 100 * row["tokens_per_second"] * model_flops / (peak * 1e12)
    return {
        "preset": config.preset, "batch_size": config.batch_size, "tokens": tokens, "dtype": config.dtype,
        "gpu": gpu, "bandwidth_gbps": peaks.bandwidth, "tflops": peak, "kernels": rows,
    }  # fmt: skip


def _print(document: dict[str, Any]) -> None:

    from rich.table import Table

    console = wide_console(140)
    console.print(
        f"{document['preset']}, {document['tokens']:,} tokens a step, {document['dtype']}, at the published peaks "
        f"of an {document['gpu']}: {document['bandwidth_gbps']:,} GB/s, {document['tflops']:,} TFLOP/s",
        highlight=False,
    )
    rows = document["kernels"]
    table = Table(title="The least a step can take, op after op", title_justify="left")
    for heading in ("kernels", "launches", "GB", "TFLOP", "us", "tokens/s", "MFU"):
        table.add_column(heading, justify="left" if heading == "kernels" else "right")
    for row in rows:
        table.add_row(
            row["kernels"], f"{row['launches']:,}", f"{row['bytes'] / 1e9:.2f}", f"{row['flops'] / 1e12:.2f}",
            f"{row['us']:,.0f}", f"{row['tokens_per_second']:,.0f}", f"{row['mfu_percent']:.1f}%",
        )  # fmt: skip
    console.print(table)
    groups = Table(title="us by group of ops (launches)", title_justify="left")
    groups.add_column("group")
    for row in rows:
        groups.add_column(row["kernels"], justify="right")
    for name in dict.fromkeys(name for row in rows for name in row["groups"]):
        cells = [row["groups"].get(name) for row in rows]
        groups.add_row(name, *(f"{cell['us']:,.0f} ({cell['launches']:,})" if cell else "" for cell in cells))
    console.print(groups)
    console.print(
        "Counted, not measured: every op alone, its inputs from memory. Caches, overlap and torch.compile can do "
        "better, real kernels and launches do worse.",
        highlight=False,
    )
