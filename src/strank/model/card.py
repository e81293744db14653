"""The card of a model: what it is, on what it was trained, how well it does."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strank.errors import InputError, some
from strank.files import markdown_table, read_facts, read_written
from strank.shown import few_names

if TYPE_CHECKING:
    import pandas as pd

_TAGS = ("spatial-transcriptomics", "gene-expression", "histology", "pathology", "learning-to-rank")
_SCORES = {"scc": "SCC", "depth_matched": "depth-matched SCC", "lift": "lift"}
_SCORES |= {"deviance": "deviance explained", "slope": "calibration slope"}
_LISTED = 30


@dataclass(frozen=True)
class Evidence:
    """How well a model does, as `strank.evaluation.held_out.Evaluation` wrote it."""

    summary: pd.DataFrame  # Its `summary.csv`
    protocol: str  # What was scored
    warnings: tuple[str, ...]  # What limits what the scores say


def read_evidence(folder: Path | str, provenance: Mapping[str, Any]) -> Evidence:
    """Read the folder of ``strank evaluate`` of the model with this provenance."""
    folder = Path(folder)
    facts = read_facts(folder / "evaluation.json")
    evaluated = facts.get("model")
    if evaluated is not None and evaluated != json.loads(json.dumps(dict(provenance))):
        raise InputError(f"{folder}: the evaluation of another model; evaluate this one")
    protocol = str(facts.get("protocol"))
    if evaluated is None:
        protocol = f"models made in this way, {protocol}"
    try:
        summary = read_written(folder / "summary.csv")
        summary[["method", "section", *_SCORES]]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: not the tables of `strank evaluate` ({error})") from error
    told = facts.get("warnings", [])
    if not isinstance(told, list) or not all(isinstance(warning, str) for warning in told):
        raise InputError(f"{folder}/evaluation.json: warnings: not a list of texts")
    return Evidence(summary, protocol, tuple(told))


def method_of(provenance: Mapping[str, Any]) -> str:
    """How tables name what a model was made by, as `strank.fitting.method.Method` does."""
    return str(provenance.get("method", {}).get("name", "own model"))


def short_facts(
    panel: Sequence[str], encoder: Mapping[str, Any], provenance: Mapping[str, Any]
) -> dict[str, str]:
    """Say what matters most of a model, in a few lines."""
    sections = provenance.get("sections", {})
    patients = len({known["patient"] for known in sections.values()})
    spots = sum(known["n_spots"] for known in sections.values())
    of = f", of {patients} patient{'s' * (patients != 1)}, {spots:,} spots" if sections else ""
    told = {
        "genes": few_names(panel),
        "features": f"{encoder['name']}, {encoder['n_features']} a spot",
        "trained on sections": few_names(list(sections)) + of,
    }
    calibration = provenance.get("calibration") or {}
    return told | ({"scores": calibration["told"]} if "told" in calibration else {})


def write_card(
    panel: Sequence[str],
    encoder: Mapping[str, Any],
    provenance: Mapping[str, Any],
    evidence: Evidence | None,
    *,
    licence: str | None = None,
    for_hub: bool = False,
) -> str:
    """Describe a model in Markdown, for the hub with the header that it reads."""
    method = method_of(provenance)
    body = model_card(panel, encoder, provenance, method, evidence)
    return hub_header(encoder, method, evidence, licence) + body if for_hub else body


def model_card(
    panel: Sequence[str],
    encoder: Mapping[str, Any],
    provenance: Mapping[str, Any],
    method: str,
    evidence: Evidence | None,
) -> str:
    """Describe a model in Markdown; `RankModel.card` says what is in it."""
    genes = f"{len(panel)} gene{'s' * (len(panel) != 1)}"
    parts = {
        f"strank model: {_escaped(encoder['name'])}, {genes}": (
            "Scores the relative expression of genes in spots of H&E-stained tissue, from image "
            "features: the natural log of a gene's rate, up to a constant of each section and gene."
        ),
        "What a difference of scores means": _meaning(provenance),
        "What it was trained on": _training(provenance),
        "Image features": _table(["fact", "value"], encoder.items()),
        "Genes": (
            f"{genes} (chosen: {_escaped(provenance.get('panel_choice', 'not recorded'))}): "
            f"{_escaped(some(panel, _LISTED))}."
        ),
        "How well": "Not evaluated." if evidence is None else _how_well(method, evidence),
        "What not to use it for": _LIMITS,
        "How to use it": _USE.format(json.dumps(encoder["name"])),
        "Citation": _CITATION,
    }
    sections = [
        f"{'#' * (1 + (n > 0))} {title}\n\n{text}" for n, (title, text) in enumerate(parts.items())
    ]
    return "\n\n".join(sections) + "\n"


def hub_header(
    encoder: Mapping[str, Any], method: str, evidence: Evidence | None, licence: str | None
) -> str:
    """Head a card by the YAML that the hub reads: licence, tags, and how well the model does."""
    from huggingface_hub import EvalResult, ModelCardData

    results = []
    if evidence is not None:
        summary = evidence.summary
        mean = summary[(summary["section"] == "mean") & (summary["method"] == method)]
        results = [
            EvalResult(
                task_type="other",
                task_name="relative gene expression",
                dataset_type="spatial-transcriptomics",
                dataset_name=" ".join(evidence.protocol.split()),
                metric_type=score,
                metric_name=title,
                metric_value=round(float(mean[score].iloc[0]), 4),
            )
            for score, title in _SCORES.items()
            if mean[score].notna().any()
        ]
    data = ModelCardData(
        library_name="strank",
        license=licence,
        model_name=f"strank model of {encoder['name']}" if results else None,
        eval_results=results or None,
        pipeline_tag="other",
        tags=list(_TAGS),
    )
    return f"---\n{data.to_yaml()}\n---\n\n"


def _meaning(known: Mapping[str, Any]) -> str:
    told = (known.get("calibration") or {"told": "not recorded"})["told"]
    sure = known.get("uncertainty", "")
    meaning = f"{_escaped(told[:1].upper() + told[1:])}."
    return f"{meaning} Standard errors tell {_escaped(sure)}." if sure else meaning


def _training(known: Mapping[str, Any]) -> str:
    sections = known.get("sections", {})
    rows = [
        (name, entry["patient"], entry["n_spots"], entry["counts_sha256"][:12])
        for name, entry in sections.items()
    ]
    patients = {entry["patient"] for entry in sections.values()}
    spots = sum(entry["n_spots"] for entry in sections.values())
    how = known.get("method", {}).get("name", "not recorded")
    spread = f", dispersion {_escaped(known['dispersion'])}" if "dispersion" in known else ""
    return (
        f"Sections: {len(sections)}; patients: {len(patients)}; spots: {spots}, of "
        f"{known.get('spot_diameter_um', '?')} µm. Method: {_escaped(how)}{spread}. Written by "
        f"strank {_escaped(known.get('strank_version', '?'))}.\n\n"
        + _table(["section", "patient", "spots", "SHA-256 of counts"], rows)
    )


def _how_well(method: str, evidence: Evidence) -> str:
    summary = evidence.summary
    mean = summary[summary["section"] == "mean"]
    rows = [[row["method"], *_scores(row)] for row in mean.to_dict("records")]
    scored = [name for name in summary["section"].unique() if name != "mean"]
    return "\n\n".join(
        [
            f"{_escaped(evidence.protocol)}; scored on {_escaped(some(scored, _LISTED))}; means "
            f"over genes and sections. The model is {_escaped(method)}, the rest are baselines; "
            "'within section' tells what these sections give by themselves. SCC (Spearman against "
            "log1p(CP10k)) also rewards knowing depth alone; depth-matched SCC and lift do not. "
            "Deviance and slope ask for the size of differences: a slope of 1 (median of genes) is "
            "right, below it they are too large.",
            _table(["method", *_SCORES.values()], rows),
            *(f"**Note:** {_escaped(warning)}." for warning in evidence.warnings),
        ]
    )


def _scores(row: Mapping[str, Any]) -> list[Any]:
    """Scores of a method; the slope with its interval, where there are sections enough for one."""
    ends = [row.get(f"slope_{end}", math.nan) for end in ("low", "high")]
    if all(map(math.isfinite, ends)):
        interval = f"{_cell(row['slope'])} [{_cell(ends[0])}, {_cell(ends[1])}]"
        return [interval if score == "slope" else row[score] for score in _SCORES]
    return [row[score] for score in _SCORES]


def _table(columns: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    return markdown_table(columns, ([_escaped(_cell(value)) for value in row] for row in rows))


def _cell(value: Any) -> str:
    if isinstance(value, float) and value != value:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _escaped(text: object) -> str:
    """Text that Markdown shows as it is, whatever a section or gene is called."""
    # Without what a terminal takes for a command.
    shown = "".join(c for c in " ".join(str(text).split()) if c.isprintable())
    return re.sub(r"([\\`*_\[\]<>|~#!&$])", r"\\\1", shown)


_USE = """\
```bash
strank model pull OWNER/NAME -o model
strank predict slide.svs --model model -o scores
```

```python
from strank import RankModel

model = RankModel.from_pretrained("OWNER/NAME")
scores = model.predict(adata)  # spots with features in adata.obsm[{}]
```"""

_LIMITS = """\
- Diagnosis, prognosis or the choice of a treatment: it is a tool of research.
- Levels of expression: scores compare spots of one section for one gene, and neither sections nor
  genes with each other.
- Tissue unlike that above: other organs, species, stains, scanners or sizes of spots are untested.
- Proof on its own patients: scores on sections of the patients above say little about new ones.
- Anything that the licence of its image encoder or of its training data forbids."""

_CITATION = (
    "Nishimura, Hirose, Bise, Shiku and Kojima. *Learning Relative Gene Expression Trends from "
    "Pathology Images in Spatial Transcriptomics.* NeurIPS 2025, "
    "[arXiv:2512.06612](https://arxiv.org/abs/2512.06612)."
)
