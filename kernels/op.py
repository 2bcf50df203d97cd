"""What an op is made of: Spec, Launch, Case, Cost, Op; how a plan is run; and the helpers that every kernel uses.

A plan is a pure function `plan(specs, options, device) -> list[Launch]`. Whatever wants to know what a kernel
is launched with (running, ahead-of-time compilation, resource tables, launch counts, tuning) reads the plan.
"""

import collections
import contextlib
import contextvars
import functools
import numbers
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from kernels import device as devices
from kernels.device import Device
from kernels.interpreting import interpreting

if devices.HAS_TRITON:
    import triton
    import triton.language as tl
else:

    class _Absent:
        """Stands where Triton would, so that the op files import; launching is refused before it is touched."""

        def __getattr__(self, name):
            return self

        def __call__(self, *args, **kwargs):
            return self

    triton = tl = _Absent()


class Spec(NamedTuple):
    """What a plan may know of a tensor. Strides are in elements."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    aligned: bool  # the first element lies on a 16-byte boundary


@dataclass(frozen=True)
class Launch:
    """One kernel launch. `arguments` are in the kernel's order; the pointer named `x_ptr` is the tensor `x`."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Spec | int | float | None]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    @property
    def gluon(self) -> bool:
        """Whether the kernel is written in Gluon, not in Triton."""
        return getattr(self.kernel, "is_gluon", bool)()

    @property
    def scratch(self) -> bool:
        """Whether the kernel makes tensor descriptors, for which Triton asks an allocator for memory at each launch."""
        return self.constexprs.get("DESCRIPTORS", False) or "WARPGROUPS" in self.constexprs


Specs = Mapping[str, Spec | None]
Plan = Callable[[Specs, Mapping[str, Any], Device], list[Launch]]

_pretended: Device | None = None  # plan for this device instead of the tensors' own
_planned: list[Launch] | None = None  # collect launches here instead of launching
_counters: list[collections.Counter] = []
_nothing = contextlib.nullcontext()


@contextlib.contextmanager
def plan_for(device: Device) -> Iterator[None]:
    """Run with the tiles of another device: the interpreter can execute what a GPU would."""
    global _pretended
    before, _pretended = _pretended, device
    try:
        yield
    finally:
        _pretended = before


@contextlib.contextmanager
def plan_only(device: Device) -> Iterator[list[Launch]]:
    """Collect the launches for `device` and launch nothing; tensors may be on the meta device."""
    global _planned
    before, _planned = _planned, []
    try:
        with plan_for(device):
            yield _planned
    finally:
        _planned = before


@contextlib.contextmanager
def count_launches() -> Iterator[collections.Counter]:
    """Count launches by kernel name for as long as the context lasts."""
    counter = collections.Counter()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.remove(counter)


class _Ready:
    """A planned launch and, once it has run on a GPU, its compiled kernel, started without asking Triton again.

    Triton finds a compiled kernel by the types, alignment and divisibility of all arguments, at every launch anew. All
    of that is in the Specs and options that the launch was planned from.
    """

    def __init__(self, launch: Launch):
        self.launch = launch
        arguments = enumerate(launch.arguments.items())
        self._tensors = [(i, name.removesuffix("_ptr")) for i, (name, value) in arguments if isinstance(value, Spec)]
        self._values = [None if isinstance(value, Spec) else value for value in launch.arguments.values()]
        self._constants: list = []
        self._compiled: dict[int | None, Callable] = {}

    def start(self, tensors: Mapping[str, torch.Tensor | None], device: torch.device) -> None:
        """Launch on the tensors, which lie on `device`, the current GPU if it is one."""
        arguments = self._values.copy()
        for place, name in self._tensors:
            arguments[place] = tensors[name]
        index = device.index
        if index in self._compiled:
            self._compiled[index](*arguments, *self._constants)
            return
        launch = self.launch
        if devices.INTERPRETED and launch.gluon:
            raise RuntimeError(
                f"{launch.name} is written in Gluon, which Triton's interpreter does not run: unset TRITON_INTERPRET "
                "where there is a GPU, or run it in the emulator (docs/profiling.md)"
            )
        with interpreting() if devices.INTERPRETED else _nothing:
            compiled = launch.kernel[launch.grid](
                *arguments, **launch.constexprs, num_warps=launch.num_warps, num_stages=launch.num_stages
            )
        if not devices.INTERPRETED:
            self._constants = [launch.constexprs[name] for name in launch.kernel.arg_names[len(arguments) :]]
            self._compiled[index] = compiled[(*launch.grid, 1, 1)[:3]]


class _ReadyWithScratch(_Ready):
    """One that Triton needs global memory for, which comes from PyTorch.

    Whom Triton asks is a context variable, set in a copy of the context: the caller's own allocator stays.
    """

    def start(self, tensors: Mapping[str, torch.Tensor | None], device: torch.device) -> None:
        contextvars.copy_context().run(self._start, tensors, device)

    def _start(self, tensors: Mapping[str, torch.Tensor | None], device: torch.device) -> None:
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.uint8, device=device))
        super().start(tensors, device)


def _ready(launch: Launch) -> _Ready:
    return _ReadyWithScratch(launch) if launch.scratch and not devices.INTERPRETED else _Ready(launch)


@functools.lru_cache(maxsize=4096)
def _launches(plan: Plan, names: tuple, specs: tuple, options: tuple, device: Device) -> list[_Ready]:
    known = {
        name: None if spec is None else Spec(tuple(spec[0]), *spec[1:]) for name, spec in zip(names, specs, strict=True)
    }
    return [_ready(launch) for launch in plan(known, dict(options), device) if 0 not in launch.grid]


def run(plan: Plan, tensors: Mapping[str, torch.Tensor | None], **options: Any) -> None:
    """Launch what `plan` makes of the tensors. They must lie on one device; None is an absent tensor."""
    first = next(iter(tensors.values()))
    specs = tuple(  # Specs without their names, which take longer to make than all the rest
        [
            None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() % 16 == 0)
            for tensor in tensors.values()
        ]
    )
    launches = _launches(plan, tuple(tensors), specs, tuple(options.items()), facts_of(first))
    if _planned is not None:
        _planned.extend(ready.launch for ready in launches)
        return
    device = first.device
    if refusal := devices.why_not(device):
        raise RuntimeError(refusal)
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else _nothing:
        for ready in launches:
            ready.start(tensors, device)
            for counter in _counters:
                counter[ready.launch.name] += 1


def facts_of(tensor: torch.Tensor) -> Device:
    """The device that work on `tensor` is planned for."""
    return _pretended or devices.facts(tensor.device)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast is set to for `device`; None where it is off, or unknown as for meta tensors."""
    if device.type in ("cpu", "cuda") and torch.is_autocast_enabled(device.type):  # asking PyTorch breaks 2.11's graphs
        return torch.get_autocast_dtype(device.type)
    return None


_LIBRARY = torch.library.Library("kernels", "FRAGMENT")
IMPLEMENTATIONS: dict[str, Callable] = {}  # what the ops run, by name


def register(
    name: str,
    function: Callable,
    fake: Callable,
    gradients: Callable | None = None,
    save: Callable | None = None,
    changes: tuple[str, ...] = (),
) -> torch._ops.OpOverload:
    """`function`, which overwrites nothing but `changes` and returns new tensors, as the op torch.ops.kernels.`name`.

    The schema is read off its annotations. `fake` allocates what it returns, strides too. `save(ctx, inputs, outputs)`
    keeps what `gradients(ctx, *grads)` needs for one gradient or None an input; an output without a gradient has
    None there. Without `gradients`, differentiating raises. This is torch.library.custom_op with half its time a call:
    nothing looks for aliases in the results (opcheck does, in the tests) or fills in defaults, as there are none.
    """
    schema = torch.library.infer_schema(function, mutates_args=changes)
    _LIBRARY.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"kernels::{name}", fake, lib=_LIBRARY)
    op = getattr(torch.ops.kernels, name).default
    _LIBRARY.impl(name, _autograd(op, function, gradients, save), "Autograd", with_keyset=True)
    IMPLEMENTATIONS[name] = function
    return op


def _autograd(
    op: torch._ops.OpOverload, function: Callable, gradients: Callable | None, save: Callable | None
) -> Callable:
    """The autograd kernel of `op`: runs it below autograd, and records the formula if an input requires a gradient."""

    def below(keys, *inputs):
        with torch._C._AutoDispatchBelowADInplaceOrView():  # there views are tracked: a result would be one
            if keys.highestPriorityTypeId() in _PLAIN:  # no mode, no subclass: the dispatcher would call just this
                return function(*inputs)
            return op.redispatch(keys, *inputs)

    class Gradients(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs_and_keys):
            *inputs, keys = inputs_and_keys
            outputs = below(keys, *inputs)
            # autograd would make zeros for outputs without a gradient, saved statistics too, at a launch each
            ctx.set_materialize_grads(False)
            if save is not None:
                save(ctx, inputs, outputs)
            return outputs

        @staticmethod
        def backward(ctx, *grads):
            if gradients is None:
                raise NotImplementedError(f"{op.name()} has no derivative: second derivatives are not implemented")
            if all(grad is None for grad in grads):  # what follows may have none to give
                return (None,) * len(ctx.needs_input_grad)
            made = gradients(ctx, *grads)
            return (*made, None) if isinstance(made, tuple) else (made, None)

    Gradients.__name__ = Gradients.__qualname__ = f"{op._opname}_gradients"

    def kernel(keys, *inputs):
        keys = keys & _BELOW_AUTOGRAD
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            return Gradients.apply(*inputs, keys)
        return below(keys, *inputs)

    return kernel


_KEY = torch._C.DispatchKey
_BELOW_AUTOGRAD = torch._C._after_autograd_keyset - torch._C.DispatchKeySet(_KEY.ADInplaceOrView)
_PLAIN = (_KEY.CPU, _KEY.CUDA)


DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CHECK_VALUES = devices.INTERPRETED or devices.DEBUG  # of targets and lengths, which has the host wait for the device


def check_tensors(
    op: str,
    tensors: Mapping[str, torch.Tensor | None],
    *,
    optional: tuple[str, ...] = (),
    integers: tuple[str, ...] = (),
) -> None:
    """The tensor arguments by name. Raises TypeError for what is no tensor, as PyTorch's parser does (None may stand
    for the `optional`), RuntimeError for one that is not on the first one's device, and NotImplementedError for dtypes
    other than DTYPES; those of the `integers` are the op's to check.
    """
    first = None
    for name, tensor in tensors.items():
        if tensor is None and name in optional:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{op}: {name} must be a Tensor, not {type(tensor).__name__}")
        if tensor.dtype not in DTYPES and name not in integers:
            raise NotImplementedError(f"{op}: {name} is {tensor.dtype}; the kernel has float32, float16, bfloat16")
        if first is None:
            first, device = name, tensor.device
        elif tensor.device != device:
            raise RuntimeError(f"{op}: {name} is on {tensor.device}, {first} on {device}")


def refuse_transforms(op: str, *tensors: torch.Tensor | None) -> None:
    """Raise NotImplementedError inside torch.func's transforms and for tensors with a forward-mode tangent.

    PyTorch's custom ops have no formula for these: grad fails with a message about something else, a tangent
    would be dropped without a word, and vmap launches every sample by itself.
    """
    if torch.compiler.is_dynamo_compiling():  # transforms are traced away there, or refused by the compiler
        return
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise NotImplementedError(
            f"{op}: the transforms of torch.func (vmap, grad, vjp, jvp, jacrev, ...) are not implemented; dimensions "
            "in front are a batch already, and tensor.backward() and torch.autograd.grad differentiate"
        )
    if torch.autograd.forward_ad._current_level >= 0:
        unpack = torch.autograd.forward_ad.unpack_dual
        if any(tensor is not None and unpack(tensor).tangent is not None for tensor in tensors):
            raise NotImplementedError(f"{op}: forward-mode derivatives are not implemented; reverse mode is")


def check_number(op: str, name: str, value: Any, *, whole: bool = False, finite: bool = False) -> None:
    """Raise TypeError for what is no number, or with `whole` no integer (a bool is none), as PyTorch's parser does.

    With `finite`, ValueError for NaN and what float32, in which kernels have their numbers, makes infinite.
    """
    if type(value) is not int and (type(value) is not float or whole):
        kinds = (numbers.Integral, torch.SymInt) if whole else (numbers.Real, torch.SymInt, torch.SymFloat)
        if not isinstance(value, kinds) or (whole and isinstance(value, bool)):
            kind = "an integer" if whole else "a number"
            raise TypeError(f"{op}: {name} must be {kind}, not {type(value).__name__}")
    if finite and not abs(value) <= _LARGEST:
        raise ValueError(f"{op}: {name} must be finite in float32, got {value}")


_LARGEST = torch.finfo(torch.float32).max


def rows_of(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` if its last dimension is contiguous, as every kernel here walks it, else a contiguous copy."""
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def pointers(specs: Specs, *names: str) -> dict[str, Spec | None]:
    """The pointer arguments of a Launch for the tensors of these names."""
    return {f"{name}_ptr": specs[name] for name in names}


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


class Case(NamedTuple):
    """One problem for an op: shapes by argument name, options to call it with, dtypes that are not the others'."""

    name: str
    shapes: dict[str, tuple[int, ...]]
    options: dict[str, Any] = {}  # noqa: RUF012 - never written to
    dtypes: dict[str, torch.dtype] = {}  # noqa: RUF012


class Cost(NamedTuple):
    """Floating-point operations, and the fewest bytes that must move through device memory."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Op:
    """An op's entry in the catalogue; tests, compilation, benchmarks and tables loop over these."""

    name: str
    public: Callable
    reference: Callable  # the same in plain arithmetic
    torch: Callable  # PyTorch's own function of that name, or what it takes of PyTorch's to do the same
    plan: Callable[[dict, dict, Device], list[Launch]]  # inputs (meta will do), options -> forward and backward
    cost: Callable[[dict, dict], tuple[Cost, Cost | None]]  # inputs, options -> forward, backward if there is one
    cases: tuple[Case, ...]  # small and awkward: parity
    sizes: tuple[Case, ...]  # real: compilation, resources, benchmarks
    differentiable: tuple[str, ...]  # none: the op has no backward
    draw: Callable[[str, tuple[int, ...], Case, torch.Generator], torch.Tensor | None] = field(default=lambda *_: None)
    outputs: tuple[str, ...] = ("output",)  # of several, a tuple is returned
    both: Callable[[dict, dict], Cost] | None = None  # as cost: the two passes, where together they need less
    replaces: str = ""  # for the README, where `torch` is not one function of torch.nn.functional

    def inputs(self, case: Case, dtype: torch.dtype, device: str | torch.device, seed: int = 0) -> dict:
        """The case's tensors on `device` ("meta" will do): from N(0, 1), or as `draw` has it; floats in `dtype`."""
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for name, shape in case.shapes.items():
            meta = torch.device(device).type == "meta"
            drawn = (1,) * len(shape) if meta else shape  # on the meta device for its dtype only
            tensor = self.draw(name, drawn, case, generator)
            if tensor is None:
                tensor = torch.randn(drawn, generator=generator, dtype=torch.float64)
            if tensor.is_floating_point():
                tensor = tensor.to(case.dtypes.get(name, dtype))
            tensors[name] = torch.empty(shape, dtype=tensor.dtype, device=device) if meta else tensor.to(device)
        return tensors


INTERPRETED = tl.constexpr(devices.INTERPRETED)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x as `dtype`, rounded to nearest even. Triton's interpreter by itself truncates fp32 to bf16."""
    if INTERPRETED and dtype == tl.bfloat16:
        x = x.to(tl.float32)
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def dot(a, b, acc, precision: tl.constexpr):
    """acc + a @ b with an fp32 sum. Triton's interpreter by itself multiplies the bit patterns of bf16."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=precision)


LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x):
    """e to the power of x (fp32), zero below 2**-126; tl.exp goes on to 2**-149, for three instructions more."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def fma(a, b, c):
    """a * b + c rounded once, as GPUs have it. Triton's interpreter by itself rounds the product too."""
    if INTERPRETED:
        return (a.to(tl.float64) * b + c).to(tl.float32)
    return tl.fma(a, b, c)
