"""The ops inside PyTorch: registration, torch.compile, fake tensors, FLOP counts, launches."""

import collections
from functools import partial

import pytest
import torch
from parity import DTYPES, LAYOUTS, as_tuple, case_of, differentiate, hold_alike, incoming, inputs_of, name_of, on_each
from test_parity import each_differentiable_op, laid_out
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import kernels
from kernels import catalogue
from kernels.device import INTERPRETED, INTERPRETER
from kernels.op import count_launches, facts_of

OPS = {op.name: op for op in catalogue.OPS}
each_op = pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)


class _Calls(TorchDispatchMode):
    """Notes the calls of our custom ops: (function, arguments, keywords, result)."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.namespace == "kernels":
            self.calls.append((function, args, kwargs or {}, result))
        return result


def _problem(op, device, dtype=torch.float32):
    case = laid_out(op)
    inputs = inputs_of(op, case, dtype, device)
    return inputs, case.options, incoming(op, inputs, case.options)


@each_op
def test_every_registered_op_passes_opcheck(op, device):
    inputs, options, grad = _problem(op, device)
    with _Calls() as noted:
        differentiate(op.public, op, inputs, options, grad)
    assert len(noted.calls) == 1 + bool(op.differentiable), "one boundary forward, one backward"
    for place, (function, args, kwargs, _) in enumerate(noted.calls):
        # only forward has a formula: a second derivative raises
        wants = place == 0 and bool(op.differentiable)
        args = [
            value.detach().requires_grad_(wants and value.is_floating_point()) if torch.is_tensor(value) else value
            for value in args
        ]
        torch.library.opcheck(function, tuple(args), kwargs)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@each_op
def test_fake_tensors_have_the_real_strides(op, layout, device):
    inputs, options, _ = _problem(op, device, torch.bfloat16)
    inputs = {name: layout(tensor) for name, tensor in inputs.items()}
    grad = on_each(layout, incoming(op, inputs, options))
    real = differentiate(op.public, op, inputs, options, grad)
    with FakeTensorMode() as mode:
        fakes = {name: mode.from_tensor(tensor) for name, tensor in inputs.items()}
        fake = differentiate(op.public, op, fakes, options, on_each(mode.from_tensor, grad))
    for quantity, value in real.items():
        told = fake[quantity]
        assert (told.shape, told.stride(), told.dtype) == (value.shape, value.stride(), value.dtype), quantity


@each_op
def test_ops_return_what_their_fakes_say(op, device):
    """Of every case: compiled code reads results at the fakes' strides, and on a GPU asserts that they are aligned."""
    for case in op.cases:
        inputs = inputs_of(op, case, torch.bfloat16, device)
        with _Calls() as noted:
            differentiate(op.public, op, inputs, case.options, incoming(op, inputs, case.options))
        for function, args, kwargs, result in noted.calls:
            with FakeTensorMode() as mode:
                fake = function(*tree_map_only(torch.Tensor, mode.from_tensor, args), **kwargs)
            for place, (real, told) in enumerate(zip(as_tuple(result), as_tuple(fake), strict=True)):
                facts = [(one.shape, one.stride(), one.storage_offset(), one.dtype) for one in (real, told)]
                where = f"{case.name}: result {place} of {function}"
                assert facts[0] == facts[1] and real.storage_offset() == 0, f"{where} is {facts[0]}, not {facts[1]}"


@each_op
def test_meta_tensors(op):
    inputs, options, grad = _problem(op, "cpu")
    grad = on_each(lambda tensor: tensor.to("meta"), grad)
    result = differentiate(op.public, op, {n: t.to("meta") for n, t in inputs.items()}, options, grad)
    assert all(value.is_meta for value in result.values())


# ---------------------------------------------------------------- in place


def _modified(tensor):
    """In place, and so that the gradient of what was there is not what it was."""
    tensor *= 1.5
    tensor[..., :1] = 0.25
    return tensor


@each_op
def test_results_are_nobodys_views(op, device):
    """PyTorch's own are not: a view made in a function, or without gradients, cannot be modified in place."""
    case = case_of(op, "none") if "cross_entropy" in op.name else laid_out(op)  # losses of one dimension
    inputs, options = inputs_of(op, case, torch.float32, device), case.options
    leaves = {name: tensor.clone().requires_grad_(name in op.differentiable) for name, tensor in inputs.items()}
    with torch.no_grad():
        without = as_tuple(op.public(**leaves, **options))
    for output in (*without, *as_tuple(op.public(**leaves, **options)), *as_tuple(op.public(**inputs, **options))):
        assert not output._is_view()
    for output in without:
        output += torch.ones_like(output).requires_grad_()
        assert output.requires_grad


@each_differentiable_op
def test_results_modified_in_place(op, device):
    """As PyTorch has it: gradients of what became of them, or where backward needs what was there, an error."""
    inputs, options, grad = _problem(op, device)
    kept = {"scaled_dot_product_attention": [0], "scaled_dot_product_attention_qkvpacked": [0], "add_layer_norm": [1]}
    for place, name in enumerate(op.outputs):

        def changed(*args, function, place=place, **options):
            outputs = list(as_tuple(function(*args, **options)))
            outputs[place] = _modified(outputs[place])
            return tuple(outputs) if len(outputs) > 1 else outputs[0]

        if place in kept.get(op.name, []):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                differentiate(partial(changed, function=op.public), op, inputs, options, grad)
            continue
        ours, theirs = (
            differentiate(partial(changed, function=function), op, inputs, options, grad)
            for function in (op.public, op.torch)
        )
        for quantity, exact in theirs.items():
            torch.testing.assert_close(ours[quantity], exact, rtol=1e-4, atol=1e-4, msg=f"{name}: {quantity}")


# ---------------------------------------------------------------- torch.compile


def _chain(x, weight, bias, target, ops=kernels):
    """Ops one after another, and nothing else that computes."""
    b, t, width = x.shape
    y = ops.layer_norm(x, (width,), weight, bias)
    y, x = ops.add_layer_norm(y, x, (width,), weight, bias)
    y, _ = ops.add_layer_norm(y, x, (width,))
    query = y.view(b, t, 2, width // 2).transpose(1, 2)
    y = ops.scaled_dot_product_attention(query, query, query, is_causal=True)
    return ops.cross_entropy(y.transpose(1, 2).reshape(b * t, width), target, label_smoothing=0.1)


def _chain_inputs(device, dtype=torch.float32, t=9):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, t, 32, generator=generator).to(device, dtype)
    parameters = [torch.randn(32, generator=generator).to(device, dtype) for _ in range(2)]
    return x, *parameters, torch.randint(0, 32, (2 * t,), generator=generator).to(device)


def _loss_and_gradients(function, inputs):
    leaves = [tensor.clone().requires_grad_(tensor.is_floating_point()) for tensor in inputs]
    loss = function(*leaves)
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves if leaf.requires_grad)]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_whole_it_is_eager(backend, dtype, device):
    """In the interpreter bit for bit; but inductor adds the gradients of query, key and value in fp32 where eager
    rounds in between, and on a GPU other strides are other arithmetic: held to the truth as the ops are, with eager in
    PyTorch's place.
    """
    inputs = _chain_inputs(device, dtype)
    eager = _loss_and_gradients(_chain, inputs)
    ours = _loss_and_gradients(torch.compile(_chain, fullgraph=True, backend=backend), inputs)
    if backend != "inductor" and INTERPRETED:
        assert all(torch.equal(*pair) for pair in zip(ours, eager, strict=True))
        return
    doubles = [tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs]
    truth = _loss_and_gradients(partial(_chain, ops=kernels.reference), doubles)
    for exact, one, other in zip(truth, ours, eager, strict=True):
        floor = torch.finfo(dtype).eps * exact.square().mean().sqrt()
        for measure in (lambda error: error.abs().max(), lambda error: error.square().mean().sqrt()):
            assert measure(one.double() - exact) <= 2 * measure(other.double() - exact) + floor


@each_op
def test_inductor_finds_every_result_aligned(op, device, monkeypatch):
    """It asserts so of an op's results where the inputs are, which by itself it supposes on a GPU alone."""
    monkeypatch.setattr("torch._inductor.graph.should_assume_input_aligned", lambda _: True)
    case = laid_out(op)
    inputs = inputs_of(op, case, torch.float32, device)
    options = case.options | ({"reduction": "mean"} if "reduction" in case.options else {})
    grad = incoming(op, inputs, options)
    compiled = torch.compile(op.public, fullgraph=True, backend="inductor")
    eager, ours = (differentiate(function, op, inputs, options, grad) for function in (op.public, compiled))
    for quantity, value in eager.items():
        torch.testing.assert_close(ours[quantity], value, msg=quantity)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_dropout_has_eagers_mask(backend, device):
    def attend(x):
        return kernels.scaled_dot_product_attention(x, x, x, dropout_p=0.5, is_causal=True).square().sum()

    x = torch.randn(1, 2, 9, 16, generator=torch.Generator().manual_seed(0)).to(device)
    compiled = torch.compile(attend, fullgraph=True, backend=backend)
    results = []
    for function in (attend, compiled, compiled):
        torch.manual_seed(5)
        results.append(_loss_and_gradients(function, [x]))
    for eager, first, second in zip(*results, strict=True):
        hold_alike(first, eager, "compiled")
        assert torch.equal(first, second)
    assert not torch.equal(results[1][0], compiled(x)), "the mask is compiled in"


def test_one_graph_serves_every_length(device):
    """A dynamic dimension is not pinned by a shape that a plan or a check reads."""
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(_chain, fullgraph=True, dynamic=True, backend=count)
    for t in (9, 12, 20):
        inputs = _chain_inputs(device, t=t)
        torch.testing.assert_close(compiled(*inputs), _chain(*inputs))
    assert len(graphs) == 1, f"{len(graphs)} graphs for three lengths"


@pytest.mark.parametrize("form", ["a number", "a tuple"])
def test_traced_with_a_symbolic_normalized_shape(form, device):
    """What x.shape[-1] is while make_fx, export or the compiler trace; the graph then serves other sizes."""

    def norms(x):
        shape = x.shape[-1] if form == "a number" else (x.shape[-1],)
        return kernels.layer_norm(x, shape), *kernels.add_layer_norm(x, x, shape)

    graph = make_fx(norms, tracing_mode="symbolic")(torch.ones(3, 8, device=device))
    x = torch.randn(5, 13, generator=torch.Generator().manual_seed(0)).to(device)
    for traced, eager in zip(graph(x), norms(x), strict=True):
        assert torch.equal(traced, eager)


# ---------------------------------------------------------------- torch.func


def _first_argument(op, device):
    """(a function of the first input alone, that input)."""
    inputs, options, _ = _problem(op, device)
    name = next(iter(inputs))

    def call(tensor):
        return as_tuple(op.public(**(inputs | {name: tensor}), **options))[0].sum()

    return call, inputs[name]


@pytest.mark.parametrize(
    "transform", ["vmap", "grad", "jacrev", "jacfwd", "vjp", "grad under vmap", "vmap under grad", "jvp"]
)
@each_op
def test_transforms_of_torch_func_are_refused(op, transform, device):
    """A tangent would be lost silently, and grad fails inside PyTorch with a message that says nothing of the op."""
    call, x = _first_argument(op, device)
    batch = torch.stack([x, x])
    transformed = {
        "vmap": lambda: torch.vmap(call)(batch),
        "grad": lambda: torch.func.grad(call)(x),
        "jacrev": lambda: torch.func.jacrev(call)(x),
        "jacfwd": lambda: torch.func.jacfwd(call)(x),
        "vjp": lambda: torch.func.vjp(call, x),
        "grad under vmap": lambda: torch.vmap(torch.func.grad(call))(batch),
        "vmap under grad": lambda: torch.func.grad(lambda b: torch.vmap(call)(b).sum())(batch),
        "jvp": lambda: torch.func.jvp(call, (x,), (x,)),
    }
    with pytest.raises(NotImplementedError, match=f"{op.name}: .*not implemented"):
        transformed[transform]()


@each_op
def test_forward_mode_is_refused(op, device):
    call, x = _first_argument(op, device)
    with torch.autograd.forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match=f"{op.name}: forward-mode"):
            call(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        call(x)  # without a tangent it is a call like any other


def test_lengths_left_to_the_compiler_compile_twice_at_most(device):
    """Nothing said of dynamic shapes: the second length makes the graph dynamic, for all that follow."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(_chain, fullgraph=True, backend=counter)
    for t in (9, 12, 20, 33, 47):
        inputs = _chain_inputs(device, t=t)
        for eager, ours in zip(_loss_and_gradients(_chain, inputs), _loss_and_gradients(compiled, inputs), strict=True):
            hold_alike(ours, eager, f"with {t} tokens")
    assert counter.frame_count == 2, f"{counter.frame_count} graphs for five lengths"


# ---------------------------------------------------------------- CUDA graphs


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@each_op
def test_a_captured_step_replays_on_new_inputs(op, dtype, device):
    """Forward and backward in one CUDA graph: replayed on other values it gives their results, bit for bit."""
    inputs, options, grad = _problem(op, device, dtype)
    other, _, _ = _problem(op, device, dtype)
    other = {name: t.flip(0) if t.is_floating_point() else t for name, t in other.items()}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiled and allocated before the capture
        for _ in range(3):
            differentiate(op.public, op, inputs, options, grad)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = differentiate(op.public, op, inputs, options, grad)
    for name, tensor in other.items():
        inputs[name].copy_(tensor)
    graph.replay()
    torch.cuda.synchronize()
    for quantity, value in differentiate(op.public, op, other, options, grad).items():
        assert torch.equal(captured[quantity], value), quantity


@pytest.mark.gpu
def test_a_captured_dropout_draws_a_mask_each_replay(device):
    """The seed is drawn inside the graph: every replay has its own mask, and the generator's seed gives it again."""
    x = torch.randn(1, 2, 33, 64, device=device, dtype=torch.bfloat16, requires_grad=True)

    def step():
        out = kernels.scaled_dot_product_attention(x, x, x, dropout_p=0.5, is_causal=True)
        return out, torch.autograd.grad(out, x, torch.ones_like(out))[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()

    def replay():
        graph.replay()
        torch.cuda.synchronize()
        return [result.detach().clone() for result in captured]

    torch.manual_seed(5)
    first, second = replay(), replay()
    torch.manual_seed(5)
    again = replay()
    for one, two, three in zip(first, second, again, strict=True):
        assert not torch.equal(one, two) and torch.equal(one, three)


# ---------------------------------------------------------------- counts


@each_op
def test_flops_are_those_of_the_cost_formula(op, device):
    """Where an op has a FLOP formula, PyTorch's counter sees what the cost formula says; and one product more, as many
    as forward has, where linear_cross_entropy makes the logits again rather than keep them."""
    for case in op.cases[:12]:
        inputs = inputs_of(op, case, torch.float32, "meta")
        forward, backward = op.cost(inputs, case.options)
        with _Calls() as noted, FlopCounterMode(display=False) as counter:
            leaves = {n: t.requires_grad_(n in op.differentiable) for n, t in inputs.items()}
            outputs = as_tuple(op.public(**leaves, **case.options))
            first = counter.get_total_flops()
            if backward is not None:
                torch.autograd.backward(outputs, tuple(map(torch.empty_like, outputs)))
        registered = [function for function, *_ in noted.calls if function._overloadpacket in flop_registry]
        both = forward.flops + (backward.flops if backward is not None else 0)
        again = op.name == "linear_cross_entropy" and case.options.get("reduction") == "none"
        both += forward.flops if again else 0
        assert (first, counter.get_total_flops()) == ((forward.flops, both) if registered else (0, 0)), case.name
        assert len(registered) in (0, 1 + bool(op.differentiable)), "a formula for one direction only"


@pytest.mark.parametrize("name", ["attention", "attention_qkvpacked", "decode_attention"])
def test_attention_has_a_flop_formula(name):
    assert getattr(torch.ops.kernels, name) in flop_registry


LAUNCHES = {
    "scaled_dot_product_attention": (1, 1),  # of a short sequence; a longer one has two backward, see test_attention.py
    "scaled_dot_product_attention_qkvpacked": (1, 1),  # as that
    "decode_attention": (1, 0),  # a cache this short is not split
    "layer_norm": (1, 2),
    "add_layer_norm": (1, 2),  # the sum costs none, forward or backward
    "cross_entropy": (1, 1),  # of reduction="none"; "mean" and "sum" have one more forward
    "linear_cross_entropy": (1, 1),  # of one chunk, reduction="none"
}


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@each_op
def test_launches_are_those_of_the_plan(op, dtype, device):
    """So many kernels a call forward and backward, and the very ones that compilation and benchmarks are told of."""
    inputs, options, grad = _problem(op, device, dtype)
    leaves = {name: tensor.clone().requires_grad_(name in op.differentiable) for name, tensor in inputs.items()}
    with count_launches() as forward:
        outputs = as_tuple(op.public(**leaves, **options))
    with count_launches() as backward:
        if op.differentiable:
            torch.autograd.backward(outputs, as_tuple(grad))
    assert (forward.total(), backward.total()) == LAUNCHES[op.name]
    plan = op.plan({n: t.to("meta") for n, t in inputs.items()}, options, facts_of(next(iter(inputs.values()))))
    assert forward + backward == collections.Counter(launch.name for launch in plan)


@each_op
def test_nothing_is_launched_backward_for_what_needs_no_gradient(op, device):
    inputs, options, _ = _problem(op, device)
    with count_launches() as launched:
        op.public(**inputs, **options)
    assert launched.total() == LAUNCHES[op.name][0]


class _Functions(TorchDispatchMode):
    """Notes the names of all functions that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


@each_differentiable_op
def test_backward_makes_no_zeros(op, device):
    """Statistics have no gradient; autograd by itself fills one with zeros for each, a launch that nobody reads."""
    inputs, options, grad = _problem(op, device)
    leaves = {name: tensor.clone().requires_grad_(name in op.differentiable) for name, tensor in inputs.items()}
    outputs = as_tuple(op.public(**leaves, **options))
    with _Functions() as called:
        torch.autograd.backward(outputs, as_tuple(grad))
    assert any(name.startswith("kernels::") for name in called.names)
    assert not [name for name in called.names if "zero" in name or "fill" in name or "full" in name]


class _Severed(torch.autograd.Function):
    """Its input has no gradient, though it is asked for one."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@each_differentiable_op
def test_no_gradient_from_what_follows_is_no_gradient(op, device):
    inputs, options, _ = _problem(op, device)
    leaves = {name: tensor.clone().requires_grad_(name in op.differentiable) for name, tensor in inputs.items()}
    outputs = as_tuple(op.public(**leaves, **options))
    with count_launches() as launched:
        sum(_Severed.apply(output).sum() for output in outputs).backward()
    assert not launched and all(leaf.grad is None or not leaf.grad.any() for leaf in leaves.values())


@each_op
def test_a_plan_takes_meta_tensors_and_launches_nothing(op):
    for case in op.cases:
        with count_launches() as launched:
            plan = op.plan(inputs_of(op, case, torch.bfloat16, "meta"), case.options, INTERPRETER)
        assert plan and not launched
