"""One page of a benchmark, which opens without a network and sends nothing."""

from __future__ import annotations

import hashlib
import json
from base64 import b64encode
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from strank.cohort.folder import section_names
from strank.errors import InputError
from strank.evaluation.calibration import ChangeSums, calibration_line, change_sums
from strank.files import claims, write_bytes
from strank.report.benchmark.data import (
    GENES,
    Benchmark,
    TestSection,
    gene_tables,
    leaderboard,
    map_of,
    map_values,
    open_benchmark,
    prediction_files,
    test_sections,
)
from strank.report.benchmark.parts import Parts, parts_beside, to_json

# Bytes of all maps together; of a cohort with more, sections are left out evenly.
_BUDGET = 500_000_000

_PICTURE_BYTES = 150_000

_SCRIPTS = ("", "_genes", "_maps")


@dataclass(frozen=True)
class Report:
    """What was written: a page of so many bytes, and what it lacks, in words."""

    path: Path
    n_bytes: int
    notes: tuple[str, ...]
    #: Folder of genes and maps that would make the page too large; None where it holds all.
    files: Path | None = None


@claims("folder")
def write_report(folder: Path | str, *, cohort: Path | str | None = None) -> Report:
    """Make one page of a benchmark: methods, depth, ceilings, genes, maps, calibration.

    ``report.html`` in its folder opens without a network and sends nothing. It holds all it needs;
    or, where that would be more than 20 MB, genes and maps lie in ``report_files`` beside it, and
    are loaded when they are asked for: then both belong together.

    Parameters
    ----------
    folder
        Of `strank.benchmark`.
    cohort
        Folder with the counts, if it is no longer where the benchmark found it. Without counts or
        images the page lacks the observed maps, the H&E and the calibration, and says so.

    Returns
    -------
    Report
        ``path`` and ``n_bytes`` of the page, ``notes`` of what it lacks, and ``files`` beside it.

    Raises
    ------
    strank.errors.InputError
        If the folder is no benchmark, or a file of it is damaged.

    Examples
    --------
    >>> import strank
    >>> strank.report.write_report("out", cohort="cohort").path  # doctest: +SKIP
    """
    benchmark = open_benchmark(Path(folder))
    notes: list[str] = []
    counts = _cohort_folder(benchmark, cohort, notes)
    path, beside = (benchmark.folder / name for name in ("report.html", "report_files"))
    with parts_beside(beside) as parts:
        tables = []
        for number, table in enumerate(gene_tables(benchmark)):
            about = {key: table[key] for key in ("encoder", "genes", "patients")}
            tables.append({**about, "part": parts.add(f"genes-{number}", table)})
        maps, calibration = _of_sections(benchmark, counts, parts, notes)
        if parts.files:
            notes.append(
                f"Genes and maps lie in {beside.name} beside this page "
                f"({parts.n_bytes / 1e6:.1f} MB): keep and send both"
            )
        data = {
            "reference": benchmark.facts["reference"],
            "headline": benchmark.facts["protocol"].get("headline", "depth_matched"),
            "encoders": benchmark.facts["encoders"],
            "genes": [str(size) for size in benchmark.facts["genes"]],
            "leaderboard": leaderboard(benchmark),
            "tables": tables,
            **maps,
            "calibration": calibration,
            **parts.in_page(beside.name),
        }
        html = _render(benchmark, data, notes)
    write_bytes(path, html)
    return Report(path, len(html), tuple(notes), beside if parts.files else None)


def _cohort_folder(
    benchmark: Benchmark, cohort: Path | str | None, notes: list[str]
) -> Path | None:
    given = benchmark.facts.get("cohort") if cohort is None else cohort
    if given is None:
        notes.append("No observed counts and no H&E: the benchmark names no cohort; give `cohort`")
        return None
    try:
        section_names(Path(given))
    except InputError as error:
        # Asked for, it must be there; remembered, it may have gone.
        if cohort is not None:
            raise
        notes.append(f"No observed counts and no H&E: {error}; name the cohort with `cohort`")
        return None
    return Path(given)


def _of_sections(
    benchmark: Benchmark, cohort: Path | None, parts: Parts, notes: list[str]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Make maps and calibration, in one walk through the predictions."""
    maps: list[dict[str, Any]] = []
    panels: list[list[str]] = []
    sums: dict[tuple[str, str], dict[tuple[str, str, str], ChangeSums]] = defaultdict(dict)
    share, number = _share(benchmark), 0
    for number, section in enumerate(test_sections(benchmark, cohort, notes), start=1):
        for key, found in _changes(section).items():
            sums[key][section.fold, section.name, section.patients] = found
        if int(number * share) > int((number - 1) * share):
            if (panel := section.genes.tolist()) not in panels:
                panels.append(panel)
            about = {key: getattr(section, key) for key in ("fold", "patients")}
            about |= {"section": section.name, "panel": panels.index(panel)}
            maps.append(about | _map(section, f"map-{number}", parts, notes))
    if number == 0:
        notes.append("No maps and no calibration: there are no predictions for a small panel")
    elif len(maps) < number:
        notes.append(f"Maps of {len(maps)} of {number} sections: those of all would be too large")
    return {"maps": maps, "panels": panels, "block": GENES}, _calibration(sums)


def _map(section: TestSection, name: str, parts: Parts, notes: list[str]) -> dict[str, Any]:
    """Keep a map in parts: of the section, and of some genes each."""
    blocks = [parts.add(f"{name}-{n}", block) for n, block in enumerate(map_values(section))]
    return {"part": parts.add(name, map_of(section, notes)), "blocks": blocks}


def _share(benchmark: Benchmark) -> float:
    """Which part of the sections has room on the page."""
    files = prediction_files(benchmark)
    if not files:
        return 0.0
    sections = benchmark.facts["sections"].values()
    n_genes = int(files[0][0].parents[1].name)
    values = sum(int(s["n_spots"]) for s in sections) * n_genes * (len(files[0]) + 1)
    return min(1.0, _BUDGET / max(4 / 3 * values + _PICTURE_BYTES * len(sections), 1))


def _changes(section: TestSection) -> dict[tuple[str, str], ChangeSums]:
    if section.observed is None:
        return {}
    measured = section.genes.isin(section.observed.var_names)
    counts = section.observed[:, section.genes[measured]].X
    depth = section.observed.obs["library_size"].to_numpy()
    return {
        (encoder, method): change_sums(scores[:, measured].astype(np.float64), counts, depth)
        for (encoder, method), scores in section.scores.items()
        if (encoder, method) in section.log_rates
    }


def _calibration(
    sums: Mapping[tuple[str, str], Mapping[tuple[str, str, str], ChangeSums]],
) -> list[dict[str, Any]]:
    """Lines of every method: of each section, and pooled; of known, new and all patients."""
    lines = []
    for (encoder, method), found in sums.items():
        for patients in ("known", "new", "all"):
            kept = {k: v for k, v in found.items() if patients in ("all", k[2])}
            if not kept:
                continue
            lines.append(
                {
                    **{"encoder": encoder, "method": method, "patients": patients},
                    "pooled": calibration_line(reduce(add, kept.values())),
                    "sections": [
                        {"section": name, **calibration_line(sums)}
                        for (_, name, _), sums in kept.items()
                    ],
                }
            )
    return lines


def _render(benchmark: Benchmark, data: Mapping[str, Any], notes: list[str]) -> bytes:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("strank.report.benchmark"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    scripts = [get_plotlyjs(), *(_source(environment, f"benchmark{part}.js") for part in _SCRIPTS)]
    content = to_json(data)
    n_bytes = sum(map(len, scripts)) + len(content)
    html = environment.get_template("benchmark.html").render(
        facts=benchmark.facts,
        everything=json.dumps(benchmark.facts, indent=2, ensure_ascii=False),
        notes=notes,
        css=Markup(_source(environment, "benchmark.css")),
        scripts=[Markup(script) for script in scripts],
        hashes=[_hash(script) for script in scripts],
        data=Markup(content),
        beside=data["beside"] if data["files"] else "",
        size=f"{n_bytes / 1e6:.1f} MB",
    )
    return html.encode(errors="replace")


def _source(environment: jinja2.Environment, name: str) -> str:
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def _hash(script: str) -> str:
    """Name a script in the page's policy; the browser runs no other."""
    return f"'sha256-{b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
