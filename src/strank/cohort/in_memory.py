"""What a user holds in memory becomes sections of the contract; their own objects stay as they are.

Counts are shared where they are float32 already, and so is all that is not filled in.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse

from strank.cohort.arrays import UNKNOWN, array_of, scanpy_um, spots_of
from strank.cohort.contract import (
    MOST_COUNTS,
    SCHEMA,
    SectionInfo,
    check_counts,
    check_depths,
    check_naming,
    check_section,
    check_slots,
    dtype_of_counts,
    whole_counts,
)
from strank.cohort.genes import IDS, name_genes
from strank.cohort.library import scalefactors
from strank.cohort.names import clean_name, clean_names
from strank.cohort.on_disk import SectionsOnDisk
from strank.errors import InputError, some

# One AnnData, divided by ``obs["section"]``; several; or named ones. A table of SpatialData is one.
Sections: TypeAlias = AnnData | Iterable[AnnData] | Mapping[str, AnnData]
# Notes, and the sections of which each is to be told.
_Notes: TypeAlias = dict[str, list[str]]
# An object, and which of its rows are a section.
_Place: TypeAlias = tuple[AnnData, NDArray[np.bool_]]

_COUNTS = "counts"
_PATIENTS = ("patient", "patient_id", "donor_id", "donor")
# What scanpy keeps of a spot's counts: it may have been counted before genes were cut away.
_DEPTHS = ("total_counts", "n_counts")
# A panel of so few genes, or what is left of a transcriptome.
_FEW_GENES = 5000
_FACTS = frozenset(SectionInfo.__dataclass_fields__)
_told: set[tuple[str, str]] = set()


def as_sections(
    given: Sections, *, patients: bool = True, on_disk: bool = False
) -> Mapping[str, AnnData]:
    """Make sections of the contract of what a user gives, and say once what was filled in.

    A section that keeps the contract is handed on as it is. Where ``patients`` play no part, one
    that is not known is called as the section. Counts may stay ``on_disk``, and then each is made
    when it is asked for. Raises an `InputError` that says what to set where something is not known,
    and for counts that are not raw.

    >>> adata = AnnData(np.eye(3), obsm={"spatial": np.eye(3, 2)})
    >>> adata.obs["patient"], adata.obs["library_size"] = "P1", 10
    >>> section = as_sections({"S1": adata})["S1"]
    >>> list(section.obs["section"]), "section" in adata.obs
    (['S1', 'S1', 'S1'], False)
    """
    if on_disk and isinstance(given, SectionsOnDisk):
        return given
    notes: _Notes = {}
    parts = placed(given, notes, on_disk=on_disk)
    if any(adata.isbacked for adata, _ in parts.values()):
        _tell(notes)
        return SectionsOnDisk(list(parts), partial(_read, parts, patients))
    sections = {name: _section(name, *part, notes, patients) for name, part in parts.items()}
    check_naming({name: adata.var_names for name, adata in sections.items()})
    _tell(notes)
    return sections


def _read(parts: Mapping[str, _Place], patients: bool, name: str) -> AnnData:
    adata, rows = parts[name]
    part = adata if rows.all() else adata[rows]
    part = part.to_memory() if adata.isbacked else part
    return as_sections({name: part}, patients=patients)[name]


def _tell(notes: _Notes) -> None:
    for told, names in notes.items():
        if new := [name for name in names if (told, name) not in _told]:
            _told.update((told, name) for name in new)
            warnings.warn(f"section {some(new)}: {told}", UserWarning, stacklevel=4)


def name_of(adata: AnnData) -> str:
    """Name the only section of an object."""
    names = list(placed(adata))
    if len(names) > 1:
        raise InputError(f"one object holds sections {some(names)}; give a part of it for each")
    return names[0]


def placed(
    given: Sections, notes: _Notes | None = None, *, on_disk: bool = False
) -> dict[str, _Place]:
    """Name the sections, and find the object and the rows of each; counts may stay ``on_disk``."""
    notes = {} if notes is None else notes
    found: dict[str, _Place] = {}
    if isinstance(given, Mapping):
        for name, each in given.items():
            if str(name) in found:
                raise InputError(f"two sections are called {name}; give each a name of its own")
            adata = _table(each, f"section {name}", on_disk)
            if len(held := np.unique(section_labels(adata))) > 1:
                raise InputError(
                    f"section {name} holds several ({some(held)}); give the AnnData by itself, "
                    "not under a name, or one section each"
                )
            found[str(name)] = adata, np.ones(adata.n_obs, bool)
    elif isinstance(given, AnnData) or hasattr(given, "tables"):
        found = _divided(_table(given, "the object", on_disk), "section 1", notes)
    elif isinstance(given, Iterable) and not isinstance(given, (str, bytes)):
        for number, each in enumerate(given, 1):
            parts = _divided(_table(each, f"number {number}", on_disk), f"section {number}", notes)
            if twice := sorted(found.keys() & parts.keys()):
                raise InputError(
                    f'two sections are called {some(twice)}; name them in obs["section"], or give '
                    "a mapping of names"
                )
            found |= parts
    else:
        raise InputError(
            "sections are an AnnData, a list of them or a mapping of names, as "
            f"`strank.read_cohort` reads a folder; got {type(given).__name__}"
        )
    if not found:
        raise InputError("no sections are given")
    return found


def section_labels(adata: AnnData) -> NDArray[np.object_]:
    """Name the section of each spot, ``[n_spots]``; empty where there is no name.

    That is ``obs["section"]``; or what scanpy, squidpy or SpatialData keep, if they name several.
    """
    # Without those attributes a region may be one of the tissue, as tumour and stroma.
    regions = adata.uns.get("spatialdata_attrs", {}).get("region_key")
    for column in ("section", "library_id", regions):
        if column in adata.obs:
            found = pd.Categorical(adata.obs[column])
            names = [clean_name(name) for name in found.categories]
            if column == "section" or len(names) > 1:
                return np.array([*names, ""], object)[found.codes]
    return np.full(adata.n_obs, "", object)


def _divided(adata: AnnData, unnamed: str, notes: _Notes) -> dict[str, _Place]:
    labels = section_labels(adata)
    names = sorted(set(labels))
    if names == [""]:
        libraries = adata.uns.get("spatial", {})
        name = clean_name(next(iter(libraries))) if len(libraries) == 1 else unnamed
        notes.setdefault('its name is taken, as obs["section"] says none', []).append(name)
        return {name: (adata, labels == "")}
    if "" in names:
        lacking = adata.obs_names[labels == ""]
        raise InputError(
            f'obs["section"] has no name, or one as nan or NA, for spot {some(lacking)}; name it, '
            "or take those spots out"
        )
    return {name: (adata, labels == name) for name in names}


def _table(given: Any, name: str, on_disk: bool) -> AnnData:
    """Take the AnnData, or the only table of a SpatialData object."""
    tables = getattr(given, "tables", None)
    if isinstance(tables, Mapping) and len(tables) == 1:
        given = next(iter(tables.values()))
    elif tables is not None:
        raise InputError(f"{name}: tables {some(tables) or 'none'}; give one of `.tables`")
    if not isinstance(given, AnnData):
        raise InputError(f"{name}: an AnnData is needed; got {type(given).__name__}")
    if given.isbacked and not on_disk:
        raise InputError(f"{name}: its counts are on disk; read them by `.to_memory()`")
    return given


def _section(
    name: str, adata: AnnData, rows: NDArray[np.bool_], notes: _Notes, patients: bool
) -> AnnData:
    """Fill in what the contract asks for; what keeps it stays the same object."""
    adata = adata if rows.all() else adata[rows]
    if (kept := _kept_counts(name, adata)) is not None:
        check_slots(adata, name=f"section {name}")
        check_depths(adata, kept, name=f"section {name}")
        return adata
    spots, off = spots_of(adata, f"section {name}"), off_tissue(adata)
    if off.any():
        told = f"{off.sum()} spots outside the tissue (in_tissue 0) are left out"
        notes.setdefault(told, []).append(name)
        adata, spots = adata[~off], spots[~off]
    counts = _counts(name, adata, notes)
    patient = _patient(name, adata, notes) if patients or "patient" in adata.obs else name
    obs = adata.obs.assign(
        section=pd.Categorical([name] * adata.n_obs),
        patient=pd.Categorical([patient] * adata.n_obs),
        library_size=_library_size(name, adata, counts, notes),
    )
    info = info_of(adata, spots, name)
    made = AnnData(
        X=counts,
        obs=obs,
        var=_genes(name, adata, notes),
        obsm={**adata.obsm, "spatial": spots[["x", "y"]].to_numpy(np.float64)},
        uns={**adata.uns, "strank": {"schema": SCHEMA, **asdict(info)}},
    )
    check_section(made, name=f"section {name}")
    return made


def _kept_counts(name: str, adata: AnnData) -> NDArray | sparse.csr_matrix | None:
    """Return the counts of an object that keeps the contract, under this name; ``None`` if not."""
    slots = {"section", "patient", "library_size"} <= set(adata.obs)
    if not (slots and set(adata.uns.get("strank", ())) >= {"schema", *_FACTS}):
        return None
    values = adata.X  # of a part of an object each look makes another copy
    kept = (
        set(adata.obs["section"].unique()) == {name}
        and isinstance(values, (sparse.csr_matrix, np.ndarray))
        and values.dtype in (np.float32, np.float64)
        and _are_counts(values)
    )
    return values if kept else None


def _are_counts(values: NDArray | sparse.csr_matrix) -> bool:
    data: Any = values.data if sparse.issparse(values) else values
    if data.dtype == bool:
        return False
    # Nothing that is no number equals itself rounded.
    return not data.size or bool(
        data.min() >= 0 and data.max() < MOST_COUNTS and (data == np.round(data)).all()
    )


def off_tissue(adata: AnnData) -> NDArray[np.bool_]:
    """Tell the spots that Space Ranger found outside the tissue, if it is of some only."""
    known = pd.to_numeric(adata.obs.get("in_tissue", pd.Series(1, adata.obs_names)), "coerce")
    off = (known == 0).to_numpy()
    return off & (not off.all())


def _counts(name: str, adata: AnnData, notes: _Notes) -> sparse.csr_matrix:
    """Take raw counts from ``X``, or from the layer of that name."""
    for slot, values in {"X": adata.X, _COUNTS: adata.layers.get(_COUNTS)}.items():
        if values is None:
            continue
        if not (sparse.issparse(values) or isinstance(values, np.ndarray)):
            raise InputError(
                f"section {name}: {slot} is a {type(values).__name__}; an array or a sparse matrix "
                "in memory is needed"
            )
        half = values.dtype == np.float16  # which SciPy has not
        counts = whole_counts(sparse.csr_matrix(values, dtype=np.float32 if half else None))
        if not _are_counts(counts):
            continue
        if slot == _COUNTS:
            notes.setdefault('X is no counts, those in layers["counts"] are taken', []).append(name)
        return sparse.csr_matrix(counts, dtype=dtype_of_counts(counts.data.max(initial=0)))
    why = "X is empty"
    try:
        if adata.X is not None:
            check_counts(adata.X, spots=adata.obs_names, genes=adata.var_names, name="X")
    except InputError as error:
        why = str(error)
    raise InputError(f'section {name}: {why}; give raw counts in X or in layers["counts"]')


def _patient(name: str, adata: AnnData, notes: _Notes) -> str:
    column = next((column for column in _PATIENTS if column in adata.obs), None)
    found = [] if column is None else sorted(set(map(clean_name, adata.obs[column].unique())))
    if len(found) > 1:
        raise InputError(
            f'section {name}: obs["{column}"] names several ({some(n or "none" for n in found)}); '
            'if these are several sections, tell them apart in obs["section"]'
        )
    if not any(found):
        raise InputError(
            f"section {name}: the patient is not known, and folds go by patient; set "
            f'adata.obs["patient"] (to {name!r} if each section is of another patient)'
        )
    if column != "patient":
        notes.setdefault(f'the patient is that of obs["{column}"]', []).append(name)
    return found[0]


def _library_size(
    name: str, adata: AnnData, counts: sparse.csr_matrix, notes: _Notes
) -> NDArray[np.float64] | pd.Series:
    """Take all counts of a spot: as ``obs`` says them, or their sum."""
    if "library_size" in adata.obs:
        return adata.obs["library_size"]
    # Sparse matrices of float32 are summed in it.
    total = np.asarray(counts @ np.ones(counts.shape[1]))
    for column in filter(adata.obs.__contains__, _DEPTHS):
        known = pd.to_numeric(adata.obs[column], "coerce").to_numpy(np.float64)
        # Of logarithms, or of other genes, it is none.
        if (known >= total - 0.5).all() and (known == np.round(known)).all():
            if (known != total).any():
                told = f'library_size is obs["{column}"], more than the counts of the genes held'
                notes.setdefault(told, []).append(name)
            return known
    told = "library_size is the sum of the counts of all genes held"
    raw = 0 if adata.raw is None else adata.raw.n_vars
    if adata.n_vars < max(_FEW_GENES, raw):
        told = f"library_size is the sum over {adata.n_vars:,} genes; if more were measured and "
        told += 'cut away, set obs["library_size"] to all counts'
    notes.setdefault(told, []).append(name)
    return total


def _genes(name: str, adata: AnnData, notes: _Notes) -> pd.DataFrame:
    """Keep ``var``; genes of one name are told apart by their ids, as the readers do."""
    if adata.var_names.is_unique:
        return adata.var
    ids = next((clean_names(adata.var[column]) for column in IDS if column in adata.var), None)
    named = name_genes(clean_names(adata.var_names), ids, name=f"section {name}")
    notes.setdefault("genes of one name are told apart by their ids", []).append(name)
    return adata.var.set_axis(named.index)


def known_facts(adata: AnnData, name: str) -> Mapping[str, Any]:
    """Read what ``uns["strank"]`` says of a section; of several it has an entry each."""
    stored = adata.uns.get("strank", {})
    if not isinstance(stored, Mapping):
        return {}
    own = stored.get(name)
    return own if isinstance(own, Mapping) else stored


def info_of(
    adata: AnnData, spots: pd.DataFrame, name: str, um_per_pixel: float | None = None
) -> SectionInfo:
    """Find the facts of a section: as stored, measured by its array, or NaN where not known."""
    known = {key: value for key, value in known_facts(adata, name).items() if key in _FACTS}
    um = um_per_pixel_of(adata, spots, name) if um_per_pixel is None else um_per_pixel
    array = UNKNOWN
    if not (math.isnan(um) or known.keys() >= _FACTS):
        array = array_of(scalefactors(adata, name), spots, um)
    facts: dict[str, Any] = {"spot_diameter_um": array.diameter_um, "spot_pitch_um": array.pitch_um}
    told = {} if array.technology == "unknown" else {"array": array.told}
    facts |= {"technology": array.technology, "provenance": {"reader": "memory"} | told}
    facts |= {"image": "", "image_sha256": ""}
    return SectionInfo(**facts | known | {"um_per_pixel": um})


def um_per_pixel_of(adata: AnnData, spots: pd.DataFrame, name: str) -> float:
    """Find the scale: as stored, measured by the array, as scanpy keeps it; or NaN."""
    stated = known_facts(adata, name).get("um_per_pixel")
    return scanpy_um(spots, scalefactors(adata, name)) if stated is None else float(stated)


def um_of_spots(adata: AnnData) -> NDArray[np.float64]:
    """Spot centres (x, y) of one section or several in µm, ``[n_spots, 2]``; NaN if not known."""
    labels = section_labels(adata)
    positions = np.empty((adata.n_obs, 2))
    for label in set(labels):
        rows = labels == label
        spots = spots_of(part := adata[rows], f"section {label}".strip())
        positions[rows] = spots[["x", "y"]] * um_per_pixel_of(part, spots, label)
    return positions
