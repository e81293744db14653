"""A trained model: head, panel, encoder and provenance in a folder that anyone can open."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from strank.cohort.contract import positions_um
from strank.encoders.backbone import Backbone
from strank.encoders.load import backbone_from_config
from strank.errors import InputError, some
from strank.files import atomic_path, read_json, sha256
from strank.functional.groups import centre_within
from strank.model.novelty import Novelty
from strank.neural.data import find_neighbours
from strank.neural.heads import HEADS, Traits, stored_head
from strank.version import __version__

FORMAT = 1

_HEAD, _BACKBONE, _NOVELTY = "head.safetensors", "encoder.safetensors", "novelty.safetensors"

_ROWS = 8192

# What reading a file that is not as it was written can raise.
_DAMAGE = (LookupError, TypeError, ValueError, OSError, RuntimeError)


@dataclass(frozen=True)
class RankModel:
    """What turns the features of an encoder into scores for a panel of genes.

    Attributes
    ----------
    head
        Maps ``[n_spots, n_features]`` to ``[n_spots, n_genes]``; holds the standardisation.
    panel
        One row a gene (the index), with what is known of its fit.
    encoder
        Facts of the encoder: name, version, fields, number of features.
    provenance
        What the model was trained on and with.
    backbone
        The encoder, where it was trained with the head.
    novelty
        Which features are usual, where that is known.

    Examples
    --------
    >>> import tempfile
    >>> from strank.neural.heads import LinearHead
    >>> facts = {"name": "mine", "version": "1", "fields": [], "n_features": 3}
    >>> model = RankModel(LinearHead(3, 1), pd.DataFrame(index=["ERBB2"]), facts, {})
    >>> folder = Path(tempfile.mkdtemp()) / "model"
    >>> model.save(folder)
    >>> scores = RankModel.load(folder).predict(AnnData(obsm={"mine": np.ones((4, 3))}))
    >>> scores.shape
    (4, 1)
    """

    head: nn.Module
    panel: pd.DataFrame
    encoder: Mapping[str, Any]
    provenance: Mapping[str, Any]
    backbone: Backbone | None = None
    novelty: Novelty | None = None

    @property
    def method(self) -> str:
        """How tables name it, as `strank.fitting.method.Method` does."""
        return str(self.provenance.get("method", {}).get("name", "own model"))

    def save(self, folder: Path | str) -> None:
        """Write ``model.json``, ``head.safetensors`` and, where they are there, the others.

        The folder is whole or absent.

        Raises
        ------
        InputError
            If the folder exists and is not a model, cannot be written, or for a head that is not
            known by name.
        """
        folder = Path(folder)
        _stored_head(self.head)
        if folder.exists() and not (folder / "model.json").is_file():
            raise InputError(f"{folder}: exists and is not a model; choose another folder")
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(folder) as part:
                part.mkdir()
                save_file(self.head.state_dict(), part / _HEAD)
                if self.backbone is not None:
                    save_model(self.backbone, str(part / _BACKBONE))
                if self.novelty is not None:
                    save_file(vars(self.novelty), part / _NOVELTY)
                (part / "model.json").write_text(self._json(part))
        except OSError as error:
            raise InputError(f"{folder}: cannot be written ({error.strerror})") from error

    @classmethod
    def load(cls, folder: Path | str) -> Self:
        """Read a model folder.

        Raises
        ------
        InputError
            If it is not a model, is damaged, or was written by a later strank.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise InputError(f"{folder}: no such model folder; train one with `strank fit`")
        stored = read_json(folder / "model.json")
        try:
            if stored["format"] != FORMAT:
                raise InputError(f"{folder}: model format {stored['format']}; update strank")
            panel = pd.DataFrame(stored["panel"]).set_index("gene")
            # Modules draw first weights from torch's generator, which is not to be moved.
            with torch.random.fork_rng():
                head = _load_head(folder, stored["head"], stored["encoder"]["n_features"], panel)
                backbone = _load_backbone(folder, stored.get("backbone"))
            novelty = _load_novelty(folder, stored.get("novelty"))
            return cls(head, panel, stored["encoder"], stored["provenance"], backbone, novelty)
        except InputError:
            raise
        except (*_DAMAGE, SafetensorError) as error:
            raise InputError(f"{folder}: damaged model folder ({error!r})") from error

    def predict(self, adata: AnnData) -> AnnData:
        """Score every spot.

        Parameters
        ----------
        adata
            Spots with features in ``obsm[encoder]``; several sections are told apart by
            ``obs["section"]``.

        Returns
        -------
        AnnData
            ``X`` = scores (natural log, float32), 0 at the mean of a section and gene; ``obs`` and
            ``obsm["spatial"]`` as given; ``var`` = the panel, with ``measured`` = whether the input
            has counts of the gene; ``uns["strank_model"]`` = encoder and provenance as JSON,
            ``uns["strank"]`` as given.

        Raises
        ------
        InputError
            If the features are absent, of another width, version or encoder, or not finite.
        """
        section = adata.obs["section"] if "section" in adata.obs else np.zeros(adata.n_obs)
        section = np.asarray(section)
        with torch.inference_mode():
            scores = self._scores(adata, section)
        return AnnData(
            X=centre_within(scores, section).astype(np.float32),
            obs=adata.obs.copy(),
            var=self.panel.assign(measured=self.panel.index.isin(adata.var_names)),
            obsm={"spatial": adata.obsm["spatial"]} if "spatial" in adata.obsm else None,
            uns={
                "strank_model": json.dumps({"encoder": dict(self.encoder), **self.provenance}),
                # Which image the positions belong to.
                **({"strank": adata.uns["strank"]} if "strank" in adata.uns else {}),
            },
        )

    def check_encoder(self, facts: Mapping[str, Any]) -> None:
        """Refuse features of another encoder, version, or set of fields, naming what differs."""
        different = [key for key in self.encoder if facts.get(key) != self.encoder[key]]
        if different:
            raise InputError(
                f"the features come from another {self.encoder['name']} than the model's "
                f"({some(different)} differ); embed again with this version, or train again"
            )

    def _scores(self, adata: AnnData, section: np.ndarray) -> np.ndarray:
        values = self._features(adata)
        traits = Traits.of(self.head)
        if traits.centred:
            values = centre_within(values, section).astype(np.float32)
        features = torch.as_tensor(values)
        if traits.n_neighbours == 0:
            return torch.cat([self.head(part) for part in features.split(_ROWS)]).numpy()
        neighbours = find_neighbours(positions_um(adata), section, traits.n_neighbours)
        parts, at_once = [], max(1, _ROWS // (1 + traits.n_neighbours))
        for start in range(0, len(features), at_once):
            rows, around = neighbours.of(np.arange(start, min(start + at_once, len(features))))
            parts.append(self.head(features[rows], *around))
        return torch.cat(parts).numpy()

    def _features(self, adata: AnnData) -> np.ndarray:
        name, width = self.encoder["name"], self.encoder["n_features"]
        if name not in adata.obsm:
            has = f"; there is {some(adata.obsm)}" if len(adata.obsm) else ""
            raise InputError(f"the model needs features of {name} in obsm[{name!r}]{has}")
        if name in adata.uns:
            self.check_encoder(adata.uns[name])
        features = np.asarray(adata.obsm[name], dtype=np.float32)
        if features.shape[1] != width:
            raise InputError(
                f"obsm[{name!r}] has {features.shape[1]} features, but the model was trained on "
                f"{width}"
            )
        wrong = ~np.isfinite(features).all(1)
        if wrong.any():
            raise InputError(f"features of spot {some(adata.obs_names[wrong])} are not finite")
        return features

    def _json(self, folder: Path) -> str:
        content = {
            "format": FORMAT,
            "strank": __version__,
            "head": {**_stored_head(self.head), "sha256": sha256(folder / _HEAD)},
            "encoder": dict(self.encoder),
            "panel": self.panel.rename_axis("gene").reset_index().to_dict("records"),
            "provenance": dict(self.provenance),
        }
        if self.backbone is not None:
            checksum = sha256(folder / _BACKBONE)
            content["backbone"] = {"config": self.backbone.config, "sha256": checksum}
        if self.novelty is not None:
            content["novelty"] = {"sha256": sha256(folder / _NOVELTY)}
        return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _checked(weights: Path, stored: Mapping[str, Any]) -> Path:
    if sha256(weights) != stored["sha256"]:
        raise InputError(f"{weights}: damaged (its checksum is not that in model.json)")
    return weights


def _stored_head(head: nn.Module) -> dict[str, Any]:
    """Say how a head is made again; refuse one that cannot be."""
    stored = stored_head(head)
    if None in _kinds(stored):
        raise InputError(
            "a model with a head of your own class predicts, but is not saved: add the class to "
            "strank.neural.heads.HEADS, under a name"
        )
    return stored


def _load_head(
    folder: Path, stored: Mapping[str, Any], n_features: int, panel: pd.DataFrame
) -> nn.Module:
    if unknown := _kinds(stored) - set(HEADS):
        raise InputError(f"{folder}: the model has a head {unknown.pop()!r}, unknown here")
    head = HEADS[stored["kind"]](n_features, len(panel), **stored.get("options", {}))
    head.load_state_dict(load_file(_checked(folder / _HEAD, stored)))
    return head.eval()


def _load_backbone(folder: Path, stored: Mapping[str, Any] | None) -> Backbone | None:
    if stored is None:
        return None
    backbone = backbone_from_config(stored["config"])
    load_model(backbone, _checked(folder / _BACKBONE, stored))
    return backbone


def _load_novelty(folder: Path, stored: Mapping[str, Any] | None) -> Novelty | None:
    return None if stored is None else Novelty(**load_file(_checked(folder / _NOVELTY, stored)))


def _kinds(stored: Mapping[str, Any]) -> set[str | None]:
    """Kinds of a head and of its members."""
    members = stored.get("options", {}).get("members", [])
    return {stored["kind"]}.union(*(_kinds(member) for member in members))
