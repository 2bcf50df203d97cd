"""The flag: what it names is what runs, or an error says why not."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

import kernels
import kernels.reference
from minigpt import backends
from minigpt.backends import OPS, parse_request, resolve, will_interpret
from minigpt.config import ModelConfig
from minigpt.errors import UserError
from minigpt.model import GPT

CPU = torch.device("cpu")
NAMES = {
    "attention": "scaled_dot_product_attention_qkvpacked",
    "decode": "decode_attention",
    "layer_norm": "layer_norm",
    "add_layer_norm": "add_layer_norm",
    "loss": "linear_cross_entropy",
}


@pytest.fixture
def runs_anywhere(monkeypatch):
    monkeypatch.setattr(kernels.device, "why_not", lambda device: None)


@pytest.mark.parametrize(
    ("backend", "home"), [("eager", kernels.reference), ("torch", backends.Torch), ("triton", kernels)]
)
def test_one_name_for_all_ops(backend, home, runs_anywhere):
    for request in (backend, f" {backend.upper()} ", ",".join(f"{op} = {backend}" for op in OPS)):
        ops = resolve(request, CPU)
        assert ops.names == dict.fromkeys(OPS, backend)
        for field, name in NAMES.items():
            assert getattr(ops, field) is getattr(home, name)


def test_the_torch_backend_is_pytorchs_functions():
    qkv = torch.randn(2, 7, 3, 2, 4, dtype=torch.float64)
    expected = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), is_causal=True)
    assert torch.equal(
        backends.Torch.scaled_dot_product_attention_qkvpacked(qkv, is_causal=True), expected.transpose(1, 2)
    )
    assert backends.Torch.layer_norm is F.layer_norm
    x, residual, weight = (torch.randn(*shape, dtype=torch.float64) for shape in ((3, 4), (3, 4), (5, 4)))
    target, bias = torch.tensor([0, 4, -100]), torch.randn(5, dtype=torch.float64)
    expected = kernels.reference.add_layer_norm(x, residual, (4,))
    torch.testing.assert_close(backends.Torch.add_layer_norm(x, residual, (4,)), expected)
    torch.testing.assert_close(
        backends.Torch.linear_cross_entropy(x, weight, target, linear_bias=bias),
        kernels.reference.linear_cross_entropy(x, weight, target, linear_bias=bias),
    )
    query, keys, values = (torch.randn(3, 2, slots, 4, dtype=torch.float64) for slots in (1, 7, 7))
    lengths = torch.tensor([1, 7, 4])
    torch.testing.assert_close(
        backends.Torch.decode_attention(query, keys, values, lengths),
        kernels.reference.decode_attention(query, keys, values, lengths),
    )


def test_ops_that_are_not_named_follow_auto(runs_anywhere):
    ops = resolve("loss=triton,attention=eager", CPU)
    assert ops.names == {"attention": "eager", "layer_norm": "torch", "loss": "triton"}
    assert ops.loss is kernels.linear_cross_entropy and ops.layer_norm is F.layer_norm
    assert ops.choices["layer_norm"].reason == "no GPU" and "asked for" in ops.choices["loss"].reason


@pytest.mark.parametrize("request_text", [None, "", "auto", "  ", "attention=auto"])
def test_auto_is_torch_until_a_measurement_says_otherwise(request_text):
    assert resolve(request_text, CPU).names == dict.fromkeys(OPS, "torch")
    on_gpu = resolve(request_text, torch.device("cuda"))
    assert on_gpu.names == dict.fromkeys(OPS, "torch")
    assert all("no measurement" in choice.reason for choice in on_gpu.choices.values())


@pytest.mark.parametrize(
    ("request_text", "said"),
    [
        ("cuda", "unknown kernels 'cuda'.*auto, eager, torch, triton"),
        ("attention=fast", "unknown kernels 'fast'.*eager, torch, triton"),
        ("attention=", "unknown kernels ''"),
        ("softmax=triton", "unknown op 'softmax'.*attention, layer_norm, loss"),
        ("attention=triton,", "unknown op ''"),
        ("attention=triton,loss", "unknown op 'loss'|unknown kernels ''"),
        ("attention=torch,attention=eager", "named twice"),
    ],
)
def test_wrong_names_list_the_right_ones(request_text, said):
    with pytest.raises(UserError, match=said):
        parse_request(request_text)


def test_a_kernel_that_cannot_run_is_an_error_and_never_a_fallback(monkeypatch):
    monkeypatch.setattr(kernels.device, "why_not", lambda device: "Triton is not installed: pip install triton")
    for request in ("triton", "layer_norm=triton"):
        with pytest.raises(UserError, match=r"triton cannot run on cpu.*pip install triton"):
            resolve(request, CPU)
        assert not will_interpret(request, CPU)
    assert resolve("eager", CPU).names == dict.fromkeys(OPS, "eager")


def test_the_interpreter_is_loud(monkeypatch, runs_anywhere):
    monkeypatch.setattr(kernels.device, "INTERPRETED", True)
    ops = resolve("loss=triton", CPU)
    assert ops.interpreted and "INTERPRETER" in ops.warning and "slow" in ops.warning
    assert resolve("torch", CPU).warning is None
    monkeypatch.setattr(kernels.device, "INTERPRETED", False)
    assert resolve("loss=triton", CPU).warning is None


def test_the_table_names_each_op_its_backend_and_the_reason():
    out = io.StringIO()
    ops = resolve("attention=eager", CPU)
    Console(file=out, width=120).print(ops.table())
    rows = [line for line in out.getvalue().splitlines() if any(op in line for op in OPS)]
    for row, (op, choice) in zip(rows, ops.choices.items(), strict=True):
        assert op in row and choice.backend in row and choice.reason in row


@pytest.mark.parametrize("request_text", ["auto", *backends.BACKENDS])
def test_a_model_can_be_copied_and_pickled(request_text, runs_anywhere):
    model = GPT(ModelConfig(vocab_size=5, block_size=4, n_layer=1, n_head=1, n_embd=4), resolve(request_text, CPU))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.ops == model.ops and other.state_dict().keys() == model.state_dict().keys()


def test_every_backend_has_every_op():
    assert set(backends.BACKENDS) == {"eager", "torch", "triton"}
    for home in (kernels, kernels.reference, backends.Torch):
        assert all(callable(getattr(home, name)) for name in NAMES.values())
