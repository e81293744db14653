"""Texture of a stained patch over physical scales: bands, fibres, local binary patterns."""

from __future__ import annotations

import math

import cv2
import numpy as np
from numpy.typing import NDArray

from strank.encoders.morphology.stain import Stains

_Image = NDArray[np.float32]
# Contrast (optical density) below which bands, gradients and patterns count as noise.
_BAND_NOISE = 0.01
_GRADIENT_NOISE = 0.01
_PATTERN_NOISE = 0.02
# A structure tensor is averaged over a window this many times wider than the gradient's blur.
_WINDOW = 3
# An image blurred by this many pixels holds nothing finer than what half the pixels can show.
_HALVED_FROM = 1.9
# The neighbours of a pixel, in a circle.
_CIRCLE = ((-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1))
_N_PATTERNS = 10


def blur(image: _Image, sigma: float) -> _Image:
    """Gaussian blur with mirrored borders; ``sigma`` in pixels."""
    side = 2 * math.ceil(3 * sigma) + 1
    return np.asarray(
        cv2.GaussianBlur(image, (side, side), sigma, borderType=cv2.BORDER_REFLECT_101)
    )


def describe_bands(
    stains: Stains, um_per_pixel: float, scales: tuple[int, ...]
) -> dict[str, float]:
    """Contrast of both stains in bands of scale, and how they go together.

    A band is the difference of two Gaussians, of the scale before and of this scale: Burt & Adelson
    (1983), IEEE Trans. Commun. 31, 532-540. Of each the log of the root mean square, the cube root
    of the skewness, and the correlation of the two stains'.
    """
    features = {}
    hematoxylin, eosin, done = stains.hematoxylin, stains.eosin, 0.0
    for scale in scales:
        sigma = math.sqrt(scale**2 - done**2) / um_per_pixel
        smooth = [blur(stain, sigma) for stain in (hematoxylin, eosin)]
        bands = [cv2.subtract(hematoxylin, smooth[0]), cv2.subtract(eosin, smooth[1])]
        strength = []
        for name, band in zip(("hematoxylin", "eosin"), bands, strict=True):
            square = cv2.multiply(band, band)
            strength.append(math.sqrt(_mean(square)) + _BAND_NOISE)
            features[f"{name}.log_contrast_{scale}um"] = math.log(strength[-1])
            third = float(np.cbrt(_mean(cv2.multiply(square, band))))
            features[f"{name}.skewness_{scale}um"] = third / strength[-1]
        together = _mean(cv2.multiply(*bands)) / (strength[0] * strength[1])
        features[f"stains.correlation_{scale}um"] = together
        hematoxylin, eosin = smooth
        done = scale
        if scale >= _HALVED_FROM * um_per_pixel:
            hematoxylin, eosin = _halve(hematoxylin), _halve(eosin)
            um_per_pixel *= 2
    return features


def _mean(image: _Image) -> float:
    # OpenCV's mean adds in float64 and releases the interpreter's lock.
    return float(cv2.mean(image)[0])


def _halve(image: _Image) -> _Image:
    height, width = image.shape[:2]
    size = (max(1, width // 2), max(1, height // 2))
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA))


def describe_fibres(
    density: _Image, um_per_pixel: float, scales: tuple[int, ...]
) -> dict[str, float]:
    """How much the edges in a patch share a direction, as the fibres of stroma do: 0 to 1.

    From the structure tensor of Bigün & Granlund (1987), ICCV, 433-438: `alignment` over the whole
    patch, `coherence` in windows three times the scale, weighted by the gradients' energy, and
    `even_coherence`, the same with all windows counting alike.
    """
    features = {}
    for scale in scales:
        if scale >= 1.4 * _HALVED_FROM * um_per_pixel:
            density, um_per_pixel = _halve(density), 2 * um_per_pixel
        smooth = blur(density, scale / um_per_pixel)
        # In optical density per `scale`, so that the noise floor means the same at each.
        unit = scale / um_per_pixel / 32
        across = cv2.Scharr(smooth, cv2.CV_32F, 1, 0, scale=unit)
        down = cv2.Scharr(smooth, cv2.CV_32F, 0, 1, scale=unit)
        xx, yy = cv2.multiply(across, across), cv2.multiply(down, down)
        tensor = [cv2.add(xx, yy), cv2.subtract(xx, yy), cv2.multiply(across, down, scale=2)]
        energy, plain, diagonal = map(_mean, tensor)
        window = _WINDOW * scale / um_per_pixel / 2
        windows = [blur(_halve(part), window) for part in tensor]
        # OpenCV's magnitude differs in the last digit by where in memory its arguments lie.
        directed = np.sqrt(windows[1] ** 2 + windows[2] ** 2)
        noise = _GRADIENT_NOISE**2
        features[f"alignment_{scale}um"] = math.hypot(plain, diagonal) / (energy + noise)
        features[f"coherence_{scale}um"] = _mean(directed) / (energy + noise)
        features[f"even_coherence_{scale}um"] = _mean(directed / (windows[0] + noise))
    return features


def _pattern_of_code() -> NDArray[np.uint8]:
    """Rotation-invariant uniform pattern of each of the 256 neighbour codes."""
    bits = (np.arange(256)[:, None] >> np.arange(8)) & 1
    changes = (bits != np.roll(bits, 1, axis=1)).sum(axis=1)
    return np.where(changes <= 2, bits.sum(axis=1), _N_PATTERNS - 1).astype(np.uint8)


_PATTERN_OF_CODE = _pattern_of_code()


def describe_patterns(
    density: _Image, um_per_pixel: float, scales: tuple[int, ...]
) -> dict[str, float]:
    """Roots of the shares of local binary patterns: which neighbours are denser than a pixel.

    Ojala, Pietikäinen & Mäenpää (2002), IEEE Trans. PAMI 24, 971-987 (riu2, P = 8): `k_of_8` for
    pixels with k clearly denser neighbours in one run, `mixed` for those with more than one run.
    """
    features = {}
    for scale in scales:
        step = max(1, round(scale / um_per_pixel))
        smooth = blur(density, scale / um_per_pixel / 2)
        height, width = smooth.shape
        centre = smooth[step : height - step, step : width - step] + _PATTERN_NOISE
        code = np.zeros(centre.shape, np.uint8)
        for bit, (dy, dx) in enumerate(_CIRCLE):
            top, left = step + dy * step, step + dx * step
            neighbour = smooth[top : top + centre.shape[0], left : left + centre.shape[1]]
            # `compare` gives 255 for true.
            code |= cv2.compare(neighbour, centre, cv2.CMP_GT) & np.uint8(1 << bit)
        patterns = cv2.LUT(code, _PATTERN_OF_CODE)
        counts = cv2.calcHist([patterns], [0], None, [_N_PATTERNS], [0, _N_PATTERNS]).ravel()
        names = [*(f"{n}_of_8" for n in range(_N_PATTERNS - 1)), "mixed"]
        for name, share in zip(names, np.sqrt(counts / code.size), strict=True):
            features[f"{name}_{scale}um"] = float(share)
    return features
