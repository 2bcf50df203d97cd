"""The list that bounds what may skip."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def _pytest(folder: Path, test: str) -> subprocess.CompletedProcess:
    tests = folder / "tests"
    tests.mkdir()
    for name in ("conftest.py", "allowed_skips.txt"):
        shutil.copy(HERE / name, tests / name)
    (tests / "test_it.py").write_text(f"import pytest\n\n{test}\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", str(tests)]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("test", "status"),
    [
        (
            "def test_it():\n    pytest.skip('Triton is not installed')\n\n"
            "@pytest.mark.xfail(strict=True)\ndef test_other():\n    assert False",
            0,
        ),
        ("@pytest.mark.skip(reason='no time')\ndef test_it():\n    pass\n\ndef test_other():\n    pass", 1),
        ("pytest.importorskip('no_such_package_at_all')", 1),
    ],
    ids=["allowed", "not allowed", "a whole file"],
)
def test_a_skip_that_is_not_in_the_list_fails_the_run(test, status, tmp_path):
    done = _pytest(tmp_path, test)
    assert done.returncode == status, done.stdout + done.stderr
    assert ("not in tests/allowed_skips.txt" in done.stdout) == bool(status)
    # pytest's own closing line stays the last
    last = done.stdout.strip().splitlines()[-1]
    assert " in " in last and ("skipped" in last or "passed" in last)
