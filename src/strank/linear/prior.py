r"""A prior of the weights that genes share, so that sparse genes borrow from abundant ones.

Genes follow few programs (epithelium, stroma, immune cells), so weights of one gene tell where
those of another are to be expected. Their second moment over genes, estimated by empirical Bayes
(Efron and Morris, JASA 68, 1973), is the covariance :math:`\Sigma` of a Gaussian prior: the penalty
becomes :math:`\tfrac{\lambda}{2} w^\top \Sigma^{-1} w`. A gene may refuse it: what has the higher
likelihood on held-out sections, with :math:`\Sigma` from the training sections alone, wins.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import uniform_filter1d
from torch import Tensor

from strank.linear.design import Block, Design
from strank.linear.penalty import PenaltyChoice, best_of, choose_penalty
from strank.linear.solver import descend

# Fewer genes have too little in common to estimate a covariance from.
_FEWEST_GENES = 15
# The part of the prior that expects nothing, and what keeps it from ruling directions out.
_IDENTITY = 0.2
# Genes of about the same counts, and what their mean held-out loss weighs beside a gene's own.
_NEIGHBOURS, _WEIGHT = 50, 3.0
_TOLERANCE, _ITERATIONS = 1e-4, 500


def borrow(
    design: Design, penalties: ArrayLike, *, advance: Callable[[int], object] | None = None
) -> tuple[Design, PenaltyChoice, NDArray[np.bool_]]:
    """Estimate the prior, and choose prior and penalty of each gene on what is left out.

    Returns the design with the prior, the penalties of all genes (``held_out`` has those without
    the prior, then those with it), and which genes borrow.
    """
    if design.n_genes < _FEWEST_GENES:
        raise ValueError(f"borrow needs at least {_FEWEST_GENES} genes; got {design.n_genes}")
    choose = partial(pooled_choice, counts=design.gene_counts)
    alone = choose_penalty(design, penalties, choose, advance=advance)
    given = design.with_prior(estimate_prior(design, alone.penalty, advance=advance))
    together = choose_penalty(given, penalties, choose, advance=advance)
    choice, whose = best_of([alone, together], choose)
    return given, choice, whose == 1


def pooled_choice(losses: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.intp]:
    """Choose a candidate for each gene by its own held-out loss and that of genes like it.

    The held-out loss of a sparse gene is mostly noise; genes of about as many counts want about
    the same penalty. Losses are ``[n_candidates, n_genes]``, counts ``[n_genes]``.

    >>> losses = np.array([[0.0, 0.0, 0.0, 0.0], [-1.0, -1.0, 0.5, -1.0]])
    >>> pooled_choice(losses, np.array([5, 6, 7, 8]))
    array([1, 1, 1, 1])
    """
    order = np.argsort(counts, kind="stable")
    gain = (losses - losses[:1])[:, order]
    width = min(_NEIGHBOURS, gain.shape[1])
    pooled = gain + _WEIGHT * uniform_filter1d(gain, width, axis=1, mode="nearest")
    best = np.empty(len(order), dtype=np.intp)
    best[order] = pooled.argmin(0)
    return best


def estimate_prior(
    design: Design,
    penalty: NDArray[np.float64],
    *,
    advance: Callable[[int], object] | None = None,
) -> dict[int | None, Tensor]:
    r"""Estimate the prior of every fold, from its training sections.

    .. math:: \Sigma = (1 - a) \frac{p\,S}{\operatorname{tr} S} + a I, \qquad
        S = \sum_g \sqrt{T_g}\, w_g w_g^\top

    with weights of standardised features fitted by the penalty alone, and counts :math:`T_g`. For
    each group that is left out, and for none (``None``): the symmetric root of :math:`\Sigma` along
    the axes of the rest, ``[n_axes, n_axes]``, which all :math:`w_g` lie in.
    """
    folds: list[int | None] = [None, *range(design.n_groups)]
    work = partial(_second_moments, design, penalty, folds)
    # Added up as they come: of all blocks, they would not fit into memory.
    total = reduce(_added, design.each_block(work, advance))
    p = design.rows.n_features
    return {left_out: _root(moment, p) for left_out, moment in zip(folds, total, strict=True)}


def _added(total: list[Tensor], more: list[Tensor]) -> list[Tensor]:
    return [moment.add_(other) for moment, other in zip(total, more, strict=True)]


def _second_moments(
    design: Design, penalty: NDArray[np.float64], folds: list[int | None], block: Block
) -> list[Tensor]:
    """:math:`S` of each fold along its axes, of the genes of a block, ``[n_axes, n_axes]``."""
    moments = []
    for left_out in folds:
        problem = design.training(block, torch.as_tensor(penalty[block.genes].copy()), left_out)
        start = torch.zeros_like(problem.xtc)
        found = descend(problem, start, tolerance=_TOLERANCE, max_iterations=_ITERATIONS)
        # Axes are at right angles for standardised features.
        weights = found.axes * problem.counts**0.25
        moments.append(weights @ weights.T)
    return moments


def _root(moment: Tensor, p: int) -> Tensor:
    """Symmetric root of the covariance; the identity where no gene has any weight."""
    trace = moment.trace()
    identity = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    if trace <= 0:
        return identity
    values, vectors = torch.linalg.eigh((1 - _IDENTITY) * p / trace * moment + _IDENTITY * identity)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
