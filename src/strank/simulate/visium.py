"""Print a Visium array on simulated tissue, and write of it what Space Ranger writes."""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import h5py
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from strank.cohort.arrays import VISIUM
from strank.files import write_bytes, write_json, write_table
from strank.simulate.tissue import LAYOUT_UM, Tissue, TissueDesign, on_tissue

_ROW_UM, _COLUMN_UM = VISIUM.pitch_um * 3**0.5 / 2, VISIUM.pitch_um / 2
# What Space Ranger writes as the width of a spot, and of a mark of the frame.
_WIDE_UM, _MARK_UM = 65.0, 105.0
_LETTERS, _BASES = 16, str.maketrans("0123", "ACGT")
_LONGEST_PX = {"hires": 2000, "lowres": 600}


def place_visium(tissue: Tissue, design: TissueDesign, *, rng: np.random.Generator) -> pd.DataFrame:
    """Tell of each position of the array that is on the image whether there is tissue."""
    reach = VISIUM.diameter_um / 2 + LAYOUT_UM
    first = rng.integers(0, 10, 2)
    start = reach + rng.uniform(0, _COLUMN_UM, 2)
    steps = ((design.side_um - reach - start) // (_COLUMN_UM, _ROW_UM)).astype(int) + 1
    n_columns, n_rows = steps.tolist()
    grid = np.indices((n_rows, n_columns)).reshape(2, -1).T
    grid = grid[(grid + first).sum(1) % 2 == 0]
    centre = start + grid[:, ::-1] * (_COLUMN_UM, _ROW_UM)
    drawn = [np.base_repr(n, 4) for n in rng.choice(4**_LETTERS, len(grid), replace=False)]
    barcodes = [f"{n.zfill(_LETTERS).translate(_BASES)}-1" for n in drawn]
    pixel = centre / design.um_per_pixel
    return pd.DataFrame(
        {
            "in_tissue": on_tissue(tissue.labels, centre, VISIUM.diameter_um / 2).astype(int),
            "array_row": (grid + first)[:, 0],
            "array_col": (grid + first)[:, 1],
            "pixel_y": pixel[:, 1],
            "pixel_x": pixel[:, 0],
        },
        index=pd.Index(barcodes, name="barcode"),
    )


def write_run(
    outs: Path,
    *,
    name: str,
    image: NDArray[np.uint8],
    spots: pd.DataFrame,
    counts: pd.DataFrame,
    um_per_pixel: float,
) -> None:
    """Write ``outs``: the filtered matrix, and the folder ``spatial`` with its reduced images."""
    write_bytes(outs / "filtered_feature_bc_matrix.h5", _matrix(counts, name))
    spatial = outs / "spatial"
    renamed = {"pixel_y": "pxl_row_in_fullres", "pixel_x": "pxl_col_in_fullres"}
    write_table(spatial / "tissue_positions.csv", spots.rename(columns=renamed), index=True)
    scales = {
        "spot_diameter_fullres": _WIDE_UM / um_per_pixel,
        "fiducial_diameter_fullres": _MARK_UM / um_per_pixel,
    }
    for kind, longest in _LONGEST_PX.items():
        scale = min(1.0, longest / max(image.shape[:2]))
        scales[f"tissue_{kind}_scalef"] = scale
        small = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        _, packed = cv2.imencode(".png", cv2.cvtColor(small, cv2.COLOR_RGB2BGR))
        write_bytes(spatial / f"tissue_{kind}_image.png", packed.tobytes())
    write_json(spatial / "scalefactors_json.json", scales)


def _matrix(counts: pd.DataFrame, name: str) -> bytes:
    """Features by barcodes, as HDF5 of 10x."""
    by_barcode, held = sparse.csr_matrix(counts.to_numpy(np.int32)), io.BytesIO()
    with h5py.File(held, "w") as file:
        file.attrs["library_ids"] = np.array([name], "S")
        matrix = file.create_group("matrix")
        matrix["barcodes"] = np.array(list(counts.index), "S")
        for part in ("data", "indices", "indptr"):
            matrix[part] = getattr(by_barcode, part)
        matrix["shape"] = np.array(by_barcode.shape[::-1], np.int32)
        features = matrix.create_group("features")
        features["_all_tag_keys"] = np.array(["genome"], "S")
        features["id"] = np.array([f"ENSG{i:011}" for i in range(counts.shape[1])], "S")
        features["name"] = np.array(list(counts.columns), "S")
        for key, value in {"feature_type": "Gene Expression", "genome": "simulated"}.items():
            features[key] = np.array([value] * counts.shape[1], "S")
    return held.getvalue()
