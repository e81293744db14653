"""The tables of a benchmark: summaries that can be recomputed, in Markdown and in LaTeX."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from strank.evaluation.results import write_parts
from strank.evaluation.scores import SCORES
from strank.files import write_json
from strank.metrics.significance import combine_sections, mean_intervals
from strank.studies.benchmark.tables import latex_table, summarise_benchmark, write_tables

# Four that are fitted, library size, the first of all shuffled, and the section by itself.
N_METHODS = 7


KEYS = ["encoder", "genes", "fold", "seed", "section", "patient", "patient_seen", "gene", "method"]


def table_of(values: dict[tuple, float], **columns) -> pd.DataFrame:
    """Results in the form of a benchmark, of (method, seed, section, gene, score)."""
    names = ["method", "seed", "section", "gene", "score"]
    table = pd.Series(values).rename_axis(names).rename("value").reset_index()
    facts = {"encoder": "mine", "genes": "2", "fold": "F", "patient": "P", "patient_seen": False}
    return table.assign(**facts, **columns)


def summary_of(out: Path, results: pd.DataFrame, genes: pd.DataFrame, **how) -> pd.DataFrame:
    """The summary of a folder that has these tables, a row a score, in its partitions."""
    wide = results.pivot(index=KEYS, columns="score", values="value")  # noqa: PD010
    wide = wide.reindex(columns=SCORES).reset_index().sort_values(["method", "seed"])
    facts = results[[*KEYS[:3], "section", "patient", "patient_seen", "gene"]].drop_duplicates()
    genes = facts.merge(genes)
    for keys, rows in wide.groupby(KEYS[:3]):
        task = dict(zip(KEYS, keys, strict=False))
        of_task = (genes[list(task)] == pd.Series(task)).all(axis=1)
        tables = (table.drop(columns=list(task)) for table in (rows, genes[of_task]))
        write_parts(out, task, tables, {})
    about = {name: sorted(set(results[name])) for name in ("encoder", "genes")}
    write_json(out / "benchmark.json", {"encoders": about["encoder"], "genes": about["genes"]})
    return summarise_benchmark(out, **how)


def test_summary_by_hand(tmp_path):
    """Two seeds, two sections, two genes, one value missing."""
    found = summary_of(
        tmp_path,
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
    )
    found = found[found["score"] == "scc"].set_index("method")
    means = found["mean"]
    assert means["linear, list"] == pytest.approx((0.6 + 0.3) / 2)
    assert means["mlp, list"] == pytest.approx(((0.5 + 0.2) / 2 + 0.1) / 2)
    assert found.loc["mlp, list", "difference"] == pytest.approx(((0 - 0.5) / 2 - 0.2) / 2)
    assert np.isnan(found.loc["linear, list", "difference"])
    assert found.loc["linear, list", "fraction_of_ceiling"] == pytest.approx(0.8 / 1.5)
    assert found.loc["mlp, list", "fraction_of_ceiling"] == pytest.approx(0.6 / 1.5)
    assert found[["n_sections", "n_genes"]].to_numpy().tolist() == [[2, 2], [2, 2]]
    assert found["seeds"].tolist() == [1, 2]


def test_summary_of_a_run_by_pandas(bench, done):
    results, genes = bench.results(done), pd.read_parquet(done / "genes")
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


def in_memory(results: pd.DataFrame, genes: pd.DataFrame) -> pd.DataFrame:
    """The summary by the plain formula: all rows at once, as tables of (section, gene)."""
    found = []
    for keys, rows in results.groupby(["encoder", "genes", "patient_seen"]):
        known = rows[rows["score"] != "p_value"]
        means = known.pivot_table("value", ["method", "score"], ["section", "gene"], dropna=False)
        levels = [means.columns.unique(name) for name in ("section", "gene")]
        cells = pd.MultiIndex.from_product(levels)
        cube = means.reindex(columns=cells).to_numpy().reshape(len(means), *map(len, levels))
        patient = rows.drop_duplicates("section").set_index("section")["patient"][levels[0]]
        names = means.index.get_level_values("method")
        at = means.index.get_indexer(
            [("linear, list", score) for score in means.index.get_level_values("score")]
        )
        own, against = (
            mean_intervals(x, patient=patient.to_numpy()) for x in (cube, cube - cube[at])
        )
        table = pd.DataFrame(own._asdict(), index=means.index)
        for name, values in zip(("", "_low", "_high"), against, strict=True):
            table[f"difference{name}"] = np.where(names == "linear, list", np.nan, values)
        mine = genes[(genes["encoder"] == keys[0]) & (genes["genes"] == keys[1])]
        by_gene = mine.groupby(["section", "gene"])
        for score in ("scc", "pearson", "depth_matched"):
            top = by_gene[f"ceiling_{score}"].mean().reindex(cells).to_numpy()
            for row in means.index[means.index.get_level_values("score") == score]:
                values = means.reindex(columns=cells).loc[row].to_numpy()
                both = np.isfinite(values) & (top > 0.05)
                table.loc[row, "fraction_of_ceiling"] = values[both].sum() / top[both].sum()
        table["n_sections"] = np.isfinite(cube).any(2).sum(1)
        table["n_genes"] = np.isfinite(cube).any(1).sum(1)
        p = rows[rows["score"] == "p_value"]
        p = p[p["seed"] == p.groupby("method")["seed"].transform("min")]
        wide = p.pivot_table("value", "method", ["section", "gene"], dropna=False)[cells]
        wide = wide.where(wide.notna() | wide.isna().all(), 1.0)
        for method, values in wide.iterrows():
            z = stats.norm.isf(values.clip(0.001, 0.999)).reshape(len(levels[0]), -1)
            n = np.isfinite(z).sum(0)
            chance = stats.norm.sf(np.nansum(z, axis=0)[n > 0] / np.sqrt(n[n > 0]))
            share = (stats.false_discovery_control(chance) < 0.05).mean()
            row = {"mean": share, "n_sections": len(levels[0]), "n_genes": (n > 0).sum()}
            table.loc[(method, "predicted"), list(row)] = row.values()
        seeds = rows.groupby("method")["seed"].nunique()
        table = table.reset_index().assign(encoder=keys[0], genes=keys[1], patient_seen=keys[2])
        found.append(table.assign(seeds=table["method"].map(seeds)))
    return pd.concat(found, ignore_index=True)


def random_tables() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Known and new patients, seeds, a section of two folds, and values that are not there."""
    rng = np.random.default_rng(0)
    keys = {
        **{"encoder": ["mine", "öther/1"], "genes": ["5", "all"]},
        **{"section": ["S", "T", "U", "V"], "gene": list("ABCDE"), "score": list(SCORES)},
        **{"method": ["linear, list", "mlp, list", "ridge", "within section"], "seed": [0, 1]},
    }
    table = pd.MultiIndex.from_product(keys.values(), names=keys).to_frame(index=False)
    table = table[(table["seed"] == 0) | (table["method"] == "mlp, list")]
    table["patient"] = table["section"].map({"S": "P", "T": "P", "U": "Q", "V": "R"})
    table["patient_seen"] = table["section"] == "V"
    table["fold"] = table["patient"]
    table = table[~table["patient_seen"] | (table["method"] != "within section")]
    twice = table[table["section"] == "U"].assign(fold="another")
    table = pd.concat([table, twice], ignore_index=True)
    table["value"] = rng.uniform(0, 0.3, len(table))
    table.loc[rng.random(len(table)) < 0.1, "value"] = np.nan
    # A gene without variation has no score by anyone.
    table.loc[(table["gene"] == "B") & (table["section"] == "T"), "value"] = np.nan
    genes = table[["encoder", "genes", "fold", "section", "gene"]].drop_duplicates()
    for name in ("scc", "pearson", "depth_matched"):
        genes[f"ceiling_{name}"] = rng.uniform(0, 1, len(genes))
    return table, genes


@pytest.mark.parametrize("apart", [True, False])
def test_method_by_method_it_is_what_it_is_in_memory(tmp_path, apart):
    results, genes = random_tables()
    found = summary_of(tmp_path, results, genes, apart=apart)
    expected = in_memory(results if apart else results.assign(patient_seen=False), genes)
    keys = ["encoder", "genes", "patient_seen", "method", "score"]
    assert len(found) == len(expected) > 100
    found, expected = (table.set_index(keys).sort_index() for table in (found, expected))
    expected = expected[list(found)].astype(found.dtypes)
    pd.testing.assert_frame_equal(found, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("reader", ["pandas", "polars", "duckdb"])
def test_tables_open_elsewhere(done, reader):
    """As one table, with what their paths say as columns."""
    library = pytest.importorskip(reader, reason=f"needs {reader}")
    if reader == "pandas":
        table = library.read_parquet(done / "results")
    elif reader == "polars":
        table = library.scan_parquet(f"{done}/results/").collect().to_pandas()
    else:
        table = library.sql(f"from '{done}/results/**/*.parquet'").df()
    assert {*KEYS, *SCORES} == {*table}
    assert set(table["fold"]) == {"A", "B", "C"}
    means = table.groupby(["genes", "method"], observed=True)["scc"].mean()
    summary = pd.read_csv(done / "summary.csv").query("score == 'scc'")
    assert len(means) == len(summary)
    assert means["3", "ridge"] == pytest.approx(
        done_mean(done, genes="3", method="ridge"), rel=1e-12
    )


def done_mean(done: Path, **where: str) -> float:
    """Of SCC over the rows of all partitions of a panel."""
    paths = (done / "results/encoder=mine" / f"genes={where['genes']}").rglob("part.parquet")
    rows = pd.concat([pd.read_parquet(path, partitioning=None) for path in paths])
    return rows[rows["method"] == where["method"]]["scc"].mean()


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


def test_a_gene_that_a_method_does_not_order_is_not_predicted(tmp_path):
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
    summary = summary_of(tmp_path, table_of(values), genes.assign(**ceiling))
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
