"""``strank fit``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from strank.cli.console import Json, finish, given_options, note, split_names
from strank.errors import InputError
from strank.files import claims

if TYPE_CHECKING:
    from anndata import AnnData

    from strank.model.rank_model import RankModel

_EXACT, NETWORKS, _IMAGES = "Exact solver", "Networks", "Networks with their encoder"

Sections = Annotated[
    str | None, typer.Option(help="Names of sections, separated by commas; all if not given.")
]
HeadName = Annotated[
    str,
    typer.Option(
        help="`linear`, or a network: `mlp`, `context` (neighbouring spots), `mlp+linear`, "
        "`context+linear`."
    ),
]
LossName = Annotated[
    str,
    typer.Option(
        help="`list`, `pair`, `poisson`, `nb` or `mse` (exact for `linear`), `rank`, "
        "`rank-published`, `pcc` or `section-pcc`."
    ),
]
RecipeName = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=NETWORKS,
        help="How a network is trained: `default`, or `published` as the paper's code does it "
        "(`published-no-entropy`: less the entropy term of its pair loss); makes linear a network.",
    ),
]
LibrarySize = Annotated[
    bool,
    typer.Option(
        "--library-size/--no-library-size",
        help="Whether the likelihood knows the depth of a spot; without, as an ablation.",
    ),
]
Seed = Annotated[
    int | None, typer.Option(min=0, rich_help_panel=NETWORKS, help="Seed of a network.")
]


_Cohort = Annotated[Path, typer.Argument(help="A cohort with features.")]
_Output = Annotated[Path, typer.Option("-o", "--output", help="The model folder to write.")]
_Genes = Annotated[
    str, typer.Option(help="Size of the panel, by variance in training; or `all` that vary.")
]
_Union = Annotated[
    bool,
    typer.Option(
        "--union",
        help="Also genes that only some sections measure; the others have no say in them.",
    ),
]
_Encoder = Annotated[str, typer.Option(help="Which image features.")]
_Finetune = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_IMAGES,
        help="Train the encoder too, an image network such as timm:resnet18: `lora`, `last-2` "
        "(or another number of blocks) or `full`.",
    ),
]
_MicroBatch = Annotated[
    int | None,
    typer.Option(
        min=1,
        rich_help_panel=_IMAGES,
        help="Patches at a time through the encoder, to save memory; the loss stays the same.",
    ),
]
_Penalty = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=_EXACT,
        help="L2 penalty in counts; chosen by leaving patients (or sections) out if not given.",
    ),
]
_AimOf = Annotated[
    str | None,
    typer.Option(
        "--aim",
        help="Whose sections the scores are for: `new-patients` (as if not given), by patients "
        "left out, or `known-patients`, other sections of these, by sections left out.",
    ),
]
_Borrow = Annotated[
    bool,
    typer.Option(
        "--borrow", rich_help_panel=_EXACT, help="Let sparse genes borrow from the others."
    ),
]
_MaxMemory = Annotated[
    float,
    typer.Option(help="GiB for all of it; what does not fit is read from disk when it is needed."),
]
_Dask = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_EXACT,
        help="Fit blocks of 256 genes on the workers of this scheduler, tcp://HOST:PORT or its "
        ".json: for large panels.",
    ),
]
_Validation = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=NETWORKS,
        help="Sections that stop it and that it does not see; by default they take "
        "turns, each for a network of its own.",
    ),
]
_Patience = Annotated[
    int | None,
    typer.Option(min=1, rich_help_panel=NETWORKS, help="Epochs without a better score."),
]
_Epochs = Annotated[
    int | None, typer.Option(min=1, rich_help_panel=NETWORKS, help="At most so many.")
]
_Devices = Annotated[int, typer.Option(min=1, rich_help_panel=NETWORKS, help="Processes, or GPUs.")]
_Nodes = Annotated[
    int, typer.Option(min=1, rich_help_panel=NETWORKS, help="Machines, each with --devices.")
]
_Precision = Annotated[
    str, typer.Option(rich_help_panel=NETWORKS, help="`32-true`, `bf16-mixed` or `16-mixed`.")
]
_Workers = Annotated[
    int, typer.Option(min=0, rich_help_panel=_IMAGES, help="Processes that read patches.")
]
_Wandb = Annotated[
    str | None,
    typer.Option(rich_help_panel=NETWORKS, help="Project of Weights & Biases to log to."),
]
_Resume = Annotated[
    bool,
    typer.Option("--resume", rich_help_panel=NETWORKS, help="Go on from the last checkpoint."),
]


@claims("output")
def fit(
    context: typer.Context,
    cohort: _Cohort,
    output: _Output,
    genes: _Genes = "50",
    union: _Union = False,
    sections: Sections = None,
    encoder: _Encoder = "morphology",
    head: HeadName = "linear",
    loss: LossName = "list",
    finetune: _Finetune = None,
    micro_batch: _MicroBatch = None,
    penalty: _Penalty = None,
    aim: _AimOf = None,
    library_size: LibrarySize = True,
    borrow: _Borrow = False,
    max_memory: _MaxMemory = 4.0,
    dask: _Dask = None,
    recipe: RecipeName = None,
    seed: Seed = None,
    validation: _Validation = None,
    patience: _Patience = None,
    epochs: _Epochs = None,
    devices: _Devices = 1,
    nodes: _Nodes = 1,
    precision: _Precision = "32-true",
    workers: _Workers = 2,
    wandb: _Wandb = None,
    resume: _Resume = False,
    as_json: Json = False,
) -> None:
    """3. Train a head: linear with an exact solver, or a network by any objective.

    [bold]Example:[/] strank fit strank-demo/cohort -o model --genes 50 --sections A1,B1,C1

    [bold]Example:[/] strank fit strank-demo/cohort -o transcriptome --genes all --borrow

    [bold]Example:[/] strank fit strank-demo/cohort -o network --head mlp --loss list
    (checkpoints, logs and learning curves in network.training)

    [bold]Example:[/] strank fit cohort -o model --encoder timm:resnet18 --finetune last-2

    [bold]Example:[/] strank fit strank-demo/cohort -o published --recipe published --validation C1
    """
    from strank.cohort.store import open_cohort, read_cohort
    from strank.fitting.method import Method, fit
    from strank.neural.recipe import Finetune, Machine, get_recipe

    if genes != "all" and not genes.isdecimal():
        raise InputError(f"--genes is a number or `all`; got {genes!r}")
    method = Method(head, loss, recipe or ("finetune" if finetune else None), library_size)
    _check_options(context, output, method.is_exact, finetune)
    read = read_cohort if finetune else partial(open_cohort, encoder=encoder)
    train = read(cohort, sections=split_names(sections))
    options: dict[str, Any] = {"head": head, "loss": loss, "recipe": method.recipe}
    options |= {"n_genes": None if genes == "all" else int(genes), "encoder": encoder}
    options |= {"union": union, "library_size": library_size, "aim": aim, "verbose": True}
    options |= {} if finetune else {"max_memory": max_memory}
    if method.is_exact:
        options |= {"penalty": penalty, "borrow": borrow, "dask": dask}
        model = fit(train, **options)
        model.save(output)
        _finish(model, [output], as_json, *_told_of_solver(model, penalty))
        return
    both: dict[str, Any] = {"patience": patience, "max_epochs": epochs}
    if given := {name: value for name, value in both.items() if value is not None}:
        options["recipe"] = replace(get_recipe(str(method.recipe)), **given)
    if finetune:
        options["finetune"] = Finetune(finetune, micro_batch=micro_batch)
    how = devices, nodes, precision, workers if finetune else 0
    machine = Machine("auto", *how, wandb=wandb)  # type: ignore[arg-type]
    options |= {"validation": split_names(validation), "seed": seed, "machine": machine}
    _train(train, output, as_json, resume=resume, **options)


def _check_options(context: typer.Context, output: Path, exact: bool, finetune: str | None) -> None:
    """Refuse an output that is something else, and options that would be ignored."""
    from strank.model.folder import refuse_other

    refuse_other(output)
    given = [name for name in given_options(context, NETWORKS) if name != "--recipe"]
    if exact and given:
        raise InputError(f"{given[0]} is for networks: give --head mlp or context, or a --recipe")
    if not exact and (given := given_options(context, _EXACT)):
        raise InputError(f"{given[0]} is for the exact solver: leave --head, --loss, --recipe out")
    if finetune is None and (given := given_options(context, _IMAGES)):
        raise InputError(f"{given[0]} is for training the encoder: give --finetune")


def _told_of_solver(model: RankModel, penalty: float | None) -> list[str]:
    facts, panel = model.provenance, model.panel
    if len(facts["sections"]) == 1 and penalty is None:
        note(f"penalty: {facts['penalty_choice']}")
    how = f"{facts['solver']}; penalty: {facts['penalty_choice']}"
    if "penalty" in panel:
        how += f" (median {panel['penalty'].median():g} counts)"
    if "dispersion" in facts:
        how += f"; dispersion: {facts['dispersion']}"
    if "borrows" in panel and panel["borrows"].any():
        how += f"; {panel['borrows'].sum()} genes borrow"
    if not facts["calibration"]["size"]:
        note(facts["calibration"]["told"])
        return [how]
    told = facts["calibration"]["told"]
    return [how, f"{told[0].upper()}{told[1:]}."]


def _train(train: Mapping[str, AnnData], output: Path, as_json: bool, **options: Any) -> None:
    from strank.fitting.method import fit

    folder = output.with_name(output.name + ".training")
    model = fit(train, **options, folder=folder)
    from strank.neural.training import is_first_process

    if not is_first_process():
        return
    model.save(output)
    _draw(folder)
    lines = []
    for network in model.provenance["networks"]:
        (name, score), *_ = ((k[11:], v) for k, v in network.items() if k.startswith("validation/"))
        lines.append(
            f"stopped by {', '.join(network['validation'])}: best of {network['epochs']} epochs "
            f"{network['best_epoch']}, {name} there {score:.4g}"
        )
    lines.append(f"checkpoints, logs and learning curves: {folder}")
    _finish(model, [output, folder], as_json, *lines)


def _draw(folder: Path) -> None:
    try:
        # matplotlib is absent here, if at all.
        from strank.report.plots import draw_learning_curves

        draw_learning_curves(folder)
    except ModuleNotFoundError as error:
        note(f"no learning curves are drawn: pip install 'strank[plots]' ({error.name} is absent)")


def _finish(model: RankModel, outputs: list[Path], as_json: bool, *lines: str) -> None:
    facts, output = model.provenance, outputs[0]
    finish(
        {"model": str(output), "n_genes": len(model.panel), "provenance": facts},
        outputs=outputs,
        as_json=as_json,
        lines=[
            *lines,
            f"Panel: {facts['panel_choice']}.",
            f"Wrote a model of {len(model.panel)} genes from {len(facts['sections'])} sections to "
            f"{output}.",
        ],
    )
