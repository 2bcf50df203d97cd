"""The notebooks: run from top to bottom, and stored with what they show."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def cells(path, kind):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_stored_with_its_pictures_and_nothing_of_a_machine(path):
    found = [output for cell in cells(path, "code") for output in cell["outputs"]]
    assert not [output for output in found if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in found) >= 3
    assert [cell["execution_count"] for cell in cells(path, "code")] == list(range(1, len(cells(path, "code")) + 1))
    assert not re.search(r"/home/|/root/|/tmp/|/usr/", json.dumps(found))
    assert len(cells(path, "markdown")) >= 5


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_from_top_to_bottom(path, tmp_path):
    lines = ["import matplotlib", "matplotlib.use('Agg')"]
    for cell in cells(path, "code"):
        lines += [line for line in "".join(cell["source"]).splitlines() if not line.startswith("%")]
    program = tmp_path / "notebook.py"
    program.write_text("\n".join(lines))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(program)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_there_are_four():
    assert [path.stem for path in NOTEBOOKS] == [
        "01_attention_mechanism",
        "02_transformer_block",
        "03_training_loop",
        "04_experiments",
    ]
