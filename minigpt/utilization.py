"""How much of a device training uses: its arithmetic (MFU) and its memory."""

import sys

import torch

from .model import GPT

try:
    import resource
except ImportError:  # Windows
    resource = None

# Dense matrix products with an fp32 sum, TFLOP/s, as the makers' data sheets have them, by the name that the driver
# gives the whole device: another variant of a chip has another clock, so nothing is matched by a part of the name.
_H100 = {"bfloat16": 989.4, "float16": 989.4, "tf32": 494.7, "float32": 66.9}
_A100 = {"bfloat16": 312.0, "float16": 312.0, "tf32": 156.0, "float32": 19.5}
PEAK_TFLOPS: dict[str, dict[str, float]] = {
    "NVIDIA H200": _H100,
    "NVIDIA H100 80GB HBM3": _H100,
    "NVIDIA H100 PCIe": {"bfloat16": 756.0, "float16": 756.0, "tf32": 378.0, "float32": 51.2},
    "NVIDIA A100-SXM4-40GB": _A100,
    "NVIDIA A100-SXM4-80GB": _A100,
    "NVIDIA A100-PCIE-40GB": _A100,
    "NVIDIA A100 80GB PCIe": _A100,
    "NVIDIA L4": {"bfloat16": 121.0, "float16": 121.0, "tf32": 60.0, "float32": 30.3},
    "NVIDIA L40S": {"bfloat16": 362.0, "float16": 362.0, "tf32": 183.0, "float32": 91.6},
    "NVIDIA GeForce RTX 5090": {"bfloat16": 209.5, "float16": 209.5, "tf32": 104.8, "float32": 104.8},
    "NVIDIA GeForce RTX 4090": {"bfloat16": 165.2, "float16": 165.2, "tf32": 82.6, "float32": 82.6},
    "NVIDIA GeForce RTX 3090": {"bfloat16": 71.0, "float16": 71.0, "tf32": 35.6, "float32": 35.6},
}


def peak_tflops(name: str, precision: str) -> float | None:
    """The data sheet's peak of the device called `name` (bfloat16, float16, tf32, float32); None where not known."""
    return PEAK_TFLOPS.get(name, {}).get(precision)


def precision(dtype: torch.dtype) -> str:
    """The precision that matrix products of `dtype` are computed in, under PyTorch's settings."""
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return str(dtype).removeprefix("torch.")


def flops_per_token(model: GPT, window: int) -> int:
    """Operations of forward and backward for one token: 6 N + 12 L C T.

    N are the parameters of the matrix products (embeddings left out, the head counted), L the layers of width C, and T
    the tokens of context, `window`.
    """
    shape = model.config
    head = shape.vocab_size * shape.n_embd
    blocks = sum(p.numel() for block in model.blocks for p in block.parameters() if p.dim() == 2)
    return 6 * (blocks + head) + 12 * shape.n_layer * shape.n_embd * window


def mfu_percent(tokens_per_second: float, flops: int, device_name: str, dtype: torch.dtype) -> float | None:
    """Model FLOPs utilization in percent; None for a device or precision whose peak is not known."""
    peak = peak_tflops(device_name, precision(dtype))
    return None if peak is None else 100 * tokens_per_second * flops / (peak * 1e12)


def peak_memory(device: torch.device) -> int | None:
    """The most bytes in use at once so far: of a GPU by PyTorch's tensors, else of the whole process; None on Windows.

    Asks the host alone, and waits for nothing.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
