"""The paper's table by number of genes: folds, panels and numbers, gone on with, and refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.stats import spearmanr
from typer.testing import CliRunner

from strank.cli import app
from strank.cohort.folds import fixed_folds
from strank.cohort.store import read_cohort
from strank.encoders.base import Field
from strank.errors import InputError
from strank.evaluation.protocol import PRESETS
from strank.fitting.method import fit
from strank.reproduce import genes
from strank.studies.reproduce.genes import _benches, _paper, turns

SECTIONS = ("A1", "A2", "B1", "C1")
N_GENES, SIDE = 240, 5
LOSSES = ("list",)


class Shade:
    """Mean colour: what the sections below hold."""

    name, version, fields = "shade", "1", (Field(100.0, 32),)
    feature_names = ("r", "g", "b")

    def encode(self, patches):
        return patches[0].mean((1, 2), dtype=np.float32) / 255


def write_st(folder: Path, *sections: str, n_genes: int = N_GENES, **other: int) -> Path:
    """Spots whose shade says what they express; `other` sections have other genes from there on."""
    of_genes = np.random.default_rng(0)
    level, slope = of_genes.uniform(0.5, 2, n_genes), of_genes.normal(0, 0.6, n_genes)
    for kind in ("images", "counts", "spots"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for name in sections:
        rng = np.random.default_rng([*name.encode()])
        y, x = np.mgrid[:SIDE, :SIDE].reshape(2, -1)
        state = rng.normal(size=SIDE**2)
        counts = rng.poisson(
            rng.lognormal(0, 0.3, (SIDE**2, 1)) * np.exp(level + state[:, None] * slope)
        )
        spots = pd.DataFrame({"x": x, "y": y, "pixel_x": 60 + 100 * x, "pixel_y": 60 + 100 * y})
        pixels = np.full((520, 520, 3), 200.0)
        for column, row, shade in zip(x, y, state, strict=True):
            at = np.s_[10 + 100 * row : 110 + 100 * row, 10 + 100 * column : 110 + 100 * column]
            pixels[at] = 130 + shade * np.array([25, -15, 8]) + rng.normal(0, 6, (100, 100, 1))
        names = [f"G{i}" if i < other.get(name, n_genes) else f"{name}-{i}" for i in range(n_genes)]
        index = [f"{a}x{b}" for a, b in zip(x, y, strict=True)]
        table = pd.DataFrame(counts, index=index, columns=names)
        Image.fromarray(np.clip(pixels, 0, 230).astype(np.uint8)).save(
            folder / f"images/{name}.jpg", quality=95
        )
        table.to_csv(folder / f"counts/{name}.tsv.gz", sep="\t")
        spots.to_csv(folder / f"spots/{name}_selection.tsv", sep="\t", index=False)
    return folder


def run(folder: Path, data: Path, **given):
    how = {"encoder": Shade(), "n_genes": [50, 9385], "losses": LOSSES, "quick": True}
    return genes(folder, data, **how | given)


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """The folder of a run; its data lie beside it."""
    folder = tmp_path_factory.mktemp("genes")
    run(folder / "out", write_st(folder / "st", *SECTIONS))
    return folder / "out"


def test_every_patient_is_held_out_once_and_the_next_one_stops():
    patients = {"A1": "A", "A2": "A", "B1": "B", "C1": "C"}
    found = {fold.name: (fold.train, fold.validation, fold.test) for fold in turns(patients)}
    assert found == {
        "A": (("C1",), ("B1",), ("A1", "A2")),
        "B": (("A1", "A2"), ("C1",), ("B1",)),
        "C": (("B1",), ("A1", "A2"), ("C1",)),
    }
    of_two = {"A1": "A", "A2": "A", "B1": "B"}
    [first, *_] = folds = turns(of_two)
    assert [fold.name for fold in folds] == ["A1", "A2", "B1"]
    assert (first.train, first.validation, first.test) == (("B1",), ("A2",), ("A1",))
    assert [fold.shared_patients for fold in fixed_folds(folds, of_two)] == [("A",), ("A",), ()]


def test_the_papers_number_stands_beside_as_many_genes_or_hardly_fewer():
    assert _paper(("list", "nb"), 50, 50) == {"list": 0.26, "nb": 0.02}
    assert _paper(("list",), 9000, 9385) == {"list": 0.087}
    assert np.isnan(_paper(("list",), 1010, 9385)["list"])
    assert np.isnan(_paper(("list",), 60, 60)["list"])


def test_numbers_are_those_of_fits_by_hand(done):
    table = pd.read_csv(done / "table.csv").set_index(["genes", "method"])
    # No more genes than there are.
    assert sorted(set(table.index.get_level_values("genes"))) == [50, N_GENES]
    protocol = PRESETS["paper-IDC"]
    cohort = protocol.filtered(read_cohort(done / "cohort", encoder="shade"))
    folds = turns({name: name[0] for name in SECTIONS})
    how = {"encoder": "shade", "recipe": "published-quick", "seed": 0}
    for size, paper in ((50, 0.26), (N_GENES, np.nan)):
        panel = protocol.choose_panel(cohort, folds[0], size)
        found = []
        for fold in folds:
            development = {name: cohort[name] for name in fold.development}
            validation = fold.validation
            model = fit(development, genes=list(panel), validation=validation, **how)
            for name in fold.test:
                counts = cohort[name][:, panel].X.toarray()
                target = np.log1p(1e4 * counts / counts.sum(1, keepdims=True))
                scores = np.asarray(model.predict(cohort[name]).X)
                found += [spearmanr(scores[:, g], target[:, g])[0] for g in range(size)]
        row = table.loc[(size, "linear, list, published-quick")]
        assert row["scc"] == pytest.approx(np.mean(found), abs=1e-4)
        assert row["paper"] == pytest.approx(paper, nan_ok=True)
    assert table.loc[(50, "linear, list"), "scc"] > 0.3


def test_the_published_recipe_trains_any_number_of_genes(section_of, tmp_path):
    cohort = {name: section_of(name, patient=name[0], n_genes=1003) for name in ("A1", "B1", "C1")}
    facts = {"quick": False, "losses": ("rank",), "seeds": 1, "library_size": True}
    about = {"questionable": []}
    benches = _benches(cohort, [50, 1001, 9385], tmp_path, tmp_path, "mine", facts, about)
    assert [bench.what for bench in benches[::2]] == ["50 genes", "1001 genes", "1003 genes"]
    # Of three folds, the published rank, the exact list, and both ridges; and three to score.
    assert [bench.work for bench in benches] == [3 * 4 + 3] * 6


def test_without_leaks_genes_are_of_training_and_scores_neutral_to_depth(done):
    table = pd.read_csv(done / "table.csv").set_index(["genes", "method"])
    about = json.loads((done / "50-genes/leak-free/benchmark.json").read_text())["protocol"]
    assert (about["panel_from"], about["target_depth"]) == ("training", "all")
    summary = pd.read_csv(done / "50-genes/leak-free/summary.csv").set_index(["method", "score"])
    for score in ("depth_matched", "lift", "slope"):
        expected = summary.loc[("linear, list", score), ["mean", "low", "high"]].astype(float)
        found = table.loc[(50, "linear, list"), [score, f"{score}_low", f"{score}_high"]]
        np.testing.assert_allclose(found.astype(float), expected, rtol=1e-4)


def test_it_says_what_is_questionable(done):
    facts = json.loads((done / "reproduction.json").read_text())
    assert "does not name the split" in facts["split"]
    assert "every patient is held out" in facts["split"]
    told = " ".join(facts["questionable"])
    assert f"9385 genes are asked for, and the filter leaves {N_GENES} that all 4 sect" in told
    assert "A first look" in told
    assert "published: the genes are chosen on all sections" in told
    assert "leak-free: the genes are chosen" not in told
    # Of both benchmarks, but once.
    assert told.count("the filter leaves of") == 1
    text = (done / "table.md").read_text()
    assert text.index("does not name the split") < text.index("| linear, list, published-quick")
    assert "not done" not in text


def test_what_is_done_is_not_done_again(done, monkeypatch):
    before = (done / "table.csv").read_text()
    for name in ("run_cell", "score_task"):
        monkeypatch.setattr(f"strank.studies.benchmark.runner.{name}", pytest.fail)
    monkeypatch.setattr("strank.studies.reproduce.genes.read_st", pytest.fail)
    run(done, done.parent / "st")
    assert (done / "table.csv").read_text() == before
    with pytest.raises(InputError, match="out: reproduction of another losses; choose another"):
        run(done, done.parent / "st", losses=["mse"])


def test_of_two_patients_sections_take_turns_in_a_cohort_as_it_is(done, tmp_path):
    cohort = tmp_path / "cohort"
    for part in ("", "features/shade/"):
        (cohort / part).mkdir(parents=True, exist_ok=True)
        for name in ("A1", "A2", "B1"):
            shutil.copy(done / f"cohort/{part}{name}.h5ad", cohort / f"{part}{name}.h5ad")
    found = run(tmp_path / "out", cohort, n_genes=[50])
    assert "every section is held out" in found.facts["split"]
    assert not (tmp_path / "out/cohort").exists()
    # Seen and new patients in one row.
    assert found.table["method"].is_unique
    rows = found.table.set_index("method").loc[["linear, list", "linear, list, published-quick"]]
    assert np.isfinite(rows[["scc", "depth_matched", "lift", "slope"]]).all(axis=None)
    told = " ".join(found.facts["questionable"])
    assert "fold A1, A2: patient A stands on both sides of the split" in told
    assert "what is called leak-free has genes chosen on training" in told


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n_genes": []}, "^`n_genes` names no number of genes$"),
        ({"n_genes": 50}, "^`n_genes` is a list of whole numbers above 0; got 50$"),
        ({"n_genes": [0]}, "^`n_genes` is a list of whole numbers"),
        ({"losses": ["lsit"]}, "^no loss 'lsit'; choose one of mse, .*did you mean list"),
        ({"losses": "list"}, "^`losses` is a list of names; got 'list'$"),
        ({"seeds": 0}, "^`seeds` must be at least 1; got 0$"),
        ({"data": "none"}, "none: no such folder; it needs images/, counts/ and spots/, or"),
        ({"data": "empty"}, "empty: no sections .* make a cohort with `strank import`$"),
        ({"data": "part"}, "part: section A1 has images/A1.jpg but nothing in counts and spots/"),
        ({"data": "two"}, r"two: only 2 sections \(A1, B1\), and three are needed: to train,"),
    ],
)
def test_what_is_asked_for_wrongly_is_refused_at_once(tmp_path, given, message):
    write_st(tmp_path / "two", "A1", "B1", n_genes=3)
    (tmp_path / "empty").mkdir()
    shutil.copytree(tmp_path / "two/images", tmp_path / "part/images")
    data = tmp_path / given.pop("data", "two")
    with pytest.raises(InputError, match=message):
        run(tmp_path / "out", data, **given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("shared", "message"),
    [
        (0, "^no gene is measured in all of the sections A1, B1, C1: C1 has .*, before it .*$"),
        (
            40,
            "^50 genes asked for, and the filter leaves 40 that all sections share; section .* has "
            "the fewest, 2.*: ask for fewer `n_genes`, or take it out$",
        ),
    ],
)
def test_sections_that_share_too_few_genes_are_refused(tmp_path, shared, message):
    folder = write_st(tmp_path / "st", "A1", "B1", "C1", n_genes=210, C1=shared)
    with pytest.raises(InputError, match=message):
        run(tmp_path / "out", folder)
    assert not list((tmp_path / "out").glob("*-genes"))


def test_the_command_says_which_option_is_wrong(tmp_path):
    command = ["reproduce", "genes", "--data", str(tmp_path), "-o", str(tmp_path / "out")]
    found = CliRunner().invoke(app, [*command, "--genes", "50,many"])
    assert found.exit_code == 2
    assert "--genes: 'many' is no number of genes" in found.stderr
    assert not (tmp_path / "out").exists()


def test_the_command_prints_the_table(done, monkeypatch):
    monkeypatch.setattr("strank.studies.reproduce.genes.needed_encoder", lambda *_: Shade())
    command = ["reproduce", "genes", "--data", str(done.parent / "st"), "-o", str(done)]
    command += ["--genes", "50,9385", "--losses", "list", "--quick"]
    found = CliRunner().invoke(app, command)
    assert found.exit_code == 0, found.stderr
    assert "Depth-matched SCC, genes chosen on" in found.stdout
    assert "does not name the split" in found.stderr
    told = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert len(told["rows"]) == len(pd.read_csv(done / "table.csv"))
