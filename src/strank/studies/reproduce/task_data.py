"""The paper's tasks on HEST: samples are got and looked at, and become cohorts with features."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from joblib import Parallel, delayed

from strank.cohort.contract import counts_checksum, section_info
from strank.cohort.store import read_section, write_h5ad
from strank.encoders.base import Encoder
from strank.encoders.registry import get_encoder
from strank.errors import InputError, no_such
from strank.evaluation.paper_tasks import PAPER_TASKS, PaperTask
from strank.evaluation.protocol import PRESETS
from strank.files import check_room, read_json, write_json
from strank.io import download_hest, read_hest
from strank.io.hest import HestSample, hest_facts, hest_patient, hest_samples
from strank.io.patches import read_patches
from strank.progress import Advance
from strank.storage import is_whole

# Slides are most of a sample; the paper used its patches.
_PARTS = ("st", "patches", "metadata")
_PIXELS, _UM = 224, 0.5
# Patches of slides with other pixels are cut to the nearest of these.
_TOLERANCE = 0.02
_PANEL = 50


def paper_tasks(names: Iterable[str]) -> list[PaperTask]:
    """Look tasks up, each once."""
    if isinstance(names, str):
        raise InputError(f"`tasks` is a list of names; got {names!r}")
    wanted = list(dict.fromkeys(names))
    if unknown := [name for name in wanted if name not in PAPER_TASKS]:
        raise no_such("task", unknown[0], PAPER_TASKS)
    if not wanted:
        raise InputError(f"`tasks` names none; there are {', '.join(PAPER_TASKS)}")
    return [PAPER_TASKS[name] for name in wanted]


def needed_encoder(encoder: str | Encoder, weights: Path | str | None) -> Encoder:
    """Make the encoder; where its weights cannot be had, say what else there is."""
    if not isinstance(encoder, str):
        return encoder
    try:
        return get_encoder(encoder, weights=weights)
    except InputError as error:
        if weights is not None or "`weights`" not in str(error):
            raise
        raise InputError(
            f"{error}, or take another `encoder`: morphology needs no weights"
        ) from error


def task_samples(
    tasks: Sequence[PaperTask], data: Path | None, output: Path
) -> dict[str, HestSample]:
    """Find the samples of all tasks in a folder of HEST-1k, or download them into the output."""
    names = list(dict.fromkeys(name for task in tasks for name in task.samples))
    if data is None:
        # As much again for the images that are put together, and for the cohorts.
        data = download_hest(output / "hest", samples=names, parts=_PARTS, room=2.0)[0]
    found = hest_samples(data)
    for task in tasks:
        for name in task.samples:
            if name not in found:
                raise InputError(
                    f"sample {name} of task {task.name}: {data / f'st/{name}.h5ad'} is not there; "
                    "get it with `strank hest download`, or leave the task out of `tasks`"
                )
            _check_patches(f"sample {name} of task {task.name}", found[name])
    return {name: found[name] for name in names}


def _check_patches(what: str, sample: HestSample) -> None:
    """Refuse patches that are not the paper's; where there is the slide, they are cut from it."""
    if sample.slide.is_file():
        return
    if not sample.patches.is_file():
        raise InputError(
            f"{what}: neither {sample.patches} nor {sample.slide} is there; get one of them with "
            "`strank hest download`"
        )
    patches = read_patches(sample.patches, hest_facts(sample).get("pixel_size_um_estimated"))
    um = patches.slide_um_per_pixel * patches.shrink
    if patches.side != _PIXELS or abs(um / _UM - 1) > _TOLERANCE:
        raise InputError(
            f"{what}: {sample.patches} has patches of {patches.side} pixels of {um:.3g} µm; those "
            f"of HEST, which the paper used, are of {_PIXELS} pixels of {_UM} µm"
        )


def sample_bytes(samples: Mapping[str, HestSample]) -> dict[str, list[int]]:
    """Sizes of the files of every sample: counts, and the image or what stands in for it."""
    return {name: [path.stat().st_size for path in _files(s)] for name, s in samples.items()}


def _files(sample: HestSample) -> tuple[Path, Path]:
    return sample.counts, sample.slide if sample.slide.is_file() else sample.patches


def unknown_patients(samples: Mapping[str, HestSample]) -> list[str]:
    """Name the samples whose patient HEST does not tell."""
    return [name for name, sample in samples.items() if not hest_patient(hest_facts(sample))]


def import_task(
    task: PaperTask,
    samples: Mapping[str, HestSample],
    cohort: Path,
    advance: Advance,
    *,
    jobs: int = 1,
) -> None:
    """Write each section that is not there yet; one whose patient is not known is of its own."""
    lacking = [name for name in task.samples if not is_whole(cohort / f"{name}.h5ad")]
    check_room(cohort, sum(sum(_to_write(samples[name])) for name in lacking))
    patients = {name: name for name in unknown_patients({n: samples[n] for n in lacking})}
    advance(len(task.samples) - len(lacking))
    data = samples[task.test].counts.parents[1]
    # Threads, since most is compression; processes would have to be started for it.
    read = Parallel(jobs, backend="threading", return_as="generator_unordered")
    for _ in read(delayed(_import_sample)(data, cohort, patients, name) for name in lacking):
        advance(1)


def _import_sample(data: Path, cohort: Path, patients: Mapping[str, str], name: str) -> None:
    # One by one, so that a run which was killed has what was read.
    images = cohort / "images"
    section = read_hest(data, section=name, patients=patients, image_folder=images)
    write_h5ad(section, cohort / f"{name}.h5ad")


def _to_write(sample: HestSample) -> list[int]:
    counts, image = _files(sample)
    return [counts.stat().st_size, 0 if image == sample.slide else image.stat().st_size]


def task_facts(task: PaperTask, samples: Mapping[str, HestSample], cohort: Path) -> dict[str, Any]:
    """Patients and checksums of a task; refuse fewer genes than the panel after the filter."""
    path = cohort / "task.json"
    if path.is_file():
        return dict(read_json(path))
    by_sample: dict[str, dict[str, Any]] = {"patients": {}, "n_spots": {}}
    by_sample |= {"counts_sha256": {}, "image_sha256": {}}
    genes: dict[str, set[str]] = {}
    for name in task.samples:
        # One at a time, since they may be large.
        section = read_section(cohort / f"{name}.h5ad")
        try:
            [kept] = PRESETS[f"paper-{task.name}"].filtered({name: section}).values()
        except InputError as error:
            raise InputError(f"task {task.name}, {samples[name].counts}: {error}") from error
        genes[name] = set(kept.var_names)
        by_sample["patients"][name] = str(section.obs["patient"].iloc[0])
        by_sample["n_spots"][name] = kept.n_obs
        by_sample["counts_sha256"][name] = counts_checksum(section)
        by_sample["image_sha256"][name] = section_info(section).image_sha256
    if (left := len(set.intersection(*genes.values()))) < _PANEL:
        # Without which the others share the most.
        odd = max(genes, key=lambda name: len(set.intersection(*_others(genes, name))))
        raise InputError(
            f"task {task.name}: the filter leaves {left} genes in all of its samples, and "
            f"{_PANEL} are needed; sample {odd} ({samples[odd].counts}) lacks most of those that "
            "the others share"
        )
    facts = {"validation": task.validation, "test": task.test, **by_sample}
    write_json(path, facts, seal=True)
    return facts


def _others(genes: Mapping[str, set[str]], name: str) -> list[set[str]]:
    return [found for other, found in genes.items() if other != name]
