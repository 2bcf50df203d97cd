"""Tables of tuned tiles: read when there is one for the device, and refused when it is malformed."""

import json
from dataclasses import replace

import pytest
import torch

from kernels import catalogue, op, tiles
from kernels.attention_plan import _tile
from kernels.device import INTERPRETER, TARGETS
from kernels.layer_norm import _programs
from kernels.op import Spec

OPS = {entry.name: entry for entry in catalogue.OPS}
SPEC = Spec((2, 4, 1024, 64), (262144, 65536, 64, 1), torch.bfloat16, True)
OPTIONS = {"dropout_p": 0.0, "allow_tf32": False}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tiles, "FOLDER", tmp_path)
    caches = (tiles._load, op._launches, _programs)  # plans of the same device, made from another table
    for cache in caches:
        cache.cache_clear()
    yield tmp_path
    for cache in caches:
        cache.cache_clear()


def write(folder, table, gpu="ACME G-1", schema=tiles.SCHEMA):
    (folder / "acme-g-1.json").write_text(json.dumps({"schema": schema, "gpu": gpu, "tiles": table}))
    return replace(TARGETS["sm_90"], name="ACME G-1")


def test_slug():
    assert tiles.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_attention_takes_what_was_tuned(folder):
    numbers = {"half/64": [32, 32, 4, 1, 1, 0, 0, 0], "half-dropout/64": [64, 32, 4, 2, 0, 0, 0, 1]}
    device = write(folder, {"attention.forward": numbers})

    def tile(slot, device, dropout_p=0.0, **traits):
        return _tile(f"attention.{slot}", SPEC, OPTIONS | {"dropout_p": dropout_p}, device, (SPEC,), **traits)

    default = tile("forward", TARGETS["sm_90"])
    assert tile("forward", device) == (32, 32, 4, 1, 1, 0, 0, 0) != default
    assert tile("forward", device, 0.1) == (64, 32, 4, 2, 0, 0, 0, 1)
    # what has no entry keeps its default, and so does every other kernel
    assert tile("forward", device, grouped=True) == default
    assert tile("backward_key", device) == tile("backward_key", TARGETS["sm_90"])


@pytest.mark.parametrize(
    ("name", "case", "slot", "key", "numbers", "expected"),
    [
        ("layer_norm", "768", "layer_norm.forward", "1024", [4, 8], {"ROWS": 4}),
        ("cross_entropy", "v50304", "cross_entropy.forward", "65536", [4096, 1, 8], {"BLOCK_V": 4096, "ROWS": 1}),
        ("cross_entropy", "v50304", "cross_entropy.backward", "65536", [256, 4, 4], {"BLOCK_V": 256, "ROWS": 4}),
    ],
)
def test_plans_take_what_was_tuned(name, case, slot, key, numbers, expected, folder):
    device = write(folder, {slot: {key: numbers}})
    entry = OPS[name]
    case = next(c for c in entry.sizes if c.name == case)
    inputs = entry.inputs(case, torch.bfloat16, "meta")
    changed = [
        launch
        for launch, before in zip(
            entry.plan(inputs, case.options, device), entry.plan(inputs, case.options, TARGETS["sm_90"]), strict=True
        )
        if launch != before
    ]
    assert changed and any(expected.items() <= launch.constexprs.items() for launch in changed)
    assert any(launch.num_warps == numbers[-1] for launch in changed)


def test_without_a_file_or_a_name_nothing_changes(folder):
    write(folder, {"attention.forward": {"half/64": [32, 32, 4, 1, 0, 0, 0, 0]}})
    for device in (TARGETS["sm_90"], INTERPRETER, replace(TARGETS["sm_90"], name="ACME G-2")):
        assert tiles.tuned(device, "attention.forward", "half/64") is None


def test_results_do_not_depend_on_the_table(folder, device):
    """Small tiles through the public function, where kernels run here."""
    import kernels
    from kernels.op import plan_for

    tuned = write(folder, {"attention.forward": {"ieee/64": [32, 16, 4, 1, 1, 0, 0, 1]}})
    q, k, v = (torch.randn(1, 1, 50, 32, generator=torch.Generator().manual_seed(i)).to(device) for i in range(3))
    with plan_for(tuned):
        ours = kernels.scaled_dot_product_attention(q, k, v, is_causal=True)
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


BAD = {
    'no "schema": 3': ({}, {"schema": 1}),
    "tuned on 'ACME G-2', not on 'ACME G-1'": ({}, {"gpu": "ACME G-2"}),
    '"tiles" must be an object': ([], {}),
    "'attention.sideways' is no slot": ({"attention.sideways": {}}, {}),
    "must be [ROWS, num_warps], not [1]": ({"layer_norm.forward": {"1024": [1]}}, {}),
    "BLOCK_Q of attention.forward half/64 must be a power of two from 16 to 256, not 96": (
        {"attention.forward": {"half/64": [96, 64, 8, 2, 0, 0, 0, 0]}}, {},
    ),
    "num_warps of layer_norm.forward 1024 must be a power of two from 1 to 32, not 64": (
        {"layer_norm.forward": {"1024": [1, 64]}}, {},
    ),
    "not True": ({"layer_norm.forward": {"1024": [True, 4]}}, {}),
    "num_stages of attention.forward half/64 must be a number from 1 to 8, not 0": (
        {"attention.forward": {"half/64": [64, 64, 8, 0, 0, 0, 0, 0]}}, {},
    ),
    # a table from before there were options
    "must be [BLOCK_Q, BLOCK_K, num_warps, num_stages, DESCRIPTORS, WARPGROUPS, TURNS, OVERLAP], not [64, 64, 8, 2]": (
        {"attention.forward": {"half/64": [64, 64, 8, 2]}}, {},
    ),
    "must be [BLOCK_Q, BLOCK_K, num_warps, num_stages, DESCRIPTORS, WARPGROUPS, TURNS], not [64, 64, 8, 2, 1, 1]": (
        {"attention.backward_key": {"half/64": [64, 64, 8, 2, 1, 1]}}, {},
    ),
    "OVERLAP of attention.forward half/64 must be 0 or 1, not 2": (
        {"attention.forward": {"half/64": [64, 64, 8, 2, 1, 0, 0, 2]}}, {},
    ),
    "half/64 is [64, 64, 8, 2, 1, 2, 1, 1]: with WARPGROUPS num_warps must be 4": (
        {"attention.forward": {"half/64": [64, 64, 8, 2, 1, 2, 1, 1]}}, {},
    ),
    "and DESCRIPTORS and OVERLAP 1": ({"attention.forward": {"half/64": [64, 64, 4, 2, 0, 2, 1, 1]}}, {}),
    "BLOCK_Q must be 64 or 128, a warpgroup's": ({"attention.forward": {"half/64": [32, 64, 4, 2, 1, 2, 0, 1]}}, {}),
    "WARPGROUPS must be 0 or 2 or 3": ({"attention.forward": {"half/64": [64, 64, 4, 2, 1, 1, 0, 1]}}, {}),
    "must be a number from 0 to 3, not 4": ({"attention.forward": {"half/64": [64, 64, 4, 2, 1, 4, 0, 1]}}, {}),
    "num_stages must be at least 2 here": ({"attention.backward_query": {"half/64": [64, 64, 4, 1, 1, 2, 0]}}, {}),
    "half/64 is [64, 32, 4, 2, 0, 0, 0]: BLOCK_Q must be at most BLOCK_K": (
        {"attention.backward_key": {"half/64": [64, 32, 4, 2, 0, 0, 0]}}, {},
    ),
    "TURNS are between WARPGROUPS": ({"attention.forward": {"half/64": [64, 64, 4, 2, 1, 0, 1, 1]}}, {}),
    "for fp16 and bf16 without dropout": ({"attention.forward": {"half-dropout/64": [64, 64, 4, 2, 1, 2, 0, 1]}}, {}),
}  # fmt: skip


@pytest.mark.parametrize("said", BAD)
def test_a_malformed_table_is_refused_in_one_line(said, folder):
    table, changes = BAD[said]
    device = write(folder, table, **changes)
    with pytest.raises(ValueError) as error:
        tiles.tuned(device, "attention.forward", "half/64")
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_no_json_is_refused(folder):
    (folder / "acme-g-1.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read as a table of tiles"):
        tiles.table("ACME G-1")


def test_the_tables_in_the_checkout_are_read():
    for path in tiles.FOLDER.glob("*.json"):
        assert tiles.table(json.loads(path.read_text())["gpu"])
