"""Offsets past 2^31 elements: computed in 64 bits by every kernel, for every pointer, and shown by kernels that do not.

The addresses of launches on tensors far larger than any memory are compared with those that come out when every
integer has 64 bits. Each conversion to 64 bits in the kernels is then left out, one at a time, and must be missed.
"""

import ast
import dataclasses
import functools
import importlib
import inspect
import math
import re
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from addresses import launches_of, wrong_access
from parity import bits, differentiate, incoming, inputs_of, on_each
from test_parity import OPS, each_op, laid_out

from kernels import catalogue
from kernels.device import INTERPRETED, TARGETS
from kernels.op import Case, Spec

STRIDE = 2**31 - 16  # fits 32 bits; twice it does not
SM_90 = TARGETS["sm_90"]
interpreted = pytest.mark.skipif(not INTERPRETED, reason="addresses are read in Triton's interpreter")

SPLITS = 4  # of caches of SPLIT slots or more, here; every one of them gets keys
SPLIT = 1024


@pytest.fixture(autouse=True)
def _however_many_it_would_choose(monkeypatch):
    """All rows in one chunk of logits, and splits however many programs there are: nothing is left to a device."""
    monkeypatch.setattr(
        importlib.import_module("kernels.linear_cross_entropy"), "chunk_rows", lambda n_rows, *_: n_rows
    )
    decode = importlib.import_module("kernels.decode_attention")
    monkeypatch.setattr(decode, "_splits", lambda programs, t_max, *_: SPLITS if t_max >= SPLIT else 1)


def _attention(b: int, t: int) -> Case:
    shapes = {"query": (b, 6, t, 16), "key": (b, 3, t, 16), "value": (b, 3, t, 16)}
    return Case(f"{b}x{t}", shapes, {"is_causal": True, "enable_gqa": True})


def _qkvpacked(b: int, t: int) -> Case:
    return Case(f"{b}x{t}", {"qkv": (b, t, 3, 6, 16)}, {"is_causal": True})


def _layer_norm(rows: int, n: int) -> Case:
    return Case(f"{rows}x{n}", {"input": (rows, n), "weight": (n,), "bias": (n,)}, {"normalized_shape": (n,)})


def _add_layer_norm(rows: int, n: int) -> Case:
    case = _layer_norm(rows, n)
    return case._replace(shapes={"input": (rows, n), "residual": (rows, n)} | case.shapes)


def _cross_entropy(rows: int, n: int) -> Case:
    return Case(f"{rows}x{n}", {"input": (rows, n), "target": (rows,), "weight": (n,)}, {"reduction": "none"})


def _decode(b: int, h: int, key_heads: int, t: int) -> Case:
    cache = (b, key_heads, t, 16)
    shapes = {"query": (b, h, 1, 16), "key_cache": cache, "value_cache": cache, "lengths": (b,)}
    return Case(f"{b}x{h}x{key_heads}x{t}", shapes, {"enable_gqa": True})


def _linear_cross_entropy(rows: int, hidden: int, n: int, **options) -> Case:
    shapes = {"input": (rows, hidden), "linear_weight": (n, hidden), "target": (rows,), "linear_bias": (n,)}
    return Case(f"{rows}x{hidden}x{n}", shapes | {"weight": (n,)}, options)


STRIDED = {  # every dimension at least 3, and several tiles
    "scaled_dot_product_attention": [_attention(3, 150), _attention(3, 24)],
    "scaled_dot_product_attention_qkvpacked": [_qkvpacked(3, 150), _qkvpacked(3, 24)],
    "decode_attention": [_decode(3, h, 3, t) for h in (3, 6) for t in (150, SPLIT)],
    "cross_entropy": [Case("rows", {"input": (5, 24), "target": (5,), "weight": (24,)}, {"label_smoothing": 0.1})],
    # classes by the 16: the logits' rows are padded to that, and a launch does not tell how far
    "linear_cross_entropy": [_linear_cross_entropy(5, 24, 48, reduction=reduction) for reduction in ("none", "mean")],
}  # fmt: skip
MANY = {  # contiguous, and many elements: of every kind of kernel and of everything that has an element a row
    "scaled_dot_product_attention": [_attention(5_000_000, 150), _attention(3, 2**26), _attention(2**24, 24)],
    "scaled_dot_product_attention_qkvpacked": [_qkvpacked(5_000_000, 150), _qkvpacked(3, 2**26), _qkvpacked(2**24, 24)],
    "layer_norm": [_layer_norm(2**32, 24), _layer_norm(100, 2**26)],
    "add_layer_norm": [_add_layer_norm(2**32, 24), _add_layer_norm(100, 2**26)],
    "cross_entropy": [_cross_entropy(2**32, 24), _cross_entropy(5, 2**30)],
    "decode_attention": [_decode(2**28, 1, 1, t) for t in (100, SPLIT)]
    + [_decode(2**24, 64, 1, t) for t in (100, SPLIT)],
    "linear_cross_entropy": [
        _linear_cross_entropy(rows, 8, n, reduction=reduction)
        for rows, n in ((2**32, 48), (5, 2**30))
        for reduction in ("none", "mean")
    ],
}
# Never past 2^31 elements: one for each column, for each program that fills the device, or one alone; and the long
# rows' and the splits' statistics, of which there is one a program
BOUNDED = re.compile(r"weight|bias|weight_sum|divisor|sums|count|factor|seed|d?weight(_parts)?|d?bias(_parts)?")
ONE_A_PROGRAM = {("_layer_norm_forward_long", "mean"), ("_layer_norm_forward_long", "rstd")}
ONE_A_PROGRAM |= {(f"_layer_norm_backward_long_{of}", s) for of in ("input", "parameters") for s in ("mean", "rstd")}
ONE_A_PROGRAM |= {("_decode_single", "peak"), ("_decode_single", "total")}
ONE_A_PROGRAM |= {("_cross_entropy_forward", "parts"), ("_cross_entropy_reduce", "parts")}  # two, one after the other
ONE_ALONE = {("_linear_cross_entropy_backward_scale", "grad"), ("_cross_entropy_reduce", "loss")}  # of a mean or a sum


def _many(op) -> list[Case]:
    """The cases of MANY; of another op, its own with a first dimension that makes everything large."""
    if op.name in MANY:
        return MANY[op.name]
    case = laid_out(op)
    first = next(iter(case.shapes.values()))
    scaled = 2**32 // max(1, math.prod(first[1:-1]))
    shapes = {n: (scaled, *shape[1:]) if shape[:1] == first[:1] else shape for n, shape in case.shapes.items()}
    return [case._replace(name="many", shapes=shapes)]


def _strides(shape: tuple[int, ...], far: int) -> list[int]:
    """Strides with STRIDE at dimension `far` from the end: packed behind it, and what is in front as far as it must."""
    strides, step = [], 1
    for place, size in enumerate(reversed(shape)):
        step = STRIDE if place == far else step
        strides.insert(0, step)
        step *= size
    return strides


def _meta(shape, strides, dtype):
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")


def _variants(op):
    """(name, inputs, options, incoming gradients) on the meta device."""
    for case in _many(op):
        inputs = op.inputs(case, torch.bfloat16, "meta")
        yield case.name, inputs, case.options, lambda result: on_each(torch.empty_like, result)
    for case in STRIDED.get(op.name, [laid_out(op)]):
        for far in range(1, max(len(shape) for shape in case.shapes.values())):
            inputs = {
                name: _meta(tensor.shape, _strides(tensor.shape, far), tensor.dtype)
                if tensor.is_floating_point() and tensor.dim() > far
                else tensor
                for name, tensor in op.inputs(case, torch.bfloat16, "meta").items()
            }
            if "lengths" in inputs:
                inputs["lengths"] = _meta(inputs["lengths"].shape, [STRIDE], torch.int32)

            def grad(result, far=far):
                return on_each(lambda one: _meta(one.shape, _strides(one.shape, far), one.dtype), result)

            yield f"{case.name}, dimension {-far - 1} strided", inputs, case.options, grad


def _values(inputs: dict) -> dict[str, int]:
    """What integer tensors hold: a cache is full."""
    return {"lengths_ptr": inputs["key_cache"].shape[-2]} if "lengths" in inputs else {}


# attention of one tensor has the kernels of attention
each_kernel = pytest.mark.parametrize(
    "op",
    [pytest.param(op, marks=pytest.mark.slow if op.name.endswith("qkvpacked") else ()) for op in OPS.values()],
    ids=lambda op: op.name,
)


@interpreted
@each_kernel
def test_every_offset_is_64_bits(op):
    reached: dict[tuple[str, str], int] = {}
    pointers = set()
    for name, inputs, options, grad in _variants(op):
        for launch in launches_of(op, inputs, options, grad, SM_90):
            assert launch.grid[0] < 2**31, "more programs than a grid can have"
            wrong, reach = wrong_access(launch, _values(inputs))
            assert not wrong, f"{name}: {wrong}"
            pointers |= {(launch.name, n) for n, value in launch.arguments.items() if isinstance(value, Spec)}
            for pointer, offset in reach.items():
                reached[launch.name, pointer] = max(reached.get((launch.name, pointer), 0), offset)
    near = {
        (kernel, pointer)
        for kernel, pointer in pointers
        if reached.get((kernel, pointer), 0) < 2**31
        and not BOUNDED.fullmatch(pointer.removesuffix("_ptr"))
        and (kernel, pointer.removesuffix("_ptr")) not in ONE_A_PROGRAM | ONE_ALONE
    }
    assert not near, f"no variant went past 2^31 elements for {sorted(near)}"


# ---------------------------------------------------------------- kernels with one conversion less


def _functions(module) -> str:
    """The source of the file's Triton functions."""
    source = inspect.getsource(module)
    nodes = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list)
    ]
    lines = source.splitlines()
    return "\n\n".join("\n".join(lines[node.decorator_list[0].lineno - 1 : node.end_lineno]) for node in nodes) + "\n"


WIDENED = re.compile(r"\.to\(tl\.int64\)|tl\.cast\((\w+), tl\.int64\)")
# No size needs these: a workspace has as many elements as fill the device, and a row has columns that 32 bits count
SPARE = re.compile(r"(own|columns|places) = ")


class Mutant(NamedTuple):
    """A file of kernels with one conversion left out."""

    module: ModuleType
    source: str
    line: str

    def kernels(self, folder) -> dict:
        path = folder / "mutant.py"  # a file: the interpreter reads a function's source
        path.write_text(self.source)
        names = dict(vars(self.module))
        exec(compile(self.source, path, "exec"), names)
        return names


@functools.cache
def _kernels() -> dict[str, set[tuple[str, str]]]:
    """By op: (file, name) of every kernel that it launches."""
    kernels = {}
    for op in catalogue.OPS:
        plans = [op.plan(op.inputs(case, torch.bfloat16, "meta"), case.options, SM_90) for case in op.cases + op.sizes]
        found = {launch.kernel.fn for plan in plans for launch in plan}
        kernels[op.name] = {(kernel.__module__, kernel.__name__) for kernel in found}
    return kernels


def _mutants(op) -> list[Mutant]:
    """Of the files that the op's kernels are written in, but not of kernels there that only other ops launch."""
    own = _kernels()[op.name]
    others = set().union(*_kernels().values()) - own
    mutants = []
    for name in sorted({module for module, _ in own}):
        module = importlib.import_module(name)
        source = _functions(module)
        for found in WIDENED.finditer(source):
            function = re.findall(r"^def (\w+)", source[: found.start()], re.MULTILINE)[-1]
            if (name, function) in others:
                continue
            without = source[: found.start()] + (found.group(1) or "") + source[found.end() :]
            line = without[: found.start()].count("\n")
            mutants.append(Mutant(module, without, without.splitlines()[line].strip()))
    return mutants


def _noticed(op, mutant: Mutant, folder) -> bool:
    kernels = mutant.kernels(folder)
    for _, inputs, options, grad in _variants(op):
        for launch in launches_of(op, inputs, options, grad, SM_90):
            if launch.kernel.fn.__module__ == mutant.module.__name__:
                spoiled = dataclasses.replace(launch, kernel=kernels[launch.name])
                if wrong_access(spoiled, _values(inputs))[0]:
                    return True
    return False


def _problems() -> list:
    """The default run takes the first of each op, the slow one all."""
    return [
        pytest.param(op, mutant, marks=pytest.mark.slow if place else (), id=f"{op.name}-{place}")
        for op in catalogue.OPS
        for place, mutant in enumerate(_mutants(op))
    ]


@interpreted
@pytest.mark.parametrize(("op", "mutant"), _problems())
def test_a_conversion_left_out_is_noticed(op, mutant, tmp_path):
    spare = bool(SPARE.match(mutant.line))
    assert _noticed(op, mutant, tmp_path) != spare, f"{mutant.module.__name__}: `{mutant.line}`"


@each_op
def test_every_op_has_conversions_to_leave_out(op):
    assert any(not SPARE.match(mutant.line) for mutant in _mutants(op))


# ---------------------------------------------------------------- and it runs


@pytest.mark.parametrize("name", ["layer_norm", "cross_entropy", "scaled_dot_product_attention"])
def test_views_with_rows_far_apart(name, device):
    """Rows 2^30 elements apart, in memory of which no more is touched than the rows: as packed, in the interpreter to
    the bit. On a GPU sums may be split otherwise.
    """
    op = next(op for op in catalogue.OPS if op.name == name)
    case = {
        "layer_norm": Case("far", {"input": (4, 24), "weight": (24,), "bias": (24,)}, {"normalized_shape": (24,)}),
        "cross_entropy": Case("far", {"input": (4, 24), "target": (4,)}, {}),
        "scaled_dot_product_attention": Case("far", dict.fromkeys(("query", "key", "value"), (1, 1, 4, 16)), {}),
    }[name]
    inputs = inputs_of(op, case, torch.bfloat16, device)
    grad = incoming(op, inputs, case.options)
    expected = differentiate(op.public, op, inputs, case.options, grad)
    first = op.differentiable[0]
    packed = inputs[first]
    size = packed.shape[-1]
    far = torch.empty(3 * 2**30 + size, dtype=packed.dtype, device=device)
    strides = [4 * 2**30] * (packed.dim() - 2) + [2**30, 1]
    inputs[first] = far.as_strided(packed.shape, strides).copy_(packed)
    ours = differentiate(op.public, op, inputs, case.options, grad)
    for quantity, value in expected.items():
        assert not INTERPRETED or torch.equal(bits(ours[quantity]), bits(value)), quantity
        torch.testing.assert_close(ours[quantity], value)
