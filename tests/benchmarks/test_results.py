"""Results files: what is written is what is read, and what is no results file is refused in one line."""

import copy
import csv
import io
import json
import os
import subprocess
from pathlib import Path

import pytest

from benchmarks import comparison, machine, noise, pictures, report, results
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
    "it has no date": {"date": None},
    "is timed and lacks tflops": {"row": {"tflops": None}},
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
    assert "1.1 (1 to 1.18)" in text and "- triton (layer_norm): not timed here" in text
    assert "a copy moves 10 GB/s" in text and "3 TFLOP/s in float32" in text
    document["rows"][0]["over_ours"] = 1.25
    assert "x1.25" in report.markdown(document)


def test_what_computes_faster_than_the_ceiling_is_marked(document):
    """The ceiling is 3 TFLOP/s: 3.1 is within what samples vary by, 3.3 is not."""
    document["rows"][0]["tflops"], document["rows"][1]["tflops"] = 3.1, 3.1
    assert report.above_ceiling(document) == set() and "^" not in report.markdown(document)
    document["rows"][1]["tflops"] = 3.3
    text = report.markdown(document)
    assert text.count("^") == 2 and "^2.1 (" in text and "1 row, marked ^, computes faster" in text
    document["ceilings"] = {}
    assert report.above_ceiling(document) == set()


@pytest.mark.parametrize("which", ["forward", "backward", "forward+backward"])
@pytest.mark.parametrize("op", results.SPLIT)
def test_a_pass_that_is_each_providers_own_has_no_rate(op, which, document, tmp_path):
    """What older files have there, of our split of the work, is not shown."""
    whole = which == "forward+backward"
    row = document["rows"][0] | {"op": op, "pass": which, "tflops": 9.0, "roofline_percent": 300.0}
    document["rows"] = [row]
    text = report.markdown(document)
    assert bool(report.above_ceiling(document)) == ("^" in text) == whole
    assert ("^1.1 (1 to 1.18) 300% |" if whole else "| 1.1 (1 to 1.18) -% |") in text
    assert "both passes together alone" in text
    drawn = [path.name for path in pictures.draw(document, tmp_path / "a.json")]
    assert drawn == [f"a-{op}-float32.png", *(["a-roofline-float32.png"] if whole else [])]
    for name in (*results.RATES, "roofline_percent"):
        del row[name]
    path = stored(document, tmp_path)
    if whole:
        with pytest.raises(UserError, match="lacks gbps, tflops, intensity"):
            results.load(path)
    else:
        assert "| 1.1 (1 to 1.18) |" in report.markdown(results.load(path))


def test_what_has_one_reason_is_one_line(document):
    """... and what is not there has no column and no explanation."""
    for name in ("flex", "cce"):
        document["rows"].append(document["rows"][2] | {"provider": name, "reason": "needs a CUDA GPU"})
    text = report.markdown(document)
    assert "- flex, cce (layer_norm): needs a CUDA GPU" in text and text.count("needs a CUDA GPU") == 1
    assert "times our time" not in text and "roofline" not in text


def test_a_file_without_a_gpu_says_what_it_does_not_say(document):
    document["machine"]["type"] = "cpu"
    assert "**the Triton kernels are not timed here**" in report.markdown(document)
    document["machine"]["type"] = "cuda"
    assert "not timed here**" not in report.markdown(document)


# ---------------------------------------------------------------- a busy machine


def again(row, **more):
    return row | {"provider": row["provider"] + noise.AGAIN} | more


def part(row, which, ms):
    return row | {"pass": which} | results.timed([ms] * 7)


SPOILT = {
    "samples far apart": lambda row: [row | results.timed([1.0, 1.0, 1.0, 1.5, 1.6, 1.0, 1.7])],
    "samples that agree, and had to wait": lambda row: [row | {"waited": 0.5}],
    "a second time that differs": lambda row: [row, again(row, **results.timed([1.3] * 7))],
    "a part that is longer than the whole": lambda row: [row, part(row, "forward+backward", 0.5)],
}


@pytest.mark.parametrize("what", SPOILT)
def test_what_a_busy_machine_did_is_marked_and_told(what, document):
    row = document["rows"][0]
    document["rows"] = SPOILT[what](row)
    assert results.key_of(document, row) in noise.disturbed(document)
    text = report.markdown(document)
    assert "The machine was busy" in text and "| ~1" in text
    assert "The machine was busy" in " ".join(comparison.differences(document, document))


@pytest.mark.parametrize("busy", [False, True])
def test_a_picture_tells_of_a_busy_machine(busy, document, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(pictures.Figure, "text", lambda self, x, y, text, **_: said.append(text))
    if busy:
        document["rows"][0] |= results.timed([1.0, 1.0, 1.0, 3.0, 3.0, 3.0])
    pictures.draw(document, tmp_path / "a.json")
    assert (pictures.BUSY in said) == busy


def test_a_quiet_run_is_not_marked(document):
    row = document["rows"][0]
    document["rows"] = [row, again(row, **results.timed([1.05] * 7)), part(row, "forward+backward", 2.0)]
    assert noise.disturbed(document) == set() and noise.warning(document) == ""
    assert "busy" not in report.markdown(document) and "~" not in report.markdown(document)


def test_a_backward_that_is_no_part_of_the_whole_is_not_held_to_it(document):
    """Alone it makes the gradient that forward makes in both together; forward is a part there too."""
    row = document["rows"][0] | {"op": "cross_entropy"}
    document["rows"] = [row, part(row, "forward+backward", 0.5), part(row, "backward", 0.8)]
    assert noise.disturbed(document) == {results.key_of(document, row)} and row["pass"] == "forward"


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
    """Each section is its file's tables; of each kind and device that results are committed of, the newest is shown."""
    text = README.read_text(encoding="utf-8")
    assert report.stale_sections(text) == [], "run python -m benchmarks report FILE --readme"
    shown = {found[2] for found in report.MARKERS.finditer(text)}
    assert text.count("<!-- benchmarks") == text.count("<!-- /benchmarks -->") == len(shown)
    newest = {}
    for path in sorted(_committed_results()):
        newest[Path(path).parent, report.title(results.load(machine.ROOT / path))] = path
    assert set(newest.values()) <= shown, "results are committed, and the README does not show them"


@pytest.fixture
def checkout(document, tmp_path, monkeypatch):
    """A checkout of a README and one results file."""
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    (tmp_path / "README.md").write_text("# A title\n\n## Benchmarks\n\nText.\n\n## Tests\n\nMore.\n")
    document["rows"][2] = document["rows"][0] | {"provider": "triton", "median_ms": 1.3}
    stored(document, tmp_path)
    return tmp_path


def _told(*arguments) -> None:
    from benchmarks.__main__ import parser

    parsed = parser().parse_args(["report", *map(str, arguments)])
    assert parsed.run(parsed) == 0


def test_one_command_writes_the_section(document, checkout):
    """... where it belongs; a newer file of the same kind and device takes the place of the older one."""
    readme = checkout / "README.md"
    _told(checkout / "a.json", "--readme")
    text = readme.read_text()
    assert text.startswith("# A title\n\n## Benchmarks\n\nText.\n\n<!-- benchmarks kernels layer_norm: a.json -->\n")
    assert text.endswith("<!-- /benchmarks -->\n\n## Tests\n\nMore.\n") and "1.1 (1 to 1.18)" in text
    assert report.stale_sections(text) == []
    document["rows"][0]["median_ms"] = 1.15
    results.save(document, checkout / "b.json")
    _told(checkout / "b.json", "--readme")
    after = readme.read_text()
    assert after == text.replace("a.json", "b.json").replace("1.1 (1 to 1.18)", "1.15 (1 to 1.18)")
    (checkout / "b-layer_norm-float32.png").write_bytes(b"")
    assert report.stale_sections(after) == ["b.json"], "a picture that the section does not show"


def test_what_says_nothing_of_our_kernels_is_a_link(document, checkout):
    document["rows"].pop(2)
    results.save(document, checkout / "a.json")
    text = report.section("a.json")
    assert "(a.md)" in text and "|" not in text and "1.1 (1 to" not in text
    assert "1.1 (1 to" in report.markdown(document)


def test_files_of_two_kinds_and_devices_have_a_section_each(document, checkout):
    train = document | {"kind": "train", "rows": [train_row("torch"), train_row("eager")]}
    results.save(train, checkout / "t.json")
    (checkout / "other").mkdir()
    results.save(document, checkout / "other" / "a.json")
    for path in ("a.json", "t.json", "other/a.json", "a.json"):
        _told(checkout / path, "--readme")
    text = (checkout / "README.md").read_text()
    assert [found.group(1, 2) for found in report.MARKERS.finditer(text)] == [
        ("kernels layer_norm", "a.json"), ("train tiny", "t.json"), ("kernels layer_norm", "other/a.json"),
    ]  # fmt: skip


def train_row(name, **more):
    speeds = dict.fromkeys(("tokens_per_second", "p20_tokens_per_second", "p80_tokens_per_second"), 1000.0)
    row = {"preset": "tiny", "configuration": name, "dtype": "fp32", "tokens_per_step": 128}
    return row | results.timed([128.0] * 7) | speeds | more


def test_a_ladder_has_the_columns_that_it_has_something_for(document):
    train = document | {"kind": "train", "rows": [train_row("torch"), train_row("eager")]}
    head = next(line for line in report.markdown(train).splitlines() if line.startswith("| configuration"))
    assert head == "| configuration | tokens/s (20th to 80th) | MFU | peak MiB |"
    train["rows"] = [train_row("nanoGPT", over_ours=2.0, ours="torch", note="as it is"), train_row("torch")]
    text = report.markdown(train)
    assert "time / torch" in text and "| note |" in text and report.title(train) == "train tiny beside nanoGPT"
    train["rows"][1] |= results.timed([1.0, 1.0, 1.0, 3.0, 3.0, 3.0])
    assert "| ~1,000" in report.markdown(train)


def test_a_file_outside_the_checkout_cannot_be_shown(document, checkout, tmp_path_factory):
    path = stored(document, tmp_path_factory.mktemp("elsewhere"))
    with pytest.raises(UserError, match="under benchmarks/results"):
        _told(path, "--readme")
    (checkout / "README.md").write_text("# No chapter\n")
    with pytest.raises(UserError, match="no line '## Benchmarks'"):
        _told(checkout / "a.json", "--readme")


def test_a_section_that_differs_is_found(checkout):
    text = f"before\n{report.section('a.json')}\nafter"
    assert report.stale_sections(text) == []
    assert report.stale_sections(text.replace("1.1 (1 to", "1.0 (1 to")) == ["a.json"]
    os.remove(checkout / "a.json")
    assert report.stale_sections(text) == ["a.json"]


def test_results_do_not_make_a_checkout_dirty(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@localhost"]
    (tmp_path / "file").write_text("")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "a.json").write_text("")
    assert machine.commit()["dirty"] is False
    (tmp_path / "file").write_text("changed")
    assert machine.commit()["dirty"] is True
