"""HEST-1k: from the hub to sections."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData

from strank.cohort.arrays import (
    ST_1K,
    ST_2K,
    VISIUM,
    find_array,
    lattice_of,
    spot_size_um,
)
from strank.cohort.library import scalefactors
from strank.cohort.names import clean_name
from strank.cohort.store import read_h5ad
from strank.errors import InputError, some
from strank.files import output_folder, read_json
from strank.hub import download
from strank.io.generic import object_counts, object_genes, object_spots
from strank.io.hest_bench import read_folds
from strank.io.patches import Patches, image_file, patches_um, read_patches, write_mosaic
from strank.io.sections import (
    Patients,
    build_section,
    choose_section,
    patient_of,
    read_patients,
)
from strank.io.tables import read_table
from strank.slides.scale import Stated
from strank.slides.slide import Slide, check_image, check_override, check_told, open_slide

TASKS = ("IDC", "PRAD", "PAAD", "SKCM", "COAD", "READ", "CCRCC", "HCC", "LUNG", "LYMPH_IDC")
_BENCHMARK, _SAMPLES = "MahmoodLab/hest-bench", "MahmoodLab/hest"
# Without nuclei, transcripts and pictures, which are most of a sample and not read here.
_PARTS = ("st", "wsis", "patches", "metadata")
_TABLES = "HEST_v*.csv"
# Probes that measure no gene; HEST keeps them among the genes of Xenium.
_CONTROLS = r"NegControl|BLANK|Unassigned|Deprecated|antisense_|Intergenic"
_SAME_DISTANCE = 0.2
_NUMBER = re.compile(r"\d+")


def download_hest(
    folder: Path | str,
    *,
    tasks: Sequence[str] = (),
    samples: Sequence[str] = (),
    parts: Sequence[str] = _PARTS,
    revision: str | None = None,
    room: float = 1.0,
) -> list[Path]:
    """Get tasks of the HEST-Benchmark, or samples of HEST-1k, from the Hugging Face hub.

    A stopped download goes on, files are checked against the hub's checksums, and what is there
    already is not asked for. The licence has to be accepted on the hub, once.

    Parameters
    ----------
    folder
        Where to: tasks become folders in it; samples lie in its ``st/``, ``wsis/``, ``patches/``
        and ``metadata/``, beside the table of all samples, ``HEST_v*.csv``.
    tasks
        Some of IDC, PRAD, PAAD, SKCM, COAD, READ, CCRCC, HCC, LUNG and LYMPH_IDC.
    samples
        Such as ``TENX99``.
    parts
        What to get of samples: all that `read_hest` reads, or without ``"wsis"``, the slides, which
        are most of it; then patches stand in.
    revision
        Branch, tag or commit of ``MahmoodLab/hest-bench`` or ``MahmoodLab/hest``; the newest if
        ``None``.
    room
        How many times what is still to come must fit on the disk, more than once if it is to be
        worked on there.

    Returns
    -------
    list[Path]
        The folder of each task, or that of the samples, for `read_hest`.

    Raises
    ------
    InputError
        For a task or sample that is not there; without network, access or space, and for a damaged
        file.

    Examples
    --------
    >>> import strank
    >>> strank.io.download_hest("bench_data", tasks=["BRCA"])
    Traceback (most recent call last):
    ...
    strank.errors.InputError: no task BRCA; there are IDC, PRAD, PAAD, SKCM, COAD, READ, ...
    """
    if bool(tasks) == bool(samples):
        raise InputError("give either `tasks` or `samples`")
    if unknown := [task for task in tasks if task not in TASKS]:
        raise InputError(f"no task {some(unknown)}; there are {', '.join(TASKS)}")
    if wrong := [name for name in samples if not re.fullmatch(r"\w+", name)]:
        raise InputError(f"{some(wrong)}: not the id of a sample, such as TENX99")
    repo = _BENCHMARK if tasks else _SAMPLES
    patterns = [f"{part}/{name}.*" for name in samples for part in parts] + [_TABLES]
    found = download(
        repo,
        repo_type="dataset",
        revision=revision,
        allow_patterns=[f"{task}/*" for task in tasks] or patterns,
        folder=output_folder(Path(folder).expanduser()),
        room=room,
    )
    if absent := [name for name in samples if not (found / f"st/{name}.h5ad").is_file()]:
        raise InputError(f"{_SAMPLES}: has no sample {some(absent)}; {found}/{_TABLES} lists them")
    return [found / task for task in tasks] or [found]


class HestSample(NamedTuple):
    """The files of a sample, as they are or would be called, and what HEST's table says of it."""

    counts: Path
    patches: Path
    slide: Path
    metadata: Path
    row: Mapping[str, Any]


def read_hest(
    path: Path | str,
    *,
    section: str | None = None,
    patient: str | None = None,
    patients: Patients = None,
    um_per_pixel: float | None = None,
    um_per_pixel_override: bool = False,
    gene_id: bool = False,
    image_folder: Path | str | None = None,
) -> AnnData:
    """Read a sample of HEST-1k, or of a task of HEST-Benchmark, into the data contract.

    Where there are patches, spots without one are dropped, with the slide as without: HEST stores
    spots off the tissue, too, and cuts patches only on it. Control probes are dropped. Facts come
    from the newest table ``HEST_v*.csv``, then from the JSON.

    Parameters
    ----------
    path
        Of HEST-1k: folder with ``st/``, and ``wsis/`` or ``patches/``; ``metadata/`` and
        ``HEST_v*.csv``. A task: folder with ``splits/``, ``adata/`` and ``patches/``; it knows no
        patients.
    section
        Which sample, ``TENX99`` say; `find_hest` lists them. ``None`` for the only one.
    patient, patients, um_per_pixel_override, gene_id
        As in `read_visium`; the table may be a ``HEST_v*.csv``. The first two come before the
        metadata, whose labels count within a study ("Patient 1" stands in many), so the study's
        title is added to them.
    um_per_pixel
        Of the slide; ``None`` for the estimate in the metadata, or else what the patches say. What
        is embedded in the slides of HEST is often that of a screen, and not used.
    image_folder
        Where to write the image that stands in for an absent slide: the patches, losslessly, with
        white between them, ``<section>.tif``; positions become its pixels.

    Returns
    -------
    AnnData
        ``X`` the raw counts ``[n_spots, n_genes]``, ``obsm["spatial"]`` the centres in pixels of
        the image; ``uns["strank"]["provenance"]["image_from"]`` is ``"slide"`` or ``"patches"``.

    Raises
    ------
    InputError
        For anything that is absent or cannot be used.

    Examples
    --------
    >>> import strank
    >>> strank.io.read_hest("hest_data", section="TENX99")
    Traceback (most recent call last):
    ...
    strank.errors.InputError: hest_data: no st/*.h5ad there and no splits/; it is neither ...
    """
    path = Path(path)
    section, sample = choose_section(path, hest_samples(path), section)
    facts = hest_facts(sample)
    patient = patient_of(section, patient, _hest_patients(patients), hest_patient(facts))
    um = _told_um(um_per_pixel, um_per_pixel_override, facts, sample)
    adata = read_h5ad(sample.counts)
    spots = object_spots(adata, sample.counts)
    genes = ~adata.var_names.astype(str).str.match(_CONTROLS)
    with_patch, has_slide = np.ones(len(spots), bool), sample.slide.is_file()
    if sample.patches.is_file():
        patches = read_patches(sample.patches, um)
        um = patches.slide_um_per_pixel
        with_patch = _matched(spots, patches, section, sample)
    elif not has_slide:
        raise InputError(
            f"sample {section}: neither {sample.slide} nor {sample.patches} is there; download "
            "one of them"
        )
    um = _known_um(um, section, sample)
    adata, spots = adata[with_patch, genes], spots[with_patch]
    counts = object_counts(adata, sample.counts)
    named = object_genes(adata, sample.counts, gene_id=gene_id)
    diameter, pitch, notes = _spot_size(adata, spots, um, facts)
    if has_slide:
        slide = open_slide(sample.slide, um)
        check_image(slide)
    else:
        mosaic = image_file(sample.patches, section, image_folder)
        slide, spots = _patches_as_slide(patches, mosaic, spots)
    technology = str(facts.get("st_technology", "unknown"))
    return build_section(
        counts,
        spots=spots,
        genes=named,
        section=section,
        patient=patient,
        slide=slide,
        technology="ST" if technology == "Spatial Transcriptomics" else technology,
        spot_diameter_um=diameter,
        spot_pitch_um=pitch,
        provenance={
            "reader": "hest",
            "counts_file": str(sample.counts.resolve()),
            "image_from": "slide" if has_slide else "patches",
            "dropped_spots": {"without a patch": int((~with_patch).sum())},
            "dropped_controls": int((~genes).sum()),
            "notes": notes,
        },
    )


def _told_um(
    um_per_pixel: float | None, override: bool, facts: Mapping[str, Any], sample: HestSample
) -> float | None:
    """Take what is given, which may not contradict the metadata or the patches, or the metadata."""
    check_override(um_per_pixel, override)
    path, who = sample.slide, "the metadata say"
    known = _positive(facts, "pixel_size_um_estimated") or None
    if um_per_pixel is None or override:
        return known if um_per_pixel is None else um_per_pixel
    if known is None and sample.patches.is_file():
        path, who, known = sample.patches, "the file says", patches_um(sample.patches)
    if known is not None:
        check_told(path, um_per_pixel, Stated(float(known), float(known)), who)
    return um_per_pixel


def _positive(facts: Mapping[str, Any], key: str) -> float:
    """Take a number from the metadata, 0 for what is none."""
    try:
        number = float(facts.get(key, 0))
    except (TypeError, ValueError, OverflowError):
        return 0.0
    return number if 0 < number < np.inf else 0.0


def _known_um(um: object, section: str, sample: HestSample) -> float:
    """Refuse a slide whose µm per pixel nobody says."""
    if um is None:
        raise InputError(
            f"sample {section}: the metadata do not say the µm per pixel of {sample.slide}; "
            "give it with `um_per_pixel`"
        )
    return float(um)  # type: ignore[arg-type]


def _patches_as_slide(
    patches: Patches, mosaic: Path, spots: pd.DataFrame
) -> tuple[Slide, pd.DataFrame]:
    """Write the patches where a slide is absent, and give spots in its pixels."""
    slide = open_slide(mosaic, write_mosaic(patches, mosaic))
    return slide, spots.assign(x=spots["x"] / patches.shrink, y=spots["y"] / patches.shrink)


def find_hest(path: Path | str) -> list[str]:
    """Name the samples of HEST-1k that have counts, or those of a task's splits, sorted.

    Parameters
    ----------
    path
        As in `read_hest`.

    Raises
    ------
    InputError
        For an absent folder, and splits or a table ``HEST_v*.csv`` that cannot be used.

    Examples
    --------
    >>> import strank
    >>> strank.io.find_hest("hest_data")
    Traceback (most recent call last):
    ...
    strank.errors.InputError: hest_data: no st/*.h5ad there and no splits/; it is neither ...
    """
    return list(hest_samples(Path(path)))


def hest_samples(folder: Path) -> dict[str, HestSample]:
    """Find the samples of a folder of HEST-1k, or of a task of the benchmark."""
    if (folder / "splits").is_dir():
        counts = read_folds(folder)[1]
    else:
        counts = {path.stem: f"st/{path.name}" for path in folder.glob("st/[!.]*.h5ad")}
    if not counts:
        raise InputError(
            f"{folder}: no st/*.h5ad there and no splits/; it is neither the folder of HEST-1k nor "
            "a task of HEST-Benchmark"
        )
    tables = sorted(folder.glob(_TABLES), key=lambda p: list(map(int, _NUMBER.findall(p.stem))))
    rows = _read_rows(tables[-1]) if tables else {}
    return {
        name: HestSample(
            folder / counts[name],
            folder / f"patches/{name}.h5",
            folder / f"wsis/{name}.tif",
            folder / f"metadata/{name}.json",
            rows.get(name, {}),
        )
        for name in sorted(counts)
    }


def hest_facts(sample: HestSample) -> dict[str, Any]:
    """Metadata, corrected by the newest table; a task of the benchmark has neither."""
    facts = read_json(sample.metadata) if sample.metadata.is_file() else {}
    if not isinstance(facts, dict):
        raise InputError(f"{sample.metadata}: not the metadata of a sample")
    return {k: v for k, v in facts.items() if v is not None and v == v} | dict(sample.row)


def _matched(spots: pd.DataFrame, patches: Patches, section: str, sample: HestSample) -> np.ndarray:
    """Which spots have a patch; refuse patches that are not cut around their spots."""
    rows = patches.barcodes.get_indexer(spots.index)
    found = rows >= 0
    if not found.any():
        raise InputError(
            f"sample {section}: no barcode stands in both {sample.patches} and {sample.counts} "
            f"(e.g. {some(patches.barcodes, 2)}; {some(spots.index, 2)})"
        )
    off = np.abs(patches.centres[rows[found]] - spots.loc[found, ["x", "y"]].to_numpy()).max(1)
    if np.median(off) > patches.side * patches.shrink / 8:
        raise InputError(
            f"sample {section}: the middle of most patches of {sample.patches} is more than an "
            f"eighth of a patch off its spot ({np.median(off):.0f} pixels in the median); are the "
            "files of one version, and is µm per pixel right?"
        )
    return found


def _spot_size(
    adata: AnnData, spots: pd.DataFrame, um_per_pixel: float, facts: Mapping[str, Any]
) -> tuple[float, float, list[str]]:
    """Diameter, pitch and doubts; those stated for Xenium and Visium HD are not of what is pooled.

    Of what is stated the positions decide; some samples have the two swapped.
    """
    diameter, pitch = (_positive(facts, key) for key in ("spot_diameter", "inter_spot_dist"))
    by_scanpy, apart = spot_size_um(scalefactors(adata), spots, um_per_pixel)
    pooled = facts.get("st_technology") not in ("Visium", "Spatial Transcriptomics")
    if pooled or not (diameter > 0 and pitch > 0):
        return by_scanpy, apart, []
    told = f"the metadata say spots of {diameter:g} µm, {pitch:g} µm apart"
    stand = f"at {um_per_pixel:.4g} µm per pixel they stand {apart:.0f} µm apart"
    notes = _other_scale(spots, um_per_pixel)
    if diameter <= pitch:
        doubt = f"{told}, but {stand}; is µm per pixel right (`um_per_pixel`)?"
        return diameter, pitch, notes or [doubt] * (not _near(pitch, apart))
    if _near(diameter, apart) and not _near(pitch, apart):
        return pitch, diameter, [*notes, f"{told}: the two are swapped, since {stand}"]
    size = f"{told}, which would overlap; {stand}, which is taken for both"
    return apart, apart, [*notes, size]


def _near(stated: float, measured: float) -> bool:
    """Whether two distances are one; jitter and missing neighbours add some."""
    return abs(stated / measured - 1) <= _SAME_DISTANCE


def _other_scale(spots: pd.DataFrame, um_per_pixel: float) -> list[str]:
    """Doubt µm per pixel that makes a known array larger or smaller than it was printed."""
    grid = lattice_of(spots)
    array = find_array(grid, among=(ST_1K, ST_2K, VISIUM)) if grid else None
    if grid is None or array is None:
        return []
    um = array.step_um / grid.step_px
    doubt = (
        f"the array of {array.told} makes it {um:.4g} µm per pixel, and not {um_per_pixel:.4g}; if "
        f"that is right, give `um_per_pixel={um:.4g}` and `um_per_pixel_override=True`"
    )
    return [doubt] * Stated(um, um).contradicts(um_per_pixel)


def hest_patient(facts: Mapping[str, Any]) -> str:
    """Name the patient, within a study; empty if that is not known."""
    patient, study = (clean_name(facts.get(key)) for key in ("patient", "dataset_title"))
    return f"{patient} ({study})" if patient and study else patient


def _hest_patients(patients: Patients) -> Mapping[str, str]:
    if isinstance(patients, Mapping):
        return patients
    if patients is None or not re.match(r"HEST_v\d", Path(patients).name):
        return read_patients(patients)
    rows = _read_rows(Path(patients))
    return {name: known for name, row in rows.items() if (known := hest_patient(row))}


def _read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """Facts of samples by a ``HEST_v<version>.csv``: only those that are known."""
    table = read_table(path, ["id"], dtype={"id": str, "patient": str})
    rows = table.drop_duplicates("id", keep="last").set_index("id").to_dict("index")
    return {
        str(name): {str(key): value for key, value in row.items() if pd.notna(value)}
        for name, row in rows.items()
    }
