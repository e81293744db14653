"""A trained model: head, panel, encoder and provenance in a folder that anyone can open."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self, TypeVar

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from strank.cohort.contract import check_features, known_encoder
from strank.cohort.in_memory import section_labels, um_of_spots
from strank.cohort.library import libraries_of
from strank.encoders.backbone import Backbone
from strank.encoders.weights import filled
from strank.errors import InputError, some
from strank.files import claims, sha256, write_bytes, write_json, write_utf8
from strank.functional.groups import centre_within
from strank.hub import download, upload
from strank.model.card import method_of, read_evidence, short_facts, write_card
from strank.model.folder import CARD, MODEL, MODEL_FILES, TENSORS, read_folder, refuse_other
from strank.model.novelty import Novelty
from strank.model.schema import FORMAT
from strank.model.uncertainty import Uncertainty
from strank.neural.data import find_neighbours
from strank.neural.heads import HEADS, Traits, stored_head
from strank.shown import as_html, as_text
from strank.storage import new_file, new_folder
from strank.version import __version__

_ROWS = 8192

_Module = TypeVar("_Module", bound=nn.Module)

# What reading a file that is not as it was written can raise.
_DAMAGE = (AttributeError, LookupError, TypeError, ValueError, OSError, RuntimeError)


@dataclass(frozen=True)
class RankModel:
    """What turns the features of an encoder into scores for a panel of genes.

    Made by `strank.fit`, read by `load` or `from_pretrained`.

    Attributes
    ----------
    head : torch.nn.Module
        Maps ``[n_spots, n_features]`` to ``[n_spots, n_genes]``; holds the standardisation.
    panel : pandas.DataFrame
        One row a gene (the index), with what is known of its fit.
    encoder : Mapping
        Facts of the encoder: name, version, fields, number of features.
    provenance : Mapping
        What the model was trained on and with.
    backbone : Backbone, optional
        The encoder, where it was trained with the head.
    novelty : Novelty, optional
        Which features are usual, where that is known.
    uncertainty : Uncertainty, optional
        How wrong its scores may be, where that is known.

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
    >>> "1 gene (chosen: not recorded): ERBB2." in model.card()
    True
    """

    head: nn.Module
    panel: pd.DataFrame
    encoder: Mapping[str, Any]
    provenance: Mapping[str, Any]
    backbone: Backbone | None = None
    novelty: Novelty | None = None
    uncertainty: Uncertainty | None = None

    @property
    def _shown(self) -> tuple[str, dict[str, str]]:
        facts = short_facts(list(self.panel.index), self.encoder, self.provenance)
        return f"RankModel: {self.method}", facts

    def __repr__(self) -> str:
        return as_text(*self._shown)

    def _repr_html_(self) -> str:
        return as_html(*self._shown)

    @property
    def method(self) -> str:
        """How tables name it: head and objective, and a recipe that is not the usual one."""
        return method_of(self.provenance)

    def save(self, folder: Path | str, *, card: str | None = None) -> None:
        """Write ``model.json``, ``head.safetensors`` and, where they are there, the others.

        The folder is whole or absent; a model may take the place of a model.

        Parameters
        ----------
        folder
            To write.
        card
            Becomes ``README.md``, as the hub shows it.

        Raises
        ------
        InputError
            If the folder exists and is not a model, cannot be written, or for a head that is not
            known by name, or holds values that are not finite.
        """
        folder = Path(folder)
        _stored_head(self.head)
        for name, values in self.head.state_dict().items():
            if not values.isfinite().all():
                raise InputError(
                    f"a model whose {name} is not finite is not saved: it would predict nothing"
                )
        refuse_other(folder)
        with new_folder(folder) as part:
            write_bytes(part / TENSORS["head"], save(self.head.state_dict()))
            if self.backbone is not None:
                write_bytes(part / TENSORS["backbone"], _without_copies(self.backbone))
            if self.novelty is not None:
                write_bytes(part / TENSORS["novelty"], save(vars(self.novelty)))
            if self.uncertainty is not None:
                write_bytes(part / TENSORS["uncertainty"], save(vars(self.uncertainty)))
            write_json(part / MODEL, self._facts(part))
            if card is not None:
                write_utf8(part / CARD, card)

    @classmethod
    def load(cls, folder: Path | str) -> Self:
        """Read a model's folder, and no other file; no code is run and no network asked.

        Raises
        ------
        InputError
            If it is not a model, is damaged, or was written by an earlier or later strank.
        """
        folder = Path(folder)
        stored = read_folder(folder)
        try:
            panel = pd.DataFrame(stored["panel"]).set_index("gene")
            # Modules draw first weights from torch's generator, which is not to be moved.
            with torch.random.fork_rng():
                head = _load_head(folder, stored["head"], stored["encoder"]["n_features"], panel)
                backbone = _load_backbone(folder, stored.get("backbone"))
            novelty = _load_novelty(folder, stored.get("novelty"), stored["encoder"])
            unsure = _load_uncertainty(folder, stored.get("uncertainty"), stored["encoder"], panel)
            facts = stored["encoder"], stored["provenance"]
            return cls(head, panel, *facts, backbone, novelty, unsure)
        except InputError:
            raise
        except (*_DAMAGE, SafetensorError) as error:
            raise InputError(f"{folder}: damaged model folder ({error!r})") from error

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Path | str,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> Self:
        """Read a model from a folder, or from the Hugging Face hub, and check it.

        Parameters
        ----------
        pretrained_model_name_or_path
            A folder or, where there is none of that name, ``owner/name`` on the hub.
        revision
            Branch, tag or commit on the hub; the newest if ``None``.
        token
            Of the hub; if ``None`` that of ``hf auth login`` or ``HF_TOKEN``.

        Raises
        ------
        InputError
            If it is not a model or damaged, or the hub does not give it: the message says why.

        Examples
        --------
        >>> RankModel.from_pretrained("./none")
        Traceback (most recent call last):
        ...
        strank.errors.InputError: ./none: not a model of strank (it has no model.json)
        """
        source = pretrained_model_name_or_path
        if Path(source).is_dir():
            source = Path(source)
        return cls.load(_found(source, revision, token))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        evaluation: Path | str | None = None,
        licence: str | None = None,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
    ) -> str:
        """Put the model, with its card, on the Hugging Face hub.

        The names of its training sections and patients go with it.

        Parameters
        ----------
        repo_id
            ``owner/name``; made if there is none.
        evaluation, licence
            Of the card, as in `card`.
        commit_message
            ``Model by strank`` and the version if ``None``.
        private
            Only for those who are let in; if ``None``, as the owner's default says.
        token
            Of the hub; if ``None`` that of ``hf auth login`` or ``HF_TOKEN``.

        Returns
        -------
        str
            Address of the repository.

        Raises
        ------
        InputError
            If the hub does not take it, or the model is to be private and a public one is there.
        """
        with TemporaryDirectory() as place:
            ready = Path(place) / "model"
            self.save(ready, card=self.card(evaluation, licence=licence, for_hub=True))
            message = commit_message or f"Model by strank {__version__}"
            return upload(ready, repo_id, message=message, private=private, token=token)

    def card(
        self,
        evaluation: Path | str | None = None,
        *,
        licence: str | None = None,
        for_hub: bool = False,
    ) -> str:
        """Describe the model in Markdown.

        What it is, what it was trained on, how well it does, what not to use it for, how to use it.

        Parameters
        ----------
        evaluation
            Folder of its evaluation, from `strank.evaluate` or ``strank evaluate``; without one the
            card says that there is none.
        licence
            As the hub abbreviates it, ``"mit"`` say; only in the header.
        for_hub
            Begin with the header that the hub reads.

        Raises
        ------
        InputError
            If the folder is not that of an evaluation, or another model was evaluated.
        """
        evidence = None if evaluation is None else read_evidence(evaluation, self.provenance)
        known = list(self.panel.index), self.encoder, self.provenance, evidence
        return write_card(*known, licence=licence, for_hub=for_hub)

    def predict(self, adata: AnnData) -> AnnData:
        """Score spots for all genes of the panel.

        Parameters
        ----------
        adata
            Spots with features in ``obsm[encoder]``; several sections are told apart by
            ``obs["section"]``, or ``obs["library_id"]``. Counts are not needed.

        Returns
        -------
        AnnData
            ``X`` = scores (natural log, float32), 0 at the mean of a section and gene; ``obs`` and
            ``obsm["spatial"]`` as given; ``var`` = the panel, with ``measured`` = whether the input
            has counts of the gene; ``uns["strank_model"]`` = encoder and provenance as JSON,
            ``uns["strank"]`` as given, and so ``uns["spatial"]``, which scanpy and squidpy draw
            over, under the names of sections. For a model that knows how wrong it may be,
            ``layers["se"]`` = standard error of a score, as the difference from that mean; and what
            it is made of: the difference of two spots in ``obsm["score_axes"]``, squared, times
            ``varm["score_variance"]``, is the variance of the difference of their scores (of the
            last column, how far each is from all axes, the squares of both).

        Raises
        ------
        InputError
            If the features are absent, of another width, version or encoder, or not finite.
        """
        section = section_labels(adata)
        with torch.inference_mode():
            scores = self._scores(adata, section)
        found = AnnData(
            X=centre_within(scores, section).astype(np.float32),
            obs=adata.obs.copy(),
            var=self.panel.assign(measured=self.panel.index.isin(adata.var_names)),
            obsm={"spatial": adata.obsm["spatial"]} if "spatial" in adata.obsm else None,
            uns={
                "strank_model": json.dumps({"encoder": dict(self.encoder), **self.provenance}),
                # Which image the positions belong to.
                **({"strank": adata.uns["strank"]} if "strank" in adata.uns else {}),
                **({"spatial": pictures} if (pictures := libraries_of(adata, section)) else {}),
            },
        )
        if self.uncertainty is not None:
            places = self.uncertainty.within_sections(self._features(adata), section)
            variance = self.uncertainty.variance
            found.obsm["score_axes"], found.varm["score_variance"] = places, variance
            found.layers["se"] = np.sqrt(places**2 @ variance.T)
        return found

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
        neighbours = find_neighbours(um_of_spots(adata), section, traits.n_neighbours)
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
        if (facts := known_encoder(adata, name)) is not None:
            self.check_encoder(facts)
        features = np.asarray(adata.obsm[name])
        if features.shape[1] != width:
            raise InputError(
                f"obsm[{name!r}] has {features.shape[1]} features, but the model was trained on "
                f"{width}"
            )
        check_features(features, adata.obs_names, f"{name} features")
        return features.astype(np.float32, copy=False)

    def _facts(self, folder: Path) -> dict[str, Any]:
        sums = {
            part: {"sha256": sha256(folder / name)}
            for part, name in TENSORS.items()
            if (folder / name).is_file()
        }
        content = {
            "format": FORMAT,
            "strank": __version__,
            "head": _stored_head(self.head) | sums.pop("head"),
            "encoder": dict(self.encoder),
            "panel": self.panel.rename_axis("gene").reset_index().to_dict("records"),
            "provenance": dict(self.provenance),
        }
        if self.backbone is not None:
            content["backbone"] = {"config": self.backbone.config, **sums.pop("backbone")}
        return content | sums


def _without_copies(network: nn.Module) -> bytes:
    """Weights, each once: of parts that are used twice one name."""
    once: dict[Any, tuple[str, Tensor]] = {}
    for name, weight in network.state_dict().items():
        key = weight.data_ptr(), weight.shape, weight.stride()
        once.setdefault(key if weight.numel() else name, (name, weight.contiguous()))
    return save(dict(once.values()))


@claims("folder")
def pull_model(source: str, folder: Path | str, *, revision: str | None = None) -> Path:
    """Copy a model, byte by byte and checked, from the hub or from a folder in its layout."""
    found, folder = _found(source, revision, None), Path(folder)
    RankModel.load(found)
    refuse_other(folder)
    with new_folder(folder) as part:
        for name in filter(lambda name: (found / name).is_file(), MODEL_FILES):
            with new_file(part / name) as copy, (found / name).open("rb") as original:
                shutil.copyfileobj(original, copy)
    return folder


def is_on_hub(name: str) -> bool:
    """Whether a name is one of the hub, owner/name, and not a folder."""
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) is not None


def _found(source: Path | str, revision: str | None, token: str | bool | None) -> Path:
    """Find the folder of a model, here or, downloaded, on the hub."""
    if isinstance(source, str) and is_on_hub(source):
        folder = download(source, revision=revision, allow_patterns=MODEL_FILES, token=token)
    elif revision is not None:
        raise InputError(f"{source}: a folder, which has no `revision`")
    else:
        folder = Path(source).expanduser()
    if not (folder / MODEL).is_file():
        raise InputError(f"{source}: not a model of strank (it has no {MODEL})")
    return folder


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
    kind, options = HEADS[stored["kind"]], stored.get("options", {})
    return _filled(folder, "head", lambda: kind(n_features, len(panel), **options)).eval()


def _load_backbone(folder: Path, stored: Mapping[str, Any] | None) -> Backbone | None:
    if stored is None:
        return None
    # What builds networks is not needed by models without one.
    from strank.encoders.load import backbone_from_config

    return _filled(folder, "backbone", lambda: backbone_from_config(stored["config"]))


def _filled(folder: Path, part: str, make: Callable[[], _Module]) -> _Module:
    try:
        return filled(make, folder / TENSORS[part])
    except InputError as error:
        raise InputError(f"{folder / MODEL}: {error}") from error


def _load_novelty(
    folder: Path, stored: Mapping[str, Any] | None, encoder: Mapping[str, Any]
) -> Novelty | None:
    if stored is None:
        return None
    path = folder / TENSORS["novelty"]
    novelty = Novelty(**load_file(path))
    shapes = (novelty.mean.shape, novelty.whitening.shape[:1], (encoder["n_features"],))
    if len(set(shapes)) > 1 or not all(t.isfinite().all() for t in vars(novelty).values()):
        raise InputError(f"{path}: not of {encoder['n_features']} features, or not finite")
    return novelty


def _load_uncertainty(
    folder: Path,
    stored: Mapping[str, Any] | None,
    encoder: Mapping[str, Any],
    panel: pd.DataFrame,
) -> Uncertainty | None:
    if stored is None:
        return None
    path = folder / TENSORS["uncertainty"]
    unsure = Uncertainty(**load_file(path))
    # Of each tensor the shape that goes with the others.
    n_features, n_axes = encoder["n_features"], unsure.axes.shape[-1]
    expected = {"axes": (n_features, n_axes), "lengths": (n_axes, n_axes), "inverse": (n_features,)}
    expected |= dict.fromkeys(("within", "between"), (n_axes + 1, len(panel)))
    sizes = (unsure.within, unsure.between.nan_to_num(0, torch.inf), unsure.inverse)
    if {name: tuple(v.shape) for name, v in vars(unsure).items()} != expected or not (
        all(v.isfinite().all() for v in (unsure.axes, unsure.lengths))
        and all((v.isfinite() & (v >= 0)).all() for v in sizes)
    ):
        raise InputError(f"{path}: not of this encoder and panel, or no variances")
    return unsure


def _kinds(stored: Mapping[str, Any]) -> set[str | None]:
    """Kinds of a head and of its members."""
    members = stored.get("options", {}).get("members", [])
    return {stored["kind"]}.union(*(_kinds(member) for member in members))
