"""Beam search against every sequence there is, and against greedy."""

import itertools
import math

import pytest
import torch

from minigpt.backends import resolve
from minigpt.beam import beam_search
from minigpt.config import ModelConfig
from minigpt.errors import UserError
from minigpt.generation import generate
from minigpt.model import GPT
from minigpt.tokenizers import CharTokenizer

OPS = resolve("torch", torch.device("cpu"))


def build(vocab_size: int, block_size: int = 12, seed: int = 0) -> GPT:
    """A model that is as sure as a trained one: its logits spread over several units."""
    torch.manual_seed(seed)
    model = GPT(ModelConfig(vocab_size, block_size, n_layer=1, n_head=2, n_embd=16, tied_head=False), OPS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return model.eval()


@torch.no_grad()
def log_probabilities(model: GPT, prompt: list[int], ids: tuple[int, ...]) -> list[float]:
    """Of each of `ids` after the prompt, in one pass over the whole."""
    table = model(torch.tensor([[*prompt, *ids]]))[0][0].double().log_softmax(-1)
    return [table[len(prompt) - 1 + place, token].item() for place, token in enumerate(ids)]


def brute_force(model, prompt, steps, penalty, ended) -> list[tuple[float, tuple[int, ...]]]:
    """(score, ids) of every complete continuation, the best first."""
    found = []
    vocabulary = range(model.config.vocab_size)
    for length in range(1, steps + 1):
        for ids in itertools.product(vocabulary, repeat=length):
            earlier = any(ended(ids[:end]) for end in range(1, length))
            if not earlier and (length == steps or ended(ids)):
                total = sum(log_probabilities(model, prompt, ids))
                found.append((total / ((5 + length) / 6) ** penalty, ids))
    return sorted(found, reverse=True)


def ends_at(stop):
    return lambda ids: stop is not None and ids[-1] == stop


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize(("penalty", "stop"), [(0.0, None), (0.0, 2), (1.0, 2), (3.0, 2)])
def test_as_many_beams_as_tokens_rank_every_pair_as_brute_force_does(penalty, stop, cache):
    """Two steps of 4 beams look at all there is in a vocabulary of 4."""
    for seed in range(4):
        model, prompt, ended = build(4, seed=seed), [1, 3], ends_at(stop)
        truth = brute_force(model, prompt, 2, penalty, ended)
        found = beam_search(model, prompt, width=4, max_new_tokens=2, length_penalty=penalty, ended=ended, cache=cache)
        assert [hypothesis.ids for hypothesis in found] == [ids for _, ids in truth[:4]]
        for hypothesis, (score, ids) in zip(found, truth, strict=False):
            assert hypothesis.score == pytest.approx(score, abs=1e-5)
            assert hypothesis.logprobs == pytest.approx(log_probabilities(model, prompt, ids), abs=1e-5)


@pytest.mark.parametrize(("penalty", "stop"), [(0.0, None), (0.0, 2), (1.0, 2), (3.0, 2)])
def test_four_beams_find_the_best_of_four_steps(penalty, stop):
    """... though they look at a part only of the 256: with these models the best is in it."""
    lengths = set()
    for seed in range(3):
        model, prompt, ended = build(4, seed=seed), [1, 3], ends_at(stop)
        truth = brute_force(model, prompt, 4, penalty, ended)
        found = beam_search(model, prompt, width=4, max_new_tokens=4, length_penalty=penalty, ended=ended)
        scores = {ids: score for score, ids in truth}
        assert found[0].ids == truth[0][1]
        assert all(h.score == pytest.approx(scores[h.ids], abs=1e-5) for h in found)
        lengths |= {len(h.ids) for h in found}
    assert (len(lengths) > 1) == (stop is not None), "some end at the stop"


def test_never_less_likely_than_greedy():
    """100 random prompts, past the block; and with one beam it is greedy."""
    model, better = build(30, block_size=8), 0
    generator = torch.Generator().manual_seed(1)
    for number in range(100):
        prompt = torch.randint(30, (1 + number % 8,), generator=generator).tolist()
        greedy = tuple(generate(model, prompt, max_new_tokens=10, temperature=0))
        (one,) = beam_search(model, prompt, width=1, max_new_tokens=10)
        assert one.ids == greedy
        best = beam_search(model, prompt, width=2 + number % 3, max_new_tokens=10)[0]
        assert best.score >= one.score - 1e-5  # batches of other sizes round otherwise
        assert best.score == pytest.approx(sum(best.logprobs))
        better += best.score > one.score + 1e-3
    assert better > 20, "the search finds more than greedy does"


def test_the_best_come_first_and_each_once():
    found = beam_search(build(30), [1], width=6, max_new_tokens=5)
    assert len(found) == len({hypothesis.ids for hypothesis in found}) == 6
    assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)
    assert {len(h.ids) for h in found} == {5}


def test_a_length_penalty_prefers_longer_ones():
    def lengths(penalty):
        options = {"width": 5, "max_new_tokens": 9, "length_penalty": penalty, "ended": lambda ids: ids[-1] < 2}
        return [len(beam_search(build(6, seed=seed), [1], **options)[0].ids) for seed in range(5)]

    short, long = lengths(0.0), lengths(4.0)
    assert all(a <= b for a, b in zip(short, long, strict=True)) and sum(short) < sum(long)


def test_what_no_text_has_is_never_found():
    alphabet = CharTokenizer.from_text("abc")
    model = build(alphabet.vocab_size + 4)
    found = beam_search(model, [3], width=3, max_new_tokens=4, tokenizer=alphabet)
    assert {token for h in found for token in h.ids} <= {3, 4, 5}
    with pytest.raises(UserError, match="between 1 and the 3 tokens"):
        beam_search(model, [3], width=4, max_new_tokens=4, tokenizer=alphabet)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"width": 0}, "beam width is 0.*between 1 and the 6"),
        ({"width": 7}, "beam width is 7"),
        ({"length_penalty": -1.0}, "length_penalty is -1"),
        ({"length_penalty": math.nan}, "length_penalty"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"ids": []}, "nothing to continue"),
    ],
)
def test_values_that_make_no_sense(options, named):
    options = {"ids": [1], "width": 2, "max_new_tokens": 3} | options
    with pytest.raises(UserError, match=named):
        beam_search(build(6), options.pop("ids"), **options)


def test_nothing_asked_for_and_a_model_that_has_diverged():
    model = build(6)
    (nothing,) = beam_search(model, [1], width=2, max_new_tokens=0)
    assert nothing.ids == () and nothing.score == 0
    with torch.no_grad():
        model.head.weight.fill_(math.nan)
    with pytest.raises(UserError, match="diverged"):
        beam_search(model, [1], width=2, max_new_tokens=2)
