"""Linear layers on oneDNN: torch.nn.functional.linear's results, gradients and FLOPs."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from minigpt.linear import _AVAILABLE, Linear, linear

needs_onednn = pytest.mark.skipif(not _AVAILABLE, reason="this PyTorch has no oneDNN")


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def both(x, weight, bias, gradient):
    """Output and gradients of `linear` in fp32, and of F.linear in float64."""
    results = []
    for function, dtype in ((linear, torch.float32), (F.linear, torch.float64)):
        given = [None if t is None else t.detach().to(dtype).requires_grad_() for t in (x, weight, bias)]
        if dtype == torch.float32:
            given[0] = x.detach().requires_grad_()  # its strides as they are
        y = function(*given)
        y.backward(gradient.to(dtype))
        results.append([y.detach(), *(t.grad for t in given if t is not None)])
    return zip(*results, strict=True)


@pytest.mark.parametrize("shape", [(5,), (1, 5), (3, 5), (2, 3, 5), (2, 1, 3, 5), (769, 5), (0, 5), (2, 0, 5)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_output_and_gradients(shape, with_bias):
    bias = drawn(7) if with_bias else None
    for ours, exact in both(drawn(*shape), drawn(7, 5), bias, drawn(*shape[:-1], 7)):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


def test_strided_inputs_and_gradients():
    x, weight, gradient = drawn(16, 6, 10), drawn(12, 10), drawn(16, 6, 12)
    layouts = (
        (x.transpose(0, 1), weight, gradient.transpose(0, 1)),
        (x[::3, 1:, :], weight, gradient[::3, 1:, :]),
        (x[:1].expand(4, 6, 10), weight, gradient[:1].expand(4, 6, 12)),
        (x[..., 1:8], weight[:, 1:8], gradient),
        (x, drawn(10, 12).t(), torch.ones(()).expand(16, 6, 12)),
        (x[..., :1].expand(16, 6, 10), weight, gradient),
    )
    for layout in layouts:
        for ours, exact in both(layout[0], layout[1], None, layout[2]):
            torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-4)


@needs_onednn
def test_onednn_computes_fp32_and_nothing_else():
    x, weight = drawn(4, 5).requires_grad_(), drawn(7, 5)
    assert type(linear(x, weight).grad_fn).__name__ == "_LinearBackward"
    for dtype in (torch.float64, torch.bfloat16):
        y = linear(x.to(dtype), weight.to(dtype))
        assert y.dtype == dtype and type(y.grad_fn).__name__ != "_LinearBackward"
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16


def test_a_frozen_weight_or_input_gets_no_gradient():
    layer = Linear(5, 7)
    layer.weight.requires_grad_(False)
    layer(drawn(3, 5)).sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(layer.bias.grad, torch.full((7,), 3.0))
    layer.requires_grad_(False)
    assert not layer(drawn(3, 5)).requires_grad


def test_flops_are_counted_as_those_of_a_matrix_product():
    layer = Linear(5, 7)
    x = drawn(2, 3, 5).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * (2 * 3) * 5 * 7


def test_sizes_that_do_not_fit_raise_an_error():
    with pytest.raises(RuntimeError):
        linear(drawn(3, 5), drawn(7, 6))
    with pytest.raises(RuntimeError):
        linear(drawn(3, 5), drawn(7, 5), drawn(6))


def test_the_whole_model_compiles_with_it():
    layer = Linear(5, 7)
    x = drawn(3, 5)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
