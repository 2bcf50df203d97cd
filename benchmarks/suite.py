"""`python -m benchmarks kernels`: every provider on every problem, right first and timed then.

Passes: forward with what it saves for backward, backward alone as a second one over the same graph is, and both. Of
losses, whose gradient some providers make in forward, only both together have rates and a share of the roofline. On a
GPU the times are the device's, with cold L2, and the host's time per call stands apart; on a CPU PyTorch's providers
are timed by the clock, and Triton's kernels, which the interpreter runs there, are checked and not timed.
"""

import argparse
import contextlib
import gc
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, noise, problems, providers, report, results, timing
from benchmarks.noise import AGAIN
from benchmarks.problems import DTYPES, PEER_FACTOR, Checker, Problem, Wrong
from benchmarks.providers import Provider, Unavailable
from kernels.op import Case, Op
from minigpt.errors import UserError

PASSES = ("forward", "backward", "forward+backward")
SCALE = -2.0  # of incoming gradients, exact in every dtype
INTERPRETED = "Triton's interpreter shows what is right, not how fast"


def add_to(commands: Any) -> None:
    """Add `kernels` to a command line."""
    parser = commands.add_parser("kernels", help="time every op against its peers", description=__doc__)
    parser.add_argument(
        "--op", nargs="+", action="extend", default=[], metavar="OP", help="ops of the catalogue (default: all)"
    )
    parser.add_argument(
        "--provider", nargs="+", action="extend", default=[], metavar="NAME", help="who computes (default: all)"
    )
    parser.add_argument(
        "--dtype", nargs="+", action="extend", choices=list(DTYPES), help="default: bfloat16; on a CPU float32"
    )
    parser.add_argument("--quick", action="store_true", help="the main cases, fewer samples")
    parser.add_argument("--rounds", type=int, help="samples of each row (default: 40, with --quick 12)")
    parser.add_argument("--out", type=Path, help="folder for the results (default: benchmarks/results)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """The command. Returns 1 if an answer of ours was wrong."""
    if arguments.rounds is not None and arguments.rounds < 1:
        raise UserError(f"--rounds must be at least 1, not {arguments.rounds}")
    here = machine.here()
    ops, who = problems.ops_named(arguments.op), providers.chosen(arguments.provider)
    dtypes = [DTYPES[name] for name in arguments.dtype or ["bfloat16" if here.type == "cuda" else "float32"]]
    command = {"name": "kernels", "ops": [op.name for op in ops], "quick": arguments.quick}
    document = results.new("kernels", command)
    path = results.path_of(document, arguments.out)
    results.prepare(path)
    print(f"{here.name}: {len(ops)} ops, {len(who)} providers; results go to {path}", flush=True)
    document["ceilings"] = timing.ceilings(here.torch_device, dtypes, arguments.quick)
    rounds = arguments.rounds or (12 if arguments.quick else 40)
    for op, case in in_order(ops, here.type == "cuda", arguments.quick):
        for dtype in dtypes:
            fit = providers.fit_for(op, who, bool(arguments.provider))
            rows = measure(op, case, dtype, fit, document["ceilings"], rounds)
            document["rows"] += rows
            results.save(document, path)
            _say(rows)
    report.publish(document, path)
    return int(any(row["provider"] == "triton" and row["status"] in ("wrong", "error") for row in document["rows"]))


def in_order(ops: Sequence[Op], on_gpu: bool, quick: bool) -> list[tuple[Op, Case]]:
    """What to measure, as a run may end early: what the goals name, then the most important case of every op before
    the second of any."""
    from benchmarks import goals

    found = []
    for named in (True, False):
        queue = [
            [(op, case) for case in problems.all_cases(op, on_gpu, quick) if (case.name in goals.cases(op)) == named]
            for op in ops
        ]
        found += [turn for turns in itertools.zip_longest(*queue) for turn in turns if turn]
    return found


def _say(rows: list[dict[str, Any]]) -> None:
    """A line for each provider: its medians by pass, or why there are none."""
    print(f"{rows[0]['op']} {rows[0]['case']} {rows[0]['dtype']}")
    for name in dict.fromkeys(row["provider"] for row in rows):
        said = {
            f"{row['pass']} {row['median_ms']:.4g} ms" if row["status"] == "ok" else row["reason"]: None
            for row in rows
            if row["provider"] == name
        }
        print(f"  {name}: {', '.join(said)}", flush=True)


# ---------------------------------------------------------------- one problem


def measure(op, case, dtype, who: list[Provider], ceilings: dict, rounds: int) -> list[dict[str, Any]]:
    """Rows of one problem: each provider in each pass."""
    providers.forget_compilations()
    key = {"op": op.name, "case": case.name, "dtype": str(dtype).removeprefix("torch.")}
    passes = PASSES if op.differentiable else PASSES[:1]
    try:
        problem = Problem(op, case, dtype, machine.here().torch_device)
        checker = Checker(problem)
    except Exception as error:  # no truth, no row with a number; the other problems go on
        fields = failure(error)
        what = "the problem and its truth do not fit" if fields["status"] == "memory" else "its truth is not known"
        fields["reason"] = f"{what}: {fields['reason']}"
        free()
        return [key | {"pass": name, "provider": p.name} | fields for name in passes for p in who]
    key["shape"] = problem.shape
    right, outcome = {}, {}
    for entry in who:
        outcome[entry.name], call = judge(entry, problem, checker)
        if call is not None:
            right[entry.name] = call
        free()
    rows = []
    for name in passes:
        try:
            rows += _time_pass(name, key, problem, checker, right, outcome, ceilings, rounds)
        except Exception as error:  # there was no room for the copies, or a provider has left the device unusable
            failed = {
                provider: fields if provider not in right else failure(error) for provider, fields in outcome.items()
            }
            rows += [key | {"pass": name, "provider": provider} | fields for provider, fields in failed.items()]
        free()
    return rows


def judge(entry: Provider, problem: Problem, checker: Checker) -> tuple[dict[str, Any], Callable | None]:
    """(fields for the rows, what to time or None): whether a provider is here, and right, forward and backward."""
    factor = 1.0 if entry.name == "triton" else PEER_FACTOR
    try:
        call = entry.make(problem)
        ratios = checker.check(call, factor)
    except Unavailable as reason:
        return {"status": "skipped", "reason": str(reason)}, None
    except Wrong as reason:
        return {"status": "wrong", "reason": f"wrong: {reason}"}, None
    except NotImplementedError as error:
        return {"status": "skipped", "reason": f"cannot do this: {_line(error)}"}, None
    except Exception as error:  # whatever a provider throws is its row
        return failure(error), None
    error = {"error_over_allowed": float(f"{max(ratios.values(), default=0.0):.3g}")}
    if entry.name == "triton" and problem.device.type == "cpu":
        return error | {"status": "untimed", "reason": INTERPRETED}, None
    return error, call


def failure(error: Exception) -> dict[str, str]:
    """The fields of a row whose provider threw. A CPU's allocator has no type of error of its own."""
    memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
    said = "out of memory" if memory else type(error).__name__
    return {"status": "memory" if memory else "error", "reason": f"{said}: {_line(error)}"}


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def free() -> None:
    """Give back what the last variant held."""
    gc.collect()
    if machine.here().type == "cuda":
        with contextlib.suppress(RuntimeError):  # where a provider has broken the device, every row says so by itself
            torch.cuda.empty_cache()


def _time_pass(name, key, problem, checker, right, outcome, ceilings, rounds) -> list[dict[str, Any]]:
    timers: dict[str, timing.Timer] = {}
    extra: dict[str, dict[str, Any]] = {}
    failed: dict[str, Exception] = {}
    used: dict[str, Problem] = {}
    problem.redraw(problems.SEEDS[0])
    copies = copies_of(problem)
    first = next(iter(right), None)  # ours where it is timed: once more, to see what differs by chance alone
    for variant, call in [*right.items(), *([(first + AGAIN, right[first])] if first else [])]:
        try:
            own = [copy.copy() for copy in copies] if _entered(variant, "overwrites") else copies
            used[variant] = own[0]
            timers[variant], extra[variant] = prepare(name, problem, own, call)
            if _entered(variant, "wrapped"):
                extra[variant].pop("host_us", None)
        except Exception as error:
            failed[variant] = error
            free()
    samples, broken = timing.interleaved(timers, rounds, seconds=20.0)
    failed |= broken
    rows = []
    cost = problem.cost()[name] if results.rated(problem.op.name, name) else None
    for variant in [*outcome, *([first + AGAIN] if first else [])]:
        row = key | {"pass": name, "provider": variant} | outcome.get(variant, {})
        if variant in failed:
            row |= failure(failed[variant])
        elif variant in samples:
            try:
                after_timing(name, used[variant], checker, timers[variant], variant)
                row |= results.timed(samples[variant]) | extra[variant] | noise.waited(timers[variant])
                if cost:
                    row |= rates(cost, row["median_ms"], row["dtype"], ceilings if row["l2"] == "cold" else {})
            except Wrong as error:
                row |= {"status": "wrong", "reason": f"wrong: {error}"}
            except Exception as error:  # with the inputs drawn anew it may throw all the same
                row |= failure(error)
        rows.append(row)
    ours = next((row for row in rows if row["provider"] == "triton" and row["status"] == "ok"), None)
    for row in rows:
        if ours and row["status"] == "ok":
            row["over_ours"] = float(f"{row['median_ms'] / ours['median_ms']:.4g}")
    return rows


def _entered(variant: str, what: str) -> bool:
    """Whether the provider of that name was entered as one that `overwrites` or is `wrapped`."""
    return getattr(providers.PROVIDERS.get(variant.removesuffix(AGAIN)), what, False)


def after_timing(name: str, problem: Problem, checker: Checker, timer: timing.Timer, variant: str) -> None:
    """Hold what was timed to the truth once more, with other numbers at the same addresses. Raises Wrong.

    A CUDA graph is replayed: what a provider did where the capture did not see it is not in there. Backward alone keeps
    the inputs that its forward pass saw; its incoming gradients are scaled, and the truth with them. What overwrites
    its inputs has nothing right to give once its backward pass has run, and was held to the truth before.
    """
    factor = 1.0 if variant.startswith("triton") else PEER_FACTOR
    if name != "forward" and _entered(variant, "overwrites"):
        return
    if name != "backward":
        seed = problems.SEEDS[1]
        problem.redraw(seed)
        found = problems.as_tuple(timer.outputs())
        names = problem.output_names if name == "forward" else [f"d{name}" for name in problem.wanted]
        checker.check_again(dict(zip(names, found, strict=True)), seed, factor)
        problem.redraw(problems.SEEDS[0])
    else:
        problem.scale_gradients(SCALE)
        found = problems.as_tuple(timer.outputs())
        names = [f"d{name}" for name in problem.wanted]
        checker.check_again(dict(zip(names, found, strict=True)), problems.SEEDS[0], factor, SCALE)
        problem.scale_gradients(1 / SCALE)


def copies_of(problem: Problem) -> list[Problem]:
    """The problem, and on a GPU as many copies of it as calls must rotate among for cold caches."""
    if problem.device.type == "cpu":
        return [problem]
    free_bytes, _ = torch.cuda.mem_get_info()
    count = timing.copies_needed(problem.nbytes, machine.here().l2, free_bytes // 8)
    return [problem, *(problem.copy() for _ in range(count - 1))]


def closure(name: str, problem: Problem, call: Callable) -> Callable[[], Any]:
    """One pass over a problem as a function without arguments; for "backward" the forward pass runs here, once."""
    options = problem.case.options
    leaves = problem.leaves()
    wanted = [leaves[n] for n in problem.wanted]

    def forward():
        return problems.as_tuple(call(**leaves, **options))

    def backward_of(outputs, retain):
        pairs = [(o, g) for o, g in zip(outputs, problem.gradients, strict=True) if o.requires_grad]
        given = [g.to(o.dtype) for o, g in pairs]
        return torch.autograd.grad([o for o, _ in pairs], wanted, given, retain_graph=retain)

    if name == "forward":
        return forward
    if name == "backward":
        outputs = forward()
        backward_of(outputs, True)  # the first may find its gradient made by the forward pass; all others are alike
        return lambda: backward_of(outputs, True)
    return lambda: backward_of(forward(), False)


def prepare(name: str, problem: Problem, copies: list[Problem], call: Callable) -> tuple[timing.Timer, dict[str, Any]]:
    """A timer of one variant, and the fields of its row that do not come from samples."""
    if problem.device.type == "cpu":
        timer = timing.CpuTimer(closure(name, problem, call))
        return timer, {"method": timer.method, "l2": "warm"}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        functions = [closure(name, copy, call) for copy in copies]
    torch.cuda.synchronize()
    peak = peak_bytes(functions[0])
    host = timing.host_microseconds(functions[0])
    timer = timing.cuda_timer(functions, stream)
    swept = len(functions) if timer.method == "graph" else len(timer.functions)
    cold = swept * problem.nbytes >= timing.COLD_FACTOR * (machine.here().l2 or timing.LARGEST_L2)
    return timer, {
        "method": timer.method, "l2": "cold" if cold else "warm", "copies": swept,
        "host_us": float(f"{host:.4g}"), "peak_memory_mib": round(peak / 2**20, 1),
    }  # fmt: skip


def peak_bytes(function: Callable[[], Any]) -> int:
    """Device memory that a call takes at its peak, beside what was there before it."""
    function()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def rates(cost, milliseconds: float, dtype: str, ceilings: dict[str, float]) -> dict[str, float]:
    """GB/s and TFLOP/s of a call, and the share of the roofline in percent.

    The roofline is the longer of the time to move the fewest bytes at the measured copy bandwidth and the time for
    the operations at the measured rate of matrix products. With warm caches it says nothing: pass no ceilings.
    """
    floor_ms = roofline_ms(cost, dtype, ceilings)
    found = {"gbps": cost.bytes / milliseconds / 1e6, "tflops": cost.flops / milliseconds / 1e9}
    if floor_ms:
        found["roofline_percent"] = 100 * floor_ms / milliseconds
    found["intensity"] = cost.flops / cost.bytes
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def roofline_ms(cost, dtype: str, ceilings: dict[str, float]) -> float:
    """The least time in milliseconds that the measured ceilings leave for a Cost; 0 where they are not known."""
    copy, matmul = ceilings.get("copy_gbps"), ceilings.get(f"matmul_tflops_{dtype}")
    if not copy or not matmul:
        return 0.0
    return max(cost.bytes / copy / 1e6, cost.flops / matmul / 1e9)
