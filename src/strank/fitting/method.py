"""A method: head, objective and recipe; and `fit`, which makes a model by one."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from torch.nn import Module

from strank.cohort.folds import Aim
from strank.cohort.in_memory import Sections, as_sections
from strank.cohort.store import open_cohort, read_cohort
from strank.encoders.catalogue import library_of
from strank.errors import InputError, no_such
from strank.extras import need
from strank.fitting.exact import ExactOptions, Solve, fit_exact, solve_hest_ridge, solve_ridge
from strank.fitting.objectives import OBJECTIVES, Objective, get_objective
from strank.model.rank_model import RankModel
from strank.neural.heads import HEADS
from strank.neural.recipe import RECIPES, Finetune, Machine, Recipe, get_recipe

if TYPE_CHECKING:
    from strank.fitting.networks import MakeHead

OWN_HEAD, OWN_RECIPE = "own head", "own recipe"


class _Head(NamedTuple):
    """What is trained under the name of a head."""

    kind: str
    with_linear: bool = False


def head_choices() -> dict[str, _Head]:
    """Heads by name; those with ``+linear`` are the mean with the exact linear head."""
    names = [name for name in HEADS if name not in ("linear", "linear-network", "mean")]
    found = {"linear": _Head("linear-network")} | {name: _Head(name) for name in names}
    return found | {f"{name}+linear": _Head(name, with_linear=True) for name in names}


class _Solved(NamedTuple):
    """Another exact solution of squared error, beside the usual one."""

    title: str
    solve: Solve


_EXACT = "exact"
_RIDGES = {
    _EXACT: _Solved("ridge", solve_ridge),
    "centred": _Solved("centred ridge", partial(solve_ridge, centred=True)),
    "hest": _Solved("hest-ridge", solve_hest_ridge),
}


@dataclass(frozen=True)
class Method:
    """What is fitted, and how.

    Without a recipe it is the usual one: exact where there is such a solver, else ``"default"``,
    or ``"finetune"`` for an image network.

    Examples
    --------
    >>> Method("linear", "list").name, Method("mlp", "list").name, Method("linear", "mse").name
    ('linear, list', 'mlp, list', 'ridge')
    >>> Method("linear", "list", "published", library_size=False).name
    'linear, list, published, no library size'
    """

    #: Of `head_choices`, ``"own head"``, or an image network that is trained end to end.
    head: str
    #: Name of an objective.
    loss: str
    recipe: str | None = None
    #: Whether its likelihood knows the depth of a spot.
    library_size: bool = True

    def __post_init__(self) -> None:
        choices = (*RECIPES, *self._solvers)
        if not (self.needs_images or self.head in (OWN_HEAD, *head_choices())):
            raise no_such("head", self.head, head_choices())
        if self.recipe is None:
            object.__setattr__(self, "recipe", self._usual)
        if self.recipe not in (OWN_RECIPE, *choices):
            raise no_such("recipe", self.recipe, choices)
        if self.recipe in RECIPES and get_recipe(self.recipe).published:
            self.check_published()
            if self.loss != "pair" and not get_recipe(self.recipe).pair_entropy:
                # There is no other entropy term that could be left out.
                object.__setattr__(self, "recipe", "published")
        if not (self.library_size or self.log_rates):
            those = [name for name, objective in OBJECTIVES.items() if objective.log_rates]
            raise InputError(
                f"{self.loss} has no exposure that `library_size` could be left out of, as "
                f"{', '.join(those)} have"
            )

    def check_published(self) -> None:
        """Refuse what the published recipe does not train."""
        if self.head != "linear" or self.objective.published is None:
            those = [name for name, objective in OBJECTIVES.items() if objective.published]
            raise InputError(
                f"the published recipe is not for {self.head}, {self.loss}, but for `head` linear "
                f"and `loss` {', '.join(those)}"
            )

    @property
    def objective(self) -> Objective:
        """What it is fitted by."""
        return get_objective(self.loss)

    @property
    def _solvers(self) -> dict[str, Solve]:
        if self.head != "linear" or self.objective.exact is None:
            return {}
        if self.loss == "mse":
            return {recipe: ridge.solve for recipe, ridge in _RIDGES.items()}
        return {_EXACT: self.objective.exact}

    @property
    def _usual(self) -> str:
        if self._solvers:
            return _EXACT
        return "finetune" if self.needs_images else "default"

    @property
    def name(self) -> str:
        """What tables show."""
        if self.is_exact and self.loss == "mse":
            return _RIDGES[str(self.recipe)].title
        recipe = f", {self.recipe}" * (self.recipe != self._usual)
        return f"{self.head}, {self.loss}" + recipe + ", no library size" * (not self.library_size)

    @property
    def facts(self) -> dict[str, str | bool]:
        """Its parts and its name, as a model's provenance has them."""
        return {"name": self.name, **asdict(self)}

    @property
    def log_rates(self) -> bool:
        """Whether its scores are log rates."""
        return self.objective.log_rates

    @property
    def solver(self) -> Solve | None:
        """The exact solver, or ``None`` where it is trained step by step."""
        return self._solvers.get(str(self.recipe))

    @property
    def is_exact(self) -> bool:
        """Whether it is solved exactly; then no seed plays a part."""
        return self.solver is not None

    @property
    def needs_images(self) -> bool:
        """Whether its head is an image network that is trained end to end."""
        return self.head.startswith(("timm:", "hf:"))

    @classmethod
    def of_model(cls, model: RankModel) -> Method | None:
        """How a model was made, if it says so."""
        facts = model.provenance.get("method")
        return facts and cls(**{key: facts[key] for key in facts if key != "name"})


REFERENCE = Method("linear", "list")
RIDGE, CENTRED_RIDGE, HEST_RIDGE = (Method("linear", "mse", recipe) for recipe in _RIDGES)


def fit(
    cohort: Sections | Path | str,
    *,
    head: str | MakeHead = "linear",
    loss: str = "list",
    recipe: str | Recipe | None = None,
    encoder: str = "morphology",
    n_genes: int | None = 50,
    genes: Sequence[str] | None = None,
    union: bool = False,
    penalty: float | None = None,
    aim: Aim | None = None,
    library_size: bool = True,
    borrow: bool = False,
    max_memory: float | None = None,
    dask: str | None = None,
    finetune: str | Finetune | None = None,
    validation: Sequence[str] | None = None,
    seed: int | None = None,
    machine: Machine | None = None,
    folder: Path | str | None = None,
    resume: bool = False,
    verbose: bool = False,
) -> RankModel:
    """Fit a head to the sections of a cohort, by any objective.

    The linear head is fitted exactly where the objective has a solver (``"list"``, ``"pair"``,
    ``"poisson"``, ``"nb"``, ``"mse"``) and no recipe is named: no seed, no steps, one optimum.

    Everything else is a network. It is stopped by sections that it does not see: the patients (or
    sections, where there are fewer than three patients) take turns at that, each for a network of
    its own, and the model gives the mean of their scores; so every section is trained on, too.

    Parameters
    ----------
    cohort
        Training sections with features: the folder of a cohort, of which one section is read at a
        time; from `read_cohort(..., encoder=...)`; or any AnnData with raw counts in ``X`` or
        ``layers["counts"]``, ``obsm[encoder]``, ``obsm["spatial"]`` and ``obs["patient"]``, in a
        mapping of names, in a list, or in one that ``obs["section"]`` divides. They stay as they
        are, and their counts on disk if they are there (``backed="r"``); what is filled in is said
        in a `UserWarning`. With images to train the encoder. A network needs two.
    head
        ``"linear"``, ``"mlp"``, ``"context"`` (which sees neighbouring spots), ``"mlp+linear"`` or
        ``"context+linear"`` (the mean of the networks' scores and of the exact linear head's, by
        the list), a name of your own in `strank.neural.heads.HEADS`, or what makes a module from
        the number of features and of genes, such as ``functools.partial(MLPHead, width=64)``.
    loss
        ``"list"``, ``"pair"``, ``"rank"`` (margin 1), ``"rank-published"`` (margin 0), ``"pcc"``
        (Pearson over all spots of a batch, as published), ``"section-pcc"`` (within sections),
        ``"mse"``, ``"poisson"`` or ``"nb"``. The exact negative binomial has a level for each
        section and gene, as the list has; a network's has one a gene, and learns its dispersions.
    recipe
        How it is solved: ``"exact"``; or a network is trained: ``"default"``, ``"published"`` (the
        paper's procedure to the letter, stopped by ``validation``; ``"published-no-entropy"``
        leaves out the entropy term that its code adds to the pair loss) or a
        `strank.neural.recipe.Recipe`. For the linear head and ``"mse"`` also ``"centred"`` and
        ``"hest"``, the ridge of HEST-Benchmark. The usual one if ``None``.
    encoder
        Whose features; with ``finetune`` an image network such as ``"timm:resnet18"``.
    n_genes
        Size of the panel, chosen by variance on these sections; ``None`` for all genes that vary.
    genes
        The panel, if it is given.
    union
        Whether a gene may be measured in some of the sections only; the others have no say in its
        likelihood. For the list and the pair objective.
    penalty
        Exact only: in counts; chosen for each gene if ``None``, by leaving out patients or
        sections, as ``aim`` says. From one section nothing can be left out: then it is a default,
        and the provenance says so.
    aim
        Whose sections the scores are for. ``"new-patients"``, as ``None``: penalties are chosen by
        patients left out in turn, and the scores of each gene are multiplied by what held for
        those, so that a difference is a log fold change on a patient not seen. A model of one
        patient can know nothing of others: its scores show order, not size, and
        ``provenance["calibration"]`` says so. ``"known-patients"``: by sections left out, for other
        sections of the same patients. Of networks it says whether patients (from three on) or
        sections take turns; they are not calibrated.
    library_size
        Whether the likelihood knows the depth of a spot; ``False``, for an ablation, takes counts
        as if all spots had the same. For the list, pair, Poisson and negative binomial.
    borrow
        Exact list or pair only: let sparse genes borrow from the others, as `STRankRegressorCV`
        says.
    max_memory
        GiB for features, counts, solver and results, beside the program and what is given; 4 if
        ``None``. What does not fit is read from disk whenever it is needed, but for the exact
        ``"poisson"`` and ``"mse"``, which take all spots at once. A section at a time is in memory
        whatever this says. Not with ``finetune``, which reads images.
    dask
        Exact list, pair and nb only, for panels of more than 256 genes: address of a scheduler of
        Dask, or its ``.json``, on whose workers blocks of so many are fitted, each in
        ``max_memory``. They read features on disk where these are, and counts that do not fit from
        a file in ``TMPDIR``, so both must be on a disk that all see; what fits into memory travels
        to each.
    finetune
        Train the encoder too: ``"lora"``, ``"last-2"`` (or another number of blocks), ``"full"``,
        ``"frozen"``, or a `strank.neural.recipe.Finetune`. A single network is trained.
    validation
        Networks only: sections of the cohort that stop a single network, which does not see them,
        rather than turns. The published recipe must have them.
    seed
        Networks only: of first weights, batches, dropout and pairs; 0 if ``None``. On one machine,
        the same model.
    machine
        Networks only: devices, precision and so on; one device if ``None``.
    folder
        Networks only: for checkpoints, logs and learning curves.
    resume
        Networks only: go on from the checkpoints in ``folder``.
    verbose
        Whether to show progress, on stderr.

    Returns
    -------
    RankModel
        Its ``panel`` has the counts of each gene, and of an exact fit penalty and status (and
        ``dispersion``, of a negative binomial);
        ``provenance["networks"]`` has best epoch and score on the held-out sections of each
        network. A trained encoder comes as its ``backbone``.

    Raises
    ------
    InputError
        For counts that are not raw, a section or patient without a name, features that are absent
        or not the same in all sections, a panel that is not measured,
        a section without counts, an unknown head, loss, recipe or section, an option that does not
        belong to this method, fewer than two sections for a network, a folder of another training,
        a loss that is not finite, and an image or network that cannot be read.

    Examples
    --------
    Two sections with raw counts and features named "mine":

    >>> import numpy as np
    >>> import pandas as pd
    >>> from anndata import AnnData
    >>> rng, cohort = np.random.default_rng(0), {}
    >>> for name in ("A1", "B1"):
    ...     features = rng.normal(size=(50, 2))
    ...     counts = rng.poisson(5 * np.exp(features @ [[0.5, -0.2], [0.0, 0.8]]))
    ...     adata = AnnData(counts, var=pd.DataFrame(index=["ERBB2", "CD3E"]))
    ...     adata.obs = adata.obs.assign(patient=name, library_size=1000.0)
    ...     adata.obsm = {"mine": features, "spatial": 100.0 * rng.permutation(100).reshape(50, 2)}
    ...     cohort[name] = adata
    >>> model = fit(cohort, encoder="mine", n_genes=2)
    >>> model.method, list(model.panel.index)
    ('linear, list', ['CD3E', 'ERBB2'])
    >>> model.predict(cohort["B1"]).shape
    (50, 2)
    >>> fit(cohort, encoder="mine", n_genes=2, loss="mse").method
    'ridge'
    """
    named = head if isinstance(head, str) else OWN_HEAD
    method = Method(named, loss, _recipe_name(recipe, finetune), library_size)
    _check_finetune(method, finetune, union)
    exact = {"penalty": penalty, "borrow": borrow, "dask": dask}
    exact |= {"max_memory": max_memory} if finetune else {}
    room = 4.0 if max_memory is None else max_memory
    networks: dict[str, Any] = {"validation": validation, "seed": seed, "machine": machine}
    networks |= {"folder": folder, "resume": resume}
    _refuse_ignored(method, exact if method.solver is None else networks)
    _check_given(networks)
    sections = as_sections(_opened(cohort, encoder, finetune), on_disk=finetune is None)
    _check_union(method, union)
    panel: dict[str, Any] = {"encoder": encoder, "n_genes": n_genes, "genes": genes, **_aimed(aim)}
    if method.solver is not None:
        options = ExactOptions(penalty, borrow, room, dask, verbose)
        panel["union"] = union
        return fit_exact(sections, method.solver, options, method=method.facts, **panel)
    recipe = recipe if isinstance(recipe, Recipe) else get_recipe(str(method.recipe))
    _check_recipe(method, recipe, machine)
    if recipe.published:
        _check_as_published(method, finetune, validation)
    networks |= {"seed": seed or 0, "verbose": verbose, "method": method.facts, **panel}
    how = Finetune(finetune) if isinstance(finetune, str) else finetune
    need("lightning", *_packages(encoder, how))
    if how is None:
        from strank.fitting.networks import fit_networks

        make, with_linear = _maker(head)
        networks |= {"with_linear": with_linear, "union": union, "max_memory": room}
        return fit_networks(sections, make, method.objective, recipe, **networks)
    from strank.fitting.finetune import fit_finetuned

    make, with_linear = _maker(head, centred=False)
    if with_linear:
        raise InputError(f"the features of {head} would not stay: leave +linear or `finetune` out")
    return fit_finetuned(sections, how, make, method.objective, recipe, **networks)


def _opened(given: Sections | Path | str, encoder: str, finetune: object) -> Sections:
    """Open the folder of a cohort, or take sections as they are; images are read by the file."""
    if not isinstance(given, (str, Path)):
        return given
    return open_cohort(given, encoder) if finetune is None else read_cohort(given)


def _packages(encoder: str, how: Finetune | None) -> list[str]:
    """List what reads images, builds an image network and trains it, where that is asked for."""
    if how is None:
        return []
    adapters = "peft" if how.mode == "lora" else None
    return [name for name in ("cv2", library_of(encoder), adapters) if name is not None]


def _aimed(aim: Aim | None) -> dict[str, Aim]:
    if aim is not None and aim not in get_args(Aim):
        raise no_such("aim", aim, get_args(Aim))
    return {"aim": aim or "new-patients"}


def _recipe_name(recipe: str | Recipe | None, finetune: object) -> str | None:
    if isinstance(recipe, Recipe):
        return OWN_RECIPE
    return "finetune" if recipe is None and finetune is not None else recipe


def _check_finetune(method: Method, finetune: object, union: bool) -> None:
    if method.needs_images:
        raise InputError(f"{method.head} is no head: give it as `encoder`, with `finetune`")
    if finetune is not None and (method.is_exact or union):
        what = "`union`" if union else f"`recipe` {method.recipe}"
        raise InputError(f"{what} is not for `finetune`; leave it out")


def _check_union(method: Method, union: bool) -> None:
    if union and not method.objective.unmeasured:
        raise InputError(
            f"{method.loss} cannot tell a gene that a section does not measure from one without "
            "counts: leave `union` out, or use the list or pair objective"
        )


def _check_recipe(method: Method, recipe: Recipe, machine: Machine | None) -> None:
    if recipe.list_size is not None and method.loss != "list":
        raise InputError(f"{method.loss} has no lists: leave list_size out of the `recipe`")
    if recipe.monitor == "loss" and machine is not None and machine.devices * machine.nodes > 1:
        raise InputError(
            "what is stopped by its own loss, as the published recipe is, is of one process: take "
            "one of `devices`, `nodes`"
        )


def _check_as_published(method: Method, finetune: object, validation: Sequence[str] | None) -> None:
    method.check_published()
    if finetune is not None:
        raise InputError("the published recipe is for features: leave `finetune` or `recipe` out")
    if validation is None:
        raise InputError(
            "the published recipe is stopped by sections that are named: give `validation`"
        )


def _check_given(options: Mapping[str, Any]) -> None:
    names = options["validation"]
    listed = isinstance(names, Collection) and not isinstance(names, str) and len(names) > 0
    if not (names is None or listed):
        raise InputError(f"`validation` is a list of sections; got {names!r}")
    if options["resume"] and options["folder"] is None:
        raise InputError("`resume` goes on from the checkpoints in a `folder`: give that too")


def _refuse_ignored(method: Method, ignored: Mapping[str, Any]) -> None:
    for name, value in ignored.items():
        if value is None or value is False:
            continue
        if method.is_exact:
            raise InputError(f"`{name}` is for networks: give `head` mlp or context, or a `recipe`")
        raise InputError(f"`{name}` is for the exact solver: leave `head`, `loss`, `recipe` out")


def _maker(head: str | MakeHead, **options: Any) -> tuple[MakeHead, bool]:
    """Find what makes the head, and whether the exact linear head is to stand beside it."""
    if isinstance(head, Module) or not (isinstance(head, str) or callable(head)):
        raise InputError(
            "`head` is a name, or what makes a module from the number of features and of genes; "
            f"got {type(head).__name__}"
        )
    if not isinstance(head, str):
        return head, False
    if head not in head_choices():
        raise no_such("head", head, head_choices())
    kind, with_linear = head_choices()[head]
    return partial(HEADS[kind], **options), with_linear
