"""Predictions in the formats of other tools: GeoJSON for QuPath, SpatialData."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path

import geopandas
import numpy as np
import pandas as pd
import shapely
from anndata import AnnData
from numpy.typing import NDArray
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, ShapesModel, TableModel
from spatialdata.transformations import Identity, Scale

from strank.errors import InputError
from strank.slides.slide import Slide, open_slide, thumbnail
from strank.storage import new_file, new_folder

# About 100 MB, what QuPath opens without complaint; an outline is ten numbers.
_MOST_NUMBERS = 6_000_000
_OUTLINE = 10
_BLOCK = 10_000
# What QuPath colours tiles by, and lists beside their measurements.
_ODD = '"classification":{"name":"unlike training","color":[230,120,0]},'
_IMAGE_UM = 2.0
_MOST_PIXELS = 8192


def check_geojson_size(n_tiles: int, n_genes: int, errors: bool = False) -> None:
    """Refuse more than 6 million numbers, where a tile has one a gene and ten for its outline.

    >>> check_geojson_size(300_000, 100)
    Traceback (most recent call last):
    ...
    strank.errors.InputError: GeoJSON: 300,000 tiles x 100 genes are more than QuPath opens \
(300,000 tiles may have 10 genes, 100 genes 54,545 tiles); name fewer `genes`, or raise `stride_um`
    """
    a_tile = n_genes * (1 + errors) + _OUTLINE
    if n_tiles * a_tile <= _MOST_NUMBERS:
        return
    fewer = max(0, _MOST_NUMBERS // n_tiles - _OUTLINE) // (1 + errors)
    raise InputError(
        f"GeoJSON: {n_tiles:,} tiles x {n_genes} genes are more than QuPath opens "
        f"({n_tiles:,} tiles may have {fewer} genes, {n_genes} genes "
        f"{_MOST_NUMBERS // a_tile:,} tiles); name fewer `genes`, or raise "
        "`stride_um`"
    )


def tile_squares(predictions: AnnData) -> NDArray[np.object_]:
    """Squares around the centres of tiles, as wide as the stride, in pixels of the full image."""
    # So they fill the plane without overlap, whatever the size of the windows that were scored.
    facts = predictions.uns["strank"]
    half = float(facts["stride_um"]) / float(facts["um_per_pixel"]) / 2
    x, y = np.asarray(predictions.obsm["spatial"], dtype=np.float64).T
    return np.asarray(shapely.box(x - half, y - half, x + half, y + half))


def write_geojson(
    predictions: AnnData, path: Path | str, *, genes: Sequence[str] | None = None
) -> None:
    """Write predictions as GeoJSON for QuPath: tiles with the scores of some genes.

    It is a FeatureCollection of squares as wide as the stride, in pixels of the full image; scores,
    to four decimals, are their ``properties.measurements``; where the predictions have them, with
    ``novelty`` and, after each gene's name, the standard error of its score, as ``ERBB2 se``.
    Tiles unlike the training (``obs["odd"]``) have a classification that says so, in orange.

    Parameters
    ----------
    predictions
        From `strank.predict`.
    path
        The file; whole or absent.
    genes
        Whose scores; ``None`` for all.

    Raises
    ------
    InputError
        If there are more tiles and genes than QuPath opens (6 million numbers, of which a tile has
        one a gene, or two with standard errors, and ten for its outline).

    Examples
    --------
    >>> import json
    >>> import tempfile
    >>> import numpy as np
    >>> import strank
    >>> from anndata import AnnData
    >>> predictions = AnnData(np.array([[0.5], [-0.5]], np.float32))
    >>> predictions.var_names = ["ERBB2"]
    >>> predictions.obsm["spatial"] = np.array([[100.0, 100.0], [150.0, 100.0]])
    >>> predictions.uns["strank"] = {"um_per_pixel": 0.5, "stride_um": 25.0}
    >>> path = Path(tempfile.mkdtemp()) / "scores.geojson"
    >>> strank.io.write_geojson(predictions, path)
    >>> json.loads(path.read_text())["features"][0]["properties"]["measurements"]
    {'ERBB2': 0.5}
    """
    genes = list(predictions.var_names if genes is None else genes)
    unsure = "se" in predictions.layers
    check_geojson_size(predictions.n_obs, len(genes), unsure)
    chosen = predictions[:, genes]
    table = pd.DataFrame(np.asarray(chosen.X, dtype=np.float64), columns=pd.Index(genes))
    if unsure:
        errors = np.asarray(chosen.layers["se"], dtype=np.float64)
        table = table.join(pd.DataFrame(errors, columns=[f"{gene} se" for gene in genes]))
    if "novelty" in predictions.obs:
        table["novelty"] = predictions.obs["novelty"].to_numpy(np.float64)
    odd = predictions.obs.get("odd", pd.Series(False, predictions.obs_names)).to_numpy(bool)
    # Hundredths of a pixel: more would only be digits.
    squares = shapely.set_precision(tile_squares(predictions), 0.01, mode="pointwise")
    with new_file(Path(path)) as part, TextIOWrapper(part, "utf-8", newline="") as file:
        file.write('{"type":"FeatureCollection","features":[')
        for start in range(0, len(table), _BLOCK):
            rows = slice(start, start + _BLOCK)
            file.write(",\n" if start else "\n")
            file.write(",\n".join(_features(squares[rows], table[rows], odd[rows])))
        file.write("\n]}\n")


def _features(
    squares: NDArray[np.object_], table: pd.DataFrame, odd: NDArray[np.bool_]
) -> list[str]:
    lines = table.to_json(orient="records", lines=True, double_precision=4).strip().split("\n")
    return [
        f'{{"type":"Feature","geometry":{square},"properties":'
        f'{{"objectType":"tile","isLocked":true,{_ODD if unlike else ""}'
        f'"measurements":{measurements}}}}}'
        for square, measurements, unlike in zip(
            shapely.to_geojson(squares), lines, odd, strict=True
        )
    ]


def write_spatialdata(
    predictions: AnnData, path: Path | str, *, image: Path | str | None = None
) -> None:
    """Write predictions as a SpatialData zarr, which napari-spatialdata and squidpy open.

    Its coordinate system ``global`` has pixels of the full image, as ``obsm["spatial"]``. The
    image ``he`` is a pyramid from about 2 µm a pixel on (coarser if that were more than 8192
    pixels a side), the shapes ``tiles`` are squares as wide as the stride, the ``table`` is the
    predictions.

    Parameters
    ----------
    predictions
        From `strank.predict`.
    path
        The folder, whole or absent; an older one is replaced.
    image
        The slide that was scored; ``None`` for where it was then.

    Raises
    ------
    InputError
        For an image that is absent or damaged.

    Examples
    --------
    >>> import strank
    >>> predictions = strank.predict("slide.svs", model)  # doctest: +SKIP
    >>> strank.io.write_spatialdata(predictions, "scores.zarr")  # doctest: +SKIP
    """
    facts = predictions.uns["strank"]
    where = Path(str(facts["image"]) if image is None else image)
    slide = open_slide(where, float(facts["um_per_pixel"]))
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
    with warnings.catch_warnings(), new_folder(Path(path)) as part:
        # anndata announces a default of its next version, once an array.
        warnings.filterwarnings("ignore", "zarr v3 autosharding", UserWarning)
        # It wants to make its folder itself.
        data.write(part / "made", update_sdata_path=False)
        for made in (part / "made").iterdir():
            made.rename(part / made.name)
        (part / "made").rmdir()


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
