"""What the playground does: the runs that it finds, what it writes and thinks of it, and what it refuses."""

import math
import os
import shutil
import threading
from dataclasses import replace

import pytest
import torch
from playing_runs import BYTES, CHARACTERS, TEXT, write_run

from minigpt import context, generation, playing, side_by_side
from minigpt.errors import UserError
from minigpt.model import GPT
from minigpt.models import Models
from minigpt.playing import Session, Settings, write
from minigpt.tokenizers import CharTokenizer

CPU = torch.device("cpu")
FEW = Settings(length=12, seed=3)


@pytest.fixture
def root(tmp_path):
    write_run(tmp_path / "a")
    return tmp_path


@pytest.fixture
def models(root):
    return Models(root, CPU)


def written(models, prompt="The ", settings=FEW, run="a", kernels="torch"):
    session = Session()
    for _ in write(models, session, run, kernels, prompt, settings):
        pass
    return session


def said(session):
    return " | ".join(session.text.notes)


# ---------------------------------------------------------------- runs that change


def test_a_run_that_is_removed_or_damaged_meanwhile(root, models):
    session = written(models)
    (root / "a" / "best" / "model.safetensors").write_bytes(b"half")
    text = session.text
    with pytest.raises(UserError, match=r"model\.safetensors.*damaged"):
        next(write(models, session, "a", "torch", "The ", FEW))
    shutil.rmtree(root / "a")
    write_run(root / "b")
    with pytest.raises(UserError, match="'a' is gone"):
        next(write(models, session, "a", "torch", "The ", FEW))
    for look in (playing.attention, side_by_side.side_by_side):
        with pytest.raises(UserError, match="'a' is gone"):
            look(models, session)
    assert session.text is text and len(text.tokens) == 12  # what was written stays


def test_a_damaged_checkpoint_is_told_where_there_is_another(root, models):
    shutil.copytree(root / "a" / "best", root / "a" / "last")
    (root / "a" / "best" / "config.json").unlink()
    assert "Taking" in said(written(models))


# ---------------------------------------------------------------- text


@pytest.mark.parametrize("tokenizer", [CHARACTERS, BYTES], ids=["characters", "bytes"])
def test_surprisal_and_alternatives_are_those_of_the_whole_model(tmp_path, tokenizer):
    model = write_run(tmp_path / "a", tokenizer)
    session = written(Models(tmp_path, CPU), "The caf\u00e9 ", replace(FEW, temperature=1.5, top_k=20))
    text = session.text
    ids = tokenizer.encode("The caf\u00e9 ").tolist()
    assert text.ids[: len(ids)] == ids and [token.id for token in text.tokens] == text.ids[len(ids) :]
    with torch.no_grad():
        logits = model(torch.tensor([text.ids]))[0][0]
    expected = logits.double().softmax(-1)[len(ids) - 1 : -1]
    assert len(expected) == len(text.tokens) == 12
    for probabilities, token in zip(expected, text.tokens, strict=True):
        assert token.bits == pytest.approx(-math.log2(probabilities[token.id]), abs=1e-4)
        shares, likeliest = probabilities.topk(8)
        assert [id for id, _, _ in token.alternatives] == likeliest.tolist()
        assert [share for _, _, share in token.alternatives] == pytest.approx(shares.tolist(), rel=1e-4)
        assert token.alternatives[0][1] == tokenizer.token_text(int(likeliest[0]))
    assert max(token.bits for token in text.tokens) > 1
    assert text.ended.startswith("12 tokens, ") and "bits of surprise each" in text.ended


def test_the_text_is_that_of_generate(models):
    loaded = models.get("a", "torch")
    options = {"max_new_tokens": 50, "temperature": 0.8, "top_k": 7, "top_p": 0.9, "seed": 11}
    expected = generation.complete(loaded.model, CHARACTERS, "fox", **options)
    for _ in range(2):
        text = written(models, "fox", Settings(0.8, 7, 0.9, 50, 11)).text
        assert text.prompt + "".join(token.text for token in text.tokens) == expected


def test_a_character_of_several_tokens_shows_with_the_last_one(tmp_path, monkeypatch):
    write_run(tmp_path / "a", BYTES)
    ids = iter(BYTES.encode("\u20acz").tolist())
    never = torch.full((1, BYTES.vocab_size), -20.0)

    def expecting(*_):
        logits = never.clone()
        logits[0, next(ids)] = 20.0
        return logits

    monkeypatch.setattr("minigpt.context.Cached.first", expecting)
    monkeypatch.setattr("minigpt.context.Cached.next", expecting)
    text = written(Models(tmp_path, CPU), "a", replace(FEW, length=4, temperature=0)).text
    assert [token.text for token in text.tokens] == ["", "", "\u20ac", "z"]
    assert text.tokens[0].name == "\\xe2"


@pytest.mark.parametrize(
    ("prompt", "note"),
    [
        ("", "The prompt is empty"),
        (None, "The prompt is empty"),
        ("The fox. " * 4, "has 36 tokens, the block 32: the model sees the last 16"),
    ],
)
def test_prompts_that_deserve_a_note(models, prompt, note):
    session = written(models, prompt)
    assert len(session.text.tokens) == 12 and len(session.text.notes) == 1 and note in session.text.notes[0]


def test_an_ordinary_prompt_has_no_note(models):
    assert written(models).text.notes == []


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("x" * 3_000_000, "3,000,000 characters, and this page takes 100,000"),
        ("\x00\x1b[31m", r"never seen \('\\x00'"),
        ("<img src=x onerror=alert(1)>", "never seen"),
        ("a\ud800", r"'\\ud800'"),
        ("\u202e\u2603" * 30, "never seen"),
    ],
)
def test_prompts_that_are_refused_leave_the_text_alone(models, prompt, message):
    session = written(models)
    text = session.text
    with pytest.raises(UserError, match=message) as refused:
        next(write(models, session, "a", "torch", prompt, FEW))
    assert session.text is text and len(text.tokens) == 12 and len(str(refused.value)) < 400


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": None}, "temperature is empty"),
        ({"temperature": "1"}, "temperature is empty"),
        ({"top_p": 0}, "top_p is 0: it must be above 0"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 2.5}, "top_k is 2.5: it must be a whole number"),
        ({"top_k": math.nan}, "top_k is nan"),
        ({"length": 0}, "length is 0: it must be between 1 and 1000"),
        ({"length": 1001}, "length is 1001"),
        ({"length": math.inf}, "length is inf"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, "seed"),
        ({"seed": None}, "seed is empty"),
        ({"seed": True}, "seed is empty"),
    ],
)
def test_settings_that_make_no_sense(models, options, message):
    with pytest.raises(UserError, match=message):
        written(models, settings=replace(FEW, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": 2},
        {"top_p": 0.01},
        {"top_k": 1.0},
        {"top_k": CHARACTERS.vocab_size},
        {"length": 1},
        {"seed": 0.0},
        {"seed": 9999},
    ],
)
def test_settings_at_their_ends(models, options):
    settings = replace(FEW, **options)
    text = written(models, settings=settings).text
    assert len(text.tokens) == settings.length
    if options in ({"temperature": 0.0}, {"top_p": 0.01}, {"top_k": 1.0}):
        assert all(token.id == token.alternatives[0][0] for token in text.tokens)


def test_a_text_is_stopped_before_its_next_token(models):
    session = Session()
    for _ in write(models, session, "a", "torch", "The ", replace(FEW, length=1000)):
        if len(session.text.tokens) == 5:
            session.stop()
    assert len(session.text.tokens) == 5 and session.text.ended.startswith("Stopped after 5 tokens")
    Session().stop()  # nothing to stop


def test_a_new_text_ends_the_one_before_and_closing_ends_all(models):
    session = Session()
    old = write(models, session, "a", "torch", "The ", replace(FEW, length=1000))
    next(old)
    first = session.text
    new = write(models, session, "a", "torch", "fox", replace(FEW, length=1000))
    next(new)
    assert len(list(old)) == 1 and first.ended and not session.text.ended and session.text.prompt == "fox"
    models.closing = True
    list(new)
    assert len(session.text.tokens) == 1


def test_tabs_do_not_disturb_each_other(models):
    settings = [replace(FEW, length=25, seed=seed) for seed in range(3)]
    expected = [written(models, settings=its).text.ids for its in settings]
    sessions = [Session() for _ in settings]

    def tab(session, its):
        for _ in write(models, session, "a", "torch", "The ", its):
            if len(session.text.tokens) % 4 == 0:
                playing.attention(models, session)  # swaps the model's ops while the others write

    threads = [threading.Thread(target=tab, args=pair) for pair in zip(sessions, settings, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [session.text.ids for session in sessions] == expected


# ---------------------------------------------------------------- attention and backends


def test_attention_is_a_page_of_the_last_tokens(models):
    session = written(models, TEXT[:30], replace(FEW, length=20))
    page = playing.attention(models, session)
    assert "The last 32 tokens, attention by torch" in page and page.count("<script>") == 1
    with pytest.raises(UserError, match="no text yet"):
        playing.attention(models, Session())


@pytest.mark.interpreted
def test_both_backends_agree_and_a_wrong_one_shows(models):
    session = written(models)
    result = side_by_side.side_by_side(models, session)
    assert [side.name for side in result.sides] == ["torch", "triton"]
    assert 0 < result.logits < 1e-3 and 0 < result.logprobs < 1e-3
    assert result.same_text and result.agreeing == result.tokens == 16
    assert len(result.sides[0].ids) == 6 and result.sides[0].read > 0 and result.sides[0].written > 0
    triton = models.get("a", "triton")
    assert result.sides[1].interpreted == triton.ops.interpreted == (result.sides[1].read is None)
    with torch.no_grad():
        triton.model.norm.weight *= 1.01
    assert side_by_side.side_by_side(models, session).logits > 10 * result.logits
    with pytest.raises(UserError, match="no text yet"):
        side_by_side.side_by_side(models, Session())


def test_reading_is_timed_without_a_copy_of_the_logits(models, monkeypatch):
    rates = []

    def rate(work, tokens):
        with monkeypatch.context() as timed:
            if not rates:  # the first is reading; writing fetches each token
                timed.setattr(torch.Tensor, "cpu", lambda self: 1 / 0)
            work()
        rates.append(tokens)
        return 1.0

    monkeypatch.setattr(side_by_side, "_rate", rate)
    side, logits = side_by_side._run(models, models.get("a", "torch"), "torch", [1, 2, 3], 2)
    assert rates == [3, 2] and side.read == 1.0 and logits.shape[0] == 3 and logits.dtype == torch.float64


def test_out_of_memory_is_told(models, monkeypatch):
    session = written(models)
    full = torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(GPT, "forward", lambda *_, **__: (_ for _ in ()).throw(full))
    monkeypatch.setattr(context, "prefill", GPT.forward)
    for work in (lambda: playing.attention(models, session), lambda: written(models)):
        with pytest.raises(UserError, match="out of memory: take a shorter text"):
            work()


@pytest.mark.interpreted
def test_the_interpreter_writes_few_tokens_and_says_so(models):
    torch_, triton = (
        written(models, settings=replace(FEW, length=40), kernels=kernels).text for kernels in ("torch", "triton")
    )
    if not models.get("a", "triton").ops.interpreted:
        assert triton.ids == torch_.ids
        return
    assert triton.ids == torch_.ids[: len(triton.ids)] and len(triton.tokens) == playing.INTERPRETED_TOKENS
    assert (
        "INTERPRETER" in triton.warning
        and torch_.warning is None
        and "16 tokens are written, not 40" in " ".join(triton.notes)
    )


@pytest.mark.interpreted
def test_a_text_of_a_model_that_was_replaced(root, models):
    session = written(models)
    write_run(root / "a", CharTokenizer.from_text("ab"))
    os.utime(root / "a" / "best" / "model.safetensors", (2e9,) * 2)
    for look in (playing.attention, side_by_side.side_by_side):
        with pytest.raises(UserError, match="another model since"):
            look(models, session)
