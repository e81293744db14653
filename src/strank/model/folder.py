"""A model's folder: what may lie in it, what it says, and whether its files are as written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from strank.errors import InputError, said_by
from strank.files import sha256
from strank.model.schema import read_model
from strank.storage import recover

MODEL, CARD = "model.json", "README.md"
# Files of tensors, by what `model.json` calls their part.
TENSORS = {"head": "head.safetensors", "backbone": "encoder.safetensors"}
TENSORS |= {part: f"{part}.safetensors" for part in ("novelty", "uncertainty")}
# All that a model's folder may hold; what happens to lie beside it is not copied.
MODEL_FILES = (MODEL, CARD, *TENSORS.values())


def read_folder(folder: Path) -> dict[str, Any]:
    """Read what a model says of itself, if its tensors are those that were written with it."""
    recover(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such model folder; train one with `strank fit`")
    _refuse_links(folder)
    stored = read_model(folder / MODEL)
    for part, name in TENSORS.items():
        if stored.get(part) is not None:
            _check_sum(folder, name, stored[part]["sha256"])
    return stored


def refuse_other(folder: Path) -> None:
    """Let a model take the place of a model only."""
    if folder.exists() and not (folder / MODEL).is_file():
        raise InputError(f"{folder}: exists and is not a model; choose another `folder`")


def _check_sum(folder: Path, name: str, meant: str) -> None:
    try:
        found = sha256(folder / name)
    except OSError as error:
        raise InputError(f"{folder / name}: damaged model folder ({said_by(error)})") from error
    if found != meant:
        raise InputError(f"{folder / name}: damaged (its checksum is not that in model.json)")


def _refuse_links(folder: Path) -> None:
    """Refuse files of a model that lie elsewhere, but for the hub's own cache, or are no files."""
    place = folder.resolve()
    homes = (place, place.parents[min(1, len(place.parents) - 1)] / "blobs")
    for path in (folder / name for name in MODEL_FILES):
        if path.is_symlink() and path.resolve().parent not in homes:
            raise InputError(f"{path}: a link out of the model's folder; copy the file")
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: no ordinary file; make the model's folder anew")
