"""HEST-1k: from the hub to sections."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from strank.cohort.store import read_h5ad
from strank.errors import InputError, some
from strank.files import output_folder, read_json
from strank.hub import download
from strank.io.generic import counts_of, genes_of, spot_size_um, spots_of
from strank.io.hest_bench import read_folds
from strank.io.patches import Patches, read_patches, write_mosaic
from strank.io.sections import Origin, build_section, patient_of, read_patients, write_sections
from strank.slides.slide import check_image, open_slide

TASKS = ("IDC", "PRAD", "PAAD", "SKCM", "COAD", "READ", "CCRCC", "HCC", "LUNG", "LYMPH_IDC")
_BENCHMARK, _SAMPLES = "MahmoodLab/hest-bench", "MahmoodLab/hest"
# Without nuclei, transcripts and pictures, which are most of a sample and not read here.
_PARTS = ("st", "wsis", "patches", "metadata")

_TABLES = "HEST_v*.csv"
# Probes that measure no gene; HEST keeps them among the genes of Xenium.
_CONTROLS = r"NegControl|BLANK|Unassigned|Deprecated|antisense_|Intergenic"

_NUMBER = re.compile(r"\d+")


def download_tasks(
    tasks: Sequence[str], folder: Path | str, *, revision: str | None = None
) -> list[Path]:
    """Get tasks of the HEST-Benchmark: splits, counts, patches and genes.

    A stopped download goes on, files are checked against the hub's checksums, and what is there
    already is not asked for. The licence has to be accepted on the hub, once.

    Parameters
    ----------
    tasks
        Some of `TASKS`.
    folder
        The tasks become folders in it.
    revision
        Branch, tag or commit of ``MahmoodLab/hest-bench``; the newest if ``None``.

    Returns
    -------
    list[Path]
        Folder of each task, as `strank.io.hest_bench` reads it.

    Raises
    ------
    InputError
        For an unknown task, and as `strank.hub.download` says.

    Examples
    --------
    >>> download_tasks(["BRCA"], "bench_data")
    Traceback (most recent call last):
    ...
    strank.errors.InputError: no task BRCA; there are IDC, PRAD, PAAD, SKCM, COAD, READ, ...
    """
    unknown = [task for task in tasks if task not in TASKS]
    if unknown or not tasks:
        raise InputError(f"no task {some(unknown)}; there are {', '.join(TASKS)}")
    patterns = [f"{task}/*" for task in tasks]
    found = _download(_BENCHMARK, patterns, folder, revision)
    return [found / task for task in tasks]


def download_samples(
    ids: Sequence[str], folder: Path | str, *, revision: str | None = None
) -> Path:
    """Get samples of HEST-1k: counts, slide, patches and metadata, and the table of all samples.

    As `download_tasks` does.

    Parameters
    ----------
    ids
        Such as ``TENX99``; the hub's table ``HEST_v*.csv`` lists them.
    folder
        Gets ``st/``, ``wsis/``, ``patches/`` and ``metadata/``.
    revision
        Branch, tag or commit of ``MahmoodLab/hest``; the newest if ``None``.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    InputError
        For a sample that is not there, and as `strank.hub.download` says.
    """
    wrong = [name for name in ids if not re.fullmatch(r"\w+", name)]
    if wrong or not ids:
        raise InputError(f"{some(wrong)}: not the id of a sample, such as TENX99")
    patterns = [f"{part}/{name}.*" for name in ids for part in _PARTS]
    found = _download(_SAMPLES, [*patterns, _TABLES], folder, revision)
    absent = [name for name in ids if not (found / f"st/{name}.h5ad").is_file()]
    if absent:
        raise InputError(f"{_SAMPLES}: has no sample {some(absent)}; {found}/{_TABLES} lists them")
    return found


def _download(repo: str, patterns: Sequence[str], folder: Path | str, revision: str | None) -> Path:
    folder = output_folder(Path(folder).expanduser())
    return download(
        repo, repo_type="dataset", revision=revision, allow_patterns=patterns, folder=folder
    )


@dataclass(frozen=True)
class HestFiles:
    """The files of a sample, and what is known of it.

    Attributes
    ----------
    sample
        Its name, which becomes the section's.
    counts, patches, slide
        Where they are, or would be.
    facts
        Metadata of HEST; empty where there is none, as in the benchmark.
    """

    sample: str
    counts: Path
    patches: Path
    slide: Path
    facts: Mapping[str, Any]


def find_hest(folder: Path, samples: Iterable[str] | None = None) -> list[HestFiles]:
    """List samples of HEST-1k, sorted; facts come from the newest table, then from the JSON.

    Labels of patients count within a study ("Patient 1" stands in many), so the title of the study
    is added to them.

    Parameters
    ----------
    folder
        With ``st/``.
    samples
        Which; ``None`` for all that have counts.

    Raises
    ------
    InputError
        For an absent folder or sample, or metadata that cannot be read.
    """
    present = sorted(path.stem for path in (folder / "st").glob("[!.]*.h5ad"))
    if not present:
        raise InputError(f"{folder}: no st/*.h5ad there; is it the folder of HEST-1k?")
    names = present if samples is None else sorted(set(samples))
    if absent := [name for name in names if name not in present]:
        raise InputError(f"{folder}: no st/{absent[0]}.h5ad; there are {some(present, 20)}")
    tables = sorted(
        folder.glob("HEST_v*.csv"), key=lambda p: list(map(int, _NUMBER.findall(p.stem)))
    )
    table = _read_table(tables[-1]) if tables else {}
    found = []
    for name in names:
        stored = folder / "metadata" / f"{name}.json"
        facts = read_json(stored) if stored.is_file() else {}
        if not isinstance(facts, dict):
            raise InputError(f"{stored}: not the metadata of a sample")
        facts = {k: v for k, v in facts.items() if v is not None and v == v} | table.get(name, {})
        found.append(_files(folder, name, f"st/{name}.h5ad", facts))
    return found


def find_hest_bench(task: Path) -> list[HestFiles]:
    """List the samples that the splits of a task name, sorted.

    Raises
    ------
    InputError
        For splits that are absent or cannot be used.
    """
    _, expression = read_folds(task)
    return [_files(task, name, counts, {}) for name, counts in sorted(expression.items())]


def hest_patients(path: Path) -> dict[str, str]:
    """Read patients from a ``HEST_v<version>.csv``, or a table with ``section,patient``."""
    if not re.match(r"HEST_v\d", path.name):
        return read_patients(path)
    return {name: known for name, facts in _read_table(path).items() if (known := _label(facts))}


def import_hest(
    found: Iterable[HestFiles],
    cohort: Path,
    *,
    patient: str | None = None,
    patients: Mapping[str, str] | None = None,
    um_per_pixel: float | None = None,
    gene_id: bool = False,
    advance: Callable[[int], object] | None = None,
) -> dict[str, AnnData]:
    """Read samples and write them as a cohort; no section is written unless all can be read.

    Parameters
    ----------
    found
        From `find_hest` or `find_hest_bench`.
    cohort
        The folder to write to; images that stand in for slides go to its ``images/``.
    patient, patients
        As in `strank.io.sections.patient_of`; they come before the metadata.
    um_per_pixel, gene_id
        As in `read_hest`.
    advance
        Called with 1 after every sample.

    Returns
    -------
    dict[str, AnnData]
        Section name to section, sorted; ``provenance["image_from"]`` is ``"slide"`` or
        ``"patches"``.

    Raises
    ------
    InputError
        As `read_hest`, or if the cohort cannot be written.
    """
    sections = []
    for files in found:
        stated = (patients or {}).get(files.sample) or _label(files.facts)
        origin = Origin(files.sample, patient_of(files.sample, patient or stated, patients))
        mosaic = cohort.resolve() / "images" / f"{files.sample}.tif"
        sections.append(
            read_hest(files, origin, mosaic=mosaic, um_per_pixel=um_per_pixel, gene_id=gene_id)
        )
        if advance is not None:
            advance(1)
    return write_sections(sections, cohort)


def read_hest(
    files: HestFiles,
    origin: Origin,
    *,
    mosaic: Path,
    um_per_pixel: float | None = None,
    gene_id: bool = False,
) -> AnnData:
    """Read one sample into the data contract.

    Where there are patches, spots without one are dropped, with the slide as without: HEST stores
    spots off the tissue, too, and cuts patches only on it. Control probes are dropped.

    Parameters
    ----------
    files
        From `find_hest` or `find_hest_bench`.
    origin
        Names of section and patient.
    mosaic
        Where to write the image that stands in for an absent slide; positions become its pixels.
    um_per_pixel
        Of the slide; ``None`` for the estimate in the metadata, or else what the patches say. What
        is embedded in the slides of HEST is often that of a screen, and not used.
    gene_id
        Name genes by id.

    Raises
    ------
    InputError
        For anything that is absent or cannot be used.
    """
    um = files.facts.get("pixel_size_um_estimated") if um_per_pixel is None else um_per_pixel
    adata = read_h5ad(files.counts)
    spots = spots_of(adata, files.counts)
    genes = ~adata.var_names.astype(str).str.match(_CONTROLS)
    with_patch = np.ones(len(spots), bool)
    if files.patches.is_file():
        patches = read_patches(files.patches, um)
        um = patches.slide_um_per_pixel
        with_patch = _matched(spots, patches, files)
    elif not files.slide.is_file():
        raise InputError(
            f"sample {files.sample}: neither {files.slide} nor {files.patches} is there; download "
            "one of them"
        )
    if um is None:
        raise InputError(
            f"sample {files.sample}: the metadata do not say the µm per pixel of {files.slide}; "
            "give it with --mpp"
        )
    adata, spots = adata[with_patch, genes], spots[with_patch]
    counts = counts_of(adata, files.counts)
    named = genes_of(adata, files.counts, gene_id=gene_id)
    diameter, pitch = _spot_size(adata, spots, float(um), files.facts)
    if files.slide.is_file():
        slide = open_slide(files.slide, float(um))
        check_image(slide)
    else:
        slide = open_slide(mosaic, write_mosaic(patches, mosaic))
        spots = spots.assign(x=spots["x"] / patches.shrink, y=spots["y"] / patches.shrink)
    technology = str(files.facts.get("st_technology", "unknown"))
    return build_section(
        counts,
        spots=spots,
        genes=named,
        origin=origin,
        slide=slide,
        technology="ST" if technology == "Spatial Transcriptomics" else technology,
        spot_diameter_um=diameter,
        spot_pitch_um=pitch,
        provenance={
            "reader": "hest",
            "counts_file": str(files.counts.resolve()),
            "image_from": "slide" if files.slide.is_file() else "patches",
            "dropped_spots": {"without a patch": int((~with_patch).sum())},
            "dropped_controls": int((~genes).sum()),
        },
    )


def _files(folder: Path, sample: str, counts: str, facts: Mapping[str, Any]) -> HestFiles:
    patches, slide = folder / f"patches/{sample}.h5", folder / f"wsis/{sample}.tif"
    return HestFiles(sample, folder / counts, patches, slide, facts)


def _matched(spots: pd.DataFrame, patches: Patches, files: HestFiles) -> np.ndarray:
    """Which spots have a patch; refuse patches that are not cut around their spots."""
    rows = patches.barcodes.get_indexer(spots.index)
    found = rows >= 0
    if not found.any():
        raise InputError(
            f"sample {files.sample}: no barcode stands in both {files.patches} and {files.counts} "
            f"(e.g. {some(patches.barcodes, 2)}; {some(spots.index, 2)})"
        )
    off = np.abs(patches.centres[rows[found]] - spots.loc[found, ["x", "y"]].to_numpy()).max(1)
    if np.median(off) > patches.side * patches.shrink / 8:
        raise InputError(
            f"sample {files.sample}: the middle of most patches of {files.patches} is more than an "
            f"eighth of a patch off its spot ({np.median(off):.0f} pixels in the median); are the "
            "files of one version, and is µm per pixel right?"
        )
    return found


def _spot_size(
    adata: AnnData, spots: pd.DataFrame, um_per_pixel: float, facts: Mapping[str, Any]
) -> tuple[float, float]:
    """Diameter and pitch; those stated for Xenium and Visium HD are not of what HEST pooled."""
    diameter, pitch = (float(facts.get(k, 0)) for k in ("spot_diameter", "inter_spot_dist"))
    pooled = facts.get("st_technology") not in ("Visium", "Spatial Transcriptomics")
    if diameter > 0 and pitch > 0 and not pooled:
        return diameter, pitch
    return spot_size_um(adata, spots, um_per_pixel)


def _label(facts: Mapping[str, Any]) -> str:
    patient, study = (str(facts.get(key, "")).strip() for key in ("patient", "dataset_title"))
    return f"{patient} ({study})" if patient and study else patient


def _read_table(path: Path) -> dict[str, dict[str, Any]]:
    try:
        table = pd.read_csv(path, dtype={"id": str, "patient": str})
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: not a readable table ({error})") from error
    if "id" not in table:
        raise InputError(f"{path}: lacks column id; it has {some(table.columns)}")
    rows = table.drop_duplicates("id", keep="last").set_index("id").to_dict("index")
    return {
        str(name): {str(key): value for key, value in row.items() if pd.notna(value)}
        for name, row in rows.items()
    }
