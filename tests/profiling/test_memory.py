"""The estimate of a step's memory against what is counted by hand, and against what a real step allocates."""

import dataclasses
import itertools
import json
import sys
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.device import HAS_TRITON, INTERPRETER, TARGETS
from kernels.op import register
from minigpt import backends, learning, trainer
from minigpt.config import DTYPES, preset
from minigpt.errors import door
from minigpt.model import GPT
from profiling import __main__, cuda_rules, estimate, memory, memory_report, pictures
from profiling.step import make_batch, training_step
from profiling.tracker import CATEGORIES, Tracker, Workspaces

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


def _config(kernels="torch", dtype="fp32", name="tiny", **changes):
    return preset(name, kernels=kernels, dtype=dtype, **changes)


def _estimate(kernels="torch", dtype="fp32", device="cuda", passes=1, **changes):
    return estimate.estimate(_config(kernels, dtype, **changes), device=device, passes=passes)


def _rounded(*sizes: int) -> int:
    return sum(-(-size // 512) * 512 for size in sizes)


# ---------------------------------------------------------------- by hand


def test_what_can_be_counted_by_hand_is_what_is_counted():
    """Parameters 4 bytes, AdamW's two moments 8 and a step count each, gradients 4; the batch int64 twice."""
    found = _estimate(device="cpu")
    model = GPT(_config().model_config(100), backends.resolve("torch", torch.device("cpu")))
    sizes = [parameter.numel() for parameter in model.parameters()]
    assert found.parameters == sum(sizes) == 145_764
    first, last = found.timeline[0], [point for point in found.timeline if point.phase == "clipping"][-1]
    for point in (first, last):
        assert point.bytes["parameters"] == 4 * sum(sizes)
        assert point.bytes["optimizer state"] == 8 * sum(sizes) + 4 * len(sizes)
        assert point.bytes["batch and buffers"] == 2 * 8 * 2 * 64
    assert first.bytes["gradients"] == 0 and last.bytes["gradients"] == 4 * sum(sizes)
    end = found.timeline[-1].bytes
    assert end["gradients"] == end["temporaries"] == 0 and end["activations"] == 4  # the loss


def test_a_gpus_allocator_rounds_every_tensor_up_to_512_bytes():
    model = GPT(_config().model_config(100), backends.resolve("torch", torch.device("cpu")))
    found = _estimate(device="cuda")
    sizes = [parameter.nbytes for parameter in model.parameters()]
    assert found.timeline[0].bytes["parameters"] == _rounded(*sizes)
    assert found.timeline[0].bytes["optimizer state"] == 2 * _rounded(*sizes) + 512 * len(sizes)


def test_the_logits_under_autocast_are_counted_by_hand():
    """At the peak PyTorch holds log-probabilities in bf16, and in fp32 those and their gradient; ours none of them."""
    rows, classes = 4 * 512, 20_000
    sizes = {"n_layer": 1, "batch_size": 4, "window": 512, "vocab_size": classes, "head_bias": False}
    torchs, ours = (_estimate(name, "bf16", **sizes) for name in ("torch", "triton"))
    of_logits = [[(b.bytes, b.dtype) for b in e.largest if b.shape == (rows, classes)] for e in (torchs, ours)]
    assert sorted(of_logits[0]) == sorted([(4 * rows * classes, "float32")] * 2 + [(2 * rows * classes, "bfloat16")])
    assert of_logits[1] == [] and ours.peak < torchs.peak / 2
    assert torchs.peak_op == "aten.nll_loss_backward.default"


def test_attention_saves_query_key_value_out_and_lse_and_no_scores():
    """The fused forms grow with T, plain arithmetic with T squared."""
    peaks = [
        _estimate("torch", "bf16", n_layer=1, batch_size=1, window=0, block_size=t).peak for t in (512, 1024, 1536)
    ]
    assert peaks[2] - peaks[1] == pytest.approx(peaks[1] - peaks[0], rel=0.01)
    eager = [
        _estimate("eager", "bf16", n_layer=1, batch_size=1, window=0, block_size=t).peak for t in (512, 1024, 1536)
    ]
    assert eager[2] - eager[1] > 1.3 * (eager[1] - eager[0])


@pytest.mark.parametrize("name", ["eager", "torch", pytest.param("triton", marks=needs_triton)])
def test_as_much_more_batch_is_as_much_more_activations(name):
    """But for autocast's copies of the weights, which do not grow: the same step up twice, and nearly all of it."""
    found = [_estimate(name, "bf16", batch_size=size) for size in (8, 16, 24)]
    ends = [[point.bytes for point in one.timeline if point.phase == "forward"][-1] for one in found]
    assert ends[0]["parameters"] == ends[1]["parameters"] and ends[1]["batch and buffers"] == 2 * 2 * 8 * 8 * 64
    activations = [end["activations"] for end in ends]
    step = activations[1] - activations[0]
    assert activations[2] - activations[1] == pytest.approx(step, rel=0.01)
    assert 0 <= activations[0] - step <= 2.1 * found[0].parameters


def test_accumulated_gradients_are_there_beside_the_next_activations():
    once, twice = (_estimate(passes=passes) for passes in (1, 2))
    end = [point for point in twice.timeline if point.phase == "forward"][-1]
    assert end.bytes["gradients"] == once.timeline[0].bytes["parameters"]
    assert twice.peak > once.peak


@pytest.mark.parametrize("name", ["torch", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize(("dtype", "size"), [("fp32", 4), ("bf16", 2)])
def test_checkpointed_activations_are_not_kept(name, dtype, size):
    """At the end of forward, by hand: of each block but the first what goes in, instead of all that is in it."""
    rows, C, layers, heads = 4 * 512, 64, 3, 4
    sizes = {"n_layer": layers, "batch_size": 4, "window": 512}
    kept, again = (_estimate(name, dtype, checkpoint_activations=flag, **sizes) for flag in (False, True))
    ends = [[p.bytes for p in found.timeline if p.phase == "forward"][-1]["activations"] for found in (kept, again)]
    in_block = rows * ((8 + 10 * size) * C + 16 + 4 * heads) + (16 * C * C if dtype == "bf16" else 0)
    between = rows * (4 + size) * C
    stream = 4 * rows * C  # the last one, which the last norm keeps
    assert ends[0] - ends[1] == pytest.approx(layers * in_block - (layers - 1) * between - stream, rel=0.001)
    assert again.peak < kept.peak


# ---------------------------------------------------------------- the timeline


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_categories_add_up_to_what_is_alive_at_every_point(dtype):
    """The blocks' sum against a count that the tracker keeps by itself as tensors come and go."""
    seen = []

    class Counting(Tracker):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = super().__torch_dispatch__(func, types, args, kwargs)
            seen.append(self.live)
            return result

    config = _config("torch", dtype)
    with FakeTensorMode(allow_non_fake_inputs=True):
        ops = backends.resolve("torch", torch.device("cpu"))
        model = GPT(config.model_config(100), ops)
        optimizer = learning.make_optimizer(model, config)
        batch = make_batch(config, 100, "cpu")
        tracker = Counting()
        estimate.hold_model(tracker, model, optimizer, batch)
        with tracker:
            training_step(model, optimizer, batch, DTYPES[dtype], 1.0, during=tracker.during)
    tracker._sums.clear()  # without what autograd does in place, the two counts are the same thing
    found = estimate.summary(tracker, ops, model, "torch", {})
    totals = [point.total for point in found.timeline]
    assert max(totals) == max(seen) == tracker.highest == found.peak
    assert set(seen) <= set(totals) | {seen[0]}
    assert all(set(point.bytes) == set(CATEGORIES) and min(point.bytes.values()) >= 0 for point in found.timeline)
    assert found.peak == sum(found.at_peak.values()) == sum(block.bytes for block in tracker.alive_at_peak())


def test_a_leak_is_seen():
    """A tensor that an op keeps stays in the timeline to the end; one that it drops does not."""
    kept = []

    def total(leak: bool) -> list[int]:
        tracker = Tracker()
        with FakeTensorMode(), tracker, tracker.during("forward"):
            x = torch.empty(1000)
            for _ in range(3):
                y = x + 1
                if leak:
                    kept.append(y)
                del y
        tracker.finish()
        return [point.total for point in tracker.timeline()]

    assert total(leak=False)[-1] == 4000 and max(total(leak=False)) == 8000
    assert total(leak=True)[-1] == max(total(leak=True)) == 16_000


def test_views_and_in_place_ops_take_nothing():
    tracker = Tracker()
    with FakeTensorMode(), tracker, tracker.during("forward"):
        x = torch.empty(64, 64)
        y = x.t()[3:].unflatten(1, (8, 8)).transpose(1, 2)
        y.mul_(2.0)
    assert tracker.highest == tracker.live == 4 * 64 * 64


# ---------------------------------------------------------------- inside an op


@needs_triton
def test_what_an_op_of_ours_allocates_inside_is_counted():
    """layer_norm's backward shares its sums over a workspace: 2 x parts x N fp32, by hand from its plan."""
    device = TARGETS["sm_90"]
    op = torch.ops.kernels.layer_norm_backward.default
    rows, n = 8192, 768
    x, weight, row = torch.empty(rows, n), torch.empty(n), torch.empty(rows)
    inside = Workspaces(device)(op, (x, x, weight, weight, row, row, 1, [True, True, True]), {})
    from kernels.layer_norm import _programs

    assert inside == 4 * rows * n + 2 * 4 * n + 2 * 4 * _programs(rows, n, 4, device) * n


def test_a_workspace_inside_a_custom_op_is_in_the_peak_whatever_its_fake_says():
    def function(x: torch.Tensor) -> torch.Tensor:
        scratch = x.new_empty(10 * x.numel())
        first = scratch * 2.0
        del scratch
        return x + first[: x.numel()]

    name = "test_memory_scratch"
    made = register(name, function, lambda x: torch.empty_like(x))
    ours = Workspaces(TARGETS["sm_90"])
    tracker = Tracker(workspace=ours)
    with FakeTensorMode(), tracker, tracker.during("forward"):
        x = torch.empty(1000)
        y = made(x)
    tracker.finish()
    # x; then twice the scratch inside; then x and y
    assert not ours.unseen and tracker.highest == 4000 + 80_000
    points = [point.total for point in tracker.timeline()]
    assert max(points) == 84_000 and points[-1] == 8000 == x.nbytes + y.nbytes


@pytest.mark.parametrize(("device", "copies"), [(TARGETS["sm_90"], 0), (INTERPRETER, 2)])
def test_an_op_that_does_otherwise_on_a_gpu_is_seen_doing_so(device, copies):
    """A product of bf16 with a result in fp32, which only CUDA has, and copies in its place elsewhere."""

    def function(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        out = a.new_empty((100, 100), dtype=torch.float32)
        if a[:50].is_cuda:
            torch.mm(a, b, out=out, out_dtype=torch.float32)
        else:
            torch.mm(a.float(), b.float(), out=out)
        return out

    name = f"test_memory_widening_{copies}"
    register(name, function, lambda a, b: a.new_empty((100, 100), dtype=torch.float32))
    ours = Workspaces(device)
    a = torch.empty(100, 100, dtype=torch.bfloat16)
    assert ours(getattr(torch.ops.kernels, name).default, (a, a), {}) == (1 + copies) * 4 * 100 * 100
    assert not ours.unseen


def test_an_op_that_cannot_be_looked_into_is_named():
    def function(x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:  # needs values
            return x + 1
        return x + 2

    made = register("test_memory_needs_values", function, lambda x: torch.empty_like(x))
    ours = Workspaces(TARGETS["sm_90"])
    with FakeTensorMode(), Tracker(workspace=ours):
        made(torch.empty(10))
    assert list(ours.unseen) == ["kernels::test_memory_needs_values"]


@needs_triton
def test_every_op_of_ours_is_looked_into():
    for dtype in ("fp32", "bf16"):
        assert not _estimate("triton", dtype, dropout=0.1).unseen


# ---------------------------------------------------------------- CUDA's choices


class _Log(TorchDispatchMode):
    """Ops with the shapes and dtypes of what they return, views and questions left out."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]
        if func.namespace != "prim" and made and not (func.is_view or func.name().endswith("detach")):
            self.ops.append((str(func), [(tuple(x.shape), x.stride(), x.dtype) for x in made]))
        return result


class _Whole:
    """A tensor that is always taken whole."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __getitem__(self, _):
        return self.tensor


@pytest.fixture
def cuda_autocast():
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    yield
    torch.set_autocast_enabled("cuda", False)


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("name", ["torch", pytest.param("triton", marks=needs_triton)])
def test_a_forward_pass_makes_what_pytorch_makes_on_cuda_tensors(name, bf16, request):
    """Op by op, with dropout, against the dispatcher's own choices for (fake) CUDA tensors and their autocast.

    Left out: PyTorch's own attention, as which of its kernels runs is asked of the GPU, and our loss, whose fake takes
    a slice, which there is none of without CUDA.
    """
    config = _config(dropout=0.1, n_layer=1).model_config(100)
    ops = backends.resolve(name, torch.device("cuda"))
    torchs = backends.resolve("torch", torch.device("cuda"))
    if name == "torch":
        ops = dataclasses.replace(ops, attention=lambda qkv, **_: qkv.amax(2))
    else:
        ops = dataclasses.replace(ops, loss=torchs.loss)

    def log(device):
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            model = GPT(config, ops)
            for module in model.modules():
                for key, parameter in module._parameters.items():
                    if parameter is not None:
                        there = torch.empty(parameter.shape, device=device)
                        module._parameters[key] = torch.nn.Parameter(there, requires_grad=False)
            tokens = torch.zeros(2, 16, dtype=torch.int64, device=device)
            # indexing asks for a device guard, which there is none of without CUDA
            del model.positions
            model.positions = _Whole(torch.zeros(16, config.n_embd, device=device))
            with _Log() as found:
                model(tokens, tokens)
        return found.ops

    with cuda_rules.as_on_cuda(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        ours = log("cpu")
    if bf16:
        request.getfixturevalue("cuda_autocast")
    theirs = log("cuda")
    assert [op for op in ours if "aten._to_copy" not in op[0]] == [op for op in theirs if "aten._to_copy" not in op[0]]
    copies = [sorted(str(op[1]) for op in ops if "aten._to_copy" in op[0]) for ops in (ours, theirs)]
    assert copies[0] == copies[1]


@pytest.mark.parametrize(("dtype", "kernel"), [("bf16", "flash"), ("fp32", "efficient")])
def test_the_cpus_own_forms_are_not_in_an_estimate_for_a_gpu(dtype, kernel):
    ops = _estimate("torch", dtype, dropout=0.1, n_layer=1).ops
    assert f"aten._scaled_dot_product_{kernel}_attention.default" in ops
    assert "aten.native_dropout.default" in ops and "aten.gelu.default" in ops
    assert not [op for op in ops if "mkldnn" in op or "sigmoid" in op or "bernoulli" in op or "for_cpu" in op]


def test_an_estimate_for_a_cpu_has_them():
    ops = _estimate("torch", "fp32", device="cpu", n_layer=1).ops
    assert "aten._scaled_dot_product_flash_attention_for_cpu.default" in ops and "aten.gelu.default" not in ops
    assert not torch.backends.mkldnn.is_available() or "mkldnn._linear_pointwise.default" in ops


def test_the_cpus_and_cudas_attention_save_the_same():
    """q, k, v, out and one fp32 a row: the fused forms of both."""
    shape = (2, 4, 64, 16)

    def saved(rules):
        tracker = Tracker()
        with FakeTensorMode(), rules:
            q, k, v = (torch.empty(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
            with tracker, tracker.during("forward"):
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return tracker.live, out.nbytes

    for rules in (nullcontext(), cuda_rules.as_on_cuda()):
        live, out = saved(rules)
        inputs = 3 * out  # seen as arguments only when an op returns them
        assert live - out - 4 * 2 * 4 * 64 in (0, 24, inputs, inputs + 24)


# ---------------------------------------------------------------- against a real step


def _real_peak(config) -> int:
    """Bytes: what PyTorch's profiler records of a real step on the CPU, above what was there before it."""
    device = torch.device("cpu")
    vocab_size = estimate.vocabulary(config)
    model = GPT(config.model_config(vocab_size), backends.resolve(config.kernels, device))
    optimizer = learning.make_optimizer(model, config)
    batch = make_batch(config, vocab_size, device)
    step = lambda: training_step(model, optimizer, batch, DTYPES[config.dtype], config.grad_clip)  # noqa: E731
    step()
    states = [tensor for state in optimizer.state.values() for tensor in state.values()]
    before = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers(), *batch, *states))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = recorded.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    assert len(changes) > 100
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return before + peak


@pytest.mark.parametrize(("name", "dropout"), [("torch", 0.2), ("torch", 0.0), ("eager", 0.2)])
def test_the_estimate_is_what_a_real_step_on_the_cpu_allocates(name, dropout):
    config = _config(name, name="shakespeare", n_layer=1, batch_size=2, dropout=dropout)
    assert estimate.estimate(config, device="cpu").peak == pytest.approx(_real_peak(config), rel=0.03)


def test_so_it_is_under_autocast():
    config = _config("torch", "bf16", name="shakespeare", n_layer=1, batch_size=1)
    assert estimate.estimate(config, device="cpu").peak == pytest.approx(_real_peak(config), rel=0.03)


@needs_triton
@pytest.mark.interpreted
def test_so_it_is_with_the_kernels_in_the_interpreter():
    config = _config("triton", name="shakespeare", n_layer=1, batch_size=1, block_size=128, dropout=0.0)
    assert estimate.estimate(config, device="cpu").peak == pytest.approx(_real_peak(config), rel=0.15)


@pytest.mark.slow
def test_the_whole_shakespeare_preset():
    config = _config("torch", name="shakespeare")
    assert estimate.estimate(config, device="cpu").peak == pytest.approx(_real_peak(config), rel=0.15)


def test_the_step_is_the_trainers(tmp_path):
    """The trainer's own step makes the same tensors."""
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question.\n" * 200)
    here = {"data": str(text), "out": tmp_path / "run", "device": "cpu"}
    config = _config(name="shakespeare-cpu", batch_size=4, n_layer=1, **here)
    session = trainer.Session(config)
    session.learner.step(0)
    theirs = Tracker()
    estimate.hold_model(theirs, session.model, session.learner.optimizer, [])
    with theirs, theirs.during("forward"):
        session.learner.step(1)
    own = Tracker()
    batch = make_batch(config, session.tokenizer.vocab_size, "cpu")
    estimate.hold_model(own, session.model, session.learner.optimizer, [])
    with own, own.during("forward"):
        training_step(session.model, session.learner.optimizer, batch, torch.float32, config.grad_clip)
    assert own.highest == pytest.approx(theirs.highest, rel=0.001)


# ---------------------------------------------------------------- what fits


def test_a_batch_that_fits_fits_and_one_more_does_not():
    config = _config("torch", "bf16", n_layer=1)
    peak = lambda n: estimate.estimate(dataclasses.replace(config, batch_size=n)).peak  # noqa: E731
    limits = [30e6, 60e6]
    for limit, found in zip(limits, estimate.largest_batches(peak, limits), strict=True):
        assert found > 1 and peak(found) <= limit < peak(found + 1)


@pytest.mark.parametrize("limit", [10, 107, 1000, 1007, 54_321])
def test_the_search_is_right_on_steps_and_bends_too(limit):
    for peak in (lambda n: 7 * n + 100, lambda n: 512 * (n // 3), lambda n: max(10 * n, 3 * n * n - 50)):
        found = estimate.largest_batch(peak, limit)
        assert found == max((n for n in range(1, 60_000) if peak(n) <= limit), default=0)


# ---------------------------------------------------------------- the command


@pytest.fixture
def run(monkeypatch, capsys):
    """The command as a whole program, in this process: (exit status, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["profiling", "memory", *arguments])
        with pytest.raises(SystemExit) as left:
            door(__main__.main)
        return left.value.code or 0, *capsys.readouterr()

    return run


def _document(**changes) -> dict:
    rows = [memory.as_json(_estimate(name, "bf16")) for name in ("torch", "eager")]
    settings = {
        "preset": "tiny", "batch_size": 2, "tokens": 64, "vocab_size": 100, "parameters": 145_764, "dtype": "bf16",
        "grad_accumulation": 1, "checkpoint_activations": False, "device": "cuda", "arch": "sm_90",
        "torch": torch.__version__,
    }  # fmt: skip
    return {"settings": settings, "fit_gb": [], "kernels": rows} | changes


def test_the_command_takes_checkpointing_as_training_does(run):
    asked = ("--preset", "tiny", "--kernels", "torch", "--estimate", "--checkpoint-activations", "--json", "-")
    status, out, _ = run(*asked)
    document = json.loads(out)
    assert status == 0 and document["settings"]["checkpoint_activations"]
    assert document["kernels"][0]["peak"] == _estimate("torch", "bf16", checkpoint_activations=True).peak
    assert "computed again" in memory_report.title(document)


def test_the_command_writes_everything_it_is_asked_for(tmp_path, run):
    files = {name: tmp_path / f"memory.{name}" for name in ("json", "png", "html")}
    flags = [text for name, path in files.items() for text in (f"--{name}", str(path))]
    asked = ("--preset", "tiny", "--kernels", "torch", "attention=eager,loss=torch", "--estimate", "--fit", "0.03")
    status, out, err = run(*asked, *flags)
    assert status == 0, err
    document = json.loads(files["json"].read_text())
    rows = {row["kernels"]: row for row in document["kernels"]}
    assert set(rows) == {"torch", "attention=eager,loss=torch"}
    assert rows["attention=eager,loss=torch"]["backends"]["attention"] == "eager"
    assert rows["torch"]["fit"][0] > 1 and f" {rows['torch']['fit'][0]} " in out
    assert rows["torch"]["peak"] == _estimate("torch", "bf16").peak
    assert files["png"].read_bytes().startswith(b"\x89PNG") and "</html>" in files["html"].read_text()


@pytest.mark.parametrize(
    ("words", "requests"),
    [
        (["eager,torch,triton"], ["eager", "torch", "triton"]),
        (["torch", "attention=triton, loss=torch", "torch"], ["torch", "attention=triton,loss=torch"]),
        (["eager, torch", "loss=eager"], ["eager", "torch", "loss=eager"]),
    ],
)
def test_what_is_compared_is_written_as_training_has_it(words, requests):
    assert memory._requests(words) == requests


def test_the_page_stands_alone_and_escapes_what_it_shows():
    document = _document()
    document["kernels"][0]["kernels"] = "<script>alert(1)</script>"
    page = memory_report.to_html(document)
    assert "<script" not in page and "&lt;script&gt;" in page
    assert not [word for word in ("src=", "href=", "@import", "url(") if word in page]
    assert page.count("<svg") == page.count("</svg>") == 3
    assert page.count("<polygon") == 2 * len(CATEGORIES)


@pytest.mark.parametrize(
    "names", [["torch"], ["eager", "torch", "triton"], ["triton", *(f"loss={n}" for n in "abcde")]]
)
def test_lines_that_lie_on_one_another_can_be_told_apart(names):
    """What is drawn later is narrower, and the last of several has gaps."""
    made = pictures.strokes(names)
    assert len({s.width for s in made}) == len({s.colour for s in made}) == len(names)
    assert all(below.width > above.width for below, above in itertools.pairwise(made))
    assert [bool(s.dashes) for s in made] == [False] * (len(names) - 1) + [len(names) > 1]


def test_one_backend_twice_is_two_lines_in_the_page():
    document = _document()
    document["kernels"][1] |= {key: document["kernels"][0][key] for key in ("timeline", "peak", "categories")}
    page = memory_report.to_html(document)
    assert (
        page.count('stroke-width="3.6"/>') == 1 and page.count('stroke-width="1.4" stroke-dasharray="4.9 2.8"/>') == 1
    )


def test_a_picture_shows_what_a_gpu_did_above_the_estimate(tmp_path):
    document = _document()
    pictures.memory_png(document, tmp_path / "without.png", "")
    row = document["kernels"][0]
    row["measured"] = {name: row[name] for name in ("timeline", "categories")} | {"allocated": 2 * row["peak"]}
    pictures.memory_png(document, tmp_path / "with.png", "")
    assert (tmp_path / "with.png").read_bytes() != (tmp_path / "without.png").read_bytes()


@pytest.mark.parametrize(("scale", "unit"), [(1, "MB"), (1000, "GB")])
def test_pictures_count_in_a_unit_that_fits(scale, unit, tmp_path):
    document = _document()
    for row in document["kernels"]:
        row["peak"] *= scale
        row["timeline"] = [[phase, op, *(size * scale for size in sizes)] for phase, op, *sizes in row["timeline"]]
    other = {"MB": "GB", "GB": "MB"}[unit]
    timelines = memory_report.to_html(document).split("<table>")[0]
    assert f" {unit}</text>" in timelines and f" {other}</text>" not in timelines
    pictures.memory_png(document, tmp_path / "memory.svg", "")
    assert "<svg" in (tmp_path / "memory.svg").read_text()


def test_pictures_keep_the_peak():
    row = _document()["kernels"][0]
    line = pictures.aligned(row)
    assert max(line.totals) == row["peak"] and line.x == sorted(line.x) and 0 < line.x[0] < line.x[-1] < 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--preset", "gpt3"), "gpt2-medium"),
        (("--kernels", "cuda"), "eager, torch, triton"),
        (("--kernels", "softmax=torch"), "attention"),
        (("--kernels", "torch,"), "empty name"),
        (("--kernels", "torch,attention=eager"), "put spaces between"),
        (("--kernels", "attention=eager,attention=torch"), "named twice"),
        (("--arch", "sm_70"), "sm_80"),
        (("--batch-size", "0"), "batch_size"),
        (("--batch-size", "many"), "--batch-size"),
        (("--fit", "-1"), "above 0"),
        (("--grad-accumulation", "0"), "at least 1"),
        (("--snapshot", "folder", "--estimate"), "needs a GPU"),
        (("--preset", "tiny", "--png", "no/such/folder/a.png"), "no such folder"),
        (("--preset", "tiny", "--png", "a.txt"), "--png a.txt: the name must end in"),
        (("--preset", "tiny", "--png", "a"), ".png"),
        (("--preset", "tiny", "--html", "a.png"), "--html a.png: the name must end in .htm or .html"),
        (("--preset", "tiny", "--kernels", "torch", "--estimate", "--html", "/dev/full"), "disk is full"),
    ],
)
def test_bad_input_is_told_in_one_line(arguments, says, run):
    status, _, complaint = run(*arguments)
    assert status == 1 and complaint.count("\n") == 1 and complaint.startswith("error: ") and says in complaint
