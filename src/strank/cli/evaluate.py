"""``strank evaluate``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from strank.cli.console import (
    Json,
    finish,
    given_options,
    note,
    records,
    show_table,
    split_names,
    working,
)
from strank.cli.fit import NETWORKS, HeadName, LossName, RecipeName, Seed
from strank.errors import InputError
from strank.files import claims
from strank.progress import progress

if TYPE_CHECKING:
    from strank.evaluation.held_out import Evaluation
    from strank.fitting.method import Method

_Cohort = Annotated[Path, typer.Argument(help="A cohort with features.")]
_Output = Annotated[Path, typer.Option("-o", "--output", help="Folder for the tables.")]
_Model = Annotated[
    Path | None, typer.Option(help="A trained model; it is scored on sections of the cohort.")
]
_Sections = Annotated[
    str | None,
    typer.Option(help="Sections to score; those the model was not trained on if not given."),
]
_Folds = Annotated[
    str | None, typer.Option(help="Hold out every `section` or every `patient` once.")
]
_Train = Annotated[
    Path | None,
    typer.Option(help="Cohort with the model's training sections, for the baselines."),
]
_Genes = Annotated[
    int | None, typer.Option(min=1, help="Size of the panel of every fold; 50 if not given.")
]
_Encoder = Annotated[
    str | None, typer.Option(help="Image features of the folds; morphology if not given.")
]


_WRITTEN = ("scores.csv", "summary.csv", "calibration.csv", "evaluation.json")
_SHOWN = {
    "scc": "SCC, mean",
    "depth_matched": "Depth-matched SCC, mean",
    "deviance": "Deviance explained (below 0 is worse than no model), mean",
    "slope": "Calibration slope (1 is right, below it differences are too large), median",
}


@claims("output")
def evaluate_command(
    context: typer.Context,
    cohort: _Cohort,
    output: _Output,
    model: _Model = None,
    sections: _Sections = None,
    folds: _Folds = None,
    train: _Train = None,
    genes: _Genes = None,
    encoder: _Encoder = None,
    head: HeadName = "linear",
    loss: LossName = "list",
    recipe: RecipeName = None,
    seed: Seed = None,
    as_json: Json = False,
) -> None:
    """4. Score held-out sections, beside ridges, library size alone and shuffled scores.

    Of new patients also what is reached within their own sections, without other patients.
    Give either --model or --folds. Shows Spearman correlation (SCC) against log1p(CP10k), and with
    depth taken out; scores.csv has more.

    [bold]Example:[/] strank evaluate strank-demo/cohort --folds patient -o evaluation

    [bold]Example:[/] strank evaluate strank-demo/cohort --folds patient --head mlp
    -o evaluation-mlp
    """
    from strank.cohort.contract import patients_of
    from strank.cohort.folds import make_folds
    from strank.cohort.store import read_cohort
    from strank.evaluation.held_out import cross_validate
    from strank.evaluation.methods import WITHIN, WITHIN_TOLD, fit_model_of
    from strank.fitting.method import Method

    if (model is None) == (folds is None):
        raise InputError("give either --model or --folds")
    if model is not None:
        typed = given_options(context, NETWORKS)
        default = (head, loss, recipe) == ("linear", "list", None)
        if typed or genes is not None or encoder is not None or not default:
            raise InputError("--genes, --encoder, --head, --loss and --recipe are the model's own")
        result = _evaluate_model(cohort, model, split_names(sections), train or cohort)
    else:
        if train is not None:
            raise InputError("--train goes with --model; folds train on the cohort itself")
        fit = partial(fit_model_of, _told(Method(head, loss, recipe)), seed=seed)
        how: Any = {"by": folds, "encoder": encoder or "morphology", "n_genes": genes or 50}
        data = read_cohort(cohort, sections=split_names(sections), encoder=how["encoder"])
        with progress("Folds", len(make_folds(patients_of(data), how["by"]))) as advance:
            result = cross_validate(data, **how, fit=fit, advance=advance)
    result.write(output)
    drawn = _draw(output, result)
    summary = result.summary
    told = [WITHIN_TOLD] if (summary["method"] == WITHIN).any() else []
    for text in (*result.warnings, *told):
        note(text)
    if not as_json:
        for score, title in _SHOWN.items():
            wide = summary.pivot(index="section", columns="method", values=score)
            wide = wide.loc[summary["section"].unique(), summary["method"].unique()]
            show_table(wide.reset_index(), f"{title} of genes ({result.facts['protocol']})")
    finish(
        {"protocol": result.facts["protocol"], "summary": records(summary)},
        outputs=[output / name for name in (*_WRITTEN, *["calibration.png"] * bool(drawn))],
        as_json=as_json,
        lines=[
            f"Wrote scores.csv, summary.csv, calibration.csv {drawn}and evaluation.json "
            f"to {output}."
        ],
    )


def _draw(output: Path, result: Evaluation) -> str:
    """Draw the calibration where pictures can be drawn; tables need no more than the core."""
    try:
        from strank.report.plots import write_calibration
    except ModuleNotFoundError as error:
        note(f"no calibration.png is drawn: pip install 'strank[plots]' ({error.name} is absent)")
        return ""
    write_calibration(output / "calibration.png", result.calibration)
    return "with calibration.png "


def _told(method: Method) -> Method:
    """Say what stops a method in folds, if that is drawn."""
    from strank.evaluation.methods import is_stopped_by_name

    if is_stopped_by_name(method):
        note(
            f"{method.name}: stopped by the sections of one training patient, or one section of "
            "fewer than three patients, drawn by the seed"
        )
    return method


def _evaluate_model(
    cohort: Path, folder: Path, sections: list[str] | None, train: Path
) -> Evaluation:
    from strank.cohort.folder import count_spots, section_names
    from strank.cohort.store import read_cohort
    from strank.evaluation.held_out import evaluate
    from strank.model.rank_model import RankModel

    model = RankModel.load(folder)
    encoder, trained = model.encoder["name"], list(model.provenance["sections"])
    if sections is None:
        sections = [name for name in section_names(cohort) if name not in trained]
        if not sections:
            raise InputError(
                f"{cohort}: the model was trained on all of its sections; name some with "
                "--sections, or evaluate with --folds"
            )
    known = [name for name in section_names(train) if name in trained]
    if model.backbone is not None:
        from strank.encoders.embedding import embed
        from strank.prediction import encoder_of

        for place in {cohort, train}:
            # What was done before is kept.
            told = f"Embedding by the model's encoder ({place})"
            with progress(told, count_spots(place)) as advance:
                embed(place, encoder_of(model), advance=advance)
    with working("Scoring, and fitting the baselines"):
        return evaluate(
            model,
            read_cohort(cohort, sections=sections, encoder=encoder),
            train=read_cohort(train, sections=known, encoder=encoder),
        )
