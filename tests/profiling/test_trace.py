"""Traces: the arithmetic on spans by hand, and the command on a CPU against what the model is known to do."""

import json
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from kernels.device import HAS_TRITON
from minigpt.errors import UserError, door
from profiling import __main__, recording, step, trace
from profiling.trace import Span


@pytest.fixture
def run(monkeypatch, capfd):
    """The command as a whole program, in this process: (exit status, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["profiling", "trace", *arguments])
        with pytest.raises(SystemExit) as left:
            door(__main__.main)
        return left.value.code or 0, *capfd.readouterr()

    return run


# ---------------------------------------------------------------- by hand


def test_idle_time_is_what_nothing_covers():
    """Overlaps count once, a span inside another not at all: 0-10, 5-12, 6-7, a gap of 8, 20-30, a gap of 2, 32-33."""
    spans = [Span("a", 5, 7), Span("b", 0, 10), Span("c", 6, 1), Span("d", 32, 1), Span("e", 20, 10)]
    assert trace.idleness(spans) == (12 + 10 + 1, 10, [8, 2])
    assert trace.idleness([]) == (0, 0, [])
    assert trace.idleness([Span("a", 3, 4)]) == (4, 0, [])


def test_shares_and_the_top_are_a_step_and_add_up():
    spans = [Span("aten::mm", 0, 6000), Span("aten::mm", 9, 2000), Span("kernels::attention_backward", 20, 12_000)]
    groups = {row["group"]: row for row in trace.shares(spans, steps=2)}
    assert groups["attention"] == {"group": "attention", "us": 6.0, "share": 0.6, "calls": 0.5}
    assert groups["matrix products"]["us"] == 4.0 and groups["matrix products"]["calls"] == 1.0
    top = trace.top_ops(spans, steps=1)
    assert [row["name"] for row in top] == ["kernels::attention_backward", "aten::mm"] and top[1]["calls"] == 2
    assert sum(row["share"] for row in top) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("_attention_backward_key", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("void pytorch_flash::flash_bwd_kernel<...>", "attention"),
        ("_layer_norm_backward_reduce", "layer norm"),
        ("_cross_entropy_forward", "loss"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNN", "matrix products"),
        ("void at::native::vectorized_elementwise_kernel<4, GeluCUDAKernelImpl", "GELU"),
        ("aten::_fused_adamw_", "optimizer"),
        ("Memcpy DtoD (Device -> Device)", "copies and casts"),
        ("cudnn_generated_fort_native_sdpa_sm90_knob_6_64x64x64_4x1x1_kernel0_0", "attention"),
        ("void cudnn::fusion::compute_dot_do_o_specialized<true, __nv_bfloat16, 128, 4>(...)", "attention"),
        ("void cudnn::fusion::convert_dq_to_16bits<__nv_bfloat16, 128>(...)", "attention"),
        ("_decode_single", "attention"),
        ("_decode_group", "attention"),
        ("_decode_merge", "attention"),
        (
            "void at::native::(anonymous namespace)::GammaBetaBackwardCUDAKernelTemplate<float>",
            "layer norm",
        ),
        ("void at::native::(anonymous namespace)::layer_norm_grad_input_kernel_vectorized<float>", "layer norm"),
        ("void at::native::(anonymous namespace)::LayerNormForwardCUDAKernel<float, float>", "layer norm"),
        ("void at::native::vectorized_gather_kernel<16, long>", "embedding"),
        ("void at::native::(anonymous namespace)::indexSelectSmallIndex<float, long, unsigned int>", "embedding"),
        ("void at::native::(anonymous namespace)::compute_grad_weight<float, long>", "embedding"),
        ("void splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float>", "matrix products"),
        ("aten::add", "other"),
    ],
)
def test_groups(name, group):
    assert trace.group_of(name) == group


@pytest.mark.parametrize("form", ["kernels::{}", "{}_gradients", "{}_gradientsBackward"])
def test_every_op_of_ours_has_a_group(form):
    from kernels import catalogue  # noqa: F401 - registers the ops
    from kernels.op import IMPLEMENTATIONS

    assert "attention" in IMPLEMENTATIONS
    ops = [name for name, function in IMPLEMENTATIONS.items() if function.__module__.startswith("kernels.")]
    assert len(ops) >= 11  # other tests register ops of their own
    assert [name for name in ops if trace.group_of(form.format(name)) == "other"] == []
    assert trace.group_of(form.format("attention")) == "attention"


def event(name, device_type, start, end, annotation=False):
    time = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    return SimpleNamespace(name=name, device_type=device_type, time_range=time, is_user_annotation=annotation)


def test_a_steps_time_is_the_hosts_alone():
    """On a GPU the profiler gives every range twice, as the host and as the GPU went through it."""
    events = [
        event(name, device, start, end, annotation=True)
        for name, start, end in (("step 0", 0.0, 10.0), ("forward", 0.0, 4.0), ("step 1", 10.0, 18.0))
        for device in (DeviceType.CPU, DeviceType.CUDA)
    ]
    assert trace.host_us(events, "step 0") == 10.0 and trace.host_us(events, "forward") == 4.0


def test_what_ran_on_a_gpu_is_taken_in_order_and_without_annotations():
    events = [
        event("later", DeviceType.CUDA, 8.0, 9.5),
        event("aten::mm", DeviceType.CPU, 0.0, 7.0),
        event("forward", DeviceType.CUDA, 0.0, 9.5, annotation=True),
        event("first", DeviceType.CUDA, 1.0, 3.0),
    ]
    assert trace.gpu_spans(events) == [Span("first", 1000, 2000), Span("later", 8000, 1500)]


def test_a_profiler_that_saw_no_kernel_is_told():
    """And not taken for a GPU that was never busy."""
    events = [event("aten::mm", DeviceType.CPU, 0.0, 7.0), event("step 0", DeviceType.CUDA, 0.0, 9.5, annotation=True)]
    with pytest.raises(UserError, match=r"no kernel on the GPU, CUPTI is missing or busy: end other profilers"):
        trace.gpu_spans(events)


def test_what_the_profiler_says_of_itself_is_dropped_and_nothing_else(capfd):
    """Errors keep their way to stderr, which is put back when something is thrown."""
    with pytest.raises(RuntimeError), recording.without_chatter():
        os.write(2, b"USDT:2026-01-01 Handler.cpp:52] profiler_start\nCUPTI is missing\n")
        raise RuntimeError("it broke")
    os.write(2, b"USDT: afterwards\n")
    assert capfd.readouterr().err == "CUPTI is missing\nUSDT: afterwards\n"


def test_what_is_profiled_keeps_its_stderr(capfd):
    with recording.recorded(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        os.write(2, b"USDT: not the profiler's\n")
        torch.add(torch.ones(3), 1)
    assert capfd.readouterr().err == "USDT: not the profiler's\n"
    assert "aten::add" in {event.name for event in profiler.events()}


# ---------------------------------------------------------------- the command


def test_a_trace_of_torch_steps(run, tmp_path):
    """Calls by hand: two layers with four products each, and the head's, forward and twice backward."""
    out = tmp_path / "deep" / "er"
    status, said, complaint = run("--kernels", "torch", "--device", "cpu", "--dtype", "fp32", "--out", str(out))
    assert status == 0 and complaint == ""
    document = json.loads((out / "trace-summary.json").read_text())
    calls = {row["name"]: row["calls"] for row in document["ops"]}
    assert document["preset"] == "tiny" and document["steps"] == 3 and document["our_launches_a_step"] == 0
    assert calls["aten::native_layer_norm"] == calls["aten::native_layer_norm_backward"] == 5
    assert calls.get("mkldnn::_linear_pointwise", calls.get("aten::addmm", 0)) in (27, 9)
    assert calls["aten::_fused_adamw_"] == 2  # two groups of parameters
    assert sum(row["share"] for row in document["groups"]) == pytest.approx(1.0)
    inside = sum(row["us"] for row in document["ops"])
    assert 0 < sum(document["phases_us"].values()) <= document["step_us"] and inside <= 1.05 * document["step_us"]
    events = json.loads((out / "trace.json").read_text())["traceEvents"]
    assert {"forward", "backward", "clipping", "AdamW", "step 2"} <= {event.get("name") for event in events}
    assert "layer norm" in said and "aten::" in said and "gpu_idle_us" not in document


def test_the_steps_before_the_first_are_left_out(run, monkeypatch, tmp_path):
    """One outside the profiler, and one inside, where its own first work falls."""
    done, train = [], step.training_step

    def noting(*arguments, **options):
        with options["during"]("forward"):
            (torch.sin if len(done) < 2 else torch.cos)(torch.ones(8))
        done.append(1)
        return train(*arguments, **options)

    monkeypatch.setattr(step, "training_step", noting)
    status, _, _ = run("--kernels", "torch", "--device", "cpu", "--steps", "2", "--out", str(tmp_path))
    document = json.loads((tmp_path / "trace-summary.json").read_text())
    calls = {row["name"]: row["calls"] for row in document["ops"]}
    assert status == 0 and len(done) == 4 and calls["aten::cos"] == 1 and "aten::sin" not in calls
    assert "warm-up" not in calls and calls["aten::_fused_adamw_"] == 2
    assert sum(document["phases_us"].values()) <= document["step_us"]


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.interpreted
def test_launches_are_counted(run, tmp_path):
    """Two layers: attention 1 forward each and backward at least 1, and five layer norms forward."""
    asked = "--kernels", "attention=triton,layer_norm=triton,loss=triton"
    status, said, complaint = run(*asked, "--device", "cpu", "--batch-size", "1", "--out", str(tmp_path))
    assert status == 0, complaint
    document = json.loads((tmp_path / "trace-summary.json").read_text())
    assert document["interpreted"] and document["steps"] == 1 and "INTERPRETER" in said

    def launches(op: str, direction: str) -> float:
        return sum(count for name, count in document["our_launches"].items() if op in name and direction in name)

    assert launches("attention", "forward") == 2 and launches("attention", "backward") in (2, 4)
    assert launches("layer_norm", "forward") == 5 and launches("cross_entropy", "forward") >= 1
    assert document["our_launches_a_step"] == sum(document["our_launches"].values())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--preset", "gpt3"), "gpt2-medium"),
        (("--kernels", "cuda"), "eager, torch, triton"),
        (("--device", "tpu"), "unknown device"),
        (("--steps", "0"), "at least 1"),
        (("--steps", "few"), "--steps"),
        (("--out", "/dev/null/folder"), "/dev/null/folder"),
    ],
)
def test_bad_input_is_told_in_one_line(arguments, says, run):
    status, _, complaint = run("--kernels", "torch", *arguments)
    assert status and complaint.count("\n") == 1 and complaint.startswith("error: ") and says in complaint


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.interpreted
def test_the_interpreter_refuses_what_would_take_hours(run):
    status, _, complaint = run("--kernels", "triton", "--device", "cpu", "--preset", "gpt2")
    assert status == 1 and "--preset tiny" in complaint and complaint.count("\n") == 1
