"""Learning curves: what is drawn is what was learned."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from strank.errors import InputError
from strank.files import safe_name
from strank.report import plots as learning
from strank.report.plots import draw_learning_curves

SCORES = {"A": [-3.0, 0.5, 0.75, 0.25], "B": [-9.0, 0.125, 0.25]}


def write(folder, scores, *, monitor="list_gain"):
    """Write the histories of networks by the section that each does not see."""
    for name, values in scores.items():
        own = folder / f"without-{safe_name(name)}"
        own.mkdir(parents=True)
        loss = 10.0 / np.arange(1, len(values) + 1)
        history = {"epoch": range(len(values)), "train/loss": loss, f"validation/{monitor}": values}
        pd.DataFrame(history).to_csv(own / "history.csv", index=False)
    return folder


@pytest.fixture
def figures(monkeypatch):
    """Figures as they are printed."""
    printed = []

    class Canvas(learning.FigureCanvasAgg):
        def __init__(self, figure):
            printed.append(figure)
            super().__init__(figure)

    monkeypatch.setattr(learning, "FigureCanvasAgg", Canvas)
    return printed


def legend_of(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_a_picture_with_something_on_it_is_written(tmp_path):
    path = draw_learning_curves(write(tmp_path, SCORES))
    assert path == tmp_path / "learning.png"
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width > image.height > 300
        assert len(image.convert("RGB").getcolors(2**24)) > 10
    assert sorted(p.name for p in tmp_path.iterdir()) == ["learning.png", "without-A", "without-B"]


def test_curves_are_the_histories_and_the_best_epoch_is_marked(tmp_path, figures):
    draw_learning_curves(write(tmp_path, SCORES))
    loss, score = figures[0].axes
    for number, values in enumerate(SCORES.values()):
        np.testing.assert_allclose(
            loss.lines[number].get_ydata(), 10 / np.arange(1, len(values) + 1)
        )
        curve, best = score.lines[2 * number : 2 * number + 2]
        np.testing.assert_array_equal(curve.get_xdata(), np.arange(len(values)))
        np.testing.assert_array_equal(curve.get_ydata(), values)
        top = int(np.argmax(values))
        assert best.get_xydata().tolist() == [[top, values[top]]]
        assert curve.get_color() == best.get_color() == loss.lines[number].get_color()
    assert legend_of(score) == ["A", "B"]
    assert "log-likelihood" in score.get_ylabel()


def test_all_but_the_first_epochs_are_in_view(tmp_path, figures):
    scores = {"A": [-1e6, *np.linspace(0, 1, 19)]}
    draw_learning_curves(write(tmp_path, scores))
    low, high = figures[0].axes[1].get_ylim()
    assert -1 < low < 0.2
    assert high >= 1


@pytest.mark.parametrize(
    ("monitor", "label"), [("spearman", "Spearman correlation"), ("another", "another")]
)
def test_the_score_is_named_as_it_is(tmp_path, figures, monitor, label):
    draw_learning_curves(write(tmp_path, SCORES, monitor=monitor))
    assert label in figures[0].axes[1].get_ylabel()


def test_a_run_of_one_epoch_is_drawn(tmp_path):
    assert draw_learning_curves(write(tmp_path, {"A": [0.5]})).is_file()


@pytest.mark.parametrize(
    "name", ["without-A", "Größe", "B1+B2", "a b", "a$\\frac{$b", "_A", "../up"]
)
def test_any_name_of_a_section_is_written_as_it_is(tmp_path, figures, name):
    draw_learning_curves(write(tmp_path / "networks", {name: [0.0, 1.0]}))
    assert legend_of(figures[0].axes[1]) == [name]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["networks"]


@pytest.mark.parametrize("place", ["nothing", "too high"])
def test_without_a_history_there_is_one_clear_error(tmp_path, place):
    if place == "too high":
        (tmp_path / "history.csv").write_text("epoch,train/loss,validation/list_gain\n0,1,1\n")
    with pytest.raises(InputError, match=r"no history\.csv of a network there"):
        draw_learning_curves(tmp_path)
    assert not (tmp_path / "learning.png").exists()
