"""Triton kernels under torch.nn.functional's names: change `F.` to `kernels.`."""

from kernels import device  # first: it chooses the interpreter before Triton is imported
from kernels.attention import scaled_dot_product_attention
from kernels.layer_norm import layer_norm

__all__ = ["device", "layer_norm", "scaled_dot_product_attention"]
