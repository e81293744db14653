"""How methods are compared: folds, panel and score; and what is questionable about it."""

from __future__ import annotations

import hashlib
import json
import reprlib
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd
from anndata import AnnData

from strank.cohort.folds import Fold, FoldUnit, fixed_folds, k_folds, make_folds, shared_patients
from strank.cohort.panel import PanelRule, check_genes, choose_panel
from strank.errors import InputError, no_such, some
from strank.evaluation.scores import Depth
from strank.files import atomic_path
from strank.io.hest_bench import read_folds, read_panel

HEADLINES = (
    "depth_matched",
    "lift",
    "lift_relative",
    "deviance",
    "scc",
    "pearson",
    "pearson_counts",
)
PanelFrom = Literal["training", "all"]
_TEXT = (lambda value: isinstance(value, str), "text")
_UNITS, _RULES = get_args(FoldUnit), get_args(PanelRule)
_FOR_PEOPLE = ("name", "description")


def check_fields(values: Mapping[str, Any]) -> None:
    """Refuse a value that is not allowed, and say what is.

    Examples
    --------
    >>> check_fields({"seed": -1})
    Traceback (most recent call last):
    ...
    strank.errors.InputError: seed is -1; it must be a number of at least 0
    """
    for key, value in values.items():
        allowed, what = _ALLOWED[key]
        if not allowed(value):
            raise InputError(f"{key} is {reprlib.repr(value)}; it must be {what}")


def _one_of(*choices: str) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value in choices, "one of " + ", ".join(choices)


def _is_number(value: Any, least: int) -> bool:
    return type(value) is int and value >= least


def _are_names(value: Any) -> bool:
    named = isinstance(value, tuple) and all(isinstance(name, str) and name for name in value)
    return named and len(set(value)) == len(value)


def _are_folds(value: Any) -> bool:
    return isinstance(value, tuple) and all(
        isinstance(fold, Fold)
        and isinstance(fold.name, str)
        and _are_names(fold.train)
        and _are_names(fold.test)
        for fold in value
    )


_ALLOWED: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "name": _TEXT,
    "description": _TEXT,
    "folds": (
        lambda value: value in _UNITS or _is_number(value, 2) or _are_folds(value),
        f"{' or '.join(_UNITS)}, a number of at least 2, or tables [[folds]] with name (text), "
        "train and test (lists of sections, each once)",
    ),
    "first_fold_only": (lambda value: isinstance(value, bool), "true or false"),
    "panel": (
        lambda value: value in _RULES or (_are_names(value) and len(value) > 0),
        f"one of {', '.join(_RULES)}, or a list of genes, each once",
    ),
    "panel_from": _one_of(*get_args(PanelFrom)),
    "n_genes": (
        lambda value: (
            isinstance(value, tuple)
            and len(set(value)) == len(value) > 0
            and all(size is None or _is_number(size, 1) for size in value)
        ),
        'a list of sizes, each once: numbers of at least 1, or "all"',
    ),
    "target_depth": _one_of(*get_args(Depth)),
    "methods": (_are_names, "a list of methods, each once"),
    "headline": _one_of(*HEADLINES),
    "seed": (lambda value: _is_number(value, 0), "a number of at least 0"),
}


def of_folds(folds: Sequence[Fold], patients: Mapping[str, str]) -> list[str]:
    """Tell of patients on both sides, a single split, and few patients to test on.

    Examples
    --------
    >>> of_folds([Fold("1", ("A1",), ("A2",), ("A",))], {"A1": "A", "A2": "A"})[2]
    'only patient A is tested: that says little about other patients'
    """
    told = []
    if shared := [fold for fold in folds if fold.shared_patients]:
        both = sorted({patient for fold in shared for patient in fold.shared_patients})
        told.append(f"fold {some(fold.name for fold in shared)}: {shared_patients(both)}")
    if len(folds) == 1:
        told.append(
            f"a single split (test on {some(folds[0].test)}): how much the score depends on which "
            "sections are held out is not known"
        )
    tested = sorted({patients[name] for fold in folds for name in fold.test})
    if len(tested) < 3:
        told.append(
            f"only patient {some(tested)} {'is' if len(tested) == 1 else 'are'} tested: that says "
            "little about other patients"
        )
    return told


def of_genes(panel: str | tuple[str, ...], panel_from: str) -> list[str]:
    """Tell of genes in which test sections had a say, or may have had."""
    if panel_from == "all":
        return [
            "the genes are chosen on all sections, those of the test included: genes that stand "
            "out in the test sections are favoured"
        ]
    if not isinstance(panel, str):
        return ["the genes are given: whether test sections had a say in them is not known"]
    return []


def of_scores(headline: str, target_depth: str) -> list[str]:
    """Tell of scores that predicting depth raises, and of a target that hangs on the panel."""
    told = []
    if target_depth == "panel":
        told.append(
            "the target divides by the total over the panel, not over all measured genes: that of "
            "a gene depends on which others are in the panel"
        )
    if headline == "pearson_counts":
        told.append(
            "sorted by pearson_counts: log1p(counts) contains the depth of a spot, so that "
            "methods gain by predicting depth"
        )
    if headline in ("scc", "pearson"):
        told.append(
            f"sorted by {headline}: deep spots see a sparse gene more often, so that "
            "methods gain by predicting depth"
        )
    return told


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
        """Divide the sections of a cohort, whose patients are given, as `strank.cohort.folds`."""
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
        raise no_such("protocol", str(name), (*PRESETS, "a .toml file"))
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
