"""A protocol: which sections train and test, for which genes, against what; cited by its hash."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd
from anndata import AnnData

from strank.cohort.panel import PanelRule, check_genes, choose_panel
from strank.cohort.splits import Fold, FoldUnit, fixed_folds, k_folds, make_folds
from strank.errors import InputError, some
from strank.evaluation.allowed import HEADLINES, Depth, PanelFrom, check_fields
from strank.evaluation.caveats import of_folds, of_genes, of_scores
from strank.files import atomic_path
from strank.readers.hest_bench import read_folds, read_panel

__all__ = ["HEADLINES", "PRESETS", "Protocol", "from_hest", "get_protocol"]

_FOR_PEOPLE = ("name", "description")


@dataclass(frozen=True)
class Protocol:
    """How methods are compared, so that others can do the same.

    Attributes
    ----------
    name, description
        For people; they do not count in the hash.
    folds
        ``"patient"`` or ``"section"``: each is held out once; a number: so many folds, by patient;
        or the folds themselves.
    first_fold_only
        Whether the first of them is the only one.
    panel
        How genes are chosen, as in `strank.cohort.panel.choose_panel`; or the genes themselves.
    panel_from
        On which sections of a fold: those of ``"training"``, or ``"all"``, the test included.
    n_genes
        Sizes of the panel; ``None`` for all genes that vary, or that are given.
    target_depth
        What the counts are divided by in the target of ``scc`` and ``pearson``: the total over
        ``"all"`` measured genes, or over the ``"panel"``.
    methods
        What is compared if the user does not say; ``()`` leaves it to the program.
    headline
        Score that methods are sorted by.
    seed
        Of all that is drawn.

    Raises
    ------
    InputError
        For a value that is not allowed.
    """

    name: str
    description: str = ""
    folds: FoldUnit | int | tuple[Fold, ...] = "patient"
    first_fold_only: bool = False
    panel: PanelRule | tuple[str, ...] = "variance"
    panel_from: PanelFrom = "training"
    n_genes: tuple[int | None, ...] = (50,)
    target_depth: Depth = "all"
    methods: tuple[str, ...] = ()
    headline: str = "depth_matched"
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            if isinstance(value := getattr(self, field.name), list):
                object.__setattr__(self, field.name, tuple(value))
        check_fields({field.name: getattr(self, field.name) for field in fields(self)})

    @property
    def facts(self) -> dict[str, Any]:
        """All fields in plain types, as in a file."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        plain["n_genes"] = ["all" if size is None else size for size in self.n_genes]
        if isinstance(self.folds, tuple):
            plain["folds"] = [
                {"name": fold.name, "train": sorted(fold.train), "test": sorted(fold.test)}
                for fold in self.folds
            ]
        return plain

    @property
    def sha256(self) -> str:
        """SHA-256 of all fields that decide results, in hexadecimal."""
        facts = {key: value for key, value in self.facts.items() if key not in _FOR_PEOPLE}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def to_toml(self) -> str:
        """Write the protocol as text that `get_protocol` reads.

        Examples
        --------
        >>> print(PRESETS["section"].to_toml().split("n_genes")[1])
         = [50]
        target_depth = "all"
        methods = []
        headline = "depth_matched"
        seed = 0
        """
        facts = self.facts
        # In TOML, tables come after all plain values.
        tables = facts.pop("folds") if isinstance(self.folds, tuple) else []
        lines = [f"# SHA-256 {self.sha256}", *_assignments(facts)]
        for table in tables:
            lines += ["", "[[folds]]", *_assignments(table)]
        return "\n".join(lines) + "\n"

    def write(self, path: Path | str) -> None:
        """Write ``to_toml`` to a file, to share it."""
        with atomic_path(Path(path)) as part:
            part.write_text(self.to_toml(), encoding="utf-8")

    def make_folds(self, patients: Mapping[str, str]) -> list[Fold]:
        """Divide the sections of a cohort, whose patients are given, as `strank.cohort.splits`."""
        if isinstance(self.folds, tuple):
            folds = fixed_folds(self.folds, patients)
        elif isinstance(self.folds, int):
            folds = k_folds(patients, self.folds, seed=self.seed)
        else:
            folds = make_folds(patients, self.folds)
        return folds[:1] if self.first_fold_only else folds

    def choose_panel(
        self, cohort: Mapping[str, AnnData], fold: Fold, n_genes: int | None
    ) -> pd.Index:
        """Choose the genes of a fold.

        Parameters
        ----------
        cohort
            Sections of the fold; those of the test are looked at only if ``panel_from`` is
            ``"all"``.
        fold
            Of `make_folds`.
        n_genes
            One of the sizes of the protocol; of genes that are given, the first so many.

        Raises
        ------
        InputError
            If there are fewer such genes, or a section lacks one that is given.
        """
        names = fold.train + (fold.test if self.panel_from == "all" else ())
        sections = {name: cohort[name] for name in sorted(names)}
        if isinstance(self.panel, str):
            return choose_panel(sections, n_genes, by=self.panel)
        if n_genes is not None and n_genes > len(self.panel):
            raise InputError(f"{n_genes} genes asked for; the protocol lists {len(self.panel)}")
        return check_genes(sections, self.panel[:n_genes])

    def warnings(self, folds: Sequence[Fold], patients: Mapping[str, str]) -> tuple[str, ...]:
        """Say what is questionable about it, with these folds, of sections of these patients."""
        return (
            *of_folds(folds, patients),
            *of_genes(self.panel, self.panel_from),
            *of_scores(self.headline, self.target_depth),
        )


def get_protocol(name: Path | str) -> Protocol:
    """Take a protocol by its name, or read it from a file.

    Parameters
    ----------
    name
        One of `PRESETS`; a ``.toml`` file, as `Protocol.write` makes it; or the folder of a task of
        HEST-Benchmark, as in `from_hest`.

    Raises
    ------
    InputError
        For an unknown name, or a file that cannot be used; it names file and key.

    Examples
    --------
    >>> get_protocol("strank").folds
    'patient'
    """
    if str(name) in PRESETS:
        return PRESETS[str(name)]
    path = Path(name)
    if path.is_dir():
        return from_hest(path)
    if path.suffix != ".toml":
        raise InputError(f"no protocol {str(name)!r}; choose {', '.join(PRESETS)} or a .toml file")
    try:
        return _protocol_of(tomllib.loads(path.read_text(encoding="utf-8")), path.stem)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: not a readable TOML file ({error})") from error


def from_hest(folder: Path | str) -> Protocol:
    """Make a protocol of the splits and genes of a task of HEST-Benchmark.

    Parameters
    ----------
    folder
        The task, ``bench_data/IDC`` say, with ``splits`` and ``var_50genes.json``. Sections of the
        cohort must have the names of its samples.

    Raises
    ------
    InputError
        For a file that is absent or cannot be used.
    """
    folder = Path(folder)
    panel = read_panel(folder / "var_50genes.json")
    folds, _ = read_folds(folder)
    description = f"Folds and genes of the task {folder.name} of HEST-Benchmark."
    return replace(
        PRESETS["hest"],
        name=folder.name,
        description=description,
        folds=folds,
        panel=panel,
        n_genes=(None,),
    )


def _protocol_of(content: Mapping[str, Any], name: str) -> Protocol:
    keys = [field.name for field in fields(Protocol)]
    if unknown := [key for key in content if key not in keys]:
        raise InputError(f"unknown key {some(unknown)}; there are {', '.join(keys)}")
    given: dict[str, Any] = {"name": name, **content}
    if isinstance(given.get("folds"), list):
        given["folds"] = [_fold_of(table) for table in given["folds"]]
    if isinstance(given.get("panel"), list):
        given.setdefault("n_genes", ["all"])
    if isinstance(given.get("n_genes"), list):
        given["n_genes"] = [None if size == "all" else size for size in given["n_genes"]]
    return Protocol(**given)


def _fold_of(table: Any) -> Any:
    """Make a fold of a table; what is none is left for `Protocol` to refuse."""
    if not isinstance(table, dict) or set(table) != {"name", "train", "test"}:
        return table
    sides = (tuple(side) if isinstance(side := table[k], list) else side for k in ("train", "test"))
    return Fold(table["name"], *sides)


def _assignments(values: Mapping[str, Any]) -> list[str]:
    # JSON of text, numbers, truth values and lists is TOML, but for one character.
    return [
        f"{key} = {json.dumps(value, ensure_ascii=False)}".replace("\x7f", "\\u007f")
        for key, value in values.items()
    ]


PRESETS: Mapping[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "strank",
            "Every patient held out once; genes chosen on training sections; sorted by a score "
            "that knows nothing of depth.",
        ),
        Protocol(
            "section",
            "As strank, but every section is held out once: others of its patient may train.",
            folds="section",
        ),
        Protocol(
            "paper",
            "As the experiments on HEST of Nishimura et al., NeurIPS 2025: one test section, genes "
            "chosen on all. They name the test section; here it is the first.",
            folds="section",
            first_fold_only=True,
            panel_from="all",
            target_depth="panel",
            methods=("mse", "poisson", "nb", "rank", "pair", "pcc", "list"),
            headline="scc",
        ),
        Protocol(
            "hest",
            "As HEST-Benchmark (Jaume et al., NeurIPS 2024): every patient held out once, genes "
            "chosen on all sections, ridge on 256 principal components.",
            panel_from="all",
            methods=("hest-ridge", "list"),
            headline="pearson_counts",
        ),
    )
}
