"""Facts of image networks with published weights: where from, on what terms.

An entry in catalogue.toml is all that a new one needs. Nothing is imported for them, so that
listing them is cheap.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from strank.encoders.base import Field


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

# What builds an image network, by how its name begins.
LIBRARIES = {"timm": "timm", "hf": "transformers"}


def library_of(name: str) -> str | None:
    """Which package builds an image network of that name; ``None`` for another encoder.

    >>> library_of("hf:owner/name"), library_of("uni"), library_of("morphology")
    ('transformers', 'timm', None)
    """
    if name in CATALOGUE:
        return CATALOGUE[name].library
    return LIBRARIES.get(name.partition(":")[0])
