"""Who computes an op: ours, PyTorch in its several ways, and the peers that are installed.

A provider is a function from a Problem to what is called with the op's inputs and options, by name. It raises
Unavailable, with the reason, where it is not installed or cannot do the problem. What is imported is imported there, so
that nothing here needs a peer.
"""

import functools
import importlib
import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels.device
from benchmarks.problems import SEEDS, Call, Problem
from kernels.op import Op
from minigpt.errors import UserError

ATTENTION = "scaled_dot_product_attention"
QKVPACKED = "scaled_dot_product_attention_qkvpacked"
DECODE = "decode_attention"
LARGEST_SCORES = 2 << 30  # bytes: with so many plain arithmetic crowds out whoever is timed beside it
NO_BACKEND = ("No available kernel", "No viable backend")  # what PyTorch says where a backend cannot do it


class Unavailable(Exception):
    """A provider that is not here, or not for this problem: one line that says why."""


@dataclass(frozen=True)
class Provider:
    """A way to compute ops; `ops` are those it has, none for all of them."""

    name: str
    build: Callable[[Problem], Call]
    ops: tuple[str, ...]
    gpu_only: bool
    overwrites: bool = False
    wrapped: bool = False

    def make(self, problem: Problem) -> Call:
        """What computes `problem`. Raises Unavailable with the reason."""
        if self.ops and problem.op.name not in self.ops:
            raise Unavailable(f"{self.name} has no {problem.op.name}")
        if self.gpu_only and problem.device.type != "cuda":
            raise Unavailable("needs a CUDA GPU")
        return self.build(problem)


PROVIDERS: dict[str, Provider] = {}


def provider(name: str, *ops: str, gpu_only: bool = False, overwrites: bool = False, wrapped: bool = False) -> Callable:
    """Enter the decorated function in PROVIDERS.

    `overwrites`: its backward destroys inputs, as some peers' does. `wrapped`: a call does things on the host that
    only this comparison needs, so that its host time is nobody's.
    """

    def enter(build: Callable[[Problem], Call]) -> Callable[[Problem], Call]:
        PROVIDERS[name] = Provider(name, build, ops, gpu_only, overwrites, wrapped)
        return build

    return enter


def chosen(names: list[str]) -> list[Provider]:
    """Providers by name; all without one. Raises UserError for an unknown name, listing the right ones."""
    for name in names:
        if name not in PROVIDERS:
            raise UserError(f"unknown provider {name!r}: choose from {', '.join(PROVIDERS)}")
    return [PROVIDERS[name] for name in names] or list(PROVIDERS.values())


def fit_for(op: Op, who: list[Provider], by_name: bool) -> list[Provider]:
    """Those of `who` that have the op; asked for `by_name`, the others too, whose rows will say that they have not."""
    return [entry for entry in who if by_name or not entry.ops or op.name in entry.ops]


def _imported(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        top = module.split(".")[0]
        missing = isinstance(error, ModuleNotFoundError) and error.name == top
        raise Unavailable("not installed" if missing else f"{module} cannot be imported: {error}") from None
    except AttributeError:
        raise Unavailable(f"this version of {module} has no {name}") from None


def _refuse(problem: Problem, *options: str) -> None:
    """Raise Unavailable where the problem sets one of the options that a provider lacks."""
    for option in options:
        if problem.case.options.get(option):
            raise Unavailable(f"it has no {option}")


def _unweighted(problem: Problem) -> None:
    if "weight" in problem.case.shapes:
        raise Unavailable("it has no class weights")


def _half_only(problem: Problem) -> None:
    if problem.dtype == torch.float32:
        raise Unavailable("it computes in fp16 and bf16 only")


# ---------------------------------------------------------------- ours and PyTorch's


@provider("triton")
def _ours(problem: Problem) -> Call:
    refusal = kernels.device.why_not(problem.device)
    if refusal:
        raise Unavailable(refusal)
    return problem.op.public


@provider("eager")
def _eager(problem: Problem) -> Call:
    _small_scores(problem)
    return problem.op.reference


def _small_scores(problem: Problem) -> None:
    if problem.op.name == ATTENTION:
        size = math.prod(problem.case.shapes["query"][:-1]) * problem.case.shapes["key"][-2] * problem.dtype.itemsize
        if size >= LARGEST_SCORES:
            raise Unavailable(f"its scores would take {size / 1e9:.0f} GB")


@provider("torch")
def _torch(problem: Problem) -> Call:
    if problem.op.torch is None:
        raise Unavailable(f"this PyTorch has no {problem.op.name}")
    return _sdpa(problem) if problem.op.name in (ATTENTION, DECODE) else problem.op.torch


def _sdpa(problem: Problem) -> Call:
    """PyTorch's attention with no mask where it needs none, and one made beforehand for a shifted diagonal."""
    if problem.op.name == DECODE:
        return _over_full_caches if _full(problem) else problem.op.torch
    offset = problem.case.options.get("query_offset", 0)
    if not (offset and problem.case.options.get("is_causal")):
        return problem.op.torch
    places = (problem.case.shapes["query"][-2], problem.case.shapes["key"][-2])
    mask = torch.ones(places, dtype=torch.bool, device=problem.device).tril(offset)

    def attention(query, key, value, is_causal, query_offset, **options):
        return problem.op.torch(query, key, value, attn_mask=mask, **options)

    return attention


def _over_full_caches(query, key_cache, value_cache, lengths, **options):
    return torch.nn.functional.scaled_dot_product_attention(query, key_cache, value_cache, **options)


def _full(problem: Problem) -> bool:
    """Whether the caches of decode_attention are full, whatever seed their lengths are drawn with."""
    shape, slots = problem.case.shapes["lengths"], problem.case.shapes["key_cache"][2]
    drawn = (problem.op.draw("lengths", shape, problem.case, torch.Generator().manual_seed(seed)) for seed in SEEDS)
    return all(bool((lengths == slots).all()) for lengths in drawn)


def _by_one_backend(problem: Problem, backend: SDPBackend) -> Call:
    _half_only(problem)
    _refuse(problem, "query_offset")
    if problem.op.name == DECODE and not _full(problem):
        raise Unavailable("it has no mask of lengths")
    attention = _sdpa(problem)

    def restricted(**arguments):
        with sdpa_kernel(backend):
            try:
                return attention(**arguments)
            except RuntimeError as error:
                if str(error).startswith(NO_BACKEND):
                    raise NotImplementedError(str(error)) from None
                raise

    return restricted


@provider("torch-flash", ATTENTION, DECODE, gpu_only=True, wrapped=True)
def _torch_flash(problem: Problem) -> Call:
    return _by_one_backend(problem, SDPBackend.FLASH_ATTENTION)


@provider("torch-cudnn", ATTENTION, DECODE, gpu_only=True, wrapped=True)
def _torch_cudnn(problem: Problem) -> Call:
    return _by_one_backend(problem, SDPBackend.CUDNN_ATTENTION)


@provider("torch-chunked", "linear_cross_entropy")
def _torch_chunked(problem: Problem) -> Call:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Unavailable("this version of torch has no chunks")
    _refuse(problem, "label_smoothing")  # with which it would not be chunked
    options = torch.nn.LinearCrossEntropyOptions(allow_retain_graph=True)  # backward alone is timed with its graph kept
    return functools.partial(problem.op.torch, options=options)


def _compiled(function: Callable) -> Callable:
    functorch = importlib.import_module("torch._functorch.config")  # which torch does not import by itself
    functorch.donated_buffer = False  # backward alone is timed with its graph kept
    return torch.compile(function, dynamic=False)


def forget_compilations() -> None:
    """Make room for a new problem: the compilations of one after another would reach dynamo's limit."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@provider("compile")
def _compile(problem: Problem) -> Call:
    """Of what people compile: PyTorch's function where the compiler makes kernels of it, else the plain arithmetic."""
    if problem.op.name in ("layer_norm", "add_layer_norm", "cross_entropy"):
        return _compiled(problem.op.torch)
    _small_scores(problem)
    return _compiled(problem.op.reference)


# ---------------------------------------------------------------- peers


@provider("flex", ATTENTION, gpu_only=True)
def _flex(problem: Problem) -> Call:
    _refuse(problem, "dropout_p")
    flex_attention = _imported("torch.nn.attention.flex_attention", "flex_attention")
    create_block_mask = _imported("torch.nn.attention.flex_attention", "create_block_mask")
    options = problem.case.options
    mask, offset = None, options.get("query_offset", 0)
    if options.get("is_causal"):
        places = (problem.case.shapes["query"][-2], problem.case.shapes["key"][-2])
        mask = create_block_mask(
            lambda batch, head, query, key: key <= query + offset, None, None, *places, device=problem.device
        )
    compiled = _compiled(flex_attention)
    more = {"block_mask": mask, "scale": options.get("scale"), "enable_gqa": options.get("enable_gqa", False)}
    return lambda query, key, value, **_: compiled(query, key, value, **more)


@provider("flash_attn", ATTENTION, QKVPACKED, gpu_only=True)
def _flash_attn(problem: Problem) -> Call:
    _half_only(problem)
    if problem.op.name == QKVPACKED:
        packed = _imported("flash_attn", "flash_attn_qkvpacked_func")
        return lambda qkv, dropout_p=0.0, is_causal=False, scale=None: packed(qkv, dropout_p, scale, is_causal)
    function = _imported("flash_attn", "flash_attn_func")
    _refuse(problem, "query_offset")
    options, shapes = problem.case.options, problem.case.shapes
    if options.get("is_causal") and shapes["query"][-2] != shapes["key"][-2]:
        raise Unavailable("its causal mask starts at the other corner where the lengths differ")
    more = {"dropout_p": options.get("dropout_p", 0.0), "softmax_scale": options.get("scale")}
    more["causal"] = options.get("is_causal", False)

    def attention(query, key, value, **_):  # it takes (B, T, H, D)
        return function(*(tensor.transpose(1, 2) for tensor in (query, key, value)), **more).transpose(1, 2)

    return attention


@provider("liger", "layer_norm", "cross_entropy", "linear_cross_entropy", gpu_only=True, overwrites=True)
def _liger(problem: Problem) -> Call:
    if problem.op.name == "layer_norm":
        norm = _imported("liger_kernel.ops.layer_norm", "LigerLayerNormFunction")
        if any(name not in problem.case.shapes for name in ("weight", "bias")):
            raise Unavailable("it needs a weight and a bias")
        if len(problem.case.options["normalized_shape"]) != 1:
            raise Unavailable("it normalizes one dimension only")
        return lambda input, normalized_shape, weight, bias, eps=1e-5: norm.apply(input, weight, bias, eps)
    if problem.op.name == "cross_entropy":
        return _imported("liger_kernel.transformers.functional", "liger_cross_entropy")
    function = _imported("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")
    _unweighted(problem)
    return lambda input, linear_weight, target, *, linear_bias=None, **options: function(
        input, linear_weight, target, linear_bias, **options
    )


@provider("cce", "linear_cross_entropy", gpu_only=True)
def _cce(problem: Problem) -> Call:
    function = _imported("cut_cross_entropy", "linear_cross_entropy")
    _half_only(problem)
    _refuse(problem, "label_smoothing")
    _unweighted(problem)
    if "linear_bias" not in problem.case.shapes:
        return lambda input, linear_weight, target, **options: function(input, linear_weight, target, **options)
    if "bias" not in inspect.signature(function).parameters:
        raise Unavailable("this version of cut_cross_entropy has no bias")
    return lambda input, linear_weight, target, linear_bias, **options: function(
        input, linear_weight, target, bias=linear_bias, **options
    )


@provider("quack", "cross_entropy", gpu_only=True)
def _quack(problem: Problem) -> Call:
    function = _imported("quack.cross_entropy", "cross_entropy")
    _refuse(problem, "label_smoothing")
    _unweighted(problem)
    return functools.partial(function, **({} if "reduction" in problem.case.options else {"reduction": "mean"}))
