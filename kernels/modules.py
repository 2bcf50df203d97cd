"""Thin modules around the functions, under torch.nn's names and with its arguments and parameters.

They are subclasses of PyTorch's and only forward is another: a state_dict goes from one to the other, and code
that asks for `isinstance(module, nn.LayerNorm)`, as initializers and weight decay do, is not surprised. Only
LinearCrossEntropyLoss is a class of its own, as PyTorch has none before 2.13.
Attention has no module of its own: torch.nn has none, and nn.MultiheadAttention is more than the function.
"""

import torch
from torch import nn

from kernels.add_layer_norm import add_layer_norm
from kernels.cross_entropy import cross_entropy
from kernels.layer_norm import layer_norm
from kernels.linear_cross_entropy import linear_cross_entropy


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
        options = {"reduction": self.reduction, "label_smoothing": self.label_smoothing}
        return cross_entropy(input, target, self.weight, ignore_index=self.ignore_index, **options)


class LinearCrossEntropyLoss(nn.Module):
    """PyTorch 2.13's `torch.nn.LinearCrossEntropyLoss` on kernels.linear_cross_entropy: a linear layer, `linear`, and
    the loss of its output, with the same arguments, parameters and state_dict.

    Input (..., in_features) and class indices (...) -> the mean or sum, or the losses in the targets' shape. Raises
    RuntimeError as PyTorch's for a weight or smoothing that does not fit, NotImplementedError for `out_features`, which
    makes a loss of several dimensions, and for `options`; other errors are linear_cross_entropy's.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: torch.Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: object = None,
    ):
        super().__init__()
        if out_features or options is not None:
            raise NotImplementedError("LinearCrossEntropyLoss: out_features and options are not implemented")
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(
                f"LinearCrossEntropyLoss: weight must have one element for each of the {num_classes} classes, got "
                f"shape {list(weight.shape)}"
            )
        if not 0.0 <= label_smoothing <= 1.0:
            raise RuntimeError(f"LinearCrossEntropyLoss: label_smoothing must be in [0, 1], got {label_smoothing}")
        self.linear = nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.register_buffer("weight", weight)
        self.reduction, self.ignore_index, self.label_smoothing = reduction, ignore_index, label_smoothing

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(
            input,
            self.linear.weight,
            target,
            linear_bias=self.linear.bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )

    def extra_repr(self) -> str:
        return f"reduction={self.reduction}, ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}"
