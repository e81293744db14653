r"""How wrong scores may be: what the counts leave open, and what differs between groups.

The weights of a gene, along the main axes of the features, are taken for normal. They lie around
the fitted ones as far as the counts leave it open (Laplace's approximation at the optimum, with the
diagonal of the Hessian, and counts that vary as much more than Poisson's as they do); and those of
a group that was not seen lie around these as far as those of the groups left out did. In plain
words, for one gene and axis ``k``::

    within[k] = dispersion / (information[k] + penalty)
    between[k] = size_of_gene * size_of_axis[k]

where the sizes are those of highest likelihood, given the weights that each group left out asks
for, and how unsure these are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import linalg
from scipy.special import logsumexp, softmax
from torch import Tensor

from strank.cohort.training_set import TrainingData
from strank.functional.groups import deal, rows_of

_Array = NDArray[np.float64]

# Axes that are looked at one by one: those of so much of the variance, but no more than so many,
# and for each so many spots of the smallest group. What lies along all others is taken together.
_SHARE, _MOST_AXES, _SPOTS_AN_AXIS = 0.99, 64, 4
# Genes at a time: counts of a section are dense for so many.
_GENES = 256
_FOLDS, _ROUNDS = 10, 30
# Of the counts, what parameters leave at least to tell their dispersion.
_LEAST_LEFT = 0.2
# Of changes between regions: draws of the weights; and of the spots of a region, as many as have
# so many scores, but at least and at most so many.
_DRAWS, _VALUES, _SPOTS = 400, 1_000_000, (200, 2000)
# Spots at a time, whose features are copied.
_ROWS = 2048
# What the common size weighs beside a gene's and an axis' own, in values.
_COMMON = 10.0


@dataclass(frozen=True)
class Uncertainty:
    """Variances of the weights along some axes, on which features within sections have length 1.

    The last row is of what lies along none of them, in units of standardised features.
    """

    axes: Tensor  #: of the features, ``[n_features, n_axes]``
    lengths: Tensor  #: standardised features of a place on the axes, ``[n_axes, n_axes]``
    inverse: Tensor  #: of the scale of the features, ``[n_features]``; 0 where they do not vary
    within: Tensor  #: what the counts leave open, ``[n_axes + 1, n_genes]``
    between: Tensor  #: of groups that were not seen, ``[n_axes + 1, n_genes]``; NaN if not known

    @property
    def variance(self) -> NDArray[np.float32]:
        """Of a weight for a spot of another group, ``[n_genes, n_axes + 1]``."""
        return np.asarray((self.within + self.between.nan_to_num(0)).T.numpy())

    def along(self, features: NDArray) -> NDArray[np.float32]:
        """Places of features along the axes, and how far they are from all of these.

        Features are about what they are compared with; ``[n_spots, n_axes + 1]``.
        """
        values = torch.as_tensor(features, dtype=torch.float32)
        places = values @ self.axes
        near = (places @ self.lengths.T).square().sum(1, keepdim=True)
        far = ((values * self.inverse).square().sum(1, keepdim=True) - near).clamp(min=0).sqrt()
        return np.asarray(torch.cat([places, far], 1).numpy())

    def within_sections(self, features: NDArray, section: NDArray) -> NDArray[np.float32]:
        """Places of features about the mean of their section, ``[n_spots, n_axes + 1]``."""
        places = np.empty((len(features), len(self.within)), np.float32)
        for rows in rows_of(section):
            mean = features[rows].mean(0, dtype=np.float64).astype(np.float32)
            for part in np.array_split(rows, 1 + len(rows) // _ROWS):
                places[part] = self.along(features[part] - mean)
        return places


@dataclass(frozen=True)
class Fitted:
    """A fit, and what it is without a group."""

    weight: _Array  #: of features as they are, ``[n_features, n_genes]``
    scale: _Array  #: of the features, ``[n_features]``
    penalty: _Array  #: in counts, on weights of standardised features, ``[n_genes]``
    #: weights of a fit to some spots, given as a mask
    refit: Callable[[NDArray[np.bool_]], _Array]


def fit_uncertainty(data: TrainingData, fitted: Fitted) -> Uncertainty:
    """Learn how unsure the weights are; what differs between groups, if there are two or more."""
    inverse = np.where(_varies(data), 1 / fitted.scale, 0.0)
    axes, variances, rest = _main_axes(data, inverse)
    ridge = np.maximum(fitted.penalty, 1e-9) / variances[:, None]
    here = _sums(data, axes, lambda _: fitted.weight, np.zeros(len(data.section), dtype=int))
    dispersion = here.dispersion
    within = dispersion / (here.information.sum(0) + ridge)
    between, turn = np.full_like(within, np.nan), np.eye(len(variances))
    if len(here.total) > 1:
        fold = deal(data.group, _FOLDS)
        left_out = _sums(data, axes, lambda f: fitted.refit(fold != f), fold)
        wanted, unsure = left_out.step, dispersion * left_out.chance + within
        turn = _turn(wanted, unsure)
        axes, wanted = axes @ turn, np.einsum("kj,pkg->pjg", turn, wanted)
        unsure, within = (np.einsum("kj,...kg->...jg", turn**2, v) for v in (unsure, within))
        of_gene, of_axis = _sizes(wanted, unsure)
        between = of_gene * of_axis[:, None]
    # Along all other axes, in their own units, groups differ as they do along these.
    last = dispersion / (here.total.sum(0) * rest + np.maximum(fitted.penalty, 1e-9))
    within = np.vstack([within, last])
    between = np.vstack([between, between.mean(0) / variances.mean()])
    lengths = np.sqrt(variances)[:, None] * turn
    # What is saved must lie in one piece.
    parts = (axes, lengths, inverse, within, between)
    values = (np.ascontiguousarray(v, dtype=np.float32) for v in parts)
    return Uncertainty(*map(torch.as_tensor, values))


def _main_axes(data: TrainingData, inverse: _Array) -> tuple[_Array, _Array, float]:
    """Find main axes of the standardised features within sections, and the variances along them.

    The axes give places of variance 1, ``[n_features, n_axes]``; also the mean variance along the
    others.
    """
    covariance = np.zeros((len(inverse), len(inverse)))
    for rows in rows_of(data.section):
        mean = sum(part.sum(0) for _, part in _blocks(data, rows, inverse)) / len(rows)
        for _, part in _blocks(data, rows, inverse):
            part -= mean
            covariance += part.T @ part / len(data.section)
    variances, axes = linalg.eigh(covariance)
    variances, axes = variances[::-1], axes[:, ::-1]
    variances = np.maximum(variances, max(1e-9 * variances[0], 1e-9))
    fewest = min(len(rows) for rows in rows_of(data.group))
    n_axes = 1 + int(np.searchsorted(np.cumsum(variances), _SHARE * variances.sum()))
    n_axes = max(1, min(n_axes, _MOST_AXES, len(inverse), fewest // _SPOTS_AN_AXIS))
    rest, variances = variances[n_axes:], variances[:n_axes]
    scaled = axes[:, :n_axes] / np.sqrt(variances) * inverse[:, None]
    return scaled, variances, float(rest.mean()) if len(rest) else 0.0


def _varies(data: TrainingData) -> NDArray[np.bool_]:
    """Tell which features have more than one value."""
    low, high = np.inf, -np.inf
    for _, part in _blocks(data, np.arange(len(data.section))):
        low, high = np.minimum(low, part.min(0)), np.maximum(high, part.max(0))
    return np.asarray(high > low)


def _blocks(
    data: TrainingData, rows: NDArray, times: NDArray | float = 1.0
) -> Iterator[tuple[slice, _Array]]:
    """Yield features of some rows, in float64, times something; and which of the rows they are."""
    for start in range(0, len(rows), _ROWS):
        part = slice(start, start + _ROWS)
        yield part, data.features[rows[part]] * np.asarray(times, np.float64)


@dataclass(frozen=True)
class _Sums:
    """What the counts of each group tell of scores that a fit gave them; first axis groups."""

    residual: _Array  #: places summed over counts less those expected, ``[, n_axes, n_genes]``
    information: _Array  #: diagonal of the Hessian, ``[, n_axes, n_genes]``
    spread: _Array  #: covariance of places, weighted by depth, ``[, n_axes, n_axes]``
    miss: _Array  #: squares of counts less those expected, summed, ``[, n_genes]``
    heavy: _Array  #: squares of those expected, summed, ``[, n_genes]``
    total: _Array  #: counts, ``[, n_genes]``
    n_sections: NDArray[np.int64]

    @property
    def _inverse(self) -> _Array:
        return np.asarray(np.linalg.pinv(self.spread, hermitian=True), dtype=np.float64)

    @property
    def step(self) -> _Array:
        """Newton's step to what each group by itself asks for, ``[, n_axes, n_genes]``."""
        return np.asarray(self._inverse @ self.residual / np.maximum(self.total, 1)[:, None])

    @property
    def chance(self) -> _Array:
        """Variance of that step by Poisson's law, as a number where there are no counts."""
        unsure = self._inverse.diagonal(axis1=1, axis2=2)[:, :, None]
        return np.asarray(unsure / np.maximum(self.total, 1e-9)[:, None])

    @property
    def dispersion(self) -> _Array:
        """Variance over that of Poisson's law, after each group's own step; at least 1."""
        # As a weighted fit would: what a parameter explains, and what it takes of the noise.
        each = self.heavy / np.maximum(self.total, 1e-9)
        explained = each * (self.residual * self.step).sum(1)
        lost = each * (self.n_sections + self.residual.shape[1])[:, None]
        left = np.maximum((self.total - lost).sum(0), _LEAST_LEFT * self.total.sum(0))
        return np.maximum((self.miss - explained).sum(0) / np.maximum(left, 1e-9), 1.0)


def _sums(
    data: TrainingData, axes: _Array, weights: Callable[[int], _Array], which: NDArray
) -> _Sums:
    """Sum up the spots of each group; ``which`` of the weights score a spot, ``[n_spots]``."""
    groups, n_axes, n_genes = rows_of(data.group), axes.shape[1], data.counts.shape[1]
    residual, information = np.zeros((2, len(groups), n_axes, n_genes))
    missed, heavy, total = np.zeros((3, len(groups), n_genes))
    spread = np.zeros((len(groups), n_axes, n_axes))
    n_sections = np.zeros(len(groups), dtype=int)
    # Only one of the weights at a time is there.
    order = np.argsort([which[members[0]] for members in groups], kind="stable")
    known, weight = -1, np.empty(0)
    for group in order.tolist():
        members = groups[group]
        if known != which[members[0]]:
            known = int(which[members[0]])
            weight = weights(known)
        for part in rows_of(data.section[members]):
            rows = members[part]
            places = _times(data, rows, axes)
            depth = data.library_size[rows] / data.library_size[rows].sum()
            places -= depth @ places
            counts = data.counts[rows]
            for genes in (slice(g, g + _GENES) for g in range(0, n_genes, _GENES)):
                observed = counts[:, genes].toarray().astype(np.float64)
                share = _times(data, rows, weight[:, genes]) + np.log(depth)[:, None]
                share = np.exp(share - share.max(0))
                share /= share.sum(0)
                n, mean = observed.sum(0), places.T @ share
                miss = observed - n * share
                residual[group, :, genes] += places.T @ miss
                information[group, :, genes] += n * ((places**2).T @ share - mean**2)
                missed[group, genes] += (miss**2).sum(0)
                heavy[group, genes] += ((n * share) ** 2).sum(0)
                total[group, genes] += n
            spread[group] += counts.sum() * (places.T * depth) @ places
            n_sections[group] += 1
    spread /= np.maximum(total.sum(1), 1)[:, None, None]
    return _Sums(residual, information, spread, missed, heavy, total, n_sections)


def _times(data: TrainingData, rows: NDArray, weights: _Array) -> _Array:
    """Product of the features of some rows with ``[n_features, n]``."""
    product = np.empty((len(rows), weights.shape[1]))
    for part, features in _blocks(data, rows):
        np.matmul(features, weights, out=product[part])
    return product


def _turn(wanted: _Array, unsure: _Array) -> _Array:
    """Turn axes to those along which groups differ most, ``[n_axes, n_axes]``."""
    flat, of_gene = np.ones((wanted.shape[1], 1)), np.ones(wanted.shape[2])
    for _ in range(_ROUNDS):
        of_gene = _scored(wanted, unsure, flat, of_gene, (0, 1))
    # A gene weighs as much as it tells of differences between groups, whatever their size.
    weight = (of_gene / (of_gene + unsure.mean(1))) ** 2 / of_gene
    excess = np.einsum("pkg,pg,pjg->kj", wanted, weight, wanted)
    excess -= np.diag(np.einsum("pkg,pg->k", unsure, weight))
    return np.asarray(linalg.eigh(excess)[1][:, ::-1])


def _sizes(wanted: _Array, unsure: _Array) -> tuple[_Array, _Array]:
    """Find sizes of genes and axes whose products are the likeliest variances of what is wanted.

    By Fisher's scoring; ``unsure`` is the variance of what is wanted beside that. The common size
    of all genes weighs as much as some values of each, so that a gene with few counts has it; that
    of axes alike.
    """
    of_gene, of_axis = np.ones(wanted.shape[2]), np.ones(wanted.shape[1])
    for _ in range(_ROUNDS):
        of_gene = _scored(wanted, unsure, of_axis[:, None], of_gene, (0, 1))
        of_axis = _scored(wanted, unsure, of_gene, of_axis[:, None], (0, 2))
        of_axis /= max(of_axis.mean(), 1e-300)
    # Student's variance: so many values tell the size of a gene.
    share = of_axis[:, None] * of_gene / (of_axis[:, None] * of_gene + unsure)
    values = (share**2).sum((0, 1)) + _COMMON
    return of_gene * values / (values - 2), of_axis


def _scored(
    wanted: _Array, unsure: _Array, other: _Array, now: _Array, over: tuple[int, int]
) -> _Array:
    """Take a step of Fisher's scoring from the sizes ``now``; each is drawn to the common one."""
    share = other / (other * now + unsure)
    own = (share**2 * (wanted**2 - unsure) / np.maximum(other, 1e-300)).sum(over)
    known = (share**2).sum(over)
    common = max(own.sum() / max(known.sum(), 1e-300), 1e-9)
    # In values that would tell as much if nothing but groups made them differ.
    values = known * now.ravel() ** 2 + 1e-300
    own = np.maximum(own / np.maximum(known, 1e-300), 0)
    return (values * own + _COMMON * common) / (values + _COMMON)


def change_interval(
    scores: _Array, places: NDArray, variance: NDArray, regions: Sequence[NDArray], *, seed: int
) -> tuple[_Array, _Array, _Array]:
    """Find the standard error, and 90 % interval, of a log ratio of mean rates of two regions.

    Weights are drawn from what they may be, since rates are no sums of them. ``places`` are those
    of spots along the axes, ``variance`` that of weights, ``regions`` masks; each ``[n_genes]``.
    """
    rng, n_genes = np.random.default_rng(seed), scores.shape[1]
    most = int(np.clip(_VALUES / max(n_genes, 1), *_SPOTS))
    drawn = [_some(np.flatnonzero(region), most, rng) for region in regions]
    # About the means of all spots, which decide more than how spots lie about them.
    about = [
        places[r, :-1] - places[r, :-1].mean(0) + places[region, :-1].mean(0)
        for r, region in zip(drawn, regions, strict=True)
    ]
    parts = []
    for genes in (slice(start, start + _GENES) for start in range(0, n_genes, _GENES)):
        spots = [(scores[r, genes], a) for r, a in zip(drawn, about, strict=True)]
        moved = _moved(spots, np.sqrt(variance[genes, :-1].T), rng)
        # What lies along no axis is of any direction: it adds up as chance does.
        shares = (softmax(scores[region, genes], axis=0) ** 2 for region in regions)
        far = (places[region, -1] ** 2 for region in regions)
        rest = variance[genes, -1] * sum(d @ share for share, d in zip(shares, far, strict=True))
        moved += np.sqrt(rest) * rng.normal(size=moved.shape)
        parts.append(np.vstack([moved.std(0), np.quantile(moved, (0.05, 0.95), axis=0)]))
    error, low, high = np.hstack(parts) if parts else np.empty((3, 0))
    return error, low, high


def _moved(
    spots: Sequence[tuple[_Array, NDArray]], size: NDArray, rng: np.random.Generator
) -> _Array:
    """Draw by how much the log ratio of two regions moves, ``[n_draws, n_genes]``."""
    told = np.empty((_DRAWS + 1, size.shape[1]))
    for number in range(_DRAWS + 1):
        # Of the first, nothing is added.
        weights = size * rng.normal(size=size.shape) * (number > 0)
        first, second = (logsumexp(scores + places @ weights, axis=0) for scores, places in spots)
        told[number] = first - second
    return told[1:] - told[0]


def _some(rows: NDArray, most: int, rng: np.random.Generator) -> NDArray:
    """Take no more spots than tell of a region's mean."""
    return rng.choice(rows, most, replace=False) if len(rows) > most else rows
