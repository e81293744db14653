"""SpatialData objects: a table, the element that it annotates, and an image, brought together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from strank.cohort.arrays import measured_um
from strank.cohort.store import check_matrices
from strank.errors import InputError, said_by, some
from strank.extras import need
from strank.files import read_json
from strank.io.generic import (
    object_counts,
    object_patient,
    object_spots,
    read_object,
)
from strank.io.patches import BAND, image_file, write_tiff
from strank.io.sections import Patients
from strank.io.tables import check_unique

_ZARR = ("zarr.json", ".zarray", ".zmetadata")
# Keys of metadata that name no array.
_LEVELS = ("consolidated_metadata", "metadata")
# What a folder may ask for: so many times its size, and what small ones may.
_TIMES, _SMALL = 100, 2**26


def read_spatialdata(
    path: Path | str,
    *,
    image: Path | str | None = None,
    section: str | None = None,
    patient: str | None = None,
    patients: Patients = None,
    um_per_pixel: float | None = None,
    um_per_pixel_override: bool = False,
    gene_id: bool = False,
    layer: str | None = None,
    table: str | None = None,
    image_folder: Path | str | None = None,
) -> AnnData:
    """Read a SpatialData zarr, one section, into the data contract.

    Parameters
    ----------
    path
        The zarr. The table annotates one element: shapes, points or labels.
    image
        The name of an image of the object; or an image file whose pixels are the units of the
        coordinate system ``global``. ``None`` for the only image of the object.
    section
        Name; ``None`` for that of the zarr.
    patient, patients, um_per_pixel_override, gene_id
        As in `read_visium`; the first two come before ``obs["patient"]``.
    um_per_pixel
        Of the image; if ``None``, as an array of spots measures it, or as stored in a file.
    layer
        Where raw counts are in the table, as in `read_anndata`.
    table
        Name of the table; ``None`` for the only one.
    image_folder
        Where an image of the object is written at full resolution, ``<section>.tif``, since a
        section belongs to an image file.

    Returns
    -------
    AnnData
        ``X`` the raw counts ``[n_spots, n_genes]``, ``obsm["spatial"]`` the centres of what the
        table annotates in pixels of the image.

    Raises
    ------
    InputError
        For a folder that is no such zarr, elements that are absent or not the only ones, counts
        that are not raw, or an image that does not fit.

    Examples
    --------
    >>> import strank
    >>> strank.io.read_spatialdata("mine.zarr", um_per_pixel=0.5, image_folder="images")
    Traceback (most recent call last):
    ...
    strank.errors.InputError: mine.zarr: no such folder; a SpatialData zarr is one
    """
    path = Path(path)
    section = section or path.stem
    data = _open_zarr(path)
    adata = data.tables[_only(data.tables, table, path, "table")].copy()
    check_matrices(adata, path)
    patient = object_patient(adata, section, patient, patients)
    chosen = None if _is_file(image, data, path) else _only(data.images, image, path, "image")
    try:
        element, rows = _annotated(data, adata, path)
        centres = _centres(element, None if chosen is None else data.images[chosen], path)
    except InputError:
        raise
    except Exception as error:  # each of the libraries has its own kinds
        raise _damaged(path, error) from error
    check_unique(centres.index, f"{path}: instance")
    absent = rows[~rows.isin(centres.index)]
    if len(absent):
        raise InputError(f"{path}: the table annotates {some(absent)}, which the element lacks")
    adata.obsm["spatial"] = centres.loc[rows, ["x", "y"]].to_numpy()
    object_counts(adata, path, layer)  # refused before an image is written
    if chosen is not None and um_per_pixel is None:
        um_per_pixel = measured_um(object_spots(adata, path))
    if chosen is None:
        file = Path(str(image))
    elif um_per_pixel is None:
        raise InputError(
            f"{path}: µm per pixel of image {chosen} is not known; give it with `um_per_pixel`"
        )
    else:
        file = image_file(path, section, image_folder)
        _write_image(data.images[chosen], file, um_per_pixel, path)
    how: dict[str, Any] = {"um_per_pixel": um_per_pixel, "gene_id": gene_id, "layer": layer}
    how["um_per_pixel_override"] = um_per_pixel_override
    return read_object(adata, path, section, image=file, patient=patient, **how)


def _is_file(image: Path | str | None, data: Any, path: Path) -> bool:
    if image is None or str(image) in data.images:
        return False
    if not Path(image).is_file():
        raise InputError(
            f"{image}: neither a file nor an image of {path}, which has "
            f"{some(data.images) or 'none'}"
        )
    return True


def _open_zarr(path: Path) -> Any:
    need("spatialdata", "geopandas")
    import spatialdata

    if not path.is_dir():
        raise InputError(f"{path}: no such folder; a SpatialData zarr is one")
    _check_arrays(path)
    try:
        return spatialdata.read_zarr(path)
    except Exception as error:  # zarr, ome-zarr and pyarrow raise many kinds for a damaged store
        raise _damaged(path, error) from error


def _check_arrays(path: Path) -> None:
    """Refuse arrays of far more than the folder can hold; those of images are read by chunks."""
    held = [file for file in path.rglob("*") if file.is_file()]
    most = _SMALL + _TIMES * sum(file.stat().st_size for file in held)
    asked = 0
    for file in held:
        if file.name in _ZARR:
            try:
                asked += _asked(read_json(file), file.parent.relative_to(path).as_posix())
            except InputError as error:
                raise _damaged(path, error) from error
    # Each is described twice where all of them are described at the top, too.
    if asked > 2 * most:
        raise InputError(
            f"{path}: asks for {asked / 2e9:.3g} GB of memory, by a small folder; write it again"
        )


def _asked(node: Any, where: str) -> int:
    """Bytes of the arrays that metadata describe, or of a chunk of those that are images."""
    if not isinstance(node, dict):
        return 0
    sizes = node.get("shape")
    if isinstance(sizes, list) and where.startswith(("images", "labels")):
        grid = node.get("chunk_grid", node)
        grid = grid.get("configuration", grid) if isinstance(grid, dict) else {}
        sizes = grid.get("chunk_shape", grid.get("chunks")) if isinstance(grid, dict) else None
    if isinstance(sizes, list):
        return 8 * math.prod(abs(n) for n in sizes if isinstance(n, int))
    return sum(_asked(part, where if name in _LEVELS else name) for name, part in node.items())


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(f"{path}: not a readable SpatialData zarr ({said_by(error)})")


def _only(elements: Any, wanted: Path | str | None, path: Path, what: str) -> str:
    names = sorted(elements)
    if wanted is not None and str(wanted) in names:
        return str(wanted)
    if wanted is None and len(names) == 1:
        return str(names[0])
    if not names:
        raise InputError(f"{path}: holds no {what}" + "; give `image=FILE`" * (what == "image"))
    which = "several" if wanted is None else f"no {wanted}, but"
    raise InputError(f"{path}: {which} {what}s: {some(names, 20)}; choose one with `{what}`")


def _annotated(data: Any, adata: AnnData, path: Path) -> tuple[Any, pd.Index]:
    """Find the element that a table annotates, and the element's row of each row of the table."""
    attrs = adata.uns.get("spatialdata_attrs", {})
    regions = np.unique(np.atleast_1d(attrs.get("region", [])))
    if len(regions) != 1:
        raise InputError(
            f"{path}: the table annotates {some(regions) or 'no element'}, and one is needed; save "
            "each section as a SpatialData of its own (SpatialData.subset)"
        )
    if str(regions[0]) not in data:
        raise InputError(f"{path}: the table annotates {regions[0]}, which is not there")
    return data[str(regions[0])], pd.Index(adata.obs[attrs["instance_key"]])


def _centres(element: Any, image: Any | None, path: Path) -> pd.DataFrame:
    """Centres (x, y) of an element in pixels of the image, or in ``global`` without one."""
    from spatialdata import get_centroids
    from spatialdata.transformations import get_transformation

    systems = set(get_transformation(element, get_all=True))
    if image is not None:
        systems &= set(get_transformation(image, get_all=True))
    if not systems or (image is None and "global" not in systems):
        raise InputError(f"{path}: the spots and the image have no coordinate system in common")
    system = "global" if "global" in systems else sorted(systems)[0]
    points = get_centroids(element, coordinate_system=system)
    index = points.index.compute() if hasattr(points.index, "compute") else points.index
    positions = np.column_stack([np.asarray(points[axis]) for axis in ("x", "y")])
    if image is not None:
        to_system = get_transformation(image, to_coordinate_system=system)
        matrix = np.linalg.inv(to_system.to_affine_matrix(("x", "y"), ("x", "y")))
        positions = positions @ matrix[:2, :2].T + matrix[:2, 2]
    return pd.DataFrame(positions, index=index, columns=["x", "y"])


def _computed(block: Any, path: Path) -> Any:
    try:
        return block.compute()
    except Exception as error:  # each codec has its own kinds
        raise _damaged(path, error) from error


def _write_image(image: Any, file: Path, um_per_pixel: float, path: Path) -> None:
    """Write the full resolution of an image, RGB, a band at a time."""
    # Several scales are a tree of images, one scale is an image.
    pixels = image["scale0"]["image"] if hasattr(image, "data_vars") else image
    array = pixels.transpose("y", "x", "c").data[..., :3]
    if array.dtype != np.uint8 or array.shape[2] != 3:
        raise InputError(
            f"{path}: the image is {array.dtype} with {array.shape[2]} channels, not RGB of 8 bits "
            "a colour; give `image=FILE`"
        )
    height, width = array.shape[:2]
    # A band is cut from several of its own height, so that chunks are not decoded once for each.
    step = BAND * max(1, array.chunksize[0] // BAND)
    bands: Iterator[NDArray[np.uint8]] = (
        block[y : y + BAND]
        for top in range(0, height, step)
        for block in [_computed(array[top : top + step], path)]
        for y in range(0, len(block), BAND)
    )
    write_tiff(file, bands, (width, height), um_per_pixel)
