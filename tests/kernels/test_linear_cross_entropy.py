"""Linear cross-entropy's own: chunks, what they cost, what is frozen, autocast, sums in fp32, memory, errors."""

import importlib
import itertools
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from parity import DTYPES, LAYOUTS, guarded_allocations, hold_alike, name_of
from torch._subclasses import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import kernels
from kernels.op import count_launches

linear_cross_entropy = kernels.linear_cross_entropy
module = importlib.import_module("kernels.linear_cross_entropy")  # the package's attribute of that name is the function
REDUCTIONS = ("mean", "sum", "none")
CHUNK = 128  # rows, with what `chunked` sets


@pytest.fixture
def chunked(monkeypatch):
    """Every chunk has the fewest rows that there can be."""
    for name, value in {"SMALL": 0, "FEWEST": CHUNK, "MOST": CHUNK}.items():
        monkeypatch.setattr(module, name, value)


def draw(*shape, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)


def problem(n_rows, hidden=12, n_classes=20, *, dtype=torch.float32, device="cpu"):
    """input, linear_weight, target, linear_bias; the weights small enough for logits of order 1."""
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(0, n_classes, (n_rows,), generator=generator).to(device)
    w = (draw(n_classes, hidden, device=device, seed=2) / math.sqrt(hidden)).to(dtype)
    return draw(n_rows, hidden, dtype=dtype, device=device), w, target, draw(n_classes, device=device, seed=3).to(dtype)


def written_out(x, w, target, *, linear_bias=None, **options):
    """The two functions that this one stands for, on any number of leading dimensions."""
    logits = F.linear(x, w, linear_bias)
    loss = F.cross_entropy(logits.reshape(target.numel(), w.shape[0]), target.reshape(-1), **options)
    return loss.view(target.shape) if options.get("reduction") == "none" else loss


def agree(x, w, target, bias=None, *, rtol=1e-5, atol=1e-5, **options):
    """Loss and gradients are those of the two functions in float64, NaN where they have NaN."""
    wide = {name: value.double() if torch.is_tensor(value) else value for name, value in options.items()}
    tensors = [tensor for tensor in (x, w, bias) if tensor is not None]
    ours = [tensor.detach().requires_grad_() for tensor in tensors]
    theirs = [tensor.detach().double().requires_grad_() for tensor in tensors]
    expected = written_out(*theirs[:2], target, linear_bias=theirs[2] if bias is not None else None, **wide)
    grad = draw(*expected.shape, seed=7).to(x)
    with guarded_allocations():
        loss = linear_cross_entropy(*ours[:2], target, linear_bias=ours[2] if bias is not None else None, **options)
        gradients = torch.autograd.grad(loss, ours, grad)
    exact = torch.autograd.grad(expected, theirs, grad.double())
    assert loss.dtype == x.dtype and loss.shape == expected.shape
    for one, other in zip((loss, *gradients), (expected, *exact), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=rtol, atol=atol, equal_nan=True)


# ---------------------------------------------------------------- the size of a chunk


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((16384, 768, 50304, 2), 2048),  # an eighth of the logits
        ((16384, 384, 65, 4), 16384),  # small: whole
        ((4096, 4096, 128256, 2), 2048),  # a quarter of the sum of dW
        ((2048, 768, 262144, 2), 512),  # no fewer
        ((1 << 20, 768, 50304, 2), 4096),  # no more
        ((1, 768, 262144, 4), 1),
        ((0, 768, 50304, 2), 0),
    ],
)
def test_rows_of_a_chunk(shape, rows):
    assert module.chunk_rows(*shape) == rows


def test_a_chunk_keeps_to_its_bounds():
    """Multiples of 128 or everything; everything that is small; none much smaller than the others."""
    rows_of = module.chunk_rows
    for n, hidden, v, size in itertools.product((1, 127, 129, 5000, 16384), (64, 768), (1, 65, 50257, 262144), (2, 4)):
        rows = rows_of(n, hidden, v, size)
        assert rows == n or (rows % 128 == 0 and 0 < rows < n)
        if n * v * size <= module.SMALL:
            assert rows == n
        if rows * v * size > module.SMALL:
            assert rows <= max(module.FEWEST, min(module.MOST, max(n // 8, hidden // size)))
        if rows < n:
            n_chunks = -(-n // rows)
            assert n_chunks * rows - n < 128 * n_chunks


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("n_rows", [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 7])
def test_at_the_ends_of_chunks(n_rows, reduction, chunked, device):
    x, w, target, bias = problem(n_rows, device=device)
    with count_launches() as launched:
        linear_cross_entropy(x, w, target)
    assert launched.total() == -(-n_rows // CHUNK)
    agree(x, w, target, bias, reduction=reduction)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_chunks_change_rounding_only(dtype, device, monkeypatch):
    x, w, target, bias = (t.requires_grad_(t.is_floating_point()) for t in problem(400, dtype=dtype, device=device))
    results = []
    for most in (400, CHUNK):
        monkeypatch.setattr(module, "chunk_rows", lambda *_, most=most: most)
        loss = linear_cross_entropy(x, w, target, linear_bias=bias, label_smoothing=0.1)
        results.append((loss, *torch.autograd.grad(loss, (x, w, bias))))
    eps = torch.finfo(dtype).eps
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(whole, parts, rtol=4 * eps, atol=4 * eps * whole.abs().max().item())


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("ignore_index", [-100, 0, 19, 10**12])
def test_every_combination(reduction, smoothing, weighted, ignore_index, chunked, device):
    """Ignored targets by every rule, in every chunk, and one chunk that is ignored whole."""
    x, w, target, bias = problem(2 * CHUNK + 40, device=device)
    target[::4] = ignore_index
    target[CHUNK : 2 * CHUNK] = ignore_index
    options = {"reduction": reduction, "label_smoothing": smoothing, "ignore_index": ignore_index}
    if weighted:
        options["weight"] = draw(20, seed=5, device=device).abs() + 0.1
    agree(x, w, target, bias, **options)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_everything_ignored(reduction, smoothing, chunked, device):
    """mean over nothing is NaN, as PyTorch has it, and the gradients are zero."""
    x, w, _, bias = problem(CHUNK + 3, device=device)
    target = torch.full((CHUNK + 3,), -100, device=device)
    agree(x, w, target, bias, reduction=reduction, label_smoothing=smoothing)


@pytest.mark.parametrize("smoothing", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_classes_that_weigh_nothing(reduction, smoothing, device):
    """Once for some targets, once for all, where mean divides by zero, and once for every class."""
    x, w, target, bias = problem(9, n_classes=5, device=device)
    weight, options = torch.tensor([0.0, 1.0, 0.0, 2.0, 0.5], device=device), {"label_smoothing": smoothing}
    agree(x, w, target, bias, weight=weight, reduction=reduction, **options)
    agree(x, w, target % 2 * 2, bias, weight=weight, reduction=reduction, **options)
    agree(x, w, torch.zeros_like(target), bias, weight=torch.zeros(5, device=device), reduction=reduction, **options)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("lead", [(), (7,), (3, 5), (2, 3, 4)], ids=lambda lead: f"{len(lead)}-D")
def test_any_leading_dimensions(lead, reduction, device):
    _, w, target, bias = problem(math.prod(lead), device=device)
    agree(draw(*lead, 12, device=device), w, target.view(lead), bias, reduction=reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("lead", [(0,), (2, 0)], ids=str)
def test_nothing_at_all(lead, reduction, device):
    _, w, _, bias = problem(0, device=device)
    target = torch.zeros(lead, dtype=torch.int64, device=device)
    agree(draw(*lead, 12, device=device), w, target, bias, reduction=reduction, label_smoothing=0.1)


@pytest.mark.parametrize(("reduction", "smoothing"), [("mean", 0.0), ("mean", 0.1), ("sum", 0.0), ("none", 0.0)])
@pytest.mark.parametrize("weighted", [True, False])
def test_no_classes(weighted, reduction, smoothing, device):
    """Every target is ignored: there is nothing else that it can be."""
    x, w, target, bias = problem(3, device=device)
    options = {"weight": torch.empty(0, device=device)} if weighted else {}
    target = torch.full_like(target, -100)
    agree(x, w[:0], target, bias[:0], reduction=reduction, label_smoothing=smoothing, **options)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("with_bias", [True, False])
def test_no_features(with_bias, reduction, device):
    _, w, target, bias = problem(5, hidden=1, device=device)
    agree(draw(5, 0, device=device), w[:, :0], target, bias if with_bias else None, reduction=reduction)


@pytest.mark.parametrize("n_classes", [1, 2, 15, 16, 17, 4097, 65_537, 262_144])
def test_every_number_of_classes(n_classes, device):
    agree(*problem(3, hidden=4, n_classes=n_classes, device=device))


# ---------------------------------------------------------------- layouts and incoming gradients


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_layouts_in_chunks(layout, reduction, chunked, device):
    """Of the inputs, three-dimensional ones too, and of the incoming gradient; nothing given is written to."""
    _, w, target, bias = (
        layout(tensor) if index != 2 else tensor for index, tensor in enumerate(problem(150, device=device))
    )
    x, target = layout(draw(10, 15, 12, device=device)), layout(target.view(10, 15))
    before = [tensor.clone() for tensor in (x, w, target, bias)]
    leaves = [tensor.detach().requires_grad_() for tensor in (x, w, bias)]
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, w, bias)]
    with guarded_allocations():
        loss = linear_cross_entropy(*leaves[:2], target, linear_bias=leaves[2], reduction=reduction)
        grad = layout(draw(*loss.shape, device=device, seed=9))
        kept = grad.clone()
        ours = torch.autograd.grad(loss, leaves, grad)
    expected = written_out(*wide[:2], target, linear_bias=wide[2], reduction=reduction)
    exact = torch.autograd.grad(expected, wide, kept.double())
    for one, other in zip((loss, *ours), (expected, *exact), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
    for now, then in zip((x, w, target, bias, grad), (*before, kept), strict=True):
        assert torch.equal(now, then), "an input was modified"


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradient_through_what_follows(reduction, chunked, device):
    """The loss used twice, scaled and squared; what forward made is not spoiled by the first use."""
    x, w, target, bias = problem(CHUNK + 9, device=device)
    results = []
    for function, dtype in ((linear_cross_entropy, torch.float32), (written_out, torch.float64)):
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (x, w, bias)]
        loss = function(leaves[0] * 2.0, leaves[1], target, linear_bias=leaves[2], reduction=reduction)
        (loss * 0.125 + loss.square()).sum().backward()
        results.append([leaf.grad.double() for leaf in leaves])
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5 * exact.abs().max().item())


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_backward_twice_and_bitwise_repeatable(reduction, chunked, device):
    x, w, target, bias = problem(CHUNK + 9, dtype=torch.bfloat16, device=device)
    leaves = [tensor.requires_grad_() for tensor in (x, w, bias)]
    losses = [linear_cross_entropy(x, w, target, linear_bias=bias, reduction=reduction) for _ in range(2)]
    grad = draw(*losses[0].shape, dtype=torch.bfloat16, device=device)
    first = torch.autograd.grad(losses[0], leaves, grad, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    for gradient in first:
        gradient.zero_()  # as an optimizer may
    for again in (torch.autograd.grad(losses[0], leaves, grad), torch.autograd.grad(losses[1], leaves, grad)):
        assert all(torch.equal(one, other) for one, other in zip(kept, again, strict=True))
    assert torch.equal(*losses)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("frozen", ["input", "linear_weight", "linear_bias", "nothing"])
def test_double_backward_raises(frozen, reduction, device):
    """Also where nothing but a penalty on the gradient asks for it, which must not be left out in silence."""
    x, w, target, bias = problem(7, device=device)
    leaves = {"input": x, "linear_weight": w, "linear_bias": bias}
    wanted = [tensor.requires_grad_() for name, tensor in leaves.items() if name != frozen]
    loss = linear_cross_entropy(target=target, **leaves, reduction=reduction)
    gradients = torch.autograd.grad(loss, wanted, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        (loss + sum(gradient.square().sum() for gradient in gradients)).backward()


# ---------------------------------------------------------------- work that is not done


class _Work(TorchDispatchMode):
    """Counts products, and notes the bytes of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.products, self.largest = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.products += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        for tensor in torch.utils._pytree.tree_leaves(result):
            if torch.is_tensor(tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


def _call(reduction, needs, tensors, dtype=torch.float32):
    """(work, launches) forward and backward, of the functions behind the ops: a mode sees nothing inside an op."""
    x, w, target, bias = tensors
    none = reduction == "none"
    with _Work() as forward, count_launches() as launched_forward:
        made = module._forward(
            x, w, target, bias, None, -100, reduction, 0.0, dtype, dtype, [False] * 3 if none else needs
        )
    loss, lse, count, *gradients, _ = made
    with _Work() as backward, count_launches() as launched_backward:
        if none:
            module._backward(loss, x, w, target, bias, None, lse, -100, 0.0, dtype, needs)
        else:
            module._scale(loss, count, *gradients, dtype, dtype, dtype, needs)
    return (forward, launched_forward), (backward, launched_backward)


NEEDS = list(itertools.product([True, False], repeat=3))


@pytest.mark.parametrize(
    ("reduction", "needs"),
    [(reduction, needs) for reduction in REDUCTIONS for needs in NEEDS if reduction != "none" or any(needs)],
    ids=str,
)
def test_products_and_launches(reduction, needs, chunked, device):
    """Three products a chunk where everything learns, four for "none"; a frozen one takes its product away."""
    n_chunks, each = 3, 1 + needs[0] + needs[1]
    (forward, first), (backward, second) = _call(reduction, list(needs), problem(2 * CHUNK + 9, device=device))
    if reduction == "none":
        assert (forward.products, backward.products) == (n_chunks, n_chunks * each)
        assert first == {"_linear_cross_entropy_forward": n_chunks} and second == {"_cross_entropy_backward": n_chunks}
    else:
        assert (forward.products, backward.products) == (n_chunks * each, 0)
        assert first == {"_linear_cross_entropy_forward": n_chunks}
        assert second.total() == sum(needs)


@pytest.mark.parametrize("needs", NEEDS, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_what_is_frozen_is_told_to_the_op(reduction, needs, device):
    """PyTorch's counter sees the products of what requires a gradient, no more; gradients come for those alone."""
    x, w, target, bias = problem(7, device=device)
    leaves = [tensor.requires_grad_(need) for tensor, need in zip((x, w, bias), needs, strict=True)]
    one = 2 * x.numel() * w.shape[0]
    with FlopCounterMode(display=False) as counter:
        loss = linear_cross_entropy(x, w, target, linear_bias=bias, reduction=reduction)
        forward = counter.get_total_flops()
        if any(needs):
            loss.sum().backward()
    made = needs[0] + needs[1]
    assert forward == one * (1 if reduction == "none" else 1 + made)
    assert counter.get_total_flops() == one * (1 + made + (reduction == "none" and any(needs)))
    assert [leaf.grad is not None for leaf in leaves] == list(needs)
    everything = [tensor.detach().requires_grad_() for tensor in (x, w, bias)]
    whole = linear_cross_entropy(everything[0], everything[1], target, linear_bias=everything[2], reduction=reduction)
    for leaf, gradient in zip(leaves, torch.autograd.grad(whole.sum(), everything), strict=True):
        if leaf.grad is not None:
            hold_alike(leaf.grad, gradient, f"with {needs} wanted")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=lambda c: c.__name__)
def test_no_gradient_work_where_none_is_wanted(context, reduction, device):
    x, w, target, bias = (t.requires_grad_(t.is_floating_point()) for t in problem(7, device=device))
    with context(), FlopCounterMode(display=False) as counter, count_launches() as launched:
        loss = linear_cross_entropy(x, w, target, linear_bias=bias, reduction=reduction)
    assert counter.get_total_flops() == 2 * x.numel() * w.shape[0] and launched.total() == 1
    assert not loss.requires_grad
    torch.testing.assert_close(loss, written_out(x, w, target, linear_bias=bias, reduction=reduction).detach())


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_the_logits_never_exist(dtype, reduction, chunked, device):
    """No operation, forward or backward, returns or fills a tensor nearly as large as the logits."""
    n_rows, hidden, n_classes = 8 * CHUNK, 4, 301
    tensors = problem(n_rows, hidden, n_classes, dtype=dtype, device=device)
    passes = _call(reduction, [True] * 3, tensors, dtype)
    largest = max(work.largest for work, _ in passes)
    chunk = CHUNK * 304 * 4  # padded; low precisions are multiplied as fp32 where there is no GPU
    assert CHUNK * n_classes * dtype.itemsize <= largest <= chunk < n_rows * n_classes * dtype.itemsize / 3


def _peak(function, dtype=torch.bfloat16, n_rows=16384, hidden=768, n_classes=50304):
    with FakeTensorMode():
        x = torch.empty(n_rows, hidden, dtype=dtype, requires_grad=True)
        w = torch.empty(n_classes, hidden, dtype=dtype, requires_grad=True)
        target = torch.zeros(n_rows, dtype=torch.int64)
        tracker = MemTracker()
        tracker.track_external(x, w, target)
        with tracker:
            function(x, w, target).backward()
    return sum(peak["Total"] for peak in tracker.get_tracker_snapshot("peak").values())


def test_peak_memory_at_gpt2s_size():
    """What a tracker sees is what there is, but for some numbers a row; and less than a tenth of keeping the logits."""
    n, h, v = 16384, 768, 50304
    ours = _peak(linear_cross_entropy)
    inputs, workspace = 2 * (n * h + v * h), 2 * v * module.chunk_rows(n, h, v, 2)
    assert 0 <= ours - (inputs + workspace + 2 * n * h + 4 * v * h) < 32 * n
    assert ours < _peak(written_out) / 10


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_outlives_its_use(reduction, device, monkeypatch):
    """The workspace goes with the call; what was saved goes with backward, though the loss is kept."""
    x, w, target, bias = (t.requires_grad_(t.is_floating_point()) for t in problem(7, device=device))
    linear_cross_entropy(x, w, target).backward()  # whatever a first call imports and keeps
    workspaces, gradients = [], []
    make, empty = module._workspace, module._empty_gradients
    monkeypatch.setattr(module, "_workspace", lambda *a: workspaces.append(made := make(*a)) or made)
    monkeypatch.setattr(module, "_empty_gradients", lambda *a: gradients.append(made := empty(*a)) or made)
    loss = linear_cross_entropy(x, w, target, linear_bias=bias, reduction=reduction)
    workspaces[:] = [weakref.ref(tensor) for tensor in workspaces]
    gradients[:] = [weakref.ref(tensor) for made in gradients for tensor in made]
    assert len(workspaces) == 1 and len(gradients) == 3
    assert workspaces[0]() is None, "the workspace is still there"
    monkeypatch.undo()
    torch.autograd.grad(loss.sum(), (x, w, bias))
    assert not [1 for tensor in gradients if tensor() is not None], "what was saved is still there"


# ---------------------------------------------------------------- precision


def test_the_weights_gradient_is_summed_in_fp32(chunked, device):
    """Over 64 chunks in bf16 it is as exact as one product is; summed in bf16 from chunk to chunk it is far off."""
    n_rows, hidden, n_classes = 64 * CHUNK, 8, 6
    x, w, target, bias = problem(n_rows, hidden, n_classes, dtype=torch.bfloat16, device=device)
    x = (x.float() * 0.25 + 1.0).to(torch.bfloat16)  # terms of one sign: the sum outgrows each of them
    leaves = [tensor.requires_grad_() for tensor in (w, bias)]
    loss = linear_cross_entropy(x, w, target, linear_bias=bias, reduction="sum")
    ours = torch.autograd.grad(loss, leaves)
    wide = [tensor.detach().double().requires_grad_() for tensor in (w, bias)]
    expected = written_out(x.double(), wide[0], target, linear_bias=wide[1], reduction="sum")
    exact = torch.autograd.grad(expected, wide)

    narrow = torch.zeros_like(w)
    with torch.no_grad():
        for rows in range(0, n_rows, CHUNK):
            part, labels = x[rows : rows + CHUNK], target[rows : rows + CHUNK]
            dlogits = F.linear(part, w, bias).float().softmax(-1) - F.one_hot(labels, n_classes)
            narrow += dlogits.to(torch.bfloat16).t() @ part

    def error(result):
        return ((result.double() - exact[0]).norm() / exact[0].norm()).item()

    assert error(ours[0]) < 4e-3, f"{error(ours[0]):.2e}"
    assert error(narrow) > 3 * error(ours[0]), f"bf16 sums {error(narrow):.2e}, ours {error(ours[0]):.2e}"
    torch.testing.assert_close(ours[1].double(), exact[1], rtol=1e-2, atol=2.0)


@pytest.mark.parametrize("loss_scale", [1.0, 4096.0])
def test_fp16_gradients_of_a_mean_do_not_vanish(loss_scale, chunked, device):
    """A sure and right prediction: p / n_rows is lost in fp16's smallest steps, and is never rounded to them here."""
    x, w, target, bias = problem(4 * CHUNK, 8, 50, dtype=torch.float16, device=device)
    x = (x.float() * 0.25 + 1.0).to(torch.float16)
    w, bias = w * 0.1, torch.zeros_like(bias)
    target.fill_(3)
    bias[3] = 9.0
    results = []
    for function, dtype in (
        (linear_cross_entropy, torch.float16), (written_out, torch.float16), (written_out, torch.float64),
    ):  # fmt: skip
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (w, bias)]
        loss = function(x.to(dtype), leaves[0], target, linear_bias=leaves[1])
        results.append([g.double() for g in torch.autograd.grad(loss, leaves, loss.new_tensor(loss_scale))])
    for ours, theirs, exact in zip(*results, strict=True):
        step = 2.0**-24 / 2 * math.sqrt(exact.numel())  # the gradient itself is fp16
        assert (ours - exact).norm() < 3e-3 * exact.norm() + step
        assert loss_scale > 1.0 or (theirs - exact).norm() > 10 * (ours - exact).norm()


def test_class_weights_of_any_size_in_fp16(device):
    """mean does not depend on their scale, and must not overflow or vanish with it."""
    x, w, target, bias = problem(50, dtype=torch.float16, device=device)
    weight = draw(20, seed=5, device=device).abs() + 0.1
    results = []
    for scale in (1.0, 2.0**-30, 2.0**30):
        leaves = [tensor.detach().requires_grad_() for tensor in (x, w, bias)]
        loss = linear_cross_entropy(*leaves[:2], target, linear_bias=leaves[2], weight=weight * scale)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    for scaled in results[1:]:
        for one, other in zip(results[0], scaled, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-3, atol=1e-6)


# ---------------------------------------------------------------- autocast


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)], ids=str)
def test_autocast(dtypes, low, reduction, chunked, device):
    """Products in autocast's dtype, loss in fp32, gradients in the leaves' dtypes, as PyTorch's two functions."""
    x, w, target, bias = problem(CHUNK + 9, device=device)
    leaves = [tensor.detach().requires_grad_() for tensor in (x.to(dtypes[0]), w.to(dtypes[1]), bias.to(dtypes[1]))]
    results = []
    for function in (linear_cross_entropy, written_out):
        with torch.autocast(device.type, dtype=low):
            loss = function(*leaves[:2], target, linear_bias=leaves[2], reduction=reduction)
        results.append((loss, *torch.autograd.grad(loss.sum(), leaves)))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2 * theirs.abs().max().item())
    assert results[0][0].dtype == torch.float32


def test_backward_inside_autocast_is_the_same(chunked, device):
    """Autocast must not reach the sums, which it would cast down."""
    x, w, target, bias = problem(CHUNK + 9, dtype=torch.bfloat16, device=device)
    results = []
    for enabled in (False, True):
        leaves = [tensor.detach().requires_grad_() for tensor in (x, w, bias)]
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled):
            loss = linear_cross_entropy(*leaves[:2], target, linear_bias=leaves[2], reduction="none")
            results.append(torch.autograd.grad(loss, leaves, torch.ones_like(loss)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


# ---------------------------------------------------------------- inside PyTorch


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_whole_it_is_eager(backend, dtype, reduction, chunked, device):
    torch.compiler.reset()

    def step(x, w, target, bias):
        return linear_cross_entropy(x, w, target, linear_bias=bias, reduction=reduction, label_smoothing=0.1).sum()

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend=backend)):
        x, w, target, bias = problem(CHUNK + 9, dtype=dtype, device=device)
        leaves = [tensor.requires_grad_() for tensor in (x, w, bias)]
        loss = function(x, w, target, bias)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for eager, ours in zip(*results, strict=True):
        if backend == "inductor":  # the sum after the op is its own
            torch.testing.assert_close(ours, eager)
        else:
            hold_alike(ours, eager, "compiled")
    torch.compiler.reset()


def test_one_graph_serves_every_length(device):
    torch.compiler.reset()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(linear_cross_entropy, fullgraph=True, dynamic=True, backend=count)
    for n_rows in (9, 12, 40):
        x, w, target, _ = problem(n_rows, device=device)
        torch.testing.assert_close(step(x, w, target), linear_cross_entropy(x, w, target))
    assert len(graphs) == 1, f"{len(graphs)} graphs for three lengths"
    torch.compiler.reset()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_opcheck(reduction, chunked, device):
    """The other reductions: the shared tests have "none"."""
    x, w, target, bias = problem(CHUNK + 9, device=device)
    leaves = [tensor.requires_grad_() for tensor in (x, w, bias)]
    weight = draw(20, seed=5, device=device).abs()
    arguments = (*leaves[:2], target, leaves[2], weight, 3, reduction, 0.1, x.dtype, x.dtype)
    torch.library.opcheck(module.forward, (*arguments, [True, True, True]))
    torch.library.opcheck(
        module.forward,
        (*(a.detach() if torch.is_tensor(a) else a for a in arguments), [False] * 3),
    )
    with torch.no_grad():
        loss, _, count, *gradients, _ = module.forward(*arguments, [True, True, True])
    torch.library.opcheck(module.scale, (loss, count, *gradients, *[torch.bfloat16] * 3, [True, False, True]))


def test_a_gradient_that_forward_did_not_make_is_told(device):
    x, w, target, _ = problem(6, device=device)
    leaves = x.requires_grad_(), w.requires_grad_()
    loss = module.forward(*leaves, target, None, None, -100, "mean", 0.0, x.dtype, x.dtype, [True, False, False])[0]
    with pytest.raises(RuntimeError, match="linear_weight required no gradient"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant, device):
    """Forward runs twice, the first time without gradients if reentrant."""
    x, w, target, bias = (t.requires_grad_(t.is_floating_point()) for t in problem(9, device=device))

    def loss(x):
        return linear_cross_entropy(x, w, target, linear_bias=bias)

    plain = torch.autograd.grad(loss(x), (x, w, bias))
    torch.utils.checkpoint.checkpoint(loss, x, use_reentrant=reentrant).backward()
    for leaf, gradient in zip((x, w, bias), plain, strict=True):
        assert torch.equal(leaf.grad, gradient)


# ---------------------------------------------------------------- targets and arguments


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("wrong", [-1, 20, 2**40, -(2**62)])
def test_a_target_out_of_bounds_spoils_its_row(wrong, reduction, chunked, device, monkeypatch):
    monkeypatch.setattr(module, "CHECK_VALUES", False)
    x, w, target, bias = problem(CHUNK + 9, device=device)
    weight = draw(20, seed=5, device=device).abs()
    target[CHUNK + 3] = wrong
    leaves = [tensor.requires_grad_() for tensor in (x, w, bias)]
    with guarded_allocations():
        loss = linear_cross_entropy(x, w, target, linear_bias=bias, weight=weight, reduction=reduction)
        dx, dw, db = torch.autograd.grad(loss.sum(), leaves)
    right = torch.arange(CHUNK + 9, device=device) != CHUNK + 3
    assert dx[~right].isnan().all() and dx[right].isfinite().all() and dw.isnan().all() and db.isnan().all()
    if reduction == "none":
        assert loss[~right].isnan().all()
        expected = written_out(x[right], w, target[right], linear_bias=bias, weight=weight, reduction="none")
        torch.testing.assert_close(loss[right], expected)
    else:
        assert loss.isnan()


@pytest.mark.parametrize("wrong", [-1, 20])
def test_a_target_out_of_bounds_is_told(wrong, device, monkeypatch):
    monkeypatch.setattr(module, "CHECK_VALUES", True)
    x, w, target, _ = problem(5, device=device)
    target[2] = wrong
    with pytest.raises(IndexError, match=f"linear_cross_entropy: target {wrong} is out of bounds for 20"):
        linear_cross_entropy(x, w, target)
    linear_cross_entropy(x, w, target, ignore_index=wrong)


def test_ignore_index_none_is_the_default(device):
    x, w, target, _ = problem(9, device=device)
    target[::2] = -100
    losses = [linear_cross_entropy(x, w, target, ignore_index=index) for index in (None, -100)]
    assert torch.equal(*losses) and torch.equal(losses[0], linear_cross_entropy(x, w, target))


def test_it_is_there_without_pytorchs_own(monkeypatch):
    """PyTorch 2.11 has no function of that name; the two that it stands for are compared with then."""
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    function = module._torch_function()
    x, w, target, bias = problem(9)
    assert function.__name__ == "linear_cross_entropy"
    torch.testing.assert_close(
        function(x, w, target, linear_bias=bias), written_out(x, w, target, linear_bias=bias), rtol=0.0, atol=0.0
    )


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"input": torch.ones(3, 4, dtype=torch.float64)}, NotImplementedError, "input is torch.float64"),
        ({"input": torch.ones(3, 4, dtype=torch.bfloat16)}, RuntimeError, "linear_weight is torch.float32"),
        ({"linear_bias": torch.ones(5, dtype=torch.float16)}, RuntimeError, "linear_bias is torch.float16"),
        ({"input": torch.ones(3, 6)}, RuntimeError, "input"),
        ({"input": torch.tensor(1.0)}, RuntimeError, "input"),
        ({"linear_weight": torch.ones(4)}, RuntimeError, "linear_weight"),
        ({"linear_weight": torch.ones(5, 2, 4)}, NotImplementedError, "K-dimensional"),
        ({"linear_bias": torch.ones(4)}, RuntimeError, "linear_bias"),
        ({"weight": torch.ones(4)}, RuntimeError, "weight"),
        ({"weight": torch.ones(5, dtype=torch.float64)}, NotImplementedError, "weight is torch.float64"),
        ({"target": torch.ones(3, 5)}, NotImplementedError, "probability"),
        ({"target": torch.ones(3, dtype=torch.int32)}, RuntimeError, "int64"),
        ({"target": torch.ones(4, dtype=torch.int64)}, ValueError, "target"),
        ({"target": torch.ones(3, 5, dtype=torch.int64)}, RuntimeError, "target"),
        ({"target": torch.ones(3, dtype=torch.int64, device="meta")}, RuntimeError, "target is on meta"),
        ({"linear_weight": torch.ones(5, 4, device="meta")}, RuntimeError, "linear_weight is on meta"),
        ({"reduction": "average"}, ValueError, "average"),
        ({"label_smoothing": 1.5}, RuntimeError, "label_smoothing"),
        ({"label_smoothing": float("nan")}, RuntimeError, "label_smoothing"),
        ({"label_smoothing": "a"}, TypeError, "label_smoothing must be a number"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index must be an integer"),
        ({"ignore_index": True}, TypeError, "ignore_index must be an integer, not bool"),
        ({"options": object()}, NotImplementedError, "options"),
    ],
)
def test_bad_arguments(arguments, error, says):
    given = {"input": torch.ones(3, 4), "linear_weight": torch.ones(5, 4), "target": torch.ones(3, dtype=torch.int64)}
    with pytest.raises(error, match=says):
        linear_cross_entropy(**(given | arguments))


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"label_smoothing": 0.1}], ids=str)
def test_class_weights_that_require_a_gradient_are_refused(options, device):
    """As PyTorch does: they have none, and would learn nothing without a word. Without gradients they are weights."""
    arguments = problem(3, n_classes=5, device=device)[:3]
    weight = draw(5, device=device, seed=2).abs()
    expected = linear_cross_entropy(*arguments, weight=weight, **options)
    weight.requires_grad_()
    with pytest.raises(RuntimeError, match="linear_cross_entropy: not differentiable with respect to weight"):
        linear_cross_entropy(*arguments, weight=weight, **options)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(*arguments, weight=weight, **options), expected, rtol=0, atol=0)
