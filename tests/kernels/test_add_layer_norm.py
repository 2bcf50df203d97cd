"""The fused residual add's own: mixed dtypes, broadcasting, results that are not used, what may be overwritten."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from parity import DTYPES, constant, expanded, guarded_allocations, hold_alike, name_of, sliced, transposed

import kernels
from kernels.catalogue import ADD_LAYER_NORM
from kernels.device import INTERPRETED
from kernels.op import count_launches

add_layer_norm = kernels.add_layer_norm


def draw(*shape, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)


def problem(*shape, dtypes=(torch.float32, torch.float32), device="cpu"):
    """input, residual, weight and bias that want gradients."""
    n = shape[-1]
    tensors = [draw(*shape, dtype=dtype, device=device, seed=seed) for seed, dtype in enumerate(dtypes)]
    tensors += [draw(n, device=device, seed=seed) for seed in (2, 3)]
    return [tensor.requires_grad_() for tensor in tensors]


def in_double(tensors):
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("shapes", [((3, 8), (3, 8)), ((3, 8), ()), ((), (3, 8))], ids=str)
@pytest.mark.parametrize(
    "dtypes", list(itertools.product(DTYPES, DTYPES)), ids=lambda pair: "+".join(map(name_of, pair))
)
def test_the_sum_is_pytorchs_bit_for_bit(dtypes, shapes, device):
    x, residual = (draw(*shape, dtype=dtype, device=device) for shape, dtype in zip(shapes, dtypes, strict=True))
    total, expected = add_layer_norm(x, residual, 8)[1], x + residual
    rounding = 4 * torch.finfo(total.dtype).eps if () in shapes else 0.0  # PyTorch may round a lone number first
    torch.testing.assert_close(total, expected, rtol=0.0, atol=rounding)


PAIRS = [(a, b) for a in DTYPES for b in DTYPES if a != b]


@pytest.mark.parametrize("n", [40, 17_000])
@pytest.mark.parametrize("dtypes", PAIRS, ids=lambda pair: "+".join(map(name_of, pair)))
def test_mixed_dtypes_promote_as_pytorchs_sum(dtypes, n, device):
    """The sum bit for bit, every gradient in its input's dtype, and no launch more than without the sum."""
    leaves = problem(4, n, dtypes=dtypes, device=device)
    with guarded_allocations(), count_launches() as launched:
        output, total = add_layer_norm(*leaves[:2], n, *leaves[2:])
        grads = draw(4, n, device=device, seed=8).to(output.dtype), draw(4, n, device=device, seed=9).to(total.dtype)
        ours = torch.autograd.grad((output, total), leaves, grads)
    assert launched.total() == (3 if n <= 8192 else 4)
    assert torch.equal(total, leaves[0] + leaves[1]) and total.dtype == output.dtype == torch.float32
    doubles = in_double(leaves)
    exact = ADD_LAYER_NORM.reference(*doubles[:2], n, *doubles[2:])
    torch.testing.assert_close(output.double(), exact[0], rtol=1e-5, atol=1e-5)
    truth = torch.autograd.grad(exact, doubles, [grad.double() for grad in grads])
    for leaf, gradient, expected in zip(leaves, ours, truth, strict=True):
        assert gradient.dtype == leaf.dtype
        tolerance = 1e-5 if leaf.dtype == torch.float32 else torch.finfo(leaf.dtype).eps
        torch.testing.assert_close(gradient.double(), expected, rtol=tolerance, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("n", [67, 20_000])
def test_the_norm_is_of_the_sum_as_it_was_rounded(dtype, n, device):
    """Equal to layer_norm of PyTorch's sum, in the interpreter bit for bit."""
    x, residual, weight, bias = problem(5, n, dtypes=(dtype, dtype), device=device)
    output, total = add_layer_norm(x, residual, n, weight, bias)
    assert torch.equal(total, x + residual)
    expected = kernels.layer_norm(total.detach().requires_grad_(), n, weight, bias)
    hold_alike(output, expected, "of the sum")


@pytest.mark.parametrize("layout", [transposed, expanded, constant, sliced], ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("used", ["output", "sum", "both"])
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16, torch.float32)], ids=["same", "mixed"])
def test_a_result_that_is_not_used(used, layout, dtypes, device):
    """Its gradient is absent: nothing is made in its place, and what is not reached has no gradient."""
    leaves = problem(6, 24, dtypes=dtypes, device=device)
    doubles = in_double(leaves)
    places = [0, 1] if used == "both" else [("output", "sum").index(used)]
    results = add_layer_norm(*leaves[:2], 24, *leaves[2:])
    exact = ADD_LAYER_NORM.reference(*doubles[:2], 24, *doubles[2:])
    grads = [layout(draw(6, 24, device=device, seed=place)) for place in places]
    with count_launches() as launched:
        torch.autograd.backward([results[place] for place in places], grads)
    assert launched.total() == (0 if used == "sum" else 2)
    torch.autograd.backward([exact[place] for place in places], [grad.double() for grad in grads])
    for leaf, truth in zip(leaves, doubles, strict=True):
        assert (leaf.grad is None) == (truth.grad is None)
        if leaf.grad is not None:
            tolerance = 1e-5 if leaf.dtype == torch.float32 else 8e-3
            torch.testing.assert_close(leaf.grad.double(), truth.grad, rtol=tolerance, atol=1e-5)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (1, 2), (0, 3)], ids=str)
@pytest.mark.parametrize("n", [24, 9000])
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16, torch.float32)], ids=["same", "mixed"])
def test_gradients_of_some_only(wanted, n, dtypes, device):
    leaves = problem(3, n, dtypes=dtypes, device=device)
    grads = draw(3, n, device=device, seed=8), draw(3, n, device=device, seed=9)
    everything = torch.autograd.grad(add_layer_norm(*leaves[:2], n, *leaves[2:]), leaves, grads)
    chosen = [leaf.detach().requires_grad_(place in wanted) for place, leaf in enumerate(leaves)]
    results = add_layer_norm(*chosen[:2], n, *chosen[2:])
    assert [result.requires_grad for result in results] == [True, bool({0, 1} & set(wanted))]  # as PyTorch's sum
    used = [place for place in (0, 1) if results[place].requires_grad]
    torch.autograd.backward([results[place] for place in used], [grads[place] for place in used])
    for place, leaf in enumerate(chosen):
        assert (leaf.grad is not None) == (place in wanted)
        if place in wanted:
            if INTERPRETED:
                assert torch.equal(leaf.grad, everything[place])
            torch.testing.assert_close(leaf.grad, everything[place])  # compiled, other products may be fused


def test_one_gradient_for_both_and_no_memory_shared(device):
    """Autograd is handed one tensor for both; leaves that keep it do not keep the same memory."""
    leaves = problem(4, 24, device=device)
    output, total = add_layer_norm(*leaves[:2], 24, *leaves[2:])
    dinput, dresidual = torch.autograd.grad((output, total), leaves[:2], (output.detach(), total.detach()))
    assert dinput.data_ptr() == dresidual.data_ptr(), "a copy was made"
    output, total = add_layer_norm(*leaves[:2], 24, *leaves[2:])
    (output.sum() + total.sum()).backward()
    assert leaves[0].grad.data_ptr() != leaves[1].grad.data_ptr()
    before = leaves[1].grad.clone()
    leaves[0].grad.zero_()
    assert torch.equal(leaves[1].grad, before)


@pytest.mark.parametrize("n", [40, 9000])
def test_something_added_to_itself(n, device):
    x = draw(4, n, device=device).requires_grad_()
    truth = x.detach().double().requires_grad_()
    for leaf, function in ((x, add_layer_norm), (truth, ADD_LAYER_NORM.reference)):
        output, total = function(leaf, leaf, n)
        (output.square() * output + total.square()).sum().backward()
    torch.testing.assert_close(x.grad.double(), truth.grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("shapes", "normalized"),
    [
        (((3, 5, 8), (5, 8)), (8,)),
        (((1, 8), (4, 8)), (8,)),
        (((3, 5, 8), (3, 1, 8)), (8,)),
        (((3, 1), (3, 8)), (8,)),
        (((2, 3, 1, 8), (5, 1)), (5, 8)),
        (((8,), (2, 2, 8)), (8,)),
        (((4, 8), ()), (8,)),
        (((0, 8), (1, 8)), (8,)),
        (((3, 0), (3, 1)), (0,)),
    ],
    ids=str,
)
def test_broadcasting_as_in_pytorchs_sum(shapes, normalized, device):
    leaves = [draw(*shape, device=device, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]
    leaves += [draw(*normalized, device=device, seed=seed).requires_grad_() for seed in (2, 3)]
    doubles = in_double(leaves)
    output, total = add_layer_norm(*leaves[:2], normalized, *leaves[2:])
    exact = ADD_LAYER_NORM.torch(*doubles[:2], normalized, *doubles[2:])
    assert torch.equal(total, leaves[0] + leaves[1])
    torch.testing.assert_close(output.double(), exact[0], rtol=1e-5, atol=1e-5)
    grads = draw(*total.shape, seed=8, device=device), draw(*total.shape, seed=9, device=device)
    ours = torch.autograd.grad((output, total), leaves, grads)
    truth = torch.autograd.grad(exact, doubles, [grad.double() for grad in grads])
    for leaf, gradient, expected in zip(leaves, ours, truth, strict=True):
        assert gradient.shape == leaf.shape
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_stream_through_layers(device):
    """As a transformer has it: every block adds to the stream; both results of every norm are used."""

    def forward(function, x, branches, weight):
        stream = x
        y = F.layer_norm(x, (24,))
        for branch in branches:
            y, stream = function((y * branch).to(x.dtype), stream, 24, weight)
        return y.square().mean() + stream.sum() * 0.1

    tensors = [draw(5, 24, device=device, seed=seed) for seed in range(4)] + [draw(24, device=device, seed=5)]
    leaves, doubles = [tensor.requires_grad_() for tensor in tensors], in_double(tensors)
    for group, function in ((leaves, add_layer_norm), (doubles, ADD_LAYER_NORM.reference)):
        forward(function, group[0], group[1:4], group[4]).backward()
    for leaf, truth in zip(leaves, doubles, strict=True):
        torch.testing.assert_close(leaf.grad.double(), truth.grad, rtol=1e-4, atol=1e-5)


def test_autocast_gives_the_norm_autocasts_dtype_and_leaves_the_sum(device):
    x, residual = draw(4, 24, dtype=torch.bfloat16, device=device), draw(4, 24, device=device, seed=1)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        output, total = add_layer_norm(x, residual, 24)
        expected = x + residual
    assert output.dtype == torch.bfloat16 and total.dtype == torch.float32 and torch.equal(total, expected)
    torch.testing.assert_close(output.float(), F.layer_norm(expected, (24,)), rtol=1e-2, atol=1e-2)


def test_the_sum_must_stay_and_what_was_added_may_change(device):
    x, residual, weight, bias = problem(4, 24, device=device)
    output, total = add_layer_norm(x, residual, 24, weight, bias)
    expected = torch.autograd.grad((output, total), (x, residual, weight), (output.detach(), total.detach()))
    changing = x * 1.0
    output, total = add_layer_norm(changing, residual, 24, weight, bias)
    with torch.no_grad():
        changing += 1.0
    again = torch.autograd.grad((output, total), (x, residual, weight), (output.detach(), total.detach()))
    assert all(map(torch.equal, again, expected))
    output, total = add_layer_norm(x, residual, 24, weight, bias)
    with torch.no_grad():
        total += 1.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"normalized_shape": 7}, RuntimeError, "add_layer_norm: normalized_shape"),
        ({"input": torch.ones(3, 1), "residual": torch.ones(3, 1), "normalized_shape": True}, TypeError, "not bool"),
        ({"residual": torch.ones(2, 8)}, RuntimeError, "broadcast"),
        ({"weight": torch.ones(7)}, RuntimeError, "add_layer_norm: weight"),
        ({"bias": torch.ones(1, 8)}, RuntimeError, "bias"),
        ({"residual": torch.ones(3, 8, dtype=torch.float64)}, NotImplementedError, "residual is torch.float64"),
        ({"input": torch.ones(3, 8, dtype=torch.int64)}, NotImplementedError, "input is torch.int64"),
        ({"residual": torch.ones(3, 8, device="meta")}, RuntimeError, "residual is on meta"),
    ],
)
def test_bad_arguments(arguments, error, says):
    given = {"input": torch.ones(3, 8), "residual": torch.ones(3, 8), "normalized_shape": 8} | arguments
    with pytest.raises(error, match=says):
        add_layer_norm(**given)
