"""Providers that cheat or fail: each must end as a row without a number, and one that is right as one with."""

import functools
import random
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from benchmarks import machine, problems, stats, suite, timing
from benchmarks.noise import AGAIN
from benchmarks.problems import Checker, Problem, Wrong
from benchmarks.providers import PROVIDERS, Provider, Unavailable
from kernels import catalogue
from kernels.op import Case

OPS = {op.name: op for op in catalogue.OPS}
CEILINGS = {"copy_gbps": 10.0, "matmul_tflops_float32": 0.1}


def entry(call, name="suspect") -> Provider:
    return Provider(name, lambda problem: call, (), False, False)


def stale():
    """Answers what it answered first."""
    memory = {}

    def call(input, normalized_shape, weight, bias):
        if not memory:
            memory["output"] = F.layer_norm(input, normalized_shape, weight, bias)
        return memory["output"]

    return call


def by_address():
    """Remembers its answers by where the inputs lie."""
    memory = {}

    def call(input, normalized_shape, weight, bias):
        key = input.data_ptr()
        if key not in memory:
            memory[key] = F.layer_norm(input, normalized_shape, weight, bias).detach()
        return memory[key] + 0.0 * (input.sum() + weight.sum() + bias.sum())

    return call


def last_row(input, normalized_shape, weight, bias):
    right = F.layer_norm(input, normalized_shape, weight, bias)
    return torch.cat([right[:-1], right[-1:] + 1e-3])


def wrong_gradient(input, normalized_shape, weight, bias):
    return F.layer_norm(input, normalized_shape, weight * 2, bias) - F.layer_norm(
        input, normalized_shape, weight.detach(), None
    )


def nan(input, normalized_shape, weight, bias):
    right = F.layer_norm(input, normalized_shape, weight, bias)
    return torch.where(torch.arange(right.numel(), device=right.device).view_as(right) == 5, torch.nan, right)


CHEATS = {
    "stale": stale(),
    "by address": by_address(),
    "zeros": lambda input, normalized_shape, weight, bias: 0.0 * F.layer_norm(input, normalized_shape, weight, bias),
    "last row": last_row,
    "forward only": lambda input, normalized_shape, weight, bias: F.layer_norm(
        input, normalized_shape, weight, bias
    ).detach(),
    "no weight": lambda input, normalized_shape, weight, bias: F.layer_norm(
        input, normalized_shape, weight.detach(), bias
    ),
    "gradient": wrong_gradient,
    "nan": nan,
    "shape": lambda input, normalized_shape, weight, bias: F.layer_norm(input, normalized_shape, weight, bias)[:-1],
    "half": lambda input, normalized_shape, weight, bias: (
        F.layer_norm(input, normalized_shape, weight, bias).bfloat16().float()
    ),
}


@pytest.mark.parametrize("name", CHEATS)
def test_a_wrong_provider_gets_no_number(name, norm, checker):
    fields, call = suite.judge(entry(CHEATS[name]), norm, checker)
    assert fields["status"] in ("wrong", "error") and fields["reason"] and call is None


@pytest.mark.parametrize("name", ["torch", "eager"])
def test_a_right_provider_is_timed(name, norm, checker):
    fields, call = suite.judge(PROVIDERS[name], norm, checker)
    assert call is not None and 0.0 <= fields["error_over_allowed"] < problems.PEER_FACTOR


def test_forward_alone_is_named(norm, checker):
    with pytest.raises(Wrong, match="computes forward alone"):
        checker.check(CHEATS["forward only"])
    with pytest.raises(Wrong, match="no gradient for weight"):
        checker.check(CHEATS["no weight"])


def test_our_kernels_are_held_to_the_contract_itself(norm, checker):
    def rough(input, normalized_shape, weight, bias):
        return F.layer_norm(input, normalized_shape, weight, bias) * (1 + 1.5e-6)

    assert suite.judge(entry(rough), norm, checker)[1] is not None
    assert suite.judge(entry(rough, "triton"), norm, checker)[0]["status"] == "wrong"


def _throw(error):
    def call(**_):
        raise error

    return call


def test_a_cpu_that_has_no_memory_left_is_a_row_that_says_so(norm, checker):
    def greedy(input, normalized_shape, weight, bias):
        return F.layer_norm(input, normalized_shape, weight, bias) + torch.empty(1 << 50)[0]

    fields, call = suite.judge(entry(greedy), norm, checker)
    assert fields["status"] == "memory" and fields["reason"].startswith("out of memory: ") and call is None


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (RuntimeError("no such\nthing"), "error", "RuntimeError: no such thing"),
        (torch.OutOfMemoryError("too big"), "memory", "out of memory: too big"),
        (MemoryError(), "memory", "out of memory: MemoryError"),
        (NotImplementedError("not that"), "skipped", "cannot do this: not that"),
    ],
)
def test_what_throws_is_a_row_that_says_why(error, status, said, norm, checker):
    assert suite.judge(entry(_throw(error)), norm, checker)[0] == {"status": status, "reason": said}


def test_what_is_not_here_is_a_row_that_says_why(norm, checker):
    def build(problem):
        raise Unavailable("not installed")

    fields, call = suite.judge(Provider("peer", build, (), False, False), norm, checker)
    assert fields == {"status": "skipped", "reason": "not installed"} and call is None
    fields, _ = suite.judge(Provider("peer", build, ("attention",), False, False), norm, checker)
    assert fields["reason"] == "peer has no layer_norm"


def test_one_bad_provider_does_not_end_the_run(norm):
    who = [
        entry(_throw(RuntimeError("broken")), "thrower"),
        entry(CHEATS["zeros"], "zeros"),
        entry(F.layer_norm, "good"),
    ]
    rows = suite.measure(norm.op, norm.case, torch.float32, who, CEILINGS, rounds=6)
    by_name = {row["provider"]: row for row in rows if row["pass"] == "forward+backward"}
    assert by_name["thrower"]["status"] == "error" and by_name["zeros"]["status"] == "wrong"
    assert by_name["good"]["status"] == by_name["good again"]["status"] == "ok"
    assert len(by_name["good"]["samples_ms"]) == 6 and by_name["good"]["median_ms"] > 0
    assert {row["pass"] for row in rows} == set(suite.PASSES)


def test_a_provider_that_goes_wrong_while_it_is_timed_gets_no_number(norm):
    calls = []

    def tires(input, normalized_shape, weight, bias):
        calls.append(1)
        right = F.layer_norm(input, normalized_shape, weight, bias)
        return right if len(calls) < 12 else right * 0.5

    rows = suite.measure(norm.op, norm.case, torch.float32, [entry(tires)], CEILINGS, rounds=6)
    assert rows[0]["status"] == "wrong" and "after timing" in rows[0]["reason"] and "median_ms" not in rows[0]


def in_a_thread(input, normalized_shape, weight, bias):
    """Gives its answer before it has it, as work on another stream does."""
    right = F.layer_norm(input, normalized_shape, weight, bias)
    output = right * 0.0
    done = right.detach().clone()
    threading.Timer(0.05, lambda: output.data.copy_(done)).start()
    return output


def test_an_answer_that_comes_late_is_wrong(norm, checker):
    assert suite.judge(entry(in_a_thread), norm, checker)[0]["status"] == "wrong"


@pytest.mark.gpu
@pytest.mark.parametrize("cycles", [0, 50_000_000])
def test_work_on_another_stream_is_not_believed(cycles, norm, checker):
    """An answer that comes late is wrong where it is read, its timing is refused, or its graph is found empty."""
    other = torch.cuda.Stream()

    def late(input, normalized_shape, weight, bias):
        with torch.cuda.stream(other):
            torch.cuda._sleep(cycles)
            return F.layer_norm(input, normalized_shape, weight, bias)

    rows = suite.measure(norm.op, norm.case, torch.float32, [entry(late)], CEILINGS, rounds=6)
    # autograd waits for every stream that it used, so that with a backward pass after it the work is done in time
    assert all(row["status"] in ("wrong", "error") for row in rows if row["pass"] == "forward"), rows


class _Event:
    """A CUDA event by hand: its stream is done at once, 2 ms after it began."""

    def __init__(self, enable_timing):
        assert enable_timing

    record = synchronize = lambda self: None

    def elapsed_time(self, end):
        return 2.0


@pytest.mark.parametrize("late", [False, True])
def test_a_sample_that_leaves_work_behind_is_no_sample(late, monkeypatch):
    """What synchronising the whole device still waits for, once the timed stream is done, was not in the time."""
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: now.append(now.pop() + (0.02 if late else 1e-5)))
    monkeypatch.setattr(timing, "_idle_seconds", lambda: 1e-5)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if late:
        with pytest.raises(timing.Late):
            timing._elapsed(start, end)
    else:
        assert timing._elapsed(start, end) == 2.0


@pytest.mark.parametrize("op", [catalogue.LAYER_NORM, catalogue.LINEAR_CROSS_ENTROPY])
def test_only_both_passes_of_a_loss_have_rates(op, on_cpu):
    """Its gradient may be made in forward, and PyTorch does that otherwise than ours: one product, then two."""
    rows = suite.measure(op, op.cases[3], torch.float32, [PROVIDERS["torch"]], CEILINGS, 6)
    with_rates = {row["pass"] for row in rows if row["status"] == "ok" and "tflops" in row}
    assert with_rates == ({"forward+backward"} if op is catalogue.LINEAR_CROSS_ENTROPY else set(suite.PASSES))


@pytest.mark.parametrize(("name", "full"), [("two_tiles", True), ("prime", False), ("pairs", False)])
def test_pytorchs_attention_has_a_mask_only_where_slots_are_empty(name, full, monkeypatch):
    """A mask, and caches that are cleared first, would be work that nobody asked of it."""
    op = catalogue.DECODE_ATTENTION
    problem = Problem(op, next(case for case in op.cases if case.name == name), torch.float32, torch.device("cpu"))
    given, attention = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: given.append(k) or attention(*a, **k))
    call = PROVIDERS["torch"].make(problem)
    assert suite.judge(entry(call), problem, Checker(problem))[0].get("error_over_allowed", 9.0) <= 1.0
    assert given and all((keywords.get("attn_mask") is None) == full for keywords in given)


def test_a_loss_is_given_one_and_then_something_else():
    op = catalogue.CROSS_ENTROPY
    problem = Problem(op, Case("mean", {"input": (5, 7), "target": (5,)}, {}), torch.float32, torch.device("cpu"))
    assert problem.gradients[0].item() == 1.0
    problem.redraw(problems.SEEDS[1])
    assert problem.gradients[0].item() != 1.0, "a provider that takes no notice of it must be found out"
    problem.redraw(problems.SEEDS[0])
    assert problem.gradients[0].item() == 1.0


@pytest.mark.parametrize(("shape", "said"), [((1, 32, 16384, 64), "17 GB"), ((4, 16, 4096, 128), "2 GB")])
def test_plain_attention_of_too_many_scores_is_left_out(shape, said):
    """The second is exactly the limit, and a size that the kernels are compiled for."""
    large = Case("large", dict.fromkeys(("query", "key", "value"), shape), {})
    problem = SimpleNamespace(op=catalogue.ATTENTION, case=large, dtype=torch.bfloat16, device=torch.device("cpu"))
    for name in ("eager", "compile"):
        with pytest.raises(Unavailable, match=f"its scores would take {said}"):
            PROVIDERS[name].make(problem)


def _head(*more: str) -> Problem:
    shapes = {"input": (5, 8), "linear_weight": (7, 8), "target": (5,)} | dict.fromkeys(more, (7,))
    return Problem(catalogue.LINEAR_CROSS_ENTROPY, Case("head", shapes, {}), torch.bfloat16, torch.device("cpu"))


def _as_released(e, c, targets, ignore_index=-100, softcap=None, reduction="mean", shift=False, filter_eps="high"):
    return F.cross_entropy(e @ c.T, targets, ignore_index=ignore_index, reduction=reduction)


def _with_a_bias(e, c, targets, bias=None, reduction="mean"):
    return F.cross_entropy(F.linear(e, c, bias), targets, reduction=reduction)


@pytest.mark.parametrize(
    ("function", "more", "refusal"),
    [
        (_as_released, (), None),
        (_as_released, ("linear_bias",), "has no bias"),
        (_with_a_bias, (), None),
        (_with_a_bias, ("linear_bias",), None),
        (_with_a_bias, ("weight",), "has no class weights"),
    ],
)
def test_a_peer_is_given_a_bias_where_it_takes_one(function, more, refusal, monkeypatch):
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", SimpleNamespace(linear_cross_entropy=function))
    problem, cce = _head(*more), replace(PROVIDERS["cce"], gpu_only=False)
    fields, call = suite.judge(cce, problem, Checker(problem))
    assert fields.get("reason", "right").endswith(refusal or "right") and (call is None) == bool(refusal)


@pytest.mark.parametrize("name", ["torch-flash", "torch-cudnn"])
def test_choosing_a_backend_is_not_in_pytorchs_host_time(name, on_cpu, monkeypatch):
    problem = Problem(catalogue.ATTENTION, catalogue.ATTENTION.cases[0], torch.float32, torch.device("cpu"))
    timer = timing.CpuTimer(lambda: None)
    monkeypatch.setattr(suite, "prepare", lambda *_: (timer, {"method": "graph", "l2": "warm", "host_us": 60.0}))
    monkeypatch.setattr(suite, "after_timing", lambda *_: None)
    right = {name: None, "torch": None}
    rows = suite._time_pass("forward", {"dtype": "float32"}, problem, None, right, {n: {} for n in right}, {}, 3)
    assert {row["provider"]: row.get("host_us") for row in rows} == {name: None, name + AGAIN: None, "torch": 60.0}


@pytest.mark.parametrize("name", ["torch-flash", "torch-cudnn"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_backend_that_cannot_do_it_is_said_to(name):
    shapes = dict.fromkeys(("query", "key", "value"), (1, 2, 8, 8))
    case = Case("dropped", shapes, {"dropout_p": 0.1})  # on a CPU neither has dropout
    problem = Problem(catalogue.ATTENTION, case, torch.bfloat16, torch.device("cpu"))
    with pytest.raises(NotImplementedError, match=r"No (available kernel|viable backend)"):
        problems.answer(problem, replace(PROVIDERS[name], gpu_only=False).make(problem))


@pytest.mark.parametrize("op", [catalogue.LAYER_NORM, catalogue.ADD_LAYER_NORM, catalogue.CROSS_ENTROPY])
def test_what_is_compiled_is_one_graph_of_pytorchs_own_function(op, monkeypatch):
    """The reference's arithmetic would hinder the compiler: of its cross_entropy it moves 14 bytes a logit, not 6."""
    graphs = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=graphs))
    problem = Problem(op, op.cases[0], torch.float32, torch.device("cpu"))
    torch._dynamo.reset()
    problems.answer(problem, PROVIDERS["compile"].make(problem))
    assert graphs.frame_count == 1
    names = {node.target.__name__ for node in graphs.graphs[0].graph.nodes if node.op == "call_function"}
    assert names & {"layer_norm", "cross_entropy"}


def test_a_driver_that_is_slow_leaves_nothing_behind(monkeypatch):
    """Waiting for an idle device takes 0.5 ms here, and no longer after a sample."""
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: now.append(now.pop() + 5e-4))
    timing._idle_seconds.cache_clear()
    try:
        assert timing._elapsed(*(torch.cuda.Event(enable_timing=True) for _ in range(2))) == 2.0
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: now.append(now.pop() + 5e-3))
        with pytest.raises(timing.Late):
            timing._elapsed(*(torch.cuda.Event(enable_timing=True) for _ in range(2)))
    finally:
        timing._idle_seconds.cache_clear()


class _Replayed:
    """A timer whose answers come from what was recorded, as a CUDA graph's do; it may have recorded nothing."""

    method = "graph"

    def __init__(self, function, empty):
        self.function, self.before = function, function() if empty else None

    def sample(self):
        return 1.0

    def outputs(self):
        return self.before or self.function()


@pytest.mark.parametrize("empty", [False, True])
def test_a_graph_that_does_not_do_the_work_gets_no_number(empty, on_cpu, norm, monkeypatch):
    monkeypatch.setattr(timing, "CpuTimer", lambda function: _Replayed(function, empty))
    rows = suite.measure(norm.op, norm.case, torch.float32, [entry(F.layer_norm)], CEILINGS, rounds=6)
    assert {row["pass"] for row in rows} == set(suite.PASSES)
    assert all(row["status"] == ("wrong" if empty else "ok") for row in rows), rows
    assert not empty or all("after timing" in row["reason"] for row in rows)


class _Busy:
    """A clock on which a call takes its milliseconds, more at times, and the longer the later it is."""

    def __init__(self, seed):
        self.now, self.random = 0.0, random.Random(seed)

    def read(self):
        self.now += 1e-4
        return self.now

    def work(self, milliseconds):
        slow = self.random.random() < 0.2
        self.now += milliseconds / 1e3 * (1.0 + self.random.gauss(0.0, 0.01) + 0.3 * slow + self.now / 10.0)

    def taking(self, milliseconds):
        def call(input, normalized_shape, weight, bias):
            self.work(milliseconds)
            return F.layer_norm(input, normalized_shape, weight, bias)

        return call


def _three_machines() -> list:
    """(ratio, verdict, seed): by default each verdict on a machine of its own."""
    found = []
    for place, (ratio, verdict) in enumerate([(1.0, "SAME"), (1.15, "SLOWER"), (0.87, "FASTER")]):
        for seed in range(3):
            marks = () if seed == place else pytest.mark.slow
            found.append(pytest.param(ratio, verdict, seed, marks=marks, id=f"{seed}-{ratio}-{verdict}"))
    return found


@pytest.mark.parametrize(("ratio", "verdict", "seed"), _three_machines())
def test_identical_providers_are_the_same_and_others_are_not(ratio, verdict, seed, on_cpu, norm, monkeypatch):
    """From the provider to the verdict, on a machine that slows down while it measures."""
    clock = _Busy(seed)
    monkeypatch.setattr(timing.time, "perf_counter", clock.read)
    who = [entry(clock.taking(2.0), "one"), entry(clock.taking(2.0 * ratio), "other")]
    rows = suite.measure(norm.op, norm.case, torch.float32, who, CEILINGS, rounds=60)
    taken = {row["provider"]: row["samples_ms"] for row in rows if row["pass"] == "forward"}
    assert max(taken["one"]) > 1.3 * min(taken["one"])
    assert stats.compare(taken["one"], taken["other"]).verdict == verdict
    assert stats.compare(taken["one"], taken["one again"]).verdict == "SAME"


def test_a_case_is_drawn_in_its_own_dtypes():
    """An op may read one of its inputs in another dtype: the benchmark is of that, not of something like it."""
    op = OPS["add_layer_norm"]
    mixed = [case for case in op.sizes if case.dtypes]
    assert mixed
    for case in mixed:
        small = Case(
            "small", {name: (3,) * len(shape) for name, shape in case.shapes.items()}, {"normalized_shape": (3,)}
        )
        small = small._replace(dtypes=case.dtypes)
        problem = problems.Problem(op, small, torch.bfloat16, machine.here().torch_device)
        assert {name: tensor.dtype for name, tensor in problem.inputs.items()} == {
            name: case.dtypes.get(name, torch.bfloat16) for name in case.shapes
        }
        assert suite.judge(PROVIDERS["eager"], problem, problems.Checker(problem))[1] is not None


def test_where_there_is_no_room_for_the_copies_every_row_says_so(norm, monkeypatch):
    def full(problem):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(suite, "copies_of", full)
    rows = suite.measure(norm.op, norm.case, torch.float32, [entry(F.layer_norm), entry(nan, "nan")], CEILINGS, 6)
    assert [(row["provider"], row["status"]) for row in rows] == [("suspect", "memory"), ("nan", "wrong")] * 3


def test_dropout_that_is_ignored_is_wrong():
    shape = (1, 2, 40, 16)
    case = Case("d", dict.fromkeys(("query", "key", "value"), shape), {"is_causal": True, "dropout_p": 0.2})
    problem = problems.Problem(OPS["scaled_dot_product_attention"], case, torch.float32, machine.here().torch_device)
    checker = problems.Checker(problem)
    attention = problem.op.torch
    ratios = checker.check(problem.op.reference)
    assert set(ratios) == {"output", "dquery", "dkey", "dvalue"}
    with pytest.raises(Wrong, match=r"dropout keeps 1\.0000"):
        checker.check(lambda query, key, value, is_causal, dropout_p: attention(query, key, value, is_causal=True))


def test_attention_head_by_head_is_attention(monkeypatch):
    shapes = {"query": (2, 4, 9, 8), "key": (2, 2, 9, 8), "value": (2, 2, 9, 8)}
    case = Case("g", shapes, {"is_causal": True, "enable_gqa": True})
    problem = problems.Problem(OPS["scaled_dot_product_attention"], case, torch.float32, machine.here().torch_device)
    whole = problems.exact_answer(problem)
    monkeypatch.setattr(problems, "LARGEST_SCORES", 0)
    parts = problems.exact_answer(problem)
    assert set(parts) == set(whole)
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scores", [0, 1 << 25])
def test_attention_of_one_tensor_is_attention_of_its_parts(scores, monkeypatch):
    """Its truth is made head by head as well, and its dropout is looked at as attention's is."""
    op, options = OPS["scaled_dot_product_attention_qkvpacked"], {"is_causal": True}
    case = Case("p", {"qkv": (2, 40, 3, 2, 16)}, options)
    problem = problems.Problem(op, case, torch.float32, machine.here().torch_device)
    leaf = problem.inputs["qkv"].double().requires_grad_()
    out = op.reference(leaf, **options)
    (gradient,) = torch.autograd.grad(out, leaf, problem.gradients[0].double())
    monkeypatch.setattr(problems, "LARGEST_SCORES", scores)
    truth = problems.exact_answer(problem)
    assert set(truth) == {"output", "dqkv"}
    torch.testing.assert_close(truth["output"], out.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(truth["dqkv"], gradient, rtol=1e-12, atol=1e-12)
    dropped = case._replace(options=options | {"dropout_p": 0.2})
    checker = problems.Checker(problems.Problem(op, dropped, torch.float32, machine.here().torch_device))
    assert set(checker.check(op.reference)) == {"output", "dqkv"}
    with pytest.raises(Wrong, match=r"dropout keeps 1\.0000"):
        checker.check(lambda qkv, is_causal, dropout_p: op.torch(qkv, is_causal=True))


def test_every_op_of_the_catalogue_can_be_a_problem(device):
    """Whatever op is added: inputs, truth, and the generic providers come from its entry alone."""
    for op in OPS.values():
        small = min(op.cases, key=lambda c: sum(torch.Size(s).numel() for s in c.shapes.values()))
        problem = problems.Problem(op, small, torch.float32, machine.here().torch_device)
        fields, call = suite.judge(PROVIDERS["eager"], problem, problems.Checker(problem))
        assert call is not None, (op.name, fields)
        assert problems.small_cases(op)
        assert problem.cost()["forward"].bytes > 0


def test_the_truth_of_many_logits_is_that_of_few(monkeypatch):
    """Some rows at a time, the last ones fewer, ignored ones among them: the same numbers as all at once."""
    case = Case("rows", {"input": (37, 8), "linear_weight": (50, 8), "target": (37,)})
    problem = problems.Problem(OPS["linear_cross_entropy"], case, torch.float32, machine.here().torch_device)
    problem.inputs["target"][::6] = -100
    whole = problems.exact_answer(problem)
    monkeypatch.setattr(problems, "LARGEST_LOGITS", 4 * 50 * 5)  # five rows at a time
    parts = problems.exact_answer(problem)
    assert list(parts) == list(whole)
    for name, exact in whole.items():
        torch.testing.assert_close(parts[name], exact, rtol=1e-13, atol=1e-15)
    smooth = problem.copy()  # not a sum of losses alone: all at once
    smooth.case = case._replace(options={"label_smoothing": 0.1})
    assert problems._too_many_logits(problem) and not problems._too_many_logits(smooth)
