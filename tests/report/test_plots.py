from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from strank.report.plots import draw_contrast, write_calibration, write_volcano

ODD = ["<img src=x>", "a$\\frac{$b", "../up", "HLA/A"]


def table(n: int = 60, *, observed: bool = False) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    predicted = np.sort(rng.normal(size=n))[::-1]
    p = np.exp(-8 * np.abs(predicted))
    found = pd.DataFrame(
        {"gene": [*ODD, *(f"G{i}" for i in range(n - len(ODD)))], "predicted": predicted}
    ).assign(low=predicted - 0.3, high=predicted + 0.3, p=p, q=np.minimum(2 * p, 1))
    found = found.assign(a="Tumor $_{", b="Stroma <b>")
    if observed:
        seen = 0.8 * predicted + rng.normal(size=n) * 0.2
        seen[5] = np.nan
        found = found.assign(observed=seen, observed_low=seen - 0.5, observed_high=seen + 0.5)
    return found


def names(ax) -> list:
    return [text for text in ax.texts if text.get_text()]


def test_the_genes_that_change_most_are_named_and_coloured_by_q():
    figure = draw_contrast(table())
    [ax] = figure.axes
    shown = [text.get_text() for text in names(ax)]
    genes = table()["gene"].tolist()
    assert sorted(shown) == sorted([*genes[:8], *genes[-8:]])
    colours = {tuple(c) for c in ax.collections[0].get_facecolors().round(3)}
    assert len(colours) == 3
    assert figure.get_suptitle() == "Tumor $_{ against Stroma <b>"
    assert "higher in Tumor $_{ →" in ax.get_xlabel()
    sure = (table()["q"] < 0.05).sum()
    assert ax.get_title(loc="right") == f"coloured: q < 0.05, {sure} of 60 genes"


@pytest.mark.parametrize("observed", [False, True])
def test_no_two_names_overlap_and_all_lie_inside(observed):
    figure = draw_contrast(table(300, observed=observed))
    figure.canvas.draw()
    for ax in figure.axes:
        frame = ax.get_window_extent()
        boxes = [super(type(t), t).get_window_extent() for t in names(ax)]
        assert len(boxes) == 16
        for number, box in enumerate(boxes):
            assert frame.y0 <= box.y0 <= box.y1 <= frame.y1
            assert not any(box.overlaps(other) for other in boxes[:number])


def test_observed_stands_beside_predicted():
    changes = table(observed=True)
    _, ax = draw_contrast(changes).axes
    points = ax.collections[-1].get_offsets()
    kept = changes.dropna()
    np.testing.assert_allclose(points, kept[["predicted", "observed"]])
    assert "observed" in ax.get_ylabel()


def test_few_genes_none_of_them_sure_are_drawn_too(tmp_path):
    changes = table(5).assign(q=1.0, p=[0.0, 1, 1, 1, 1])
    write_volcano(tmp_path / "volcano.png", changes)
    write_volcano(
        tmp_path / "one.png",
        changes[:1]
        .assign(predicted=0.0, observed=np.nan)
        .assign(observed_low=np.nan, observed_high=np.nan),
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.png", "volcano.png"]
    [ax] = draw_contrast(changes).axes
    assert len(names(ax)) == 5


def test_calibration_draws_a_line_a_method(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    rows = [("a $b$", 0.5, 0.7, 40), ("a $b$", 2.0, 1.4, 60), ("c", 1.0, 1.0, 80)]
    lines = pd.DataFrame(rows, columns=["method", "predicted", "observed", "counts"])
    write_calibration(tmp_path / "calibration.png", lines)
    [ax] = drawn[0].axes
    _, first, _ = ax.lines
    np.testing.assert_allclose(first.get_xdata(), np.log([0.5, 2.0]))
    np.testing.assert_allclose(first.get_ydata(), np.log([0.7, 1.4]))
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a $b$", "c"]
    # Of no method the picture is empty, and no error.
    write_calibration(tmp_path / "none.png", lines[:0])
