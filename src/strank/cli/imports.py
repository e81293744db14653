"""``strank import``: from the files of a platform to a cohort."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from strank.cli.console import Json, split_names
from strank.cli.imported import (
    GeneId,
    Images,
    Mpp,
    Names,
    Output,
    Patient,
    Patients,
    patient_table,
    tell,
)
from strank.errors import InputError
from strank.progress import progress

if TYPE_CHECKING:
    from anndata import AnnData

    from strank.readers.sections import Origin

__all__ = ["imports"]

imports = typer.Typer(help="1. Read sections of a platform into a cohort.", no_args_is_help=True)


@imports.command("st")
def import_st(
    folder: Annotated[Path, typer.Argument(help="Folder with images/, counts/ and spots/.")],
    output: Output,
    patient_pattern: Annotated[
        str | None,
        typer.Option(
            help="Regular expression that finds the patient in a section's name; "
            "the leading letters if not given."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Read legacy Spatial Transcriptomics sections into a cohort.

    Nothing is written unless every section can be read; so it is with all platforms.

    [bold]Example:[/] strank import st her2st -o cohort
    """
    from strank.readers import st

    pattern = st.PATIENT_PATTERN if patient_pattern is None else patient_pattern
    with progress("Reading", len(st.find_sections(folder))) as advance:
        sections = st.import_st(folder, output, patient_pattern=pattern, advance=advance)
    tell(sections, output, as_json)


@imports.command("visium")
def import_visium(
    runs: Annotated[list[Path], typer.Argument(help="Outputs of Space Ranger, one a section.")],
    output: Output,
    image: Images = None,
    section: Names = None,
    patient: Patient = None,
    patients: Patients = None,
    mpp: Mpp = None,
    gene_id: GeneId = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="Counts of raw_feature_bc_matrix, under tissue.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Read Visium: Space Ranger 1.x to 4.x, with or without CytAssist.

    [bold]Example:[/] strank import visium S1/outs S2/outs --image S1.tif --image S2.tif
    --section S1,S2 --patients patients.csv -o cohort
    """
    from strank.readers.visium import VisiumRun, read_visium

    def read(run: Path, origin: Origin, picture: Path | None) -> AnnData:
        return read_visium(VisiumRun(run, origin, picture, mpp), gene_id=gene_id, raw=raw)

    _import_runs(read, runs, image, section, (patient, patients), output, as_json)


@imports.command("visium-hd")
def import_visium_hd(
    runs: Annotated[list[Path], typer.Argument(help="Outputs of Space Ranger, one a section.")],
    output: Output,
    bin_um: Annotated[
        float, typer.Option("--bin", help="Side of a bin in µm; other than 8 and 16, of 2 µm bins.")
    ] = 16.0,
    image: Images = None,
    section: Names = None,
    patient: Patient = None,
    patients: Patients = None,
    mpp: Mpp = None,
    gene_id: GeneId = False,
    as_json: Json = False,
) -> None:
    """Read Visium HD in bins of 8, 16 or any other even number of µm.

    [bold]Example:[/] strank import visium-hd S1/outs --image S1.tif --patient P1 --bin 48 -o cohort
    """
    from strank.readers.visium_hd import read_visium_hd

    def read(run: Path, origin: Origin, picture: Path | None) -> AnnData:
        picture = _needed(picture, run)
        options: dict[str, Any] = {"bin_um": bin_um, "um_per_pixel": mpp, "gene_id": gene_id}
        return read_visium_hd(run, origin=origin, image=picture, **options)

    _import_runs(read, runs, image, section, (patient, patients), output, as_json)


@imports.command("xenium")
def import_xenium(
    runs: Annotated[list[Path], typer.Argument(help="Output bundles, one a section.")],
    output: Output,
    bin_um: Annotated[
        float | None,
        typer.Option("--bin", help="Side of pseudo-spots in µm; single cells if not given."),
    ] = None,
    image: Images = None,
    alignment: Annotated[
        Path | None,
        typer.Option(help="Explorer's matrix; <image>*_he_imagealignment.csv if not given."),
    ] = None,
    section: Names = None,
    patient: Patient = None,
    patients: Patients = None,
    mpp: Mpp = None,
    gene_id: GeneId = False,
    as_json: Json = False,
) -> None:
    """Read Xenium: single cells, or pseudo-spots that meet models of Visium.

    [bold]Example:[/] strank import xenium bundle --image he.tif --bin 100 --patient P1 -o cohort
    """
    from strank.readers.xenium import read_xenium

    if alignment is not None and len(runs) > 1:
        raise InputError("--alignment is of one image; of several, keep each beside its image")

    def read(run: Path, origin: Origin, picture: Path | None) -> AnnData:
        options: dict[str, Any] = {"size_um": bin_um, "alignment": alignment, "um_per_pixel": mpp}
        picture = _needed(picture, run)
        return read_xenium(run, origin=origin, image=picture, gene_id=gene_id, **options)

    _import_runs(read, runs, image, section, (patient, patients), output, as_json)


@imports.command("hest")
def import_hest(
    folder: Annotated[Path, typer.Argument(help="Folder with st/, wsis/ and metadata/.")],
    output: Output,
    samples: Annotated[
        str | None, typer.Option(help="Which, separated by commas; all if not given.")
    ] = None,
    patient: Patient = None,
    patients: Annotated[
        Path | None, typer.Option(help="HEST_v*.csv, or a CSV table with columns section,patient.")
    ] = None,
    mpp: Mpp = None,
    gene_id: GeneId = False,
    as_json: Json = False,
) -> None:
    """Read samples of HEST-1k; patches stand in where the slide was not downloaded.

    Patients come from the newest HEST_v*.csv there, which has the corrected labels.

    [bold]Example:[/] strank import hest hest_data --samples TENX99,TENX95 -o cohort
    """
    from strank.readers.hest import find_hest

    found = find_hest(folder, split_names(samples))
    _import_hest(found, (patient, patients), mpp, gene_id, output, as_json)


@imports.command("hest-bench")
def import_hest_bench(
    task: Annotated[Path, typer.Argument(help="Folder with splits/, adata/ and patches/.")],
    output: Output,
    patient: Patient = None,
    patients: Annotated[
        Path | None, typer.Option(help="HEST_v*.csv, or a CSV table with columns section,patient.")
    ] = None,
    mpp: Mpp = None,
    gene_id: GeneId = False,
    as_json: Json = False,
) -> None:
    """Read a task of HEST-Benchmark; its patches stand in for the slides.

    [bold]Example:[/] strank import hest-bench bench_data/IDC --patients HEST_v1_3_0.csv -o cohort
    """
    from strank.readers.hest import find_hest_bench

    _import_hest(find_hest_bench(task), (patient, patients), mpp, gene_id, output, as_json)


@imports.command("anndata")
def import_anndata(
    file: Annotated[Path, typer.Argument(help='.h5ad with raw counts and obsm["spatial"].')],
    output: Output,
    image: Annotated[
        Path, typer.Option(help="The image whose pixels obsm counts; of several sections a folder.")
    ],
    section: Annotated[
        str | None, typer.Option(help='Name; obs["section"], or the file\'s, if not given.')
    ] = None,
    patient: Patient = None,
    patients: Patients = None,
    mpp: Mpp = None,
    layer: Annotated[str | None, typer.Option(help="Where raw counts are; X if not given.")] = None,
    gene_id: GeneId = False,
    as_json: Json = False,
) -> None:
    """Read any AnnData with raw counts, positions in pixels, and an image.

    [bold]Example:[/] strank import anndata mine.h5ad --image mine.tif --patient P1 -o cohort
    """
    from strank.readers.objects import import_anndata as read

    options: dict[str, Any] = {"section": section, "layer": layer, "gene_id": gene_id}
    options |= {"patient": patient, "patients": patient_table(patients), "um_per_pixel": mpp}
    tell(read(file, output, image=image, **options), output, as_json)


@imports.command("spatialdata")
def import_spatialdata(
    zarr: Annotated[Path, typer.Argument(help="A SpatialData zarr with a table of raw counts.")],
    output: Output,
    image: Annotated[
        str | None, typer.Option(help="An image of the object, or a file; its only if not given.")
    ] = None,
    table: Annotated[str | None, typer.Option(help="Its only table if not given.")] = None,
    section: Annotated[str | None, typer.Option(help="Name; the zarr's if not given.")] = None,
    patient: Patient = None,
    patients: Patients = None,
    mpp: Mpp = None,
    gene_id: GeneId = False,
    as_json: Json = False,
) -> None:
    """Read a SpatialData object: its table, what the table annotates, and its image.

    [bold]Example:[/] strank import spatialdata mine.zarr --mpp 0.5 --patient P1 -o cohort
    """
    from strank.readers.spatial_data import import_spatialdata as read

    options: dict[str, Any] = {"section": section, "table": table, "gene_id": gene_id}
    options |= {"patient": patient, "patients": patient_table(patients), "um_per_pixel": mpp}
    tell(read(zarr, output, image=image, **options), output, as_json)


def _import_runs(
    read: Callable[[Path, Origin, Path | None], AnnData],
    runs: list[Path],
    images: list[Path] | None,
    names: str | None,
    of_patients: tuple[str | None, Path | None],
    output: Path,
    as_json: bool,
) -> None:
    """Read one section a run, with the image, name and patient that belong to it."""
    from strank.readers.sections import Origin, patient_of, write_sections

    pictures: list[Path | None] = [*images] if images else [None] * len(runs)
    # `S1/outs` is section S1.
    folders = [run.resolve().parent if run.resolve().name == "outs" else run for run in runs]
    sections = split_names(names) or [folder.resolve().name for folder in folders]
    for option, n in {"--image": len(pictures), "--section": len(sections)}.items():
        if n != len(runs):
            raise InputError(f"{option}: {n} for {len(runs)} runs; give one each")
    patient, patients = of_patients[0], patient_table(of_patients[1])
    origins = [Origin(name, patient_of(name, patient, patients)) for name in sections]

    with progress("Reading", len(runs)) as advance:

        def read_all() -> Iterator[AnnData]:
            for run, origin, picture in zip(runs, origins, pictures, strict=True):
                yield read(run, origin, picture)
                advance(1)

        written = write_sections(read_all(), output)
    tell(written, output, as_json)


def _import_hest(
    found: list[Any],
    of_patients: tuple[str | None, Path | None],
    mpp: float | None,
    gene_id: bool,
    output: Path,
    as_json: bool,
) -> None:
    from strank.readers.hest import hest_patients, import_hest

    patient, table = of_patients
    patients = None if table is None else hest_patients(table)
    options: dict[str, Any] = {"patient": patient, "patients": patients, "um_per_pixel": mpp}
    with progress("Reading", len(found)) as advance:
        sections = import_hest(found, output, gene_id=gene_id, advance=advance, **options)
    tell(sections, output, as_json)


def _needed(picture: Path | None, run: Path) -> Path:
    if picture is None:
        raise InputError(f"{run}: give the full-resolution H&E image with --image")
    return picture
