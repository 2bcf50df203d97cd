"""Thin modules around the functions, under torch.nn's names and with its arguments and parameters.

They are subclasses of PyTorch's and only forward is another: a state_dict goes from one to the other, and code
that asks for `isinstance(module, nn.LayerNorm)`, as initializers and weight decay do, is not surprised.
Attention has no module of its own: torch.nn has none, and nn.MultiheadAttention is more than the function.
"""

import torch
from torch import nn

from kernels.add_layer_norm import add_layer_norm
from kernels.cross_entropy import cross_entropy
from kernels.layer_norm import layer_norm


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` on kernels.layer_norm: the same arguments, parameters and state_dict.

    (*, *normalized_shape) -> the same shape and dtype; under autocast autocast's dtype. Errors are layer_norm's.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class AddLayerNorm(nn.LayerNorm):
    """kernels.add_layer_norm with nn.LayerNorm's arguments, parameters and state_dict.

    (input, residual), of one shape (*, *normalized_shape) or such that broadcast to it -> (the norm of
    their sum, their sum). Errors are add_layer_norm's.
    """

    def forward(self, input: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return add_layer_norm(input, residual, self.normalized_shape, self.weight, self.bias, self.eps)


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` on kernels.cross_entropy: the same arguments, buffer and state_dict.

    Logits (C,), (N, C) or (N, C, d1, ...) and class indices (), (N,) or (N, d1, ...) -> the mean or sum, or the
    losses in the targets' shape. Errors are cross_entropy's.
    """

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return cross_entropy(input, target, self.weight, self.ignore_index, self.reduction, self.label_smoothing)
