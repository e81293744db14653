from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from strank.cohort.names import alike, clean_name, difference, look_alikes
from strank.cohort.panel import check_genes, shared_genes
from strank.errors import InputError

IDS = [f"ENSG0000010000{i}" for i in range(6)]


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        (" P1\t", "P1"),
        ("\ufeffP1\u200b ", "P1"),
        ("P 1", "P 1"),
        ("Mu\u0308ller", "M\u00fcller"),
        (7, "7"),
        (7.0, "7"),
        (np.float64(7), "7"),
        (7.5, "7.5"),
        ("7.0", "7.0"),
        ("Nana", "Nana"),
        *(
            (name, "")
            for name in (None, np.nan, pd.NA, "", " ", "NaN", "N/A", "#N/A", "NaT", "NULL")
        ),
    ],
)
def test_a_name_is_stripped_or_none(name, clean):
    assert clean_name(name) == clean


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        (["P1", "p1", "P2"], [["P1", "p1"]]),
        (["P1", "P-01", "P_1"], [["P-01", "P1", "P_1"]]),
        (["S1-1", "S11", "S1-2"], []),
        (["P1", "P10", "P100"], []),
        (["P1", "\uff301", "P\uff11", "P2"], [["P1", "P\uff11", "\uff301"]]),
        (["HER2+", "HER2-", "her2 +"], [["HER2+", "her2 +"]]),
        (["a-1+", "A1-", "A1"], []),
        (["1", "1.0", "1.5"], [["1", "1.0"]]),
        (["+", "-"], []),
    ],
)
def test_names_that_are_alike(names, groups):
    assert alike(names) == groups


APART = {
    "versions of Ensembl ids": (IDS, [f"{name}.7" for name in IDS]),
    "versions of Ensembl ids .": ([f"{name}.8" for name in IDS], [f"{name}.7" for name in IDS]),
    "blanks around the names": (list("ABCDEF"), [f"{name} " for name in "ABCDEF"]),
    "capital and small letters": (list("ABCDEF"), list("abcdef")),
}


@pytest.mark.parametrize("why", APART)
def test_sections_without_a_common_gene_say_why(section_of, why):
    cohort = {name: section_of(name) for name in ("A1", "A2")}
    for adata, names in zip(cohort.values(), APART[why], strict=True):
        adata.var_names = names
    with pytest.raises(InputError, match=f"sections A1, A2: they differ only by {why}"):
        shared_genes(cohort)
    with pytest.raises(InputError, match=f"its own differ only by {why}"):
        check_genes({"A1": cohort["A1"]}, APART[why][1])
    (told,) = look_alikes({"A1": "A", "A2": "B"}, {n: a.var_names for n, a in cohort.items()})
    assert f"sections A1 and A2: genes that differ only by {why.rstrip(' .')}" in told


def test_sections_of_other_genes_show_some(section_of):
    cohort = {name: section_of(name) for name in ("A1", "A2")}
    cohort["A2"].var_names = list("UVWXYZ")
    with pytest.raises(InputError, match=r": A2 has U, V, W and 3 more, before it G0, G1, G2 and"):
        shared_genes(cohort)


def test_genes_of_one_section_are_never_taken_for_one():
    """Of mouse and human together, as in grafts."""
    assert difference(pd.Index(["GAPDH", "Gapdh"]), pd.Index(["GAPDH"])) == ""
