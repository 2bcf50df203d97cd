"""The sweep of tiles: what it tries, drops, keeps and remembers."""

import argparse
import importlib
import itertools
import json
import os
import sys
import threading
from dataclasses import replace
from unittest import mock

import pytest
import torch

from benchmarks import machine, results, sweep, trial, tune
from benchmarks.problems import Checker, Problem
from benchmarks.sweep import Candidate
from kernels import tiles
from kernels.device import TARGETS, facts
from kernels.op import Case

ENTRIES = sweep.entries()
NORM = next(entry for entry in ENTRIES if entry.slot == "layer_norm.forward")
BASE = TARGETS["sm_90"]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_every_entry_is_one_that_its_plan_asks_for(entry):
    """The real case and the small one both take a launch from a candidate's numbers."""
    op, case = sweep.case_of(entry)
    tried = sweep.candidates(entry, BASE)
    assert tried[0].numbers == () and 60 > len({c.numbers for c in tried}) == len(tried) > 3
    for problem in (case, entry.small):
        inputs = op.inputs(problem, getattr(torch, entry.dtype), "meta")
        before = op.plan(inputs, problem.options, BASE)
        changed = [c for c in tried[1:] if op.plan(inputs, problem.options, c.device(BASE)) != before]
        assert len(changed) >= len(tried) - 2, "candidates that change nothing"


def test_descriptors_are_tried_where_there_are_any():
    """From compute capability 9.0 on, in half precision: where every plan of a candidate with the option takes it."""
    for entry in ENTRIES:
        if not entry.slot.startswith("attention"):
            continue
        op, case = sweep.case_of(entry)
        inputs = op.inputs(case, getattr(torch, entry.dtype), "meta")
        for arch in ("sm_80", "sm_89", "gfx942"):
            assert not any(any(c.numbers[4:]) for c in sweep.candidates(entry, TARGETS[arch]))
        for arch in ("sm_90", "sm_100"):
            found = [c for c in sweep.candidates(entry, TARGETS[arch]) if any(c.numbers[4:])]
            assert bool(found) == entry.key.startswith("half"), entry.name
            for candidate in found:
                launches = op.plan(inputs, case.options, candidate.device(TARGETS[arch]))
                assert any(x.scratch for x in launches) == bool(candidate.numbers[4])
                used = {x.constexprs["WARPGROUPS"] for x in launches if x.gluon}
                assert used == {number for number in candidate.numbers[5:6] if number}
                overlaps = any(x.constexprs.get("OVERLAP") or x.name == "_attention_forward_hopper" for x in launches)
                assert overlaps == bool(sum(candidate.numbers[7:]))


def test_warpgroups_are_tried_on_hopper_for_attention_without_dropout():
    found = {
        (entry.name, arch)
        for entry, arch in itertools.product(ENTRIES, TARGETS)
        for candidate in sweep.candidates(entry, TARGETS[arch])
        if entry.slot.startswith("attention") and sum(candidate.numbers[5:6])
    }
    passes = [*itertools.product(("forward", "backward_query", "backward_key"), ("half/64", "half/128"))]
    passes += [("forward", "half/256"), ("backward_key", "half-grouped/128")]
    assert found == {(f"attention.{slot} {key}", "sm_90") for slot, key in passes}


def test_candidates_are_compiled_by_the_libraries_of_this_process(monkeypatch):
    """Triton itself may lie in a folder of PYTHONPATH: another one would compile other kernels than run."""
    seen = []

    def run(command, *, env, **_):
        seen.append(env["PYTHONPATH"])
        raise InterruptedError

    monkeypatch.setenv("PYTHONPATH", "/libraries")
    monkeypatch.setattr(sweep.subprocess, "Popen", run)
    with pytest.raises(InterruptedError):
        sweep.compiled([Candidate(NORM)], "sm_90", 1)
    assert seen == [f"{machine.ROOT}:/libraries"]


def test_the_default_is_not_what_a_table_says():
    """A second sweep must beat what stands beside the op, not what the first one found."""
    assert Candidate(NORM).device(replace(BASE, name="somebody")).name == ""


def _compiled(entries, partial):
    """What tune.compiled yields in a dry run."""
    return tune.compiled(entries, BASE, partial, argparse.Namespace(quick=False, dry_run=True, workers=1))


def test_only_what_compiles_and_is_right_survives(tmp_path, monkeypatch):
    tried = [Candidate(NORM), *(Candidate(NORM, numbers) for numbers in ((1, 4), (2, 8), (4, 4)))]
    asked = []

    def compiled(chosen, arch, workers, keep):
        assert not keep, "a dry run leaves nothing in Triton's cache"
        asked.append([c.numbers for c in chosen])
        return {c.name: "spills 8 B" if c.numbers == (1, 4) else "" for c in chosen}

    def survivors(partial):
        ((entry, candidates),) = _compiled([NORM], partial)
        assert entry == NORM and candidates == tried
        return tune.survivors(entry, candidates, BASE, partial, True)

    monkeypatch.setattr(sweep, "candidates", lambda entry, device: tried)
    monkeypatch.setattr(sweep, "compiled", compiled)
    monkeypatch.setattr(tune, "problem_of", lambda entry, dry: None)
    monkeypatch.setattr(tune, "Checker", lambda problem: None)
    monkeypatch.setattr(tune, "judge", lambda c, base, checker: "wrong: so" if c.numbers == (2, 8) else "")
    right = survivors(tune.Partial(tmp_path / "p.json"))
    assert [c.numbers for c in right] == [(), (4, 4)]
    # what is known is not asked again, by this sweep or by one that goes on from it
    assert survivors(tune.Partial(tmp_path / "p.json")) == right and len(asked) == 1
    monkeypatch.setattr(tune, "_kernels_hash", lambda: "other kernels")
    survivors(tune.Partial(tmp_path / "p.json"))
    assert len(asked) == 2


def test_the_next_entry_compiles_while_one_is_busy(tmp_path, monkeypatch):
    entries = ENTRIES[:3]
    begun = {entry.name: threading.Event() for entry in entries}

    def compiled(chosen, arch, workers, keep):
        begun[chosen[0].entry.name].set()
        return dict.fromkeys((c.name for c in chosen), "")

    monkeypatch.setattr(sweep, "candidates", lambda entry, device: [Candidate(entry)])
    monkeypatch.setattr(sweep, "compiled", compiled)
    partial = tune.Partial(tmp_path / "p.json")
    for place, (entry, _) in enumerate(_compiled(entries, partial)):
        assert partial.known["compiled"][Candidate(entry).name] == ""
        if place < 2:
            assert begun[entries[place + 1].name].wait(5.0), "nothing compiles beside"
        if place < 1:
            assert not begun[entries[2].name].is_set(), "one entry ahead, not all"


CHILD = """
import json, os, sys, time
print("ready", flush=True)
for what in json.loads(sys.argv[1]):
    if what == "hangs":
        time.sleep(1000)
    if what == "dies":
        os._exit(3)
    print(json.dumps(what), flush=True)
    if "CUDA" in what:
        os._exit(1)
"""


def test_candidates_are_compiled_for_the_gpu_and_not_for_its_kin(tmp_path, monkeypatch):
    base, asked = replace(BASE, arch="sm_121"), []
    monkeypatch.setattr(sweep, "candidates", lambda entry, device: [Candidate(entry)])
    monkeypatch.setattr(sweep, "compiled", lambda chosen, arch, workers, keep: asked.append(arch) or {})
    options = argparse.Namespace(quick=False, dry_run=True, workers=1)
    assert len(list(tune.compiled([NORM], base, tune.Partial(tmp_path / "p.json"), options))) == 1
    assert asked == ["sm_121"]


def test_a_compiler_that_does_not_end_holds_up_one_entry_alone(monkeypatch):
    monkeypatch.setattr(sweep, "COMPILING", 0.2)
    tried = [Candidate(NORM), Candidate(NORM, (2, 4))]
    assert sweep.compiled(tried, "sm_90", 1) == {one.name: "not compiled within 0 s" for one in tried}


def test_what_hangs_or_dies_is_that_candidates_fault_alone(monkeypatch):
    said = ["", "CUDA error", "", "hangs", "wrong: so", "CUDA error", "dies", "dies", "", "hangs", "", "wrong: so"]
    tried = [Candidate(NORM, (1, 1 << place)) for place in range(len(said))]
    by_name = dict(zip((candidate.name for candidate in tried), said, strict=True))

    def command(entry, candidates, arch):
        return [sys.executable, "-c", CHILD, json.dumps([by_name[candidate.name] for candidate in candidates])]

    monkeypatch.setattr(trial, "_command", command)
    found = dict(trial.outcomes(NORM, tried, "sm_90", seconds=1.5))
    assert list(found) == list(by_name)
    late, ended, no = (
        "did not end within 2 s",
        "its process ended with status 3",
        "not tried: 2 of its kind did not end",
    )
    error = "CUDA error"
    assert list(found.values()) == ["", error, "", late, "wrong: so", error, ended, ended, "", late, no, no]


def test_candidates_in_gluon_are_judged_apart(tmp_path, monkeypatch):
    """And told apart by their plans. Without a GPU the interpreter is what runs, and says that it cannot."""
    for name, value in (("CUDA_VISIBLE_DEVICES", ""), ("TRITON_INTERPRET", "1")):
        monkeypatch.setenv(name, value)
    entry = next(entry for entry in ENTRIES if entry.name == "attention.forward half/64")
    tried = [Candidate(entry, (64, 64, 4, 3, 1, 2, 1, 1)), Candidate(entry, (128, 64, 8, 2, 1, 0, 0, 1))]
    assert [sweep.in_gluon(candidate, BASE) for candidate in tried] == [True, False]
    monkeypatch.setattr(tune, "judge", lambda candidate, base, checker: "")
    partial = tune.Partial(tmp_path / "p.json")
    partial.enter("compiled", dict.fromkeys((candidate.name for candidate in tried), ""))
    assert tune.survivors(entry, tried, BASE, partial, True) == tried[1:]
    assert "Gluon" in partial.known["judged"][tried[0].name] and partial.known["judged"][tried[1].name] == ""


def test_a_tile_that_is_wrong_is_found(monkeypatch):
    """A kernel that owns twice the rows that its grid thinks would leave half of them unwritten."""
    module = importlib.import_module("kernels.layer_norm")  # kernels.layer_norm is the function
    case = Case("t", {"input": (9, 64), "weight": (64,), "bias": (64,)}, {"normalized_shape": (64,)})
    op, _ = sweep.case_of(NORM)
    device = machine.here().torch_device
    checker = Checker(Problem(op, case, torch.float32, device))
    base = facts(device)
    candidate = Candidate(replace(NORM, key="64"), (2, 4))
    if base.arch == "interpreter":
        base = TARGETS["sm_90"]
    assert tune.judge(candidate, base, checker) == ""
    plan = module.plan_forward

    def short(specs, options, device):
        (launch,) = plan(specs, options, device)
        return [replace(launch, grid=(max(1, launch.grid[0] - 1),))]

    monkeypatch.setattr(module, "plan_forward", short)
    assert "wrong" in tune.judge(candidate, base, checker)


class _Steady:
    """A timer that always takes the same; or fails, from its nth sample on."""

    def __init__(self, milliseconds, fails_at=10**9):
        self.milliseconds, self.left = milliseconds, fails_at

    def sample(self):
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("gone")
        return self.milliseconds


@pytest.mark.parametrize(
    ("timers", "winner", "verdict"),
    [
        ({"default": _Steady(2.0), "other": _Steady(1.0)}, (2, 8), "FASTER"),
        ({"default": _Steady(1.0), "other": _Steady(2.0)}, None, "SAME"),
        ({"other": _Steady(1.0)}, (2, 8), "FASTER"),
        ({"default": _Steady(2.0, fails_at=20), "other": _Steady(1.0)}, None, "UNCLEAR"),
        ({}, None, "nothing could be timed"),
    ],
)
def test_only_what_is_faster_wins_and_what_cannot_be_timed_ends_nothing(timers, winner, verdict, tmp_path, monkeypatch):
    tried = {"default": Candidate(NORM), "other": Candidate(NORM, (2, 8))}
    made = iter(timers.get(name) for name in tried)

    def timer(functions, stream):
        if (found := next(made)) is None:
            raise RuntimeError("cannot be launched")
        return found

    monkeypatch.setattr(tune, "problem_of", lambda entry, dry: None)
    monkeypatch.setattr(tune.suite, "copies_of", lambda problem: [])
    monkeypatch.setattr(tune.timing, "cuda_timer", timer)
    for name in ("Stream", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    partial = tune.Partial(tmp_path / "p.json")
    best = tune.decide(NORM, list(tried.values()), BASE, partial)
    assert (best and best.numbers) == winner and partial.known["decided"][NORM.name]["verdict"] == verdict


@pytest.mark.parametrize("in_gluon", [True, False])
def test_timing_that_hangs_ends_the_sweep_and_the_next_goes_on_without_it(in_gluon, tmp_path, monkeypatch):
    tried, ended, known = [Candidate(NORM), Candidate(NORM, (2, 8))], threading.Event(), {}

    def timed(entry, right, base):
        assert ended.wait(30)
        return {}, "FASTER", Candidate(NORM)

    def end(status):
        known.update(json.loads((tmp_path / "p.json").read_text()))
        ended.set()

    monkeypatch.setattr(tune, "TIMING", 0.1)
    monkeypatch.setattr(tune, "_timed", timed)
    monkeypatch.setattr(sweep, "in_gluon", lambda candidate, base: in_gluon and bool(candidate.numbers))
    monkeypatch.setattr(os, "_exit", end)
    tune.decide(NORM, tried, BASE, tune.Partial(tmp_path / "p.json"))
    if in_gluon:
        assert known["judged"] == {tried[1].name: "timing did not end within 0 s"} and not known["decided"]
    else:
        decided = known["decided"][NORM.name]
        assert decided["best"] == [] and "did not end" in decided["verdict"]


def test_a_table_that_is_written_can_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tiles, "FOLDER", tmp_path)
    tiles._load.cache_clear()
    tune.write_table({NORM.slot: {NORM.key: [2, 8]}}, "ACME G-9", tmp_path / "acme-g-9.json")
    assert tiles.table("ACME G-9") == {NORM.slot: {NORM.key: (2, 8)}}
    assert json.loads((tmp_path / "acme-g-9.json").read_text())["versions"]["torch"]
    tiles._load.cache_clear()


def test_a_damaged_partial_file_starts_anew(tmp_path):
    results.write(tmp_path / "p.json", "{")
    assert tune.Partial(tmp_path / "p.json").known["compiled"] == {}


@pytest.mark.slow
def test_compilation_in_a_process_of_its_own():
    loss = next(entry for entry in ENTRIES if entry.name == "cross_entropy.forward 128")
    candidate = Candidate(loss, (128, 8, 8))
    assert sweep.compiled([candidate], "sm_90", 1) == {candidate.name: ""}


@pytest.mark.slow
def test_descriptors_with_overlap_survive_and_what_waits_for_its_products_does_not():
    forward = {entry.key: entry for entry in ENTRIES if entry.slot == "attention.forward"}
    good = [
        Candidate(forward["half/64"], (128, 64, 8, 2, 1, 0, 0, 1)),
        Candidate(forward["half/128"], (128, 128, 8, 2, 1, 0, 0, 1)),
    ]
    bad = Candidate(forward["half/64"], (128, 128, 4, 2, 0, 0, 0, 0))
    found = sweep.compiled([*good, bad], "sm_90", 1)
    assert [found[candidate.name] for candidate in good] == ["", ""]
    assert "a wait after every product" in found[bad.name]


@pytest.mark.slow
def test_what_is_tried_with_warpgroups_survives():
    tried = [one for entry in ENTRIES for one in sweep.candidates(entry, BASE) if sum(one.numbers[5:6])]
    found = sweep.compiled(tried, "sm_90", 2)
    assert len(found) > 20 and not {name: why for name, why in found.items() if why}


@pytest.mark.slow
def test_a_tile_that_spills_is_dropped():
    """One warp with 512 elements a thread must spill, four with 32 need not."""
    found = sweep.compiled([Candidate(NORM, (16, 1)), Candidate(NORM, (4, 4))], "sm_90", 1)
    assert "spills" in found[Candidate(NORM, (16, 1)).name] and found[Candidate(NORM, (4, 4)).name] == ""
