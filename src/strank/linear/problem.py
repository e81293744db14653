"""The penalised list objective for a linear head, reduced to what an optimiser needs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from strank.functional.segments import segment_log_softmax, segment_logsumexp

__all__ = ["ListProblem"]


@dataclass(frozen=True)
class ListProblem:
    r"""What the list objective of a linear head needs to know of the counts.

    .. math:: -\sum_i c_i\,x_i^\top w + \sum_s T_s \log \sum_{i \in s} l_i e^{x_i^\top w}

    Counts enter only through ``xtc`` = :math:`X^\top c` and ``totals`` = :math:`T_s`, so they are
    read once and may stay sparse.

    Attributes
    ----------
    features
        ``[n_spots, n_features]``.
    section
        Codes ``0 .. n_sections - 1``, ``[n_spots]``.
    offset
        Log exposure (log library size) per spot, ``[n_spots]``.
    xtc
        Features summed over counts, ``[n_features, n_genes]``.
    totals
        Counts of a gene in a section, ``[n_sections, n_genes]``.
    """

    features: Tensor
    section: Tensor
    offset: Tensor
    xtc: Tensor
    totals: Tensor

    @classmethod
    def from_counts(
        cls,
        features: Tensor,
        counts: sparse.csr_matrix | np.ndarray,
        *,
        section: Tensor,
        n_sections: int,
        offset: Tensor,
    ) -> ListProblem:
        """Reduce counts (CSR or dense, ``[n_spots, n_genes]``) to sums; they are not kept."""
        codes = section.cpu().numpy()
        member = sparse.csr_matrix(
            (np.ones(len(codes)), (codes, np.arange(len(codes)))), shape=(n_sections, len(codes))
        )
        counts = sparse.csr_matrix(counts)
        xtc = (counts.T @ features.cpu().numpy()).T
        totals = (member @ counts).toarray()
        xtc, totals = (torch.as_tensor(sums).to(features) for sums in (xtc, totals))
        return cls(features, section, offset, xtc, totals)

    @property
    def n_sections(self) -> int:
        """Number of sections."""
        return self.totals.shape[0]

    @cached_property
    def gene_totals(self) -> Tensor:
        """Counts of each gene over all sections, ``[n_genes]``."""
        return self.totals.sum(0)

    def shares(self, scores: Tensor) -> Tensor:
        """Predicted share of a section's counts that falls on each spot, ``[n_spots, n_genes]``."""
        logits = scores + self.offset[:, None]
        return segment_log_softmax(logits, self.section, self.n_sections).exp()

    def loss(self, weights: Tensor) -> Tensor:
        """Negative log-likelihood per gene, in nats, ``[n_genes]``, constants dropped."""
        logits = self.features @ weights + self.offset[:, None]
        lse = segment_logsumexp(logits, self.section, self.n_sections)
        return (self.totals * lse).sum(0) - (weights * self.xtc).sum(0)

    def genes(self, index: Tensor) -> ListProblem:
        """Keep some of the genes."""
        return ListProblem(
            self.features, self.section, self.offset, self.xtc[:, index], self.totals[:, index]
        )
