"""From the sections of a cohort to a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from strank.cohort.contract import counts_checksum, section_info
from strank.cohort.panel import check_genes, choose_panel
from strank.cohort.splits import patients_of
from strank.errors import InputError
from strank.linear.head import LinearHead
from strank.linear.penalty import DEFAULT_PENALTY
from strank.linear.regressor import STRankRegressor
from strank.linear.regressor_cv import STRankRegressorCV
from strank.linear.solution import Status
from strank.model import RankModel
from strank.version import __version__

__all__ = ["TrainingData", "fit_model", "training_data"]


@dataclass(frozen=True)
class TrainingData:
    """Spots of several sections in one: ``[n_spots, ...]`` in each.

    Attributes
    ----------
    features
        Of one encoder, ``[n_spots, n_features]``.
    counts
        Of the panel, CSR, ``[n_spots, n_genes]``.
    library_size
        Totals over all measured genes; spots without counts are left out.
    section
        Names.
    group
        What is left out together where something is chosen: patients, or sections where fewer
        than three patients are there.
    """

    features: np.ndarray
    counts: sparse.csr_matrix
    library_size: np.ndarray
    section: np.ndarray
    group: np.ndarray


def training_data(cohort: Mapping[str, AnnData], panel: pd.Index, encoder: str) -> TrainingData:
    """Stack the sections; spots without any count have no exposure and are left out."""
    kept = {name: adata[adata.obs["library_size"] > 0] for name, adata in cohort.items()}
    empty = [name for name, adata in kept.items() if adata.n_obs == 0]
    if empty:
        raise InputError(f"section {empty[0]}: no spot has any count")
    n_spots = [adata.n_obs for adata in kept.values()]
    return TrainingData(
        features=np.concatenate([adata.obsm[encoder] for adata in kept.values()]),
        counts=sparse.vstack([sparse.csr_matrix(a[:, panel].X) for a in kept.values()], "csr"),
        library_size=np.concatenate([a.obs["library_size"].to_numpy() for a in kept.values()]),
        section=np.repeat(list(kept), n_spots),
        group=np.repeat(_groups(cohort)[1], n_spots),
    )


def _groups(cohort: Mapping[str, AnnData]) -> tuple[str, list[str]]:
    """Choose what is left out together, and name that of each section."""
    patients = list(patients_of(cohort).values())
    # Two patients would leave a single one to train on.
    return ("patient", patients) if len(set(patients)) > 2 else ("section", list(cohort))


def fit_model(
    cohort: Mapping[str, AnnData],
    *,
    encoder: str = "morphology",
    n_genes: int | None = 50,
    genes: Sequence[str] | None = None,
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
    facts = _encoder_facts(cohort, encoder)
    if genes is None:
        panel = choose_panel(cohort, n_genes)
        panel_choice = f"{n_genes} of highest log1p(CP10k) variance" if n_genes else "all that vary"
    else:
        panel, panel_choice = check_genes(cohort, genes), "given"
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
            **_training_sections(cohort),
        },
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
    how = f"leave one {_groups(cohort)[0]} out"
    return STRankRegressorCV(borrow=borrow), how + ", genes borrow" * borrow


def _encoder_facts(cohort: Mapping[str, AnnData], encoder: str) -> dict[str, Any]:
    """Find what the features come from, which must be the same for all sections."""
    found: dict[str, Any] = {}
    for name, adata in cohort.items():
        if encoder not in adata.obsm:
            raise InputError(f"section {name} has no features obsm[{encoder!r}]; embed it first")
        # Features that a user brings have a name and a width, and no more is known of them.
        width = adata.obsm[encoder].shape[1]
        facts = adata.uns.get(encoder, {"name": encoder, "version": "", "fields": []})
        facts = {**facts, "n_features": width}
        if found and facts != found:
            raise InputError(f"section {name} has other {encoder} features than the rest")
        found = facts
    return found


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


def _training_sections(cohort: Mapping[str, AnnData]) -> dict[str, object]:
    patients = patients_of(cohort)
    info = {name: section_info(adata) for name, adata in cohort.items()}
    return {
        "spot_pitch_um": min(i.spot_pitch_um for i in info.values()),
        "spot_diameter_um": min(i.spot_diameter_um for i in info.values()),
        "sections": {
            name: {
                "patient": patients[name],
                "n_spots": adata.n_obs,
                "counts_sha256": counts_checksum(adata),
                "image_sha256": info[name].image_sha256,
            }
            for name, adata in cohort.items()
        },
    }
