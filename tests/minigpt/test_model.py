"""The GPT against PyTorch's own transformer layer, GPT-2's published sizes, and across backends."""

import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode

import kernels
from kernels.op import count_launches
from minigpt.backends import resolve
from minigpt.config import ModelConfig, preset
from minigpt.errors import UserError
from minigpt.gelu import _GELULinear, gelu, gelu_linear
from minigpt.model import GPT, IGNORE, sinusoids

TORCH = resolve("torch", torch.device("cpu"))
SMALL = ModelConfig(vocab_size=13, block_size=9, n_layer=2, n_head=3, n_embd=12, bias=True)


def build(config=SMALL, ops=TORCH, seed=0, spread=1.0):
    """A model; `spread` > 1 makes its weights large enough for every part of it to matter."""
    torch.manual_seed(seed)
    model = GPT(config, ops)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3 * (spread - 1))
    return model


def tokens(*shape, vocab=13, seed=1):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- size and weights


@pytest.mark.parametrize(
    ("name", "vocab", "parameters"),
    [
        ("tiny", 100, 145_764),
        # Published: GPT-2 with its 50,257 tokens.
        ("gpt2", 50257, 124_439_808),
        ("gpt2-medium", 50257, 354_823_168),
        ("gpt2-large", 50257, 774_030_080),
        ("gpt2-xl", 50257, 1_557_611_200),
    ],
)
def test_parameter_counts(name, vocab, parameters):
    config = replace(preset(name).model_config(1), vocab_size=vocab)
    with torch.device("meta"):
        model = GPT(config, TORCH)
    assert model.parameter_count() == parameters


def test_the_shakespeare_preset_has_10_7_million_parameters():
    with torch.device("meta"):
        assert GPT(preset("shakespeare").model_config(68), TORCH).parameter_count() == pytest.approx(10.7e6, rel=0.01)


def test_the_first_loss_is_that_of_a_uniform_guess():
    for name in ("tiny", "shakespeare-cpu"):
        config = preset(name).model_config(68)
        model = build(config)
        x = tokens(4, 64, vocab=config.vocab_size)
        _, loss = model(x, tokens(4, 64, vocab=config.vocab_size, seed=2))
        assert loss.item() == pytest.approx(math.log(config.vocab_size), abs=0.35)


def test_the_seed_fixes_the_weights_whatever_the_backend():
    eager = resolve("eager", torch.device("cpu"))
    for a, b in zip(build().parameters(), build(ops=eager).parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(build().tokens.weight, build(seed=1).tokens.weight)


def test_decay_groups_hold_every_parameter_once():
    for tied in (True, False):
        model = build(replace(SMALL, tied_head=tied, head_bias=True))
        decayed, kept = model.decay_groups(0.1)
        assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
        assert all(p.dim() < 2 for p in kept["params"])
        together = [id(p) for group in (decayed, kept) for p in group["params"]]
        assert sorted(together) == sorted(id(p) for p in model.parameters())


def test_a_tied_head_is_the_embedding_and_an_untied_one_is_not():
    tied, untied = build(replace(SMALL, tied_head=True)), build(replace(SMALL, tied_head=False, head_bias=True))
    assert tied.head.weight is tied.tokens.weight and untied.head.weight is not untied.tokens.weight
    assert untied.parameter_count() - tied.parameter_count() == 13 * 12 + 13


def test_without_biases_only_norm_weights_are_vectors():
    names = [name for name, p in build(replace(SMALL, bias=False)).named_parameters() if p.dim() == 1]
    assert names and all("norm" in name and name.endswith("weight") for name in names)


# ---------------------------------------------------------------- forward


def pytorch_logits(model, idx):
    """The same model out of torch.nn.TransformerEncoderLayer, in float64."""
    config, T = model.config, idx.shape[1]
    mask = nn.Transformer.generate_square_subsequent_mask(T, dtype=torch.float64)
    x = (model.tokens.weight[idx] + model.positions[:T]).double()
    for block in model.blocks:
        layer = nn.TransformerEncoderLayer(
            config.n_embd, config.n_head, 4 * config.n_embd, dropout=0.0, norm_first=True, batch_first=True,
            bias=config.bias, activation=lambda x: F.gelu(x, approximate="tanh"), dtype=torch.float64,
        )  # fmt: skip
        pairs = {
            "self_attn.in_proj_": block.attention.qkv, "self_attn.out_proj.": block.attention.out,
            "linear1.": block.mlp.up, "linear2.": block.mlp.down, "norm1.": block.norm1, "norm2.": block.norm2,
        }  # fmt: skip
        layer.load_state_dict({a + kind: p for a, m in pairs.items() for kind, p in m.named_parameters()})
        x = layer(x, src_mask=mask)
    norm = model.norm
    x = F.layer_norm(x, x.shape[-1:], norm.weight.double(), None if norm.bias is None else norm.bias.double())
    head_bias = None if model.head.bias is None else model.head.bias.double()
    return F.linear(x, model.head.weight.double(), head_bias)


@pytest.mark.parametrize("T", [1, 2, 9])
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"tied_head": False, "head_bias": True}, {"position": "sinusoidal"}, {"n_head": 1}],
    ids=str,
)
def test_logits_are_those_of_pytorchs_transformer(options, T):
    model = build(replace(SMALL, **options), spread=2.0).eval()
    idx = tokens(3, T)
    logits, loss = model(idx)
    assert loss is None and logits.shape == (3, T, 13) and logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), pytorch_logits(model, idx), rtol=2e-4, atol=2e-4)


def test_the_loss_is_the_mean_over_the_targets_that_count():
    model = build(spread=2.0)
    idx, targets = tokens(3, 9), tokens(3, 9, seed=5)
    targets[0, :4], targets[2] = IGNORE, IGNORE
    (logits, _), (nothing, loss) = model(idx), model(idx, targets)
    assert nothing is None
    picked = [
        -logits[b, t].double().log_softmax(0)[targets[b, t]] for b in range(3) for t in range(9) if targets[b, t] >= 0
    ]
    assert loss.item() == pytest.approx((sum(picked) / len(picked)).item(), rel=1e-6)
    torch.testing.assert_close(model(idx, last_only=True)[0], model(idx)[0][:, -1:])


def test_no_token_sees_a_later_one():
    model = build(spread=2.0).eval()
    idx = tokens(1, 9)
    before = model(idx)[0]
    for t in range(9):
        changed = idx.clone()
        changed[0, t] = (changed[0, t] + 1) % 13
        after = model(changed)[0]
        assert torch.equal(after[:, :t], before[:, :t]) and not torch.equal(after[:, t:], before[:, t:])


def test_more_tokens_than_the_block_raise():
    with pytest.raises(ValueError, match="10 tokens are more than the block size, 9"):
        build()(tokens(1, 10))


def test_dropout_acts_in_training_only():
    model = build(replace(SMALL, dropout=0.5), spread=2.0)
    idx = tokens(2, 9)
    torch.manual_seed(3)
    first, second = model(idx)[0], model(idx)[0]
    torch.manual_seed(3)
    again = model(idx)[0]
    assert not torch.equal(first, second) and torch.equal(first, again)
    model.eval()
    assert torch.equal(model(idx)[0], model(idx)[0])


def test_sinusoids_have_the_papers_form():
    for length, channels in ((7, 6), (5, 1), (4, 9)):
        table = sinusoids(length, channels) / (0.02 * math.sqrt(2))
        for position in range(length):
            for channel in range(channels):
                angle = position / 10000 ** ((channel - channel % 2) / channels)
                expected = math.cos(angle) if channel % 2 else math.sin(angle)
                assert table[position, channel].item() == pytest.approx(expected, abs=1e-5)


# ---------------------------------------------------------------- GELU


def test_gelu_is_the_tanh_form():
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e4, -1e4])])
    x = x[None].requires_grad_()
    exact = x.detach().double().requires_grad_()
    incoming = torch.linspace(-2, 2, x.numel())[None]
    ours, reference = gelu(x), F.gelu(exact, approximate="tanh")
    ours.backward(incoming)
    reference.backward(incoming.double())
    torch.testing.assert_close(ours.double(), reference, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


def test_gelu_of_other_dtypes_and_layouts():
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    for given in (x.double(), x.bfloat16(), x.t(), x[::2, 1:], x[:1].expand(4, 5), x[:0]):
        wanted = F.gelu(given.double(), approximate="tanh")
        tolerance = 1e-2 if given.dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(gelu(given).double(), wanted, rtol=tolerance, atol=tolerance)
    assert gelu(torch.tensor([math.nan])).isnan().all()


def test_the_gradient_of_gelu_may_be_expanded():
    x = torch.randn(4, 5, requires_grad=True)
    gelu(x).sum().backward()
    y = x.detach().double().requires_grad_()
    F.gelu(y, approximate="tanh").sum().backward()
    torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lead", [(), (2, 5)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("form", [gelu_linear, _GELULinear.apply])
def test_gelu_and_the_linear_layer_after_it(form, with_bias, lead):
    """The form for GPUs makes the activations a second time: same results, same gradients, expanded ones too."""
    drawn = [torch.randn(*shape, generator=torch.Generator().manual_seed(3)) for shape in ((*lead, 6), (4, 6), (4,))]
    leaves, exact = ([t.to(dtype).requires_grad_() for t in drawn] for dtype in (torch.float32, torch.float64))
    for incoming in (torch.randn(*lead, 4), torch.ones(()).expand(*lead, 4)):
        ours = form(leaves[0], leaves[1], leaves[2] if with_bias else None)
        theirs = F.linear(F.gelu(exact[0], approximate="tanh"), exact[1], exact[2] if with_bias else None)
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)
        wanted = 3 if with_bias else 2
        gradients = torch.autograd.grad(ours, leaves[:wanted], incoming)
        expected = torch.autograd.grad(theirs, exact[:wanted], incoming.double())
        for gradient, truth in zip(gradients, expected, strict=True):
            torch.testing.assert_close(gradient.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", [0, 1])
def test_gelu_linear_under_autocast_is_the_two_under_autocast(frozen):
    drawn = [torch.randn(*shape, generator=torch.Generator().manual_seed(3)) for shape in ((2, 5, 6), (4, 6), (4,))]
    results = []
    for form in (_GELULinear.apply, lambda x, weight, bias: F.linear(F.gelu(x, approximate="tanh"), weight, bias)):
        leaves = [t.clone().requires_grad_(place != frozen) for place, t in enumerate(drawn)]
        with torch.autocast("cpu", torch.bfloat16):
            out = form(F.linear(leaves[0], torch.eye(6)), leaves[1], leaves[2])
        out.float().square().sum().backward()
        results.append((out, [leaf.grad for leaf in leaves]))
    (ours, gradients), (theirs, expected) = results
    assert ours.dtype == torch.bfloat16 and torch.equal(ours, theirs)
    for one, two in zip(gradients, expected, strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            torch.testing.assert_close(one, two, rtol=2e-2, atol=2e-2)


def test_gelu_linear_keeps_no_activations():
    kept = []
    x, weight = torch.randn(8, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        _GELULinear.apply(x, weight, None)
    assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr(), weight.data_ptr()]


# ---------------------------------------------------------------- backends


def train_a_little(config, request_text, device, steps):
    """Logits and gradients of the first step, and the losses of all of them."""
    model = build(config, resolve(request_text, device), spread=1.3).to(device)
    optimizer = torch.optim.AdamW(model.decay_groups(0.1), lr=1e-2)
    idx, targets = tokens(2, 9).to(device), tokens(2, 9, seed=5).to(device)
    losses, gradients, first = [], {}, None
    for _ in range(steps):
        if first is None:
            first = model(idx)[0].detach()
        _, loss = model(idx, targets)
        loss.backward()
        losses.append(loss.item())
        if not gradients:
            gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
    return first, gradients, losses


@pytest.mark.parametrize(
    ("request_text", "steps", "options"),
    [
        ("eager", 5, {}),
        ("eager", 5, {"bias": False}),
        ("triton", 5, {"n_layer": 1}),  # few layers and steps, for Triton's interpreter is slow
        ("attention=eager,layer_norm=triton", 1, {"bias": False, "n_layer": 1}),
    ],
    ids=str,
)
def test_backends_agree(request_text, steps, options, device):
    config = replace(SMALL, **options)
    logits, gradients, losses = train_a_little(config, request_text, device, steps)
    expected_logits, expected_gradients, expected_losses = train_a_little(config, "torch", device, steps)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, expected_gradients[name], rtol=1e-3, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}"
        )
    assert losses == pytest.approx(expected_losses, abs=1e-3)


def of_three_tensors(function):
    """Attention as of queries, keys and values that are three tensors."""

    def attention(qkv, **options):
        B, T, _, H, D = qkv.shape
        query, key, value = (part.view(B, T, H, D).transpose(1, 2) for part in qkv.flatten(2).split(H * D, -1))
        return function(query, key, value, **options).transpose(1, 2)

    return attention


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("backend", "function"),
    [("torch", F.scaled_dot_product_attention), ("triton", kernels.scaled_dot_product_attention)],
    ids=["torch", "triton"],
)
def test_one_tensor_of_queries_keys_and_values_changes_no_bit(backend, function, checkpointing, autocast, device):
    """Loss and every gradient, dropout's mask in them, as of three tensors, whose gradients autograd puts together."""
    results = []
    for packed in (True, False):
        ops = resolve(backend, device)
        model = build(
            replace(SMALL, dropout=0.2), ops if packed else replace(ops, attention=of_three_tensors(function))
        )
        model.to(device).checkpoint_activations = checkpointing
        torch.manual_seed(4)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            _, loss = model(tokens(2, 9).to(device), tokens(2, 9, seed=5).to(device))
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for one, other in zip(*results, strict=True):
        if device.type == "cpu":  # a GPU may sum otherwise what lies otherwise in memory
            assert torch.equal(one, other)
        torch.testing.assert_close(one, other)


def test_heads_that_the_kernel_does_not_have_are_told_before_anything_runs(device):
    config = replace(SMALL, n_embd=300, n_head=1)
    with pytest.raises(UserError, match=r"heads of 300 channels.*--n-head"):
        build(config, resolve("triton", device))
    build(config, resolve("attention=torch,layer_norm=triton,loss=triton", device))


def test_use_switches_every_op(device):
    model = build(spread=1.3).to(device)
    idx, targets = tokens(2, 9).to(device), tokens(2, 9, seed=5).to(device)
    with count_launches() as before:
        expected = model(idx, targets)[1]
    model.use(resolve("triton", device))
    with count_launches() as after:
        loss = model(idx, targets)[1]
        loss.backward()
    assert sum(before.values()) == 0 and sum(after.values()) > 0
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)


# ---------------------------------------------------------------- fake tensors


def _step(model, optimizer, idx, targets, dtype):
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        loss = model(idx, targets)[1]
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    optimizer.step()
    return {"loss": loss, **gradients}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernels", ["eager", "torch", pytest.param("triton", marks=pytest.mark.interpreted)])
def test_a_step_under_fake_tensors_is_the_real_one_without_the_numbers(kernels, dtype):
    ops, results = resolve(kernels, torch.device("cpu")), []
    for mode in (nullcontext(), FakeTensorMode(allow_non_fake_inputs=True)):
        with mode, count_launches() as launched:
            model = build(replace(SMALL, dropout=0.1), ops)
            optimizer = torch.optim.AdamW(model.parameters(), fused=True)
            results.append(_step(model, optimizer, tokens(2, 9), tokens(2, 9, seed=5), dtype))
    assert not launched
    real, fake = results
    for name, tensor in real.items():
        told = fake[name]
        assert isinstance(told, FakeTensor), name
        assert (told.shape, told.stride(), told.dtype) == (tensor.shape, tensor.stride(), tensor.dtype), name


def test_gpt2_trains_under_fake_tensors_at_its_real_size():
    """124 million parameters and 16 x 1024 tokens, no memory: 38 norms, 12 attentions and a loss with their fakes."""
    config = preset("gpt2").model_config(50304)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = GPT(config, resolve("triton", torch.device("cuda")))  # no kernel runs
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        idx = torch.empty(16, 1024, dtype=torch.int64)
        results = _step(model, optimizer, idx, torch.empty_like(idx), torch.bfloat16)
    assert results.pop("loss").shape == ()
    for name, parameter in model.named_parameters():
        gradient = results[name]
        assert (gradient.shape, gradient.dtype) == (parameter.shape, torch.float32), name
    assert sum(gradient.numel() for gradient in results.values()) == model.parameter_count()
