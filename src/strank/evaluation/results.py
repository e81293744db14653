"""The tables of a benchmark: a partition a task, written where it is scored, read by column.

``results/encoder=…/genes=…/fold=…/part.parquet`` has a row a method, seed, section and gene, and a
column a score; ``genes/…`` a row a section and gene. Names in paths are escaped. Nothing here holds
more than the columns of one method of one encoder and size of the panel.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from numpy.typing import NDArray

from strank.errors import InputError
from strank.files import read_facts, safe_name, sha256, write_json
from strank.metrics.significance import combine_sections
from strank.storage import new_file, warn_of_damage

TABLES = ("results", "genes")
# What the path of a partition says.
_TASK = ("encoder", "genes", "fold")
_PATHS = ds.partitioning(pa.schema([(key, pa.string()) for key in _TASK]), flavor="hive")
_FORMAT = ds.ParquetFileFormat(
    default_fragment_scan_options=ds.ParquetFragmentScanOptions(page_checksum_verification=True)
)


def part_path(out: Path, table: str, task: Mapping[str, str]) -> Path:
    """Where the rows of a task are."""
    folders = (f"{key}={safe_name(task[key])}" for key in _TASK)
    return out.joinpath(table, *folders, "part.parquet")


def _record_path(out: Path, task: Mapping[str, str]) -> Path:
    return out.joinpath("predictions", *(safe_name(task[key]) for key in _TASK), "scored.json")


def write_parts(
    out: Path, task: Mapping[str, str], tables: Iterable[pd.DataFrame], made_of: Mapping[str, str]
) -> None:
    """Write both tables of a task; and last, beside its predictions, what they were made of."""
    record = dict(made_of)
    for name, table in zip(TABLES, tables, strict=True):
        path = part_path(out, name, task)
        _write_part(path, table)
        record[name] = sha256(path)
    write_json(_record_path(out, task), record, seal=True)


def has_parts(out: Path, task: Mapping[str, str], made_of: Mapping[str, str]) -> bool:
    """Whether both tables of a task are there, of these predictions, and as they were written."""
    path = _record_path(out, task)
    paths = {name: part_path(out, name, task) for name in TABLES}
    # Parquet has checksums of values, not of what says where and which they are.
    if not all(found.is_file() for found in (path, *paths.values())):
        return False
    try:
        record = read_facts(path)
    except InputError:
        warn_of_damage(path)
        return False
    if {key: value for key, value in record.items() if key not in TABLES} != made_of:
        return False
    damaged = [found for name, found in paths.items() if sha256(found) != record.get(name)]
    for found in damaged:
        warn_of_damage(found)
    return not damaged


def drop_parts(out: Path, task: Mapping[str, str]) -> None:
    """Remove what there is of a task."""
    for path in (_record_path(out, task), *(part_path(out, name, task) for name in TABLES)):
        path.unlink(missing_ok=True)


def _write_part(path: Path, table: pd.DataFrame) -> None:
    """Write a partition whose text is dictionaries.

    Each method is a row group of its own, so that one can be read without the others.
    """
    rows = pa.Table.from_pandas(table, preserve_index=False).replace_schema_metadata(None)
    for number, name in enumerate(rows.column_names):
        if not pa.types.is_primitive(rows.schema.field(name).type):
            text = rows[name].cast(pa.string()).dictionary_encode()
            rows = rows.set_column(number, name, text)
    alike = table.get("method", pd.Series("", table.index)).to_numpy()
    starts = [0, *np.flatnonzero(alike[1:] != alike[:-1]) + 1, len(rows)]
    with (
        new_file(path) as file,
        pq.ParquetWriter(file, rows.schema, write_page_checksum=True) as writer,
    ):
        for start, end in pairwise(starts):
            writer.write_table(rows[start:end])


@dataclass(frozen=True)
class Group:
    """Rows of one encoder and size of the panel, of known or new patients, or of all (None)."""

    out: Path
    encoder: str
    genes: str
    patient_seen: bool | None

    @cached_property
    def methods(self) -> list[str]:
        """Names of all that have rows, in order."""
        found: set[str] = set()
        with _readable(self.out / "results"):
            for batch in self._scan("results", ["method"]).to_batches():
                found.update(batch.column(0).unique().to_pylist())
        return sorted(found)

    def facts(self, columns: Iterable[str]) -> pd.DataFrame:
        """Read columns of ``genes``."""
        return self._read("genes", columns)

    def scores(self, method: str, columns: Iterable[str]) -> pd.DataFrame:
        """Read columns of ``results``, of one method."""
        return self._read("results", columns, ds.field("method") == method)

    def combined_p_values(self, cells: pd.MultiIndex) -> Iterator[tuple[str, NDArray[np.float64]]]:
        """Combine the p-values of each method over sections: ``[n_genes]``; cells as in `cube`.

        Of several seeds the first stands for a method. What a method does not order, where others
        do, it does not predict: its p-value there is 1. So all are read twice, one at a time.
        """
        known: Any = False
        for method in self.methods:
            known = known | np.isfinite(self._p_values(method, cells))
        for method in self.methods:
            p = self._p_values(method, cells)
            yield method, combine_sections(np.where(np.isnan(p) & known, 1.0, p))

    def _p_values(self, method: str, cells: pd.MultiIndex) -> NDArray[np.float64]:
        rows = self.scores(method, ["seed", "section", "gene", "p_value"])
        return cube(rows[rows["seed"] == rows["seed"].min()], "p_value", cells)

    def _read(self, table: str, columns: Iterable[str], *where: Any) -> pd.DataFrame:
        with _readable(self.out / table):
            return self._scan(table, columns, *where).to_table().to_pandas()

    def _scan(self, table: str, columns: Iterable[str], *where: Any) -> ds.Scanner:
        kept = (ds.field("encoder") == self.encoder) & (ds.field("genes") == self.genes)
        if self.patient_seen is not None:
            kept &= ds.field("patient_seen") == self.patient_seen
        for more in where:
            kept &= more
        dataset = ds.dataset(self.out / table, format=_FORMAT, partitioning=_PATHS)
        # Two files at a time: what is read ahead counts as well.
        how = {"batch_readahead": 2, "fragment_readahead": 2}
        return dataset.scanner(columns=list(columns), filter=kept, **how)


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"{folder}: no readable table of a benchmark ({error}); run the benchmark again"
        ) from error


def groups_of(out: Path, facts: Mapping[str, Any], *, apart: bool = True) -> list[Group]:
    """List what a benchmark's folder has of what ``benchmark.json`` names, in order.

    Known and new patients are groups apart, or one.
    """
    found = []
    for encoder in sorted(facts["encoders"]):
        for genes in sorted(map(str, facts["genes"])):
            every = Group(out, encoder, genes, None)
            seen = sorted(set(every.facts(["patient_seen"])["patient_seen"]))
            kinds = seen if apart else [None] * bool(seen)
            found += [Group(out, encoder, genes, kind) for kind in kinds]
    return found


def cube(rows: pd.DataFrame, column: str, cells: pd.MultiIndex) -> NDArray[np.float64]:
    """Means over seeds and folds: ``[n_sections, n_genes]``; ``cells`` are all pairs of these."""
    return cubes(rows, [column], cells)[column]


def cubes(
    rows: pd.DataFrame, columns: Sequence[str], cells: pd.MultiIndex
) -> dict[str, NDArray[np.float64]]:
    """Means of several columns, as `cube`."""
    shape = [len(level) for level in cells.levels]
    means = rows.groupby(["section", "gene"], observed=True)[list(columns)].mean().reindex(cells)
    return {name: means[name].to_numpy(np.float64).reshape(shape) for name in columns}


def cells_of(facts: pd.DataFrame) -> pd.MultiIndex:
    """All pairs of a section and a gene, in order."""
    levels = [sorted(facts[name].unique()) for name in ("section", "gene")]
    return pd.MultiIndex.from_product(levels, names=["section", "gene"])
