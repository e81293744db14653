"""``strank contrast`` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse
from typer.testing import CliRunner

from strank.cli import app
from strank.cohort.contract import counts_checksum
from strank.files import sha256

GENES = ["ERBB2", "VWF", "HLA/A <b>", "FLAT"]
EFFECT = np.array([1.0, -0.8, 0.3, 0.0])


def run(*arguments: object, code: int = 0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result


def refuse(*arguments: object) -> str:
    told = run(*arguments, code=2)
    assert told.stdout == ""
    [error] = [line for line in told.stderr.splitlines() if line.startswith("Error: ")]
    return error.removeprefix("Error: ")


def rectangle(name: str, x: float, y: float, width: float, height: float) -> dict:
    ring = [[x, y], [x + width, y], [x + width, y + height], [x, y + height], [x, y]]
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {"objectType": "annotation", "classification": {"name": name}},
    }


@pytest.fixture
def section(section_of) -> AnnData:
    """30 x 20 spots 200 µm apart, 0.7 µm a pixel; the left half is tumour."""
    adata = section_of("A1", n_spots=600, n_genes=4)
    y, x = np.mgrid[:20, :30].reshape(2, -1) * 200 / 0.7
    adata.obsm["spatial"] = np.column_stack([x, y])
    adata.var_names = [*GENES[:3], "OTHER"]
    left = adata.obsm["spatial"][:, 0] < 4000
    rng = np.random.default_rng(0)
    adata.X = sparse.csr_matrix(rng.poisson(30 * np.exp(np.where(left[:, None], EFFECT, 0))))
    adata.obs["library_size"] = 1000.0
    adata.obs["niche"] = np.where(left, "Tumor", "Stroma")
    return adata


@pytest.fixture
def files(tmp_path: Path, section: AnnData) -> Path:
    rng = np.random.default_rng(1)
    left = (section.obs["niche"] == "Tumor").to_numpy()
    scores = np.where(left[:, None], EFFECT, 0) + rng.normal(0, 0.2, (600, 4)) * (EFFECT != 0)
    trained = {"A1": {"counts_sha256": counts_checksum(section)}}
    predictions = AnnData(
        scores.astype(np.float32),
        obs=section.obs[["section", "niche"]],
        var=pd.DataFrame(index=GENES),
        obsm={"spatial": section.obsm["spatial"]},
        uns={
            "strank": {"image": "/elsewhere/A1.jpg", "um_per_pixel": 0.7},
            "strank_model": json.dumps({"sections": trained}),
        },
    )
    predictions.write_h5ad(tmp_path / "scores.h5ad")
    section.write_h5ad(tmp_path / "A1.h5ad")
    features = [
        rectangle("Tumor", -10, -10, 2000, 6000),
        rectangle("Tumor", 1990, -10, 2010, 6000),
        rectangle("Stroma", 4000, -10, 5000, 6000),
        rectangle("Far", 50_000, 0, 10, 10),
    ]
    content = {"type": "FeatureCollection", "features": features}
    (tmp_path / "regions.geojson").write_text(json.dumps(content))
    return tmp_path


def contrast(files: Path, *arguments: object) -> list[object]:
    groups = [] if "--groups" in arguments else ["--groups", files / "regions.geojson"]
    return ["contrast", files / "scores.h5ad", *groups, "-o", files / "out", *arguments]


def test_the_table_the_plot_and_where_they_come_from(files):
    told = run(*contrast(files, "--between", "Tumor,Stroma"))
    assert "Predicted higher in Tumor than in Stroma" in told.stdout
    assert "do not cover the error of the model" in told.stdout
    table = pd.read_csv(files / "out/contrast.csv")
    assert table["gene"].tolist() == ["ERBB2", "HLA/A <b>", "FLAT", "VWF"]
    np.testing.assert_allclose(table["predicted"], [1, 0.3, 0, -0.8], atol=0.05)
    assert ((table["low"] <= table["predicted"]) & (table["predicted"] <= table["high"])).all()
    assert table[["a", "b", "spots_a", "spots_b"]].iloc[0].tolist() == ["Tumor", "Stroma", 280, 320]
    facts = json.loads((files / "out/contrast.json").read_text())
    assert facts["inputs"]["groups"]["sha256"] == sha256(files / "regions.geojson")
    assert facts["parameters"]["block_um"] == 1000
    assert facts["parameters"]["seed"] == 0
    assert "A1" in facts["model"]["sections"]
    assert facts["warnings"] == []
    assert sorted(path.name for path in (files / "out").iterdir()) == [
        *("contrast.csv", "contrast.json", "volcano.png")
    ]


def test_observed_beside_predicted_as_json(files):
    arguments = contrast(files, "--between", "Stroma, Tumor", "--counts", files / "A1.h5ad")
    told = run(*arguments, "--json")
    found = json.loads(told.stdout)
    assert found["change"] == "log mean rate in Stroma - log mean rate in Tumor"
    assert [row["gene"] for row in found["up"]] == ["VWF"]
    assert [row["gene"] for row in found["down"]] == ["ERBB2", "HLA/A <b>"]
    assert found["agreement"]["genes"] == 3
    assert found["agreement"]["same_direction"] == 1
    assert "A1.h5ad has no counts of FLAT: predicted only" in told.stderr
    assert "the model was trained on" in told.stderr
    table = pd.read_csv(files / "out/contrast.csv").set_index("gene")
    np.testing.assert_allclose(table.loc[GENES[:3], "observed"], -EFFECT[:3], atol=0.1)
    assert np.isnan(table.loc["FLAT", "observed"])


def test_a_column_of_obs_names_the_regions(files):
    told = run(*contrast(files, "--groups", "niche", "--counts", files / "A1.h5ad"))
    assert "If the groups were found from these scores" in told.stdout
    facts = json.loads((files / "out/contrast.json").read_text())
    assert facts["between"] == ["Stroma", "Tumor"]
    assert sorted(facts["inputs"]) == ["counts", "predictions"]
    again = run(*contrast(files, "--groups", "niche", "--counts", files / "A1.h5ad"))
    assert again.stdout == told.stdout


def test_spots_in_both_regions_are_counted(files):
    content = json.loads((files / "regions.geojson").read_text())
    content["features"].append(rectangle("Stroma", 3000, -10, 1500, 6000))
    (files / "regions.geojson").write_text(json.dumps(content))
    told = run(*contrast(files, "--between", "Tumor,Stroma"))
    assert "scores.h5ad: 60 spots lie in both regions, and are left out" in told.stderr


def test_what_is_left_out_of_the_file_is_told(files):
    content = json.loads((files / "regions.geojson").read_text())
    del content["features"][1]["properties"]["classification"]
    content["features"][3:] = [{"type": "Feature", "geometry": None, "properties": {}}]
    (files / "regions.geojson").write_text(json.dumps(content), encoding="utf-16")
    told = run(*contrast(files, "--json"))
    left_out = "left out 1 polygon with neither class nor name, 1 feature without an outline"
    [warning] = json.loads(told.stdout)["warnings"]
    assert warning == f"--groups {files / 'regions.geojson'}: {left_out}"
    assert left_out in told.stderr.replace("\n", " ")
    assert json.loads(told.stdout)["between"] == ["Tumor", "Stroma"]
    del content["features"][2]
    (files / "regions.geojson").write_text(json.dumps(content))
    error = refuse(*contrast(files))
    assert "has Tumor (left out: 1 polygon with neither" in error
    assert "a contrast needs two regions" in error


def change(path: Path, how) -> None:
    adata = anndata.read_h5ad(path)
    how(adata)
    adata.write_h5ad(path)


def test_what_is_wrong_with_the_regions(files):
    error = refuse(*contrast(files))
    assert error.endswith(
        "has Tumor, Stroma, Far: a contrast needs two regions; choose with --between A,B"
    )
    error = refuse(*contrast(files, "--between", "Tumor,Far"))
    assert "no spot lies in region 'Far'; spots lie at x 0 to 8286, y 0 to 5429, in pix" in error
    error = refuse(*contrast(files, "--groups", "tissue"))
    assert "neither a file nor a column of obs; its columns are section, niche" in error
    assert "give two regions" in refuse(*contrast(files, "--between", "Tumor"))
    assert "has A1: a contrast needs two" in refuse(*contrast(files, "--groups", "section"))
    assert "--block must be positive" in refuse(*contrast(files, "--block", "nan"))
    error = refuse(*contrast(files, "--between", "Tumor,Stroma", "--block", 9000))
    assert "is worth 1." in error
    assert not (files / "out").exists()


def test_counts_must_be_of_the_same_image(files):
    arguments = contrast(files, "--groups", "niche", "--counts", files / "A1.h5ad")
    change(files / "A1.h5ad", lambda adata: adata.obs.pop("niche"))
    assert "A1.h5ad: obs has no column niche; add it there too" in refuse(*arguments)
    change(files / "A1.h5ad", lambda adata: adata.obs.insert(0, "niche", "Tumor"))
    assert "A1.h5ad: obs['niche'] has no Stroma" in refuse(*arguments)
    change(files / "A1.h5ad", lambda adata: adata.uns["strank"].update(um_per_pixel=0.5))
    assert "counts of A1.jpg (0.5 µm per pixel), but the predictions are of" in refuse(*arguments)
    change(files / "scores.h5ad", lambda adata: adata.uns["strank"].update(image="B2.jpg"))
    assert "the predictions are of B2.jpg" in refuse(*arguments)


def test_counts_are_no_predictions(files):
    error = refuse("contrast", files / "A1.h5ad", "--groups", "niche", "-o", files / "out")
    assert "A1.h5ad: counts, not predictions; run `strank predict" in error


def test_predictions_of_other_makers(files):
    def strip(adata):
        del adata.uns["strank_model"]
        adata.obs["section"] = ["A1", "A2"] * 300

    change(files / "scores.h5ad", strip)
    assert "holds sections A1, A2; a contrast is of one" in refuse(*contrast(files))
    change(files / "scores.h5ad", lambda adata: adata.obs.pop("section"))
    told = run(*contrast(files, "--groups", "niche"))
    assert "was not written by strank: X is taken for log relative rates" in told.stderr
    change(files / "scores.h5ad", lambda adata: adata.uns.pop("strank"))
    assert 'uns["strank"]["um_per_pixel"]' in refuse(*contrast(files, "--groups", "niche"))


def test_help_has_an_example():
    assert "Example: strank contrast" in run("contrast", "--help").output
