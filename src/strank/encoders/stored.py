"""Features that are stored: whether they are those of a section and an encoder."""

from __future__ import annotations

import json
from pathlib import Path

from strank.cohort.folder import open_h5ad, text_of
from strank.encoders.base import Encoder, encoder_facts
from strank.errors import InputError
from strank.storage import check_seal

_DTYPES = ("float32", "float16")
_DAMAGE = (InputError, AttributeError, KeyError, TypeError, ValueError)


def check_dtype(dtype: str | None) -> None:
    """Refuse what features are not stored as."""
    if dtype not in (None, *_DTYPES):
        raise InputError(f"dtype {dtype!r}: choose one of {', '.join(_DTYPES)}")


def lacks(path: Path, encoder: Encoder, spots_sha256: str | None, dtype: str | None) -> str | None:
    """Say why a section's features are not what they should be; ``None`` if they are.

    Empty if there are none.
    """
    if not path.is_file():
        return ""
    try:
        with open_h5ad(path, sealed=check_seal(path)) as file:
            facts = dict(json.loads(text_of(file["uns/encoder"])))
            same_spots = text_of(file["uns/spots_sha256"]) == spots_sha256
            stored = file["X"].dtype
    except _DAMAGE:
        return f"{path} is damaged"
    now = encoder_facts(encoder)
    changed = [key for key in now | facts if facts.get(key) != now.get(key)]
    if changed:
        was = ", ".join(f"{key} was {facts.get(key)}, now {now.get(key)}" for key in changed)
        return f"the encoder changed: {was}"
    if not same_spots:
        return "its spots or its image changed"
    if dtype not in (None, stored):
        return f"its features are stored as {stored}, not {dtype}"
    return None


def fault_of(path: Path, spots_sha256: str | None) -> str:
    """Say what is wrong with features, of whatever encoder; empty for nothing."""
    if not path.is_file():
        return "missing"
    try:
        with open_h5ad(path, sealed=check_seal(path)) as file:
            same = text_of(file["uns/spots_sha256"]) == spots_sha256
    except _DAMAGE:
        return "damaged"
    return "" if same else "of changed spots"
