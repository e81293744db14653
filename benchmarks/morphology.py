"""How many spots and patches a second the built-in encoder describes.

    python benchmarks/morphology.py
    python benchmarks/morphology.py --images DIR    # crops of the first image in DIR as well

Two patches of 224 x 224 px a spot (150 and 450 µm).

What the features are worth: mean Spearman of the 50 most variable genes against
log1p(counts per 10k) on her2st, each section predicted from the other four (list likelihood with a
linear head; ridge; ridge on section-centred features and targets; penalties by inner folds):

    182 features           list   ridge  centred ridge
    C2                     0.424  0.309  0.387
    C3                     0.519  0.426  0.464
    C4                     0.517  0.419  0.454
    C5                     0.494  0.364  0.440
    mean of C2..C5         0.489  0.379  0.436
    B4 (another patient)   0.141  0.188  0.231

What was tried, as list and ridge on C2..C5 (mean), list and ridge on B4. B4 was looked at in these
choices too, so its figures flatter.

    66 colour statistics, no stains or nuclei         0.436  0.209   0.055  0.135
    first set, 344 features                           0.488  0.372   0.111  0.173
      without bands / without nuclei                  0.476 / 0.486  0.360 / 0.346
      without patterns / fibres / rings               0.483 / 0.485 / 0.486
      bands alone / nuclei alone / stains alone       0.468 / 0.447 / 0.402
      spot's field alone / surroundings alone         0.457 / 0.465
    surroundings of 300 / 600 / 800 µm (450)   0.481 / 0.490 / 0.491, B4 0.139 / 0.104 / 0.062
    spot of 100 / 220 µm, not 150                     0.478 / 0.487, B4 0.118 / 0.134
    a third field of 1200 µm                          0.499  0.396   0.078  0.158
    second-order (scattering) bands added             0.488  0.378   0.117  0.190
    bands without skewness / correlation              0.480 / 0.480
    one more, coarser or finer, band a field          0.485 for 0.482
    solidity and alignment of nuclei added            0.489  0.375   0.111  0.171
    shape of nuclei in the surroundings left out      0.488  0.377   0.142  0.188
    image divided by its background colour (344)      0.489  0.387   0.112  0.192
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from strank.encoders.base import Field
from strank.encoders.morphology import Morphology

UM_PER_PIXEL = 0.687


def noise(n_spots: int, field: Field, rng: np.random.Generator) -> NDArray[np.uint8]:
    return rng.integers(0, 256, (n_spots, field.pixels, field.pixels, 3), dtype=np.uint8)


def blobs(n_spots: int, field: Field, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Dark discs of 8 µm, 4,000 a mm², on pink."""
    patches = np.full((n_spots, field.pixels, field.pixels, 3), (210, 150, 200), np.uint8)
    pixels_per_um = field.pixels / field.um
    for patch in patches:
        for x, y in rng.integers(0, field.pixels, (round(4000e-6 * field.um**2), 2)).tolist():
            cv2.circle(patch, (x, y), round(4 * pixels_per_um), (70, 50, 120), thickness=-1)
    return patches


def crops(n_spots: int, field: Field, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Windows at the same random places of the middle of an image for every field."""
    side = round(field.um / UM_PER_PIXEL)
    rng = np.random.default_rng(0)
    patches = []
    for share in rng.uniform(0.3, 0.7, (n_spots, 2)):
        top, left = (int(middle - side / 2) for middle in share * image.shape[:2])
        window = image[top : top + side, left : left + side]
        size = (field.pixels, field.pixels)
        patches.append(cv2.resize(window, size, interpolation=cv2.INTER_AREA))
    return np.stack(patches)


def race(label: str, patches: list[NDArray[np.uint8]], repeats: int) -> None:
    n_spots, n_cores = len(patches[0]), os.cpu_count() or 1
    for threads in sorted({1, n_cores}):
        encoder = Morphology(threads=threads)
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            encoder.encode(patches)
            seconds.append(time.perf_counter() - start)
        rate = n_spots / min(seconds)
        total = len(patches) * rate
        print(f"{label:8} {threads:3} threads {rate:7.0f} spots/s {total:7.0f} patches/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=Path, help="folder with .jpg images of tissue")
    parser.add_argument("--spots", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()

    fields = Morphology().fields
    rng = np.random.default_rng(0)
    race("noise", [noise(options.spots, field, rng) for field in fields], options.repeats)
    race("blobs", [blobs(options.spots, field, rng) for field in fields], options.repeats)
    if options.images:
        path = sorted(options.images.glob("*.jpg"))[0]
        image = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
        race(path.stem, [crops(options.spots, field, image) for field in fields], options.repeats)


if __name__ == "__main__":
    main()
