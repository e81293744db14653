"""A simulated run of Space Ranger, read by others and by us."""

from __future__ import annotations

import json
import warnings

import anndata
import cv2
import numpy as np
import pandas as pd
import pytest
from scipy.spatial import cKDTree

import strank
from strank.simulate import TissueDesign, simulate_cohort

UM = 2.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simulated") / "visium"
    tissue = TissueDesign(side_um=1000, um_per_pixel=UM)
    simulate_cohort(folder, n_patients=1, n_sections=2, n_genes=21, tissue=tissue, layout="visium")
    return folder


@pytest.mark.parametrize("name", ["A1", "A2"])
def test_what_squidpy_reads_is_what_we_read(folder, name):
    squidpy = pytest.importorskip("squidpy")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = squidpy.read.visium(folder / name / "outs")
    ours = strank.io.read_visium(
        folder / name / "outs", image=folder / f"images/{name}.jpg", patient="A"
    )
    assert list(theirs.obs_names) == list(ours.obs_names)
    np.testing.assert_array_equal(theirs.X.toarray(), ours.X.toarray())
    np.testing.assert_allclose(theirs.obsm["spatial"], ours.obsm["spatial"], atol=1e-6)
    assert ours.uns["strank"]["um_per_pixel"] == pytest.approx(UM)
    assert list(theirs.uns["spatial"]) == [name]
    hires = theirs.uns["spatial"][name]["images"]["hires"]
    image = cv2.imread(str(folder / f"images/{name}.jpg"))
    assert hires.shape == image.shape


def test_the_array_is_that_of_visium_and_its_spots_are_on_tissue(folder):
    table = pd.read_csv(folder / "A1/outs/spatial/tissue_positions.csv", index_col=0)
    assert table.index.is_unique
    assert table.index.str.fullmatch("[ACGT]{16}-1").all()
    assert ((table["array_row"] + table["array_col"]) % 2 == 0).all()
    um = UM * table[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy()
    distances, _ = cKDTree(um).query(um, k=2)
    np.testing.assert_allclose(distances[:, 1], 100, rtol=1e-6)
    assert (um > 27.5).all()
    assert (um < 1000 - 27.5).all()
    # No position that the image shows is missing.
    assert len(um) == pytest.approx(1000**2 / (100 * 100 * 3**0.5 / 2), rel=0.2)
    image = cv2.imread(str(folder / "images/A1.jpg")).astype(float)
    light = image[tuple((um / UM).astype(int).T[::-1])].min(axis=1)
    on = (table["in_tissue"] == 1).to_numpy()
    assert 10 < on.sum() < len(on)
    assert np.median(light[on]) < 210 < np.median(light[~on])
    truth = anndata.read_h5ad(folder / "truth/A1.h5ad")
    assert list(truth.obs_names) == list(table.index[on])
    scales = json.loads((folder / "A1/outs/spatial/scalefactors_json.json").read_text())
    assert scales["spot_diameter_fullres"] * UM == 65


def test_another_layout_is_refused(tmp_path):
    with pytest.raises(ValueError, match='layout must be "st" or "visium"; got \'hd\''):
        simulate_cohort(tmp_path / "out", layout="hd")
    assert not (tmp_path / "out").exists()
