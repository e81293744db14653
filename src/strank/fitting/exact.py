"""The exact fits of a linear head: count likelihoods by `linear`, squared error by scikit-learn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from strank.cohort.folds import Aim
from strank.cohort.scratch import CountsOnDisk
from strank.cohort.training_set import (
    Survey,
    TrainingData,
    are_two_patients,
    left_out_together,
    panel_of,
    same_encoder,
    training_data,
    training_sections,
)
from strank.errors import InputError
from strank.functional.groups import centre_within, deal, rows_of
from strank.linear.calibration import LEAST, LeftOut, lowest, mostly_as_all, temperature
from strank.linear.design import TooLittleMemory, few_threads
from strank.linear.exact import Solution, Status
from strank.linear.penalty import DEFAULT_PENALTY, PENALTIES
from strank.linear.regressor import STRankRegressor
from strank.linear.regressor_cv import STRankRegressorCV
from strank.metrics.correlation import log1p_cp10k
from strank.metrics.deviance import list_gain, score_slope, slope_information
from strank.model.novelty import fit_novelty
from strank.model.rank_model import RankModel
from strank.model.uncertainty import Fitted, Uncertainty, fit_uncertainty
from strank.neural.heads import LinearHead
from strank.version import __version__

# Of the ridges: what the field compares with.
ALPHAS = np.logspace(-1, 5, 13)
# Features as stored have any scale; these are the ones of issue 144 of HEST.
HEST_ALPHAS = np.logspace(-6, 8, 29)
_HEST_COMPONENTS = 256
# All pairs cost as many times more as a section has spots, and bring nothing.
_PARTNERS = 16
_BORROWERS = "borrowing between genes is for the list and pair objective"
# How near the optimum fits come of which only the errors are looked at.
_ROUGH = 1e-3
# Each is fitted from the start, so there are fewer of them.
_POOLED_PENALTIES = PENALTIES[::2]


@dataclass(frozen=True)
class ExactOptions:
    """What is asked of an exact fit."""

    #: In counts; chosen for each gene if None.
    penalty: float | None = None
    #: Whether sparse genes borrow from the others.
    borrow: bool = False
    #: Working memory in GiB.
    max_memory: float = 4.0
    #: The scheduler on whose workers genes are fitted, or this process.
    dask: str | None = None
    verbose: bool = False
    #: Whether genes choose penalties mostly as all do: of two patients chance has much to say.
    alike: bool = False


@dataclass(frozen=True)
class ExactFit:
    """A linear head at its optimum."""

    weight: NDArray[np.float64]  #: of standardised features, ``[n_features, n_genes]``
    centre: NDArray[np.float64]
    scale: NDArray[np.float64]
    table: Mapping[str, Any]  #: column to what is known of each gene
    message: str
    choice: str | None  #: how the penalty came about, if not by leaving groups out
    #: Scores as the solver's own precision gives them, with the level that a model leaves out.
    predict: Callable[[NDArray], NDArray[np.float64]]
    #: Weights of features as they are, ``[n_features, n_genes]``, of the same fit to some spots;
    #: only of a likelihood of all counts, which says how sure they are
    refit: Callable[[NDArray[np.bool_]], NDArray[np.float64]] | None = None

    @property
    def head(self) -> LinearHead:
        """The head, in float32."""
        head = LinearHead(*self.weight.shape)
        fitted = {"centre": self.centre, "scale": self.scale, "weight": self.weight}
        head.load_state_dict({name: torch.as_tensor(values) for name, values in fitted.items()})
        return head.eval()


Solve = Callable[[TrainingData, ExactOptions], ExactFit]


def solve_list(data: TrainingData, options: ExactOptions) -> ExactFit:
    """Fit the list likelihood."""
    return _solve(data, options, objective="list")


def solve_pair(data: TrainingData, options: ExactOptions) -> ExactFit:
    """Fit the pair likelihood, of some partners of every spot."""
    return _solve(data, options, objective="pair", n_partners=_PARTNERS)


def solve_negative_binomial(data: TrainingData, options: ExactOptions) -> ExactFit:
    """Fit the negative binomial likelihood of a level for each section and gene."""
    return _solve(data, options, objective="nb")


def _solve(
    data: TrainingData,
    options: ExactOptions,
    *,
    objective: Literal["list", "pair", "nb"],
    n_partners: int | None = None,
) -> ExactFit:
    if options.borrow and objective == "nb":
        raise InputError(_BORROWERS)
    chosen = options.penalty is None and len(np.unique(data.group)) > 1
    regressor: STRankRegressor
    if chosen:
        regressor = STRankRegressorCV(borrow=options.borrow)
        if options.alike and not options.borrow:
            regressor.set_params(shared="mostly")
    else:
        regressor = STRankRegressor(_given(options))
    regressor.set_params(objective=objective, n_partners=n_partners)
    how: dict[str, Any] = {"max_memory": options.max_memory, "dask": options.dask}
    regressor.set_params(**how, verbose=options.verbose)
    spots = {"section": data.section, "offset": np.log(data.library_size)}
    spots |= {"group": data.group} if chosen else {}
    regressor.fit(data.features, data.counts, **spots)
    held = regressor.choice_.temperature if isinstance(regressor, STRankRegressorCV) else None
    solved = _fit_of(regressor, held, None if chosen else _not_chosen(options))
    if objective != "list" or options.borrow:
        return solved
    again = STRankRegressor(regressor.penalty_, tolerance=_ROUGH, **how)

    def refit(kept: NDArray[np.bool_]) -> NDArray[np.float64]:
        part = data.of_sections(kept)
        spots = {"section": part.section, "offset": np.log(part.library_size)}
        again.fit(part.features, part.counts, **spots)
        return np.asarray(again.coef_.T * (1.0 if held is None else held))

    return replace(solved, refit=refit)


#: What never has all features and counts in memory.
_BY_BLOCKS: tuple[Solve, ...] = (solve_list, solve_pair, solve_negative_binomial)


def solve_poisson(data: TrainingData, options: ExactOptions) -> ExactFit:
    """Fit a level for each gene, but none for its sections: a list of the spots of all of them.

    The penalty of each gene is chosen as for the list, by held-out list likelihood.
    """
    if options.borrow:
        raise InputError(_BORROWERS)
    if options.dask is not None:
        raise InputError("`dask` is for the list, pair and nb, which are fitted by genes")
    fold = deal(data.group, 10)
    rows = [fold != f for f in np.unique(fold)] if len(np.unique(fold)) > 1 else []
    if options.penalty is not None:
        rows = []
    if not rows:
        chosen: Any = _given(options)
        held = None
    else:
        left_out = LeftOut(*np.stack([_pooled_path(data, kept, options) for kept in rows], 1))
        choose = mostly_as_all if options.alike else lowest
        chosen = np.asarray(_POOLED_PENALTIES)[choose(left_out.total)]
        held = temperature(left_out, choose)
    fitted = _pooled(data, np.ones(len(data.section), dtype=bool), chosen, options)
    return _fit_of(fitted, held, None if rows else _not_chosen(options))


def _pooled_path(data: TrainingData, kept: NDArray, options: ExactOptions) -> NDArray[np.float64]:
    """Leave a group out at each penalty; as `LeftOut` has it, ``[3, n_penalties, n_genes]``."""
    spots = {"section": data.section[~kept], "library_size": data.library_size[~kept]}
    counts, found = data.counts[~kept], []
    for penalty in _POOLED_PENALTIES:
        scores = _pooled(data, kept, penalty, options).predict(data.features[~kept])
        loss = -list_gain(scores, counts, **spots).sum(0)
        slope, information = (f(scores, counts, **spots) for f in (score_slope, slope_information))
        found.append([loss, slope, information])
    return np.stack(found, 1)


def _pooled(
    data: TrainingData, rows: NDArray, penalty: float | NDArray, options: ExactOptions
) -> STRankRegressor:
    offset = np.log(data.library_size[rows])
    section = np.zeros(len(offset), dtype=int)
    return STRankRegressor(penalty, max_memory=options.max_memory).fit(
        data.features[rows], data.counts[rows], section=section, offset=offset
    )


def _given(options: ExactOptions) -> float:
    return DEFAULT_PENALTY if options.penalty is None else options.penalty


def _not_chosen(options: ExactOptions) -> str:
    if options.penalty is not None:
        return "given"
    return f"default of {DEFAULT_PENALTY:g} counts: one section, nothing to leave out"


def _fit_of(
    regressor: STRankRegressor, held: NDArray[np.float64] | None, choice: str | None
) -> ExactFit:
    """Take what a regressor found, multiplied by what of it ``held`` for what was left out."""
    solution: Solution = regressor.solution_
    told = {} if held is None else {"temperature": held}
    told |= {"dispersion": regressor.dispersion_} if regressor.objective == "nb" else {}
    held = np.ones(len(regressor.coef_)) if held is None else held
    return ExactFit(
        weight=regressor.coef_.T * regressor.scale_[:, None] * held,
        centre=regressor.centre_,
        scale=regressor.scale_,
        table={
            "penalty": regressor.penalty_,
            **told,
            "borrows": getattr(regressor, "borrows_", False),
            "iterations": solution.iterations,
            "status": [Status(code).name.lower() for code in solution.status.tolist()],
        },
        message=solution.message,
        choice=choice,
        predict=lambda features: regressor.predict(features) * held,
    )


def solve_ridge(data: TrainingData, options: ExactOptions, *, centred: bool = False) -> ExactFit:
    """Fit log1p(CP10k) of all genes; the penalty by leaving the same sections out as the list.

    Centred, the mean of each section is subtracted from features and targets, which removes a
    shift between sections; the penalty is chosen by squared error on held-out sections either way.
    """
    _refuse_options(options)
    features = data.features.astype(np.float64)
    target = log1p_cp10k(data.counts, data.library_size).toarray()
    if centred:
        features, target = (centre_within(v, data.section) for v in (features, target))
    several = len(np.unique(data.group)) > 1
    with few_threads(len(features), features.shape[1], target.shape[1]):
        alpha = _best_alpha(features, target, data.group) if several else float(np.median(ALPHAS))
        model = make_pipeline(StandardScaler(), Ridge(alpha)).fit(features, target)

    def predict(features: NDArray) -> NDArray[np.float64]:
        features = features.astype(np.float64)
        shifted = features - features.mean(0) if centred else features
        return np.asarray(model.predict(shifted)).reshape(len(features), -1)

    scaler, ridge = model
    return ExactFit(
        weight=np.atleast_2d(ridge.coef_).T,
        centre=scaler.mean_,
        scale=scaler.scale_,
        table={"alpha": np.full(target.shape[1], ridge.alpha)},
        message=f"ridge with alpha {ridge.alpha:g} for all genes",
        choice=None
        if several
        else f"default of alpha {ridge.alpha:g}: one section, nothing to leave out",
        predict=predict,
    )


def _best_alpha(features: NDArray, target: NDArray, group: NDArray) -> float:
    """Choose as GridSearchCV over groups; of each, one eigendecomposition serves all alphas."""
    errors = np.zeros(len(ALPHAS))
    for rows in rows_of(group):
        kept = np.ones(len(group), dtype=bool)
        kept[rows] = False
        scaler, level = StandardScaler().fit(features[kept]), target[kept].mean(0)
        x, y = scaler.transform(features[kept]), target[kept] - level
        # Of fewer spots than features, along the spots: the same ridge.
        wide = len(x) < x.shape[1]
        values, vectors = np.linalg.eigh(x @ x.T if wide else x.T @ x)
        axes = x.T @ vectors if wide else vectors
        test, weights = (
            scaler.transform(features[rows]) @ axes,
            vectors.T @ (y if wide else x.T @ y),
        )
        for number, alpha in enumerate(ALPHAS):
            predicted = test / (np.maximum(values, 0) + alpha) @ weights
            errors[number] += np.square(target[rows] - level - predicted).mean()
    return float(ALPHAS[errors.argmin()])


def solve_hest_ridge(data: TrainingData, options: ExactOptions) -> ExactFit:
    """Fit log1p(counts) as HEST-Benchmark does, on principal components of the features."""
    _refuse_options(options)
    target = data.counts.log1p().toarray()
    n_components = min(_HEST_COMPONENTS, *data.features.shape)
    pipeline = _hest_pipeline(n_components)
    components = _as_torch(pipeline.fit_transform(data.features))
    ridge = _hest_model(n_components, target.shape[1]).fit(components, target)
    scaler, pca = pipeline

    def predict(features: NDArray) -> NDArray[np.float64]:
        scores = ridge.predict(_as_torch(pipeline.transform(features)))
        return scores.reshape(len(features), -1)

    return ExactFit(
        weight=pca.components_.T @ np.atleast_2d(ridge.coef_).T,
        centre=scaler.mean_,
        scale=scaler.scale_,
        table={"alpha": np.full(target.shape[1], ridge.alpha)},
        message=f"ridge on {n_components} principal components",
        choice=f"that of HEST-Benchmark, alpha {ridge.alpha:g}",
        predict=predict,
    )


def _refuse_options(options: ExactOptions) -> None:
    asked = {"penalty": options.penalty, "borrow": options.borrow or None, "dask": options.dask}
    for name in (name for name, given in asked.items() if given is not None):
        raise InputError(f"`{name}` is for count likelihoods: leave it out for the squared error")


def hest_components(
    train: NDArray, test: NDArray, *, n_components: int = 256, seed: int = 1
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Reduce features as HEST-Benchmark does; of which float type matters to the last digits."""
    pipeline = _hest_pipeline(n_components, seed)
    return _as_torch(pipeline.fit_transform(train)), _as_torch(pipeline.transform(test))


def _hest_pipeline(n_components: int, seed: int = 1) -> Any:
    return make_pipeline(StandardScaler(), PCA(n_components, random_state=seed))


def _as_torch(components: NDArray) -> NDArray[np.float64]:
    # The benchmark hands on torch tensors: rounded to single precision, and read by scikit-learn
    # as double. LSQR stops early enough for either to move the third digit of a correlation.
    return components.astype(np.float32).astype(np.float64)


def hest_ridge(
    train: NDArray, target: NDArray, test: NDArray, *, alpha: float | None = None, seed: int = 1
) -> NDArray[np.float64]:
    """Predict ``[n_spots, n_genes]`` as HEST-Benchmark does; alpha by its formula if None."""
    model = _hest_model(train.shape[1], target.shape[1], alpha=alpha, seed=seed)
    # scikit-learn drops the axis of a single gene.
    predicted = model.fit(train, target).predict(test).reshape(len(test), -1)
    return np.asarray(predicted, dtype=np.float64)


def _hest_model(
    n_features: int, n_genes: int, *, alpha: float | None = None, seed: int = 1
) -> Ridge:
    return Ridge(
        solver="lsqr",
        alpha=hest_alpha(n_features, n_genes) if alpha is None else alpha,
        # Handed over as there, but LSQR does not use it.
        random_state=seed,
        fit_intercept=False,
        max_iter=1000,
    )


def choose_alpha(features: NDArray, target: NDArray, group: NDArray, alphas: NDArray) -> float:
    """Choose the alpha of a ridge without intercept: least squared error, a group left out at once.

    Of a single group, a spot left out at once. As scikit-learn's GridSearchCV and RidgeCV do, but
    of each training set one eigendecomposition serves all alphas.
    """
    features = features.astype(np.float64)
    gram, cross, groups = features.T @ features, features.T @ target, rows_of(group)
    alone = len(groups) == 1
    errors = np.zeros(len(alphas))
    for rows in groups:
        x, y = features[rows], target[rows]
        # What is not left out: never negative, but for the subtraction's last digits.
        kept, kept_cross = (gram, cross) if alone else (gram - x.T @ x, cross - x.T @ y)
        values, vectors = np.linalg.eigh(kept)
        rotated, weights = x @ vectors, vectors.T @ kept_cross
        for number, alpha in enumerate(alphas):
            shrunk = rotated / (np.maximum(values, 0) + alpha)
            residual = y - shrunk @ weights
            if alone:
                residual /= 1 - (shrunk * rotated).sum(1, keepdims=True)
            errors[number] += np.square(residual).mean()
    return float(alphas[np.nan_to_num(errors, nan=np.inf).argmin()])


def hest_alpha(n_features: int, n_genes: int) -> float:
    """Penalty of the benchmark.

    >>> hest_alpha(256, 50)
    0.0078125
    """
    return 100 / (n_features * n_genes)


def _dispersion(solved: ExactFit, unit: str) -> dict[str, str]:
    """Say how far counts vary beyond chance, and how that came about."""
    found = solved.table.get("dispersion")
    if found is None:
        return {}
    low, middle, high = np.quantile(found, [0, 0.5, 1])
    how = "what the moments say"
    if solved.choice is None:
        how += f" or half of it, chosen for each gene by leave one {unit} out"
    return {"dispersion": f"{low:.2g} to {high:.2g}, median of genes {middle:.2g}: {how}"}


# How much of a score difference was there on new patients of her2st, of models of one or two.
_ELSEWHERE = "elsewhere differences were 1.8 times (C to B) and 9 times (B and C to A) too large"


def _calibration(solved: ExactFit, aim: Aim, unit: str, n_groups: int) -> dict[str, Any]:
    """Say what a difference of its scores means, and for whom: its size, or its order only."""
    held, whom = solved.table.get("temperature"), aim.replace("-", " ")
    if held is None:
        why = "no section was left out to learn their size from"
        if "penalty" not in solved.table:
            why = "squared error gives levels of log1p(CP10k)"
        return {"size": False, "told": f"scores show order, not size: {why}"}
    if aim == "new-patients" and unit == "section":
        return {
            "size": False,
            "told": "scores show order, not size, on new patients: a model of one patient can know "
            f"nothing of others; {_ELSEWHERE}",
        }
    none = int((np.asarray(held) <= LEAST).sum())
    told = (
        f"scores are log fold changes for {whom}: their size is that which held for each of "
        f"{n_groups} {unit}s left out ({np.median(held):.0%} of that in training, median of genes)"
    )
    nothing = f"; of {none} of {len(held)} genes nothing held: order, not size"
    return {"size": True, "told": told + nothing * (none > 0)}


def _uncertainty(data: TrainingData, solved: ExactFit) -> Uncertainty | None:
    if solved.refit is None:
        return None
    weight = solved.weight / solved.scale[:, None]
    return fit_uncertainty(
        data, Fitted(weight, solved.scale, solved.table["penalty"], solved.refit)
    )


def _sure_of(aim: Aim, unit: str, n_groups: int) -> str:
    """Say what standard errors cover."""
    counts = "what the counts leave open"
    if n_groups < 2:
        return f"within-section uncertainty only: {counts}"
    if aim == "new-patients" and unit == "section":
        return (
            f"within-patient uncertainty only: {counts}, and what differs between {n_groups} "
            "sections of one patient; others may differ by far more"
        )
    return f"{counts}, and what differs between {n_groups} {unit}s, each left out"


def _room(solve: Solve, survey: Survey, n_features: int, n_genes: int, max_memory: float) -> float:
    """Find the memory that decides what stays on disk: nothing, of what is solved at once."""
    if solve in _BY_BLOCKS:
        return max_memory
    n_spots = sum(adata.n_obs for adata in survey.known.values())
    # Features as they are and three times in float64, targets as often.
    needed = n_spots * (4 * n_features + 24 * (n_features + n_genes)) / 2**30
    if needed > max_memory:
        raise InputError(
            f"`max_memory={max_memory:g}` GiB is too little for this `loss`, which takes all spots "
            f"at once: about {needed:.2g} GiB; give more, or take the list, pair or nb"
        )
    return np.inf


def _results(data: TrainingData) -> float:
    """Estimate what is found, in GiB: weights, and what they may be wrong by in every group."""
    n_groups, (n_features, n_genes) = (
        len(set(data.group)),
        (data.features.shape[1], data.counts.shape[1]),
    )
    return 8 * n_genes * (8 * n_features + 10 * n_groups * min(n_features, 64)) / 2**30


def _solved(data: TrainingData, solve: Solve, options: ExactOptions) -> ExactFit:
    """Solve with the memory that spots, counts and results leave."""
    beside = data.gib + _results(data)
    left = options.max_memory - beside
    given = f"`max_memory={options.max_memory:g}` GiB is"
    if left <= 0:
        raise InputError(f"{given} too little: spots, counts and results take {beside:.2g} GiB")
    try:
        return solve(data, replace(options, max_memory=left))
    except TooLittleMemory as error:
        needed = f"{error.needed:.2g} GiB, and spots, counts and results {beside:.2g} GiB"
        raise InputError(f"{given} {error.told} needs {needed}") from error
    except ValueError as error:
        raise InputError(str(error)) from error


def fit_exact(
    cohort: Mapping[str, AnnData],
    solve: Solve,
    options: ExactOptions,
    *,
    method: Mapping[str, Any],
    encoder: str,
    aim: Aim = "new-patients",
    **panel_options: Any,
) -> RankModel:
    """Fit the linear head by a solver; the method's facts and the panel's options as `fit` has."""
    if options.penalty is not None and not options.penalty >= 0:
        raise InputError(f"`penalty` must not be negative; got {options.penalty}")
    if options.borrow and (options.penalty is not None or len(cohort) < 2):
        raise InputError(
            "borrowing between genes needs two sections, of which one is left out, and chooses the "
            "penalties itself"
        )
    survey = Survey.of(cohort, encoder, sums=panel_options["genes"] is None)
    facts = same_encoder(survey.encoders, encoder)
    panel, panel_choice = panel_of(survey, **panel_options)
    unit, group = left_out_together(survey.known, aim)
    room = _room(solve, survey, facts["n_features"], len(panel), options.max_memory)
    scratch = partial(CountsOnDisk, shared=options.dask is not None)
    data = training_data(cohort, panel, encoder, group, max_memory=room, scratch=scratch)
    if not method["library_size"]:
        data = data.without_depth()
    solved = _solved(data, solve, replace(options, alike=are_two_patients(unit, group)))
    left_out = f"leave one {unit} out" + ", genes borrow" * options.borrow
    n_groups, uncertainty = len(set(group)), _uncertainty(data, solved)
    told = {} if uncertainty is None else {"uncertainty": _sure_of(aim, unit, n_groups)}
    return RankModel(
        head=solved.head,
        panel=pd.DataFrame({"counts": data.gene_counts, **solved.table}, index=panel),
        encoder=facts,
        provenance={
            "strank_version": __version__,
            "method": dict(method),
            "panel_choice": panel_choice,
            "penalty_choice": solved.choice or left_out,
            "solver": solved.message,
            "aim": aim,
            **_dispersion(solved, unit),
            "calibration": _calibration(solved, aim, unit, n_groups),
            **told,
            **training_sections(survey),
        },
        novelty=fit_novelty(data.features, data.group),
        uncertainty=uncertainty,
    )
