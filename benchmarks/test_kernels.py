"""The suites of `pytest benchmarks`: every op's main cases, each provider, forward and forward with backward.

pytest-benchmark's own numbers are of whole calls as a program makes them, the launch included and caches warm; device
times with cold caches come from `python -m benchmarks kernels`.
"""

import pytest
import torch

from benchmarks import machine, problems, providers, results, suite
from benchmarks.conftest import synchronised
from kernels import catalogue

HERE = machine.here()
ON_GPU = HERE.type == "cuda"
# on two cores a compilation by inductor takes longer than all the rest: without a GPU it is left to the command
NAMES = [name for name in providers.PROVIDERS if ON_GPU or name in ("triton", "eager", "torch", "torch-chunked")]
PARAMETERS = [
    pytest.param(op, case, name, which, id=f"{op.name}-{case.name}-{which}-{name}")
    for op in catalogue.OPS
    for case in problems.all_cases(op, ON_GPU, quick=True)
    for which in (("forward", "forward+backward") if op.differentiable else ("forward",))
    for name in NAMES
    if not providers.PROVIDERS[name].ops or op.name in providers.PROVIDERS[name].ops
]

_problems: dict = {}
_judged: dict = {}


def _problem(op, case, dtype) -> tuple[problems.Problem, problems.Checker]:
    """Made once, and the one before forgotten: cases come one after another."""
    if (op.name, case.name) not in _problems:
        _problems.clear()
        _judged.clear()
        suite.free()
        problem = problems.Problem(op, case, dtype, HERE.torch_device)
        _problems[op.name, case.name] = problem, problems.Checker(problem)
    return _problems[op.name, case.name]


@pytest.mark.parametrize(("op", "case", "name", "which"), PARAMETERS)
def test_kernel(op, case, name, which, dtype, ceilings, benchmark, ran):
    if name == "triton" and not ON_GPU:
        pytest.skip(suite.INTERPRETED)
    problem, checker = _problem(op, case, dtype)
    if name not in _judged:
        _judged[name] = suite.judge(providers.PROVIDERS[name], problem, checker)
    fields, call = _judged[name]
    if call is None:
        (pytest.skip if fields["status"] in ("skipped", "memory") else pytest.fail)(fields["reason"])
    benchmark.group = f"{op.name} {problem.shape} {which}"
    problem.redraw(problems.SEEDS[0])
    function = suite.closure(which, problem, call)
    benchmark._timer = synchronised
    benchmark.pedantic(function, warmup_rounds=2, rounds=30 if ON_GPU else 8, iterations=1)
    if benchmark.stats is None:
        pytest.skip("--benchmark-disable: nothing is timed")
    ran.append(benchmark.name)
    milliseconds = benchmark.stats.stats.median * 1e3
    if results.rated(op.name, which):
        known = ceilings if ON_GPU else {}
        rates = suite.rates(problem.cost()[which], milliseconds, str(dtype).removeprefix("torch."), known)
        benchmark.extra_info |= {
            "GB/s": rates["gbps"],
            "TFLOP/s": rates["tflops"],
            "% of roofline": rates.get("roofline_percent", "not meaningful: caches are warm"),
        }
    benchmark.extra_info |= {
        "peak memory, MiB": round(suite.peak_bytes(function) / 2**20, 1) if ON_GPU else "not measured on a CPU",
    }
    assert torch.isfinite(torch.tensor(milliseconds))
