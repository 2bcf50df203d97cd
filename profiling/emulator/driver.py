"""A GPU that is not there, as Triton sees it: kernels launched on CPU tensors run in the emulator.

PyTorch's own functions compute on the CPU as always, so that whatever takes CPU tensors, with our kernels in it, runs
as it would on a GPU but for who executes the kernels: what ran is the code compiled for `arch`, not Triton's source.
"""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch

from profiling.emulator import ptx
from profiling.emulator.machine import Counts, Machine
from profiling.emulator.memory import Global, Region

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120")


class Emulated:
    """Triton's driver.

    `launched` notes (kernel's name, Machine, Counts) of each launch; `some` programs of each run, 0 for all; `order` is
    the seed of a random order of warps, None for one that is quicker.
    """

    def __init__(
        self, arch: str, watched: bool = True, measured: bool = False, some: int = 0, order: int | None = None
    ):
        from kernels.device import TARGETS

        self.arch, self.watched, self.measured, self.some, self.order = arch, watched, measured, some, order
        self.launched: list[tuple[str, Machine, Counts]] = []
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": TARGETS[arch].shared_memory},
            load_binary=lambda name, *_: (name, name, 32, 0, 1024),
        )

    def launcher_cls(self, source, metadata) -> Callable:
        """What Triton calls to launch one compiled kernel: (grid, 6 things of its own, the arguments)."""
        from triton.runtime import _allocation
        from triton.runtime.cache import get_cache_manager

        with open(get_cache_manager(metadata.hash).get_file(f"{metadata.name}.ptx")) as file:
            program = ptx.parse(file.read())
        machine = Machine(program, metadata.num_warps * 32, metadata.shared)
        owners = machine.threads // 32 + 1 if self.watched else 0
        constant = [kind == "constexpr" for kind in source.signature.values()]

        def launch(x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
            given = [value for value, fixed in zip(arguments, constant, strict=True) if not fixed]
            tensors = {name: value for name, value in zip(_names(source), given, strict=True) if torch.is_tensor(value)}
            parameters = [
                value.data_ptr() if torch.is_tensor(value) else 0 if value is None else value for value in given
            ]
            if metadata.global_scratch_size:
                size = metadata.global_scratch_size * x * y * z
                scratch = _allocation._allocator.get()(size, metadata.global_scratch_align, stream)
                parameters.append(scratch.data_ptr())
                tensors["scratch"] = scratch
            parameters += [0] * (len(program.parameters) - len(parameters))
            memory = Global(merged([region_of(name, tensor) for name, tensor in tensors.items()]), owners)
            counts = machine.launch((x, y, z), parameters, memory, self.watched, self.measured, self.some, self.order)
            self.launched.append((program.name, machine, counts))

        return launch

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", int(self.arch.removeprefix("sm_")), 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _names(source) -> list[str]:
    return [name for name, kind in source.signature.items() if kind != "constexpr"]


def region_of(name: str, tensor: torch.Tensor) -> Region:
    """The bytes of a CPU tensor from its first element to its last, and to the end of a padded last row."""
    start, storage = tensor.data_ptr(), tensor.untyped_storage()
    dimensions = list(zip(tensor.shape, tensor.stride(), strict=True))
    places = max(
        [1 + sum((size - 1) * stride for size, stride in dimensions)] + [n * stride for n, stride in dimensions]
    )
    size = min(places * tensor.element_size(), storage.data_ptr() + storage.nbytes() - start) if tensor.numel() else 0
    return _region(name, start, size)


def _region(name: str, start: int, size: int) -> Region:
    import ctypes

    lead = start % 16
    whole = -(-(lead + size) // 16) * 16
    array = (
        np.frombuffer((ctypes.c_uint8 * whole).from_address(start - lead), np.uint8) if size else np.zeros(0, np.uint8)
    )
    return Region(name, start, size, array, lead)


def merged(regions: list[Region]) -> list[Region]:
    """Regions that overlap, parts of one tensor, as one."""
    found: list[Region] = []
    for region in sorted(regions, key=lambda region: region.start):
        last = found[-1] if found else None
        if last is not None and region.size and region.start < last.start + last.size:
            end = max(last.start + last.size, region.start + region.size)
            name = last.name if region.name in last.name.split(" and ") else f"{last.name} and {region.name}"
            found[-1] = _region(name, last.start, end - last.start)
        elif region.size:
            found.append(region)
    return found


def emulate(arch: str = "sm_90", **settings) -> Emulated:
    """Let kernels run in the emulator on CPU tensors, in this process and from now on.

    `settings` are Emulated's. Raises ValueError for an arch whose PTX it does not know, and where Triton was imported
    as its interpreter: the process must have been started with TRITON_INTERPRET=0.
    """
    import triton

    from kernels import device, op

    if arch not in ARCHS:
        raise ValueError(f"no GPU of {arch} can be emulated: choose from {', '.join(ARCHS)}")
    if device.INTERPRETED:
        raise ValueError("kernels are interpreted in this process: set TRITON_INTERPRET=0 before it starts")
    driver = Emulated(arch, **settings)
    triton.runtime.driver.set_active(driver)
    refused = device.why_not
    device.why_not = lambda place: None if place.type == "cpu" else refused(place)
    op._pretended = device.TARGETS[arch]
    return driver
