"""What a model is trained on: spots of several sections, a panel, and where both come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from strank.cohort.contract import (
    LEAST_FEATURE,
    check_features,
    counts_checksum,
    known_encoder,
    patients_of,
    positions_um,
    section_info,
)
from strank.cohort.folds import Aim
from strank.cohort.panel import all_genes, check_genes, choose_panel, panel_counts, shared_genes
from strank.errors import InputError, some


@dataclass(frozen=True)
class TrainingData:
    """Spots of several sections in one: ``[n_spots, ...]`` in each."""

    features: np.ndarray  # of one encoder; [n_spots, 0] without one
    counts: sparse.csr_matrix  # of the panel
    library_size: np.ndarray
    section: np.ndarray
    positions: np.ndarray  # in µm
    group: np.ndarray  # what is left out together where something is chosen

    @property
    def gene_counts(self) -> np.ndarray:
        """Counts of every gene, ``[n_genes]``; sparse matrices of float32 would sum in it."""
        return self.counts.T @ np.ones(len(self.section))

    def without_depth(self) -> TrainingData:
        """Take all spots for as deep, as an ablation does."""
        return replace(self, library_size=np.ones(len(self.section)))


def training_data(
    cohort: Mapping[str, AnnData],
    panel: pd.Index,
    encoder: str | None,
    group: Sequence[str] | None = None,
) -> TrainingData:
    """Stack the sections; spots without any count have no exposure and are left out.

    ``group`` is that of each section, `taking_turns` if ``None``.
    """
    kept = {name: _with_counts(adata) for name, adata in cohort.items()}
    empty = [name for name, adata in kept.items() if adata.n_obs == 0]
    if empty:
        raise InputError(f"section {empty[0]}: no spot has any count")
    n_spots = [adata.n_obs for adata in kept.values()]
    return TrainingData(
        features=np.concatenate([_features(name, a, encoder) for name, a in kept.items()]),
        counts=sparse.vstack([panel_counts(a, panel) for a in kept.values()], "csr"),
        library_size=np.concatenate([a.obs["library_size"].to_numpy() for a in kept.values()]),
        section=np.repeat(list(kept), n_spots),
        positions=np.concatenate([positions_um(a) for a in kept.values()]),
        group=np.repeat(taking_turns(cohort) if group is None else group, n_spots),
    )


def _with_counts(section: AnnData) -> AnnData:
    counted = (section.obs["library_size"] > 0).to_numpy()
    return section if counted.all() else section[counted]


def _features(name: str, section: AnnData, encoder: str | None) -> np.ndarray:
    if encoder is None:
        return np.empty((section.n_obs, 0))
    features = np.asarray(section.obsm[encoder])
    check_features(features, section.obs_names, f"section {name}: {encoder} features")
    # Beside others, what no model can hold is 0.
    return np.where(np.abs(features) < LEAST_FEATURE, 0, features)


def taking_turns(cohort: Mapping[str, AnnData], aim: Aim = "new-patients") -> list[str]:
    """Name what each section is part of where one of them stops a network: a patient, or itself."""
    patients = list(patients_of(cohort).values())
    # Two patients would leave a single one to train on.
    return patients if aim == "new-patients" and len(set(patients)) > 2 else list(cohort)


def left_out_together(
    cohort: Mapping[str, AnnData], aim: Aim = "new-patients"
) -> tuple[str, list[str]]:
    """Choose what is left out together where sizes are chosen, and name that of each section."""
    patients = list(patients_of(cohort).values())
    if aim == "new-patients" and len(set(patients)) > 1:
        return "patient", patients
    return "section", list(cohort)


def are_two_patients(unit: str, group: Sequence[str]) -> bool:
    """Tell whether what `left_out_together` leaves out are two patients."""
    return unit == "patient" and len(set(group)) == 2


def panel_of(
    cohort: Mapping[str, AnnData],
    n_genes: int | None,
    genes: Sequence[str] | None,
    *,
    union: bool = False,
) -> tuple[pd.Index, str]:
    """Take the panel that is given, or choose it by variance; and say which."""
    if genes is None:
        panel = choose_panel(cohort, n_genes, union=union)
        how = f"{n_genes} of highest log1p(CP10k) variance" if n_genes else "all that vary"
    else:
        if isinstance(genes, str) or len(genes) == 0:
            raise InputError(f"`genes` is a list of names; got {genes!r}")
        panel, how = pd.Index(genes), "given"
        if panel.has_duplicates:
            raise InputError(f"`genes` names {some(panel[panel.duplicated()].unique())} twice")
        if not union:
            check_genes(cohort, genes)
        elif len(absent := panel.difference(all_genes(cohort))):
            raise InputError(f"no section has gene {some(absent)}")
    return panel, f"{how}; {_measured_where(cohort, panel, union)}"


def _measured_where(cohort: Mapping[str, AnnData], panel: pd.Index, union: bool) -> str:
    if not union:
        return f"of {len(shared_genes(cohort))} that all sections measure"
    partly = int((~panel.isin(shared_genes(cohort))).sum())
    return f"of {len(all_genes(cohort))} that any section measures; {partly} not in all"


def encoder_facts_of(cohort: Mapping[str, AnnData], encoder: str) -> dict[str, Any]:
    """Find what the features come from, which must be the same for all sections."""
    found: dict[str, Any] = {}
    for name, adata in cohort.items():
        if encoder not in adata.obsm:
            raise InputError(f"section {name} has no features obsm[{encoder!r}]; embed it first")
        # Features that a user brings have a name and a width, and no more is known of them.
        width = adata.obsm[encoder].shape[1]
        facts = known_encoder(adata, encoder) or {"name": encoder, "version": "", "fields": []}
        facts |= {"n_features": width}
        if found and facts != found:
            raise InputError(f"section {name} has other {encoder} features than the rest")
        found = facts
    return found


def training_sections(cohort: Mapping[str, AnnData]) -> dict[str, object]:
    """List what a model was trained on, for its provenance."""
    patients = patients_of(cohort)
    info = {name: section_info(adata) for name, adata in cohort.items()}
    sizes = {
        name: float(np.min([getattr(facts, name) for facts in info.values()]))
        for name in ("spot_pitch_um", "spot_diameter_um")
    }
    return {
        # Where a section's scale is not known, neither is the size of its spots.
        **{name: um for name, um in sizes.items() if np.isfinite(um)},
        "sections": {
            name: {
                "patient": patients[name],
                "n_spots": adata.n_obs,
                "counts_sha256": counts_checksum(adata),
                "image_sha256": info[name].image_sha256,
            }
            for name, adata in cohort.items()
        },
    }
