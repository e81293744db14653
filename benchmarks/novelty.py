"""How often `predict` warns: of tissue like that of training, and of what is not.

    python benchmarks/novelty.py COHORT...

Each patient (each section, where there are fewer than three patients) is left out of a cohort with
features of `morphology`; its sections are looked at as they are, and distorted: every third spot.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from anndata import AnnData

from strank.cohort.store import read_cohort
from strank.cohort.training_set import left_out_together
from strank.encoders.registry import get_encoder
from strank.encoders.tiles import embed_spots
from strank.model.novelty import fit_novelty, novelty_of, warning_of
from strank.slides.pixels import ArrayPixels
from strank.slides.slide import Slide, read_region, slide_of

COLOURS = {
    "inverted": lambda rgb: 255 - rgb,
    "blurred by 4 µm": lambda rgb: cv2.GaussianBlur(rgb, (0, 0), 6),
    "grey": lambda rgb: np.repeat(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2),
    "red and blue swapped": lambda rgb: np.ascontiguousarray(rgb[..., ::-1]),
}
SCALES = {"scale x2": 2.0, "scale x1.4": 1.4, "scale /1.4": 1 / 1.4, "scale /2": 0.5}


def distorted(slide: Slide) -> dict[str, Slide]:
    pixels = read_region(slide, 0, 0, *slide.size)
    wrong = {n: replace(slide, um_per_pixel=slide.um_per_pixel * f) for n, f in SCALES.items()}
    return wrong | {
        name: replace(slide, source=ArrayPixels(change(pixels))) for name, change in COLOURS.items()
    }


def shares(section: AnnData, usual: object) -> dict[str, np.ndarray]:
    """Distances of the section as it is, and of every third spot of it distorted."""
    encoder = get_encoder("morphology")
    centres = np.asarray(section.obsm["spatial"])[::3]
    found = {"as it is": novelty_of(section.obsm["morphology"], usual)}
    for name, slide in distorted(slide_of(section)).items():
        found[name] = novelty_of(embed_spots(slide, centres, encoder), usual)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("cohort", type=Path, nargs="+")
    warned, looked = Counter(), Counter()
    for folder in parser.parse_args().cohort:
        cohort = read_cohort(folder, encoder="morphology")
        what, group = left_out_together(cohort)
        for left in dict.fromkeys(group):
            train = {n: a for (n, a), g in zip(cohort.items(), group, strict=True) if g != left}
            features = np.concatenate([a.obsm["morphology"] for a in train.values()])
            sizes = [a.n_obs for a in train.values()]
            usual = fit_novelty(features, np.repeat(left_out_together(train)[1], sizes))
            for name in cohort.keys() - train.keys():
                found = shares(cohort[name], usual)
                told = ", ".join(f"{k} {(d > 1).mean():.0%}" for k, d in found.items())
                print(f"{folder.name}, {what} left out, {name}: {told}", flush=True)
                looked.update(list(found))
                warned.update(k for k, d in found.items() if warning_of(d))
    for name, n in looked.items():
        print(f"{name}: warned of {warned[name]} of {n} sections")


if __name__ == "__main__":
    main()
