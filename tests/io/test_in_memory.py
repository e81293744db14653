"""The lines of docs/in-memory.md run, on runs of Space Ranger that squidpy reads."""

from __future__ import annotations

import re
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
N_GENES, UM = 60, 2.0


def write_run(place: Path, name: str, write_space_ranger) -> None:
    """A small Visium run and its image: counts follow how dark the tissue is."""
    rng = np.random.default_rng([*name.encode()])
    row, col = np.mgrid[0:8, 0:16].reshape(2, -1)
    kept = (row + col) % 2 == 0
    row, col = row[kept], col[kept]
    x, y = 90 + 50 * col / UM, 90 + 50 * 3**0.5 * row / UM
    darkness = np.kron(rng.uniform(0, 120, (8, 9)), np.ones((80, 80)))[:460, :560]
    pixels = np.full((460, 560, 3), 240.0)
    pixels[50:430, 50:530] = (210 - darkness)[50:430, 50:530, None] + rng.normal(
        0, 15, (380, 480, 3)
    )
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(place / f"{name}.tif")
    seen = darkness[y.astype(int), x.astype(int)] / 120
    slopes = np.random.default_rng(0).normal(0, 1, N_GENES)
    counts = rng.poisson(8 * np.exp(seen[:, None] * slopes))
    ids = [f"ENSG{i:011}" for i in range(N_GENES)]
    # Two genes of one name, as in every reference of 10x.
    features = pd.DataFrame({"id": ids, "symbol": ["TBCE", "TBCE", *map("G{}".format, range(58))]})
    places = {"barcode": [f"AAAC{i:04}-1" for i in range(len(x))], "in_tissue": 1}
    places |= {"array_row": row, "array_col": col}
    places |= {"pxl_row_in_fullres": y, "pxl_col_in_fullres": x}
    outs = write_space_ranger(place / name / "outs", counts, features, pd.DataFrame(places))
    with h5py.File(outs / "filtered_feature_bc_matrix.h5", "r+") as file:
        file.attrs["library_ids"] = np.array([name], "S")


@pytest.mark.filterwarnings("ignore")
def test_the_lines_of_the_docs_run(tmp_path, monkeypatch, capsys, write_space_ranger):
    pytest.importorskip("squidpy")
    block = re.search(r"```python\n(.*?)```", (ROOT / "docs/in-memory.md").read_text(), re.DOTALL)
    lines = block[1]
    assert lines in (ROOT / "README.md").read_text()
    assert len([line for line in lines.splitlines() if line.strip()]) <= 11
    for name in ("S1", "S2", "S3", "S4"):
        write_run(tmp_path, name, write_space_ranger)
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.chdir(tmp_path)
    there: dict = {}
    exec(lines, there)
    assert "Evaluation: leave one patient out" in capsys.readouterr().out
    written = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    assert {path.relative_to(tmp_path) for path in written} == {
        Path(f"maps/{gene}.png") for gene in there["model"].panel.index[:3]
    }
    model, section = there["model"], there["sections"]["S4"]
    assert model.provenance["spot_pitch_um"] == pytest.approx(100)
    assert there["scores"].uns["strank"]["um_per_pixel"] == pytest.approx(UM)
    spots = model.predict(section)
    assert spots.shape == (64, 50)
