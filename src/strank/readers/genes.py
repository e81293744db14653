"""Unique names of genes from the symbols and ids of a file."""

from __future__ import annotations

import numpy as np
import pandas as pd

from strank.cohort.naming import naming
from strank.errors import InputError, some

__all__ = ["name_genes"]


def name_genes(
    symbols: pd.Index | None,
    ids: pd.Index | None,
    *,
    gene_id: bool = False,
    name: str = "the file",
) -> pd.DataFrame:
    """Name the genes of a section: by symbol, or by id where that is wished or all there is.

    Parameters
    ----------
    symbols, ids
        Of each gene, as the file has them; ``None`` for what it has not. Ensembl ids in the place
        of symbols are taken as ids.
    gene_id
        Name genes by id.
    name
        File named in an error.

    Returns
    -------
    pandas.DataFrame
        Indexed by unique names, with ``gene_id`` where ids are known. A symbol that stands twice is
        followed by ``_`` and the id in all its places; a gene without symbol is named by its id.

    Raises
    ------
    InputError
        If names cannot be made unique, or ids are wished and there are none.

    Examples
    --------
    >>> ids = pd.Index(["ENSG00000284770", "ENSG00000280987", "ENSG00000015479"])
    >>> list(name_genes(pd.Index(["TBCE", "MATR3", "MATR3"]), ids).index)
    ['TBCE', 'MATR3_ENSG00000280987', 'MATR3_ENSG00000015479']
    """
    if ids is None and symbols is not None and naming(symbols) == "Ensembl ids":
        ids = symbols
    if ids is None:
        if gene_id:
            raise InputError(f"{name}: holds no gene ids; leave --gene-id out")
        return pd.DataFrame(index=_unique(_text(symbols), name))
    ids = _unique(_text(ids), name)
    if gene_id or symbols is None:
        return pd.DataFrame({"gene_id": ids}, index=ids)
    names = _text(symbols)
    names = names.where(names != "", ids)
    # Never "-1": which of the copies gets it depends on the file, and sections would not match.
    apart = np.where(names == ids, names, names + "_" + ids)
    names = names.where(~names.duplicated(keep=False), apart)
    return pd.DataFrame({"gene_id": ids}, index=_unique(names, name))


def _text(names: pd.Index | None) -> pd.Index:
    column = pd.Series(names, dtype=object)
    return pd.Index(column.where(column.notna(), "").astype(str))


def _unique(names: pd.Index, name: str) -> pd.Index:
    if (names == "").any():
        raise InputError(f"{name}: gene {int(np.argmax(names == '')) + 1} has no name")
    if not names.is_unique:
        raise InputError(
            f"{name}: gene {some(names[names.duplicated()].unique())} stands twice, and ids that "
            "tell the copies apart are not known; rename them or take them out"
        )
    return names
