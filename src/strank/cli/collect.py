"""``strank collect``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from strank.cli.console import Json, fail, finish
from strank.cli.predict import pages
from strank.errors import InputError, some
from strank.extras import need
from strank.files import claimed

_Output = Annotated[
    Path, typer.Argument(help="Folder that the shares have written; a cohort, if they embed it.")
]


def collect(output: _Output, as_json: Json = False) -> None:
    """Put together what shares ([bold]--shard[/]) have done; name what failed or is missing.

    Of [bold]predict[/] slides.csv and the page are written; of [bold]embed[/] slides.csv, or of a
    cohort the features of each encoder are looked through. Exit code 1 if something is not done.

    [bold]Example:[/] strank collect slides

    [bold]Example:[/] strank collect strank-demo/cohort
    """
    from strank.slide_runs import RUN

    is_cohort = (output / "features").is_dir() and not (output / RUN).is_file()
    (_look_through if is_cohort else _collect_slides)(output, as_json)


def _collect_slides(output: Path, as_json: bool) -> None:
    need("jinja2")
    from strank.slide_runs import SLIDES, Records, write_slides

    with claimed(output):
        records = Records.of(output)
        table = write_slides(records)
        scored = records.facts["kind"] == "slides"
        written = pages(output) if scored else [output / SLIDES]
    states = {str(state): int(n) for state, n in table["state"].value_counts().items()}
    bad = table[table["state"] != "done"]
    finish(
        {"states": states, "not_done": dict(zip(bad["name"], bad["error"], strict=True))},
        outputs=written,
        as_json=as_json,
        lines=[f"{states.get('done', 0)} of {len(table)} slides are done. All: {written[-1]}"],
    )
    named = [f"{name} ({state})" for name, state in zip(bad["name"], bad["state"], strict=True)]
    _fail_of(named, f"of {len(table)} slides are not done")


def _look_through(cohort: Path, as_json: bool) -> None:
    from strank.cohort.folder import digest_of, features_path, section_names
    from strank.encoders.stored import fault_of

    encoders = sorted(path.name for path in (cohort / "features").iterdir() if path.is_dir())
    if not encoders:
        raise InputError(f"{cohort}: no features of any encoder; make them with `strank embed`")
    digests = {name: digest_of(cohort / f"{name}.h5ad") for name in section_names(cohort)}
    lines, done, bad = [], list[Path](), dict[str, str]()
    for encoder in encoders:
        paths = {name: features_path(cohort, encoder, name) for name in digests}
        lacks = {name: fault_of(path, digests[name]) for name, path in paths.items()}
        bad |= {f"{name} of {encoder}": why for name, why in lacks.items() if why}
        whole = [paths[name] for name, why in lacks.items() if not why]
        lines.append(f"{encoder}: {len(whole)} of {len(paths)} sections have their features.")
        done += whole
    states = {"done": len(done)} | Counter(bad.values())
    finish({"states": states, "not_done": bad}, outputs=done, as_json=as_json, lines=lines)
    named = [f"{name} ({why})" for name, why in bad.items()]
    _fail_of(named, f"of {len(done) + len(bad)} features of sections are not done")


def _fail_of(bad: list[str], told: str) -> None:
    if bad:
        fail(f"{len(bad)} {told}: {some(bad, 20)}")
        raise typer.Exit(1)
