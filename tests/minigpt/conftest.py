"""A text and a run that are quickly trained, and a program run through its door."""

import pytest

from minigpt import errors
from minigpt.config import preset


@pytest.fixture
def text(tmp_path):
    """A file whose next character the one before nearly gives away."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{number} is {'odd' if number % 2 else 'even'}.\n" for number in range(300)))
    return path


@pytest.fixture
def small(text, tmp_path, monkeypatch):
    """Settings of a run that takes a second; options replace them."""
    monkeypatch.chdir(tmp_path)

    def settings(**options):
        shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 4, "device": "cpu"}
        run = {"max_steps": 12, "warmup_steps": 2, "eval_interval": 5, "log_interval": 2, "sample_tokens": 8}
        return preset("shakespeare-cpu", **({"data": str(text), "learning_rate": 1e-2} | shape | run | options))

    return settings


@pytest.fixture
def call(capsys):
    """Runs a program through its door: (status, stdout, stderr)."""

    def run(main, *arguments) -> tuple[int, str, str]:
        capsys.readouterr()
        status = 0
        try:
            errors.door(lambda: main(list(map(str, arguments))))
        except SystemExit as leaving:
            status = leaving.code or 0
        return status, *capsys.readouterr()

    return run
