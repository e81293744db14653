"""``strank encoders`` and ``strank embed``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from strank.cli.console import (
    Dask,
    FewJobs,
    Json,
    Mpp,
    MppOverride,
    Shard,
    fail,
    finish,
    note,
    show_rows,
)
from strank.errors import InputError, some
from strank.progress import progress

if TYPE_CHECKING:
    from strank.encoders.base import Encoder
    from strank.slide_features import TileEmbedding
    from strank.where import Where

_Inputs = Annotated[
    list[Path],
    typer.Argument(
        help="A cohort from `strank import`; or slides, or a .csv with a row a slide (path, and if "
        "wanted name, mpp and more), whose tissue is laid with tiles."
    ),
]
_Output = Annotated[
    Path | None, typer.Option("-o", "--output", help="Of slides: folder for their features.")
]
_Stride = Annotated[
    float | None,
    typer.Option(
        help="Of slides: µm between tiles; the encoder's smallest window if not given. With a "
        "spot's diameter they are those that `strank predict` would lay."
    ),
]
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
    inputs: _Inputs,
    encoder: _Encoder = "morphology",
    output: _Output = None,
    mpp: Mpp = None,
    mpp_override: MppOverride = False,
    stride: _Stride = None,
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

    Of slides the tissue is found and laid with tiles, whose features any number of models of this
    encoder score later: strank predict --features.

    [bold]Example:[/] strank embed strank-demo/cohort --encoder morphology

    [bold]Example:[/] strank embed cohort --encoder uni2-h --dtype float16

    [bold]Example:[/] strank embed cohort --encoder uni --jobs 4

    [bold]Example:[/] strank embed strank-demo/st/images/*.jpg --mpp 0.8 --stride 100 -o tiles
    """
    from strank.encoders.embedding import encoder_to_embed

    how: dict[str, Any] = {"dtype": dtype, "precision": precision, "batch_size": batch_size}
    how |= {"workers": workers}
    if _is_cohort(inputs):
        given: dict[str, Any] = {"--output": output, "--mpp": mpp, "--stride": stride}
        given |= {"--mpp-override": mpp_override or None}
        if odd := [name for name, value in given.items() if value is not None]:
            raise InputError(f"{some(odd)}: for slides; {inputs[0]} is taken for a cohort")
        _embed_cohort(
            inputs[0], encoder_to_embed(encoder, weights), how, (jobs, dask, shard), as_json
        )
        return
    if output is None:
        raise InputError("-o is missing: the folder for the features of slides")
    from strank.slide_features import TileEmbedding
    from strank.where import Where

    chosen = encoder_to_embed(encoder, weights)
    how["dtype"] = dtype or "float32"
    looking = TileEmbedding(chosen, stride, mpp, mpp_override, **how)
    _embed_slides(looking, inputs, output, Where(jobs, dask, shard), as_json)


def _is_cohort(inputs: list[Path]) -> bool:
    """Tell a cohort's folder from slides; what has no ending of a file is missed as either."""
    first = inputs[0]
    if len(inputs) > 1 and any(path.is_dir() for path in inputs):
        raise InputError(f"{some(map(str, inputs))}: give one cohort, or slides")
    if not (first.suffix or first.exists()):
        raise InputError(
            f"{first}: no such folder; make a cohort with `strank import`, or give slides"
        )
    return first.is_dir()


def _embed_cohort(
    cohort: Path,
    encoder: Encoder,
    how: dict[str, Any],
    where: tuple[int, str | None, str | None],
    as_json: bool,
) -> None:
    from strank.cohort.folder import count_spots, features_path
    from strank.encoders.embedding import embed as embed_cohort

    how |= dict(zip(("jobs", "dask", "shard"), where, strict=True))
    with progress("Embedding", count_spots(cohort), unit="tiles") as advance:
        done = embed_cohort(cohort, encoder, advance=advance, say=note, **how)
    new = [entry.section for entry in done if not entry.done_before]
    before = [entry.section for entry in done if entry.done_before]
    option = f" --encoder {encoder.name}" * (encoder.name != "morphology")
    finish(
        {"cohort": str(cohort), "slides": None, **_facts(encoder, new, before, {})},
        outputs=[features_path(cohort, encoder.name, entry.section) for entry in done],
        as_json=as_json,
        lines=[
            f"{encoder.name} {encoder.version}: {len(encoder.feature_names)} features a spot; "
            f"{len(new)} sections embedded, {len(before)} were done before. "
            f"Next: strank fit {cohort} -o model{option}"
        ],
    )


def _embed_slides(
    looking: TileEmbedding, inputs: list[Path], output: Path, where: Where, as_json: bool
) -> None:
    """Embed the tiles of slides, each into a folder of its own."""
    from strank.files import claimed
    from strank.slide_runs import SLIDES, entries_of

    entries = entries_of(inputs, output)
    n_slides = len(where.mine([entry.name for entry in entries]))
    here = where.is_here
    bar = progress if here else partial(progress, hidden=True)
    slides = progress("Slides", n_slides, hidden=here)
    with claimed(output, shard=where.shard), slides as advance:
        done, failed = looking.run(entries, output, where, bar=bar, tell=note, advance=advance)
    names = {flag: [n for n in done if done[n]["embedded_before"] == flag] for flag in (0, 1)}
    table = [output / SLIDES] if where.share is None else []
    encoder = looking.encoder
    finish(
        {"cohort": None, "slides": str(output), **_facts(encoder, names[0], names[1], failed)},
        outputs=[*(Path(found["features"]) for found in done.values()), *table],
        as_json=as_json,
        lines=[
            f"{encoder.name} {encoder.version}: {len(encoder.feature_names)} features a tile, "
            f"every {looking.stride:g} µm; {len(names[0])} slides embedded, {len(names[1])} were "
            "done before."
            + f" Next: strank predict SLIDES --features {output} --model MODEL -o maps"
            * bool(done)
        ],
    )
    if failed:
        fail(f"{len(failed)} of {n_slides} slides failed: {some(failed, 20)}")
        raise typer.Exit(1)


def _facts(
    encoder: Encoder, new: list[str], before: list[str], failed: dict[str, str]
) -> dict[str, Any]:
    return {
        "encoder": encoder.name,
        "version": encoder.version,
        "n_features": len(encoder.feature_names),
        "embedded": new,
        "done_before": before,
        "failed": failed,
    }


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
