from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from matplotlib.backends.backend_agg import FigureCanvasAgg as Canvas
from matplotlib.collections import EllipseCollection
from matplotlib.transforms import Affine2D
from PIL import Image

from strank.files import safe_name
from strank.pl.layers import MapLayer, map_layers
from strank.report import maps
from strank.report.maps import draw_maps, write_gene_maps
from strank.slides.pixels import ArrayPixels
from strank.slides.slide import Slide

GENES = ["CD24", "<img src=x>", "a$\\frac{$b", "../up"]


def layer(scale: float = 1.0) -> MapLayer:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(40, len(GENES))) * scale
    positions = rng.uniform(50, 250, (40, 2))
    return MapLayer("predicted", "log relative expression", positions, 40, scores, pd.Index(GENES))


def marks_of(figure) -> EllipseCollection:
    found = [c for ax in figure.axes for c in ax.collections if isinstance(c, EllipseCollection)]
    assert len(found) == 1
    return found[0]


def test_colours_are_centred_at_zero_and_labelled():
    figure = draw_maps(np.zeros((150, 150, 3), np.uint8), 2.0, 2.0, [layer()], "CD24")
    marks = marks_of(figure)
    low, high = marks.get_clim()
    assert low == -high
    assert high == pytest.approx(np.quantile(np.abs(layer().scores[:, 0]), 0.98))
    np.testing.assert_allclose(marks.get_offsets(), layer().positions)
    labels = [ax.get_ylabel() for ax in figure.axes]
    assert "log relative expression" in labels


def test_a_flat_map_looks_flat():
    figure = draw_maps(np.zeros((150, 150, 3), np.uint8), 2.0, 2.0, [layer(0.01)], "CD24")
    assert marks_of(figure).get_clim()[1] == pytest.approx(np.log(1.5))


def test_what_is_unlike_the_training_is_crossed_out_and_a_banner_says_so(tmp_path, monkeypatch):
    slide = Slide(ArrayPixels(np.full((300, 300, 3), 200, np.uint8)), 2.0, Path("x.png"))
    odd = np.arange(40) < 10
    told = "25 % of the tiles look $unlike$ anything in training; do not trust this map"
    predictions = AnnData(
        layer().scores,
        obs=pd.DataFrame({"odd": odd}, index=[f"t{i}" for i in range(40)]),
        var=pd.DataFrame(index=GENES),
        obsm={"spatial": layer().positions},
        uns={"strank": {"stride_um": 40.0}, "strank_novelty": {"warning": told}},
        layers={"se": np.abs(layer().scores)},
    )
    figures = []
    monkeypatch.setattr(maps, "FigureCanvasAgg", lambda of: figures.append(of) or Canvas(of))
    for _ in range(2):
        write_gene_maps(tmp_path, predictions, ["CD24"], slide=slide)
        predictions.obs["odd"], predictions.uns["strank_novelty"] = False, {"warning": ""}
    warned, silent = figures
    for ax in (ax for ax in warned.axes if ax.get_title() not in ("", "H&E")):
        coloured, crossed = ax.collections
        assert (coloured.get_hatch(), crossed.get_hatch()) == (None, "////")
        np.testing.assert_allclose(crossed.get_offsets(), layer().positions[odd])
        assert ax.get_title().endswith("hatched: unlike the training, 25 % of tiles")
        # Tiles are squares that fill the plane, 40 µm at 2 µm a pixel.
        corners = coloured.get_paths()[0].transformed(Affine2D(coloured.get_transforms()[0]))
        np.testing.assert_allclose(np.ptp(corners.vertices, axis=0), 20)
    assert warned.get_supxlabel().replace("\n", " ") == told
    assert warned.get_size_inches()[1] > silent.get_size_inches()[1]
    assert silent.get_supxlabel() == ""
    assert all(len(ax.collections) < 2 for ax in silent.axes if ax.get_title())


def test_any_gene_name_is_drawn_as_text_and_kept_in_the_folder(tmp_path):
    slide = Slide(ArrayPixels(np.full((300, 300, 3), 200, np.uint8)), 2.0, Path("x.png"))
    out = tmp_path / "maps"
    drawn = layer()
    predictions = AnnData(
        drawn.scores,
        var=pd.DataFrame(index=GENES),
        obsm={"spatial": drawn.positions},
        uns={"strank": {"stride_um": 40.0}},
    )
    paths = write_gene_maps(out, predictions, GENES, slide=slide)
    assert len(set(paths)) == len(GENES)
    assert all(path.parent == out and path.is_file() for path in paths)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["maps"]


def test_a_gene_is_drawn_as_if_it_were_alone(tmp_path):
    rng = np.random.default_rng(0)
    slide = Slide(ArrayPixels(rng.integers(0, 255, (300, 300, 3), np.uint8)), 2.0, Path("x.png"))
    one = rng.normal(size=40)
    predictions = AnnData(
        np.column_stack([one, -one]),
        var=pd.DataFrame(index=["A", "B"]),
        obsm={"spatial": layer().positions},
        uns={"strank": {"stride_um": 40.0}},
    )
    first, second = write_gene_maps(tmp_path / "both", predictions, ["A", "B"], slide=slide)
    [alone] = write_gene_maps(tmp_path / "alone", predictions, ["B"], slide=slide)
    pixels = [np.asarray(Image.open(path)).astype(int) for path in (first, second, alone)]
    np.testing.assert_array_equal(pixels[1], pixels[2])
    assert np.abs(pixels[0] - pixels[1]).mean() > 1


@pytest.mark.parametrize(
    "genes", [["C1orf1", "C1ORF1"], ["Gapdh", "ERBB2", "GAPDH", "gapdh"], ["a/b", "A/B"]]
)
def test_genes_that_differ_in_capitals_have_files_of_their_own(genes, tmp_path):
    slide = Slide(ArrayPixels(np.full((300, 300, 3), 200, np.uint8)), 2.0, Path("x.png"))
    drawn = layer()
    predictions = AnnData(
        drawn.scores[:, : len(genes)],
        var=pd.DataFrame(index=genes),
        obsm={"spatial": drawn.positions},
        uns={"strank": {"stride_um": 40.0}},
    )
    paths = write_gene_maps(tmp_path, predictions, genes, slide=slide)
    assert len({path.name.casefold() for path in paths}) == len(genes)
    assert paths[0].name == f"{safe_name(genes[0])}.png"


def test_layers_have_their_own_sizes_and_values(section_of):
    adata = section_of()
    predictions = AnnData(
        X=np.ones((4, 2), np.float32),
        var=pd.DataFrame(index=["G2", "ABSENT"]),
        obsm={"spatial": np.zeros((4, 2))},
        uns={"strank": {"stride_um": 50.0}},
    )
    assert [found.title for found in map_layers(predictions)] == ["predicted"]
    observed, predicted = map_layers(predictions, adata)
    assert (observed.diameter_um, predicted.diameter_um) == (100.0, 50.0)
    assert list(observed.genes) == ["G2"]
    expected = np.log1p(adata[:, "G2"].X.toarray()[:, 0] / adata.obs["library_size"] * 1e4)
    np.testing.assert_allclose(observed.scores[:, 0], expected - expected.mean())
