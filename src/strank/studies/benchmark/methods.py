"""What the benchmark fits: heads and objectives by name.

A method is ``HEAD, LOSS``, or one of `OTHERS`. The linear head is solved exactly where the
objective has an exact solver (list, pair, poisson, mse); everything else is trained step by step.
Whatever is chosen (penalty, when to stop) is chosen on training sections.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from strank.errors import InputError
from strank.evaluation.baselines import BASELINES
from strank.fit import fit_model
from strank.functional.deviance import list_gain
from strank.linear.inputs import deal
from strank.linear.penalty import DEFAULT_PENALTY, PENALTIES
from strank.linear.regressor import STRankRegressor
from strank.linear.regressor_cv import STRankRegressorCV
from strank.neural.objectives import OBJECTIVES
from strank.neural.recipe import Machine
from strank.plan import head_maker, method_name
from strank.studies.probe_methods import hest_components, hest_ridge
from strank.train import train_model
from strank.training_set import TrainingData, training_data

__all__ = ["OTHERS", "Predict", "fit_method", "is_stepwise", "method_of", "needs_images"]

Predict = Callable[[AnnData], NDArray]
_ByFeatures = Callable[[NDArray], NDArray]

OTHERS = (*BASELINES, "hest-ridge")

# All pairs cost as many times more as a section has spots, and bring nothing.
_PARTNERS = 16
_HEST_COMPONENTS = 256
# Each is fitted from the start, so there are fewer of them.
_POOLED_PENALTIES = PENALTIES[::2]
_PAPER = "linear-paper"


def method_of(head: str, loss: str) -> str:
    """Name a combination, or refuse one that there is not.

    Raises
    ------
    InputError
        For an unknown head or loss; it lists the choices.

    Examples
    --------
    >>> method_of("linear", "list"), method_of("linear", "mse")
    ('linear, list', 'ridge')
    """
    if loss not in OBJECTIVES:
        raise InputError(f"no loss {loss!r}; choose one of {', '.join((*OBJECTIVES, *OTHERS))}")
    if not needs_images(head) and head != _PAPER:
        head_maker(head.removesuffix("+linear"))
    # The exact linear head of squared error, which is a baseline anyway.
    return "ridge" if (head, loss) == ("linear", "mse") else method_name(head, loss)


def is_stepwise(method: str) -> bool:
    """Whether a method is trained by gradient steps, and so has a seed.

    Examples
    --------
    >>> is_stepwise("linear, list"), is_stepwise("linear, nb"), is_stepwise("mlp, list")
    (False, True, True)
    """
    return method not in OTHERS and method not in _EXACT


def needs_images(head: str) -> bool:
    """Whether a head, or method, is an image network that is trained end to end."""
    return head.startswith(("timm:", "hf:"))


def fit_method(
    method: str, train: Mapping[str, AnnData], panel: pd.Index, *, encoder: str, seed: int = 0
) -> Predict:
    """Fit a method on training sections.

    Parameters
    ----------
    method
        From `method_of`, or one of `OTHERS`.
    train
        Training sections with features.
    panel
        Genes.
    encoder
        Whose features.
    seed
        Of what is trained step by step.

    Returns
    -------
    Callable
        A section to its scores, ``[n_spots, n_genes]``.
    """
    if is_stepwise(method):
        return _train(method, train, panel, encoder, seed)
    if method == "linear, list":
        model = fit_model(train, encoder=encoder, genes=list(panel))
        return lambda section: np.asarray(model.predict(section).X)
    fit = BASELINES.get(method) or _EXACT.get(method) or _fit_hest
    try:
        return partial(_apply, fit(training_data(train, panel, encoder)), encoder)
    except ValueError as error:
        raise InputError(str(error)) from error


def _apply(predict: _ByFeatures, encoder: str, section: AnnData) -> NDArray:
    return predict(section.obsm[encoder])


def _train(
    method: str, train: Mapping[str, AnnData], panel: pd.Index, encoder: str, seed: int
) -> Predict:
    head, _, loss = method.rpartition(", ")
    options: dict[str, Any] = {
        "loss": loss,
        "genes": list(panel),
        "seed": seed,
        "machine": Machine(),
    }
    if needs_images(head):
        from strank.finetune import finetune_model
        from strank.neural.finetune import Finetune
        from strank.predict import predict_slide
        from strank.slides.image import slide_of

        model = finetune_model(train, head, Finetune("full"), head="linear", **options)
        return lambda section: np.asarray(predict_slide(slide_of(section), model, section).X)
    recipe = "paper" if head == _PAPER else "default"
    head = "linear" if head == _PAPER else head
    model = train_model(train, head=head, recipe=recipe, encoder=encoder, **options)
    return lambda section: np.asarray(model.predict(section).X)


def _fit_pair(data: TrainingData) -> _ByFeatures:
    several = len(np.unique(data.group)) > 1
    kind = STRankRegressorCV if several else STRankRegressor
    regressor = kind(objective="pair", n_partners=_PARTNERS)
    spots = {"section": data.section, "offset": np.log(data.library_size)}
    regressor.fit(data.features, data.counts, **spots, **({"group": data.group} if several else {}))
    return regressor.predict


def _fit_poisson(data: TrainingData) -> _ByFeatures:
    """Fit a level for each gene, but none for its sections: a list of the spots of all of them.

    The penalty of each gene is chosen as for the list, by held-out list likelihood.
    """
    fold = deal(data.group, 10)
    rows = [fold != f for f in np.unique(fold)] if len(np.unique(fold)) > 1 else []
    held_out = np.zeros((len(_POOLED_PENALTIES), data.counts.shape[1]))
    for kept in rows:
        spots = {"section": data.section[~kept], "library_size": data.library_size[~kept]}
        for number, penalty in enumerate(_POOLED_PENALTIES):
            predicted = _pooled(data, kept, penalty).predict(data.features[~kept])
            held_out[number] += list_gain(predicted, data.counts[~kept], **spots).sum(0)
    chosen = np.asarray(_POOLED_PENALTIES)[held_out.argmax(0)] if rows else DEFAULT_PENALTY
    return _pooled(data, np.ones(len(data.section), dtype=bool), chosen).predict


def _pooled(data: TrainingData, rows: NDArray, penalty: float | NDArray) -> STRankRegressor:
    offset = np.log(data.library_size[rows])
    section = np.zeros(len(offset), dtype=int)
    return STRankRegressor(penalty).fit(
        data.features[rows], data.counts[rows], section=section, offset=offset
    )


def _fit_hest(data: TrainingData) -> _ByFeatures:
    target = data.counts.log1p().toarray()
    n_components = min(_HEST_COMPONENTS, *data.features.shape)

    def predict(features: NDArray) -> NDArray:
        inner, outer = hest_components(data.features, features, n_components=n_components)
        return hest_ridge(inner, target, outer).reshape(len(features), -1)

    return predict


_EXACT: dict[str, Callable[[TrainingData], _ByFeatures] | None] = {
    "linear, list": None,
    "linear, pair": _fit_pair,
    "linear, poisson": _fit_poisson,
}
