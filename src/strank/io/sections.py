"""What all readers end with: a section, written into a cohort; names of genes and of patients."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
from anndata import AnnData
from anndata.io import read_elem
from scipy import sparse

from strank.cohort.contract import (
    SectionInfo,
    check_counts,
    check_naming,
    make_section,
    whole_counts,
)
from strank.cohort.folder import open_h5ad
from strank.cohort.library import add_library
from strank.cohort.names import clean_name, given_name, look_alikes
from strank.cohort.store import write_h5ad
from strank.errors import InputError, some
from strank.files import claimed, output_folder, sha256
from strank.io.extent import check_extent, slide_of_array
from strank.io.tables import read_table
from strank.progress import Say
from strank.slides.placement import check_inside, check_on_tissue
from strank.slides.slide import Slide, check_image, picture_for

T = TypeVar("T")
Patients = Mapping[str, str] | Path | str | None


def build_section(
    counts: sparse.csr_matrix,
    *,
    spots: pd.DataFrame,
    genes: pd.DataFrame,
    section: str,
    patient: str,
    slide: Slide,
    technology: str,
    spot_diameter_um: float,
    spot_pitch_um: float,
    provenance: dict[str, Any],
) -> AnnData:
    """Put what a reader found into the contract, once the counts are raw and spots on the tissue.

    ``spots`` has the centres ``x`` and ``y`` in pixels of the slide; further columns are kept.
    ``provenance["notes"]`` are sentences for the user.
    """
    image = slide.path.resolve()
    section = given_name(section, "section")
    counts_file = str(provenance.get("counts_file", f"section {section}"))
    counts = whole_counts(counts)
    check_counts(counts, spots=spots.index, genes=genes.index, name=counts_file)
    if counts.nnz == 0 or not counts.data.any():
        raise InputError(f"{counts_file}: section {section} has no counts at all; is it the file?")
    check_image(slide)
    check_inside(spots, slide, section)
    centres = spots[["x", "y"]].to_numpy(float)
    centres_um = centres * slide.um_per_pixel
    notes, on = provenance.get("notes", []), slide_of_array(spots, technology)
    notes = [*notes, *check_extent(centres_um, spot_pitch_um, on, name=section)]
    if (turned := slide.source.orientation) != 1:
        notes.append(
            f"{slide.path.name} asks to be shown turned or mirrored (orientation {turned} of EXIF) "
            "and is read as stored; if positions were found on the turned image, save it turned "
            "and import that one"
        )
    notes += check_on_tissue(slide, centres, name=section)
    info = SectionInfo(
        image=str(image),
        image_sha256=sha256(image),
        um_per_pixel=slide.um_per_pixel,
        spot_diameter_um=spot_diameter_um,
        spot_pitch_um=spot_pitch_um,
        technology=technology,
        provenance=provenance | {"notes": notes},
    )
    adata = make_section(
        counts, spots=spots, genes=genes, section=section, patient=patient, info=info
    )
    add_library(adata, section, picture_for(slide, spot_diameter_um))
    return adata


def write_sections(
    sections: Iterable[AnnData],
    cohort: Path | str,
    *,
    advance: Callable[[int], object] | None = None,
    say: Say | None = None,
) -> dict[str, AnnData]:
    """Write sections into a cohort, in the place of older ones of the same name: all, or none.

    This is what ``strank import`` does with what a reader gives.

    Parameters
    ----------
    sections
        From the readers of `strank.io`; a generator reads them one after the other, and nothing
        is written unless all could be read.
    cohort
        The folder, ``<cohort>/<section>.h5ad``; it may hold sections.
    advance
        Called with 1 after every section read.
    say
        Called with what to know of names in the cohort: patients, sections and genes that may be
        one, in words. If ``None``, each is a `UserWarning`.

    Returns
    -------
    dict[str, AnnData]
        Section name to section, sorted.

    Raises
    ------
    InputError
        For no sections, two of one name but for capitals, a name that no file can have, genes that
        are named in another way than in the rest of the cohort, or a folder that cannot be written.

    Examples
    --------
    >>> import strank
    >>> runs = {"S1/outs": "S1.tif", "S2/outs": "S2.tif"}
    >>> sections = (
    ...     strank.io.read_visium(run, image=image, patients="patients.csv")
    ...     for run, image in runs.items()
    ... )
    >>> strank.io.write_sections(sections, "cohort")
    Traceback (most recent call last):
    ...
    strank.errors.InputError: patients.csv: not a readable table (...No such file...)...
    """
    cohort, named = Path(cohort), dict[str, AnnData]()
    for adata in sections:
        name = str(adata.obs["section"].iloc[0])
        if name in named:
            raise InputError(f"two sections are called {name}; give each a name of its own")
        if Path(name).name != name or name.startswith(".") or clean_name(name) != name:
            raise InputError(f"section {name!r}: not the name of a file; give it another name")
        named[name] = adata
        if advance is not None:
            advance(1)
    if not named:
        raise InputError("no sections to write")
    # Runs side by side may add to one cohort, each after another, since all look at its names.
    with claimed(cohort, wait=True):
        _add(named, cohort, say)
    return dict(sorted(named.items()))


def _add(named: Mapping[str, AnnData], cohort: Path, say: Say | None) -> None:
    """Write sections whose names and genes fit to those of the cohort."""
    held = {path.stem: path for path in cohort.glob("[!.]*.h5ad") if path.stem not in named}
    folded = {name.casefold(): name for name in held}
    for name in named:
        if (other := folded.setdefault(name.casefold(), name)) != name:
            raise InputError(
                f"sections {other} and {name} are one file where capitals are not told apart "
                "(Windows, macOS); give one another name"
            )
    known = {name: _named_on_disk(path) for name, path in held.items()}
    known |= {
        name: (clean_name(adata.obs["patient"].iloc[0]), adata.var_names)
        for name, adata in named.items()
    }
    genes = {name: those for name, (_, those) in sorted(known.items())}
    check_naming(genes)
    output_folder(cohort)
    for name, adata in named.items():
        write_h5ad(adata, cohort / f"{name}.h5ad")
    for told in look_alikes({name: patient for name, (patient, _) in known.items()}, genes):
        say(told) if say is not None else warnings.warn(told, stacklevel=3)


def section_name(path: Path, section: str | None = None) -> str:
    """Name the section that an output folder is of: ``S1/outs`` is of S1."""
    folder = path.resolve()
    return section or (folder.parent if folder.name == "outs" else folder).name


def run_of(
    path: Path,
    section: str | None,
    patient: str | None,
    patients: Patients,
    image: Path | str | None,
) -> tuple[str, str, Path]:
    """Name the section and the patient of an output folder, and take its image."""
    section = section_name(path, section)
    return section, patient_of(section, patient, patients), needed_image(path, image)


def needed_image(path: Path, image: Path | str | None) -> Path:
    """Refuse to go on without an image."""
    if image is None:
        raise InputError(f"{path}: give the full-resolution H&E image with `image`")
    return Path(image)


def choose_section(path: Path, sections: Mapping[str, T], section: str | None) -> tuple[str, T]:
    """Take the section that is asked for, or the only one there."""
    if section is None and len(sections) == 1:
        return next(iter(sections.items()))
    if section is None:
        raise InputError(
            f"{path}: holds several sections; choose one with `section`: {some(sections, 20)}"
        )
    if section not in sections:
        raise InputError(f"{path}: no section {section}; there are {some(sections, 20)}")
    return section, sections[section]


def patient_of(
    section: str, patient: str | None, patients: Patients = None, stated: str | None = None
) -> str:
    """Name the patient of a section: as given, by the table, or as the platform's files say."""
    given = given_name(patient, "patient") if patient is not None else ""
    read = patients if isinstance(patients, Mapping) else read_patients(patients)
    table = {clean_name(name): clean_name(of) for name, of in read.items()}
    found = given or table.get(clean_name(section)) or clean_name(stated)
    if not found:
        raise InputError(
            f"section {section}: the patient is not known, and splits go by patient; give "
            "`patient=NAME`, or `patients=FILE` with columns section,patient"
            + (f" (FILE has {some(table)})" if table else "")
        )
    return found


def read_patients(path: Path | str | None) -> dict[str, str]:
    """Read which section is of which patient: a CSV table with columns ``section,patient``."""
    if path is None:
        return {}
    table = read_table(Path(path), ["section", "patient"], dtype=str, keep_default_na=False)
    table = table[["section", "patient"]].map(clean_name).drop_duplicates()
    table = table[(table != "").any(axis=1)]  # spreadsheets leave rows of nothing
    for wrong, what in [
        (table["section"] == "", "has no name, or one as nan or NA"),
        (table["patient"] == "", "has no patient, or one as nan or NA"),
        (table["section"].duplicated(), "has two patients"),
    ]:
        if wrong.any():
            raise InputError(f"{path}: section {some(table['section'][wrong])} {what}")
    return dict(zip(table["section"], table["patient"], strict=True))


def _named_on_disk(path: Path) -> tuple[str, pd.Index]:
    """Name the patient and the genes of a section; no patient where reading the cohort fails."""
    with open_h5ad(path) as file:
        patients = read_elem(file["obs/patient"]) if "patient" in file["obs"] else []
        genes = read_elem(file["var"]).index
    return clean_name(patients[0]) if len(patients) else "", genes
