"""Triton kernels under torch.nn.functional's names: change `F.` to `kernels.`."""

from kernels import device, reference  # device first: it chooses the interpreter before Triton is imported
from kernels.attention import scaled_dot_product_attention
from kernels.cross_entropy import cross_entropy
from kernels.decode_attention import decode_attention
from kernels.layer_norm import layer_norm

__all__ = ["cross_entropy", "decode_attention", "device", "layer_norm", "reference", "scaled_dot_product_attention"]
