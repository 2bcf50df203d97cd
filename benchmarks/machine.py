"""What a result was measured on: the device, the software, the state of the checkout, the precision settings."""

import functools
import hashlib
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import kernels.device
from kernels import tiles

ROOT = Path(__file__).resolve().parent.parent


def import_path() -> str:
    """PYTHONPATH for a process of this checkout: what this one has stays, as its libraries may lie there."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


@dataclass(frozen=True)
class Machine:
    """The device that is measured. Bytes for memory and caches; 0 where PyTorch does not say."""

    slug: str
    name: str
    type: str  # "cuda" or "cpu"
    processors: int
    memory: int = 0
    l2: int = 0

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.type)


@functools.cache
def here() -> Machine:
    """The GPU of this process, or its CPU. With Triton's interpreter chosen it is the CPU, GPU or not."""
    if torch.cuda.is_available() and not kernels.device.INTERPRETED:
        properties = torch.cuda.get_device_properties(0)
        return Machine(
            slug=tiles.slug(properties.name),
            name=properties.name,
            type="cuda",
            processors=properties.multi_processor_count,
            memory=properties.total_memory,
            l2=getattr(properties, "L2_cache_size", 0),
        )
    name = _cpu_name()
    return Machine(slug=f"cpu-{tiles.slug(name)}", name=name, type="cpu", processors=os.cpu_count() or 1)


def _cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def clocks() -> dict[str, str] | None:
    """What nvidia-smi says of clocks (MHz), temperature (C), power (W) and throttling now; None without it."""
    fields = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "clocks_throttle_reasons.active")
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(fields, values, strict=True)) if done.returncode == 0 and len(values) == len(fields) else None


def versions() -> dict[str, str]:
    """Versions of what takes part in a measurement."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "system": platform.platform()}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
        if torch.backends.cudnn.is_available():
            found["cudnn"] = str(torch.backends.cudnn.version())
    if kernels.device.HAS_TRITON:
        import triton

        found["triton"] = triton.__version__
    return found


def settings() -> dict[str, str | int | bool]:
    """What decides in which precision, and over how many threads, PyTorch computes."""
    return {
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
        "bf16_reduced_precision_reduction": torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        "threads": torch.get_num_threads(),
        "interpreted": kernels.device.INTERPRETED,
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> dict[str, str | bool | None]:
    """The commit checked out and whether files differ from it; None and False where there is no git to ask.

    Results do not count: those of one command must not make the next one's look like measured with changes.
    """
    changes = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return {"commit": _git("rev-parse", "--short=12", "HEAD"), "dirty": bool(changes)}


def kernels_hash() -> str:
    """SHA-256, 16 digits, over kernels/*.py and the tile tables: what was measured, whatever the commit says."""
    digest = hashlib.sha256()
    for path in sorted([*(ROOT / "kernels").glob("*.py"), *(ROOT / "kernels" / "tiles").glob("*.json")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _plain(table: tiles.Table) -> dict[str, dict[str, list[int]]]:
    return {slot: {key: list(numbers) for key, numbers in found.items()} for slot, found in table.items()}


def describe() -> dict:
    """All of the above, as a results file holds it."""
    machine = here()
    return {
        "machine": asdict(machine),
        "versions": versions(),
        "precision": settings(),
        "clocks": {"start": clocks()},
        "tiles": _plain(tiles.table(machine.name)) if machine.type == "cuda" else {},
        "kernels_hash": kernels_hash(),
        **commit(),
    }
