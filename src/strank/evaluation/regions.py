"""Which spots lie in which region: a column of ``obs``, or polygons in GeoJSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import shapely
from anndata import AnnData
from numpy.typing import NDArray
from shapely.errors import ShapelyError
from shapely.geometry import shape

from strank.errors import InputError, some
from strank.files import read_json

# Region to which of the spots lie in it, ``[n_spots]``.
Regions = dict[str, NDArray[np.bool_]]
# A GeoJSON file, a column of ``obs``, or a label for each spot.
Groups: TypeAlias = str | Path | list[Any] | NDArray[Any] | pd.Series

_POLYGONS = [shapely.GeometryType.POLYGON, shapely.GeometryType.MULTIPOLYGON]
_DAMAGE = (AttributeError, LookupError, TypeError, ValueError, ShapelyError)


def find_regions(spots: AnnData, groups: Groups) -> Regions:
    """Tell which spots lie in which region; a spot without a label lies in none."""
    if not isinstance(groups, (str, Path)):
        labels = pd.Series(np.asarray(groups, dtype=object))
        if len(labels) != spots.n_obs:
            raise InputError(f"`groups` has {len(labels)} labels for {spots.n_obs} spots")
        return _labelled(labels)
    if groups in spots.obs:
        return _labelled(spots.obs[groups])
    path = Path(groups)
    if not path.is_file() and path.suffix.lower() not in (".geojson", ".json"):
        raise InputError(
            f"`groups={groups}`: neither a file nor a column of obs; its columns are "
            f"{some(spots.obs.columns, 20) or 'none'}"
        )
    regions = outlines(path)
    if "spatial" not in spots.obsm:
        raise InputError('obsm["spatial"] is needed: positions in pixels of the full image')
    positions = np.asarray(spots.obsm["spatial"], dtype=np.float64)
    _check_near(path, regions, positions)
    return spots_within(regions, positions)


def _labelled(labels: pd.Series) -> Regions:
    known, values = labels.notna(), labels.astype(str)
    return {name: (known & (values == name)).to_numpy() for name in sorted(set(values[known]))}


def spots_within(regions: Mapping[str, Any], positions: NDArray[np.float64]) -> Regions:
    """Tell which centres lie inside which geometry."""
    return {
        name: np.asarray(shapely.contains_xy(region, positions[:, 0], positions[:, 1]))
        for name, region in regions.items()
    }


def outlines(path: Path) -> dict[str, Any]:
    """Read regions as QuPath exports them, in pixels of the full image and in the file's order.

    A region is all polygons of one class (``properties.classification.name``), or of one name where
    there is no class, with their holes; points and lines do not count.
    """
    found: dict[str, list[Any]] = {}
    try:
        for number, feature in enumerate(_features(read_json(path))):
            parts = shapely.get_parts(shape(feature["geometry"]))
            polygons = parts[np.isin(shapely.get_type_id(parts), _POLYGONS)]
            if not np.isfinite(shapely.get_coordinates(polygons)).all():
                raise InputError(f"{path}: feature {number} has coordinates that are not finite")
            polygons = polygons[~shapely.is_empty(polygons)]
            if len(polygons):
                found.setdefault(_name(feature), []).extend(polygons)
    except InputError:
        raise
    except _DAMAGE as error:
        raise InputError(f"{path}: not GeoJSON as QuPath exports it ({error!r})") from error
    if not found:
        raise InputError(f"{path}: no polygon there; draw regions and export them as GeoJSON")
    # Outlines drawn by hand cross themselves now and then.
    return {
        name: shapely.union_all(
            shapely.make_valid(polygons, method="structure", keep_collapsed=False)
        )
        for name, polygons in found.items()
    }


def choose_pair(
    regions: Regions, between: str | tuple[str, str] | None, *, source: str
) -> tuple[str, str]:
    """Choose the two regions of a contrast; a name may hold a comma."""
    names = list(regions)
    there = f"{source} has {some(names, 20) or 'no region'}"
    if between is None:
        if len(names) != 2:
            raise InputError(
                f"{there}: a contrast needs two regions"
                + ("; choose with `between=A,B`" if len(names) > 2 else "")
            )
        return names[0], names[1]
    if isinstance(between, str):
        cuts = [at for at, letter in enumerate(between) if letter == ","]
        pairs = [(between[:at].strip(), between[at + 1 :].strip()) for at in cuts]
    else:
        pairs = [between]
    pairs = [(a, b) for a, b in pairs if a in names and b in names and a != b]
    if not pairs:
        raise InputError(f"`between={between}`: give two regions, separated by a comma; {there}")
    return pairs[0]


def disjoint(regions: Regions, pair: tuple[str, ...]) -> tuple[Regions, int]:
    """Take two regions and leave out the spots that lie in both; also how many those are."""
    shared = regions[pair[0]] & regions[pair[1]]
    return {name: regions[name] & ~shared for name in pair}, int(shared.sum())


def _check_near(path: Path, regions: Mapping[str, Any], positions: NDArray[np.float64]) -> None:
    """Refuse a file all of whose regions lie where no spot is: it is of another slide or scale."""
    spots = np.concatenate([positions.min(0), positions.max(0)])
    bounds = np.array([region.bounds for region in regions.values()])
    near = (bounds[:, :2] <= spots[2:]) & (bounds[:, 2:] >= spots[:2])
    if not near.all(1).any():
        where = [f"{name!r} at {_extent(region.bounds)}" for name, region in regions.items()]
        raise InputError(
            f"{path}: region {some(where, 3)}; but spots lie at {_extent(spots)} (pixels of the "
            "full image): are the regions of this slide, and in its pixels, not in µm?"
        )


def _extent(bounds: Iterable[float]) -> str:
    left, top, right, bottom = bounds
    return f"x {left:.0f} to {right:.0f}, y {top:.0f} to {bottom:.0f}"


def _features(content: Any) -> list[Any]:
    if isinstance(content, list):
        return content
    kind = content["type"]
    if kind == "FeatureCollection":
        return list(content["features"])
    return [content if kind == "Feature" else {"geometry": content}]


def _name(feature: Mapping[str, Any]) -> str:
    properties = feature.get("properties") or {}
    classification = properties.get("classification") or {}
    return str(classification.get("name") or properties.get("name") or "unnamed")
