"""``strank embed``: features beside the counts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from strank.cli.console import Json, finish
from strank.progress import progress

__all__ = ["embed"]


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
