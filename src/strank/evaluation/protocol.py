"""How methods are compared: folds, spots, panel, score; and what is questionable about it."""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd
from anndata import AnnData

from strank.cohort.filter import SpotFilter, filter_spots
from strank.cohort.folds import Fold, FoldUnit, fixed_folds, k_folds, make_folds, shared_patients
from strank.cohort.panel import PanelRule, check_genes, choose_panel, shared_genes
from strank.doors import parse_toml
from strank.errors import InputError, no_such, some
from strank.evaluation.paper_tasks import PAPER_TASKS
from strank.evaluation.scores import Depth
from strank.files import write_utf8
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
# What came later is left out of facts and hash where it is not used: older hashes stay.
_LATER = {"filter": None, "recipes": ()}
_SIDES = ("train", "validation", "test")
_SHORT = reprlib.Repr()
_SHORT.maxother = 200  # a fold or a filter, in which it is one of the values that is wrong
_FILTER_KEYS = {field.name for field in fields(SpotFilter)}


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
            raise InputError(f"{key} is {_SHORT.repr(value)}; it must be {what}")


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
        and all(_are_names(getattr(fold, side)) for side in _SIDES)
        for fold in value
    )


def _is_filter(value: Any) -> bool:
    return value is None or (
        isinstance(value, SpotFilter)
        and _is_number(value.min_genes, 0)
        and _is_number(value.min_spots, 0)
        and type(value.max_mito) in (int, float)
        and 0 < value.max_mito <= 1
    )


_ALLOWED: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "name": _TEXT,
    "description": _TEXT,
    "folds": (
        lambda value: value in _UNITS or _is_number(value, 2) or _are_folds(value),
        f"{' or '.join(_UNITS)}, a number of at least 2, or tables [[folds]] with name (text), "
        "train, test and, if any, validation (lists of sections, each once)",
    ),
    "filter": (
        _is_filter,
        "a table [filter] with min_genes and min_spots (numbers of at least 0) and max_mito "
        "(above 0, at most 1)",
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
            and all(size is None or _is_number(size, 1) for size in value)
            and len(set(value)) == len(value) > 0
        ),
        'a list of sizes, each once: numbers of at least 1, or "all"',
    ),
    "target_depth": _one_of(*get_args(Depth)),
    "methods": (_are_names, "a list of methods, each once"),
    "recipes": (_are_names, "a list of recipes, each once"),
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
    for fold in folds:
        of_test = {patients[name] for name in fold.test}
        if same := [name for name in fold.validation if patients[name] in of_test]:
            told.append(
                f"fold {fold.name}: validation section {some(same)} is of patient "
                f"{some(sorted({patients[name] for name in same}))}, who is tested: what it stops, "
                "it stops where that patient is predicted best"
            )
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
        or the folds themselves. Their ``validation`` sections stop a network that is stopped by
        named sections; all else trains on them, too.
    first_fold_only
        Whether the first of them is the only one.
    filter
        Which spots and genes of every section are kept, before anything else is done with it; all
        if ``None``.
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
        Losses that are compared if the user does not say; ``()`` leaves it to the program.
    recipes
        How they are trained, likewise: names as of `strank.fit`, or ``"usual"``.
    headline
        Score that methods are sorted by.
    seed
        Of all that is drawn.

    Raises
    ------
    InputError
        For a value that is not allowed.

    Examples
    --------
    >>> Protocol("mine", folds=5, n_genes=(50, 200)).facts["folds"]  # strank.benchmark(protocol=…)
    5
    """

    name: str
    description: str = ""
    folds: FoldUnit | int | tuple[Fold, ...] = "patient"
    first_fold_only: bool = False
    filter: SpotFilter | None = None
    panel: PanelRule | tuple[str, ...] = "variance"
    panel_from: PanelFrom = "training"
    n_genes: tuple[int | None, ...] = (50,)
    target_depth: Depth = "all"
    methods: tuple[str, ...] = ()
    recipes: tuple[str, ...] = ()
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
            plain["folds"] = [{"name": fold.name, **fold_facts(fold)} for fold in self.folds]
        unused = [key for key, value in _LATER.items() if getattr(self, key) == value]
        return {key: value for key, value in plain.items() if key not in unused}

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
        folds = facts.pop("folds") if isinstance(self.folds, tuple) else []
        tables = [("[filter]", facts.pop("filter"))] if self.filter else []
        tables += [("[[folds]]", fold) for fold in folds]
        lines = [f"# SHA-256 {self.sha256}", *_assignments(facts)]
        for title, table in tables:
            lines += ["", title, *_assignments(table)]
        return "\n".join(lines) + "\n"

    def write(self, path: Path | str) -> None:
        """Write ``to_toml`` to a file, to share it."""
        write_utf8(Path(path), self.to_toml())

    @property
    def sections(self) -> list[str] | None:
        """Sections that its folds name, sorted; ``None`` if any will do."""
        if not isinstance(self.folds, tuple):
            return None
        return sorted({name for fold in self.folds for name in fold.development + fold.test})

    def filtered(self, cohort: Mapping[str, AnnData]) -> dict[str, AnnData]:
        """Leave out the spots and genes that are not kept."""
        if self.filter is None:
            return dict(cohort)
        return {name: filter_spots(adata, self.filter) for name, adata in cohort.items()}

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
            Sections of the fold, filtered; those of the test are looked at only if ``panel_from``
            is ``"all"``.
        fold
            Of `make_folds`.
        n_genes
            One of the sizes of the protocol; of genes that are given, the first so many.

        Raises
        ------
        InputError
            If there are fewer such genes, or a section lacks one that is given.
        """
        names = fold.development + (fold.test if self.panel_from == "all" else ())
        sections = {name: cohort[name] for name in sorted(names)}
        if isinstance(self.panel, str):
            if self.filter and n_genes is not None:
                _check_number(sections, n_genes)
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


def _check_number(sections: Mapping[str, AnnData], n_genes: int) -> None:
    """Refuse a filter that leaves too few genes, naming the section that has the fewest."""
    if (left := len(shared_genes(sections))) < n_genes:
        fewest = min(sections, key=lambda name: sections[name].n_vars)
        raise InputError(
            f"{n_genes} genes asked for, and the filter leaves {left} in all of the sections "
            f"{some(sections)}; section {fewest} has the fewest, {sections[fewest].n_vars}"
        )


def fold_facts(fold: Fold) -> dict[str, list[str]]:
    """Sections of each side of a fold, sorted; of validation, if there are any."""
    sides = {side: sorted(getattr(fold, side)) for side in _SIDES}
    return {side: names for side, names in sides.items() if names or side != "validation"}


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
    content = parse_toml(path)
    try:
        return _protocol_of(content, path.stem)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


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
    if isinstance(table := given.get("filter"), dict) and table.keys() == _FILTER_KEYS:
        given["filter"] = SpotFilter(**table)
    if isinstance(given.get("panel"), list):
        given.setdefault("n_genes", ["all"])
    if isinstance(given.get("n_genes"), list):
        given["n_genes"] = [None if size == "all" else size for size in given["n_genes"]]
    return Protocol(**given)


def _fold_of(table: Any) -> Any:
    """Make a fold of a table; what is none is left for `Protocol` to refuse."""
    if not isinstance(table, dict) or table.keys() | {"validation"} != {"name", *_SIDES}:
        return table
    sides: Any = {side: table.get(side, []) for side in _SIDES}
    sides = {side: tuple(v) if isinstance(v, list) else v for side, v in sides.items()}
    return Fold(table["name"], **sides)


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
            "hest",
            "As HEST-Benchmark (Jaume et al., NeurIPS 2024): every patient held out once, genes "
            "chosen on all sections, ridge on 256 principal components.",
            panel_from="all",
            methods=("hest-ridge", "list"),
            headline="pearson_counts",
        ),
        *(
            Protocol(
                f"paper-{task.name}",
                f"The task {task.name} on HEST of Nishimura et al., NeurIPS 2025: one validation "
                "and one test sample, genes chosen on all, as published.",
                folds=(task.fold,),
                filter=SpotFilter(min_genes=200, max_mito=0.2, min_spots=3),
                panel_from="all",
                target_depth="panel",
                methods=tuple(task.scc),
                recipes=("published",),
                headline="scc",
            )
            for task in PAPER_TASKS.values()
        ),
    )
}
