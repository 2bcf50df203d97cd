"""Evaluation: every token once, against a loop over single tokens."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minigpt.backends import resolve
from minigpt.config import ModelConfig
from minigpt.errors import UserError
from minigpt.evaluate import Evaluation, evaluate
from minigpt.model import GPT

BLOCK = 6
ONES = np.ones(11, dtype=np.int64)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = GPT(ModelConfig(11, BLOCK, 1, 2, 8, dropout=0.5), resolve("torch", torch.device("cpu")))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20)  # far from uniform, so that a token counted twice or left out shows
    return model


def token_losses(model, tokens):
    """The loss of each token after the first, one at a time, the context starting anew every BLOCK tokens."""
    losses = []
    model.eval()
    with torch.no_grad():
        for position in range(1, len(tokens)):
            start = (position - 1) // BLOCK * BLOCK
            logits, _ = model(tokens[None, start:position])
            losses.append(F.cross_entropy(logits[0, -1].double(), tokens[position]).item())
    return losses


@pytest.mark.parametrize("length", [2, 3, BLOCK, BLOCK + 1, BLOCK + 2, 5 * BLOCK + 1, 5 * BLOCK + 3, 200])
def test_every_token_counts_once(model, length):
    tokens = torch.randint(11, (length,), generator=torch.Generator().manual_seed(length))
    expected = token_losses(model, tokens)
    result = evaluate(model, tokens, ONES)
    assert result.tokens == length - 1
    assert result.loss == pytest.approx(sum(expected) / len(expected), abs=1e-5)


@pytest.mark.parametrize("split", [1, BLOCK, 2 * BLOCK, 10_000])
def test_the_result_does_not_depend_on_how_many_windows_go_at_once(model, split, monkeypatch):
    tokens = torch.randint(11, (5 * BLOCK + 3,), generator=torch.Generator().manual_seed(1))
    expected = evaluate(model, tokens, ONES).loss
    monkeypatch.setattr("minigpt.evaluate._TOKENS_AT_ONCE", {"cpu": split})
    assert evaluate(model, tokens, ONES).loss == pytest.approx(expected, rel=1e-6)


def test_max_tokens_takes_windows_from_all_over_the_text(model):
    tokens = torch.randint(11, (10 * BLOCK + 1,), generator=torch.Generator().manual_seed(2))
    losses = token_losses(model, tokens)
    windows = [losses[i : i + BLOCK] for i in range(0, len(losses), BLOCK)]
    result = evaluate(model, tokens, ONES, max_tokens=2 * BLOCK + 1)
    assert result.tokens == 2 * BLOCK
    assert result.loss == pytest.approx(sum(windows[0] + windows[9]) / (2 * BLOCK), abs=1e-5)
    assert evaluate(model, tokens, ONES, max_tokens=4).tokens == 4
    assert evaluate(model, tokens, ONES, max_tokens=10 * BLOCK) == evaluate(model, tokens, ONES)
    assert evaluate(model, tokens, ONES, max_tokens=10**9) == evaluate(model, tokens, ONES)


def test_dropout_is_off_meanwhile_and_the_mode_stays(model):
    tokens = torch.arange(11).repeat(3)
    for training in (True, False):
        model.train(training)
        first, second = evaluate(model, tokens, ONES), evaluate(model, tokens, ONES)
        assert first == second and model.training is training


def test_bf16(model):
    tokens = torch.arange(11).repeat(3)
    assert evaluate(model, tokens, ONES, dtype=torch.bfloat16).loss == pytest.approx(
        evaluate(model, tokens, ONES).loss, rel=0.05
    )


def test_a_model_that_knows_nothing_needs_log_v_nats():
    model = GPT(ModelConfig(16, 4, 1, 1, 4), resolve("torch", torch.device("cpu")))
    with torch.no_grad():
        model.head.weight.zero_()
    result = evaluate(model, torch.arange(16), np.ones(16, np.int64))
    assert result.loss == pytest.approx(math.log(16), abs=1e-6)
    assert result.bits_per_character == pytest.approx(4) and result.perplexity == pytest.approx(16, abs=1e-4)
    assert Evaluation(1e6, 1, 1).perplexity == math.inf


@pytest.mark.parametrize("max_tokens", [0, 2 * BLOCK])
def test_characters_are_those_of_the_tokens_that_are_predicted(model, max_tokens):
    tokens = torch.randint(11, (10 * BLOCK + 4,), generator=torch.Generator().manual_seed(3))
    lengths = np.arange(11)  # some ids stand for none, others for many
    predicted = tokens[1:] if not max_tokens else torch.cat([tokens[1 : BLOCK + 1], tokens[9 * BLOCK + 1 :][:BLOCK]])
    result = evaluate(model, tokens, lengths, max_tokens=max_tokens)
    assert result.tokens == len(predicted) and result.characters == int(predicted.sum())
    whole = evaluate(model, tokens, ONES, max_tokens=max_tokens)
    assert (
        whole.loss == result.loss and whole.perplexity == result.perplexity and whole.loss_per_character == whole.loss
    )
    assert result.loss_per_character == pytest.approx(result.loss * result.tokens / result.characters)
    assert result.bits_per_character == pytest.approx(result.loss_per_character / math.log(2))


def test_two_tokens_a_character_double_the_bits():
    assert Evaluation(math.log(2), 100, 50).bits_per_character == pytest.approx(2)
    assert Evaluation(math.log(2), 100, 400).bits_per_character == pytest.approx(0.25)
    assert Evaluation(1.0, 5, 0).bits_per_character == math.inf  # nothing but <eos>


def test_nothing_to_predict_is_refused(model):
    for length in (0, 1):
        with pytest.raises(UserError, match="at least 2 tokens"):
            evaluate(model, torch.zeros(length, dtype=torch.int64), ONES)
