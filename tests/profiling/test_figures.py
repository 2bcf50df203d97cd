"""Stored figures of compiled kernels: what has got worse is named, and nothing else."""

import dataclasses

import pytest
from test_resources import EXCEPTIONS, TENSOR_CORE

from profiling import figures
from profiling.resources import Use

GOOD = Use(
    op="layer_norm", dtype="bfloat16", arch="sm_90", kernel="_forward", cases=["768", "other/1024"],
    tile={"BLOCK_N": 1024}, num_warps=4, num_stages=1, registers=48, spill_bytes=4, shared_memory=1024,
    tensor_core={"wgmma.mma_async": 4}, loads={"128": 4, "32": 1}, stores={"128": 1},
)  # fmt: skip


@pytest.fixture(autouse=True)
def stored(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "FOLDER", tmp_path / "figures")
    figures.store([GOOD], "1.2.3")


def changed(**changes) -> Use:
    return dataclasses.replace(GOOD, **changes)


@pytest.mark.parametrize(
    "use",
    [
        GOOD,
        changed(registers=48 + figures.REGISTERS, num_warps=8, tile={"BLOCK_N": 512}),
        changed(registers=30, spill_bytes=0, shared_memory=0, loads={"128": 1, "64": 9}),
        changed(cases=["1024"]),  # a part of the cases, as --case gives it
        changed(tensor_core={"mma.sync": 16}),  # which one it is, is the plan's to choose
        changed(arch="sm_80", registers=255),  # nothing is stored for it
        changed(error="does not compile"),  # told elsewhere
    ],
)
def test_what_is_no_worse_is_not_named(use):
    assert not figures.moved([use], "1.2.3")


@pytest.mark.parametrize(
    ("use", "says"),
    [
        (changed(registers=57), "registers 57, stored 48"),
        (changed(spill_bytes=8), "spill_bytes 8, stored 4"),
        (changed(shared_memory=2048), "shared_memory 2048, stored 1024"),
        (changed(tensor_core={}), "no tensor cores, stored wgmma.mma_async"),
        (changed(loads={"64": 9}), "loads of at most 64 bits, stored 128"),
        (changed(stores={"32": 4}), "stores of at most 32 bits, stored 128"),
        (changed(kernel="_backward"), "not among the stored figures"),
        (changed(cases=["4096"]), "not among the stored figures"),
    ],
)
def test_the_row_that_moved_is_named(use, says):
    (line,) = figures.moved([GOOD, use], "1.2.3")
    assert line.startswith(f"{use.kernel} bfloat16 sm_90 {use.cases[0]}") and says in line


def test_another_version_of_triton_has_its_own_figures():
    worse = changed(registers=200)
    assert not figures.moved([worse], "1.2.4")
    figures.store([worse], "1.2.4")
    assert not figures.moved([worse], "1.2.4") and figures.moved([worse], "1.2.3")


def test_storing_replaces_all_rows_of_an_op_on_an_architecture_in_a_dtype():
    figures.store([changed(kernel="_other", cases=["768"]), changed(arch="sm_80")], "1.2.3")
    rows = figures.read("1.2.3")
    assert [(row["kernel"], row["arch"]) for row in rows] == [("_forward", "sm_80"), ("_other", "sm_90")]
    figures.store([changed(op="softmax", error="does not compile")], "1.2.3")
    assert figures.read("1.2.3") == rows


def test_the_figures_that_are_kept_are_of_kernels_that_there_are(monkeypatch):
    monkeypatch.undo()
    from kernels import catalogue

    versions = [file.stem.removeprefix("triton-") for file in figures.FOLDER.glob("triton-*.csv")]
    assert {"3.6.0", "3.7.1"} <= set(versions)
    sizes = {case.name for op in catalogue.OPS for case in op.sizes}
    exceptions = {name: max(bytes.values()) for name, bytes in EXCEPTIONS.items()}
    for version in versions:
        for row in figures.read(version):
            assert row["op"] in {op.name for op in catalogue.OPS} and row["arch"] in TENSOR_CORE
            assert {case.split("/")[-1] for case in row["cases"].split()} <= sizes
            if row["dtype"] != "float32" and "BLOCK_D=256" not in row["tile"]:
                assert int(row["spill_bytes"]) <= exceptions.get(version, 0), row
