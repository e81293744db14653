"""Write a simulated cohort: the layout of published ST folders, and the truth beside it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from strank.cohort.arrays import VISIUM
from strank.cohort.store import write_h5ad
from strank.errors import InputError
from strank.files import write_bytes, write_table
from strank.simulate.counts import (
    CountDesign,
    Genes,
    SectionCounts,
    draw_counts,
    draw_genes,
    draw_patient,
)
from strank.simulate.drawing import Stain, draw_section, draw_stain
from strank.simulate.regions import REGIONS
from strank.simulate.tissue import (
    LAYOUT_UM,
    Tissue,
    TissueDesign,
    grow_tissue,
    on_tissue,
    under_spots,
)
from strank.simulate.visium import place_visium, write_run
from strank.storage import new_folder

PITCH_UM, RADIUS_UM = 200.0, 50.0
_JITTER = 0.04
# Spread of the fields' shifts between patients, and between the sections of one.
_PATIENT_SPREAD, _SECTION_SPREAD = 0.3, 0.1
# Branches of the tree of seeds; a section's random numbers depend on its own branch only.
_GENES, _PATIENT, _SECTION = range(3)
_TISSUE, _DRAWING, _SPOTS, _COUNTS, _EFFECTS = range(5)


@dataclass(frozen=True)
class _Cohort:
    seed: int
    tissue: TissueDesign
    counts: CountDesign
    genes: Genes
    visium: bool

    @property
    def radius_um(self) -> float:
        return VISIUM.diameter_um / 2 if self.visium else RADIUS_UM


class Section(NamedTuple):
    """One simulated section."""

    name: str
    image: NDArray[np.uint8]  # RGB
    spots: pd.DataFrame  # positions by name of spot, on the image and off the tissue, too
    counts: pd.DataFrame  # spots by genes
    truth: AnnData  # log relative rates


def simulate_cohort(
    folder: Path,
    *,
    n_patients: int = 4,
    n_sections: int = 2,
    n_genes: int = 210,
    seed: int = 0,
    signal: float = 1.0,
    tissue: TissueDesign | None = None,
    counts: CountDesign | None = None,
    layout: Literal["st", "visium"] = "st",
) -> list[str]:
    """Simulate sections of several patients and write them as platforms do, with their truth.

    Patients differ as real ones do: in tissue and stain, and in what each gene marks, so that what
    was learned on some holds in part on others (``CountDesign.shared``).

    Writes ``images/<section>.jpg``; ``counts/<section>.tsv.gz`` and
    ``spots/<section>_selection.tsv`` as published ST folders have them, or ``<section>/outs`` as
    Space Ranger has it; and ``truth/<section>.h5ad``: ``X`` has the true log relative rates
    (natural log, centred per gene within the section, float32), ``obs`` the share of each region,
    the density of nuclei and the depth of each spot, ``var`` each gene's ``abundance`` and
    ``gene_class``, named after the effects that patients share. The folder appears whole or not at
    all. A section's content depends on the seed, its patient and its number, not on how many
    others there are.

    Parameters
    ----------
    folder
        Where to; absent or empty.
    n_patients, n_sections
        Patients, and sections of each; sections are named A1, A2, B1, ...
    n_genes
        At least 21.
    seed
        Same seed, same cohort.
    signal
        Strength of the dependence of expression on tissue; 0 for none. The images stay the same.
    tissue
        Size and scale of the images; 3,750 px and about 140 spots by default.
    counts
        Further properties of the counts; its own ``signal`` is not used.
    layout
        ``"st"``: spots of 100 µm, 200 µm apart on a square grid. ``"visium"``: spots of 55 µm, 100
        µm apart on the hexagonal array, of which an image shows a part.

    Returns
    -------
    list of str
        Names of the sections.

    Raises
    ------
    InputError
        If the folder has something in it.
    ValueError
        For a number out of its range.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp(), "demo")
    >>> simulate_cohort(folder, n_patients=2, n_sections=1, tissue=TissueDesign(side_um=600))
    ['A1', 'B1']
    >>> sorted(path.name for path in folder.iterdir())
    ['counts', 'images', 'spots', 'truth']
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: not an empty folder; choose another, or remove it first")
    if layout not in ("st", "visium"):
        raise ValueError(f'layout must be "st" or "visium"; got {layout!r}')
    if n_patients < 1 or n_sections < 1:
        raise ValueError(
            f"n_patients and n_sections must be at least 1; got {n_patients} and {n_sections}"
        )
    design = replace(counts or CountDesign(), signal=signal)
    genes = draw_genes(n_genes, design=design, rng=_rng(seed, _GENES))
    cohort = _Cohort(seed, tissue or TissueDesign(), design, genes, layout == "visium")
    with new_folder(folder) as part:
        names = []
        for section in _sections(cohort, n_patients, n_sections):
            _write(section, part, cohort)
            names.append(section.name)
    return names


def place_spots(tissue: Tissue, design: TissueDesign, *, rng: np.random.Generator) -> pd.DataFrame:
    """Print an array of spots and keep those on tissue: a selection table by ``<x>x<y>``."""
    start = rng.uniform(RADIUS_UM, PITCH_UM - RADIUS_UM, 2)
    first = rng.integers(3, 10, 2)
    steps = int((design.side_um - RADIUS_UM) // PITCH_UM) + 1
    grid = np.indices((steps, steps)).reshape(2, -1).T
    jitter = np.clip(_JITTER * rng.standard_normal(grid.shape), -0.12, 0.12)
    centre = start + (grid + jitter) * PITCH_UM
    reach = RADIUS_UM + LAYOUT_UM
    inside = ((centre >= reach) & (centre < design.side_um - reach)).all(1)
    grid, jitter, centre = grid[inside], jitter[inside], centre[inside]
    kept = on_tissue(tissue.labels, centre, RADIUS_UM)
    array, refined = (grid + first)[kept], np.round((grid + jitter + first)[kept], 3)
    pixel = np.round(centre[kept] / design.um_per_pixel, 2)
    return pd.DataFrame(
        {
            "x": array[:, 0],
            "y": array[:, 1],
            "new_x": refined[:, 0],
            "new_y": refined[:, 1],
            "pixel_x": pixel[:, 0],
            "pixel_y": pixel[:, 1],
            "selected": 1,
        },
        index=pd.Index([f"{x}x{y}" for x, y in array]),
    )


def _sections(cohort: _Cohort, n_patients: int, n_sections: int) -> Iterator[Section]:
    """All sections in order, two at a time: each takes about half a gigabyte while it is drawn."""
    wanted = [(p, s) for p in range(n_patients) for s in range(n_sections)]
    with ThreadPoolExecutor(2) as pool:
        for first in range(0, len(wanted), 2):
            pair = wanted[first : first + 2]
            yield from list(pool.map(lambda which: _section(cohort, *which), pair))


def _section(cohort: _Cohort, patient: int, number: int) -> Section:
    own = _rng(cohort.seed, _PATIENT, patient)
    composition = _PATIENT_SPREAD * own.standard_normal(len(REGIONS))
    stain = draw_stain(own)
    branch = (cohort.seed, _SECTION, patient, number)
    rng = _rng(*branch, _TISSUE)
    composition = composition + _SECTION_SPREAD * rng.standard_normal(len(REGIONS))
    tissue = grow_tissue(cohort.tissue, composition=composition, rng=rng)
    place = place_visium if cohort.visium else place_spots
    spots = place(tissue, cohort.tissue, rng=_rng(*branch, _SPOTS))
    seen = _seen(tissue, spots[spots["in_tissue"] == 1] if cohort.visium else spots, cohort)
    of_patient = _rng(cohort.seed, _PATIENT, patient, _EFFECTS)
    drawn = draw_counts(
        seen[[f"fraction_{region}" for region in REGIONS]].to_numpy(),
        seen["nuclei_per_mm2"].to_numpy(),
        genes=draw_patient(cohort.genes, design=cohort.counts, rng=of_patient),
        design=cohort.counts,
        rng=_rng(*branch, _COUNTS),
    )
    stain = _touch(stain, rng)
    image = draw_section(tissue, cohort.tissue, stain=stain, rng=_rng(*branch, _DRAWING))
    table = pd.DataFrame(drawn.counts, index=seen.index, columns=cohort.genes.table.index)
    return Section(
        f"{_letters(patient)}{number + 1}", image, spots, table, _truth(seen, drawn, cohort)
    )


def _touch(stain: Stain, rng: np.random.Generator) -> Stain:
    """Slides of one patient are stained together, but not exactly alike."""
    first, second = np.asarray(stain.strength) * rng.uniform(0.95, 1.05, 2)
    return replace(stain, strength=(float(first), float(second)))


def _seen(tissue: Tissue, spots: pd.DataFrame, cohort: _Cohort) -> pd.DataFrame:
    """Shares of the regions among the tissue under each spot, and nuclei per mm²."""
    centre = spots[["pixel_x", "pixel_y"]].to_numpy() * cohort.tissue.um_per_pixel
    under = under_spots(tissue.labels, centre, cohort.radius_um)
    shares = np.stack([(under == k).mean(1) for k in range(len(REGIONS))], axis=1)
    shares /= shares.sum(1, keepdims=True)
    nuclei = cKDTree(np.column_stack([tissue.nuclei.x, tissue.nuclei.y]))
    number = nuclei.query_ball_point(centre, cohort.radius_um, return_length=True)
    table = pd.DataFrame(shares, index=spots.index, columns=[f"fraction_{r}" for r in REGIONS])
    return table.assign(nuclei_per_mm2=number / (np.pi * (cohort.radius_um / 1e3) ** 2))


def _truth(seen: pd.DataFrame, drawn: SectionCounts, cohort: _Cohort) -> AnnData:
    return AnnData(
        X=drawn.truth.astype(np.float32),
        obs=seen.assign(depth=drawn.depth),
        var=cohort.genes.table.copy(),
    )


def _write(section: Section, folder: Path, cohort: _Cohort) -> None:
    # Quality as scanners have it; OpenCV wants blue first.
    pixels = cv2.cvtColor(section.image, cv2.COLOR_RGB2BGR)
    _, image = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 90])
    write_bytes(folder / "images" / f"{section.name}.jpg", image.tobytes())
    write_h5ad(section.truth, folder / "truth" / f"{section.name}.h5ad", compression=None)
    if cohort.visium:
        write_run(
            folder / section.name / "outs",
            name=section.name,
            image=section.image,
            spots=section.spots,
            counts=section.counts,
            um_per_pixel=cohort.tissue.um_per_pixel,
        )
        return
    write_table(
        folder / "counts" / f"{section.name}.tsv.gz",
        section.counts,
        index=True,
        sep="\t",
        # Without a time stamp the same cohort is the same bytes.
        compression={"method": "gzip", "mtime": 0},
    )
    write_table(folder / "spots" / f"{section.name}_selection.tsv", section.spots, sep="\t")


def _rng(seed: int, *branch: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=branch))


def _letters(patient: int) -> str:
    """Name patients A, B, ..., Z, AA, AB, ... as spreadsheets name columns."""
    letters = ""
    patient += 1
    while patient:
        patient, last = divmod(patient - 1, 26)
        letters = chr(ord("A") + last) + letters
    return letters
