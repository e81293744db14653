"""``strank encoders`` and ``strank embed``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from strank.cli.console import Dask, FewJobs, Json, Shard, finish, note, show_rows
from strank.progress import progress

_Cohort = Annotated[Path, typer.Argument(help="A cohort from `strank import`.")]
_Encoder = Annotated[
    str,
    typer.Option(
        help="A name from `strank encoders`, timm:NAME, hf:NAME, or your own module:callable."
    ),
]
_Weights = Annotated[
    Path | None,
    typer.Option(help="File with the encoder's weights, in place of those on the hub."),
]
_Dtype = Annotated[
    str | None,
    typer.Option(help="Store features as float32 or float16; as they are, or float32."),
]
_Precision = Annotated[
    str | None,
    typer.Option(
        help="A GPU computes in bf16, fp16 or float32; in bf16 if it can and none is given."
    ),
]
_BatchSize = Annotated[
    int, typer.Option(min=1, help="Spots at a time; halved if a GPU has no memory for them.")
]
_Workers = Annotated[
    int | None,
    typer.Option(min=0, help="Processes that read tiles; none if the encoder uses the CPU."),
]


def embed(
    cohort: _Cohort,
    encoder: _Encoder = "morphology",
    weights: _Weights = None,
    dtype: _Dtype = None,
    precision: _Precision = None,
    batch_size: _BatchSize = 64,
    workers: _Workers = None,
    jobs: FewJobs = 1,
    dask: Dask = None,
    shard: Shard = None,
    as_json: Json = False,
) -> None:
    """2. Turn the image around every spot into features, kept beside the counts.

    What is done is not done again, and a stopped run goes on with the section it was at. An image
    network runs on the first GPU; with --jobs 4 four processes share all of them.

    [bold]Example:[/] strank embed strank-demo/cohort --encoder morphology

    [bold]Example:[/] strank embed cohort --encoder uni2-h --dtype float16

    [bold]Example:[/] strank embed cohort --encoder uni --jobs 4
    """
    from strank.cohort.folder import count_spots, features_path
    from strank.encoders.embedding import embed as embed_cohort
    from strank.encoders.embedding import encoder_to_embed

    n_spots = count_spots(cohort)
    chosen = encoder_to_embed(encoder, weights)
    with progress("Embedding", n_spots, unit="tiles") as advance:
        done = embed_cohort(
            cohort,
            chosen,
            dtype=dtype,
            precision=precision,
            batch_size=batch_size,
            workers=workers,
            jobs=jobs,
            dask=dask,
            shard=shard,
            advance=advance,
            say=note,
        )
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
        outputs=[features_path(cohort, chosen.name, entry.section) for entry in done],
        as_json=as_json,
        lines=[
            f"{chosen.name} {chosen.version}: {summary['n_features']} features a spot; "
            f"{len(new)} sections embedded, {len(done) - len(new)} were done before. "
            f"Next: strank fit {cohort} -o model"
            + f" --encoder {chosen.name}"
            * (chosen.name != "morphology")
        ],
    )


def encoders(as_json: Json = False) -> None:
    """List the encoders that `strank embed --encoder` knows by name.

    Besides, it takes any network of timm (timm:NAME) or transformers (hf:OWNER/NAME), a folder with
    one, and what a module of yours gives (module:callable). Weights come from the hub, or with
    --weights from a file. --json has the file, revision, colours, precision and citation, too.

    [bold]Example:[/] strank encoders
    """
    from strank.encoders.registry import encoder_table

    rows = encoder_table()
    if not as_json:
        numbers = {"width": "width", "um_per_pixel": "µm/px", "pixels": "input"}
        columns = ["name", *numbers, "licence", "gated", "source"]
        shown = [row | {"gated": "yes" if row["gated"] else "no"} for row in rows]
        show_rows(
            [(numbers.get(column, column), column in numbers) for column in columns],
            ([row[column] for column in columns] for row in shown),
            "Encoders",
        )
    finish(
        {"encoders": rows},
        as_json=as_json,
        lines=["Gated: accept the terms at https://huggingface.co/SOURCE, then `hf auth login`."],
    )
