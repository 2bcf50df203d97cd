"""Shares of a batch on several threads give the loss and the gradients of the whole batch."""

import pytest
import torch

from minigpt.backends import resolve
from minigpt.config import ModelConfig
from minigpt.model import GPT
from minigpt.shares import Shares, shares_for, threads

CONFIG = ModelConfig(vocab_size=13, block_size=9, n_layer=2, n_head=3, n_embd=12, bias=True)


def model_and_batch(rows):
    torch.manual_seed(0)
    model = GPT(CONFIG, resolve("torch", torch.device("cpu")))
    return model, torch.randint(13, (rows, 9)), torch.randint(13, (rows, 9))


@pytest.mark.parametrize(("rows", "count"), [(12, 2), (5, 2), (2, 2), (7, 3)])
def test_loss_and_gradients_are_those_of_the_whole_batch(rows, count):
    model, inputs, targets = model_and_batch(rows)
    _, loss = model.double()(inputs, targets)
    (3 * loss).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    shares = Shares(lambda x, y: model(x, y)[1], list(model.parameters()), count)
    with threads(1):
        for repeat in (1, 2):  # the second time, the gradients add to the first's
            assert shares.backward(inputs, targets, 3.0).item() == pytest.approx(loss.item(), rel=1e-12)
            for name, p in model.named_parameters():
                torch.testing.assert_close(p.grad, repeat * expected[name], rtol=1e-9, atol=1e-12)


def test_the_same_batch_gives_the_same_bits():
    model, inputs, targets = model_and_batch(12)
    shares = Shares(lambda x, y: model(x, y)[1], list(model.parameters()), 3)
    seen = []
    with threads(1):
        for _ in range(10):
            model.zero_grad()
            loss = shares.backward(inputs, targets, 1.0)
            seen.append([loss, *(p.grad.clone() for p in model.parameters())])
    assert all(torch.equal(a, b) for other in seen for a, b in zip(seen[0], other, strict=True))


def test_an_error_in_a_share_comes_through():
    model, inputs, targets = model_and_batch(4)
    shares = Shares(lambda x, y: model(x, y)[1], list(model.parameters()), 2)
    with pytest.raises(IndexError), threads(1):
        shares.backward(inputs + 100, targets, 1.0)


def test_a_batch_is_shared_only_where_it_is_worth_it():
    assert shares_for(12, 64, 2) == 2 and shares_for(12, 64, 3) == 3
    assert shares_for(12, 64, 1) == 1  # one core
    assert shares_for(12, 64, 4) == 1 and shares_for(2, 64, 2) == 1  # too little for each
    assert shares_for(1, 4096, 2) == 1  # nothing to split
    assert shares_for(64, 1024, 32) == 1  # too many threads for one Python


def test_threads_are_as_before_afterwards():
    before = torch.get_num_threads()
    with pytest.raises(ValueError), threads(1):
        assert torch.get_num_threads() == 1
        raise ValueError
    assert torch.get_num_threads() == before
