"""Memory that a process frees stays its own."""

import os
import subprocess
import sys

import pytest

FAULTS = """
import resource
import torch
from minigpt.allocator import keep_freed_memory

def faults():
    for step in range(30):
        if step == 10:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [torch.ones(2**18) for _ in range(4)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(), keep_freed_memory(), faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is Linux's")
def test_no_page_faults_once_memory_is_kept():
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # else glibc moves it, now and then, by itself
    done = subprocess.run([sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True, check=True)
    before, kept, after = done.stdout.split()
    if kept != "True":
        pytest.skip("this C library has no mallopt")
    assert int(before) > 1000 and int(after) < 100
