"""The encoders by name, and facts of the image networks: where from, on what terms.

An entry in catalogue.toml is all that a new network needs. Nothing is imported for them, so that
listing them is cheap.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

from strank.encoders.base import Encoder, Field
from strank.errors import InputError


@dataclass(frozen=True)
class EncoderEntry:
    """An image network with published weights."""

    name: str  # In `obsm`, too
    repo: str  # On the Hugging Face hub
    citation: str
    n_features: int
    architecture: Mapping[str, Any]  # What builds it without weights, as in `Backbone`
    mean: list[float]  # Of red, green and blue, each from 0 to 1
    std: list[float]
    file: str = "pytorch_model.bin"
    licence: str = "CC-BY-NC-ND-4.0"
    gated: bool = True  # Given after its terms were accepted on the hub
    library: str = "timm"
    um_per_pixel: float = 0.5  # Of the patches it expects
    pixels: int = 224
    # What the network gives by itself, mostly its class token; or "class+mean", which appends the
    # mean of the patch tokens.
    pooling: str = "own"
    precision: str = "fp16"  # That its authors compute in on a GPU: a name of `PRECISIONS`
    rest: tuple[str, ...] = ()  # How names of weights begin that the file has besides
    revision: str | None = None  # If nobody pinned one the newest is taken, and recorded

    @property
    def field(self) -> Field:
        """The window it looks at."""
        return Field(self.um_per_pixel * self.pixels, self.pixels)

    @property
    def terms(self) -> str:
        """What a user must know before the weights can be had."""
        gate = f", gated: ask at https://huggingface.co/{self.repo}" if self.gated else ""
        return f"licence {self.licence}{gate}"


def _read_entries() -> Iterator[EncoderEntry]:
    content = tomllib.loads(files("strank.encoders").joinpath("catalogue.toml").read_text("utf-8"))
    for name, facts in content["network"].items():
        mean, std = content["colours"][facts.pop("colours", "imagenet")]
        built: dict[str, Any] = facts.pop("architecture")
        if facts.get("library", "timm") == "timm":
            of = built.pop("architecture")
            built = {"architecture": of, "model_args": {"num_classes": 0, **built}}
            built["pretrained_cfg"] = {}
        facts["rest"] = tuple(facts.get("rest", ()))
        yield EncoderEntry(name, architecture=built, mean=mean, std=std, **facts)


# The entries of catalogue.toml, the place to add one.
CATALOGUE: dict[str, EncoderEntry] = {entry.name: entry for entry in _read_entries()}

# Encoders that need no weights, by what makes them: the place to add one.
ENCODERS: dict[str, str] = {"morphology": "strank.encoders.morphology.encoder:Morphology"}

# What builds an image network, by how its name begins.
LIBRARIES = {"timm": "timm", "hf": "transformers"}

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
        Whether ``module:callable`` is imported: not where the name comes out of a file, such as a
        model that was downloaded, which could name any code.

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
    if name in CATALOGUE or name.partition(":")[0] in LIBRARIES:
        # Here, so that listing names needs no torch.
        from strank.encoders.load import load_encoder

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
    called = {"width": "n_features", "source": "repo"}
    for entry in CATALOGUE.values():
        rows.append({name: getattr(entry, called.get(name, name)) for name in rows[0]})
    return rows
