"""A linear layer whose products run on oneDNN on a CPU: y = x W^T + b.

PyTorch gives a CPU's fp32 products to MKL, which leaves half the width of an AMD processor's vectors unused. oneDNN,
which every PyTorch for x86 carries too, uses all of it: the products of the preset shakespeare-cpu ran 2.2 times as
fast on a processor with AVX-512, and 1.1 times as fast on the same one held to AVX2.
"""

import kernels  # noqa: F401, I001  first: it chooses Triton's interpreter where there is no GPU

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

FEWEST_ROWS = 4
"""Below so many rows, as where one token is decoded, a product costs oneDNN more to begin than MKL to finish."""

_AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Linear(nn.Linear):
    """torch.nn.Linear through `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear: (..., N), (M, N) and (M,) -> (..., M), any floating-point dtype."""
    ours = _AVAILABLE and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    if (
        not ours
        or 0 in (x.numel(), weight.numel())
        or x.numel() < FEWEST_ROWS * weight.shape[-1]
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
    ):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = gradient.reshape(-1, len(weight))
        return (
            _product(gradient, weight.t()) if needs_x else None,
            _product(rows.t(), x.reshape(len(rows), -1).t()) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


if _AVAILABLE:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _flops(x_shape: torch.Size, weight_shape: torch.Size, *_args, out_shape: torch.Size, **_kwargs) -> int:
        return 2 * x_shape.numel() * weight_shape[0]
