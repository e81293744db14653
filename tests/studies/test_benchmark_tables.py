"""The tables of a benchmark: summaries that can be recomputed, in Markdown and in LaTeX."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from strank.evaluation.scores import SCORES
from strank.metrics.significance import combine_sections
from strank.studies.benchmark.tables import latex_table, summarise_benchmark, write_tables

# Four that are fitted, library size, the first of all shuffled, and the section by itself.
N_METHODS = 7


def table_of(values: dict[tuple, float], **columns) -> pd.DataFrame:
    """Results in the form of a benchmark, of (method, seed, section, gene, score)."""
    names = ["method", "seed", "section", "gene", "score"]
    table = pd.Series(values).rename_axis(names).rename("value").reset_index()
    facts = {"encoder": "mine", "genes": "2", "patient": "P", "patient_seen": False}
    return table.assign(**facts, **columns)


def test_summary_by_hand():
    """Two seeds, two sections, two genes, one value missing."""
    found = summarise_benchmark(
        table_of(
            {
                ("linear, list", 0, "S", "A", "scc"): 0.5,
                ("linear, list", 0, "S", "B", "scc"): 0.7,
                ("linear, list", 0, "T", "A", "scc"): 0.3,
                ("linear, list", 0, "T", "B", "scc"): np.nan,
                ("mlp, list", 0, "S", "A", "scc"): 0.4,
                ("mlp, list", 1, "S", "A", "scc"): 0.6,
                ("mlp, list", 0, "S", "B", "scc"): 0.3,
                ("mlp, list", 1, "S", "B", "scc"): 0.1,
                ("mlp, list", 0, "T", "A", "scc"): 0.0,
                ("mlp, list", 1, "T", "A", "scc"): 0.2,
            }
        ),
        pd.DataFrame(
            {
                **{"encoder": "mine", "genes": "2"},
                **{"section": ["S", "S", "T", "T"], "gene": ["A", "B", "A", "B"]},
                # Of a ceiling that is mostly noise, no fraction is taken.
                "ceiling_scc": [1.0, 0.04, 0.5, 0.9],
                "ceiling_pearson": 1.0,
                "ceiling_depth_matched": 1.0,
            }
        ),
    ).set_index("method")
    means = found["mean"]
    assert means["linear, list"] == pytest.approx((0.6 + 0.3) / 2)
    assert means["mlp, list"] == pytest.approx(((0.5 + 0.2) / 2 + 0.1) / 2)
    assert found.loc["mlp, list", "difference"] == pytest.approx(((0 - 0.5) / 2 - 0.2) / 2)
    assert np.isnan(found.loc["linear, list", "difference"])
    assert found.loc["linear, list", "fraction_of_ceiling"] == pytest.approx(0.8 / 1.5)
    assert found.loc["mlp, list", "fraction_of_ceiling"] == pytest.approx(0.6 / 1.5)
    assert found[["n_sections", "n_genes"]].to_numpy().tolist() == [[2, 2], [2, 2]]
    assert found["seeds"].tolist() == [1, 2]


def test_summary_of_a_run_by_pandas(done):
    results, genes = (pd.read_parquet(done / f"{name}.parquet") for name in ("results", "genes"))
    summary = pd.read_csv(done / "summary.csv", dtype={"genes": str})
    keys = ["encoder", "genes", "patient_seen", "method", "score"]
    assert not summary.duplicated(keys).any()
    assert len(summary) == 2 * N_METHODS * len(SCORES)
    summary = summary.set_index(keys).sort_index()
    rows = results[results["score"] != "p_value"].astype({"method": str, "score": str})
    by_section = rows.groupby([*keys, "section"], observed=True)["value"].mean()
    expected = by_section.groupby(keys, observed=True).mean()
    np.testing.assert_allclose(summary["mean"][expected.index], expected, rtol=1e-4)
    wide = rows.pivot_table("value", ["genes", "score", "section", "gene"], "method", observed=True)
    paired = wide.sub(wide["linear, list"], axis=0)
    for by in (["genes", "score", "section"], ["genes", "score"]):
        paired = paired.groupby(by, observed=True).mean()
    known = summary[summary["difference"].notna()]
    assert len(known) == 2 * (N_METHODS - 1) * (len(SCORES) - 1)
    for (_, size, _, method, score), row in known.iterrows():
        assert row["difference"] == pytest.approx(
            paired.loc[(size, score), method], rel=1e-5, abs=1e-9
        )
        assert row["difference_low"] <= row["difference"] <= row["difference_high"]
    ceiling = genes.set_index(["genes", "section", "gene"])["ceiling_scc"].rename("ceiling")
    scc = rows[(rows["score"] == "scc") & (rows["method"] == "ridge")]
    both = scc.merge(ceiling.reset_index(), on=["genes", "section", "gene"])
    both = both[both["ceiling"] > 0.05].groupby("genes", observed=True)[["value", "ceiling"]].sum()
    for size, fraction in (both["value"] / both["ceiling"]).items():
        ours = summary.loc[("mine", size, False, "ridge", "scc"), "fraction_of_ceiling"]
        assert ours == pytest.approx(fraction, rel=1e-5)
    p = results[results["score"] == "p_value"].astype({"method": str})
    for (size, method), mine in p.groupby(["genes", "method"], observed=True):
        wide = mine.pivot_table("value", "section", "gene", observed=True)
        q = stats.false_discovery_control(combine_sections(wide.to_numpy()))
        row = summary.loc[("mine", size, False, method, "predicted")]
        assert row["mean"] == pytest.approx((q < 0.05).mean())
        assert row["n_genes"] == len(q)
    assert summary.loc[("mine", "all", False, "linear, list", "predicted"), "mean"] > 0.9
    assert summary.loc[("mine", "all", False, "shuffled", "predicted"), "mean"] < 0.4


def test_p_values_are_combined_as_scipy_does():
    p = np.random.default_rng(0).uniform(0.002, 0.99, size=(4, 6))
    p[1, 2], p[:3, 3], p[:, 4] = np.nan, np.nan, np.nan
    p[:, 5] = [0.001, 1.0, 0.2, 0.4]
    found = combine_sections(p)
    # What came from 999 draws says no more than that it is above 0.999.
    p[1, 5] = 0.999
    for gene in (0, 1, 2, 3, 5):
        known = p[np.isfinite(p[:, gene]), gene]
        expected = stats.combine_pvalues(known, method="stouffer").pvalue
        assert found[gene] == pytest.approx(expected, rel=1e-9)
    assert np.isnan(found[4])


def test_a_gene_that_a_method_does_not_order_is_not_predicted():
    """Scores that are constant have no p-value: left out, a method with one gene had 100 %."""
    p = {("all", 0): [1e-3] * 4, ("some", 0): [1e-3, np.nan, np.nan, np.nan]}
    # The first seed of this one could not be trained.
    p |= {("late", 1): [1e-3, 0.5, 0.9, np.nan], ("late", 2): [0.9] * 4}
    values = {
        (method, seed, "S", gene, score): value if score == "p_value" else 0.1
        for (method, seed), column in p.items()
        for gene, value in zip("ABCD", column, strict=True)
        for score in ("p_value", "depth_matched")
    }
    # Of a gene that nobody has a p-value of, nothing is said.
    values |= {(m, s, "S", "E", "p_value"): np.nan for m, s in p}
    ceiling = {f"ceiling_{name}": 1.0 for name in ("scc", "pearson", "depth_matched")}
    genes = pd.DataFrame({"encoder": "mine", "genes": "2", "section": "S", "gene": list("ABCDE")})
    summary = summarise_benchmark(table_of(values), genes.assign(**ceiling))
    predicted = summary[summary["score"] == "predicted"].set_index("method")
    assert predicted["mean"].to_dict() == {"all": 1.0, "some": 0.25, "late": 0.25}
    assert predicted["n_genes"].tolist() == [4] * 3


EVIL = r"50% a&b_c|d<i>#{e}$\f"


@pytest.fixture
def shown(done) -> pd.DataFrame:
    """A summary whose encoder, and one method, have names that mean something to Markdown."""
    summary = pd.read_csv(done / "summary.csv", dtype={"genes": str})
    more = summary.assign(encoder=EVIL, genes="1000").query("genes == '1000'")
    table = pd.concat([summary, more.drop_duplicates(["method", "score"])])
    return table.replace({"method": {"linear, poisson": "timm:a_b|c, list"}})


def test_markdown_has_as_many_cells_in_every_line(shown, tmp_path):
    write_tables(tmp_path, shown, "scc")
    lines = (tmp_path / "summary.md").read_text().splitlines()
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    assert len(lines) == 2 + 3 * N_METHODS
    assert {len(row) for row in rows} == {14}
    cells = [[cell.strip().replace(r"\|", "|") for cell in row] for row in rows]
    assert cells[0][:5] == ["encoder", "genes", "patient", "method", "scc"]
    assert cells[0][11:] == ["scc, against linear, list", "of ceiling", "genes predicted"]
    body = cells[2:]
    assert "<" not in (tmp_path / "summary.md").read_text()
    # By encoder, then by the size of the panel, then by the headline.
    escaped = EVIL.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    sizes = np.repeat(["1000", "3", "all"], N_METHODS)
    assert [row[:2] for row in body] == [
        [escaped if size == "1000" else "mine", size] for size in sizes
    ]
    assert "timm:a_b|c, list" in [row[3] for row in body]
    for start in range(0, len(body), N_METHODS):
        means = [float(row[4].split()[0]) for row in body[start : start + N_METHODS]]
        assert means == sorted(means, reverse=True)
    for row in body:
        assert all(re.fullmatch(r"-?\d\.\d{3} \[-?\d\.\d{3}, -?\d\.\d{3}\]", c) for c in row[4:11])
        is_reference = row[3] == "linear, list"
        assert (row[11] == "") == is_reference
        assert is_reference or re.fullmatch(r"[+-]\d\.\d{3} \[-?\d\.\d{3}, -?\d\.\d{3}\]", row[11])
        assert re.fullmatch(r"-?\d+%", row[12])


def test_latex_has_as_many_cells_in_every_line(shown, tmp_path):
    write_tables(tmp_path, shown, "depth_matched")
    text = (tmp_path / "summary.tex").read_text()
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 1 + 3 * N_METHODS
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {13}
    evil = r"50\% a\&b\_c\textbar{}d\textless{}i\textgreater{}\#\{e\}\$\textbackslash f & 1000 &"
    assert sum(row.startswith(evil) for row in rows) == N_METHODS
    assert r"depth\_matched, against linear, list" in rows[0]
    assert not re.search(r"[|<>]|(?<!\\)[%#$_]", text)


def test_latex_is_as_pandas_writes_it():
    table = pd.DataFrame({"a_b ^~": [r"50% a&b_c#{e}$\f ^~", "x"], "c": ["1", ""]})
    assert latex_table(table) == table.to_latex(index=False, escape=True)


def test_a_table_keeps_its_last_zeros(shown, tmp_path):
    """Numbers without an interval would be read as such, and lose them."""
    ends = ["low", "high", "difference_low", "difference_high"]
    write_tables(tmp_path, shown.assign(mean=0.3, **dict.fromkeys(ends, np.nan)), "lift")
    row = (tmp_path / "summary.md").read_text().splitlines()[-1]
    assert row.count(" 0.300 ") == 7
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / "summary.csv")[["mean", "low"]],
        shown.assign(mean=0.3, low=np.nan)[["mean", "low"]].reset_index(drop=True),
    )
