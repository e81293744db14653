"""AnnData objects of any origin, with counts, positions and an image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from anndata import AnnData
from scipy import sparse

from strank.cohort.arrays import array_of, measured_um, spots_of
from strank.cohort.contract import naming, raw_counts
from strank.cohort.genes import IDS, name_genes
from strank.cohort.library import scalefactors
from strank.cohort.names import clean_name, clean_names
from strank.cohort.store import read_h5ad
from strank.errors import InputError, some
from strank.io.sections import (
    Patients,
    build_section,
    choose_section,
    needed_image,
    patient_of,
)
from strank.io.tables import check_unique
from strank.slides.placement import image_of, open_measured
from strank.slides.slide import check_image, open_told

_RAW = "raw"  # as a layer: the slot .raw, where no layer is so called
_SYMBOLS = ("gene_symbols", "gene_symbol", "gene_names", "gene_name", "feature_name", "symbol")


def read_anndata(
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
) -> AnnData:
    """Read a section of any AnnData file with raw counts and positions into the data contract.

    Where ``obs`` has ``array_row`` and ``array_col``, as scanpy and squidpy make it of Visium, the
    array of spots is told and measured as `read_visium` does.

    Parameters
    ----------
    path
        The ``.h5ad`` file, with ``obsm["spatial"]`` (x, y) in pixels of the image.
        ``obs["section"]`` divides it, ``obs["patient"]`` names patients; both may be absent.
    image
        The image; or a folder with one for each section, called like it.
    section
        Which of ``obs["section"]``, if there are several; else the name of the only one (``None``:
        as in ``obs``, or the file's).
    patient, patients, um_per_pixel_override, gene_id
        As in `read_visium`; the first two come before ``obs["patient"]``.
    um_per_pixel
        Of the image; if ``None``, as an array of spots measures it, or as stored in the image.
    layer
        Where raw counts are; ``X`` if ``None``. ``"raw"`` is ``.raw``, with its genes, where no
        layer is so called.

    Returns
    -------
    AnnData
        ``X`` the raw counts ``[n_spots, n_genes]``, ``obsm["spatial"]`` the positions; without a
        known array the pitch of spots is the median distance of neighbours, the diameter what
        scanpy keeps of it.

    Raises
    ------
    InputError
        For a slot that is absent, counts that are not raw, an image that is absent or does not fit.

    Examples
    --------
    >>> import strank
    >>> strank.io.read_anndata("mine.h5ad", image="mine.tif", patient="P1")
    Traceback (most recent call last):
    ...
    strank.errors.InputError: mine.h5ad: no such file
    """
    path = Path(path)
    adata = read_h5ad(path)
    names = _section_names(adata, path)
    rows = {name: (names == name).to_numpy() for name in sorted(names.unique())}
    if section is None or len(rows) > 1:
        section, chosen = choose_section(path, rows, section)
        adata = adata[chosen]
    return read_object(
        adata,
        path,
        section,
        image=image_of(needed_image(path, image), section),
        patient=object_patient(adata, section, patient, patients),
        um_per_pixel=um_per_pixel,
        um_per_pixel_override=um_per_pixel_override,
        gene_id=gene_id,
        layer=layer,
    )


def find_anndata(path: Path | str) -> list[str]:
    """Name the sections of an AnnData file, sorted.

    Parameters
    ----------
    path
        As in `read_anndata`.

    Raises
    ------
    InputError
        For a file that is absent or damaged.

    Examples
    --------
    >>> import strank
    >>> strank.io.find_anndata("mine.h5ad")
    Traceback (most recent call last):
    ...
    strank.errors.InputError: mine.h5ad: no such file
    """
    path = Path(path)
    adata = read_h5ad(path, backed="r")
    names = _section_names(adata, path)
    adata.file.close()
    return sorted(names.unique())


def _section_names(adata: AnnData, path: Path) -> pd.Series:
    libraries = adata.obs.get("library_id", pd.Series(dtype=object)).dropna().unique()
    if "section" not in adata.obs and len(libraries) > 1:
        raise InputError(
            f'{path}: obs["library_id"] names several ({some(map(str, libraries), 10)}); if they '
            'are sections, call the column section: obs["section"] = obs["library_id"]'
        )
    unnamed = pd.Series(path.stem, index=adata.obs_names)
    names = adata.obs.get("section", unnamed).astype(object).map(clean_name)
    if (lacking := names == "").any():
        raise InputError(
            f'{path}: obs["section"] has no name, or one as nan or NA, for spot '
            f"{some(names.index[lacking])}; name it, or take those spots out"
        )
    return names


def read_object(
    adata: AnnData,
    path: Path,
    section: str,
    *,
    image: Path,
    patient: str,
    um_per_pixel: float | None,
    um_per_pixel_override: bool,
    gene_id: bool,
    layer: str | None = None,
) -> AnnData:
    """Put one section with ``obsm["spatial"]`` in pixels of an image into the data contract."""
    spots, held = object_spots(adata, path), layer
    measured = measured_um(spots)
    if measured is None:
        slide = open_told(image, um_per_pixel, um_per_pixel_override)
    else:
        slide = open_measured(image, measured, um_per_pixel, um_per_pixel_override)
    check_image(slide)
    array = array_of(scalefactors(adata, section), spots, slide.um_per_pixel)
    # As of Space Ranger's raw matrix: measured by, but not of the tissue.
    off = pd.to_numeric(spots.get("in_tissue", pd.Series(1, spots.index)), errors="coerce") == 0
    off &= not off.all()
    adata, spots = adata[~off.to_numpy()], spots[~off]
    if layer == _RAW and layer not in adata.layers and adata.raw is not None:
        adata, held = adata.raw.to_adata(), None
    return build_section(
        object_counts(adata, path, held),
        spots=spots,
        genes=object_genes(adata, path, gene_id=gene_id),
        section=section,
        patient=patient,
        slide=slide,
        technology=array.technology,
        spot_diameter_um=array.diameter_um,
        spot_pitch_um=array.pitch_um,
        provenance={
            "reader": "spatialdata" if path.is_dir() else "anndata",
            "counts_file": str(path.resolve()),
            "layer": layer or "X",
            "dropped_spots": {"not in tissue": int(off.sum())},
        }
        | ({} if array.technology == "unknown" else {"array": array.told}),
    )


def object_counts(adata: AnnData, path: Path, layer: str | None = None) -> sparse.csr_matrix:
    """Take raw counts from ``X`` or a layer, checked; an error says where else there are some."""
    others = {name: (adata.layers[name], adata.var_names) for name in adata.layers}
    if adata.raw is not None:
        others.setdefault(_RAW, (adata.raw.X, adata.raw.var_names))
    if layer is not None and layer not in others:
        raise InputError(f"{path}: no layer {layer}; it has {some(others) or 'none'}")
    values, genes = (adata.X, adata.var_names) if layer is None else others.pop(layer)
    try:
        return _raw_counts(values, adata.obs_names, genes, path)
    except InputError as error:
        holding = [n for n, (v, genes) in others.items() if _is_raw(v, adata.obs_names, genes)]
        if holding:
            slot = " (raw is .raw)" * (_RAW in holding and _RAW not in adata.layers)
            told = f"are they in `layer={some(holding)}`?{slot}"
        elif others:
            told = f"nor are they in {some(others)}"
        else:
            raise
        raise InputError(f"{error}; {told}") from error


def _raw_counts(values: Any, spots: pd.Index, genes: pd.Index, path: Path) -> sparse.csr_matrix:
    if values is None:
        raise InputError(f"{path}: X is empty; raw counts are needed there or in a `layer`")
    return raw_counts(values, spots=spots, genes=genes, name=str(path))


def _is_raw(values: Any, spots: pd.Index, genes: pd.Index) -> bool:
    try:
        _raw_counts(values, spots, genes, Path())
    except InputError:
        return False
    return True


def object_genes(adata: AnnData, path: Path, *, gene_id: bool = False) -> pd.DataFrame:
    """Name genes by ``var_names`` and what ``var`` knows of symbols and ids."""
    names = clean_names(adata.var_names)
    columns = _SYMBOLS if naming(names) == "Ensembl ids" else IDS
    found = next((clean_names(adata.var[c]) for c in columns if c in adata.var), None)
    if naming(names) == "Ensembl ids":
        return name_genes(found, names, gene_id=gene_id, name=str(path))
    # Ids that are incomplete or stand twice tell nothing apart.
    if found is not None and ((found == "").any() or not found.is_unique):
        found = None
    return name_genes(names, found, gene_id=gene_id, name=str(path))


def object_patient(
    adata: AnnData, section: str, patient: str | None, patients: Patients = None
) -> str:
    """Name the patient; ``obs["patient"]`` counts where neither argument knows."""
    known = {clean_name(name) for name in adata.obs.get("patient", pd.Series()).unique()}
    try:
        return patient_of(section, patient, patients, min(known) if len(known) == 1 else None)
    except InputError as error:
        if patient is not None or len(known) < 2:
            raise
        several = some([name or "none" for name in sorted(known)])
        raise InputError(f'{error}; obs["patient"] says several: {several}') from error


def object_spots(adata: AnnData, path: Path) -> pd.DataFrame:
    """Take ``obs``, and ``x`` and ``y`` from ``obsm["spatial"]``; of names that differ."""
    spots = spots_of(adata, str(path))
    check_unique(spots.index, f"{path}: spot")
    return spots
