"""The paper's tasks on HEST: from its files to the table, killed and gone on with, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from strank.encoders.base import Field
from strank.evaluation.paper_tasks import PAPER_TASKS

UM, SIDE, PITCH = 0.25, 224, 100.0
N_GENES = 290
# Of a task in turns: so many patients.
PATIENTS = {"IDC": 4, "PRAD": 2, "PAAD": 3, "COAD": 2, "READ": 1, "ccRCC": 24, "IDC-L": 2}


class Colour:
    """Mean colour, and its square: enough for what the samples below hold."""

    name, version, fields = "colour", "1", (Field(112.0, 224),)
    feature_names = ("r", "g", "b", "r2", "g2", "b2")

    def encode(self, patches):
        mean = patches[0].mean((1, 2), dtype=np.float32) / 255
        return np.concatenate([mean, mean**2], axis=1)


def write_sample(folder: Path, name: str, *, patient: str | None, n_spots: int, **changed) -> None:
    """As HEST stores it: spots in another order than patches, some without one, a poor one."""
    rng = np.random.default_rng([*name.encode()])
    side = int(np.ceil(n_spots**0.5))
    where = np.stack(np.divmod(np.arange(n_spots), side), axis=1)[:, ::-1]
    centres = 1000.0 + where * PITCH / UM
    state = np.sin(where[:, 0] + rng.uniform(0, 6)) + 0.3 * rng.normal(size=n_spots)
    genes = [f"G{i}" for i in range(N_GENES)] + ["MT-CO1", "NegControlProbe_1"]
    of_genes = np.random.default_rng(0)
    level, slope = of_genes.uniform(1.2, 3, len(genes)), of_genes.normal(0, 0.4, len(genes))
    depth = rng.lognormal(0, 0.3, n_spots)
    depth[:1] = 0.02
    counts = rng.poisson(depth[:, None] * np.exp(level + state[:, None] * slope))
    counts[1, genes.index("MT-CO1")] = counts[1].sum()
    kept = ~np.isin(genes, changed.get("absent", ()))
    spots = [f"{name}-{i}" for i in range(n_spots)]
    for part in ("st", "patches", "metadata"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    scales = {"spot_diameter_fullres": 55 / UM, "tissue_downscaled_fullres_scalef": 0.1}
    anndata.AnnData(
        sparse.csr_matrix(counts[:, kept].astype(np.float32)),
        obs=pd.DataFrame({"array_row": where[:, 1]}, index=spots),
        var=pd.DataFrame(index=np.array(genes)[kept]),
        obsm={"spatial": centres},
        uns={"spatial": {"ST": {"images": {}, "scalefactors": scales}}},
    ).write_h5ad(folder / f"st/{name}.h5ad")
    order = rng.permutation(n_spots - 1)
    shade = 150 + 25 * state[order, None] * [1.0, -0.5, 0.2]
    pixels = changed.get("pixels", SIDE)
    texture = rng.normal(0, 10, (len(order), pixels // 16, pixels // 16, 1))
    img = np.repeat(np.repeat(shade[:, None, None] + texture, 16, axis=1), 16, axis=2)
    with h5py.File(folder / f"patches/{name}.h5", "w") as file:
        file.create_dataset("img", data=np.clip(img, 0, 230).astype(np.uint8), compression="lzf")
        source = changed.get("um", 0.5) * pixels / UM
        file["coords"] = (centres[order] - source / 2).astype(int)
        file["barcode"] = np.array(spots, dtype="S")[order, None]
        file["coords"].attrs.update({"patch_size_src": source, "pixel_size": UM})
    facts = {"id": name, "pixel_size_um_estimated": UM, "patient": patient, "dataset_title": "T"}
    facts |= {"st_technology": "Visium", "spot_diameter": 55.0, "inter_spot_dist": PITCH}
    (folder / f"metadata/{name}.json").write_text(json.dumps(facts))


def write_tasks(folder: Path, *tasks: str, n_spots: int = 16, **changed) -> Path:
    """All samples of some tasks; the first of a task has no patient, and lacks a gene."""
    for task in tasks:
        for number, name in enumerate(PAPER_TASKS[task].samples):
            patient = f"Patient {number % PATIENTS[task]} of {task}"
            of_first = {"absent": ["G7"]} if number == 0 else {}
            write_sample(folder, name, patient=patient, n_spots=n_spots, **of_first, **changed)
    return folder
