"""The exact fit with penalties chosen on held-out sections, with a scikit-learn face."""

from __future__ import annotations

from typing import Self

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse

from strank.linear.design import Design, Objective
from strank.linear.inputs import deal
from strank.linear.penalty import PENALTIES, choose_penalty
from strank.linear.prior import borrow
from strank.linear.regressor import STRankRegressor
from strank.linear.solution import Solution
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
    borrow
        Let genes borrow from each other: estimate a prior covariance of the weights from all genes
        of the training sections (`strank.linear.prior`), for the genes that it serves on sections
        left out. It helps genes of less than about two counts a spot; two to three times the work.
    objective, n_partners, standardize, tolerance, max_iterations, max_memory, seed, verbose
        As in `STRankRegressor`.

    Attributes
    ----------
    choice_
        Penalties compared and their held-out negative log-likelihood.
    borrows_
        Which genes have the prior, ``[n_genes]``.

    Notes
    -----
    The other attributes are those of `STRankRegressor`. ``check_estimator`` knows of no sections,
    of which two are needed here; where its data are given some, the same holds as for
    `STRankRegressor`, but for a single spot, with which nothing is left out.

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
        borrow: bool = False,
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
        self.borrow = borrow
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
            As `STRankRegressor.fit`, for fewer than two groups or a section in two of them, and for
            fewer than 15 genes to borrow from.
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
            self.borrows_ = np.zeros(n_genes, dtype=bool)
            solution = self._solve_borrowing(design) if self.borrow else None
            penalty = self.choice_.penalty
            return self._keep(design, penalty, solution or self._solve(design, penalty))

    def _solve_borrowing(self, design: Design) -> Solution:
        if self.shared:
            raise ValueError("borrow=True chooses for each gene: leave shared at False")
        with progress("Prior", 2 * design.n_genes, hidden=not self.verbose) as advance:
            found = borrow(design, self.choice_, advance=advance)
        self.choice_, self.borrows_ = found.choice, found.borrows
        parts = [
            self._solve(of.of_genes(np.flatnonzero(which)), self.choice_.penalty[which])
            for of, which in ((found.design, found.borrows), (design, ~found.borrows))
            if which.any()
        ]
        return parts[0] if len(parts) == 1 else parts[0].where(found.borrows, parts[1])
