"""The same tissue through other doors: the same features, and scores, to the last digit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import pyvips
from anndata import AnnData

from strank import fit
from strank.encoders.morphology.encoder import Morphology
from strank.encoders.tiles import embed_spots
from strank.io import read_anndata, read_st
from strank.slides.slide import slide_of


@pytest.mark.parametrize("names", [("C3",), pytest.param(("B4", "C5"), marks=pytest.mark.slow)])
def test_real_sections_score_the_same_from_a_tiled_tiff(her2st: Path, tmp_path: Path, names):
    """HEST's form of a slide, losslessly; that counts and positions agree, others have tested."""
    jpeg, tiff = {}, {}
    for name in names:
        section = read_st(her2st, section=name)[::4].copy()
        pyvips.Image.new_from_file(str(her2st / f"images/{name}.jpg")).tiffsave(
            str(tmp_path / "slide.tif"), tile=True, bigtiff=True
        )
        bare = AnnData(section.X, obs=section.obs, var=section.var, obsm=dict(section.obsm))
        bare.write_h5ad(tmp_path / f"{name}.h5ad")
        um = float(section.uns["strank"]["um_per_pixel"])
        place = {"image": tmp_path / "slide.tif", "um_per_pixel": um}
        again = read_anndata(tmp_path / f"{name}.h5ad", **place)
        for cohort, adata in ((jpeg, section), (tiff, again)):
            centres = np.asarray(adata.obsm["spatial"])
            adata.obsm["morphology"] = embed_spots(slide_of(adata), centres, Morphology())
            cohort[name] = adata
    for name in names:
        np.testing.assert_array_equal(*(c[name].obsm["morphology"] for c in (jpeg, tiff)))
    scores = [
        pd.concat([fit(c, n_genes=20).predict(a).to_df() for a in c.values()]) for c in (jpeg, tiff)
    ]
    pd.testing.assert_frame_equal(*scores, check_exact=True)
