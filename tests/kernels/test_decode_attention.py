"""Decoding's own: what lies beyond the lengths, splits, lengths that change or are wrong, other shapes, errors."""

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parity import guarded_allocations, hold_alike, in_float64, name_of
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels import op, reference
from kernels.device import INTERPRETED, TARGETS
from kernels.op import count_launches, plan_for

decode_attention = kernels.decode_attention
module = importlib.import_module("kernels.decode_attention")  # the package's attribute of that name is the function
ROOT = Path(__file__).resolve().parents[2]

# fp16 takes the paths and tiles of bf16
each_dtype = pytest.mark.parametrize(
    "dtype",
    [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow), torch.bfloat16],
    ids=name_of,
)
KINDS = pytest.mark.parametrize(("heads", "key_heads"), [(2, 2), (6, 2)], ids=["single", "group"])


def draw(*shape, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)


def problem(device, lengths, t_max=300, heads=2, key_heads=2, d=32, dtype=torch.float32) -> dict:
    batch, of = len(lengths), {"dtype": dtype, "device": device}
    return {
        "query": draw(batch, heads, 1, d, seed=1, **of),
        "key_cache": draw(batch, key_heads, t_max, d, seed=2, **of),
        "value_cache": draw(batch, key_heads, t_max, d, seed=3, **of),
        "lengths": torch.tensor(lengths, dtype=torch.int32, device=device),
    }


def run(inputs, **options):
    return decode_attention(**inputs, enable_gqa=True, **options)


def agree(inputs, ours, **options):
    """`ours` is the reference's in float64."""
    exact = reference.decode_attention(**in_float64(inputs), enable_gqa=True, **options)
    eps = torch.finfo(ours.dtype).eps
    torch.testing.assert_close(ours.double(), exact, rtol=8 * eps, atol=8 * eps)


# ---------------------------------------------------------------- beyond the lengths


@pytest.mark.parametrize("splits", [1, 3])
@each_dtype
@KINDS
def test_what_lies_beyond_the_lengths_does_not_matter(heads, key_heads, dtype, splits, device, monkeypatch):
    """Uninitialised slots may hold NaN, infinity or anything: not a bit of the result changes."""
    monkeypatch.setattr(module, "_splits", lambda *_: splits)
    lengths = (0, 1, 127, 129, 300)
    inputs = problem(device, lengths, heads=heads // 2, key_heads=1, dtype=dtype)
    clean = run(inputs)
    agree(inputs, clean)
    for poison in (torch.nan, torch.inf):
        for batch, length in enumerate(lengths):
            inputs["key_cache"][batch, :, length:] = poison
            inputs["value_cache"][batch, :, length:] = poison
        with guarded_allocations():
            assert torch.equal(run(inputs), clean)


UNMAPPED = """
import ctypes, importlib, mmap
import torch
import kernels

page, d = mmap.PAGESIZE, 16
rows = page // (4 * d)
libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def cache(seed):
    # 3 pages of filled slots, 2 that no one may touch: reading there ends the process
    memory = mmap.mmap(-1, 5 * page)
    flat = torch.frombuffer(memory, dtype=torch.float32)
    flat.copy_(torch.randn(flat.shape, generator=torch.Generator().manual_seed(seed)))
    whole = flat.view(1, 1, 5 * rows, d)
    filled = whole[:, :, : 3 * rows].clone()
    assert libc.mprotect(flat.data_ptr() + 3 * page, 2 * page, 0) == 0
    return memory, whole, filled


key_memory, key, filled_key = cache(1)
value_memory, value, filled_value = cache(2)
lengths = torch.tensor([3 * rows], dtype=torch.int32)
for heads in (1, 3):
    for splits in (1, 5):
        importlib.import_module("kernels.decode_attention")._splits = lambda *_, splits=splits: splits
        query = torch.randn(1, heads, 1, d)
        ours = kernels.decode_attention(query, key, value, lengths, enable_gqa=True)
        expected = kernels.reference.scaled_dot_product_attention(query, filled_key, filled_value, enable_gqa=True)
        torch.testing.assert_close(ours, expected)
print("right", flush=True)
lengths += 1
kernels.decode_attention(query, key, value, lengths, enable_gqa=True)
print("not reached")
"""


@pytest.mark.interpreter
def test_slots_beyond_the_lengths_are_not_even_read():
    """Their pages are taken away; one slot further, and the process dies: the pages are gone indeed."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", UNMAPPED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout == "right\n", done.stderr
    assert done.returncode in (-signal.SIGSEGV, -signal.SIGBUS), done.stderr


# ---------------------------------------------------------------- splits


@each_dtype
@KINDS
def test_any_number_of_splits(heads, key_heads, dtype, device, monkeypatch):
    """The same within rounding, each bit for bit again, and what a split without keys leaves is not read."""
    inputs = problem(device, (0, 130, 900), t_max=900, heads=heads // 2, key_heads=1, dtype=dtype)
    for splits in (1, 2, 7):
        monkeypatch.setattr(module, "_splits", lambda *_, splits=splits: splits)
        with count_launches() as launched, guarded_allocations():
            ours = run(inputs)
        assert launched.total() == (1 if splits == 1 else 2)
        agree(inputs, ours)
        assert torch.equal(ours, run(inputs)), f"{splits} splits are not the same twice"


@KINDS
def test_splits_without_keys_leave_at_once(heads, key_heads, device, monkeypatch):
    """They write nothing; and the filled tiles are dealt out, not those of the whole cache."""
    monkeypatch.setattr(module, "_splits", lambda *_: 7)
    inputs = problem(device, (0, 300), t_max=5000, heads=heads, key_heads=key_heads)
    tile = module.OP.plan(inputs, {}, op.facts_of(inputs["query"]))[0].constexprs["BLOCK_K"]
    tiles = -(-300 // tile)
    busy = -(-tiles // -(-tiles // 7))  # as many to each split, and what is left to the last
    assert busy > 1
    tensors = {}

    def noting(plan, those, **options):
        tensors.update(those)
        op.run(plan, those, **options)

    monkeypatch.setattr(module, "run", noting)
    with guarded_allocations():
        run(inputs)
    for written in (tensors["peak"], tensors["total"], tensors["partial"][..., 0]):
        assert written[0].isnan().all() and written[1, :, busy:].isnan().all()
        assert not written[1, :, :busy].isnan().any()


def test_large_scores_are_merged_without_loss(device, monkeypatch):
    """Scores of some hundred: a merge by m + log(l) would lose 1e-5 of a weight to the sum's rounding."""
    inputs = problem(device, (900,), t_max=900, d=64)
    inputs["query"] = inputs["query"].abs() * 2.0
    inputs["key_cache"] = 5.0 + 0.01 * inputs["key_cache"]
    exact = reference.decode_attention(**in_float64(inputs), scale=1.0)
    errors = []
    for splits in (1, 7):
        monkeypatch.setattr(module, "_splits", lambda *_, splits=splits: splits)
        errors.append((decode_attention(**inputs, scale=1.0) - exact).abs().max().item())
    assert errors[1] < 1.5 * errors[0] + 1e-7, errors


def test_number_of_splits():
    """From shapes and processors alone: none for a full device, none too small to be worth it, enough otherwise."""
    splits = module._splits
    assert splits(64 * 12, 16384, 64, 1, 132) == 1
    assert splits(12, 64, 64, 1, 132) == 1 and splits(1, 0, 64, 1, 132) == 1 and splits(0, 1024, 64, 1, 132) == 1
    # 8 splits of 128 keys; 32 of 512, which 264 places hold; 64 of 256, 8 for each of the 32 heads
    assert splits(12, 1024, 64, 1, 132) == 8 and splits(8, 16384, 128, 4, 132) == 32
    assert splits(1, 16384, 128, 32, 132) == 64
    for programs in (1, 5, 12, 100, 131, 132, 200, 263, 264, 265, 300, 1000):
        for t_max in (1, 100, 1024, 16384, 1 << 20):
            for size, group in ((1, 1), (64, 1), (64, 71), (128, 4), (256, 1), (256, 16)):
                for device in TARGETS.values():
                    n = splits(programs, t_max, size, group, device.processors)
                    assert 1 <= n <= module.MOST
                    assert n == 1 or (t_max * size // n >= module.LEAST and t_max // n >= 8 * group)
                    assert n == 1 or programs < 18 * device.processors  # the last of nine waves matters little


# ---------------------------------------------------------------- lengths


@pytest.mark.parametrize("splits", [1, 4])
@KINDS
def test_lengths_may_change_in_place(heads, key_heads, splits, device, monkeypatch):
    """As between replays of a CUDA graph: the same tensors, the same plan, the new token's slot among the filled."""
    monkeypatch.setattr(module, "_splits", lambda *_: splits)
    inputs = problem(device, (0, 100, 225), heads=heads, key_heads=key_heads)
    run(inputs)
    plans = op._launches.cache_info().misses
    for _ in range(3):
        inputs["lengths"] += 25
        agree(inputs, run(inputs))
    assert op._launches.cache_info().misses == plans


@pytest.mark.gpu
def test_a_cuda_graph_follows_the_lengths(device):
    inputs = problem(device, (1, 1000, 4000), t_max=4096, heads=8, key_heads=2, d=64, dtype=torch.bfloat16)
    run(inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(inputs)
    for _ in range(3):
        inputs["lengths"] += 31
        graph.replay()
        assert torch.equal(out, run(inputs))
        agree(inputs, out)


class _Called(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


def test_lengths_are_not_read_by_the_host(device, monkeypatch):
    """But for its launches the whole call is allocations: nothing that waits for a device."""
    monkeypatch.setattr(module, "run", lambda *_, **__: None)
    inputs = problem(device, (10, 200))
    for checks, reads in ((True, True), (False, False)):
        monkeypatch.setattr(module, "CHECK_VALUES", checks)
        with _Called() as called:
            module._forward(*inputs.values(), 1.0)
        allocations = {"aten.empty_like.default", "aten.new_empty.default"}
        assert bool(called.names - allocations) == reads, called.names


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=name_of)
@KINDS
def test_lengths_out_of_range_give_nan_there_and_read_nothing(heads, key_heads, dtype, splits, device, monkeypatch):
    monkeypatch.setattr(module, "CHECK_VALUES", False)
    monkeypatch.setattr(module, "_splits", lambda *_: splits)
    wrong = {torch.int32: (-1, 301, 2**31 - 1, -(2**31)), torch.int64: (-1, 301, 2**32 + 5, -(2**63))}[dtype]
    inputs = problem(device, (0, 300, 7, 129, 5, 300), heads=heads, key_heads=key_heads)
    clean = run(inputs)
    inputs["lengths"] = inputs["lengths"].to(dtype)
    assert torch.equal(run(inputs), clean)
    inputs["lengths"][:4] = torch.tensor(wrong, dtype=dtype)
    with guarded_allocations():
        ours = run(inputs)
    assert ours[:4].isnan().all() and torch.equal(ours[4:], clean[4:])


@pytest.mark.parametrize("wrong", [-1, 301])
def test_lengths_out_of_range_are_told(wrong, device, monkeypatch):
    monkeypatch.setattr(module, "CHECK_VALUES", True)
    with pytest.raises(IndexError, match=f"length {wrong} is out of bounds for caches of 300 slots"):
        run(problem(device, (5, wrong, 300)))


# ---------------------------------------------------------------- the same as the other attention


@each_dtype
@KINDS
def test_it_is_attention_of_the_filled_slots(heads, key_heads, dtype, device):
    for length in (1, 129, 300):
        inputs = problem(device, (length,), heads=heads, key_heads=key_heads, dtype=dtype)
        filled = [inputs[name][:, :, :length] for name in ("key_cache", "value_cache")]
        options = {"is_causal": True, "query_offset": length - 1, "enable_gqa": True}
        expected = kernels.scaled_dot_product_attention(inputs["query"], *filled, **options)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(run(inputs), expected, rtol=4 * eps, atol=4 * eps)


def test_tokens_one_by_one_are_a_causal_pass(device):
    """Keys and values entered one at a time, as generation does, in the layout that a model keeps: (B, T, H, D)."""
    b, t, h, d = 2, 9, 3, 16
    query, key, value = (draw(b, t, h, d, seed=seed, device=device).transpose(1, 2) for seed in range(3))
    expected = kernels.scaled_dot_product_attention(query, key, value, is_causal=True)
    caches = [torch.full((b, t + 4, h, d), torch.nan, device=device).transpose(1, 2) for _ in range(2)]
    lengths = torch.zeros(b, dtype=torch.int32, device=device)
    for place in range(t):
        for cache, new in zip(caches, (key, value), strict=True):
            cache[:, :, place] = new[:, :, place]
        lengths += 1
        ours = decode_attention(query[:, :, place : place + 1], *caches, lengths)
        torch.testing.assert_close(ours, expected[:, :, place : place + 1])


@pytest.mark.parametrize("arch", [*TARGETS, None])
@pytest.mark.parametrize("group", [1, 5, 40, 70])
def test_every_size_of_group_in_every_devices_tiles(group, arch, device):
    if not INTERPRETED and arch:
        pytest.skip("the device's own tiles run in every other test")
    inputs = problem(device, (140, 33), t_max=140, heads=group, key_heads=1, d=64)
    with plan_for(TARGETS[arch]) if arch else guarded_allocations():
        agree(inputs, run(inputs))


# ---------------------------------------------------------------- memory


@KINDS
def test_a_cache_is_walked_in_place(heads, key_heads, device):
    """Of a cache that a model keeps as (B, T, H, D) nothing is copied; where the last dimension is strided, all is."""
    inputs = problem(device, (200, 300), heads=heads, key_heads=key_heads)
    expected = run(inputs)
    for names, order in ((["key_cache", "value_cache"], (0, 2, 1, 3)), (["key_cache"], (0, 1, 3, 2))):
        laid_out = dict(inputs)
        for name in names:
            laid_out[name] = inputs[name].permute(order).contiguous().permute(order)
        with guarded_allocations() as buffers:
            ours = run(laid_out)
        hold_alike(ours, expected, f"{', '.join(names)} in another order")
        assert sum(size for _, _, size in buffers.buffers) < inputs["key_cache"].nbytes


def test_a_strided_last_dimension_is_copied(device, monkeypatch):
    copied = []
    monkeypatch.setattr(module, "rows_of", lambda tensor: copied.append(op.rows_of(tensor) is not tensor) or tensor)
    monkeypatch.setattr(module, "run", lambda *_, **__: None)
    inputs = problem(device, (200,))
    run(inputs)
    run(inputs | {"key_cache": inputs["key_cache"].transpose(2, 3).contiguous().transpose(2, 3)})
    assert copied == [False, False, False, False, True, False]


def test_offsets_beyond_32_bits(device):
    """Slots 2^30 elements apart: the last lies beyond what an int32 counts. Only three rows' pages are touched."""
    inputs = problem(device, (3,), t_max=3, heads=1, key_heads=1, d=16, dtype=torch.float16)
    expected = run(inputs)
    for name in ("key_cache", "value_cache"):
        far = torch.empty(2**31 + 16, dtype=torch.float16, device=device).as_strided((1, 1, 3, 16), (0, 0, 2**30, 1))
        hold_alike(run(inputs | {name: far.copy_(inputs[name])}), expected, f"{name} far apart")
        del far


@pytest.mark.parametrize(
    "shape",
    [{"lengths": ()}, {"heads": 0, "key_heads": 0}, {"t_max": 0, "lengths": (0, 0)}, {"lengths": (0,), "t_max": 5}],
    ids=["no batch", "no heads", "no cache", "no length"],
)
@pytest.mark.parametrize("splits", [1, 3])
def test_nothing_at_all(shape, splits, device, monkeypatch):
    monkeypatch.setattr(module, "_splits", lambda *_: splits)
    inputs = problem(device, **({"lengths": (3, 4), "t_max": 5} | shape))
    with guarded_allocations():
        ours = decode_attention(**inputs)
    assert ours.shape == inputs["query"].shape and (ours == 0).all()


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("scale", [1e-4, 1e-46, -1e-46, 0.0, -0.5, 3.0, 50.0])
@KINDS
def test_any_scale(heads, key_heads, scale, device, monkeypatch):
    monkeypatch.setattr(module, "_splits", lambda *_: 2)
    inputs = problem(device, (140, 300), heads=heads, key_heads=key_heads, d=8)
    exact = reference.decode_attention(**in_float64(inputs), enable_gqa=True, scale=scale)
    torch.testing.assert_close(run(inputs, scale=scale).double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("name", ["query", "key_cache", "value_cache"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@KINDS
def test_nan_and_infinity_spread_as_in_the_arithmetic(heads, key_heads, name, value, splits, device, monkeypatch):
    monkeypatch.setattr(module, "_splits", lambda *_: splits)
    inputs = problem(device, (300, 300), heads=heads, key_heads=key_heads)
    inputs["query"].abs_()  # an infinite score is NaN, where one of -inf is a key that is not seen
    inputs[name][1, 1, 0, 3] = value
    ours, expected = run(inputs), reference.decode_attention(**inputs, enable_gqa=True)
    assert torch.equal(ours.isfinite(), expected.isfinite()) and not ours.isfinite().all()


# ---------------------------------------------------------------- inside PyTorch


def test_no_gradient_but_an_error_that_says_what_to_use(device):
    inputs = problem(device, (5, 6))
    inputs["query"].requires_grad_()
    with torch.no_grad():
        assert not run(inputs).requires_grad
    out = run(inputs)
    assert out.requires_grad, "a loss would silently miss this branch"
    with pytest.raises(NotImplementedError, match="scaled_dot_product_attention with is_causal=True and query_offset"):
        out.sum().backward()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_whole_it_is_eager(backend, device):
    """One graph for every length, the cache's update in it."""
    torch.compiler.reset()
    inputs = problem(device, (5, 100))
    token = draw(2, 2, 32, seed=9, device=device)

    def step(query, key, value, lengths):
        batch = torch.arange(2, device=device)
        key[batch, :, lengths.long()] = token
        value[batch, :, lengths.long()] = token
        lengths += 1
        return decode_attention(query * 2.0, key, value, lengths) + 1.0

    graphs = []

    def count(graph, example):
        graphs.append(graph)
        return graph.forward if backend == "eager" else torch._dynamo.lookup_backend(backend)(graph, example)

    compiled = torch.compile(step, fullgraph=True, backend=count)
    eager = {name: tensor.clone() for name, tensor in inputs.items()}
    for _ in range(3):
        hold_alike(compiled(*inputs.values()), step(*eager.values()), "compiled")
    assert len(graphs) == 1 and torch.equal(inputs["lengths"], eager["lengths"])
    torch.compiler.reset()


@pytest.mark.parametrize("cache", [torch.float32, torch.bfloat16], ids=name_of)
def test_autocast_casts_the_query_and_the_result_but_no_cache(cache, device):
    inputs = problem(device, (200, 300))
    expected = decode_attention(
        inputs["query"].to(cache), inputs["key_cache"].to(cache), inputs["value_cache"].to(cache), inputs["lengths"]
    ).to(torch.bfloat16)
    inputs |= {name: inputs[name].to(cache) for name in ("key_cache", "value_cache")}
    with torch.autocast(device.type, dtype=torch.bfloat16), guarded_allocations() as buffers:
        ours = decode_attention(**inputs)
    assert ours.dtype == torch.bfloat16 and torch.equal(ours, expected)
    assert sum(size for _, _, size in buffers.buffers) < inputs["key_cache"].nbytes


# ---------------------------------------------------------------- errors


def _ones(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("change", "options", "error", "says"),
    [
        ({"query": _ones(2, 2, 2, 8)}, {}, NotImplementedError, "query_offset"),
        ({"query": _ones(2, 2, 0, 8)}, {}, NotImplementedError, "query_offset"),
        ({"query": _ones(2, 2, 8)}, {}, ValueError, "query must be 4-D"),
        ({"key_cache": _ones(2, 5, 8)}, {}, ValueError, "key_cache must be 4-D"),
        ({"query": _ones(3, 2, 1, 8)}, {}, RuntimeError, "do not fit"),
        ({"key_cache": _ones(2, 2, 6, 8)}, {}, RuntimeError, "do not fit"),
        ({"key_cache": _ones(2, 2, 5, 4)}, {}, RuntimeError, "do not fit"),
        ({"value_cache": _ones(2, 2, 5, 4)}, {}, NotImplementedError, "value head"),
        ({"query": _ones(2, 4, 1, 8)}, {}, RuntimeError, "enable_gqa=True"),
        ({"query": _ones(2, 3, 1, 8)}, {"enable_gqa": True}, RuntimeError, "divide"),
        ({"query": _ones(2, 2, 1, 8, dtype=torch.float16)}, {}, RuntimeError, "float16"),
        ({"lengths": [1, 2]}, {}, TypeError, "lengths must be a Tensor, not list"),
        ({}, {"scale": "a"}, TypeError, "scale must be a number"),
        ({}, {"scale": float("nan")}, ValueError, "decode_attention: scale must be finite in float32, got nan"),
        ({}, {"scale": float("inf")}, ValueError, "decode_attention: scale must be finite in float32, got inf"),
        ({}, {"scale": -1e39}, ValueError, r"decode_attention: scale must be finite in float32, got -1e\+39"),
        ({"lengths": torch.tensor([1.0, 2.0])}, {}, RuntimeError, "int32 or int64"),
        ({"lengths": torch.tensor([1])}, {}, RuntimeError, r"shape \[2\]"),
        ({"lengths": torch.tensor(1)}, {}, RuntimeError, r"shape \[2\]"),
        ({"lengths": torch.tensor([1, 2], device="meta")}, {}, RuntimeError, "lengths is on meta"),
    ],
)
def test_bad_arguments(change, options, error, says):
    inputs = {"query": _ones(2, 2, 1, 8), "key_cache": _ones(2, 2, 5, 8), "value_cache": _ones(2, 2, 5, 8)}
    inputs |= {"lengths": torch.tensor([1, 2], dtype=torch.int32)} | change
    with pytest.raises(error, match=says):
        decode_attention(**inputs, **options)


@pytest.mark.parametrize(("size", "dtype"), [(257, torch.float32), (8, torch.float64)])
def test_what_the_kernels_do_not_have(size, dtype):
    cache = _ones(1, 1, 2, size, dtype=dtype)
    with pytest.raises(NotImplementedError, match=r"257|float64"):
        decode_attention(cache[:, :, :1], cache, cache, torch.tensor([1]))
