"""Augmentation: the spot stays in the centre, stains change as said, and draws are a spot's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from strank.errors import InputError
from strank.neural.augment import N_DRAWS, STAIN_SCALE, STAIN_SHIFT, augment, draw

NEUTRAL = torch.tensor([[0.0, 0.5, 0.5, 0.5, 0.5]])


def _noise(n, pixels, low=0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = n, pixels, pixels, 3
    return torch.randint(low, 256, shape, dtype=torch.uint8, generator=generator)


def _symmetries(n=8):
    draws = NEUTRAL.repeat(n, 1)
    draws[:, 0] = (torch.arange(n) + 0.5) / n
    return draws


def test_neutral_draws_change_nothing():
    levels = torch.arange(256, dtype=torch.uint8)
    grey = levels.view(1, 16, 16, 1).expand(-1, -1, -1, 3)
    patches = torch.cat([grey, _noise(30, 16)])
    assert augment(patches, NEUTRAL.repeat(31, 1)).equal(patches)


def test_the_eight_symmetries_of_the_square_all_occur():
    patch = _noise(1, 7)
    augmented = augment(patch.repeat(8, 1, 1, 1), _symmetries()).numpy()
    expected = [np.rot90(patch[0].numpy(), turn) for turn in range(4)]
    expected += [np.fliplr(turned) for turned in expected]
    assert {a.tobytes() for a in augmented} == {e.tobytes() for e in expected}
    assert len({a.tobytes() for a in augmented}) == 8


def test_symmetries_move_pixels_and_neither_lose_nor_double_any():
    patch = torch.arange(36, dtype=torch.uint8).view(1, 6, 6, 1).expand(-1, -1, -1, 3)
    for augmented in augment(patch.repeat(8, 1, 1, 1), _symmetries()):
        assert sorted(augmented[..., 0].flatten().tolist()) == list(range(36))


@pytest.mark.parametrize("pixels", [7, 8])
def test_the_centre_stays_in_the_centre(pixels):
    patches = torch.full((200, pixels, pixels, 3), 255, dtype=torch.uint8)
    # The pixel of the spot, or the four around it.
    middle = slice((pixels - 1) // 2, pixels // 2 + 1)
    patches[:, middle, middle] = 90
    augmented = augment(patches, draw(200, seed=0, epoch=0))
    dark = (augmented < 200).any(3)
    assert dark[:, middle, middle].all()
    assert (dark.sum((1, 2)) == dark[0, middle, middle].numel()).all()


def test_empty_glass_stays_empty():
    draws = draw(500, seed=0, epoch=0)
    white = torch.full((500, 3, 3, 3), 255, dtype=torch.uint8)
    assert augment(white, draws).equal(white)
    nearly = torch.full((500, 3, 3, 3), 252, dtype=torch.uint8)
    assert (augment(nearly, draws).int() - 252).abs().max() <= 3


def _stain_amounts(patches):
    """Hematoxylin and eosin in optical density, by scikit-image."""
    color = pytest.importorskip("skimage.color")
    stains = color.rgb_from_hed[:2] / np.linalg.norm(color.rgb_from_hed[:2], axis=1)[:, None]
    third = np.cross(*stains)
    unmix = np.linalg.inv(np.vstack([stains, third / np.linalg.norm(third)]))
    # Its densities are logarithms to the base of the smallest level it knows, a millionth.
    return 6 * color.separate_stains(patches.numpy(), unmix)


def test_either_stain_is_scaled_and_shifted_as_scikit_image_sees_it():
    pytest.importorskip("skimage")
    generator = np.random.default_rng(0)
    amounts = generator.uniform((0.2, 0.2), (0.6, 0.6), (60, 8, 8, 2))
    stains = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]])
    density = amounts @ (stains / np.linalg.norm(stains, axis=1)[:, None])
    patches = torch.as_tensor(np.rint(255 * 10**-density).astype(np.uint8))
    draws = draw(60, seed=3, epoch=0)
    draws[:, 0] = 0
    before, after = _stain_amounts(patches), _stain_amounts(augment(patches, draws))
    np.testing.assert_allclose(before[..., :2], amounts, atol=0.02)
    signed = 2 * draws.numpy()[:, None, None, 1:] - 1
    scale, shift = 1 + STAIN_SCALE * signed[..., ::2], STAIN_SHIFT * signed[..., 1::2]
    np.testing.assert_allclose(after[..., :2], before[..., :2] * scale + shift, atol=0.02)
    np.testing.assert_allclose(after[..., 2], before[..., 2], atol=0.02)
    # And the change is far above that tolerance.
    assert np.abs(after - before).max() > 0.1


def test_a_patch_is_augmented_alike_in_any_batch():
    patches, draws = _noise(20, 9), draw(20, seed=1, epoch=2)
    together = augment(patches, draws)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    assert augment(patches[order], draws[order]).equal(together[order])
    for i in range(20):
        assert augment(patches[i : i + 1], draws[i : i + 1]).equal(together[i : i + 1])


def test_inputs_stay_as_they_are_and_no_patches_are_no_problem():
    patches, draws = _noise(4, 5), draw(4, seed=0, epoch=0)
    copies = patches.clone(), draws.clone()
    augment(patches, draws)
    assert patches.equal(copies[0])
    assert draws.equal(copies[1])
    assert augment(patches[:0], draws[:0]).shape == (0, 5, 5, 3)


def test_draws_are_reproducible_and_differ_by_seed_epoch_and_spot():
    state = torch.get_rng_state()
    first = draw(50, seed=1, epoch=2)
    assert torch.get_rng_state().equal(state)
    assert first.dtype == torch.float32
    assert first.equal(draw(50, seed=1, epoch=2))
    assert first[:20].equal(draw(20, seed=1, epoch=2))
    for other in (draw(50, seed=2, epoch=2), draw(50, seed=1, epoch=1), draw(50, seed=2, epoch=1)):
        assert not (first == other).any()
    assert len(first.unique(dim=0)) == 50


def test_draws_are_uniform():
    draws = draw(20_000, seed=0, epoch=0)
    assert draws.shape == (20_000, N_DRAWS)
    assert draws.min() >= 0
    assert draws.max() < 1
    for column in draws.T.double().numpy():
        assert stats.kstest(column, "uniform").pvalue > 1e-3
    correlation = np.corrcoef(draws.T.numpy()) - np.eye(N_DRAWS)
    assert np.abs(correlation).max() < 0.03


@pytest.mark.parametrize(
    ("patches", "draws", "message"),
    [
        (_noise(2, 4).float(), draw(2, 0, 0), r"uint8 patches .* got torch.float32 \[2, 4, 4, 3\]"),
        (_noise(2, 4)[:, :3], draw(2, 0, 0), r"uint8 patches .* \[2, 3, 4, 3\]"),
        (_noise(2, 4).movedim(3, 1), draw(2, 0, 0), r"uint8 patches .* \[2, 3, 4, 4\]"),
        (_noise(2, 4), draw(3, 0, 0), r"expected draws \[2, 5\].* got \[3, 5\]"),
    ],
)
def test_tensors_of_another_shape_are_refused(patches, draws, message):
    with pytest.raises(InputError, match=message):
        augment(patches, draws)
