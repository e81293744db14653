"""``strank reproduce``: the paper's experiments, beside its numbers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from strank.cli.console import (
    Dask,
    Jobs,
    Json,
    cores,
    finish,
    note,
    records,
    show_table,
    split_names,
)
from strank.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

reproduce = typer.Typer(
    help="The paper's experiments, beside its numbers and what is better.", no_args_is_help=True
)

_Output = Annotated[
    Path, typer.Option("-o", "--output", help="Folder for all of it; a stopped run continues.")
]
_Data = Annotated[
    Path | None,
    typer.Option(help="Folder of HEST-1k; what is needed is downloaded if not given."),
]
_Tasks = Annotated[
    str | None,
    typer.Option(help="Of IDC, PRAD, PAAD, COAD, READ, ccRCC, IDC-L, separated by commas."),
]
_Encoder = Annotated[
    str, typer.Option(help="Image features; the paper's are CONCH on 224 pixels, conch-224.")
]
_Weights = Annotated[
    Path | None, typer.Option(help="File with the encoder's weights, in place of the hub's.")
]
_Seeds = Annotated[int, typer.Option(min=1, help="Of what is trained, on the paper's split.")]
_LibrarySize = Annotated[
    bool,
    typer.Option(
        "--library-size/--no-library-size",
        help="Without: what knows the depth of a spot is fitted without it, too.",
    ),
]
_Quick = Annotated[
    bool, typer.Option("--quick", help="A first look: one seed, few epochs, one network.")
]
_DataGenes = Annotated[
    Path,
    typer.Option(
        help="HER2ST as for `strank import st` (images/, counts/, spots/), or a cohort, to which "
        "features are added."
    ),
]
_Genes = Annotated[
    str | None,
    typer.Option(help="Sizes of the panel; 50,250,1000,5000,9385 if not given (to 1000 if quick)."),
]
_Losses = Annotated[
    str | None,
    typer.Option(help="Of mse, poisson, nb, rank, pair, pcc, list, separated by commas."),
]
_SeedsGenes = Annotated[int, typer.Option(min=1, help="Of what is trained step by step.")]
_QuickGenes = Annotated[
    bool, typer.Option("--quick", help="A first look: one seed, few epochs, at most three folds.")
]
_DataLists = Annotated[
    Path | None,
    typer.Option(help="Folder of HEST-1k, for the column of Breast Xenium; without, curves only."),
]
_SeedsLists = Annotated[
    int | None, typer.Option(min=2, help="Data sets of each curve, and fits (3; 2 if quick).")
]
_QuickLists = Annotated[bool, typer.Option("--quick", help="A first look: two sizes, few steps.")]
_OutputSynthetic = Annotated[
    Path, typer.Option("-o", "--output", help="Folder of the study; a stopped one continues.")
]
_QuickSynthetic = Annotated[bool, typer.Option("--quick", help="A short look, in about a minute.")]
_SeedsSynthetic = Annotated[
    int | None, typer.Option(min=2, help="Data sets of each function (3; 2 if quick).")
]
_SeedSynthetic = Annotated[int, typer.Option(min=0, help="Seed of data, weights and batches.")]


@reproduce.command("hest")
def hest_command(
    output: _Output,
    data: _Data = None,
    tasks: _Tasks = None,
    encoder: _Encoder = "conch-224",
    weights: _Weights = None,
    seeds: _Seeds = 3,
    library_size: _LibrarySize = True,
    quick: _Quick = False,
    jobs: Jobs = None,
    dask: Dask = None,
    as_json: Json = False,
) -> None:
    """Repeat Table 2: seven losses on seven tasks of HEST-1k, and the same without leaks.

    Samples come from the Hugging Face hub (log in with `hf auth login`) or a folder,
    features from CONCH, whose licence is accepted at huggingface.co/MahmoodLab/conch.

    [bold]Example:[/] strank reproduce hest -o table2

    [bold]Example:[/] strank reproduce hest --tasks IDC,PRAD --data hest_data -o table2 --quick
    """
    from strank.reproduce import hest

    result = hest(
        output,
        data,
        tasks=split_names(tasks) or _all_tasks(),
        encoder=encoder,
        weights=weights,
        seeds=seeds,
        library_size=library_size,
        quick=quick,
        jobs=cores(jobs, dask),
        dask=dask,
        say=note,
        verbose=True,
    )
    _tell(result.facts)
    if not as_json:
        for value, title in _TITLES.items():
            _show(result.table, "method", "task", value, title)
    finish(
        {**result.facts, "rows": records(result.table)},
        outputs=[output],
        as_json=as_json,
        lines=[f"Page: {result.page}; table.csv, table.md and reproduction.json beside it."],
    )


@reproduce.command("genes")
def genes_command(
    data: _DataGenes,
    output: _Output,
    encoder: _Encoder = "morphology",
    weights: _Weights = None,
    genes: _Genes = None,
    losses: _Losses = None,
    seeds: _SeedsGenes = 1,
    library_size: _LibrarySize = True,
    quick: _QuickGenes = False,
    jobs: Jobs = None,
    dask: Dask = None,
    as_json: Json = False,
) -> None:
    """Repeat the table of HER2ST by number of genes, 50 to 9,385, and what is better beside it.

    The paper's losses by the published recipe, every patient held out once, beside the
    exact list; and the same with genes from training, in scores that know nothing of depth.

    [bold]Example:[/] strank reproduce genes --data her2st -o genes --genes 50,1000 --quick
    """
    from strank import reproduce as library

    sizes = split_names(genes)
    if wrong := [text for text in sizes or () if not (text.isdecimal() and int(text))]:
        raise InputError(f"`n_genes`: {wrong[0]!r} is no number of genes")
    given = {} if losses is None else {"losses": split_names(losses) or ()}
    result = library.genes(
        output,
        data,
        encoder=encoder,
        weights=weights,
        n_genes=None if sizes is None else [int(text) for text in sizes],
        seeds=seeds,
        library_size=library_size,
        quick=quick,
        jobs=cores(jobs, dask),
        dask=dask,
        say=note,
        verbose=True,
        **given,
    )
    for text in (result.facts["split"], *result.facts["questionable"]):
        note(text)
    if not as_json:
        for value, title in _TITLES_GENES.items():
            _show(result.table, "method", "genes", value, title)
    finish(
        {**result.facts, "rows": records(result.table)},
        outputs=[output],
        as_json=as_json,
        lines=[f"Wrote table.md, table.csv and reproduction.json to {output}."],
    )


@reproduce.command("list-size")
def list_size_command(
    output: _Output,
    data: _DataLists = None,
    encoder: _Encoder = "conch-224",
    weights: _Weights = None,
    seeds: _SeedsLists = None,
    quick: _QuickLists = False,
    jobs: Jobs = None,
    dask: Dask = None,
    as_json: Json = False,
) -> None:
    """Repeat Table 3: the list loss on random lists of 2 to 256 spots.

    On curves of known truth, and with --data on HEST's Xenium samples of breast, by the
    published recipe.

    [bold]Example:[/] strank reproduce list-size -o lists --quick

    [bold]Example:[/] strank reproduce list-size --data hest_data -o lists
    """
    from strank import reproduce as library

    result = library.list_size(
        output,
        data,
        encoder=encoder,
        weights=weights,
        seeds=seeds,
        quick=quick,
        jobs=cores(jobs, dask),
        dask=dask,
        say=note,
        verbose=True,
    )
    for text in result.facts["notes"]:
        note(text)
    if not as_json:
        for value, title in (("paper", "SCC, as the paper prints it"), ("scc", "SCC, ours")):
            _show(result.table, "n_k", "data", value, title)
    finish(
        {**result.facts, "rows": records(result.table)},
        outputs=[output],
        as_json=as_json,
        lines=[f"Wrote table.md, table.csv and reproduction.json to {output}."],
    )


@reproduce.command("synthetic")
def synthetic_command(
    output: _OutputSynthetic = Path("strank-synthetic"),
    quick: _QuickSynthetic = False,
    seeds: _SeedsSynthetic = None,
    seed: _SeedSynthetic = 0,
    jobs: Jobs = None,
    dask: Dask = None,
    as_json: Json = False,
) -> None:
    """Repeat the paper's synthetic study: objectives on curves of known truth.

    Table 1, the list sizes of table 3, and sweeps of scale, bias, dispersion,
    sample size, sparsity and depth, beside the paper's numbers and the exact
    optimum: about 15 minutes on two cores. A stopped study continues.

    [bold]Example:[/] strank reproduce synthetic -o strank-synthetic --quick
    """
    from strank import reproduce as library

    result = library.synthetic(
        output, quick=quick, seeds=seeds, seed=seed, jobs=jobs, dask=dask, verbose=True
    )
    if not as_json:
        shown = result.table1.query("selection != 'truth'").drop(columns=["selection", "seeds"])
        show_table(shown, "Mean SCC against the truth")
    if result.page is None:
        note("no page is made: pip install 'strank[plots]' (matplotlib is absent), and run again")
    about = {"seed": seed, "seeds": int(result.table1["seeds"].max()), "quick": quick}
    tables = {"table1": records(result.table1), "table3": records(result.table3)}
    finish(
        {**about, **tables},
        outputs=[output],
        as_json=as_json,
        lines=["", f"Page: {result.page}" if result.page else f"Tables: {output}"],
    )


def _show(table: pd.DataFrame, rows: str, columns: str, value: str, title: str) -> None:
    """Print one value of a table, in the order of the table."""
    wide = table.pivot_table(value, rows, columns, dropna=False)
    wide = wide.reindex(dict.fromkeys(table[rows]))[list(dict.fromkeys(table[columns]))]
    show_table(wide.dropna(how="all").reset_index().rename_axis(columns=None), title)


_TITLES_GENES = {
    "paper": "SCC by number of genes, as the paper prints it",
    "scc": "SCC, ours: genes chosen on all sections, counts per 10,000 of the panel",
    "depth_matched": "Depth-matched SCC, genes chosen on training sections",
    "lift": "Lift, genes chosen on training sections",
    "slope": "Calibration slope, genes chosen on training sections",
}
_TITLES = {
    "paper": "SCC, as the paper prints it",
    "scc": "SCC on the paper's split, ours",
    "depth_matched": "Depth-matched SCC without leaks",
}


def _all_tasks() -> tuple[str, ...]:
    from strank.evaluation.paper_tasks import PAPER_TASKS

    return tuple(PAPER_TASKS)


def _tell(facts: dict) -> None:
    """Say what the numbers rest on, and what could not be done; the same of several tasks once."""
    if facts["quick"]:
        note("--quick: a first look, not the study")
    if unknown := facts["unknown_patients"]:
        note(f"the patient of {', '.join(unknown)} is not known: each counts as one of its own")
    said: dict[str, list[str]] = {}
    for name, task in facts["tasks"].items():
        without = task.get("leak-free", {"failed": ["one patient"]})
        for text in (
            *task["published"]["warnings"],
            *(f"published, not done: {why}" for why in task["published"]["failed"]),
            *(f"leak-free, not possible: {why}" for why in without["failed"]),
        ):
            said.setdefault(text, []).append(name)
    for text, names in said.items():
        note(f"{', '.join(names)}: {text}")
