"""GPT-2's GELU, the tanh form (Hendrycks & Gimpel 2016): x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).

On a CPU PyTorch spends most of its one kernel in tanh. Since 1 + tanh(u) = 2 sigmoid(2u), GELU is x sigmoid(2u) too,
and PyTorch's sigmoid is four times as fast there: 768 x 512 activations take 0.9 ms forward and backward instead
of 2.7 on one core with AVX2.

On a GPU memory is what runs out: the linear layer after it would keep gelu(x) for its weight's gradient, the widest
activation of a block, beside x, from which it is made again in less than the time of writing and reading it.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .linear import linear

# 2u = x (_LINEAR + _CUBIC x^2); a tensor because addcmul adds to one.
_LINEAR = 2 * math.sqrt(2 / math.pi)
_CUBIC = 0.044715 * _LINEAR
_LINEAR_TENSOR = torch.tensor(_LINEAR)


def gelu(x: Tensor) -> Tensor:
    """GELU in the tanh form, element by element: any shape, any floating-point dtype."""
    if _on_cpu(x) and x.dtype == torch.float32:
        return _SigmoidGELU.apply(x)
    return F.gelu(x, approximate="tanh")


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """linear(gelu(x), weight, bias): (..., N), (M, N) and (M,) -> (..., M); on a GPU it keeps x alone for backward."""
    if _on_cpu(x) or torch.compiler.is_compiling():  # a compiler decides by itself what to keep
        return linear(gelu(x), weight, bias)
    return _GELULinear.apply(x, weight, bias)


def _on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu"


class _SigmoidGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        sigmoid = torch.addcmul(_LINEAR_TENSOR, x, x, value=_CUBIC).mul_(x).sigmoid_()
        ctx.save_for_backward(x, sigmoid)
        return x * sigmoid

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        x, sigmoid = ctx.saved_tensors
        slope = torch.addcmul(_LINEAR_TENSOR, x, x, value=3 * _CUBIC).mul_(x)  # x times the derivative of 2u
        torch.ops.aten.sigmoid_backward.grad_input(slope, sigmoid, grad_input=slope)
        return slope.add_(sigmoid).mul_(gradient)


class _GELULinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return F.linear(F.gelu(x, approximate="tanh"), weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        dx = dweight = dbias = None
        rows = gradient.reshape(-1, gradient.shape[-1])
        with torch.autocast(gradient.device.type, enabled=False):  # the products run in the gradient's dtype
            if needs_weight:
                activations = F.gelu(x, approximate="tanh").reshape(-1, x.shape[-1])
                dweight = (rows.t() @ activations.to(rows.dtype)).to(weight.dtype)
                del activations
            if needs_x:
                dx = torch.ops.aten.gelu_backward(
                    (gradient @ weight.to(gradient.dtype)).to(x.dtype), x, approximate="tanh"
                )
            if needs_bias:
                dbias = rows.sum(0).to(ctx.bias_dtype)
        return dx, dweight, dbias
