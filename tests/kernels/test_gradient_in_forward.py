"""Cross-entropy's gradient made in the forward pass: when it is, that it is backward's, and whose it is afterwards."""

import contextlib
import importlib
import weakref

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import aot_function, nop
from parity import guarded_allocations, name_of
from test_cross_entropy import classes, draw
from torch.fx.experimental.proxy_tensor import make_fx

import kernels
from kernels.device import TARGETS
from kernels.op import count_launches, plan_for

cross_entropy = kernels.cross_entropy
module = importlib.import_module("kernels.cross_entropy")  # the package's attribute of that name is the function

TILES = {"here": contextlib.nullcontext, "sm_90": lambda: plan_for(TARGETS["sm_90"])}
each_tile = pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)


def problem(n_classes, device, dtype=torch.float32, n_rows=5, weighted=False, ignored=True):
    x = draw(n_rows, n_classes, dtype=dtype, device=device)
    target = classes(n_rows, n_classes=n_classes, device=device)
    target[0], target[-1] = 0, n_classes - 1
    if ignored:
        target[1] = -100
    weight = draw(n_classes, seed=3, device=device).abs() + 0.1 if weighted else None
    return x, target, weight


def made_and_saved(x, target, weight, reduction="mean", label_smoothing=0.0):
    """(The gradient that the forward op makes, and its mark), and what the backward ops take besides these and grad."""
    options = (-100, reduction, label_smoothing)
    _, sums, divisor, *made = module.forward(x, target, weight, *options, x.dtype, True)
    return made, (x, target, weight, sums, divisor, *options)


@pytest.mark.parametrize(("n_classes", "tiles"), [(5003, "here"), (4096, "sm_90"), (5003, "sm_90")])
@pytest.mark.parametrize(
    ("reduction", "smoothing", "weighted"),
    [("mean", 0.0, False), ("mean", 0.9, False), ("mean", 0.2, True)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_it_is_backwards_for_one_bit_for_bit(n_classes, dtype, weighted, smoothing, reduction, tiles, device):
    """Several tiles with ends of a row and without; the target in each of them; rows that are sure of it, and one that
    is ignored. And once another gradient has come, 1 is one like others: graphs replay this kernel alone."""
    x, target, weight = problem(n_classes, device, dtype, weighted=weighted)
    x[2:].scatter_add_(1, target[2:, None], torch.full_like(x[2:, :1], 9.0))
    with TILES[tiles](), guarded_allocations():
        made, saved = made_and_saved(x, target, weight, reduction, smoothing)
        one, other = (torch.tensor(number, dtype=dtype, device=device) for number in (1.0, 0.3))
        for_one, for_other = module.backward(one, *saved), module.backward(other, *saved)
        assert torch.equal(made[0], for_one)
        for grad, expected in ((one, for_one), (other, for_other), (one, for_one)):
            module.correct(*made, grad, *saved)
            assert torch.equal(made[0], expected)


@each_tile
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_for_one_nothing_is_made_again(dtype, tiles, device):
    """Backward's kernel ends at once: what lies there is not looked at."""
    with tiles():
        (dlogits, changed), saved = made_and_saved(*problem(5000, device, dtype))
        noted = dlogits.fill_(7.0).clone()
        module.correct(dlogits, changed, torch.ones((), dtype=dtype, device=device), *saved)
        assert torch.equal(dlogits, noted)
        for other in (1.0 + 2.0**-7, 0.0, -1.0, float("nan")):
            grad = torch.tensor(other, dtype=dtype, device=device)
            module.correct(dlogits, changed, grad, *saved)
            torch.testing.assert_close(dlogits, module.backward(grad, *saved), rtol=0, atol=0, equal_nan=True)


@each_tile
@pytest.mark.parametrize("factor", [1.0, -3.0])
@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"label_smoothing": 0.1, "weight": True}], ids=str)
def test_gradients_are_pytorchs(options, factor, tiles, device):
    """Whatever follows the loss."""
    x, target, weight = problem(3000, device, weighted="weight" in options)
    ours, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    options = {name: value for name, value in options.items() if name != "weight"}
    with tiles(), guarded_allocations():
        (cross_entropy(ours, target, weight, **options) * factor).backward()
    weight = None if weight is None else weight.double()
    (F.cross_entropy(exact, target, weight, **options) * factor).backward()
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-5, atol=1e-7)


@each_tile
@pytest.mark.parametrize("wrong", [-1, 3000])
def test_ignored_rows_and_targets_out_of_bounds(wrong, tiles, device, monkeypatch):
    """Zeros for the one, whatever its logits, NaN for the other, and neither in other rows; all ignored: zeros too."""
    monkeypatch.setattr(module, "CHECK_VALUES", False)
    x, target, _ = problem(3000, device)
    x[1], target[2] = float("nan"), wrong
    with tiles(), guarded_allocations():
        (dlogits, _), _ = made_and_saved(x, target, None, "sum")
        (nothing, _), _ = made_and_saved(x, torch.full_like(target, -100), None)
    assert (dlogits[1] == 0.0).all() and dlogits[2].isnan().all() and (nothing == 0.0).all()
    right = [0, 3, 4]
    exact = x[right].double().requires_grad_()
    F.cross_entropy(exact, target[right], reduction="sum").backward()
    torch.testing.assert_close(dlogits[right].double(), exact.grad, rtol=1e-5, atol=1e-7)


# ---------------------------------------------------------------- when


def launched(x, target, **options) -> dict[str, int]:
    with count_launches() as counted:
        loss = cross_entropy(x, target, **options)
        if loss.requires_grad:
            loss.sum().backward()
    return {name.removeprefix("_cross_entropy_"): count for name, count in counted.items()}


def makes_gradient(x, target, monkeypatch, **options) -> bool:
    """Whether the forward op is asked for it. Backward is one launch either way."""
    asked = []
    forward = module.forward
    monkeypatch.setattr(module, "forward", lambda *arguments: asked.append(arguments[-1]) or forward(*arguments))
    counts = launched(x, target, **options)
    assert counts.get("backward", 0) == x.requires_grad
    (answer,) = asked
    return answer


@pytest.mark.parametrize(
    ("change", "made"),
    [
        ({}, True),
        ({"reduction": "sum"}, True),
        ({"reduction": "none"}, False),
        ({"dtype": torch.bfloat16}, True),
        ({"dtype": torch.float16}, False),  # losses are scaled
        ({"n_classes": 1024}, False),
        ({"gaps": True}, False),
        ({"frozen": True}, False),
    ],
    ids=str,
)
def test_when_it_is_made(change, made, device, monkeypatch):
    x, target, _ = problem(change.get("n_classes", 1025), device, change.get("dtype", torch.float32))
    x = torch.cat([x, x], 1)[:, : x.shape[1]] if "gaps" in change else x
    x.requires_grad_("frozen" not in change)
    options = {"reduction": change["reduction"]} if "reduction" in change else {}
    assert makes_gradient(x, target, monkeypatch, **options) == made


def test_not_without_gradients(device, monkeypatch):
    x, target, _ = problem(1025, device)
    with torch.no_grad():
        assert not makes_gradient(x, target, monkeypatch)
    asked = []
    forward = module.forward
    monkeypatch.setattr(module, "forward", lambda *arguments: asked.append(arguments[-1]) or forward(*arguments))
    with torch.no_grad():
        cross_entropy(x.requires_grad_(), target)
    assert asked == [False]


def test_not_where_it_is_traced(device):
    """In a graph backward cannot know whether it is the first; so not either where a mode might be tracing."""
    x, target, _ = problem(1025, device)
    leaves = x.clone().requires_grad_(), x.clone().requires_grad_()
    traced = aot_function(cross_entropy, fw_compiler=nop, bw_compiler=nop)
    for function, leaf in zip((traced, cross_entropy), leaves, strict=True):
        loss = function(leaf, target)
        loss.backward(retain_graph=True)
        loss.backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad)


def test_launches(device):
    """Of long rows, the sum of weights comes first for "mean", in a launch of its own; else forward has it in parts."""
    x, target, _ = problem(1025, device)
    x.requires_grad_()
    assert launched(x, target) == {"weigh": 1, "forward": 1, "reduce": 1, "backward": 1}
    assert launched(x, target, reduction="sum") == {"forward": 1, "reduce": 1, "backward": 1}
    assert launched(x, target, reduction="none") == {"forward": 1, "backward": 1}
    short = x.detach()[:, :1024].contiguous().requires_grad_()
    assert launched(short, target.clamp(max=1023)) == {"forward": 1, "reduce": 1, "backward": 1}


@pytest.mark.parametrize(
    ("backend", "dtype"), [("eager", torch.float32), ("aot_eager", torch.float32), ("aot_eager", torch.bfloat16)]
)
def test_compiled_it_is_eager_bit_for_bit(backend, dtype, device):
    """Where the gradient is made in backward: the class weights add up to the same number too."""
    x, target, weight = problem(1025, device, dtype, n_rows=9, weighted=True)
    results = []
    for function in (cross_entropy, torch.compile(cross_entropy, fullgraph=True, backend=backend)):
        leaf = x.clone().requires_grad_()
        loss = function(leaf, target, weight, label_smoothing=0.1)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    torch.compiler.reset()
    for ours, eager in zip(*results, strict=True):
        assert torch.equal(ours, eager)


# ---------------------------------------------------------------- whose it is


@each_tile
def test_backward_may_run_again(tiles, device):
    """Also where the first gradient has been changed since: it was given away."""
    x, target, _ = problem(5000, device)
    x.requires_grad_()
    with tiles():
        loss = cross_entropy(x, target)
        (first,) = torch.autograd.grad(loss, x, retain_graph=True)
        expected = first.clone()
        first.fill_(float("nan"))
        (second,) = torch.autograd.grad(loss, x, retain_graph=True)
        assert torch.equal(second, expected)
        loss.backward(retain_graph=True)
        loss.backward()
    assert torch.equal(x.grad, 2 * expected)


def test_a_leaf_takes_it_without_a_copy(device):
    """And nobody else has it then, while the loss lives."""
    x, target, _ = problem(1025, device)
    x.requires_grad_()
    loss = cross_entropy(x, target)
    place = loss.grad_fn.made[0].data_ptr()
    loss.backward()
    assert x.grad.data_ptr() == place and loss.grad_fn.made is None


def test_it_goes_with_a_loss_that_is_not_differentiated(device):
    """No cycle holds it until the garbage collector comes by."""
    x, target, _ = problem(1025, device)
    loss = cross_entropy(x.requires_grad_(), target)
    made = weakref.ref(loss.grad_fn.made[0])
    assert made() is not None
    del loss
    assert made() is None


def test_logits_changed_since_are_noticed(device):
    """As in every backward, though those of a gradient of one would not be read."""
    x, target, _ = problem(1025, device)
    logits = x.requires_grad_() * 1.0
    loss = cross_entropy(logits, target)
    logits += 1.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_second_derivatives_raise(device):
    x, target, _ = problem(1025, device)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(x, target), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        gradient.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_holds_none(reentrant, device):
    """Nor do other hooks that put aside what is saved: they would not see it."""
    x, target, _ = problem(1025, device)
    leaves = x.clone().requires_grad_(), x.clone().requires_grad_()
    loss = torch.utils.checkpoint.checkpoint(cross_entropy, leaves[0], target, use_reentrant=reentrant)
    assert reentrant or loss.grad_fn.made is None
    loss.backward()
    with torch.autograd.graph.save_on_cpu():
        loss = cross_entropy(leaves[1], target)
    assert loss.grad_fn.made is None
    loss.backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad)


def test_gradients_of_several_at_once(device):
    """As jacobian(vectorize=True) asks for them."""
    x, target, _ = problem(1025, device)
    x.requires_grad_()
    loss, grads = cross_entropy(x, target), torch.tensor([1.0, -0.5, 1.0], device=device)
    (batch,) = torch.autograd.grad(loss, x, grads, is_grads_batched=True, retain_graph=True)
    for grad, got in zip(grads, batch, strict=True):
        assert torch.equal(got, torch.autograd.grad(loss, x, grad, retain_graph=True)[0])
    loss = cross_entropy(x, target)
    once_more = torch.vmap(lambda grad: torch.autograd.grad(loss, x, grad, retain_graph=True)[0])(grads)
    assert torch.equal(once_more, batch)


def test_a_traced_backward_has_results_of_its_own(device):
    """Not that one which forward made, at each call."""
    x, target, _ = problem(1025, device)
    loss, one = cross_entropy(x.requires_grad_(), target), torch.ones((), device=device)
    traced = make_fx(lambda grad: torch.autograd.grad(loss, x, grad, retain_graph=True)[0])(one)
    first, second = traced(one), traced(0.5 * one)
    (expected,) = torch.autograd.grad(loss, x)
    assert torch.equal(first, expected) and torch.equal(second, 0.5 * expected)


def test_compiled_autograd_may_run_backward_as_often_as_it_likes(device):
    x, target, _ = problem(1025, device)
    expected = torch.autograd.grad(cross_entropy(leaf := x.clone().requires_grad_(), target), leaf)[0]
    loss = cross_entropy(x.requires_grad_(), target)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        loss.backward(torch.tensor(0.5, device=device), retain_graph=True)
        assert torch.equal(x.grad, 0.5 * expected)
        x.grad = None
        loss.backward()
    torch.compiler.reset()
    assert torch.equal(x.grad, expected)


def test_both_ops_pass_opcheck(device):
    x, target, _ = problem(1025, device)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")  # nothing that traces asks for it
    arguments = (x.requires_grad_(), target, None, -100, "mean", 0.1, x.dtype, True)
    torch.library.opcheck(module.forward, arguments, test_utils=checks)
    made, saved = made_and_saved(x.detach(), target, None)
    torch.library.opcheck(module.correct, (*made, torch.tensor(0.5, device=device), *saved))
