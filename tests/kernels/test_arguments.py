"""What is no tensor, or one of a dtype or on a device that the kernels do not take, is told by name: of every op."""

import inspect

import pytest
import torch

from kernels import catalogue


def _of_all_cases(op) -> dict:
    """Every tensor that the op takes, in its order, from the first case that has it: their shapes may not fit."""
    inputs = {}
    for case in reversed(op.cases):
        inputs |= op.inputs(case, torch.float32, "meta")
    return {name: inputs[name] for name in inspect.signature(op.public).parameters if name in inputs}


TENSORS = [(op, name) for op in catalogue.OPS for name in _of_all_cases(op)]
each_tensor = pytest.mark.parametrize(("op", "name"), TENSORS, ids=[f"{op.name}-{name}" for op, name in TENSORS])


def _refused(op, error, says: str, **changed) -> None:
    with pytest.raises(error, match=f"^{op.name}: {says}"):
        op.public(**(_of_all_cases(op) | changed), **op.cases[0].options)


@each_tensor
def test_what_is_no_tensor_is_a_type_error(op, name):
    """As PyTorch's parser has it, and None only for what has it as its default."""
    wrong = [[1.0], 1.0, "a"]
    if inspect.signature(op.public).parameters[name].default is inspect.Parameter.empty:
        wrong.append(None)
    for value in wrong:
        _refused(op, TypeError, f"{name} must be a Tensor, not {type(value).__name__}", **{name: value})


@each_tensor
def test_a_tensor_elsewhere_is_told(op, name):
    first, *others = inputs = _of_all_cases(op)
    if others:
        says = f"{name} is on cpu, {first} on meta" if name != first else f"{others[0]} is on meta, {first} on cpu"
        _refused(op, RuntimeError, says, **{name: torch.empty_like(inputs[name], device="cpu")})


@each_tensor
def test_a_dtype_that_the_kernels_lack_is_told(op, name):
    tensor = _of_all_cases(op)[name]
    if not tensor.is_floating_point():
        _refused(op, RuntimeError, f"{name} must be .*int64, got torch.int16", **{name: tensor.to(torch.int16)})
        return
    for dtype in (torch.float64, torch.int64, torch.complex64):
        says = f"{name} is {dtype}; the kernel has float32, float16, bfloat16"
        _refused(op, NotImplementedError, says, **{name: tensor.to(dtype)})
