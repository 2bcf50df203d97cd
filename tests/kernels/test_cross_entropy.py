"""Cross-entropy's own: targets of every kind, weights, smoothing, shapes, special values, errors."""

import contextlib
import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from parity import DTYPES, guarded_allocations, name_of

import kernels
from kernels.device import TARGETS
from kernels.op import count_launches, plan_for, plan_only, run

cross_entropy = kernels.cross_entropy
module = importlib.import_module("kernels.cross_entropy")  # the package's attribute of that name is the function


def draw(*shape, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)


def classes(*shape, n_classes, device="cpu", seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, n_classes, shape, generator=generator).to(device)


def agree(x, target, *, rtol=1e-5, atol=1e-6, **options):
    """Loss and gradient are PyTorch's in float64, NaN where it has NaN."""
    leaves = x.clone().requires_grad_(), x.double().requires_grad_()
    doubles = {name: value.double() if torch.is_tensor(value) else value for name, value in options.items()}
    expected = F.cross_entropy(leaves[1], target, **doubles)
    grad = draw(*expected.shape, seed=7).to(x)
    with guarded_allocations():
        loss = cross_entropy(leaves[0], target, **options)
        loss.backward(grad)
    expected.backward(grad.double())
    assert loss.dtype == x.dtype and loss.shape == expected.shape
    for ours, exact in ((loss, expected), (leaves[0].grad, leaves[1].grad)):
        torch.testing.assert_close(ours.double(), exact, rtol=rtol, atol=atol, equal_nan=True)


REDUCTIONS = ("mean", "sum", "none")


@pytest.mark.parametrize("n_classes", [1, 2, 3, 15, 16, 17, 255, 4095, 4096, 4097, 65_536, 65_537, 262_144])
def test_every_number_of_classes(n_classes, device):
    rows = 5 if n_classes < 10_000 else 2
    agree(draw(rows, n_classes, device=device), classes(rows, n_classes=n_classes, device=device))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shift", [1e3, -1e4, 1e5])
def test_a_shift_of_all_logits_costs_the_gradient_nothing(shift, reduction, device):
    """One fp32 number for lse would be rounded at the size of the shift, and the softmax with it."""
    x = draw(4, 100, device=device) + shift  # rounded here, the same for both sides
    agree(x, classes(4, n_classes=100, device=device), reduction=reduction, label_smoothing=0.1)


@pytest.mark.parametrize("n_classes", [5, 70_000])
@pytest.mark.parametrize("place", ["first", "last"])
def test_first_and_last_class(place, n_classes, device):
    target = torch.full((3,), 0 if place == "first" else n_classes - 1, device=device)
    agree(draw(3, n_classes, device=device), target, label_smoothing=0.1)


def planned_ends(x: torch.Tensor) -> tuple[bool, bool]:
    """Whether sm_90's kernels expect rows to begin or end within 16 bytes, and those of the gradient in the same place
    of them."""
    target = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    with plan_only(TARGETS["sm_90"]) as launches:
        cross_entropy(x.detach().requires_grad_(), target, reduction="none").sum().backward()
    forward, backward = (launch.constexprs for launch in launches)
    assert forward["ODD"] == backward["ODD"] and forward["UNIT"] == backward["UNIT"] == 16 // x.element_size()
    return forward["ODD"], backward["ALIKE"]


def within(n_rows: int, n_classes: int, stride: int, dtype, device, shift: int = 0) -> torch.Tensor:
    """Random rows at that stride, `shift` elements from where 16 bytes begin, with NaN between and around them."""
    memory = torch.full((n_rows * stride + 4096,), float("nan"), dtype=dtype, device=device)
    rows = memory[16 + shift :].as_strided((n_rows, n_classes), (stride, 1))
    rows.copy_(draw(n_rows, n_classes, dtype=dtype, device=device))
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize(
    ("n_classes", "stride", "options"),
    [
        (4097, 4097, {}),
        (4095, 4097, {"label_smoothing": 0.1}),
        (8195, 8195, {"label_smoothing": 0.3, "weight": True}),
        (12_287, 12_297, {}),
        (4093, 4096, {"weight": True}),
        (4096, 4097, {}),
        (16_387, 16_387, {}),
    ],
)
def test_rows_that_begin_within_16_bytes(n_classes, stride, options, dtype, device):
    """With tiles for a GPU: each place within 16 bytes, one tile to four, and nothing read beside the row."""
    x = within(9, n_classes, stride, dtype, device).detach().requires_grad_()
    exact = x.detach().double().requires_grad_()
    target = classes(9, n_classes=n_classes, device=device)
    target[0], target[1] = 0, n_classes - 1
    options, doubles = dict(options), dict(options)
    if options.pop("weight", False):
        options["weight"] = draw(n_classes, device=device).abs()
        doubles["weight"] = options["weight"].double()
    assert planned_ends(x) == (True, (stride - n_classes) % (16 // x.element_size()) == 0)
    with plan_for(TARGETS["sm_90"]), guarded_allocations():
        loss = cross_entropy(x, target, reduction="none", **options)
        loss.backward(draw(9, dtype=dtype, device=device, seed=3))
    expected = F.cross_entropy(exact, target, reduction="none", **doubles)
    expected.backward(draw(9, dtype=dtype, device=device, seed=3).double())
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-5}
    torch.testing.assert_close(loss.double(), expected, **tolerance)
    torch.testing.assert_close(x.grad.double(), exact.grad, **tolerance)


def test_which_rows_have_ends_of_their_own(device):
    assert planned_ends(within(2, 4104, 4104, torch.bfloat16, device)) == (False, True)  # 16 bytes begin and end them
    assert planned_ends(within(2, 4104, 4105, torch.bfloat16, device)) == (True, False)
    assert planned_ends(within(2, 4104, 4112, torch.bfloat16, device)) == (False, True)
    assert planned_ends(within(2, 4104, 4108, torch.float32, device)) == (False, True)
    assert planned_ends(within(2, 50_257, 50_257, torch.bfloat16, device)) == (True, True)
    assert planned_ends(within(2, 50_257, 50_304, torch.bfloat16, device)) == (True, False)


@pytest.mark.parametrize("shift", [1, 5])
@pytest.mark.parametrize("n_classes", [4096, 4099])
def test_logits_that_begin_within_16_bytes(n_classes, shift, device):
    """As a view into other memory may: no place is then where 16 bytes begin, and none is counted on."""
    x = within(5, n_classes, n_classes, torch.float32, device, shift)
    with plan_for(TARGETS["sm_90"]):
        agree(x, classes(5, n_classes=n_classes, device=device), label_smoothing=0.1)


def test_more_rows_than_a_program_owns(device):
    agree(draw(20_000, 7, device=device), classes(20_000, n_classes=7, device=device))


@pytest.mark.parametrize("n_rows", [0, 1, 300, 70_000])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_launches(reduction, n_rows, device):
    """One kernel makes losses or parts of their sum, one more adds the parts."""
    x, target = draw(n_rows, 3, device=device), classes(n_rows, n_classes=3, device=device)
    with plan_for(TARGETS["sm_90"]) if n_rows == 300 else contextlib.nullcontext(), count_launches() as launched:
        loss = cross_entropy(x, target, reduction=reduction)
    expected = ["_cross_entropy_forward"] * (n_rows > 0) + ["_cross_entropy_reduce"] * (reduction != "none")
    assert sorted(launched.elements()) == expected
    exact = F.cross_entropy(x.double(), target, reduction=reduction)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("n_parts", [1, 8191, 8192, 8193, 20_000])
def test_parts_are_added_in_blocks(n_parts, device):
    """More of them than the one program takes at once, with what follows them in memory left out."""
    memory = torch.full((2 * n_parts + 8192,), float("nan"), device=device)
    parts = memory[: 2 * n_parts].view(2, n_parts).copy_(draw(2, n_parts, device=device).abs())
    divisor, loss = torch.empty((), device=device), torch.empty((), dtype=torch.bfloat16, device=device)
    options = {"reduction": "mean", "label_smoothing": 0.0, "ignore_index": -100}
    tensors = {"logits": draw(2, 9, device=device), "parts": parts, "divisor": divisor, "loss": loss}

    def last(specs, options, device):
        absent = dict.fromkeys(("target", "weight", "weight_sum", "losses", "sums", "dlogits", "changed"))
        return module.plan_forward(specs | absent, options, device)[1:]

    run(last, tensors, **options)
    exact = parts.double().sum(1)
    torch.testing.assert_close(divisor.double(), exact[1], rtol=1e-6, atol=0.0)
    assert loss == (exact[0] / exact[1]).to(torch.bfloat16)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("ignore_index", [-100, 0, 3, 19, 10**12])
def test_every_combination(reduction, smoothing, weighted, ignore_index, device):
    """Ignored targets by every rule, an ignored class among them."""
    target = classes(23, n_classes=20, device=device)
    target[::4] = ignore_index
    options = {"reduction": reduction, "label_smoothing": smoothing, "ignore_index": ignore_index}
    if weighted:
        options["weight"] = draw(20, seed=3, device=device).abs() + 0.1
    agree(draw(23, 20, device=device), target, **options)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_everything_ignored(reduction, smoothing, device):
    """mean over nothing is NaN, as PyTorch has it."""
    target = torch.full((6,), -100, device=device)
    agree(draw(6, 9, device=device), target, reduction=reduction, label_smoothing=smoothing)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2, 1.0])
def test_weights_of_zero(reduction, smoothing, device):
    """Classes that weigh nothing; once for some targets, once for all, where mean divides by zero."""
    weight = torch.tensor([0.0, 1.0, 0.0, 2.0, 0.5], device=device)
    target = classes(8, n_classes=5, device=device)
    agree(draw(8, 5, device=device), target, weight=weight, reduction=reduction, label_smoothing=smoothing)
    x, target = draw(3, 5, device=device), torch.tensor([0, 2, 0], device=device)
    agree(x, target, weight=weight, reduction=reduction, label_smoothing=smoothing)
    target[1] = -100
    agree(x, target, weight=weight, reduction=reduction, label_smoothing=smoothing)
    ours, theirs = (
        function(x, target, weight, reduction=reduction, label_smoothing=smoothing)
        for function in (kernels.reference.cross_entropy, F.cross_entropy)
    )
    torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("n_classes", [9, 70_000])
def test_negative_weights(n_classes, reduction, device):
    """PyTorch takes them. The later tiles of a row are the higher, so that the sums so far must be shifted."""
    x = draw(3, n_classes, device=device) + torch.linspace(0.0, 9.0, n_classes, device=device)
    target, weight = classes(3, n_classes=n_classes, device=device), draw(n_classes, seed=3, device=device) - 2.0
    options = {"weight": weight, "reduction": reduction, "label_smoothing": 0.2}
    agree(x, target, rtol=1e-4, atol=1e-5, **options)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(9,), (4, 9), (4, 9, 3), (2, 9, 3, 2), (2, 9, 2, 1, 3)], ids=lambda s: f"{len(s)}-D")
def test_any_rank(shape, reduction, device):
    target_shape = (shape[0], *shape[2:]) if len(shape) > 1 else ()
    agree(draw(*shape, device=device), classes(*target_shape, n_classes=9, device=device), reduction=reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(0, 9), (0, 9, 3), (2, 9, 0)], ids=str)
def test_nothing_at_all(shape, reduction, device):
    target = classes(shape[0], *shape[2:], n_classes=9, device=device)
    agree(draw(*shape, device=device), target, reduction=reduction, label_smoothing=0.1)


@pytest.mark.parametrize("parameters", DTYPES, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_weight_of_another_dtype(dtype, parameters, device):
    weight = (draw(20, seed=3, device=device).abs() + 0.1).to(parameters)
    tolerance = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    x, target = draw(11, 20, dtype=dtype, device=device), classes(11, n_classes=20, device=device)
    agree(x, target, weight=weight, label_smoothing=0.1, **tolerance)


def test_targets_of_uint8(device):
    x, target = draw(11, 20, device=device), classes(11, n_classes=20, device=device)
    assert torch.equal(cross_entropy(x, target.to(torch.uint8)), cross_entropy(x, target))


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_large_logits(dtype, smoothing, device):
    x = draw(7, 40, dtype=dtype, device=device) * (1e4 if dtype != torch.float16 else 1e3)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    agree(x, classes(7, n_classes=40, device=device), label_smoothing=smoothing, reduction="none", **tolerance)


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_logits_shifted_far_from_zero(shift, device):
    """A constant added to every logit changes nothing but rounding."""
    x, target = (draw(7, 40, device=device) * 64).round() / 64, classes(7, n_classes=40, device=device)
    torch.testing.assert_close(cross_entropy(x + shift, target), cross_entropy(x, target), rtol=1e-5, atol=2e-3)


@pytest.mark.parametrize("n_classes", [40, 70_000])
def test_a_sure_and_right_prediction(n_classes, device):
    """The loss is next to nothing, and not lost in the logits' size."""
    x, target = draw(3, n_classes, device=device), classes(3, n_classes=n_classes, device=device)
    x[torch.arange(3), target] = 25.0
    agree(x, target, reduction="none", atol=2e-6)


@pytest.mark.parametrize("n_classes", [12, 70_000])
def test_forbidden_classes(n_classes, device):
    """-inf logits, as masked vocabularies have them, whole tiles of them too; a forbidden target costs inf."""
    x = draw(4, n_classes, device=device)
    x[:, : n_classes // 2] = -math.inf
    x[2, : n_classes - 1] = -math.inf
    target = torch.tensor([n_classes - 1, n_classes - 2, n_classes - 1, 0], device=device)
    agree(x, target, reduction="none")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_stay_in_their_row(value, device):
    x, target = draw(5, 9, device=device), classes(5, n_classes=9, device=device)
    x[2, 4] = value
    agree(x, target, reduction="none")
    x[2] = -math.inf
    agree(x, target, reduction="none")


# ---------------------------------------------------------------- targets out of bounds


@pytest.mark.parametrize("wrong", [-1, 9, 10**9, -(2**40), 2**62])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_target_out_of_bounds_spoils_its_row_only(wrong, smoothing, device, monkeypatch):
    monkeypatch.setattr(module, "CHECK_VALUES", False)
    x, target = draw(5, 9, device=device).requires_grad_(), classes(5, n_classes=9, device=device)
    weight = draw(9, seed=3, device=device).abs()
    target[3] = wrong
    with guarded_allocations():
        loss = cross_entropy(x, target, weight, reduction="none", label_smoothing=smoothing)
        loss.backward(torch.ones_like(loss))
    right = [0, 1, 2, 4]
    assert loss[3].isnan() and x.grad[3].isnan().all() and x.grad[right].isfinite().all()
    expected = F.cross_entropy(x[right], target[right], weight, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(loss[right], expected)


@pytest.mark.parametrize("wrong", [-1, 9])
def test_a_target_out_of_bounds_is_told(wrong, device, monkeypatch):
    monkeypatch.setattr(module, "CHECK_VALUES", True)
    target = torch.tensor([0, wrong, 3], device=device)
    with pytest.raises(IndexError, match=f"{wrong} is out of bounds for 9"):
        cross_entropy(draw(3, 9, device=device), target)
    cross_entropy(draw(3, 9, device=device), target, ignore_index=wrong)


# ---------------------------------------------------------------- the rest


def test_autocast_gives_fp32(device):
    x, target = draw(7, 20, dtype=torch.bfloat16, device=device), classes(7, n_classes=20, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss, expected = (f(x, target) for f in (cross_entropy, F.cross_entropy))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected.float(), rtol=1e-2, atol=1e-2)


def test_gradient_through_what_follows(device):
    """The loss scaled and added up, as accumulation does it: the incoming gradient is not one."""
    x, target = draw(6, 9, device=device), classes(6, n_classes=9, device=device)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    for leaf, f in zip(leaves, (cross_entropy, F.cross_entropy), strict=True):
        (f(leaf * 2.0, target) * 0.125 + f(leaf, target, reduction="sum").square()).backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


@pytest.mark.filterwarnings("ignore:size_average and reduce")
@pytest.mark.parametrize("size_average", [None, False, True])
@pytest.mark.parametrize("reduce", [None, False, True])
def test_pytorchs_old_arguments_in_their_places(reduce, size_average, device):
    """A call with positional arguments means what it means to PyTorch."""
    x, target, weight = draw(6, 9, device=device), classes(6, n_classes=9, device=device), draw(9, seed=4).abs()
    arguments = (x, target, weight.to(device), size_average, 3, reduce, "sum", 0.1)
    for count in range(2, len(arguments) + 1):
        for function in (cross_entropy, kernels.reference.cross_entropy):
            torch.testing.assert_close(function(*arguments[:count]), F.cross_entropy(*arguments[:count]))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_target_without_a_batch_may_have_a_dimension(reduction, device):
    x, target = draw(9, device=device), torch.tensor([3], device=device)
    ours, theirs = (f(x, target, reduction=reduction) for f in (cross_entropy, F.cross_entropy))
    torch.testing.assert_close(ours, theirs)
    weight = torch.eye(9, device=device)
    torch.testing.assert_close(kernels.linear_cross_entropy(x, weight, target, reduction=reduction), theirs)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"input": torch.ones(3, 5, dtype=torch.float64)}, NotImplementedError, "float64"),
        ({"target": torch.ones(3, 5)}, NotImplementedError, "probability"),
        ({"target": torch.ones(3, dtype=torch.int32)}, RuntimeError, "int64|Long"),
        ({"target": torch.ones(4, dtype=torch.int64)}, ValueError, "target"),
        ({"target": torch.ones(3, 5, dtype=torch.int64)}, RuntimeError, "target"),
        ({"target": torch.tensor(1)}, (ValueError, RuntimeError), "target"),
        ({"input": torch.ones(5), "target": torch.ones(3, dtype=torch.int64)}, (ValueError, RuntimeError), "target"),
        ({"weight": torch.ones(4)}, RuntimeError, "weight"),
        ({"weight": torch.ones(5, dtype=torch.float64)}, NotImplementedError, "weight"),
        ({"reduction": "average"}, ValueError, "average"),
        ({"label_smoothing": 1.5}, RuntimeError, "label_smoothing"),
        ({"label_smoothing": -0.1}, RuntimeError, "label_smoothing"),
        ({"label_smoothing": math.nan}, RuntimeError, "label_smoothing"),
        ({"label_smoothing": None}, TypeError, "label_smoothing must be a number, not NoneType"),
        ({"ignore_index": None}, TypeError, "ignore_index must be an integer, not NoneType"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index must be an integer, not float"),
        ({"ignore_index": True}, TypeError, "ignore_index must be an integer, not bool"),
    ],
)
def test_bad_arguments(arguments, error, says):
    given = {"input": torch.ones(3, 5), "target": torch.ones(3, dtype=torch.int64)} | arguments
    with pytest.raises(error, match=says):
        cross_entropy(**given)


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"label_smoothing": 0.1}], ids=str)
def test_class_weights_that_require_a_gradient_are_refused(options, device):
    """As PyTorch does: they have none, and would learn nothing without a word. Without gradients they are weights."""
    arguments = (draw(3, 5, device=device), classes(3, n_classes=5, device=device))
    weight = draw(5, device=device, seed=2).abs()
    expected = cross_entropy(*arguments, weight=weight, **options)
    weight.requires_grad_()
    with pytest.raises(RuntimeError, match="cross_entropy: not differentiable with respect to weight"):
        cross_entropy(*arguments, weight=weight, **options)
    with torch.no_grad():
        torch.testing.assert_close(cross_entropy(*arguments, weight=weight, **options), expected, rtol=0, atol=0)
