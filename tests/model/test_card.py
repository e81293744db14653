"""The card of a model: what it says, that the hub can read it, and that names do no harm."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.markdown import Markdown

from strank import RankModel, evaluate, fit
from strank.errors import InputError
from strank.model.card import Evidence, hub_header, model_card, read_evidence
from strank.model.rank_model import pull_model
from strank.neural.heads import LinearHead

FACTS = {"name": "mine", "version": "1", "fields": [], "n_features": 3}


@pytest.fixture
def model(cohort, tmp_path):
    trained = fit({k: cohort[k] for k in ("A1", "A2", "B1")}, encoder="mine", n_genes=4)
    trained.save(tmp_path / "model")
    return RankModel.load(tmp_path / "model")


@pytest.fixture
def evaluation(model, cohort, tmp_path):
    train = {name: cohort[name] for name in model.provenance["sections"]}
    evaluate(model, {"C1": cohort["C1"]}, train=train).write(tmp_path / "evaluation")
    return tmp_path / "evaluation"


def rendered(card: str) -> str:
    console = Console(width=300, file=io.StringIO())
    console.print(Markdown(card))
    return console.file.getvalue()


def test_the_card_says_what_on_what_and_how_well(model, evaluation):
    card = model.card(evaluation)
    text = rendered(card)
    assert "Sections: 3; patients: 2; spots: 90, of 100.0 µm" in text
    for name, entry in model.provenance["sections"].items():
        assert f"| {name} | {entry['patient']} | 30 | {entry['counts_sha256'][:12]} |" in card
    assert all(gene in text for gene in model.panel.index)
    summary = pd.read_csv(evaluation / "summary.csv").query("section == 'mean'")
    for row in summary.itertuples():
        assert f"| {row.method} | {row.scc:.3f} | {row.depth_matched:.3f} |" in card
    for part in ("scored on C1", "Diagnosis", "say little about new ones", "arXiv:2512.06612"):
        assert part in text
    assert "Not evaluated." in model.card()


def test_many_genes_are_counted_and_not_all_listed():
    genes = pd.DataFrame(index=[f"G{i}" for i in range(100)])
    card = RankModel(LinearHead(3, 100), genes, FACTS, {}).card()
    assert "100 genes (chosen: not recorded): G0, G1," in card
    assert "G29 and 70 more." in card


def test_the_hub_reads_the_header(model, evaluation):
    card = model.card(evaluation, licence='mit"\n', for_hub=True)
    data = ModelCard(card).data
    assert data.library_name == "strank"
    assert data.license == 'mit"\n'
    assert "spatial-transcriptomics" in data.tags
    mean = pd.read_csv(evaluation / "summary.csv").query("section == 'mean'").set_index("method")
    found = {result.metric_type: result.metric_value for result in data.eval_results}
    scores = mean.loc[model.method, ["scc", "depth_matched", "lift", "deviance", "slope"]]
    assert found == pytest.approx(scores.to_dict(), abs=1e-4)
    assert card.endswith(model.card(evaluation))
    bare = ModelCard(model.card(for_hub=True)).data.to_dict()
    assert not {"license", "model-index"} & bare.keys()


def test_its_python_works(model, tmp_path, monkeypatch):
    code = model.card().split("```python\n")[1].split("```")[0]
    code = code.replace("OWNER/NAME", "model")
    monkeypatch.chdir(tmp_path)
    names = {"adata": AnnData(obsm={"mine": np.ones((4, 3))})}
    exec(code, names)
    assert names["scores"].shape == (4, 4)


@settings(max_examples=50, deadline=None)
@given(name=st.text(st.characters(codec="ascii", exclude_categories=["C", "Z"]), min_size=1))
def test_a_name_is_shown_as_it_is(name):
    known = {"sections": {"S1": {"patient": name, "n_spots": 1, "counts_sha256": "0" * 64}}}
    model = RankModel(LinearHead(3, 1), pd.DataFrame(index=["G0"]), FACTS, known)
    row = next(line for line in rendered(model.card()).splitlines() if " S1 " in line)
    assert row.split() == ["S1", name, "1", "0" * 12]


def test_a_table_has_no_row_more_for_a_broken_line():
    known = {
        "sections": {
            "a|b\nc\x1b\x9b\x07": {"patient": "P", "n_spots": 1, "counts_sha256": "0" * 64}
        }
    }
    panel = pd.DataFrame(index=["<script>"])
    card = RankModel(LinearHead(3, 1), panel, FACTS, known).card()
    assert "| a\\|b c | P | 1 |" in card
    assert "\\<script\\>" in card


def test_warnings_and_undefined_scores_are_shown(model):
    row = {"section": "mean", "scc": 0.5, "depth_matched": np.nan, "lift": 0.25}
    row |= {"deviance": -0.125, "slope": np.nan}
    evidence = Evidence(pd.DataFrame([{"method": "list", **row}]), "folds", ("few spots",))
    card = model_card(model.panel.index, FACTS, {}, "list", evidence)
    assert "| list | 0.500 | – | 0.250 | -0.125 | – |" in card
    assert "**Note:** few spots." in card
    told = ModelCard(hub_header(FACTS, "list", evidence, None)).data.eval_results
    assert {result.metric_name: result.metric_value for result in told} == {
        "SCC": 0.5,
        "lift": 0.25,
        "deviance explained": -0.125,
    }


def test_evidence_of_other_things_is_refused(model, evaluation, cohort, tmp_path):
    other = fit(cohort, encoder="mine", n_genes=2)
    with pytest.raises(InputError, match="the evaluation of another model"):
        other.card(evaluation)
    (evaluation / "summary.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="not the tables of `strank evaluate`"):
        read_evidence(evaluation, model.provenance)
    with pytest.raises(InputError, match=r"evaluation\.json: no such file"):
        read_evidence(tmp_path, model.provenance)


@pytest.mark.parametrize("place", ["folder", "hub"])
def test_a_model_comes_back_as_it_went(model, cohort, tmp_path, hub_server, place):
    """To the byte, since what was scored before is known by the model's checksum."""
    (tmp_path / "model/notes.txt").write_text("mine alone")
    target = str(tmp_path / "shared") if place == "folder" else "me/model"
    for licence in ("mit", "cc0-1.0"):  # again, over what is there
        if place == "hub":
            assert model.push_to_hub(target, licence=licence) == f"{hub_server.address}/me/model"
        else:
            model.save(target, card=model.card(licence=licence, for_hub=True))
        (tmp_path / "shared/notes.txt").touch() if place == "folder" else None
        assert pull_model(target, tmp_path / "back") == tmp_path / "back"
        was, back = (
            {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()}
            for folder in ("model", "back")
        )
        # The hub of the tests has one commit, whose files do not change.
        expected = "mit" if place == "hub" else licence
        assert ModelCard(back.pop("README.md").decode()).data.license == expected
        del was["notes.txt"]
        assert back == was
    loaded = RankModel.from_pretrained(target)
    np.testing.assert_array_equal(loaded.predict(cohort["A1"]).X, model.predict(cohort["A1"]).X)


def test_a_folder_comes_before_the_hub_and_a_revision_and_token_go_there(
    model, tmp_path, hub_server, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    model.push_to_hub("me/model", token="hf_given")
    loaded = RankModel.from_pretrained("me/model", revision="v1", token="hf_given")
    assert loaded.provenance == model.provenance
    asked = len(hub_server.requests)
    model.save("me/model")
    RankModel.from_pretrained("me/model")
    assert len(hub_server.requests) == asked
    with pytest.raises(InputError, match="me/none: no such model"):
        RankModel.from_pretrained("me/none", token="hf_given")


def test_what_is_no_model_is_neither_sent_nor_taken(model, tmp_path, hub_server):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").touch()
    hub_server.repos["me/other"] = {"config.json": b"{}"}
    hub_server.repos["me/half"] = {"model.json": (tmp_path / "model/model.json").read_bytes()}
    hub_server.repos["me/half"]["head.safetensors"] = b"x"
    for call, told in {
        lambda: model.save(tmp_path / "full", card=""): "is not a model",
        lambda: RankModel.from_pretrained(tmp_path / "full"): "full: not a model of strank",
        lambda: pull_model(str(tmp_path / "model"), tmp_path / "full"): "is not a model",
        lambda: pull_model("me/other", tmp_path / "b"): r"me/other: not a model of strank",
        lambda: pull_model("me/half", tmp_path / "b"): "head.safetensors: damaged",
        lambda: RankModel.from_pretrained("me/half"): "head.safetensors: damaged",
        lambda: pull_model("./none", tmp_path / "b", revision="v1"): "which has no `revision`",
    }.items():
        with pytest.raises(InputError, match=told):
            call()
    assert not (tmp_path / "b").exists()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]


def test_slopes_of_three_sections_have_an_interval():
    row = {"scc": 0.4, "depth_matched": 0.3, "lift": 0.2, "deviance": 0.1, "slope": 0.97}
    summary = pd.DataFrame([{"method": "own model", "section": "mean", **row}])
    genes = pd.DataFrame(index=["A"])
    how = genes.index, FACTS, {}, "own model"
    plain = model_card(*how, Evidence(summary, "p", ()))
    assert "| 0.100 | 0.970 |" in plain
    with_ends = summary.assign(slope_low=0.81, slope_high=1.124)
    told = model_card(*how, Evidence(with_ends, "p", ()))
    assert r"| 0.100 | 0.970 \[0.810, 1.124\] |" in told
