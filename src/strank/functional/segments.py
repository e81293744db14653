"""Reductions within sections: one value per section and gene, without a Python loop.

A *segment* is the set of rows (spots) that carry the same section code. Every function takes
``section`` as integer codes ``0 .. n_sections - 1``; `section_codes` makes them from any labels.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "section_codes",
    "segment_log_softmax",
    "segment_logsumexp",
    "segment_max",
    "segment_sum",
]


def section_codes(section: Tensor) -> tuple[Tensor, int]:
    """Relabel sections as consecutive codes, in sorted order of their labels.

    Parameters
    ----------
    section
        Integer labels, ``[n_spots]``, in any order.

    Returns
    -------
    codes, n_sections
        ``int64`` codes in ``0 .. n_sections - 1``, ``[n_spots]``, and how many there are.

    Examples
    --------
    >>> section_codes(torch.tensor([7, 3, 7]))
    (tensor([1, 0, 1]), 2)
    """
    labels, codes = torch.unique(section, return_inverse=True)
    return codes, len(labels)


def segment_sum(values: Tensor, section: Tensor, n_sections: int) -> Tensor:
    """Sum rows within sections: ``[n_spots, ...]`` to ``[n_sections, ...]``.

    Examples
    --------
    >>> segment_sum(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([0, 1, 0]), 2)
    tensor([[5.],
            [2.]])
    """
    return values.new_zeros(n_sections, *values.shape[1:]).index_add(0, section, values)


def segment_max(values: Tensor, section: Tensor, n_sections: int) -> Tensor:
    """Largest row value within sections; ``-inf`` for a section without rows.

    Examples
    --------
    >>> segment_max(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([0, 1, 0]), 2)
    tensor([[4.],
            [2.]])
    """
    index = section.reshape(-1, *[1] * (values.dim() - 1)).expand_as(values)
    floor = values.new_full((n_sections, *values.shape[1:]), -torch.inf)
    return floor.scatter_reduce(0, index, values, "amax")


def segment_logsumexp(values: Tensor, section: Tensor, n_sections: int) -> Tensor:
    r"""Stable :math:`\log \sum_{i \in s} e^{v_i}` per section; ``-inf`` where all are ``-inf``.

    Examples
    --------
    >>> segment_logsumexp(torch.zeros(4, 1), torch.tensor([0, 0, 0, 1]), 2).exp()
    tensor([[3.],
            [1.]])
    """
    # The shift cancels in value and gradient, so it is kept out of the graph.
    shift = segment_max(values.detach(), section, n_sections)
    shift = torch.where(torch.isfinite(shift), shift, 0.0)
    return segment_sum((values - shift[section]).exp(), section, n_sections).log() + shift


def segment_log_softmax(values: Tensor, section: Tensor, n_sections: int) -> Tensor:
    r"""Log share of a row in its section: :math:`v_i - \log \sum_{j \in s} e^{v_j}`.

    Examples
    --------
    >>> segment_log_softmax(torch.zeros(4, 1), torch.tensor([0, 0, 0, 1]), 2).exp().flatten()
    tensor([0.3333, 0.3333, 0.3333, 1.0000])
    """
    return values - segment_logsumexp(values, section, n_sections)[section]
