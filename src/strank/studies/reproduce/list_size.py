"""Table 3 of the paper: the size of the lists, on curves and on Breast Xenium."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from strank.cohort.contract import patients_of
from strank.cohort.folder import count_spots
from strank.cohort.folds import Fold
from strank.cohort.store import read_cohort
from strank.encoders.base import Encoder, encoder_facts
from strank.encoders.embedding import embed
from strank.errors import InputError
from strank.evaluation.paper_tasks import PaperTask
from strank.evaluation.protocol import PRESETS, Protocol
from strank.evaluation.scores import score_section
from strank.files import (
    claim_folder,
    claims,
    markdown_table,
    read_json,
    read_written,
    write_table,
    write_utf8,
)
from strank.fitting.method import fit
from strank.io.hest import hest_samples
from strank.neural.recipe import get_recipe
from strank.progress import progress
from strank.storage import is_whole
from strank.studies.reproduce.tables import Reproduction, number
from strank.studies.reproduce.task_data import (
    import_task,
    needed_encoder,
    sample_bytes,
    task_samples,
    unknown_patients,
)
from strank.studies.synthetic.study import check_seeds, list_size_plan, run_cells
from strank.studies.synthetic.tables import table3
from strank.units import each
from strank.version import __version__
from strank.where import Where

_XENIUM = "breast_xenium"
_TRAIN = ("NCBI783", "NCBI784", "NCBI785", "TENX98", "TENX99")
_VALIDATION, _TEST = ("TENX95", "TENX97"), ("TENX94", "TENX96")
# SCC that the paper prints, by N_k.
_PAPER = {
    **{2: 0.447, 4: 0.462, 8: 0.455, 16: 0.458},
    **{32: 0.463, 64: 0.462, 128: 0.457, 256: 0.459},
}
_QUICK_SIZES = (2, 16)
_N_GENES = 50
_NOTES = (
    "on curves a batch of 256 holds 128 spots of each tissue: lists of 128 and 256 are whole "
    "sections of a batch",
    f"{_XENIUM}: the authors' code names validation ({', '.join(_VALIDATION)}) and test "
    f"({', '.join(_TEST)}), and trains on the other samples of a folder, which it does not name: "
    "ours are those of HEST's Xenium samples of breast that are there",
    f"{_XENIUM}: a list holds spots of one section of a batch, 256 spots of all: of several "
    "training sections few have as many as the largest N_k",
)


@claims("output")
def list_size(
    output: Path | str,
    data: Path | str | None = None,
    *,
    encoder: str | Encoder = "conch-224",
    weights: Path | str | None = None,
    seeds: int | None = None,
    quick: bool = False,
    jobs: int = 1,
    dask: str | None = None,
    say: Callable[[str], object] = lambda _: None,
    verbose: bool = False,
) -> Reproduction:
    """Repeat Table 3 of the paper: the list loss on random lists of N_k = 2 to 256 spots.

    On curves of known truth, and, where HEST-1k is at hand, on its Xenium samples of breast: by the
    published recipe, in SCC on the two samples that the authors' code tests.

    Parameters
    ----------
    output
        Folder: ``table.csv``, ``table.md``, ``reproduction.json``, and what was computed. A run
        that was stopped goes on; Breast Xenium may be added later.
    data
        Folder of HEST-1k with TENX94 to TENX97 and, to train, any of TENX98, TENX99, NCBI783,
        NCBI784 and NCBI785; curves only if ``None``.
    encoder, weights
        Whose features, as in `strank.embed`; the paper's is CONCH on patches of 224 pixels.
    seeds
        How many, at least 2; if ``None`` 3, or 2 if quick.
    quick
        A first look: N_k of 2 and 16 (on curves also the largest), few steps.
    jobs, dask
        Processes, one thread each; or the workers of a scheduler of Dask, its address or ``.json``.
    say
        Called with what a user wants to know.
    verbose
        Whether to show progress, on stderr.

    Returns
    -------
    Reproduction
        ``table`` and ``facts``.

    Raises
    ------
    InputError
        For fewer than two seeds, a folder that lacks a sample or has other patches than HEST's,
        fewer than 50 genes after the filter, and a folder of another run.

    Examples
    --------
    >>> list_size("out", "nowhere", encoder="morphology")
    Traceback (most recent call last):
    ...
    strank.errors.InputError: nowhere: no st/*.h5ad there and no splits/; it is neither ...
    """
    output, n_seeds, where = Path(output), check_seeds(seeds, quick), Where(jobs, dask)
    xenium = None if data is None else _Xenium.of(Path(data), output, encoder, weights, quick)
    facts = {"strank_version": __version__, "table": "list-size", "seeds": n_seeds, "quick": quick}
    about = {"notes": _NOTES}
    growing = {"xenium": xenium.facts if xenium else {}}
    claim_folder(output, facts, kind="reproduction", growing=growing, about=about)
    bar = partial(progress, hidden=not verbose)
    cells = list_size_plan(quick=quick, n_seeds=n_seeds)
    found = [_of_curves(table3(run_cells(output / "curves", cells, 0, where, bar=bar)))]
    if xenium is not None:
        xenium.prepare(jobs, bar, say)
        found.append(xenium.run(n_seeds, where, bar))
    table = pd.concat(found, ignore_index=True)
    _write(output, table, quick)
    return Reproduction(table, read_json(output / "reproduction.json"))


def _of_curves(table: pd.DataFrame) -> pd.DataFrame:
    """Take the checkpoints chosen by noisy counts, as anyone could."""
    rows = table[table["selection"] == "counts"].drop(columns="selection")
    return rows.rename(columns={"sampling": "data", "sd": "scc_sd"})[_COLUMNS]


_COLUMNS = ["data", "n_k", "paper", "scc", "scc_sd", "seeds"]


class _Cell(NamedTuple):
    n_k: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.n_k}-{self.seed}.csv"


@dataclass(frozen=True)
class _Xenium:
    """The column of Breast Xenium."""

    task: PaperTask
    samples: Mapping[str, Any]
    encoder: Encoder
    folder: Path
    quick: bool

    @classmethod
    def of(
        cls,
        data: Path,
        output: Path,
        encoder: str | Encoder,
        weights: Path | str | None,
        quick: bool,
    ) -> _Xenium:
        there = hest_samples(data)
        train = tuple(name for name in _TRAIN if name in there)
        if not train:
            raise InputError(f"{data}: none of {', '.join(_TRAIN)} is there, to train on")
        names = (*train, *_VALIDATION, *_TEST)
        if absent := [name for name in names if name not in there]:
            raise InputError(
                f"sample {absent[0]} of Breast Xenium: {data / f'st/{absent[0]}.h5ad'} is not "
                "there; get it with `strank hest download`"
            )
        task = PaperTask("Breast Xenium", names, _VALIDATION[0], _TEST[0], {})
        samples = task_samples([task], data, output)
        made = needed_encoder(encoder, weights)
        return cls(task, samples, made, output / _XENIUM, quick)

    @property
    def facts(self) -> dict[str, Any]:
        return {"samples": sample_bytes(self.samples), "encoder": encoder_facts(self.encoder)} | {
            "unknown_patients": unknown_patients(self.samples)
        }

    @property
    def cohort(self) -> Path:
        return self.folder / "cohort"

    @property
    def protocol(self) -> Protocol:
        train = tuple(n for n in self.task.samples if n not in _VALIDATION + _TEST)
        fold = Fold("test", train, _TEST, validation=_VALIDATION)
        # Filter, panel and target are those of the paper's tasks on HEST.
        return replace(PRESETS["paper-IDC"], name="paper-breast-xenium", folds=(fold,))

    def prepare(self, jobs: int, bar: Callable[..., Any], say: Callable[[str], object]) -> None:
        """Import what is not there yet, with its features."""
        with bar("Reading samples", len(self.task.samples)) as advance:
            import_task(self.task, self.samples, self.cohort, advance, jobs=jobs)
        with bar("Embedding", count_spots(self.cohort), unit="spots") as advance:
            embed(self.cohort, self.encoder, advance=advance, say=say)

    def run(self, n_seeds: int, where: Where, bar: Callable[[str, int], Any]) -> pd.DataFrame:
        """Train what is not done, and gather all scores."""
        sizes = _QUICK_SIZES if self.quick else tuple(_PAPER)
        cells = [_Cell(n_k, seed) for n_k in sizes for seed in range(n_seeds)]
        left = [cell for cell in cells if not is_whole(self.folder / cell.name)]
        with bar("Training on Breast Xenium", len(left)) as advance:
            for _ in each(self.score, left, where):
                advance(1)
        tables = [
            read_written(self.folder / cell.name, sealed=True).assign(n_k=cell.n_k, seed=cell.seed)
            for cell in cells
        ]
        by_seed = pd.concat(tables).groupby(["n_k", "seed"])["scc"].mean()
        table = by_seed.groupby("n_k").agg(scc="mean", scc_sd="std", seeds="size").reset_index()
        return table.assign(data=_XENIUM, paper=table["n_k"].map(_PAPER))[_COLUMNS]

    def score(self, cell: _Cell) -> None:
        """Train by the published recipe on lists of one size; keep the SCC of every gene."""
        cohort, encoder = read_cohort(self.cohort, encoder=self.encoder.name), self.encoder.name
        sections, protocol = self.protocol.filtered(cohort), self.protocol
        [fold] = protocol.make_folds(patients_of(sections))
        panel = protocol.choose_panel(sections, fold, _N_GENES)
        recipe = get_recipe("published-quick" if self.quick else "published")
        model = fit(
            {name: sections[name] for name in fold.development},
            recipe=replace(recipe, list_size=cell.n_k),
            encoder=encoder,
            genes=list(panel),
            validation=fold.validation,
            seed=cell.seed,
        )
        scored = [
            score_section(
                {"list": np.asarray(model.predict(sections[name]).X)},
                sections[name],
                panel,
                depth=protocol.target_depth,
            )
            for name in fold.test
        ]
        found = pd.concat(scored)[["section", "gene", "scc"]]
        write_table(self.folder / cell.name, found, seal=True)


def _write(folder: Path, table: pd.DataFrame, quick: bool) -> None:
    """Write ``table.csv``, and for people ``table.md``: N_k in rows."""
    shown = pd.DataFrame(
        {
            (name, column): rows.set_index("n_k").apply(text, axis=1)
            for name, rows in table.groupby("data", sort=False)
            for column, text in (
                ("paper", lambda row: number(row["paper"])),
                ("ours", lambda row: f"{row['scc']:.3f} ± {row['scc_sd']:.3f}"),
            )
        }
    ).fillna("")
    shown.columns = [" ".join(pair) for pair in shown.columns]
    remarks = [*(["A first look, not the study: few steps."] if quick else []), *_NOTES]
    text = "".join(f"- {remark}\n" for remark in remarks)
    rows = shown.reset_index().astype(str).to_numpy()
    text += "\n" + markdown_table(["N_k", *shown.columns], rows) + "\n"
    write_table(folder / "table.csv", table, float_format="%.6g")
    write_utf8(folder / "table.md", text)
