from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from matplotlib.collections import EllipseCollection
from PIL import Image

from strank.files import safe_name
from strank.report.maps import MapLayer, draw_maps, map_layers, write_gene_maps
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
    np.testing.assert_allclose(marks.get_offsets(), layer().positions / 2)
    labels = [ax.get_ylabel() for ax in figure.axes]
    assert "log relative expression" in labels


def test_a_flat_map_looks_flat():
    figure = draw_maps(np.zeros((150, 150, 3), np.uint8), 2.0, 2.0, [layer(0.01)], "CD24")
    assert marks_of(figure).get_clim()[1] == pytest.approx(np.log(1.5))


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
