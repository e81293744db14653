"""Encoders by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from strank.encoders.base import Encoder
from strank.encoders.pathology import NETWORKS
from strank.errors import InputError

__all__ = ["ENCODERS", "encoder_table", "get_encoder"]

#: Encoders that are made from images alone, by what makes them.
ENCODERS: dict[str, str] = {"morphology": "strank.encoders.morphology:Morphology"}

_LIBRARIES = ("timm", "hf")
_PROTOCOL = ("name", "version", "fields", "feature_names", "encode")


def get_encoder(name: str, *, weights: Path | None = None, own: bool = True) -> Encoder:
    """Make the encoder of that name, on the CPU; `strank.encoders.backbone.place` moves it.

    Parameters
    ----------
    name
        ``morphology``; a network of the catalogue, such as ``uni``; ``timm:NAME``, ``hf:REPO`` or
        a folder as `strank.encoders.hub.load_backbone` takes them; or ``module:callable``, what
        gives an object with the attributes of `strank.encoders.base.Encoder` when it is called.
    weights
        File with the weights of a network of the catalogue, in place of those on the hub.
    own
        Whether ``module:callable`` is imported: not where the name comes out of a file, such as a
        model that was downloaded, which could name any code.

    Raises
    ------
    InputError
        For an unknown name, with the choices; if it cannot be loaded, as `load_backbone`; or if
        what ``module:callable`` gives is no encoder.

    Examples
    --------
    >>> get_encoder("morphologie")
    Traceback (most recent call last):
    ...
    strank.errors.InputError: no encoder 'morphologie'; did you mean 'morphology'? choose one of ...
    """
    if name in NETWORKS or name.partition(":")[0] in _LIBRARIES:
        from strank.encoders.hub import load_encoder

        return load_encoder(name, weights=weights)
    if weights is not None:
        raise InputError(f"--weights is for networks of the catalogue, which {name!r} is not")
    if ":" in name:
        if not own:
            raise InputError(
                f"{name}: code that a file names is not run; if you trust it, give --encoder {name}"
            )
        return _made_by(name)
    if name not in ENCODERS:
        choices = [*ENCODERS, *NETWORKS]
        near = difflib.get_close_matches(name.lower(), choices, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(
            f"no encoder {name!r}; {hint}choose one of {', '.join(choices)}, timm:NAME, hf:NAME, "
            "module:callable"
        )
    module, _, attribute = ENCODERS[name].partition(":")
    encoder: Encoder = getattr(import_module(module), attribute)()
    return encoder


def _made_by(name: str) -> Encoder:
    module, _, attribute = name.partition(":")
    try:
        make: Callable[[], Encoder] = getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        # Not what the module itself lacks.
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise InputError(
            f"{name}: no module {module!r}; install it, or put its folder into PYTHONPATH"
        ) from error
    except (AttributeError, ValueError) as error:
        raise InputError(
            f"{name}: no {attribute!r} in {module!r}; write module:callable"
        ) from error
    if not callable(make):
        raise InputError(f"{name}: cannot be called; it must give an encoder when it is")
    encoder = make()
    absent = [part for part in _PROTOCOL if not hasattr(encoder, part)]
    if absent:
        raise InputError(
            f"{name}: gives no encoder: {type(encoder).__name__} has no {', '.join(absent)}; see "
            "strank.encoders.base.Encoder"
        )
    return encoder


def encoder_table() -> list[dict[str, Any]]:
    """List the catalogue: what every encoder gives, looks at, and may be used for.

    Examples
    --------
    >>> [(row["name"], row["width"]) for row in encoder_table() if row["name"] == "uni2-h"]
    [('uni2-h', 1536)]
    """
    built_in = get_encoder("morphology")
    first = built_in.fields[0]
    morphology = {
        "name": built_in.name,
        "width": len(built_in.feature_names),
        "um_per_pixel": first.um / first.pixels,
        "pixels": first.pixels,
        "mean": None,
        "std": None,
        "precision": "float32",
        "licence": "BSD-3-Clause",
        "gated": False,
        "source": "built in",
        "file": None,
        "revision": built_in.version,
        "citation": "strank",
    }
    return [morphology] + [
        {
            "name": entry.name,
            "width": entry.n_features,
            "um_per_pixel": entry.um_per_pixel,
            "pixels": entry.pixels,
            "mean": list(entry.colours[0]),
            "std": list(entry.colours[1]),
            "precision": entry.precision,
            "licence": entry.licence,
            "gated": entry.gated,
            "source": entry.repo,
            "file": entry.file,
            "revision": entry.revision,
            "citation": entry.citation,
        }
        for entry in NETWORKS.values()
    ]
