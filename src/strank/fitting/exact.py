"""From the sections of a cohort to a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from anndata import AnnData

from strank.cohort.training_set import (
    TrainingData,
    encoder_facts_of,
    left_out_together,
    panel_of,
    training_data,
    training_sections,
)
from strank.errors import InputError
from strank.linear.exact import Status
from strank.linear.penalty import DEFAULT_PENALTY
from strank.linear.regressor import STRankRegressor, STRankRegressorCV
from strank.model.novelty import fit_novelty
from strank.model.rank_model import RankModel
from strank.neural.heads import LinearHead
from strank.version import __version__


def fit_model(
    cohort: Mapping[str, AnnData],
    *,
    encoder: str = "morphology",
    n_genes: int | None = 50,
    genes: Sequence[str] | None = None,
    union: bool = False,
    penalty: float | None = None,
    borrow: bool = False,
    max_memory: float = 4.0,
    verbose: bool = False,
) -> RankModel:
    """Train the linear head with the exact list objective.

    Parameters
    ----------
    cohort
        Training sections with features, from `read_cohort(..., encoder=...)`.
    encoder
        Whose features.
    n_genes
        Size of the panel, chosen by variance on these sections; ``None`` for all genes that vary.
    genes
        The panel, if it is given.
    union
        Whether a gene may be measured in some of the sections only; the others have no say in its
        likelihood.
    penalty
        In counts; chosen for each gene if ``None``, by leaving out patients, or sections where
        there are fewer than three patients. From one section nothing can be left out: then it is
        `DEFAULT_PENALTY`, and the provenance says so.
    borrow
        Let sparse genes borrow from the others, as `STRankRegressorCV` says.
    max_memory
        Working memory of the solver in GiB, beside features, counts and model.
    verbose
        Whether to show progress, on stderr.

    Returns
    -------
    RankModel
        Its ``panel`` has counts, penalty and status of each gene.

    Raises
    ------
    InputError
        For features that are absent or not the same in all sections, a panel that is not
        measured, a section without counts, a negative penalty, or memory that is too little.
    """
    regressor, how = _regressor(cohort, penalty, borrow)
    facts = encoder_facts_of(cohort, encoder)
    panel, panel_choice = panel_of(cohort, n_genes, genes, union=union)
    data = training_data(cohort, panel, encoder)
    spots = {"section": data.section, "offset": np.log(data.library_size)}
    if isinstance(regressor, STRankRegressorCV):
        spots["group"] = data.group
    regressor.set_params(max_memory=max_memory, verbose=verbose)
    try:
        regressor.fit(data.features, data.counts, **spots)
    except ValueError as error:
        raise InputError(str(error)) from error
    return RankModel(
        head=LinearHead.from_regressor(regressor).eval(),
        panel=_panel_table(panel, data, regressor),
        encoder=facts,
        provenance={
            "strank_version": __version__,
            "objective": "list likelihood, linear head, exact",
            "panel_choice": panel_choice,
            "penalty_choice": how,
            "solver": regressor.solution_.message,
            **training_sections(cohort),
        },
        novelty=fit_novelty(data.features, data.group),
    )


def _regressor(
    cohort: Mapping[str, AnnData], penalty: float | None, borrow: bool
) -> tuple[STRankRegressor, str]:
    """Choose the estimator, and say how its penalties are chosen."""
    if penalty is not None and not penalty >= 0:
        raise InputError(f"the penalty must not be negative; got {penalty}")
    if borrow and (penalty is not None or len(cohort) < 2):
        raise InputError(
            "borrowing between genes needs two sections, of which one is left out, and chooses the "
            "penalties itself"
        )
    if penalty is not None:
        return STRankRegressor(penalty), "given"
    if len(cohort) < 2:
        how = f"default of {DEFAULT_PENALTY:g} counts: one section, nothing to leave out"
        return STRankRegressor(), how
    how = f"leave one {left_out_together(cohort)[0]} out"
    return STRankRegressorCV(borrow=borrow), how + ", genes borrow" * borrow


def _panel_table(panel: pd.Index, data: TrainingData, regressor: STRankRegressor) -> pd.DataFrame:
    solution = regressor.solution_
    return pd.DataFrame(
        {
            "counts": np.asarray(data.counts.sum(0)).ravel(),
            "penalty": regressor.penalty_,
            "borrows": getattr(regressor, "borrows_", False),
            "iterations": solution.iterations,
            "status": [Status(code).name.lower() for code in solution.status.tolist()],
        },
        index=panel,
    )
