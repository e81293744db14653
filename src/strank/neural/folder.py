"""The folder of a training: what it was started with, so that only the same goes on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from strank.errors import InputError, some
from strank.files import output_folder, read_json, write_json

__all__ = ["claim_folder"]

_FILE = "training.json"


def claim_folder(folder: Path, parameters: dict[str, Any], *, resume: bool) -> None:
    """Start in a folder, emptied of an earlier training, or go on with the same training.

    Parameters
    ----------
    folder
        Where checkpoints and logs go.
    parameters
        What determines the result, as JSON can hold it.
    resume
        Whether to go on.

    Raises
    ------
    InputError
        If there is nothing to resume, or it was started with other parameters, or the folder has
        other things in it.
    """
    known = folder / _FILE
    if resume:
        if not known.is_file():
            raise InputError(f"{folder}: no training to resume; start without --resume")
        before = read_json(known)
        different = [key for key in parameters if before.get(key) != parameters[key]]
        if different:
            raise InputError(
                f"{folder}: the training there was started with another {some(different)}; give "
                "the same, or start without --resume"
            )
        return
    if folder.is_dir() and any(folder.iterdir()):
        if not known.is_file():
            raise InputError(f"{folder}: exists and is not a training; choose another folder")
        shutil.rmtree(folder)
    output_folder(folder)
    write_json(known, parameters)
