"""Variants of the model do what they say, and what looks inside measures what it says."""

import math
import types
from dataclasses import replace

import numpy as np
import pytest
import torch

from minigpt import backends, generators
from minigpt.experiments import variants
from minigpt.experiments.catalogue import backends_here
from minigpt.experiments.diversity import diversity
from minigpt.experiments.runs import Place, Run
from minigpt.experiments.step_cost import kept_bytes, step_cost
from minigpt.experiments.training import finite, train
from minigpt.model import GPT

TINY = Run(n_layer=2, n_head=2, n_embd=16, block_size=8, batch_size=2, steps=4, eval_tokens=16, evaluations=2)
OPS = backends.resolve("eager", torch.device("cpu"))


@pytest.fixture
def place(text):
    return Place(str(text), "cpu")


def model(run=TINY, variant="plain", vocab_size=20):
    generators.seed(run.seed)
    return GPT(run.config().model_config(vocab_size), variants.VARIANTS[variant](OPS))


@pytest.mark.parametrize(("variant", "depends"), [("plain", True), ("no residuals", False), ("no scaling", True)])
def test_a_block_sees_its_stream_only_with_residuals(variant, depends):
    block = model(variant=variant).blocks[1]
    branch, one, other = torch.randn(3, 2, 8, 16)
    outputs = [block(stream, branch) for stream in (one, other)]
    same = [torch.equal(a, b) for a, b in zip(*outputs, strict=True)]
    assert same == [not depends, not depends]
    assert not torch.equal(block(one, branch)[1], block(one, branch + 1.5 * torch.randn_like(branch))[1])


def test_without_residuals_the_first_block_still_reads_its_input():
    changed = model(variant="no residuals")
    logits = [changed(torch.tensor([[1, 2, third]]))[0][0, -1] for third in (3, 4)]
    assert not torch.allclose(*logits)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_without_the_division_scores_are_wider_by_the_root_of_d(heads):
    run, idx = replace(TINY, n_head=heads), torch.randint(0, 20, (4, 8))
    found = [variants.attention_statistics(model(run), OPS, change, idx) for change in map(variants.VARIANTS.get,
             ("plain", "no scaling"))]  # fmt: skip
    ratio = found[1]["score_std"][0] / found[0]["score_std"][0]  # later layers see what the first one made
    assert ratio == pytest.approx(math.sqrt(16 / heads), rel=1e-4)
    assert found[1]["entropy"][0] < found[0]["entropy"][0] <= 1.0
    assert len(found[0]["entropy"]) == 2


def test_without_the_division_the_softmax_gets_the_plain_products():
    qkv = torch.randn(2, 5, 3, 2, 4)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    got = variants.without_scaling(OPS).attention(qkv, is_causal=True).transpose(1, 2)
    scores = (query @ key.mT).masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -math.inf)
    assert torch.allclose(got, scores.softmax(-1) @ value, atol=1e-6)


def test_statistics_of_attention_that_looks_everywhere_alike():
    even = model()
    for block in even.blocks:
        torch.nn.init.zeros_(block.attention.qkv.weight)
    before = even.ops
    found = variants.attention_statistics(even, OPS, variants.VARIANTS["plain"], torch.randint(0, 20, (4, 8)))
    assert found["score_std"] == [0.0, 0.0] and found["entropy"] == pytest.approx([1.0, 1.0])
    assert even.ops is before and even.training


def test_gradient_norms_are_those_of_backward(place):
    from minigpt.experiments.training import _learner

    learner = _learner(TINY, place)
    data = learner.data(0)
    found = variants.gradient_norms(learner, data)
    assert all(p.grad is None for p in learner.parameters)  # it leaves nothing behind
    learner.loss(*data[0]).backward()
    for block, norm in zip(learner.model.blocks, found, strict=True):
        assert norm == pytest.approx(math.sqrt(sum(float(p.grad.square().sum()) for p in block.parameters())))


def test_the_same_deviation_at_every_width():
    run = replace(TINY, n_embd=64)
    wide, fixed = model(run, vocab_size=500), model(run, vocab_size=500)
    variants.same_deviation_at_every_width(fixed)
    block = fixed.blocks[1]
    assert block.mlp.up.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert block.mlp.down.weight.std().item() == pytest.approx(0.02 / math.sqrt(2 * run.n_layer), rel=0.03)
    assert wide.blocks[1].mlp.up.weight.std().item() == pytest.approx(0.02 * math.sqrt(768 / 64), rel=0.03)
    for name in ("tokens.weight", "positions", "norm.weight"):
        assert torch.equal(wide.get_parameter(name), fixed.get_parameter(name))


def test_a_run_repeats_itself(place):
    one, other = (train(replace(TINY, variant="no scaling"), place) for _ in range(2))
    assert {**one, "seconds": 0} == {**other, "seconds": 0}
    assert one["train"] != train(replace(TINY, seed=7), place)["train"]
    assert [row["step"] for row in one["validation"]] == [0, 2, 4] == [row["step"] for row in one["gradients"]]
    assert [row["step"] for row in one["attention"]] == [0, 4] and len(one["train"]) == 4


def test_bits_per_character_of_bpe_come_from_characters(place):
    run = replace(TINY, tokenizer="bpe", vocab_size=270)
    found = train(run, place)
    data = place.dataset("bpe", 270)
    assert found["characters_per_token"] == pytest.approx(len(data.tokenizer.decode(data.train)) / len(data.train))
    assert found["final"]["bits"] < found["final"]["loss"] / math.log(2)
    characters = train(TINY, place)["final"]
    assert characters["bits"] == pytest.approx(characters["loss"] / math.log(2))


def test_what_is_no_number_is_none():
    assert finite({"a": [1.0, math.nan, {"b": math.inf}], "c": "nan"}) == {"a": [1.0, None, {"b": None}], "c": "nan"}


def test_kept_bytes_are_counted_once():
    weight, x = torch.randn(4, 4, requires_grad=True), torch.randn(8, 4)

    def loss(inputs, targets):
        hidden = inputs @ weight  # keeps its input and the weight, which are there anyway
        return (hidden * hidden.view(4, 8).view(8, 4)).sum()  # keeps hidden twice, one storage

    learner = types.SimpleNamespace(parameters=[weight], data=lambda number: [(x, x)], loss=loss)
    assert kept_bytes(learner) == 8 * 4 * 4
    learner.loss = lambda inputs, targets: (inputs @ weight).exp().exp().sum()  # each keeps its output
    assert kept_bytes(learner) == 2 * 8 * 4 * 4


def test_attention_that_keeps_its_map_grows_with_the_square(place):
    run = replace(TINY, kind="cost", steps=0, batch_size=1)
    kept = {
        name: [step_cost(replace(run, kernels=name, block_size=T), place)["kept_bytes"] for T in (32, 64, 128)]
        for name in backends_here(place)
    }
    for name, (small, middle, large) in kept.items():
        # from 64 to 128 tokens twice as much is added as from 32 to 64, where nothing is square
        assert ((large - middle) > 2.2 * (middle - small)) is (name == "eager")
    assert all(values[2] < kept["eager"][2] for name, values in kept.items() if name != "eager")


def test_diversity_of_known_texts():
    same = diversity("the the the the", {"the"})
    assert same["distinct_1"] == 0.25 and same["distinct_2"] == pytest.approx(1 / 3)
    assert same["known"] == 1.0 and same["repetition"] == 0.75
    other = diversity("One two, three: four!", {"one", "two"})
    assert other["distinct_1"] == other["distinct_2"] == 1.0 and other["known"] == 0.5 and other["repetition"] == 0.0
    assert diversity("abababab", set())["entropy"] == pytest.approx(1.0)  # aba and bab, as often
    far = " ".join(["word", *(chr(97 + i) * 3 for i in range(16)), "word"])
    assert diversity(far, set())["repetition"] == 0.0  # 17 words apart
    assert all(math.isnan(value) for value in diversity("", set()).values())
    assert np.isnan(diversity("12 34", set())["distinct_1"])
