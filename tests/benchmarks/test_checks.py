"""Providers that cheat or fail: each must end as a row without a number, and one that is right as one with."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks import machine, problems, suite, timing
from benchmarks.problems import Wrong
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


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (RuntimeError("no such\nthing"), "error", "RuntimeError: no such thing"),
        (torch.OutOfMemoryError("too big"), "memory", "out of memory: too big"),
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


@pytest.mark.gpu
def test_work_on_another_stream_is_not_believed(norm, checker):
    """An answer that comes late is wrong where it is read, or its timing is refused."""
    other = torch.cuda.Stream()
    held = []

    def late(input, normalized_shape, weight, bias):
        with torch.cuda.stream(other):
            torch.cuda._sleep(50_000_000)
            held.append(F.layer_norm(input, normalized_shape, weight, bias))
        return held[-1]

    fields, call = suite.judge(entry(late), norm, checker)
    if call is not None:
        with pytest.raises(timing.Late):
            timing.EventTimer([lambda: late(**norm.leaves(), **norm.case.options)]).sample()
    else:
        assert fields["status"] == "wrong"


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


def test_every_op_of_the_catalogue_can_be_a_problem(device):
    """Whatever op is added: inputs, truth, and the generic providers come from its entry alone."""
    for op in OPS.values():
        small = min(op.cases, key=lambda c: sum(torch.Size(s).numel() for s in c.shapes.values()))
        problem = problems.Problem(op, small, torch.float32, machine.here().torch_device)
        fields, call = suite.judge(PROVIDERS["eager"], problem, problems.Checker(problem))
        assert call is not None, (op.name, fields)
        assert problems.small_cases(op)
        assert problem.cost()["forward"].bytes > 0
