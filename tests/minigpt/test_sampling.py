"""Sampling against probabilities computed in plain Python, and the text that comes out of a model."""

import itertools
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from minigpt.errors import UserError
from minigpt.sampling import complete, encode_prompt, generate, sample, stream
from minigpt.tokenizers import EOS, PAD, UNK, CharTokenizer


def expected(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """The probability of each token, the slow way."""
    weights = [math.exp((x - max(logits)) / temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: -weights[i])[: top_k or None]
    total = sum(weights[i] for i in order)
    kept, mass = [], 0.0
    for i in order:
        if mass >= top_p:
            break
        kept.append(i)
        mass += weights[i] / total
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


LOGITS = [0.3, 2.0, -1.0, 1.2, -math.inf, 0.9, -8.0]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1, 0, 1),
        (0.5, 0, 1),
        (3, 0, 1),
        (1, 1, 1),
        (1, 3, 1),
        (1, 7, 1),
        (1, 0, 0.5),
        (1, 0, 0.9),
        (2, 4, 0.8),
        (1, 2, 1e-9),
    ],
)
def test_tokens_come_with_the_probabilities_they_should(temperature, top_k, top_p):
    draws = 20_000
    logits = torch.tensor(LOGITS).expand(draws, -1)
    ids = sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=seeded())
    assert ids.shape == (draws,) and ids.dtype == torch.int64
    found = Counter(ids.tolist())
    for token, p in enumerate(expected(LOGITS, temperature, top_k, top_p)):
        if p == 0:
            assert found[token] == 0
        else:
            # Five standard deviations of a binomial count.
            assert abs(found[token] - draws * p) <= 5 * math.sqrt(draws * p * (1 - p)) + 1e-9


def test_the_smallest_nucleus_that_reaches_top_p():
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64).log().expand(2000, -1)
    assert set(sample(logits, top_p=0.49, generator=seeded()).tolist()) == {0}
    assert set(sample(logits, top_p=0.51, generator=seeded()).tolist()) == {0, 1}
    assert set(sample(logits, top_p=0.74, generator=seeded()).tolist()) == {0, 1}


def test_top_k_keeps_exactly_k_of_equal_logits():
    assert len(set(sample(torch.zeros(2000, 10), top_k=3, generator=seeded()).tolist())) == 3


def test_temperature_zero_is_greedy_and_so_is_one_close_to_it():
    logits = torch.randn(50, 33, generator=seeded())
    best = logits.argmax(-1)
    assert torch.equal(sample(logits, temperature=0.0), best)
    for temperature in (1e-6, 1e-300, 5e-324):
        assert torch.equal(sample(logits, temperature=temperature, generator=seeded()), best)


@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 3, 5)])
def test_shapes(shape):
    logits = torch.randn(shape, generator=seeded())
    assert sample(logits, generator=seeded()).shape == shape[:-1]
    assert sample(logits, top_k=2, top_p=0.9, generator=seeded()).shape == shape[:-1]
    assert sample(logits, temperature=0).shape == shape[:-1]


def test_huge_and_half_precision_logits():
    logits = torch.tensor([-60000.0, 60000.0, 59000.0], dtype=torch.float16)
    assert sample(logits, generator=seeded()) == 1
    assert sample(torch.tensor([1e38, -1e38]), temperature=1e-30, generator=seeded()) == 0


BAD = [
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": math.nan}, "temperature"),
    ({"temperature": math.inf}, "temperature"),
    ({"top_k": -1}, "top_k"),
    ({"top_k": 8}, "top_k"),
    ({"top_p": 0.0}, "top_p"),
    ({"top_p": 1.01}, "top_p"),
    ({"top_p": -0.5}, "top_p"),
    ({"top_p": math.nan}, "top_p"),
]


@pytest.mark.parametrize(("options", "named"), BAD)
def test_values_that_make_no_sense(options, named):
    with pytest.raises(UserError, match=named):
        sample(torch.zeros(7), **options)


# Generation


class Scripted(nn.Module):
    """A model of `vocab_size` tokens that expects `next_of(ids)` after them, and remembers what it was shown."""

    def __init__(self, next_of, vocab_size: int, block_size: int = 8, sure: float = 100.0):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocab_size, block_size=block_size)
        self.next_of, self.sure, self.seen = next_of, sure, []
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, idx, targets=None, *, last_only=False):
        assert last_only and not self.training and not torch.is_grad_enabled()
        assert idx.dtype == torch.int64 and idx.shape[0] == 1 and idx.shape[1] <= self.config.block_size
        self.seen.append(idx[0].tolist())
        logits = torch.zeros(1, 1, self.config.vocab_size)
        logits[0, 0, self.next_of(self.seen[-1])] = self.sure
        return logits, None


ALPHABET = CharTokenizer.from_text("\nabcdefghijklmnopqrstuvwxyz ")


def writer(text: str, padded: int = 0, **keywords) -> Scripted:
    """A model that writes `text` again and again, whatever comes before."""
    ids = itertools.cycle(ALPHABET.encode(text).tolist())
    return Scripted(lambda _: next(ids), ALPHABET.vocab_size + padded, **keywords)


def counter(vocab_size: int = 70, **keywords) -> Scripted:
    """A model that expects the number after the last one."""
    return Scripted(lambda ids: (ids[-1] + 1) % vocab_size, vocab_size, **keywords)


def test_tokens_come_one_at_a_time_and_feed_back():
    model = counter(block_size=4)
    ids = generate(model, [1, 2, 3], max_new_tokens=5, temperature=0)
    assert next(ids) == 4 and len(model.seen) == 1
    assert list(ids) == [5, 6, 7, 8]
    # Never more than block_size, and always the latest.
    assert model.seen == [[1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5], [3, 4, 5, 6], [4, 5, 6, 7]]


def test_a_prompt_longer_than_the_block_is_cropped():
    model = counter(block_size=4)
    assert list(generate(model, torch.arange(20), max_new_tokens=1, temperature=0)) == [20]
    assert model.seen == [[16, 17, 18, 19]]


def test_nothing_asked_for_is_nothing_given():
    model = counter()
    assert list(generate(model, [1], max_new_tokens=0)) == [] and model.seen == []


def test_the_model_is_left_as_it_was():
    for training in (True, False):
        model = counter().train(training)
        list(generate(model, [1], max_new_tokens=2))
        assert model.training is training


def test_a_seed_gives_the_same_ids_and_leaves_pytorchs_generator_alone():
    model = counter(sure=1.0)
    state = torch.get_rng_state()
    runs = [list(generate(model, [1], max_new_tokens=30, seed=seed)) for seed in (7, 7, 8, None, None)]
    assert runs[0] == runs[1]
    assert len({tuple(run) for run in runs}) == 4
    assert torch.equal(torch.get_rng_state(), state)


def test_special_and_padding_tokens_are_never_drawn():
    flat = Scripted(lambda _: 0, ALPHABET.vocab_size + 60, sure=0.0)
    ids = list(
        itertools.chain.from_iterable(
            generate(flat, [3], max_new_tokens=100, seed=seed, tokenizer=ALPHABET) for seed in range(40)
        )
    )
    assert set(ids) == set(range(3, ALPHABET.vocab_size))
    for likeliest in (PAD, UNK, EOS, ALPHABET.vocab_size, ALPHABET.vocab_size + 59):
        model = Scripted(lambda _, token=likeliest: token, ALPHABET.vocab_size + 60)
        for temperature in (0, 1):
            ids = generate(model, [3], max_new_tokens=9, temperature=temperature, tokenizer=ALPHABET)
            assert all(3 <= token < ALPHABET.vocab_size for token in ids)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        *((options | {"max_new_tokens": 1}, named) for options, named in BAD if "top_k" not in options),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"max_new_tokens": 1, "seed": -1}, "seed"),
        ({"max_new_tokens": 1, "seed": 2**64}, "seed"),
        # Above the tokenizer's vocabulary, although the padded one is larger.
        ({"max_new_tokens": 1, "top_k": ALPHABET.vocab_size + 1}, f"top_k .* {ALPHABET.vocab_size} tokens"),
    ],
)
def test_values_that_make_no_sense_are_told_before_the_first_token(options, named):
    model = writer("a", padded=10)
    with pytest.raises(UserError, match=named):
        generate(model, [3], tokenizer=ALPHABET, **options)  # not even iterated over
    assert model.seen == []


def test_no_ids_to_continue():
    with pytest.raises(UserError, match="nothing to continue"):
        generate(counter(), [], max_new_tokens=1)


def test_a_tokenizer_that_does_not_fit_the_model():
    with pytest.raises(UserError, match="do not belong together"):
        generate(counter(vocab_size=10), [3], max_new_tokens=1, tokenizer=ALPHABET)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_model_that_has_diverged(bad):
    model = counter(sure=bad)
    with pytest.raises(UserError, match="diverged"):
        list(generate(model, [1], max_new_tokens=1))


# Text


def text_of(model: Scripted, **options) -> list[str]:
    return list(
        stream(model, ALPHABET, options.pop("prompt", ""), **{"max_new_tokens": 12, "temperature": 0} | options)
    )


def test_text_streams_character_by_character():
    assert text_of(writer("hello ")) == list("hello hello ")


def test_the_prompt_comes_first_and_is_what_the_model_sees():
    model = writer("xyz", block_size=100)
    assert complete(model, ALPHABET, "abc", max_new_tokens=3, temperature=0) == "abcxyz"
    assert ALPHABET.decode(model.seen[0]) == "abc"


def test_no_prompt_begins_at_a_new_line_or_at_eos():
    model = writer("x")
    assert complete(model, ALPHABET, max_new_tokens=2, temperature=0) == "xx"
    assert ALPHABET.decode(model.seen[0]) == "\n"
    assert encode_prompt(CharTokenizer.from_text("no lines"), "") == [EOS]


@pytest.mark.parametrize(
    ("script", "stop", "text"),
    [
        ("hello world ", "wor", "hello "),
        ("hello world ", "h", ""),
        ("aaab", "aab", "a"),  # the beginning of the stop text inside itself
        ("ababac", "abac", "ab"),
        ("aaaa", "aaaaa", ""),
        ("hello ", "xyz", "hello hello "),
        ("hello ", "hello hello h", "hello hello "),  # begun, and never finished
        ("hello ", "hello hello ", ""),
    ],
)
def test_stop_text(script, stop, text):
    assert "".join(text_of(writer(script), stop=stop)) == text


def test_text_is_held_back_only_while_it_may_be_the_stop_text():
    pieces = text_of(writer("abxabc"), stop="abc", max_new_tokens=6)
    assert pieces == ["abx"]  # "ab" twice waits for what follows
    assert text_of(writer("xyz"), stop="abc", max_new_tokens=3) == ["x", "y", "z"]


def test_unknown_characters_are_named():
    with pytest.raises(UserError, match=r"prompt.*'é', 'Z', '\\udc80'"):
        stream(writer("a"), ALPHABET, "aéZé\udc80", max_new_tokens=1)
    with pytest.raises(UserError, match=r"stop text.*'!'"):
        stream(writer("a"), ALPHABET, "a", max_new_tokens=1, stop="a!")
    with pytest.raises(UserError, match=r"'0'.*\.\.\."):
        encode_prompt(ALPHABET, "0123456789ABC")


def test_an_empty_stop_text():
    with pytest.raises(UserError, match="stop text is empty"):
        stream(writer("a"), ALPHABET, "a", max_new_tokens=1, stop="")
