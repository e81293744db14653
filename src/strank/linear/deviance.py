"""How much of the way counts are shared among spots a score explains."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from strank.linear.inputs import Data
from strank.linear.objective import dense
from strank.linear.rows import Rows

__all__ = ["deviance_explained"]

# Genes at a time: counts and scores of a section are dense for so many.
_GENES = 256


def deviance_explained(rows: Rows, data: Data, weights: Tensor) -> NDArray[np.float64]:
    r"""Share of the list deviance that linear scores explain, ``[n_genes]``.

    .. math:: 1 - \frac{L(r) - L^*}{L(0) - L^*}

    with the list loss :math:`L` of the scores, of no scores (library size alone), and of the
    shares as they were observed. NaN where the counts of a gene are shared by library size.

    Parameters
    ----------
    rows
        Features, centred as for the weights.
    data
        Counts, sections and offsets.
    weights
        ``[n_features, n_genes]``.
    """
    by_gene, parts = data.counts.tocsc(), []
    offset = torch.as_tensor(data.offset).to(rows.device)
    for start in range(0, weights.shape[1], _GENES):
        genes = slice(start, start + _GENES)
        counts = by_gene[:, genes].tocsr()
        model, none = torch.zeros(2, counts.shape[1], dtype=torch.float64, device=rows.device)
        for s in range(rows.n_sections):
            scores = rows.times(rows.of(s), weights[:, genes])
            of_model, of_none = _losses(scores, dense(counts, rows, s), offset[rows.of(s)])
            model += of_model
            none += of_none
        parts.append(torch.where(none > 1e-9, 1 - model / none, torch.nan).cpu().numpy())
    return np.concatenate(parts)


def _losses(scores: Tensor, counts: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """List loss of a section above that of the observed shares: of the scores, and of none."""
    total = counts.sum(0)
    observed = torch.xlogy(counts, counts).sum(0) - torch.xlogy(total, total) - offset @ counts
    model = total * (scores + offset[:, None]).logsumexp(0) - (scores * counts).sum(0)
    return model + observed, total * offset.logsumexp(0) + observed
