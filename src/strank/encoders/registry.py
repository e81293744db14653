"""From a name to an encoder: built in, an image network, or one's own.

Image networks are imported when one is asked for, so that the others need no torch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from strank.encoders.base import Encoder
from strank.errors import InputError

# Encoders that need no weights, by what makes them: the place to add one.
ENCODERS: dict[str, str] = {"morphology": "strank.encoders.morphology.encoder:Morphology"}

_PROTOCOL = ("name", "version", "fields", "feature_names", "encode")


def get_encoder(
    name: str, *, um: float | None = None, weights: Path | str | None = None, own: bool = True
) -> Encoder:
    """Make the encoder of that name, on the CPU.

    Nothing but tensors is read of weights, and no code of a hub is run: architectures come from the
    installed libraries.

    Parameters
    ----------
    name
        ``morphology``, which needs no weights; a network of the catalogue, such as ``uni`` (see
        `encoder_table`); any other of the hub as ``timm:resnet18``, ``timm:owner/name`` or
        ``hf:owner/name`` (transformers); ``timm:folder`` or ``hf:folder`` for a local folder in the
        hub's layout (``config.json``, ``model.safetensors`` and, of transformers,
        ``preprocessor_config.json``); or ``module:callable``, what gives an `Encoder` when it is
        called.
    um
        Side of the window around a spot, in µm, for an image network; its pixels are those of the
        network. If ``None``, what the catalogue says, or 112 µm.
    weights
        File with the weights of a network of the catalogue, in place of those on the hub:
        safetensors, or a checkpoint of torch that holds nothing but tensors.
    own
        Whether the name is the user's: out of a file, such as a model that was downloaded, it may
        be that of the catalogue or of a network that timm registers; code, folders and other
        repositories of the hub, to which a token would be sent, are neither run nor opened.

    Returns
    -------
    Encoder
        ``strank.embed`` moves an image network to the GPU.

    Raises
    ------
    InputError
        For an unknown name, with the choices; if it cannot be loaded: no network, a damaged folder,
        weights that are not safetensors or incomplete or of another network, a hub that cannot be
        reached, or does not give them; or if what ``module:callable`` gives is no encoder.

    Examples
    --------
    >>> get_encoder("morphology").fields[0]
    Field(um=100.0, pixels=224)
    >>> get_encoder("morphologie")
    Traceback (most recent call last):
    ...
    strank.errors.InputError: no encoder 'morphologie'; did you mean 'morphology'? choose one of ...
    """
    if name not in ENCODERS:
        from strank.encoders.catalogue import CATALOGUE, LIBRARIES

        if name in CATALOGUE or name.partition(":")[0] in LIBRARIES:
            from strank.encoders.load import load_encoder

            if not own and name not in CATALOGUE:
                _refuse_foreign(name)
            return load_encoder(name, um=um, weights=weights)
    for option, given in {"weights": weights, "um": um}.items():
        if given is not None:
            raise InputError(f"`{option}` is for image networks, which {name!r} is not")
    if ":" in name:
        if not own:
            raise InputError(
                f"{name}: code that a file names is not run; if you trust it, give `encoder={name}`"
            )
        return _made_by(name)
    if name not in ENCODERS:
        choices = [*ENCODERS, *CATALOGUE]
        near = difflib.get_close_matches(name.lower(), choices, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(
            f"no encoder {name!r}; {hint}choose one of {', '.join(choices)}, timm:NAME, hf:NAME, "
            "module:callable"
        )
    module, _, attribute = ENCODERS[name].partition(":")
    encoder: Encoder = getattr(import_module(module), attribute)()
    return encoder


def _refuse_foreign(name: str) -> None:
    source = name.partition(":")[2]
    if re.fullmatch(r"timm:[a-z0-9_.]+", name) and not Path(source).exists():
        return
    raise InputError(
        f"{name}: a folder or repository that a file names is not opened; if you trust it, embed "
        f"with it first, or give `encoder={name}`"
    )


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
            "strank.encoders.Encoder"
        )
    return encoder


def encoder_table() -> list[dict[str, Any]]:
    """List the encoders that have a name: what each gives, looks at, and may be used for.

    Returns
    -------
    list[dict]
        For each ``name``, ``width`` (number of features), ``um_per_pixel`` and ``pixels`` of its
        window, ``mean`` and ``std`` of the colours (``None`` for those without weights),
        ``precision`` that its authors compute in, ``licence``, ``gated`` (whether the licence is to
        be accepted on the hub), ``source``, ``file``, ``revision`` and ``citation``.

    Examples
    --------
    >>> [(row["name"], row["width"]) for row in encoder_table() if row["name"] == "uni2-h"]
    [('uni2-h', 1536)]
    """
    rows: list[dict[str, Any]] = []
    for name in ENCODERS:
        encoder = get_encoder(name)
        window = encoder.fields[0]
        row: dict[str, Any] = {"name": name, "width": len(encoder.feature_names)}
        row |= {"um_per_pixel": window.um / window.pixels, "pixels": window.pixels}
        row |= {"mean": None, "std": None, "precision": "float32", "licence": "BSD-3-Clause"}
        row |= {"gated": False, "source": "built in", "file": None, "revision": encoder.version}
        rows.append(row | {"citation": "strank"})
    from strank.encoders.catalogue import CATALOGUE

    called = {"width": "n_features", "source": "repo"}
    for entry in CATALOGUE.values():
        rows.append({name: getattr(entry, called.get(name, name)) for name in rows[0]})
    return rows
