"""What results show of themselves: what matters, in 80 columns, and safely in a notebook."""

from __future__ import annotations

from html.parser import HTMLParser

import pandas as pd
import pytest

import strank
from strank.evaluation.held_out import Evaluation
from strank.shown import as_html, as_text
from strank.studies.benchmark.runner import BenchmarkResult
from strank.studies.hest_benchmark import OURS, RIDGE, HestBenchmarkResult


class Balanced(HTMLParser):
    """Fails where a tag is closed that is not open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read(html: str) -> Balanced:
    page = Balanced()
    page.feed(html)
    assert page.open == []
    return page


def check(result, *, longest: int = 80) -> str:
    text = repr(result)
    assert max(map(len, text.splitlines())) <= longest, text
    assert len(text.splitlines()) < 60
    read(result._repr_html_())
    return text


@pytest.fixture
def evaluation(cohort) -> Evaluation:
    return strank.cross_validate(cohort, encoder="mine", n_genes=3)


def test_a_model(cohort):
    model = strank.fit(cohort, encoder="mine", n_genes=3)
    text = check(model)
    assert text.startswith("RankModel: linear, list\n")
    assert f"genes: 3: {', '.join(model.panel.index)}\n" in text
    assert "features: mine, 3 a spot\n" in text
    assert "trained on sections: 4: A1, A2, B1, C1, of 3 patients, 120 spots\n" in text
    assert "log fold changes" in text
    assert "tensor" not in text


def test_a_model_of_which_nothing_is_known(cohort):
    model = strank.fit(cohort, encoder="mine", n_genes=3)
    bare = strank.RankModel(model.head, model.panel, model.encoder, {})
    assert "trained on sections: none\n" in check(bare) + "\n"


def test_an_evaluation_shows_its_scores(evaluation):
    text = check(evaluation)
    means = evaluation.summary[evaluation.summary["section"] == "mean"].set_index("method")
    for score in ("scc", "depth_matched", "lift", "deviance", "slope"):
        assert score in text
        assert f"{means.loc['linear, list', score]:.3f}" in text
        assert f"{means.loc['ridge', score]:.3f}" in read(evaluation._repr_html_()).text
    assert "leave one patient out" in text


def test_what_a_benchmark_shows():
    scores = ("depth_matched", "lift", "deviance", "slope", "scc", "pearson", "predicted")
    rows = [
        {"encoder": "uni", "genes": genes, "patient_seen": seen, "method": method}
        | {"score": score, "mean": place + 0.125}
        for genes in ("50", "1000")
        for seen in (True, False)
        for place, method in enumerate(["ridge", "linear, list", "a method of a very long name, x"])
        for score in scores
    ]
    protocol = {"name": "strank", "headline": "scc"}
    facts = {"protocol": protocol, "sections": {"A": {}, "B": {}}, "warnings": ["few patients"]}
    text = check(BenchmarkResult(pd.DataFrame(rows), facts))
    for caption in ("uni, 50 genes, known patients", "uni, 1000 genes, new patients"):
        assert caption in text
    table = text.partition("uni, 50 genes, known patients\n")[2].splitlines()
    assert table[0].split() == ["scc", "depth_matched", "lift", "deviance", "slope"]
    assert [line[:10] for line in table[2:5]] == ["a method o", "linear, li", "ridge     "]
    assert table[4].split() == ["ridge", *["0.125"] * 5]
    assert "  ! few patients" in text


def test_what_hest_benchmark_shows():
    rows = [
        {"task": task, "encoder": "uni", "features": "pca", "method": method, "fold": fold}
        | {"gene": "G1", "score": score, "value": 0.25 + 0.5 * (task == "B")}
        for task in ("A", "B")
        for method in (RIDGE, *OURS)
        for fold in ("0", "1")
        for score in ("pearson", "pearson_within", "scc")
    ]
    result = HestBenchmarkResult(pd.DataFrame(rows), {"protocols": ["hest"]})
    head = next(line for line in check(result).splitlines() if "mean" in line)
    assert head.split() == ["mean", "scc", "A", "B"]


def test_names_are_no_markup():
    table = pd.DataFrame({"scc": [0.5]}, index=["<script>alert(1)</script>"])
    html = as_html("<b>", {"<i>": "&"}, {"<u>": table}, ["<s>"])
    page = read(html)
    assert not {"script", "b", "i", "u", "s"} & set(page.seen)
    assert "alert(1)" in page.text
    assert "\x1b" not in as_text("a\x1b[2J", {})


def test_long_tables_and_many_notes_are_cut():
    table = pd.DataFrame({"scc": range(1000)}, index=[f"m{i}" for i in range(1000)])
    notes = [f"note {i}" for i in range(50)]
    for show in (as_text, as_html):
        told = show("T", {}, {"": table}, notes)
        assert "... and 970 more rows" in told
        assert "and 47 more in `warnings`" in told
        assert "note 3" not in told
