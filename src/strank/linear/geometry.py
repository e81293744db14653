"""How features vary within sections: the units of the penalty, and the axes of the solver."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from strank.linear.data import Rows

# Rounding: relative to the largest variance of an axis, and to the largest value of a feature.
_NEGLIGIBLE_VARIANCE = 1e-10
_NEGLIGIBLE_SCALE = 1e-9
# What features are brought to about 1 from, and weights back, without losing digits; and in units
# of their own, in which they are squared as they are.
_FITTED, _FITTED_AS_GIVEN = (1e-290, 1e290), (1e-100, 1e100)
# Powers of two of what is about 1 as it is.
_ORDINARY = 40


@dataclass(frozen=True)
class Moments:
    """Sums over the spots of some sections; those of more sections are added.

    So the geometry of any set of groups is had from one reading of the features.
    """

    n_spots: int
    weight: float  #: of the sections in ``covariance``, together
    total: Tensor  #: ``[n_features]``, and so the next two
    squares: Tensor  #: of deviations from the mean of the section
    largest: Tensor  #: absolute value
    #: within sections, weighted by depth, times weight; ``None`` of fewer spots than features, for
    #: which it is that of the rows of these
    covariance: Tensor | None
    roots: tuple[Tensor, ...]  #: ``[n_spots, n_features]`` of each section

    def __add__(self, other: Moments) -> Moments:
        mine, others = self.covariance, other.covariance
        return Moments(
            self.n_spots + other.n_spots,
            self.weight + other.weight,
            self.total + other.total,
            self.squares + other.squares,
            torch.maximum(self.largest, other.largest),
            None if mine is None or others is None else mine + others,
            self.roots + other.roots,
        )


def units_of(rows: Rows, *, standardize: bool) -> Tensor:
    """Powers of two that bring every feature to about 1, ``[n_features]``; what cannot is refused.

    A product with one is exact, so that whatever is computed has the same digits for features of
    any size. Ordinary features keep their units, and all do where the penalty is in these.
    """
    largest = _largest(rows)
    top = largest if standardize else largest.amax(0, keepdim=True)
    least, most = _FITTED if standardize else _FITTED_AS_GIVEN
    beyond = (top > most) | ((top > 0) & (top < least))
    if beyond.any():
        feature = int((beyond if standardize else largest == top).nonzero()[0])
        raise ValueError(
            f"X reaches {float(largest[feature]):g} in feature {feature}; what can be fitted "
            f"reaches {least:g} to {most:g}: multiply it by a constant"
        )
    if not standardize:
        return torch.ones_like(largest)
    # Those of float32 have themselves to be a number of float32.
    bound = 126 if rows.dtype == torch.float32 else 1000
    exponent = torch.frexp(largest).exponent.clamp(-bound, bound)
    exponent = torch.where(exponent.abs() <= _ORDINARY, 0, exponent)
    return torch.ldexp(torch.ones_like(largest), -exponent)


def _largest(rows: Rows) -> Tensor:
    """Largest absolute value of every feature; an error for what is not finite."""
    largest = torch.zeros(rows.n_features, dtype=torch.float64, device=rows.device)
    for block, features in rows.each_block(slice(0, rows.bounds[-1])):
        top = features.abs().amax(0).double()
        if not torch.isfinite(top).all():
            spot, feature = torch.nonzero(~torch.isfinite(features))[0].tolist()
            raise ValueError(
                f"X contains NaN or infinity (row {block.start + spot}, feature {feature})"
            )
        largest = torch.maximum(largest, top)
    return largest


def measure(
    rows: Rows, offset: Tensor, group: Sequence[int], weight: Sequence[float]
) -> list[Moments]:
    """Read all rows once; moments of each group, from the group and weight of each section."""
    found: dict[int, Moments] = {}
    for s in range(rows.n_sections):
        moments = _of_section(rows, s, offset, weight[s])
        g = group[s]
        found[g] = found[g] + moments if g in found else moments
    return [found[g] for g in sorted(found)]


def _of_section(rows: Rows, section: int, offset: Tensor, weight: float) -> Moments:
    share = offset[rows.of(section)].double().softmax(0)
    p = rows.n_features
    total, squares, largest, mean = (share.new_zeros(p) for _ in range(4))
    covariance = None if rows.wide else share.new_zeros(p, p)
    roots = []
    shift: Tensor | None = None
    for block, features in rows.each_block(rows.of(section)):
        # Deviations from a mean, even a rough one, are what keeps sums of squares exact.
        shift = features.double().mean(0) if shift is None else shift
        part = share[block.start - rows.bounds[section] : block.stop - rows.bounds[section]]
        deviation = features.double() - shift
        total += deviation.sum(0)
        squares += (deviation * deviation).sum(0)
        mean += part @ deviation
        if covariance is None:
            roots.append(deviation)
        else:
            deviation *= part.sqrt()[:, None]
            covariance += deviation.T @ deviation
        largest = torch.maximum(largest, features.abs().amax(0).double())
    n = rows.size(section)
    if covariance is not None:
        covariance = weight * covariance.sub_(torch.outer(mean, mean))
    else:
        roots = [torch.cat(roots).sub_(mean).mul_((weight * share).sqrt()[:, None])]
    shift = mean if shift is None else shift
    return Moments(
        n,
        weight,
        total + n * shift,
        squares - total * total / n,
        largest,
        covariance,
        tuple(roots),
    )


@dataclass(frozen=True)
class Geometry:
    r"""Standardisation by what varies within sections, and its principal axes.

    The scale of a feature is its pooled standard deviation *within* sections: what differs between
    sections (stain, scanner) cannot help to order the spots of one, and must not set the scale.

    All genes share the axes: along them the Hessian of a gene is close to its counts times
    ``variances``, so that the solver starts from almost the right curvature. Weights of the
    features :math:`w = B u` have :math:`\lVert u \rVert` equal to the norm of the weights of
    standardised features (in the metric of their prior, if there is one).
    """

    unit: Tensor  #: what features were multiplied by, as all below are, ``[n_features]``
    centre: Tensor  #: mean over spots, ``[n_features]``
    scale: Tensor  #: standard deviation; as of 1 for a feature that varies in no section
    basis: Tensor  #: :math:`B`, ``[n_features, n_axes]``, without axes along which nothing varies
    variances: Tensor  #: of standardised features along the axes, ``[n_axes]``

    @classmethod
    def of(cls, groups: Iterable[Moments], unit: Tensor, *, standardize: bool = True) -> Geometry:
        """Combine moments."""
        moments = reduce(Moments.__add__, groups)
        deviation = (moments.squares.clamp(min=0) / moments.n_spots).sqrt()
        constant = deviation <= _NEGLIGIBLE_SCALE * moments.largest
        scale = torch.where(constant | (not standardize), unit, deviation)
        # The rounding of a large constant is no variation.
        inverse = torch.where(constant, 0.0, 1 / scale)
        # Where no section has counts, no axis is left, and scores are constant.
        weight = moments.weight or 1.0
        if moments.covariance is None:
            root = torch.cat(moments.roots).mul_(inverse / weight**0.5)
            axes, deviations, _ = torch.linalg.svd(root.T, full_matrices=False)
            variances = deviations.square()
        else:
            covariance = moments.covariance / weight * torch.outer(inverse, inverse)
            variances, axes = torch.linalg.eigh(covariance)
        kept = _varying(variances)
        basis = axes[:, kept] * inverse[:, None]
        return cls(unit, moments.total / moments.n_spots, scale, basis, variances[kept])

    def with_prior(self, root: Tensor) -> Geometry:
        """Take the symmetric root of a prior covariance of weights, ``[n_axes, n_axes]``, in."""
        variances, axes = torch.linalg.eigh(root * self.variances @ root)
        kept = _varying(variances)
        return replace(self, basis=self.basis @ (root @ axes[:, kept]), variances=variances[kept])


def _varying(variances: Tensor) -> Tensor:
    """Find the axes along which there is more than rounding."""
    if not len(variances):
        return variances > 0
    return variances > variances.max().clamp(min=0) * _NEGLIGIBLE_VARIANCE
