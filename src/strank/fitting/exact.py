"""The exact fits of a linear head to count likelihoods, and the model of such a fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from numpy.typing import NDArray

from strank.cohort.training_set import (
    TrainingData,
    encoder_facts_of,
    left_out_together,
    panel_of,
    training_data,
    training_sections,
)
from strank.errors import InputError
from strank.functional.groups import deal
from strank.linear.exact import Solution, Status
from strank.linear.penalty import DEFAULT_PENALTY, PENALTIES
from strank.linear.regressor import STRankRegressor, STRankRegressorCV
from strank.metrics.deviance import list_gain
from strank.model.novelty import fit_novelty
from strank.model.rank_model import RankModel
from strank.neural.heads import LinearHead
from strank.version import __version__

# All pairs cost as many times more as a section has spots, and bring nothing.
_PARTNERS = 16
# Each is fitted from the start, so there are fewer of them.
_POOLED_PENALTIES = PENALTIES[::2]


@dataclass(frozen=True)
class ExactOptions:
    """What a user may say about an exact fit."""

    #: In counts; chosen for each gene if None.
    penalty: float | None = None
    #: Whether sparse genes borrow from the others.
    borrow: bool = False
    #: Working memory in GiB.
    max_memory: float = 4.0
    verbose: bool = False


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


def _solve(
    data: TrainingData,
    options: ExactOptions,
    *,
    objective: Literal["list", "pair"],
    n_partners: int | None = None,
) -> ExactFit:
    chosen = options.penalty is None and len(np.unique(data.group)) > 1
    regressor: STRankRegressor
    if chosen:
        regressor = STRankRegressorCV(borrow=options.borrow)
    else:
        regressor = STRankRegressor(_given(options))
    regressor.set_params(objective=objective, n_partners=n_partners)
    regressor.set_params(max_memory=options.max_memory, verbose=options.verbose)
    spots = {"section": data.section, "offset": np.log(data.library_size)}
    spots |= {"group": data.group} if chosen else {}
    regressor.fit(data.features, data.counts, **spots)
    return _fit_of(regressor, None if chosen else _not_chosen(options))


def solve_poisson(data: TrainingData, options: ExactOptions) -> ExactFit:
    """Fit a level for each gene, but none for its sections: a list of the spots of all of them.

    The penalty of each gene is chosen as for the list, by held-out list likelihood.
    """
    if options.borrow:
        raise InputError("borrowing between genes is for the list and pair objective")
    fold = deal(data.group, 10)
    rows = [fold != f for f in np.unique(fold)] if len(np.unique(fold)) > 1 else []
    if options.penalty is not None:
        rows = []
    held_out = np.zeros((len(_POOLED_PENALTIES), data.counts.shape[1]))
    for kept in rows:
        spots = {"section": data.section[~kept], "library_size": data.library_size[~kept]}
        for number, penalty in enumerate(_POOLED_PENALTIES):
            predicted = _pooled(data, kept, penalty, options).predict(data.features[~kept])
            held_out[number] += list_gain(predicted, data.counts[~kept], **spots).sum(0)
    chosen = np.asarray(_POOLED_PENALTIES)[held_out.argmax(0)] if rows else _given(options)
    fitted = _pooled(data, np.ones(len(data.section), dtype=bool), chosen, options)
    return _fit_of(fitted, None if rows else _not_chosen(options))


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


def _fit_of(regressor: STRankRegressor, choice: str | None) -> ExactFit:
    solution: Solution = regressor.solution_
    return ExactFit(
        weight=regressor.coef_.T * regressor.scale_[:, None],
        centre=regressor.centre_,
        scale=regressor.scale_,
        table={
            "penalty": regressor.penalty_,
            "borrows": getattr(regressor, "borrows_", False),
            "iterations": solution.iterations,
            "status": [Status(code).name.lower() for code in solution.status.tolist()],
        },
        message=solution.message,
        choice=choice,
        predict=regressor.predict,
    )


def fit_exact(
    cohort: Mapping[str, AnnData],
    solve: Solve,
    options: ExactOptions,
    *,
    method: Mapping[str, str],
    encoder: str,
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
    facts = encoder_facts_of(cohort, encoder)
    panel, panel_choice = panel_of(cohort, **panel_options)
    data = training_data(cohort, panel, encoder)
    try:
        solved = solve(data, options)
    except ValueError as error:
        raise InputError(str(error)) from error
    left_out = f"leave one {left_out_together(cohort)[0]} out" + ", genes borrow" * options.borrow
    return RankModel(
        head=solved.head,
        panel=pd.DataFrame(
            {"counts": np.asarray(data.counts.sum(0)).ravel(), **solved.table}, index=panel
        ),
        encoder=facts,
        provenance={
            "strank_version": __version__,
            "method": dict(method),
            "panel_choice": panel_choice,
            "penalty_choice": solved.choice or left_out,
            "solver": solved.message,
            **training_sections(cohort),
        },
        novelty=fit_novelty(data.features, data.group),
    )
