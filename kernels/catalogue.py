"""The ops, one line each. Tests, compilation, resource tables, benchmarks and the README's table loop over these."""

from kernels.attention import OP as ATTENTION
from kernels.cross_entropy import OP as CROSS_ENTROPY
from kernels.layer_norm import OP as LAYER_NORM

OPS = (
    ATTENTION,
    LAYER_NORM,
    CROSS_ENTROPY,
)
