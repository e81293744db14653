"""Anything that predicts a section: a model, what stands beside it, every method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse

from strank.cohort.contract import places
from strank.cohort.folds import Aim
from strank.cohort.panel import panel_counts
from strank.cohort.training_set import (
    are_two_patients,
    left_out_together,
    taking_turns,
    training_data,
)
from strank.errors import InputError
from strank.fitting.exact import ExactOptions
from strank.fitting.method import CENTRED_RIDGE, REFERENCE, RIDGE, Method, fit
from strank.linear.calibration import lowest, temperature
from strank.linear.penalty import PENALTIES
from strank.linear.regressor import STRankRegressor
from strank.linear.regressor_cv import STRankRegressorCV
from strank.metrics.deviance import score_slope
from strank.model.rank_model import RankModel
from strank.neural.recipe import RECIPES

BASELINES = (RIDGE, CENTRED_RIDGE)
# The row of `within_section`, and what it says.
WITHIN = "within section"
WITHIN_TOLD = (
    f"{WITHIN}: strips of a section, each predicted by {REFERENCE.name} of the rest of the same "
    "section; what can be reached there without other patients, and no rival of the methods"
)
_STRIPS, _LEAST_SPOTS = 4, 5
PredictSection = Callable[[AnnData], NDArray]


def without_image(scores: NDArray, library_size: NDArray, *, seed: int = 0) -> dict[str, NDArray]:
    """Give the two rows that no model should be below: depth alone, and a model's scores shuffled.

    Depth is what a model cannot know: a score that it reaches alone says nothing about the image.
    Spots are shuffled for each gene by itself.

    Examples
    --------
    >>> rows = without_image(np.array([[1.0], [2.0]]), np.array([1, 10]))
    >>> sorted(rows), rows["library size"].round(2).ravel().tolist()
    (['library size', 'shuffled'], [0.0, 2.3])
    """
    shuffled = np.random.default_rng(seed).permuted(scores, axis=0)
    return {"library size": _depth(scores.shape[1], library_size), "shuffled": shuffled}


def depth_scores(n_genes: int, section: AnnData) -> NDArray[np.float64]:
    """Scores of the row ``library size``: the log of a section's depth, the same for all genes."""
    return _depth(n_genes, section.obs["library_size"].to_numpy())


def _depth(n_genes: int, library_size: NDArray) -> NDArray[np.float64]:
    depth = np.log(np.maximum(library_size, 1.0))[:, None]
    return np.broadcast_to(depth, (len(depth), n_genes))


def within_section(section: AnnData, panel: pd.Index, encoder: str) -> NDArray[np.float64]:
    """Predict four strips of a section, each by the exact list head of the other three.

    What the section itself can tell: nothing is carried over from another patient. The counts of a
    strip have no say in its weights, and its penalties and sizes are chosen by the other strips.
    Nor have they in its level, which a likelihood of shares leaves open: every model is 0 at the
    mean of the *whole* section's features, so that strips would agree if their weights did, and
    without signal no strip stands above another. (The level of the training strips would not do:
    where one strip has more counts by chance, the other three have less.) Scores are 0 for genes
    that are not measured, and in sections too small to be cut.
    """
    scores = np.zeros((section.n_obs, len(panel)))
    measured = panel.isin(section.var_names)
    counted = section.obs["library_size"].to_numpy() > 0
    strip = _strips(places(section), counted)
    if np.bincount(strip[counted], minlength=_STRIPS).min() < _LEAST_SPOTS or not measured.any():
        return scores
    data, strip_of = training_data({"": section}, panel[measured], encoder), strip[counted]
    spots = {"section": strip_of, "offset": np.log(data.library_size)}
    # Not below 100 counts, which one section never asks for, and every other: it must stay cheap.
    choice = STRankRegressorCV(PENALTIES[:7:2]).fit(data.features, data.counts, **spots).choice_
    for held in range(_STRIPS):
        others, rows = choice.left_out.without(held), strip_of != held
        model = STRankRegressor(choice.penalties[lowest(others.total)])
        model.fit(data.features[rows], data.counts[rows], **{k: v[rows] for k, v in spots.items()})
        found = model.predict(section.obsm[encoder]) * temperature(others, lowest)
        scores[np.ix_(strip == held, measured)] = (found - found.mean(0))[strip == held]
    return scores


def _strips(positions: NDArray[np.float64], counted: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Cut a section across its longer side into strips with as many of the spots with counts."""
    along = positions[:, np.ptp(positions, axis=0).argmax()]
    if not counted.any():
        return np.zeros(len(along), dtype=np.intp)
    edges = np.quantile(along[counted], np.arange(1, _STRIPS) / _STRIPS)
    return np.searchsorted(edges, along)


@dataclass(frozen=True)
class Predicted:
    """Predictions of several methods."""

    #: Section, then method, to scores ``[n_spots, n_genes]``.
    sections: dict[str, dict[str, NDArray]]
    #: Of methods whose scores are no log rates, from their training sections.
    slopes: dict[str, NDArray]


def predict_all(
    model: RankModel,
    cohort: Mapping[str, AnnData],
    *,
    train: Mapping[str, AnnData],
    within: bool = False,
) -> Predicted:
    """Predict by the model, by baselines fitted on its training sections, and by no image.

    With ``within``, each section also by itself.
    """
    encoder, panel = model.encoder["name"], model.panel.index
    methods: dict[str, PredictSection] = {
        model.method: lambda adata: np.asarray(model.predict(adata).X)
    }
    # A model may be one of the baselines itself.
    beside = [method for method in BASELINES if method.name != model.method]
    how = {"encoder": encoder, "aim": model.provenance.get("aim", "new-patients")}
    methods |= {m.name: _fit_where_measured(m, train, panel, **how) for m in beside}
    known = (Method.of_model(model), *BASELINES)
    unscaled = {method.name for method in known if method and not method.log_rates}
    slopes = {
        name: training_slope(predict, train, panel)
        for name, predict in methods.items()
        if name in unscaled
    }
    depth = partial(depth_scores, len(panel))
    slopes["library size"] = training_slope(depth, train, panel)
    sections = {}
    for name, adata in cohort.items():
        found = {method: predict(adata) for method, predict in methods.items()}
        if within:
            found[WITHIN] = within_section(adata, panel, encoder)
        rest = without_image(found[model.method], adata.obs["library_size"].to_numpy())
        sections[name] = found | rest
    return Predicted(sections, slopes)


def training_slope(
    predict: Callable[[AnnData], NDArray], train: Mapping[str, AnnData], panel: pd.Index
) -> NDArray[np.float64]:
    """Find the slopes that turn a method's scores of its training sections into log rates."""
    return score_slope(
        np.concatenate([predict(adata) for adata in train.values()]),
        sparse.vstack([panel_counts(adata, panel) for adata in train.values()]),
        section=np.repeat(list(train), [adata.n_obs for adata in train.values()]),
        library_size=np.concatenate([adata.obs["library_size"] for adata in train.values()]),
    )


def _fit_where_measured(
    method: Method, train: Mapping[str, AnnData], panel: pd.Index, **how: Any
) -> PredictSection:
    """Fit genes on the sections that measure them: those with the same sections together."""
    measured = np.stack([panel.isin(adata.var_names) for adata in train.values()])
    patterns, of_gene = np.unique(measured, axis=1, return_inverse=True)
    of_gene = of_gene.ravel()  # NumPy 2.0 gives it a second axis.
    fitted = []
    for number, pattern in enumerate(patterns.T):
        sections = {name: train[name] for name in np.array(list(train))[pattern]}
        genes = of_gene == number
        fitted.append((genes, fit_method(method, sections, panel[genes], **how)))

    def predict(section: AnnData) -> NDArray[np.float64]:
        scores = np.empty((section.n_obs, len(panel)))
        for genes, part in fitted:
            scores[:, genes] = part(section)
        return scores

    return predict


def is_stopped_by_name(method: Method) -> bool:
    """Tell whether named sections stop it, which it then is not trained on."""
    recipe = str(method.recipe)
    return recipe in RECIPES and RECIPES[recipe].published


def draw_validation(
    train: Mapping[str, AnnData], seed: int, aim: Aim = "new-patients"
) -> tuple[str, ...]:
    """Draw the sections of a patient, or one section where that would leave a single patient."""
    groups = taking_turns(train, aim)
    drawn = np.random.default_rng(seed).choice(sorted(set(groups)))
    return tuple(name for name, group in zip(train, groups, strict=True) if group == drawn)


def fit_model_of(
    method: Method,
    train: Mapping[str, AnnData],
    *,
    seed: int | None = None,
    aim: Aim = "new-patients",
    validation: Sequence[str] = (),
    **how: Any,
) -> RankModel:
    """Fit a model; what named sections stop is stopped by ``validation``, or by some drawn."""
    if is_stopped_by_name(method):
        how["validation"] = validation or draw_validation(train, seed or 0, aim)
    return fit(train, **asdict(method), seed=seed, aim=aim, **how)


def fit_method(
    method: Method,
    train: Mapping[str, AnnData],
    panel: pd.Index,
    *,
    encoder: str,
    seed: int = 0,
    aim: Aim = "new-patients",
    validation: Sequence[str] = (),
) -> PredictSection:
    """Fit a method on training sections: what it returns gives scores ``[n_spots, n_genes]``."""
    genes = list(panel)
    if method == REFERENCE:
        return _by_model(fit(train, encoder=encoder, genes=genes, aim=aim))
    if method.solver is not None:
        # Not through a model, which leaves out the level of a section: for these objectives it has
        # a meaning, and tables of ridge have all their digits.
        unit, group = left_out_together(train, aim)
        data = training_data(train, panel, encoder, group)
        if not method.library_size:
            data = data.without_depth()
        try:
            options = ExactOptions(alike=are_two_patients(unit, group))
            solved = method.solver(data, options)
        except ValueError as error:
            raise InputError(str(error)) from error
        return lambda section: solved.predict(section.obsm[encoder])
    if method.needs_images:
        return _by_images(method, train, genes, seed)
    how: dict[str, Any] = {"encoder": encoder, "genes": genes, "seed": seed, "aim": aim}
    return _by_model(fit_model_of(method, train, validation=validation, **how))


def _by_model(model: RankModel) -> PredictSection:
    return lambda section: np.asarray(model.predict(section).X)


def _by_images(
    method: Method, train: Mapping[str, AnnData], genes: list[str], seed: int
) -> PredictSection:
    """Train an image network end to end, with a linear head on it."""
    from strank.neural.recipe import Machine
    from strank.prediction import predict_slide
    from strank.slides.slide import slide_of

    how: dict[str, Any] = {**asdict(method), "head": "linear", "finetune": "full"}
    # Images are read in this process: a benchmark shares the cores among processes already.
    model = fit(train, encoder=method.head, genes=genes, seed=seed, machine=Machine(), **how)
    return lambda section: np.asarray(predict_slide(slide_of(section), model, section).X)
