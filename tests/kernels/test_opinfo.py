"""PyTorch's own test inputs of its functions and modules, through ours.

Whatever PyTorch tests its function with gives PyTorch's result and gradients here too, or a NotImplementedError that
names what is missing; what PyTorch's tests expect to raise raises the same type of error. How many of each there are
is committed below, so that nothing that works can quietly stop being supported.

The inputs come from torch.testing._internal, in a process of its own: importing it changes PyTorch's settings. All fp32
samples run, and every third of the two narrow dtypes.
"""

import collections
import math
import subprocess
import sys

import pytest
import torch
from parity import DTYPES, name_of
from torch.utils._pytree import tree_map

import kernels

COLLECT = """
import sys
import torch
try:
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db
except ImportError as error:
    print(error)
    sys.exit(3)

path, *functions = sys.argv[1:]
samples = []  # (where from, function, dtype, arguments, keywords, error)
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    name = str(dtype).removeprefix("torch.")
    for info in op_db:
        function = info.name.removeprefix("nn.functional.")
        if function in functions and info.name.startswith("nn.functional."):
            torch.manual_seed(0)
            for sample in info.sample_inputs("cpu", dtype, requires_grad=True):
                samples.append(("functions", function, name, (sample.input, *sample.args), sample.kwargs, None))
    for info in module_db:
        function = info.name.removeprefix("nn.")
        settings = {"device": "cpu", "dtype": dtype, "requires_grad": True, "training": True}
        if function in ("LayerNorm", "CrossEntropyLoss"):
            torch.manual_seed(0)
            for sample in info.module_inputs_func(info, **settings):
                made, called = sample.constructor_input, sample.forward_input
                arguments = (made.args, made.kwargs, called.args, called.kwargs)
                samples.append(("modules", function, name, arguments, {}, None))
            if info.module_error_inputs_func and name == "float32":
                for wrong in info.module_error_inputs_func(info, **settings):
                    made, called = wrong.module_error_input.constructor_input, wrong.module_error_input.forward_input
                    arguments = (made.args, made.kwargs, called.args, called.kwargs)
                    samples.append(("errors", function, name, arguments, {}, wrong.error_type.__name__))
torch.save(samples, path)
"""

OWN_MASK = "dropout, by another mask than PyTorch's"
SAME = "PyTorch's result"
ATTN_MASK = "attn_mask is not implemented"
PROBABILITIES = "probability targets are not implemented"

# (where from, function, dtype) -> how many; measured with PyTorch 2.13, others have other inputs
EXPECTED = {
    ("functions", "cross_entropy", "float32"): {SAME: 11, PROBABILITIES: 10},
    ("functions", "layer_norm", "float32"): {SAME: 6},
    ("functions", "scaled_dot_product_attention", "float32"): {SAME: 12, OWN_MASK: 12, ATTN_MASK: 1},
    ("functions", "cross_entropy", "float16"): {SAME: 4, PROBABILITIES: 3},
    ("functions", "layer_norm", "float16"): {SAME: 2},
    ("functions", "scaled_dot_product_attention", "float16"): {SAME: 4, OWN_MASK: 4, ATTN_MASK: 1},
    ("functions", "cross_entropy", "bfloat16"): {SAME: 4, PROBABILITIES: 3},
    ("functions", "layer_norm", "bfloat16"): {SAME: 2},
    ("functions", "scaled_dot_product_attention", "bfloat16"): {SAME: 4, OWN_MASK: 4, ATTN_MASK: 1},
    ("modules", "CrossEntropyLoss", "float32"): {SAME: 69, PROBABILITIES: 36},
    ("modules", "LayerNorm", "float32"): {SAME: 7},
    ("modules", "CrossEntropyLoss", "float16"): {SAME: 23, PROBABILITIES: 12},
    ("modules", "LayerNorm", "float16"): {SAME: 3},
    ("modules", "CrossEntropyLoss", "bfloat16"): {SAME: 23, PROBABILITIES: 12},
    ("modules", "LayerNorm", "bfloat16"): {SAME: 3},
}
REASONS = {OWN_MASK, SAME, ATTN_MASK, PROBABILITIES}


@pytest.fixture(scope="module")
def samples(tmp_path_factory, device) -> list:
    path = tmp_path_factory.mktemp("samples") / "samples.pt"
    functions = ["scaled_dot_product_attention", "layer_norm", "cross_entropy"]
    command = [sys.executable, "-c", COLLECT, str(path), *functions]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode == 3:
        pytest.skip(f"PyTorch's own test inputs need what is not installed: {done.stdout.strip()}")
    assert done.returncode == 0, done.stderr
    # what is to be refused stays on the CPU: on a GPU some of it would end the process
    return [
        (where, *rest) if where == "errors" else (where, *tree_map(lambda value: _placed(value, device), rest))
        for where, *rest in torch.load(path, weights_only=False)
    ]


def _placed(value, device):
    """A tensor as a leaf on the device; anything else as it is."""
    if not torch.is_tensor(value):
        return value
    return value.detach().to(device).requires_grad_(value.requires_grad)


def _leaves(value, dtype=None):
    """The same arguments as leaves of their own, floating tensors in `dtype`."""

    def leaf(tensor):
        if not torch.is_tensor(tensor):
            return tensor
        chosen = dtype if dtype and tensor.is_floating_point() else tensor.dtype
        return tensor.detach().to(chosen, copy=True).requires_grad_(tensor.requires_grad)

    return tree_map(leaf, value)


def _described(value):
    return f"{name_of(value.dtype)}{tuple(value.shape)}" if torch.is_tensor(value) else value


def _tensors(value) -> list[torch.Tensor]:
    found = []
    tree_map(lambda leaf: found.append(leaf) if torch.is_tensor(leaf) and leaf.requires_grad else None, value)
    return found


def _results(call, arguments, keywords, dtype=None, parameters=None) -> list[torch.Tensor]:
    """Output and gradients, the parameters' too."""
    arguments, keywords = _leaves(arguments, dtype), _leaves(keywords, dtype)
    wanted = _tensors((arguments, keywords))
    output = call(*arguments, **keywords)
    if not output.requires_grad:
        return [output]
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
    gradients = torch.autograd.grad(output, wanted + (parameters or []), grad, allow_unused=True)
    return [output.detach(), *(gradient for gradient in gradients if gradient is not None)]


def _hold(ours: list, theirs: list, truth: list, dtype: torch.dtype, residue: float = 0.0) -> None:
    """Ours may be as far from the truth as PyTorch's, three times, and a few roundings, and what cancelling leaves."""
    assert len(ours) == len(theirs) == len(truth)
    for mine, other, exact in zip(ours, theirs, truth, strict=True):
        assert (mine.shape, mine.dtype) == (other.shape, other.dtype)
        assert torch.equal(mine.isnan(), exact.isnan())
        if not exact.numel() or exact.isnan().all():
            continue
        error, allowed = ((result.double() - exact).abs().nan_to_num(0.0).max().item() for result in (mine, other))
        scale = exact.nan_to_num(0.0).abs().max().item()
        assert error <= 3 * allowed + 8 * torch.finfo(dtype).eps * scale + residue, f"{error}, PyTorch has {allowed}"


def _function(name, arguments, keywords, dtype) -> str:
    ours, theirs = getattr(kernels, name), getattr(torch.nn.functional, name)
    if keywords.get("dropout_p"):  # its own tests say what it drops; the same inputs come without it as well
        mine, other = (_results(function, arguments, keywords) for function in (ours, theirs))
        assert [(one.shape, one.dtype) for one in mine] == [(one.shape, one.dtype) for one in other]
        assert all(one.isfinite().all() for one in mine)
        return OWN_MASK
    residue = 0.0
    if name == "scaled_dot_product_attention":  # where one key has all the weight, the scores' gradient is nothing
        largest = max(tensor.detach().abs().max().item() for tensor in arguments if torch.is_tensor(tensor))
        residue = 16 * torch.finfo(torch.float32).eps * largest**2
    if name == "layer_norm" and math.prod(arguments[1]) == 1:  # the input's gradient is nothing, by a difference of two
        largest = max([1.0, *(one.detach().abs().max().item() for one in arguments[2:] if torch.is_tensor(one))])
        residue = torch.finfo(torch.float32).eps * largest * keywords.get("eps", 1e-5) ** -0.5
    mine, other = (_results(function, arguments, keywords) for function in (ours, theirs))
    _hold(mine, other, _results(theirs, arguments, keywords, torch.float64), dtype, residue)
    return SAME


def _module(name, made, options, called, keywords, dtype, device) -> str:
    ours, theirs, exact = (getattr(package, name)(*made, **options) for package in (kernels, torch.nn, torch.nn))
    generator = torch.Generator().manual_seed(2)
    for parameter in theirs.parameters():  # not ones and zeros
        torch.nn.init.normal_(parameter, generator=generator)
    theirs = theirs.to(device, dtype)
    ours.to(device, dtype).load_state_dict(theirs.state_dict())
    exact.to(device, torch.float64).load_state_dict(theirs.state_dict())
    results = (
        _results(module, called, keywords, kind, list(module.parameters()))
        for module, kind in ((ours, None), (theirs, None), (exact, torch.float64))
    )
    _hold(*results, dtype)
    return SAME


def _outcome(where, name, arguments, keywords, dtype, device) -> str:
    try:
        if where == "modules":
            return _module(name, *arguments, dtype, device)
        return _function(name, arguments, keywords, dtype)
    except NotImplementedError as error:
        return str(error).split(": ", 1)[1].split(";")[0]


def _run(samples, where, dtype, device) -> dict:
    counts = collections.defaultdict(collections.Counter)
    chosen = [sample for sample in samples if sample[0] == where and sample[2] == name_of(dtype)]
    assert chosen
    for place, (_, name, _, arguments, keywords, _) in enumerate(chosen):
        if dtype == torch.float32 or place % 3 == 0:
            try:
                counts[where, name, name_of(dtype)][_outcome(where, name, arguments, keywords, dtype, device)] += 1
            except Exception as error:
                problem = tree_map(_described, (arguments, keywords))
                raise AssertionError(f"{name}, sample {place}, {problem}: {error}") from error
    return counts


def _compare(counts: dict) -> None:
    for key, outcomes in counts.items():
        print(f"{key}: {dict(outcomes)},")
    for key, outcomes in counts.items():
        assert set(outcomes) <= REASONS and outcomes[SAME]
        if torch.__version__.startswith("2.13."):
            assert dict(outcomes) == EXPECTED.get(key)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_functions_on_pytorchs_own_inputs(dtype, samples, device):
    _compare(_run(samples, "functions", dtype, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_modules_on_pytorchs_own_inputs(dtype, samples, device):
    _compare(_run(samples, "modules", dtype, device))


def test_what_pytorchs_modules_refuse_ours_refuse(samples):
    """With the same type of error, or as not implemented; both at the call, or both when the module is made."""
    chosen = [sample for sample in samples if sample[0] == "errors"]
    assert chosen
    for _, name, _, (made, options, called, keywords), _, error in chosen:
        raised = []
        for module in (getattr(torch.nn, name), getattr(kernels, name)):
            with pytest.raises(Exception) as caught:
                module(*made, **options)(*called, **keywords)
            raised.append(caught.type)
        assert raised[0].__name__ == error and raised[1] in (raised[0], NotImplementedError), (raised, error)
