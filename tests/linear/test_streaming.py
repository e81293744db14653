"""Features that stay on disk: the same optimum, in the memory that was stated."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import h5py
import numpy as np
import pytest
from scipy import sparse

from strank import STRankRegressor, STRankRegressorCV


@pytest.fixture(scope="module")
def spots():
    rng = np.random.default_rng(0)
    X = (rng.normal(size=(600, 12)) + 3).astype(np.float32)
    section = np.repeat([9, 3, 7], [250, 200, 150])
    slopes = rng.normal(size=(12, 5)) * 0.2
    depth = rng.lognormal(4, 0.5, 600)
    counts = rng.poisson(0.1 * depth[:, None] * np.exp(X @ slopes))
    options = {"section": section, "offset": np.log(depth)}
    return X, sparse.csr_matrix(counts), options


def stored(form: str, X: np.ndarray, folder):
    """Features as what a user may have on disk."""
    if form == "memmap":
        X.tofile(folder / "X.bin")
        return np.memmap(folder / "X.bin", dtype=X.dtype, mode="r", shape=X.shape)
    if form == "h5py":
        h5py.File(folder / "X.h5", "w").create_dataset("X", data=X, chunks=(64, 12))
        return h5py.File(folder / "X.h5")["X"]
    if form == "zarr":
        zarr = pytest.importorskip("zarr")
        array = zarr.open(folder / "X.zarr", mode="w", shape=X.shape, chunks=(64, 12), dtype="f4")
        array[:] = X
        return array
    return pytest.importorskip("dask.array").from_array(X, chunks=(64, 12))


@pytest.mark.parametrize("max_memory", [1.0, 8e-5], ids=["roomy", "tight"])
@pytest.mark.parametrize("form", ["memmap", "h5py", "zarr", "dask"])
def test_features_on_disk_have_the_same_optimum(spots, form, max_memory, tmp_path):
    X, counts, options = spots
    model = STRankRegressor(10.0, tolerance=1e-8)
    expected = model.fit(X.astype(float), counts, **options)
    scores, explained = expected.predict(X), expected.score(X, counts, **options)
    on_disk = stored(form, X, tmp_path)
    model = STRankRegressor(10.0, tolerance=1e-8, max_memory=max_memory)
    model.fit(on_disk, counts, **options)
    assert model.converged_.all()
    np.testing.assert_allclose(model.coef_, expected.coef_, atol=1e-6)
    np.testing.assert_allclose(model.predict(on_disk), scores, atol=1e-5)
    assert model.score(on_disk, counts, **options) == pytest.approx(explained, abs=1e-6)


def test_penalties_are_chosen_alike(spots, tmp_path):
    X, counts, options = spots
    expected = STRankRegressorCV().fit(X, counts, **options)
    got = STRankRegressorCV(max_memory=8e-5).fit(stored("h5py", X, tmp_path), counts, **options)
    np.testing.assert_array_equal(got.penalty_, expected.penalty_)
    np.testing.assert_allclose(got.choice_.held_out, expected.choice_.held_out, rtol=1e-6)


def test_errors_say_where(spots, tmp_path):
    X, counts, options = spots
    mixed = options | {"section": np.arange(600) % 3}
    with pytest.raises(ValueError, match="write them section after section"):
        STRankRegressor().fit(stored("h5py", X, tmp_path), counts, **mixed)
    broken = X.copy()
    broken[311, 4] = np.nan
    with pytest.raises(ValueError, match=r"NaN or infinity \(row 311, feature 4\)"):
        STRankRegressor().fit(stored("h5py", broken, tmp_path), counts, **options)
    model = STRankRegressor().fit(X, counts, **options)
    with pytest.raises(ValueError, match="X has 7 features, but STRankRegressor is expecting 12"):
        model.predict(stored("memmap", X[:, :7], tmp_path)[:])
    with pytest.raises(ValueError, match="X has 7 features, but STRankRegressor is expecting 12"):
        model.predict(h5py.File(tmp_path / "wide.h5", "w").create_dataset("X", data=X[:, :7]))


def test_peak_memory_is_what_was_stated(tmp_path):
    """Features of 160 MB and a budget of 40: what the fit adds to the process stays below."""
    script = """
        import resource, sys
        import h5py, numpy as np, torch
        from scipy import sparse
        from strank import STRankRegressor

        rng = np.random.default_rng(0)
        n, p, g = 160_000, 256, 20
        with h5py.File(sys.argv[1], "w") as file:
            X = file.create_dataset("X", (n, p), dtype="f4")
            for start in range(0, n, 4000):
                X[start : start + 4000] = rng.normal(size=(4000, p))
        counts = sparse.random(n, g, 0.05, format="csr", rng=rng)
        counts.data[:] = 1
        section = np.repeat(np.arange(32), n // 32)

        def fit(rows, source, **options):
            return STRankRegressor(300.0, **options).fit(
                source[:rows] if rows < n else source, counts[:rows], section=section[:rows]
            )

        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        with h5py.File(sys.argv[1]) as file:
            # Libraries are loaded, and threads started, before it counts.
            fit(10_000, np.zeros((n, 4), dtype="f4") + np.arange(n)[:, None] % 7, max_memory=1)
            before = peak()
            model = fit(n, file["X"], max_memory=0.04)
        assert model.converged_.all(), model.solution_.message
        print(peak() - before)
    """
    path = tmp_path / "X.h5"
    command = [sys.executable, "-c", textwrap.dedent(script), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert path.stat().st_size > 3.5 * 0.04 * 2**30
    # Beside the budget: the counts by gene and by block (20 MB), and coefficients.
    assert float(done.stdout) < 0.04 + 0.02
