"""The modules: torch.nn's arguments, parameters, state_dict and results."""

import copy
import inspect

import pytest
import torch
from torch import nn

import kernels
from kernels.op import count_launches

PAIRS = [("LayerNorm", nn.LayerNorm), ("AddLayerNorm", nn.LayerNorm), ("CrossEntropyLoss", nn.CrossEntropyLoss)]
each_module = pytest.mark.parametrize(("name", "theirs"), PAIRS, ids=[name for name, _ in PAIRS])
NORMS = [
    ((24,), {}),
    (([4, 6],), {"eps": 1e-3}),
    ((24,), {"bias": False}),
    ((24,), {"elementwise_affine": False}),
    ((24,), {"dtype": torch.bfloat16}),
]
LOSSES = [
    {},
    {"weight": torch.linspace(0.5, 1.5, 9)},
    {"ignore_index": 3, "reduction": "sum", "label_smoothing": 0.1},
    {"reduction": "none", "weight": torch.linspace(0.5, 1.5, 9)},
]


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@each_module
def test_arguments_are_pytorchs(name, theirs):
    ours = getattr(kernels, name)
    assert issubclass(ours, theirs) and ours.__doc__ != theirs.__doc__ and name in kernels.__all__
    assert inspect.signature(ours) == inspect.signature(theirs)


def _exchange(ours, theirs):
    """A state_dict of either goes into the other, names and all; returns PyTorch's module with random parameters."""
    for seed, parameter in enumerate(theirs.parameters()):
        parameter.data.copy_(draw(*parameter.shape, seed=seed + 5))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor) and ours.state_dict()[name].dtype == tensor.dtype
    back = copy.deepcopy(theirs)
    back.load_state_dict(ours.state_dict(), strict=True)


@pytest.mark.parametrize(("made", "options"), NORMS, ids=str)
def test_layer_norm(made, options, device):
    ours, theirs = kernels.LayerNorm(*made, **options).to(device), nn.LayerNorm(*made, **options).to(device)
    _exchange(ours, theirs)
    shape = (3, *([made[0]] if isinstance(made[0], int) else made[0]))
    inputs = [draw(*shape, dtype=options.get("dtype", torch.float32)).to(device).requires_grad_() for _ in range(2)]
    with count_launches() as launched:
        results = [module(x) for module, x in zip((ours, theirs), inputs, strict=True)]
    assert launched.total() == 1
    torch.testing.assert_close(*results)
    for result in results:
        result.backward(draw(*shape, seed=3).to(result))
    for one, two in zip([inputs[0], *ours.parameters()], [inputs[1], *theirs.parameters()], strict=True):
        tolerance = {"rtol": 0.02, "atol": 0.02} if one.dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(one.grad, two.grad, **tolerance)


@pytest.mark.parametrize(("made", "options"), NORMS[:4], ids=str)
def test_add_layer_norm(made, options, device):
    ours, theirs = kernels.AddLayerNorm(*made, **options).to(device), nn.LayerNorm(*made, **options).to(device)
    _exchange(ours, theirs)
    shape = (3, *([made[0]] if isinstance(made[0], int) else made[0]))
    x, residual = draw(*shape).to(device), draw(*shape, seed=1).to(device)
    output, total = ours(x, residual)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(output, theirs(x + residual))
    if options.get("elementwise_affine", True):
        (output.square().sum() + total.sum()).backward()
        theirs(x + residual).square().sum().backward()
        for one, two in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(one.grad, two.grad)


@pytest.mark.parametrize("options", LOSSES, ids=lambda options: "-".join(options) or "plain")
def test_cross_entropy_loss(options, device):
    ours, theirs = kernels.CrossEntropyLoss(**options).to(device), nn.CrossEntropyLoss(**options).to(device)
    _exchange(ours, theirs)
    target = torch.tensor([0, 3, 8, 3, 5], device=device)
    inputs = [draw(5, 9).to(device).requires_grad_() for _ in range(2)]
    with count_launches() as launched:
        results = [module(x, target) for module, x in zip((ours, theirs), inputs, strict=True)]
    assert launched.total() == (1 if options.get("reduction") == "none" else 2)
    torch.testing.assert_close(*results)
    for result in results:
        result.backward(draw(*result.shape, seed=3).to(device))
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", LOSSES, ids=lambda options: "-".join(options) or "plain")
def test_linear_cross_entropy_loss(options, bias, device):
    ours = kernels.LinearCrossEntropyLoss(6, 9, bias=bias, **options).to(device)
    head, loss = nn.Linear(6, 9, bias=bias).to(device), nn.CrossEntropyLoss(**options).to(device)
    head.load_state_dict(ours.linear.state_dict())
    target = torch.tensor([[0, 3, 8], [3, 5, 3]], device=device)
    inputs = [draw(2, 3, 6).to(device).requires_grad_() for _ in range(2)]
    with count_launches() as launched:
        result = ours(inputs[0], target)
    expected = loss(head(inputs[1]).flatten(0, 1), target.flatten())
    expected = expected.view(target.shape) if options.get("reduction") == "none" else expected
    assert launched.total() == 1
    torch.testing.assert_close(result, expected)
    for one in (result, expected):
        one.backward(draw(*one.shape, seed=3).to(device))
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for name, parameter in head.named_parameters():
        torch.testing.assert_close(getattr(ours.linear, name).grad, parameter.grad)


def test_linear_cross_entropy_loss_is_pytorchs_own():
    theirs = getattr(nn, "LinearCrossEntropyLoss", None)
    if theirs is None:  # before PyTorch 2.13
        names = ["linear.weight", "linear.bias", "weight"]
    else:
        assert [*inspect.signature(theirs).parameters] == [
            *inspect.signature(kernels.LinearCrossEntropyLoss).parameters
        ]
        names = list(theirs(4, 3, bias=True, weight=torch.ones(3)).state_dict())
    made = kernels.LinearCrossEntropyLoss(4, 3, bias=True, weight=torch.ones(3))
    assert sorted(made.state_dict()) == sorted(names)
    with pytest.raises(RuntimeError, match="3 classes"):
        kernels.LinearCrossEntropyLoss(4, 3, weight=torch.ones(2))
    with pytest.raises(RuntimeError, match="label_smoothing"):
        kernels.LinearCrossEntropyLoss(4, 3, label_smoothing=1.5)
    with pytest.raises(NotImplementedError, match="out_features"):
        kernels.LinearCrossEntropyLoss(4, 3, out_features=(2,))


def test_a_model_trained_with_one_loads_into_the_other(device):
    class Net(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.norm, self.out = norm(8), nn.Linear(8, 5)

        def forward(self, x):
            return self.out(self.norm(x))

    ours, theirs = Net(kernels.LayerNorm).to(device), Net(nn.LayerNorm).to(device)
    loss = kernels.CrossEntropyLoss()
    optimizer = torch.optim.SGD(ours.parameters(), 0.1)
    x, target = draw(6, 8).to(device), torch.arange(6, device=device) % 5
    before = loss(ours(x), target).item()
    for _ in range(3):
        optimizer.zero_grad()
        loss(ours(x), target).backward()
        optimizer.step()
    assert loss(ours(x), target).item() < before
    theirs.load_state_dict(ours.state_dict(), strict=True)
    torch.testing.assert_close(theirs(x), ours(x))


def test_their_errors_are_the_functions(device):
    with pytest.raises(RuntimeError, match="normalized_shape"):
        kernels.LayerNorm(8)(draw(3, 7).to(device))
    for shape, kind in ((True, "bool"), ([True], "bool"), ([1.0], "float")):  # with parameters nn.LayerNorm refuses it
        for module, inputs in ((kernels.LayerNorm, 1), (kernels.AddLayerNorm, 2)):
            with pytest.raises(TypeError, match=f"normalized_shape must be an integer, not {kind}"):
                module(shape, elementwise_affine=False)(*[draw(3, 1).to(device)] * inputs)
    with pytest.raises(NotImplementedError, match="probability"):
        kernels.CrossEntropyLoss()(draw(3, 5).to(device), draw(3, 5).to(device).softmax(-1))
