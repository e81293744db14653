"""Optional packages: which extra of strank brings them, and one error that names all that lack."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import lazy_loader

from strank.errors import InputError

_MODULES = {
    "dask": "distributed",
    "encoders": "timm transformers",
    "finetune": "peft",
    "hub": "huggingface_hub",
    "images": "cv2 openslide pyvips tifffile",
    "neural": "lightning",
    "plots": "PIL jinja2 matplotlib plotly shapely",
    "scverse": "geopandas scanpy spatialdata",
}
_EXTRAS = {module: extra for extra, modules in _MODULES.items() for module in modules.split()}


def need(*modules: str) -> None:
    """Refuse, before the work, what needs modules that are absent; the error names all of them."""
    if absent := [name for name in modules if find_spec(name) is None]:
        raise InputError(_told(absent))


def attach(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], Any], list[str]]:
    """Import public names when they are first used; where an extra lacks, say which brings it."""
    get, names, public = lazy_loader.attach_stub(package, file)

    def attribute(name: str) -> Any:
        try:
            return get(name)
        except ModuleNotFoundError as error:
            told = explain_absence(error)
            if told is None:
                raise
            raise InputError(told) from error

    return attribute, names, public


def explain_absence(error: ModuleNotFoundError) -> str | None:
    """Say what brings a package that is absent; ``None`` for one that no extra brings."""
    name = (error.name or "").partition(".")[0]
    if name not in _EXTRAS:
        return None
    # What the same extra brings will be missed next.
    beside = [other for other in _EXTRAS if _EXTRAS[other] == _EXTRAS[name]]
    return _told([other for other in beside if other == name or find_spec(other) is None])


def _told(absent: list[str]) -> str:
    extras = sorted({_EXTRAS[name] for name in absent})
    return f"this needs {', '.join(absent)}: pip install 'strank[{','.join(extras)}]'"
