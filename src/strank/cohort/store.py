"""Reading and writing cohorts: ``COHORT/<section>.h5ad`` and features beside it.

Features are AnnData files of their own, ``COHORT/features/<encoder>/<section>.h5ad`` (``X`` =
features, ``var`` = their names), joined to ``obsm[<encoder>]`` on reading. So adding features
never touches counts, and a file is whole or absent.
"""

from __future__ import annotations

from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import anndata
import h5py
import numpy as np
from anndata import AnnData
from anndata.io import write_elem

from strank.cohort.contract import (
    check_features,
    check_naming,
    check_section,
    known_encoder,
    spots_checksum,
)
from strank.cohort.folder import features_path, section_names
from strank.cohort.on_disk import SectionsOnDisk
from strank.cohort.rows import RowsOnDisk
from strank.errors import InputError, said_by, some
from strank.files import write_bytes
from strank.hdf5_guard import check_hdf5
from strank.storage import check_seal


def read_cohort(
    folder: Path | str, *, sections: Iterable[str] | None = None, encoder: str | None = None
) -> dict[str, AnnData]:
    """Read the sections of a cohort, checked against the data contract.

    Parameters
    ----------
    folder
        The cohort's folder.
    sections
        Which sections; all of them if ``None``.
    encoder
        Join the features of this encoder as ``obsm[encoder]``.

    Returns
    -------
    dict[str, AnnData]
        Section name to section, in sorted order; `anndata.concat` takes it as it is.

    Raises
    ------
    InputError
        For an absent folder, an unknown section, a file that breaks the contract, sections that
        name genes in two ways (symbols, ids), or features that are absent or do not fit.

    Examples
    --------
    >>> read_cohort("nowhere")
    Traceback (most recent call last):
    ...
    strank.errors.InputError: nowhere: no such folder; make a cohort with `strank import`
    """
    folder = Path(folder)
    wanted = _names_of(folder, sections)
    cohort = {name: read_section(folder / f"{name}.h5ad") for name in wanted}
    check_naming({name: adata.var_names for name, adata in cohort.items()})
    if encoder is not None:
        for name, adata in cohort.items():
            found = features_of(adata, features_path(folder, encoder, name), encoder)
            adata.obsm[encoder] = found[:]
    return cohort


def _names_of(folder: Path, sections: Iterable[str] | None) -> list[str]:
    names = section_names(folder)
    if isinstance(sections, str):
        raise InputError(f"`sections` is a list of names; got {sections!r}")
    wanted = names if sections is None else sorted(set(sections))
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise InputError(f"{folder}: no section {some(unknown)}; there are {some(names, 20)}")
    return wanted


def open_cohort(
    folder: Path | str, encoder: str, *, sections: Iterable[str] | None = None
) -> SectionsOnDisk:
    """Open the sections of a cohort, which are checked when they are read; features stay there."""
    folder = Path(folder)

    def read(name: str) -> AnnData:
        adata = read_section(folder / f"{name}.h5ad")
        path = features_path(folder, encoder, name)
        cohort.features[name] = features_of(adata, path, encoder)
        return adata

    cohort = SectionsOnDisk(_names_of(folder, sections), read)
    return cohort


def read_section(path: Path) -> AnnData:
    """Read one section; an :class:`InputError` if it is damaged or breaks the contract."""
    adata = read_h5ad(path)
    check_section(adata, name=str(path))
    name = adata.obs["section"].iloc[0]
    if name != path.stem:
        raise InputError(f'{path}: obs["section"] says {name}; rename the file to {name}.h5ad')
    return adata


def features_of(adata: AnnData, path: Path, encoder: str) -> RowsOnDisk:
    """Find the features of a section, checked; the facts of the encoder become ``uns[encoder]``."""
    if not path.is_file():
        known = sorted(folder.name for folder in path.parents[1].glob("[!.]*") if folder.is_dir())
        there = f" (there are those of {', '.join(known)})" if known else ""
        raise InputError(
            f"{path}: no {encoder} features; run `strank embed {path.parents[2]} "
            f"--encoder {encoder}`{there}"
        )
    features = read_h5ad(path, backed="r")
    try:
        if features.uns.get("spots_sha256") != spots_checksum(adata):
            raise InputError(
                f"{path}: features of other spots or another image; run `strank embed` again"
            )
        values = features.X
        if not isinstance(values, h5py.Dataset) or values.shape[:1] != (adata.n_obs,):
            raise InputError(f"{path}: holds no features of its spots; run `strank embed` again")
        tiny = check_features(values, adata.obs_names, f"{path}: features")
        found = RowsOnDisk.of(path, values, tiny=tiny)
    except (OSError, RuntimeError) as error:  # of what is packed
        raise _unreadable(path, error) from error
    finally:
        features.file.close()
    # Text, as in the file: AnnData writes no lists of mappings.
    adata.uns[encoder] = features.uns.get("encoder")
    try:
        facts = known_encoder(adata, encoder)
    except InputError:
        facts = None
    if facts is None:
        raise InputError(f"{path}: does not say which encoder made it; run `strank embed` again")
    return found


def read_h5ad(path: Path, *, backed: Literal["r"] | None = None) -> AnnData:
    """Read an AnnData file; an :class:`InputError` if it is absent or damaged.

    With ``backed="r"`` the values of ``X`` stay on disk, and are not checked.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    check_hdf5(path, sealed=check_seal(path) if backed is None else None)
    try:
        adata = anndata.read_h5ad(path, backed=backed)
    except Exception as error:  # h5py and anndata raise many kinds for a damaged file
        raise _unreadable(path, error) from error
    for slot, table in {"obs": adata.obs, "var": adata.var}.items():
        for name, column in table.items():
            if len(column) and isinstance(column.iloc[0], h5py.Empty):
                raise InputError(f'{path}: {slot}["{name}"] has no values; write the file again')
    if backed is None:
        check_matrices(adata, path)
    return adata


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(
        f"{path}: not a readable .h5ad file ({said_by(error)}); copy or write it again"
    )


def check_matrices(adata: AnnData, path: Path) -> None:
    """Refuse what are no matrices of numbers; scipy crashes at indices that lie outside."""
    raw = {} if adata.raw is None else {"raw": adata.raw.X}
    layers = {f'layers["{name}"]': values for name, values in adata.layers.items()}
    for slot, values in {"X": adata.X, **raw, **layers}.items():
        if values is not None:
            check_matrix(values, f"{path}: {slot}")


def check_matrix(values: Any, slot: str) -> None:
    """Refuse one that is no matrix of numbers; ``slot`` names file and place."""
    parts = [getattr(values, name, None) for name in ("data", "indices", "indptr")]
    is_sparse = hasattr(values, "check_format")
    if not all(isinstance(part, np.ndarray) for part in (parts if is_sparse else [values])):
        raise InputError(f"{slot} is damaged (it is no array); write the file again")
    if values.dtype.kind not in "biuf":
        raise InputError(f"{slot} holds {values.dtype}, not numbers; write the file again")
    if not is_sparse:
        return
    if {values.indices.dtype.kind, values.indptr.dtype.kind} != {"i"}:
        raise InputError(f"{slot} is damaged (its indices are no integers); write the file again")
    try:
        values.check_format(full_check=True)
    except (ValueError, IndexError) as error:
        raise InputError(f"{slot} is damaged ({said_by(error)}); write the file again") from error


def write_h5ad(adata: AnnData, path: Path, *, compression: str | None = "gzip") -> None:
    """Write an AnnData file with a seal, whole or absent; an `InputError` on a full disk."""
    adata.strings_to_categoricals()
    # In memory, where no write can fail: HDF5 passes over errors when it closes a file, or crashes.
    # Without a cache of chunks their order is that of the writes, and not of when Python lets go.
    content = BytesIO()
    with h5py.File(content, "w", rdcc_nbytes=0) as target:
        write_elem(target, "/", adata, dataset_kwargs={"compression": compression})
    write_bytes(path, content.getbuffer(), seal=True)
