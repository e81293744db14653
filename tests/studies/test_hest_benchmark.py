"""HEST-Benchmark: its ridges to the digit, what `list` finds, and one leaderboard."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse, stats
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.model_selection import GridSearchCV, LeaveOneGroupOut
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

import strank
from strank.errors import InputError
from strank.fitting.exact import ALPHAS, HEST_ALPHAS, choose_alpha
from strank.io import read_hest_task
from strank.metrics.correlation import correlation
from strank.studies import hest_benchmark as module
from strank.studies.hest_benchmark import VARIANTS, hest_benchmark
from strank.studies.hest_task import predict_methods, run_task, stack

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
    options = {"n_components": N_COMPONENTS, "protocols": ["all"]}
    return hest_benchmark(folder / "task", folder / "emb", **options)


def hest_split(folder: Path, k: int, n_components: int | None):
    """Features and targets by HEST's predict_single_split and load_adata; None for no PCA."""
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
    if n_components is not None:
        pipe = Pipeline(
            [("scaler", StandardScaler()), ("PCA", PCA(n_components=n_components, random_state=1))]
        )
        x_train, x_test = (
            torch.Tensor(pipe.fit_transform(x_train)),
            torch.Tensor(pipe.transform(x_test)),
        )
    return x_train, y_train, x_test, y_test


def hest_fold(
    folder: Path, k: int, n_components: int | None, *, cv: bool = False, pooled: bool = True
) -> list[float]:
    """Pearson of each gene by HEST's train_test_reg; alpha by scikit-learn's searches instead."""
    x_train, y_train, x_test, y_test = hest_split(folder, k, n_components)
    alpha = 100 / (x_train.shape[1] * y_train.shape[1])
    if cv:
        alpha = alpha_by_scikit_learn(folder, k, x_train, y_train)
    reg = Ridge(solver="lsqr", alpha=alpha, random_state=1, fit_intercept=False, max_iter=1000)
    reg.fit(x_train, y_train)
    preds_all = reg.predict(x_test)
    # Every sample has as many spots.
    n = len(FOLDS[k][1])
    parts = [slice(None)] if pooled else np.split(np.arange(len(y_test)), n)
    return [
        np.mean([stats.pearsonr(y_test[rows, g], preds_all[rows, g])[0] for rows in parts])
        for g in range(y_test.shape[1])
    ]


def alpha_by_scikit_learn(folder: Path, k: int, x_train, y_train) -> float:
    x_train = np.asarray(x_train, dtype=np.float64)
    names = FOLDS[k][0]
    if len(names) == 1:
        return float(RidgeCV(HEST_ALPHAS, fit_intercept=False).fit(x_train, y_train).alpha_)
    search = GridSearchCV(
        Ridge(fit_intercept=False),
        {"alpha": HEST_ALPHAS},
        cv=LeaveOneGroupOut(),
        scoring="neg_mean_squared_error",
    )
    groups = np.repeat(names, len(x_train) // len(names))
    return float(search.fit(x_train, y_train, groups=groups).best_params_["alpha"])


def assert_as_hest(folder: Path, result, n_components: int) -> None:
    expected = np.array([hest_fold(folder, k, n_components) for k in FOLDS])
    ours = result.results.query("features == 'pca' and method == 'hest-ridge'")
    ours = ours.query("score == 'pearson'")
    assert ours["gene"].tolist() == PANEL * len(FOLDS)
    np.testing.assert_allclose(ours["value"], expected.ravel(), rtol=1e-12)
    summary = result.summary.query("features == 'pca' and method == 'hest-ridge'")
    summary = summary.set_index("fold")["pearson"]
    per_fold = expected.mean(1)
    np.testing.assert_allclose(summary[["0", "1"]], per_fold, rtol=1e-12)
    np.testing.assert_allclose(summary["mean"], np.mean(per_fold), rtol=1e-12)
    np.testing.assert_allclose(summary["std"], np.std(per_fold), rtol=1e-9)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_protocol_is_that_of_scikit_learn_called_by_hand(folder, result, name):
    """PCA, alpha and pooling are read from the name, so that a wrong row of the table is seen."""
    n_components = None if "a13" in name else N_COMPONENTS
    options = {"cv": "cv" in name.split("-"), "pooled": not name.endswith("per-sample")}
    expected = np.mean([hest_fold(folder, k, n_components, **options) for k in FOLDS])
    ridge = "hest-ridge, cv" if options["cv"] else "hest-ridge"
    board = result.leaderboard
    row = board[(board["protocol"] == name) & (board["method"] == ridge)]
    assert row[["task", "mean"]].to_numpy() == pytest.approx(np.full((1, 2), expected), rel=1e-12)


def test_protocols_differ(result):
    """Or the test above would not see one taken for another."""
    ridges = result.leaderboard[result.leaderboard["method"].str.startswith("hest-ridge")]
    assert len(ridges) == len(VARIANTS) == 8
    assert np.diff(np.sort(ridges["mean"])).min() > 1e-4


def test_alpha_is_chosen_as_scikit_learn_chooses():
    rng = np.random.default_rng(5)
    x, group = rng.normal(size=(90, 12)), np.repeat(["a", "b", "c"], [20, 30, 40])
    y = x @ rng.normal(size=(12, 4)) + rng.normal(scale=9, size=(90, 4))
    search = GridSearchCV(
        Ridge(fit_intercept=False),
        {"alpha": ALPHAS},
        cv=LeaveOneGroupOut(),
        scoring="neg_mean_squared_error",
    ).fit(x, y, groups=group)
    alone = RidgeCV(ALPHAS, fit_intercept=False).fit(x, y).alpha_
    assert choose_alpha(x, y, group, ALPHAS) == search.best_params_["alpha"]
    assert choose_alpha(x, y, np.repeat("a", 90), ALPHAS) == alone
    # Neither end, so that it is a choice.
    assert ALPHAS[0] < min(alone, search.best_params_["alpha"]) <= ALPHAS[-2]


def test_ridge_is_that_of_the_benchmark_to_the_digit(folder, result):
    assert_as_hest(folder, result, N_COMPONENTS)


def test_to_the_digit_where_pca_is_randomised_and_embeddings_are_of_half_precision(tmp_path):
    write_task(tmp_path, n_spots=600, width=340, dtype="float16")
    result = hest_benchmark(tmp_path / "task", tmp_path / "emb", protocols=["hest"])
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
    ours = ours[ours["features"] == "pca"]
    ours = ours.set_index("score")["value"]
    assert ours["pearson_within"] == pytest.approx(np.mean(within), rel=1e-12)
    assert ours["scc"] == pytest.approx(np.mean(ranks), rel=1e-12)


@pytest.mark.parametrize("features", ["pca", "all"])
def test_list_finds_the_signal(result, features):
    mean = result.summary.query("fold == 'mean' and features == @features").set_index("method")
    assert mean.loc["linear, list", "scc"] > 0.5
    assert mean.loc["linear, list", "scc"] > mean.loc["hest-ridge", "scc"]
    assert mean.loc["library size", "scc"] < 0.3
    both = mean.loc["linear, list + library size", "pearson_within"]
    assert both > 0.65
    assert both > mean.loc[["linear, list", "library size"], "pearson_within"].max()
    # Depth alone is a good part of the benchmark's score.
    assert mean.loc["library size", "pearson"] > 0.3


@pytest.mark.parametrize("features", ["pca", "all"])
def test_methods_within_sections_leave_no_level(folder, features):
    task = read_hest_task(folder / "task", folder / "emb")
    train, test = (stack(task, names) for names in FOLDS[1])
    scores, _, _ = predict_methods(train, test, features=features, n_components=N_COMPONENTS)
    for method in ("ridge, within sections", "linear, list"):
        for name in FOLDS[1][1]:
            means = scores[method][test.section == name].mean(0)
            np.testing.assert_allclose(means, 0, atol=1e-12)
    np.testing.assert_allclose(
        scores["linear, list + library size"],
        scores["linear, list"] + scores["library size"],
        rtol=1e-12,
    )


def test_units_of_features_are_theirs_not_ours(folder):
    """Without components, the benchmark's ridge takes features as they are stored."""
    task = read_hest_task(folder / "task", folder / "emb")
    before, after = [], []
    for scores, factor in ((before, 1), (after, 1000)):
        train, test = (stack(task, names) for names in FOLDS[0])
        for spots in (train, test):
            object.__setattr__(spots, "features", spots.features.astype(np.float64))
            spots.features[:, 3] *= factor
        scores.append(predict_methods(train, test, features="all")[0])
    for method in ("linear, list", "ridge, within sections"):
        np.testing.assert_allclose(before[0][method], after[0][method], rtol=1e-4, atol=1e-4)
    assert np.abs(before[0]["hest-ridge"] - after[0]["hest-ridge"]).max() > 0.1


def test_what_is_said_and_written(folder, result, tmp_path):
    out = tmp_path / "out"
    again = hest_benchmark(
        folder / "task", folder / "emb", out, protocols=["all"], n_components=N_COMPONENTS
    )
    pd.testing.assert_frame_equal(again.leaderboard, result.leaderboard)
    notes = again.facts["notes"]
    assert any("S0: " in n and "embeddings have no counts" in n for n in notes)
    assert any(n.startswith("task, emb: fold 1: trained on one sample") for n in notes)
    assert any("fitted without 2 training spots" in n for n in notes)
    assert any("fitted without 1 training spots" in n for n in notes)
    about = json.loads((out / "tasks/task/emb/pca.json").read_text())
    assert about["panel"] == PANEL
    assert about["sha256"]["S0 counts"] != about["sha256"]["S1 counts"]
    assert about["folds"][0]["ridge_alpha"] == 100 / (N_COMPONENTS * len(PANEL))
    assert [fold["list_penalty_chosen"] for fold in about["folds"]] == [True, False]
    about = json.loads((out / "hest-benchmark.json").read_text())
    assert "chose its genes on all samples" in about["caveats"][0]
    assert list(about["protocols"]) == list(VARIANTS)
    for name in ("results", "summary", "leaderboard"):
        written = pd.read_csv(out / f"{name}.csv", float_precision="round_trip")
        table = getattr(result, name)
        table = table.astype({"fold": written["fold"].dtype} if name == "results" else {})
        pd.testing.assert_frame_equal(written, table, check_exact=True, check_dtype=False)
    lines = (out / "leaderboard.md").read_text().splitlines()
    assert lines[0] == "| protocol | encoder | method | task | mean | scc |"
    assert len(lines) == 2 + len(result.leaderboard)
    assert result.results["method"].unique().tolist() == [
        *("hest-ridge", "hest-ridge, cv", "ridge, within sections"),
        *("linear, list", "linear, list + library size", "library size"),
    ]


def test_a_gene_that_does_not_vary_is_left_out_and_counted(folder):
    task = read_hest_task(folder / "task", folder / "emb")
    counts = task.samples["S2"].counts.tolil()
    counts[:, 0] = 0
    object.__setattr__(task.samples["S2"], "counts", counts.tocsr())
    results, facts = run_task(task, "pca", n_components=N_COMPONENTS)
    gone = results.query("fold == '0' and gene == 'G3'")
    assert gone["value"].isna().all()
    assert results.query("fold == '1' and gene == 'G3'")["value"].notna().all()
    told = facts["warnings"]
    assert any("1 of 10 gene-fold pairs have no pearson, since" in w for w in told)


def test_refusals(folder, tmp_path):
    task = read_hest_task(folder / "task", folder / "emb")
    with pytest.raises(
        InputError, match="fold 0: 256 principal components need as many training spots and"
    ):
        run_task(task, "pca")
    for sample in task.samples.values():
        sample.library_size[:] = 0
    with pytest.raises(InputError, match="fold 0: no training spot has any count"):
        run_task(task, "all")
    for options, told in (
        ({"protocols": ["hset"]}, "no protocol 'hset'; choose one of hest, .*mean hest"),
        ({"tasks": ["PRAD"]}, "no task 'PRAD'; choose one of task"),
        ({"encoders": ["uni"]}, "no encoder 'uni'; choose one of emb"),
    ):
        with pytest.raises(InputError, match=told):
            hest_benchmark(folder / "task", folder / "emb", tmp_path / "out", **options)
    with pytest.raises(InputError, match=r"neither a task .* nor a folder of them"):
        hest_benchmark(folder / "emb", folder / "emb", tmp_path / "out")
    with pytest.raises(InputError, match="task: no embeddings there; needs <task>/<encoder>"):
        hest_benchmark(folder / "task", folder / "task", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def bench(folder, tmp_path) -> Path:
    """Two tasks and two encoders, as HEST's code lays them out; in one it wrote fp32 below."""
    for task, names in {"IDC": FOLDS[0], "READ": FOLDS[1]}.items():
        shutil.copytree(folder / "task", tmp_path / "bench_data" / task)
        splits = tmp_path / "bench_data" / task / "splits"
        for part, of_part in zip(("train", "test"), names, strict=True):
            (splits / f"{part}_1.csv").unlink()
            rows = [(name, f"adata/{name}.h5ad") for name in of_part]
            table = pd.DataFrame(rows, columns=["sample_id", "expr_path"])
            table.to_csv(splits / f"{part}_0.csv", index=False)
        shutil.copytree(folder / "emb", tmp_path / "ST_data_emb" / task / "uni_v1")
        for name in ("S0", "S1", "S2"):
            with h5py.File(folder / f"emb/{name}.h5") as file:
                features, barcodes = file["embeddings"][:, ::2], file["barcodes"][:]
            path = tmp_path / "ST_data_emb" / task / "resnet50/fp32" / f"{name}.h5"
            path.parent.mkdir(parents=True, exist_ok=True)
            with h5py.File(path, "w") as file:
                file["embeddings"], file["barcodes"] = features, barcodes
    (tmp_path / "bench_data/README.md").write_text("no task")
    return tmp_path


def run_bench(bench: Path, **options):
    given = {"n_components": N_COMPONENTS, **options}
    return hest_benchmark(bench / "bench_data", bench / "ST_data_emb", bench / "out", **given)


@pytest.mark.slow
def test_all_tasks_and_encoders_in_one_leaderboard(bench, result):
    board = run_bench(bench, jobs=2).leaderboard
    assert board.columns.tolist() == ["protocol", "encoder", "method", "IDC", "READ", "mean", "scc"]
    assert set(board["encoder"]) == {"uni_v1", "resnet50/fp32"}
    assert len(board) == 2 * 2 * 5
    for _, rows in board.groupby("protocol", sort=False):
        assert rows["mean"].is_monotonic_decreasing
    np.testing.assert_allclose(board["mean"], board[["IDC", "READ"]].mean(axis=1), rtol=1e-12)
    # Each task has one of the folds above.
    one = board.query("protocol == 'hest' and encoder == 'uni_v1'").set_index("method")
    folds = result.summary.query("features == 'pca'").set_index(["method", "fold"])
    folds, scc = folds["pearson"], folds["scc"]
    for method in one.index:
        assert one.loc[method, "scc"] == pytest.approx(scc[method, "mean"], rel=1e-9)
        assert one.loc[method, "IDC"] == pytest.approx(folds[method, "0"], rel=1e-9)
        assert one.loc[method, "READ"] == pytest.approx(folds[method, "1"], rel=1e-9)


def test_what_is_done_is_not_repeated(bench, monkeypatch):
    done: list[tuple[str, str]] = []

    def counted(task, features, **options):
        done.append((task.folder.name, features))
        return run_task(task, features, **options)

    monkeypatch.setattr(module, "run_task", counted)
    first = run_bench(bench, protocols=["hest"], tasks=["IDC"])
    assert done == [("IDC", "pca")] * 2
    done.clear()
    whole = run_bench(bench)
    assert sorted(done) == [("IDC", "all")] * 2 + [("READ", "all")] * 2 + [("READ", "pca")] * 2
    done.clear()
    kept = {path: path.stat().st_mtime_ns for path in (bench / "out/tasks").rglob("*.*")}
    again = run_bench(bench)
    assert done == []
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    pd.testing.assert_frame_equal(again.results, whole.results, check_exact=True)
    pd.testing.assert_frame_equal(
        again.results.query("task == 'IDC' and features == 'pca'").reset_index(drop=True),
        first.results,
        check_exact=True,
    )
    with h5py.File(bench / "ST_data_emb/READ/uni_v1/S0.h5", "a") as file:
        file["embeddings"][0, 0] += 1
    run_bench(bench)
    assert sorted(done) == [("READ", "all"), ("READ", "pca")]
    # A run that was stopped between the two files of a result has not done it.
    (bench / "out/tasks/IDC/uni_v1/all.json").unlink()
    done.clear()
    run_bench(bench)
    assert done == [("IDC", "all")]
    with pytest.raises(InputError, match="hest-benchmark of another seed; choose another `folder`"):
        run_bench(bench, seed=2)


def test_tasks_that_lack_something_are_named_and_the_others_go_on(bench):
    (bench / "ST_data_emb/IDC/uni_v1/S1.h5").unlink()
    shutil.rmtree(bench / "ST_data_emb/READ/resnet50")
    (bench / "ST_data_emb/READ/uni_v1/S2.h5").write_bytes(b"no HDF5")
    result = run_bench(bench)
    told = [text.replace(str(bench), "") for text in result.facts["failed"]]
    assert told[0] == (
        "IDC, uni_v1: /ST_data_emb/IDC/uni_v1/S1.h5: no such file; sample S1 has no embeddings"
    )
    assert told[1].startswith("READ, resnet50/fp32: /ST_data_emb/READ/resnet50/fp32: no such")
    assert told[2].startswith("READ, uni_v1: /ST_data_emb/READ/uni_v1/S2.h5: not a readable")
    board = result.leaderboard
    assert set(board["encoder"]) == {"resnet50/fp32"}
    assert board.columns.tolist() == ["protocol", "encoder", "method", "IDC", "mean", "scc"]
    shutil.copy(bench / "ST_data_emb/IDC/uni_v1/S0.h5", bench / "ST_data_emb/READ/uni_v1/S2.h5")
    board = run_bench(bench).leaderboard.set_index("encoder")
    # The mean of some tasks is not that of all.
    assert board[["mean", "scc"]].isna().all(axis=None)
    assert board.loc["uni_v1", "READ"].notna().all()


def test_components_that_cannot_be_leave_the_protocol_without(bench):
    result = run_bench(bench, n_components=15, encoders=["resnet50/fp32"])
    assert len(result.facts["failed"]) == 2
    assert "15 principal components need as many" in result.facts["failed"][0]
    assert set(result.leaderboard["protocol"]) == {"hest-a13"}


def test_one_folder_of_embeddings_does_for_all_tasks(bench):
    """Samples of different tasks may be the same, or embedded into one folder; or be a link."""
    for path in ("bench_data/IDC", "ST_data_emb/READ/uni_v1"):
        (bench / path).rename(bench / "elsewhere")
        (bench / path).symlink_to((bench / "elsewhere").rename(bench / path.replace("/", " ")))
    assert {*run_bench(bench, tasks=["READ"], protocols=["hest"]).leaderboard["encoder"]} == {
        *("resnet50/fp32", "uni_v1")
    }
    result = hest_benchmark(
        bench / "bench_data",
        bench / "ST_data_emb/IDC/uni_v1",
        protocols=["hest"],
        n_components=N_COMPONENTS,
    )
    assert set(result.leaderboard["encoder"]) == {"uni_v1"}
    assert set(result.results["task"]) == {"IDC", "READ"}
    assert strank.hest_benchmark is hest_benchmark


def test_correlation_is_that_of_scipy():
    first, second = np.random.default_rng(0).normal(size=(2, 50, 4))
    expected = [stats.pearsonr(a, b)[0] for a, b in zip(first.T, second.T, strict=True)]
    np.testing.assert_allclose(correlation(first, second), expected, rtol=1e-12)
