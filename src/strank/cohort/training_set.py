"""What a model is trained on: spots of several sections, a panel, and where both come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from strank.cohort.contract import (
    check_features,
    check_naming,
    counts_checksum,
    known_encoder,
    patients_of,
    positions_um,
    section_info,
)
from strank.cohort.folds import Aim
from strank.cohort.on_disk import SectionsOnDisk
from strank.cohort.panel import (
    GeneSums,
    all_genes,
    check_genes,
    choose_panel,
    panel_counts,
    shared_genes,
)
from strank.cohort.rows import SectionRows, StackedRows
from strank.cohort.scratch import CountsOnDisk, Scratch
from strank.errors import InputError, some
from strank.functional.groups import rows_of

# Of `max_memory` features take this part as an array, and counts that with the copies that a fit
# makes of them; else they stay on disk.
_FEATURES, _COUNTS, _COPIES = 0.25, 0.25, 3
# Bytes of a spot beside those: its name, place, depth, section and group.
_A_SPOT = 250


@dataclass(frozen=True)
class TrainingData:
    """Spots of several sections in one: ``[n_spots, ...]`` in each."""

    features: Any  # of one encoder, an array or `StackedRows`; [n_spots, 0] without one
    counts: Any  # of the panel, CSR or `CountsOnDisk`
    library_size: np.ndarray
    section: np.ndarray
    positions: np.ndarray  # in µm
    group: np.ndarray  # what is left out together where something is chosen

    @property
    def gene_counts(self) -> np.ndarray:
        """Counts of every gene, ``[n_genes]``; sparse matrices of float32 would sum in it."""
        total = np.zeros(self.counts.shape[1])
        for rows in rows_of(self.section):
            total += self.counts[rows].T @ np.ones(len(rows))
        return total

    @property
    def gib(self) -> float:
        """What it takes of the memory, in GiB, with the copies that a fit makes of counts."""
        held = _A_SPOT * len(self.section)
        if isinstance(self.features, np.ndarray):
            held += self.features.nbytes
        if sparse.issparse(self.counts):
            held += _COPIES * _n_bytes(self.counts)
        return held / 2**30

    def without_depth(self) -> TrainingData:
        """Take all spots for as deep, as an ablation does."""
        return replace(self, library_size=np.ones(len(self.section)))

    def of_sections(self, kept: np.ndarray) -> TrainingData:
        """Keep the sections of some spots, given as a mask."""
        features, counts = self.features, self.counts
        if isinstance(features, np.ndarray):  # which is not copied
            edges = np.flatnonzero(np.diff(kept, prepend=False, append=False))
            parts = [SectionRows(features[a:b]) for a, b in edges.reshape(-1, 2).tolist()]
            features = StackedRows(parts)
        else:
            features = features.of_sections(kept)
        counts = counts[kept] if sparse.issparse(counts) else counts.of_sections(kept)
        spots = (self.library_size, self.section, self.positions, self.group)
        return TrainingData(features, counts, *(values[kept] for values in spots))


def training_data(
    cohort: Mapping[str, AnnData],
    panel: pd.Index,
    encoder: str | None,
    group: Sequence[str] | None = None,
    *,
    max_memory: float = np.inf,
    scratch: Callable[[int], Scratch] = CountsOnDisk,
) -> TrainingData:
    """Stack the sections; spots without any count have no exposure and are left out.

    ``group`` is that of each section, `taking_turns` if ``None``. What takes too much of
    ``max_memory``, in GiB, stays where it is, or goes to disk: then as much memory is needed as the
    largest section takes. ``scratch`` makes of the number of genes what holds counts there.
    """
    budget, names = max_memory * 2**30, []
    stacked = _Stack(partial(scratch, len(panel)), _COUNTS * budget)
    features, depths, positions = [], [], []
    for name in cohort:
        adata = cohort[name]
        depth = adata.obs["library_size"].to_numpy()
        kept = None if (depth > 0).all() else np.flatnonzero(depth > 0)
        if kept is not None and not len(kept):
            raise InputError(f"section {name}: no spot has any count")
        features.append(_features(cohort, name, adata, encoder, kept))
        own, counts = slice(None) if kept is None else kept, panel_counts(adata, panel)
        stacked.add(counts if kept is None else counts[kept])
        depths.append(depth[own])
        positions.append(positions_um(adata)[own])
        names.append(name)
        del adata, counts  # before the next is read
    n_spots, rows = list(map(len, depths)), StackedRows(features)
    return TrainingData(
        features=rows.in_memory() if rows.nbytes <= _FEATURES * budget else rows,
        counts=stacked.whole(),
        library_size=np.concatenate(depths),
        section=np.repeat(names, n_spots),
        positions=np.concatenate(positions),
        group=np.repeat(taking_turns(cohort) if group is None else group, n_spots),
    )


class _Stack:
    """Counts of sections one after the other: in memory, until they are too many for it."""

    def __init__(self, make: Callable[[], Scratch], budget: float) -> None:
        self._make, self._budget = make, budget
        self._held: list[sparse.csr_matrix] = []
        self._on_disk: Scratch | None = None

    def add(self, counts: sparse.csr_matrix) -> None:
        self._held.append(counts)
        if self._on_disk is None and _COPIES * sum(map(_n_bytes, self._held)) > self._budget:
            self._on_disk = self._make()
        while self._on_disk is not None and self._held:
            self._on_disk.append(self._held.pop(0))

    def whole(self) -> Any:
        return self._on_disk.whole() if self._on_disk else sparse.vstack(self._held, "csr")


def _n_bytes(counts: sparse.csr_matrix) -> int:
    return int(counts.data.nbytes + counts.indices.nbytes + counts.indptr.nbytes)


def _features(
    cohort: Mapping[str, AnnData],
    name: str,
    section: AnnData,
    encoder: str | None,
    kept: np.ndarray | None,
) -> SectionRows:
    if encoder is None:
        return SectionRows(np.empty((section.n_obs, 0)), kept)
    if isinstance(cohort, SectionsOnDisk) and name in cohort.features:
        found = cohort.features[name]
        return SectionRows(found, kept, found.tiny)
    features = np.asarray(section.obsm[encoder])
    spots, what = section.obs_names, f"section {name}: {encoder} features"
    if kept is None or features.ndim != 2:
        return SectionRows(features, kept, check_features(features, spots, what))
    return SectionRows(features, kept, check_features(features[kept], spots[kept], what))


@dataclass(frozen=True)
class Survey:
    """What one look at every section tells; counts and features are read again."""

    known: Mapping[str, AnnData]  #: without counts and features, of sections on disk
    encoders: Mapping[str, dict[str, Any]]  #: what the features of each come from
    sha256: Mapping[str, str]  #: of counts
    sums: GeneSums | None  #: of what a panel is chosen by

    @classmethod
    def of(cls, cohort: Mapping[str, AnnData], encoder: str | None, *, sums: bool) -> Survey:
        """Look at the sections, one after the other; with ``sums`` those of the genes, too."""
        known, encoders, sha256, genes = {}, {}, {}, GeneSums() if sums else None
        for name in cohort:
            adata = cohort[name]
            if encoder is not None:
                encoders[name] = _encoder_facts(cohort, name, adata, encoder)
            sha256[name] = counts_checksum(adata)
            if genes is not None:
                genes.add(adata)
            known[name] = _without_counts(adata) if isinstance(cohort, SectionsOnDisk) else adata
            del adata  # before the next is read
        if isinstance(cohort, SectionsOnDisk):
            check_naming({name: adata.var_names for name, adata in known.items()})
        return cls(known, encoders, sha256, genes)


def _without_counts(adata: AnnData) -> AnnData:
    obs = adata.obs[["section", "patient", "library_size"]]
    facts = {"strank": adata.uns["strank"]}
    return AnnData(obs=obs, var=pd.DataFrame(index=adata.var_names), uns=facts)


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
    survey: Survey,
    n_genes: int | None,
    genes: Sequence[str] | None,
    *,
    union: bool = False,
) -> tuple[pd.Index, str]:
    """Take the panel that is given, or choose it by variance; and say which."""
    cohort = survey.known
    if genes is None:
        panel = choose_panel(cohort, n_genes, union=union, sums=survey.sums)
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
    each = {name: _encoder_facts(cohort, name, a, encoder) for name, a in cohort.items()}
    return same_encoder(each, encoder)


def same_encoder(facts: Mapping[str, dict[str, Any]], encoder: str) -> dict[str, Any]:
    """Take what the features of all sections come from, which must be the same."""
    first = next(iter(facts.values()))
    for name, found in facts.items():
        if found != first:
            raise InputError(f"section {name} has other {encoder} features than the rest")
    return first


def _encoder_facts(
    cohort: Mapping[str, AnnData], name: str, adata: AnnData, encoder: str
) -> dict[str, Any]:
    on_disk = cohort.features if isinstance(cohort, SectionsOnDisk) else {}
    if name not in on_disk and encoder not in adata.obsm:
        raise InputError(f"section {name} has no features obsm[{encoder!r}]; embed it first")
    values = on_disk[name] if name in on_disk else adata.obsm[encoder]
    # Features that a user brings have a name and a width, and no more is known of them.
    facts = known_encoder(adata, encoder) or {"name": encoder, "version": "", "fields": []}
    return facts | {"n_features": values.shape[1]}


def training_sections(survey: Survey) -> dict[str, object]:
    """List what a model was trained on, for its provenance."""
    cohort = survey.known
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
                "counts_sha256": survey.sha256[name],
                "image_sha256": info[name].image_sha256,
            }
            for name, adata in cohort.items()
        },
    }
