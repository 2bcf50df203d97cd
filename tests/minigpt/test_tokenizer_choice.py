"""Which tokenizer a name means, and every form in which GPT-2's is found, held to the package's own reading of it."""

import json

import pytest
import tokenizers as package

from minigpt import bpe, storage, tokenizer_choice
from minigpt.errors import UserError
from minigpt.tokenizer_choice import choose, contradicts, read
from minigpt.tokenizers import CharTokenizer

TEXT = "It's the mill that we've built; they'll grind it, won't they? naïve 日本語 \U0001f600 ###\n" * 4
EOT = "<|endoftext|>"


@pytest.fixture(scope="module")
def made():
    """A small tokenizer as GPT-2's is made: the bytes, the merges, and at the end its only special token."""
    learnt = bpe.train([TEXT], 320)
    return bpe.BPETokenizer((*learnt.tokens[3:], EOT), learnt.merges)


def gpt2_files(folder, made, names=("vocab.json", "merges.txt")):
    folder.mkdir(parents=True)
    (folder / names[0]).write_text(json.dumps({token: number for number, token in enumerate(made.tokens)}))
    (folder / names[1]).write_text("#version: 0.2\n" + "\n".join(made.merges) + "\n", encoding="utf-8")
    return folder


def package_file(folder, made):
    """What the package writes, as the Hugging Face libraries store GPT-2's."""
    folder.mkdir(parents=True)
    gpt2_files(folder / "two", made)
    coder = package.Tokenizer(
        package.models.BPE.from_file(str(folder / "two/vocab.json"), str(folder / "two/merges.txt"))
    )
    coder.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    coder.post_processor = package.processors.ByteLevel(trim_offsets=False)
    coder.decoder = package.decoders.ByteLevel()
    coder.add_special_tokens([EOT])
    coder.save(str(folder / "tokenizer.json"))
    return coder


def change(path, **changes):
    data = json.loads(path.read_text())
    for name, value in changes.items():
        part, _, key = name.rpartition("__")
        (data[part] if part else data)[key] = value
    path.write_text(json.dumps(data))


def test_every_form_of_the_files_is_read(made, tmp_path):
    coder = package_file(tmp_path / "package", made)
    gpt2_files(tmp_path / "hub", made)
    gpt2_files(tmp_path / "openai", made, ("encoder.json", "vocab.bpe"))
    (tmp_path / "ours").mkdir()
    storage.write_json(tmp_path / "ours" / "tokenizer.json", made.to_json())
    forms = ["package", "hub", "openai", "ours", "package/tokenizer.json", "ours/tokenizer.json"]
    for form in forms:
        found = read(str(tmp_path / form))
        assert found == made and found.eos == len(made.tokens) - 1 and found.special_ids == (found.eos,)
        for text in (TEXT, "other text\n\n  and 12 more", ""):
            assert found.encode(text).tolist() == coder.encode(text, add_special_tokens=False).ids
            assert found.decode(found.encode(text)) == text
    assert EOT in made.tokens and read(str(tmp_path / "hub")).token_text(made.eos) == EOT
    assert made.decode(made.encode(EOT)) == EOT and made.eos not in made.encode(EOT)  # in a text it is text


def test_a_merge_that_begins_like_a_comment_is_a_merge(made, tmp_path):
    assert "# #" in made.merges and read(str(gpt2_files(tmp_path / "g", made))).merges == made.merges


def test_char_is_read_from_a_checkpoint_or_a_prepared_text_too(tmp_path):
    storage.write_json(tmp_path / "tokenizer.json", CharTokenizer.from_text("abc").to_json())
    assert read(str(tmp_path)) == CharTokenizer.from_text("abc")


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """Empty caches."""
    for name in ("MINIGPT_CACHE", "HF_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    return tmp_path


@pytest.mark.parametrize("owner", ["gpt2", "openai-community--gpt2"])
def test_gpt2_is_found_where_it_usually_is(made, nowhere, monkeypatch, owner):
    monkeypatch.setattr(tokenizer_choice, "_GPT2_SIZE", made.vocab_size)
    hub = nowhere / "HF_HOME" / "hub"
    (hub / f"models--{owner}" / "snapshots" / "0000").mkdir(parents=True)  # a download without these files
    with pytest.raises(UserError, match="not on this machine"):
        read("gpt2")
    gpt2_files(hub / f"models--{owner}" / "snapshots" / "1111", made)
    assert read("gpt2") == made
    hub.rename(nowhere / "elsewhere")
    monkeypatch.setenv("HF_HUB_CACHE", str(nowhere / "elsewhere"))
    assert read("gpt2") == made
    gpt2_files(nowhere / "MINIGPT_CACHE" / "gpt2", bpe.BPETokenizer((*bpe.ALPHABET, EOT), ()))
    with pytest.raises(UserError, match=f"gpt2 has 257 tokens and not the {made.vocab_size}"):  # it comes first
        read("gpt2")


def test_gpt2_that_is_nowhere_says_where_to_put_it(nowhere):
    with pytest.raises(UserError, match=r"vocab.json and merges.txt into .*MINIGPT_CACHE/gpt2,.*--tokenizer FOLDER"):
        read("gpt2")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__type": "WordPiece"}, "not byte-level BPE"),
        ({"pre_tokenizer": None}, "not byte-level BPE"),
        ({"pre_tokenizer__add_prefix_space": True}, "add_prefix_space"),
        ({"pre_tokenizer__use_regex": False}, "use_regex"),
        ({"normalizer": {"type": "NFC"}}, "normalizer"),
        ({"model__ignore_merges": True}, "ignore_merges"),
        ({"model__vocab": {"a": 0, "b": 2}}, "without a gap"),
        ({"model__merges": ["zz top"]}, "the merge 'zz top'"),
        ({"added_tokens": [{"content": "the", "id": 300}]}, "gap|adds the tokens 'the'"),
        ({"added_tokens": [{"content": "a"}]}, "'id' is missing"),
        ({"model": 7}, "tokenizer.json is no tokenizer"),
    ],
)
def test_a_tokenizer_that_would_make_other_tokens_is_refused(made, tmp_path, changes, said):
    package_file(tmp_path / "package", made)
    change(tmp_path / "package" / "tokenizer.json", **changes)
    with pytest.raises(UserError, match=said) as raised:
        read(str(tmp_path / "package"))
    assert "name another one" in str(raised.value) and "\n" not in str(raised.value)


def test_an_ordinary_token_that_is_added_is_refused(made, tmp_path):
    package_file(tmp_path / "package", made)
    path = tmp_path / "package" / "tokenizer.json"
    number = json.loads(path.read_text())["model"]["vocab"]["a"]
    change(path, added_tokens=[{"content": EOT, "id": made.eos}, {"content": "a", "id": number}])
    with pytest.raises(UserError, match="adds the tokens 'a', which text may have"):
        read(str(path))


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff\xfe", b'{"kind": "other"}', b'{"kind": "bpe"}'])
def test_a_file_that_is_no_tokenizer_is_told(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match="tokenizer"):
        read(str(tmp_path))


def test_a_path_that_is_not_there_is_told(tmp_path):
    for path in (tmp_path, tmp_path / "no"):
        with pytest.raises(UserError, match=r"no tokenizer.*char, bpe, gpt2, or a folder"):
            read(str(path))


def chosen(name, size=0, text=TEXT):
    said = []
    found = choose(name, size, alphabet="".join(set(text)), texts=lambda: [text], announce=said.append)
    return found, said


def test_char_and_bpe_are_made_from_the_text(made, tmp_path):
    assert chosen(None) == chosen("char") == (CharTokenizer.from_text(TEXT), [])
    assert chosen("bpe", 300) == (bpe.train([TEXT], 300), [])
    assert chosen(str(gpt2_files(tmp_path / "g", made)), text="\U0001f9d1") == (made, [])


def test_a_text_that_is_too_short_for_a_size_is_told():
    found, said = chosen("bpe", 5000, "ab ab ab")
    assert found.vocab_size == 261 and len(said) == 1
    assert "too short for a BPE vocabulary of 5,000" in said[0] and "261 tokens" in said[0]


def test_characters_that_a_stored_tokenizer_does_not_know_are_named(tmp_path):
    storage.write_json(tmp_path / "tokenizer.json", CharTokenizer.from_text("abc").to_json())
    assert chosen(str(tmp_path), text="abba")[0] == CharTokenizer.from_text("abc")
    with pytest.raises(UserError, match=r"does not know.*'d'"):
        chosen(str(tmp_path), text="abd")


def test_what_contradicts_a_stored_tokenizer(made, tmp_path):
    plain, learnt = CharTokenizer.from_text("abc"), bpe.train([TEXT], 300)
    path = str(gpt2_files(tmp_path / "g", made))
    for stored in (plain, learnt, made):
        assert not contradicts(None, 0, stored) and not contradicts(None, 7, stored)
    assert not contradicts("char", 50, plain) and contradicts("bpe", 0, plain) and contradicts(path, 0, plain)
    assert contradicts("char", 0, learnt) and not contradicts("bpe", 0, learnt) and contradicts(path, 0, learnt)
    assert contradicts("char", 0, made) and contradicts("bpe", 0, made) and not contradicts(path, 0, made)
    # fewer than were asked for is what a short text gives; more is another size
    assert not contradicts("bpe", 400, learnt) and contradicts("bpe", 299, learnt)
