"""Features that are stored: whether they are those of a section and an encoder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from strank.cohort.folder import digest_of, features_path, open_h5ad, text_of
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


def what_lacks(cohort: Path, encoder: str, sections: Iterable[str]) -> dict[str, str]:
    """Say which sections have no whole features of an encoder and of their spots, and why."""
    found = {}
    for name in sections:
        path = features_path(cohort, encoder, name)
        try:
            if not path.is_file():
                found[name] = "missing"
            elif _spots_of(path) != digest_of(cohort / f"{name}.h5ad"):
                found[name] = "its spots or its image changed"
        except _DAMAGE:
            found[name] = "damaged"
    return found


def _spots_of(path: Path) -> str:
    with open_h5ad(path, sealed=check_seal(path)) as file:
        return text_of(file["uns/spots_sha256"])
