"""The exact fit with a scikit-learn face."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from scipy.special import xlogy
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils.validation import check_array, check_is_fitted, validate_data

from strank.linear.penalty import DEFAULT_PENALTY, PENALTIES, Data, choose_penalty
from strank.linear.scaling import Scaling
from strank.linear.solver import Solution, Status, minimise
from strank.linear.threads import few_threads

__all__ = ["STRankRegressor", "STRankRegressorCV"]


class STRankRegressor(RegressorMixin, BaseEstimator):
    r"""Linear scores of highest list likelihood, computed exactly.

    Minimises, for each gene :math:`g` (counts :math:`c`, library size :math:`l`, section total
    :math:`T_{sg}`, features :math:`x` standardised within sections),

    .. math::
        -\sum_i c_{ig}\, x_i^\top w + \sum_s T_{sg} \log \sum_{i \in s} l_i e^{x_i^\top w}
        + \tfrac{\lambda}{2} \lVert w \rVert^2

    which is the multinomial likelihood of ListSTRank and, without the penalty, the conditional
    Poisson regression with a level of its own for each section and gene.

    Parameters
    ----------
    penalty
        :math:`\lambda`, in counts: it weighs as much as that many counts, whatever the gene has.
        One value, or one a gene.
    tolerance
        A gene is converged when the norm of its gradient is at most this share of its counts.
    max_iterations
        Most iterations a gene.

    Attributes
    ----------
    coef_
        Change of the score (natural log) per unit of a feature, ``[n_genes, n_features]``.
    centre_, scale_
        Mean, and standard deviation within sections, of the features, ``[n_features]``.
    penalty_
        The penalty of each gene, ``[n_genes]``.
    solution_
        Status, gradient, bound and iterations of each gene.
    n_iter_
        Largest number of iterations.
    converged_
        Whether each gene met the tolerance, ``[n_genes]``.

    See Also
    --------
    STRankRegressorCV : chooses the penalty by leaving sections out.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> X, section = rng.normal(size=(60, 2)), np.repeat([0, 1, 2], 20)
    >>> counts = rng.poisson(20 * np.exp(X @ [[0.5], [-0.2]]))
    >>> model = STRankRegressor(penalty=1.0).fit(X, counts, section=section)
    >>> model.coef_.round(1)
    array([[ 0.5, -0.2]])
    >>> model.converged_
    array([ True])
    """

    def __init__(
        self,
        penalty: float | ArrayLike = DEFAULT_PENALTY,
        *,
        tolerance: float = 1e-6,
        max_iterations: int = 500,
    ) -> None:
        self.penalty = penalty
        self.tolerance = tolerance
        self.max_iterations = max_iterations

    def fit(
        self,
        X: ArrayLike,
        counts: ArrayLike | sparse.spmatrix,
        *,
        section: ArrayLike | None = None,
        offset: ArrayLike | None = None,
    ) -> Self:
        """Fit every gene.

        Parameters
        ----------
        X
            Features, ``[n_spots, n_features]``.
        counts
            Raw counts, ``[n_spots, n_genes]`` or ``[n_spots]``; sparse stays sparse.
        section
            Section label of each spot; one section if ``None``.
        offset
            Log library size of each spot; equal depth if ``None``.

        Raises
        ------
        ValueError
            For shapes that do not fit, negative counts or values that are not finite.
        """
        data = self._data(X, counts, section, offset)
        with few_threads(*data.counts.shape):
            penalty = np.broadcast_to(
                np.asarray(self.penalty, dtype=np.float64), data.counts.shape[1:]
            )
            return self._fit(data, penalty)

    def predict(self, X: ArrayLike) -> NDArray[np.float64]:
        """Scores ``[n_spots, n_genes]`` (``[n_spots]`` if fitted so); 0 at the mean feature."""
        check_is_fitted(self)
        features: NDArray[np.float64] = validate_data(self, X, reset=False, dtype=np.float64)
        scores = (features - self.centre_) @ self.coef_.T
        return scores[:, 0] if self._one_gene else scores

    def score(
        self,
        X: ArrayLike,
        counts: ArrayLike | sparse.spmatrix,
        *,
        section: ArrayLike | None = None,
        offset: ArrayLike | None = None,
    ) -> float:
        """Share of the list deviance explained, mean over the genes for which it is defined.

        1 is a perfect prediction of how counts are shared among the spots of a section, 0 is as
        good as sharing them by library size alone; below 0 is worse than that.
        """
        check_is_fitted(self)
        data = self._data(X, counts, section, offset, reset=False)
        return float(np.nanmean(self._deviance_explained(data)))

    def _deviance_explained(self, data: Data) -> NDArray[np.float64]:
        problem = data.problem(Scaling(self.centre_, np.ones_like(self.centre_)))
        coef = torch.as_tensor(self.coef_.T)
        # The saturated model shares a section's counts as they were observed.
        totals = problem.totals.numpy()
        log_depth = data.counts.T @ data.offset
        stored = data.counts.tocsc()
        ones = stored.copy()
        ones.data = xlogy(stored.data, stored.data)
        best = log_depth - np.asarray(ones.sum(0)).ravel() + xlogy(totals, totals).sum(0)
        model, none = (problem.loss(w).numpy() - best for w in (coef, torch.zeros_like(coef)))
        return 1 - np.divide(model, none, out=np.full_like(none, np.nan), where=none > 1e-9)

    def _data(self, X: Any, counts: Any, section: Any, offset: Any, *, reset: bool = True) -> Data:
        X = validate_data(self, X, reset=reset, dtype=np.float64)
        counts = check_array(counts, accept_sparse="csr", dtype=np.float64, ensure_2d=False)
        if reset:
            self._one_gene = counts.ndim == 1
        counts = sparse.csr_matrix(counts if counts.ndim == 2 else counts[:, None])
        n = len(X)
        section = np.zeros(n) if section is None else np.asarray(section)
        offset = np.zeros(n) if offset is None else np.asarray(offset, dtype=np.float64)
        for name, values in {"counts": counts, "section": section, "offset": offset}.items():
            if values.shape[0] != n:
                raise ValueError(f"{name} has {values.shape[0]} rows, but X has {n}")
        if counts.nnz and counts.data.min() < 0:
            raise ValueError("counts must not be negative")
        if not np.isfinite(offset).all():
            raise ValueError("offset must be finite; leave out spots without counts")
        return Data(X, counts, np.unique(section, return_inverse=True)[1].ravel(), offset)

    def _fit(self, data: Data, penalty: NDArray[np.float64]) -> Self:
        scaling = Scaling.fit(data.features, data.section)
        solution: Solution = minimise(
            data.problem(scaling),
            torch.as_tensor(np.array(penalty)),
            tolerance=self.tolerance,
            max_iterations=self.max_iterations,
        )
        self.centre_, self.scale_ = scaling.centre, scaling.scale
        self.coef_ = solution.weights.T.numpy() / scaling.scale
        self.penalty_ = np.array(penalty)
        self.solution_ = solution
        self.n_iter_ = int(solution.iterations.max())
        self.converged_ = (solution.status == Status.CONVERGED).numpy()
        return self


class STRankRegressorCV(STRankRegressor):
    """`STRankRegressor` with the penalty of each gene chosen on held-out sections.

    Every group of sections is left out once; along a warm-started path, the penalty of highest
    held-out list likelihood wins, for each gene by itself.

    Parameters
    ----------
    penalties
        Candidates, in counts.
    tolerance, max_iterations
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
        tolerance: float = 1e-6,
        max_iterations: int = 500,
    ) -> None:
        self.penalties = penalties
        self.tolerance = tolerance
        self.max_iterations = max_iterations

    def fit(
        self,
        X: ArrayLike,
        counts: ArrayLike | sparse.spmatrix,
        *,
        section: ArrayLike | None = None,
        offset: ArrayLike | None = None,
        group: ArrayLike | None = None,
    ) -> Self:
        """Choose the penalties and fit every gene.

        Parameters
        ----------
        X, counts, section, offset
            As in `STRankRegressor.fit`.
        group
            What is left out as a whole (a patient, say), one label a spot; sections if ``None``.

        Raises
        ------
        ValueError
            As `STRankRegressor.fit`, and for fewer than two groups or a section in two of them.
        """
        data = self._data(X, counts, section, offset)
        codes = data.section if group is None else np.unique(group, return_inverse=True)[1]
        pairs = np.unique(np.column_stack([data.section, codes]), axis=0)
        if len(pairs) > data.section.max() + 1:
            raise ValueError("group: a section stands in two groups")
        with few_threads(*data.counts.shape):
            self.choice_ = choose_penalty(data, codes, np.asarray(self.penalties))
            return self._fit(data, self.choice_.penalty)
