r"""Losses of single spots: regression on absolute expression, the field's baselines.

A spot's rate is :math:`\mu_{ig} = l_i e^{r_{ig}}`. A shift of the scores changes these losses, so a
section's batch effect enters them; ``free_level`` takes it out of the likelihoods.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn.functional import softplus

from strank.functional.batch import LossBatch, Reduction, check_batch, masked, reduce_loss
from strank.functional.segments import in_float64, segment_log_softmax, segment_sum

_LEVEL_STEPS = 50


def mse_loss(
    scores: Tensor,
    counts: Tensor,
    *,
    section: Tensor | ArrayLike,
    offset: Tensor | None = None,
    where: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Squared error to log1p(counts per 10k).

    Definition:

    .. math:: L_{ig} = (r_{ig} - \log(1 + 10^4 c_{ig} / l_i))^2

    Parameters
    ----------
    scores, counts, section, where, weight
        As in `list_loss`; counts dense. Sections do not matter here.
    reduction
        As in `list_loss`: ``"mean"`` divides by the number of elements that take part.
    offset
        Log library size; ``None`` takes the target :math:`\log(1 + c)`.

    Returns
    -------
    Tensor
        A scalar, or ``[n_spots, n_genes]``.

    Raises
    ------
    ValueError
        As `list_loss`, and for ``reduction="per_count"``.

    Examples
    --------
    >>> mse_loss(torch.zeros(2, 1), torch.tensor([[0.0], [1.0]]), section=torch.tensor([0, 0]))
    tensor(0.2402)
    """
    batch = _checked(scores, counts, section=section, offset=offset, where=where, weight=weight)
    error = batch.scores - log1p_rate(batch.counts, batch.offset)
    return _reduce(batch, error * error, reduction, likelihood=False)


def poisson_loss(
    scores: Tensor,
    counts: Tensor,
    *,
    section: Tensor | ArrayLike,
    offset: Tensor | None = None,
    where: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    free_level: bool = False,
) -> Tensor:
    r"""Poisson negative log-likelihood, without its constant :math:`\log c!`.

    Definition:

    .. math:: L_{ig} = \mu_{ig} - c_{ig} \log \mu_{ig}, \qquad \mu_{ig} = l_i e^{r_{ig} + a_{sg}}

    Parameters
    ----------
    scores, counts, section, offset, where, weight
        As in `list_loss`; counts dense.
    reduction
        As in `list_loss`: ``"mean"`` divides by the number of elements that take part.
    free_level
        Whether a section and gene have a level :math:`a_{sg}` of their own, added to the offset
        at its maximum-likelihood value: then the gradient is that of `list_loss`. Otherwise it
        is 0. With it, weights must be of genes, ``[n_genes]``.

    Returns
    -------
    Tensor
        A scalar, or ``[n_spots, n_genes]``.

    Raises
    ------
    ValueError
        As `list_loss`.

    Examples
    --------
    >>> section = torch.tensor([0, 0])
    >>> poisson_loss(torch.zeros(2, 1), torch.tensor([[0.0], [4.0]]), section=section)
    tensor(1.)
    >>> poisson_loss(
    ...     torch.zeros(2, 1), torch.tensor([[0.0], [4.0]]), section=section, free_level=True
    ... )
    tensor(0.6137)
    """
    batch = _checked(scores, counts, section=section, offset=offset, where=where, weight=weight)
    log_rate = batch.logits
    if free_level:
        log_rate, counted = _poisson_level(batch)
        loss = torch.where(counted, log_rate.exp() - batch.counts * log_rate, 0.0)
    else:
        loss = log_rate.exp() - batch.counts * log_rate
    return _reduce(batch, loss, reduction, likelihood=True)


def negative_binomial_loss(
    scores: Tensor,
    counts: Tensor,
    *,
    section: Tensor | ArrayLike,
    offset: Tensor | None = None,
    where: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    dispersion: Tensor | float = 1.0,
    free_level: bool = False,
) -> Tensor:
    r"""Negative binomial negative log-likelihood, of variance :math:`\mu + \varphi \mu^2`.

    Definition:

    .. math:: L_{ig} = -\log \binom{c + 1/\varphi - 1}{c}
        + (c + 1/\varphi) \log(1 + \varphi\mu) - c \log(\varphi\mu)

    Parameters
    ----------
    scores, counts, section, offset, where, weight
        As in `list_loss`; counts dense.
    reduction
        As in `list_loss`: ``"mean"`` divides by the number of elements that take part.
    dispersion
        :math:`\varphi > 0`, one value or ``[n_genes]``; the inverse of the size
        :math:`\theta = 1/\varphi`. It may need a gradient.
    free_level
        As in `poisson_loss`. The level is held fixed in the gradient, which is exact for sums
        over a section.

    Returns
    -------
    Tensor
        A scalar, or ``[n_spots, n_genes]``.

    Raises
    ------
    ValueError
        As `list_loss`, and for a dispersion that is not positive.

    Examples
    --------
    >>> negative_binomial_loss(
    ...     torch.zeros(1, 1), torch.zeros(1, 1), section=torch.tensor([0]), dispersion=1.0
    ... )
    tensor(0.6931)
    """
    batch = _checked(scores, counts, section=section, offset=offset, where=where, weight=weight)
    phi = _dispersion(dispersion, batch)
    log_rate = batch.logits
    if free_level:
        log_rate, counted = _poisson_level(batch)
        level = _negative_binomial_level(batch, log_rate.detach(), phi.detach())
        log_rate = log_rate + level.index_select(0, batch.section)
    loss = _negative_binomial(log_rate, batch.counts, phi)
    if free_level:
        loss = torch.where(counted, loss, 0.0)
    return _reduce(batch, loss, reduction, likelihood=True)


def log1p_rate(counts: Tensor, offset: Tensor | None) -> Tensor:
    r"""Compute :math:`\log(1 + 10^4 c / l)`, or :math:`\log(1 + c)` without offset."""
    if offset is None:
        return counts.log1p()
    return (counts * (math.log(1e4) - offset).exp()).log1p()


def _checked(scores: Tensor, counts: Tensor, **options: Any) -> LossBatch:
    """Check the arguments; what is left out is 0, since its gradient may not be finite."""
    batch = check_batch(scores, counts, **options)
    return replace(
        batch,
        scores=masked(batch.scores, batch.where),
        counts=masked(batch.counts, batch.where),
    )


def _poisson_level(batch: LossBatch) -> tuple[Tensor, Tensor]:
    """Log rates that sum to the section's counts, and where there are any (else they are 0)."""
    if batch.weight is not None and batch.weight.dim() > 1 and len(batch.weight) > 1:
        raise ValueError("weight must be [n_genes] with free_level: a level belongs to a section")
    log_share = segment_log_softmax(batch.shared_logits(), batch.section, batch.n_sections)
    totals = segment_sum(batch.counts, batch.section, batch.n_sections)
    counted = (totals > 0).index_select(0, batch.section)
    if batch.where is not None:
        counted = counted & batch.where
    log_totals = torch.where(totals > 0, totals, 1.0).log().index_select(0, batch.section)
    return torch.where(counted, torch.where(counted, log_share, 0.0) + log_totals, 0.0), counted


def _dispersion(dispersion: Tensor | float, batch: LossBatch) -> Tensor:
    n_genes = batch.scores.shape[1]
    if isinstance(dispersion, Tensor):
        phi = dispersion.to(batch.scores)
    else:
        phi = batch.scores.new_tensor(dispersion)
    if phi.shape not in ((), (1,), (n_genes,)):
        raise ValueError(
            f"dispersion must be one value or [n_genes] = [{n_genes}]; got {list(phi.shape)}"
        )
    if not (phi > 0).all():
        raise ValueError("dispersion must be positive")
    return phi


def _negative_binomial(log_rate: Tensor, counts: Tensor, phi: Tensor) -> Tensor:
    """Negative log-likelihood, in float64: in float32 differences of lgamma cancel."""
    count, phi = in_float64(counts), in_float64(phi)
    size, logit = 1 / phi, in_float64(log_rate) + phi.log()
    choices = torch.lgamma(count + size) - torch.lgamma(size) - torch.lgamma(count + 1)
    loss = (count + size) * softplus(logit) - count * logit - choices
    return loss.to(counts)


@torch.no_grad()
def _negative_binomial_level(batch: LossBatch, log_rate: Tensor, phi: Tensor) -> Tensor:
    """Maximum-likelihood level of a section and gene, above that of the Poisson likelihood."""
    # At the maximum it has no gradient of its own, so it may be held fixed. The likelihood is
    # generalised self-concordant in it: steps so damped cannot overshoot.
    level = log_rate.new_zeros(batch.n_sections, log_rate.shape[1])
    totals = segment_sum(batch.counts, batch.section, batch.n_sections)
    rounding = 16 * torch.finfo(level.dtype).eps * totals
    trials = masked(batch.counts + 1 / phi, batch.where)
    for _ in range(_LEVEL_STEPS):
        chance = torch.sigmoid(log_rate + level.index_select(0, batch.section) + phi.log())
        expected = trials * chance
        rise = totals - segment_sum(expected, batch.section, batch.n_sections)
        rise = torch.where(rise.abs() > rounding, rise, 0.0)
        if not rise.any():
            break
        bend = segment_sum(expected * (1 - chance), batch.section, batch.n_sections)
        newton = rise / bend.clamp(min=1e-20)
        reach = newton.abs()
        step = newton * torch.where(reach > 0, torch.log1p(reach) / reach, 1.0)
        level += torch.where(totals > 0, step, 0.0)
    return level


def _reduce(batch: LossBatch, loss: Tensor, reduction: Reduction, *, likelihood: bool) -> Tensor:
    loss = masked(loss, batch.where)
    if batch.weight is not None:
        loss = loss * batch.weight
    counts = batch.gene_counts if likelihood else None
    return reduce_loss(loss, reduction, elements=batch.elements(), counts=counts)
