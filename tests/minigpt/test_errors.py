"""The door turns what a person caused into one line and a status; bugs keep their traceback."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt.errors import Stopped, UserError, door, writing

ROOT = Path(__file__).resolve().parents[2]


def fails(exception):
    def main():
        raise exception

    return main


@pytest.mark.parametrize(
    ("exception", "status", "line"),
    [
        (UserError("two\nlines   of text"), 1, "error: two lines of text\n"),
        (Stopped("stopped, go on with --resume runs/x"), 130, "stopped, go on with --resume runs/x\n"),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C\n"),
        (PermissionError(13, "Permission denied", "/x/y"), 1, "error: /x/y: no permission"),
        (OSError(28, "No space left on device", "/x/y"), 1, "error: /x/y: the disk is full"),
    ],
)
def test_what_a_person_caused_is_one_line(exception, status, line, capsys):
    with pytest.raises(SystemExit) as leaving:
        door(fails(exception))
    written = capsys.readouterr()
    assert leaving.value.code == status
    assert written.err.startswith(line) and written.err.count("\n") == 1 and written.out == ""


def test_of_several_processes_one_tells_what_all_of_them_met(monkeypatch, capsys):
    monkeypatch.setattr("minigpt.errors._SECONDS_TO_TELL", 0)

    def told(rank_here, *, rank=None, silent=False):
        monkeypatch.setenv("RANK", str(rank_here))
        error = UserError("so it is")
        error.rank, error.silent = rank, silent
        with pytest.raises(SystemExit) as leaving:
            door(fails(error))
        assert leaving.value.code == 1
        return capsys.readouterr().err

    assert told(0) == told(0, rank=0) == "error: so it is\n"
    assert told(3) == told(3, rank=3, silent=True) == ""
    assert told(3, rank=3) == "[rank 3] error: so it is\n"


@pytest.mark.parametrize("exception", [ValueError("a bug"), FileNotFoundError(2, "No such file", "data.json")])
def test_a_bug_keeps_its_traceback(exception):
    with pytest.raises(type(exception)):
        door(fails(exception))


def test_a_main_that_works_just_returns(capsys):
    door(lambda: print("done"))
    assert capsys.readouterr().out == "done\n"


def test_a_closed_pipe_ends_quietly():
    program = "from minigpt.errors import door\ndoor(lambda: [print('x' * 1000) for _ in range(1000)])"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_closed_pipe_ends_quietly_under_rich_too():
    program = (
        "from rich.console import Console\nfrom minigpt.errors import door\n"
        "door(lambda: [Console().print('x' * 1000) for _ in range(1000)])"
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_writing_names_the_file_of_a_failed_write(tmp_path):
    path = tmp_path / "large"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(UserError, match=f"{path}: the file would be larger than allowed"), writing(path):
            path.write_bytes(bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
