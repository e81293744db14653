"""The built-in encoder: units, invariances, extremes, and agreement with scikit-image."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import cv2
import numpy as np
import pytest

from strank.encoders.base import Field
from strank.encoders.morphology.encoder import Morphology
from strank.encoders.morphology.names import dyadic_scales, patch_names
from strank.encoders.morphology.nuclei import find_nuclei, measure_nuclei
from strank.encoders.morphology.patch import describe_patch
from strank.encoders.morphology.stain import (
    HEMATOXYLIN_EOSIN,
    optical_density,
    quantiles,
    separate_stains,
    unmixing_matrix,
)
from strank.encoders.morphology.texture import describe_fibres

PINK, PURPLE, WHITE = (210, 150, 200), (70, 50, 120), (255, 255, 255)


def plain(colour, pixels=224):
    return np.full((pixels, pixels, 3), colour, np.uint8)


def tissue_with_nuclei(n_side=5, radius_um=4.0, um=150.0, pixels=224):
    """Pink tissue with n_side² dark discs on a grid; drawn large and reduced."""
    drawn = 4 * pixels
    patch = plain(PINK, drawn)
    for row in range(n_side):
        for column in range(n_side):
            centre = [round((index + 0.5) / n_side * drawn) for index in (column, row)]
            cv2.circle(patch, centre, round(radius_um * drawn / um), PURPLE, thickness=-1)
    return cv2.resize(patch, (pixels, pixels), interpolation=cv2.INTER_AREA)


def random_tissue(seed, pixels=224):
    """Blobs, more and larger ones in some patches, and smooth noise in tissue colours."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(pixels, pixels)).astype(np.float32)
    size, share = rng.uniform(3, 6), rng.uniform(0.05, 0.5)
    smooth = cv2.GaussianBlur(noise, (0, 0), size)[..., None]
    nuclei = smooth > np.quantile(smooth, 1 - share)
    shade = 3 * cv2.GaussianBlur(rng.normal(size=(pixels, pixels, 3)), (0, 0), 6) / 0.05
    return np.clip(np.where(nuclei, PURPLE, PINK) + shade, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def encoder():
    return Morphology()


@pytest.fixture(scope="module")
def patches():
    return [np.stack([random_tissue(seed + shift) for seed in range(9)]) for shift in (0, 100, 200)]


@pytest.fixture(scope="module")
def features(encoder, patches):
    return encoder.encode(patches)


def test_features_have_unique_names_and_are_finite(encoder, features):
    names = encoder.feature_names
    assert features.shape == (9, len(names))
    assert features.dtype == np.float32
    assert len(set(names)) == len(names)
    assert 100 <= len(names) <= 300
    assert {name.split(".")[0] for name in names} == {"spot", "nearby", "surroundings"}
    assert np.isfinite(features).all()


@pytest.mark.parametrize("field", [*Morphology().fields, Field(60.0, 48), Field(900.0, 224)])
def test_names_are_those_of_what_is_measured_and_in_its_order(field):
    measured = describe_patch(plain(PINK, field.pixels), field.um)
    assert list(patch_names(field)) == list(measured)


@pytest.mark.parametrize("colour", [WHITE, (0, 0, 0), (128, 128, 128), PINK, (255, 0, 0), PURPLE])
def test_constant_patches_give_finite_features(encoder, colour):
    features = encoder.encode([plain(colour)[None]] * 3)
    assert np.isfinite(features).all()
    assert np.abs(features).max() < 100


def test_no_spots_give_no_rows(encoder):
    none = np.empty((0, 224, 224, 3), np.uint8)
    assert encoder.encode([none] * 3).shape == (0, len(encoder.feature_names))


def test_a_row_depends_on_its_own_patches_only(encoder, patches, features):
    np.testing.assert_array_equal(encoder.encode(patches), features)
    np.testing.assert_array_equal(encoder.encode([p[::-1] for p in patches])[::-1], features)
    np.testing.assert_array_equal(
        Morphology(threads=1).encode([p[3:4] for p in patches])[0], features[3]
    )


def test_features_do_not_depend_on_where_in_memory_they_are_computed(patches):
    """To the last digit; many threads at once make the memory of each a matter of chance."""
    describe = partial(describe_patch, um=250.0)
    alone = [describe(patch) for patch in patches[1]]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(6):
            assert list(pool.map(describe, patches[1])) == alone


@pytest.mark.parametrize(
    "turn",
    [
        lambda p: np.rot90(p, 1, axes=(1, 2)),
        lambda p: np.rot90(p, 2, axes=(1, 2)),
        lambda p: p[:, ::-1],
        lambda p: p[:, :, ::-1],
        lambda p: p.transpose(0, 2, 1, 3),
    ],
    ids=["quarter", "half", "upside down", "mirrored", "transposed"],
)
def test_turning_and_mirroring_changes_nothing(encoder, patches, features, turn):
    turned = encoder.encode([turn(array) for array in patches])
    change = np.abs(turned - features) / (features.std(axis=0) + 0.01)
    # Where nuclei touch, a pixel as near to one as to another may change sides.
    nuclear = np.array([".nuclei." in name for name in encoder.feature_names])
    assert change[:, ~nuclear].max() < 0.01
    assert np.quantile(change[:, nuclear], 0.99) < 0.3
    assert change[:, nuclear].mean() < 0.02


def test_drawn_nuclei_are_counted_and_measured():
    patch, um_per_pixel = tissue_with_nuclei(), 150 / 224
    density = optical_density(patch)
    hematoxylin = separate_stains(density).hematoxylin
    labels, n_clumps = find_nuclei(hematoxylin, um_per_pixel)
    nuclei = measure_nuclei(labels, hematoxylin, density, um_per_pixel)
    assert n_clumps == len(nuclei.log_area_um2) == 25
    np.testing.assert_allclose(np.exp(nuclei.log_area_um2), np.pi * 4**2, rtol=0.1)
    np.testing.assert_allclose(nuclei.elongation, 0, atol=0.05)
    np.testing.assert_allclose(nuclei.centre_um.mean(axis=0), 75, atol=0.6)
    features = describe_patch(patch, um=150)
    assert features["nuclei.sqrt_density_per_mm2"] ** 2 == pytest.approx(25 / 0.15**2, rel=1e-6)
    assert features["nuclei.area_share"] == pytest.approx(25 * np.pi * 16 / 150**2, rel=0.1)
    assert np.expm1(features["nuclei.log_nearest_um.mean"]) == pytest.approx(30, rel=0.1)


def test_touching_nuclei_are_told_apart():
    patch = plain(PINK)
    for column in (106, 118):
        cv2.circle(patch, (column, 112), 7, PURPLE, thickness=-1)
    labels, n_clumps = find_nuclei(separate_stains(optical_density(patch)).hematoxylin, 150 / 224)
    assert n_clumps == 1
    assert len(np.unique(labels)) == 3


def test_the_size_of_a_pixel_does_not_enter():
    coarse, fine = (describe_patch(tissue_with_nuclei(pixels=p), um=150) for p in (224, 336))
    for name in (
        "hematoxylin.mean",
        "tissue.share",
        "bands.hematoxylin.log_contrast_4um",
        "bands.hematoxylin.log_contrast_8um",
        "bands.stains.correlation_4um",
        "fibres.coherence_2um",
        "nuclei.sqrt_density_per_mm2",
        "nuclei.log_area_um2.mean",
        "nuclei.hematoxylin.mean",
    ):
        assert coarse[name] == pytest.approx(fine[name], rel=0.05, abs=0.02), name


def test_darker_purple_means_more_hematoxylin():
    shades = [describe_patch(plain(colour), 150) for colour in [(200, 190, 230), PURPLE]]
    assert shades[0]["hematoxylin.mean"] < shades[1]["hematoxylin.mean"]
    assert shades[0]["hematoxylin.q50"] < shades[1]["hematoxylin.q50"]


def test_white_is_no_tissue_and_a_deep_hole():
    white, pink = describe_patch(plain(WHITE), 150), describe_patch(plain(PINK), 150)
    assert (white["tissue.share"], pink["tissue.share"]) == (0, 1)
    assert white["holes.sqrt_share_15um_deep"] == 1
    assert pink["holes.sqrt_share_5um_deep"] == 0
    assert white["nuclei.sqrt_density_per_mm2"] == 0


def test_stripes_are_aligned_and_a_disc_is_not():
    stripes = np.sin(np.arange(224) / 3).astype(np.float32) * np.ones((224, 1), np.float32)
    features = describe_fibres(stripes, 150 / 224, (1, 2, 4))
    assert min(features[f"alignment_{scale}um"] for scale in (1, 2)) > 0.95
    distance = np.hypot(*np.mgrid[-111.5:112, -111.5:112])
    disc = cv2.GaussianBlur((distance < 60).astype(np.float32), (0, 0), 2)
    features = describe_fibres(disc, 150 / 224, (1, 2, 4))
    assert features["alignment_2um"] < 0.01
    assert features["coherence_2um"] > 0.8


def test_stain_separation_agrees_with_scikit_image():
    color = pytest.importorskip("skimage.color")
    patch = random_tissue(5)
    from_rgb = unmixing_matrix().T
    # scikit-image works with natural logs in units of its own, without the offset of one level.
    theirs = color.separate_stains((patch.astype(float) + 1) / 256, from_rgb) * -np.log10(1e-6)
    ours = separate_stains(optical_density(patch))
    for index, name in enumerate(("hematoxylin", "eosin")):
        np.testing.assert_allclose(
            np.maximum(getattr(ours, name), 0), theirs[..., index], atol=1e-4, err_msg=name
        )


@pytest.mark.parametrize(("stain", "amounts"), [(0, (1, 0)), (1, (0, 1))])
def test_a_pure_stain_is_found_pure(stain, amounts):
    density = np.array(HEMATOXYLIN_EOSIN[stain]) / np.linalg.norm(HEMATOXYLIN_EOSIN[stain])
    found = separate_stains(density.astype(np.float32).reshape(1, 1, 3))
    np.testing.assert_allclose([found.hematoxylin.item(), found.eosin.item()], amounts, atol=1e-6)


def test_quantiles_agree_with_numpy():
    image = np.random.default_rng(0).gamma(2, 0.2, (200, 200)).astype(np.float32)
    shares = (0.05, 0.5, 0.95)
    np.testing.assert_allclose(quantiles(image, shares), np.quantile(image, shares), atol=0.01)


def test_scales_are_powers_of_two_that_the_field_can_show():
    assert dyadic_scales(150, 150 / 224) == (1, 2, 4, 8, 16)
    assert dyadic_scales(450, 450 / 224) == (4, 8, 16, 32, 64)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda p: p[:1], r"one array of patches a field is needed \(spot, .*surroundings\); 1"),
        (lambda p: [p[0], p[1].astype(float), p[2]], "field 'nearby': expected uint8 .* float64"),
        (
            lambda p: [p[0][:, :200], *p[1:]],
            r"field 'spot': expected .* got uint8 \[9, 200, 224, 3\]",
        ),
        (lambda p: [p[0][0], *p[1:]], r"field 'spot': expected .* got uint8 \[224, 224, 3\]"),
        (lambda p: [*p[:2], p[2][:4]], "field 'surroundings': 4 patches; field 'spot' has 9"),
    ],
    ids=["one field", "float", "not square", "one patch", "unequal"],
)
def test_wrong_patches_are_refused_by_field(encoder, patches, wrong, message):
    with pytest.raises(ValueError, match=message):
        encoder.encode(wrong(patches))


def test_wrong_fields_are_refused():
    with pytest.raises(ValueError, match="looks at 3 fields"):
        Morphology(fields=(Field(150, 224),))
    with pytest.raises(ValueError, match="'surroundings': 16 pixels over 450 µm are too coarse"):
        Morphology(fields=(Field(100, 224), Field(250, 224), Field(450, 16)))
