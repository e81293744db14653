"""Which sections train, which are scored, and what stands beside the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial, reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from strank.cohort.contract import counts_checksum, patients_of
from strank.cohort.folds import FoldUnit, make_folds, shared_patients
from strank.cohort.in_memory import Sections, as_sections
from strank.errors import InputError, some
from strank.evaluation.calibration import ChangeSums, calibration_table, change_sums
from strank.evaluation.methods import Predicted, predict_all
from strank.evaluation.scores import disagreements, score_section, summarise
from strank.files import claims, output_folder, write_json, write_table
from strank.fitting.method import fit as fit_model
from strank.model.rank_model import RankModel
from strank.progress import Advance
from strank.shown import as_html, as_text, few_names
from strank.version import __version__

# What an evaluation shows of itself.
_FIRST = ("scc", "depth_matched", "lift", "deviance", "slope", "genes")
FitModel = Callable[..., RankModel]


@dataclass(frozen=True)
class Evaluation:
    """Scores of a model and of what stands beside it: ridges, library size, shuffled scores.

    Where new patients are scored, also what the exact list head reaches within each section, strips
    of which are predicted from its other strips: that needs no transfer.

    Attributes
    ----------
    scores
        One row a method, section and gene: ``scc`` (Spearman with log1p of counts per 10k),
        ``pearson``, ``depth_matched``, ``lift``, ``deviance`` and others, NaN where undefined, and
        in ``note`` why.
    facts
        What produced them: version, protocol, sections, parameters.
    warnings
        What limits what they say, in words.
    calibration
        Whether predicted fold changes are those observed: ``method``, ``predicted`` and
        ``observed`` (of a tenth of a section's depth, pooled where they are predicted alike), and
        ``counts``.
    """

    scores: pd.DataFrame
    facts: dict[str, Any]
    warnings: tuple[str, ...]
    calibration: pd.DataFrame = field(default_factory=partial(calibration_table, {}))

    @property
    def summary(self) -> pd.DataFrame:
        """Mean over genes, of every section and of all; the same genes for every method."""
        return summarise(self.scores)

    @property
    def _shown(self) -> tuple[str, dict[str, str], dict[str, pd.DataFrame], tuple[str, ...]]:
        sections = [str(name) for name in self.scores["section"].unique()]
        table = self.summary[self.summary["section"] == "mean"].set_index("method")
        title = f"Evaluation: {self.facts.get('protocol', 'scores')}"
        what = "mean over genes and sections; each section is in `summary`"
        return title, {"sections": few_names(sections)}, {what: table[list(_FIRST)]}, self.warnings

    def __repr__(self) -> str:
        return as_text(*self._shown)

    def _repr_html_(self) -> str:
        return as_html(*self._shown)

    @claims("folder")
    def write(self, folder: Path | str) -> None:
        """Write ``scores.csv``, ``summary.csv``, ``calibration.csv`` and ``evaluation.json``."""
        folder = output_folder(Path(folder))
        for name in ("scores", "summary", "calibration"):
            write_table(folder / f"{name}.csv", getattr(self, name), float_format="%.6g")
        write_json(folder / "evaluation.json", {**self.facts, "warnings": list(self.warnings)})


def evaluate(model: RankModel, cohort: Sections, *, train: Sections) -> Evaluation:
    """Score a model, and baselines fitted on its own training sections, on sections of a cohort.

    Beside the model stand ridges of the same features, library size alone and shuffled scores; and
    where patients are new, what their own sections tell.

    Parameters
    ----------
    model
        A trained model.
    cohort
        Sections to score, with counts and the features of the model's encoder, as `strank.fit`
        takes them.
    train
        Sections that the model was trained on, for the baselines.

    Returns
    -------
    Evaluation
        It warns of scored sections, or patients, that the model was trained on.

    Raises
    ------
    strank.errors.InputError
        If ``train`` lacks a training section, or holds other counts under its name; if a section
        to score measures no gene of the model's.

    Examples
    --------
    >>> import strank
    >>> cohort = strank.read_cohort("cohort", encoder="morphology")  # doctest: +SKIP
    >>> train = {name: cohort[name] for name in ("A1", "B1")}  # doctest: +SKIP
    >>> model = strank.fit(train)  # doctest: +SKIP
    >>> evaluate(model, {"C1": cohort["C1"]}, train=train).summary  # doctest: +SKIP
    """
    cohort, train = as_sections(cohort), as_sections(train)
    measured = {name: _measured(name, adata, model) for name, adata in cohort.items()}
    expected: dict[str, dict[str, Any]] = model.provenance["sections"]
    trained = {name: _same(name, train, expected) for name in expected}
    patients = patients_of(cohort)
    warnings = []
    if seen := sorted(set(cohort) & set(expected)):
        warnings.append(f"the model was trained on {some(seen)}: the score there is no test")
    known = {entry["patient"] for entry in expected.values()}
    if shared := sorted(known & {patients[name] for name in cohort if name not in expected}):
        warnings.append(shared_patients(shared))
    new = any(patient not in known for patient in patients.values())
    predicted = predict_all(model, cohort, train=trained, within=new)
    scores = _score(predicted, cohort, model.panel.index)
    changes = _changes(predicted, cohort, model.panel.index)
    facts = {
        "strank_version": __version__,
        "protocol": "a given model",
        "sections": {name: counts_checksum(adata) for name, adata in cohort.items()},
        "measured_genes": measured,
        "model": dict(model.provenance),
    }
    return _result(scores, changes, facts, warnings, model.method)


def cross_validate(
    cohort: Sections,
    *,
    by: FoldUnit = "patient",
    encoder: str = "morphology",
    n_genes: int = 50,
    fit: FitModel = fit_model,
    advance: Advance | None = None,
) -> Evaluation:
    """Hold out every section, or every patient, once; panel and penalties are of its training part.

    Parameters
    ----------
    cohort
        Sections with counts and features, as `strank.fit` takes them.
    by
        What is held out as a whole.
    encoder
        Whose features.
    n_genes
        Size of the panel.
    fit
        Makes a model of training sections, ``encoder``, ``n_genes`` and ``aim`` (known patients
        where a patient stands on both sides of a fold): the exact list by default,
        or ``functools.partial(strank.fit, head="mlp")``.
    advance
        Called with 1 after every fold.

    Raises
    ------
    strank.errors.InputError
        For fewer than two sections or patients, and as `strank.fit`.

    Examples
    --------
    Three sections with raw counts and features named "mine":

    >>> import numpy as np
    >>> rng, cohort = np.random.default_rng(0), {}
    >>> for name in ("A1", "B1", "C1"):
    ...     features = rng.normal(size=(50, 2))
    ...     counts = rng.poisson(5 * np.exp(features @ [[0.5, -0.2], [0.0, 0.8]]))
    ...     adata = AnnData(counts.astype(np.float32), var=pd.DataFrame(index=["ERBB2", "CD3E"]))
    ...     adata.obs = adata.obs.assign(patient=name, library_size=1000.0)
    ...     adata.obsm = {"mine": features, "spatial": 100.0 * rng.permutation(100).reshape(50, 2)}
    ...     cohort[name] = adata
    >>> found = cross_validate(cohort, by="patient", encoder="mine", n_genes=2)
    >>> summary = found.summary.set_index(["method", "section"])
    >>> bool(summary.loc[("linear, list", "mean"), "scc"] > 0.4)
    True
    """
    cohort, tables, facts, warnings = as_sections(cohort), [], [], []
    changes: dict[str, list[ChangeSums]] = {}
    folds = make_folds(patients_of(cohort), by)
    new = any(fold.aim == "new-patients" for fold in folds)
    for fold in folds:
        train = {name: cohort[name] for name in fold.train}
        model = fit(train, encoder=encoder, n_genes=n_genes, aim=fold.aim)
        test = {name: cohort[name] for name in fold.test}
        predicted = predict_all(model, test, train=train, within=new)
        table = _score(predicted, test, model.panel.index)
        for method, found in _changes(predicted, test, model.panel.index).items():
            changes.setdefault(method, []).extend(found)
        tables.append(table.assign(fold=fold.name))
        facts.append({"fold": fold.name, "test": fold.test, **model.provenance})
        if fold.shared_patients:
            warnings.append(f"fold {fold.name}: {shared_patients(fold.shared_patients)}")
        if len(train) == 1 and model.provenance.get("penalty_choice", "given") != "given":
            warnings.append(
                f"fold {fold.name}: trained on one section, so no penalty could be chosen there"
            )
        if advance is not None:
            advance(1)
    scores = pd.concat(tables, ignore_index=True)
    parameters = {"encoder": encoder, "n_genes": n_genes}
    protocol = {"strank_version": __version__, "protocol": f"leave one {by} out"}
    about = {**protocol, **parameters, "folds": facts}
    return _result(scores, changes, about, warnings, model.method)


def _score(predictions: Predicted, cohort: Mapping[str, AnnData], panel: pd.Index) -> pd.DataFrame:
    return pd.concat(
        [
            score_section(predictions.sections[name], adata, panel, slopes=predictions.slopes)
            for name, adata in cohort.items()
        ],
        ignore_index=True,
    )


def _changes(
    predictions: Predicted, cohort: Mapping[str, AnnData], panel: pd.Index
) -> dict[str, list[ChangeSums]]:
    """Sum up the predicted changes of every method, one entry a section."""
    found: dict[str, list[ChangeSums]] = {}
    for name, section in cohort.items():
        measured = panel.isin(section.var_names)
        counts, depth = section[:, panel[measured]].X, section.obs["library_size"].to_numpy()
        for method, scores in predictions.sections[name].items():
            rates = np.asarray(scores, dtype=np.float64) * predictions.slopes.get(method, 1.0)
            sums = change_sums(rates[:, measured], counts, depth)
            found.setdefault(method, []).append(sums)
    return found


def _result(
    scores: pd.DataFrame,
    changes: Mapping[str, list[ChangeSums]],
    facts: dict[str, Any],
    warnings: Iterable[str],
    method: str,
) -> Evaluation:
    """Put together what was found in all folds, and warn of what it does not say."""
    told = [*warnings, *_unscored(scores, method), *disagreements(summarise(scores))]
    pooled = {name: reduce(add, sections) for name, sections in changes.items()}
    return Evaluation(scores, facts, tuple(told), calibration_table(pooled))


def _same(
    name: str, train: Mapping[str, AnnData], expected: Mapping[str, Mapping[str, Any]]
) -> AnnData:
    if name not in train:
        raise InputError(
            f"the baselines are fitted on the model's training sections ({some(expected)}), and "
            f"{name} is not among those given: name the cohort that has them with `train`"
        )
    if counts_checksum(train[name]) != expected[name]["counts_sha256"]:
        raise InputError(f"section {name} has other counts than when the model was trained on it")
    return train[name]


def _measured(name: str, section: AnnData, model: RankModel) -> int:
    """Count the genes of the model that a section measures."""
    panel = model.panel.index
    if not (number := int(panel.isin(section.var_names).sum())):
        raise InputError(
            f"section {name} measures none of the model's {len(panel)} genes ({some(panel)}); it "
            f"has {some(section.var_names)}: are both named by symbols?"
        )
    return number


def _unscored(scores: pd.DataFrame, method: str) -> list[str]:
    own = scores[scores["method"] == method]
    told = []
    lacking = own[own["note"] == "not measured"].groupby("section").size()
    for number, sections in lacking.groupby(lacking):
        n_genes = own["section"].eq(sections.index[0]).sum()
        told.append(
            f"section {some(sections.index)}: scored for the {n_genes - number} of the model's "
            f"{n_genes} genes that are measured there"
        )
    for note in ("constant counts", "constant scores"):
        if number := (own["note"] == note).sum():
            how = "counted as 0" if note == "constant scores" else "not scored"
            told.append(f"{number} of {len(own)} gene-section pairs: {note}, {how}")
    return told
