"""The ops, one line each. Tests, compilation, resource tables, benchmarks and the README's table loop over these."""

import torch

from kernels.add_layer_norm import OP as ADD_LAYER_NORM
from kernels.attention import OP as ATTENTION
from kernels.attention_qkvpacked import OP as ATTENTION_QKVPACKED
from kernels.cross_entropy import OP as CROSS_ENTROPY
from kernels.decode_attention import OP as DECODE_ATTENTION
from kernels.device import TARGETS
from kernels.layer_norm import OP as LAYER_NORM
from kernels.linear_cross_entropy import OP as LINEAR_CROSS_ENTROPY

OPS = (
    ATTENTION,
    ATTENTION_QKVPACKED,
    DECODE_ATTENTION,
    LAYER_NORM,
    ADD_LAYER_NORM,
    CROSS_ENTROPY,
    LINEAR_CROSS_ENTROPY,
)


def table() -> str:
    """The ops as a Markdown table: what the README shows, made from the plans for bf16 on sm_90."""
    lines = ["| function | drop-in for | our launches forward, backward (bf16, sm_90) | held to |", "|---|---|---|---|"]
    for op in OPS:
        case = op.sizes[0]
        launches = op.plan(op.inputs(case, torch.bfloat16, "meta"), case.options, TARGETS["sm_90"])
        backward = sum("backward" in launch.name for launch in launches)
        lines.append(
            f"| `kernels.{op.name}` | {op.replaces or f'`torch.nn.functional.{op.torch.__name__}`'} | "
            f"{len(launches) - backward}, {backward if op.differentiable else 'none'} ({_shape(case)}) | "
            f"{len(op.cases)} cases in 3 dtypes |"
        )
    return "\n".join(lines)


def _shape(case) -> str:
    """The shapes that are not said by those before them."""
    shapes = ["x".join(map(str, shape)) for shape in case.shapes.values() if len(shape) > 1]
    return " ".join(dict.fromkeys(shapes))
