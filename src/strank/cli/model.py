"""``strank model show``, ``push`` and ``pull``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from strank.cli.console import Json, finish, note, records, working
from strank.errors import InputError, printable

ModelFolder = Annotated[Path, typer.Argument(help="A trained model.")]
EvaluationFolder = Annotated[
    Path | None, typer.Option(help="Folder of `strank evaluate` for this model, to say how well.")
]


_Markdown = Annotated[bool, typer.Option("--markdown", help="As plain Markdown.")]
_Repo = Annotated[
    str, typer.Argument(help="OWNER/NAME on the Hugging Face hub, or a folder: ./NAME.")
]
_Private = Annotated[bool, typer.Option("--private", help="Only for those who are let in.")]
_Licence = Annotated[
    str | None, typer.Option("--license", help="As the hub abbreviates it: mit, cc-by-4.0, ...")
]
_Output = Annotated[Path, typer.Option("-o", "--output", help="Folder of the model to write.")]
_Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit on the hub; the newest if not given.")
]


def show(
    model: ModelFolder,
    evaluation: EvaluationFolder = None,
    markdown: _Markdown = False,
    as_json: Json = False,
) -> None:
    """Show the card of a model: what, on what, how well, what not to use it for.

    [bold]Example:[/] strank model show strank-demo/model --evaluation strank-demo/evaluation
    """
    from rich.console import Console
    from rich.markdown import Markdown

    from strank.model.card import read_evidence, write_card
    from strank.model.folder import read_folder

    # What a model says of itself is read without its tensors.
    stored = read_folder(model)
    genes, encoder = [row["gene"] for row in stored["panel"]], stored["encoder"]
    evidence = None if evaluation is None else read_evidence(evaluation, stored["provenance"])
    known = genes, encoder, stored["provenance"], evidence
    card = write_card(*known, for_hub=markdown or as_json)
    if not (markdown or as_json):
        Console().print(Markdown(printable(card)))
    finish(
        {
            "card": card,
            "genes": genes,
            "encoder": encoder,
            "provenance": stored["provenance"],
            "evaluation": None if evidence is None else records(evidence.summary),
        },
        as_json=as_json,
        lines=[card] if markdown else [],
    )


def push(
    model: ModelFolder,
    repo: _Repo,
    private: _Private = False,
    evaluation: EvaluationFolder = None,
    licence: _Licence = None,
    as_json: Json = False,
) -> None:
    """Put a model with its card on the Hugging Face hub.

    The names of its training sections and patients go with it.

    [bold]Example:[/] strank model push model me/her2-breast --evaluation evaluation --private
    """
    from strank.model.rank_model import RankModel, is_on_hub

    trained = RankModel.load(model)
    if licence is None:
        note("the card names no licence, so that others may not use the model; give --license")
    if is_on_hub(repo):
        with working("Uploading"):
            place = trained.push_to_hub(
                repo, evaluation=evaluation, licence=licence, private=private or None
            )
    elif private:
        raise InputError(f"{repo}: a folder, to which --private does not apply")
    else:
        place = str(Path(repo).expanduser())
        trained.save(place, card=trained.card(evaluation, licence=licence, for_hub=True))
    finish(
        {"repo": repo, "at": place},
        outputs=[] if is_on_hub(repo) else [place],
        as_json=as_json,
        lines=[f"The model is at {place}"],
    )


def pull(
    repo: _Repo,
    output: _Output,
    revision: _Revision = None,
    as_json: Json = False,
) -> None:
    """Get a model from the Hugging Face hub, and check it.

    [bold]Example:[/] strank model pull me/her2-breast -o model
    """
    from strank.model.rank_model import pull_model

    folder = pull_model(repo, output, revision=revision)
    finish(
        {"repo": repo, "revision": revision, "model": str(folder)},
        outputs=[folder],
        as_json=as_json,
        lines=[f"Wrote {folder}. Next: strank model show {folder}"],
    )
