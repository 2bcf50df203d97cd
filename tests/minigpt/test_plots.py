"""The picture of the curves: what is drawn, from which lines of the table, and what cannot be drawn."""

import csv
import math
import struct
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from minigpt import plots
from minigpt.errors import UserError

HEADER = ["step", "train_loss", "val_loss", "perplexity"]


def write(path: Path, rows: list[list]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([HEADER, *rows])
    return path


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Draws a table's text or rows, and gives back the figure."""
    figures = []
    save = Figure.savefig

    def keep(figure, *arguments, **keywords):
        figures.append(figure)
        save(figure, *arguments, **keywords)

    monkeypatch.setattr(Figure, "savefig", keep)

    def run(rows, **keywords) -> Figure:
        path = tmp_path / "metrics.csv"
        path.write_text(rows) if isinstance(rows, str) else write(path, rows)
        plots.curves(path, tmp_path / "curves.png", **keywords)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.png", "metrics.csv"]  # nothing left over
        return figures[-1]

    return run


def labelled(figure: Figure) -> list[dict[str, np.ndarray]]:
    """Of each panel: curve's name -> its points, (N, 2)."""
    return [{c: line.get_xydata() for line in a.lines if (c := line.get_label())[0] != "_"} for a in figure.axes]


def words(figure: Figure) -> list[list[str]]:
    return [[text.get_text() for text in axes.texts] for axes in figure.axes]


def test_loss_and_perplexity_of_both_splits_with_their_last_values(draw, tmp_path):
    figure = draw([[0, 4.6, 4.5, ""], [10, 3.0, "", ""], [20, 2.0, 2.25, ""]], title="a run")
    loss, perplexity = labelled(figure)
    assert loss["train"].tolist() == [[0, 4.6], [10, 3.0], [20, 2.0]]
    assert loss["validation"].tolist() == [[0, 4.5], [20, 2.25]]
    np.testing.assert_allclose(perplexity["train"][:, 1], [math.exp(x) for x in (4.6, 3.0, 2.0)])
    assert words(figure)[0][1:] == ["train 2.00", "validation 2.25"]
    assert words(figure)[1][1:] == ["train 7.39", "validation 9.49"]
    assert figure.axes[1].get_yscale() == "log"
    assert figure.get_suptitle() == "a run"
    head = (tmp_path / "curves.png").read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", head[16:]) == (1760, 720)


def test_a_single_point(draw):
    figure = draw([[0, 4.6, 4.6, ""]])
    assert [text[1:] for text in words(figure)] == [
        ["train 4.60", "validation 4.60"],
        ["train 99.5", "validation 99.5"],
    ]
    for axes in figure.axes:
        (low, high), (bottom, top) = axes.get_xlim(), axes.get_ylim()
        assert low < 0 < high and bottom < top


@pytest.mark.parametrize("only", [["3.5", ""], ["", "3.5"]])
def test_one_split_alone(draw, only):
    loss, _ = labelled(draw([[0, *only, ""], [1, *only, ""]]))
    assert len(loss) == 1


def test_nothing_measured(draw):
    assert words(draw([]))[0][1:] == ["nothing measured yet"]


def test_losses_that_are_not_finite_and_cut_off_lines_are_left_out(draw):
    figure = draw(",".join(HEADER) + "\n0,4.0,nan,\n1,inf,5.0,\n2,3.0,,\n3,2.0\n4,-\n5")
    loss, _ = labelled(figure)
    assert loss["train"].tolist() == [[0, 4.0], [2, 3.0], [3, 2.0]]
    assert loss["validation"].tolist() == [[1, 5.0]]


def test_a_loss_whose_perplexity_is_no_number(draw):
    draw([[0, 5000.0, 1e300, ""], [1, 1.0, 1.0, ""]])


def test_of_a_repeated_step_the_later_line_counts_and_order_does_not(draw):
    loss, _ = labelled(draw([[0, 4.0, "", ""], [2, 9.0, "", ""], [1, 3.0, "", ""], [2, 2.0, "", ""]]))
    assert loss["train"].tolist() == [[0, 4.0], [1, 3.0], [2, 2.0]]


def test_a_noisy_curve_is_shown_as_it_is_and_averaged(draw):
    losses = np.random.default_rng(0).normal(3.0, 0.5, 600)
    figure = draw([[step, loss, "", ""] for step, loss in enumerate(losses)])
    faint, bold = figure.axes[0].lines
    np.testing.assert_array_equal(faint.get_ydata(), losses)
    average = bold.get_ydata()
    assert average[0] == losses[0]
    np.testing.assert_allclose(average[300], losses[290:311].mean())
    np.testing.assert_allclose(average[599], losses[589:].mean())
    np.testing.assert_allclose(figure.axes[1].lines[1].get_ydata(), np.exp(average))


@pytest.mark.parametrize(("train", "val"), [(2.0, 2.0), (2.0, 2.001), (0.001, 4.6), (4.6, 0.001)])
def test_the_labels_do_not_overlap_and_stay_beside_the_panel(draw, train, val):
    figure = draw([[0, 4.6, 4.6, ""], [1, train, val, ""]])
    for axes in figure.axes:
        heights = sorted(text.get_position()[1] for text in axes.texts[1:])
        texts = sorted(axes.texts[1:], key=lambda text: text.xy[1])
        assert texts[1].xy[1] - texts[0].xy[1] >= 0.08, heights
        assert -0.1 <= texts[0].xy[1] and texts[1].xy[1] <= 1.1
        for text in texts:  # each beside its own curve, and above the other's if that is where it ends
            name, value = text.get_text().split()
            line = next(line for line in axes.lines if line.get_label() == name)
            assert text.get_color() == line.get_color() and float(value) == pytest.approx(
                line.get_ydata()[-1], rel=0.01
            )
        ends = [float(text.get_text().split()[1]) for text in texts]
        assert ends == sorted(ends)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no"),
        (b"", "no columns"),
        (b"a,b\n1,2\n", "no columns"),
        (b"step,train_loss\n\xff,1\n", "cannot"),
    ],
)
def test_files_that_are_no_metrics(tmp_path, content, message):
    path = tmp_path / "metrics.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        plots.curves(path, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_a_picture_that_cannot_be_written(tmp_path):
    path = write(tmp_path / "metrics.csv", [[0, 1.0, 1.0, ""]])
    with pytest.raises(UserError, match=r"curves\.png|missing"):
        plots.curves(path, tmp_path / "missing" / "curves.png")
    (tmp_path / "curves.png").mkdir()
    with pytest.raises(UserError, match=r"curves\.png"):
        plots.curves(path, tmp_path / "curves.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.png", "metrics.csv"]
