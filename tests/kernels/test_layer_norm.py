"""Layer norm's own: shapes, mixed dtypes, special values, errors."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from parity import DTYPES, differentiate, guarded_allocations, hold, name_of

import kernels
from kernels import reference, tiles
from kernels.catalogue import ADD_LAYER_NORM, LAYER_NORM
from kernels.device import INTERPRETED, TARGETS
from kernels.op import Case, cdiv, facts_of, plan_for

layer_norm = kernels.layer_norm


def draw(*shape, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)


def agree(inputs, options, rtol=1e-5, atol=1e-5):
    """Output and gradients are PyTorch's in float64."""
    grad = draw(*inputs["input"].shape, seed=9).to(inputs["input"])
    with guarded_allocations():
        ours = differentiate(layer_norm, LAYER_NORM, inputs, options, grad)
    doubles = {name: tensor.double() for name, tensor in inputs.items()}
    for quantity, exact in differentiate(F.layer_norm, LAYER_NORM, doubles, options, grad.double()).items():
        expected = inputs["input" if quantity == "output" else quantity[1:]]
        assert ours[quantity].shape == exact.shape and ours[quantity].dtype == expected.dtype
        torch.testing.assert_close(
            ours[quantity].double(), exact, rtol=rtol, atol=atol, msg=lambda m, q=quantity: f"{q}: {m}"
        )


@pytest.mark.parametrize("n", [1, 2, 3, 15, 16, 17, 127, 128, 129, 1023, 1025, 4096, 4097, 8191])
@pytest.mark.parametrize("rows", [1, 5])
def test_every_length_of_row(rows, n, device):
    inputs = {"input": draw(rows, n, device=device), "weight": draw(n, seed=1, device=device)}
    agree(inputs | {"bias": draw(n, seed=2, device=device)}, {"normalized_shape": (n,)})


@pytest.mark.parametrize("n", [9, 31])
def test_many_rows_of_one_element_a_lane(n, device):
    """Compiled, the lanes of a row hold sums of their own, which must be the same: one of them is what is saved."""
    inputs = {"input": draw(64, n, device=device), "weight": draw(n, seed=1, device=device)}
    agree(inputs | {"bias": draw(n, seed=2, device=device)}, {"normalized_shape": (n,)})


@pytest.mark.parametrize("op", [LAYER_NORM, ADD_LAYER_NORM], ids=lambda op: op.name)
@pytest.mark.parametrize(
    ("n", "dtype", "parts", "width", "rows", "stages"),
    [
        (65, torch.bfloat16, 1, 128, 16, 1),
        (384, torch.bfloat16, 3, 128, 4, 4),
        (384, torch.float32, 3, 128, 4, 4),
        (768, torch.bfloat16, 3, 256, 4, 3),
        (1024, torch.bfloat16, 2, 512, 2, 4),
        (1500, torch.bfloat16, 3, 512, 2, 1),
        (1600, torch.float32, 7, 256, 1, 4),
        (2560, torch.bfloat16, 3, 1024, 1, 4),
    ],
    ids=lambda value: name_of(value) if isinstance(value, torch.dtype) else None,
)
def test_several_blocks_of_rows_in_parts(op, n, dtype, parts, width, rows, stages, device):
    """As on a GPU: rows in vectors, of which the last may go past a row's end, and blocks that are loaded ahead."""
    gpu = TARGETS["sm_90"] if INTERPRETED else facts_of(torch.empty(0, device=device))
    one = dataclasses.replace(gpu, processors=1)
    n_rows = 67 if n < 384 else 37 if n < 1500 else 19
    shapes = {"input": (n_rows, n), "residual": (n_rows, n), "weight": (n,), "bias": (n,)}
    if op is LAYER_NORM:
        del shapes["residual"]
    case = Case("parts", shapes, {"normalized_shape": (n,)})
    launches = op.plan(op.inputs(case, dtype, "meta"), case.options, one)
    backward = next(launch for launch in launches if launch.name == "_layer_norm_backward")
    if op is ADD_LAYER_NORM and n == 1600:  # with a third tensor shared memory has room for no more
        stages = 3
    if gpu.arch == "sm_90" and not tiles.table(gpu.name).get("layer_norm.backward"):  # no tiles of this GPU's own
        tile = {"N": n, "WIDTH": width, "PARTS": parts, "ROWS": rows, "STAGES": stages}
        assert backward.constexprs == tile
    assert backward.grid[0] < cdiv(n_rows, rows), "a program has several blocks"
    with plan_for(one):
        hold(op, case, dtype, device, {})


@pytest.mark.parametrize(
    ("arch", "n", "dtype", "stages"),
    [
        ("sm_90", 8192, torch.bfloat16, 4),
        ("sm_90", 8192, torch.float32, 3),
        ("sm_80", 8192, torch.bfloat16, 4),
        ("sm_80", 8192, torch.float32, 1),
        ("sm_89", 8192, torch.bfloat16, 3),
        ("sm_89", 1024, torch.bfloat16, 1),
        ("gfx942", 1024, torch.bfloat16, 1),
    ],
)
def test_as_many_blocks_ahead_as_shared_memory_has_room_for(arch, n, dtype, stages):
    """Of dy, s and ds', for all the programs that a processor's registers hold. Two stages would load nothing ahead."""
    case = Case("ahead", dict.fromkeys(("input", "residual"), (4096, n)), {"normalized_shape": (n,)})
    launches = ADD_LAYER_NORM.plan(ADD_LAYER_NORM.inputs(case, dtype, "meta"), case.options, TARGETS[arch])
    backward = next(launch for launch in launches if launch.name == "_layer_norm_backward")
    assert backward.constexprs["STAGES"] == stages
    programs = backward.grid[0] // TARGETS[arch].processors
    tile = backward.constexprs["ROWS"] * backward.constexprs["PARTS"] * backward.constexprs["WIDTH"]
    taken = programs * ((stages - 1) * 3 * tile * dtype.itemsize + 1024)
    assert taken <= TARGETS[arch].shared_memory + 1024


@pytest.mark.parametrize("n", [16384, 16385, 65_537, 262_144])
def test_long_rows(n, device):
    inputs = {"input": draw(2, n, device=device), "weight": draw(n, seed=1, device=device)}
    agree(inputs | {"bias": draw(n, seed=2, device=device)}, {"normalized_shape": (n,)})


@pytest.mark.parametrize("n", [24, 17_000])
def test_more_rows_than_programs(n, device):
    """Rows are shared out unevenly, and the workspace's rows are all used."""
    rows = 4100 if n == 24 else 21
    inputs = {"input": draw(rows, n, device=device), "weight": draw(n, seed=1, device=device)}
    agree(inputs | {"bias": draw(n, seed=2, device=device)}, {"normalized_shape": (n,)}, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (3, 0), (0, 0), (2, 0, 8), (2, 8, 0), (0, 8, 2)], ids=str)
def test_nothing_at_all(shape, dims, device):
    """Parameters have a gradient all the same: zeros, as many as they are."""
    normalized = shape[-dims:]
    inputs = {"input": draw(*shape, device=device), "weight": draw(*normalized, device=device)}
    agree(inputs | {"bias": draw(*normalized, device=device)}, {"normalized_shape": normalized})


@pytest.mark.parametrize("shape", [(7,), (2, 7), (2, 3, 7), (2, 2, 2, 2, 7)], ids=lambda shape: f"{len(shape)}-D")
@pytest.mark.parametrize("dims", [1, 2])
def test_any_rank(shape, dims, device):
    normalized = shape[-dims:]
    inputs = {"input": draw(*shape, device=device), "weight": draw(*normalized, seed=1, device=device)}
    agree(inputs | {"bias": draw(*normalized, seed=2, device=device)}, {"normalized_shape": normalized})


@pytest.mark.parametrize("parameters", [(), ("weight",), ("bias",), ("weight", "bias")], ids="+".join)
@pytest.mark.parametrize("normalized", [(24,), (4, 6), (2, 3, 4), (9000,), (3, 5667)], ids=str)
def test_with_and_without_each_parameter(normalized, parameters, device):
    """Rows held whole, and rows walked in chunks forward, backward or both."""
    inputs = {"input": draw(2, 2, *normalized, device=device)}
    inputs |= {name: draw(*normalized, seed=seed, device=device) for seed, name in enumerate(parameters, 1)}
    agree(inputs, {"normalized_shape": normalized})


def test_normalized_shape_in_every_form(device):
    x = draw(3, 6, device=device)
    expected = F.layer_norm(x, (6,))
    for form in (6, [6], (6,), torch.Size([6])):
        torch.testing.assert_close(layer_norm(x, form), expected)


@pytest.mark.parametrize("parameters", DTYPES, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_parameters_of_another_dtype(dtype, parameters, device):
    inputs = {
        "input": draw(9, 40, dtype=dtype, device=device),
        "weight": draw(40, seed=1, dtype=parameters, device=device),
    }
    tolerance = 1e-5 if dtype == parameters == torch.float32 else 4e-2
    inputs["bias"] = draw(40, seed=2, dtype=parameters, device=device)
    agree(inputs, {"normalized_shape": (40,)}, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-3, 10.0])
def test_any_eps(eps, device):
    inputs = {"input": draw(5, 33, device=device)}
    agree(inputs, {"normalized_shape": (33,), "eps": eps})


@pytest.mark.parametrize("n", [24, 17_000])
@pytest.mark.parametrize("eps", [math.nan, math.inf, -math.inf, -1e-3, -2.0])
def test_an_eps_that_makes_no_sense_gives_pytorchs_result(eps, n, device):
    x = draw(3, n, device=device)
    torch.testing.assert_close(layer_norm(x, n, eps=eps), F.layer_norm(x, (n,), eps=eps), equal_nan=True)


@pytest.mark.parametrize("n", [50, 20_000])
@pytest.mark.parametrize("mean", [1e2, 1e4])
def test_a_mean_far_from_zero(mean, n, device):
    """A variance taken as E[x^2] - E[x]^2 would have lost every digit."""
    x = draw(3, n, device=device) + mean
    with guarded_allocations():
        ours = layer_norm(x, n)
    exact = F.layer_norm(x.double(), (n,))
    # the mean itself is rounded to fp32: that much of a deviation every method loses
    torch.testing.assert_close(ours.double(), exact, rtol=0.0, atol=4e-7 * mean)


@pytest.mark.parametrize("scale", [1e-20, 1e-8, 1e15])
def test_rows_of_any_size(scale, device):
    x = draw(3, 40, device=device) * scale
    torch.testing.assert_close(layer_norm(x, 40).double(), F.layer_norm(x.double(), (40,)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [3, 31, 70, 768, 5000, 20_001])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_a_constant_row_gives_the_bias(dtype, n, device):
    """Exactly: 1 / sqrt(eps) would make 300 times as much of what rounding leaves out of the mean."""
    values = torch.tensor([3.25, 0.1, -1.7, 1234.567, 3e-4], device=device)
    x = values[:, None].expand(5, n).to(dtype)
    bias = draw(n, device=device, dtype=dtype)
    assert torch.equal(layer_norm(x, n, None, bias), bias.expand(5, n))
    y, _ = kernels.add_layer_norm(x, x, n, None, bias)
    assert torch.equal(y, bias.expand(5, n))


@pytest.mark.parametrize("n", [24, 17_000])
def test_a_variance_that_overflows_is_nan_and_not_zero(n, device):
    x = draw(3, n, device=device)
    x[1] *= 1e20
    out = layer_norm(x, n)
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()
    assert kernels.add_layer_norm(x, x, n)[0][1].isnan().all()


@pytest.mark.parametrize("n", [24, 17_000])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_stay_in_their_row(value, n, device):
    x = draw(3, n, device=device)
    x[1, n // 2] = value
    leaf = x.clone().requires_grad_()
    out = layer_norm(leaf, n)
    out.backward(torch.ones_like(out))
    for result in (out, leaf.grad):
        assert result[[0, 2]].isfinite().all() and result[1].isnan().all()


def test_autocast_gives_autocasts_dtype(device):
    x, weight = draw(4, 24, device=device), draw(24, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = layer_norm(x, 24, weight)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), F.layer_norm(x, (24,), weight), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"normalized_shape": 7}, RuntimeError, "normalized_shape"),
        ({"normalized_shape": ()}, RuntimeError, "normalized_shape"),
        ({"normalized_shape": (2, 3, 8)}, RuntimeError, "normalized_shape"),
        ({"normalized_shape": "8"}, TypeError, "normalized_shape must be an int or a list of them, not str"),
        ({"normalized_shape": 8.0}, TypeError, "normalized_shape must be an int or a list of them, not float"),
        ({"normalized_shape": [8.0]}, TypeError, "normalized_shape must be an integer, not float"),
        ({"input": torch.ones(3, 1), "normalized_shape": True}, TypeError, "must be an integer, not bool"),
        ({"input": torch.ones(3, 1), "normalized_shape": [True]}, TypeError, "must be an integer, not bool"),
        ({"normalized_shape": 8, "eps": "a"}, TypeError, "eps must be a number, not str"),
        ({"normalized_shape": 8, "weight": torch.ones(7)}, RuntimeError, "weight"),
        ({"normalized_shape": 8, "bias": torch.ones(1, 8)}, RuntimeError, "bias"),
        ({"normalized_shape": 8, "weight": torch.ones(8, dtype=torch.float64)}, NotImplementedError, "float64"),
        ({"input": torch.ones(3, 8, dtype=torch.float64), "normalized_shape": 8}, NotImplementedError, "float64"),
        ({"input": torch.ones(3, 8, dtype=torch.int64), "normalized_shape": 8}, NotImplementedError, "int64"),
    ],
)
def test_bad_arguments(arguments, error, says):
    with pytest.raises(error, match=says):
        layer_norm(**({"input": torch.ones(3, 8)} | arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_reference_keeps_the_dtype(dtype):
    assert reference.layer_norm(draw(3, 8, dtype=dtype), 8, draw(8, dtype=dtype)).dtype == dtype
