"""Features of spots, sections and cohorts: resumed, and shared by processes."""

from __future__ import annotations

import json
import os
import struct
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO
from zlib import crc32

import numpy as np
import pandas as pd
from anndata import AnnData
from filelock import FileLock, Timeout
from numpy.typing import DTypeLike, NDArray

from strank.cohort.contract import section_info, spots_checksum
from strank.cohort.store import features_path, read_h5ad, read_section, section_names
from strank.encoders.base import Encoder, encoder_facts
from strank.encoders.tiles import Batch, Say, check_scale, encode_batches
from strank.errors import InputError, some
from strank.files import atomic_path, sha256, writing
from strank.slides.slide import Slide, slide_of

# First row, number of rows and CRC-32 of their bytes, before every batch.
_RECORD = struct.Struct("<III")

_DTYPES = ("float32", "float16")
Advance = Callable[[int], object]
#: Spots that are read and encoded at a time.
BATCH = 64


class Part:
    """Features of the first spots of a section; what was added survives the end of the process.

    The file is a line of JSON, what the features belong to, and the batches one after another, each
    with its checksum. What is torn, damaged or belongs to something else is dropped.

    Parameters
    ----------
    path
        The file, continued if there is one.
    belongs_to
        All that the features depend on, JSON-able.
    shape
        Numbers of spots and features.
    dtype
        In which features are stored.

    Attributes
    ----------
    features
        ``[n_spots, n_features]``, of which the first ``n_done`` rows are known.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "C2.part"
    >>> Part(path, {"encoder": "mine"}, (5, 2), "float32").add(np.ones((3, 2)))
    >>> Part(path, {"encoder": "mine"}, (5, 2), "float32").n_done
    3
    >>> Part(path, {"encoder": "other"}, (5, 2), "float32").n_done
    0
    """

    def __init__(
        self, path: Path, belongs_to: dict[str, Any], shape: tuple[int, int], dtype: DTypeLike
    ) -> None:
        self.path = path
        self.features: NDArray = np.empty(shape, dtype)
        self.n_done = 0
        facts = belongs_to | {"dtype": self.features.dtype.name, "shape": shape}
        header = (json.dumps(facts) + "\n").encode()
        good = self._read(header)
        with writing(path):
            if good:
                os.truncate(path, good)
            else:
                path.write_bytes(header)

    def add(self, rows: NDArray) -> None:
        """Append the features of the next spots; an :class:`InputError` if that fails."""
        first, stop = self.n_done, self.n_done + len(rows)
        self.features[first:stop] = rows
        stored = self.features[first:stop].tobytes()
        with writing(self.path), self.path.open("ab") as file:
            file.write(_RECORD.pack(first, len(rows), crc32(stored)) + stored)
        self.n_done = stop

    def _read(self, header: bytes) -> int:
        """Take over what is good; return where that ends, 0 if nothing is."""
        end = 0
        with suppress(FileNotFoundError), self.path.open("rb") as file:
            if file.read(len(header)) == header:
                end = file.tell()
                while self._read_batch(file):
                    end = file.tell()
        return end

    def _read_batch(self, file: BinaryIO) -> bool:
        head = file.read(_RECORD.size)
        if len(head) < _RECORD.size:
            return False
        first, n_rows, checksum = _RECORD.unpack(head)
        rows = self.features[self.n_done : self.n_done + n_rows]
        stored = file.read(rows.nbytes)
        in_order = first == self.n_done and 0 < n_rows == len(rows)
        if not in_order or crc32(stored) != checksum:
            return False
        rows[:] = np.frombuffer(stored, rows.dtype).reshape(rows.shape)
        self.n_done += n_rows
        return True


@dataclass
class _Work:
    """A section that is being embedded."""

    section: AnnData
    slide: Slide
    image_sha256: Future[str]
    path: Path
    part: Part
    lock: FileLock


@dataclass
class Run:
    """What is to be embedded in a cohort, is under way and was done; a context that ends claims.

    Parameters
    ----------
    folder, encoder, dtype, advance, say
        As in `strank.encoders.embedding.embed_cohort`.

    Attributes
    ----------
    todo
        Sections that lack features.
    embedded
        Those that this run completed.
    """

    folder: Path
    encoder: Encoder
    dtype: str | None
    advance: Callable[[int], object]
    say: Say
    todo: list[str] = field(default_factory=list)
    embedded: set[str] = field(default_factory=set)
    _under_way: deque[_Work] = field(default_factory=deque)
    _claims: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        if self.dtype not in (None, *_DTYPES):
            raise InputError(f"dtype {self.dtype!r}: choose one of {', '.join(_DTYPES)}")

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self._under_way.clear()
        self._claims.close()

    def look(self, name: str) -> int:
        """Count the spots of a section, and put it on the list if it lacks features."""
        section = read_h5ad(self.folder / f"{name}.h5ad", backed="r")
        lacks = self._lacks(name, section)
        section.file.close()
        if lacks is not None:
            self.todo.append(name)
        if lacks:
            self.say(f"section {name}: embedded again, because {lacks}")
        return int(section.n_obs)

    def batches(self, size: int, *, wait: bool) -> Iterator[Batch]:
        """Claim what is to be done, section by section, and yield what each still lacks.

        Parameters
        ----------
        size
            Spots of a batch.
        wait
            Wait for other processes, so that nothing remains to be done; else it may.
        """
        names, self.todo = self.todo, []
        with ThreadPoolExecutor(1) as hashing:
            for name in names:
                work = self._take(name, hashing, wait=wait)
                if work is not None:
                    self._under_way.append(work)
                    centres = np.asarray(work.section.obsm["spatial"])
                    for start in range(work.part.n_done, len(centres), size):
                        yield Batch(work.slide, centres[start : start + size])

    def add(self, rows: NDArray[np.float32]) -> None:
        """Keep the features of the next batch, and write the section that they complete."""
        work = self._under_way[0]
        with np.errstate(over="ignore"):
            rows = rows.astype(work.part.features.dtype)
        wrong = ~np.isfinite(rows).all(1)
        if wrong.any():
            spots = work.section.obs_names[work.part.n_done :][: len(rows)][wrong]
            raise InputError(
                f"section {work.path.stem}: {self.encoder.name} features of spot {some(spots)} "
                f"are not finite as {rows.dtype}"
            )
        work.part.add(rows)
        self.advance(len(rows))
        if work.part.n_done == work.section.n_obs:
            self._finish(self._under_way.popleft())

    def _take(self, name: str, hashing: ThreadPoolExecutor, *, wait: bool) -> _Work | None:
        path = features_path(self.folder, self.encoder.name, name)
        lock = self._claim(path, wait=wait)
        if lock is None:
            self.todo.append(name)
            return None
        section = read_section(self.folder / f"{name}.h5ad")
        if self._lacks(name, section) is None:
            self.advance(section.n_obs)
            _release(lock)
            return None
        slide = slide_of(section)
        check_scale(slide, self.encoder)
        stat = slide.path.stat()
        belongs_to = _facts(section, self.encoder) | {"image": [stat.st_size, stat.st_mtime_ns]}
        shape = section.n_obs, len(self.encoder.feature_names)
        part = Part(_beside(path, "part"), belongs_to, shape, self.dtype or "float32")
        work = _Work(section, slide, hashing.submit(sha256, slide.path), path, part, lock)
        self.advance(part.n_done)
        if part.n_done == section.n_obs:
            self._finish(work)
            return None
        return work

    def _claim(self, path: Path, *, wait: bool) -> FileLock | None:
        """Have a section's features to itself; the claim ends with the process at the latest."""
        lock = FileLock(_beside(path, "lock"))
        if wait:
            self.say(f"section {path.stem}: another run is at it; waiting ({lock.lock_file})")
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(blocking=wait)
            except Timeout:
                return None
        self._claims.callback(_release, lock)
        return lock

    def _finish(self, work: _Work) -> None:
        try:
            check_unchanged(work.image_sha256.result(), work.section)
        except InputError:
            work.part.path.unlink()
            raise
        features = features_of(work.section, self.encoder, work.part.features)
        # Not compressed: features hardly shrink, and a GPU would wait for it.
        with writing(work.path), atomic_path(work.path) as part:
            features.write_h5ad(part)
        work.part.path.unlink()
        _release(work.lock)
        self.embedded.add(work.path.stem)

    def _lacks(self, name: str, section: AnnData) -> str | None:
        """Say why a section's features are not what they should be; ``None`` if they are.

        Empty if there are none.
        """
        path = features_path(self.folder, self.encoder.name, name)
        if not path.is_file():
            return ""
        try:
            stored = read_h5ad(path, backed="r")
            uns, dtype = dict(stored.uns), stored.X.dtype
            stored.file.close()
            facts, now = json.loads(uns["encoder"]), encoder_facts(self.encoder)
            same_spots = uns["spots_sha256"] == spots_checksum(section)
        except (InputError, KeyError, ValueError):
            return f"{path} is damaged"
        changed = [key for key in now | facts if facts.get(key) != now.get(key)]
        if changed:
            was = ", ".join(f"{key} was {facts.get(key)}, now {now.get(key)}" for key in changed)
            return f"the encoder changed: {was}"
        if not same_spots:
            return "its spots or its image changed"
        if self.dtype not in (None, dtype):
            return f"its features are stored as {dtype}, not {self.dtype}"
        return None


def features_of(section: AnnData, encoder: Encoder, features: NDArray) -> AnnData:
    """Features of a section as an AnnData: ``X`` features, ``obs`` spots, ``var`` their names."""
    return AnnData(
        X=features,
        obs=pd.DataFrame(index=section.obs_names),
        var=pd.DataFrame(index=pd.Index(encoder.feature_names)),
        uns=_facts(section, encoder) | _known(encoder),
    )


def check_unchanged(image_sha256: str, section: AnnData) -> None:
    """Refuse an image that is not the one that was imported."""
    info = section_info(section)
    if image_sha256 != info.image_sha256:
        raise InputError(f"{info.image}: the image changed since the import; import again")


def _facts(section: AnnData, encoder: Encoder) -> dict[str, Any]:
    facts = json.dumps(encoder_facts(encoder))
    return {"encoder": facts, "spots_sha256": spots_checksum(section)}


def _known(encoder: Encoder) -> dict[str, str]:
    """List what is worth knowing of an encoder, but makes no other features."""
    known = {name: getattr(encoder, name, None) for name in ("revision", "precision")}
    return {name: str(value) for name, value in known.items() if value is not None}


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.stem}.{suffix}")


def _release(lock: FileLock) -> None:
    if lock.is_locked:
        # Before the release, after which it may be the lock of another process.
        with suppress(OSError):
            Path(lock.lock_file).unlink()
        lock.release()


@dataclass(frozen=True)
class Embedded:
    """What `embed_cohort` did for a section; ``done_before`` if its features were there already."""

    section: str
    n_spots: int
    done_before: bool


def embed_cohort(
    folder: Path,
    encoder: Encoder,
    *,
    dtype: str | None = None,
    batch_size: int = BATCH,
    workers: int = 0,
    advance: Advance | None = None,
    say: Say | None = None,
) -> list[Embedded]:
    """Write the features of every section that lacks them.

    A section counts as done when its features come from the same encoder (all its facts), the same
    image and the same spots. A run that was killed goes on after the last batch that it finished.
    Several processes may work on one cohort, one a GPU say: each takes sections that no other has,
    and at the end waits for the others.

    Parameters
    ----------
    folder
        The cohort.
    encoder
        Which features.
    dtype
        How features are stored, ``"float32"`` or ``"float16"``; if ``None`` as they are, and new
        ones in ``float32``.
    batch_size, workers
        As in `embed_spots`.
    advance
        Called with the number of spots done, for a progress bar.
    say
        Called with what a user wants to know, such as why a section is embedded again.

    Raises
    ------
    InputError
        For an unknown dtype, a section or image that cannot be read, an image that changed since
        the import, features that are not finite, or a full disk.
    """
    run = Run(folder, encoder, dtype, advance or _ignore, say or _ignore)
    n_spots = {name: run.look(name) for name in section_names(folder)}
    # At once and before all else, so that it does not count as speed.
    run.advance(sum(n for name, n in n_spots.items() if name not in run.todo))
    with run:
        # Nobody waits while others may wait for what it has not finished.
        for wait in (False, True):
            if run.todo:
                batches = run.batches(batch_size, wait=wait)
                encoded = encode_batches(batches, encoder, workers=workers, say=say)
                with closing(encoded):
                    for rows in encoded:
                        run.add(rows)
    return [Embedded(name, n, name not in run.embedded) for name, n in n_spots.items()]


def embed_section(section: AnnData, encoder: Encoder, *, advance: Advance | None = None) -> AnnData:
    """Features of a section as an AnnData: ``X`` features, ``obs`` spots, ``var`` their names."""
    slide = slide_of(section)
    check_unchanged(sha256(slide.path), section)
    features = embed_spots(slide, np.asarray(section.obsm["spatial"]), encoder, advance=advance)
    return features_of(section, encoder, features)


def embed_spots(
    slide: Slide,
    centres: NDArray[np.float64],
    encoder: Encoder,
    *,
    batch_size: int = BATCH,
    workers: int = 0,
    advance: Advance | None = None,
    say: Say | None = None,
) -> NDArray[np.float32]:
    """Features at any positions of a slide.

    Parameters
    ----------
    slide
        The image.
    centres
        Positions (x, y) in pixels of the image, ``[n_spots, 2]``.
    encoder
        Which features.
    batch_size
        Spots that are read and encoded at a time; one batch is read while another is encoded.
        Features are the same, of an image network but for the rounding of float32.
    workers
        Processes that read, for an encoder on a GPU; 0 for threads of this process, faster for one
        on the CPU. Features are the same.
    advance
        Called with the number of spots done.
    say
        Told if a batch does not fit into the GPU's memory and goes through in parts.

    Returns
    -------
    NDArray
        ``float32``, ``[n_spots, n_features]``. Besides it, memory holds the patches of three
        batches, and of two more a worker.

    Raises
    ------
    InputError
        If the slide's pixels are far too coarse, or cannot be read.
    """
    check_scale(slide, encoder)
    out = np.empty((len(centres), len(encoder.feature_names)), np.float32)
    starts = range(0, len(centres), batch_size)
    batches = (Batch(slide, centres[start : start + batch_size]) for start in starts)
    features = encode_batches(batches, encoder, workers=workers, say=say)
    for start, rows in zip(starts, features, strict=True):
        out[start : start + len(rows)] = rows
        if advance is not None:
            advance(len(rows))
    return out


def _ignore(_: object) -> None:
    pass
