"""What a person can get wrong: one clear line, a status that is not 0, and no traceback."""

import os
import subprocess
import sys

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.machine import ROOT
from minigpt.errors import UserError

WRONG = {
    "unknown op 'softmax': choose from scaled_dot_product_attention": ["kernels", "--op", "softmax"],
    "unknown provider 'cudnn': choose from triton": ["kernels", "--provider", "cudnn"],
    "--rounds must be at least 1": ["kernels", "--rounds", "0"],
    "unknown preset 'gpt5': choose one of": ["train", "--preset", "gpt5"],
    "unknown kernels 'cuda'": ["train", "--rung", "cuda"],
    "--steps must be at least 1": ["train", "--steps", "0"],
    "--block must be at least 1, not 0": ["decode", "--block", "64", "0"],
    "--batch must be at least 1, not -1": ["decode", "--batch", "-1"],
    "unknown kernels 'cuda': choose": ["decode", "--kernels", "torch", "cuda"],
    "is no checkout of nanoGPT": ["train", "--nanogpt", "{folder}", "--out", "{folder}"],
    "{folder}/text": ["train", "--data", "{folder}/text", "--out", "{folder}"],
    "{folder} is a folder": ["report", "{folder}"],
    "invalid choice": ["kernels", "--dtype", "int8"],
    "there is no": ["compare", "{folder}/a.json", "{folder}/b.json"],
    "there is no {folder}": ["report", "{folder}/a.json"],
    "--minutes must be above 0": ["all", "--stage", "1", "--minutes", "0", "--out", "{folder}"],
    "a part of the path is a file": ["kernels", "--op", "layer_norm", "--out", "{file}"],
    "the following arguments are required": ["all", "--stage", "1"],
}


@pytest.mark.parametrize("said", WRONG)
def test_one_line_says_what_is_wrong(said, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    places = {"folder": str(tmp_path), "file": str(tmp_path / "file")}
    monkeypatch.setattr(sys, "argv", ["benchmarks", *(word.format(**places) for word in WRONG[said])])
    with pytest.raises(UserError) as error:
        main()
    assert said.format(**places) in str(error.value) and "\n" not in str(error.value).strip()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_tuning_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "tune"])
    with pytest.raises(UserError, match="needs a CUDA GPU; --dry-run"):
        main()


def run(*arguments, **environment) -> subprocess.CompletedProcess:
    command = [sys.executable, *arguments]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(command, cwd=ROOT, env=inherited | environment, capture_output=True, text=True, timeout=300)


def test_the_door(tmp_path):
    done = run("-m", "benchmarks", "kernels", "--op", "softmax")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: unknown op 'softmax'") and done.stderr.count("\n") == 1


def benchmarks(*chosen) -> subprocess.CompletedProcess:
    """`pytest benchmarks`, without plugins that take their time to be imported."""
    without = ("-p", "no:cacheprovider", "-p", "no:hypothesispytest", "-p", "no:xdist")
    return run("-m", "pytest", "benchmarks", "-q", *without, *chosen)


@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param(("-k", "layer_norm and forward-liger or layer_norm and forward-triton"), marks=pytest.mark.slow),
        ("-k", "nothing_is_called_so"),
        pytest.param(("-k", "layer_norm-128-forward-torch", "--benchmark-disable"), marks=pytest.mark.slow),
    ],
)
def test_a_pytest_run_without_a_benchmark_fails(chosen):
    """A session in which everything is skipped has measured nothing."""
    done = benchmarks(*chosen)
    ran_one = torch.cuda.is_available() and "triton" in chosen[1]
    assert (done.returncode == 0) == ran_one, done.stdout + done.stderr
    assert ("no benchmark ran at all" in done.stdout) != ran_one


def test_a_pytest_run_with_one_passes():
    chosen = (
        "layer_norm-384-forward-torch and not add"
        if torch.cuda.is_available()
        else "layer_norm-128-forward-torch and not add"
    )
    done = benchmarks("-k", chosen)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr


def test_plain_pytest_does_not_collect_the_benchmarks():
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert settings["tool"]["pytest"]["ini_options"]["testpaths"] == ["tests"]
