"""What ``model.json`` says, checked before any of it is used."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from strank.doors import checked
from strank.encoders.config import Name, Strict
from strank.errors import InputError
from strank.files import read_json

FORMAT = 1

_MOST = 1000  # Neighbours, and layers of all members
_Count = Annotated[int, Field(ge=0)]
_Size = Annotated[int, Field(ge=1, le=2**20)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Positive = Annotated[float, Field(gt=0)]
_Sum = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Scalar = str | bool | int | float | None


class _Open(BaseModel):
    """What may have more fields, which are shown and not used."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class _Options(_Open):
    """Options of the heads here; those of your own class may be others."""

    width: _Size = 1
    rank: _Size | None = None
    depth: _Count = 0
    n_neighbours: Annotated[int, Field(ge=0, le=_MOST)] = 0
    n_heads: Annotated[int, Field(ge=1, le=_MOST)] = 1
    dropout: _Share = 0.0
    input_dropout: _Share = 0.0
    centred: bool = False
    members: list[_Member] = []

    @property
    def n_layers(self) -> int:
        """Hidden layers of the head and its members, and a layer a member."""
        return self.depth + sum(1 + member.options.n_layers for member in self.members)

    @model_validator(mode="after")
    def _is_built_soon(self) -> _Options:
        if self.n_layers > _MOST:
            raise ValueError(f"at most {_MOST} layers in all")
        return self


class _Member(Strict):
    kind: Name
    options: _Options = Field(default_factory=lambda: _Options())


class _Stored(Strict):
    sha256: _Sum


class _Head(_Member, _Stored):
    pass


class _Backbone(_Stored):
    config: dict[str, Any]


class _Encoder(_Open):
    name: Name
    n_features: _Size
    source: Name = ""


class _Section(_Open):
    patient: str
    n_spots: _Count
    counts_sha256: str


class _Method(Strict):
    name: str
    head: str
    loss: str
    recipe: str
    library_size: bool


class _Calibration(Strict):
    size: bool
    told: str


class _Provenance(_Open):
    method: _Method = Field(default_factory=_Method.model_construct)
    sections: dict[str, _Section] = {}
    spot_pitch_um: _Positive = 1.0
    spot_diameter_um: _Positive = 1.0
    networks: list[dict[str, Any]] = []
    calibration: _Calibration | None = None
    uncertainty: str = ""
    strank_version: str = ""


class _Gene(_Open):
    __pydantic_extra__: dict[str, _Scalar]

    gene: Annotated[str, Field(min_length=1)]


class _Model(_Open):
    format: Literal[1]
    head: _Head
    encoder: _Encoder
    panel: Annotated[list[_Gene], Field(min_length=1)]
    provenance: _Provenance
    backbone: _Backbone | None = None
    novelty: _Stored | None = None
    uncertainty: _Stored | None = None

    @model_validator(mode="after")
    def _is_a_table(self) -> _Model:
        columns = set(self.panel[0].model_extra or {})
        if any(set(row.model_extra or {}) != columns for row in self.panel):
            raise ValueError("the genes of panel differ in their columns")
        if len({row.gene for row in self.panel}) < len(self.panel):
            raise ValueError("panel has a gene twice")
        return self


def read_model(path: Path) -> dict[str, Any]:
    """Read ``model.json``, as it is, if it says what a model must say, of the right kind."""
    stored = read_json(path)
    if isinstance(stored, dict):
        version = stored.get("format", FORMAT)
        if isinstance(version, int) and version != FORMAT:
            raise InputError(f"{path.parent}: model format {version}; update strank")
        told = stored.get("provenance")
        if isinstance(told, dict) and ("objective" in told or isinstance(told.get("method"), str)):
            # It names its method in words, which the tables of today would not know.
            raise InputError(f"{path.parent}: written by an earlier strank; fit the model again")
    checked(_Model, stored, str(path))
    found: dict[str, Any] = stored
    return found
