"""Whether a gene is predicted at all, and how surely a mean is known."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.fft import irfft2, next_fast_len, rfft2
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist
from scipy.stats import false_discovery_control, norm, t

from strank.functional.groups import rows_of
from strank.metrics.correlation import unit_ranks
from strank.metrics.depth import check_draws, thinned_ranks

_Array = NDArray[np.float64]
_LEAST_P = 1e-3
# Genes at a time: several arrays of the grid are held for each.
_GENES = 64
# Correlation of neighbours, from which on a gene shows a pattern at all.
_LEAST_SHOWN = 0.05
# A pattern worth fewer spots is as wide as the tissue.
_LEAST_SPOTS = 6.0


class Intervals(NamedTuple):
    """Means and the ends of their 95 % intervals, ``[n_tables]`` each.

    Examples
    --------
    >>> import numpy as np
    >>> lead = Intervals(mean=np.array([0.2]), low=np.array([0.1]), high=np.array([0.3]))
    >>> lead.low > 0
    array([ True])
    """

    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


def mean_intervals(values: NDArray, *, patient: NDArray | None = None) -> Intervals:
    r"""Mean of tables of sections by genes, and its interval over patients, sections and genes.

    Every section weighs the same: the mean :math:`m` over sections of the means :math:`m_s` over
    genes. All genes of a section share its spots, and all sections a gene's nature, so both vary:

    .. math::
        m \pm \sqrt{t_{S - 1}^2 \hat\sigma_S^2 / S + t_{G - 1}^2 \hat\sigma_G^2 / G}

    The first part is the variance of the :math:`m_s`, what varies by section and gene together
    included; the second is that of genes alone. Each has its own quantile of Student's t (Cochran),
    so few sections give a wide interval: where sections vary more than genes, 1.6 times as wide as
    a bootstrap of both with five, 2.7 times with three, and with two it hardly says anything.
    Sections of a patient are alike: with two patients or more, :math:`S` is of patients, and
    where these have unequal numbers of sections their effective number.

    Simulated with 2 to 12 sections of 2 to 12 patients and 50 genes, where patients, sections,
    genes and noise vary by 0 to 10 times another, it covers 94.4 to 99.2 %, 96 % over the grid, and
    up to 99.7 % where patients have unequal numbers of sections. (The bootstrap: 76 % with three
    sections, 84 % with five.) With one section it is over genes only, with one patient over that
    patient's sections only. It does not know that models of different folds share training
    sections.

    Parameters
    ----------
    values
        ``[n_tables, n_sections, n_genes]``, of the same sections and genes; NaN where a gene has
        no value in a section.
    patient
        Of each section, ``[n_sections]``; if ``None`` each is a patient of its own.

    Returns
    -------
    Intervals
        NaN for a table without values.

    Examples
    --------
    >>> found = mean_intervals(np.array([[[0.2, 0.4], [0.2, np.nan]], [[0.5, 0.5], [0.5, 0.5]]]))
    >>> found.mean, found.low[1], found.high[1]
    (array([0.25, 0.5 ]), np.float64(0.5), np.float64(0.5))
    """
    known, of_section = np.isfinite(values), np.arange(values.shape[1])
    number = known.sum(2)
    sums = np.where(known, values, 0.0).sum(2)
    by_section = np.divide(sums, number, out=np.full(number.shape, np.nan), where=number > 0)
    n_sections = np.maximum((number > 0).sum(1), 1)
    mean = np.where(known.any((1, 2)), np.nansum(by_section, axis=1) / n_sections, np.nan)
    squared, _ = _squared_margin(by_section, mean, of_section)
    if patient is not None:
        of_patient = np.unique(patient, return_inverse=True)[1]
        of_patients, n_patients = _squared_margin(by_section, mean, of_patient)
        squared = np.where(n_patients > 1, of_patients, squared)
    counted = np.maximum(number, 1) * n_sections[:, None]
    part = np.where(known, (values - by_section[:, :, None]) / counted[:, :, None], 0.0)
    margin = np.sqrt(squared + _squared_margin_of_genes(part, known))
    # A single value does not say how it varies.
    margin[known.sum((1, 2)) < 2] = np.nan
    return Intervals(mean, mean - margin, mean + margin)


def _squared_margin(by_section: NDArray, mean: NDArray, group: NDArray) -> tuple[_Array, NDArray]:
    """Variance of the mean over groups of sections, times t squared; and the number of groups."""
    member = np.eye(group.max(initial=0) + 1)[group]
    has = np.isfinite(by_section)
    n = np.maximum(has.sum(1, keepdims=True), 1)
    weight, away = has @ member / n, np.where(has, by_section - mean[:, None], 0.0) @ member / n
    # The mean is of all groups: a group is nearer to it than to the truth.
    left = 1 - 2 * weight + (weight**2).sum(1, keepdims=True)
    variance = np.divide(away**2, left, out=np.zeros(away.shape), where=left > 1e-9).sum(1)
    freedom = 1 / np.maximum((weight**2).sum(1), 1e-9) - 1
    return variance * t.ppf(0.975, np.maximum(freedom, 1)) ** 2, (weight > 0).sum(1)


def _squared_margin_of_genes(part: NDArray, known: NDArray) -> _Array:
    """Variance of the mean over genes, of what is theirs in all sections, times t squared.

    ``part`` is what each value adds to the mean, ``[n_tables, n_sections, n_genes]``.
    """
    n_sections, n_genes = known.any(2).sum(1), known.any(1).sum(1)
    by_gene, of_gene = part.sum(1), np.maximum(known.sum(1), 1)
    rest = np.where(known, part - (by_gene / of_gene)[:, None], 0.0)
    # What differs between the sections of a gene is counted with the sections.
    spread = n_sections / np.maximum(n_sections - 1, 1) * (n_sections > 1)
    variance = (by_gene**2).sum(1) - spread * (rest**2).sum((1, 2))
    variance = np.maximum(variance, 0.0) * n_genes / np.maximum(n_genes - 1, 1)
    return np.asarray(variance * t.ppf(0.975, np.maximum(n_genes - 1, 1)) ** 2)


@dataclass(frozen=True)
class SpatialNull:
    """What unrelated maps of the same spots share by chance; of positions, for all genes."""

    positions: NDArray
    #: Where each spot lies on a grid as fine as the spots are: ``[n_spots, n_cells]``.
    place: sparse.csr_matrix
    #: Of the grid, with as much again, so that transforms do not wrap around.
    shape: tuple[int, int]
    #: Which shifts of the grid are of which length, in cells: ``[n_shifts, n_lengths]``.
    lengths: sparse.csr_matrix

    @classmethod
    def of(cls, positions: NDArray) -> Self:
        """Prepare for the spots of one section."""
        corner = positions - positions.min(0)
        # Where spots lie closer in pairs than elsewhere, no more cells than four a spot.
        width = max(_pitch(positions), float(np.sqrt(corner.max(0).prod() / len(corner))) / 2)
        rows, columns = np.rint(corner / (width or 1.0)).astype(np.int64).T
        shape = next_fast_len(2 * int(rows.max()) + 1), next_fast_len(2 * int(columns.max()) + 1)
        down, right = (np.minimum(np.arange(n), n - np.arange(n)) for n in shape)
        length = np.rint(np.hypot(down[:, None], right)).astype(np.int64).ravel()
        place = _one_hot(rows * shape[1] + columns, len(length))
        return cls(positions, place, shape, _one_hot(length, int(length.max()) + 1))

    @cached_property
    def basis(self) -> _Array:
        """Patterns beyond trends."""
        return moran_basis(self.positions)

    def p_values(
        self, scores: NDArray, targets: NDArray, *, n_draws: int = 999, rng: np.random.Generator
    ) -> _Array:
        """Chance of so high a correlation for maps without a relation, ``[n_genes]``; one-sided.

        Of unit ranks of scores and mean unit ranks of targets, ``[n_spots, n_genes]``. Neither maps
        that share a trend nor maps as smooth as these may reach it: the larger chance counts.
        """
        trend = self._chance_beyond_trends(scores, targets, n_draws, rng)
        return np.maximum(trend, self._chance_as_smooth(scores, targets))

    def _chance_beyond_trends(
        self, scores: NDArray, targets: NDArray, n_draws: int, rng: np.random.Generator
    ) -> _Array:
        """Against surrogates: coefficients in the basis of the same size, with random signs."""
        shared = (self.basis.T @ scores) * (self.basis.T @ targets)
        # All genes get the same signs: a gene's null does not depend on the other genes.
        signs = rng.integers(0, 2, size=(n_draws, len(shared))) * 2.0 - 1.0
        # Signs that are all alike give the observed value itself, but for rounding.
        observed = shared.sum(0)
        reached = (signs @ shared >= observed - 1e-12).sum(0)
        return np.where(np.isnan(observed), np.nan, (1 + reached) / (1 + n_draws))

    def _chance_as_smooth(self, scores: NDArray, targets: NDArray) -> _Array:
        """Against t, for as many spots as a correlation of maps as smooth is worth.

        Its variance is the sum over pairs of spots of what both maps have in common there.
        """
        targets = targets / np.sqrt((targets**2).sum(0))
        r, pairs = (scores * targets).sum(0), self._pairs(len(scores))
        variance = (self._products(scores) * self._products(targets) / pairs).sum(1)
        # Of n independent spots it is 1 / (n - 1), with n - 2 degrees of freedom.
        freedom = 1 / variance.clip(1 / max(len(scores) - 1, 1), 1) - 1
        freedom = np.maximum(freedom, 1e-6)
        return np.asarray(t.sf(r * np.sqrt(freedom / np.maximum(1 - r**2, 1e-12)), freedom))

    def independent_spots(self, targets: NDArray) -> _Array:
        """How many independent spots a gene's pattern is worth, ``[n_genes]``; NaN without one.

        Correlations of spots are relative to what those of neighbours say of a spot with itself,
        so that noise has no part.
        """
        n = len(targets)
        pairs = self._pairs(n)
        mean = n * self._products(targets / np.sqrt((targets**2).sum(0))) / pairs
        if mean.shape[1] < 3:
            return np.full(len(mean), np.nan)
        # A smooth pattern falls with the square of the distance.
        shown = mean[:, 1] + (mean[:, 1] - mean[:, 2]) / 3
        shown = np.where(mean[:, 1] > _LEAST_SHOWN, shown, np.nan)
        relative = mean / shown[:, None]
        relative[:, 0] = 1.0
        return np.where(np.isnan(shown), np.nan, 1 + n**2 / (relative**2 @ pairs))

    def _pairs(self, n: int) -> _Array:
        """How many pairs of spots there are of each distance, at least 1; ``[n_lengths]``."""
        return np.maximum(np.rint(self._products(np.ones((n, 1)))[0]), 1.0)

    def _products(self, values: NDArray) -> _Array:
        """Sum over pairs of spots of the product of their values, ``[n_genes, n_lengths]``."""
        found = []
        for start in range(0, values.shape[1], _GENES):
            block = values[:, start : start + _GENES].T
            on_grid = (block @ self.place).reshape(-1, *self.shape)
            shared = irfft2(np.abs(rfft2(on_grid)) ** 2, self.shape)
            found.append(shared.reshape(len(block), -1) @ self.lengths)
        return np.concatenate(found) if found else np.zeros((0, self.lengths.shape[1]))


def _one_hot(at: NDArray[np.int64], n: int) -> sparse.csr_matrix:
    return sparse.csr_matrix((np.ones(len(at)), (np.arange(len(at)), at)), shape=(len(at), n))


def _pitch(positions: NDArray) -> float:
    """Median distance between nearest neighbours; 0 of a single spot."""
    if len(positions) < 2:
        return 0.0
    return float(np.median(cKDTree(positions).query(positions, k=2)[0][:, 1]))


def moran_basis(positions: NDArray) -> _Array:
    """Patterns beyond trends, from coarse to fine: orthonormal columns, ``[n_spots, n_patterns]``.

    Moran's eigenvector maps: eigenvectors of the matrix of spatial weights, less what trends
    explain of it.
    """
    # Negative distance is the limit of exp(-d / rho) for a long rho: there is no scale to choose.
    # Weights of neighbours only, or of 1 / d, mix coarse patterns up: of unrelated fields smooth
    # over half a tissue, 21 % and 9 % come out significant at 5 %.
    distance = cdist(positions, positions)
    known = _trends(positions, distance)
    weights = known @ (known.T @ distance) - distance
    weights -= (weights @ known) @ known.T
    # No eigenvalue is negative, so this makes those of the trends, 0, the largest: they come last.
    weights += 2 * max(float(np.trace(weights)), 1.0) * known @ known.T
    return np.linalg.eigh(weights)[1][:, : len(distance) - known.shape[1]][:, ::-1]


def _trends(positions: NDArray, distance: NDArray) -> _Array:
    """Compute what falls from the centre to the edge, and a level: orthonormal columns."""
    radius, reach = np.linalg.norm(positions - positions.mean(0), axis=1), distance.mean(0)
    columns = [np.ones(len(distance)), radius, radius**2, reach, reach**2]
    if pitch := _pitch(positions):
        # Towards an edge, or a hole, there are fewer spots around.
        columns += [np.exp(-((distance / (k * pitch)) ** 2) / 2).sum(0) for k in (1, 2, 4)]
    scaled = np.stack(columns, axis=1)
    scaled[:, 1:] -= scaled[:, 1:].mean(0)
    scaled /= np.maximum(np.linalg.norm(scaled, axis=0), 1e-300)
    vectors, sizes, _ = np.linalg.svd(scaled, full_matrices=False)
    return np.asarray(vectors[:, sizes > 1e-6])


def p_values(
    scores: NDArray,
    counts: NDArray | sparse.csr_matrix,
    *,
    section: NDArray,
    library_size: NDArray,
    positions: NDArray,
    quantile: float = 0.1,
    n_draws: int = 999,
    seed: int = 0,
) -> _Array:
    r"""Chance of at least this depth-matched correlation for a gene that scores say nothing of.

    Neighbouring spots are alike, and two smooth maps agree by chance as two noises of far fewer
    spots would. So two nulls must be refused, and the larger p-value counts: that of maps with the
    autocorrelation of both (Clifford, Richardson and Hemon, 1989), and that of maps beyond a trend
    from the centre to the edge: Moran spectral randomisation (Wagner and Dray, 2015) of what is
    left without functions of the distance to the centre and of how crowded spots lie.

    Of unrelated simulated maps on 164 and 210 spots, smooth over none to all of the tissue, with
    trends from the centre or along a line that have up to four times their variance, at most
    6.1 % are significant at 5 % and 2.3 % at 1 %, on average over the grid 2.5 and 0.4 %; permuting
    spots calls up to 44 %. Not held: what both maps share along the distance to an edge, 6 to 19 %
    at 5 % where it has their own variance, and up to 37 % where it has four times as much.

    What cannot be seen: a pattern as wide as the tissue is often matched by chance. Of genes smooth
    over a quarter, half and the whole of the tissue, scores equal to the true rates are significant
    at 5 % for 93, 40 and 14 % (164 spots) or 100, 80 and 32 % (210 on a hexagonal grid). A warning
    says of how many genes the pattern is worth fewer than 6 independent spots. More sections help:
    see `combine_sections`.

    Parameters
    ----------
    scores, counts, section, library_size, quantile
        As in `depth_matched_spearman`.
    positions
        Centres of the spots in any unit, ``[n_spots, 2]``. Time grows with the third power of the
        number of spots of a section.
    n_draws
        Of the null; the correlation is the mean over ten thinnings.
    seed
        Of all draws.

    Returns
    -------
    NDArray
        ``[n_sections, n_genes]``, sections in sorted order, one-sided, at least ``1 / (1 +
        n_draws)``; NaN where the correlation is undefined.

    Raises
    ------
    ValueError
        For a quantile or number of draws out of range.

    Warns
    -----
    UserWarning
        If patterns are as wide as the tissue.

    Examples
    --------
    >>> rng, line = np.random.default_rng(0), np.c_[np.arange(100), np.zeros(100)]
    >>> counts = rng.poisson(1 + 9 * (rng.random((100, 1)) < 0.5)) * [[1, 0]]
    >>> spots = {"section": np.zeros(100), "library_size": np.full(100, 5000), "positions": line}
    >>> p_values(counts + rng.random((100, 2)), counts, **spots)
    array([[0.001,   nan]])
    """
    check_draws(quantile, n_draws)
    counts, rng, found, worth = sparse.csr_matrix(counts), np.random.default_rng(seed), [], []
    for rows in rows_of(section):
        thinned = thinned_ranks(counts[rows], library_size[rows], quantile=quantile, rng=rng)
        kept = rows[thinned.kept]
        null = SpatialNull.of(positions[kept])
        worth.append(null.independent_spots(thinned.ranks))
        ranks = unit_ranks(scores[kept])
        found.append(null.p_values(ranks, thinned.ranks, n_draws=n_draws, rng=rng))
    if told := as_wide_as_the_tissue(np.stack(worth)):
        warnings.warn(told, UserWarning, stacklevel=2)
    return np.stack(found)


def as_wide_as_the_tissue(independent_spots: NDArray) -> str:
    """Say of how many genes and sections p-values can hardly be small; nothing of none."""
    wide = int((independent_spots < _LEAST_SPOTS).sum())
    if not wide:
        return ""
    return (
        f"p-values: {wide} of {np.size(independent_spots)} patterns of genes in sections are as "
        f"wide as the tissue, worth fewer than {_LEAST_SPOTS:g} independent spots: even true rates "
        "are often not significant there"
    )


def combine_sections(p: NDArray) -> _Array:
    """Combine the p-values of sections by Stouffer's method; NaN does not count.

    Parameters
    ----------
    p
        ``[n_sections, ...]``; taken as between 0.001 and 0.999, so that a 1, which a finite number
        of draws can give, does not outweigh the smallest.

    Returns
    -------
    NDArray
        ``[...]``; NaN where no section has one.

    Examples
    --------
    >>> combine_sections(np.array([[0.01, 0.5, np.nan], [0.02, 0.5, np.nan]])).round(4)
    array([0.001, 0.5  ,   nan])
    """
    # As scipy.stats.combine_pvalues, which takes minutes for a table with NaN.
    scores, known = norm.isf(p.clip(_LEAST_P, 1 - _LEAST_P)), np.isfinite(p).sum(0)
    total = np.where(known > 0, np.nansum(scores, axis=0), np.nan)
    return np.asarray(norm.sf(total / np.sqrt(np.maximum(known, 1))))


def false_discovery_rate(p: NDArray) -> _Array:
    """Adjust p-values of many genes (Benjamini and Hochberg); NaN stays NaN and does not count.

    Parameters
    ----------
    p
        ``[n_genes]``.

    Returns
    -------
    NDArray
        ``[n_genes]``; calling a gene predicted below 0.05 is wrong of 5 % of those called.

    Examples
    --------
    >>> false_discovery_rate(np.array([0.01, np.nan, 0.02, 0.6]))
    array([0.03,  nan, 0.03, 0.6 ])
    """
    adjusted, known = np.full(np.shape(p), np.nan), np.isfinite(p)
    adjusted[known] = false_discovery_control(p[known]) if known.any() else np.nan
    return adjusted
