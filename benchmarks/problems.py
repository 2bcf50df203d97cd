"""A problem: one op, one of its cases, one dtype, on one device; its inputs, and whether an answer to it is right.

Truth is the reference in float64 on the inputs as the dtype rounded them. As the numerics contract has it, in maximum
and in RMS, for the outputs and every gradient,

    error <= factor * (2 * (the error of PyTorch's own function in that dtype) + eps(dtype) * RMS(truth))

with a factor of 1 for our kernels. Peers have promised no such thing and get PEER_FACTOR: what a wrong kernel does is
larger by far. The check draws twice, into the same memory, so that an answer remembered from before is wrong.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from kernels.op import Case, Cost, Op
from minigpt.errors import UserError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PEER_FACTOR = 8.0
SEEDS = (0, 1)
DRAWS = 8  # of PyTorch's error, where a problem is small and its largest error a matter of luck
SMALL_BYTES = 16 << 20
LARGEST_SCORES = 1 << 25  # elements, above which the truth of attention is computed head by head
LARGEST_LOGITS = 1 << 30  # elements, above which that of linear_cross_entropy is computed some rows at a time
DROPOUT_SEED = 7

Outputs = tuple[torch.Tensor, ...]
Call = Callable[..., Any]


class Wrong(Exception):
    """The answer is not right, and so its time is of no interest: one line that says what is wrong."""


def _attention(name: str, *shape: int, **options) -> Case:
    return Case(name, dict.fromkeys(("query", "key", "value"), shape), {"is_causal": True} | options)


def _packed(name: str, batch: int, length: int, heads: int, size: int) -> Case:
    return Case(name, {"qkv": (batch, length, 3, heads, size)}, {"is_causal": True})


def _norm(rows: int, n: int, *more: str) -> Case:
    shapes = dict.fromkeys(("input", *more), (rows, n)) | {"weight": (n,), "bias": (n,)}
    return Case(str(n), shapes, {"normalized_shape": (n,)})


def _loss(rows: int, v: int) -> Case:
    return Case(f"v{v}", {"input": (rows, v), "target": (rows,)})


def _head(rows: int, n: int, v: int) -> Case:
    return Case(f"v{v}", {"input": (rows, n), "linear_weight": (v, n), "target": (rows,)})


def _cache(name: str, batch: int, heads: int, length: int, size: int) -> Case:
    whole = (batch, heads, length, size)
    shapes = {"query": (batch, heads, 1, size), "key_cache": whole, "value_cache": whole, "lengths": (batch,)}
    return Case(name, shapes)


_SMALL = {
    "scaled_dot_product_attention": (_attention("heads", 12, 4, 64, 32), _attention("longer", 2, 4, 256, 64)),
    "scaled_dot_product_attention_qkvpacked": (_packed("heads", 12, 64, 4, 32), _packed("longer", 2, 256, 4, 64)),
    "decode_attention": (_cache("heads", 12, 4, 64, 32), _cache("longer", 2, 4, 1024, 64)),
    "layer_norm": (_norm(768, 128), _norm(1024, 768)),
    "add_layer_norm": (_norm(768, 128, "residual"), _norm(1024, 768, "residual")),
    "cross_entropy": (_loss(768, 65), _loss(256, 8192)),
    "linear_cross_entropy": (_head(768, 128, 65), _head(256, 128, 8192)),
}
"""Cases for a CPU, where Op.sizes are too large: what the mini-GPT runs there, and something larger."""


def small_cases(op: Op) -> tuple[Case, ...]:
    """Cases of `op` for a CPU; of an op that is not known here, the two largest of its tests."""
    elements = {case.name: sum(math.prod(shape) for shape in case.shapes.values()) for case in op.cases}
    return _SMALL.get(op.name) or tuple(sorted(op.cases, key=lambda case: elements[case.name])[-2:])


def ops_named(names: list[str]) -> list[Op]:
    """Ops of the catalogue by name; all without one. Raises UserError for an unknown name, listing the right ones."""
    from kernels import catalogue

    known = {op.name: op for op in catalogue.OPS}
    for name in names:
        if name not in known:
            raise UserError(f"unknown op {name!r}: choose from {', '.join(known)}")
    return [known[name] for name in names] or list(known.values())


class Problem:
    """An op's case in a dtype on a device, its inputs drawn with a seed; `redraw` draws others into the same memory."""

    def __init__(self, op: Op, case: Case, dtype: torch.dtype, device: torch.device):
        self.op, self.case, self.dtype, self.device = op, case, dtype, device
        self.inputs = self._draw(0)
        self.wanted = [name for name in self.inputs if name in op.differentiable]
        with torch.no_grad():
            like = as_tuple(call_on_meta(self))
        self.gradients = tuple(torch.empty(out.shape, dtype=out.dtype, device=device) for out in like)
        self._draw_gradients(0)

    def _draw(self, seed: int) -> dict[str, torch.Tensor]:
        """As Op.inputs, and normal numbers drawn where they are needed."""
        generator = torch.Generator().manual_seed(seed)
        at_device = torch.Generator(self.device).manual_seed(seed)
        tensors = {}
        for name, shape in self.case.shapes.items():
            if self.op.draw(name, (1,) * len(shape), self.case, torch.Generator()) is not None:
                tensor = self.op.draw(name, shape, self.case, generator).to(self.device)
            else:
                tensor = torch.randn(shape, generator=at_device, device=self.device)
            dtype = self.case.dtypes.get(name, self.dtype) if tensor.is_floating_point() else tensor.dtype
            tensors[name] = tensor.to(dtype)
        return tensors

    def _draw_gradients(self, seed: int) -> None:
        """Normal numbers; of a scalar what a loss is given by backward(), but for the second draw, which tells who
        takes no notice of it: with 1 some peers leave out a pass over their gradients, and that is how they are used.
        """
        generator = torch.Generator(self.device).manual_seed(seed + 1000)
        for gradient in self.gradients:
            gradient.copy_(torch.randn(gradient.shape, generator=generator, device=self.device))
            if not gradient.dim() and seed != SEEDS[1]:
                gradient.fill_(1.0)

    def redraw(self, seed: int) -> None:
        """Other inputs and incoming gradients, at the same addresses."""
        for name, tensor in self._draw(seed).items():
            self.inputs[name].copy_(tensor)
        self._draw_gradients(seed)

    def scale_gradients(self, factor: float) -> None:
        """Multiply the incoming gradients, in place: those of the inputs are to become so many times as large."""
        for gradient in self.gradients:
            gradient.mul_(factor)

    def copy(self) -> "Problem":
        """The same problem in memory of its own."""
        twin = object.__new__(Problem)
        twin.__dict__ |= self.__dict__
        twin.inputs = {name: tensor.clone() for name, tensor in self.inputs.items()}
        twin.gradients = tuple(gradient.clone() for gradient in self.gradients)
        return twin

    @property
    def output_names(self) -> list[str]:
        """The names of its outputs, in order."""
        return [name_of_output(index, self.gradients) for index in range(len(self.gradients))]

    @property
    def nbytes(self) -> int:
        """Bytes of inputs and incoming gradients."""
        return sum(tensor.nbytes for tensor in (*self.inputs.values(), *self.gradients))

    @property
    def shape(self) -> str:
        """The shapes as a table shows them: each once, in order."""
        return " ".join(dict.fromkeys("x".join(map(str, shape)) or "scalar" for shape in self.case.shapes.values()))

    def leaves(self) -> dict[str, torch.Tensor]:
        """The inputs as new leaves that want gradients, in the same memory."""
        return {name: tensor.detach().requires_grad_(name in self.wanted) for name, tensor in self.inputs.items()}

    def cost(self) -> dict[str, Any]:
        """Pass -> Cost of the op: forward, backward, and both."""
        found = costs(self.op, self.inputs, self.case.options)
        return found if self.wanted else {"forward": found["forward"]}


def costs(op: Op, inputs: dict[str, torch.Tensor], options: dict[str, Any]) -> dict[str, Cost]:
    """Pass -> Cost of an op: forward, and if it has a backward, that and both."""
    forward, backward = op.cost(inputs, options)
    if backward is None:
        return {"forward": forward}
    both = Cost(forward.flops + backward.flops, forward.bytes + backward.bytes)
    if op.both:
        both = op.both(inputs, options)
    return {"forward": forward, "backward": backward, "forward+backward": both}


def as_tuple(outputs: Any) -> Outputs:
    """What an op returns, one tensor or several, as a tuple."""
    return tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)


def call_on_meta(problem: Problem) -> Any:
    """The op's outputs without data, for their shapes and dtypes; with data where the reference looks at some."""
    meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in problem.inputs.items()}
    try:
        return problem.op.reference(**meta, **problem.case.options)
    except (RuntimeError, NotImplementedError):
        return problem.op.reference(**problem.inputs, **problem.case.options)


# ---------------------------------------------------------------- right or wrong


def answer(problem: Problem, call: Call) -> dict[str, torch.Tensor]:
    """Outputs and gradients by name, as `call` gives them, copied on the current stream without waiting for others.

    Raises Wrong where a gradient does not come: a provider that computes forward alone has not done the work.
    """
    leaves = problem.leaves()
    torch.manual_seed(DROPOUT_SEED)
    outputs = as_tuple(call(**leaves, **problem.case.options))
    found = {name_of_output(i, outputs): out.detach().clone() for i, out in enumerate(outputs)}
    if len(outputs) != len(problem.gradients):
        raise Wrong(f"{len(outputs)} outputs, should be {len(problem.gradients)}")
    if problem.wanted:
        through = [pair for pair in zip(outputs, problem.gradients, strict=True) if pair[0].requires_grad]
        if not through:
            raise Wrong("its output has no gradient: it computes forward alone")
        wanted = [leaves[name] for name in problem.wanted]
        gradients = torch.autograd.grad(
            [out for out, _ in through], wanted, [_like(grad, out) for out, grad in through], allow_unused=True
        )
        for name, gradient in zip(problem.wanted, gradients, strict=True):
            if gradient is None:
                raise Wrong(f"no gradient for {name}")
            found[f"d{name}"] = gradient.clone()
    return found


def _like(gradient: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    return gradient.to(output.dtype)


def name_of_output(index: int, outputs: Outputs) -> str:
    """ "output" of one, "output0", "output1", ... of several."""
    return "output" if len(outputs) == 1 else f"output{index}"


class Checker:
    """Holds providers' answers to a problem to the truth; what it takes to know the truth is computed once."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self.truths: dict[int, dict[str, torch.Tensor]] = {}
        self.allowed: dict[str, tuple[float, float]] = {}
        theirs: dict[str, tuple[float, float]] = {}
        for seed in range(DRAWS if problem.nbytes <= SMALL_BYTES else len(SEEDS)):
            problem.redraw(seed)
            truth = None
            for function in _torch_functions(problem):
                if problem.case.options.get("dropout_p"):
                    continue
                try:
                    given = answer(problem, function)
                except Exception:  # whatever it is, the provider's own row will tell it
                    continue
                for name, exact in (truth := truth or self._truth(seed, None)).items():
                    worst = theirs.get(name, (0.0, 0.0))
                    theirs[name] = tuple(map(max, worst, errors(given[name], exact)))
        eps = torch.finfo(problem.dtype).eps
        problem.redraw(SEEDS[0])
        for name, exact in self._truth(SEEDS[0], None).items():
            floor = eps * exact.square().mean().sqrt().item() if exact.numel() else 0.0
            # nobody to compare with; or dropout: no two draw one mask, and 1 - p comes in steps of 2^-16
            if name not in theirs:
                step = floor * max(1.0, 2.0**-16 / eps)
                theirs[name] = (32 * step, 4 * step)
            their_max, their_rms = theirs[name]
            self.allowed[name] = (2 * their_max + floor, 2 * their_rms + floor)

    def _truth(self, seed: int, mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """The exact answer for the inputs of `seed`, which must be drawn; with dropout, for that mask."""
        if mask is None and seed in self.truths:
            return self.truths[seed]
        truth = exact_answer(self.problem, mask)
        if mask is None and seed in SEEDS:
            self.truths[seed] = truth
        return truth

    def check(self, call: Call, factor: float = 1.0) -> dict[str, float]:
        """By quantity, the error over what is allowed before `factor`; raises Wrong where that exceeds `factor`."""
        ratios: dict[str, float] = {}
        for seed in SEEDS:
            self.problem.redraw(seed)
            mask = dropout_mask(self.problem, call) if self.problem.case.options.get("dropout_p") else None
            given = answer(self.problem, call)
            truth = self._truth(seed, mask)
            for name, exact in truth.items():
                if name not in given:
                    raise Wrong(f"no {name}")
                if given[name].shape != exact.shape:
                    raise Wrong(f"{name} has shape {tuple(given[name].shape)}, should be {tuple(exact.shape)}")
                for error, allowed, what in zip(
                    errors(given[name], exact), self.allowed[name], ("maximum", "RMS"), strict=True
                ):
                    ratio = error / allowed if allowed else (0.0 if error == 0.0 else math.inf)
                    if not ratio <= factor:  # NaN fails too
                        raise Wrong(f"{what} error of {name} is {error:.3g}, allowed {factor * allowed:.3g}")
                    ratios[name] = max(ratios.get(name, 0.0), ratio)
        return ratios

    def check_again(self, given: dict[str, torch.Tensor], seed: int, factor: float = 1.0, scale: float = 1.0) -> None:
        """Hold what a timed call left behind to `scale` times the truth of `seed`; nothing is said of dropout."""
        if self.problem.case.options.get("dropout_p"):
            return
        for name, tensor in given.items():
            high, _ = errors(tensor.detach(), self.truths[seed][name] * scale)
            if not high <= factor * abs(scale) * self.allowed[name][0]:
                raise Wrong(f"{name} is wrong after timing: maximum error {high:.3g}")


def errors(result: torch.Tensor, truth: torch.Tensor) -> tuple[float, float]:
    """(maximum, RMS) of the difference of two tensors of one shape."""
    error = (result.double() - truth).abs()
    return (error.max().item(), error.square().mean().sqrt().item()) if error.numel() else (0.0, 0.0)


def _torch_functions(problem: Problem) -> list[Call]:
    """The implementations whose rounding sets the scale: PyTorch's own function and the plain arithmetic."""
    from benchmarks import providers

    found = []
    for name in ("torch", "eager"):
        try:
            found.append(providers.PROVIDERS[name].make(problem))
        except providers.Unavailable:
            continue
    return found


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def exact_answer(problem: Problem, mask: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Outputs and gradients by the reference in float64; attention head by head, its scores would not fit else."""
    if "qkv" in problem.inputs:
        found = exact_answer(_unpacked(problem), mask)
        parts = [found[name].transpose(1, 2) for name in ("dquery", "dkey", "dvalue")]
        return {"output": found["output"].transpose(1, 2), "dqkv": torch.stack(parts, 2)}
    extra = {} if mask is None else {"dropout_mask": mask.double()}
    options = {k: v for k, v in problem.case.options.items() if k != "dropout_p"} | extra
    if _too_many_logits(problem):
        return _exact_by_rows(problem)
    if not _too_many_scores(problem):
        return _exact(problem, problem.inputs, problem.gradients, options)
    parts = {}
    heads = problem.inputs["key"].shape[1]
    group = problem.inputs["query"].shape[1] // heads
    for batch, head in ((b, h) for b in range(problem.inputs["query"].shape[0]) for h in range(heads)):
        places = {"key": slice(head, head + 1), "value": slice(head, head + 1)}
        queries = slice(head * group, (head + 1) * group)
        here = slice(batch, batch + 1)
        inputs = {name: tensor[here, places.get(name, queries)] for name, tensor in problem.inputs.items()}
        if mask is not None:
            options["dropout_mask"] = extra["dropout_mask"][here, queries]
        found = _exact(problem, inputs, [g[here, queries] for g in problem.gradients], options)
        for name, tensor in found.items():
            shape = problem.inputs[name.removeprefix("d")].shape if name != "output" else problem.gradients[0].shape
            whole = parts.setdefault(name, torch.empty(shape, dtype=torch.float64, device=tensor.device))
            whole[here, places.get(name.removeprefix("d"), queries)] = tensor
    return parts


def _unpacked(problem: Problem) -> Problem:
    """Attention of one packed tensor as attention of three, which are views of it."""
    from kernels.catalogue import ATTENTION

    twin = object.__new__(Problem)
    twin.__dict__ |= problem.__dict__
    parts = (part.transpose(1, 2) for part in problem.inputs["qkv"].unbind(2))
    twin.op, twin.inputs = ATTENTION, dict(zip(ATTENTION.differentiable, parts, strict=True))
    twin.case = problem.case._replace(shapes={name: tuple(part.shape) for name, part in twin.inputs.items()})
    twin.wanted, twin.gradients = list(twin.inputs), tuple(grad.transpose(1, 2) for grad in problem.gradients)
    return twin


def _too_many_scores(problem: Problem) -> bool:
    if problem.op.name != "scaled_dot_product_attention" or problem.inputs["query"].dim() != 4:
        return False
    query, key = problem.case.shapes["query"], problem.case.shapes["key"]
    return math.prod(query[:3]) * key[2] > LARGEST_SCORES


def _too_many_logits(problem: Problem) -> bool:
    """Whether the logits would not fit in float64; sums over rows are a mean where nothing else is asked for."""
    if problem.op.name != "linear_cross_entropy" or problem.case.options or len(problem.inputs) != 3:
        return False
    return problem.inputs["input"].shape[0] * problem.inputs["linear_weight"].shape[0] > LARGEST_LOGITS


def _exact_by_rows(problem: Problem) -> dict[str, torch.Tensor]:
    """The mean loss of all rows and its gradients, as sums over a part of the rows at a time."""
    rows, weight = problem.inputs["input"], problem.inputs["linear_weight"]
    count = (problem.inputs["target"] != -100).sum().item()
    gradients = [problem.gradients[0].double() / count]
    found = {
        "output": torch.zeros((), dtype=torch.float64, device=rows.device),
        "dinput": torch.empty(rows.shape, dtype=torch.float64, device=rows.device),
        "dlinear_weight": torch.zeros(weight.shape, dtype=torch.float64, device=rows.device),
    }
    step = max(1, LARGEST_LOGITS // 4 // weight.shape[0])
    for start in range(0, rows.shape[0], step):
        here = slice(start, start + step)
        inputs = problem.inputs | {"input": rows[here], "target": problem.inputs["target"][here]}
        part = _exact(problem, inputs, gradients, {"reduction": "sum"})
        found["output"] += part["output"] / count
        found["dinput"][here] = part["dinput"]
        found["dlinear_weight"] += part["dlinear_weight"]
    return found


def _exact(problem: Problem, inputs: dict, gradients: Any, options: dict) -> dict[str, torch.Tensor]:
    leaves = {name: _wide(tensor.detach()).requires_grad_(name in problem.wanted) for name, tensor in inputs.items()}
    outputs = as_tuple(problem.op.reference(**leaves, **options))
    found = {name_of_output(i, outputs): out.detach() for i, out in enumerate(outputs)}
    if problem.wanted:
        through = [pair for pair in zip(outputs, gradients, strict=True) if pair[0].requires_grad]
        given = torch.autograd.grad(
            [out for out, _ in through], [leaves[name] for name in problem.wanted], [g.double() for _, g in through]
        )
        found |= {f"d{name}": gradient for name, gradient in zip(problem.wanted, given, strict=True)}
    return found


def dropout_mask(problem: Problem, call: Call) -> torch.Tensor:
    """The mask that attention's `call` draws after torch.manual_seed(DROPOUT_SEED): 0, or 1 / (1 - dropout_p).

    With columns of the identity as values, the output is the dropped probabilities themselves. Raises Wrong where
    the share that is kept is not what was asked for.
    """
    if "qkv" in problem.inputs:

        def unpacked(query, key, value, **options):
            packed = torch.stack([part.transpose(1, 2) for part in (query, key, value)], 2)
            return call(qkv=packed, **options).transpose(1, 2)

        return dropout_mask(_unpacked(problem), unpacked)
    query, key, value = (problem.inputs[name] for name in ("query", "key", "value"))
    k_len, size = key.shape[-2], value.shape[-1]
    kept = torch.empty(*query.shape[:-1], k_len, dtype=torch.bool, device=problem.device)
    with torch.no_grad():
        for start in range(0, k_len, size):
            ones = torch.zeros(k_len, size, dtype=problem.dtype, device=problem.device)
            ones[start : start + size].fill_diagonal_(1.0)
            torch.manual_seed(DROPOUT_SEED)
            probe = call(query=query, key=key, value=ones.expand_as(value).contiguous(), **problem.case.options)
            kept[..., start : start + size] = (probe != 0)[..., : min(size, k_len - start)]
    seen = torch.ones(query.shape[-2], k_len, dtype=torch.bool, device=problem.device)
    if problem.case.options.get("is_causal"):
        seen = seen.tril(problem.case.options.get("query_offset", 0))
    p = problem.case.options["dropout_p"]
    count = seen.sum().item() * kept[..., 0, 0].numel()
    share = (kept & seen).sum().item() / count
    if abs(share - (1 - p)) > 6 * math.sqrt(p * (1 - p) / count) + 1e-3:
        raise Wrong(f"dropout keeps {share:.4f} of the probabilities, should keep {1 - p:.4f}")
    return kept.to(torch.float32) / (1 - p)


def all_cases(op: Op, on_gpu: bool, quick: bool) -> Iterator[Case]:
    """The cases to measure, the most important first: on a GPU Op.sizes and MORE; with `quick` MAIN, or two."""
    if not on_gpu:
        cases = small_cases(op)
        yield from cases[:1] if quick else cases
        return
    main = MAIN.get(op.name)
    if quick:
        yield from (case for case in op.sizes if case.name in main) if main else op.sizes[:2]
        return
    cases = [*op.sizes, *MORE.get(op.name, ())]
    yield from sorted(cases, key=lambda case: case.name not in FIRST.get(op.name, ()))


FIRST = {"scaled_dot_product_attention": ("d64-1024", "d128", "d64-16384")}
"""Of many cases those that say most of how the rest will do: attention over 1k, 4k and 16k tokens."""

MAIN = {
    "scaled_dot_product_attention": ("shakespeare", "gpt2", "d128"),
    "scaled_dot_product_attention_qkvpacked": ("gpt2",),
    "layer_norm": ("384", "768", "4096"),
    "cross_entropy": ("v65", "v50304"),
}


MORE = {
    "scaled_dot_product_attention": (
        *(
            _attention(f"d{size}-{length}", 16384 // length, 2048 // size, length, size)
            for size, lengths in ((64, (1024, 4096, 16384)), (128, (256, 1024, 16384)))
            for length in lengths
        ),
        _attention("gpt2-dropout", 16, 12, 1024, 64, dropout_p=0.1),
    ),
    "linear_cross_entropy": (_head(32768, 4096, 128256),),
    "layer_norm": tuple(_norm(2**26 // n, n) for n in (32768, 65536)),
    "cross_entropy": (_loss(2048, 65536),),
}
"""Lengths that peers publish figures of: 16k tokens of width 2048 for attention, as many elements for the others. They
run the kernels that Op.sizes run, so that nothing is compiled for them alone."""
