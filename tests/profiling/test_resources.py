"""Every kernel compiles for every target, within its registers and shared memory, on the tensor cores.

The default run compiles one instance of each kernel for two targets, the slow one each kernel for every target, short
attention too, and the whole table. fp16 and bf16 with head sizes up to 128 must not spill, but for
EXCEPTIONS; and no kernel may ask for more than its stored figures, by the version of Triton that they were measured
with.
"""

import argparse
import json
import os
import subprocess
import sys

import forked
import pytest
import torch

from kernels import catalogue
from kernels.device import HAS_TRITON, TARGETS
from minigpt.errors import UserError, door
from profiling import __main__, resources
from profiling.instructions import overlapped
from profiling.limits import PEAKS
from profiling.resources import trial_of

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")

EXCEPTIONS = {  # bytes, by version of Triton, kernel, architecture and case
    "3.6.0": {
        ("_attention_backward_key", "sm_90", "d64-ragged-dropout"): 12,
        ("_attention_backward_key", "sm_80", "d128-short-all"): 16,
        ("_attention_backward_key", "sm_80", "d128-grouped-dropout"): 16,
        ("_attention_backward_key", "sm_100", "d64-ragged-grouped"): 64,
    },
    "3.7.1": {("_decode_group", "sm_120", "mqa-64"): 4},
}
TENSOR_CORE = {
    "sm_80": "mma.sync",
    "sm_86": "mma.sync",
    "sm_89": "mma.sync",
    "sm_90": "wgmma.mma_async",
    "sm_100": "tcgen05.mma",
    "sm_120": "mma.sync",
    "gfx942": "v_mfma",
}
SERIALISED = {"C7511", "C7512", "C7515"}  # ptxas: a wait after every wgmma
ONE_OF_EACH = ["gpt2", "d64-short", "gqa-4k-batch", "768", "262144", "v50304"]  # between them they launch every kernel
WHOLE = ["sm_80", "sm_90"]  # what the default run compiles every kernel for
OTHERS = [arch for arch in TARGETS if arch not in WHOLE]


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return forked.run("-m", "profiling", "resources", *arguments, timeout=3000, **environment)


def _table(*arguments: str) -> dict:
    done = _run(*arguments, "--json", "-")
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def _name(use: dict) -> str:
    return f"{use['kernel']} {use['dtype']} {use['arch']} {use['cases'][0]}"


def _must_not_spill(use: dict) -> bool:
    return use["dtype"] != "float32" and use["tile"].get("BLOCK_D", 0) <= 128


def _problems(document: dict) -> list[str]:
    """What is wrong with these kernels, each in a line."""
    exceptions = EXCEPTIONS.get(document["versions"]["triton"], {})
    wrong = list(document["moved"])
    for use in document["kernels"]:
        if use["error"]:
            wrong.append(f"{_name(use)} does not compile: {use['error']}")
            continue
        if use["shared_memory"] > use["shared_memory_limit"]:
            wrong.append(f"{_name(use)}: {use['shared_memory']} bytes of shared memory of {use['shared_memory_limit']}")
        allowed = exceptions.get((use["kernel"], use["arch"], use["cases"][0]), 0)
        if _must_not_spill(use) and use["spill_bytes"] > allowed:
            wrong.append(f"{_name(use)} spills {use['spill_bytes']} bytes")
        if use["kernel"] == "_decode_group" and use["dtype"] != "float32" and not use["tensor_core"]:
            # which it uses hangs on the rows: 16 are too few for wgmma and tcgen05
            wrong.append(f"{_name(use)} does not use tensor cores")
        attends = use["op"] == "scaled_dot_product_attention" and use["dtype"] != "float32"
        wanted = TENSOR_CORE[use["arch"]]
        if use["tile"].get("BLOCK", 64) < 64 and not use["arch"].startswith("gfx"):
            wanted = "mma.sync"  # wgmma and tcgen05 multiply 64 rows at least
        if attends and wanted not in use["tensor_core"]:
            wrong.append(f"{_name(use)} does not use {wanted}")
        if use["tile"].get("PRECISION") == "ieee" and use["dtype"] == "float32" and not use["arch"].startswith("gfx"):
            # NVIDIA's tensor cores have no fp32: what they would multiply is TF32
            if use["tensor_core"]:
                wrong.append(f"{_name(use)} was asked for fp32 products and uses {use['tensor_core']}")
        if attends and use["arch"] == "sm_90" and SERIALISED & set(use["advisories"]):
            wrong.append(f"{_name(use)}: tensor cores serialised, {use['advisories']}")
    return wrong


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((WHOLE, ONE_OF_EACH), id="two targets"),
        pytest.param(
            ([arch for arch in OTHERS if arch != "sm_86"], ["d64-short"]),
            id="short attention for the others",
            marks=pytest.mark.slow,
        ),
        pytest.param((OTHERS, ONE_OF_EACH), id="the others", marks=pytest.mark.slow),
    ],
)
def asked(request) -> tuple[list[str], list[str]]:
    """Targets and cases."""
    return request.param


@pytest.fixture(scope="module")
def one_of_each(asked, tmp_path_factory) -> dict:
    """The table, compiled once for all processes of a run."""
    import fcntl  # not on Windows

    archs, cases = asked
    table = ("--arch", *archs, "--dtype", "bfloat16", "--case", *cases)
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    path = folder / f"{'-'.join((*archs, *cases))}.json"
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            few = () if cases is ONE_OF_EACH else ("--workers", "1")
            path.write_text(json.dumps(_table(*table, *few)))
    return json.loads(path.read_text())


def test_one_of_each_kernel_compiles_well(one_of_each):
    assert not _problems(one_of_each)


def test_one_of_each_is_every_kernel(asked, one_of_each):
    """The default run leaves no kernel of any plan out: of two targets; of the others none of short attention's."""
    archs, cases = asked
    compiled = {(use["kernel"], use["arch"]) for use in one_of_each["kernels"]}
    planned = set()
    for op in catalogue.OPS:
        for case in (*op.cases, *op.sizes) if cases is ONE_OF_EACH else op.sizes:
            if cases is not ONE_OF_EACH and case.name not in cases:
                continue
            inputs = op.inputs(case, torch.bfloat16, "meta")
            for arch in archs:
                planned |= {(launch.name, arch) for launch in op.plan(inputs, case.options, TARGETS[arch])}
    assert compiled == planned and {arch for _, arch in planned} == set(archs)


def test_rows_that_allow_it_are_read_16_bytes_at_a_time(one_of_each):
    """Alignment and divisibility reach the compiler: without them every access would be of one element."""
    for use in one_of_each["kernels"]:
        if use["arch"] == "sm_90" and "reduce" not in use["kernel"]:
            assert "128" in use["loads"], _name(use)


def test_instructions_are_counted_by_kind(one_of_each):
    """What must be in a kernel of its kind is, what cannot be is not, and widths add up to the kinds."""
    for use in one_of_each["kernels"]:
        mix, where = use["instructions"], _name(use)
        assert mix["total"] > sum(mix[kind] for kind in ("tensor_core", "fp32", "ldg", "stg", "lds", "sts")), where
        assert mix["fp32"] >= mix["ffma"] and mix["mufu"] >= mix["ex2"], where
        assert (mix["tensor_core"] > 0) == bool(use["tensor_core"]), where
        assert mix["stg"] == sum(use["stores"].values()) and mix["ldg"] >= sum(use["loads"].values()) > 0, where
        assert mix["ex2"] > 0 or use["kernel"] not in ("_attention_forward", "_cross_entropy_forward"), where
        assert mix["ex2"] == 0 or "layer_norm" not in use["kernel"], where
        assert mix["local"] == 0 or use["spill_bytes"] or use["arch"] == "gfx942", where


def test_a_kernel_that_compiles_can_run(one_of_each):
    for use in one_of_each["kernels"]:
        assert use["occupancy"]["blocks"] >= 1 and 0 < use["occupancy"]["share"] <= 1, _name(use)


LOOPS = {  # most instructions of the loops of tiles seen whole and of those with a mask; bf16, sm_90
    "gpt2": {"forward": (310, 390), "backward_query": (260, 340), "backward_key": (290, 390)},
    "shakespeare-dropout": {"forward": (590, 680), "backward_query": (510, 600), "backward_key": (600, 765)},
}


def _hold_loops(uses: list[dict], case: str) -> None:
    found = {use["kernel"].removeprefix("_attention_"): sorted(use["loop_instructions"]) for use in uses}
    assert found.keys() == LOOPS[case].keys()
    for name, most in LOOPS[case].items():
        whole, masked = found[name]
        assert whole <= most[0] and masked <= most[1], (name, found[name])


def test_attentions_loops_are_short(asked, one_of_each):
    """A thread has 32 elements of a tile in each of them. Not so short where each thread loads all statistics that it
    needs, where masks compare twice, or ptxas keeps their answers in bits."""
    uses = [use for use in one_of_each["kernels"] if "gpt2" in use["cases"] and use["op"] == catalogue.ATTENTION.name]
    if "sm_90" in asked[0]:  # loops are told apart by its products
        _hold_loops([use for use in uses if use["arch"] == "sm_90"], "gpt2")


@pytest.mark.slow
def test_with_dropout_too():
    """Nor where threads make random numbers that others have made, or send answers one by one."""
    case = "shakespeare-dropout"
    _hold_loops(_table("--arch", "sm_90", "--dtype", "bfloat16", "--case", case)["kernels"], case)


@pytest.mark.slow
@pytest.mark.parametrize("arch", TARGETS)
def test_the_whole_table(arch):
    assert not _problems(_table("--arch", arch))


TUNED = {  # what docs/kernels/attention.md has the figures of, by case: slots and numbers
    "gpt2": (
        ["attention.forward half/64 128 64 8 2 1 0 0 1", "attention.backward_query half/64 128 64 8 2 1 0 0",
         "attention.backward_key half/64 64 128 8 2 1 0 0"],
        ["attention.forward half/64 128 128 8 2 1 0 0 1", "attention.backward_query half/64 64 64 4 2 1 0 0",
         "attention.backward_key half/64 64 64 4 2 1 0 0"],
    ),
    "d128": (
        ["attention.forward half/128 128 64 8 2 1 0 0 1", "attention.backward_query half/128 128 64 8 2 1 0 0",
         "attention.backward_key half/128 32 128 8 2 1 0 0"],
        ["attention.forward half/128 128 128 8 2 1 0 0 1", "attention.backward_query half/128 64 64 4 2 1 0 0",
         "attention.backward_key half/128 32 64 4 2 1 0 0"],
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
@pytest.mark.parametrize(("case", "which"), [(case, which) for case in TUNED for which in (0, 1)])
def test_tuned_options_compile_well(case, which, arch):
    """No spills, within shared memory, tiles loaded by the TMA unit, wgmma not serialised, exponentials beside it."""
    tiles = [part for tile in TUNED[case][which] for part in ("--tile", *tile.split())]
    document = _table("--arch", arch, "--dtype", "bfloat16", "--case", case, *tiles)
    assert not _problems(document)
    attention = [use for use in document["kernels"] if use["tile"].get("DESCRIPTORS")]
    assert len(attention) == 3
    for use in attention:
        assert use["instructions"]["tma"] >= 4, _name(use)
        if use["kernel"] == "_attention_forward" and arch == "sm_90":
            found, total = overlapped(use["loops"][0])
            assert found >= total / 3, use["loops"]


@pytest.mark.parametrize(
    ("tile", "said"),
    [
        ("attention.forward half/64", "give a slot, a key and whole numbers"),
        ("attention.forward half/64 64 64 4 2 1 x", "give a slot, a key and whole numbers"),
        (
            "attention.forward half/64 64 64 4 2",
            "must be [BLOCK_Q, BLOCK_K, num_warps, num_stages, DESCRIPTORS, WARPGROUPS, TURNS, OVERLAP]",
        ),
        ("attention.sideways half/64 64 64 4 2", "'attention.sideways' is no slot"),
    ],
)
def test_what_is_no_tile_is_told_in_a_line(tile, said):
    with pytest.raises(UserError) as error:
        trial_of([tile.split()], [], [], [])
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
def test_every_test_case_compiles():
    """Odd sizes, odd strides, every option: what the interpreter runs, a compiler takes as well."""
    uses = _table("--arch", "sm_90", "--cases", "cases")["kernels"]
    assert not [f"{_name(use)}: {use['error']}" for use in uses if use["error"]]


# ---------------------------------------------------------------- the measuring itself

MEASURE = """
import json, torch
from kernels import catalogue
from kernels.device import TARGETS
from kernels.op import Case, Launch, Spec
from profiling.compile import begin_worker, compile_source, source_of

op = catalogue.LAYER_NORM
case = next(case for case in op.sizes if case.name == "768")
launch = op.plan(op.inputs(case, torch.bfloat16, "meta"), case.options, TARGETS["sm_90"])[0]

def source(**changes):
    arguments = dict(launch.arguments) | changes
    made = source_of(Launch(launch.kernel, launch.grid, arguments, launch.constexprs, 4, 1), "sm_90")
    names = list(arguments)
    constants = {names[place[0]]: value for place, value in made.constants if place[0] < len(names)}
    attributes = {names[place[0]]: value for place, value in made.attributes if value}
    return {"signature": dict(made.signature), "constants": constants, "attributes": attributes}

x = launch.arguments["input_ptr"]
out = {
    "as planned": source(),
    "one": source(row_stride=1),
    "odd": source(row_stride=7),
    "wide": source(row_stride=2**31),
    "widest i32": source(row_stride=2**31 - 1),
    "absent": source(bias_ptr=None),
    "misaligned": source(input_ptr=x._replace(aligned=False)),
}
op = catalogue.ATTENTION
case = next(case for case in op.sizes if case.name == "d128")
launch = op.plan(op.inputs(case, torch.bfloat16, "meta"), case.options, TARGETS["sm_90"])[0]
few = Launch(launch.kernel, launch.grid, launch.arguments, launch.constexprs | {"BLOCK_K": 128}, 4, 2)
begin_worker()
out["too few warps"] = compile_source(source_of(few, "sm_90"))
out["impossible"] = compile_source(source_of(Launch(launch.kernel, launch.grid, launch.arguments,
                                             launch.constexprs | {"BLOCK_K": 100}, 4, 2), "sm_90"))
op = catalogue.CROSS_ENTROPY
case = Case("", {"input": (2, 4104), "target": (2,)}, {"reduction": "none"})
for launch in op.plan(op.inputs(case, torch.bfloat16, "meta"), case.options, TARGETS["sm_90"]):
    out[launch.name] = compile_source(source_of(launch, "sm_90"))
smooth = case.options | {"label_smoothing": 0.1}
launch = op.plan(op.inputs(case, torch.bfloat16, "meta"), smooth, TARGETS["sm_90"])[0]
out["smoothed"] = compile_source(source_of(launch, "sm_90"))
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def measured() -> dict:
    done = forked.run("-c", MEASURE)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_arguments_are_specialized_as_a_launch_does(measured):
    divisible = [["tt.divisibility", 16]]
    planned = measured["as planned"]
    assert planned["signature"]["input_ptr"] == "*bf16" and planned["signature"]["mean_ptr"] == "*fp32"
    assert planned["signature"]["eps"] == "fp32" and planned["signature"]["row_stride"] == "i32"
    assert planned["attributes"]["input_ptr"] == planned["attributes"]["row_stride"] == divisible
    assert measured["one"]["signature"]["row_stride"] == "constexpr" and measured["one"]["constants"]["row_stride"] == 1
    assert "row_stride" not in measured["odd"]["attributes"]
    assert measured["wide"]["signature"]["row_stride"] == "i64"
    assert measured["widest i32"]["signature"]["row_stride"] == "i32"
    assert (
        measured["absent"]["signature"]["bias_ptr"] == "constexpr"
        and measured["absent"]["constants"]["bias_ptr"] is None
    )
    assert "input_ptr" not in measured["misaligned"]["attributes"]
    assert measured["misaligned"]["attributes"]["output_ptr"] == divisible


def test_spills_and_serialised_tensor_cores_are_seen(measured):
    """A tile of 128 x 128 with four warps is known to do both."""
    use = measured["too few warps"]
    assert use["spill_bytes"] > 100 and use["registers"] == 255 and SERIALISED & set(use["advisories"])


@pytest.mark.parametrize("name", ["_cross_entropy_forward", "_cross_entropy_backward"])
def test_rows_of_whole_16_bytes_are_read_so(name, measured):
    """Of 4,104 classes in 2 bytes, no multiple of the 16 that Triton looks for in an argument. What is 2 bytes: the
    target, and a row's incoming gradient."""
    loads, stores = measured[name]["loads"], measured[name]["stores"]
    assert loads["128"] >= 2 and loads.get("16", 0) <= 3
    assert stores.get("16", 0) <= 1


def test_threads_exchange_a_rows_sums_when_it_ends(measured):
    """Smoothing is one sum more, not one more for each tile."""
    smooth, plain = (measured[name]["instructions"] for name in ("smoothed", "_cross_entropy_forward"))
    for kind in ("shuffles", "barriers", "sts"):
        assert 0 < smooth[kind] < 2 * plain[kind]


def test_what_does_not_compile_is_a_row_with_an_error(measured):
    assert measured["impossible"]["error"]


def test_every_tile_given_must_be_taken():
    """By itself: a plan that the one before changed is not counted for it."""
    case = next(case for case in catalogue.LAYER_NORM.sizes if case.name == "768")
    forward, other = ["layer_norm.forward", "1024", "4", "8"], ["layer_norm.backward", "512", "4", "8"]
    chosen = ([(catalogue.LAYER_NORM, case)], ["bfloat16"], ["sm_90"])
    assert trial_of([forward], *chosen)
    with pytest.raises(UserError, match=r"--tile layer_norm.backward 512: nothing that was chosen takes it"):
        trial_of([forward, other], *chosen)


KEPT = """
import dataclasses, os, torch, triton
from kernels import catalogue, tiles
from kernels.device import TARGETS
from kernels.op import _ready, plan_only
from profiling import host, resources
from profiling.compile import begin_worker, compile_source, source_of

hopper = {"attention.forward": {"half/64": [64, 64, 4, 2, 1, 2, 1, 1]}}
tiles.try_out("hopper", hopper)
wanted = [
    (catalogue.LAYER_NORM, "768", ""), (catalogue.ATTENTION, "gpt2", "hopper"), (catalogue.CROSS_ENTROPY, "v65", "")
]
launches = []
for op, name, gpu in wanted:
    case = next(case for case in op.sizes if case.name == name)
    inputs = op.inputs(case, torch.bfloat16, "meta")
    inputs |= {"bias": None} if op is catalogue.LAYER_NORM else {}
    launches += op.plan(inputs, case.options, dataclasses.replace(TARGETS["sm_90"], name=gpu))[:1]
assert launches[1].gluon and launches[0].arguments["bias_ptr"] is None
begin_worker()
for launch in launches:
    found = compile_source(source_of(launch, "sm_90"), keep=True)
    assert found["registers"], found
triton.knobs.compilation.always_compile = False
before = sorted(os.listdir(os.environ["TRITON_CACHE_DIR"]))
driver = host.stand_in()
for launch in launches:
    tensors = {name.removesuffix("_ptr"): torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype)
               for name, spec in launch.arguments.items() if hasattr(spec, "stride")}
    _ready(launch).start(tensors, torch.device("cpu"))
assert before and sorted(os.listdir(os.environ["TRITON_CACHE_DIR"])) == before, "a launch compiled a kernel again"
"""


def test_a_launch_finds_what_was_kept(tmp_path):
    """Triton's cache has the kernel under the key of a launch: its types, constants, alignments, options."""
    done = forked.run("-c", KEPT, TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr


HERE = """
import dataclasses
import torch
from kernels import device
from profiling import __main__

gpu = dataclasses.replace(device.TARGETS["sm_89"], arch="sm_87", name="a GPU", shared_memory=70_000)
torch.cuda.is_available = lambda: True
torch.cuda.current_device = lambda: 0
device.facts = lambda device: gpu
what = "resources --here --op layer_norm --case 384 --dtype bfloat16 --workers 1 --json -"
arguments = __main__.parser().parse_args(what.split())
arguments.run(arguments)
"""


def test_here_means_this_gpu(tmp_path):
    """Also one that is no target: compiled for itself, by its own limits, with the tiles of its kin."""
    done = forked.run("-c", HERE, TRITON_CACHE_DIR=str(tmp_path))
    assert done.stdout, done.stderr
    document = json.loads(done.stdout)
    assert {(use["arch"], use["shared_memory_limit"], use["error"]) for use in document["kernels"]} == {
        ("sm_87", 70_000, "")
    }
    compiled = [json.loads(path.read_text()) for path in tmp_path.rglob("_layer_norm_*.json")]
    targets = [kernel["target"]["arch"] for kernel in compiled if "target" in kernel]
    assert targets == [87] * len(document["kernels"])
    assert {use["occupancy"]["blocks"] > 0 for use in document["kernels"]} == {True}
    assert {row["product"] for row in document["rooflines"]} == {PEAKS["sm_89"].product}


def test_machine_code_that_the_disassembler_cannot_read_is_told_in_a_line(tmp_path):
    """As Triton 3.6's, older than its ptxas, for compute capability 10.3."""
    older = tmp_path / "nvdisasm"
    older.write_text("#!/bin/sh\n[ $1 = --version ] && echo Cuda compilation tools, release 12.8, V12.8.55 && exit\n"
                     "echo \"nvdisasm fatal   : Cannot decode architecture 'SM103a'\" >&2; exit 1\n")  # fmt: skip
    older.chmod(0o755)
    what = "resources --op layer_norm --case 384 --arch sm_90 --dtype bfloat16 --workers 1".split()
    done = forked.run("-m", "profiling", *what, TRITON_NVDISASM_PATH=str(older))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "Cannot decode architecture 'SM103a'" in done.stderr and "TRITON_NVDISASM_PATH" in done.stderr


def test_here_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--here is for a machine with a GPU"):
        resources._gpu_here(argparse.Namespace(arch=None, tile=[], store=False))


@pytest.mark.slow
def test_a_kernel_of_two_ops_is_one_row_and_has_both_rooflines():
    """add_layer_norm without a second output's gradient is layer_norm's kernel in part."""
    done = _run("--op", "layer_norm", "add_layer_norm", "--arch", "sm_90", "--dtype", "bfloat16", "--json", "-")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    shared = [use for use in document["kernels"] if any(label.startswith("add_layer_norm/") for label in use["cases"])]
    assert shared and all(use["op"] == "layer_norm" for use in shared)
    assert {line["op"] for line in document["rooflines"]} == {"layer_norm", "add_layer_norm"}
    sizes = {(op.name, case.name) for op in catalogue.OPS if "layer_norm" in op.name for case in op.sizes}
    assert {(line["op"], line["case"]) for line in document["rooflines"]} == sizes


@pytest.mark.slow
def test_a_flag_given_twice_adds_to_itself():
    uses = _table("--op", "layer_norm", "--arch", "sm_90", "--arch", "sm_80", "--dtype", "bfloat16", "--case", "768")[
        "kernels"
    ]
    assert {use["arch"] for use in uses} == {"sm_80", "sm_90"}


BAD_INPUT = {
    ("--op", "softmax"): "unknown op softmax: choose from scaled_dot_product_attention",
    ("--arch", "sm_70"): "unknown arch sm_70: choose from sm_80",
    ("--op", "layer_norm", "--case", "gpt2"): "unknown case gpt2: choose from",
    ("--workers", "0"): "--workers must be at least 1",
    ("--workers", "many"): "invalid int value",
    ("--json", "no/such/folder/a.json"): "no such folder",
    ("--here", "--arch", "sm_90"): "--here has its architecture and its tiles",
    ("--here", "--store"): "--here has its architecture and its tiles",
}


def _is_one_line(status: int, stdout: str, stderr: str, says: str) -> None:
    assert status == 1 and stderr.count("\n") == 1, stderr
    assert stderr.startswith("error: ") and says in stderr and not stdout


@pytest.mark.parametrize(
    ("arguments", "says"), BAD_INPUT.items(), ids=lambda value: " ".join(value) if isinstance(value, tuple) else ""
)
def test_bad_input_is_told_in_one_line_before_anything_is_compiled(arguments, says, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["profiling", "resources", *arguments])
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # the command would start over
    monkeypatch.setattr(resources, "measure", lambda *_: pytest.fail("something is compiled"))
    with pytest.raises(SystemExit) as left:
        door(__main__.main)
    _is_one_line(left.value.code, *capsys.readouterr(), says)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", BAD_INPUT, ids=" ".join)
def test_so_it_is_through_the_door(arguments):
    done = _run(*arguments, TRITON_INTERPRET="1")  # the command must see to that itself
    _is_one_line(done.returncode, done.stdout, done.stderr, BAD_INPUT[arguments])
