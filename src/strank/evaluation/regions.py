"""Which spots lie in which region: a column of ``obs``, or polygons in GeoJSON."""

from __future__ import annotations

import ast
import json
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import NoneType
from typing import Any, TypeAlias

import lazy_loader
import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from strank.cohort.names import clean_name
from strank.errors import InputError, some
from strank.extras import need
from strank.files import read_json

# Region to which of the spots lie in it, ``[n_spots]``.
Regions = dict[str, NDArray[np.bool_]]
# A GeoJSON file, a column of ``obs``, or a label for each spot.
Groups: TypeAlias = str | Path | list[Any] | NDArray[Any] | pd.Series

# A column of ``obs`` needs it not, and may be all that there is.
shapely = lazy_loader.load("shapely")
_DAMAGE = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
_UNNAMED = "unnamed"
# Sides of outlines whose bounds may overlap: of any region, and of each side, its neighbours among
# them. What is found where they cross takes time and memory.
_FEW_CORNERS, _PAIRS, _NEAR = 1000, 1_000_000, 30


def find_regions(spots: AnnData, groups: Groups) -> tuple[Regions, list[str]]:
    """Tell which spots lie in which region (none without a label), and what was left out."""
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
    regions, left_out = outlines(path)
    if "spatial" not in spots.obsm:
        raise InputError('obsm["spatial"] is needed: positions in pixels of the full image')
    positions = np.asarray(spots.obsm["spatial"], dtype=np.float64)
    _check_near(path, regions, positions)
    return spots_within(regions, positions), left_out


def _labelled(labels: pd.Series) -> tuple[Regions, list[str]]:
    known = {at: label for at, label in enumerate(labels) if not pd.isna(label)}
    named = {at: name for at, label in known.items() if (name := clean_name(label))}
    nameless = [
        text for at, label in known.items() if at not in named and (text := str(label).strip())
    ]
    values = np.array([named.get(at, "") for at in range(len(labels))])
    regions = {name: values == name for name in sorted(set(named.values()))}
    told = some(sorted(set(nameless)))
    return regions, _counted({f"spot* with the label {told}": len(nameless)})


def spots_within(regions: Mapping[str, Any], positions: NDArray[np.float64]) -> Regions:
    """Tell which centres lie inside which geometry."""
    return {
        name: np.asarray(shapely.contains_xy(region, positions[:, 0], positions[:, 1]))
        for name, region in regions.items()
    }


def outlines(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Read regions as QuPath exports them, in pixels of the full image and in the file's order.

    A region is all polygons of one class, or of one name or label where there is no class, with
    their holes. Also what was left out: features without an outline, points and lines, and polygons
    without any name, unless all are: those are one region.
    """
    need("shapely")
    found: dict[str, list[Any]] = {}
    empty = others = 0
    for number, (geometry, properties) in enumerate(_features(path)):
        polygons, n_others = _polygons(path, number, geometry)
        others += n_others
        empty += not (len(polygons) or n_others)
        if len(polygons):
            found.setdefault(_name(path, number, properties), []).extend(polygons)
    if not found:
        raise InputError(f"{path}: no polygon there; draw regions and export them as GeoJSON")
    nameless = found.pop("", [])
    if not found:
        found, nameless = {_UNNAMED: nameless}, []
    left_out = {
        "polygon* with neither class nor name": len(nameless),
        "feature* without an outline": empty,
        "point* or line*": others,
    }
    for name, parts in found.items():
        _check_crossings(path, name, parts)
    # Outlines drawn by hand cross themselves now and then.
    regions = {
        name: shapely.union_all(
            shapely.make_valid(polygons, method="structure", keep_collapsed=False)
        )
        for name, polygons in found.items()
    }
    return regions, _counted(left_out)


def _check_crossings(path: Path, name: str, polygons: Sequence[Any]) -> None:
    """Refuse outlines that may cross each other far more often than any that are drawn."""
    rings = shapely.get_rings(shapely.get_parts(np.asarray(polygons)))
    corners, ring = shapely.get_coordinates(rings, return_index=True)
    if len(corners) < _FEW_CORNERS:
        return
    along = ring[1:] == ring[:-1]
    sides = shapely.linestrings(np.stack([corners[:-1][along], corners[1:][along]], axis=1))
    tree, near, at_once = shapely.STRtree(sides), 0, max(1, _PAIRS // len(sides))
    for first in range(0, len(sides), at_once):
        near += tree.query(sides[first : first + at_once]).shape[1]
        if near > _PAIRS + _NEAR * len(sides):
            raise InputError(
                f"{path}: region {name[:40]!r}: the {len(sides):,} sides of its outlines cross "
                "each other all over; draw it anew"
            )


def _counted(kinds: Mapping[str, int]) -> list[str]:
    """Count things in words; a star stands for the plural's s."""
    return [
        f"{count} {kind.replace('*', '' if count == 1 else 's')}"
        for kind, count in kinds.items()
        if count
    ]


def choose_pair(
    regions: Regions,
    between: str | tuple[str, str] | None,
    *,
    source: str,
    left_out: Sequence[str] = (),
) -> tuple[str, str]:
    """Choose the two regions of a contrast; a name may hold a comma."""
    names = list(regions)
    there = f"{source} has {some(names, 20) or 'no region'}"
    if left_out:
        there += f" (left out: {', '.join(left_out)})"
    if between is None:
        if len(names) != 2:
            raise InputError(
                f"{there}: a contrast needs two regions"
                + ("; choose with `between=A,B`" if len(names) > 2 else "")
                + ("; give each a class in QuPath (Set class)" if names == [_UNNAMED] else "")
            )
        return names[0], names[1]
    if isinstance(between, str):
        cuts = [at for at, letter in enumerate(between) if letter == ","]
        pairs = [(between[:at].strip(), between[at + 1 :].strip()) for at in cuts]
    else:
        a, b = between
        pairs = [(a.strip(), b.strip())]
    pairs = [(a, b) for a, b in pairs if a in names and b in names and a != b]
    if not pairs:
        raise InputError(f"`between={between}`: give two regions, separated by a comma; {there}")
    return pairs[0]


def disjoint(regions: Regions, pair: tuple[str, ...]) -> tuple[Regions, int]:
    """Take two regions and leave out the spots that lie in both; also how many those are."""
    shared = regions[pair[0]] & regions[pair[1]]
    return {name: regions[name] & ~shared for name in pair}, int(shared.sum())


def on_same_slide(
    name: str, section: AnnData, tiles: AnnData, *, by_place: bool
) -> tuple[AnnData, list[str]]:
    """Refuse counts whose positions are in pixels of another image; say what is not known of it."""
    mine, theirs = section.uns["strank"], tiles.uns.get("strank", {})
    image, other = (Path(str(facts.get("image", ""))).name for facts in (mine, theirs))
    scale, expected = (float(facts.get("um_per_pixel", np.nan)) for facts in (mine, theirs))
    # Of an image that has no name the scale may be measured, not stated.
    allowed = 1e-6 if image and other else 0.05
    if (image and other and image != other) or abs(scale - expected) > allowed * expected:
        raise InputError(
            f"{name}: counts of {image or 'an image without name'} ({scale:.6g} µm per pixel), but "
            f"the predictions are of {other or 'one without name'} ({expected:.6g}); regions are "
            "places of one image"
        )
    told = []
    if by_place and not (image and other):
        whose = name if other else "the predictions"
        told.append(
            f"{whose}: the image is not named; places are taken to be pixels of the same image"
        )
    if np.isnan(scale) and not np.isnan(expected):
        told.append(
            f"{name}: µm per pixel is not known; that of the predictions, {expected:.6g}, is taken"
        )
        facts = {"strank": {**mine, "um_per_pixel": expected}}
        slots = {"obs": section.obs, "var": section.var, "obsm": dict(section.obsm)}
        section = AnnData(section.X, **slots, uns={**section.uns, **facts})
    return section, told


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


def _features(path: Path) -> Iterator[tuple[Any, Mapping[str, Any]]]:
    """Geometry and properties of each feature; a geometry by itself is a feature too."""
    content = read_json(path)
    if isinstance(content, Mapping):
        content = content.get("features", [content])
    if not isinstance(content, list):
        raise InputError(f"{path}: not GeoJSON as QuPath exports it: no list of features")
    waiting = content[::-1]
    while waiting:
        feature = waiting.pop()
        if not isinstance(feature, Mapping) or not feature.keys() & {"type", "geometry"}:
            raise InputError(f"{path}: not GeoJSON as QuPath exports it: {reprlib.repr(feature)}")
        if isinstance(inner := feature.get("features"), list):  # collections of collections
            waiting += inner[::-1]
            continue
        if "geometry" not in feature and feature["type"] != "Feature":
            yield feature, {}
            continue
        properties = feature.get("properties")
        properties = properties if isinstance(properties, Mapping) else {}
        yield feature.get("geometry"), properties
        # What QuPath writes with its whole hierarchy.
        children = properties.get("childObjects")
        waiting += children[::-1] if isinstance(children, list) else []


def _polygons(path: Path, number: int, geometry: Any) -> tuple[NDArray[Any], int]:
    """Take the polygons out of a geometry; also how many other parts it has. Null has none."""
    if geometry is None:
        return np.array([]), 0
    kinds = shapely.GeometryType
    try:
        with np.errstate(invalid="ignore"):
            parts = np.asarray(shapely.get_parts(shapely.geometry.shape(geometry)))
        while (nested := shapely.get_type_id(parts) == kinds.GEOMETRYCOLLECTION).any():
            parts = np.concatenate([parts[~nested], shapely.get_parts(parts[nested])])
    except (*_DAMAGE, shapely.errors.ShapelyError) as error:
        raise InputError(
            f"{path}: not GeoJSON as QuPath exports it: geometry of feature {number} ({error!r})"
        ) from error
    parts = parts[~shapely.is_empty(parts)]
    polygons = parts[np.isin(shapely.get_type_id(parts), [kinds.POLYGON, kinds.MULTIPOLYGON])]
    if not np.isfinite(shapely.get_coordinates(polygons)).all():
        raise InputError(f"{path}: feature {number} has coordinates that are not finite")
    return polygons, len(parts) - len(polygons)


def _name(path: Path, number: int, properties: Mapping[str, Any]) -> str:
    """Name a feature by its class, else its name, else its label; empty where it has none."""
    for field in ("classification", "name", "label"):
        value = properties.get(field)
        try:
            if name := _text(value):
                return name
        except (TypeError, RecursionError) as error:
            raise InputError(
                f"{path}: properties.{field} of feature {number} is no name: "
                f"{reprlib.repr(value)}; give text, or a class as QuPath writes it"
            ) from error
    return ""


def _text(value: Any) -> str:
    """Write a class as QuPath shows it, parts joined by colons; empty for none.

    QuPath 0.4 writes ``name`` or ``names``, earlier ones ``name`` and ``parentClass``; what went
    through a table comes as JSON in a text (GDAL), or as Python shows it (pandas).
    """
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        value = _parsed(value.strip())
    if isinstance(value, Mapping):
        own = next((value[key] for key in ("names", "name", "value") if value.get(key)), None)
        value = [value.get("parentClass"), own]
    if isinstance(value, list):
        return ": ".join(part for part in map(_text, value) if part)
    if isinstance(value, bool) or not isinstance(value, (str, int, float, NoneType)):
        raise TypeError("no name")
    # Half a surrogate pair could not be written.
    return clean_name(value).encode(errors="replace").decode()


def _parsed(text: str) -> Any:
    for read in (json.loads, ast.literal_eval):
        with suppress(*_DAMAGE, SyntaxError, MemoryError):
            return read(text)
    return text
