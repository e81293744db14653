"""How the genes of a section are named, each by a name of its own."""

from __future__ import annotations

import numpy as np
import pandas as pd

from strank.cohort.contract import naming
from strank.cohort.names import clean_names
from strank.errors import InputError, some

# Columns of ``var`` with Ensembl ids.
IDS = ("gene_ids", "gene_id", "ensembl_id", "ensembl_ids")


def name_genes(
    symbols: pd.Index | None,
    ids: pd.Index | None,
    *,
    gene_id: bool = False,
    name: str = "the file",
) -> pd.DataFrame:
    """Index genes by unique symbols, or by ids; a symbol that stands twice is followed by its id.

    >>> ids = pd.Index(["ENSG00000284770", "ENSG00000280987", "ENSG00000015479"])
    >>> list(name_genes(pd.Index(["TBCE", "MATR3", "MATR3"]), ids).index)
    ['TBCE', 'MATR3_ENSG00000280987', 'MATR3_ENSG00000015479']
    """
    symbols, ids = (None if names is None else clean_names(names) for names in (symbols, ids))
    if ids is None and symbols is not None and naming(symbols) == "Ensembl ids":
        ids = symbols
    if ids is None:
        if gene_id:
            raise InputError(f"{name}: holds no gene ids; leave `gene_id` out")
        return pd.DataFrame(index=_unique(pd.Index([]) if symbols is None else symbols, name))
    ids = _unique(ids, name)
    if gene_id or symbols is None:
        return pd.DataFrame({"gene_id": ids}, index=ids)
    names = symbols.where(symbols != "", ids)
    # Never "-1": which of the copies gets it depends on the file, and sections would not match.
    apart = np.where(names == ids, names, names + "_" + ids)
    names = names.where(~names.duplicated(keep=False), apart)
    return pd.DataFrame({"gene_id": ids}, index=_unique(names, name))


def _unique(names: pd.Index, name: str) -> pd.Index:
    if (names == "").any():
        number = int(np.argmax(names == "")) + 1
        raise InputError(f"{name}: gene {number} has no name, or one as nan or NA")
    if not names.is_unique:
        raise InputError(
            f"{name}: gene {some(names[names.duplicated()].unique())} stands twice, and ids that "
            "tell the copies apart are not known; rename them or take them out"
        )
    return names
