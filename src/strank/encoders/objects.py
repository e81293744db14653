"""Features of sections in memory: they stand in ``obsm``, and nothing is written."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray

from strank.cohort.arrays import spots_of
from strank.cohort.contract import SCHEMA, SectionInfo, check_features
from strank.cohort.in_memory import Sections, info_of, known_facts, placed, um_per_pixel_of
from strank.cohort.library import add_library, visium_library
from strank.encoders.backbone import on_gpu
from strank.encoders.base import Encoder, encoder_facts
from strank.encoders.tiles import embed_spots, usual_workers
from strank.errors import InputError, some
from strank.files import sha256
from strank.progress import Advance, Say
from strank.slides.placement import check_inside, check_on_tissue, image_of, open_measured
from strank.slides.slide import Slide, check_image, open_told, picture_for

# One for a section each by name, a folder of them, or of a single section its own.
Images: TypeAlias = Mapping[str, Path | str] | Path | str | None


def embed_objects(
    given: Sections,
    encoder: Encoder,
    images: Images,
    scale: tuple[float | None, bool],
    *,
    precision: str | None,
    workers: int | None,
    advance: Advance | None,
    say: Say | None,
    **how: Any,
) -> dict[str, int]:
    """Embed all spots of some sections; the number of spots of each. Facts stand in ``uns``."""
    parts = placed(given)
    encoder, there = on_gpu(encoder, precision)
    how["workers"] = usual_workers(there) if workers is None else workers
    files = {name: _file(name, *part, images, len(parts)) for name, part in parts.items()}
    # All are looked at before the first is embedded.
    opened = {name: _opened(name, *part, files[name], scale) for name, part in parts.items()}
    for told in [note for _, _, _, notes in opened.values() for note in notes]:
        say(told) if say is not None else warnings.warn(told, stacklevel=4)
    found: dict[str, NDArray[np.float32]] = {}
    for name, (adata, rows) in parts.items():
        slide, centres = opened[name][0], np.asarray(adata.obsm["spatial"], np.float64)[rows, :2]
        found[name] = embed_spots(slide, centres, encoder, advance=advance, say=say, **how)
        what = f"section {name}: {encoder.name} features"
        check_features(found[name], adata.obs_names[rows], what)
    for name, (adata, rows) in parts.items():
        _keep(name, adata, rows, encoder, found[name], *opened[name][1:3])
    return {name: len(features) for name, features in found.items()}


def _file(
    name: str, adata: AnnData, rows: NDArray[np.bool_], images: Images, n_sections: int
) -> Path:
    """Find the image of a section: as given, or as the object says it."""
    if isinstance(images, Mapping):
        if name not in images:
            raise InputError(f"section {name}: `image` has none; it has {some(images) or 'none'}")
        return Path(images[name])
    if images is not None:
        if n_sections > 1 and not Path(images).is_dir():
            raise InputError(
                f"`image` is one file for {n_sections} sections; give a mapping of their names, or "
                "a folder with an image called like each"
            )
        return image_of(Path(images), name)
    metadata = visium_library(adata[rows], name).get("metadata", {})
    known = [known_facts(adata, name).get("image"), metadata.get("source_image_path")]
    if not any(known):
        raise InputError(f"section {name}: give its full-resolution H&E image with `image`")
    return Path(str(next(filter(None, known))))


def _opened(
    name: str,
    adata: AnnData,
    rows: NDArray[np.bool_],
    file: Path,
    scale: tuple[float | None, bool],
) -> tuple[Slide, SectionInfo, dict[str, Any], list[str]]:
    """Open the image of a section, once spots and image are found to belong together.

    With its picture as scanpy and squidpy keep it, where the section has none.
    """
    part = adata[rows]
    spots = spots_of(part, f"section {name}")
    known = um_per_pixel_of(part, spots, name)
    slide = open_measured(file, known, *scale) if known > 0 else open_told(file, *scale)
    check_image(slide)
    check_inside(spots, slide, name)
    notes = check_on_tissue(slide, spots[["x", "y"]].to_numpy(np.float64), name=name)
    info = info_of(part, spots, name, slide.um_per_pixel)
    image = slide.path.resolve()
    info = replace(info, image=str(image), image_sha256=sha256(image))
    picture = {} if visium_library(part, name) else picture_for(slide, info.spot_diameter_um)
    return slide, info, picture, notes


def _keep(
    name: str,
    adata: AnnData,
    rows: NDArray[np.bool_],
    encoder: Encoder,
    features: NDArray[np.float32],
    info: SectionInfo,
    picture: dict[str, Any],
) -> None:
    """Put features, facts and picture where a section that is read from a cohort has them."""
    facts: dict[str, Any] = {"schema": SCHEMA, **asdict(info)}
    if rows.all():
        adata.obsm[encoder.name], adata.uns["strank"] = features, facts
    else:
        kept = np.full((len(rows), features.shape[1]), np.nan, np.float32)
        if encoder.name in adata.obsm and adata.obsm[encoder.name].shape == kept.shape:
            kept = np.array(adata.obsm[encoder.name], np.float32)
        kept[rows] = features
        adata.obsm[encoder.name] = kept
        adata.uns["strank"] = {**adata.uns.get("strank", {}), name: facts}
    if picture:
        add_library(adata, name, picture)
    # As text, since files of AnnData hold no lists of facts.
    adata.uns[encoder.name] = json.dumps(encoder_facts(encoder))
