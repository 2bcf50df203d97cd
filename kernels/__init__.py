"""Triton kernels under torch.nn.functional's names: change `F.` to `kernels.`."""

from kernels import device  # first: it chooses the interpreter before Triton is imported
from kernels.layer_norm import layer_norm

__all__ = ["device", "layer_norm"]
