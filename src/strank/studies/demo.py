"""The whole way on simulated tissue whose truth is known, in one call that ends in a page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any
from urllib.parse import quote

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
from strank.report.filled import write_filled
from strank.report.maps import write_gene_maps
from strank.simulate.cohort import simulate_cohort
from strank.slides.slide import slide_of

# What to try on the folder that is left.
NEXT = (
    "model show {0}/model --evaluation {0}/evaluation",
    "predict {0}/st/images/D1.jpg --mpp 0.8 --model {0}/model -o slide",
    "benchmark {0}/cohort -o benchmark --losses list,mse",
)
_DRAWN = {
    "stroma": "a gene that stroma marks",
    "tumour": "a gene that tumour marks",
    "immune": "a gene that immune cells mark",
    "flat": "a gene that no tissue marks: nothing is to be seen, and nothing should be",
}


@dataclass(frozen=True)
class DemoResult:
    """What the demo made."""

    table: pd.DataFrame  # Mean SCC by class of gene and method, on the held-out patient
    evaluation: Evaluation  # The scores behind it
    maps: list[Path]  # Pictures of the held-out section
    page: Path  # All of this on one page


@claims("folder")
def run_demo(folder: Path, *, seed: int = 0, n_genes: int = 100, say: Say = print) -> DemoResult:
    """Simulate a cohort, train without one patient, score and draw that patient's sections."""
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder}: not empty; choose another `folder`, or remove it")
    output_folder(folder)
    say(
        "Simulating a section of each of four patients; by design they share a fifth of what "
        "genes do, as real ones seem to"
    )
    simulate_cohort(folder / "st", n_sections=1, seed=seed)
    say("import: reading the sections into a cohort")
    made = folder / "st"
    write_sections((read_st(made, section=name) for name in find_st(made)), folder / "cohort")
    say("embed: turning the image around every spot into features")
    embed(folder / "cohort")
    cohort = read_cohort(folder / "cohort", encoder="morphology")
    patients = patients_of(cohort)
    name, held_out = max(patients.items(), key=itemgetter(1))
    test, train = {name: cohort.pop(name)}, cohort
    say(f"fit: {n_genes} genes on {len(train)} sections, without patient {held_out}")
    model = fit(train, encoder="morphology", n_genes=n_genes)
    model.save(folder / "model")
    truth = {name: read_h5ad(folder / "st" / "truth" / f"{name}.h5ad")[test[name].obs_names]}
    drawn = _of_each_class(model, truth[name])
    # Something to look at comes first: scores of the spots, whose features are there.
    say(f"predict: the spots of section {name}, for a first picture in {folder / 'maps'}")
    slide = slide_of(test[name])
    at_spots = model.predict(test[name])
    write_gene_maps(folder / "maps", at_spots, [*drawn][:1], section=test[name], slide=slide)
    say(f"predict: a dense grid over section {name}, for maps in their place")
    predictions = predict(test[name], model, folder / "maps")
    maps = write_gene_maps(folder / "maps", predictions, drawn, section=test[name], slide=slide)
    _write_regions(folder / "regions.geojson", test[name], truth[name])
    say(f"evaluate: on section {name}, of patient {held_out}")
    evaluation = evaluate(model, test, train=train)
    evaluation.write(folder / "evaluation")
    # The other rows are in evaluation/; here they would make the table too wide to read.
    methods = [model.method, CENTRED_RIDGE.name, WITHIN]
    scores = evaluation.scores[evaluation.scores["method"].isin(methods)]
    found = predict_all(model, test, train=train, within=True).sections[name]
    table = class_table(scores, {name: {method: found[method] for method in methods}}, truth)
    write_table(folder / "table.csv", table, float_format="%.4f")
    told = {
        "held_out": held_out,
        "n_train": len(train),
        "n_genes": n_genes,
        "section": name,
        "warnings": evaluation.warnings,
    }
    page = _write_page(folder, table, dict(zip(maps, drawn.items(), strict=True)), told)
    return DemoResult(table, evaluation, maps, page)


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


def _write_page(
    folder: Path, table: pd.DataFrame, maps: dict[Path, tuple[str, str]], told: dict[str, Any]
) -> Path:
    return write_filled(
        folder / "index.html",
        "demo.html",
        **told,
        maps=[
            {"gene": gene, "told": what, "link": f"./maps/{quote(path.name)}"}
            for path, (gene, what) in maps.items()
        ],
        columns=table.columns,
        rows=[[_shown(cell) for cell in row] for row in table.itertuples(index=False)],
        commands=[command.format(folder) for command in NEXT],
    )


def _of_each_class(model: RankModel, truth: AnnData) -> dict[str, str]:
    """Choose the gene with most counts of each class that is drawn; what it is."""
    classes = truth.var["gene_class"].astype(str)
    chosen = {}
    for wanted, told in _DRAWN.items():
        of_class = model.panel.index[model.panel.index.map(classes) == wanted]
        for gene in model.panel.loc[of_class, "counts"].nlargest(1).index:
            chosen[gene] = told
    return chosen


def _shown(cell: object) -> str:
    if not isinstance(cell, float):
        return str(cell)
    return "–" if cell != cell else f"{cell:.2f}"
