from __future__ import annotations

import cv2
import numpy as np
import pytest

from strank.simulate.cohort import place_spots
from strank.simulate.drawing import draw_section, draw_stain
from strank.simulate.regions import GLASS, REGIONS
from strank.simulate.tissue import LAYOUT_UM, TissueDesign, at, grow_tissue, smooth_field

DESIGN = TissueDesign(side_um=1400, um_per_pixel=1.0)


def grown(seed, design=DESIGN, composition=None):
    shift = np.zeros(len(REGIONS)) if composition is None else composition
    return grow_tissue(design, composition=shift, rng=np.random.default_rng(seed))


@pytest.fixture(scope="module")
def tissue():
    return grown(3)


@pytest.fixture(scope="module")
def image(tissue):
    rng = np.random.default_rng(4)
    return draw_section(tissue, DESIGN, stain=draw_stain(rng), rng=rng)


def test_a_smooth_field_is_standard_and_smooth():
    field = smooth_field(np.random.default_rng(0), 400, 20.0)
    assert abs(field.mean()) < 0.2
    assert 0.8 < field.std() < 1.2
    assert np.abs(np.diff(field, axis=0)).mean() < 0.3


def test_tissue_is_one_piece_away_from_the_border(tissue):
    inside = (tissue.labels != GLASS).astype(np.uint8)
    assert cv2.connectedComponents(inside)[0] == 2
    assert inside[1:-1, 1:-1].sum() == inside.sum()
    assert 0.4 < inside.mean() < 0.9


def test_the_composition_shifts_the_regions():
    shift = np.array([1.5, 0, 0, 0, 0])
    plain = np.mean([(grown(s).labels == 0).mean() for s in range(4)])
    shifted = np.mean([(grown(s, composition=shift).labels == 0).mean() for s in range(4)])
    assert shifted > 1.5 * plain


def test_nuclei_are_dense_where_they_should_be(tissue):
    area = np.bincount(tissue.labels.ravel() + 1, minlength=6)[1:] * (LAYOUT_UM / 1e3) ** 2
    label = at(tissue.labels, tissue.nuclei.x, tissue.nuclei.y)
    density = dict(
        zip(
            REGIONS,
            np.bincount(label[label >= 0], minlength=5) / np.maximum(area, 0.01),
            strict=True,
        )
    )
    assert density["immune"] > density["tumour"] > density["stroma"] > density["adipose"]


def test_the_image_has_tissue_where_the_layout_has_it(tissue, image):
    assert image.shape == (1400, 1400, 3)
    assert image.dtype == np.uint8
    labels = cv2.resize(tissue.labels, (1400, 1400), interpolation=cv2.INTER_NEAREST)
    near = cv2.dilate((labels != GLASS).astype(np.uint8), np.ones((81, 81))) > 0
    green = image[..., 1]
    assert green[~near].min() > 200
    assert np.median(green[np.isin(labels, [0, 1, 2, 3])]) < 200
    # Hematoxylin takes red, eosin leaves it: cell-rich regions are bluer than fibres.
    blueness = image[..., 2].astype(int) - image[..., 0]
    assert blueness[labels == 3].mean() > blueness[labels == 1].mean()


def test_nuclei_are_drawn_where_they_lie(tissue, image):
    red = image[..., 0].astype(int)
    nuclei = tissue.nuclei
    rows, columns = (np.round(v).astype(int) for v in (nuclei.y, nuclei.x))
    lymphocytes = nuclei.kind == REGIONS.index("immune")
    assert np.median(red[rows[lymphocytes], columns[lymphocytes]]) < np.quantile(red, 0.25)


def test_patients_differ_in_stain():
    stains = [draw_stain(np.random.default_rng(seed)) for seed in range(2)]
    assert stains[0] != stains[1]
    assert np.linalg.norm(stains[0].hematoxylin) == pytest.approx(1)


@pytest.mark.parametrize("seed", range(8))
def test_the_smallest_section_works(seed):
    design = TissueDesign(side_um=600, um_per_pixel=2.0)
    rng = np.random.default_rng(seed)
    tissue = grown(seed, design)
    spots = place_spots(tissue, design, rng=rng)
    image = draw_section(tissue, design, stain=draw_stain(rng), rng=rng)
    assert len(spots) > 0
    assert image.shape == (300, 300, 3)


def test_spots_stand_on_the_grid_and_on_tissue(tissue):
    spots = place_spots(tissue, DESIGN, rng=np.random.default_rng(0))
    x, y = spots["pixel_x"].to_numpy(), spots["pixel_y"].to_numpy()
    assert (at(tissue.labels, x, y) != GLASS).mean() > 0.9
    jitter = (spots[["new_x", "new_y"]].to_numpy() - spots[["x", "y"]].to_numpy()) * 200
    assert 0 < np.abs(jitter).max() <= 24.2
    start = spots[["pixel_x", "pixel_y"]].to_numpy() - 200 * spots[["new_x", "new_y"]].to_numpy()
    np.testing.assert_allclose(start, np.broadcast_to(start[0], start.shape), atol=0.3)


@pytest.mark.parametrize("options", [{"side_um": 500}, {"um_per_pixel": 0.1}, {"um_per_pixel": 3}])
def test_a_design_out_of_range_is_refused(options):
    with pytest.raises(ValueError, match=r"side_um >= 600 and um_per_pixel from 0\.2 to 2"):
        TissueDesign(**options)
