"""Which genes a model is trained for, chosen on training sections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from numbers import Integral
from typing import Literal, get_args

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse
from sklearn.neighbors import radius_neighbors_graph

from strank.cohort.contract import positions_um, section_info
from strank.cohort.names import difference, no_common_genes
from strank.errors import InputError, some
from strank.metrics.correlation import log1p_cp10k

# Genes at a time: what is computed for them is a few times as large as their counts.
_GENES = 1024

# What is highest in the genes chosen: the variance of log1p(CP10k) over all spots; the mean over
# all spots of the gene's share of a spot's counts; Moran's I of log1p(CP10k), mean over sections,
# each weighing the same, 0 where a section has one value only.
PanelRule = Literal["variance", "mean", "moran"]

# In units of the spot pitch: 6 neighbours on a hexagonal grid, 8 on a square one.
_REACH = 1.5
# By Moran's I, genes seen in fewer spots are left out: chance alone puts a few spots side by side
# in some of so many genes.
_SEEN = 0.05


def morans_i(
    values: NDArray | sparse.csr_matrix, neighbours: sparse.csr_matrix
) -> NDArray[np.float64]:
    r"""Moran's I of every gene, ``[n_genes]``: how far neighbours are alike.

    .. math::
        I = \frac{n}{\sum_{ij} w_{ij}}\,
            \frac{\sum_{ij} w_{ij}\, (x_i - \bar x)(x_j - \bar x)}{\sum_i (x_i - \bar x)^2}

    NaN for a gene that is constant, or where no two spots are neighbours. It is fooled by a sparse
    gene whose few counts happen to stand side by side, and by depth, which has a pattern too.
    """
    # scanpy's is the same to 1e-15, but an optional package, and compiled for a minute at first.
    by_gene = sparse.csc_matrix(values, dtype=np.float64)
    starts = range(0, max(by_gene.shape[1], 1), _GENES)
    return np.concatenate([_of_block(by_gene[:, at : at + _GENES], neighbours) for at in starts])


def _of_block(values: sparse.csc_matrix, neighbours: sparse.csr_matrix) -> NDArray[np.float64]:
    # Products of centred values, multiplied out, so that zeros need not be stored.
    n_spots, total = values.shape[0], float(neighbours.sum())
    mean, squares = _sum(values) / n_spots, _sum(values.multiply(values))
    weight = np.asarray(neighbours.sum(0)).ravel() + np.asarray(neighbours.sum(1)).ravel()
    alike = _sum(values.multiply(neighbours @ values))
    alike += mean * (mean * total - values.T @ weight)
    spread = squares - n_spots * mean * mean
    # What rounding leaves of the spread of a constant gene is far less.
    defined = (spread > 1e-12 * squares) & (total > 0)
    scale = n_spots / total if total > 0 else 0.0
    return np.divide(scale * alike, spread, out=np.full(len(mean), np.nan), where=defined)


def _sum(values: sparse.spmatrix) -> NDArray[np.float64]:
    return np.asarray(values.sum(0)).ravel()


def choose_panel(
    cohort: Mapping[str, AnnData],
    n_genes: int | None,
    by: PanelRule = "variance",
    *,
    union: bool = False,
    sums: GeneSums | None = None,
) -> pd.Index:
    """Choose genes, highest first and ties in alphabetical order; ``None`` takes all that vary.

    With ``union`` a gene counts that only some sections measure, which alone are looked at then.
    By variance or mean, no counts are looked at where ``sums`` has what they come to.
    """
    if by not in get_args(PanelRule):
        raise InputError(f"panel by {by!r}: choose one of {', '.join(get_args(PanelRule))}")
    if not isinstance(n_genes, Integral | None):
        raise InputError(f"`n_genes` is a whole number; got {n_genes!r}")
    genes = all_genes(cohort) if union else shared_genes(cohort)
    if sums is None:
        sums = GeneSums()
        for adata in cohort.values():
            sums.add(adata)
    table = sums.moments(genes)
    which = "that vary"
    table = table[table["variance"] > 1e-12]
    if by == "moran":
        table = table[table["seen"] >= _SEEN]
        table = table.assign(moran=_mean_moran(cohort, table.index))
        which += f" and are seen in {_SEEN:.0%} of the spots"
    n_genes = len(table) if n_genes is None else n_genes
    if not 1 <= n_genes <= len(table):
        raise InputError(
            f"{n_genes} genes asked for; choose between 1 and the {len(table)} {which}"
        )
    return table.index[np.argsort(-table[by].to_numpy(), kind="stable")[:n_genes]]


class GeneSums:
    """Sums over the spots of sections, for every gene that any of them measures."""

    def __init__(self) -> None:
        self._genes = pd.Index([], dtype=object)
        self._sums = np.zeros((5, 0))

    def add(self, adata: AnnData) -> None:
        """Look at one more section."""
        counts = sparse.csr_matrix(adata.X)
        library_size = adata.obs["library_size"].to_numpy()
        target = log1p_cp10k(counts, library_size)
        of_gene = partial(np.bincount, target.indices, minlength=adata.n_vars)
        if len(more := adata.var_names.difference(self._genes, sort=False)):
            self._genes = self._genes.append(more)
            self._sums = np.pad(self._sums, ((0, 0), (0, len(more))))
        self._sums[:, self._genes.get_indexer(adata.var_names)] += [
            np.full(adata.n_vars, adata.n_obs),
            of_gene(target.data),
            of_gene(target.data**2),
            counts.T @ (1 / np.maximum(library_size, 1.0)),
            of_gene(target.data > 0),
        ]

    def moments(self, genes: pd.Index) -> pd.DataFrame:
        """Variance of log1p(CP10k), mean share of counts, and how often seen, where measured."""
        n_spots, total, squares, share, seen = self._sums[:, self._genes.get_indexer(genes)]
        variance = squares / n_spots - (total / n_spots) ** 2
        values = {"variance": variance, "mean": share / n_spots, "seen": seen / n_spots}
        return pd.DataFrame(values, index=genes)


def _mean_moran(cohort: Mapping[str, AnnData], genes: pd.Index) -> NDArray[np.float64]:
    total, n_sections = np.zeros((2, len(genes)))
    for name, adata in cohort.items():
        pitch = section_info(adata).spot_pitch_um
        neighbours = radius_neighbors_graph(positions_um(adata), _REACH * pitch)
        if neighbours.nnz == 0:
            raise InputError(
                f"section {name}: no two spots within {_REACH} spot pitches of {pitch:g} µm, so "
                "Moran's I is undefined; check spot_pitch_um and um_per_pixel, or choose the "
                "panel by variance"
            )
        target = log1p_cp10k(panel_counts(adata, genes), adata.obs["library_size"])
        total += np.nan_to_num(morans_i(target, neighbours))
        n_sections += genes.isin(adata.var_names)
    return total / n_sections


def shared_genes(cohort: Mapping[str, AnnData]) -> pd.Index:
    """Genes measured in every section, in alphabetical order."""
    genes: pd.Index | None = None
    for adata in cohort.values():
        genes = adata.var_names if genes is None else genes.intersection(adata.var_names)
    if genes is None or genes.empty:
        raise no_common_genes({name: adata.var_names for name, adata in cohort.items()})
    return genes.sort_values()


def all_genes(cohort: Mapping[str, AnnData]) -> pd.Index:
    """Genes measured in any section, in alphabetical order."""
    genes = pd.Index([])
    for adata in cohort.values():
        genes = genes.union(adata.var_names, sort=False)
    return genes.sort_values()


def panel_counts(adata: AnnData, genes: pd.Index) -> sparse.csr_matrix:
    """Take the counts of genes, ``[n_spots, n_genes]``: none of those that are not measured.

    A section without counts of a gene has no say in the gene's list or pair likelihood.
    """
    found = adata.var_names.get_indexer(genes)
    measured = np.flatnonzero(found >= 0)
    place = sparse.csr_matrix(
        (np.ones(len(measured), adata.X.dtype), (found[measured], measured)),
        shape=(adata.n_vars, len(genes)),
    )
    return sparse.csr_matrix(adata.X @ place)


def check_genes(cohort: Mapping[str, AnnData], genes: Sequence[str]) -> pd.Index:
    """Return the genes as an index, or refuse those that a section lacks, by name."""
    wanted = pd.Index(genes)
    for name, adata in cohort.items():
        absent = wanted.difference(adata.var_names)
        if len(absent):
            how = difference(absent, adata.var_names)
            why = f"; its own differ only by {how}" if how else ""
            raise InputError(f"section {name} has no gene {some(absent)}{why}")
    return wanted
