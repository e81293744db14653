"""``strank import`` and ``strank hest download``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from strank.cli.console import Json, finish, note, split_names
from strank.errors import InputError
from strank.progress import progress

if TYPE_CHECKING:
    from anndata import AnnData

    from strank.io.sections import Origin


Output = Annotated[Path, typer.Option("-o", "--output", help="The cohort to write, or to add to.")]
Images = Annotated[
    list[Path] | None,
    typer.Option(
        "--image", help="The full-resolution H&E; of several runs one each, in their order."
    ),
]
Names = Annotated[
    str | None,
    typer.Option(
        "--section", help="Name, of several runs separated by commas; the folders' if not given."
    ),
]
Patient = Annotated[str | None, typer.Option(help="The patient of all sections.")]
Patients = Annotated[
    Path | None, typer.Option(help="CSV table with columns section,patient instead.")
]
Mpp = Annotated[
    float | None, typer.Option(help="µm per pixel of the image, where no file says it.")
]
GeneId = Annotated[bool, typer.Option("--gene-id", help="Name genes by Ensembl id, not symbol.")]
imports = typer.Typer(help="1. Read sections of a platform into a cohort.", no_args_is_help=True)


def patient_table(path: Path | None) -> dict[str, str] | None:
    """Read --patients, if it is given."""
    from strank.io.sections import read_patients

    return None if path is None else read_patients(path)


def tell(sections: Mapping[str, AnnData], output: Path, as_json: bool) -> None:
    """Say what was read, what was left out, and where patches stand in for a slide."""
    from strank.cohort.contract import section_info

    summary = []
    for name, adata in sections.items():
        info = section_info(adata)
        dropped = {
            what: {str(why): int(n) for why, n in info.provenance.get(key, {}).items() if n}
            for key, what in {"dropped_spots": "spots", "dropped_features": "features"}.items()
        }
        if n_controls := int(info.provenance.get("dropped_controls", 0)):
            dropped["features"]["control probes"] = n_controls
        for what, reasons in dropped.items():
            if reasons:
                told = ", ".join(f"{n} {why}" for why, n in reasons.items())
                note(f"section {name}: dropped {what}: {told}")
        if info.provenance.get("image_from") == "patches":
            note(f"section {name}: no slide, so patches stand in; there is white between them")
        summary.append(
            {
                "section": name,
                "patient": adata.obs["patient"].iloc[0],
                "technology": info.technology,
                "spots": adata.n_obs,
                "genes": adata.n_vars,
                "um_per_pixel": round(info.um_per_pixel, 4),
                "dropped": dropped["spots"],
                "dropped_features": dropped["features"],
            }
        )
    finish(
        {"cohort": str(output), "sections": summary},
        as_json=as_json,
        lines=[
            *(
                f"{e['section']}: {e['technology']}, patient {e['patient']}, {e['spots']} spots, "
                f"{e['genes']} genes, {e['um_per_pixel']} µm per pixel"
                for e in summary
            ),
            *_genes_lines(sections),
            f"Wrote {len(summary)} sections to {output}. Next: strank embed {output}",
        ],
    )


def _genes_lines(sections: Mapping[str, AnnData]) -> list[str]:
    """Where sections measure different genes, how many they share."""
    from strank.cohort.panel import all_genes

    union = all_genes(sections)
    shared = sum(union.isin(adata.var_names).astype(int) for adata in sections.values())
    in_all = int((shared == len(sections)).sum())
    if in_all == len(union):
        return []
    return [
        f"{in_all} of {len(union)} genes are measured in all of these sections; a panel is chosen "
        "among those, or of all with `strank fit --union`"
    ]


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
    from strank.io import st

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
    from strank.io.visium import VisiumRun, read_visium

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
    from strank.io.visium import read_visium_hd

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
    from strank.io.xenium import read_xenium

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
    from strank.io.hest import find_hest

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
    from strank.io.hest import find_hest_bench

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
    from strank.io.generic import import_anndata as read

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
    from strank.io.spatialdata import import_spatialdata as read

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
    from strank.io.sections import Origin, patient_of, write_sections

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
    from strank.io.hest import hest_patients, import_hest

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


def download(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to download to.")],
    task: Annotated[
        str | None,
        typer.Option(
            help="Tasks of the HEST-Benchmark, separated by commas: IDC, PRAD, PAAD, SKCM, COAD, "
            "READ, CCRCC, HCC, LUNG, LYMPH_IDC."
        ),
    ] = None,
    ids: Annotated[
        str | None, typer.Option("--id", help="Samples of HEST-1k, such as TENX99,TENX95.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit on the hub; the newest if not given.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Download tasks or samples of HEST from the Hugging Face hub.

    Accept their licence there first (huggingface.co/datasets/MahmoodLab/hest-bench and hest) and
    log in with `hf auth login`. A stopped download goes on; every file is checked.

    [bold]Example:[/] strank hest download --task IDC,PRAD -o bench_data

    [bold]Example:[/] strank hest download --id TENX99 -o hest_data
    """
    from strank.io.hest import download_samples, download_tasks

    tasks, samples = split_names(task), split_names(ids)
    if (tasks is None) == (samples is None):
        raise InputError("give either --task or --id")
    if tasks is not None:
        folders = download_tasks(tasks, output, revision=revision)
        following = f"strank import hest-bench {folders[0]}"
    else:
        folders = [download_samples(samples or [], output, revision=revision)]
        following = f"strank import hest {output}"
    finish(
        {"folders": [str(folder) for folder in folders], "revision": revision},
        as_json=as_json,
        lines=[
            *(f"Downloaded and checked: {folder}" for folder in folders),
            f"Next: {following} -o cohort",
        ],
    )
