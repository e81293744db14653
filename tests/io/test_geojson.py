"""GeoJSON as QuPath imports it: against the schema of RFC 7946, and read back by others."""

from __future__ import annotations

import json

import geopandas
import jsonschema
import numpy as np
import pandas as pd
import pytest
import shapely
from anndata import AnnData

from strank.errors import InputError
from strank.evaluation.regions import outlines
from strank.io import exports as geojson
from strank.io import write_geojson
from strank.io.exports import check_geojson_size, tile_squares

GENES = ["ERBB2", 'HLA/A "<b>"\n', "µ\u2028", "VWF"]

# Trimmed from https://geojson.org/schema/FeatureCollection.json to polygons and numbers.
SCHEMA = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "type": "object",
    "required": ["type", "features"],
    "properties": {
        "type": {"enum": ["FeatureCollection"]},
        "features": {"type": "array", "items": {"$ref": "#/definitions/feature"}},
    },
    "definitions": {
        "feature": {
            "type": "object",
            "required": ["type", "properties", "geometry"],
            "properties": {
                "type": {"enum": ["Feature"]},
                "geometry": {"$ref": "#/definitions/polygon"},
                # Not of the schema: what QuPath reads of a tile.
                "properties": {
                    "type": "object",
                    "required": ["objectType", "measurements"],
                    "properties": {
                        "objectType": {"enum": ["tile"]},
                        "isLocked": {"type": "boolean"},
                        "classification": {
                            "type": "object",
                            "required": ["name", "color"],
                            "properties": {
                                "name": {"type": "string"},
                                "color": {"type": "array", "minItems": 3, "maxItems": 3},
                            },
                        },
                        "measurements": {
                            "type": "object",
                            "additionalProperties": {"type": "number"},
                        },
                    },
                },
            },
        },
        "polygon": {
            "type": "object",
            "required": ["type", "coordinates"],
            "properties": {
                "type": {"enum": ["Polygon"]},
                "coordinates": {
                    "type": "array",
                    "items": {
                        "type": "array",
                        "minItems": 4,
                        "items": {"type": "array", "minItems": 2, "items": {"type": "number"}},
                    },
                },
            },
        },
    },
}


@pytest.fixture
def predictions() -> AnnData:
    """Twelve tiles, 25 µm apart at 0.3 µm a pixel."""
    y, x = np.mgrid[:3, :4].reshape(2, -1) * 25 / 0.3 + 1000 / 3
    scores = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
    return AnnData(
        scores,
        obs=pd.DataFrame(index=[f"tile{i}" for i in range(12)]),
        var=pd.DataFrame(index=GENES),
        obsm={"spatial": np.column_stack([x, y])},
        uns={"strank": {"um_per_pixel": 0.3, "stride_um": 25.0, "tile_um": 100.0}},
    )


@pytest.mark.parametrize("block", [5, 6, 100])
def test_it_is_geojson_with_the_scores_of_the_chosen_genes(
    predictions, tmp_path, monkeypatch, block
):
    monkeypatch.setattr(geojson, "_BLOCK", block)
    write_geojson(predictions, tmp_path / "s.geojson", genes=GENES[:3])
    content = json.loads((tmp_path / "s.geojson").read_text())
    jsonschema.Draft7Validator(SCHEMA).validate(content)
    assert len(content["features"]) == 12
    for feature, scores in zip(content["features"], predictions.X, strict=True):
        measurements = feature["properties"]["measurements"]
        assert list(measurements) == GENES[:3]
        assert list(measurements.values()) == pytest.approx(scores[:3], abs=6e-5)
        # The right-hand rule of the RFC.
        assert shapely.is_ccw(shapely.geometry.shape(feature["geometry"]).exterior)


def test_the_schema_refuses_what_is_no_tile(predictions, tmp_path):
    write_geojson(predictions, tmp_path / "s.geojson", genes=GENES[:1])
    content = json.loads((tmp_path / "s.geojson").read_text())
    content["features"][3]["properties"]["measurements"]["ERBB2"] = "high"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft7Validator(SCHEMA).validate(content)


def test_squares_lie_around_the_tiles_and_fill_the_plane(predictions, tmp_path):
    write_geojson(predictions, tmp_path / "s.geojson", genes=["VWF"])
    # Pixels, whatever the default of the format.
    read = geopandas.read_file(tmp_path / "s.geojson").set_crs(None, allow_override=True)
    centres = np.column_stack([read.centroid.x, read.centroid.y])
    np.testing.assert_allclose(centres, predictions.obsm["spatial"], atol=0.01)
    np.testing.assert_allclose(read.area, (25 / 0.3) ** 2, rtol=1e-3)
    # strank's own reader of regions: together they are the rectangle, without overlap.
    [whole] = outlines(tmp_path / "s.geojson")[0].values()
    assert whole.area == pytest.approx(12 * (25 / 0.3) ** 2, rel=1e-3)
    assert shapely.union_all(tile_squares(predictions)).area == pytest.approx(whole.area, rel=1e-3)


def test_novelty_goes_along(predictions, tmp_path, monkeypatch):
    monkeypatch.setattr(geojson, "_BLOCK", 5)
    predictions.obs["novelty"] = np.linspace(0, 2, 12, dtype=np.float32)
    predictions.obs["odd"] = predictions.obs["novelty"] > 1
    write_geojson(predictions, tmp_path / "s.geojson", genes=["VWF"])
    content = json.loads((tmp_path / "s.geojson").read_text())
    jsonschema.Draft7Validator(SCHEMA).validate(content)
    features = content["features"]
    named = [f["properties"].get("classification", {}).get("name") for f in features]
    assert named == [None] * 6 + ["unlike training"] * 6
    assert [f["properties"]["measurements"]["novelty"] for f in features] == pytest.approx(
        predictions.obs["novelty"], abs=1e-4
    )


def test_its_size_is_bounded(predictions, tmp_path, monkeypatch):
    check_geojson_size(300_000, 10)
    with pytest.raises(InputError, match=r"GeoJSON: 300,000 tiles x 11 genes .* raise `stride_um`"):
        check_geojson_size(300_000, 11)
    monkeypatch.setattr(geojson, "_MOST_NUMBERS", 12 * 11)
    with pytest.raises(InputError, match=r"12 tiles may have 1 genes, 4 genes 9 tiles"):
        write_geojson(predictions, tmp_path / "s.geojson")
    assert not list(tmp_path.iterdir())
    write_geojson(predictions, tmp_path / "s.geojson", genes=["VWF"])


def test_a_full_disk_leaves_nothing(predictions, tmp_path, monkeypatch):
    def full(squares, table, odd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(geojson, "_features", full)
    with pytest.raises(OSError, match="No space"):
        write_geojson(predictions, tmp_path / "s.geojson")
    assert not list(tmp_path.iterdir())
