"""Cost formulas against numbers counted by hand, and what is made of them."""

import math

import pytest
import torch

from benchmarks import machine, problems, results, suite, timing
from kernels import catalogue
from kernels.device import TARGETS
from kernels.op import Case, Cost

OPS = {op.name: op for op in catalogue.OPS}


def cost(name, shapes, options, dtype=torch.bfloat16):
    op = OPS[name]
    return op.cost(op.inputs(Case("by hand", shapes, options), dtype, "meta"), options)


def test_attention_by_hand():
    """One head, 4 queries, 4 keys, 8 wide. Causal: 1 + 2 + 3 + 4 = 10 scores of 8 products and 8 sums each."""
    shapes = dict.fromkeys(("query", "key", "value"), (1, 1, 4, 8))
    forward, backward = cost("scaled_dot_product_attention", shapes, {"is_causal": True})
    assert forward.flops == 2 * (10 * 16) and backward.flops == 5 * (10 * 16)
    # q, k, v, out of 4 x 8 elements of 2 bytes, and 4 numbers of 4 bytes
    assert forward.bytes == 4 * 64 + 16 and backward.bytes == 8 * 64 + 16
    forward, _ = cost("scaled_dot_product_attention", shapes, {})
    assert forward.flops == 2 * (16 * 16)


def test_layer_norm_by_hand():
    """3 rows of 8 in fp32: read 96 bytes, write 96, weight and bias 32 each, mean and rstd of 3 rows 24."""
    forward, backward = cost(
        "layer_norm", {"input": (3, 8), "weight": (8,), "bias": (8,)}, {"normalized_shape": (8,)}, torch.float32
    )
    assert forward == Cost(7 * 24, 96 + 96 + 64 + 24)
    assert backward == Cost(14 * 24, 3 * 96 + 2 * 64 + 24)


def test_cross_entropy_by_hand():
    """2 rows of 10 in bf16: 40 bytes; targets 16; the two parts of lse of 2 rows 16; their losses 4, if asked for."""
    shapes = {"input": (2, 10), "target": (2,)}
    forward, backward = cost("cross_entropy", shapes, {})
    assert forward == Cost(100, 40 + 16 + 16)
    assert backward == Cost(120, 80 + 16 + 16)
    assert cost("cross_entropy", shapes, {"reduction": "none"}) == (Cost(100, 40 + 16 + 16 + 4), backward)
    op = OPS["cross_entropy"]
    inputs = op.inputs(Case("by hand", shapes), torch.bfloat16, "meta")
    together = problems.costs(op, inputs, {})["forward+backward"]  # the logits read once, their gradient written
    assert together == Cost(220, 80 + 16 + 16)


def test_whose_gradients_can_be_made_in_forward_is_known():
    """Where both passes together need less, or all products stand in forward, a pass alone is each provider's own."""
    found = set()
    for op in catalogue.OPS:
        for case in op.sizes if op.differentiable else ():
            costs = problems.costs(op, op.inputs(case, torch.bfloat16, "meta"), case.options)
            if op.both or not costs["backward"].flops:
                found.add(op.name)
    assert found == set(results.SPLIT)


def test_both_passes_need_what_each_needs_or_less():
    for op in catalogue.OPS:
        for case in op.sizes:
            found = problems.costs(op, op.inputs(case, torch.bfloat16, "meta"), case.options)
            if op.differentiable:
                forward, backward, both = found.values()
                assert both.flops == forward.flops + backward.flops
                assert both.bytes == forward.bytes + backward.bytes or op.both
                assert max(forward.bytes, backward.bytes) <= both.bytes <= forward.bytes + backward.bytes
            else:
                assert [*found] == ["forward"]


def _kernels(op, cases, device, dtype):
    launches = [x for case in cases for x in op.plan(op.inputs(case, dtype, "meta"), case.options, device)]
    return {(x.name, str(x.constexprs), x.num_warps, x.num_stages) for x in launches}


@pytest.mark.parametrize("name", problems.MORE)
def test_cases_for_benchmarks_alone_need_no_kernel_of_their_own(name):
    op, more = OPS[name], problems.MORE[name]
    assert not {case.name for case in more} & {case.name for case in op.sizes}
    cases = problems.all_cases(op, on_gpu=True, quick=False)
    assert sorted(case.name for case in cases) == sorted(case.name for case in (*op.sizes, *more))
    for device in TARGETS.values():
        for dtype in (torch.bfloat16, torch.float32):
            assert _kernels(op, more, device, dtype) <= _kernels(op, op.sizes, device, dtype)


def test_attention_is_measured_from_256_to_16384_tokens():
    cases = list(problems.all_cases(OPS["scaled_dot_product_attention"], on_gpu=True, quick=False))
    for size in (64, 128):
        causal = [case for case in cases if case.options == {"is_causal": True} and case.shapes["query"][3] == size]
        assert {256, 1024, 4096, 16384} <= {case.shapes["query"][2] for case in causal}


def test_rates_by_hand():
    """4 GB and 2 TFLOP in 2 ms, under 4000 GB/s and 500 TFLOP/s: the products take 4 ms, the bytes 1 ms."""
    ceilings = {"copy_gbps": 4000.0, "matmul_tflops_bfloat16": 500.0}
    found = suite.rates(Cost(2 * 10**12, 4 * 10**9), 8.0, "bfloat16", ceilings)
    assert found == {"gbps": 500.0, "tflops": 250.0, "roofline_percent": 50.0, "intensity": 500.0}
    assert suite.roofline_ms(Cost(10**9, 4 * 10**9), "bfloat16", ceilings) == pytest.approx(1.0)
    assert "roofline_percent" not in suite.rates(Cost(10, 10), 1.0, "bfloat16", {})


def test_copies_exceed_five_times_the_cache():
    l2 = 50 * 2**20
    assert timing.copies_needed(2**20, l2, 2**40) == 251
    assert timing.copies_needed(100, l2, 2**40) == timing.MOST_COPIES
    assert timing.copies_needed(2**30, l2, 2**40) == 2
    assert timing.copies_needed(2**30, l2, 2**31) == 2 and timing.copies_needed(2**30, l2, 0) == 1
    assert timing.copies_needed(2**21, 0, 2**40) > 5 * 126 // 2, "a cache of unknown size is a large one"


def test_the_ceilings_are_finite_and_above_nothing():
    found = timing.ceilings(machine.here().torch_device, [torch.float32], quick=True)
    assert set(found) == {"copy_gbps", "matmul_tflops_float32"}
    assert all(value > 0 and math.isfinite(value) for value in found.values())


class _Clock:
    """A timer that knows when it was asked."""

    method = "test"

    def __init__(self, log, name, fails_at=None):
        self.log, self.name, self.fails_at = log, name, fails_at

    def sample(self):
        self.log.append(self.name)
        if self.log.count(self.name) == self.fails_at:
            raise RuntimeError("tired")
        return 1.0


def test_variants_take_turns():
    log = []
    samples, failed = timing.interleaved({name: _Clock(log, name) for name in "abc"}, 30)
    assert not failed and {name: len(taken) for name, taken in samples.items()} == dict.fromkeys("abc", 30)
    assert len(log) == 93, "a round to warm up, and thirty"
    rounds = [log[i : i + 3] for i in range(0, 93, 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds) and len({tuple(turn) for turn in rounds}) > 3


def test_one_that_fails_does_not_end_the_others():
    log = []
    samples, failed = timing.interleaved({"a": _Clock(log, "a", fails_at=3), "b": _Clock(log, "b")}, 10)
    assert list(samples) == ["b"] and len(samples["b"]) == 10 and str(failed["a"]) == "tired"


def test_time_that_is_up_leaves_samples_enough():
    samples, _ = timing.interleaved({"a": _Clock([], "a")}, 100, seconds=0.0)
    assert len(samples["a"]) == 6
