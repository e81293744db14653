r"""Held-out list likelihood of scores: arrays in, ``[n_sections, n_genes]`` out.

The list loss of a section is :math:`L(r) = T \log \sum_i l_i e^{r_i} - \sum_i c_i r_i`, up to a
constant.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.special import logsumexp, rel_entr, softmax

from strank.functional.groups import rows_of

_STEPS = 100

# In standard deviations of a gene's scores, either way, for counts that ask for an infinite slope.
_LONGEST = 15.0

# The largest of a slope that is told: a slope of 1 is two of it from 0.
_STANDARD_ERROR = 0.5


def deviance_explained(
    scores: NDArray,
    counts: NDArray | sparse.csr_matrix,
    *,
    section: NDArray,
    library_size: NDArray,
    slope: NDArray | None = None,
) -> NDArray[np.float64]:
    r"""Share of the list deviance that score differences explain, per section and gene.

    .. math:: 1 - \frac{L(r) - L^*}{L(0) - L^*}

    with the loss of the scores, of no scores (library size alone), and of the shares as they were
    observed. It measures whether log fold changes are right, size included: 1 is perfect, 0 no
    model at all, below 0 worse than none. Where there is no signal, the gain of any function of
    depth over library size alone, `list_gain`, is at most 0 in expectation.

    What can fool it: noise. Counts of a sparse gene are mostly noise, so even the truth explains
    little; and a few spots with many counts weigh most.

    Parameters
    ----------
    scores, counts, section, library_size
        As in `spearman`; the scores are log rates (natural log) up to a level.
    slope
        Factor of each gene's scores, ``[n_genes]``, fitted on **training** sections: for scores
        that are no log rates.

    Returns
    -------
    NDArray
        ``[n_sections, n_genes]``, sections in sorted order; NaN where counts are shared exactly by
        library size, or there are none.

    Examples
    --------
    >>> counts, spots = np.array([[1], [3]]), {"section": np.zeros(2), "library_size": np.ones(2)}
    >>> deviance_explained(np.log(counts), counts, **spots).round(6)
    array([[1.]])
    >>> deviance_explained(np.zeros((2, 1)), counts, **spots)
    array([[0.]])
    """
    gain = list_gain(scores, counts, section=section, library_size=library_size, slope=slope)
    counts = sparse.csr_matrix(counts)
    null = np.stack([null_deviance(counts[r], library_size[r]) for r in rows_of(section)])
    totals = np.stack([counts[r].sum(0).A1 for r in rows_of(section)])
    # What rounding leaves of terms that cancel grows with the counts.
    least = np.maximum(1e-9, 16 * np.finfo(np.float64).eps * totals)
    return np.divide(gain, null, out=np.full(gain.shape, np.nan), where=null > least)


def list_gain(
    scores: NDArray,
    counts: NDArray | sparse.csr_matrix,
    *,
    section: NDArray,
    library_size: NDArray,
    slope: NDArray | None = None,
) -> NDArray[np.float64]:
    r"""List log-likelihood above that of library size alone, :math:`L(0) - L(r)`, in nats.

    Parameters
    ----------
    scores, counts, section, library_size, slope
        As in `deviance_explained`.

    Returns
    -------
    NDArray
        ``[n_sections, n_genes]``, sections in sorted order; 0 for a gene without counts.

    Examples
    --------
    >>> counts, spots = np.array([[1], [3]]), {"section": np.zeros(2), "library_size": np.ones(2)}
    >>> list_gain(np.log(counts), counts, **spots).round(4)
    array([[0.5232]])
    """
    counts, found = sparse.csr_matrix(counts), []
    for rows in rows_of(section):
        shifted, offset, observed = _centred(scores[rows], counts[rows], library_size[rows])
        shifted *= 1.0 if slope is None else slope
        rise = logsumexp(shifted + offset, axis=0) - logsumexp(offset)
        found.append(observed.multiply(shifted).sum(0).A1 - observed.sum(0).A1 * rise)
    return np.stack(found)


def calibration_slope(
    scores: NDArray,
    counts: NDArray | sparse.csr_matrix,
    *,
    section: NDArray,
    library_size: NDArray,
    slope: NDArray | None = None,
) -> NDArray[np.float64]:
    r"""Slope of the counts on score differences, per section and gene: 1 is right.

    .. math:: \arg\min_b L(b r)

    Below 1 the predicted log fold changes are too large, above 1 too small, below 0 of the wrong
    sign; where the scores have nothing to do with the counts it is about 0.

    What can fool it: noise beyond Poisson, which makes the slope of a sparse gene, or of scores
    that hardly vary, less sure than it seems; and it says nothing of what the scores miss.

    Parameters
    ----------
    scores, counts, section, library_size, slope
        As in `deviance_explained`.

    Returns
    -------
    NDArray
        ``[n_sections, n_genes]``, sections in sorted order; NaN where so few counts cannot tell a
        slope of 1 from 0 by two standard errors (none at all, or scores that hardly vary), and
        where they ask for a slope without end.

    Examples
    --------
    >>> counts, spots = np.array([[1], [3]]), {"section": np.zeros(2), "library_size": np.ones(2)}
    >>> calibration_slope(2 * np.log(counts), counts, **spots).round(6)
    array([[0.5]])
    """
    counts, found = sparse.csr_matrix(counts), []
    for rows in rows_of(section):
        own = np.asarray(scores[rows], dtype=np.float64) * (1.0 if slope is None else slope)
        spots = {"section": np.zeros(len(own)), "library_size": library_size[rows]}
        best = score_slope(own, counts[rows], **spots)
        known = slope_information(own, counts[rows], **spots) >= 1 / _STANDARD_ERROR**2
        values = _centred(own, counts[rows], library_size[rows])[0]
        known &= np.abs(best) * values.std(0) < _LONGEST * (1 - 1e-9)
        found.append(np.where(known, best, np.nan))
    return np.stack(found)


def slope_error(
    slope: NDArray,
    scores: NDArray,
    counts: NDArray | sparse.csr_matrix,
    *,
    section: NDArray,
    library_size: NDArray,
) -> NDArray[np.float64]:
    r"""Find the standard error of the slope of scores, per section and gene.

    .. math:: \frac{\sqrt{\sum_i (c_i - T p_i)^2 (r_i - \bar r)^2}}{T \sum_i p_i (r_i - \bar r)^2}

    with the shares :math:`p` at the slope and :math:`\bar r = \sum_i p_i r_i`: Huber's and White's
    sandwich, so counts may vary more than Poisson's. It takes spots for independent.

    Parameters
    ----------
    slope
        Of `calibration_slope` for the same arguments, ``[n_sections, n_genes]``.
    scores, counts, section, library_size
        As there.

    Returns
    -------
    NDArray
        ``[n_sections, n_genes]``; NaN where the slope is.

    Examples
    --------
    >>> counts, spots = np.array([[1], [3]]), {"section": np.zeros(2), "library_size": np.ones(2)}
    >>> slope_error(np.array([[0.5]]), 2 * np.log(counts), counts, **spots)
    array([[0.]])
    """
    counts, found = sparse.csr_matrix(counts), []
    for own, rows in zip(np.atleast_2d(slope), rows_of(section), strict=True):
        values, offset, observed = _centred(scores[rows], counts[rows], library_size[rows])
        share = softmax(np.nan_to_num(own) * values + offset, axis=0)
        about = values - (share * values).sum(0)
        total = observed.sum(0).A1
        miss = np.sqrt(((observed.toarray() - total * share) ** 2 * about**2).sum(0))
        curvature = total * (share * about**2).sum(0)
        error = np.divide(miss, curvature, out=np.full_like(miss, np.nan), where=curvature > 0)
        found.append(np.where(np.isnan(own), np.nan, error))
    return np.stack(found)


def slope_information(
    scores: NDArray,
    counts: NDArray | sparse.csr_matrix,
    *,
    section: NDArray,
    library_size: NDArray,
) -> NDArray[np.float64]:
    """Fisher's information about the slope of each gene, ``[n_genes]``, where there is no signal.

    It knows nothing of where the counts lie.
    """
    counts = sparse.csr_matrix(counts)
    parts = [_centred(scores[r], counts[r], library_size[r]) for r in rows_of(section)]
    none = np.zeros(scores.shape[1])
    return np.sum([_newton(none, *part)[1] for part in parts], axis=0)


def score_slope(
    scores: NDArray,
    counts: NDArray | sparse.csr_matrix,
    *,
    section: NDArray,
    library_size: NDArray,
) -> NDArray[np.float64]:
    """Slope of each gene, ``[n_genes]``, that turns scores into log rates of highest likelihood.

    0 for scores that do not vary within sections and for genes without counts; at most 15 standard
    deviations either way.
    """
    # Newton's method, kept between bounds, on L(b r), convex in b, for all genes at once.
    counts = sparse.csr_matrix(counts)
    parts = [_centred(scores[r], counts[r], library_size[r]) for r in rows_of(section)]
    total = sum((values**2).sum(0) for values, _, _ in parts)
    scale = np.sqrt(total / max(sum(len(values) for values, _, _ in parts), 1))
    inverse = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0)
    for values, _, _ in parts:
        values *= inverse
    slope = np.zeros(scores.shape[1])
    low, high = np.full_like(slope, -_LONGEST), np.full_like(slope, _LONGEST)
    for _ in range(_STEPS):
        gradient, curvature = (
            sum(v) for v in zip(*(_newton(slope, *p) for p in parts), strict=True)
        )
        low, high = np.where(gradient < 0, slope, low), np.where(gradient > 0, slope, high)
        step = np.where(gradient == 0, 0.0, np.inf)
        np.divide(-gradient, curvature, out=step, where=curvature > 0)
        # One outlying spot makes the loss bend so sharply that Newton's steps run to and fro.
        inside = (slope + step >= low) & (slope + step <= high)
        step = np.where(inside | (gradient == 0), step, (low + high) / 2 - slope)
        slope = slope + step
        if np.abs(step).max(initial=0) < 1e-10:
            break
    return slope * inverse


def _newton(
    slope: NDArray, scores: NDArray, offset: NDArray, counts: sparse.csr_matrix
) -> tuple[NDArray, NDArray]:
    """Gradient and curvature of the loss of a section."""
    logits = slope * scores + offset
    share = np.exp(logits - logits.max(0))
    share /= share.sum(0)
    total, mean = counts.sum(0).A1, (share * scores).sum(0)
    spread = (share * (scores - mean) ** 2).sum(0)
    return total * mean - counts.multiply(scores).sum(0).A1, total * spread


def _centred(
    scores: NDArray, counts: sparse.csr_matrix, library_size: NDArray
) -> tuple[NDArray[np.float64], NDArray, sparse.csr_matrix]:
    """Scores about their mean, log depth and counts of the spots that have any count."""
    depth = np.asarray(library_size, dtype=np.float64)
    if not depth.any():
        depth = np.ones_like(depth)
    seen = depth > 0
    values = np.asarray(scores, dtype=np.float64)[seen]
    # About their mean, so that two large terms do not lose the digits of their difference; and
    # first about one of them, so that nothing is left of a constant.
    values = values - values[0]
    observed = sparse.csr_matrix(counts[seen], dtype=np.float64)
    return values - values.mean(0), np.log(depth[seen])[:, None], observed


def null_deviance(counts: sparse.csr_matrix, library_size: NDArray) -> NDArray[np.float64]:
    r""":math:`L(0) - L^*` of a section: half the deviance of library size alone."""
    stored = sparse.coo_matrix(counts, dtype=np.float64)
    total = stored.sum(0).A1
    depth = np.asarray(library_size, dtype=np.float64)
    share = depth / max(depth.sum(), 1)
    # Term by term, so that nothing is left where all are as expected.
    stored.data = rel_entr(stored.data, total[stored.col] * share[stored.row])
    return stored.sum(0).A1
