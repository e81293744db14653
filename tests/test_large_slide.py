"""Memory stays small whatever the size of the slide."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import tifffile
import torch

from strank.encoders.base import encoder_facts
from strank.encoders.morphology.encoder import Morphology
from strank.model.rank_model import RankModel
from strank.neural.heads import LinearHead

TILE = 256
# Prints the peak of the process; `ru_maxrss` would be that of the tests that started it, too.
RUN = """
import sys
from strank.cli import app
try:
    app(sys.argv[1:])
finally:
    print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def draw_tiles(rng: np.random.Generator) -> list[bytes]:
    """Glass, and eight kinds of tissue, as JPEG."""
    tiles = [np.full((TILE, TILE, 3), (243, 240, 244), np.uint8)]
    for _ in range(8):
        tile = np.full((TILE, TILE, 3), (205, 130, 185), np.uint8)
        for x, y, radius in rng.integers((0, 0, 6), (TILE, TILE, 13), (60, 3)):
            cv2.circle(tile, (int(x), int(y)), int(radius), (105, 65, 150), -1)
        tiles.append(np.clip(tile + rng.normal(0, 6, tile.shape), 0, 255).astype(np.uint8))
    return [cv2.imencode(".jpg", tile[..., ::-1])[1].tobytes() for tile in tiles]


def write_slide(path: Path, side: int) -> None:
    """A pyramid of ``side`` px at 0.25 µm, its middle half tissue; tiles are encoded only once."""
    kinds = draw_tiles(np.random.default_rng(0))

    def tiles(n: int) -> Iterator[bytes]:
        for row, column in np.ndindex(n, n):
            inside = n / 4 <= min(row, column) and max(row, column) < 3 * n / 4
            yield kinds[1 + (3 * row + column) % 8 if inside else 0]

    options = {"tile": (TILE, TILE), "compression": "jpeg", "photometric": "ycbcr"}
    options |= {"dtype": np.uint8, "subsampling": (2, 2)}
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for level in range(6):
            size = side >> level
            file.write(
                tiles(-(-size // TILE)),
                shape=(size, size, 3),
                subfiletype=int(level > 0),
                resolution=(1e4 / 0.25, 1e4 / 0.25),
                resolutionunit="CENTIMETER",
                **options,
            )


@pytest.fixture
def model(tmp_path) -> Path:
    encoder = Morphology()
    head = LinearHead(len(encoder.feature_names), 2)
    head.load_state_dict({k: torch.ones_like(v) for k, v in head.state_dict().items()})
    spots = {"spot_diameter_um": 100.0, "spot_pitch_um": 200.0, "sections": {}}
    RankModel(head, pd.DataFrame(index=["A", "B"]), encoder_facts(encoder), spots).save(
        tmp_path / "model"
    )
    return tmp_path / "model"


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads Linux's /proc")
@pytest.mark.parametrize("side", [16_000, pytest.param(60_000, marks=pytest.mark.slow)])
def test_tissue_tiles_features_and_scores_in_less_than_2_gib(side, model, tmp_path):
    write_slide(tmp_path / "slide.tif", side)
    stride = side * 0.25 / 2 / 12  # 144 tiles
    options = ["--stride", str(stride), "--model", str(model), "-o", str(tmp_path / "out")]
    command = [sys.executable, "-c", RUN, "predict", str(tmp_path / "slide.tif"), *options]
    run = subprocess.run([*command, "--json"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    summary, peak = run.stdout.rstrip().rsplit("\n", 1)
    assert json.loads(summary)["slides"][0]["n_tiles"] == pytest.approx(144, abs=30)
    assert 0.3 < int(peak) / 2**20 < 2
