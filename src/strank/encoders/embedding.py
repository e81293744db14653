"""Features of cohorts: what is there already is only looked at, and the rest is embedded.

What embeds, PyTorch and all that opens slides, is imported when something is to be done.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strank.cohort.folder import digest_of, features_path, n_spots_of, section_names
from strank.encoders.base import Encoder
from strank.encoders.catalogue import library_of
from strank.encoders.registry import get_encoder
from strank.encoders.stored import check_dtype, lacks
from strank.errors import InputError
from strank.extras import need
from strank.files import claimed
from strank.progress import Advance, Say, ignore
from strank.where import Where

if TYPE_CHECKING:
    from strank.cohort.in_memory import Sections
    from strank.encoders.objects import Images


@dataclass(frozen=True)
class Embedded:
    """What `embed` did for a section; ``done_before`` if its features were there already."""

    section: str
    n_spots: int
    done_before: bool


def encoder_to_embed(encoder: str | Encoder, weights: Path | str | None = None) -> Encoder:
    """Load an encoder; what its network and the reading of images need is missed at once."""
    if not isinstance(encoder, str):
        if weights is not None:
            raise InputError("`weights` are for an encoder that is given by its name")
        return encoder
    if (library := library_of(encoder)) is not None:
        need("cv2", "pyvips", library)
    return get_encoder(encoder, weights=None if weights is None else Path(weights))


def embed(
    cohort: Path | str | Sections,
    encoder: str | Encoder = "morphology",
    *,
    image: Images = None,
    um_per_pixel: float | None = None,
    um_per_pixel_override: bool = False,
    weights: Path | str | None = None,
    dtype: str | None = None,
    precision: str | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    jobs: int = 1,
    dask: str | None = None,
    shard: str | None = None,
    advance: Advance | None = None,
    say: Say | None = None,
) -> list[Embedded]:
    """Turn the image around every spot of a cohort into features, kept beside the counts.

    Of sections in memory they stand in ``obsm[<encoder>]``, and what is known of the image in
    ``uns["strank"]``; nothing is written.

    Those of a folder lie in ``features/<encoder>/<section>.h5ad``; `strank.read_cohort` puts them
    into ``obsm[<encoder>]``. A section counts as done when its features come from the same encoder
    (all its facts), the same image and the same spots. A run that was killed goes on with the
    section at which it was. What fails in one section does not stop the others.

    Parameters
    ----------
    cohort
        Folder of the cohort; or sections in memory, as `strank.fit` takes them, which may be
        without counts.
    encoder
        A name, as `strank.encoders.get_encoder` takes it, or an encoder of your own. An image
        network runs on the first GPU, if there is one.
    image
        Of sections in memory: the full-resolution H&E image, which ``obsm["spatial"]`` are pixels
        of. A file for one section, and for several a mapping of their names, or a folder with an
        image called like each. If ``None`` what ``uns`` says, as ``source_image_path`` of scanpy.
    um_per_pixel
        Of that image; if ``None``, as the array of spots measures it, Space Ranger's scale factors
        say, or the image.
    um_per_pixel_override
        Take ``um_per_pixel`` even where they say another scale (by more than 5 %).
    weights
        File with the weights of a network of the catalogue, in place of those on the hub.
    dtype
        How features are stored in a folder, ``"float32"`` or ``"float16"``; if ``None`` as they
        are, and new ones in ``float32``.
    precision
        What a GPU computes in, ``"bf16"``, ``"fp16"`` or ``"float32"``; if ``None`` bf16 where it
        can.
    batch_size
        Spots that are read and encoded at a time; one batch is read while another is encoded.
        Features are the same, of an image network but for the rounding of float32.
    workers
        Processes that read tiles; 0 for threads of this process, faster for an encoder on the CPU.
        If ``None``, up to 8 for one on a GPU, and 0 else. Features are the same.
    jobs, dask, shard
        Where a folder's sections are embedded: in so many processes of one thread each, which share
        the GPUs; on the workers of a scheduler of Dask (its address or its ``.json``); only a share
        of them, ``"2/8"``, or ``"slurm"`` for what the array of jobs says.
    advance
        Called with the number of spots done, for a progress bar.
    say
        Called with what a user wants to know, such as why a section is embedded again.

    Returns
    -------
    list[Embedded]
        For each section its name, its number of spots and whether it was done before.

    Raises
    ------
    InputError
        For an unknown encoder, dtype or precision, a section or image that cannot be read, an image
        that changed since the import or whose pixels are far too coarse, spots that do not lie on
        the tissue, features that are not finite, or a full disk; after the other sections.

    Examples
    --------
    >>> import tempfile
    >>> from strank.io import read_st, write_sections
    >>> from strank.simulate import TissueDesign, simulate_cohort
    >>> folder = Path(tempfile.mkdtemp())
    >>> small = TissueDesign(side_um=600)
    >>> _ = simulate_cohort(folder / "st", n_patients=1, n_sections=1, tissue=small)
    >>> _ = write_sections([read_st(folder / "st", pitch_um=200)], folder / "cohort")
    >>> embed(folder / "cohort")
    [Embedded(section='A1', n_spots=..., done_before=False)]
    >>> embed(folder / "cohort")
    [Embedded(section='A1', n_spots=..., done_before=True)]

    In memory, of an object with ``obsm["spatial"]``:

    >>> adata = read_st(folder / "st", pitch_um=200)
    >>> embed(adata, image=folder / "st" / "images" / "A1.jpg")
    [Embedded(section='A1', n_spots=..., done_before=False)]
    >>> adata.obsm["morphology"].shape == (adata.n_obs, 268)
    True
    """
    how: dict[str, Any]
    encoder = encoder_to_embed(encoder, weights)
    where = Where(jobs, dask, shard)
    check_dtype(dtype)
    if not isinstance(cohort, (Path, str)):
        if dtype is not None:
            raise InputError("`dtype` is of files; in memory features are float32")
        if where != Where():
            raise InputError("`jobs`, `dask` and `shard` are for a folder of sections")
        from strank.encoders.objects import embed_objects

        scale = (um_per_pixel, um_per_pixel_override)
        how = {"workers": workers, "precision": precision, "batch_size": batch_size, "say": say}
        done = embed_objects(cohort, encoder, image, scale, advance=advance, **how)
        return [Embedded(name, n, done_before=False) for name, n in done.items()]
    if image is not None or um_per_pixel is not None or um_per_pixel_override:
        raise InputError("`image` and its scale are of sections in memory: a folder has its own")
    advance, say, folder = advance or ignore, say or ignore, Path(cohort)
    names = where.mine(section_names(folder))
    n_spots = {name: n_spots_of(folder / f"{name}.h5ad") for name in names}
    todo = [name for name in names if not _is_done(folder, encoder, name, dtype, say)]
    # At once and before all else, so that it does not count as speed.
    advance(sum(n for name, n in n_spots.items() if name not in todo))
    if todo or precision is not None:
        need("cv2", "pyvips")
        from strank.encoders.run import EmbeddingRun, embed_sections

        run = EmbeddingRun(folder, encoder, dtype, precision, batch_size, workers)
        with claimed(features_path(folder, encoder.name, "any").parent, shard=shard):
            found = embed_sections(run, todo, where, advance=advance, say=say)
            failed = [outcome.error for outcome in found if outcome.error]
        if failed:
            more = f"; {len(failed) - 1} more of {len(todo)} sections failed" * (len(failed) > 1)
            raise InputError(f"{failed[0]}{more}")
    return [Embedded(name, n, name not in todo) for name, n in n_spots.items()]


def _is_done(folder: Path, encoder: Encoder, name: str, dtype: str | None, say: Say) -> bool:
    """Tell whether a section has its features; of those it has, say why they will not do."""
    path = features_path(folder, encoder.name, name)
    reason = lacks(path, encoder, digest_of(folder / f"{name}.h5ad"), dtype)
    if reason:
        say(f"section {name}: embedded again, because {reason}")
    return reason is None
