"""Features that are stored: whether they are those of a section and an encoder."""

from __future__ import annotations

import json
from pathlib import Path

from strank.cohort.folder import open_h5ad, text_of
from strank.encoders.base import Encoder, encoder_facts
from strank.errors import InputError
from strank.storage import Claim, check_seal, tidy

DTYPES = ("float32", "float16")
_DAMAGE = (InputError, AttributeError, KeyError, TypeError, ValueError)


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


def sweep(path: Path) -> None:
    """Remove what a run has left that was killed when the features were written."""
    tidy(path)
    part = part_of(path)
    if part.exists() or Claim.place(path).exists():
        claim = Claim.take(path, wait=False)
        if claim is not None:
            part.unlink(missing_ok=True)
            claim.release()


def part_of(path: Path) -> Path:
    """Where features are kept while they are made."""
    return path.with_name(f".{path.stem}.part")
