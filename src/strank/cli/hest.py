"""``strank hest download``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from strank.cli.console import Json, finish, split_names
from strank.errors import InputError

__all__ = ["download"]


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
    from strank.readers.hest_download import download_samples, download_tasks

    tasks, samples = split_names(task), split_names(ids)
    if (tasks is None) == (samples is None):
        raise InputError("give either --task or --id")
    if tasks is not None:
        folders = download_tasks(tasks, output, revision=revision)
        following = f"strank import hest-bench {folders[0]}"
    else:
        folders = [download_samples(samples or [], output, revision=revision)]
        following = f"strank import hest {output}"
    finish(
        {"folders": [str(folder) for folder in folders], "revision": revision},
        as_json=as_json,
        lines=[
            *(f"Downloaded and checked: {folder}" for folder in folders),
            f"Next: {following} -o cohort",
        ],
    )
