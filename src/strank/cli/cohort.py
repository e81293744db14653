"""``strank import`` and ``strank embed``: from files to a cohort with features."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from strank.cli.console import Json, finish, note
from strank.progress import progress

__all__ = ["embed", "import_st"]


def import_st(
    folder: Annotated[Path, typer.Argument(help="Folder with images/, counts/ and spots/.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The cohort to write.")],
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

    Nothing is written unless every section can be read.

    [bold]Example:[/] strank import st her2st -o cohort
    """
    from strank.cohort.contract import section_info
    from strank.readers import st

    pattern = st.PATIENT_PATTERN if patient_pattern is None else patient_pattern
    with progress("Reading", len(st.find_sections(folder))) as advance:
        sections = st.import_st(folder, output, patient_pattern=pattern, advance=advance)
    summary = []
    for name, adata in sections.items():
        info = section_info(adata)
        dropped = {why: n for why, n in info.provenance["dropped_spots"].items() if n}
        if dropped:
            what = ", ".join(f"{n} {why}" for why, n in dropped.items())
            note(f"section {name}: dropped spots: {what}")
        summary.append(
            {
                "section": name,
                "patient": adata.obs["patient"].iloc[0],
                "spots": adata.n_obs,
                "genes": adata.n_vars,
                "um_per_pixel": round(info.um_per_pixel, 4),
                "dropped": dropped,
            }
        )
    finish(
        {"cohort": str(output), "sections": summary},
        as_json=as_json,
        lines=[
            *(
                f"{e['section']}: patient {e['patient']}, {e['spots']} spots, {e['genes']} genes, "
                f"{e['um_per_pixel']} µm per pixel"
                for e in summary
            ),
            f"Wrote {len(summary)} sections to {output}. Next: strank embed {output}",
        ],
    )


def embed(
    cohort: Annotated[Path, typer.Argument(help="A cohort from `strank import`.")],
    encoder: Annotated[
        str, typer.Option(help="`morphology`, or an image network: timm:NAME, hf:NAME or a folder.")
    ] = "morphology",
    as_json: Json = False,
) -> None:
    """2. Turn the image around every spot into features, kept beside the counts.

    Sections that have them are skipped, so a stopped run continues.

    [bold]Example:[/] strank embed cohort --encoder morphology

    [bold]Example:[/] strank embed cohort --encoder timm:resnet18
    """
    from strank.cohort.store import count_spots
    from strank.encoders.catalogue import get_encoder
    from strank.encoders.embed import embed_cohort

    chosen = get_encoder(encoder)
    with progress("Embedding spots", count_spots(cohort)) as advance:
        done = embed_cohort(cohort, chosen, advance=advance)
    new = [entry.section for entry in done if not entry.done_before]
    summary = {
        "cohort": str(cohort),
        "encoder": chosen.name,
        "version": chosen.version,
        "n_features": len(chosen.feature_names),
        "embedded": new,
        "done_before": [entry.section for entry in done if entry.done_before],
    }
    finish(
        summary,
        as_json=as_json,
        lines=[
            f"{chosen.name} {chosen.version}: {summary['n_features']} features a spot; "
            f"{len(new)} sections embedded, {len(done) - len(new)} were done before. "
            f"Next: strank fit {cohort} -o model"
            + f" --encoder {chosen.name}"
            * (chosen.name != "morphology")
        ],
    )
