"""These tests once more, in a process of their own, on the code that Triton compiles for a GPU, run in the emulator.

The default run takes a part of them; `KERNELS_EMULATE=sm_90 pytest tests/kernels` is all of them, for half an hour.
"""

import os
import re
import subprocess

import forked
import pytest
import torch
from parity import DTYPES

from kernels import catalogue
from kernels.device import HAS_TRITON

pytestmark = [
    pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="compiled kernels are tested on the GPU here"),
    pytest.mark.skipif("KERNELS_EMULATE" in os.environ, reason="compiled kernels are emulated in this very process"),
]

PARITY = "tests/kernels/test_parity.py::test_parity"
OPTIONS = "tests/kernels/test_attention_options.py"
HOPPER = "tests/kernels/test_attention_hopper.py"
QUICK = [
    *(
        f"{PARITY}[{case}-bfloat16]"
        for case in (
            "scaled_dot_product_attention-offset", "scaled_dot_product_attention_qkvpacked-prime",
            "decode_attention-pairs", "layer_norm-prime", "add_layer_norm-prime", "cross_entropy-prime",
            "linear_cross_entropy-prime",
        )
    ),
    "tests/kernels/test_layer_norm.py::test_several_blocks_of_rows_in_parts[1024-bfloat16-2-512-2-4-add_layer_norm]",
    "tests/kernels/test_layer_norm.py::test_many_rows_of_one_element_a_lane[31]",
    f"{PARITY}[cross_entropy-prime-float32]",
    "tests/kernels/test_gradient_in_forward.py::test_it_is_backwards_for_one_bit_for_bit"
    "[bfloat16-mean-0.2-True-5003-here]",
    f"{OPTIONS}::test_parity_with_both[one_over_a_tile-bfloat16]",
    f"{HOPPER}::test_parity[one_over_a_tile-bfloat16-turns]",
    f"{HOPPER}::test_infinite_values[turns]",
]  # fmt: skip


def emulated(arch: str, *tests: str, slow: bool = False) -> subprocess.CompletedProcess:
    """pytest of these tests with kernels compiled for `arch` and emulated."""
    command = ["-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-p", "no:hypothesispytest", "-p", "no:benchmark"]  # they take their time to be imported
    command += ["-m", "not network"] if slow else []
    return forked.run(*command, *tests, timeout=3600 * 6, KERNELS_EMULATE=arch)


def passed(done: subprocess.CompletedProcess) -> int:
    """How many passed, where nothing else happened."""
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    summary = done.stdout.strip().splitlines()[-1]
    found = re.fullmatch(r"(\d+) passed(?:, \d+ warnings?)? in .*", summary)
    assert found, summary
    return int(found.group(1))


def test_some_of_everything():
    """Each op in bf16, rows loaded ahead, attention with the TMA unit's descriptors and overlap, and its Hopper
    kernel."""
    assert passed(emulated("sm_90", *QUICK)) == len(QUICK)


def test_a_target_that_cannot_be_emulated():
    done = emulated("sm_91", QUICK[0])
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    says = (
        "ERROR: KERNELS_EMULATE=sm_91: no GPU of sm_91 can be emulated: choose from sm_80, sm_86, sm_89, sm_90, sm_120"
    )
    assert says in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90", "sm_80", "sm_86", "sm_89", "sm_120"])
def test_parity_of_every_case(arch):
    assert passed(emulated(arch, PARITY, slow=True)) == len(DTYPES) * sum(len(op.cases) for op in catalogue.OPS)


@pytest.mark.slow
def test_attention_with_descriptors_and_overlap():
    tests = [f"{OPTIONS}::{name}" for name in ("test_the_options_change_nothing", "test_parity_with_both")]
    assert passed(emulated("sm_90", *tests, slow=True)) > 100


@pytest.mark.slow
def test_attention_on_hopper():
    tests = ("parity", "log_sum_exp_is_that_of_the_other_kernel", "infinite_values", "other_layouts",
             "the_same_bits_on_any_number_of_processors")  # fmt: skip
    assert passed(emulated("sm_90", *(f"{HOPPER}::test_{name}" for name in tests), slow=True)) > 100
