"""Regions as QuPath exports them, or a column of ``obs``; and the two that are contrasted."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import shapely
from anndata import AnnData

from strank.errors import InputError
from strank.evaluation.regions import choose_pair, disjoint, find_regions, outlines, spots_within


def feature(geometry: dict, **properties) -> dict:
    return {"type": "Feature", "geometry": geometry, "properties": properties}


def square(x: float, y: float, side: float) -> list:
    return [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]


WITH_HOLE = {"type": "Polygon", "coordinates": [square(0, 0, 10), square(4, 4, 2)]}
TWO = {"type": "MultiPolygon", "coordinates": [[square(20, 0, 5)], [square(40, 0, 5)]]}
POINTS = np.array([[1, 1], [5, 5], [22, 2], [42, 2], [99, 99]], float)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda features: {"type": "FeatureCollection", "features": features},
        lambda features: features,
    ],
)
def test_regions_as_qupath_exports_them(tmp_path, wrap):
    path = tmp_path / "regions.geojson"
    tumour = {"objectType": "annotation", "classification": {"name": "Tumor", "color": [1, 2, 3]}}
    features = [
        feature(WITH_HOLE, **tumour),
        feature(TWO, name="rim <b>/\\"),
        feature({"type": "Point", "coordinates": [99, 99]}, name="a point"),
        feature({"type": "Polygon", "coordinates": [square(90, 90, 20)]}, **tumour, name="x"),
        {**feature({"type": "Polygon", "coordinates": [square(60, 60, 2)]}), "properties": None},
    ]
    path.write_text(json.dumps(wrap(features)))
    found = spots_within(outlines(path), POINTS)
    assert list(found) == ["Tumor", "rim <b>/\\", "unnamed"]
    assert found["Tumor"].tolist() == [True, False, False, False, True]
    assert found["rim <b>/\\"].tolist() == [False, False, True, True, False]
    adata = AnnData(np.zeros((5, 1)), obsm={"spatial": POINTS})
    assert find_regions(adata, str(path))["Tumor"].tolist() == found["Tumor"].tolist()


@pytest.mark.parametrize("content", [WITH_HOLE, feature(WITH_HOLE)])
def test_one_feature_or_geometry_is_one_region(tmp_path, content):
    (tmp_path / "r.json").write_text(json.dumps(content))
    found = spots_within(outlines(tmp_path / "r.json"), POINTS)
    assert found["unnamed"].tolist() == [True, False, False, False, False]


def test_an_outline_that_crosses_itself_is_mended(tmp_path):
    bow = {"type": "Polygon", "coordinates": [[[0, 0], [4, 4], [4, 0], [0, 4], [0, 0]]]}
    path = tmp_path / "r.geojson"
    path.write_text(json.dumps([feature(bow, name="bow"), feature(TWO, name="bow")]))
    assert shapely.is_valid(outlines(path)["bow"])
    inside = spots_within(outlines(path), np.array([[1, 2], [3, 2], [2, 1], [22, 2]], float))
    assert inside["bow"].tolist() == [True, True, False, True]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a readable JSON file"),
        ('{"a": 1}', "not GeoJSON as QuPath exports it"),
        ("[3]", "not GeoJSON"),
        ('{"type": "Polygon", "coordinates": [[[0, 0], [1, null]]]}', "not GeoJSON"),
        ('{"type": "Polygon", "coordinates": []}', "no polygon there"),
        ('{"type": "Point", "coordinates": [0, 0]}', "no polygon there"),
        ('{"type": "FeatureCollection", "features": []}', "no polygon there"),
        (
            '{"type": "Polygon", "coordinates": [[[0, 0], [1, Infinity], [1, 1], [0, 0]]]}',
            "feature 0 has coordinates that are not finite",
        ),
    ],
)
def test_a_file_without_regions_is_refused(tmp_path, text, message):
    (tmp_path / "r.geojson").write_text(text)
    with pytest.raises(InputError, match=rf"r\.geojson.*{message}"):
        outlines(tmp_path / "r.geojson")


def test_a_column_of_obs():
    obs = pd.DataFrame({"niche": pd.Categorical(["b", None, "a", "b"])}, index=list("wxyz"))
    adata = AnnData(np.zeros((4, 1)), obs=obs)
    found = find_regions(adata, "niche")
    assert {name: inside.tolist() for name, inside in found.items()} == {
        "a": [False, False, True, False],
        "b": [True, False, False, True],
    }
    with pytest.raises(InputError, match=r"neither a file nor a column of obs.*niche"):
        find_regions(adata, "tissue")
    with pytest.raises(InputError, match=r"absent\.geojson: no such file"):
        find_regions(adata, "absent.geojson")


def test_two_regions_are_chosen_by_name():
    regions = {name: np.ones(1, bool) for name in ("Immune, cells", "Tumor", "Stroma")}
    assert choose_pair(regions, "Stroma , Tumor", source="x") == ("Stroma", "Tumor")
    assert choose_pair(regions, "Tumor,Immune, cells", source="x") == ("Tumor", "Immune, cells")
    for wrong in ("Tumor", "Tumor,Tumor", "Tumor,Fat", "Tumor,Stroma,x", ""):
        with pytest.raises(InputError, match=r"give two regions.*x has Immune, cells, Tumor, Str"):
            choose_pair(regions, wrong, source="x")
    with pytest.raises(InputError, match="needs two regions; choose with `between"):
        choose_pair(regions, None, source="x")
    with pytest.raises(InputError, match=r"x has Tumor: a contrast needs two regions$"):
        choose_pair({"Tumor": np.ones(1, bool)}, None, source="x")
    with pytest.raises(InputError, match="x has no region"):
        choose_pair({}, None, source="x")


def test_spots_in_both_regions_are_in_neither():
    regions = {"a": np.array([1, 1, 0], bool), "b": np.array([0, 1, 1], bool)}
    found, shared = disjoint(regions, ("b", "a"))
    assert list(found) == ["b", "a"]
    assert shared == 1
    assert not (found["a"] | found["b"])[1]


def test_regions_outside_the_slide_are_refused(tmp_path):
    path = tmp_path / "regions.geojson"
    far = feature({"type": "Polygon", "coordinates": [square(1000, 200, 50)]}, name="Tumor")
    path.write_text(json.dumps([far, feature(TWO, name="rim")]))
    tiles = AnnData(np.zeros((5, 1)), obsm={"spatial": POINTS})
    # One that is near is enough: which regions are needed is not known here.
    assert not find_regions(tiles, str(path))["Tumor"].any()
    path.write_text(json.dumps([far]))
    with pytest.raises(
        InputError,
        match=r"regions\.geojson: region 'Tumor' at x 1000 to 1050, y 200 to 250; but spots lie at "
        r"x 1 to 99, y 1 to 99 \(pixels of the full image\): are the regions of this slide",
    ):
        find_regions(tiles, str(path))
    # A single tile has no extent, and lies in a region all the same.
    one = AnnData(np.zeros((1, 1)), obsm={"spatial": np.array([[1010.0, 210.0]])})
    assert find_regions(one, str(path))["Tumor"].all()
