"""The list that bounds what may skip."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]
HERE = Path(__file__).resolve().parent


def _write(folder: Path, test: str) -> str:
    tests = folder / "tests"
    tests.mkdir()
    for name in ("conftest.py", "allowed_skips.txt"):
        shutil.copy(HERE / name, tests / name)
    (tests / "test_it.py").write_text(f"import pytest\n\n{test}\n")
    return str(tests)


def _pytest(pytester, monkeypatch, test: str, *more: str):
    """A session of its own with these settings, in this process, which has imported PyTorch already."""
    monkeypatch.setenv("PYTHONPATH", str(HERE.parent))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_XDIST_TESTRUNUID"):
        monkeypatch.delenv(name, raising=False)
    return pytester.runpytest_inprocess("-p", "no:cacheprovider", "-q", *more, _write(pytester.path, test))


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
def test_a_skip_that_is_not_in_the_list_fails_the_run(test, status, pytester, monkeypatch):
    done = _pytest(pytester, monkeypatch, test)
    assert done.ret == status
    assert ("not in tests/allowed_skips.txt" in done.stdout.str()) == bool(status)
    # pytest's own closing line stays the last
    last = done.stdout.str().strip().splitlines()[-1]
    assert " in " in last and ("skipped" in last or "passed" in last)


@pytest.mark.parametrize("interpret", ["0", "1"])
def test_what_needs_the_interpreter_here_runs_where_it_is(interpret, tmp_path, monkeypatch):
    """On a machine with a GPU kernels are compiled, and a CPU's tensors have none; unless the interpreter is chosen."""
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    (tmp_path / "sitecustomize.py").write_text("import torch\ntorch.cuda.is_available = lambda: True\n")
    test = """
import kernels, torch

@pytest.mark.interpreted
def test_it():
    x = torch.arange(24.0).reshape(3, 8)
    torch.testing.assert_close(kernels.layer_norm(x, 8), torch.nn.functional.layer_norm(x, (8,)))

@pytest.mark.gpu
def test_other():
    assert not kernels.device.INTERPRETED
"""
    # in a process of its own: the interpreter is chosen when Triton is imported
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-vv", _write(tmp_path, test)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (tmp_path, HERE.parent)))}
    environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    ran, skipped = ("test_it", "test_other") if interpret == "1" else ("test_other", "test_it")
    assert f"::{ran} PASSED" in done.stdout and f"::{skipped} SKIPPED" in done.stdout


@pytest.mark.parametrize("reason", [pytest.param("Triton is not installed", marks=pytest.mark.slow), "no time"])
def test_several_processes_tell_the_same(reason, pytester, monkeypatch):
    """Skips of single tests and of whole files, and the worst of the ratios that each process has seen."""
    test = f"""
@pytest.mark.parametrize("n", range(8))
def test_it(n, ratios):
    key = ("layer_norm", "float32", "output")
    entry = ratios.setdefault(key, {{"max": (0.0, "-"), "rms": (0.0, "-"), "error_max": 0.0, "error_rms": 0.0}})
    entry["max"] = max(entry["max"], (n / 8, f"case {{n}}"))
    if n == 3:
        pytest.skip({reason!r})
"""
    done = _pytest(pytester, monkeypatch, test, "-p", "xdist.plugin", "-n", "2")
    said = done.stdout.str()
    assert (done.ret != 0) == (reason == "no time")
    assert ("not in tests/allowed_skips.txt" in said) == (reason == "no time")
    (line,) = [line for line in said.splitlines() if line.startswith("layer_norm")]
    assert line.split()[3:6] == ["0.88", "case", "7"]
    assert "7 passed, 1 skipped" in said.strip().splitlines()[-1]
