"""A run's folder: nothing of anybody's is overwritten, and one training at a time is let in."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt.errors import UserError
from minigpt.folder import hold, new_folder, remove_if_empty

ROOT = Path(__file__).resolve().parents[2]


def test_one_lock_at_a_time(tmp_path):
    lock = hold(tmp_path)
    with pytest.raises(UserError, match=f"another training is at work in {tmp_path} \\(process {os.getpid()}\\)"):
        hold(tmp_path)
    lock.release()
    assert os.listdir(tmp_path) == []
    hold(tmp_path).release()


def test_a_killed_process_leaves_no_lock(tmp_path):
    code = f"from minigpt.folder import hold; from pathlib import Path; lock = hold(Path({str(tmp_path)!r})); print(1)"
    code += "; import time; sys = __import__('sys'); sys.stdout.flush(); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match=f"process {other.pid}"):
            hold(tmp_path)
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert os.listdir(tmp_path) == ["lock"]
    hold(tmp_path).release()


def test_a_lock_file_that_its_holder_took_away_is_no_lock(tmp_path, monkeypatch):
    """Another training may release between this one's opening of the file and its locking."""
    first, opened = hold(tmp_path), os.open

    def open_then_release(*arguments):
        descriptor = opened(*arguments)
        monkeypatch.undo()
        first.release()
        return descriptor

    monkeypatch.setattr(os, "open", open_then_release)
    second = hold(tmp_path)
    with pytest.raises(UserError):
        hold(tmp_path)
    second.release()


def test_a_folder_that_cannot_be_locked_is_told(tmp_path):
    with pytest.raises(UserError, match="missing/lock"):
        hold(tmp_path / "missing")


def test_new_folders_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [str(new_folder(None, "x")) for _ in range(2)] == ["runs/x-1", "runs/x-2"]
    assert new_folder(Path("a/b"), "x") == Path("a/b") and Path("a/b").is_dir()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("last", "--resume run goes on"),
        ("last.1", "--resume run"),
        ("notes.txt", "no run is in it"),
        ("best", "no run"),
    ],
)
def test_what_is_there_is_not_overwritten(tmp_path, monkeypatch, name, said):
    monkeypatch.chdir(tmp_path)
    (Path("run") / name).mkdir(parents=True)
    with pytest.raises(UserError, match=f"run is not empty.*{said}"):
        new_folder(Path("run"), "x")


def test_what_a_kill_left_before_the_first_checkpoint_is_no_run(tmp_path):
    (tmp_path / "last.writing").mkdir()
    (tmp_path / "lock").write_text("123")
    assert new_folder(tmp_path, "x") == tmp_path


def test_only_an_empty_folder_is_removed(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name in ("full", "empty", "missing"):
        remove_if_empty(tmp_path / name)
    assert os.listdir(tmp_path) == ["full"]
