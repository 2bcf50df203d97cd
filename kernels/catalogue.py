"""The ops, one line each. Tests, compilation, resource tables, benchmarks and the README's table loop over these."""

from kernels import attention, cross_entropy, layer_norm

OPS = (
    attention.OP,
    layer_norm.OP,
    cross_entropy.OP,
)
