"""What a map shows: values at places of a slide, their colours, and which not to trust."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from strank.cohort.contract import section_info
from strank.cohort.in_memory import info_of, name_of
from strank.errors import InputError, per_cent
from strank.metrics.correlation import log1p_cp10k

# Red and blue keep apart in all common colour deficiencies; the middle is light, like unstained.
_COLOURS = "RdBu_r"
_ERROR_COLOURS = "Purples"
_NOVELTY_COLOURS = "Oranges"
# The full colours stand for half as much again, or more; of novelty for twice the threshold.
_LEAST_LIMIT, _NOVEL = float(np.log(1.5)), 2.0


@dataclass(frozen=True)
class MapLayer:
    """Values at positions of a slide."""

    title: str
    #: Of the colour bar.
    label: str
    #: Centres (x, y) in pixels of the full image, ``[n_spots, 2]``.
    positions: NDArray[np.float64]
    #: Size of a mark.
    diameter_um: float
    #: ``[n_spots, n_genes]``; 0 is the middle of the colours, of standard errors their beginning.
    scores: NDArray[np.float64]
    genes: pd.Index
    colours: str = _COLOURS
    #: Whether marks are squares, as wide as their distance, or discs.
    square: bool = False
    #: Spots unlike the training, ``[n_spots]``; they are hatched.
    odd: NDArray[np.bool_] | None = None

    def limits(self, gene: str) -> tuple[float, float]:
        """Find the values of the first and the last colour."""
        if self.colours == _NOVELTY_COLOURS:
            return 0.0, _NOVEL
        # One spot far out must not wash out the rest, and a flat map must look flat.
        values = np.abs(self.values(gene))
        limit = max(float(np.quantile(values, 0.98)), _LEAST_LIMIT)
        return 0.0 if self.colours == _ERROR_COLOURS else -limit, limit

    def values(self, gene: str) -> NDArray[np.float64]:
        """Take the values of a gene, ``[n_spots]``."""
        return np.asarray(self.scores[:, self.genes.get_loc(gene)])

    @property
    def heading(self) -> str:
        """Say what is shown, and what is not to be trusted of it."""
        if self.odd is None or not self.odd.any():
            return self.title
        return f"{self.title}\nhatched: unlike the training, {per_cent(self.odd.mean())} of tiles"


def map_layers(predictions: AnnData, section: AnnData | None = None) -> list[MapLayer]:
    """Observed counts of the section if given, predictions, their errors if known."""
    layers = [predicted_layer(predictions)]
    if "se" in predictions.layers:
        layers.append(error_layer(predictions))
    return layers if section is None else [observed_layer(section, predictions.var_names), *layers]


def predicted_layer(predictions: AnnData) -> MapLayer:
    """Scores: of tiles squares as wide as the stride, of spots discs."""
    stride = predictions.uns.get("strank", {}).get("stride_um")
    return MapLayer(
        "predicted",
        _label(predictions),
        np.asarray(predictions.obsm["spatial"]),
        scale_of(predictions)[1] if stride is None else float(stride),
        np.asarray(predictions.X, dtype=np.float64),
        predictions.var_names,
        square=stride is not None,
        odd=predictions.obs["odd"].to_numpy(bool) if "odd" in predictions.obs else None,
    )


def error_layer(predictions: AnnData) -> MapLayer:
    """Take the standard errors of scores."""
    if "se" not in predictions.layers:
        raise InputError(
            'these scores have no standard errors (`layers["se"]`): exact list fits have them'
        )
    return replace(
        predicted_layer(predictions),
        title="standard error",
        label=_sure(predictions),
        scores=np.asarray(predictions.layers["se"], dtype=np.float64),
        colours=_ERROR_COLOURS,
    )


def novelty_layer(predictions: AnnData) -> MapLayer:
    """Take how far tiles lie from what the model was trained on."""
    if "novelty" not in predictions.obs:
        raise InputError(
            'these scores have no `obs["novelty"]`: `strank.predict` on slides gives it, with a '
            "model that knows how its training features spread"
        )
    return replace(
        predicted_layer(predictions),
        title="novelty",
        label="distance from the training; beyond 1 is odd",
        scores=predictions.obs["novelty"].to_numpy(np.float64)[:, None],
        genes=pd.Index(["novelty"]),
        colours=_NOVELTY_COLOURS,
    )


def scale_of(adata: AnnData) -> tuple[float, float]:
    """Find µm per pixel, and the diameter of a spot in µm (NaN of tiles)."""
    facts = adata.uns.get("strank", {})
    if "stride_um" in facts:
        return float(facts["um_per_pixel"]), np.nan
    name = name_of(adata)
    places = pd.DataFrame(np.asarray(adata.obsm["spatial"]), adata.obs_names, ["x", "y"])
    info = info_of(adata, places, name)
    if not info.um_per_pixel > 0:
        raise InputError(
            f"section {name}: a map needs the size of a pixel; set "
            'adata.uns["strank"] = {"um_per_pixel": ...}, of the pixels of obsm["spatial"]'
        )
    return info.um_per_pixel, info.spot_diameter_um


def _sure(predictions: AnnData) -> str:
    """Say what a standard error is of, and what it leaves out."""
    told = str(json.loads(predictions.uns.get("strank_model", "{}")).get("uncertainty", ""))
    alone = told.partition(" only")[0] + " only" if " only" in told else ""
    return "of the log relative expression" + f"; {alone}" * bool(alone)


def _label(predictions: AnnData) -> str:
    """Say what the colours of a prediction are, as its model knows them for new patients."""
    model = json.loads(predictions.uns.get("strank_model", "{}"))
    if (model.get("calibration") or {"size": True})["size"]:
        return "log relative expression"
    return "score: order only, no fold changes"


def observed_layer(section: AnnData, genes: pd.Index) -> MapLayer:
    """Take counts of spots, as far as the section measures the genes."""
    genes = genes[genes.isin(section.var_names)]
    target = log1p_cp10k(section[:, genes].X, section.obs["library_size"]).toarray()
    return MapLayer(
        "observed, on a scale of its own",
        "log1p(CP10k), minus section mean",
        np.asarray(section.obsm["spatial"]),
        section_info(section).spot_diameter_um,
        target - target.mean(0),
        genes,
    )
