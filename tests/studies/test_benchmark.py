"""The benchmark: every cell once, however often it is stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from strank.cohort.folds import Fold
from strank.cohort.store import read_h5ad, write_h5ad
from strank.errors import InputError
from strank.evaluation.protocol import Protocol, get_protocol
from strank.evaluation.results import TABLES
from strank.fitting.method import Method
from strank.storage import DamageWarning
from strank.studies.benchmark import runner
from strank.studies.benchmark.grid import LOSSES, Cell, Grid, Task
from strank.studies.benchmark.runner import score_task

METHODS = ["linear, list", "ridge", "centred ridge", "linear, poisson"]


def files(out: Path) -> dict[str, int]:
    """Everything in a folder, and when it was written."""
    found = [path for path in out.rglob("*") if path.is_file()]
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in found}


def counted(monkeypatch, *, stop_after: int = 10**6) -> list[Cell]:
    """Watch which cells are run; and stop as Ctrl-C does."""
    cells: list[Cell] = []
    real = runner.run_cell

    def run_cell(cell: Cell, *arguments) -> None:
        if len(cells) == stop_after:
            raise KeyboardInterrupt
        cells.append(cell)
        real(cell, *arguments)

    monkeypatch.setattr(runner, "run_cell", run_cell)
    return cells


def assert_same_results(one: Path, other: Path) -> None:
    for name in ("summary.csv", "summary.md", "summary.tex", "protocol.toml"):
        assert (one / name).read_text() == (other / name).read_text()
    parts = [path.relative_to(one) for name in TABLES for path in (one / name).rglob("*.parquet")]
    assert parts
    for part in parts:
        assert (one / part).read_bytes() == (other / part).read_bytes()


def test_grid():
    grid = Grid(heads=("linear", "mlp", "mlp"), losses=(*LOSSES, "hest-ridge", "mse"), seeds=3)
    assert len(grid.methods) == len(set(grid.methods)) == 2 * 8 + 2
    assert [m.name for m in grid.methods[:3]] == ["linear, list", "ridge", "centred ridge"]
    assert grid.n_genes == (50,)
    tasks = [Task("mine", size, Fold("A", ("B1",), ("A1",))) for size in (50, 1000, 1001, None)]
    cells = grid.cells(tasks)
    seeds = {(cell.task.genes, cell.method.name): [] for cell in cells}
    for cell in cells:
        seeds[cell.task.genes, cell.method.name].append(cell.seed)
    assert seeds["50", "linear, pair"] == [0]
    assert sorted(seeds["1000", "mlp, list"]) == sorted(seeds["50", "linear, rank"]) == [0, 1, 2]
    assert {m for size, m in seeds if size == "all"} == {m for size, m in seeds if size == "1001"}
    assert {m for size, m in seeds if size == "all"} == {
        *("linear, list", "linear, pair", "linear, poisson", "linear, nb"),
        *("ridge", "centred ridge", "hest-ridge"),
    }
    paper = Grid(losses=("list", "hest-ridge"), recipes=("published", "usual", None)).methods
    assert [m.name for m in paper[3:]] == ["linear, list, published", "hest-ridge"]
    with pytest.raises(InputError, match=r"no loss 'hest-rigde'; .* \(did you mean hest-ridge\?\)"):
        Grid(losses=("hest-rigde",)).methods  # noqa: B018
    with pytest.raises(InputError, match="no recipe 'own recipe'"):
        Grid(recipes=("own recipe",)).methods  # noqa: B018
    # The longest first, so that no core is left waiting at the end.
    sizes = [cell.task.n_genes or 10**6 for cell in cells]
    assert sizes == sorted(sizes, reverse=True)
    assert len({cell.path(Path()) for cell in cells}) == len(cells)


def test_grid_without_what_the_published_recipe_does_not_train():
    losses = ("list", "section-pcc", "hest-ridge")
    grid = Grid(losses, ("linear", "mlp"), recipes=("published", "default"))
    names = ["linear, list, published", "linear, list, default", "linear, section-pcc"]
    names += ["hest-ridge", "mlp, list", "mlp, section-pcc"]
    assert [method.name for method in grid.methods[3:]] == names
    assert grid.notes[1] == (
        "linear, section-pcc, published; mlp, list, published; mlp, section-pcc, published: "
        "nothing that the published recipe trains, so left out"
    )
    assert not any("left out" in note for note in Grid(recipes=("default",)).notes)
    with pytest.raises(InputError, match="the published recipe is not for mlp, list, but for `hea"):
        Grid(("list",), ("mlp",), ("published",)).methods  # noqa: B018


def test_grid_without_library_size_has_rows_more():
    also = (Method("linear", "pcc", "default"), Method("mlp", "list", library_size=False))
    grid = Grid(("list", "mse", "nb"), recipes=("published", None), library_size=False, also=also)
    without = {method.name for method in grid.methods if not method.library_size}
    assert without == {
        *(f"linear, {x}, no library size" for x in ("list", "nb", "list, published")),
        *("linear, nb, published, no library size", "mlp, list, no library size"),
    }
    every = replace(grid, library_size=True).methods
    assert {m for m in grid.methods if m.library_size} | {also[1]} == set(every)
    assert set(also) <= set(every)
    assert len(grid.methods) == len({method.name for method in grid.methods})


def test_what_the_folder_says(bench, done):
    about = json.loads((done / "benchmark.json").read_text())
    assert about["protocol"]["sha256"] == bench.protocol.sha256
    assert get_protocol(done / "protocol.toml").sha256 == bench.protocol.sha256
    assert about["methods"] == METHODS
    assert about["reference"] == METHODS[0]
    assert (about["genes"], about["encoders"], about["seeds"]) == (["3", "all"], ["mine"], 1)
    assert about["folds"]["A"] == {"train": ["B1", "C1"], "test": ["A1", "A2"]}
    patients = {name: entry["patient"] for name, entry in about["sections"].items()}
    assert patients == {"A1": "A", "A2": "A", "B1": "B", "C1": "C"}
    assert about["features"]["mine"]["version"] == "1"
    assert about["warnings"] == about["failed"] == []
    assert "linear, mse is ridge" in about["notes"][0]
    assert about["seconds"] > 0
    assert set(files(done)) == {
        *("benchmark.json", "protocol.toml", "summary.csv", "summary.md", "summary.tex"),
        *(f"predictions/mine/{size}/{fold}/scored.json" for size in ("3", "all") for fold in "ABC"),
        *(
            f"{table}/encoder=mine/genes={size}/fold={fold}/part.parquet"
            for table in TABLES
            for size in ("3", "all")
            for fold in "ABC"
        ),
        *(
            str(Cell(Task("mine", size, Fold(fold, (), ())), method).path(Path()))
            for size in (3, None)
            for fold in "ABC"
            for method in bench.grid.methods
        ),
    }


def test_a_run_that_was_stopped_goes_on(bench, done, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        first = counted(patch, stop_after=7)
        with pytest.raises(KeyboardInterrupt):
            bench.run(out)
    before = files(out)
    assert sorted(before)[:1] == ["benchmark.json"]
    assert sum(name.endswith(".h5ad") for name in before) == 7
    assert not any("part" in name for name in before)
    with monkeypatch.context() as patch:
        second = counted(patch)
        bench.run(out)
    assert len(second) == 24 - 7
    assert not set(first) & set(second)
    after = files(out)
    assert {n for n in before if before[n] != after[n]} == {"benchmark.json", "protocol.toml"}
    assert_same_results(out, done)


def test_what_is_done_is_not_done_again(bench, done, tmp_path, monkeypatch):
    """But what was removed is; what a killed process left of a file is not in the way."""
    out = shutil.copytree(done, tmp_path / "out")
    before = files(out)
    about = json.loads((out / "benchmark.json").read_text())
    gone = out / "predictions/mine/3/B/ridge.h5ad"
    gone.unlink()
    rest = gone.with_name(".ridge.0123abcd.part.h5ad")
    rest.write_bytes(b"half a file")
    cells, told = counted(monkeypatch), []

    @contextmanager
    def watched(title: str, total: int) -> Iterator:
        told.append((title, total))
        yield lambda n: told.append(n)

    bench.run(out, bar=watched)
    assert not rest.exists()
    assert told == [("Fitting", 1), 1, ("Scoring", 6), *[1] * 6, ("Writing", 1), 1]
    assert [(c.method.name, c.task.fold.name, c.task.genes) for c in cells] == [("ridge", "B", "3")]
    assert_same_results(out, done)
    after = files(out)
    changed = {n for n in before if before[n] != after[n] and "/" in n}
    # The same predictions: their scores stand.
    assert changed == {str(gone.relative_to(out))}
    assert json.loads((out / "benchmark.json").read_text())["seconds"] > about["seconds"]


@pytest.mark.parametrize("place", [8, 0.3, 0.6, 0.9, -81, -30])
def test_a_damaged_cell_is_named_and_fitted_again(bench, done, tmp_path, place):
    out = shutil.copytree(done, tmp_path / "out")
    cell = out / "predictions/mine/3/B/ridge.h5ad"
    content = bytearray(cell.read_bytes())
    content[int(place * len(content)) if isinstance(place, float) else place] ^= 4
    cell.write_bytes(content)
    with pytest.warns(DamageWarning, match=r"B/ridge\.h5ad: damaged .*; it is made anew"):
        bench.run(out)
    assert_same_results(out, done)


PARTS = {
    **{f"{name}/encoder=mine/genes=3/fold=B/part.parquet": 0.3 for name in TABLES},
    **{f"{name}/encoder=mine/genes=3/fold=A/part.parquet": -200 for name in TABLES},
    "predictions/mine/3/C/scored.json": 30,
}


def test_damaged_partitions_are_named_and_scored_again(bench, done, tmp_path):
    out = shutil.copytree(done, tmp_path / "out")
    for part, place in PARTS.items():
        content = bytearray((out / part).read_bytes())
        content[int(place * len(content)) if isinstance(place, float) else place] ^= 4
        (out / part).write_bytes(content)
    with pytest.warns(DamageWarning) as told:
        bench.run(out)
    assert {str(t.message).split(": damaged")[0] for t in told} == {f"{out / p}" for p in PARTS}
    assert_same_results(out, done)


def test_scores_are_of_the_predictions_that_are_there(bench, done, tmp_path):
    """One that has changed is scored again, and nothing else; what is gone has no scores."""
    out = shutil.copytree(done, tmp_path / "out")
    before, cell = files(out), out / "predictions/mine/3/B/ridge.h5ad"
    adata = read_h5ad(cell)
    adata.X = adata.X[:, ::-1].copy()
    write_h5ad(adata, cell)
    bench.run(out)
    after = files(out)
    part = "encoder=mine/genes=3/fold=B/part.parquet"
    changed = {name for name in before if before[name] != after[name] and "=" in name}
    assert changed == {f"{table}/{part}" for table in TABLES}
    assert not any("part" in name and "=" not in name for name in after)
    old, new = (bench.results(x).query("score == 'scc'") for x in (done, out))
    differ = new[new["value"].to_numpy() != old["value"].to_numpy()]
    assert set(differ["method"]) == {"ridge"}
    assert set(differ["fold"]) == {"B"}
    score_task(bench.protocol, bench.cohort, out, (Task("mine", 3, Fold("B", (), ())), []))
    assert not any((out / table / part).exists() for table in TABLES)


def test_more_may_be_asked_later(bench, tmp_path, monkeypatch):
    protocol = Protocol("first", first_fold_only=True, n_genes=(3,))
    bench.run(tmp_path, protocol, bench.small)
    cells = counted(monkeypatch)
    bench.run(tmp_path, protocol, replace(bench.small, losses=("list", "hest-ridge")))
    assert {cell.method.name for cell in cells} == {"hest-ridge"}
    methods = {*METHODS[:3], "library size", "shuffled", "within section", "hest-ridge"}
    assert set(bench.results(tmp_path)["method"]) == methods


@pytest.mark.slow
def test_several_at_once_find_what_one_finds(bench, done, tmp_path):
    bench.run(tmp_path, grid=bench.small, jobs=2)
    for path in tmp_path.rglob("predictions/**/*.h5ad"):
        mine, theirs = read_h5ad(path), read_h5ad(done / path.relative_to(tmp_path))
        np.testing.assert_array_equal(mine.X, theirs.X)
    expected = bench.results(done).query("genes == '3' and method != 'linear, poisson'")
    for name, values in bench.results(tmp_path).items():
        np.testing.assert_array_equal(values.tolist(), expected[name].tolist())


def test_shares_fit_what_one_run_scores(bench, done, tmp_path, monkeypatch):
    cells = counted(monkeypatch)
    for shard in ("2/2", "1/2"):
        bench.run(tmp_path, grid=bench.small, shard=shard)
    assert not (tmp_path / "summary.csv").exists()
    assert len(cells) == len(set(cells)) == len(list(tmp_path.rglob("predictions/**/*.h5ad")))
    bench.run(tmp_path, grid=bench.small)
    assert len(cells) == len(set(cells))
    expected = bench.results(done).query("genes == '3' and method != 'linear, poisson'")
    for name, values in bench.results(tmp_path).items():
        np.testing.assert_array_equal(values.tolist(), expected[name].tolist())


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on(bench, done, tmp_path, monkeypatch):
    script = (
        "import sys; from pathlib import Path; from functools import partial\n"
        "from strank.progress import progress\n"
        "from strank.where import Where\n"
        "from strank.evaluation.protocol import Protocol\n"
        "from strank.studies.benchmark.grid import Grid\n"
        "from strank.studies.benchmark.runner import run_benchmark\n"
        "grid = Grid(('list', 'poisson'), encoders=('mine',), n_genes=(3, None))\n"
        "run_benchmark(Path(sys.argv[1]), Protocol('patients', n_genes=(3, None)), grid, "
        "Path(sys.argv[2]), where=Where(2), bar=partial(progress, hidden=True))\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, bench.cohort, tmp_path], start_new_session=True
    )
    while child.poll() is None and len(list(tmp_path.rglob("[!.]*.h5ad"))) < 3:
        time.sleep(0.01)
    # With all its processes, of which one that is left might finish another cell.
    os.killpg(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    kept = len(list(tmp_path.rglob("[!.]*.h5ad")))
    before = files(tmp_path)
    assert 3 <= kept < 24
    cells = counted(monkeypatch)
    bench.run(tmp_path)
    assert len(cells) == 24 - kept
    after = files(tmp_path)
    assert all(after[n] == before[n] for n in before if n.startswith("predictions"))
    assert_same_results(tmp_path, done)


def test_a_folder_of_something_else_is_refused(bench, done, tmp_path, monkeypatch):
    before = files(done)

    def refuse(folder: Path, protocol: Protocol = bench.protocol) -> str:
        with pytest.raises(InputError) as error:
            bench.run(done, protocol, cohort=folder)
        assert str(error.value).endswith("; choose another `folder`, or remove it")
        return str(error.value).split(": ")[1].split(";")[0]

    assert (
        refuse(bench.cohort, replace(bench.protocol, seed=1))
        == "benchmark of another protocol_sha256"
    )
    other = bench.write(tmp_path / "fewer", "A1 B1 C1")
    assert refuse(other) == "benchmark of another counts_sha256"
    bench.write(other, "A2", version="2")
    with pytest.raises(InputError, match="section A2 has other mine features than the rest"):
        bench.run(done, cohort=other)
    bench.write(other, "A1 B1 C1", version="2")
    assert refuse(other) == "benchmark of another features"
    changed = bench.section("A1")
    changed.X[3, 3] += 1
    changed.obs.loc["3x3", "library_size"] += 1
    bench.write(other)
    bench.write_section(other, changed)
    assert refuse(other, replace(bench.protocol, folds="section")) == (
        "benchmark of another protocol_sha256, counts_sha256"
    )
    monkeypatch.setattr(runner, "__version__", "9")
    assert refuse(bench.cohort) == "benchmark of another strank_version"
    assert files(done) == before


def test_names_and_places_are_for_people(bench, done, tmp_path, monkeypatch):
    cells, out = counted(monkeypatch), shutil.copytree(done, tmp_path / "out")
    renamed = replace(bench.protocol, name="mine", description="for people")
    bench.run(out, renamed, bench.small, cohort=bench.write(tmp_path / "moved"))
    assert not cells
    assert json.loads((out / "benchmark.json").read_text())["protocol"]["name"] == "mine"


def test_where_nothing_can_be_done(bench, tmp_path):
    with pytest.raises(InputError, match=r"nothing could be fitted: .*50 genes asked for"):
        bench.run(tmp_path, *(replace(x, n_genes=(50,)) for x in (bench.protocol, bench.small)))
    assert set(files(tmp_path)) == {"benchmark.json", "protocol.toml"}
