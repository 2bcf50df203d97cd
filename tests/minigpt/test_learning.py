"""The learning rate, the optimizer and its step, each against what its paper says."""

import math
from contextlib import nullcontext

import pytest
import torch
from training_runs import Waits

import kernels
from minigpt.backends import resolve
from minigpt.batches import Batches
from minigpt.config import preset
from minigpt.learning import Learner, learning_rate
from minigpt.model import GPT

CPU = torch.device("cpu")
SHAPE = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 4, "learning_rate": 1e-2}


def make(dtype=torch.float32, **options):
    config = preset("shakespeare-cpu", **(SHAPE | {"warmup_steps": 0} | options))
    torch.manual_seed(0)
    model = GPT(config.model_config(20), resolve("torch", CPU))
    tokens = torch.randint(20, (500,))
    return Learner(model, config, Batches(tokens, 16, config.batch_size, seed=0), dtype)


def test_the_learning_rate_warms_up_and_follows_a_cosine():
    config = preset("shakespeare-cpu", learning_rate=1.0, min_learning_rate=0.2, warmup_steps=9, max_steps=109)
    rates = [learning_rate(step, config) for step in range(109)]
    assert rates[:9] == pytest.approx([0.1 * n for n in range(1, 10)])
    assert rates[9] == 1.0 and rates[59] == pytest.approx(0.6) and rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[34] == pytest.approx(0.2 + 0.8 * (2 + math.sqrt(2)) / 4) and 0.2 < rates[-1] < 0.201
    assert learning_rate(109, config) == learning_rate(10**6, config) == pytest.approx(0.2)
    short = preset("shakespeare-cpu", warmup_steps=50, max_steps=10)
    assert 0 < learning_rate(9, short) < learning_rate(50, short)


def test_the_optimizer_steps_as_the_paper_says():
    """One step of decoupled weight decay and bias-corrected moments, computed by hand in float64."""
    learner = make(beta1=0.8, beta2=0.9, weight_decay=0.3)
    named = dict(learner.model.named_parameters())
    before = {name: p.detach().double().clone() for name, p in named.items()}
    torch.manual_seed(0)
    for p in named.values():
        p.grad = torch.randn_like(p)
    learner.optimizer.step()
    for name, p in named.items():
        decay = 0.3 if p.dim() >= 2 else 0.0
        gradient = p.grad.double()
        expected = before[name] * (1 - 1e-2 * decay) - 1e-2 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(p.detach().double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_the_gradient_is_clipped_to_its_norm(clip, monkeypatch):
    learner, seen = make(grad_clip=clip), []
    monkeypatch.setattr(learner.optimizer, "step", lambda: seen.append(_norm(learner)))
    _, norm = learner.step(0).tolist()
    learner.backward(learner.data(0))
    assert norm == pytest.approx(_norm(learner), rel=1e-5) and norm > 0.1
    assert seen == pytest.approx([clip or norm], rel=1e-3)


def _norm(learner):
    return torch.cat([p.grad.flatten() for p in learner.parameters]).norm().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_step_never_waits_for_the_device(dtype):
    learner = make(dtype)
    learner.step(0)
    with Waits() as waits:
        learner.step(1)
        assert waits.found == []
        # that the test would see one
        float(torch.ones(()))
        torch.ones(1).tolist()
        assert waits.found == ["_local_scalar_dense", "tolist"]


def state(learner):
    tensors = [*learner.parameters, *(t for s in learner.optimizer.state.values() for t in s.values())]
    return [tensor.detach().clone() for tensor in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("factor", [math.nan, math.inf, -math.inf])
def test_a_step_without_a_finite_loss_changes_nothing(monkeypatch, dtype, clip, factor):
    learner = make(dtype, grad_clip=clip, grad_accumulation=2)
    for number in range(2):
        learner.step(number)
    before, loss = state(learner), learner.loss
    with monkeypatch.context() as patch:
        patch.setattr(learner, "loss", lambda *batch: loss(*batch) * factor)
        assert not learner.step(2).isfinite().any()
    assert all(torch.equal(a, b) for a, b in zip(before, state(learner), strict=True))
    assert learner.step(3).isfinite().all()
    assert not any(torch.equal(a, b) for a, b in zip(before, state(learner), strict=True) if a.dim() == 2)


def test_a_step_whose_gradient_alone_is_not_finite_changes_nothing(monkeypatch):
    learner = make(grad_clip=0.0)
    learner.step(0)
    before = state(learner)
    handle = learner.parameters[0].register_hook(lambda gradient: gradient * math.inf)
    loss, norm = learner.step(1).tolist()
    handle.remove()
    assert math.isfinite(loss) and not math.isfinite(norm)
    assert all(torch.equal(a, b) for a, b in zip(before, state(learner), strict=True))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("Triton Error [CUDA]: out of memory")])
def test_a_pass_that_compiles_kernels_may_find_too_little_memory(monkeypatch, error):
    """A compiled step takes less, and tells itself where it has too little."""
    passes = []

    def too_little(work, _):
        work()
        passes.append(torch.rand(()))
        raise error

    monkeypatch.setattr(kernels, "compile_ahead", too_little)
    learner, other = make(dropout=0.3), make(dropout=0.3)
    learner.cold = True
    for number in range(2):
        torch.manual_seed(number)
        measured = learner.step(number)
        torch.manual_seed(number)
        assert torch.equal(measured, other.step(number))
    assert len(passes) == 1


def test_other_errors_of_that_pass_stay_what_they_are(monkeypatch):
    def broken(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(kernels, "compile_ahead", broken)
    learner = make()
    learner.cold = True
    with pytest.raises(RuntimeError, match="a bug"):
        learner.step(0)


def test_the_memory_of_that_pass_is_not_that_of_training(monkeypatch):
    done, learner = [], make()
    learner.device = torch.device("cuda")
    monkeypatch.setattr(torch.random, "fork_rng", lambda _: nullcontext())
    monkeypatch.setattr(kernels, "compile_ahead", lambda *_: done.append("pass"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: done.append(str(device)))
    learner.compile_kernels([])
    assert done == ["pass", "cuda"]


@pytest.mark.parametrize("kernels", ["eager", "torch", pytest.param("triton", marks=pytest.mark.interpreted)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputed_activations_give_the_same_gradients(kernels, dropout):
    def gradients(checkpointing):
        learner = make(n_layer=2, dropout=dropout, checkpoint_activations=checkpointing, kernels=kernels)
        learner.model.use(resolve(kernels, CPU))
        torch.manual_seed(1)
        loss = learner.backward(learner.data(0))
        return [loss, *(p.grad for p in learner.parameters)]

    assert all(torch.equal(a, b) for a, b in zip(gradients(True), gradients(False), strict=True))


def saved_bytes(learner):
    """Bytes that the forward pass keeps for backward, parameters left out, each storage once."""
    kept, parameters = {}, {p.untyped_storage().data_ptr() for p in learner.parameters}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = learner.loss(*learner.batches[0])
    del loss
    return sum(kept.values())


def test_of_a_block_only_its_inputs_are_kept():
    def kept(n_layer, checkpointing):
        return saved_bytes(make(n_layer=n_layer, checkpoint_activations=checkpointing))

    one_input = 4 * 16 * 16 * 4  # batch, window, width, bytes
    more = [kept(7, checkpointing) - kept(2, checkpointing) for checkpointing in (False, True)]
    assert more[1] <= 5 * 2 * one_input  # the stream, and the branch that is yet to be added to it
    assert more[0] > 5 * 10 * one_input


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"checkpoint_activations": True}, {"dropout": 0.1}], ids=str)
def test_a_compiled_model_trains_the_same(options):
    def run(compiled):
        learner = make(compile=compiled, **options)
        return torch.stack([learner.step(number) for number in range(4)])

    compiled, eager = run(True), run(False)
    if "dropout" in options:  # inductor draws masks of its own
        compiled, eager = compiled[:, 0], eager[:, 0]
    torch.testing.assert_close(compiled, eager, rtol=0, atol=0.1 if "dropout" in options else 1e-5)
