"""The text that comes out of a model: what it was shown, what was drawn, where it ends."""

import functools
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from minigpt import generation
from minigpt.backends import resolve
from minigpt.config import ModelConfig
from minigpt.errors import UserError
from minigpt.generation import Writing, encode_prompt
from minigpt.model import GPT
from minigpt.tokenizers import EOS, PAD, UNK, CharTokenizer

# What a scripted model expects is not in keys and values.
generate, stream, complete = (
    functools.partial(function, cache=False)
    for function in (generation.generate, generation.stream, generation.complete)
)


class Scripted(nn.Module):
    """A model of `vocab_size` tokens that expects `next_of(ids)` after them, and remembers what it was shown."""

    def __init__(self, next_of, vocab_size: int, block_size: int = 8, sure: float = 100.0):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocab_size, block_size=block_size)
        self.next_of, self.sure, self.seen = next_of, sure, []
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, idx, targets=None, *, last_only=False):
        assert last_only and not self.training and not torch.is_grad_enabled()
        assert idx.dtype == torch.int64 and idx.shape[1] <= self.config.block_size
        logits = torch.zeros(len(idx), 1, self.config.vocab_size)
        for row, ids in enumerate(idx.tolist()):
            self.seen.append(ids)
            logits[row, 0, self.next_of(ids)] = self.sure
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
    # What outgrows the block goes on from its last half.
    assert model.seen == [[1, 2, 3], [1, 2, 3, 4], [4, 5], [4, 5, 6], [4, 5, 6, 7]]


@pytest.mark.parametrize(("block_size", "seen"), [(4, [18, 19]), (5, [18, 19]), (1, [19]), (20, list(range(20)))])
def test_of_a_prompt_longer_than_the_block_the_last_half_block_counts(block_size, seen):
    model = counter(block_size=block_size)
    assert list(generate(model, torch.arange(20), max_new_tokens=1, temperature=0)) == [20]
    assert model.seen == [seen] and generation.seen(model, 20) == len(seen)


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
        ({"max_new_tokens": 1, "temperature": -0.1}, "temperature"),
        ({"max_new_tokens": 1, "top_k": -1}, "top_k"),
        ({"max_new_tokens": 1, "top_p": 0.0}, "top_p"),
        ({"max_new_tokens": 1, "num_samples": 0}, "num_samples"),
        ({"max_new_tokens": 1, "cuda_graph": True}, "leave out --cuda-graph or --no-cache"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"max_new_tokens": 1, "seed": -1}, "seed"),
        ({"max_new_tokens": 1, "seed": 2**64}, "seed"),
        # Above the tokenizer's vocabulary, although the padded one is larger.
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


# Several rows, log-probabilities


def test_rows_end_each_at_its_own_stop_text():
    """The samples of a prompt side by side; what is drawn for a row that has ended is not its any more."""
    model = counter(vocab_size=ALPHABET.vocab_size, block_size=100)
    options = {"max_new_tokens": 6, "temperature": 0, "cache": False}
    writing = Writing(model, ALPHABET, ["abc", "xw", "k"], stop=["g", "no", "yz"], num_samples=2, **options)
    news = list(writing)
    assert [row.text for row in writing.rows] == ["def", "def", "x", "x", "lm", "lm"]
    assert [row.stopped for row in writing.rows] == [True] * 6
    assert [len(row.ids) for row in writing.rows] == [4, 4, 3, 3, 4, 4]
    assert len(model.seen) == 4 * 6, "all have ended after four tokens"
    assert ["".join(new) for new in zip(*news, strict=True)] == [row.text for row in writing.rows]
    never = Writing(model, ALPHABET, ["abc", "q"], stop=["zzz"], **options)
    list(never)
    assert [row.text for row in never.rows] == ["defghi", "rstuvw"] and not any(row.stopped for row in never.rows)


def test_log_probabilities_are_those_of_the_whole_text_in_float64():
    """At temperature 1 and over the whole vocabulary, whatever they were drawn with."""
    torch.manual_seed(0)
    ops = resolve("torch", torch.device("cpu"))
    config = ModelConfig(ALPHABET.vocab_size + 5, 64, n_layer=2, n_head=2, n_embd=16)
    model, exact = GPT(config, ops), GPT(config, ops).double()
    with torch.no_grad():
        for one, two in zip(model.parameters(), exact.parameters(), strict=True):
            one.mul_(6.0)
            two.copy_(one)
    writing = Writing(
        model, ALPHABET, ["to be", "\n"], max_new_tokens=30, temperature=0.7, top_k=8, seed=3, alternatives=4
    )
    list(writing)
    for prompt, row in zip(["to be", "\n"], writing.rows, strict=True):
        ids = torch.tensor([*ALPHABET.encode(prompt).tolist(), *row.ids])
        table = exact(ids[None])[0][0, len(prompt) - 1 : -1].log_softmax(-1)
        truth = table.gather(-1, ids[len(prompt) :, None])[:, 0]
        torch.testing.assert_close(torch.tensor(row.logprobs, dtype=torch.float64), truth, rtol=0, atol=1e-4)
        assert len(set(row.ids)) > 3 and row.text == ALPHABET.decode(row.ids)
        values, places = table.topk(4)
        for found, expected, where in zip(row.alternatives, values, places, strict=True):
            assert [token for token, _ in found] == where.tolist()
            assert [value for _, value in found] == pytest.approx(expected.tolist(), abs=1e-4)


def test_how_many_alternatives_there_can_be():
    for wrong in (-1, ALPHABET.vocab_size + 1):
        with pytest.raises(UserError, match=f"alternatives is {wrong}"):
            Writing(counter(), ALPHABET, ["a"], alternatives=wrong, max_new_tokens=1)
