"""The numerics contract: what a kernel's outputs and gradients are held to.

Truth is the reference in float64, on the inputs as the dtype rounded them. In maximum and in RMS,

    error <= 2 * (the error of PyTorch's own function in that dtype) + eps(dtype) * RMS(truth)

and below an absolute cap for each op, dtype and quantity, from caps.json. PyTorch's error is taken over several
draws of the same problem, and over its implementations where it has several: the maximum of a few rounding errors
is a matter of luck, and one lucky draw of PyTorch's would fail a kernel that rounds as well as it does.
"""

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

CAPS = Path(__file__).with_name("caps.json")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DRAWS = 8  # of PyTorch's error
GUARD = 512  # bytes on each side of a guarded allocation


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

    def written_out(*args, **options):
        with sdpa_kernel(SDPBackend.MATH):
            return attention(*args, **options)

    return [attention, written_out] if op.name == "scaled_dot_product_attention" else [op.torch]


def inputs_of(op, case, dtype: torch.dtype, device, seed: int = 0) -> dict:
    """The case's inputs, every floating one in `dtype`: PyTorch takes no mixture."""
    inputs = op.inputs(case, dtype, device, seed)
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}


def as_tuple(result) -> tuple[torch.Tensor, ...]:
    """The tensors of a result, or of an incoming gradient: one, or a tuple of several."""
    return (result,) if torch.is_tensor(result) else tuple(result)


def on_each(function, result):
    """`function` of a result's tensor, or of every tensor of the tuple that it is."""
    return function(result) if torch.is_tensor(result) else tuple(function(tensor) for tensor in result)


def differentiate(function, op, inputs: dict, options: dict, grad) -> dict[str, torch.Tensor]:
    """{"output": ..., "d<input>": ...} of `function`; inputs keep their strides, `grad` is the incoming gradient.

    Of an op without a backward the output alone.
    """
    leaves = {name: tensor.detach().requires_grad_(name in op.differentiable) for name, tensor in inputs.items()}
    outputs = as_tuple(function(**leaves, **options))
    wanted = [name for name in inputs if name in op.differentiable]
    gradients = torch.autograd.grad(outputs, [leaves[name] for name in wanted], as_tuple(grad)) if wanted else ()
    results = {name: output.detach() for name, output in zip(op.outputs, outputs, strict=True)}
    return results | {f"d{name}": g for name, g in zip(wanted, gradients, strict=True)}


def in_float64(tensors: dict) -> dict:
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def incoming(op, inputs: dict, options: dict, seed: int = 1):
    """A gradient of the output's shape and dtype, drawn from N(0, 1); of several outputs a tuple of gradients."""
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


def torch_errors(op, case, dtype: torch.dtype, device, draws: int = DRAWS) -> dict[str, tuple[float, float]]:
    """By quantity: PyTorch's maximum error, and the RMS of its errors, of the worst of its implementations."""
    errors: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for seed in range(draws):
        inputs = inputs_of(op, case, dtype, device, seed)
        grad = incoming(op, inputs, case.options, seed + 1)
        truth = differentiate(op.reference, op, in_float64(inputs), case.options, on_each(torch.Tensor.double, grad))
        for place, function in enumerate(torch_functions(op)):
            theirs = differentiate(function, op, inputs, case.options, grad)
            for quantity, exact in truth.items():
                errors.setdefault(quantity, {}).setdefault(place, []).append(_errors(theirs[quantity], exact))
    return {
        quantity: (
            max(high for draws in by_place.values() for high, _ in draws),
            max(math.sqrt(sum(rms * rms for _, rms in draws) / len(draws)) for draws in by_place.values()),
        )
        for quantity, by_place in errors.items()
    }


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
                cap = caps[op.name][name_of(dtype)][quantity][measure]
                if not error <= cap:
                    broken.append(f"{quantity}: {measure} error {error:.3g} is above its cap {cap:.3g}")
    assert not broken, f"{op.name}, {case}, {name_of(dtype)}: " + "; ".join(broken)


def read_caps() -> dict:
    return json.loads(CAPS.read_text())["caps"]


# ---------------------------------------------------------------- allocations that tell


@contextlib.contextmanager
def guarded_allocations() -> Iterator[list[torch.Tensor]]:
    """Fill what the kernels allocate with NaN, and put guards around it that must be untouched afterwards.

    An element that no program writes stays NaN, so parity fails; a write out of bounds changes a guard. Yields the
    buffers.
    """
    buffers = []
    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def allocate(like: torch.Tensor) -> torch.Tensor:
        if like.is_meta or isinstance(like, torch._subclasses.FakeTensor):
            return like
        places = 1 + sum((size - 1) * step for size, step in zip(like.shape, like.stride(), strict=True))
        size = like.dtype.itemsize * (places if like.numel() else 0)
        # 0xff is NaN in every floating dtype, and not the NaN that arithmetic makes
        buffer = torch.full((size + 2 * GUARD,), 0xFF, dtype=torch.uint8, device=like.device)
        buffers.append(buffer)
        return (
            buffer[GUARD : GUARD + size].view(like.dtype).as_strided(like.shape, like.stride(), GUARD // like.itemsize)
        )

    torch.empty = lambda *args, **options: allocate(empty(*args, **options))
    torch.empty_like = lambda *args, **options: allocate(empty_like(*args, **options))
    torch.Tensor.new_empty = lambda *args, **options: allocate(new_empty(*args, **options))
    try:
        yield buffers
    finally:
        torch.empty, torch.empty_like, torch.Tensor.new_empty = empty, empty_like, new_empty
    for buffer in buffers:
        assert (buffer[:GUARD] == 0xFF).all() and (buffer[-GUARD:] == 0xFF).all(), "a kernel wrote out of bounds"


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


LAYOUTS = (transposed, reordered, expanded, constant, sliced, strided, misaligned)
