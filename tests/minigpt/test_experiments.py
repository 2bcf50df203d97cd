"""The command: every experiment from end to end, what is stored is found again, and what is not whole is not."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from minigpt import __main__
from minigpt.errors import Stopped, UserError
from minigpt.experiments import command, training
from minigpt.experiments.catalogue import EXPERIMENTS, Scale
from minigpt.experiments.command import run_experiment
from minigpt.experiments.runs import Place, Run
from minigpt.experiments.store import Store
from minigpt.lock import Lock

ROOT = Path(__file__).resolve().parents[2]
TINY = Scale(2, 2, 2, 1, 8, 16, 30, 2, (8, 16), 270)


@pytest.fixture(autouse=True)
def tiny(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "QUICK", TINY)


@pytest.fixture
def experiment(text, capsys):
    """Call the command; what it printed to stdout and to stderr."""

    def call(name, *options):
        run_experiment([name, "--quick", "--data", str(text), "--device", "cpu", *map(str, options)])
        return capsys.readouterr()

    return call


@pytest.fixture
def counted(monkeypatch):
    """The runs that were really made, in order."""
    made = []
    for module, name in ((command.training, "train"), (command, "step_cost")):
        plain = getattr(module, name)
        monkeypatch.setattr(module, name, lambda run, place, plain=plain: (made.append(run), plain(run, place))[1])
    return made


def rows(path):
    with Path(path).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_all_of_them_from_end_to_end(experiment, counted):
    said = experiment("all", "--out", "out").out
    log = Path("out/experiments_log.md").read_text(encoding="utf-8")
    assert "means nothing" in log and "experiment all --quick`" in log
    assert len(counted) == len(set(counted))  # what two experiments need is run once
    for name, one in EXPERIMENTS.items():
        assert f"## {one.title}\n" in log and f"Usually said: {one.said}." in log
        assert f"![{one.title}](images/experiments/{name}.png)" in log
        drawn = Path(f"out/images/experiments/{name}.png").read_bytes()
        assert drawn.startswith(b"\x89PNG") and drawn == Path(f"out/{name}.png").read_bytes()
        paragraph = said.split(f"\n{one.title}. ")[1].split("\n")[0]
        assert paragraph and paragraph in log and paragraph in Path(f"out/{name}.md").read_text(encoding="utf-8")
        assert len({(row["variant"], row["seed"]) for row in rows(f"out/{name}.csv")}) >= 2
    assert log.count("<pre>") == 3 and str(Path.cwd()) not in log  # it is published, and that is nobody's business
    assert not list(Path("out").rglob("*.writing"))

    # The numbers of the table, the sentence and the log are those of the runs.
    def ends(name):
        wanted = (name, "final_loss")
        return [float(row["value"]) for row in rows("out/rates.csv") if (row["variant"], row["quantity"]) == wanted]

    mean, sd = np.mean(ends("1e-5")), np.std(ends("1e-5"), ddof=1)
    assert f"1e-5 {mean:.3f} ± {sd:.3f}" in said and len(set(ends("1e-3") + ends("1e-5"))) == 4
    kept = [row for row in rows("out/kernels.csv") if row["quantity"] == "kept_bytes"]
    assert all(float(row["value"]) > 0 for row in kept)
    assert {row["index"] for row in rows("out/residuals.csv") if row["quantity"] == "gradient_norm"} == set("12345678")

    # Again: nothing is run, the same comes out.
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.suffix in (".csv", ".json", ".md")}
    counted.clear()
    assert "0 to do" in experiment("scaling", "--out", "out").out and not counted
    assert before == {path: path.read_bytes() for path in before}


def test_one_of_them_writes_no_log(experiment, counted):
    experiment("positions", "--out", "out", "--seeds", "1")
    assert [(run.position, run.seed) for run in counted] == [("learned", 1337), ("sinusoidal", 1337)]
    names = {path.name for path in Path("out").iterdir()}
    assert names == {"positions.csv", "positions.png", "positions.md", "results"}
    assert not Path("docs").exists()
    assert "one seed" in Path("out/positions.md").read_text(encoding="utf-8")


def test_other_settings_are_other_runs(experiment, counted, text):
    def made(*options):
        counted.clear()
        experiment("positions", "--out", "out", *options)
        return len(counted)

    assert made("--seeds", "1") == 2 and made("--seeds", "1") == 0
    assert made("--seeds", "3") == 4  # two more seeds
    assert made("--seeds", "1", "--kernels", "eager") == 2
    text.write_text(text.read_text() * 2)
    assert made("--seeds", "1") == 2
    command.QUICK = Scale(3, 2, 2, 1, 8, 16, 30, 2, (8, 16), 270)
    assert made("--seeds", "1") == 2


def test_ctrl_c_keeps_what_is_done(experiment, counted, monkeypatch, capsys):
    plain = training.Learner.step

    def step(learner, number):
        if len(counted) == 2:
            signal.raise_signal(signal.SIGINT)
        return plain(learner, number)

    monkeypatch.setattr(training.Learner, "step", step)
    with pytest.raises(Stopped, match="kept in out: the same command goes on") as stopped:
        experiment("positions", "--out", "out")
    assert stopped.value.exit_status == 130
    assert len(list(Path("out/results").iterdir())) == 1 and not Path("out/positions.png").exists()
    monkeypatch.setattr(training.Learner, "step", plain)
    first = counted[0]
    counted.clear()
    assert "4 runs, 1 of them stored already, 3 to do" in experiment("positions", "--out", "out").out
    assert len(counted) == 3 and first not in counted


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_kill_costs_the_run_that_it_hit(experiment, counted, text):
    script = (
        "import kernels\nfrom minigpt.experiments import command\nfrom minigpt.experiments.catalogue import Scale\n"
        f"command.QUICK = Scale(2, 60, 2, 1, 8, 16, 30, 2, (8, 16), 270)\n"
        f"data = {str(text)!r}\n"
        "command.run_experiment(['positions', '--quick', '--data', data, '--out', 'out', '--device', 'cpu'])\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL, env=environment)
    until = time.monotonic() + 100
    while not list(Path().glob("out/results/*.json")) and running.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    running.kill()
    assert running.wait() == -signal.SIGKILL
    stored = len(list(Path("out/results").glob("*.json")))
    assert 1 <= stored < 120
    experiment("positions", "--out", "out", "--seeds", "1")
    assert len(counted) <= 1 and Path("out/positions.png").exists()  # the folder's lock went with the process


@pytest.fixture
def store(text, tmp_path):
    """A store, a run, its settings, and the warnings."""
    said = []
    run = Run(n_layer=1, n_embd=8, n_head=1)
    return Store(tmp_path / "store", said.append), run, Place(str(text), "cpu").settings(run), said


def test_a_result_is_stored_whole_or_not_at_all(store, monkeypatch):
    store, run, settings, said = store
    assert store.load(run, settings) is None

    def killed(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            store.save(run, settings, {"loss": 1.5})
    assert store.load(run, settings) is None
    draft = store.path(run, settings).with_name(store.path(run, settings).name + ".writing")
    draft.write_text('{"settings"')  # what a kill leaves
    assert store.load(run, settings) is None and not said
    store.save(run, settings, {"loss": 1.5, "rows": [None, 2]})
    assert store.load(run, settings) == {"loss": 1.5, "rows": [None, 2]} and not draft.exists()
    assert store.load(run, settings | {"torch": "0"}) is None and not said


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: text.replace("1.5", "1.25"),
        lambda text: text.replace('"n_layer": 1', '"n_layer": 2'),
        lambda text: json.dumps({"result": {"loss": 1.0}}),
        lambda text: "[]",
        lambda text: "\x00" * 100,
    ],
)
def test_a_damaged_result_is_no_result(store, damage):
    store, run, settings, said = store
    store.save(run, settings, {"loss": 1.5})
    path = store.path(run, settings)
    path.write_text(damage(path.read_text()))
    assert store.load(run, settings) is None
    assert len(said) == 1 and str(path) in said[0] and "damaged" in said[0] and "made again" in said[0]
    store.save(run, settings, {"loss": 1.5})
    assert store.load(run, settings) == {"loss": 1.5}


def test_a_damaged_result_is_run_again(experiment, counted):
    experiment("positions", "--out", "out", "--seeds", "1")
    path = sorted(Path("out/results").iterdir())[0]
    whole = json.loads(path.read_text())
    path.write_text(path.read_text()[:-20])
    counted.clear()
    assert "made again" in experiment("positions", "--out", "out", "--seeds", "1").err.replace("\n", " ")
    assert len(counted) == 1
    again = json.loads(path.read_text())
    assert again["result"] | {"seconds": 0} == whole["result"] | {"seconds": 0}


def test_the_list_names_them_all(capsys):
    __main__.main(["experiment", "--list"])
    said = capsys.readouterr().out
    assert all(f"{name} " in said and one.question in said for name, one in EXPERIMENTS.items())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name an experiment: rates, size, .*, all"),
        (["residual"], "unknown experiment 'residual': there are rates, .*; did you mean residuals?"),
        (["frobnicate"], "unknown experiment 'frobnicate': there are rates,"),
        (["rates", "--seeds", "-1"], "seeds is -1"),
        (["rates", "--device", "tpu"], "unknown device 'tpu'"),
        (["rates", "--kernels", "fast"], "unknown kernels 'fast'"),
        (["rates", "--data", "missing.txt"], "missing.txt"),
        (["rates", "--data", "short.txt"], "short.txt|longer text"),
        (["rates", "--data", "text.txt", "--out", "text.txt/out"], "text.txt"),
        (["all", "--data", "text.txt", "--log", "text.txt/log.md"], "text.txt"),
        (["all", "--data", "text.txt", "--log", "."], "folder"),
    ],
)
def test_wrong_options(text, arguments, said):
    Path("short.txt").write_text("To be")
    with pytest.raises(UserError, match=said):
        run_experiment([*arguments, "--quick"])
    assert not list(Path().rglob("*.json"))


def test_two_at_once_are_refused(experiment, tmp_path):
    Path("out").mkdir()
    lock = Lock(Path("out/lock"), "", "")
    with pytest.raises(UserError, match="other experiments are running in out"):
        experiment("positions", "--out", "out")
    lock.release()
