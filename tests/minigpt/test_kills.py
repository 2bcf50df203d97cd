"""kill -9 at any moment: the run goes on, and ends with the same weights and metrics."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "every", "least"), [(3, 23, 3), (20, 1, 60)])
def test_a_run_that_is_killed_ends_as_if_it_had_not_been(text, kills, every, least):
    command = [sys.executable, str(Path(__file__).with_name("killed.py")), str(kills), str(every), str(text)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=text.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    at_random_times, before_a_call = done.stdout.splitlines()
    assert at_random_times == f"{kills} kills at random times"
    assert int(before_a_call.split()[0]) >= least
