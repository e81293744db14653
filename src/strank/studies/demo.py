"""The whole way on simulated tissue whose truth is known, in one call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from strank.cohort.contract import patients_of, section_info
from strank.cohort.store import read_cohort, read_h5ad
from strank.encoders.embedding import embed
from strank.errors import InputError
from strank.evaluation.held_out import Evaluation, evaluate
from strank.evaluation.methods import WITHIN, predict_all
from strank.files import claims, output_folder, write_json, write_table
from strank.fitting.method import CENTRED_RIDGE, fit
from strank.io.sections import write_sections
from strank.io.st import find_st, read_st
from strank.metrics.correlation import rank_correlation
from strank.model.rank_model import RankModel
from strank.prediction import predict
from strank.progress import Say
from strank.report.maps import write_gene_maps
from strank.simulate.cohort import simulate_cohort

_DRAWN = ("tumour", "stroma", "immune", "flat")


@dataclass(frozen=True)
class DemoResult:
    """What the demo made."""

    table: pd.DataFrame  # Mean SCC by class of gene and method, on the held-out patient
    evaluation: Evaluation  # The scores behind it
    maps: list[Path]  # Pictures of the held-out section


@claims("folder")
def run_demo(folder: Path, *, seed: int = 0, n_genes: int = 100, say: Say = print) -> DemoResult:
    """Simulate a cohort, train without one patient, score and draw that patient's sections."""
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder}: not empty; choose another `folder`, or remove it")
    output_folder(folder)
    say(
        "Simulating four patients with two sections each; by design they share a fifth of what "
        "genes do, as real ones seem to"
    )
    simulate_cohort(folder / "st", seed=seed)
    say("import: reading the sections into a cohort")
    made = folder / "st"
    write_sections((read_st(made, section=name) for name in find_st(made)), folder / "cohort")
    say("embed: turning the image around every spot into features")
    embed(folder / "cohort")
    cohort = read_cohort(folder / "cohort", encoder="morphology")
    patients = patients_of(cohort)
    held_out = max(patients.values())
    test = {name: adata for name, adata in cohort.items() if patients[name] == held_out}
    train = {n: a for n, a in cohort.items() if n not in test}
    say(f"fit: {n_genes} genes on {len(train)} sections, without patient {held_out}")
    model = fit(train, encoder="morphology", n_genes=n_genes)
    model.save(folder / "model")
    say(f"evaluate: on {len(test)} sections of patient {held_out}")
    evaluation = evaluate(model, test, train=train)
    evaluation.write(folder / "evaluation")
    truth = {
        name: read_h5ad(folder / "st" / "truth" / f"{name}.h5ad")[adata.obs_names]
        for name, adata in test.items()
    }
    # The other rows are in evaluation/; here they would make the table too wide to read.
    methods = [model.method, CENTRED_RIDGE.name, WITHIN]
    scores = evaluation.scores[evaluation.scores["method"].isin(methods)]
    predictions = {
        name: {method: found[method] for method in methods}
        for name, found in predict_all(model, test, train=train, within=True).sections.items()
    }
    table = class_table(scores, predictions, truth)
    write_table(folder / "table.csv", table, float_format="%.4f")
    name = next(iter(test))
    say(f"predict: maps of section {name}")
    maps = _draw(folder / "maps", model, test[name], truth[name])
    _write_regions(folder / "regions.geojson", test[name], truth[name])
    return DemoResult(table, evaluation, maps)


def class_table(
    scores: pd.DataFrame,
    predictions: Mapping[str, Mapping[str, NDArray]],
    truth: Mapping[str, AnnData],
) -> pd.DataFrame:
    """Mean SCC by class of gene: each method against the noisy counts, and against the truth."""
    panel = scores["gene"].unique()
    rows = [scores[["method", "gene", "scc"]].assign(target="counts")]
    for section, methods in predictions.items():
        for method, predicted in methods.items():
            scc = rank_correlation(predicted, truth[section][:, panel].X)
            table = pd.DataFrame({"method": method, "gene": panel, "scc": scc})
            rows.append(table.assign(target="truth"))
    table = pd.concat(rows)
    table["column"] = table["method"] + " / " + table["target"]
    table["gene class"] = table["gene"].map(next(iter(truth.values())).var["gene_class"])
    columns = table["column"].unique()
    wide = table.pivot_table("scc", "gene class", "column", observed=True, dropna=False)[columns]
    wide.loc["all"] = table.groupby("column")["scc"].mean()
    genes = table.groupby("gene class", observed=True)["gene"].nunique()
    wide.insert(0, "genes", [*genes, len(panel)])
    return wide.rename_axis(index="gene class", columns=None).reset_index()


def _write_regions(path: Path, section: AnnData, truth: AnnData) -> None:
    """Write what most of each spot is, as QuPath exports regions that are drawn; for contrasts."""
    info = section_info(section)
    regions = truth.obs.filter(like="fraction_").idxmax(axis=1).str.removeprefix("fraction_")
    side = info.spot_pitch_um / info.um_per_pixel
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1], [-1, -1]]) * side / 2
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [(centre + corners).tolist()]},
            "properties": {"classification": {"name": region}},
        }
        for centre, region in zip(section.obsm["spatial"], regions, strict=True)
    ]
    write_json(path, {"type": "FeatureCollection", "features": features})


def _draw(folder: Path, model: RankModel, section: AnnData, truth: AnnData) -> list[Path]:
    predictions = predict(section, model, folder)
    classes = truth.var["gene_class"].astype(str)
    drawn = []
    for wanted in _DRAWN:
        of_class = model.panel.index[model.panel.index.map(classes) == wanted]
        drawn += list(model.panel.loc[of_class, "counts"].nlargest(1).index)
    return write_gene_maps(folder, predictions, drawn, section=section)
