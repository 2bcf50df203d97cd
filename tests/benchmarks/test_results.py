"""Results files: what is written is what is read, and what is no results file is refused in one line."""

import copy
import csv
import io
import json
import os
import subprocess
from pathlib import Path

import pytest

from benchmarks import machine, pictures, report, results
from minigpt.errors import UserError

README = machine.ROOT / "README.md"


def stored(document, tmp_path) -> Path:
    path = tmp_path / "a.json"
    results.save(document, path)
    return path


def test_written_is_read(document, tmp_path):
    path = stored(document, tmp_path)
    assert results.load(path) == document
    rows = list(csv.DictReader(io.StringIO(path.with_suffix(".csv").read_text())))
    assert [row["provider"] for row in rows] == ["torch", "eager", "triton"]
    assert float(rows[0]["median_ms"]) == 1.1 and rows[2]["reason"] == "not timed here" and rows[2]["median_ms"] == ""
    assert not list(tmp_path.glob("*.writing"))


def test_what_it_was_measured_under_is_there(document):
    for name in ("machine", "versions", "precision", "clocks", "tiles", "kernels_hash", "commit", "date"):
        assert name in document
    assert document["schema"] == 1 and document["versions"]["torch"]
    path = results.path_of(document | {"commit": "0123456789abcdef", "dirty": False, "date": "D"}, Path("out"))
    assert path == Path("out") / document["machine"]["slug"] / "D-0123456789ab.json"


def change(document, **changes):
    changed = copy.deepcopy(document)
    changed["rows"][0] |= changes.pop("row", {})
    return changed | changes


DAMAGES = {
    "schema 2, and 1": {"schema": 2},
    "unknown kind 'tables'": {"kind": "tables"},
    "rows is missing": {"rows": {}},
    "the machine has no slug": {"machine": {}},
    "lacks one of op": {"row": {"op": None}},
    "has the status 'fine'": {"row": {"status": "fine"}},
    "samples above 0": {"row": {"samples_ms": [1.0, 0.0]}},
    "and there alone": {"row": {"status": "wrong", "reason": "wrong"}},
    "and no reason": {"row": {"status": "error", "samples_ms": []}},
}


@pytest.mark.parametrize("said", DAMAGES)
def test_a_damaged_file_is_refused(said, document, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(change(document, **DAMAGES[said])))
    with pytest.raises(UserError, match=said) as error:
        results.load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("content", "said"), [("[1]", "no schema"), ("{", "cannot be read"), (None, "there is no")])
def test_what_is_no_file_of_ours_is_refused(content, said, tmp_path):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=said):
        results.load(path)


def test_a_folder_that_cannot_be_written_is_told_before_measuring(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a part of the path is a file"):
        results.prepare(tmp_path / "file" / "slug" / "a.json")


def test_tables_hold_every_number_and_every_reason(document):
    text = report.markdown(document)
    assert "1.1 (1 to 1.18)" in text and "- triton, layer_norm: not timed here" in text
    assert "a copy moves 10 GB/s" in text and "3 TFLOP/s in float32" in text
    document["rows"][0]["over_ours"] = 1.25
    assert "x1.25" in report.markdown(document)


def test_pictures_are_drawn(document, tmp_path):
    drawn = pictures.draw(document, stored(document, tmp_path))
    assert [path.name for path in drawn] == ["a-layer_norm-float32.png", "a-roofline-float32.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    document["rows"] = document["rows"][2:]
    assert pictures.draw(document, tmp_path / "a.json") == []


def _committed_results() -> list[str]:
    folder = machine.ROOT / "benchmarks" / "results"
    try:
        done = subprocess.run(
            ["git", "ls-files", "benchmarks/results/*.json"], cwd=machine.ROOT, capture_output=True, text=True
        )
        if done.returncode == 0:
            return done.stdout.split()
    except OSError:
        pass
    return [str(path.relative_to(machine.ROOT)) for path in folder.rglob("*.json")]


def test_readme_shows_what_the_files_say():
    """Without committed results there is nothing to show; with them, a section each that is their tables."""
    text = README.read_text(encoding="utf-8")
    shown = [path for path, _ in report.MARKERS.findall(text)]
    assert report.stale_sections(text) == []
    assert text.count("<!-- benchmarks:") == text.count("<!-- /benchmarks -->") == len(shown)
    assert shown or not _committed_results(), "results are committed, and the README shows none of them"


def test_a_section_that_differs_is_found(document, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    stored(document, tmp_path)
    text = f"before\n{report.section('a.json')}\nafter"
    assert report.stale_sections(text) == []
    assert report.stale_sections(text.replace("1.1 (1 to", "1.0 (1 to")) == ["a.json"]
    os.remove(tmp_path / "a.json")
    assert report.stale_sections(text) == ["a.json"]
