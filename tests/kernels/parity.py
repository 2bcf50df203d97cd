"""The numerics contract: what a kernel's outputs and gradients are held to.

Truth is the reference in float64, on the inputs as the dtype rounded them. In maximum and in RMS,

    error <= 2 * (the error of PyTorch's own function in that dtype) + eps(dtype) * RMS(truth)

and below an absolute cap for each op, dtype and quantity, from caps.json. PyTorch's error is taken over several
draws of the same problem, and over its implementations where it has several: the maximum of a few rounding errors
is a matter of luck, and one lucky draw of PyTorch's would fail a kernel that rounds as well as it does.

The caps are the worst errors in Triton's interpreter and a quarter. No GPU's have been measured: there an error may be
ON_A_GPU caps, so that they catch products in TF32 or sums in 16 bits, but not what the contract alone is to judge.
"""

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.device import INTERPRETED

CAPS = Path(__file__).with_name("caps.json")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DRAWS = 8  # of PyTorch's error
GUARD = 512  # bytes on each side of a guarded allocation
ON_A_GPU = 4  # its exp2 and division are off by up to 2 ulp, the interpreter's by half of one


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def torch_functions(op) -> list:
    """PyTorch's own function, taught the options of ours that it lacks; once for each way it may compute."""

    def attention(query, key, value, *, is_causal=False, query_offset=0, **options):
        mask = None
        if is_causal and query_offset:
            places = (query.shape[-2], key.shape[-2])
            mask, is_causal = torch.ones(places, dtype=torch.bool, device=query.device).tril(query_offset), False
        return op.torch(query, key, value, attn_mask=mask, is_causal=is_causal, **options)

    function = attention if op.name == "scaled_dot_product_attention" else op.torch

    def written_out(*args, **options):
        with sdpa_kernel(SDPBackend.MATH):
            return function(*args, **options)

    return [function, written_out] if op.name.startswith("scaled_dot_product_attention") else [function]


def case_of(op, name: str):
    return next(case for case in op.cases if case.name == name)


def inputs_of(op, case, dtype: torch.dtype, device, seed: int = 0) -> dict:
    """The case's inputs, every floating one in `dtype`: PyTorch takes no mixture."""
    inputs = op.inputs(case, dtype, device, seed)
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}


def as_tuple(result) -> tuple[torch.Tensor, ...]:
    """The tensors of a result, or of an incoming gradient: one, or a tuple of several."""
    return (result,) if torch.is_tensor(result) else tuple(result)


def requiring(result, grad) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The outputs that require a gradient, as a sum of what requires none does not, each with its own."""
    return [pair for pair in zip(as_tuple(result), as_tuple(grad), strict=True) if pair[0].requires_grad]


def on_each(function, result):
    """`function` of a result's tensor, or of every tensor of the tuple that it is."""
    return function(result) if torch.is_tensor(result) else tuple(map(function, result))


def outputs_of(op, result) -> dict[str, torch.Tensor]:
    """The outputs by name: an op of several says what they are called."""
    return dict(zip(op.outputs, as_tuple(result), strict=True))


def differentiate(function, op, inputs: dict, options: dict, grad) -> dict[str, torch.Tensor]:
    """{"output": ..., "d<input>": ...} of `function`; inputs keep their strides.

    `grad` is the incoming gradient: a tensor, or for an op of several outputs one for each; an op without gradients
    has no use for it.
    """
    leaves = {name: tensor.detach().requires_grad_(name in op.differentiable) for name, tensor in inputs.items()}
    result = function(**leaves, **options)
    outputs = outputs_of(op, result)
    wanted = [name for name in inputs if name in op.differentiable]
    gradients = (
        torch.autograd.grad(as_tuple(result), [leaves[name] for name in wanted], as_tuple(grad)) if wanted else ()
    )
    results = {quantity: output.detach() for quantity, output in outputs.items()}
    return results | {f"d{name}": g for name, g in zip(wanted, gradients, strict=True)}


def in_float64(tensors):
    """Every floating tensor of a dictionary, a tuple or alone in float64."""
    if isinstance(tensors, dict):
        return {name: in_float64(tensor) for name, tensor in tensors.items()}
    if isinstance(tensors, tuple):
        return tuple(in_float64(tensor) for tensor in tensors)
    return tensors.double() if tensors.is_floating_point() else tensors


def incoming(op, inputs: dict, options: dict, seed: int = 1):
    """Gradients of the outputs' shapes and dtypes, drawn from N(0, 1); one tensor where there is one output."""
    first = next(iter(inputs.values()))
    generator = torch.Generator().manual_seed(seed)

    def draw(like: torch.Tensor) -> torch.Tensor:
        drawn = torch.randn(like.shape, generator=generator, dtype=torch.float64)
        return drawn.to(device=first.device, dtype=like.dtype)

    return on_each(draw, op.reference(**inputs, **options))


def _errors(result: torch.Tensor, truth: torch.Tensor) -> tuple[float, float]:
    """(maximum, RMS) of the difference."""
    assert result.shape == truth.shape, f"shape {tuple(result.shape)}, should be {tuple(truth.shape)}"
    error = (result.double() - truth).abs()
    return (error.max().item(), error.square().mean().sqrt().item()) if error.numel() else (0.0, 0.0)


_known_errors: dict[str, dict[str, tuple[float, float]]] = {}


def torch_errors(op, case, dtype: torch.dtype, device, draws: int = DRAWS) -> dict[str, tuple[float, float]]:
    """By quantity: PyTorch's maximum error, and the RMS of its errors, of the worst of its implementations."""
    problem = repr((op.name, case, dtype, device, draws))
    if problem in _known_errors:
        return _known_errors[problem]
    errors: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for seed in range(draws):
        inputs = inputs_of(op, case, dtype, device, seed)
        grad = incoming(op, inputs, case.options, seed + 1)
        truth = differentiate(op.reference, op, in_float64(inputs), case.options, in_float64(grad))
        for place, function in enumerate(torch_functions(op)):
            theirs = differentiate(function, op, inputs, case.options, grad)
            for quantity, exact in truth.items():
                errors.setdefault(quantity, {}).setdefault(place, []).append(_errors(theirs[quantity], exact))
    _known_errors[problem] = {
        quantity: (
            max(high for draws in by_place.values() for high, _ in draws),
            max(math.sqrt(sum(rms * rms for _, rms in draws) / len(draws)) for draws in by_place.values()),
        )
        for quantity, by_place in errors.items()
    }
    return _known_errors[problem]


def check(
    ratios: dict,
    op,
    case: str,
    dtype: torch.dtype,
    ours: dict,
    theirs: dict,
    truth: dict,
    *,
    caps: dict | None = None,
    residue: dict | None = None,
) -> None:
    """Hold `ours` to the contract, and enter the ratios of error and allowance in `ratios`.

    theirs: PyTorch's errors, as torch_errors has them. residue: by quantity, what rounding may leave where terms
    cancel and the truth is next to nothing, or nothing.
    """
    broken = []
    for quantity, exact in truth.items():
        assert ours[quantity].dtype == dtype, f"{quantity} is {ours[quantity].dtype}"
        assert exact.isfinite().all(), f"{case}: the truth of {quantity} is not finite; not a case for this test"
        floor = torch.finfo(dtype).eps * (exact.square().mean().sqrt().item() if exact.numel() else 0.0)
        floor += (residue or {}).get(quantity, 0.0)
        key = (op.name, name_of(dtype), quantity)
        entry = ratios.setdefault(key, {"max": (0.0, "-"), "rms": (0.0, "-"), "error_max": 0.0, "error_rms": 0.0})
        measured = zip(("max", "rms"), _errors(ours[quantity], exact), theirs[quantity], strict=True)
        for measure, error, their_error in measured:
            allowed = 2 * their_error + floor
            ratio = error / allowed if allowed else (0.0 if error == 0.0 else math.inf)
            entry[measure] = max(entry[measure], (ratio, case))
            entry[f"error_{measure}"] = max(entry[f"error_{measure}"], error)
            if not ratio <= 1.0:  # NaN fails too
                broken.append(
                    f"{quantity}: {measure} error {error:.3g}, allowed {allowed:.3g} (PyTorch {their_error:.3g})"
                )
            if caps is not None:
                cap = cap_of(caps[op.name][name_of(dtype)][quantity][measure], ours[quantity].device)
                if not error <= cap:
                    broken.append(f"{quantity}: {measure} error {error:.3g} is above its cap {cap:.3g}")
    assert not broken, f"{op.name}, {case}, {name_of(dtype)}: " + "; ".join(broken)


def cap_of(cap: float, device: torch.device) -> float:
    """What a cap of the table is on a device."""
    return cap * (ON_A_GPU if device.type == "cuda" else 1)


def read_caps() -> dict:
    return json.loads(CAPS.read_text())["caps"]


def guarded(op, inputs: dict, options: dict, grad, fill: int = 0xFF) -> dict[str, torch.Tensor]:
    """`differentiate`, with everything in guarded buffers, the inputs too, and nothing modified that was given.

    What lies beside an input is NaN, so that reading it spoils the result.
    """
    with guarded_allocations(fill) as guards:
        inputs = {name: guards.place(tensor) for name, tensor in inputs.items()}
        grad = on_each(guards.place, grad)
        placed = len(guards.buffers)
        with unchanged(inputs, grad):
            results = differentiate(op.public, op, inputs, options, grad)
        assert len(guards.buffers) > placed, "nothing was allocated where the guards are put"
    return results


def hold(op, case, dtype: torch.dtype, device, ratios: dict, caps: dict | None = None) -> None:
    """The case's first draw by the contract."""
    inputs = inputs_of(op, case, dtype, device)
    grad = incoming(op, inputs, case.options)
    ours = guarded(op, inputs, case.options, grad)
    truth = differentiate(op.reference, op, in_float64(inputs), case.options, in_float64(grad))
    theirs = torch_errors(op, case, dtype, device)
    check(ratios, op, case.name, dtype, ours, theirs, truth, caps=caps)


def _same_results(ours: dict, expected: dict, what: str) -> None:
    assert ours.keys() == expected.keys()
    different = [quantity for quantity, value in expected.items() if not same_bits(ours[quantity], value)]
    assert not different, f"{what}: {', '.join(different)} came out otherwise"


def _close(ours: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    torch.testing.assert_close(ours, expected, msg=lambda told: f"{what} came out otherwise: {told}")


def hold_alike(ours: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """The same bits in the interpreter; compiled, and given other strides or another alignment, products and sums may
    be fused otherwise.
    """
    if INTERPRETED:
        assert same_bits(ours, expected), f"{what} it came out otherwise"
    _close(ours, expected, what)


def hold_repeats(op, case, dtype: torch.dtype, device, times: int = 3) -> None:
    """Bitwise the same every time: whatever the memory held before, and whatever ran in between."""
    inputs, other = (inputs_of(op, case, dtype, device, seed) for seed in (0, 1))
    grad = incoming(op, inputs, case.options)
    first = guarded(op, inputs, case.options, grad)
    between = guarded(op, other, case.options, grad)
    assert not same_bits(first["output"], between["output"]), "other inputs gave the same output"
    for time in range(1, times):
        # bytes of 0x4b are large but finite numbers in every dtype
        again = guarded(op, inputs, case.options, grad, fill=0x4B if time % 2 else 0xFF)
        _same_results(again, first, f"run {time + 1}")


def hold_retained_graph(op, case, dtype: torch.dtype, device) -> None:
    """A second backward pass of one graph gives the first one's bits, and changes nothing that was given."""
    inputs = inputs_of(op, case, dtype, device)
    grad = incoming(op, inputs, case.options)
    leaves = {name: tensor.clone().requires_grad_(name in op.differentiable) for name, tensor in inputs.items()}
    wanted = [leaves[name] for name in inputs if name in op.differentiable]
    output = op.public(**leaves, **case.options)
    before = {name: bits(one).clone() for name, one in outputs_of(op, output).items()}
    with unchanged(inputs, grad):
        first = torch.autograd.grad(as_tuple(output), wanted, as_tuple(grad), retain_graph=True)
        kept = [bits(gradient).clone() for gradient in first]
        again = torch.autograd.grad(as_tuple(output), wanted, as_tuple(grad))
    for one, two, three in zip(first, kept, again, strict=True):
        assert torch.equal(bits(one), two), "the second backward pass changed the first one's gradients"
        assert same_bits(one, three), "the second backward pass came out otherwise"
    for name, one in outputs_of(op, output).items():
        assert torch.equal(bits(one), before[name]), "backward changed the output"


def hold_some_gradients(op, case, dtype: torch.dtype, device) -> None:
    """Every combination of wanted gradients comes out as when all are wanted, and nothing else gets one.

    In the interpreter to the bit; a compiler may fuse products and sums otherwise where other gradients are left out.
    """
    inputs = inputs_of(op, case, dtype, device)
    grad = incoming(op, inputs, case.options)
    everything = differentiate(op.public, op, inputs, case.options, grad)
    names = [name for name in inputs if name in op.differentiable]
    for chosen in range(1, 2 ** len(names)):
        wanted = {name for place, name in enumerate(names) if chosen >> place & 1}
        leaves = {name: tensor.clone().requires_grad_(name in wanted) for name, tensor in inputs.items()}
        torch.autograd.backward(*zip(*requiring(op.public(**leaves, **case.options), grad), strict=True))
        for name, leaf in leaves.items():
            assert (leaf.grad is not None) == (name in wanted), f"{name} with only {wanted} wanted"
            if name in wanted:
                expected, what = everything[f"d{name}"], f"only {wanted} wanted"
                if INTERPRETED:
                    _same_results({name: leaf.grad}, {name: expected}, what)
                _close(leaf.grad, expected, f"{what}: {name}")


def hold_layout(op, case, dtype: torch.dtype, device, layout, of: str) -> None:
    """The results are those of contiguous tensors, with the inputs or the incoming gradient in this layout.

    In the interpreter the arithmetic is the same whatever the layout; on a GPU sums may be split otherwise.
    """
    inputs = inputs_of(op, case, dtype, device)
    grad = incoming(op, inputs, case.options)
    if of == "inputs":
        inputs = {name: layout(tensor) for name, tensor in inputs.items()}
    else:
        grad = on_each(layout, grad)
    plain = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in inputs.items()}
    expected = guarded(op, plain, case.options, on_each(lambda g: g.clone(memory_format=torch.contiguous_format), grad))
    ours = guarded(op, inputs, case.options, grad)
    if INTERPRETED:
        _same_results(ours, expected, f"{layout.__name__} {of}")
    for quantity, value in expected.items():
        _close(ours[quantity], value, f"{layout.__name__} {of}: {quantity}")


# ---------------------------------------------------------------- memory that tells


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bits as integers: to compare NaN with NaN, and -0.0 with 0.0."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(integers[tensor.dtype.itemsize])


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(bits(one), bits(other))


@contextlib.contextmanager
def unchanged(inputs: dict, grad) -> Iterator[None]:
    """Inputs and incoming gradients have the same bits afterwards."""
    tensors = [(f"input {name}", tensor) for name, tensor in inputs.items()]
    tensors += [("incoming gradient", tensor) for tensor in as_tuple(grad)]
    before = [bits(tensor).clone() for _, tensor in tensors]
    yield
    for (what, tensor), held in zip(tensors, before, strict=True):
        assert torch.equal(bits(tensor), held), f"the {what} was modified"


def generator_of(device: torch.device):
    """What has get_rng_state and set_rng_state of the generator that seeds on `device` are drawn from."""
    return torch.cuda if device.type == "cuda" else torch


_full = torch.full
ALLOCATORS = [
    *((torch, name) for name in ("empty", "empty_like", "empty_strided", "zeros", "zeros_like", "full", "full_like")),
    *((torch.Tensor, name) for name in ("new_empty", "new_empty_strided", "new_zeros", "new_full")),
]


class Guards:
    """Buffers with guards on both sides, all of it one byte over and over."""

    def __init__(self, fill: int):
        self.fill = fill
        self.buffers = []

    def _allocate(self, like: torch.Tensor) -> torch.Tensor:
        places = 1 + sum((size - 1) * step for size, step in zip(like.shape, like.stride(), strict=True))
        size = like.dtype.itemsize * (places if like.numel() else 0)
        start = GUARD + like.data_ptr() % 16  # a tensor off the boundary stays off it
        length = (start + size + GUARD + 7) // 8 * 8
        buffer = _full((length,), self.fill, dtype=torch.uint8, device=like.device)
        self.buffers.append((buffer, start, size))
        return buffer.view(like.dtype).as_strided(like.shape, like.stride(), start // like.dtype.itemsize)

    def allocate(self, like: torch.Tensor, filled: bool) -> torch.Tensor:
        """A tensor as `like` is, its values too if it was filled."""
        if like.is_meta or isinstance(like, torch._subclasses.FakeTensor):
            return like
        inside = self._allocate(like)
        return inside.copy_(like) if filled else inside

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` with its strides and whatever lies between its elements, in a buffer of its own."""
        inside = self._allocate(tensor)
        if tensor.numel():
            places = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
            flat = inside.as_strided((places,), (1,), inside.storage_offset())
            flat.copy_(tensor.detach().as_strided((places,), (1,), tensor.storage_offset()))
        return inside

    def check(self) -> None:
        for buffer, start, size in self.buffers:
            intact = (buffer[:start] == self.fill).all() and (buffer[start + size :] == self.fill).all()
            assert intact, "a kernel wrote out of bounds"


@contextlib.contextmanager
def guarded_allocations(fill: int = 0xFF) -> Iterator[Guards]:
    """Fill what the kernels allocate with NaN, and put guards around it that must be untouched afterwards.

    An element that no program writes stays NaN, so parity fails; a write out of bounds changes a guard. 0xff is NaN in
    every floating dtype, and not the NaN that arithmetic makes.
    """
    guards = Guards(fill)
    originals = [getattr(owner, name) for owner, name in ALLOCATORS]

    def guarded(original, filled):
        return lambda *args, **options: guards.allocate(original(*args, **options), filled)

    for (owner, name), original in zip(ALLOCATORS, originals, strict=True):
        setattr(owner, name, guarded(original, "empty" not in name))
    try:
        yield guards
    finally:
        for (owner, name), original in zip(ALLOCATORS, originals, strict=True):
            setattr(owner, name, original)
    guards.check()


# ---------------------------------------------------------------- layouts


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, the first and last dimensions swapped in memory."""
    return tensor.transpose(0, -1).contiguous().transpose(0, -1) if tensor.dim() > 1 else tensor


def expanded(tensor: torch.Tensor) -> torch.Tensor:
    """The first of the first dimension, repeated with stride 0."""
    return tensor[:1].expand(tensor.shape) if tensor.dim() else tensor


def constant(tensor: torch.Tensor) -> torch.Tensor:
    """One number with stride 0 everywhere, as the gradient of a sum has."""
    return tensor.flatten()[:1].view([1] * tensor.dim()).expand(tensor.shape)


def _poison(dtype: torch.dtype) -> float | int:
    """What no kernel may read: it would show in every result."""
    return math.nan if dtype.is_floating_point else torch.iinfo(dtype).max


def sliced(tensor: torch.Tensor) -> torch.Tensor:
    """The same values inside a larger tensor whose other elements are poison: rows apart, every row longer."""
    if tensor.dim() == 0:
        return tensor
    around = tensor.new_full([size + 5 for size in tensor.shape], _poison(tensor.dtype))
    inside = around[tuple(slice(2, 2 + size) for size in tensor.shape)]
    inside.copy_(tensor)
    return inside


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, poison between any two neighbours of the last dimension."""
    if tensor.dim() == 0:
        return tensor
    around = tensor.new_full([*tensor.shape[:-1], 2 * tensor.shape[-1]], _poison(tensor.dtype))
    around[..., ::2] = tensor
    return around[..., ::2]


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, contiguous, one element off any boundary."""
    around = tensor.new_zeros(tensor.numel() + 1)
    around[1:] = tensor.flatten()
    return around[1:].view(tensor.shape)


def reordered(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, the dimensions before the last in reverse order in memory: (B, H, T, D) as (T, H, B, D)."""
    order = [*reversed(range(tensor.dim() - 1)), tensor.dim() - 1]
    return tensor.permute(order).contiguous().permute(order) if tensor.dim() > 2 else tensor


def packed(tensor: torch.Tensor) -> torch.Tensor:
    """The same values as the middle of three parts of every row, (B, H, T, D) as the keys of a (B, T, 3, H, D)."""
    if tensor.dim() == 0:
        return tensor
    swap = (lambda t: t.transpose(1, 2)) if tensor.dim() == 4 else (lambda t: t)
    rows = swap(tensor)
    split = rows.dim() - (2 if tensor.dim() == 4 else 1)
    poison = math.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
    around = tensor.new_full([*rows.shape[:split], 3, *rows.shape[split:]], poison)
    around.select(split, 1).copy_(rows)
    return swap(around.select(split, 1))


LAYOUTS = (transposed, reordered, expanded, constant, sliced, strided, misaligned, packed)
