"""The exact fit with scikit-learn's face, with penalties chosen by leaving groups out."""

from __future__ import annotations

from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse

from strank.functional.groups import deal
from strank.linear.calibration import lowest, mostly_as_all
from strank.linear.data import one_a_spot
from strank.linear.design import Design, few_threads
from strank.linear.dispersion import PARTS, choose_dispersion
from strank.linear.exact import Solution
from strank.linear.penalty import PENALTIES, best_for_all, choose_penalty
from strank.linear.prior import borrow
from strank.linear.regressor import STRankRegressor, given_of
from strank.progress import progress


class STRankRegressorCV(STRankRegressor):
    """`STRankRegressor` with the penalty of each gene chosen on held-out sections.

    Every group of sections is left out once; along a path from the largest penalty down to well
    below what is best, the penalty of highest held-out list likelihood wins.

    Parameters
    ----------
    penalties
        Candidates, in counts.
    max_folds
        Where there are more groups to leave out, they are left out in so many parts.
    shared
        Choose one penalty for all genes, by the sum of their likelihoods; else each has its own.
        With ``"mostly"`` the mean of all weighs ten times as much as a gene's own, as is right for
        two groups.
    borrow
        Let genes borrow from each other: estimate a prior covariance of the weights from all genes
        of the training sections (empirical Bayes: Efron and Morris, JASA 68, 1973), for the genes
        that it serves on sections left out. It helps genes of less than about two counts a spot;
        two to three times the work.
    dispersion
        For the negative binomial, as in `STRankRegressor`; ``None`` chooses, together with the
        penalty, from what moments say and half of it: twice the work.
    objective, n_partners, standardize, tolerance, max_iterations, max_memory, dask, seed, verbose
        As in `STRankRegressor`.

    Attributes
    ----------
    choice_
        Penalties compared and their held-out negative log-likelihood; ``inf`` where not needed.
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
        shared: bool | Literal["mostly"] = False,
        borrow: bool = False,
        objective: Literal["list", "pair", "nb"] = "list",
        n_partners: int | None = None,
        dispersion: float | ArrayLike | None = None,
        standardize: bool = True,
        tolerance: float = 1e-5,
        max_iterations: int = 500,
        max_memory: float = 4.0,
        dask: str | None = None,
        seed: int = 0,
        verbose: bool = False,
    ) -> None:
        self.penalties = penalties
        self.max_folds = max_folds
        self.shared = shared
        self.borrow = borrow
        self.objective = objective
        self.n_partners = n_partners
        self.dispersion = dispersion
        self.standardize = standardize
        self.tolerance = tolerance
        self.max_iterations = max_iterations
        self.max_memory = max_memory
        self.dask = dask
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
        name, group = ("section", section) if group is None else ("group", group)
        fold = None if group is None else deal(one_a_spot(name, group), self.max_folds, name)
        data = self._data(X, y, section, offset, fold)
        self._had = given_of(section, offset)
        n_genes = data.counts.shape[1]
        with few_threads(len(data.offset), self.n_features_in_, n_genes):
            design, self.borrows_ = self._design(data), np.zeros(n_genes, dtype=bool)
            if self.borrow:
                solution = self._solve_borrowing(design)
            else:
                design = self._choose(design)
                solution = self._solve(design, self.choice_.penalty)
            return self._keep(design, self.choice_.penalty, solution)

    def _choose(self, design: Design) -> Design:
        """Choose the penalties; of a negative binomial the dispersions, too."""
        choose = {True: best_for_all, "mostly": mostly_as_all}.get(self.shared, lowest)
        n = np.size(self.penalties) * (len(PARTS) if self._seeks_dispersion else 1)
        with progress("Penalties", n * design.n_genes, hidden=not self.verbose) as advance:
            how: dict[str, Any] = {"choose": choose, "advance": advance}
            if self._seeks_dispersion:
                design, self.choice_ = choose_dispersion(design, self.penalties, **how)
            else:
                self.choice_ = choose_penalty(design, self.penalties, **how)
            return design

    def _solve_borrowing(self, design: Design) -> Solution:
        if self.shared:
            raise ValueError("borrow=True chooses for each gene: leave shared at False")
        if self.objective == "nb":
            raise ValueError("borrow=True is for objective 'list' or 'pair'")
        n = design.n_genes * (2 * np.size(self.penalties) + 1)
        with progress("Prior", n, hidden=not self.verbose) as advance:
            given, self.choice_, self.borrows_ = borrow(design, self.penalties, advance=advance)
        parts = [
            self._solve(of.of_genes(np.flatnonzero(which)), self.choice_.penalty[which])
            for of, which in ((given, self.borrows_), (design, ~self.borrows_))
            if which.any()
        ]
        return parts[0] if len(parts) == 1 else parts[0].where(self.borrows_, parts[1])
