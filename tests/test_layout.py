"""The shape of the house: who imports whom, and what an op's entry promises."""

import ast
import inspect
import sys
from pathlib import Path

import pytest
import torch

import kernels
from kernels import catalogue, reference
from kernels.device import INTERPRETER, TARGETS

ROOT = Path(__file__).resolve().parent.parent
OURS = {"kernels", "minigpt", "benchmarks", "profiling", "tests", "train", "generate"}
MAY_IMPORT = {
    "kernels": {"kernels"},
    "minigpt": {"kernels", "minigpt"},
    "benchmarks": {"kernels", "minigpt", "benchmarks", "profiling"},
    "profiling": {"kernels", "minigpt", "profiling"},
}
each_op = pytest.mark.parametrize("op", catalogue.OPS, ids=lambda op: op.name)


def _imported(path: Path) -> set[str]:
    """The top-level packages that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(), path)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # a relative import stays in its package
            found |= {node.module.split(".")[0]} if node.level == 0 else set()
    return found


def _files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_go_one_way(package):
    for path in _files(package):
        wrong = (_imported(path) & OURS) - MAY_IMPORT[package]
        assert not wrong, f"{path.relative_to(ROOT)} imports {', '.join(sorted(wrong))}"


def test_kernels_needs_torch_triton_and_numpy_only():
    for path in _files("kernels"):
        others = _imported(path) - set(sys.stdlib_module_names) - {"kernels", "torch", "triton", "numpy"}
        assert not others, f"{path.name} imports {', '.join(sorted(others))}"


def test_the_rule_sees_an_import_that_is_hidden(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        "def f():\n    if True:\n        from minigpt.model import GPT\n        import benchmarks.timing as t\n"
    )
    assert _imported(path) == {"minigpt", "benchmarks"}


@each_op
def test_an_ops_function_is_public(op):
    assert op.name in kernels.__all__ and getattr(kernels, op.name) is op.public
    assert getattr(reference, op.name) is op.reference
    # what PyTorch has no function for says what it replaces; linear_cross_entropy came with PyTorch 2.13
    theirs = getattr(torch.nn.functional, op.name, op.torch if op.name == "linear_cross_entropy" else None)
    assert bool(op.replaces) != (theirs is op.torch)
    assert op.public.__doc__ and op.reference.__doc__


def _parameters(function) -> list[tuple]:
    return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]


# PyTorch's is written in C++ and has no signature to read
ATTENTION = [
    ("query", inspect.Parameter.empty), ("key", inspect.Parameter.empty), ("value", inspect.Parameter.empty),
    ("attn_mask", None), ("dropout_p", 0.0), ("is_causal", False), ("scale", None), ("enable_gqa", False),
]  # fmt: skip


@each_op
def test_an_ops_signature_is_pytorchs_and_the_references(op):
    if op.name == "scaled_dot_product_attention":
        theirs = ATTENTION
    else:
        theirs = _parameters(op.torch)
    ours = _parameters(op.public)
    assert ours[: len(theirs)] == theirs
    more = list(inspect.signature(op.public).parameters.values())[len(theirs) :]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in more), "an addition must be optional"
    assert _parameters(op.reference)[: len(ours)] == ours


@each_op
def test_an_ops_entry_is_whole(op):
    names = [case.name for case in (*op.cases, *op.sizes)]
    assert len(names) == len(set(names)), "two cases of one name"
    assert op.cases and op.sizes and set(op.differentiable) <= set(inspect.signature(op.public).parameters)
    for case in (*op.cases, *op.sizes):
        inputs = op.inputs(case, torch.float32, "meta")
        assert {name: tuple(tensor.shape) for name, tensor in inputs.items()} == case.shapes
        forward, backward = op.cost(inputs, case.options)
        assert (backward is not None) == bool(op.differentiable)
        assert forward.flops > 0 and forward.bytes > 0
        if backward is not None:
            assert backward.flops >= 0 and backward.bytes > 0  # forward may have done backward's operations


def _every_kernel() -> set[str]:
    """The functions of kernels/ that ask which program they are, or that are launched as one. Gluon's are apart."""
    found = set()
    for path in (ROOT / "kernels").glob("*.py"):
        source = path.read_text(encoding="utf-8")
        for node in ast.parse(source).body:
            jitted = isinstance(node, ast.FunctionDef) and any("triton" in ast.unparse(d) for d in node.decorator_list)
            if jitted and ("tl.program_id" in ast.unparse(node) or f"Launch({node.name}," in source):
                found.add(node.name)
    return found


def _launched(cases: str, *devices) -> set[str]:
    return {
        launch.name
        for op in catalogue.OPS
        for case in getattr(op, cases)
        for device in devices
        for launch in op.plan(op.inputs(case, torch.bfloat16, "meta"), case.options, device)
    }


def test_every_kernel_is_in_a_plan():
    """A kernel that no case of tests and sizes launches is one that nothing checks or compiles."""
    planned = _launched("cases", INTERPRETER, TARGETS["sm_90"]) | _launched("sizes", INTERPRETER, TARGETS["sm_90"])
    assert planned == _every_kernel() and len(planned) > 15


def test_every_kernel_is_in_a_test_case():
    """... and in the interpreter the small cases alone launch them all."""
    assert _launched("cases", INTERPRETER) == _every_kernel()


def test_nothing_stands_where_runs_are_written():
    assert not (ROOT / "runs").is_file()
