"""AnnData objects of any origin, with counts, positions and an image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from scipy.spatial import KDTree

from strank.cohort.contract import check_counts, naming
from strank.cohort.store import read_h5ad
from strank.errors import InputError, some
from strank.io.sections import Origin, build_section, name_genes, patient_of, write_sections
from strank.slides.slide import Slide, check_image, open_slide

_IDS = ("gene_ids", "gene_id", "ensembl_id", "ensembl_ids")

_SYMBOLS = ("gene_symbols", "gene_symbol", "gene_names", "gene_name", "feature_name", "symbol")


def import_anndata(
    path: Path,
    cohort: Path,
    *,
    image: Path,
    um_per_pixel: float | None = None,
    section: str | None = None,
    patient: str | None = None,
    patients: Mapping[str, str] | None = None,
    layer: str | None = None,
    gene_id: bool = False,
) -> dict[str, AnnData]:
    """Read an AnnData file with raw counts and ``obsm["spatial"]``, and write it into a cohort.

    Parameters
    ----------
    path
        The ``.h5ad`` file. ``obs["section"]`` divides it, ``obs["patient"]`` names patients; both
        may be absent.
    cohort
        The folder to write to.
    image
        The image whose pixels ``obsm["spatial"]`` (x, y) counts; for several sections, a folder
        with one image each, named by section.
    um_per_pixel
        Of the image; if ``None``, as stored there.
    section
        Name; if ``None``, ``obs["section"]`` or the name of the file.
    patient, patients
        As in `strank.io.sections.patient_of`; they come before ``obs["patient"]``.
    layer
        Where raw counts are; ``X`` if ``None``.
    gene_id
        Name genes by id.

    Returns
    -------
    dict[str, AnnData]
        Section name to section, sorted.

    Raises
    ------
    InputError
        For a slot that is absent, counts that are not raw, an image that is absent or does not fit.
    """
    adata = read_h5ad(path)
    if section is not None or "section" not in adata.obs:
        named = pd.Series(section or path.stem, index=range(adata.n_obs))
    else:
        named = adata.obs["section"].astype(str).reset_index(drop=True)

    def read() -> Iterator[AnnData]:
        for name in sorted(named.unique()):
            part = adata[(named == name).to_numpy()]
            origin = origin_of(part, name, patient, patients)
            slide = open_slide(_image_of(image, name), um_per_pixel)
            yield read_object(part, path, origin, slide, layer=layer, gene_id=gene_id)

    return write_sections(read(), cohort)


def read_object(
    adata: AnnData,
    path: Path,
    origin: Origin,
    slide: Slide,
    *,
    layer: str | None = None,
    gene_id: bool = False,
) -> AnnData:
    """Put an object with ``obsm["spatial"]`` in pixels of a slide into the data contract.

    Parameters
    ----------
    adata
        All spots of one section.
    path
        Where it was read from, for errors and provenance.
    origin
        Names of section and patient.
    slide
        Its image.
    layer, gene_id
        As in `import_anndata`.

    Raises
    ------
    InputError
        As `import_anndata`.
    """
    check_image(slide)
    spots = spots_of(adata, path)
    diameter, pitch = spot_size_um(adata, spots, slide.um_per_pixel)
    return build_section(
        counts_of(adata, path, layer),
        spots=spots,
        genes=genes_of(adata, path, gene_id=gene_id),
        origin=origin,
        slide=slide,
        technology="unknown",
        spot_diameter_um=diameter,
        spot_pitch_um=pitch,
        provenance={
            "reader": "spatialdata" if path.is_dir() else "anndata",
            "counts_file": str(path.resolve()),
            "layer": layer or "X",
        },
    )


def counts_of(adata: AnnData, path: Path, layer: str | None = None) -> sparse.csr_matrix:
    """Take raw counts from ``X`` or a layer, checked; an error names the layers there are."""
    if layer is not None and layer not in adata.layers:
        raise InputError(f"{path}: no layer {layer}; it has {some(adata.layers) or 'none'}")
    values = adata.X if layer is None else adata.layers[layer]
    if values is None:
        raise InputError(f"{path}: X is empty; raw counts are needed there or in a --layer")
    counts = sparse.csr_matrix(values, dtype=np.float64)
    try:
        check_counts(counts, spots=adata.obs_names, genes=adata.var_names, name=str(path))
    except InputError as error:
        others = [name for name in adata.layers if name != layer]
        if not others:
            raise
        raise InputError(f"{error}; are they in --layer {some(others)}?") from error
    return counts


def genes_of(adata: AnnData, path: Path, *, gene_id: bool = False) -> pd.DataFrame:
    """Name genes by ``var_names`` and what ``var`` knows of symbols and ids.

    Ids that are incomplete or stand twice are not used.
    """
    names = adata.var_names
    columns = _SYMBOLS if naming(names) == "Ensembl ids" else _IDS
    found = next((pd.Index(adata.var[c].astype(object)) for c in columns if c in adata.var), None)
    if naming(names) == "Ensembl ids":
        return name_genes(found, names, gene_id=gene_id, name=str(path))
    if found is not None and (found.hasnans or not found.is_unique):
        found = None
    return name_genes(names, found, gene_id=gene_id, name=str(path))


def origin_of(
    adata: AnnData, section: str, patient: str | None, patients: Mapping[str, str] | None
) -> Origin:
    """Name section and patient; ``obs["patient"]`` counts where neither argument knows."""
    known = list(adata.obs["patient"].unique()) if "patient" in adata.obs else []
    stated = str(known[0]) if len(known) == 1 else None
    return Origin(
        section, patient_of(section, patient or (patients or {}).get(section) or stated, patients)
    )


def spots_of(adata: AnnData, path: Path) -> pd.DataFrame:
    """Take ``obs``, and ``x`` and ``y`` from ``obsm["spatial"]``."""
    if "spatial" not in adata.obsm:
        raise InputError(
            f'{path}: lacks obsm["spatial"], the positions (x, y) in pixels of the image; it has '
            f"{some(adata.obsm) or 'no obsm'}"
        )
    positions = np.asarray(adata.obsm["spatial"], dtype=np.float64)
    wrong = ~np.isfinite(positions[:, :2]).all(1)
    if wrong.any():
        raise InputError(f"{path}: position of spot {some(adata.obs_names[wrong])} is not finite")
    return adata.obs.assign(x=positions[:, 0], y=positions[:, 1])


def spot_size_um(adata: AnnData, spots: pd.DataFrame, um_per_pixel: float) -> tuple[float, float]:
    """Diameter and pitch of spots in µm.

    The pitch is the median distance to the four nearest neighbours (the nearest alone is the one
    that jitter brought closer); the diameter is what scanpy keeps in ``uns["spatial"]``, or else
    the pitch.
    """
    if len(spots) < 2:
        raise InputError("a section of one spot: nothing can be compared within it")
    positions = spots[["x", "y"]].to_numpy()
    distances, _ = KDTree(positions).query(positions, k=min(5, len(spots)))
    pitch = float(np.median(distances[:, 1:])) * um_per_pixel
    libraries = adata.uns.get("spatial", {})
    scales = [lib.get("scalefactors", {}) for lib in libraries.values() if isinstance(lib, Mapping)]
    stated = [float(s["spot_diameter_fullres"]) for s in scales if "spot_diameter_fullres" in s]
    return (stated[0] * um_per_pixel if len(stated) == 1 else pitch), pitch


def _image_of(image: Path, section: str) -> Path:
    if not image.is_dir():
        return image
    found = sorted(p for p in image.iterdir() if p.stem == section and p.is_file())
    if len(found) != 1:
        raise InputError(
            f"{image}: {'no' if not found else 'more than one'} image called {section}; name one "
            "image by the section"
        )
    return found[0]
