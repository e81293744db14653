"""``strank import`` and ``strank hest download``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from strank.cli.console import Json, finish, note, split_names
from strank.errors import InputError, some
from strank.extras import need
from strank.progress import progress

if TYPE_CHECKING:
    from anndata import AnnData

# Each option once; a parameter is called as the argument of the reader that it becomes.
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
HestPatients = Annotated[
    Path | None, typer.Option(help="HEST_v*.csv, or a CSV table with columns section,patient.")
]
Mpp = Annotated[
    float | None, typer.Option("--mpp", help="µm per pixel of the image, where no file says it.")
]
Override = Annotated[
    bool, typer.Option("--mpp-override", help="Take --mpp even where the files say another scale.")
]
Pitch = Annotated[
    float | None,
    typer.Option("--pitch", help="µm between centres of neighbouring spots; if no known array."),
]
Layer = Annotated[
    str | None, typer.Option(help="Where raw counts are, `raw` for .raw; X if not given.")
]
GeneId = Annotated[bool, typer.Option("--gene-id", help="Name genes by Ensembl id, not symbol.")]
SpaceRanger = Annotated[list[Path], typer.Argument(help="Outputs of Space Ranger, one a section.")]
Squares = Annotated[
    float | None,
    typer.Option("--bin", help="Side of pseudo-spots in µm; single cells if not given."),
]
Alignment = Annotated[
    Path | None,
    typer.Option(help="3 x 3 matrix from pixels of the H&E to those of the run; see docs/data.md."),
]
imports = typer.Typer(help="1. Read sections of a platform into a cohort.", no_args_is_help=True)


@imports.command("st")
def st(
    folder: Annotated[Path, typer.Argument(help="Folder with images/, counts/ and spots/.")],
    output: Output,
    patient_pattern: Annotated[
        str | None,
        typer.Option(
            help="Regular expression that finds the patient in a section's name; "
            "the leading letters if not given."
        ),
    ] = None,
    pitch_um: Pitch = None,
    as_json: Json = False,
) -> None:
    """Read legacy Spatial Transcriptomics sections into a cohort.

    1k arrays (200 µm a step) and 2k arrays (every other position used, 100 µm a step) are told by
    their positions; another one, or a few spots, by --pitch.

    Nothing is written unless every section can be read; so it is with all platforms.

    [bold]Example:[/] strank import st strank-demo/st -o cohort
    """
    _import("st", path="folder", **locals())


@imports.command("visium")
def visium(
    runs: SpaceRanger,
    output: Output,
    image: Images = None,
    section: Names = None,
    patient: Patient = None,
    patients: Patients = None,
    um_per_pixel: Mpp = None,
    um_per_pixel_override: Override = False,
    gene_id: GeneId = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="Counts of raw_feature_bc_matrix, under tissue.")
    ] = False,
    pitch_um: Pitch = None,
    as_json: Json = False,
) -> None:
    """Read Visium: Space Ranger 1.x to 4.x, with or without CytAssist.

    Of a square grid in this layout (DBiT-seq, AtlasXomics) give --pitch.

    [bold]Example:[/] strank import visium S1/outs S2/outs --image S1.tif --image S2.tif
    --section S1,S2 --patients patients.csv -o cohort
    """
    _import("visium", path="runs", **locals())


@imports.command("visium-hd")
def visium_hd(
    runs: SpaceRanger,
    output: Output,
    bin_um: Annotated[
        float | None,
        typer.Option(
            "--bin",
            help="Side of a bin in µm, 16 if not given; other than 8 and 16, of 2 µm bins. With "
            "--cells as for xenium.",
        ),
    ] = None,
    cells: Annotated[
        bool, typer.Option("--cells", help="The cells that Space Ranger 4 has segmented.")
    ] = False,
    image: Images = None,
    section: Names = None,
    patient: Patient = None,
    patients: Patients = None,
    um_per_pixel: Mpp = None,
    um_per_pixel_override: Override = False,
    gene_id: GeneId = False,
    as_json: Json = False,
) -> None:
    """Read Visium HD in bins of 8, 16 or any other even number of µm, or by cell.

    [bold]Example:[/] strank import visium-hd S1/outs --image S1.tif --patient P1 --bin 48 -o cohort
    """
    given = locals()
    _import("visium_hd_cells" if given.pop("cells") else "visium_hd", path="runs", **given)


_CELLS = {
    "xenium": """Read Xenium: single cells, or pseudo-spots that meet models of Visium.

    Without --alignment, <image>alignment.csv is taken, as 10x Genomics puts it beside *_he_image.

    [bold]Example:[/] strank import xenium bundle --image he.tif --bin 100 --patient P1 -o cohort
    """,
    "cosmx": """Read flat files of CosMx: single cells, or pseudo-spots that meet models of Visium.

    [bold]Example:[/] strank import cosmx slide --image he.tif --alignment he.csv --bin 100
    --patient P1 -o cohort
    """,
    "merscope": """Read MERSCOPE: single cells, or pseudo-spots that meet models of Visium.

    [bold]Example:[/] strank import merscope region_0 --image he.tif --alignment he.csv --bin 100
    --patient P1 -o cohort
    """,
}


def cells_of(
    context: typer.Context,
    runs: Annotated[list[Path], typer.Argument(help="Outputs of the instrument, one a section.")],
    output: Output,
    bin_um: Squares = None,
    image: Images = None,
    alignment: Alignment = None,
    section: Names = None,
    patient: Patient = None,
    patients: Patients = None,
    um_per_pixel: Mpp = None,
    um_per_pixel_override: Override = False,
    gene_id: GeneId = False,
    as_json: Json = False,
) -> None:
    """Read cells of the platform that the command is called by."""
    given = locals()
    platform = str(given.pop("context").info_name)
    if alignment is not None and len(runs) > 1:
        beside = ", or keep each beside its image" * (platform == "xenium")
        raise InputError(f"--alignment is of one image; import runs one after the other{beside}")
    _import(platform, path="runs", **given)


for _platform, _help in _CELLS.items():
    imports.command(_platform, help=_help)(cells_of)


@imports.command("hest")
def hest(
    folder: Annotated[Path, typer.Argument(help="Folder with st/, wsis/ and metadata/.")],
    output: Output,
    samples: Annotated[
        str | None, typer.Option(help="Which, separated by commas; all if not given.")
    ] = None,
    patient: Patient = None,
    patients: HestPatients = None,
    um_per_pixel: Mpp = None,
    um_per_pixel_override: Override = False,
    gene_id: GeneId = False,
    as_json: Json = False,
) -> None:
    """Read samples of HEST-1k; patches stand in where the slide was not downloaded.

    Patients come from the newest HEST_v*.csv there, which has the corrected labels.

    [bold]Example:[/] strank import hest hest_data --samples TENX99,TENX95 -o cohort
    """
    _import("hest", path="folder", image_folder=output / "images", **locals())


@imports.command("hest-bench")
def hest_bench(
    task: Annotated[Path, typer.Argument(help="Folder with splits/, adata/ and patches/.")],
    output: Output,
    patient: Patient = None,
    patients: HestPatients = None,
    um_per_pixel: Mpp = None,
    um_per_pixel_override: Override = False,
    gene_id: GeneId = False,
    as_json: Json = False,
) -> None:
    """Read a task of HEST-Benchmark; its patches stand in for the slides.

    [bold]Example:[/] strank import hest-bench bench_data/IDC --patients HEST_v1_3_0.csv -o cohort
    """
    _import("hest", path="task", image_folder=output / "images", **locals())


@imports.command("anndata")
def anndata(
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
    um_per_pixel: Mpp = None,
    um_per_pixel_override: Override = False,
    layer: Layer = None,
    gene_id: GeneId = False,
    as_json: Json = False,
) -> None:
    """Read any AnnData with raw counts, positions in pixels, and an image.

    Of Visium (`array_row` and `array_col` in obs, as scanpy keeps them) --mpp is measured.

    [bold]Example:[/] strank import anndata mine.h5ad --image mine.tif --patient P1 -o cohort
    """
    _import("anndata", path="file", **locals())


@imports.command("spatialdata")
def spatialdata(
    zarr: Annotated[Path, typer.Argument(help="A SpatialData zarr with a table of raw counts.")],
    output: Output,
    image: Annotated[
        str | None, typer.Option(help="An image of the object, or a file; its only if not given.")
    ] = None,
    table: Annotated[str | None, typer.Option(help="Its only table if not given.")] = None,
    section: Annotated[str | None, typer.Option(help="Name; the zarr's if not given.")] = None,
    patient: Patient = None,
    patients: Patients = None,
    um_per_pixel: Mpp = None,
    um_per_pixel_override: Override = False,
    layer: Layer = None,
    gene_id: GeneId = False,
    as_json: Json = False,
) -> None:
    """Read a SpatialData object: its table, what the table annotates, and its image.

    [bold]Example:[/] strank import spatialdata mine.zarr --mpp 0.5 --patient P1 -o cohort
    """
    _import("spatialdata", path="zarr", image_folder=output / "images", **locals())


_IMAGES = ("cv2", "openslide", "pyvips", "tifffile")
_BESIDE = {"spatialdata": ("geopandas", "spatialdata")}


def _import(platform: str, *, path: str, output: Path, as_json: bool, **given: Any) -> None:
    """Read what was given by the platform's reader, and write it; ``path`` is what it is called."""
    need(*_IMAGES, *_BESIDE.get(platform, ()))
    from strank.io import write_sections
    from strank.slides.slide import check_override

    doubts = list[str]()
    check_override(given.get("um_per_pixel"), given.get("um_per_pixel_override", False))
    where = given.pop(path)
    options = {name: value for name, value in given.items() if value is not None}
    of = _runs if isinstance(where, list) else _sections
    readers = of(platform, where, options)
    with progress("Reading", len(readers)) as advance:
        sections = write_sections(
            (read() for read in readers), output, advance=advance, say=doubts.append
        )
    tell(sections, output, doubts, as_json)


def _runs(platform: str, runs: list[Path], options: dict[str, Any]) -> list[Callable[[], AnnData]]:
    """Of each run the reader, with the image and the name that belong to it."""
    import strank.io as io
    from strank.io.sections import patient_of, section_name

    images, names = options.pop("image", None), split_names(options.pop("section", None))
    for option, values in {"--image": images, "--section": names}.items():
        if values is not None and len(values) != len(runs):
            raise InputError(f"{option}: {len(values)} for {len(runs)} runs; give one each")
    names = names or [section_name(run) for run in runs]
    # Before the first is read, since reading takes long.
    for name in names:
        patient_of(name, options.get("patient"), options.get("patients"))
    read = partial(getattr(io, f"read_{platform}"), **options)
    return [
        partial(read, run, image=image, section=name)
        for run, image, name in zip(runs, images or [None] * len(runs), names, strict=True)
    ]


def _sections(platform: str, path: Path, options: dict[str, Any]) -> list[Callable[[], AnnData]]:
    """Of each section that was asked for, or else of all that the path holds, the reader."""
    import strank.io as io

    read = partial(getattr(io, f"read_{platform}"), path)
    find = getattr(io, f"find_{platform}", None)
    names = split_names(options.pop("samples", None))
    if find is None or "section" in options:
        return [partial(read, **options)]
    found = find(path)
    if absent := sorted(set(names or []).difference(found)):
        raise InputError(f"{path}: no sample {some(absent)}; there are {some(found, 20)}")
    return [partial(read, section=name, **options) for name in found if name in (names or found)]


def tell(sections: Mapping[str, AnnData], output: Path, doubts: list[str], as_json: bool) -> None:
    """Say what was read, what was left out, and where patches stand in for a slide."""
    from strank.cohort.contract import section_info

    for text in doubts:
        note(text)
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
        for text in info.provenance.get("notes", []):
            note(f"section {name}: {text}")
        if info.provenance.get("image_from") == "patches":
            note(f"section {name}: no slide, so patches stand in; there is white between them")
        summary.append(
            {
                "section": name,
                "patient": adata.obs["patient"].iloc[0],
                "technology": info.technology,
                "array": info.provenance.get("array"),
                "spot_diameter_um": info.spot_diameter_um,
                "spot_pitch_um": info.spot_pitch_um,
                "spots": adata.n_obs,
                "genes": adata.n_vars,
                "um_per_pixel": round(info.um_per_pixel, 4),
                "dropped": dropped["spots"],
                "dropped_features": dropped["features"],
            }
        )
    finish(
        {"cohort": str(output), "sections": summary},
        outputs=[output / f"{name}.h5ad" for name in sections],
        as_json=as_json,
        lines=[
            *(
                f"{e['section']}: {e['technology']}, patient {e['patient']}, {e['spots']} spots, "
                f"{e['genes']} genes, {e['um_per_pixel']} µm per pixel"
                + (f" by the array of {e['array']}" if e["array"] else "")
                for e in summary
            ),
            *_genes_lines(sections),
            f"Wrote {len(summary)} sections to {output}. Next: strank embed {output}",
        ],
    )


def _genes_lines(sections: Mapping[str, AnnData]) -> list[str]:
    """Where sections measure different genes, how many they share."""
    measured = Counter(gene for adata in sections.values() for gene in adata.var_names)
    in_all = sum(n == len(sections) for n in measured.values())
    if in_all == len(measured):
        return []
    return [
        f"{in_all} of {len(measured)} genes are measured in all of these sections; a panel is "
        "chosen among those, or of all with `strank fit --union`"
    ]


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
    need("huggingface_hub", *_IMAGES)
    from strank.io import download_hest

    tasks, samples = split_names(task), split_names(ids)
    folders = download_hest(output, tasks=tasks or (), samples=samples or (), revision=revision)
    following = (
        f"strank import hest-bench {folders[0]}" if tasks else f"strank import hest {output}"
    )
    finish(
        {"folders": [str(folder) for folder in folders], "revision": revision},
        outputs=folders,
        as_json=as_json,
        lines=[
            *(f"Downloaded and checked: {folder}" for folder in folders),
            f"Next: {following} -o cohort",
        ],
    )
