"""Memory that a training step frees stays with the process, for the next step to take again.

glibc gives large freed blocks back to the system, and every step asks for the same blocks anew: the pages come back one
fault at a time, 2,000 to 3,700 a step of the preset shakespeare-cpu, which cost a fifth of it on a virtual machine.
"""

import ctypes
import sys

# Parameters of mallopt(3), and the largest values that it takes.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_TRIM, _LARGEST_MMAP = 2**31 - 1, 32 * 2**20


def keep_freed_memory() -> bool:
    """Ask the C library to keep what is freed, for the whole process; whether it will (glibc does, others do not)."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP) and mallopt(_TRIM_THRESHOLD, _LARGEST_TRIM))
