"""The commands export, import and attention, as a person uses them."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from minigpt import checkpoint
from minigpt.__main__ import main
from minigpt.backends import resolve
from minigpt.errors import UserError
from minigpt.trainer import train

OPS = resolve("torch", torch.device("cpu"))


@pytest.fixture
def run(small):
    """A run that has trained, and the current folder is where it lies."""
    train(small(out=Path("runs/r"), max_steps=3, sample_tokens=0))
    return Path("runs/r")


def loaded(path):
    return checkpoint.find(Path(path), print).model(OPS, torch.device("cpu"))


def test_there_and_back_generates_the_same(run, capsys):
    main(["export", "--to", "hf"])
    assert "runs/r-hf" in capsys.readouterr().out
    assert {path.name for path in Path("runs/r-hf").iterdir()} == {
        "config.json", "model.safetensors", "minigpt_tokenizer.json"
    }  # fmt: skip
    main(["import", "--from", "hf", "runs/r-hf", "--out", "runs/back"])
    assert "written to runs/back" in capsys.readouterr().out
    idx = torch.randint(0, 20, (2, 16))
    torch.testing.assert_close(loaded("runs/back")(idx)[0], loaded(run)(idx)[0], rtol=0, atol=1e-6)
    texts = []
    for folder in ("runs/r", "runs/back"):
        main(["generate", "--run", folder, "--seed", "1", "--max-new-tokens", "40"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and len(texts[0]) > 30


def test_a_model_without_a_tokenizer_needs_one(run):
    main(["export", "--to=hf", "--out=there"])
    Path("there/minigpt_tokenizer.json").unlink()
    with pytest.raises(UserError, match="no tokenizer in the folder there"):
        main(["import", "--from=hf", "there"])
    assert not list(Path("runs").glob("there*"))
    main(["import", "--from=hf", "there", "--tokenizer=runs/r/last", "--out=runs/with"])
    assert checkpoint.find(Path("runs/with"), print).tokenizer == checkpoint.find(run, print).tokenizer
    tokenizer = json.loads((run / "last" / "tokenizer.json").read_text())
    for name in ("char", "bpe"):  # there is no text to make one from
        with pytest.raises(UserError, match=f"no tokenizer '{name}': give --tokenizer gpt2, or a folder"):
            main(["import", "--from=hf", "there", f"--tokenizer={name}"])
    Path("large.json").write_text(json.dumps(tokenizer | {"characters": "".join(map(chr, range(40, 200)))}))
    with pytest.raises(UserError, match="the tokenizer has 163 tokens and the model only"):
        main(["import", "--from=hf", "there", "--tokenizer=large.json"])


def test_a_smaller_tokenizer_is_told(run, capsys):
    main(["export", "--to=hf", "--out=there"])
    tokenizer = json.loads((run / "last" / "tokenizer.json").read_text())
    Path("small.json").write_text(json.dumps(tokenizer | {"characters": "\nab"}))
    main(["import", "--from=hf", "there", "--tokenizer=small.json"])
    assert "WARNING: the tokenizer has 6 tokens and the model" in capsys.readouterr().err
    main(["import", "--from=hf", "there"])
    assert "WARNING" not in capsys.readouterr().err


def test_what_is_imported_is_no_training(run):
    """... that could be gone on with, or whose text is known; and a folder that is cut short is not ours to mend."""
    main(["export", "--to=hf", "--out=there"])
    assert Path("there/model.safetensors").stat().st_mode == Path("there/config.json").stat().st_mode
    main(["import", "--from=hf", "there", "--out=runs/back"])
    with pytest.raises(UserError, match="was not trained here, and does not tell its text: name one with --data"):
        main(["evaluate", "--run=runs/back"])
    with pytest.raises(UserError, match="runs/back has nothing to go on with"):
        main(["train", "--resume=runs/back"])
    whole = Path("there/model.safetensors").read_bytes()
    Path("there/model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="get the folder there anew"):
        main(["import", "--from=hf", "there"])
    config = json.loads(Path("there/config.json").read_text())
    Path("there/config.json").write_text(json.dumps(config | {"activation_function": "relu"}))
    with pytest.raises(UserError, match="only 'gelu_new' or 'gelu_pytorch_tanh' can be imported"):
        main(["import", "--from=hf", "there"])


def test_what_cannot_be_exported_is_one_line(run, small):
    shutil.copytree(run, "half")
    for path in Path("half").rglob("model.safetensors"):
        path.unlink()
    with pytest.raises(UserError, match="missing"):
        main(["export", "--to=hf", "--run=half"])
    with pytest.raises(UserError, match="there is no checkpoint in nowhere"):
        main(["export", "--to=hf", "--run=nowhere"])
    train(small(out=Path("runs/biased"), max_steps=1, tied_head=False, head_bias=True, sample_tokens=0))
    with pytest.raises(UserError, match="GPT-2 has no bias in the output layer"):
        main(["export", "--to=hf", "--run=runs/biased"])
    Path("runs/r-hf").mkdir()
    with pytest.raises(UserError, match="runs/r-hf is there already"):
        main(["export", "--to=hf", "--run=runs/r"])


def test_attention_writes_a_picture_and_a_page(run, capsys):
    main(["attention", "--prompt", "12 is even.\n13"])
    said = capsys.readouterr()
    assert "1 layers x 2 heads: runs/r/attention.png" in said.out and said.err == ""
    assert Path("runs/r/attention.png").stat().st_size > 10_000
    page = Path("runs/r/attention.html").read_text()
    assert '"\\u2423"' in page and '"1","2"' in page and "<title>" in page


def test_attention_of_a_prompt_that_is_too_long_shows_its_end(run, capsys):
    main(["attention", "--prompt", "123456789 is odd.\n" * 5, "--out", "elsewhere"])
    assert "has 90 tokens, and the model sees 16 at once: the last 16 are shown" in " ".join(
        capsys.readouterr().err.split()
    )
    data = Path("elsewhere/attention.html").read_text().partition("const data = ")[2].partition(";\n")[0]
    assert len(json.loads(data)["labels"]) == 16


@pytest.mark.parametrize(("prompt", "said"), [("", "the prompt is empty"), ("\x07<b>", "has never seen")])
def test_attention_refuses_what_it_cannot_show(run, prompt, said):
    with pytest.raises(UserError, match=said):
        main(["attention", f"--prompt={prompt}"])
    assert not Path("runs/r/attention.png").exists()


def test_attention_of_a_file(run, capsys):
    Path("some.txt").write_text("\n12 is")
    main(["attention", "--prompt-file=some.txt", "--out=one"])
    main(["attention", "--prompt=\n12 is", "--out=other"])
    assert Path("one/attention.html").read_text() == Path("other/attention.html").read_text()
    with pytest.raises(UserError, match="--prompt and --prompt-file do not go together"):
        main(["attention", "--prompt-file=some.txt", "--prompt=1"])
    with pytest.raises(UserError, match=r"there is no missing\.txt"):
        main(["attention", "--prompt-file=missing.txt"])
