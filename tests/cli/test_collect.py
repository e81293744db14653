"""Many slides on any engine, as shares, from a list; and what is wrong with a list."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

from strank.cli import app
from strank.encoders.base import encoder_facts
from strank.encoders.registry import get_encoder
from strank.errors import InputError
from strank.model.rank_model import RankModel
from strank.neural.heads import LinearHead
from strank.prediction import predict

NAMES = [f"s{n}" for n in range(5)]


def run(*arguments: object, code: int = 0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Five slides of 0.4 x 0.3 mm, a list of them, and a model."""
    root = tmp_path_factory.mktemp("slides")
    for number, name in enumerate(NAMES):
        pixels = np.full((150, 200, 3), 240, np.uint8)
        tissue = np.random.default_rng(number).integers(60, 200, (100, 150, 3))
        pixels[20:120, 20:170] = tissue
        Image.fromarray(pixels).save(root / f"{name}.png")
    rows = [{"path": f"{name}.png", "mpp": 2, "patient": f"P{name}"} for name in NAMES]
    pd.DataFrame(rows).to_csv(root / "list.csv", index=False)
    facts = encoder_facts(get_encoder("morphology"))
    panel = pd.DataFrame({"counts": 1.0}, index=pd.Index(["ERBB2"]))
    provenance = {"spot_diameter_um": 100.0, "spot_pitch_um": 200.0}
    head = LinearHead(facts["n_features"], 1)
    head.weight.data[:] = 0.1
    RankModel(head, panel, facts, provenance).save(root / "model")
    return root


def results(out: Path) -> dict[str, str]:
    """Checksums of all that does not say where, and in what time, it was made."""
    made = [path for path in out.rglob("*") if path.suffix in (".h5ad", ".png")]
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in made
    }


def table(out: Path) -> pd.DataFrame:
    return pd.read_csv(out / "slides.csv", keep_default_na=False)


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    run("predict", root / "list.csv", "--model", root / "model", "-o", out)
    return out


def test_a_list_says_what_stands_in_the_table(root, whole):
    found = table(whole)
    assert found["name"].tolist() == NAMES
    assert found["patient"].tolist() == [f"P{name}" for name in NAMES]
    assert set(found["state"]) == {"done"}
    assert (found["n_tiles"].astype(int) > 0).all()
    scores = anndata.read_h5ad(whole / "s0/scores.h5ad")
    assert scores.uns["strank"]["um_per_pixel"] == 2
    record = json.loads((whole / "s0/record.json").read_text())
    assert record["result"]["n_tiles"] == scores.n_obs
    assert record["host"]
    assert (whole / "index.html").is_file()


def test_shares_come_together(root, whole, tmp_path):
    out = tmp_path / "out"
    given = ["predict", root / "list.csv", "--model", root / "model", "-o", out]
    for share in ("1/3", "3/3"):
        run(*given, "--shard", share)
    assert not (out / "slides.csv").exists()
    told = run("collect", out, "--json", code=1)
    assert "2 of 5 slides are not done: s1 (missing), s4 (missing)" in told.stderr
    assert json.loads(told.stdout)["states"] == {"done": 3, "missing": 2}
    error = run(*given, "--shard", "2/4", code=2).stderr
    assert "shards of another number of shards (there are 3)" in " ".join(error.split())
    error = run(*given, "--shard", "2/3", "--stride", 50, code=2).stderr
    assert "shards of another stride_um" in " ".join(error.split())
    # One is started again, and does nothing twice.
    before = {name: (out / name / "scores.h5ad").stat().st_mtime_ns for name in ("s0", "s3")}
    run(*given, "--shard", "1/3")
    assert before == {name: (out / name / "scores.h5ad").stat().st_mtime_ns for name in before}
    run(*given, "--shard", "2/3")
    run("collect", out)
    assert results(out) == results(whole)
    columns = ["name", "slide", "state", "patient", "n_tiles", "odd_share", "warnings", "error"]
    assert table(out)[columns].equals(table(whole)[columns])


def test_what_failed_in_a_share_is_named(root, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    rows = [{"path": root / "s0.png", "mpp": 2}, {"path": tmp_path / "bad.png", "mpp": 2}]
    pd.DataFrame(rows).to_csv(tmp_path / "list.csv", index=False)
    out = tmp_path / "out"
    given = ["predict", tmp_path / "list.csv", "--model", root / "model", "-o", out]
    run(*given, "--shard", "1/2", code=1)
    run(*given, "--shard", "2/2")
    told = run("collect", out, code=1)
    assert "1 of 2 slides are not done: bad (failed)" in told.stderr
    assert "bad.png" in table(out).set_index("name").loc["bad", "error"]
    assert "no run of units to collect" in run("collect", tmp_path, code=2).stderr


@pytest.mark.slow
def test_results_are_the_same_to_the_byte_on_every_engine(root, whole, tmp_path):
    distributed = pytest.importorskip("distributed")
    given = ["predict", root / "list.csv", "--model", root / "model"]
    run(*given, "-o", tmp_path / "jobs", "--jobs", 2)
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with distributed.LocalCluster(**options) as cluster:
        run(*given, "-o", tmp_path / "dask", "--dask", cluster.scheduler_address)
    for engine in ("jobs", "dask"):
        assert results(tmp_path / engine) == results(whole), engine


def test_all_that_is_wrong_with_a_list_is_said_at_once(root, tmp_path):
    rows = [
        {"path": "gone.png", "name": "a", "mpp": 2, "model": ""},
        {"path": "lost.png", "name": "A", "mpp": "two", "model": "no-model"},
        {"path": root / "s0.png", "name": "../x", "mpp": -1, "model": ""},
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "list.csv", index=False)
    with pytest.raises(InputError) as told:
        predict(tmp_path / "list.csv", root / "model", tmp_path / "out")
    for part in ("gone.png", "lost.png", "no-model", "same name", ": a", "'../x'", "'two'", "'-1'"):
        assert part in str(told.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("file,mpp\nx,2\n", "has no column path; it has file, mpp"),
        ("path,mpp\n", "lists no slides"),
        ("", "not a readable table"),
    ],
)
def test_a_list_that_is_none(root, tmp_path, content, message):
    (tmp_path / "list.csv").write_text(content)
    with pytest.raises(InputError, match=message):
        predict(tmp_path / "list.csv", root / "model", tmp_path / "out")


def test_a_table_in_memory_with_a_model_a_slide(root, whole):
    rows = [{"path": root / f"{n}.png", "mpp": 2, "model": root / "model"} for n in NAMES[:2]]
    found = predict(pd.DataFrame(rows))
    assert list(found) == NAMES[:2]
    kept = anndata.read_h5ad(whole / "s1/scores.h5ad")
    np.testing.assert_array_equal(found["s1"].X, kept.X)
    with pytest.raises(InputError, match="no `model` is given, nor by the list"):
        predict(pd.DataFrame(rows).drop(columns="model"))
    with pytest.raises(InputError, match="for several slides with an `output`"):
        predict(pd.DataFrame(rows), jobs=2)


def test_shares_of_a_cohort_are_looked_through(st_folder, tmp_path):
    cohort = tmp_path / "cohort"
    run("import", "st", st_folder, "-o", cohort)
    names = sorted(path.stem for path in cohort.glob("*.h5ad"))
    (cohort / "features").mkdir()
    assert "no features of any encoder" in run("collect", cohort, code=2).stderr
    run("embed", cohort, "--shard", "1/2")
    told = run("collect", cohort, "--json", code=1)
    found = json.loads(told.stdout)
    assert found["not_done"] == {f"{name} of morphology": "missing" for name in names[1::2]}
    assert found["states"] == {"done": len(names[::2]), "missing": len(names[1::2])}
    run("embed", cohort, "--shard", "2/2")
    assert f"{len(names)} of {len(names)} sections" in run("collect", cohort).output
    # Neither is there what is cut short, nor what is of other spots.
    features = cohort / "features" / "morphology"
    first, second = (features / f"{name}.h5ad" for name in names[:2])
    second.write_bytes(first.read_bytes())
    first.write_bytes(first.read_bytes()[:-2000])
    told = run("collect", cohort, "--json", code=1)
    states = {"done": len(names) - 2, "damaged": 1, "of changed spots": 1}
    assert json.loads(told.stdout)["states"] == states
    told = " ".join(told.stderr.split())
    assert f"{names[0]} of morphology (damaged)" in told
    assert f"{names[1]} of morphology (of changed spots)" in told
