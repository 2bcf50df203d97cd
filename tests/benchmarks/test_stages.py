"""`python -m benchmarks all`: steps that fail, hang or never come, and the archive that is there all the same."""

import itertools
import json
import os
import sys
import tarfile
import time

import pytest

import benchmarks.__main__
import profiling.__main__
from benchmarks import problems, stages, suite
from benchmarks.stages import Step


def step(name: str, program: str, seconds: float = 20.0, vital: bool = False) -> Step:
    return Step(name, [sys.executable, "-S", "-c", program], seconds, vital)


def follow(steps, tmp_path, seconds=60.0):
    work = tmp_path / "work"
    work.mkdir()
    outcomes = stages.follow(steps, work, tmp_path / "stage.tar.gz", seconds, say=lambda line: None)
    with tarfile.open(tmp_path / "stage.tar.gz") as tar:
        packed = {member.name: tar.extractfile(member).read().decode() for member in tar.getmembers()}
    return outcomes, packed


def test_a_failure_ends_nothing_but_itself(tmp_path):
    steps = [
        step("good", "print('hello')"),
        step("bad", "raise SystemExit('it broke')"),
        step("slow", "import time; print('began', flush=True); time.sleep(60)", seconds=1.5),
        Step("absent", ["/no/such/program"], 5.0),
        step("last", "print('still here')"),
    ]
    outcomes, packed = follow(steps, tmp_path)
    assert [o.status for o in outcomes] == ["ok", "failed", "timed out", "failed", "ok"]
    assert outcomes[1].reason == "status 1: it broke" and outcomes[2].seconds < 10
    assert packed["01-good.log"] == "hello\n" and "began" in packed["03-slow.log"] and "05-last.log" in packed
    assert [entry["status"] for entry in json.loads(packed["steps.json"])] == [o.status for o in outcomes]
    assert "| slow | timed out |" in packed["steps.md"]


def test_a_vital_failure_stops_the_stage(tmp_path):
    outcomes, _ = follow([step("first", "raise SystemExit(3)", vital=True), step("next", "print(1)")], tmp_path)
    assert [o.status for o in outcomes] == ["failed", "skipped"] and "first did not pass" in outcomes[1].reason


def test_what_is_too_slow_stops_nothing(tmp_path):
    """It is not wrong, vital or not."""
    slow = step("first", "import time; time.sleep(60)", seconds=0.5, vital=True)
    outcomes, _ = follow([slow, step("next", "print(1)")], tmp_path)
    assert [o.status for o in outcomes] == ["timed out", "ok"]


def test_without_time_left_a_step_is_skipped(tmp_path):
    slow = step("slow", "import time; time.sleep(60)")
    outcomes, packed = follow([slow, step("next", "print(1)")], tmp_path, seconds=2.0)
    assert [o.status for o in outcomes] == ["timed out", "skipped"]
    assert outcomes[1].reason == "no time was left" and "steps.json" in packed


@pytest.mark.slow
def test_a_step_that_takes_too_long_leaves_the_later_ones_their_share(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "LEAST_SECONDS", 0.5)
    slow = step("slow", "import time; time.sleep(60)", seconds=100.0)
    outcomes, _ = follow([slow, step("next", "print(1)", seconds=100.0), step("last", "print(1)")], tmp_path, 10.0)
    assert [o.status for o in outcomes] == ["timed out", "ok", "ok"]
    assert outcomes[0].seconds < 7.0, "its limit is 100 of 220 parts of 10 seconds"


@pytest.mark.parametrize(
    ("left", "vital", "limit"),
    [(1000.0, False, 100.0), (80.0, False, 20.0), (12.0, False, 10.0), (5.0, False, 5.0), (80.0, True, 80.0)],
)
def test_limits(left, vital, limit):
    later = [step("next", "", seconds=200.0), step("last", "", seconds=100.0)]
    assert stages._limit(step("this", "", 100.0, vital), later, left) == pytest.approx(limit)


def test_what_a_step_writes_is_packed_while_it_runs(tmp_path, monkeypatch):
    """A machine that goes away in the middle of a step leaves an archive with what there was."""
    monkeypatch.setattr(stages, "PACK_SECONDS", 0.2)
    seen = []
    pack = stages.pack
    monkeypatch.setattr(
        stages, "pack", lambda work, archive, also: (pack(work, archive), seen.append(time.monotonic()))
    )
    follow([step("slow", "import time; time.sleep(1.5)")], tmp_path)
    assert len(seen) >= 3


def test_another_folder_is_packed_too(tmp_path):
    """What a sweep knows is where the next one goes on from, and in the archive."""
    tables, archive = tmp_path / "tiles", tmp_path / "stage.tar.gz"
    (tmp_path / "work").mkdir()
    tables.mkdir()
    (tables / "acme.partial").write_text("{}")
    stages.follow([step("none", "pass")], tmp_path / "work", archive, 60.0, say=lambda line: None, also=tables)
    with tarfile.open(archive) as tar:
        assert {"steps.json", "tiles/acme.partial"} <= set(tar.getnames())


@pytest.mark.slow
def test_its_children_end_with_a_step(tmp_path):
    marker = tmp_path / "alive"
    child = f"import time; time.sleep(3); open({str(marker)!r}, 'w')"
    program = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-S', '-c', {child!r}]); time.sleep(60)"
    follow([step("parent", program, seconds=1.0)], tmp_path)
    time.sleep(3.5)
    assert not marker.exists()


@pytest.mark.parametrize("on_gpu", [True, False])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_plans_begin_with_what_everything_rests_on(stage, on_gpu, tmp_path):
    steps = stages.plan(stage, on_gpu, tmp_path)
    assert [s.name for s in steps[:2]] == ["versions", "one-kernel"] and steps[1].vital
    parity = [s for s in steps if s.name == "parity"]
    assert len(parity) == (stage != 3)
    assert all(("-n" in s.command) == on_gpu for s in parity), "one core does not compile its kernels in time"
    assert len({s.name for s in steps}) == len(steps) and all(s.seconds > 0 for s in steps)
    for s in steps:
        for program in (benchmarks.__main__, profiling.__main__):  # every command line of ours is one that there is
            name = program.__name__.split(".")[0]
            if name in s.command:
                program.parser().parse_args(s.command[s.command.index(name) + 1 :])


def _words(step, option):
    """What follows an option of a step's command, until the next one."""
    rest = step.command[step.command.index(option) + 1 :]
    return list(itertools.takewhile(lambda word: not word.startswith("--"), rest))


def test_stage_3_has_time_for_all_that_it_asks(tmp_path):
    """Within the default minutes each step may take what it is said to; training comes before what there is most of."""
    steps = stages.plan(3, True, tmp_path)
    names = ["versions", "one-kernel", "compile", "ladder", "ladder-gpt2", "kernels", "kernels-others", "decode"]
    assert [s.name for s in steps] == names
    left = 8 * 60 - stages.RESERVE_SECONDS
    assert sum(s.seconds for s in steps) <= left
    for number, s in enumerate(steps, 1):
        assert stages._limit(s, steps[number:], left) == s.seconds >= stages.LEAST_SECONDS
        left -= s.seconds
    assert {"start", "trace-torch", "trace-triton"} <= {s.name for s in stages.plan(1, True, tmp_path)}


def test_the_ladder_of_stage_3_compares_alike(tmp_path):
    """Beside ours as a CUDA graph, PyTorch's as one: else the graph's gain would look like the kernels'."""
    for s in stages.plan(3, True, tmp_path)[3:5]:
        rungs = _words(s, "--rung")
        assert rungs[0] == "torch" and {"triton+compile+graph", "torch+compile+graph"} <= set(rungs[1:3])


def test_the_kernels_of_stage_3_leave_out_what_costs_most_and_no_goal_names(tmp_path):
    costly, others = stages.plan(3, True, tmp_path)[5:7]
    ops = _words(costly, "--op") + _words(others, "--op")
    assert sorted(ops) == sorted(op.name for op in problems.ops_named([]))
    rivals = set(_words(costly, "--provider"))
    assert {"triton", "torch", "torch-flash", "torch-cudnn", "flex", "flash_attn", "liger", "cce"} <= rivals
    assert not rivals & {"eager", "compile"} and "--provider" not in others.command
    assert _words(costly, "--rounds") == _words(others, "--rounds") == ["15"]
    first = [(op.name, case) for op, case in suite.in_order(problems.ops_named(_words(costly, "--op")), True, False)][
        :10
    ]
    lengths = {case.shapes["query"][2] for op, case in first if op == "scaled_dot_product_attention"}
    assert {1024, 4096, 16384} <= lengths


@pytest.mark.parametrize(("cores", "processes"), [(2, "2"), (12, "12"), (200, "16")])
def test_parity_on_a_gpu_takes_the_cores_that_it_may(cores, processes, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    (parity,) = [s for s in stages.plan(2, True, tmp_path) if s.name == "parity"]
    assert parity.command[parity.command.index("-n") + 1] == processes
    assert "-v" in parity.command, "the log of one that is ended does not say what passed"


@pytest.mark.slow
@pytest.mark.interpreter
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_rehearsal(stage, tmp_path):
    """As without a GPU: with one it would be no rehearsal, and write tables of tiles."""
    import subprocess

    from benchmarks.machine import ROOT

    command = [sys.executable, "-m", "benchmarks", "all", "--stage", str(stage), "--minutes", "15"]
    without = os.environ | {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    done = subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, env=without, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / f"stage-{stage}.tar.gz").stat().st_size > 1000
