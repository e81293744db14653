from __future__ import annotations

import hashlib
import json
import re
import shutil
from base64 import b64decode
from io import BytesIO

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import combine_pvalues, false_discovery_control
from typer.testing import CliRunner

from strank.cli import app
from strank.cohort.store import read_h5ad, write_h5ad
from strank.errors import InputError
from strank.evaluation.calibration import calibration_line, change_sums
from strank.files import read_json, write_json
from strank.report import benchmark as benchmark_page
from strank.report.benchmark import data as benchmark_data
from strank.report.benchmark import parts as benchmark_parts
from strank.report.benchmark import write_report
from strank.report.benchmark.data import (
    gene_tables,
    map_of,
    map_values,
    open_benchmark,
    test_sections,
)

# What pytest would take for a test of its own.
all_sections = test_sections
del test_sections

EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture
def copied(benchmark_folder, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(benchmark_folder.folder, folder)
    return folder


def edit(folder, **changes):
    write_json(folder / "benchmark.json", read_json(folder / "benchmark.json") | changes)


@pytest.fixture(scope="module")
def made(benchmark_folder):
    return write_report(benchmark_folder.folder)


def data_of(path):
    text = path.read_text()
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])


def floats(text):
    return np.frombuffer(b64decode(text), dtype="<f4")


def values_of(table):
    shape = len(table["methods"]), len(table["scores"]), len(table["names"])
    return floats(table["values"]).reshape(shape)


@pytest.fixture
def table(benchmark_folder):
    found = list(gene_tables(open_benchmark(benchmark_folder.folder)))
    wanted = {"encoder": "other", "genes": "all", "patients": "new"}
    return next(t for t in found if wanted.items() <= t.items())


def of_table(frame):
    kept = frame[(frame["encoder"] == "other") & (frame["genes"] == "all")]
    return kept[kept["section"] != "C1"]


def test_values_by_gene_are_means_over_sections_and_seeds(benchmark_folder, table):
    rows = of_table(benchmark_folder.results)
    means = rows.groupby(["method", "score", "gene"])["value"].mean()
    for m, method in enumerate(table["methods"]):
        for score in ("scc", "depth_matched", "lift"):
            found = values_of(table)[m, table["scores"].index(score)]
            expected = means[method, score].reindex(table["names"])
            np.testing.assert_allclose(found, expected, rtol=1e-6)
    facts = of_table(benchmark_folder.genes).groupby("gene")
    for found, column in [
        (table["mean_counts"], "mean_counts"),
        (table["ceilings"]["depth_matched"], "ceiling_depth_matched"),
    ]:
        expected = facts[column].mean().reindex(table["names"])
        np.testing.assert_allclose(floats(found), expected, rtol=1e-6)
    assert (table["n_sections"], table["n_genes"]) == (3, 12)


def test_chance_is_combined_over_sections(benchmark_folder, table):
    rows = of_table(benchmark_folder.results)
    rows = rows[(rows["method"] == "mlp, poisson") & (rows["score"] == "p_value")]
    rows = rows[rows["seed"] == 0]
    expected = [
        combine_pvalues(rows.loc[rows["gene"] == gene, "value"], method="stouffer").pvalue
        for gene in table["names"]
    ]
    m, scores = table["methods"].index("mlp, poisson"), table["scores"]
    p, q = (values_of(table)[m, scores.index(name)] for name in ("p_value", "q_value"))
    np.testing.assert_allclose(p, expected, rtol=1e-5)
    np.testing.assert_allclose(q, false_discovery_control(expected), rtol=1e-5)


def test_of_many_genes_some_are_taken_over_all_counts(benchmark_folder, monkeypatch):
    monkeypatch.setattr(benchmark_data, "_BUDGET", 1000)
    monkeypatch.setattr(benchmark_data, "_LEAST_GENES", 5)
    for table in gene_tables(open_benchmark(benchmark_folder.folder)):
        assert len(table["names"]) == 5
        frame = benchmark_folder.genes
        kept = (frame["encoder"] == table["encoder"]) & (frame["genes"] == table["genes"])
        by_counts = frame[kept].groupby("gene")["mean_counts"].mean().sort_values()
        assert {by_counts.index[0], by_counts.index[-1]} <= set(table["names"])
        assert table["n_genes"] == len(by_counts)


def test_a_table_lists_the_genes_of_its_own_folds(copied):
    for name in ("results", "genes"):
        for path in (copied / name).rglob("part.parquet"):
            rows = pd.read_parquet(path, partitioning=None)
            rows[(rows["gene"] != "G1") | ("fold=C" in str(path))].to_parquet(path, index=False)
    for table in gene_tables(open_benchmark(copied)):
        assert ("G1" in table["names"]) == (table["patients"] == "known")
        assert table["n_genes"] == len(table["names"])


def test_maps_are_the_predictions_to_a_byte(benchmark_folder, monkeypatch):
    benchmark, notes = open_benchmark(benchmark_folder.folder), []
    sections = list(all_sections(benchmark, benchmark_folder.cohort, notes))
    assert notes == []
    assert [s.name for s in sections] == ["A1", "A2", "B1", "C1"]
    assert [s.patients for s in sections] == ["new"] * 3 + ["known"]
    section = sections[1]
    monkeypatch.setattr(benchmark_data, "GENES", 4)
    made, blocks = map_of(section, notes), list(map_values(section))
    at = made["predicted"].index({"encoder": "mine", "method": "ridge"})
    expected = benchmark_folder.predictions["mine", "A", "ridge"].X[40:]
    expected = expected - expected.mean(0)
    layers = [block["predicted"][at] for block in blocks]
    codes = [np.frombuffer(b64decode(layer["codes"]), np.uint8) for layer in layers]
    assert [len(code) for code in codes] == [4 * 40, 2 * 40]
    codes = np.concatenate(codes).reshape(6, 40).astype(float)
    limits = np.concatenate([layer["limits"] for layer in layers])
    found = ((codes - 127) / 127).T * limits
    assert (np.abs(found - expected) <= 0.51 * limits / 127 + 1e-3 * limits).all()
    # Spots lie where they lie on the part of the image that is shown.
    positions = section.observed.obsm["spatial"] * 2.0
    shift = positions - np.array(made["xy"]).T
    assert np.ptp(shift, axis=0).max() <= 1
    size_um = np.array(made["image"]["size"])
    picture = np.asarray(Image.open(BytesIO(b64decode(made["image"]["jpeg"])))).astype(float)
    x, y = (
        np.array(made["xy"]) / size_um[:, None] * [[picture.shape[1]], [picture.shape[0]]]
    ).astype(int)
    np.testing.assert_allclose(picture[y, x, :2], positions / 2 * 255 / [700, 600], atol=3)


def test_the_truth_is_calibrated_and_too_strong_scores_are_not():
    rng = np.random.default_rng(0)
    truth = rng.normal(0, 0.4, (400, 20))
    depth = rng.lognormal(8, 0.5, 400)
    rate = depth[:, None] * np.exp(truth) * rng.lognormal(-5, 1, 20)
    counts = rng.poisson(rate)
    slope = {
        name: calibration_line(change_sums(scores, counts, depth))["slope"]
        for name, scores in {
            "truth": truth,
            "twice": 2 * truth,
            "noise": rng.permutation(truth),
            "depth": np.broadcast_to(np.log(depth)[:, None], truth.shape),
        }.items()
    }
    assert slope["truth"] == pytest.approx(1, abs=0.03)
    assert slope["twice"] == pytest.approx(0.5, abs=0.05)
    assert slope["noise"] == pytest.approx(0, abs=0.05)
    assert slope["depth"] == pytest.approx(0, abs=0.05)


@given(st.integers(0, 1000), st.floats(-5, 5), st.floats(0.1, 10))
def test_calibration_knows_no_scale_of_depth_and_no_constant(seed, constant, factor):
    rng = np.random.default_rng(seed)
    scores, counts = rng.normal(0, 0.5, (30, 4)), rng.poisson(20, (30, 4))
    depth = rng.lognormal(3, 0.3, 30)
    first = change_sums(scores, counts, depth)
    second = change_sums(scores + constant, counts, depth * factor)
    assert first.observed.sum() == counts.sum()
    for name in ("observed", "predicted", "by_depth"):
        np.testing.assert_allclose(getattr(second, name).sum(), getattr(first, name).sum())
    slopes = [calibration_line(sums)["slope"] for sums in (first, second)]
    assert slopes[0] == pytest.approx(slopes[1], abs=1e-3)


def test_scores_that_do_not_vary_have_no_slope():
    line = calibration_line(change_sums(np.zeros((30, 2)), np.full((30, 2), 9), np.ones(30)))
    assert line["slope"] is None


def test_a_line_is_pooled_by_counts(made):
    lines = data_of(made.path)["calibration"]
    assert {line["method"] for line in lines} == {"linear, list", "mlp, poisson"}
    assert {line["patients"] for line in lines} == {"new", "known", "all"}
    new = next(line for line in lines if line["patients"] == "new")
    assert [s["section"] for s in new["sections"]] == ["A1", "A2", "B1"]
    slopes = [s["slope"] for s in new["sections"]]
    assert min(slopes) < new["pooled"]["slope"] < max(slopes)


def test_the_page_is_whole_and_names_are_text(made):
    html = made.path.read_text()
    assert made.notes == ()
    assert made.n_bytes == made.path.stat().st_size < 7e6
    for wrong in (EVIL, "<script>alert", "<b>list</b>"):
        assert wrong not in html
    assert "&lt;script&gt;alert(3)&lt;/script&gt;" in html
    assert "mine &amp; yours" in html
    assert "ab" * 32 in html
    assert not re.search(r'(src|href)="(?!data:|#)', html.split('id="data"')[0])


def test_a_page_without_its_cohort_says_so(copied, benchmark_folder, tmp_path):
    edit(copied, cohort=str(tmp_path / "gone"))
    made = write_report(copied)
    assert len(made.notes) == 1
    assert re.search(r"No observed counts and no H&E: .*gone.* `cohort`", made.notes[0])
    assert "No observed counts and no H&amp;E" in made.path.read_text()
    data = data_of(made.path)
    assert data["calibration"] == []
    maps = [data["parts"][m["part"]] for m in data["maps"]]
    assert all(not m["observed"] and m["unit"] == "px" for m in maps)
    assert all(data["parts"][m["blocks"][0]]["observed"] is None for m in data["maps"])
    assert write_report(copied, cohort=benchmark_folder.cohort).notes == ()
    with pytest.raises(InputError, match="elsewhere: no such folder"):
        write_report(copied, cohort=tmp_path / "elsewhere")


def test_other_counts_and_absent_images_are_told(copied, benchmark_folder, tmp_path):
    cohort = tmp_path / "cohort"
    shutil.copytree(benchmark_folder.cohort, cohort)
    adata = read_h5ad(cohort / "A1.h5ad")
    adata.uns["strank"]["image"] = str(tmp_path / "A1.png")
    write_h5ad(adata, cohort / "A1.h5ad")
    facts = read_json(copied / "benchmark.json")
    facts["sections"]["B1"]["counts_sha256"] = "0" * 64
    write_json(copied / "benchmark.json", facts)
    (cohort / "C1.h5ad").unlink()
    notes = write_report(copied, cohort=cohort).notes
    assert len(notes) == 3
    assert re.search(r"No H&E: .*A1.png: no such image", notes[0])
    assert "section B1" in notes[1]
    assert "other counts than the benchmark" in notes[1]
    assert "C1.h5ad: no such file" in notes[2]


def test_maps_of_a_large_cohort_are_left_out_evenly(copied, monkeypatch):
    monkeypatch.setattr(benchmark_page, "_BUDGET", 2 * benchmark_page._PICTURE_BYTES + 9000)
    made = write_report(copied)
    assert [m["section"] for m in data_of(made.path)["maps"]] == ["A2", "C1"]
    assert made.notes == ("Maps of 2 of 4 sections: those of all would be too large",)


def test_what_a_page_cannot_hold_lies_beside_it(copied, made, monkeypatch):
    """The same, part by part; and gone again where the page holds it."""
    whole = data_of(made.path)
    assert (whole["files"], made.files) == ({}, None)
    monkeypatch.setattr(benchmark_parts, "_MOST", 5000)
    monkeypatch.setattr(benchmark_data, "GENES", 4)
    monkeypatch.setattr(benchmark_page, "GENES", 4)
    apart = write_report(copied)
    data = data_of(apart.path)
    assert apart.files == copied / "report_files"
    assert data["parts"] == {}
    assert {path.name for path in apart.files.iterdir()} == {*data["files"].values()}
    total = sum(path.stat().st_size for path in apart.files.iterdir())
    assert apart.notes == (
        f"Genes and maps lie in report_files beside this page ({total / 1e6:.1f} MB): keep and "
        "send both",
    )
    assert apart.n_bytes < made.n_bytes
    read = {}
    for name, file in data["files"].items():
        text = (apart.files / file).read_text()
        assert not {*"<>&"} & {*text}
        read[name] = json.loads(text.removeprefix(f'page.take("{name}", ').removesuffix(");\n"))
        assert file.split(".")[1] == hashlib.sha256(text.encode()).hexdigest()[:12]
    assert [read[t["part"]] for t in data["tables"]] == [
        whole["parts"][t["part"]] for t in whole["tables"]
    ]
    assert [read[m["part"]] for m in data["maps"]] == [
        whole["parts"][m["part"]] for m in whole["maps"]
    ]
    assert [len(m["blocks"]) for m in data["maps"]] == [2] * 4
    again = write_report(copied)
    assert {path.name for path in again.files.iterdir()} == {*data["files"].values()}
    monkeypatch.setattr(benchmark_parts, "_MOST", 10**9)
    assert write_report(copied).files is None
    assert not apart.files.exists()


def test_a_page_without_predictions_says_so(copied):
    shutil.rmtree(copied / "predictions")
    made = write_report(copied)
    assert "no predictions for a small panel" in made.notes[0]
    assert data_of(made.path)["maps"] == []


def test_other_folders_are_refused(copied, tmp_path):
    with pytest.raises(InputError, match=r"no benchmark.json there; make it with"):
        write_report(tmp_path)
    path = next((copied / "results").rglob("part.parquet"))
    path.write_bytes(b"PAR1 but no more")
    with pytest.raises(InputError, match=r"results: no readable table of a benchmark"):
        write_report(copied)
    summary = pd.read_csv(copied / "summary.csv")
    summary.drop(columns="low").to_csv(copied / "summary.csv", index=False)
    with pytest.raises(InputError, match=r"summary.csv lacks columns low"):
        write_report(copied)
    (copied / "summary.csv").unlink()
    with pytest.raises(InputError, match=r"summary.csv: no such file; let `strank benchmark` come"):
        write_report(copied)
    facts = read_json(copied / "benchmark.json")
    del facts["reference"]
    write_json(copied / "benchmark.json", facts)
    with pytest.raises(InputError, match=r"benchmark.json lacks reference"):
        write_report(copied)


def test_predictions_of_other_spots_are_refused(copied):
    paths = sorted((copied / "predictions/mine/6").glob("*/linear*.h5ad"))
    shutil.copy(paths[1], paths[0])
    with pytest.raises(InputError, match="other spots or genes"):
        write_report(copied)


def test_the_command_says_where_the_page_is(copied):
    told = CliRunner().invoke(app, ["report", str(copied), "--json"])
    assert told.exit_code == 0, told.output
    facts = json.loads(told.stdout)
    assert facts["report"] == str(copied / "report.html")
    assert facts["bytes"] == (copied / "report.html").stat().st_size
    refused = CliRunner().invoke(app, ["report", str(copied / "predictions")])
    assert refused.exit_code == 2
    assert "no benchmark.json there" in refused.stderr
