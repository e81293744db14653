"""Spots and genes of a section that are kept: by genes seen, mitochondrial counts, spots seen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from anndata import AnnData
from scipy import sparse

from strank.cohort.contract import naming
from strank.errors import InputError


@dataclass(frozen=True)
class SpotFilter:
    """What is kept of a section; shares are of its counts as they are, before anything is left out.

    The library size of a spot stays what it is: all that was measured there.

    Examples
    --------
    >>> SpotFilter(min_genes=200, max_mito=0.2, min_spots=3).max_mito
    0.2
    """

    min_genes: int  # that a spot sees
    max_mito: float  # share of a spot's counts in genes MT-...; kept are those below
    min_spots: int  # that see a gene, of those that are kept


def filter_spots(section: AnnData, keep: SpotFilter) -> AnnData:
    """Leave out spots, then genes; an :class:`InputError` names a section with nothing left."""
    name, names = section.obs["section"].iloc[0], section.var_names
    if keep.max_mito < 1 and naming(names) == "Ensembl ids":
        raise InputError(
            f"section {name}: genes are named by Ensembl ids, which do not tell mitochondrial "
            "ones; import it with symbols"
        )
    counts = sparse.csr_matrix(section.X, dtype=np.float64)
    mito = names.astype(str).str.upper().str.startswith("MT-")
    total, of_mito = (np.asarray(part.sum(1)).ravel() for part in (counts, counts[:, mito]))
    # A spot without counts has no share, and is not below any.
    share = np.divide(of_mito, total, out=np.full(len(total), np.inf), where=total > 0)
    n_genes = (counts > 0).sum(1).A1
    spots = (share < keep.max_mito) & (n_genes >= keep.min_genes)
    n_spots = (counts[spots] > 0).sum(0).A1
    genes = n_spots >= keep.min_spots
    if not (spots.any() and genes.any()):
        raise InputError(
            f"section {name}: nothing is left: {spots.sum()} of {len(spots)} spots have at least "
            f"{keep.min_genes} genes and less than {keep.max_mito:.0%} mitochondrial counts, and "
            f"no gene is seen in {keep.min_spots} of them"
        )
    return section[spots, genes].copy()
