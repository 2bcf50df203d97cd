"""Attention of one packed tensor: that of its three parts to the bit, and one gradient that nobody put together."""

import pytest
import torch
from parity import DTYPES, LAYOUTS, guarded_allocations, hold_alike, name_of, same_bits
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels.device import INTERPRETED, TARGETS
from kernels.op import plan_for

packed = kernels.scaled_dot_product_attention_qkvpacked


def draw(*shape, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)


def of_its_parts(qkv, **options):
    """The same by the function of three tensors."""
    result = kernels.scaled_dot_product_attention(*qkv.transpose(-2, -4).unbind(-3), **options)
    out, *lse = result if isinstance(result, tuple) else (result,)
    return (out.transpose(-2, -3), *lse) if lse else out.transpose(-2, -3)


def run(function, qkv, grad, **options):
    """Output and gradient after one seed."""
    leaf = qkv.detach().requires_grad_()
    torch.manual_seed(7)
    out = function(leaf, **options)
    return out.detach(), torch.autograd.grad(out, leaf, grad)[0]


def hold(qkv, grad, **options):
    """Bit for bit in the interpreter; on a GPU a gradient that lies otherwise in memory may be summed otherwise."""
    with guarded_allocations():
        ours = run(packed, qkv, grad, **options)
    for one, other in zip(ours, run(of_its_parts, qkv, grad, **options), strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        if INTERPRETED:
            assert same_bits(one, other)
        torch.testing.assert_close(one, other, equal_nan=True)
    return ours


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"is_causal": True, "dropout_p": 0.3}, {"scale": 0.4}])
@pytest.mark.parametrize("shape", [(2, 9, 3, 3, 16), pytest.param((1, 140, 3, 2, 20), marks=pytest.mark.slow)], ids=str)
def test_it_is_attention_of_its_parts(shape, options, dtype, device):
    hold(draw(*shape, dtype=dtype, device=device), draw(*shape[:2], *shape[3:], dtype=dtype, device=device), **options)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_in_any_layout(layout, device):
    """Of the input and of the incoming gradient at once, with dropout."""
    qkv, grad = draw(2, 13, 3, 3, 8, device=device), draw(2, 13, 3, 8, seed=1, device=device)
    hold(layout(qkv), layout(grad), is_causal=True, dropout_p=0.2)


@pytest.mark.parametrize("arch", TARGETS)
def test_with_the_tiles_of_a_gpu(arch, device):
    if not INTERPRETED:
        pytest.skip("the device's own tiles run in every other test")
    shape = (1, 70, 3, 2, 64)
    with plan_for(TARGETS[arch]):
        hold(draw(*shape, dtype=torch.bfloat16), draw(1, 70, 2, 64, dtype=torch.bfloat16), is_causal=True)


@pytest.mark.parametrize("lead", [(), (2, 3), (1, 2, 1), (0,), (2, 0)], ids=str)
def test_any_dimensions_in_front(lead, device):
    hold(draw(*lead, 7, 3, 2, 8, device=device), draw(*lead, 7, 2, 8, device=device), is_causal=True)


@pytest.mark.parametrize("shape", [(2, 0, 3, 2, 8), (2, 5, 3, 0, 8)], ids=["no tokens", "no heads"])
def test_nothing_at_all(shape, device):
    out, gradient = hold(draw(*shape, device=device), draw(*shape[:2], *shape[3:], device=device))
    assert out.numel() == gradient.numel() == 0


@pytest.mark.parametrize("scale", [-0.5, 0.0, 50.0])
def test_any_scale(scale, device):
    hold(draw(1, 33, 3, 2, 16, device=device), draw(1, 33, 2, 16, device=device), scale=scale, is_causal=True)


@pytest.mark.parametrize("lead", [(2,), (2, 2)], ids=str)
def test_lse(lead, device):
    qkv = draw(*lead, 9, 3, 2, 16, device=device).requires_grad_()
    out, lse = packed(qkv, is_causal=True, return_lse=True)
    expected = of_its_parts(qkv, is_causal=True, return_lse=True)
    assert lse.shape == (*lead, 2, 9) and lse.dtype == torch.float32
    grad = draw(*lse.shape, seed=7, device=device)
    for outputs in ((lse, expected[1]), (lse + out.sum(), expected[1] + expected[0].sum())):
        ours, theirs = (torch.autograd.grad(output, qkv, grad, retain_graph=True)[0] for output in outputs)
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=0.0)
    torch.testing.assert_close((out, lse), expected)
    torch.testing.assert_close(kernels.reference.scaled_dot_product_attention_qkvpacked(
        qkv.detach().double(), is_causal=True, return_lse=True)[1], lse)  # fmt: skip


def test_autocast(device):
    qkv = draw(1, 9, 3, 2, 16, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = packed(qkv, is_causal=True)
    assert out.dtype == torch.bfloat16 and same_bits(out, packed(qkv.bfloat16(), is_causal=True))


class _Functions(TorchDispatchMode):
    """Notes every function that computes or copies: no views, and nothing that only allocates."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view and "empty" not in function.name() and "detach" not in function.name():
            self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def test_nothing_is_copied_between_the_two_projections(device):
    """From (B, T, 3 C) to (B, T, C) and back: one op each way, on the very tensors."""
    projected = draw(2, 17, 3 * 2 * 16, device=device).requires_grad_()
    kept = []
    with _Functions() as forward, torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        joined = packed(projected.view(2, 17, 3, 2, 16), is_causal=True).flatten(2)
    with _Functions() as backward:
        (gradient,) = torch.autograd.grad(joined, projected, torch.ones_like(joined))
    assert forward.names == ["kernels::attention_qkvpacked"]
    assert backward.names[1:] == ["kernels::attention_qkvpacked_backward"]  # the first is ones_like
    assert gradient.shape == projected.shape and gradient.is_contiguous()
    assert {t.data_ptr() for t in kept} >= {projected.data_ptr(), joined.data_ptr()}
    # of the function of three tensors autograd puts the gradient together
    with _Functions() as other:
        of_its_parts(projected.view(2, 17, 3, 2, 16), is_causal=True).sum().backward()
    assert {"aten::stack", "aten::cat"} & set(other.names)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_whole_for_every_length_it_is_eager(backend, device):
    def step(qkv):
        return packed(qkv, dropout_p=0.4, is_causal=True).square().sum()

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for length in (9, 12, 20):
        qkv = draw(2, length, 3, 2, 8, device=device)
        results = []
        for function in (step, compiled):
            leaf = qkv.clone().requires_grad_()
            torch.manual_seed(5)
            loss = function(leaf)
            loss.backward()
            results.append((loss.detach(), leaf.grad))
        for eager, ours in zip(*results, strict=True):
            hold_alike(ours, eager, f"with {length} tokens")
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("qkv", "options", "error", "says"),
    [
        (torch.ones(5, 3, 8), {}, RuntimeError, r"must be \(\.\.\., T, 3, H, D\), got \[5, 3, 8\]"),
        (torch.ones(2, 5, 2, 4, 8), {}, RuntimeError, r"must be \(\.\.\., T, 3, H, D\), got \[2, 5, 2, 4, 8\]"),
        (torch.ones(1, 5, 3, 1, 257), {}, NotImplementedError, "head size 257"),
        (torch.ones(1, 5, 3, 1, 0), {}, NotImplementedError, "head size 0"),
        (torch.ones(1, 5, 3, 1, 8, dtype=torch.float64), {}, NotImplementedError, "float64"),
        (torch.ones(1, 5, 3, 1, 8, dtype=torch.int32), {}, RuntimeError, "qkv is torch.int32"),
        ([[1.0]], {}, TypeError, "qkv must be a Tensor, not list"),
        (torch.ones(1, 5, 3, 1, 8), {"dropout_p": 1.5}, RuntimeError, "dropout_p must be in"),
        (torch.ones(1, 5, 3, 1, 8), {"dropout_p": "a"}, TypeError, "dropout_p must be a number, not str"),
        (torch.ones(1, 5, 3, 1, 8), {"scale": "a"}, TypeError, "scale must be a number, not str"),
        (torch.ones(1, 5, 3, 1, 8), {"scale": float("nan")}, ValueError, "scale must be finite in float32, got nan"),
        (torch.ones(1, 5, 3, 1, 8), {"scale": -float("inf")}, ValueError, "scale must be finite in float32, got -inf"),
    ],
)
def test_bad_arguments(qkv, options, error, says):
    with pytest.raises(error, match=f"^scaled_dot_product_attention_qkvpacked: .*{says}"):
        packed(qkv, **options)
