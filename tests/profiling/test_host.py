"""What a call costs the host, in counts: launches, plans, PyTorch ops, Python calls. Times are for people to read."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.device import HAS_TRITON
from minigpt.errors import door
from profiling import __main__, host

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")

ROOT = Path(__file__).resolve().parents[2]


def _python(*arguments: str) -> subprocess.CompletedProcess:
    # the interpreter is chosen in this process; what launches compiled kernels needs one without
    environment = os.environ | {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path])
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def calls() -> dict[tuple[str, str], dict]:
    done = _python("-m", "profiling", "host", "--rounds", "1", "--json", "-")
    assert done.returncode == 0 and "profiler_start" not in done.stderr, done.stderr
    return {(call["op"], call["what"]): call for call in json.loads(done.stdout)["calls"]}


def test_a_folder_that_is_not_there_is_told_before_the_work(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # the command would start over
    monkeypatch.setattr(host, "measure", lambda *_: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["profiling", "host", "--json", "no/such/folder/host.json"])
    with pytest.raises(SystemExit) as left:
        door(__main__.main)
    said = capsys.readouterr().err
    assert left.value.code == 1 and "error: " in said and "no such folder" in said, said


def test_the_python_calls_of_backward_on_a_gpu_are_not_known():
    """Autograd makes them on a thread of its own there, where the count does not look."""
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert host.python_calls(lambda: 1 / 0, "forward and backward", gpu) is None
    for what, device in (("forward", gpu), ("no gradients", gpu), ("forward and backward", cpu)):
        assert host.python_calls(lambda: json.dumps(1), what, device) >= 1


def test_every_op_is_there(calls):
    from kernels import catalogue

    assert {op for op, _ in calls} == {op.name for op in catalogue.OPS}
    for op in catalogue.OPS:
        assert ((op.name, "forward and backward") in calls) == bool(op.differentiable)


def test_a_second_call_plans_nothing_and_asks_triton_nothing(calls):
    assert not {key: call["plans"] for key, call in calls.items() if call["plans"]}


def test_nothing_waits_for_the_device(calls):
    waiting = ("aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal")
    for key, call in calls.items():
        assert not set(waiting) & set(call["aten_ops"]), key


# (launches, PyTorch ops, Python calls). PyTorch ops are counted with those that others run: torch.empty_like is two.
# What of them allocates: the outputs, the statistics that backward needs, and workspaces.
MOST = {
    ("scaled_dot_product_attention", "forward"): (1, 6, 65),
    ("scaled_dot_product_attention", "forward and backward"): (2, 20, 130),
    ("scaled_dot_product_attention_qkvpacked", "forward"): (1, 17, 60),
    ("scaled_dot_product_attention_qkvpacked", "forward and backward"): (2, 43, 125),
    ("decode_attention", "no gradients"): (1, 4, 55),
    ("layer_norm", "forward"): (1, 10, 55),
    ("layer_norm", "forward and backward"): (3, 28, 150),
    ("add_layer_norm", "forward"): (1, 16, 65),
    ("add_layer_norm", "forward and backward"): (3, 38, 180),
    ("cross_entropy", "forward"): (2, 7, 74),
    ("cross_entropy", "forward and backward"): (3, 9, 125),
    ("linear_cross_entropy", "forward"): (1, 70, 72),
    ("linear_cross_entropy", "forward and backward"): (3, 78, 150),
}


@pytest.mark.parametrize("key", MOST, ids=" ".join)
def test_a_call_does_no_more_than_it_did(key, calls):
    call, most = calls[key], MOST[key]
    assert call["launches"] == most[0]
    assert sum(call["aten_ops"].values()) <= most[1], call["aten_ops"]
    assert call["python_calls"] <= most[2]


LAUNCHED_TWICE = """
import torch
from profiling.host import stand_in, ways
from kernels import catalogue
from kernels.op import _launches, count_launches
driver, known = stand_in(), set()

def launched(call):
    driver.launched = []
    with count_launches() as kernels:
        call()
    # what the op allocates lies elsewhere at each call, and profilers get a dictionary: all else must agree
    def plain(x):
        if torch.is_tensor(x):
            return x.shape, x.stride(), x.dtype
        return x if isinstance(x, (int, float, str, tuple, type(None))) else type(x)
    return set(kernels), [[plain(x) for x in one] for one in driver.launched]

for op in catalogue.OPS:
    for case in op.cases:
        names = {launch.name for launch in op.plan(op.inputs(case, torch.float16, "meta"), case.options, DEVICE)}
        if names <= known:
            continue
        call = list(ways(op, op.public, op.inputs(case, torch.float16, "cpu"), case.options).values())[-1]
        _launches.cache_clear()
        through_triton, directly = launched(call), launched(call)
        assert through_triton == directly and directly[1], (op.name, case.name)
        known |= directly[0]
print(len(known))
""".replace("DEVICE", "__import__('kernels').device.TARGETS['sm_90']")


def test_a_kernel_started_directly_gets_what_triton_gives_it():
    """The first call goes through Triton, which picks the kernel and orders its arguments; the second does not."""
    done = _python("-c", LAUNCHED_TWICE)
    assert done.returncode == 0 and int(done.stdout) >= 15, done.stdout + done.stderr
