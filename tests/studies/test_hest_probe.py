"""The HEST probe: its ridge to the digit, its scores, what `list` finds, and what it says."""

from __future__ import annotations

import json
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse, stats
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from strank.errors import InputError
from strank.io import read_hest_task
from strank.metrics.correlation import correlation
from strank.studies.hest_probe import predict_methods, run_probe, stack

PANEL = [f"G{i}" for i in (3, 0, 5, 1, 4)]
N_COMPONENTS = 6
# The second fold trains on one sample, and pools two in its test.
FOLDS = {0: (("S0", "S1"), ("S2",)), 1: (("S1",), ("S2", "S0"))}


def write_task(
    folder: Path, *, n_spots: int = 150, width: int = 20, dtype: str = "float32"
) -> None:
    """Three samples of other depth and staining; the two files of each in their own order."""
    for part in ("task/splits", "task/adata", "emb"):
        (folder / part).mkdir(parents=True)
    (folder / "task/var_50genes.json").write_text(json.dumps({"genes": PANEL}))
    for k, samples in FOLDS.items():
        for part, names in zip(("train", "test"), samples, strict=True):
            rows = [(name, f"patches/{name}.h5", f"adata/{name}.h5ad") for name in names]
            table = pd.DataFrame(rows, columns=["sample_id", "patches_path", "expr_path"])
            table.to_csv(folder / f"task/splits/{part}_{k}.csv", index=False)
    shared = np.random.default_rng(0)
    mixing = shared.normal(size=(3, width))
    slopes = shared.normal(scale=0.5, size=(3, 8))
    for number, depth in enumerate((1.0, 4.0, 0.5)):
        rng = np.random.default_rng(number + 1)
        state = rng.normal(size=(n_spots, 3))
        # Ahead of the noise, the components that count are those of the state.
        features = 3 * state @ mixing + rng.normal(size=(n_spots, width)) + number
        rate = 4 * depth * rng.lognormal(sigma=0.5, size=(n_spots, 1)) * np.exp(state @ slopes)
        counts = rng.poisson(rate)
        counts[3] = 0
        spots = np.array([f"spot{i}" for i in range(n_spots)])
        order, genes = rng.permutation(n_spots)[: n_spots - 10], rng.permutation(8)
        anndata.AnnData(
            sparse.csr_matrix(counts[order][:, genes], dtype=np.float32),
            obs=pd.DataFrame(index=spots[order]),
            var=pd.DataFrame(index=[f"G{i}" for i in genes]),
        ).write_h5ad(folder / f"task/adata/S{number}.h5ad")
        embedded = rng.permutation(n_spots)[: n_spots - 20]
        with h5py.File(folder / f"emb/S{number}.h5", "w") as file:
            file["embeddings"] = features[embedded].astype(dtype)
            file["barcodes"] = spots[embedded].astype("S")[:, None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hest")
    write_task(folder)
    return folder


@pytest.fixture(scope="module")
def result(folder):
    return run_probe(read_hest_task(folder / "task", folder / "emb"), n_components=N_COMPONENTS)


def hest_fold(folder: Path, k: int, n_components: int) -> list[float]:
    """Pearson of each gene by HEST's predict_single_split, load_adata and train_test_reg."""
    with (folder / "task/var_50genes.json").open() as file:
        genes = json.load(file)["genes"]
    data = {}
    for part in ("train", "test"):
        embeddings, targets = [], []
        for _, row in pd.read_csv(folder / f"task/splits/{part}_{k}.csv").iterrows():
            with h5py.File(folder / f"emb/{row['sample_id']}.h5") as file:
                assets = {key: file[key][:] for key in file}
            barcodes = assets["barcodes"].flatten().astype(str).tolist()
            adata = anndata.read_h5ad(folder / "task" / row["expr_path"])
            # Where HEST's code would stop: embeddings without counts.
            known = np.isin(barcodes, adata.obs_names)
            adata = adata[[b for b, found in zip(barcodes, known, strict=True) if found]]
            adata = adata[:, genes].copy()
            adata.X = adata.X.astype(np.float64)
            adata.X = adata.X.log1p()
            embeddings.append(assets["embeddings"][known])
            targets.append(adata.to_df().values)
        data[part] = np.concatenate(embeddings), np.concatenate(targets)
    (x_train, y_train), (x_test, y_test) = data["train"], data["test"]
    pipe = Pipeline(
        [("scaler", StandardScaler()), ("PCA", PCA(n_components=n_components, random_state=1))]
    )
    x_train, x_test = (
        torch.Tensor(pipe.fit_transform(x_train)),
        torch.Tensor(pipe.transform(x_test)),
    )
    alpha = 100 / (x_train.shape[1] * y_train.shape[1])
    reg = Ridge(solver="lsqr", alpha=alpha, random_state=1, fit_intercept=False, max_iter=1000)
    reg.fit(x_train, y_train)
    preds_all = reg.predict(x_test)
    return [stats.pearsonr(y_test[:, g], preds_all[:, g])[0] for g in range(y_test.shape[1])]


def assert_as_hest(folder: Path, result, n_components: int) -> None:
    expected = np.array([hest_fold(folder, k, n_components) for k in FOLDS])
    ours = result.results.query("method == 'hest-ridge' and score == 'pearson'")
    assert ours["gene"].tolist() == PANEL * len(FOLDS)
    np.testing.assert_allclose(ours["value"], expected.ravel(), rtol=1e-12)
    summary = result.summary.query("method == 'hest-ridge'").set_index("fold")["pearson"]
    per_fold = expected.mean(1)
    np.testing.assert_allclose(summary[["0", "1"]], per_fold, rtol=1e-12)
    np.testing.assert_allclose(summary["mean"], np.mean(per_fold), rtol=1e-12)
    np.testing.assert_allclose(summary["std"], np.std(per_fold), rtol=1e-9)


def test_ridge_is_that_of_the_benchmark_to_the_digit(folder, result):
    assert_as_hest(folder, result, N_COMPONENTS)


def test_to_the_digit_where_pca_is_randomised_and_embeddings_are_of_half_precision(tmp_path):
    write_task(tmp_path, n_spots=600, width=340, dtype="float16")
    result = run_probe(read_hest_task(tmp_path / "task", tmp_path / "emb"))
    assert_as_hest(tmp_path, result, 256)


def test_the_other_scores_are_those_of_scipy(folder, result):
    """`library size` has scores that are known, so that every score can be computed by hand."""
    task = read_hest_task(folder / "task", folder / "emb")
    samples = [task.samples[name] for name in FOLDS[1][1]]
    column = PANEL.index("G5")
    within, ranks = [], []
    for sample in samples:
        counts = sample.counts[:, [column]].toarray()[:, 0]
        library = sample.library_size
        depth = np.log(np.maximum(library, 1))
        within.append(stats.pearsonr(depth, np.log1p(counts))[0])
        cp10k = np.log1p(1e4 * counts / np.maximum(library, 1))
        ranks.append(stats.spearmanr(depth, cp10k)[0])
    ours = result.results.query("method == 'library size' and fold == '1' and gene == 'G5'")
    ours = ours.set_index("score")["value"]
    assert ours["pearson_within"] == pytest.approx(np.mean(within), rel=1e-12)
    assert ours["scc"] == pytest.approx(np.mean(ranks), rel=1e-12)


def test_list_finds_the_signal(result):
    mean = result.summary.query("fold == 'mean'").set_index("method")
    assert mean.loc["linear, list", "scc"] > 0.5
    assert mean.loc["linear, list", "scc"] > mean.loc["hest-ridge", "scc"]
    assert mean.loc["library size", "scc"] < 0.3
    both = mean.loc["linear, list + library size", "pearson_within"]
    assert both > 0.65
    assert both > mean.loc[["linear, list", "library size"], "pearson_within"].max()
    # Depth alone is a good part of the benchmark's score.
    assert mean.loc["library size", "pearson"] > 0.3


def test_methods_within_sections_leave_no_level(folder):
    task = read_hest_task(folder / "task", folder / "emb")
    train, test = (stack(task, names) for names in FOLDS[1])
    scores = predict_methods(train, test, n_components=N_COMPONENTS).scores
    for method in ("ridge, within sections", "linear, list"):
        for name in FOLDS[1][1]:
            means = scores[method][test.section == name].mean(0)
            np.testing.assert_allclose(means, 0, atol=1e-12)
    np.testing.assert_allclose(
        scores["linear, list + library size"],
        scores["linear, list"] + scores["library size"],
        rtol=1e-12,
    )


def test_what_is_said_and_written(folder, result, tmp_path):
    assert any("S0: " in w and "embeddings have no counts" in w for w in result.warnings)
    assert any(w.startswith("fold 1: trained on one sample") for w in result.warnings)
    assert any("fitted without 2 training spots" in w for w in result.warnings)
    assert any("fitted without 1 training spots" in w for w in result.warnings)
    result.write(tmp_path / "out")
    about = json.loads((tmp_path / "out/probe.json").read_text())
    assert about["panel"] == PANEL
    assert about["samples"]["S0"]["counts_sha256"] != about["samples"]["S1"]["counts_sha256"]
    assert about["folds"][0]["ridge_alpha"] == 100 / (N_COMPONENTS * len(PANEL))
    assert [fold["list_penalty_chosen"] for fold in about["folds"]] == [True, False]
    assert "chose its genes on all samples" in about["caveats"][0]
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "out/summary.csv"), result.summary)
    assert result.results["method"].unique().tolist() == [
        *("hest-ridge", "ridge, within sections"),
        *("linear, list", "linear, list + library size", "library size"),
    ]


def test_a_gene_that_does_not_vary_is_left_out_and_counted(folder):
    task = read_hest_task(folder / "task", folder / "emb")
    counts = task.samples["S2"].counts.tolil()
    counts[:, 0] = 0
    object.__setattr__(task.samples["S2"], "counts", counts.tocsr())
    result = run_probe(task, n_components=N_COMPONENTS)
    gone = result.results.query("fold == '0' and gene == 'G3'")
    assert gone["value"].isna().all()
    assert result.summary[["pearson", "pearson_within", "scc"]].notna().all(axis=None)
    assert any("1 of 10 gene-fold pairs have no pearson, since" in w for w in result.warnings)


def test_refusals(folder):
    task = read_hest_task(folder / "task", folder / "emb")
    with pytest.raises(
        InputError, match="fold 0: 256 principal components need as many training spots and"
    ):
        run_probe(task)
    for sample in task.samples.values():
        sample.library_size[:] = 0
    with pytest.raises(InputError, match="fold 0: no training spot has any count"):
        run_probe(task, n_components=N_COMPONENTS)


def test_correlation_is_that_of_scipy():
    first, second = np.random.default_rng(0).normal(size=(2, 50, 4))
    expected = [stats.pearsonr(a, b)[0] for a, b in zip(first.T, second.T, strict=True)]
    np.testing.assert_allclose(correlation(first, second), expected, rtol=1e-12)
