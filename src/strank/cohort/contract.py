"""What a section is: slots, checks, and how its genes are named."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse

from strank.cohort.folder import spots_digest
from strank.cohort.names import clean_name
from strank.errors import InputError, some

_ENSEMBL = re.compile(r"ENS[A-Z]*G\d+")
SCHEMA = 1
_NUMBERS = ("um_per_pixel", "spot_diameter_um", "spot_pitch_um")
# From here on float32 skips whole numbers, and float64 does.
FLOAT32_COUNTS, MOST_COUNTS = 2**24, 2**53
# Models are of float32, which holds a little more.
LEAST_FEATURE, _MOST_FEATURE = 1e-30, 1e30
# Spots at a time.
_ROWS = 8192


def naming(names: pd.Index) -> Literal["Ensembl ids", "symbols"]:
    """Tell Ensembl ids from symbols, by what most names are."""
    n_ids = sum(map(bool, map(_ENSEMBL.match, names.astype(str))))
    return "Ensembl ids" if 2 * n_ids > len(names) else "symbols"


def check_naming(names: Mapping[str, pd.Index]) -> None:
    """Refuse sections of which some name genes by Ensembl ids and some by symbols."""
    sections: dict[str, list[str]] = {}
    for section, genes in names.items():
        sections.setdefault(naming(genes), []).append(section)
    if len(sections) > 1:
        told = " and ".join(f"section {some(those)} by {how}" for how, those in sections.items())
        raise InputError(
            f"genes are named in two ways: {told}; import all with `gene_id`, or all from files "
            "that hold symbols"
        )


@dataclass(frozen=True)
class SectionInfo:
    """Facts about a section that are not per spot or gene; stored in ``uns["strank"]``."""

    image: str  # path, of the full resolution
    image_sha256: str
    um_per_pixel: float  # of that image
    spot_diameter_um: float
    spot_pitch_um: float  # between the centres of neighbours
    technology: str  # "ST", "Visium", ...
    provenance: dict[str, Any]  # reader, source files, what was dropped


def make_section(
    counts: sparse.csr_matrix,
    *,
    spots: pd.DataFrame,
    genes: pd.Index | pd.DataFrame,
    section: str,
    patient: str,
    info: SectionInfo,
) -> AnnData:
    """Put a section into the contract; columns ``x`` and ``y`` of the spots are in pixels."""
    # Sparse matrices of float32 are summed in it.
    library_size = counts @ np.ones(counts.shape[1])
    obs = spots.drop(columns=["x", "y"]).assign(
        section=pd.Categorical([section] * len(spots)),
        patient=pd.Categorical([patient] * len(spots)),
        library_size=library_size,
    )
    adata = AnnData(
        X=sparse.csr_matrix(counts, dtype=dtype_of_counts(counts.data.max(initial=0))),
        obs=obs,
        var=genes if isinstance(genes, pd.DataFrame) else pd.DataFrame(index=genes),
        obsm={"spatial": spots[["x", "y"]].to_numpy(np.float64)},
        uns={"strank": {"schema": SCHEMA, **asdict(info)}},
    )
    check_section(adata, name=section)
    return adata


def dtype_of_counts(largest: float) -> type[np.floating]:
    """Choose the type that holds counts up to the largest exactly: float32 but for huge ones.

    >>> dtype_of_counts(2**24 - 1), dtype_of_counts(2**24)
    (<class 'numpy.float32'>, <class 'numpy.float64'>)
    """
    return np.float32 if largest < FLOAT32_COUNTS else np.float64


def section_info(adata: AnnData) -> SectionInfo:
    """Read the facts about a section back from ``uns["strank"]``."""
    stored = adata.uns["strank"]
    facts = {key: stored[key] for key in SectionInfo.__dataclass_fields__}
    facts |= {key: float(stored[key]) for key in _NUMBERS}
    # Lists come back from the disk as arrays.
    lists = {k: v.tolist() for k, v in stored["provenance"].items() if isinstance(v, np.ndarray)}
    return SectionInfo(**facts | {"provenance": {**stored["provenance"], **lists}})


def positions_um(adata: AnnData) -> NDArray[np.float64]:
    """Spot centres (x, y) in µm, ``[n_spots, 2]``, of a section or of tiles; NaN if not known."""
    if "spatial" not in adata.obsm or "um_per_pixel" not in adata.uns.get("strank", {}):
        raise InputError(
            'the model looks at neighbouring spots, and needs their positions: obsm["spatial"] in '
            'pixels and uns["strank"]["um_per_pixel"]'
        )
    um_per_pixel = float(adata.uns["strank"]["um_per_pixel"])
    return np.asarray(adata.obsm["spatial"], dtype=np.float64) * um_per_pixel


def places(adata: AnnData) -> NDArray[np.float64]:
    """Spot centres in µm or, where the scale is not known, in pixels: where it plays no part."""
    found = positions_um(adata)
    return found if np.isfinite(found).all() else np.asarray(adata.obsm["spatial"], np.float64)


def counts_checksum(adata: AnnData) -> str:
    """SHA-256 of a section's counts, spot names and gene names, in hexadecimal."""
    # Sorted below: another type shares the indices without a copy, but not the data.
    counts = sparse.csr_matrix(adata.X, dtype=np.float64, copy=True)
    counts.sum_duplicates()
    digest = hashlib.sha256()
    for part in (counts.data, counts.indices.astype(np.int64), counts.indptr.astype(np.int64)):
        digest.update(part.tobytes())
    digest.update("\n".join([*adata.obs_names, "", *adata.var_names]).encode())
    return digest.hexdigest()


def spots_checksum(adata: AnnData) -> str:
    """SHA-256 of what features depend on: the image, its scale, and where which spot stands."""
    info, centres = section_info(adata), adata.obsm["spatial"]
    return spots_digest(info.image_sha256, info.um_per_pixel, adata.obs_names, centres)


def check_section(adata: AnnData, *, name: str) -> None:
    """Refuse a section that breaks the contract, naming the slot and the offending rows."""
    check_slots(adata, name=name)
    check_counts(adata.X, spots=adata.obs_names, genes=adata.var_names, name=name)
    check_depths(adata, adata.X, name=name)


def check_slots(adata: AnnData, *, name: str) -> None:
    """Refuse all that breaks the contract but for counts and depths."""
    for slot, keys in {
        "obs": ["section", "patient", "library_size"],
        "obsm": ["spatial"],
        "uns": ["strank"],
    }.items():
        missing = [key for key in keys if key not in getattr(adata, slot)]
        if missing:
            raise InputError(f"{name}: {slot} lacks {some(missing)}; import the section again")
    _check_info(adata.uns["strank"], name)
    if adata.n_obs == 0 or adata.X is None:
        raise InputError(f"{name}: no {'counts' if adata.n_obs else 'spots'}")
    for slot, index in {"obs_names": adata.obs_names, "var_names": adata.var_names}.items():
        if not index.is_unique:
            raise InputError(f"{name}: {slot} has duplicates: {some(index[index.duplicated()])}")
    if any(len(adata.obs[column].unique()) != 1 for column in ("section", "patient")):
        raise InputError(f"{name}: obs must hold one section of one patient")
    for column in ("section", "patient"):
        if not clean_name(called := adata.obs[column].iloc[0]):
            raise InputError(
                f'{name}: obs["{column}"] says {str(called)!r}, which is no name; import the '
                "section again with one"
            )
    _check_numbers(adata, name)


def check_counts(counts: Any, *, spots: pd.Index, genes: pd.Index, name: str) -> None:
    """Refuse counts that are no non-negative integers below 2^53, naming spot and gene."""
    stored = sparse.coo_matrix(counts)
    if stored.dtype == bool:
        raise InputError(
            f"{name}: holds True and False, whether a gene was seen and not how often; raw counts "
            "are needed"
        )
    for wrong, what in [
        (~np.isfinite(stored.data), "is not a finite number"),
        (stored.data < 0, "is negative"),
        (stored.data != np.round(stored.data), "is not a whole number"),
        (stored.data >= MOST_COUNTS, "is no count (from 2^53 on numbers are not exact)"),
    ]:
        if wrong.any():
            first = int(np.flatnonzero(wrong)[0])
            raise InputError(
                f"{name}: spot {spots[stored.row[first]]}, gene {genes[stored.col[first]]}: "
                f"{repr(float(stored.data[first])).removesuffix('.0')} {what}; raw counts are "
                "needed"
            )


def raw_counts(values: Any, *, spots: pd.Index, genes: pd.Index, name: str) -> sparse.csr_matrix:
    """Take counts out of any matrix, whole within rounding; what are none is refused."""
    counts = sparse.csr_matrix(values, dtype=bool if values.dtype == bool else np.float64)
    counts = whole_counts(counts)
    check_counts(counts, spots=spots, genes=genes, name=name)
    return counts


def whole_counts(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    """Make whole what is so within rounding of float32, 3.0000002; the rest stays as it is."""
    if counts.dtype.kind != "f":
        return counts
    nearest = np.round(counts.data)
    # A unit in the last place grows with the number; half a count is never rounding.
    with np.errstate(invalid="ignore"):  # infinities stay, to be refused
        within = np.abs(counts.data - nearest) <= np.clip(1e-6 * np.abs(nearest), 1e-6, 1e-2)
    if (counts.data[within] == nearest[within]).all():
        return counts
    rounded = counts.copy()
    rounded.data = np.where(within, nearest, counts.data)
    rounded.eliminate_zeros()
    return rounded


def _check_info(stored: Any, name: str) -> None:
    stored = stored if isinstance(stored, Mapping) else {}
    missing = [key for key in ("schema", *SectionInfo.__dataclass_fields__) if key not in stored]
    if missing:
        raise InputError(f'{name}: uns["strank"] lacks {some(missing)}; import the section again')
    for key in _NUMBERS:
        as_numbers(stored[key], f'{name}: uns["strank"]["{key}"]')
    if stored["schema"] != SCHEMA:
        raise InputError(
            f"{name}: schema version {stored['schema']}, but this strank reads {SCHEMA}; "
            "import the section again"
        )


def as_numbers(values: Any, slot: str) -> NDArray[np.float64]:
    """Take numbers from a slot; text and the like are refused."""
    array = np.asarray(values)
    with suppress(TypeError, ValueError):
        if array.dtype.kind != "c":  # of which numpy would take a part
            return array.astype(np.float64)
    raise InputError(f"{slot} holds what is no number; write it again")


def _check_numbers(adata: AnnData, name: str) -> None:
    for slot, values in {
        'obsm["spatial"]': adata.obsm["spatial"],
        'obs["library_size"]': adata.obs[["library_size"]],
    }.items():
        values = as_numbers(values, f"{name}: {slot}")
        wrong = ~np.isfinite(values).all(1)
        if wrong.any():
            raise InputError(f"{name}: {slot} is not finite at spot {some(adata.obs_names[wrong])}")


def check_depths(adata: AnnData, counts: Any, *, name: str) -> None:
    """Refuse library sizes below the sum of a spot's counts, naming the spots."""
    # They may cover genes that the file no longer holds, never fewer.
    short = adata.obs["library_size"].to_numpy() < counts @ np.ones(adata.n_vars) - 0.5
    if short.any():
        raise InputError(
            f'{name}: obs["library_size"] is less than the counts of spot '
            f"{some(adata.obs_names[short])}"
        )


def check_features(values: Any, spots: pd.Index, what: str) -> bool:
    """Refuse features ``[n_spots, n_features]`` that are not finite, or that no model can hold.

    They may be read by rows. Tells whether some are so small that a model cannot hold them, which
    it need not do beside others.
    """
    if values.dtype.kind not in "fiub" or values.ndim != 2:
        raise InputError(f"{what} are no array of numbers, a row a spot; `.toarray()` of sparse")
    largest, tiny = 0.0, False
    for rows in (slice(first, first + _ROWS) for first in range(0, len(spots), _ROWS)):
        part = values[rows]
        if not (finite := np.isfinite(part).all(1)).all():
            raise InputError(f"{what} of spot {some(spots[rows][~finite])} are not finite")
        size = np.abs(part)
        largest = max(largest, float(size.max(initial=0)))
        tiny = tiny or bool(((size > 0) & (size < LEAST_FEATURE)).any())
    if largest and not LEAST_FEATURE <= largest <= _MOST_FEATURE:
        raise InputError(
            f"{what} reach {largest:g}; models hold what reaches {LEAST_FEATURE:g} to "
            f"{_MOST_FEATURE:g}: multiply them by a constant"
        )
    return tiny


def known_encoder(adata: AnnData, encoder: str) -> dict[str, Any] | None:
    """Read which encoder made ``obsm[encoder]``, if it is known; files of AnnData hold it as JSON.

    >>> known_encoder(AnnData(uns={"mine": '{"version": "1"}'}), "mine")
    {'version': '1'}
    """
    found = adata.uns.get(encoder)
    with suppress(ValueError):
        found = json.loads(found) if isinstance(found, str) else found
    if not isinstance(found, Mapping | None):
        raise InputError(f"uns[{encoder!r}] does not say which encoder made the features; embed")
    return None if found is None else dict(found)


def patients_of(cohort: Mapping[str, AnnData]) -> dict[str, str]:
    """Patient of each section of a cohort."""
    return {name: clean_name(adata.obs["patient"].iloc[0]) for name, adata in cohort.items()}
