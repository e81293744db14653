"""What all readers end with: a section, written into a cohort; names of genes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from strank.cohort.contract import SectionInfo, check_counts, check_naming, make_section, naming
from strank.cohort.store import read_h5ad, write_h5ad
from strank.errors import InputError, some
from strank.files import output_folder, sha256
from strank.slides.slide import Slide, check_image, open_slide
from strank.slides.tissue import check_on_tissue

# Scanners and grids agree to a percent; a wrong image or objective is off by far more.
_TOLERANCE = 0.05


def name_genes(
    symbols: pd.Index | None,
    ids: pd.Index | None,
    *,
    gene_id: bool = False,
    name: str = "the file",
) -> pd.DataFrame:
    """Name the genes of a section: by symbol, or by id where that is wished or all there is.

    Parameters
    ----------
    symbols, ids
        Of each gene, as the file has them; ``None`` for what it has not. Ensembl ids in the place
        of symbols are taken as ids.
    gene_id
        Name genes by id.
    name
        File named in an error.

    Returns
    -------
    pandas.DataFrame
        Indexed by unique names, with ``gene_id`` where ids are known. A symbol that stands twice is
        followed by ``_`` and the id in all its places; a gene without symbol is named by its id.

    Raises
    ------
    InputError
        If names cannot be made unique, or ids are wished and there are none.

    Examples
    --------
    >>> ids = pd.Index(["ENSG00000284770", "ENSG00000280987", "ENSG00000015479"])
    >>> list(name_genes(pd.Index(["TBCE", "MATR3", "MATR3"]), ids).index)
    ['TBCE', 'MATR3_ENSG00000280987', 'MATR3_ENSG00000015479']
    """
    if ids is None and symbols is not None and naming(symbols) == "Ensembl ids":
        ids = symbols
    if ids is None:
        if gene_id:
            raise InputError(f"{name}: holds no gene ids; leave --gene-id out")
        return pd.DataFrame(index=_unique(_text(symbols), name))
    ids = _unique(_text(ids), name)
    if gene_id or symbols is None:
        return pd.DataFrame({"gene_id": ids}, index=ids)
    names = _text(symbols)
    names = names.where(names != "", ids)
    # Never "-1": which of the copies gets it depends on the file, and sections would not match.
    apart = np.where(names == ids, names, names + "_" + ids)
    names = names.where(~names.duplicated(keep=False), apart)
    return pd.DataFrame({"gene_id": ids}, index=_unique(names, name))


def _text(names: pd.Index | None) -> pd.Index:
    column = pd.Series(names, dtype=object)
    return pd.Index(column.where(column.notna(), "").astype(str))


def _unique(names: pd.Index, name: str) -> pd.Index:
    if (names == "").any():
        raise InputError(f"{name}: gene {int(np.argmax(names == '')) + 1} has no name")
    if not names.is_unique:
        raise InputError(
            f"{name}: gene {some(names[names.duplicated()].unique())} stands twice, and ids that "
            "tell the copies apart are not known; rename them or take them out"
        )
    return names


@dataclass(frozen=True)
class Origin:
    """What a section is called, and who it came from.

    Attributes
    ----------
    section, patient
        Names.
    """

    section: str
    patient: str


def open_measured(path: Path, measured: float, given: float | None = None) -> Slide:
    """Open an image whose µm per pixel the platform's files measure.

    Parameters
    ----------
    path
        The full-resolution image.
    measured
        µm per pixel, from the grid of spots or the alignment.
    given
        What the user says; it is taken, if it agrees.

    Raises
    ------
    InputError
        If what is given, or else what the image says of itself, differs by more than 5 %; otherwise
        as `strank.slides.slide.open_slide`.
    """
    slide = open_slide(path, measured if given is None else given)
    told, who = (slide.source.um_per_pixel, "the image says") if given is None else (given, "--mpp")
    if told is not None and abs(told / measured - 1) > _TOLERANCE:
        raise InputError(
            f"{path}: {who} {told:g} µm per pixel, but the positions make it {measured:.4g}; is it "
            f"the image that they are pixels of? If so, give --mpp {measured:.4g}"
        )
    return slide


def build_section(
    counts: sparse.csr_matrix,
    *,
    spots: pd.DataFrame,
    genes: pd.DataFrame,
    origin: Origin,
    slide: Slide,
    technology: str,
    spot_diameter_um: float,
    spot_pitch_um: float,
    provenance: dict[str, Any],
) -> AnnData:
    """Put what a reader found into the contract, once the counts are raw and spots on the tissue.

    Parameters
    ----------
    counts
        Over all measured genes, ``[n_spots, n_genes]``.
    spots
        Indexed by name, with ``x`` and ``y`` in pixels of the slide; further columns are kept.
    genes
        From `strank.io.sections.name_genes`.
    origin
        Names of section and patient.
    slide
        The full-resolution image, with its scale.
    technology, spot_diameter_um, spot_pitch_um, provenance
        As in `strank.cohort.contract.SectionInfo`; ``provenance["counts_file"]`` is named in errors
        of the counts.

    Raises
    ------
    InputError
        For counts that are not raw, spots outside the image or off the tissue, and other breaches
        of the contract.
    """
    name, image = origin.section, slide.path.resolve()
    counts_file = str(provenance.get("counts_file", f"section {name}"))
    check_counts(counts, spots=spots.index, genes=genes.index, name=counts_file)
    check_image(slide)
    _check_inside(spots, slide, name)
    check_on_tissue(slide, spots[["x", "y"]].to_numpy(float), name=name)
    info = SectionInfo(
        image=str(image),
        image_sha256=sha256(image),
        um_per_pixel=slide.um_per_pixel,
        spot_diameter_um=spot_diameter_um,
        spot_pitch_um=spot_pitch_um,
        technology=technology,
        provenance=provenance,
    )
    return make_section(
        counts, spots=spots, genes=genes, section=name, patient=origin.patient, info=info
    )


def write_sections(sections: Iterable[AnnData], cohort: Path) -> dict[str, AnnData]:
    """Write sections into a cohort, in the place of older ones of the same name.

    Nothing is written unless all could be read.

    Parameters
    ----------
    sections
        From `build_section`; a generator may read them.
    cohort
        The folder, which may hold sections.

    Returns
    -------
    dict[str, AnnData]
        Section name to section, sorted.

    Raises
    ------
    InputError
        For no sections, two of one name or with a name that no file can have, genes that are named
        in another way than in the rest of the cohort, or a folder that cannot be written.
    """
    named: dict[str, AnnData] = {}
    for adata in sections:
        name = str(adata.obs["section"].iloc[0])
        if name in named:
            raise InputError(f"two sections are called {name}; give each a name of its own")
        if Path(name).name != name or name.startswith("."):
            raise InputError(f"section {name!r}: not the name of a file; give it another name")
        named[name] = adata
    if not named:
        raise InputError("no sections to write")
    held = {path.stem: path for path in sorted(cohort.glob("[!.]*.h5ad"))}
    check_naming(
        {name: _gene_names(path) for name, path in held.items() if name not in named}
        | {name: adata.var_names for name, adata in named.items()}
    )
    output_folder(cohort)
    for name, adata in named.items():
        write_h5ad(adata, cohort / f"{name}.h5ad")
    return dict(sorted(named.items()))


def patient_of(section: str, patient: str | None, patients: Mapping[str, str] | None) -> str:
    """Find the patient of a section that the platform's files do not name.

    Parameters
    ----------
    section
        Name.
    patient
        Of all sections, or ``None``.
    patients
        Section to patient, from `read_patients`.

    Raises
    ------
    InputError
        If neither knows.

    Examples
    --------
    >>> patient_of("C2", None, {"C2": "C"})
    'C'
    """
    found = patient or (patients or {}).get(section)
    if not found:
        raise InputError(
            f"section {section}: the patient is not known, and splits go by patient; give "
            "--patient NAME, or --patients FILE with columns section,patient"
            + (f" (FILE has {some(patients)})" if patients else "")
        )
    return found


def read_patients(path: Path) -> dict[str, str]:
    """Read which section is of which patient: a CSV table with columns ``section,patient``.

    Raises
    ------
    InputError
        For a table without them, an empty patient, or a section with two.
    """
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: not a readable table ({error})") from error
    absent = [column for column in ("section", "patient") if column not in table]
    if absent:
        raise InputError(f"{path}: lacks column {some(absent)}; it has {some(table.columns)}")
    table = table[["section", "patient"]].drop_duplicates()
    for wrong, what in [
        (table["patient"] == "", "has no patient"),
        (table["section"].duplicated(), "has two patients"),
    ]:
        if wrong.any():
            raise InputError(f"{path}: section {some(table['section'][wrong])} {what}")
    return dict(zip(table["section"], table["patient"], strict=True))


def _gene_names(path: Path) -> pd.Index:
    adata = read_h5ad(path, backed="r")
    adata.file.close()
    return adata.var_names


def _check_inside(spots: pd.DataFrame, slide: Slide, section: str) -> None:
    width, height = slide.size
    x, y = spots["x"], spots["y"]
    outside = ~(x.between(0, width, "left") & y.between(0, height, "left"))
    if outside.any():
        swapped = y.between(0, width, "left") & x.between(0, height, "left")
        first = spots[outside].iloc[0]
        raise InputError(
            f"section {section}: spot {some(spots.index[outside])} lies outside {slide.path.name} "
            f"({first['x']:.0f}, {first['y']:.0f}; the image is {width} x {height})"
            + "; with x and y swapped all lie inside"
            * bool(swapped.all())
        )
