"""The exact fit with penalties chosen on held-out sections, with a scikit-learn face."""

from __future__ import annotations

from typing import Self

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse

from strank.linear.design import Objective
from strank.linear.inputs import deal
from strank.linear.penalty import PENALTIES, choose_penalty
from strank.linear.regressor import STRankRegressor
from strank.linear.threads import few_threads
from strank.progress import progress

__all__ = ["STRankRegressorCV"]


class STRankRegressorCV(STRankRegressor):
    """`STRankRegressor` with the penalty of each gene chosen on held-out sections.

    Every group of sections is left out once; along a warm-started path, the penalty of highest
    held-out list likelihood wins.

    Parameters
    ----------
    penalties
        Candidates, in counts.
    max_folds
        Where there are more groups to leave out, they are left out in so many parts.
    shared
        Choose one penalty for all genes, by the sum of their likelihoods; else each has its own.
    objective, n_partners, standardize, tolerance, max_iterations, max_memory, seed, verbose
        As in `STRankRegressor`.

    Attributes
    ----------
    choice_
        Penalties compared and their held-out negative log-likelihood.

    Notes
    -----
    The other attributes are those of `STRankRegressor`.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> X, section = rng.normal(size=(60, 2)), np.repeat([0, 1, 2], 20)
    >>> counts = rng.poisson(20 * np.exp(X @ [[0.5, 0.0], [0.0, 0.0]]))
    >>> model = STRankRegressorCV(penalties=[1.0, 1000.0]).fit(X, counts, section=section)
    >>> model.penalty_
    array([   1., 1000.])
    """

    def __init__(
        self,
        penalties: ArrayLike = PENALTIES,
        *,
        max_folds: int = 10,
        shared: bool = False,
        objective: Objective = "list",
        n_partners: int | None = None,
        standardize: bool = True,
        tolerance: float = 1e-5,
        max_iterations: int = 500,
        max_memory: float = 4.0,
        seed: int = 0,
        verbose: bool = False,
    ) -> None:
        self.penalties = penalties
        self.max_folds = max_folds
        self.shared = shared
        self.objective = objective
        self.n_partners = n_partners
        self.standardize = standardize
        self.tolerance = tolerance
        self.max_iterations = max_iterations
        self.max_memory = max_memory
        self.seed = seed
        self.verbose = verbose

    def fit(
        self,
        X: ArrayLike,
        y: ArrayLike | sparse.spmatrix,
        *,
        section: ArrayLike | None = None,
        offset: ArrayLike | None = None,
        group: ArrayLike | None = None,
    ) -> Self:
        """Choose the penalties and fit every gene.

        Parameters
        ----------
        X, y, section, offset
            As in `STRankRegressor.fit`.
        group
            What is left out as a whole (a patient, say), one label a spot; sections if ``None``.

        Raises
        ------
        ValueError
            As `STRankRegressor.fit`, and for fewer than two groups or a section in two of them.
        """
        group = section if group is None else group
        fold = None if group is None else deal(group, self.max_folds)
        data = self._data(X, y, section, offset, fold)
        n_genes = data.counts.shape[1]
        with few_threads(len(data.offset), self.n_features_in_, n_genes):
            design, penalties = self._design(data), np.asarray(self.penalties, dtype=np.float64)
            with progress("Penalties", n_genes, hidden=not self.verbose) as advance:
                self.choice_ = choose_penalty(
                    design, penalties, shared=self.shared, advance=advance
                )
            return self._fit(design, self.choice_.penalty)
