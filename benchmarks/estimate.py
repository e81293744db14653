"""What large runs cost, from what is measured here: a thousand slides, and a fit of 20,000 genes.

    python benchmarks/estimate.py [--tiles-a-second 1000] [--gpus 4] [--cores 64]

A slide of 24,000 px is tiled and scored with an encoder that costs nothing, so what is left is
finding tissue, reading windows, and the head. The list is fitted to a quarter of the spots and to
all of them, with half of the features and all, with the penalties chosen by patients left out: in
ns a spot, feature and gene these should agree. The formulas are those of docs/cluster.md; how many
tiles a second a GPU makes of the network is not measured, but given (where there is one,
`benchmarks/embedding.py --tiles 20000` measures it).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyvips
import torch
from embedding import made_slide
from scipy import sparse

from strank.encoders.base import Field, encoder_facts
from strank.linear.regressor_cv import STRankRegressorCV
from strank.model.rank_model import RankModel
from strank.neural.heads import LinearHead
from strank.prediction import predict_slide, tile_grid
from strank.slides.slide import open_slide

N_FEATURES, N_GENES = 1024, 50


class Nothing:
    """Tiles of a ViT at 20x, and numbers that cost nothing."""

    name, version, fields = "nothing", "1", (Field(112.0, 224),)
    feature_names = tuple(f"f{i}" for i in range(N_FEATURES))

    def encode(self, patches: list[np.ndarray]) -> np.ndarray:
        return np.repeat(patches[0][:, :1, :1, 0].reshape(-1, 1) / 255, N_FEATURES, 1)


def taken(work: Callable[[], object]) -> tuple[float, object]:
    """Seconds of processor time, and what comes of them."""
    start = time.process_time()
    found = work()
    return time.process_time() - start, found


def cost_of_tiles(place: Path) -> tuple[float, float]:
    """Seconds of a core a slide and a tile."""
    made_slide(place)
    # On glass, since where all is tissue none is found.
    inside = pyvips.Image.new_from_file(str(place / "slide.tif"))
    glass = {"extend": "background", "background": [243, 240, 244]}
    image = inside.embed(2000, 2000, 24_000, 24_000, **glass)
    how = {"tile": True, "pyramid": True, "compression": "jpeg"}
    image.tiffsave(str(place / "on_glass.tif"), **how)
    slide, encoder = open_slide(place / "on_glass.tif", 0.5), Nothing()
    head = LinearHead(N_FEATURES, N_GENES)
    panel = pd.DataFrame({"counts": 1.0}, index=[f"g{i}" for i in range(N_GENES)])
    sizes = {"spot_diameter_um": 112.0, "spot_pitch_um": 112.0}
    model = RankModel(head, panel, encoder_facts(encoder), sizes)
    find, tiles = taken(lambda: tile_grid(slide, model, encoder=encoder))
    score, scores = taken(lambda: predict_slide(slide, model, tiles, encoder=encoder))
    print(f"{scores.n_obs} tiles: {find:.1f} s to find them, {1000 * score / scores.n_obs:.2f} ms")
    return find, score / scores.n_obs


def cost_of_genes(n_spots: int, n_features: int, n_genes: int, n_patients: int) -> float:
    """Processor time of a fit, in ns a spot, feature and gene."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(n_spots, n_features)).astype(np.float32)
    slopes = rng.normal(size=(20, n_genes)) / 20
    counts = sparse.csr_matrix(rng.poisson(0.3 * np.exp(X[:, :20] @ slopes)).astype(np.float32))
    spots = np.arange(n_spots)
    where = {"section": spots * 2 * n_patients // n_spots, "group": spots * n_patients // n_spots}
    model = STRankRegressorCV()
    seconds, _ = taken(lambda: model.fit(X, counts, **where))
    each = 1e9 * seconds / (n_spots * n_features * n_genes)
    print(
        f"{n_spots} spots, {n_features} features, {n_genes} genes, {n_patients} patients: ", end=""
    )
    print(f"{seconds:.0f} s, {each:.1f} ns a spot, feature and gene")
    return each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiles-a-second", type=float, default=1000)
    parser.add_argument("--gpus", type=int, default=4)
    parser.add_argument("--cores", type=int, default=64)
    given = parser.parse_args()
    print(f"{torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as place:
        find, tile = cost_of_tiles(Path(place))
    n_tiles = 1000 * 0.3 * (60_000 / 224) ** 2
    read, encode = 1000 * find + n_tiles * tile, n_tiles / given.tiles_a_second
    print(f"1,000 slides of 60,000 px, 30 % tissue: {n_tiles / 1e6:.1f} million tiles;")
    print(f"  cores: {read / 3600:.0f} core hours; GPUs: {encode / 3600:.1f} GPU hours,")
    print(f"  {encode / 3600 / given.gpus:.1f} h on {given.gpus}, which want ", end="")
    print(f"{given.tiles_a_second * tile:.1f} cores each; ", end="")
    print(f"at most {4 * n_tiles * N_GENES / 2**30:.1f} GiB of scores of {N_GENES} genes")
    for shape in [(6_000, 256, 64, 4), (24_000, 256, 64, 4), (24_000, 512, 64, 4)]:
        each = cost_of_genes(*shape)
    each_of_ten = cost_of_genes(24_000, 512, 64, 10)
    work = 500 * 3000 * 1536 * 20_000
    print("500 sections of 3,000 spots, 1,536 features, 20,000 genes: ", end="")
    for name, ns in {"4 patients": each, "10 parts": each_of_ten}.items():
        hours = 1e-9 * ns * work / 3600
        print(
            f"{name}: {hours:.0f} core hours, {hours / given.cores:.1f} h on {given.cores}; ",
            end="",
        )
    print()


if __name__ == "__main__":
    main()
