"""HEST-1k and the HEST-Benchmark from the Hugging Face hub, in their own layouts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from strank.errors import InputError, some
from strank.files import output_folder
from strank.hub import download

__all__ = ["TASKS", "download_samples", "download_tasks"]

TASKS = ("IDC", "PRAD", "PAAD", "SKCM", "COAD", "READ", "CCRCC", "HCC", "LUNG", "LYMPH_IDC")
_BENCHMARK, _SAMPLES = "MahmoodLab/hest-bench", "MahmoodLab/hest"
# Without nuclei, transcripts and pictures, which are most of a sample and not read here.
_PARTS = ("st", "wsis", "patches", "metadata")
_TABLES = "HEST_v*.csv"


def download_tasks(
    tasks: Sequence[str], folder: Path | str, *, revision: str | None = None
) -> list[Path]:
    """Get tasks of the HEST-Benchmark: splits, counts, patches and genes.

    A stopped download goes on, files are checked against the hub's checksums, and what is there
    already is not asked for. The licence has to be accepted on the hub, once.

    Parameters
    ----------
    tasks
        Some of `TASKS`.
    folder
        The tasks become folders in it.
    revision
        Branch, tag or commit of ``MahmoodLab/hest-bench``; the newest if ``None``.

    Returns
    -------
    list[Path]
        Folder of each task, as `strank.readers.hest_bench` reads it.

    Raises
    ------
    InputError
        For an unknown task, and as `strank.hub.download` says.

    Examples
    --------
    >>> download_tasks(["BRCA"], "bench_data")
    Traceback (most recent call last):
    ...
    strank.errors.InputError: no task BRCA; there are IDC, PRAD, PAAD, SKCM, COAD, READ, ...
    """
    unknown = [task for task in tasks if task not in TASKS]
    if unknown or not tasks:
        raise InputError(f"no task {some(unknown)}; there are {', '.join(TASKS)}")
    patterns = [f"{task}/*" for task in tasks]
    found = _download(_BENCHMARK, patterns, folder, revision)
    return [found / task for task in tasks]


def download_samples(
    ids: Sequence[str], folder: Path | str, *, revision: str | None = None
) -> Path:
    """Get samples of HEST-1k: counts, slide, patches and metadata, and the table of all samples.

    As `download_tasks` does.

    Parameters
    ----------
    ids
        Such as ``TENX99``; the hub's table ``HEST_v*.csv`` lists them.
    folder
        Gets ``st/``, ``wsis/``, ``patches/`` and ``metadata/``.
    revision
        Branch, tag or commit of ``MahmoodLab/hest``; the newest if ``None``.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    InputError
        For a sample that is not there, and as `strank.hub.download` says.
    """
    wrong = [name for name in ids if not re.fullmatch(r"\w+", name)]
    if wrong or not ids:
        raise InputError(f"{some(wrong)}: not the id of a sample, such as TENX99")
    patterns = [f"{part}/{name}.*" for name in ids for part in _PARTS]
    found = _download(_SAMPLES, [*patterns, _TABLES], folder, revision)
    absent = [name for name in ids if not (found / f"st/{name}.h5ad").is_file()]
    if absent:
        raise InputError(f"{_SAMPLES}: has no sample {some(absent)}; {found}/{_TABLES} lists them")
    return found


def _download(repo: str, patterns: Sequence[str], folder: Path | str, revision: str | None) -> Path:
    folder = output_folder(Path(folder).expanduser())
    return download(
        repo, repo_type="dataset", revision=revision, allow_patterns=patterns, folder=folder
    )
