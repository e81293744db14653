"""Which genes a model is trained for; chosen on training sections only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from anndata import AnnData

from strank.errors import InputError, some
from strank.functional.metrics import log1p_cp10k

__all__ = ["check_genes", "choose_panel", "shared_genes"]


def choose_panel(cohort: Mapping[str, AnnData], n_genes: int | None) -> pd.Index:
    """Genes of highest variance of log1p(CP10k) over all spots of the sections given.

    Parameters
    ----------
    cohort
        Training sections; a gene must be measured in each of them.
    n_genes
        Size of the panel, at least 1; ``None`` for all that vary.

    Returns
    -------
    pandas.Index
        Gene symbols, highest variance first; ties in alphabetical order.

    Raises
    ------
    InputError
        If the sections share fewer genes, or fewer of them vary.
    """
    genes = shared_genes(cohort)
    n_spots, total, squares = 0, np.zeros(len(genes)), np.zeros(len(genes))
    for adata in cohort.values():
        target = log1p_cp10k(adata[:, genes].X, adata.obs["library_size"])
        n_spots += target.shape[0]
        total += np.asarray(target.sum(0)).ravel()
        squares += np.asarray(target.multiply(target).sum(0)).ravel()
    variance = squares / n_spots - (total / n_spots) ** 2
    varying = int((variance > 1e-12).sum())
    n_genes = varying if n_genes is None else n_genes
    if not 1 <= n_genes <= varying:
        raise InputError(f"{n_genes} genes asked for; choose between 1 and the {varying} that vary")
    return genes[np.argsort(-variance, kind="stable")[:n_genes]]


def shared_genes(cohort: Mapping[str, AnnData]) -> pd.Index:
    """Genes measured in every section, in alphabetical order."""
    genes: pd.Index | None = None
    for adata in cohort.values():
        genes = adata.var_names if genes is None else genes.intersection(adata.var_names)
    if genes is None or genes.empty:
        raise InputError(f"no gene is measured in all of the sections {some(cohort)}")
    return genes.sort_values()


def check_genes(cohort: Mapping[str, AnnData], genes: Sequence[str]) -> pd.Index:
    """Return the genes as an index, or refuse those that a section lacks, by name."""
    wanted = pd.Index(genes)
    for name, adata in cohort.items():
        absent = wanted.difference(adata.var_names)
        if len(absent):
            raise InputError(f"section {name} has no gene {some(absent)}")
    return wanted
