from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from strank import RankModel, STRankRegressorCV, fit
from strank.errors import InputError
from strank.linear.penalty import DEFAULT_PENALTY
from strank.model.novelty import novelty_of


@pytest.fixture
def model(cohort) -> RankModel:
    return fit(cohort, encoder="mine", n_genes=4)


def test_the_model_is_the_regressor(cohort, model):
    panel = model.panel.index
    stacked = [(a.obsm["mine"], a[:, panel].X.toarray(), a.obs) for a in cohort.values()]
    features, counts = (np.concatenate(part) for part in list(zip(*stacked, strict=True))[:2])
    section = np.repeat(list(cohort), 30)
    offset = np.concatenate([np.log(obs["library_size"]) for _, _, obs in stacked])
    patient = np.concatenate([obs["patient"] for _, _, obs in stacked])
    assert len(set(patient)) > 2
    regressor = STRankRegressorCV()
    regressor.fit(features, counts, section=section, offset=offset, group=patient)
    assert model.provenance["penalty_choice"] == "leave one patient out"
    np.testing.assert_allclose(model.panel["penalty"], regressor.penalty_)
    for name, adata in cohort.items():
        expected = regressor.predict(adata.obsm["mine"]) * regressor.choice_.temperature
        got = model.predict(adata).X
        np.testing.assert_allclose(got, expected - expected.mean(0), atol=1e-5)
        assert section[0] == "A1"
        assert name in model.provenance["sections"]


def test_a_model_survives_the_disk(cohort, model, tmp_path):
    model.save(tmp_path / "m")
    back = RankModel.load(tmp_path / "m")
    np.testing.assert_array_equal(back.predict(cohort["A1"]).X, model.predict(cohort["A1"]).X)
    assert back.provenance == json.loads(json.dumps(model.provenance))
    files = ["head.safetensors", "model.json", "novelty.safetensors", "uncertainty.safetensors"]
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == files
    model.save(tmp_path / "m")  # a model may take the place of a model
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match="other: exists and is not a model"):
        model.save(tmp_path / "other")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file"):
        model.save(tmp_path / "file" / "m")


def test_what_is_usual_survives_the_disk_and_older_models_lack_it(cohort, model, tmp_path):
    model.save(tmp_path / "m")
    back = RankModel.load(tmp_path / "m")
    features = np.vstack([cohort["A1"].obsm["mine"], [[40.0, 0.0, 0.0]]])
    distances = novelty_of(features, back.novelty)
    np.testing.assert_array_equal(distances, novelty_of(features, model.novelty))
    assert distances[-1] > 1 > np.median(distances)
    replace(model, novelty=None).save(tmp_path / "old")
    assert "novelty" not in json.loads((tmp_path / "old" / "model.json").read_text())
    assert RankModel.load(tmp_path / "old").novelty is None


def test_predictions_are_anndata_with_provenance(cohort, model):
    adata = cohort["A1"][:, [g for g in cohort["A1"].var_names if g != model.panel.index[0]]]
    got = model.predict(adata)
    assert list(got.var_names) == list(model.panel.index)
    assert got.var["measured"].tolist() == [False, True, True, True]
    np.testing.assert_allclose(got.X.mean(0), 0, atol=1e-5)
    np.testing.assert_array_equal(got.obsm["spatial"], adata.obsm["spatial"])
    assert json.loads(got.uns["strank_model"])["encoder"]["name"] == "mine"


def test_features_of_another_encoder_are_refused(cohort, model):
    adata = cohort["A1"]
    narrow = adata.copy()
    narrow.obsm["mine"] = narrow.obsm["mine"][:, :2]
    with pytest.raises(InputError, match="has 2 features, but the model was trained on 3"):
        model.predict(narrow)
    other = adata.copy()
    other.uns["mine"] = {**other.uns["mine"], "version": "2"}
    with pytest.raises(
        InputError, match=r"come from another mine than the model's \(version differ"
    ):
        model.predict(other)
    absent = adata.copy()
    absent.obsm["theirs"] = absent.obsm.pop("mine")
    with pytest.raises(
        InputError, match=r"needs features of mine in obsm\['mine'\]; there is .*theirs"
    ):
        model.predict(absent)
    broken = adata.copy()
    broken.obsm["mine"] = broken.obsm["mine"].copy()
    broken.obsm["mine"][2, 1] = np.nan
    with pytest.raises(InputError, match="features of spot 2x2 are not finite"):
        model.predict(broken)


def damage(name, change):
    def apply(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(change(content))

    return apply


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "model.json").unlink(), "model.json: no such file"),
        (lambda f: (f / "head.safetensors").unlink(), "head.safetensors: damaged model folder"),
        (damage("model.json", lambda c: c[:50]), "model.json: not a readable JSON"),
        (damage("model.json", lambda c: b"{}"), "model.json: format: missing"),
        (damage("model.json", lambda c: c.replace(b'"gene": ', b'"name": ')), "panel.0.gene: miss"),
        (damage("model.json", lambda c: c.replace(b'"linear"', b'"cubist"')), "head 'cubist'"),
        (
            damage("model.json", lambda c: c.replace(b'"format": 1', b'"format": 7')),
            "update strank",
        ),
        (damage("head.safetensors", lambda c: c[:-4]), "head.safetensors: damaged"),
        (damage("novelty.safetensors", lambda c: c[:-4]), "novelty.safetensors: damaged"),
        (
            lambda f: (f / "novelty.safetensors").unlink(),
            "novelty.safetensors: damaged model folder",
        ),
    ],
)
def test_damaged_folders_are_refused(model, tmp_path, break_it, message):
    model.save(tmp_path / "m")
    break_it(tmp_path / "m")
    with pytest.raises(InputError, match=message):
        RankModel.load(tmp_path / "m")
    with pytest.raises(InputError, match="no such model folder"):
        RankModel.load(tmp_path / "absent")


def test_the_panel_is_of_the_training_sections_only(cohort):
    train = {name: cohort[name] for name in ("A1", "A2")}
    before = fit(train, encoder="mine", n_genes=3)
    cohort["C1"].X = cohort["C1"].X * 0
    assert list(fit(train, encoder="mine", n_genes=3).panel.index) == list(before.panel.index)
    given = fit(train, encoder="mine", genes=["G5", "G0"])
    assert list(given.panel.index) == ["G5", "G0"]
    assert given.provenance["panel_choice"] == "given; of 6 that all sections measure"


def test_one_section_takes_the_default_penalty_and_says_so(cohort):
    model = fit({"A1": cohort["A1"]}, encoder="mine", n_genes=2)
    assert (model.panel["penalty"] == DEFAULT_PENALTY).all()
    assert "one section, nothing to leave out" in model.provenance["penalty_choice"]
    with pytest.raises(InputError, match="`penalty` must not be negative; got -1"):
        fit(cohort, encoder="mine", n_genes=2, penalty=-1)


def test_features_must_be_the_same_in_all_sections(cohort):
    cohort["B1"].uns["mine"] = {**cohort["B1"].uns["mine"], "version": "2"}
    with pytest.raises(InputError, match="section B1 has other mine features than the rest"):
        fit(cohort, encoder="mine", n_genes=2)
    with pytest.raises(InputError, match=r"section A1 has no features obsm\['theirs'\]"):
        fit(cohort, encoder="theirs", n_genes=2)


def test_features_that_a_user_brings_need_no_facts(cohort):
    for adata in cohort.values():
        del adata.uns["mine"]
    model = fit(cohort, encoder="mine", n_genes=2)
    assert model.predict(cohort["A1"]).shape == (30, 2)


def test_spots_without_counts_have_no_exposure_and_are_left_out(cohort):
    train = {name: cohort[name] for name in ("A1", "A2")}
    plain = fit({n: a[3:].copy() for n, a in train.items()}, encoder="mine", n_genes=3)
    for adata in train.values():
        dense = adata.X.toarray()
        dense[:3] = 0
        adata.X = type(adata.X)(dense)
        adata.obs["library_size"] = dense.sum(1)
    got = fit(train, encoder="mine", genes=list(plain.panel.index))
    np.testing.assert_allclose(got.head.weight.detach(), plain.head.weight.detach(), atol=1e-5)
    for adata in train.values():
        adata.X, adata.obs["library_size"] = adata.X * 0, 0.0
    with pytest.raises(InputError, match="section A1: no spot has any count"):
        fit(train, encoder="mine", genes=["G0"])


def test_what_is_left_out_is_what_the_scores_are_for(section_of):
    names = {"A1": "A", "A2": "A", "B1": "B"}
    cohort = {name: section_of(name, patient=patient) for name, patient in names.items()}
    model = fit(cohort, encoder="mine", n_genes=None)
    assert model.provenance["penalty_choice"] == "leave one patient out"
    told = model.provenance["calibration"]
    assert told["size"]
    assert told["told"].startswith("scores are log fold changes for new patients: ")
    assert "each of 2 patients left out" in told["told"]
    known = fit(cohort, encoder="mine", n_genes=None, aim="known-patients")
    assert known.provenance["penalty_choice"] == "leave one section out"
    assert "for known patients" in known.provenance["calibration"]["told"]
    assert "each of 3 sections left out" in known.provenance["calibration"]["told"]
    assert (known.panel["temperature"] != model.panel["temperature"]).any()
    assert len(model.panel) == 6
    assert model.provenance["panel_choice"].startswith("all that vary")


def test_a_model_of_one_patient_says_that_it_shows_order_not_size(section_of, tmp_path):
    cohort = {name: section_of(name, patient="A") for name in ("A1", "A2")}
    model = fit(cohort, encoder="mine", n_genes=None)
    model.save(tmp_path / "model")
    told = RankModel.load(tmp_path / "model").provenance["calibration"]
    assert not told["size"]
    assert told["told"].startswith("scores show order, not size, on new patients: a model of one")
    assert "Scores show order, not size, on new patients" in model.card()
    predicted = json.loads(model.predict(cohort["A1"]).uns["strank_model"])
    assert predicted["calibration"] == told
    # Of the patient's own sections its size is known.
    own = partial(fit, encoder="mine", n_genes=2)
    assert own(cohort, aim="known-patients").provenance["calibration"]["size"]
    for alone in (own({"A1": cohort["A1"]}), own(cohort, penalty=9.0)):
        assert "no section was left out" in alone.provenance["calibration"]["told"]
        assert not alone.provenance["calibration"]["size"]
    with pytest.raises(
        InputError, match=r"no aim 'new'; choose one of new-patients, known-patients"
    ):
        own(cohort, aim="new")


def test_genes_borrow_if_asked(section_of):
    cohort = {name: section_of(name, n_genes=16) for name in ("A1", "A2")}
    model = fit(cohort, encoder="mine", n_genes=None, borrow=True)
    assert model.provenance["penalty_choice"] == "leave one section out, genes borrow"
    assert model.panel["borrows"].dtype == bool
    for wrong in ({"penalty": 3.0}, {"cohort": {"A1": cohort["A1"]}}):
        with pytest.raises(InputError, match="borrowing between genes needs two sections"):
            fit(**{"cohort": cohort, "encoder": "mine", "borrow": True, **wrong})
    with pytest.raises(InputError, match="needs at least 15 genes; got 3"):
        fit(cohort, encoder="mine", n_genes=3, borrow=True)
    with pytest.raises(InputError, match="`max_memory=1e-07` GiB is too little"):
        fit(cohort, encoder="mine", n_genes=3, max_memory=1e-7)


def test_a_section_that_does_not_measure_a_gene_has_no_say_in_it(cohort):
    """Without penalty, whatever the scale of the features, only the sections with counts count."""
    lacking = {**cohort, "A1": cohort["A1"][:, ["G0", "G1", "G2"]].copy()}
    others = {name: adata for name, adata in cohort.items() if name != "A1"}
    how = {"encoder": "mine", "genes": ["G1", "G5"], "penalty": 0}
    union = fit(lacking, **how, union=True)
    without, with_all = fit(others, **how), fit(cohort, **how)

    def slopes(model) -> np.ndarray:
        return (model.head.weight / model.head.scale[:, None]).detach().numpy()

    np.testing.assert_allclose(slopes(union)[:, 1], slopes(without)[:, 1], rtol=1e-3)
    np.testing.assert_allclose(slopes(union)[:, 0], slopes(with_all)[:, 0], rtol=1e-3)
    assert union.provenance["panel_choice"] == "given; of 6 that any section measures; 1 not in all"
    with pytest.raises(InputError, match="section A1 has no gene G5"):
        fit(lacking, **how)
    with pytest.raises(InputError, match="no section has gene G9"):
        fit(lacking, **{**how, "genes": ["G9"]}, union=True)


@pytest.mark.parametrize("told", [{"objective": "list likelihood"}, {"method": "mlp, list"}])
def test_a_model_of_an_earlier_strank_is_refused(cohort, tmp_path, told):
    model = fit(cohort, encoder="mine", n_genes=3)
    provenance = {name: value for name, value in model.provenance.items() if name != "method"}
    replace(model, provenance=provenance | told).save(tmp_path / "model")
    with pytest.raises(InputError, match="model: written by an earlier strank; fit the model"):
        RankModel.load(tmp_path / "model")
