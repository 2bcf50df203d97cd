"""Memory that a process frees stays its own."""

import os
import subprocess
import sys

import pytest

FAULTS = """
import resource
import torch
from minigpt.allocator import keep_freed_memory

kept = {keep} and keep_freed_memory()
for step in range(30):
    if step == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(2**20) for _ in range(16)]
    del blocks
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(keep):
    code = FAULTS.format(keep=keep)
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # else glibc moves it, now and then, by itself
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    kept, count = done.stdout.split()
    return kept == "True", int(count)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is Linux's")
def test_no_page_faults_once_memory_is_kept():
    kept, count = faults(keep=True)
    if not kept:
        pytest.skip("this C library has no mallopt")
    assert count < 100
    assert faults(keep=False)[1] > 1000
