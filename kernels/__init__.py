"""Triton kernels under torch.nn.functional's names: change `F.` to `kernels.`."""

from kernels import device, reference  # device first: it chooses the interpreter before Triton is imported
from kernels.add_layer_norm import add_layer_norm
from kernels.ahead import compile_ahead
from kernels.attention import scaled_dot_product_attention
from kernels.attention_qkvpacked import scaled_dot_product_attention_qkvpacked
from kernels.cross_entropy import cross_entropy
from kernels.decode_attention import decode_attention
from kernels.layer_norm import layer_norm
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.modules import AddLayerNorm, CrossEntropyLoss, LayerNorm, LinearCrossEntropyLoss

__all__ = [
    "AddLayerNorm",
    "CrossEntropyLoss",
    "LayerNorm",
    "LinearCrossEntropyLoss",
    "add_layer_norm",
    "compile_ahead",
    "cross_entropy",
    "decode_attention",
    "device",
    "layer_norm",
    "linear_cross_entropy",
    "reference",
    "scaled_dot_product_attention",
    "scaled_dot_product_attention_qkvpacked",
]
