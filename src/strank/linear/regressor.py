"""The exact fit with scikit-learn's face; its penalties are given."""

from __future__ import annotations

import warnings
from typing import Any, Literal, Self

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils import Tags
from sklearn.utils.validation import check_array, check_is_fitted, validate_data
from torch import Tensor

from strank.linear.data import (
    Data,
    Rows,
    gather,
    is_read_by_genes,
    is_read_by_rows,
    no_counts,
)
from strank.linear.design import Design, few_threads
from strank.linear.dispersion import by_moments
from strank.linear.exact import Solution, fit_genes
from strank.linear.penalty import DEFAULT_PENALTY
from strank.metrics.deviance import list_gain, null_deviance
from strank.progress import progress

_PRECISIONS = (np.float64, np.float32)
# Genes that are scored at a time: counts and scores of a section are dense for so many.
_GENES = 256


class STRankRegressor(RegressorMixin, BaseEstimator):
    r"""Linear scores of highest list likelihood, computed exactly.

    Minimises, for each gene :math:`g` (counts :math:`c`, library size :math:`l`, section total
    :math:`T_{sg}`, features :math:`x` standardised within sections),

    .. math::
        -\sum_i c_{ig}\, x_i^\top w + \sum_s T_{sg} \log \sum_{i \in s} l_i e^{x_i^\top w}
        + \tfrac{\lambda}{2} \lVert w \rVert^2

    which is the multinomial likelihood of ListSTRank and, without the penalty, the conditional
    Poisson regression with a level of its own for each section and gene. With
    ``objective="pair"`` it is the binomial likelihood of PairSTRank, divided by the number of
    pairs of a spot, so that a count weighs as much. With ``objective="nb"`` it is the negative
    binomial likelihood of variance :math:`\mu + \varphi \mu^2`, with a level of its own for each
    section and gene, too: spots of high counts, whose number chance says less of, weigh less. With
    :math:`\varphi = 0` it is the list.

    Parameters
    ----------
    penalty
        :math:`\lambda`, in counts: it weighs as much as that many counts, whatever the gene has.
        One value, or one a gene.
    objective
        ``"list"``, ``"pair"`` or ``"nb"``. All pairs of a section cost as many times more as it has
        spots.
    n_partners
        For pairs: with how many others of its section a spot is compared (rounded up to an even
        number); all if ``None``.
    dispersion
        For the negative binomial: :math:`\varphi`, one value or one a gene; ``None`` takes what the
        moments of a list fit with the same penalty say.
    standardize
        Whether the penalty is on the weights of standardised features; ``False`` takes features in
        their own units, as is right after a PCA: scaling its components would undo it.
    tolerance
        A gene is converged when the norm of its gradient is at most this share of its counts (how
        far, in standard deviations, the mean features that the scores predict still are from those
        that the counts have), and when its weights are surely within 1,000 times this share of
        their norm of the optimum: 1 % by default. It is a bound (gradient over penalty): weights
        end nearer, by 3 to a million times. Without a penalty there is none, and the gradient
        alone decides. Of pairs half of the counts are meant, and of a negative binomial as many
        as would tell a list as much.
    max_iterations
        Most iterations a gene, in each precision.
    max_memory
        Working memory in GiB, beside the features as given, copies of the sparse counts (up to
        three) and the result. Genes are fitted in blocks that fit, and features that do not fit
        are read whenever they are needed.
    dask
        Address of a scheduler of Dask, or its file, on whose workers blocks of 256 genes are
        fitted, each within ``max_memory``; in this process if ``None``, or where one block is all.
        Features and counts in memory travel to each worker; those that are read by rows or genes
        must be within reach of all.
    seed
        Of the draw of partners.
    verbose
        Whether to show progress, on stderr.

    Attributes
    ----------
    coef_
        Change of the score (natural log) per unit of a feature, ``[n_genes, n_features]``.
    centre_, scale_
        Mean, and standard deviation within sections (1 if not to standardise), of the features,
        ``[n_features]``.
    genes_
        Names of the genes: the columns of the counts, or their numbers.
    penalty_
        The penalty of each gene, ``[n_genes]``.
    dispersion_
        The dispersion of each gene, ``[n_genes]``; 0 but for the negative binomial.
    solution_
        Status, gradient, bounds and iterations of each gene.
    n_iter_
        Largest number of iterations.
    converged_
        Whether each gene met the tolerance, of gradient and of distance, ``[n_genes]``.

    See Also
    --------
    STRankRegressorCV : chooses the penalty by leaving sections out.

    Notes
    -----
    Features may be larger than memory: a memmap, or anything two-dimensional that gives rows for
    a slice (an HDF5 or zarr dataset, a dask array), the rows of a section together. A torch tensor
    on a GPU is worked on there. float32 features are multiplied in float32 and summed in float64.
    Features of any size, up to 1e290 or down to 1e-290, have the same scores: they are brought to
    about 1 by powers of two, which is exact.

    Of more features than spots the optimum lies in the span of the spots: the work is along as
    many axes as there are spots, and memory grows with features times spots (times the folds that
    choose a penalty), not with the square of the features.

    Scikit-learn's ``check_estimator`` passes, but for its ``check_regressor_multioutput``, which
    gives targets below 0; counts are not.

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
        self.penalty = penalty
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
    ) -> Self:
        """Fit every gene.

        Parameters
        ----------
        X
            Features, ``[n_spots, n_features]``.
        y
            Raw counts, ``[n_spots, n_genes]`` or ``[n_spots]``; sparse stays sparse.
        section
            Section label of each spot; one section if ``None``.
        offset
            Log library size of each spot; equal depth if ``None``.

        Raises
        ------
        ValueError
            For shapes that do not fit, negative counts, values that are not finite, an offset
            that is no logarithm, features beyond 1e±290 (1e±100 if not to standardise), and a
            ``max_memory`` that is too little for a single gene. Counts that are not whole numbers
            are a warning.
        """
        data = self._data(X, y, section, offset)
        self._had = given_of(section, offset)
        n_genes, penalty = data.counts.shape[1], np.asarray(self.penalty, dtype=np.float64)
        if penalty.shape not in ((), (n_genes,)):
            raise ValueError(
                f"penalty must be one value, or one for each of {n_genes} genes; got shape "
                f"{penalty.shape}"
            )
        penalty = np.broadcast_to(penalty, n_genes)
        with few_threads(len(data.offset), self.n_features_in_, n_genes):
            design = self._design(data)
            if self._seeks_dispersion:
                design = design.with_dispersion(by_moments(design, penalty))
            return self._keep(design, penalty, self._solve(design, penalty))

    def predict(self, X: ArrayLike) -> NDArray[np.float64] | pd.DataFrame | pd.Series:
        """Scores ``[n_spots, n_genes]`` (``[n_spots]`` if fitted so); 0 at the mean feature.

        A DataFrame of features gives a DataFrame of scores, with the names of spots and genes.

        Parameters
        ----------
        X
            Features as in `fit`, of any spots.

        Returns
        -------
        ndarray, DataFrame or Series
            A difference between two spots is a log fold change (natural log).
        """
        check_is_fitted(self)
        features = self._features(X, reset=False)
        rows = self._rows(features, (0, features.shape[0]))
        scores = rows.times(rows.of(0), self._weights(rows)).cpu().numpy()
        scores = scores[:, 0] if self._one_gene else scores
        if not isinstance(X, pd.DataFrame):
            return scores
        if self._one_gene:
            return pd.Series(scores, index=X.index, name=self.genes_[0])
        return pd.DataFrame(scores, index=X.index, columns=self.genes_)

    def score(
        self,
        X: ArrayLike,
        y: ArrayLike | sparse.spmatrix,
        *,
        section: ArrayLike | None = None,
        offset: ArrayLike | None = None,
    ) -> float:
        """Share of the list deviance explained, mean over the genes for which it is defined.

        1 is a perfect prediction of how counts are shared among the spots of a section, 0 is as
        good as sharing them by library size alone; below 0 is worse than that. Sections are taken
        together, as in `strank.metrics.deviance_explained` each has its own share.

        Parameters
        ----------
        X, y, section, offset
            As in `fit`, of any sections. Without the section or offset that `fit` had it warns:
            cross-validation of scikit-learn hands them on only with metadata routing.
        """
        check_is_fitted(self)
        data = self._data(X, y, section, offset, reset=False)
        self._warn_of_what_fit_had(given_of(section, offset))
        rows = self._rows(data.features, data.bounds)
        by_gene, n_genes = data.counts.tocsc(), len(self.coef_)
        gain, null = np.zeros((2, n_genes))
        for start in range(0, n_genes, _GENES):
            genes = slice(start, start + _GENES)
            counts = by_gene[:, genes].tocsr()
            weights = self._weights(rows, genes)
            for spots in map(rows.of, range(rows.n_sections)):
                scores = rows.times(spots, weights).cpu().numpy()
                depth = np.exp(data.offset[spots] - data.offset[spots].max())
                one = {"section": np.zeros(len(depth)), "library_size": depth}
                gain[genes] += list_gain(scores, counts[spots], **one)[0]
                null[genes] += null_deviance(counts[spots], depth)
        # Counts that are shared by library size leave nothing to explain.
        told = null > 1e-9
        return float(np.nanmean(gain[told] / null[told]))

    def to_pandas(self) -> pd.DataFrame:
        """Coefficients: a row a gene, a column a feature.

        Examples
        --------
        >>> X = pd.DataFrame({"nuclei": [0.0, 1, 2, 3], "pink": [1.0, 0, 1, 1]})
        >>> counts = pd.DataFrame({"ERBB2": [1, 2, 4, 8]})
        >>> STRankRegressor(penalty=1.0).fit(X, counts).to_pandas().round(2)
               nuclei  pink
        gene...
        ERBB2    0.62   0.1
        """
        check_is_fitted(self)
        features = getattr(self, "feature_names_in_", range(self.coef_.shape[1]))
        return pd.DataFrame(self.coef_, pd.Index(self.genes_, name="gene"), list(features))

    def __sklearn_tags__(self) -> Tags:
        """Tell that counts are not negative, and of one gene or of many."""
        tags = super().__sklearn_tags__()
        tags.target_tags.positive_only = True
        tags.target_tags.multi_output = True
        return tags

    def _warn_of_what_fit_had(self, given: tuple[str, ...]) -> None:
        absent = [name for name in getattr(self, "_had", ()) if name not in given]
        if absent:
            routing = ", ".join(f"{name}=True" for name in absent)
            warnings.warn(
                f"score without the {' and '.join(absent)} that fit had is of another question "
                "(all spots one section, or of equal depth): pass them. cross_val_score, "
                "cross_validate and GridSearchCV do so after "
                "sklearn.set_config(enable_metadata_routing=True), "
                f"`.set_fit_request({routing})` and `.set_score_request({routing})`",
                UserWarning,
                stacklevel=3,
            )

    def _rows(self, features: Any, bounds: tuple[int, ...]) -> Rows:
        """Features for predictions, scaled and centred, in blocks of an eighth of the memory."""
        block = max(1, int(self.max_memory * 2**30 / 8) // (16 * self.n_features_in_))
        device = features.device if isinstance(features, torch.Tensor) else None
        # By powers of two, which are exact.
        unit = np.ldexp(1.0, -np.frexp(self.scale_)[1])
        unit, centre = (torch.as_tensor(v, device=device) for v in (unit, unit * self.centre_))
        return Rows(features, bounds, unit=unit, centre=centre, block=block)

    def _weights(self, rows: Rows, genes: slice = slice(None)) -> Tensor:
        """Weights of such features, ``[n_features, n_genes]``."""
        weights = torch.as_tensor(self.coef_[genes].T.copy()).to(rows.device)
        return weights if rows.unit is None else weights / rows.unit[:, None]

    def _features(self, X: Any, *, reset: bool) -> Any:
        """Validate features; of what is read by rows, the values are checked when they are."""
        if not is_read_by_rows(X):
            X = np.asarray(X) if isinstance(X, torch.Tensor) else X
            return validate_data(self, X, reset=reset, dtype=_PRECISIONS)
        if reset:
            self.n_features_in_ = int(X.shape[1])
        elif X.shape[1] != self.n_features_in_:
            raise ValueError(
                f"X has {X.shape[1]} features, but {type(self).__name__} is expecting "
                f"{self.n_features_in_} features as input"
            )
        return X

    def _data(
        self, X: Any, y: Any, section: Any, offset: Any, group: Any = None, *, reset: bool = True
    ) -> Data:
        if y is None:
            raise ValueError(
                f"{type(self).__name__} requires y to be passed, but the target y is None"
            )
        features = self._features(X, reset=reset)
        counts = y
        if not is_read_by_genes(y):
            counts = check_array(
                y, accept_sparse="csr", dtype=_PRECISIONS, ensure_2d=False, input_name="y"
            )
        if (odd := no_counts(y, counts)) is not None:
            warnings.warn(
                f"y holds {odd}, which is no count: raw counts are expected, neither normalised "
                "nor logarithms; the depth of spots goes to `offset`",
                UserWarning,
                stacklevel=3,
            )
        if reset:
            self._one_gene = counts.ndim == 1
            names = y.columns if isinstance(y, pd.DataFrame) else range(counts.shape[-1])
            self.genes_ = np.asarray([getattr(y, "name", 0)] if self._one_gene else names)
        return gather(features, counts, section, offset, group)

    @property
    def _seeks_dispersion(self) -> bool:
        return self.objective == "nb" and self.dispersion is None

    def _design(self, data: Data) -> Design:
        design = Design(
            data,
            self.objective,
            self.n_partners,
            seed=self.seed,
            max_memory=self.max_memory,
            dask=self.dask,
            standardize=self.standardize,
        )
        return design if self.dispersion is None else design.with_dispersion(self.dispersion)

    def _solve(self, design: Design, penalty: NDArray[np.float64]) -> Solution:
        with progress("Genes", len(penalty), hidden=not self.verbose) as advance:
            return fit_genes(
                design,
                penalty,
                tolerance=self.tolerance,
                max_iterations=self.max_iterations,
                advance=advance,
            )

    def _keep(self, design: Design, penalty: NDArray[np.float64], solution: Solution) -> Self:
        geometry = design.geometry(None)
        own = (values / geometry.unit for values in (geometry.centre, geometry.scale))
        self.centre_, self.scale_ = (values.cpu().numpy() for values in own)
        self.solution_ = solution
        self.coef_ = solution.weights.T
        self.penalty_, self.dispersion_ = np.array(penalty), np.array(design.dispersion)
        self.n_iter_ = int(solution.iterations.max())
        self.converged_ = solution.converged
        return self


def given_of(section: Any, offset: Any) -> tuple[str, ...]:
    """Name what was given of spots."""
    given = {"section": section, "offset": offset}
    return tuple(name for name, values in given.items() if values is not None)
