"""The card of a model, and models to and from the Hugging Face hub."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd

from strank.errors import InputError, some
from strank.files import atomic_path, read_json
from strank.hub import download, upload
from strank.model.rank_model import RankModel
from strank.version import __version__

_MODEL = "model.json"

_FILES = (_MODEL, "README.md", "*.safetensors")

_TAGS = ("spatial-transcriptomics", "gene-expression", "histology", "pathology", "learning-to-rank")

_LISTED = 30


@dataclass(frozen=True)
class Evidence:
    """How well a model does, as `strank.evaluation.held_out.Evaluation` wrote it.

    Attributes
    ----------
    summary
        Its ``summary.csv``.
    protocol
        What was scored.
    warnings
        What limits what the scores say.
    """

    summary: pd.DataFrame
    protocol: str
    warnings: tuple[str, ...]


def read_evidence(folder: Path | str, model: RankModel) -> Evidence:
    """Read the folder of ``strank evaluate``.

    Raises
    ------
    InputError
        If it is not one, or another model was evaluated.
    """
    folder = Path(folder)
    facts = read_json(folder / "evaluation.json")
    evaluated = facts.get("model")
    if evaluated is not None and evaluated != json.loads(json.dumps(dict(model.provenance))):
        raise InputError(f"{folder}: the evaluation of another model; evaluate this one")
    protocol = str(facts.get("protocol"))
    if evaluated is None:
        protocol = f"models made in this way, {protocol}"
    try:
        summary = pd.read_csv(folder / "summary.csv")
        summary[["method", "section", "scc", "depth_matched", "lift"]]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: not the tables of `strank evaluate` ({error})") from error
    return Evidence(summary, protocol, tuple(facts.get("warnings", ())))


def model_card(
    model: RankModel, evidence: Evidence | None = None, *, licence: str | None = None
) -> str:
    """Describe a model in Markdown, under the header that the hub reads.

    What it is, what it was trained on, how well it does, what not to use it for, how to use it.

    Parameters
    ----------
    model
        The model.
    evidence
        Its evaluation; without one the card says that there is none.
    licence
        As the hub abbreviates it, ``"mit"`` say.

    Examples
    --------
    >>> from strank.neural.heads import LinearHead
    >>> facts = {"name": "mine", "version": "1", "fields": [], "n_features": 3}
    >>> model = RankModel(LinearHead(3, 1), pd.DataFrame(index=["ERBB2"]), facts, {})
    >>> "1 gene (chosen: not recorded): ERBB2." in model_card(model)
    True
    """
    known, n_genes = model.provenance, len(model.panel)
    genes = f"{n_genes} gene{'s' * (n_genes != 1)}"
    parts = {
        f"strank model: {_escaped(model.encoder['name'])}, {genes}": (
            "Scores the relative expression of genes in spots of H&E-stained tissue, from image "
            "features: the natural log of a gene's rate, up to a constant of each section and gene."
        ),
        "What it was trained on": _training(known),
        "Image features": _table(["fact", "value"], model.encoder.items()),
        "Genes": (
            f"{genes} (chosen: {_escaped(known.get('panel_choice', 'not recorded'))}): "
            f"{_escaped(some(model.panel.index, _LISTED))}."
        ),
        "How well": "Not evaluated." if evidence is None else _how_well(model, evidence),
        "What not to use it for": _LIMITS,
        "How to use it": _USE.format(json.dumps(model.encoder["name"])),
        "Citation": _CITATION,
    }
    sections = [
        f"{'#' * (1 + (n > 0))} {title}\n\n{text}" for n, (title, text) in enumerate(parts.items())
    ]
    return "\n\n".join([_header(licence), *sections]) + "\n"


def push_model(folder: Path | str, target: str, *, card: str, private: bool = False) -> str:
    """Put a model and its card on the hub, or into a folder in the hub's layout.

    Parameters
    ----------
    folder
        Of the model.
    target
        ``owner/name`` on the hub; a folder starts with ``./`` or ``/``.
    card
        Becomes ``README.md``.
    private
        Only for those who are let in, on the hub.

    Returns
    -------
    str
        Where it is.

    Raises
    ------
    InputError
        For a damaged model, a folder with other things in it, and as `strank.hub.upload` says.
    """
    RankModel.load(folder)
    with TemporaryDirectory() as place:
        ready = Path(place) / "model"
        _copy(Path(folder), ready)
        (ready / "README.md").write_text(card)
        if _on_hub(target):
            return upload(ready, target, message=f"Model by strank {__version__}", private=private)
        if private:
            raise InputError(f"{target}: a folder, to which --private does not apply")
        return str(_place(ready, Path(target).expanduser()))


def pull_model(source: str, folder: Path | str, *, revision: str | None = None) -> Path:
    """Get a model from the hub, or from a folder in the hub's layout, and check it.

    Parameters
    ----------
    source
        As ``target`` in `push_model`.
    folder
        To write.
    revision
        Branch, tag or commit on the hub; the newest if ``None``.

    Raises
    ------
    InputError
        If it is not a model or damaged, for a folder with other things in it, and as
        `strank.hub.download` says.
    """
    if _on_hub(source):
        found = download(source, revision=revision, allow_patterns=_FILES)
    elif revision is not None:
        raise InputError(f"{source}: a folder, which has no --revision")
    else:
        found = Path(source).expanduser()
    if not (found / _MODEL).is_file():
        raise InputError(f"{source}: not a model of strank (it has no {_MODEL})")
    RankModel.load(found)
    return _place(found, Path(folder))


def _on_hub(name: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) is not None


def _place(model: Path, folder: Path) -> Path:
    if folder.exists() and not (folder / _MODEL).is_file():
        raise InputError(f"{folder}: exists and is not a model; choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder) as part:
        _copy(model, part)
    return folder


def _copy(model: Path, folder: Path) -> None:
    """Copy what belongs to a model, and nothing that happens to lie beside it."""
    folder.mkdir()
    for file in (file for pattern in _FILES for file in model.glob(pattern)):
        shutil.copyfile(file, folder / file.name)


def _header(licence: str | None) -> str:
    # JSON's strings are YAML's, whatever is in them.
    facts = {"library_name": "strank", "pipeline_tag": "other", "tags": list(_TAGS)}
    facts |= {"license": licence} if licence else {}
    return "\n".join(["---", *(f"{key}: {json.dumps(facts[key])}" for key in facts), "---"])


def _training(known: Mapping[str, Any]) -> str:
    sections = known.get("sections", {})
    rows = [
        (name, entry["patient"], entry["n_spots"], entry["counts_sha256"][:12])
        for name, entry in sections.items()
    ]
    patients = {entry["patient"] for entry in sections.values()}
    spots = sum(entry["n_spots"] for entry in sections.values())
    how = known.get("method", {}).get("name", "not recorded")
    return (
        f"Sections: {len(sections)}; patients: {len(patients)}; spots: {spots}, of "
        f"{known.get('spot_diameter_um', '?')} µm. Method: {_escaped(how)}. Written by strank "
        f"{_escaped(known.get('strank_version', '?'))}.\n\n"
        + _table(["section", "patient", "spots", "SHA-256 of counts"], rows)
    )


def _how_well(model: RankModel, evidence: Evidence) -> str:
    summary = evidence.summary
    mean = summary[summary["section"] == "mean"]
    scores = {"scc": "SCC", "depth_matched": "depth-matched SCC", "lift": "lift"}
    rows = mean[["method", *scores]].itertuples(index=False)
    scored = [name for name in summary["section"].unique() if name != "mean"]
    return "\n\n".join(
        [
            f"{_escaped(evidence.protocol)}; scored on {_escaped(some(scored, _LISTED))}; means "
            f"over genes and sections. The model is {_escaped(model.method)}, the rest are "
            "baselines. SCC (Spearman against log1p(CP10k)) also rewards knowing depth alone; the "
            "other two do not.",
            _table(["method", *scores.values()], rows),
            *(f"**Note:** {_escaped(warning)}." for warning in evidence.warnings),
        ]
    )


def _table(columns: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    cells = [columns, ["---"] * len(columns), *([_escaped(_cell(v)) for v in row] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _cell(value: Any) -> str:
    if isinstance(value, float) and value != value:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _escaped(text: object) -> str:
    """Text that Markdown shows as it is, whatever a section or gene is called."""
    return re.sub(r"([\\`*_\[\]<>|~#!&$])", r"\\\1", " ".join(str(text).split()))


_USE = """\
```bash
strank model pull OWNER/NAME -o model
strank predict slide.svs --model model -o scores
```

```python
from strank import RankModel

model = RankModel.load("model")
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
