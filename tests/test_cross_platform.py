"""Trained on one platform, used on another: simulated tissue, of which the truth is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import sparse
from scipy.spatial import cKDTree
from typer.testing import CliRunner

from strank import RankModel, read_cohort
from strank.cli import app
from strank.cohort.contract import SectionInfo, make_section
from strank.cohort.store import write_h5ad
from strank.files import sha256
from strank.metrics.correlation import rank_correlation
from strank.simulate.counts import CountDesign, draw_counts, draw_genes
from strank.simulate.drawing import draw_section, draw_stain
from strank.simulate.regions import REGIONS
from strank.simulate.tissue import LAYOUT_UM, Tissue, TissueDesign, grow_tissue

DESIGN = TissueDesign(side_um=1600, um_per_pixel=1.2)
COUNTS = CountDesign()
GENES = draw_genes(84, design=COUNTS, rng=np.random.default_rng(0))


class Platform(NamedTuple):
    """Discs on a hexagonal lattice or squares side by side; which genes, and how deep."""

    name: str
    size_um: float
    hexagonal: bool
    genes: slice
    share: float


VISIUM = Platform("Visium", 55.0, True, slice(None), 1.0)
# Every other gene, in another order, and half of the molecules.
XENIUM = Platform("Xenium", 100.0, False, slice(None, None, -2), 0.5)


def run(*arguments: object) -> dict:
    result = CliRunner().invoke(app, [*(str(a) for a in arguments), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def centres(platform: Platform) -> np.ndarray:
    """Every 100 µm, in µm."""
    rows = np.arange(50, DESIGN.side_um - 50, 100 * np.sqrt(0.75) if platform.hexagonal else 100)
    y, x = np.meshgrid(rows, np.arange(50, DESIGN.side_um - 100, 100.0), indexing="ij")
    if platform.hexagonal:
        x = x + 50 * (np.arange(len(rows)) % 2)[:, None]
    return np.column_stack([x.ravel(), y.ravel()])


def under(tissue: Tissue, spots: np.ndarray, platform: Platform) -> tuple[np.ndarray, np.ndarray]:
    """Share of glass and of each region, ``[n_spots, 1 + n_regions]``, and nuclei per mm²."""
    reach = platform.size_um / 2
    steps = np.arange(-reach + LAYOUT_UM / 2, reach, LAYOUT_UM)
    around = np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2)
    if platform.hexagonal:
        around = around[np.hypot(*around.T) <= reach]
    column, row = np.moveaxis(((spots[:, None] + around) / LAYOUT_UM).astype(int), -1, 0)
    labels = tissue.labels[row, column]
    shares = np.stack([(labels == k).mean(1) for k in range(-1, len(REGIONS))], axis=1)
    nuclei = cKDTree(np.column_stack([tissue.nuclei.x, tissue.nuclei.y]))
    number = nuclei.query_ball_point(
        spots, reach, p=2 if platform.hexagonal else np.inf, return_length=True
    )
    area = (np.pi / 4 if platform.hexagonal else 1) * (platform.size_um / 1e3) ** 2
    return shares, number / area


def write_section(
    folder: Path, platform: Platform, tissue: Tissue, image: Path, rng: np.random.Generator
) -> pd.DataFrame:
    """Write a section as a platform measures it; returns the truth of all genes."""
    spots = centres(platform)
    shares, density = under(tissue, spots, platform)
    kept = shares[:, 0] < 0.4
    shares = shares[kept, 1:] / shares[kept, 1:].sum(1, keepdims=True)
    drawn = draw_counts(shares, density[kept], genes=GENES, design=COUNTS, rng=rng)
    counts = rng.binomial(drawn.counts, platform.share)[:, platform.genes]
    names = pd.Index([f"{platform.name}{i}" for i in range(kept.sum())])
    info = SectionInfo(
        str(image),
        sha256(image),
        DESIGN.um_per_pixel,
        platform.size_um,
        100.0,
        platform.name,
        {"reader": "test"},
    )
    section = make_section(
        sparse.csr_matrix(counts),
        spots=pd.DataFrame(spots[kept] / DESIGN.um_per_pixel, columns=["x", "y"], index=names),
        genes=GENES.table.index[platform.genes],
        section=image.stem,
        patient=image.stem,
        info=info,
    )
    write_h5ad(section, folder / platform.name / f"{image.stem}.h5ad")
    return pd.DataFrame(drawn.truth, index=names, columns=GENES.table.index)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, pd.DataFrame]:
    """Patients A to C by Visium, on which the model is trained; patient D by Xenium, its truth."""
    folder = tmp_path_factory.mktemp("platforms")
    for number, patient in enumerate("ABCD"):
        rng = np.random.default_rng([7, number])
        tissue = grow_tissue(DESIGN, composition=0.3 * rng.standard_normal(5), rng=rng)
        pixels = draw_section(tissue, DESIGN, stain=draw_stain(rng), rng=rng)
        image = folder / f"{patient}.png"
        Image.fromarray(pixels).save(image)
        platform = XENIUM if patient == "D" else VISIUM
        truth = write_section(folder, platform, tissue, image, rng)
    for platform in (VISIUM, XENIUM):
        run("embed", folder / platform.name)
    run("fit", folder / "Visium", "-o", folder / "model", "--genes", 40)
    return folder, truth


def test_visium_models_score_xenium_pseudo_spots(trained):
    folder, truth = trained
    section = read_cohort(folder / "Xenium", encoder="morphology")["D"]
    predictions = RankModel.load(folder / "model").predict(section)
    shared = predictions.var_names[predictions.var["measured"]]
    assert 10 < len(shared) < 30
    varied = [gene for gene in predictions.var_names if not gene.startswith("FLAT")]
    found = rank_correlation(predictions[:, varied].X, truth[varied].to_numpy())
    depth = np.log(section.obs["library_size"].to_numpy())[:, None]
    by_depth = rank_correlation(
        np.broadcast_to(depth, (len(depth), len(varied))), truth[varied].to_numpy()
    )
    # On the genes that this section measures, and on those that it does not. In seven runs of four
    # seeds and two designs the least mean was 0.36; scores that know nothing have 0, with a
    # deviation below 0.1.
    for genes in (np.isin(varied, shared), ~np.isin(varied, shared)):
        assert found[genes].mean() > 0.3
        assert found[genes].mean() > by_depth[genes].mean() + 0.3


def test_the_panel_is_intersected_and_said(trained, tmp_path):
    folder, _ = trained
    arguments = ["--model", folder / "model", "--train", folder / "Visium", "-o", tmp_path / "ev"]
    result = run("evaluate", folder / "Xenium", *arguments)
    panel = RankModel.load(folder / "model").panel.index
    n_shared = int(panel.isin(GENES.table.index[XENIUM.genes]).sum())
    assert (
        f"section D: scored for the {n_shared} of the model's 40 genes that are measured there"
        in result["warnings"]
    )
    facts = json.loads((tmp_path / "ev/evaluation.json").read_text())
    assert facts["measured_genes"] == {"D": n_shared}
    scores = pd.read_csv(tmp_path / "ev/scores.csv")
    unmeasured = ~scores["gene"].isin(GENES.table.index[XENIUM.genes])
    assert scores.loc[unmeasured, "scc"].isna().all()
    assert (scores["note"] == "not measured").equals(unmeasured)
    summary = pd.DataFrame(result["summary"]).set_index(["section", "method"])
    means = summary.loc["D", "depth_matched"]
    assert means["linear, list"] > means["library size"] + 0.05
    assert summary.loc[("D", "linear, list"), "not_measured"] == 40 - n_shared


def test_a_section_without_any_gene_of_the_model_is_refused(trained, tmp_path):
    folder, _ = trained
    section = read_cohort(folder / "Xenium")["D"]
    section.var_names = [f"ENSG{i:011d}" for i in range(section.n_vars)]
    write_h5ad(section, tmp_path / "ids/D.h5ad")
    run("embed", tmp_path / "ids")
    arguments = ["--model", folder / "model", "--train", folder / "Visium", "-o", tmp_path / "ev"]
    told = CliRunner().invoke(app, [str(a) for a in ("evaluate", tmp_path / "ids", *arguments)])
    assert told.exit_code == 2
    assert "section D measures none of the model's 40 genes" in told.stderr
    assert "ENSG00000000000" in told.stderr
    assert "are both named by symbols?" in told.stderr
