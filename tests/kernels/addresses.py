"""The addresses that a launch touches, found in Triton's interpreter without any memory behind them.

Loads give zeros and stores go nowhere, so tensors can be of any size. A few programs are run, and of a long loop a few
trips. `wide` computes every integer in 64 bits: addresses that differ then were computed in too few.
"""

import builtins
import collections
import contextlib
import inspect
from collections.abc import Iterator
from unittest import mock

import numpy
import torch
from parity import as_tuple
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.interpreting import interpreting
from kernels.op import IMPLEMENTATIONS, Launch, Spec, plan_only

APART = 1 << 50  # bytes between tensors
TRIPS = 2  # of a loop: the first and the last


class _Address:
    """Stands for a tensor of which there is nothing but its place."""

    def __init__(self, spec: Spec, place: int):
        self.dtype, self._place = spec.dtype, place

    def data_ptr(self) -> int:
        return self._place


def _span(spec: Spec) -> int:
    """Elements from the first to the last."""
    return sum((size - 1) * stride for size, stride in zip(spec.shape, spec.stride, strict=True))


@contextlib.contextmanager
def _interpreter(kernel, accesses: list, values: dict, wide: bool) -> Iterator:
    """Loads and stores note their addresses; integers are 32 bits as compiled, or 64."""
    from triton import language as tl
    from triton.runtime import interpreter

    builder, kind = interpreter.interpreter_builder, type(interpreter.interpreter_builder)
    integer = tl.int64 if wide else tl.int32
    numbers = numpy.int64 if wide else numpy.int32

    def note(direction, pointers, mask):
        accesses.append((direction, numpy.array(pointers.data[mask.data.astype(bool)], dtype=numpy.uint64)))

    def load(self, pointers, mask, other, *_):
        note("load", pointers, mask)
        element = pointers.get_element_ty()
        first = int(pointers.data.flat[0]) // APART
        loaded = numpy.full(pointers.data.shape, values.get(first, 0), interpreter._get_np_dtype(element))
        return interpreter.TensorHandle(loaded, element)

    def store(self, pointers, value, mask, *_):
        note("store", pointers, mask)

    def handle(number):
        return tl.tensor(interpreter.TensorHandle(numpy.array([number], numbers), integer), integer)

    def argument(value):
        if isinstance(value, bool) or not isinstance(value, int) or (not wide and abs(value) >= 2**31):
            return interpreter._implicit_cvt(value)
        return handle(value)

    def trips(*bounds):
        """As compiled: a loop's variable is as wide as its widest bound."""
        long = wide or any(isinstance(bound, tl.tensor) and bound.dtype.int_bitwidth == 64 for bound in bounds)
        whole = builtins.range(*(int(bound) for bound in bounds))
        kind, number = (tl.int64, numpy.int64) if long else (tl.int32, numpy.int32)
        half = TRIPS // 2
        for trip in whole if len(whole) <= TRIPS else [*whole[:half], *whole[-half:]]:
            yield tl.tensor(interpreter.TensorHandle(numpy.array([trip], number), kind), kind)

    original_core = interpreter._patch_lang_core

    def core(lang, scope):  # called for every helper anew
        original_core(lang, scope)
        scope.set_attr(lang, "range", lambda *bounds, **_: trips(*bounds))

    def program(place):
        return lambda self, axis: interpreter.TensorHandle(numpy.array([getattr(self, place)[axis]], numbers), integer)

    replaced = {"create_masked_load": load, "create_masked_store": store}
    if wide:
        original = kind.create_make_range
        replaced |= {
            "create_get_program_id": program("grid_idx"),
            "create_get_num_programs": program("grid_dim"),
            "create_make_range": lambda self, ret_ty, start, stop: interpreter.TensorHandle(
                original(self, ret_ty, start, stop).data.astype(numpy.int64), tl.int64
            ),
        }
    function = kernel.rewrite()
    helpers = [value.rewrite() for value in list(kernel.fn.__globals__.values()) if isinstance(value, type(kernel))]
    modules = {id(f.__globals__): f.__globals__ for f in (function, kernel.fn, *helpers)}.values()
    with contextlib.ExitStack() as stack:
        for name, method in replaced.items():
            stack.enter_context(mock.patch.object(kind, name, method))
        for names in modules:
            stack.enter_context(mock.patch.dict(names, {"range": trips}))
        stack.enter_context(interpreting())
        stack.enter_context(mock.patch.object(interpreter, "_patch_lang_core", core))
        stack.callback(interpreter._patch_lang(kernel.fn).restore)
        yield function, argument, builder


def touched(launch: Launch, programs: list[int], wide: bool, values: dict[str, int] | None = None) -> list:
    """[(load or store, addresses)] of these programs, in order."""
    places = {name: (place + 1) * APART for place, name in enumerate(launch.arguments)}
    known = {places[name] // APART: value for name, value in (values or {}).items() if name in places}
    accesses: list = []
    with _interpreter(launch.kernel, accesses, known, wide) as (function, argument, builder):
        arguments = {
            name: argument(_Address(value, places[name]) if isinstance(value, Spec) else value)
            for name, value in launch.arguments.items()
        }
        bound = inspect.getcallargs(function, *arguments.values(), **launch.constexprs)
        builder.set_grid_dim(launch.grid[0], 1, 1)
        for program in programs:
            builder.set_grid_idx(program, 0, 0)
            function(**bound)
    return accesses


def some_programs(launch: Launch) -> list[int]:
    """The first, the last, and some between."""
    count = launch.grid[0]
    return sorted({0, count // 3, count * 2 // 3, max(0, count - 2), count - 1})


def farthest(launch: Launch, accesses: list) -> dict[str, int]:
    """By pointer: how many elements beyond its first the kernel went."""
    names = list(launch.arguments)
    found = collections.Counter()
    for _, addresses in accesses:  # each of one pointer
        if len(addresses):
            name = names[int(addresses[0]) // APART - 1]
            argument = launch.arguments[name]
            itemsize = argument.dtype.itemsize if isinstance(argument, Spec) else 1
            found[name] = max(found[name], int(addresses.max()) % APART // itemsize)
    return dict(found)


def wrong_access(launch: Launch, values: dict[str, int] | None = None) -> tuple[str, dict[str, int]]:
    """(what is wrong with the launch's addresses, how far each pointer went)."""
    programs = some_programs(launch)
    exact = touched(launch, programs, wide=True, values=values)
    ours = touched(launch, programs, wide=False, values=values)
    reach = farthest(launch, exact)
    for name, offset in reach.items():
        if not isinstance(launch.arguments[name], Spec):
            return f"{launch.name}: an address of no tensor, where {name} would be", reach
        if offset > _span(launch.arguments[name]):
            return f"{launch.name}: {name} goes {offset} elements far, of {_span(launch.arguments[name])}", reach
    for place, ((direction, one), (_, other)) in enumerate(zip(exact, ours, strict=True)):
        if not numpy.array_equal(one, other):
            name = list(launch.arguments)[int(one[0] // APART) - 1] if len(one) else "nothing"
            return f"{launch.name}: access {place}, a {direction} of {name}, overflows", reach
    return "", reach


# ---------------------------------------------------------------- from a call to its launches


class _Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "kernels":
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


def launches_of(op, inputs: dict[str, torch.Tensor], options: dict, grad, device) -> list[Launch]:
    """What a forward and backward pass launches on meta tensors of these shapes and strides, on `device`."""
    leaves = {name: tensor.requires_grad_(name in op.differentiable) for name, tensor in inputs.items()}
    with _Calls() as noted:
        result = op.public(**leaves, **options)
        if op.differentiable:
            torch.autograd.backward(as_tuple(result), as_tuple(grad(result)))
    assert noted.calls, "no custom op was called"
    with plan_only(device) as launches, torch.no_grad():  # as custom ops are run: products with out= need it
        for function, args in noted.calls:
            IMPLEMENTATIONS[function._opname](*args)
    return launches
