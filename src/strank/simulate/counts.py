r"""Expression programmes and counts with known truth.

Gene g belongs to a class and an abundance level. Under spot i of section s let w_ik be the share
of region k, and n_i the nuclei per mm². With signal a (1 by default, 0 for a null cohort), in
patient p::

    β_kg = √ρ β⁰_kg + √(1 - ρ) β¹_kgp,    γ_g = √ρ γ⁰_g + √(1 - ρ) γ¹_gp
    m_ig = Σ_k w_ik exp(a β_kg) · exp(a γ_g z_i),    z_i = log((n_i + 100) / 3100)
    q_ig = B · b_g e_sg m_ig / Σ_h b_h e_sh m_ih     (h over the flat genes if g is flat, else
                                                      over all others; B = Σ_h b_h)
    p_ig = (1 - u_s) q_ig + u_s mean_j q_jg          (ambient RNA, the same all over the section)
    l_i  = L · D_s · exp(a δ z_i + σ ε_i - σ² / 2),  ε_i ~ N(0, 1)
    c_ig ~ NB(mean l_i p_ig, variance mean + φ mean²)

β⁰_kg is positive in the region that the gene's class is named after and 0 elsewhere, γ⁰_g is
positive for "graded" genes only. β¹ and γ¹ are those of a gene of a class that is drawn for each
patient, so that patients differ in what a gene marks, but not in how much it varies; "flat" genes
are flat in all. ρ is the part of the variance of a gene's effects that patients share. b_g is the
share at average tissue. Σ_g p_ig = 1: p are shares of a library, a flat gene takes the same share
in every spot, and what a marker gains others lose. e_sg is a section's own factor on a gene, D_s on
its depth, u_s its additive background. L is the library size of an average spot.

The truth is log p_ig, centred per gene within the section: what a score should equal up to a
constant. Ambient RNA draws it together without changing the order of the spots; neither D_s nor
e_sg of the gene itself is in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from strank.simulate.regions import REGIONS

_Array = NDArray[np.float64]

GENE_CLASSES = (*REGIONS, "graded", "flat")
#: Counts a spot of average depth has on average, by level.
ABUNDANCE = {"high": 30.0, "medium": 5.0, "low": 0.7}

# About what an average section is made of; it only sets the scale of the abundance levels.
_AVERAGE_MIX = np.array([0.33, 0.3, 0.18, 0.09, 0.1])
_REFERENCE_PER_MM2 = 3000.0
_SOFTENING_PER_MM2 = 100.0


@dataclass(frozen=True)
class CountDesign:
    """Strength of what is in the counts; `strank.simulate.counts` gives the equations.

    Attributes
    ----------
    signal
        a, at least 0; 0 makes counts independent of the tissue.
    marker
        Smallest and largest β, the log fold change of a marker gene in its region.
    graded
        Smallest and largest γ, the exponent on the density of nuclei.
    shared
        ρ, from 0 to 1: the part of the variance of a gene's effects that patients have in common.
        With the default, scores are worth as much on a new patient as on real ones
        (``benchmarks/simulated_patients.py``); with 1, patients differ in tissue and stain alone.
    depth_by_density
        δ, the exponent of depth on the density of nuclei.
    depth_spread
        σ, of the log depth between the spots of a section.
    section_spread
        Depth factors D_s are between 1 / section_spread and section_spread, log-uniform.
    gene_spread
        Standard deviation of log e_sg.
    ambient
        Smallest and largest u_s.
    dispersion
        φ, above 0.

    Raises
    ------
    ValueError
        For a negative signal, a dispersion that is not positive, or ``shared`` beyond 0 to 1.

    Examples
    --------
    >>> CountDesign(ambient=(0, 0)).dispersion
    0.15
    """

    signal: float = 1.0
    marker: tuple[float, float] = (0.8, 2.0)
    graded: tuple[float, float] = (0.4, 0.8)
    shared: float = 0.2
    depth_by_density: float = 0.25
    depth_spread: float = 0.4
    section_spread: float = 2.5
    gene_spread: float = 0.2
    ambient: tuple[float, float] = (0.03, 0.15)
    dispersion: float = 0.15

    def __post_init__(self) -> None:
        if not self.signal >= 0:
            raise ValueError(f"signal must be at least 0; got {self.signal}")
        if not self.dispersion > 0:
            raise ValueError(f"dispersion must be above 0; got {self.dispersion}")
        if not 0 <= self.shared <= 1:
            raise ValueError(f"shared must be from 0 to 1; got {self.shared}")


class Genes(NamedTuple):
    """What is the same in every section: of all patients, or of one."""

    table: pd.DataFrame  # gene_class and abundance, by symbol
    base: _Array  # b, [n_genes]; sums to 1
    library_size: float  # L
    marker: _Array  # β, [n_regions, n_genes]
    graded: _Array  # γ, [n_genes]


class SectionCounts(NamedTuple):
    """What is drawn for a section."""

    counts: NDArray[np.int64]  # [n_spots, n_genes], as is the truth
    truth: _Array
    depth: _Array  # l, [n_spots]


def draw_genes(n_genes: int, *, design: CountDesign, rng: np.random.Generator) -> Genes:
    """Draw the genes of a cohort: classes in turn, and abundance levels in turn within a class."""
    n_kinds = len(GENE_CLASSES) * len(ABUNDANCE)
    if n_genes < n_kinds:
        raise ValueError(f"n_genes must be at least {n_kinds}; got {n_genes}")
    gene = np.arange(n_genes)
    classes = np.array(GENE_CLASSES)[gene % len(GENE_CLASSES)]
    levels = np.array(list(ABUNDANCE))[gene // len(GENE_CLASSES) % len(ABUNDANCE)]
    each = zip(classes, levels, gene // n_kinds + 1, strict=True)
    names = [f"{gene_class}-{level}-{number}".upper() for gene_class, level, number in each]
    table = pd.DataFrame({"gene_class": classes, "abundance": levels}, index=pd.Index(names))
    marker, graded = _draw_effects(classes, design, rng)
    expected = np.array([ABUNDANCE[level] for level in levels]) * rng.lognormal(-0.02, 0.2, n_genes)
    return Genes(table, expected / expected.sum(), float(expected.sum()), marker, graded)


def draw_patient(genes: Genes, *, design: CountDesign, rng: np.random.Generator) -> Genes:
    """Draw the genes as one patient expresses them."""
    of_all = genes.table["gene_class"].to_numpy()
    own = rng.choice([name for name in GENE_CLASSES if name != "flat"], len(of_all))
    effects = _draw_effects(np.where(of_all == "flat", "flat", own), design, rng)
    marker, graded = (
        np.sqrt(design.shared) * common + np.sqrt(1 - design.shared) * differing
        for common, differing in zip((genes.marker, genes.graded), effects, strict=True)
    )
    return genes._replace(marker=marker, graded=graded)


def _draw_effects(
    classes: NDArray, design: CountDesign, rng: np.random.Generator
) -> tuple[_Array, _Array]:
    """Draw β and γ of genes of some classes."""
    strength = rng.uniform(*design.marker, len(classes))
    marker = np.where(classes == np.array(REGIONS)[:, None], strength, 0.0)
    graded = np.where(classes == "graded", rng.uniform(*design.graded, len(classes)), 0.0)
    return marker, graded


def draw_counts(
    fractions: _Array,
    nuclei_per_mm2: _Array,
    *,
    genes: Genes,
    design: CountDesign,
    rng: np.random.Generator,
) -> SectionCounts:
    """Draw a section's counts; ``fractions`` of regions are ``[n_spots, n_regions]``."""
    # The order of the draws is fixed, so cohorts that differ in signal share their noise.
    section_scale = design.section_spread ** rng.uniform(-1, 1)
    gene_scale = np.exp(design.gene_spread * rng.standard_normal(len(genes.base)))
    ambient = rng.uniform(*design.ambient)
    spot_scale = np.exp(design.depth_spread * rng.standard_normal(len(fractions)))
    spot_scale *= np.exp(-(design.depth_spread**2) / 2)
    crowding = np.log(
        (nuclei_per_mm2 + _SOFTENING_PER_MM2) / (_REFERENCE_PER_MM2 + _SOFTENING_PER_MM2)
    )
    shares = _shares(fractions, crowding, gene_scale, genes=genes, signal=design.signal)
    shares = (1 - ambient) * shares + ambient * shares.mean(0)
    depth = genes.library_size * section_scale * spot_scale
    depth = depth * np.exp(design.signal * design.depth_by_density * crowding)
    counts = negative_binomial(depth[:, None] * shares, design.dispersion, rng=rng)
    truth = np.log(shares)
    truth -= truth.mean(0)
    # A constant gene's mean is off by a rounding error, which must not look like a ranking.
    truth[:, np.ptp(truth, axis=0) < 1e-9] = 0.0
    return SectionCounts(counts, truth, depth)


def negative_binomial(
    mean: _Array, dispersion: float, *, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Draw counts with the given mean and variance ``mean + dispersion * mean**2``."""
    return rng.poisson(mean * rng.gamma(1 / dispersion, dispersion, mean.shape))


def _shares(
    fractions: _Array, crowding: _Array, gene_scale: _Array, *, genes: Genes, signal: float
) -> _Array:
    """Shares q of a library, ``[n_spots, n_genes]``; rows sum to 1."""
    region_rates = np.exp(signal * genes.marker)
    average = _AVERAGE_MIX @ region_rates
    rates = fractions @ (region_rates / average)
    rates *= np.exp(signal * crowding[:, None] * genes.graded)
    shares = genes.base * gene_scale * rates
    flat = (genes.table["gene_class"] == "flat").to_numpy()
    # Closed apart, or flat genes would fall wherever markers rise.
    for block in (flat, ~flat):
        shares[:, block] *= genes.base[block].sum() / shares[:, block].sum(1, keepdims=True)
    return np.asarray(shares)
