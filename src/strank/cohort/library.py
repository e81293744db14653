"""What scanpy and squidpy keep of a section in ``uns["spatial"]``: its picture and the scales."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray


def visium_library(adata: AnnData, name: str = "") -> Mapping[str, Any]:
    """Find what is kept of a section: under its name or library id, or the only one there."""
    libraries = _libraries(adata)
    found = _named(libraries, name, adata) or (
        next(iter(libraries.values())) if len(libraries) == 1 else {}
    )
    return found if isinstance(found, Mapping) else {}


def scalefactors(adata: AnnData, name: str = "") -> Mapping[str, Any]:
    """Read Space Ranger's scale factors."""
    found = visium_library(adata, name).get("scalefactors", {})
    return found if isinstance(found, Mapping) else {}


def libraries_of(adata: AnnData, labels: NDArray[np.object_]) -> dict[str, Any]:
    """Take all that is kept, under the names of sections, ``[n_spots]``, where that can be.

    So spots of several can be drawn each over its own (``library_key="section"`` of squidpy).
    """
    libraries, names = _libraries(adata), sorted(set(labels) - {""})
    if len(names) == 1:
        found = {names[0]: visium_library(adata, names[0])}
    else:
        found = {name: _named(libraries, name, adata[labels == name]) for name in names}
    # One picture may be of several sections, whose names it does not have.
    return {_key(name): found[name] for name in names if found[name]} or dict(libraries)


def add_library(adata: AnnData, name: str, library: Mapping[str, Any]) -> None:
    """Keep one more, under the name of its section."""
    adata.uns["spatial"] = {**_libraries(adata), _key(name): library}


def _key(name: str) -> str:
    # Files of AnnData divide names at a slash.
    return name.replace("/", "∕")


def _libraries(adata: AnnData) -> Mapping[str, Any]:
    found = adata.uns.get("spatial", {})
    return found if isinstance(found, Mapping) else {}


def _named(libraries: Mapping[str, Any], name: str, adata: AnnData) -> Any:
    ids = adata.obs["library_id"].astype(str).unique() if "library_id" in adata.obs else []
    return next((libraries[key] for key in (name, _key(name), *ids) if key in libraries), {})
