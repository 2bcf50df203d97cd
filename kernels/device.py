"""Facts about the device that kernels run on, and whether Triton's interpreter stands in for one.

Imports torch, but Triton only once the choice of interpreter has been made: Triton reads
TRITON_INTERPRET while it is imported, and half of its library stays as it was chosen then.
"""

import functools
import importlib.util
import os
import sys
from dataclasses import dataclass, replace

import torch


def choose_interpreter() -> None:
    """Set TRITON_INTERPRET=1 if there is no GPU, nothing was said, and Triton is not imported yet."""
    if "TRITON_INTERPRET" not in os.environ and "triton" not in sys.modules and not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


def _interpreter_state() -> tuple[bool, bool]:
    """(asked for, what Triton's own library was imported as)."""
    asked = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")
    from triton import language
    from triton.runtime.interpreter import InterpretedFunction

    return asked, isinstance(language.zeros, InterpretedFunction)


HAS_TRITON = importlib.util.find_spec("triton") is not None
choose_interpreter()
_ASKED, INTERPRETED = _interpreter_state() if HAS_TRITON else (False, False)
DEBUG = os.environ.get("KERNELS_DEBUG", "0") not in ("", "0")


OLDEST = (8, 0)  # compute capability that Triton supports; of what is older, some kernels do not fit shared memory


@functools.cache
def interpreter_misfit() -> str | None:
    """Why Triton's interpreter cannot work with the installed numpy, and what to do; None if it can."""
    import numpy
    import triton

    there = [tuple(map(int, module.__version__.split(".")[:2])) for module in (triton, numpy)]
    if there[0] >= (3, 7) or there[1] < (2, 4):  # those numbers are made of arrays of one element, which 2.4 refuses
        return None
    return (
        f"the interpreter of Triton {triton.__version__} does not work with numpy {numpy.__version__}: "
        '`pip install "numpy<2.4"`, or Triton 3.7 or above with the PyTorch that needs it'
    )


@functools.cache
def _too_old(device: torch.device) -> str | None:
    """why_not of a GPU by its age; None where there is no GPU to ask, as where only shapes are computed."""
    if torch.version.hip or not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability >= OLDEST:
        return None
    return (
        f"{torch.cuda.get_device_name(device)} has compute capability {'.'.join(map(str, capability))}, and Triton "
        f"needs {'.'.join(map(str, OLDEST))} or above; kernels.reference has the same functions in plain PyTorch"
    )


def why_not(device: torch.device) -> str | None:
    """None if kernels can run on tensors of `device`; otherwise one line that says what to do."""
    if not HAS_TRITON:
        return (
            "Triton is not installed: `pip install triton` (Linux only); kernels.reference has the same functions "
            "in plain PyTorch"
        )
    if _ASKED != INTERPRETED:
        return (
            "Triton was imported before TRITON_INTERPRET was chosen: set TRITON_INTERPRET=1 in the environment, or "
            "`import kernels` before anything that imports Triton (building a torch.optim.AdamW does)"
        )
    if device.type == "cuda":
        return _too_old(device)
    if device.type == "cpu" and INTERPRETED:
        return interpreter_misfit()
    if device.type == "cpu":
        return (
            "Triton kernels on CPU tensors need Triton's interpreter: set TRITON_INTERPRET=1 in the environment, or "
            "`import kernels` before anything that imports Triton (building a torch.optim.AdamW does)"
        )
    return f"Triton kernels run on CUDA and ROCm GPUs, or on CPU tensors in the interpreter, not on '{device.type}'"


@dataclass(frozen=True)
class Device:
    """What a plan may know of a device."""

    arch: str  # "sm_90", "gfx942", ..., "interpreter"
    processors: int  # streaming multiprocessors or compute units
    shared_memory: int  # bytes one program can have
    name: str = ""  # the GPU's own, by which tuned tiles are found; none for what is only compiled for

    @property
    def tiles(self) -> str:
        """The architecture whose row of a tile table to take."""
        if self.arch in ("sm_80", "interpreter"):
            return self.arch
        if self.arch.startswith("gfx"):
            return "gfx942"
        number = int(self.arch.removeprefix("sm_"))
        if number < 90 or number >= 120:  # consumer parts have sm_89's 99 KB or less
            return "sm_89"
        return "sm_90" if number < 100 else "sm_100"

    @property
    def descriptors(self) -> bool:
        """Whether kernels can load through tensor descriptors (the TMA unit): compute capability 9.0 and above."""
        return self.arch.startswith("sm_") and int(self.arch.removeprefix("sm_")) >= 90

    @property
    def warpgroups(self) -> bool:
        """Whether four warps issue products on the tensor cores together (wgmma): compute capability 9.0 alone."""
        return self.arch == "sm_90"


TARGETS = {
    "sm_80": Device("sm_80", 108, 163 * 1024),
    "sm_86": Device("sm_86", 82, 99 * 1024),
    "sm_89": Device("sm_89", 128, 99 * 1024),
    "sm_90": Device("sm_90", 132, 227 * 1024),
    "sm_100": Device("sm_100", 148, 227 * 1024),
    "sm_120": Device("sm_120", 170, 99 * 1024),
    "gfx942": Device("gfx942", 304, 64 * 1024),
}


def target(arch: str) -> Device:
    """What to compile for `arch` by: one of TARGETS, or for any other the one whose tiles it takes."""
    return TARGETS.get(arch) or replace(TARGETS[Device(arch, 0, 0).tiles], arch=arch)


INTERPRETER = Device("interpreter", 4, 1 << 40)


@functools.cache
def facts(device: torch.device) -> Device:
    """The Device that tensors on `device` run on."""
    if device.type != "cuda" or INTERPRETED:
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Device(
            properties.gcnArchName.split(":")[0], properties.multi_processor_count, 64 * 1024, properties.name
        )
    arch = f"sm_{properties.major}{properties.minor}"
    return Device(arch, properties.multi_processor_count, properties.shared_memory_per_block_optin, properties.name)


def allow_tf32(tensor: torch.Tensor) -> bool:
    """Whether PyTorch is set to compute matrix products of such a tensor in TF32."""
    if tensor.dtype != torch.float32:
        return False
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # set in PyTorch's newer words, torch.backends.*.fp32_precision, which this does not know
        return torch.backends.cuda.matmul.fp32_precision == "tf32"
