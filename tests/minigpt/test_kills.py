"""kill -9 at any moment: the run goes on, and ends with the same weights and metrics."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def killed(how, count, text):
    """What killed.py said at its end."""
    command = [sys.executable, str(Path(__file__).with_name("killed.py")), how, str(count), str(text)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=text.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_at_random_times(text, kills):
    assert killed("times", kills, text).startswith(f"{kills} kills")


@pytest.mark.parametrize("every", [23, pytest.param(1, marks=pytest.mark.slow)])
def test_kills_before_what_changes_the_disk(text, every):
    kills = int(killed("calls", every, text).split()[0])
    assert kills >= (3 if every > 1 else 50)
