"""The README says what is true: its table, its example, its commands and its files."""

import fnmatch
import re
from pathlib import Path

import pytest
import torch

import benchmarks.__main__
import profiling.__main__
from kernels import catalogue
from minigpt import config
from minigpt.__main__ import COMMANDS
from minigpt.errors import UserError

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_table_of_ops_is_the_catalogues():
    shown = re.search(r"<!-- ops: .*? -->\n(.*?)\n<!-- /ops -->", TEXT, re.DOTALL)[1]
    assert shown == catalogue.table()


def test_example_runs(device):
    example = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)[1]
    exec(compile(example, "README.md", "exec"), {"__name__": "readme"})


def test_files_and_links_exist():
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", TEXT)
    assert targets
    for target in [*targets, "requirements.txt", "tests/allowed_skips.txt", "train.py", "generate.py"]:
        assert (ROOT / target).exists(), target


def test_nothing_is_left_to_fill_in():
    assert not re.findall(r"\b[A-Z]+_[A-Z]+\b(?<!MINIGPT_KERNELS)(?<!MINIGPT_CACHE)", TEXT)


@pytest.mark.parametrize("line", re.findall(r"^(?:.*&& )?(python [^#\n]*)", TEXT, re.MULTILINE))
def test_commands_are_understood(line, tmp_path, monkeypatch):
    """Every command line of the README names a program, a command and options that there are."""
    monkeypatch.chdir(tmp_path)  # where nothing has been trained
    words = line.replace('"ROMEO:"', "ROMEO").split()
    if "--resume" in words:
        for device in ("cpu", "cuda"):  # the shell finds the run of the first command on either
            run = f"runs/{config.default_preset(None, torch.device(device))}-1"
            assert fnmatch.fnmatch(run, words[-1]), run
        with pytest.raises(UserError, match="there is no checkpoint"):
            config.parse(words[2:])
    elif words[1] == "train.py":
        argv = ["--preset", "shakespeare-cpu"] * ("--preset" not in words) + words[2:]
        config.parse([word for word in argv if word not in ("--kernels", "triton")])
    elif words[1] == "-m" and words[2] == "minigpt":
        assert words[3] in COMMANDS
    elif words[1:3] == ["-m", "profiling"]:
        profiling.__main__.parser().parse_args(words[3:])
    elif words[1:3] == ["-m", "benchmarks"]:
        benchmarks.__main__.parser().parse_args(words[3:])
    else:
        assert words[1] == "generate.py"


@pytest.mark.parametrize("name", config.PRESETS)
def test_presets_are_named(name):
    assert f"`{name}`" in TEXT
