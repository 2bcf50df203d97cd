"""MFU by hand, and memory that is there."""

import pytest
import torch

from minigpt import backends
from minigpt.config import ModelConfig
from minigpt.model import GPT
from minigpt.utilization import flops_per_token, mfu_percent, peak_memory, peak_tflops, precision

CPU = torch.device("cpu")


def test_flops_by_hand():
    """One block of width 4: products of 4x12, 4x4, 4x16, 16x4, and a head of 4x10: 232 parameters. T = 8."""
    model = GPT(ModelConfig(10, 8, 1, 2, 4, bias=True), backends.resolve("eager", CPU))
    assert flops_per_token(model, 8) == 6 * (48 + 16 + 64 + 64 + 40) + 12 * 1 * 4 * 8


def test_mfu():
    """1000 tokens/s of 98.94 GFLOP each are 98.94 TFLOP/s: a tenth of an H200's peak."""
    assert mfu_percent(1000, 98_940_000_000, "NVIDIA H200", torch.bfloat16) == pytest.approx(10.0)
    assert mfu_percent(1000, 10**9, "NVIDIA H200 NVL", torch.bfloat16) is None
    assert mfu_percent(1000, 10**9, "AMD EPYC", torch.float32) is None
    assert peak_tflops("NVIDIA L4", "float64") is None


def test_the_precision_is_that_of_the_products():
    assert precision(torch.bfloat16) == "bfloat16" and precision(torch.float32) == "float32"
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert precision(torch.float32) == "tf32" and precision(torch.float16) == "float16"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.slow
def test_memory_grows_with_what_is_held():
    before = peak_memory(CPU)
    held = torch.ones(before, dtype=torch.uint8)  # as much again as was ever in use
    assert 2**26 < before < peak_memory(CPU) < before + 2 * len(held)


@pytest.mark.gpu
def test_that_of_a_gpu_is_its_tensors():
    device = torch.device("cuda")
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    held = torch.empty(2**28, dtype=torch.uint8, device=device)
    assert peak_memory(device) == before + len(held)
