"""The character tokenizer, against Python's own dictionaries."""

import json
import random

import numpy as np
import pytest
import torch

from minigpt.errors import UserError
from minigpt.tokenizers import EOS, PAD, UNK, CharTokenizer, load

AWKWARD = [
    "",
    "a",
    "to be, or not to be",
    "\0\t\r\n\x7f",
    "naïve Ελλάδα 日本語",
    "\U0001f600\U0010ffff and \U00010000",  # outside the Basic Multilingual Plane, up to the last code point
    "e\u0301 is not \u00e9",  # decomposed and composed: two spellings, both kept
    "\ufffd shown as itself",
    "undecodable \udc80 argument",
    "<pad><unk><eos>",  # the names of special tokens are ordinary text
]


def by_dictionary(text: str, prompt: str) -> list[int]:
    ids = {c: i for i, c in enumerate(sorted(set(text)), start=3)}
    return [ids.get(c, 1) for c in prompt]


@pytest.mark.parametrize("text", AWKWARD)
def test_round_trip_of_awkward_text(text):
    tokenizer = CharTokenizer.from_text(text)
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int64 and ids.shape == (len(text),)
    assert ids.tolist() == by_dictionary(text, text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.vocab_size == 3 + len(set(text))
    assert tokenizer.unknown(text) == []


@pytest.mark.parametrize("known", AWKWARD)
@pytest.mark.parametrize("prompt", AWKWARD)
def test_every_character_that_is_not_known_is_unk(known, prompt):
    tokenizer = CharTokenizer.from_text(known)
    assert tokenizer.encode(prompt).tolist() == by_dictionary(known, prompt)
    assert tokenizer.unknown(prompt) == list(dict.fromkeys(c for c in prompt if c not in known))
    assert tokenizer.decode(tokenizer.encode(prompt)) == "".join(c if c in known else "\ufffd" for c in prompt)


def test_a_million_random_characters_agree_with_a_dictionary():
    draw = random.Random(0)
    alphabet = [chr(c) for c in draw.sample(range(0xD000), 500)] + [chr(0x10FFFF)]
    text = "".join(draw.choices(alphabet, k=1_000_000))
    tokenizer = CharTokenizer.from_text(text)
    assert tokenizer.encode(text).tolist() == by_dictionary(text, text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_decode_drops_pad_and_eos_and_shows_what_it_does_not_know():
    tokenizer = CharTokenizer.from_text("ab")
    assert tokenizer.decode([PAD, 3, EOS, UNK, 4, 5, 99, -1, 2**40]) == "a\ufffdb\ufffd\ufffd\ufffd\ufffd"


def test_decode_takes_lists_arrays_tensors_and_iterators():
    tokenizer = CharTokenizer.from_text("abc")
    for ids in ([3, 4, 5], np.array([3, 4, 5], np.uint16), torch.tensor([[3, 4, 5]]), iter([3, 4, 5])):
        assert tokenizer.decode(ids) == "abc"
    assert tokenizer.decode([]) == tokenizer.decode(torch.empty(0, dtype=torch.int64)) == ""
    with pytest.raises(TypeError, match="integers"):
        tokenizer.decode([3.0])


@pytest.mark.parametrize("text", AWKWARD)
def test_json_keeps_the_tokenizer(text):
    tokenizer = CharTokenizer.from_text(text)
    again = load(json.loads(json.dumps(tokenizer.to_json())))
    assert again == tokenizer
    assert again.encode(text).tolist() == tokenizer.encode(text).tolist()


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {},
        {"kind": "bytes"},
        {"kind": "characters"},
        {"kind": "characters", "special": ["<pad>", "<unk>", "<eos>"], "characters": 7},
        {"kind": "characters", "special": ["<unk>", "<pad>", "<eos>"], "characters": "ab"},
        {"kind": "characters", "special": ["<pad>", "<unk>", "<eos>"], "characters": "ba"},
        {"kind": "characters", "special": ["<pad>", "<unk>", "<eos>"], "characters": "aa"},
    ],
)
def test_a_damaged_description_is_a_user_error(data):
    with pytest.raises(UserError, match="tokenizer"):
        load(data)


def test_characters_out_of_order_are_refused():
    with pytest.raises(ValueError, match="from_text"):
        CharTokenizer("ba")


class OnGpu:
    """Ids as a tensor on a GPU has them, which NumPy cannot read."""

    def __init__(self, ids):
        self._ids = torch.as_tensor(ids)

    def __len__(self):
        return len(self._ids)

    def __array__(self, *_, **__):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    def cpu(self):
        return self._ids


def test_ids_on_a_gpu_are_text_too():
    tokenizer = CharTokenizer.from_text("to be")
    assert tokenizer.decode(OnGpu(tokenizer.encode("to be"))) == "to be"


@pytest.mark.gpu
def test_ids_on_a_real_gpu_are_text_too():
    tokenizer = CharTokenizer.from_text("to be")
    assert tokenizer.decode(torch.from_numpy(tokenizer.encode("to be")).cuda()) == "to be"
