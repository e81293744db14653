"""Predictions as a SpatialData folder: image, tiles as shapes, scores as their table."""

from __future__ import annotations

import warnings
from pathlib import Path

import geopandas
import numpy as np
import pandas as pd
from anndata import AnnData
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, ShapesModel, TableModel
from spatialdata.transformations import Identity, Scale

from strank.exports.geojson import tile_squares
from strank.files import atomic_path
from strank.slides.image import Slide, thumbnail

__all__ = ["write_spatialdata"]

_IMAGE_UM = 2.0
_MOST_PIXELS = 8192


def write_spatialdata(path: Path, slide: Slide, predictions: AnnData) -> None:
    """Write a SpatialData zarr that napari-spatialdata and squidpy open.

    Its coordinate system ``global`` has pixels of the full image, as ``obsm["spatial"]``. The
    image ``he`` is a pyramid from about 2 µm a pixel on (coarser if that were more than 8192
    pixels a side), the shapes ``tiles`` are squares as wide as the stride, the ``table`` is the
    predictions.

    Parameters
    ----------
    path
        The folder, whole or absent; an older one is replaced.
    slide
        What was predicted.
    predictions
        From `strank.predict.predict_slide`.
    """
    tiles = np.arange(predictions.n_obs)
    squares = geopandas.GeoDataFrame(geometry=tile_squares(predictions), index=tiles)
    table = predictions.copy()
    table.obs["region"], table.obs["tile"] = pd.Categorical(["tiles"] * len(tiles)), tiles
    data = SpatialData(
        images={"he": _image(slide)},
        shapes={"tiles": ShapesModel.parse(squares, transformations={"global": Identity()})},
        tables={
            "table": TableModel.parse(
                table, region="tiles", region_key="region", instance_key="tile"
            )
        },
    )
    with warnings.catch_warnings(), atomic_path(path) as part:
        # anndata announces a default of its next version, once an array.
        warnings.filterwarnings("ignore", "zarr v3 autosharding", UserWarning)
        data.write(part, update_sdata_path=False)


def _image(slide: Slide) -> object:
    side = max(slide.size) * slide.um_per_pixel
    rgb, _ = thumbnail(slide, max(_IMAGE_UM, side / _MOST_PIXELS))
    shrink = [full / n for full, n in zip(slide.size, rgb.shape[1::-1], strict=True)]
    return Image2DModel.parse(
        np.moveaxis(rgb, -1, 0),
        dims=("c", "y", "x"),
        c_coords=["r", "g", "b"],
        scale_factors=[2] * int(np.log2(max(1, min(rgb.shape[:2]) / 256))),
        transformations={"global": Scale(shrink, axes=("x", "y"))},
    )
