"""Byte-level BPE, against a plain one in Python; nothing is lost, whatever the text and however it is cut."""

import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import plain_bpe
import pytest

from minigpt import bpe, tokenizers
from minigpt.errors import UserError
from minigpt.tokenizers import SPECIAL, CharTokenizer, tokens_before

ROOT = Path(__file__).resolve().parents[2]
LEARN = (
    "It's the mill that we've built; they'll grind 1234 bushels, won't they?\n\n  The  miller's daughter isn't there.\n"
    "naïve façade, naïve façade. 日本語の文、日本語の本。 \U0001f600\U0001f600\U0001f601 <eos> <eos>\tend\t\tend  \n"
) * 3
AWKWARD = [
    "",
    " ",
    "a",
    "\n\n\n",
    "   three spaces   and   more   ",
    "a\n\nb\n \n c\r\nd\r\r\n\te",
    "\0\x1c!\x1c \x85 \x7f\ufeff",
    "it's 'sharp' don't''s 'S 're've",
    "12 34th 5a6 ½ ² Ⅻ 三",
    "naïve Ελλάδα 日本語\u3000テスト 한국어",
    "\U0001f600\U0001f9d1\u200d\U0001f680 and \U0010ffff",
    "e\u0301 is not \u00e9; \u2028 \u00a0x \u00a0",
    "\ufffd shown as itself",
    "<pad><unk><eos> <|endoftext|>",
    LEARN,
]


@pytest.fixture(scope="module")
def learnt():
    return bpe.train([LEARN], 330)


@pytest.fixture(scope="module")
def bytes_only():
    """Nothing learnt: each token is a byte, so that every character beyond ASCII is split."""
    return bpe.train([LEARN], bpe.SMALLEST_SIZE)


def as_bytes(tokenizer, token):
    return bytes(bpe.ALPHABET.index(sign) for sign in tokenizer.tokens[token])


def random_texts(count):
    draw = random.Random(1)
    signs = "abcst'" * 3 + "  \n\t\r" * 4 + "\u3000\xa0\x85\x1c.,!-1²½é日本\U0001f600\u0301"
    return ["".join(draw.choices(signs, k=draw.randrange(200))) for _ in range(count)]


def test_merges_are_the_plain_ones():
    alphabet = [bytes([bpe.ALPHABET.index(sign)]) for sign in sorted(bpe.ALPHABET)]
    for text, size in ((LEARN, 330), ("aaaa aaaa aaa ab ab", 262), ("no pair", 300)):
        made = bpe.train([text], size)
        merges = plain_bpe.learn(text, alphabet, size - bpe.SMALLEST_SIZE)
        wanted = [left + right for left, right in merges]
        assert [as_bytes(made, token) for token in range(bpe.SMALLEST_SIZE, made.vocab_size)] == wanted
        assert made.tokens[:3] == SPECIAL and made.eos == 2 and made.special_ids == (0, 1, 2)
        assert sorted(as_bytes(made, token) for token in range(3, 259)) == [bytes([byte]) for byte in range(256)]


@pytest.mark.parametrize("text", AWKWARD)
def test_nothing_is_lost_and_the_ids_are_the_plain_ones(learnt, bytes_only, text):
    for tokenizer in (learnt, bytes_only):
        ids = tokenizer.encode(text)
        merges = [tuple(bytes(map(bpe.ALPHABET.index, part)) for part in m.split(" ")) for m in tokenizer.merges]
        assert [as_bytes(tokenizer, token) for token in ids] == plain_bpe.encode(text, merges)
        assert ids.dtype == np.int64 and tokenizer.decode(ids) == text and tokenizer.unknown(text) == []
        assert tokenizer.characters_per_token[ids].sum() == len(text)
        assert not set(ids.tolist()) & set(tokenizer.special_ids)  # the names of special tokens are ordinary text
    assert len(bytes_only.encode(text)) == len(text.encode())


@pytest.mark.parametrize("piece", [1, 2, 7, 40])
def test_a_text_that_is_cut_has_the_tokens_of_the_whole(learnt, monkeypatch, piece):
    texts = [*AWKWARD, *random_texts(300)]
    whole = [learnt._coder.encode(text, add_special_tokens=False).ids for text in texts]
    monkeypatch.setattr(bpe, "_PIECE", piece)
    monkeypatch.setattr(bpe, "_PIECES_AT_ONCE", 3)
    assert len(list(bpe._pieces(LEARN))) > len(LEARN) / (piece + 30)  # it is cut
    for text, ids in zip(texts, whole, strict=True):
        assert learnt.encode(text).tolist() == ids, text
    assert bpe.train([LEARN], 330) == learnt


def test_a_text_makes_the_same_tokenizer_with_any_number_of_threads():
    """The package starts its threads once in a process, so each number has a process of its own."""
    code = """
import hashlib, json, os, random
from minigpt import bpe
draw = random.Random(0)
words = ["".join(draw.choices("etaoinshrdlu", k=draw.randrange(1, 9))) for _ in range(3000)]
texts = [" ".join(draw.choices(words, k=400)) + chr(10) for _ in range(200)]
for number, threads in enumerate(("1", "2", "7")):
    if os.fork() == 0:
        os.environ["RAYON_NUM_THREADS"] = threads
        made = bpe.train(texts if number < 2 else reversed(texts), 900)
        print(hashlib.sha256(json.dumps(made.to_json()).encode()).hexdigest(), made.vocab_size, flush=True)
        os._exit(0)
    os.wait()
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    said = done.stdout.splitlines()
    assert len(said) == 3 and len(set(said)) == 1 and said[0].endswith(" 900")


def test_another_text_or_size_makes_another(learnt):
    assert bpe.train([LEARN], 331) != learnt != bpe.train([LEARN + "xyxyxyxyxyxy"], 330)
    assert bpe.train([LEARN]).vocab_size < bpe.DEFAULT_SIZE and bpe.train(["ab " * 9]).vocab_size == 261


@pytest.mark.parametrize("text", AWKWARD)
def test_a_stream_shows_a_character_once_it_is_whole(learnt, bytes_only, text):
    for tokenizer in (learnt, bytes_only, CharTokenizer.from_text(text)):
        stream, shown = tokenizer.stream(), ""
        for number, token in enumerate(tokenizer.encode(text).tolist(), 1):
            shown += stream.feed(token)
            whole = text.encode()[: len(b"".join(tokenizer_bytes(tokenizer, text, number)))]
            assert shown == whole.decode(errors="ignore")
        assert shown == text and stream.flush() == ""


def tokenizer_bytes(tokenizer, text, number):
    """The bytes of the first `number` tokens of a text."""
    if isinstance(tokenizer, CharTokenizer):
        return [text[:number].encode()]
    return [as_bytes(tokenizer, token) for token in tokenizer.encode(text)[:number]]


def test_a_stream_of_any_ids_gives_what_decode_gives(learnt, bytes_only):
    draw = random.Random(3)
    for tokenizer in (learnt, bytes_only, CharTokenizer.from_text("abé")):
        for _ in range(200):
            ids = [draw.randrange(-2, tokenizer.vocab_size + 3) for _ in range(draw.randrange(30))]
            stream = tokenizer.stream()
            assert "".join(map(stream.feed, ids)) + stream.flush() == tokenizer.decode(ids)


def test_half_a_character_at_the_end_is_told_once_and_a_stream_goes_on_after_it(bytes_only):
    first, *rest = bytes_only.encode("\U0001f600").tolist()
    stream = bytes_only.stream()
    assert [stream.feed(first), stream.feed(rest[0]), stream.flush(), stream.flush()] == ["", "", "\ufffd", ""]
    assert "".join(map(stream.feed, [first, *rest])) == "\U0001f600"


def test_decode_of_special_ids_and_of_those_beyond_the_vocabulary(learnt):
    a = int(learnt.encode("a")[0])
    assert learnt.decode([0, a, 2, 1, a, learnt.vocab_size, -1, 2**40]) == "a\ufffda\ufffd\ufffd\ufffd"
    assert (
        learnt.decode(iter([a, a])) == learnt.decode(np.array([[a, a]], np.uint16)) == "aa" and learnt.decode([]) == ""
    )
    with pytest.raises(TypeError, match="integers"):
        learnt.decode([1.0])


def test_a_token_to_look_at(learnt):
    ids = learnt.encode(" the \U0001f9d1")
    assert learnt.token_text(ids[0]) == " the" and learnt.token_text(2) == "<eos>"
    assert "".join(map(learnt.token_text, ids[1:])).endswith("\\xf0\\x9f\\xa7\\x91")
    assert learnt.token_text(10**6) == "\ufffd"
    plain = CharTokenizer.from_text("ab")
    assert [plain.token_text(token) for token in (0, 1, 2, 3, 4, 5)] == [*SPECIAL, "a", "b", "\ufffd"]


def test_half_a_character_in_a_text_is_told_and_becomes_a_replacement(learnt):
    assert learnt.unknown("a\udc80b\udc80\ud800") == ["\udc80", "\ud800"]
    assert learnt.decode(learnt.encode("a\udc80b")) == "a\ufffdb"


@pytest.mark.parametrize("text", [LEARN, "日本語\U0001f600é" * 5, "plain"])
def test_a_text_is_cut_after_so_many_characters_or_at_the_next_token(learnt, bytes_only, text):
    for tokenizer in (learnt, bytes_only, CharTokenizer.from_text(text)):
        ids = tokenizer.encode(text)
        for characters in range(len(text) + 2):
            cut = tokens_before(tokenizer, ids, characters)
            before = tokenizer.decode(ids[:cut])
            if tokenizer is learnt:  # a token may have the end of one character and the beginning of the next
                assert text.startswith(before.removesuffix("\ufffd")) and len(before) >= min(characters, len(text))
                assert len(before) < characters + max(tokenizer.characters_per_token)
            else:
                assert before == text[:characters]
    plain = CharTokenizer.from_text("ab")
    assert tokens_before(plain, np.array([3, 2, 4, 2, 3]), 3) == 3  # <eos> is one


def test_json_keeps_the_tokenizer(learnt):
    data = json.loads(json.dumps(learnt.to_json()))
    again = tokenizers.load(data)
    assert again == learnt and again.encode(LEARN).tolist() == learnt.encode(LEARN).tolist()
    assert pickle.loads(pickle.dumps(learnt)) == learnt and learnt != CharTokenizer.from_text("a")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokens": None}, "damaged"),
        ({"merges": [1]}, "damaged"),
        ({"tokens": ["a", "a"]}, "twice"),
        ({"tokens": ["<eos>", "a"], "merges": []}, "255 of the 256 bytes"),
        ({"merges": ["t"]}, "the merge 't'"),
        ({"merges": ["t zz"]}, "the merge 't zz'"),
        ({"tokens": [*SPECIAL[:2], *bpe.ALPHABET], "merges": []}, "no token ends a text"),
        ({"tokens": ["<eos>", *bpe.ALPHABET, "日日"], "merges": ["日 日"]}, "the merge '日 日'"),
    ],
)
def test_a_damaged_description_is_a_user_error(learnt, change, said):
    with pytest.raises(UserError, match=f"tokenizer is damaged.*{said}|{said}"):
        tokenizers.load(learnt.to_json() | change)


def test_too_small_a_size_is_refused():
    for size in (1, 258):
        with pytest.raises(UserError, match=f"vocab_size is {size}.*at least 259.*--vocab-size"):
            bpe.train([LEARN], size)


def test_without_the_package_only_learning_and_encoding_fail(learnt, monkeypatch):
    ids = learnt.encode("the mill")
    again = tokenizers.load(learnt.to_json())
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert again.decode(ids) == "the mill"
    for call in (lambda: again.encode("a"), lambda: bpe.train(["a"])):
        with pytest.raises(UserError, match="pip install tokenizers"):
            call()


def test_our_own_module_in_the_way_of_the_package_is_told(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "tokenizers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(ROOT / "minigpt")
    with pytest.raises(UserError, match=r"tokenizers.py hides it, start from another folder"):
        bpe.train(["a"])
