"""``strank reproduce``: the paper's experiments, beside its numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from strank.cli.console import Json, finish, note, records, show_table, split_names

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
_Jobs = Annotated[int | None, typer.Option(min=1, help="Processes; all cores if not given.")]


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
    jobs: _Jobs = None,
    as_json: Json = False,
) -> None:
    """Repeat Table 2: seven losses on seven tasks of HEST-1k, and the same without leaks.

    Samples come from the Hugging Face hub (log in with `hf auth login`) or a folder,
    features from CONCH, whose licence is accepted at huggingface.co/MahmoodLab/conch.

    [bold]Example:[/] strank reproduce hest -o table2

    [bold]Example:[/] strank reproduce hest --tasks IDC,PRAD --data hest_data -o table2 --quick
    """
    from joblib import cpu_count

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
        jobs=jobs or cpu_count(),
        say=note,
        verbose=True,
    )
    _tell(result.facts)
    if not as_json:
        wide = result.table.pivot(index="method", columns="task")
        for value in ("paper", "scc", "depth_matched"):
            shown = wide[value].reindex(dict.fromkeys(result.table["method"]))
            shown = shown.dropna(how="all")[list(dict.fromkeys(result.table["task"]))]
            show_table(shown.reset_index().rename_axis(columns=None), _TITLES[value])
    finish(
        {"output": str(output), **result.facts, "table": records(result.table)},
        as_json=as_json,
        lines=[f"Page: {result.page}; table.csv, table.md and reproduction.json beside it."],
    )


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
