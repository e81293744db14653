"""A method is named once: in tables, in a model's provenance, in what is refused."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

pytest.importorskip("lightning")

from strank import RankModel, STRankRegressorCV, fit
from strank.cohort.training_set import training_data
from strank.errors import InputError
from strank.fitting.method import HEST_RIDGE, Method, head_choices
from strank.fitting.objectives import OBJECTIVES
from strank.linear.penalty import PENALTIES
from strank.neural.heads import HEADS, MLPHead
from strank.neural.recipe import RECIPES, Machine, Recipe

SHORT = Recipe(max_epochs=1, networks=1)


def test_names():
    names = [Method("linear", loss).name for loss in OBJECTIVES]
    assert names == [
        *("linear, list", "linear, pair", "linear, rank", "linear, rank-published", "linear, pcc"),
        *("linear, section-pcc", "ridge", "linear, poisson", "linear, nb"),
    ]
    exact = [loss for loss in OBJECTIVES if Method("linear", loss).is_exact]
    assert exact == ["list", "pair", "mse", "poisson", "nb"]
    assert Method("linear", "mse", "centred").name == "centred ridge"
    assert Method("linear", "mse", "published").name == "linear, mse, published"
    assert Method("linear", "list", library_size=False).name == "linear, list, no library size"
    assert Method("linear", "list", "default").name == "linear, list, default"
    assert Method("mlp", "list", "default") == Method("mlp", "list")
    assert Method("timm:resnet18", "list").name == "timm:resnet18, list"
    assert Method("timm:resnet18", "list").needs_images
    assert not Method("mlp", "list").is_exact
    assert HEST_RIDGE.is_exact
    assert not HEST_RIDGE.log_rates


def test_no_two_methods_have_the_same_name():
    methods = []
    for head in (*head_choices(), "timm:resnet18"):
        for loss in OBJECTIVES:
            for recipe in (*RECIPES, "exact", "centred", "hest", "own recipe"):
                for depth in (True, False):
                    try:
                        methods.append(Method(head, loss, recipe, library_size=depth))
                    except InputError:
                        # Solvers and the published recipe are for the linear head only, and not
                        # for all losses; library size is for likelihoods.
                        known = recipe in ("default", "finetune", "own recipe")
                        assert not known or not (depth or OBJECTIVES[loss].log_rates)
    assert len({method.name for method in methods}) == len(set(methods)) > 200


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (("linear", "lst"), r"no loss 'lst'; choose one of list, pair, .* \(did you mean list\?\)"),
        (("resnet", "list"), "no head 'resnet'; choose one of linear, mlp, context, mlp.linear"),
        (("mean", "list"), "no head 'mean'; "),
        (("linear+linear", "list"), "no head 'linear.linear'"),
        (("", "list"), "no head ''"),
        (("linear", "rank", "exact"), "no recipe 'exact'; choose one of default, published"),
        (("mlp", "list", "publishd"), r"no recipe 'publishd'; .* \(did you mean published\?\)"),
        (("linear", "list", "centred"), "no recipe 'centred'"),
    ],
)
def test_unknown_names(parts, message):
    with pytest.raises(InputError, match=f"^{message}"):
        Method(*parts)


@pytest.mark.parametrize(
    ("how", "name"),
    [
        ({}, "linear, list"),
        ({"loss": "mse", "recipe": "hest"}, "hest-ridge"),
        ({"head": "mlp", "recipe": SHORT}, "mlp, list, own recipe"),
        ({"head": "mlp+linear", "loss": "pair", "recipe": SHORT}, "mlp+linear, pair, own recipe"),
        ({"recipe": SHORT, "loss": "nb"}, "linear, nb, own recipe"),
        ({"head": partial(MLPHead, width=4), "recipe": SHORT}, "own head, list, own recipe"),
    ],
)
def test_a_model_says_by_which_method_it_was_made(cohort, tmp_path, how, name):
    model = fit(cohort, encoder="mine", n_genes=3, **how)
    model.save(tmp_path / "m")
    loaded = RankModel.load(tmp_path / "m")
    assert loaded.method == model.method == name
    method = Method.of_model(loaded)
    assert method.name == name
    assert method.facts == model.provenance["method"]


def test_a_model_of_ones_own_says_nothing(cohort):
    model = fit(cohort, encoder="mine", n_genes=3)
    assert Method.of_model(RankModel(model.head, model.panel, model.encoder, {})) is None


def test_a_head_of_ones_own_has_its_name(cohort, monkeypatch):
    monkeypatch.setitem(HEADS, "mine", partial(MLPHead, width=4))
    assert Method("mine+linear", "list").name == "mine+linear, list"
    assert fit(cohort, encoder="mine", n_genes=3, head="mine", recipe=SHORT).method[:5] == "mine,"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 0}, "^`seed` is for networks: give `head` mlp or context, or a `recipe`$"),
        ({"machine": Machine()}, "`machine` is for networks"),
        ({"resume": True}, "`resume` is for networks"),
        ({"validation": ["A1"]}, "`validation` is for networks"),
        (
            {"head": "mlp", "penalty": 3.0},
            "`penalty` is for the exact solver: leave `head`, `loss`, `recipe` out",
        ),
        ({"loss": "rank", "borrow": True}, "`borrow` is for the exact solver"),
        (
            {"loss": "mse", "penalty": 3.0},
            "`penalty` is for count likelihoods: leave it out for the",
        ),
        ({"loss": "poisson", "borrow": True}, "borrowing between genes is for the list and pair"),
        ({"loss": "nb", "borrow": True}, "borrowing between genes is for the list and pair"),
        ({"loss": "nb", "borrow": True, "penalty": 3.0}, "borrowing between genes needs two"),
        ({"loss": "nb", "union": True}, "nb cannot tell a gene that a section does not"),
        ({"union": True, "loss": "poisson"}, "poisson cannot tell a gene that a section does not"),
        ({"union": True, "loss": "rank"}, "rank cannot tell a gene that a section does not"),
        ({"union": True, "finetune": "lora"}, "`union` is not for `finetune`; leave it out"),
        ({"recipe": "exact", "finetune": "lora"}, "`recipe` exact is not for `finetune`; leave it"),
        ({"head": "mlp+linear", "finetune": "lora"}, "features of mlp.linear would not stay"),
        ({"head": "timm:resnet18"}, "timm:resnet18 is no head: give it as `encoder`, with"),
        ({"head": "own head"}, "no head 'own head'; choose one of linear"),
        ({"head": "mlp", "recipe": "own recipe"}, "no recipe 'own recipe'; choose one of default"),
    ],
)
def test_what_would_be_ignored_is_refused(cohort, options, message):
    with pytest.raises(InputError, match=message):
        fit(cohort, **{"encoder": "mine", "n_genes": 3, **options})


@pytest.mark.parametrize("options", [{}, {"loss": "pair"}, {"loss": "poisson"}, {"loss": "nb"}])
def test_a_gene_without_counts_has_the_largest_penalty(cohort, options):
    for section in cohort.values():
        section.X = section.X.multiply(section.var_names != "G5").tocsr()
    panel = fit(cohort, encoder="mine", genes=list(cohort["A1"].var_names), **options).panel
    assert panel.loc["G5", "counts"] == 0
    assert panel.loc["G5", "penalty"] == max(PENALTIES)


def test_a_penalty_is_taken_by_every_likelihood(cohort):
    for loss in ("list", "pair", "poisson", "nb"):
        model = fit(cohort, encoder="mine", n_genes=3, loss=loss, penalty=7.0)
        assert model.panel["penalty"].tolist() == [7.0] * 3
        assert model.provenance["penalty_choice"] == "given"
        assert np.abs(model.head.weight.numpy(force=True)).max() > 0


def test_the_negative_binomial_says_its_dispersions(cohort):
    model = fit(cohort, encoder="mine", n_genes=3, loss="nb")
    found = model.panel["dispersion"].to_numpy()
    assert (found >= 0).all()
    assert found.max() > 0
    assert model.panel["temperature"].between(0.01, 3).all()
    low, middle, high = np.quantile(found, [0, 0.5, 1])
    told = f"{low:.2g} to {high:.2g}, median of genes {middle:.2g}: what the moments say"
    chosen = " or half of it, chosen for each gene by leave one patient out"
    assert model.provenance["dispersion"] == told + chosen
    assert f"Method: linear, nb, dispersion {told}" in model.card()
    alone = fit({"A1": cohort["A1"]}, encoder="mine", n_genes=3, loss="nb")
    assert alone.provenance["dispersion"].endswith(": what the moments say")
    other = fit(cohort, encoder="mine", n_genes=3)
    assert "dispersion" not in {*other.panel, *other.provenance}
    assert "dispersion" not in other.card()


def test_of_two_patients_genes_choose_mostly_as_all_do(cohort):
    two = {name: section for name, section in cohort.items() if name[0] != "C"}
    penalties = {}
    for aim in ("new-patients", "known-patients"):
        model = fit(two, encoder="mine", n_genes=6, aim=aim)
        penalties[aim] = model.panel["penalty"]
        data = training_data(two, model.panel.index, "mine")
        group = [label[0] if aim == "new-patients" else label for label in data.section]
        shared = "mostly" if aim == "new-patients" else False
        regressor = STRankRegressorCV(shared=shared).fit(
            data.features,
            data.counts,
            section=data.section,
            offset=np.log(data.library_size),
            group=np.array(group),
        )
        np.testing.assert_array_equal(penalties[aim], regressor.penalty_)
