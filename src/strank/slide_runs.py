"""Many slides: which they are, by a list, names or a manifest, and what became of each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import pandas as pd
from anndata import AnnData

from strank.cohort.in_memory import name_of
from strank.cohort.store import read_section
from strank.errors import InputError, some
from strank.files import read_facts, read_written, write_json, write_table
from strank.progress import Advance, Say
from strank.slides.slide import Slide, open_told, slide_of
from strank.storage import Claim
from strank.units import Outcome, outcomes
from strank.version import __version__
from strank.where import Where

# A slide, its file, or a section of a cohort, of which the image is taken.
Subject: TypeAlias = Path | str | Slide | AnnData
_Kind = TypeVar("_Kind", bound=Subject)
# What is kept of every slide of a run.
SLIDES = "slides.csv"
_KNOWN = ["name", "slide", "state"]
_FOUND = {
    "slides": ["scores", "n_tiles", "odd_share", "warnings", "seconds", "error"],
    "features": ["features", "n_tiles", "warnings", "seconds", "error"],
}
RUN, _RECORD = "run.json", "record.json"
_MISSING = "not done: no record of this run; start its share again"


@dataclass(frozen=True)
class SlideEntry:
    """A slide of a run, by its name."""

    name: str
    subject: Subject
    um_per_pixel: float | None = None  # if the list says it of this one
    model: str | None = None
    carried: Mapping[str, Any] = field(default_factory=dict)  # to the table, as it is

    @property
    def file(self) -> str:
        """What it is called in messages."""
        if isinstance(self.subject, AnnData):
            return f"section {name_of(self.subject)}"
        return str(self.subject.path if isinstance(self.subject, Slide) else self.subject)


def is_many(slides: Any) -> bool:
    """Whether these are several slides, or the table of some."""
    if isinstance(slides, (str, Path)):
        return Path(slides).suffix == ".csv"
    return not isinstance(slides, (Slide, AnnData))


def entries_of(slides: Any, output: Path | str | None) -> list[SlideEntry]:
    """Name slides: those of a table or its file, or of a list or mapping."""
    if isinstance(slides, (str, Path, pd.DataFrame)):
        return slides_of_manifest(slides)
    if not isinstance(slides, Mapping):
        slides = list(slides)
        files = (Path(given) for given in slides if isinstance(given, (str, Path)))
        table = next((path for path in files if path.suffix == ".csv"), None)
        if table is not None and len(slides) > 1:
            raise InputError(f"{table}: give a list of slides alone, and all of them in it")
        if table is not None:
            return slides_of_manifest(table)
    return named_slides(slides, output)


def slides_of_manifest(given: Path | str | pd.DataFrame) -> list[SlideEntry]:
    """Read a table with a row a slide; all that is wrong with it is said at once.

    Columns are ``path``, from the table's folder, and if wanted ``name``, ``mpp`` and ``model``.
    """
    what = "`slides`" if isinstance(given, pd.DataFrame) else str(given)
    place = Path() if isinstance(given, pd.DataFrame) else Path(given).parent
    table = _as_text(given)
    if "path" not in table:
        raise InputError(f"{what}: has no column path; it has {some(table.columns, 20)}")
    if not len(table):
        raise InputError(f"{what}: lists no slides")
    rows = table.to_dict("records")
    entries, wrong = [_entry(row, place) for row in rows], list[str]()
    bad = [f"{row['mpp']!r} of {row['path']}" for row in rows if not _is_scale(row.get("mpp", ""))]
    names = [entry.name.casefold() for entry in entries]
    places = dict.fromkeys(file for e in entries for file in (e.subject, e.model) if file)
    for told, found in (
        ("no such file:", [path for path in map(str, places) if not Path(path).exists()]),
        ("slides of the same name (give a column name):", _twice(names)),
        ("no name of a folder:", [repr(e.name) for e in entries if not _is_name(e.name)]),
        ("no µm per pixel: mpp", bad),
    ):
        wrong += [f"{told} {some(dict.fromkeys(found), 20)}"] if found else []
    if wrong:
        raise InputError(f"{what}: {'; '.join(wrong)}")
    return entries


def _as_text(given: Path | str | pd.DataFrame) -> pd.DataFrame:
    if isinstance(given, pd.DataFrame):
        return given.astype(object).where(given.notna(), "").astype(str)
    path = Path(given)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        return read_written(path, dtype=str, keep_default_na=False)
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: not a readable table; save it as CSV in UTF-8") from error


def _entry(row: Mapping[str, str], place: Path) -> SlideEntry:
    path, model, scale = place / row["path"], row.get("model", ""), row.get("mpp", "")
    return SlideEntry(
        row.get("name") or path.stem,
        path,
        float(scale) if scale and _is_scale(scale) else None,
        str(place / model) if model else None,
        {k: v for k, v in row.items() if k not in ("path", *_KNOWN, *_FOUND["slides"])},
    )


def _is_scale(text: str) -> bool:
    try:
        return not text or 0 < float(text) < float("inf")
    except ValueError:
        return False


def _twice(names: list[str]) -> list[str]:
    return [name for name in names if names.count(name) > 1]


def _is_name(name: str) -> bool:
    return bool(name) and name != ".." and Path(name).name == name


def named_slides(
    subjects: Iterable[_Kind] | Mapping[str, _Kind], output: Path | str | None
) -> list[SlideEntry]:
    """Name slides by their files, sections by themselves; what shares a folder is refused."""
    if not (given := list(subjects)):
        raise InputError("no slides are given")
    if isinstance(subjects, Mapping):
        entries = [SlideEntry(*pair) for pair in subjects.items()]
        if output is None:
            return entries
    else:
        entries = [SlideEntry(_name_of(subject), subject) for subject in given]
    taken = set()
    for name in (entry.name for entry in entries):
        if not _is_name(name):
            raise InputError(f"slide {name!r}: no name of a folder in `output`; give it another")
        # Folders of Windows and macOS do not tell capitals from small letters.
        if name.casefold() in taken:
            place = "a name" if output is None else Path(output) / name
            raise InputError(
                f"two slides are called {name}, and would share {place}; give one of them "
                "apart, with another `output`"
            )
        taken.add(name.casefold())
    return entries


def _name_of(subject: Subject) -> str:
    if isinstance(subject, AnnData):
        return name_of(subject)
    return Path(subject.path if isinstance(subject, Slide) else subject).stem


def open_subject(
    subject: Subject, um_per_pixel: float | None = None, override: bool = False
) -> tuple[Slide, AnnData | None]:
    """Open a slide; of a section, its image and itself."""
    if isinstance(subject, Slide):
        if um_per_pixel is not None:
            raise InputError(f"{subject.path} is open at its scale; leave `um_per_pixel` out")
        return subject, None
    if not isinstance(subject, AnnData):
        path = Path(subject)
        if path.suffix != ".h5ad":
            return open_told(path, um_per_pixel, override), None
        subject = read_section(path)
    if um_per_pixel is not None:
        raise InputError(
            f"section {name_of(subject)} knows its µm per pixel; leave `um_per_pixel` out"
        )
    return slide_of(subject), subject


@dataclass(frozen=True)
class Records:
    """What a run in a folder is made from, and what became of each unit, in a folder of its own."""

    folder: Path
    facts: dict[str, Any]  # on which results depend
    units: dict[str, dict[str, Any]]  # what is known of each beforehand

    def begin(self, where: Where) -> None:
        """Keep it for other shares and for who collects them; refuse shares of another run."""
        shares = None if where.share is None else where.share[1]
        content = {"shards": shares, "facts": self.facts, "units": self.units}
        path = self.folder / RUN
        self.folder.mkdir(parents=True, exist_ok=True)
        # Of shares that begin at once, one writes.
        claim = Claim.take(path, wait=True)
        try:
            before: dict[str, Any] = {}
            # A damaged one is made anew, but not under the hands of other shares.
            with nullcontext() if shares else suppress(InputError):
                before = read_facts(path) if path.is_file() else {}
            _check_kind(self.folder, before, self.facts["kind"])
            if shares and before.get("shards"):
                _check_same(path, before, content)
            else:
                write_json(path, content)
        finally:
            if claim is not None:
                claim.release()

    @classmethod
    def of(cls, folder: Path) -> Records:
        """Read what was begun there."""
        path = folder / RUN
        if not path.is_file():
            raise InputError(f"{folder}: no run of units to collect ({RUN} is not there)")
        content = read_facts(path)
        try:
            facts = dict(content["facts"])
            _ = _FOUND[facts["kind"]]
            return cls(folder, facts, dict(content["units"]))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: not as a run writes it; run again") from error

    def keep(self, name: str, outcome: Outcome[dict[str, Any]]) -> None:
        """Keep what became of a unit: its facts, or its error, and what was said of it."""
        record: dict[str, Any] = {
            "state": "failed" if outcome.error else "done",
            "error": outcome.error,
            "result": outcome.result,
            "said": list(outcome.said),
            "seconds": outcome.seconds,
            "host": outcome.host,
            "strank_version": __version__,
            "run": _digest(self.facts),
        }
        # On a full disk the record is missing, and so it is told by who collects.
        with suppress(InputError):
            write_json(self.folder / name / _RECORD, record)

    def read(self) -> dict[str, dict[str, Any]]:
        """Read the records of all units; of one without a record of this run say so."""
        return {name: self._record(name) for name in self.units}

    def _record(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        with suppress(InputError):
            found = read_facts(self.folder / name / _RECORD)
        if found.get("run") == _digest(self.facts):
            return found
        return {"state": "missing", "error": _MISSING, "result": None, "seconds": 0.0}


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _check_kind(folder: Path, before: Mapping[str, Any], kind: str) -> None:
    """Refuse a folder that holds results of another kind, which would lose its table."""
    facts = before.get("facts")
    held = facts.get("kind", kind) if isinstance(facts, Mapping) else kind
    if held != kind:
        what = "scores of slides" if held == "slides" else "features of slides"
        raise InputError(f"{folder}: holds {what}; choose another `output`")


def _check_same(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    now = json.loads(json.dumps(now))
    different = [
        "number of shards" if key == "shards" else key for key in now if before.get(key) != now[key]
    ]
    if "facts" in different:
        known = before.get("facts") or {}
        facts = now["facts"]
        different.remove("facts")
        different += [name for name in facts if known.get(name) != facts[name]]
    if different:
        raise InputError(
            f"{path.parent}: shards of another {some(different)} (there are {before['shards']}); "
            f"give all shards the same, or remove {path} and begin anew"
        )


def run_slides(
    entries: list[SlideEntry],
    work: Callable[[SlideEntry, Say], dict[str, Any]],
    output: Path,
    where: Where,
    facts: dict[str, Any],
    *,
    tell: Say,
    advance: Advance = lambda _: None,
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Work on slides, whatever fails; keep what became of each, and of a whole run the table."""
    about = {e.name: {"slide": e.file, "carried": dict(e.carried)} for e in entries}
    records = Records(output, {"kind": "slides", **facts}, about)
    records.begin(where)
    done: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    chosen = where.mine(entries, key=lambda entry: entry.name)
    for outcome in outcomes(work, chosen, where, say=tell, all_threads=True):
        entry = outcome.unit
        for line in outcome.said:
            tell(line)
        if outcome.error:
            told = (
                outcome.error if entry.file in outcome.error else f"{entry.file}: {outcome.error}"
            )
            failed[entry.name] = told
            tell(told)
            outcome = Outcome(entry, None, told, outcome.said, outcome.seconds, outcome.host)
        else:
            done[entry.name] = outcome.result or {}
        records.keep(entry.name, outcome)
        advance(1)
    if where.share is None:
        write_slides(records)
    order = [entry.name for entry in chosen]
    return {name: done[name] for name in order if name in done}, failed


def check_done(
    done: Mapping[str, Any], failed: Mapping[str, str], output: Path, where: Where
) -> None:
    """Raise if slides of a run failed, after all others."""
    if failed:
        told = f"{len(failed)} of {len(done) + len(failed)} slides failed: {some(failed, 20)}"
        why = output / SLIDES if where.share is None else f"{_RECORD} of each in {output}"
        raise InputError(f"{told}; {why} says why")


def write_slides(records: Records) -> pd.DataFrame:
    """Make the table of what became of each slide, from the records."""
    rows, columns = [], _FOUND[records.facts["kind"]]
    for name, record in records.read().items():
        known, found = records.units[name], record["result"] or {}
        row = {"name": name, "slide": known["slide"], "state": record["state"], **known["carried"]}
        row |= {column: found.get(column) for column in columns}
        row |= {"seconds": record["seconds"], "error": record["error"]}
        rows.append(row | {"warnings": "; ".join(found.get("warnings", ()))})
    carried = dict.fromkeys(column for row in rows for column in row if column not in columns)
    table = pd.DataFrame(rows, columns=[*carried, *columns]).astype({"n_tiles": "Int64"})
    write_table(records.folder / SLIDES, table)
    return table
