"""Anything that predicts a section: a model, baselines, every objective."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, LeaveOneGroupOut
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from strank.cohort.panel import panel_counts
from strank.cohort.training_set import TrainingData, training_data
from strank.errors import InputError
from strank.fitting.exact import fit_model
from strank.fitting.networks import head_maker, method_name, train_model
from strank.functional.groups import centre_within, deal
from strank.linear.penalty import DEFAULT_PENALTY, PENALTIES
from strank.linear.regressor import STRankRegressor, STRankRegressorCV
from strank.linear.threads import few_threads
from strank.metrics.correlation import log1p_cp10k
from strank.metrics.deviance import list_gain, score_slope
from strank.model.rank_model import RankModel
from strank.neural.recipe import LOG_RATES, OBJECTIVES, Machine

ALPHAS = np.logspace(-1, 5, 13)
Predict = Callable[[NDArray[np.float32]], NDArray[np.float64]]
PredictSection = Callable[[AnnData], NDArray]
_ByFeatures = Callable[[NDArray], NDArray]
# All pairs cost as many times more as a section has spots, and bring nothing.
_PARTNERS = 16

_HEST_COMPONENTS = 256
# Each is fitted from the start, so there are fewer of them.
_POOLED_PENALTIES = PENALTIES[::2]

_PAPER = "linear-paper"
# The method whose scores the "shuffled" row shuffles, and that the others are compared with.
REFERENCE = "linear, list"


def fit_ridge(data: TrainingData, *, centred: bool) -> Predict:
    """Fit scikit-learn's ridge for all genes; the penalty by leaving the same sections out.

    Parameters
    ----------
    data
        Training spots.
    centred
        Subtract the mean of each section from features and targets, which removes a shift between
        sections; by mean squared error on the held-out sections either way.

    Returns
    -------
    Callable
        Maps features ``[n_spots, n_features]`` of one section to ``[n_spots, n_genes]``.
    """
    features = data.features.astype(np.float64)
    target = log1p_cp10k(data.counts, data.library_size).toarray()
    if centred:
        features, target = (centre_within(v, data.section) for v in (features, target))
    if len(np.unique(data.group)) > 1:
        fold = {"groups": data.group}
        model = GridSearchCV(
            make_pipeline(StandardScaler(), Ridge()),
            {"ridge__alpha": ALPHAS},
            cv=LeaveOneGroupOut(),
            scoring="neg_mean_squared_error",
        )
    else:
        # From one section nothing can be left out.
        fold = {}
        model = make_pipeline(StandardScaler(), Ridge(float(np.median(ALPHAS))))
    with few_threads(len(features), features.shape[1], target.shape[1]):
        model.fit(features, target, **fold)

    def predict(features: NDArray[np.float32]) -> NDArray[np.float64]:
        features = features.astype(np.float64)
        shifted = features - features.mean(0) if centred else features
        return np.asarray(model.predict(shifted)).reshape(len(features), -1)

    return predict


def without_image(scores: NDArray, library_size: NDArray, *, seed: int = 0) -> dict[str, NDArray]:
    """Give the two rows that no model should be below: depth alone, and a model's scores shuffled.

    Parameters
    ----------
    scores
        Of a model for one section, ``[n_spots, n_genes]``.
    library_size
        Of its spots. This is what a model cannot know: a score that depth alone reaches says
        nothing about the image.
    seed
        Of the shuffling, of the spots of each gene by itself.

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


BASELINES: dict[str, Callable[[TrainingData], Predict]] = {
    "ridge": lambda data: fit_ridge(data, centred=False),
    "centred ridge": lambda data: fit_ridge(data, centred=True),
}


@dataclass(frozen=True)
class Predicted:
    """Predictions of several methods.

    Attributes
    ----------
    sections
        Section, then method, to scores ``[n_spots, n_genes]``.
    slopes
        Of methods whose scores are no log rates, as in `score_section`.
    """

    sections: dict[str, dict[str, NDArray]]
    slopes: dict[str, NDArray]


def predict_all(
    model: RankModel, cohort: Mapping[str, AnnData], *, train: Mapping[str, AnnData]
) -> Predicted:
    """Predict every section by the model and by what stands beside it.

    Parameters
    ----------
    model
        A trained model.
    cohort, train
        As in `evaluate`.

    Returns
    -------
    Predicted
        Of the model, of the baselines fitted on its training sections, and of no image
        (`without_image`).
    """
    encoder = model.encoder["name"]
    baselines = {
        method: _fit_where_measured(fit, train, model.panel.index, encoder)
        for method, fit in BASELINES.items()
    }
    methods: dict[str, Callable[[AnnData], NDArray]] = {
        model.method: lambda adata: np.asarray(model.predict(adata).X)
    } | {name: partial(_by_features, predict, encoder) for name, predict in baselines.items()}
    slopes = {
        name: training_slope(predict, train, model.panel.index)
        for name, predict in methods.items()
        if not has_log_rates(name)
    }
    depth = partial(depth_scores, len(model.panel))
    slopes["library size"] = training_slope(depth, train, model.panel.index)
    sections = {}
    for name, adata in cohort.items():
        found = {method: predict(adata) for method, predict in methods.items()}
        rest = without_image(found[model.method], adata.obs["library_size"].to_numpy())
        sections[name] = found | rest
    return Predicted(sections, slopes)


def training_slope(
    predict: Callable[[AnnData], NDArray], train: Mapping[str, AnnData], panel: pd.Index
) -> NDArray[np.float64]:
    """Find the slopes that turn a method's scores of its training sections into log rates.

    Parameters
    ----------
    predict
        A section to its scores.
    train
        Training sections.
    panel
        Genes of the scores.
    """
    return score_slope(
        np.concatenate([predict(adata) for adata in train.values()]),
        sparse.vstack([panel_counts(adata, panel) for adata in train.values()]),
        section=np.repeat(list(train), [adata.n_obs for adata in train.values()]),
        library_size=np.concatenate([adata.obs["library_size"] for adata in train.values()]),
    )


def _fit_where_measured(
    fit: Callable[[TrainingData], Predict],
    train: Mapping[str, AnnData],
    panel: pd.Index,
    encoder: str,
) -> Predict:
    """Fit genes on the sections that measure them: those with the same sections together."""
    measured = np.stack([panel.isin(adata.var_names) for adata in train.values()])
    patterns, of_gene = np.unique(measured, axis=1, return_inverse=True)
    fitted = []
    for number, pattern in enumerate(patterns.T):
        sections = {name: train[name] for name in np.array(list(train))[pattern]}
        genes = of_gene == number
        fitted.append((genes, fit(training_data(sections, panel[genes], encoder))))

    def predict(features: NDArray) -> NDArray[np.float64]:
        scores = np.empty((len(features), len(panel)))
        for genes, part in fitted:
            scores[:, genes] = part(features)
        return scores

    return predict


def has_log_rates(method: str) -> bool:
    """Whether a method's objective makes its scores log rates.

    Examples
    --------
    >>> has_log_rates("mlp, list"), has_log_rates("mlp, mse"), has_log_rates("ridge")
    (True, False, False)
    """
    return method.rpartition(", ")[2] in LOG_RATES


def _by_features(
    predict: Callable[[NDArray], NDArray], encoder: str, adata: AnnData
) -> NDArray[np.float64]:
    return predict(adata.obsm[encoder])


OTHERS = (*BASELINES, "hest-ridge")


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
) -> PredictSection:
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
) -> PredictSection:
    head, _, loss = method.rpartition(", ")
    options: dict[str, Any] = {
        "loss": loss,
        "genes": list(panel),
        "seed": seed,
        "machine": Machine(),
    }
    if needs_images(head):
        from strank.fitting.finetune import finetune_model
        from strank.neural.finetune import Finetune
        from strank.prediction import predict_slide
        from strank.slides.slide import slide_of

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


def hest_components(
    train: NDArray, test: NDArray, *, n_components: int = 256, seed: int = 1
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Reduce features as HEST-Benchmark does, fitted on training spots.

    Parameters
    ----------
    train, test
        Features, ``[n_spots, n_features]``; of which float type matters to the last digits.
    n_components, seed
        Of the PCA.
    """
    pipeline = make_pipeline(StandardScaler(), PCA(n_components, random_state=seed))
    fitted, applied = pipeline.fit_transform(train), pipeline.transform(test)
    # The benchmark hands on torch tensors: rounded to single precision, and read by scikit-learn
    # as double. LSQR stops early enough for either to move the third digit of a correlation.
    return fitted.astype(np.float32).astype(np.float64), applied.astype(np.float32).astype(
        np.float64
    )


def hest_ridge(train: NDArray, target: NDArray, test: NDArray, *, seed: int = 1) -> NDArray:
    """Predict ``[n_spots, n_genes]`` for test spots as HEST-Benchmark does.

    Parameters
    ----------
    train, test
        Components, ``[n_spots, n_components]``.
    target
        log1p(counts) of the training spots, ``[n_spots, n_genes]``.
    seed
        Handed to scikit-learn, whose LSQR does not use it.
    """
    model = Ridge(
        solver="lsqr",
        alpha=hest_alpha(train.shape[1], target.shape[1]),
        random_state=seed,
        fit_intercept=False,
        max_iter=1000,
    )
    return model.fit(train, target).predict(test)


def hest_alpha(n_components: int, n_genes: int) -> float:
    """Compute the benchmark's penalty.

    Examples
    --------
    >>> hest_alpha(256, 50)
    0.0078125
    """
    return 100 / (n_components * n_genes)
