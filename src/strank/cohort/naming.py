"""How a section names its genes, and the refusal of a cohort that does so in two ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import pandas as pd

from strank.errors import InputError, some

__all__ = ["check_naming", "naming"]

_ENSEMBL = r"ENS[A-Z]*G\d+"


def naming(names: pd.Index) -> Literal["Ensembl ids", "symbols"]:
    """Tell Ensembl ids from symbols, by what most names are.

    Examples
    --------
    >>> naming(pd.Index(["ENSG00000141736", "ENSMUSG00000062312.5", "ERBB2"]))
    'Ensembl ids'
    """
    n_ids = names.astype(str).str.match(_ENSEMBL).sum()
    return "Ensembl ids" if 2 * n_ids > len(names) else "symbols"


def check_naming(names: Mapping[str, pd.Index]) -> None:
    """Refuse sections that have no name of a gene in common because their files name them unalike.

    Parameters
    ----------
    names
        Section to the names of its genes.

    Raises
    ------
    InputError
        If some are named by Ensembl ids and some by symbols.
    """
    sections: dict[str, list[str]] = {}
    for section, genes in names.items():
        sections.setdefault(naming(genes), []).append(section)
    if len(sections) > 1:
        told = " and ".join(f"section {some(those)} by {how}" for how, those in sections.items())
        raise InputError(
            f"genes are named in two ways: {told}; import all with --gene-id, or all from files "
            "that hold symbols"
        )
