"""The command `emulate`: its table, its counts as JSON, what it refuses, and what it says of a broken kernel."""

import json
import math
import re
import subprocess

import forked
import pytest
import torch

from kernels import catalogue
from kernels.device import HAS_TRITON
from profiling.emulate import LUCK, call, errors

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return forked.run("-m", "profiling", "emulate", *arguments, **environment)


def test_counts_and_errors_of_a_case():
    """A layer norm's launches: right, with at least the bytes that its tensors have; and the heaviest lines."""
    command = ("--op", "layer_norm", "--case", "prime", "--dtype", "bfloat16", "float32", "--lines", "3")
    done = _run(*command, "--json", "-")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["arch"] == "sm_90" and set(document["versions"]) == {"torch", "triton"}
    assert [problem["dtype"] for problem in document["problems"]] == ["bfloat16", "float32"]
    for problem, eps in zip(document["problems"], (2**-8, 2**-23), strict=True):
        assert problem["error"] <= 2 * problem["torch_error"] + 16 * eps
        names = [launch["kernel"] for launch in problem["launches"]]
        assert len(names) == 3 and names[0] == "_layer_norm_forward"
        for launch in problem["launches"]:
            assert launch["programs"] == launch["of"] > 0
            assert launch["moved"] >= 32 and launch["bytes"] > 0
            lines = launch["lines"].values()
            warps = launch["programs"] * launch["warps"]
            assert abs(sum(line["instructions"] for line in lines) / warps - launch["instructions"]) <= 0.5
            assert sum(line["bytes"] for line in lines) // launch["programs"] == launch["bytes"]
            assert all(name.startswith(("layer_norm.py:", "standard.py:", "op.py:", "?")) for name in launch["lines"])
    half, single = (problem["launches"][0]["bytes"] for problem in document["problems"])
    assert 1.3 * half < single <= 2 * half
    every = [
        {name: problem[name] for name in ("op", "case", "dtype")} | {"kernel": launch["kernel"], "line": place} | line
        for problem in document["problems"]
        for launch in problem["launches"]
        for place, line in launch["lines"].items()
    ]
    assert len(every) > 3 and all(one in every for one in document["lines"])
    weights = sorted((line["moved"] + 128 * line["passes"] for line in every), reverse=True)
    assert [line["moved"] + 128 * line["passes"] for line in document["lines"]] == weights[:3]


def test_the_norms_backward_waits_for_bytes_alone():
    """Issuing its instructions takes less than three fifths of the time of its bytes, and no bank of shared memory is
    asked twice, as tl.sum would for sums over rows that lie in different warps."""
    done = _run("--op", "layer_norm", "--case", "384", "768", "--programs", "1", "--json", "-")
    assert done.returncode == 0, done.stderr
    launches = [launch for problem in json.loads(done.stdout)["problems"] for launch in problem["launches"]]
    backward = [launch for launch in launches if launch["kernel"] == "_layer_norm_backward"]
    assert len(backward) == 2
    for launch in backward:
        assert launch["issue_us"] < 0.6 * launch["move_us"] and launch["conflicts"] == 0


@pytest.mark.slow
def test_the_table_of_some_programs_at_real_size(tmp_path):
    """Without the results, which only whole problems have; and the lines that move the most."""
    path = tmp_path / "counts.json"
    done = _run("--op", "layer_norm", "--case", "768", "--programs", "2", "--lines", "3", "--json", str(path))
    assert done.returncode == 0, done.stderr
    assert "Compiled for sm_90 and emulated" in done.stdout and "_layer_norm_forward" in done.stdout
    assert "Lines of the source that move the most" in done.stdout and "layer_norm.py:" in done.stdout
    (problem,) = json.loads(path.read_text())["problems"]
    assert "error" not in problem
    for launch in problem["launches"]:
        assert launch["programs"] == min(2, launch["of"])
        assert f"{launch['programs']} of {launch['of']}" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--op", "layer_nrom"), "unknown op layer_nrom: choose from scaled_dot_product_attention"),
        (("--op", "layer_norm", "--case", "nosuch"), "no case nosuch of these ops: there are one_element"),
        (("--op", "layer_norm", "--case", "one_key_head"), "two_dimensions, gpt2, one_over_a_block, long;"),
        (("--case", "gpt2", "--op", "scaled_dot_product_attention"), "--programs takes the real sizes"),
        (("--json", "/"), "/: it is a folder; give the name of a file in it"),
        (
            ("--case", "wide_head", "--tile", *"attention.forward half/64 64 64 4 2 1 2 1 1".split()),
            "--tile attention.forward half/64: nothing that was chosen takes it. A key of attention is half",
        ),
        (("--programs", "-1"), "--programs, --lines and --order must be 0 or more"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(arguments, says):
    done = _run(*arguments)
    assert done.returncode == 1 and done.stdout == ""
    assert says in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", [str(seed) for seed in range(6)])
def test_warps_in_any_order(seed):
    """Attention's kernels for Hopper, whose warps wait for each other, and those whose warps do not."""
    tiles = ("attention.forward half/64 64 64 4 2 1 2 1 1", "attention.backward_query half/64 64 64 4 2 1 2 1",
             "attention.backward_key half/64 64 64 4 2 1 2 1")  # fmt: skip
    options = [word for tile in tiles for word in ("--tile", *tile.split())]
    command = ("--op", "scaled_dot_product_attention", "--case", "one_over_a_tile", "wide_head", "--order", seed)
    done = _run(*command, *options, "--json", "-")
    assert done.returncode == 0, done.stderr
    hopper, others = json.loads(done.stdout)["problems"]
    assert all(("hopper" in launch["kernel"]) for launch in hopper["launches"]) and not hopper["wrong"]
    assert not any(("hopper" in launch["kernel"]) for launch in others["launches"]) and not others["wrong"]


def test_a_tile_that_does_not_fit_is_told_in_a_line():
    tile = "attention.forward half/64 128 128 16 8 0 0 0 0".split()
    chosen = ("--op", "scaled_dot_product_attention", "--case", "one_over_a_tile", "--tile", *tile)
    done = _run(*chosen, TRITON_INTERPRET="1")  # the command must see to that itself
    assert done.returncode == 1 and done.stderr == ""
    stopped = (
        "stopped: scaled_dot_product_attention, one_over_a_tile, bfloat16: OutOfResources: out of resource: shared"
    )
    assert done.stdout.splitlines()[-1].startswith(stopped)


WRONG = """
import kernels.layer_norm  # the function hides the module
import sys
module = sys.modules["kernels.layer_norm"]
plan = module.plan_forward
def without_eps(specs, options, device):
    return plan(specs, options | {"eps": 2.0}, device)
module.plan_forward = without_eps
from minigpt.errors import door
from profiling.__main__ import main
door(main)
"""


def test_a_wrong_result():
    """A norm with another eps than it was given."""
    done = forked.run("-c", WRONG, "emulate", "--op", "layer_norm", "--case", "gpt2")
    assert done.returncode == 1, done.stderr
    assert "wrong: layer_norm, gpt2, bfloat16: its error is" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("place", range(4))
def test_a_nan_anywhere_is_the_largest_error(place):
    """In the output, or in a gradient whose neighbours are right."""
    op = next(op for op in catalogue.OPS if op.name == "layer_norm")
    case = next(case for case in op.cases if case.name == "gpt2")
    inputs = op.inputs(case, torch.float32, "cpu")
    ours = [one.clone() for one in call(op, op.torch, inputs, case.options, torch.float32)]
    assert errors(op, case, inputs, tuple(ours), torch.float32)[2] <= 0.5
    ours[place].view(-1)[3] = math.nan
    largest, _, ratio = errors(op, case, inputs, tuple(ours), torch.float32)
    assert math.isnan(largest) and not ratio <= LUCK


BROKEN = """
import sys
from profiling.emulator import driver, ptx

def parse(text):
    program = whole(text)
    program.instructions = [
        ptx.Instruction(("membar", "cta"), ()) if one.name == "bar.sync" else one for one in program.instructions
    ]
    return program

whole, driver.ptx.parse = ptx.parse, parse
from minigpt.errors import door
from profiling.__main__ import main
door(main)
"""


def test_a_broken_kernel():
    """Without its barriers a row's sum is read before it is written, or written while it is read: named with its line,
    and the status is 1."""
    command = ("emulate", "--op", "layer_norm", "--case", "gpt2", "--json", "-")
    done = forked.run("-c", BROKEN, *command)
    assert done.returncode == 1, done.stderr
    (problem,) = json.loads(done.stdout)["problems"]
    assert problem["launches"] == []
    assert problem["fault"].startswith("_layer_norm_backward: `")
    assert re.search("(reads|writes) shared memory that another warp (writes|reads), with no barrier", problem["fault"])
    assert "(standard.py:" in problem["fault"] or "(layer_norm.py:" in problem["fault"]
