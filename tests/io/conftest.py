"""Writers of the layouts of 10x Genomics, as its own pipelines write them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from click.testing import Result
from PIL import Image
from scipy import sparse
from scipy.io import mmwrite
from typer.testing import CliRunner

from strank.cli import app


def _write_h5(path: Path, counts, barcodes, features: pd.DataFrame) -> None:
    by_barcode = sparse.csr_matrix(counts)
    with h5py.File(path, "w") as file:
        matrix = file.create_group("matrix")
        matrix["barcodes"] = np.array(barcodes, dtype="S")
        for part in ("data", "indices", "indptr"):
            matrix[part] = getattr(by_barcode, part)
        matrix["shape"] = np.array(by_barcode.shape[::-1], dtype=np.int32)
        group = matrix.create_group("features")
        group["_all_tag_keys"] = np.array(["genome"], dtype="S")
        # Of probes for fixed tissue: the features that they target.
        group["target_sets/Transcriptome Probe Set"] = np.arange(len(features))
        group["genome"] = np.array(["GRCh38"] * len(features), dtype="S")
        group["id"], group["name"], group["feature_type"] = (
            features[c].to_numpy().astype("S") for c in ("id", "symbol", "kind")
        )


def _write_mtx(folder: Path, counts, barcodes, features: pd.DataFrame) -> None:
    folder.mkdir()
    for name, rows in {
        "features.tsv.gz": features[["id", "symbol", "kind"]].agg("\t".join, axis=1),
        "barcodes.tsv.gz": barcodes,
    }.items():
        (folder / name).write_bytes(gzip.compress("".join(f"{r}\n" for r in rows).encode()))
    with gzip.open(folder / "matrix.mtx.gz", "wb") as file:
        mmwrite(file, sparse.coo_matrix(counts).T)


@pytest.fixture(scope="session")
def write_tenx() -> Callable[..., Path]:
    """Write a matrix of spots x features: HDF5 to ``*.h5``, else a folder.

    ``features`` has columns ``id, symbol``, and ``kind`` where not all are genes.
    """

    def write(path: Path, counts, barcodes, features: pd.DataFrame) -> Path:
        features = features if "kind" in features else features.assign(kind="Gene Expression")
        path.parent.mkdir(parents=True, exist_ok=True)
        (_write_h5 if path.suffix == ".h5" else _write_mtx)(path, counts, barcodes, features)
        return path

    return write


@pytest.fixture(scope="session")
def write_space_ranger(write_tenx) -> Callable[..., Path]:
    """Write ``outs`` as a version of Space Ranger does; positions have its columns.

    ``counts`` are those of all positions: the filtered matrix holds the spots under tissue.
    """

    def write(outs: Path, counts, features, positions: pd.DataFrame, *, version: int = 2) -> Path:
        counts, tissue = sparse.csr_matrix(counts), (positions["in_tissue"] == 1).to_numpy()
        barcodes = positions["barcode"].to_numpy()
        for form in ("", ".h5"):
            name = f"feature_bc_matrix{form}"
            write_tenx(outs / f"raw_{name}", counts, barcodes, features)
            write_tenx(outs / f"filtered_{name}", counts[tissue], barcodes[tissue], features)
        spatial = outs / "spatial"
        spatial.mkdir()
        name = "tissue_positions_list.csv" if version == 1 else "tissue_positions.csv"
        positions.to_csv(spatial / name, index=False, header=version > 1)
        scales = {"tissue_hires_scalef": 0.2, "tissue_lowres_scalef": 0.06}
        diameters = {"spot_diameter_fullres": 39.0, "fiducial_diameter_fullres": 63.0}
        (spatial / "scalefactors_json.json").write_text(json.dumps(scales | diameters))
        for name in ("hires", "lowres"):
            Image.new("RGB", (40, 30), "white").save(spatial / f"tissue_{name}_image.png")
        return outs

    return write


@pytest.fixture
def command() -> Callable[..., Result]:
    """Run the command line; ``code`` is what it must end with."""

    def run(*arguments: object, code: int = 0) -> Result:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == code, result.output
        return result

    return run
