"""What the commands of ``strank import`` share: their options, and what they say at the end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from strank.cli.console import finish, note

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = [
    "GeneId",
    "Images",
    "Mpp",
    "Names",
    "Output",
    "Patient",
    "Patients",
    "patient_table",
    "tell",
]

Output = Annotated[Path, typer.Option("-o", "--output", help="The cohort to write, or to add to.")]
Images = Annotated[
    list[Path] | None,
    typer.Option(
        "--image", help="The full-resolution H&E; of several runs one each, in their order."
    ),
]
Names = Annotated[
    str | None,
    typer.Option(
        "--section", help="Name, of several runs separated by commas; the folders' if not given."
    ),
]
Patient = Annotated[str | None, typer.Option(help="The patient of all sections.")]
Patients = Annotated[
    Path | None, typer.Option(help="CSV table with columns section,patient instead.")
]
Mpp = Annotated[
    float | None, typer.Option(help="µm per pixel of the image, where no file says it.")
]
GeneId = Annotated[bool, typer.Option("--gene-id", help="Name genes by Ensembl id, not symbol.")]


def patient_table(path: Path | None) -> dict[str, str] | None:
    """Read --patients, if it is given."""
    from strank.readers.sections import read_patients

    return None if path is None else read_patients(path)


def tell(sections: Mapping[str, AnnData], output: Path, as_json: bool) -> None:
    """Say what was read, what was left out, and where patches stand in for a slide."""
    from strank.cohort.contract import section_info

    summary = []
    for name, adata in sections.items():
        info = section_info(adata)
        dropped = {
            what: {str(why): int(n) for why, n in info.provenance.get(key, {}).items() if n}
            for key, what in {"dropped_spots": "spots", "dropped_features": "features"}.items()
        }
        if n_controls := int(info.provenance.get("dropped_controls", 0)):
            dropped["features"]["control probes"] = n_controls
        for what, reasons in dropped.items():
            if reasons:
                told = ", ".join(f"{n} {why}" for why, n in reasons.items())
                note(f"section {name}: dropped {what}: {told}")
        if info.provenance.get("image_from") == "patches":
            note(f"section {name}: no slide, so patches stand in; there is white between them")
        summary.append(
            {
                "section": name,
                "patient": adata.obs["patient"].iloc[0],
                "technology": info.technology,
                "spots": adata.n_obs,
                "genes": adata.n_vars,
                "um_per_pixel": round(info.um_per_pixel, 4),
                "dropped": dropped["spots"],
                "dropped_features": dropped["features"],
            }
        )
    finish(
        {"cohort": str(output), "sections": summary},
        as_json=as_json,
        lines=[
            *(
                f"{e['section']}: {e['technology']}, patient {e['patient']}, {e['spots']} spots, "
                f"{e['genes']} genes, {e['um_per_pixel']} µm per pixel"
                for e in summary
            ),
            *_genes_lines(sections),
            f"Wrote {len(summary)} sections to {output}. Next: strank embed {output}",
        ],
    )


def _genes_lines(sections: Mapping[str, AnnData]) -> list[str]:
    """Where sections measure different genes, how many they share."""
    from strank.cohort.panel import all_genes

    union = all_genes(sections)
    shared = sum(union.isin(adata.var_names).astype(int) for adata in sections.values())
    in_all = int((shared == len(sections)).sum())
    if in_all == len(union):
        return []
    return [
        f"{in_all} of {len(union)} genes are measured in all of these sections; a panel is chosen "
        "among those, or of all with `strank fit --union`"
    ]
