"""The whole way on simulated tissue whose truth is known, in one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from anndata import AnnData

from strank.cohort.store import read_cohort, read_h5ad, write_h5ad
from strank.encoders.base import get_encoder
from strank.encoders.embed import embed_cohort
from strank.errors import InputError
from strank.evaluation.protocol import Evaluation, evaluate
from strank.files import atomic_path, output_folder
from strank.fit import fit_model
from strank.functional.metrics import rank_correlation
from strank.model import RankModel
from strank.predict import predict_slide, tile_grid
from strank.readers.st import find_sections, read_st_section
from strank.report.maps import observed_layer, predicted_layer, write_gene_maps
from strank.simulate.cohort import simulate_cohort
from strank.slides.image import open_slide

__all__ = ["DemoResult", "class_table", "run_demo"]

Say = Callable[[str], object]

_DRAWN = ("tumour", "stroma", "immune", "flat")


@dataclass(frozen=True)
class DemoResult:
    """What the demo made.

    Attributes
    ----------
    table
        Mean SCC by class of gene and method, on the held-out patient.
    evaluation
        The scores behind it.
    maps
        Pictures of the held-out section.
    """

    table: pd.DataFrame
    evaluation: Evaluation
    maps: list[Path]


def run_demo(folder: Path, *, seed: int = 0, n_genes: int = 100, say: Say = print) -> DemoResult:
    """Simulate a cohort, train without one patient, score and draw that patient's sections.

    Parameters
    ----------
    folder
        Must not exist, or be empty; afterwards it has ``st/`` (the simulated files), ``cohort/``,
        ``model/``, ``evaluation/``, ``maps/`` and ``table.csv``.
    seed
        Of the simulation; all the rest is deterministic.
    n_genes
        Size of the panel.
    say
        Called with a line before every step.

    Raises
    ------
    InputError
        If the folder holds anything.
    """
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder}: not empty; choose another -o or remove it")
    output_folder(folder)
    say("Simulating four patients with two sections each")
    simulate_cohort(folder / "st", seed=seed)
    say("import: reading the sections into a cohort")
    for files in find_sections(folder / "st"):
        write_h5ad(read_st_section(files), folder / "cohort" / f"{files.section}.h5ad")
    say("embed: turning the image around every spot into features")
    encoder = get_encoder("morphology")
    embed_cohort(folder / "cohort", encoder)
    cohort = read_cohort(folder / "cohort", encoder=encoder.name)
    held_out = max(str(adata.obs["patient"].iloc[0]) for adata in cohort.values())
    test = {n: a for n, a in cohort.items() if a.obs["patient"].iloc[0] == held_out}
    train = {n: a for n, a in cohort.items() if n not in test}
    say(f"fit: {n_genes} genes on {len(train)} sections, without patient {held_out}")
    model = fit_model(train, encoder=encoder.name, n_genes=n_genes)
    model.save(folder / "model")
    say(f"evaluate: on {len(test)} sections of patient {held_out}")
    evaluation = evaluate(model, test, train=train)
    evaluation.write(folder / "evaluation")
    truth = {name: read_h5ad(folder / "st" / "truth" / f"{name}.h5ad") for name in test}
    table = class_table(evaluation.scores, model, test, truth)
    with atomic_path(folder / "table.csv") as part:
        table.to_csv(part, index=False, float_format="%.4f")
    name = next(iter(test))
    say(f"predict: maps of section {name}")
    maps = _draw(folder / "maps", model, test[name], truth[name])
    return DemoResult(table, evaluation, maps)


def class_table(
    scores: pd.DataFrame,
    model: RankModel,
    test: dict[str, AnnData],
    truth: dict[str, AnnData],
) -> pd.DataFrame:
    """Mean SCC by class of gene: each method against counts, and the list against the truth.

    Genes without spatial variation ("flat") have no true order, so no score against it.
    """
    genes = next(iter(truth.values())).var["gene_class"].astype(str)
    true = pd.concat([_against_truth(model, test[name], truth[name]) for name in test])
    rows = pd.concat([scores[["method", "gene", "scc"]], true])
    rows["gene class"] = rows["gene"].map(genes)
    table = rows.pivot_table("scc", "gene class", "method", sort=False)[rows["method"].unique()]
    table.insert(0, "genes", rows.groupby("gene class")["gene"].nunique())
    table.loc["all"] = rows.groupby("method")["scc"].mean()
    table.loc["all", "genes"] = rows["gene"].nunique()
    return table.astype({"genes": int}).rename_axis("gene class").reset_index()


def _against_truth(model: RankModel, section: AnnData, truth: AnnData) -> pd.DataFrame:
    panel = model.panel.index
    true = truth[section.obs_names, panel].X
    scc = rank_correlation(model.predict(section).X, true)
    return pd.DataFrame({"method": "list against truth", "gene": panel, "scc": scc})


def _draw(folder: Path, model: RankModel, section: AnnData, truth: AnnData) -> list[Path]:
    info = section.uns["strank"]
    slide = open_slide(Path(info["image"]), info["um_per_pixel"])
    predictions = predict_slide(slide, model, tile_grid(slide, model))
    write_h5ad(predictions, output_folder(folder) / "scores.h5ad")
    classes = truth.var["gene_class"].astype(str)
    drawn = []
    for wanted in _DRAWN:
        of_class = model.panel.index[model.panel.index.map(classes) == wanted]
        drawn += list(model.panel.loc[of_class, "counts"].nlargest(1).index)
    layers = [
        observed_layer(section, model.panel.index, info["spot_diameter_um"]),
        predicted_layer(predictions, info["spot_diameter_um"]),
    ]
    return write_gene_maps(folder, slide, layers, drawn)
