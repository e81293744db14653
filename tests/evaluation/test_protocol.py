from __future__ import annotations

import json
import re
from dataclasses import fields, replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from strank.cohort.contract import patients_of
from strank.cohort.filter import SpotFilter
from strank.cohort.folds import Fold, k_folds
from strank.cohort.panel import choose_panel
from strank.errors import InputError
from strank.evaluation.paper_tasks import PAPER_TASKS
from strank.evaluation.protocol import HEADLINES, PRESETS, Protocol, from_hest, get_protocol
from strank.io.st import read_st

PATIENTS = {"A1": "A", "A2": "A", "B1": "B", "C1": "C"}
GIVEN = (Fold("x", ("A1", "A2"), ("B1",)), Fold("y", ("A1", "B1"), ("C1", "A2")))

# Papers cite these: a change that is meant makes another protocol.
HASHES = {
    "strank": "62d72db3359f749efeb95a08ba8ba359f671d581a54d95c95aff629fd03ceedb",
    "section": "2176b39871a72819c5bc7416f7a8fcd3af46210bdf49865349d06b436c57c9ef",
    "hest": "419f28ab16408ac1bc7f5c795ba78ad8208534555c6e0f98daf8ea76d2872a80",
    "paper-IDC": "82e505b84342c7d9377fa0f6c603a7222e69d3532aedcc73954fd24810b14536",
    "paper-PRAD": "b92244811d7d6d742c5321c071340dbc767240b4204d08d3c53e5880f033ae25",
    "paper-PAAD": "e6b5ee51b7767ff51bc02323c659d6d7046260bb384c3f5719d59f69d30c8117",
    "paper-COAD": "5f5c106438f64720ecc433199374f2068bd23e0995af88a80672443c11db2b21",
    "paper-READ": "17e7e2d3e616e4366d60a63e6d916612c50ebb597638c763251f2c544a7e9521",
    "paper-ccRCC": "99fa18a2d99a924acafc04c30cccde7e4276e73ac573583208ec6f933b64e973",
    "paper-IDC-L": "da8d3bcf3087b60c0726f3b5220a48658d60a835eaf72cf098a643a73d05f160",
}


@pytest.mark.parametrize("name", PRESETS)
def test_hashes_of_presets_stay(name):
    assert get_protocol(name).sha256 == HASHES[name]
    assert get_protocol(name).name == name


CHANGES = {
    "folds": "section",
    "first_fold_only": True,
    "filter": SpotFilter(200, 0.2, 3),
    "panel": "moran",
    "panel_from": "all",
    "n_genes": (50, None),
    "target_depth": "panel",
    "methods": ("list",),
    "recipes": ("published",),
    "headline": "scc",
    "seed": 1,
}


def test_the_hash_is_of_all_that_decides_results():
    one = PRESETS["strank"]
    assert {"name", "description", *CHANGES} == {field.name for field in fields(Protocol)}
    changed = {replace(one, **{key: value}).sha256 for key, value in CHANGES.items()}
    assert len(changed | {one.sha256}) == 1 + len(CHANGES)
    assert replace(one, name="other", description="other").sha256 == one.sha256
    # Neither the order of sections nor what is known of patients.
    first = Fold("x", ("A2", "A1"), ("B1",), ("B",))
    assert replace(one, folds=(first, GIVEN[1])).sha256 == replace(one, folds=GIVEN).sha256
    assert replace(one, folds=GIVEN[:1]).sha256 != replace(one, folds=GIVEN).sha256
    # Whether a section trains or stops decides.
    stops = Fold("x", ("A1",), ("B1",), validation=("A2",))
    assert replace(one, folds=(stops,)).sha256 != replace(one, folds=GIVEN[:1]).sha256


TEXTS = st.text(max_size=5)
NAMES = st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=4, unique=True).map(tuple)
SIZES = st.lists(st.none() | st.integers(1, 999), min_size=1, unique=True).map(tuple)
PROTOCOLS = st.builds(
    Protocol,
    TEXTS,
    TEXTS,
    st.sampled_from(["section", "patient", 2, 99])
    | st.lists(
        st.builds(Fold, TEXTS, NAMES, NAMES, validation=NAMES | st.just(())), min_size=1, max_size=3
    ).map(tuple),
    st.booleans(),
    st.none()
    | st.builds(
        SpotFilter,
        st.integers(0, 999),
        st.floats(0, 1, exclude_min=True),
        st.integers(0, 99),
    ),
    st.sampled_from(["variance", "mean", "moran"]) | NAMES,
    st.sampled_from(["training", "all"]),
    SIZES,
    st.sampled_from(["all", "panel"]),
    NAMES | st.just(()),
    NAMES | st.just(()),
    st.sampled_from(HEADLINES),
    st.integers(0, 2**70),
)


@given(PROTOCOLS)
@settings(deadline=None)  # a disk that is busy is no fault
def test_what_is_written_is_read(tmp_path_factory, protocol):
    path = tmp_path_factory.mktemp("round") / "shared.toml"
    protocol.write(path)
    back = get_protocol(path)
    assert back.sha256 == protocol.sha256
    assert back.facts == protocol.facts
    assert path.read_text(encoding="utf-8").startswith(f"# SHA-256 {protocol.sha256}\n")


def test_a_file_by_hand(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        'panel = ["ERBB2", "FASN"]\n[[folds]]\nname = "one"\ntrain = ["A1", "B1"]\ntest = ["C1"]\n'
    )
    folds = (Fold("one", ("A1", "B1"), ("C1",)),)
    expected = Protocol("mine", folds=folds, panel=("ERBB2", "FASN"), n_genes=(None,))
    assert get_protocol(str(path)) == expected
    with path.open("a") as file:
        file.write('validation = ["D1"]\n[filter]\nmin_genes = 9\nmax_mito = 0.5\nmin_spots = 2\n')
    stops = (replace(folds[0], validation=("D1",)),)
    assert get_protocol(path) == replace(expected, folds=stops, filter=SpotFilter(9, 0.5, 2))
    path.write_text('n_genes = [20, "all"]\nfolds = 3\n')
    assert get_protocol(path) == Protocol("mine", folds=3, n_genes=[20, None])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("genes = 3", "unknown key genes; there are name, description, folds"),
        ("folds = 1", "folds is 1; it must be section or patient, a number of at least 2, or tab"),
        ("folds = true", "folds is True"),
        ("folds = 'spot'", "folds is 'spot'"),
        ("[[folds]]\nname = 'x'\ntrain = ['A']", r"folds is .*'train'.*tables \[\[folds\]\] with"),
        ("[[folds]]\nname = 1\ntrain = ['A']\ntest = ['B']", r"folds is \(Fold\(name=1"),
        ("[[folds]]\nname = 'x'\ntrain = 'A'\ntest = ['B']", "folds is"),
        (
            "[[folds]]\nname = 'x'\ntrain = ['A', 'A']\ntest = ['B']",
            "folds is .*lists of sections, each once",
        ),
        (
            "[[folds]]\nname = 'x'\ntrain = ['A']\ntest = ['B']\nvalidation = 'C'",
            "folds is .*, if any, validation",
        ),
        ("[[folds]]\nname = 'x'\ntrain = ['A']\ntest = ['B']\nval = ['C']", "folds is .*'val'"),
        (
            "[filter]\nmin_genes = 200",
            r"filter is .*; it must be a table \[filter\] with min_genes and min_spots",
        ),
        ("[filter]\nmin_genes = 200\nmax_mito = 20\nmin_spots = 3", "filter is .*max_mito=20,"),
        ("[filter]\nmin_genes = -1\nmax_mito = 0.2\nmin_spots = 3", "filter is SpotFilter"),
        ("filter = true", "filter is True; it must be a table"),
        ("recipes = 'published'", "recipes is 'published'; it must be a list of recipes"),
        ("panel = 'size'", "panel is 'size'; it must be one of variance, mean, moran, or a list"),
        ("panel = ['A', 'A']", "panel is .* or a list of genes, each once"),
        ("panel = []", r"panel is \(\)"),
        ("panel_from = 'test'", "panel_from is 'test'; it must be one of training, all"),
        ("n_genes = 50", "n_genes is 50; it must be a list of sizes"),
        ("n_genes = [50, 0]", r"n_genes is \(50, 0\)"),
        ("n_genes = [50, 50]", r"n_genes is \(50, 50\); .* each once"),
        ("first_fold_only = 1", "first_fold_only is 1; it must be true or false"),
        ("target_depth = 'some'", "target_depth is 'some'; it must be one of all, panel"),
        ("methods = 'list'", "methods is 'list'; it must be a list of methods"),
        ("headline = 'rmse'", "headline is 'rmse'; it must be one of depth_matched, lift"),
        ("seed = 1.5", "seed is 1.5; it must be a number of at least 0"),
        ("seed = true", "seed is True"),
        ("name = 1", "name is 1; it must be text"),
        ("folds = ", "not a readable TOML file"),
    ],
)
def test_refusals_of_a_file(tmp_path, content, message):
    path = tmp_path / "mine.toml"
    path.write_text(content)
    with pytest.raises(InputError, match=rf"(?s)mine\.toml: {message}"):
        get_protocol(path)


def test_refusals_of_a_name(tmp_path):
    with pytest.raises(
        InputError,
        match=r"no protocol 'best'; choose one of strank, section, hest, paper-IDC, .* a \.toml",
    ):
        get_protocol("best")
    with pytest.raises(InputError, match=r"no protocol 'paper'; .* \(did you mean paper-"):
        get_protocol("paper")
    with pytest.raises(InputError, match=r"none\.toml: no such file"):
        get_protocol(tmp_path / "none.toml")


def test_folds_of_each_kind():
    free = {name: p for name, p in PRESETS.items() if p.sections is None}
    assert {n: [f.name for f in p.make_folds(PATIENTS)] for n, p in free.items()} == {
        "strank": ["A", "B", "C"],
        "section": ["A1", "A2", "B1", "C1"],
        "hest": ["A", "B", "C"],
    }
    assert [f.name for f in Protocol("1", first_fold_only=True).make_folds(PATIENTS)] == ["A"]
    six = {f"{patient}1": patient for patient in "ABCDEF"}
    for seed in range(3):
        assert Protocol("k", folds=3, seed=seed).make_folds(six) == k_folds(six, 3, seed=seed)
    fixed = Protocol("fixed", folds=GIVEN).make_folds(PATIENTS)
    assert [(fold.name, fold.test, fold.shared_patients) for fold in fixed] == [
        ("x", ("B1",), ()),
        ("y", ("A2", "C1"), ("A",)),
    ]


@pytest.mark.parametrize("by", ["variance", "mean", "moran"])
def test_the_panel_looks_at_test_sections_only_if_asked(cohort, by):
    fold = Protocol("p").make_folds(patients_of(cohort))[1]
    assert fold.test == ("B1",)
    loud = cohort["B1"].copy()
    # Here the gene that comes last in training outdoes all others.
    dense = loud.X.toarray()
    last = Protocol("p", panel=by).choose_panel(cohort, fold, None)[-1]
    right = loud.obsm["spatial"][:, 0] > 250
    dense[:, loud.var_names.get_loc(last)] = np.where(right, 1e5, 0)
    loud.X = sparse.csr_matrix(dense)
    loud.obs["library_size"] = dense.sum(1)
    train_only = {name: cohort[name] for name in fold.train}
    versions = [cohort, {**cohort, "B1": loud}, train_only]
    of_training = Protocol("p", panel=by)
    panels = [list(of_training.choose_panel(version, fold, None)) for version in versions]
    assert panels[0] == panels[1] == panels[2] == list(choose_panel(train_only, None, by=by))
    of_all = replace(of_training, panel_from="all")
    before, after = (list(of_all.choose_panel(version, fold, None)) for version in versions[:2])
    assert before != after


def test_a_panel_of_all_is_the_same_in_all_folds(cohort):
    protocol = Protocol("p", panel_from="all")
    panels = [
        list(protocol.choose_panel(cohort, fold, 4))
        for fold in protocol.make_folds(patients_of(cohort))
    ]
    assert panels[0] == panels[1] == panels[2]


def test_a_given_panel(cohort):
    protocol = Protocol("p", panel=("G4", "G1", "G0"), n_genes=(2, None))
    fold = protocol.make_folds(patients_of(cohort))[0]
    assert list(protocol.choose_panel(cohort, fold, 2)) == ["G4", "G1"]
    assert list(protocol.choose_panel(cohort, fold, None)) == ["G4", "G1", "G0"]
    with pytest.raises(InputError, match="4 genes asked for; the protocol lists 3"):
        protocol.choose_panel(cohort, fold, 4)
    cohort["B1"] = cohort["B1"][:, ["G0", "G4"]].copy()
    with pytest.raises(InputError, match="section B1 has no gene G1"):
        protocol.choose_panel(cohort, fold, 2)


def warned(protocol, patients=PATIENTS):
    return protocol.warnings(protocol.make_folds(patients), patients)


def test_warnings_say_what_is_questionable():
    assert warned(PRESETS["strank"]) == ()
    (both,) = warned(PRESETS["section"])
    assert both.startswith("fold A1, A2: patient A stands on both sides of the split")
    assert warned(PRESETS["section"], {"A1": "A", "B1": "B", "C1": "C"}) == ()
    genes, score = warned(PRESETS["hest"])
    assert "test included" in genes
    assert "pearson_counts: log1p(counts) contains the depth" in score
    (few,) = warned(PRESETS["strank"], {"A1": "A", "B1": "B"})
    assert few.startswith("only patient A, B are tested")
    (given_genes,) = warned(Protocol("p", panel=("G1",)))
    assert given_genes.startswith("the genes are given")


@pytest.mark.parametrize("task", PAPER_TASKS.values(), ids=PAPER_TASKS)
def test_the_tasks_of_the_paper(task, reference):
    table = json.loads((reference / "paper_tables.json").read_text())["hest_scc"]
    assert list(PAPER_TASKS) == table["tasks"]
    assert task.scc == {loss: table[loss][table["tasks"].index(task.name)] for loss in task.scc}
    assert set(task.scc) == {"mse", "poisson", "nb", "rank", "pair", "pcc", "list"}
    samples = table["samples"][task.name]
    if isinstance(samples, str):
        first, last = (
            re.fullmatch(r"([A-Z]+)(\d+)", name).groups() for name in samples.split("..")
        )
        samples = [f"{first[0]}{number}" for number in range(int(first[1]), int(last[1]) + 1)]
        # HEST does not have it.
        samples = [name for name in samples if name != "MEND155"]
    assert list(task.samples) == samples
    protocol = get_protocol(f"paper-{task.name}")
    assert protocol.sections == sorted(samples)
    [fold] = protocol.make_folds({name: name for name in [*samples, "OTHER"]})
    assert fold.validation == (table["val_sample"][task.name],)
    assert fold.test == (fold.name,) == (table["test_sample"][task.name],)
    assert sorted([*fold.development, *fold.test]) == sorted(samples)
    assert fold.shared_patients == ()


def test_what_is_questionable_about_a_task_of_the_paper():
    protocol = PRESETS["paper-PRAD"]
    assert protocol.filter == SpotFilter(min_genes=200, max_mito=0.2, min_spots=3)
    assert (protocol.methods, protocol.recipes) == (tuple(PAPER_TASKS["PRAD"].scc), ("published",))
    two = {name: "1" if number < 12 else "2" for number, name in enumerate(protocol.sections)}
    told = ["fold MEND140: patient 1 stands on both sides", "validation section MEND139 is of pat"]
    told += ["single split (test on MEND140)", "only patient 1 is tested"]
    told += ["chosen on all sections, those of the test included", "total over the panel"]
    told += ["sorted by scc"]
    warnings = warned(protocol, two)
    assert len(warnings) == len(told)
    assert all(part in warning for part, warning in zip(told, warnings, strict=True))
    # Where every sample is a patient of its own, the first two do not apply.
    assert warned(protocol, {name: name for name in two}) == tuple(
        warning.replace("patient 1", "patient MEND140") for warning in warnings[2:]
    )
    with pytest.raises(InputError, match="fold MEND140: the cohort has no section MEND139; there"):
        protocol.make_folds({name: "1" for name in two if name != "MEND139"})


def test_validation_sections_choose_genes_as_training_does(cohort):
    fold = Fold("x", ("A1",), ("B1",), validation=("C1",))
    protocol = Protocol("p", folds=(fold,))
    quiet = list(protocol.choose_panel(cohort, fold, None))
    dense = cohort["C1"].X.toarray()
    dense[:, cohort["C1"].var_names.get_loc(quiet[-1])] = np.repeat([1e5, 0], 15)
    cohort["C1"].X = sparse.csr_matrix(dense)
    cohort["C1"].obs["library_size"] = dense.sum(1)
    assert list(protocol.choose_panel(cohort, fold, None)) != quiet
    swapped = Fold("x", ("A1",), ("C1",), validation=("B1",))
    without = choose_panel({name: cohort[name] for name in ("A1", "B1")}, None)
    assert list(protocol.choose_panel(cohort, swapped, None)) == list(without)


def test_real_tissue_laid_out_as_a_task(her2st):
    """Its genes are those that numpy finds, of all sections, after the filter."""
    names = ["B4", "C3", "C5"]
    fold = Fold("C5", ("B4",), ("C5",), validation=("C3",))
    protocol = replace(PRESETS["paper-IDC"], name="her2st", folds=(fold,))
    cohort = protocol.filtered({name: read_st(her2st, section=name) for name in names})
    [fold] = protocol.make_folds(patients_of(cohort))
    panel = protocol.choose_panel(cohort, fold, 50)
    shared = sorted(set.intersection(*(set(adata.var_names) for adata in cohort.values())))
    rows = []
    for adata in cohort.values():
        depth = adata.obs["library_size"].to_numpy()[:, None]
        rows.append(np.log1p(1e4 * adata[:, shared].X.toarray().astype(float) / depth))
    order = np.argsort(-np.concatenate(rows).var(0), kind="stable")[:50]
    assert list(panel) == [shared[i] for i in order]
    # Not those of the sections that are not tested.
    assert set(panel) != set(
        replace(protocol, panel_from="training").choose_panel(cohort, fold, 50)
    )
    told = " ".join(protocol.warnings([fold], patients_of(cohort)))
    assert "fold C5: patient C stands on both sides" in told
    assert "validation section C3 is of patient C, who is tested" in told


def test_a_filter_that_leaves_too_few_genes_names_the_section(cohort):
    protocol = Protocol("p", filter=SpotFilter(1, 1, 29), n_genes=(6,))
    for name, adata in cohort.items():
        dense = adata.X.toarray() + 1
        dense[:2, :2] *= name != "B1"
        adata.X = sparse.csr_matrix(dense)
    kept = protocol.filtered(cohort)
    assert (kept["B1"].n_vars, kept["A1"].n_vars) == (4, 6)
    fold = protocol.make_folds(patients_of(cohort))[0]
    message = (
        "6 genes asked for, and the filter leaves 4 in all of the sections B1, C1; section B1 has "
        "the fewest, 4"
    )
    with pytest.raises(InputError, match=message):
        protocol.choose_panel(kept, fold, 6)
    assert len(protocol.choose_panel(kept, fold, 4)) == 4


def test_a_task_of_hest_benchmark(tmp_path):
    task = tmp_path / "IDC"
    (task / "splits").mkdir(parents=True)
    for k, (train, test) in enumerate([(["A1", "B1"], ["C1"]), (["C1"], ["A1", "B1"])]):
        for side, names in {"train": train, "test": test}.items():
            table = pd.DataFrame({"sample_id": names, "expr_path": [f"{n}.h5ad" for n in names]})
            table.to_csv(task / f"splits/{side}_{k}.csv", index=False)
    with pytest.raises(InputError, match=r"var_50genes\.json: no such file"):
        from_hest(task)
    (task / "var_50genes.json").write_text(json.dumps({"genes": ["G2", "G0"]}))
    protocol = get_protocol(task)
    assert protocol == from_hest(task)
    assert (protocol.name, protocol.panel, protocol.headline) == (
        "IDC",
        ("G2", "G0"),
        "pearson_counts",
    )
    folds = protocol.make_folds(PATIENTS)
    assert [(f.train, f.test) for f in folds] == [(("A1", "B1"), ("C1",)), (("C1",), ("A1", "B1"))]
    assert any("chosen on all sections" in warning for warning in warned(protocol))
