"""Names of genes: unique, the same whatever the order of the file, and never mixed in a cohort."""

from __future__ import annotations

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strank.cohort.contract import check_naming, naming
from strank.cohort.genes import name_genes
from strank.errors import InputError

IDS = pd.Index([f"ENSG{i:011}" for i in range(4)])
SYMBOLS = pd.Index(["A", "B", "A", ""])


@given(st.permutations(range(4)))
def test_copies_get_their_id_whatever_the_order(order):
    order = list(order)
    table = name_genes(SYMBOLS[order], IDS[order])
    expected = dict(
        zip(IDS, ["A_ENSG00000000000", "B", "A_ENSG00000000002", "ENSG00000000003"], strict=True)
    )
    assert list(table.index) == [expected[i] for i in IDS[order]]
    assert list(table["gene_id"]) == list(IDS[order])


def test_ids_where_wished_or_all_there_is():
    for table in (
        name_genes(SYMBOLS, IDS, gene_id=True),
        name_genes(None, IDS),
        name_genes(IDS, None),
        name_genes(IDS, None, gene_id=True),
        name_genes(IDS, IDS),
    ):
        assert list(table.index) == list(table["gene_id"]) == list(IDS)
    assert "gene_id" not in name_genes(pd.Index(["A", "B"]), None)


@pytest.mark.parametrize(
    ("symbols", "ids", "options", "message"),
    [
        (["A", "B"], None, {"gene_id": True}, "F: holds no gene ids; leave `gene_id` out"),
        (["A", "B", "A"], None, {}, "F: gene A stands twice, and ids that tell the copies apart"),
        (["A", "B"], ["E1", "E1"], {}, "F: gene E1 stands twice"),
        (["A", "A", "A_E2"], ["E1", "E2", "E3"], {}, "F: gene A_E2 stands twice"),
        (["A", None], None, {}, "F: gene 2 has no name"),
        (["A", "nan"], None, {}, "F: gene 2 has no name"),
        (["NA", "B"], None, {}, "F: gene 1 has no name"),
        (["A", "  "], None, {}, "F: gene 2 has no name"),
        (["A", "A "], None, {}, "F: gene A stands twice"),
    ],
)
def test_names_that_cannot_be_made_unique(symbols, ids, options, message):
    with pytest.raises(InputError) as caught:
        name_genes(pd.Index(symbols), None if ids is None else pd.Index(ids), name="F", **options)
    assert str(caught.value).startswith(message)


def test_naming_is_by_majority_and_a_mixture_is_refused():
    mouse = pd.Index(["ENSMUSG00000062312.5", "ENSMUSG00000059552", "mt-Nd1"])
    assert (naming(mouse), naming(SYMBOLS), naming(pd.Index([]))) == (
        "Ensembl ids",
        "symbols",
        "symbols",
    )
    check_naming({"S1": IDS, "S2": mouse})
    with pytest.raises(InputError) as caught:
        check_naming({"S1": IDS, "S2": SYMBOLS, "S3": IDS})
    assert str(caught.value) == (
        "genes are named in two ways: section S1, S3 by Ensembl ids and section S2 by symbols; "
        "import all with `gene_id`, or all from files that hold symbols"
    )


def test_a_gene_without_a_symbol_takes_its_id():
    ids = pd.Index(["E1 ", "E2", "E3", "E4"])
    table = name_genes(pd.Index([" A", None, "NaN", " "]), ids)
    assert list(table.index) == ["A", "E2", "E3", "E4"]
    assert list(table["gene_id"]) == ["E1", "E2", "E3", "E4"]
