"""Regions as QuPath exports them, or a column of ``obs``; and the two that are contrasted."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

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


def collection(features: list) -> dict:
    return {"type": "FeatureCollection", "features": features}


@pytest.mark.parametrize(
    "wrap",
    [
        collection,
        lambda features: features,
        lambda features: collection([collection(features[:2]), collection(features[2:])]),
        lambda features: [collection([collection(features)])],
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
    regions, left_out = outlines(path)
    assert left_out == ["1 polygon with neither class nor name", "1 point or line"]
    found = spots_within(regions, POINTS)
    assert list(found) == ["Tumor", "rim <b>/\\"]
    assert found["Tumor"].tolist() == [True, False, False, False, True]
    assert found["rim <b>/\\"].tolist() == [False, False, True, True, False]
    adata = AnnData(np.zeros((5, 1)), obsm={"spatial": POINTS})
    assert find_regions(adata, str(path))[0]["Tumor"].tolist() == found["Tumor"].tolist()


@pytest.mark.parametrize("content", [WITH_HOLE, feature(WITH_HOLE)])
def test_one_feature_or_geometry_is_one_region(tmp_path, content):
    (tmp_path / "r.json").write_text(json.dumps(content))
    found = spots_within(outlines(tmp_path / "r.json")[0], POINTS)
    assert found["unnamed"].tolist() == [True, False, False, False, False]


def test_collections_within_collections_of_geometries(tmp_path):
    inner = {"type": "GeometryCollection", "geometries": [WITH_HOLE]}
    both = {"type": "GeometryCollection", "geometries": [TWO, inner]}
    point = {"type": "GeometryCollection", "geometries": [{"type": "Point", "coordinates": [9, 9]}]}
    path = tmp_path / "r.geojson"
    path.write_text(json.dumps([feature(both, name="both"), feature(point, name="point")]))
    regions, left_out = outlines(path)
    assert left_out == ["1 point or line"]
    found = spots_within(regions, POINTS)
    assert found["both"].tolist() == [True, False, True, True, False]


def test_an_outline_that_crosses_itself_is_mended(tmp_path):
    bow = {"type": "Polygon", "coordinates": [[[0, 0], [4, 4], [4, 0], [0, 4], [0, 0]]]}
    path = tmp_path / "r.geojson"
    path.write_text(json.dumps([feature(bow, name="bow"), feature(TWO, name="bow")]))
    regions, _ = outlines(path)
    assert shapely.is_valid(regions["bow"])
    inside = spots_within(regions, np.array([[1, 2], [3, 2], [2, 1], [22, 2]], float))
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
        ('{"type": "FeatureCollection", "features": null}', "no list of features"),
        ('[{"type": "Feature", "geometry": 3}]', "geometry of feature 0"),
        ('[{"geometry": {"type": "Circle", "coordinates": [0, 0]}}]', "geometry of feature 0"),
        ("[" * 100_000, "more than 200 deep"),
        ('[{"properties": {"label": %s}}]' % ("[" * 600 + "]" * 600), "more than 200 deep"),
        ('{"type": "Polygon", "coordinates": [[[0, 0], [1, 1%s], [1, 1]]]}' % ("0" * 400), "0 \\("),
        (
            '{"type": "GeometryCollection", "geometries": [' * 300 + "]}" * 300,
            "more than 200 deep",
        ),
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


@pytest.mark.parametrize(
    ("properties", "name"),
    [
        # QuPath 0.4 and later.
        ({"classification": {"name": " Tumor ", "color": [1, 2, 3]}, "name": "x"}, "Tumor"),
        ({"classification": {"names": ["Tumor", "Invasive"]}}, "Tumor: Invasive"),
        ({"classification": {"names": ["A", "B ", "C"], "color": [1, 2, 3]}}, "A: B: C"),
        # Until 0.3.
        ({"classification": {"name": "Tumor", "colorRGB": -3670016}}, "Tumor"),
        (
            {"classification": {"parentClass": {"name": "Tumor"}, "name": "Positive"}},
            "Tumor: Positive",
        ),
        (
            {
                "classification": {
                    "parentClass": {"parentClass": {"name": "A"}, "name": "B", "colorRGB": 1},
                    "name": "C",
                }
            },
            "A: B: C",
        ),
        # Text, JSON in a text, what pandas writes.
        ({"classification": "Tumor", "name": "x"}, "Tumor"),
        ({"classification": '{"name": "Tumor", "color": [1, 2, 3]}'}, "Tumor"),
        ({"classification": ' { "names": [ "Tumor", "Invasive" ] }'}, "Tumor: Invasive"),
        ({"classification": "{'names': ['Tumor', 'Invasive'], 'color': None}"}, "Tumor: Invasive"),
        ({"classification": ["Tumor", "Invasive"]}, "Tumor: Invasive"),
        ({"classification": "[Tumor]"}, "[Tumor]"),
        ({"classification": "{Tumor"}, "{Tumor"),
        # No class: the name, else the label.
        ({"classification": None, "name": "rim", "label": "x"}, "rim"),
        ({"classification": {"name": None}, "name": "rim"}, "rim"),
        ({"classification": {"color": [1, 2, 3]}, "name": " ", "label": "rim"}, "rim"),
        ({"classification": "nan", "name": "NA", "label": "rim"}, "rim"),
        ({"label": 7}, "7"),
        ({"label": 7.0}, "7"),
        ({"label": {"value": "rim"}}, "rim"),
        ({"name": "unnamed"}, "unnamed"),
        ({"name": "rim \ud800"}, "rim ?"),
    ],
)
def test_the_class_of_every_qupath_and_of_what_went_through_tables(tmp_path, properties, name):
    path = tmp_path / "r.geojson"
    path.write_text(json.dumps([feature(TWO, **properties), feature(WITH_HOLE, name="other")]))
    regions, left_out = outlines(path)
    assert list(regions) == [name, "other"]
    assert left_out == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("classification", True),
        ("classification", {"name": False, "names": [True]}),
        ("classification", '{"name": true}'),
        ("name", [["a"], True]),
    ],
)
def test_what_is_no_class_is_told_with_feature_and_field(tmp_path, field, value):
    path = tmp_path / "r.geojson"
    path.write_text(json.dumps([feature(TWO, name="a"), feature(TWO, **{field: value})]))
    with pytest.raises(
        InputError, match=rf"r\.geojson: properties\.{field} of feature 1 is no name: .*give"
    ):
        outlines(path)


@pytest.mark.parametrize(
    "nothing",
    [
        None,
        {"type": "Polygon", "coordinates": []},
        {"type": "GeometryCollection", "geometries": []},
    ],
)
def test_features_without_an_outline_are_skipped_and_counted(tmp_path, nothing):
    path = tmp_path / "r.geojson"
    without = {"type": "Feature", "properties": {"name": "slide note"}}
    line = {"type": "LineString", "coordinates": [[0, 0], [1, float("nan")]]}
    features = [feature(nothing), feature(WITH_HOLE, name="a"), without, feature(line, name="a")]
    path.write_text(json.dumps(features))
    regions, left_out = outlines(path)
    assert list(regions) == ["a"]
    assert left_out == ["2 features without an outline", "1 point or line"]
    path.write_text(json.dumps([feature(nothing), without]))
    with pytest.raises(InputError, match="no polygon there"):
        outlines(path)


def test_objects_within_objects_are_regions_too(tmp_path):
    path = tmp_path / "r.geojson"
    child = feature(TWO, name="inner", childObjects=[feature(TWO, name="innermost")])
    features = [feature(None, childObjects=[child]), feature(WITH_HOLE, name="outer")]
    path.write_text(json.dumps(features))
    assert list(outlines(path)[0]) == ["inner", "innermost", "outer"]


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]
)
def test_text_of_any_unicode_is_read(tmp_path, encoding):
    path = tmp_path / "r.geojson"
    text = json.dumps([feature(TWO, name="Geschwür µ 癌")], ensure_ascii=False)
    path.write_bytes(text.encode(encoding))
    assert list(outlines(path)[0]) == ["Geschwür µ 癌"]


@pytest.mark.parametrize(
    "damage", [lambda t: t.encode("cp1252"), lambda t: gzip.compress(t.encode())]
)
def test_what_is_not_unicode_is_told(tmp_path, damage):
    path = tmp_path / "r.geojson"
    path.write_bytes(damage(json.dumps([feature(TWO, name="Geschwür")], ensure_ascii=False)))
    with pytest.raises(InputError, match=r"r\.geojson: not a readable JSON.*save it as UTF-8$"):
        outlines(path)


def test_the_nameless_are_never_beside_the_named(tmp_path):
    path = tmp_path / "r.geojson"
    tiles = AnnData(np.zeros((5, 1)), obsm={"spatial": POINTS})
    for blank in ({}, {"classification": None}, {"name": " "}, {"label": "nan"}):
        path.write_text(json.dumps([feature(TWO, **blank), feature(WITH_HOLE, name="Tumor")]))
        regions, left_out = find_regions(tiles, str(path))
        assert list(regions) == ["Tumor"]
        for between in (None, "Tumor,unnamed"):
            with pytest.raises(
                InputError, match=r"r.* has Tumor \(left out: 2 polygons with neither class nor"
            ):
                choose_pair(regions, between, source="r", left_out=left_out)
    path.write_text(json.dumps([feature(TWO), feature(WITH_HOLE)]))
    regions, left_out = find_regions(tiles, str(path))
    with pytest.raises(InputError, match=r"r has unnamed: .* regions; give each a class in QuPath"):
        choose_pair(regions, None, source="r", left_out=left_out)


@pytest.mark.parametrize("name", ["bom_json", "class_text", "names_array", "null_geometry"])
def test_files_that_were_refused_or_misread(name):
    path = Path(__file__).parents[3] / f"shared/cases/geojson_{name}/regions.geojson"
    if not path.is_file():
        pytest.skip("no shared cases")
    regions, left_out = outlines(path)
    derived = ["Tumor: Positive", "Tumor: Negative"] if name == "names_array" else ["Tumor"]
    assert list(regions) == [*derived, "Stroma"]
    assert left_out == ["1 feature without an outline"] * (name == "null_geometry")


def test_labels_that_are_no_names():
    labels = ["a ", " a", "b", "nan", "NA", None, "", np.nan, "None"]
    regions, left_out = find_regions(AnnData(np.zeros((9, 1))), labels)
    assert {name: inside.nonzero()[0].tolist() for name, inside in regions.items()} == {
        "a": [0, 1],
        "b": [2],
    }
    assert left_out == ["3 spots with the label NA, None, nan"]
    # Of clusters where some are missing tables make fractions.
    for clusters in ([1.0, 2.0, np.nan], [1, 2, None], ["1", "2", "#N/A"], [1, np.float32(2), ""]):
        regions, _ = find_regions(AnnData(np.zeros((3, 1))), clusters)
        assert list(regions) == ["1", "2"]


def test_a_column_of_obs():
    obs = pd.DataFrame({"niche": pd.Categorical(["b", None, "a", "b"])}, index=list("wxyz"))
    adata = AnnData(np.zeros((4, 1)), obs=obs)
    found, left_out = find_regions(adata, "niche")
    assert left_out == []
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
    assert choose_pair(regions, (" Tumor", "Stroma"), source="x") == ("Tumor", "Stroma")
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
    assert not find_regions(tiles, str(path))[0]["Tumor"].any()
    path.write_text(json.dumps([far]))
    with pytest.raises(
        InputError,
        match=r"regions\.geojson: region 'Tumor' at x 1000 to 1050, y 200 to 250; but spots lie at "
        r"x 1 to 99, y 1 to 99 \(pixels of the full image\): are the regions of this slide",
    ):
        find_regions(tiles, str(path))
    # A single tile has no extent, and lies in a region all the same.
    one = AnnData(np.zeros((1, 1)), obsm={"spatial": np.array([[1010.0, 210.0]])})
    assert find_regions(one, str(path))[0]["Tumor"].all()
