"""What networks buy: heads and objectives beside the exact linear head, on sections left out.

    python benchmarks/heads.py COHORT -o OUT            # a cohort folder with features
    python benchmarks/heads.py COHORT -o OUT --quick    # one seed, few methods
    python benchmarks/heads.py DEMO/cohort --truth DEMO/st/truth -o OUT    # by `strank demo`

Every section is predicted from the others; panel, penalties and early stopping are of the training
sections. Set OMP_NUM_THREADS=1 where other programs use the cores. A run that was stopped goes on.

exact: the linear head, solved. published: the same head by the paper's procedure, stopped by the
loss of its first training section. mlp, context: networks by the default recipe, stopped by
held-out list gain, mse too, which does not suit it.
With +linear, scores are the mean of the network's and of the exact head's; mlp and context with the
list loss are these networks alone, out of the same training (so seconds hold the exact fit, too).

    scc      Spearman with log1p(CP10k), mean over genes and sections
    gain     list log-likelihood above that of library size alone, nats a gene and section; left
             out where scores are no log rates
    r        Pearson correlation with the true log rates, genes without a true order left out
    seconds  of a fit; those of the processor are disturbed less by other programs

± is the standard deviation over seeds (one seed: none). "against exact" is the paired difference
to the exact list head, mean of the seeds, with a 95 % bootstrap interval over genes, each with all
its sections: it knows nothing of how few sections, and patients, there are. "known" are sections
whose patient has others in training, "new" those of a patient that no method has seen.

OUT gets genes.csv (a row a gene), fits.csv (a row a fit) and summary.csv.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer
from anndata import AnnData
from borrowing import gain

import strank
from strank import STRankRegressorCV, read_cohort
from strank.cohort.contract import patients_of
from strank.cohort.folds import make_folds
from strank.cohort.panel import choose_panel
from strank.cohort.store import read_h5ad
from strank.cohort.training_set import training_data
from strank.evaluation.methods import BASELINES, fit_method
from strank.evaluation.scores import score_section
from strank.files import write_table
from strank.neural.recipe import Machine

KEY = ["method", "loss", "seed", "section"]
MEASURES = ["scc", "gain", "r"]
REFERENCE = ("exact", "list")
LOG_RATES = ("list", "pair")
NETWORKS = {"mlp": "mlp", "context": "context", "published": "linear"}
# What is wanted most comes first; the reference, before all.
JOBS = (
    *("exact, list", "ridge, mse", "centred ridge, mse", "mlp, list", "context, list"),
    *("published, list", "exact, pair", "mlp, pair", "context, pair", "published, pair"),
    *("mlp, mse", "context, mse", "published, mse"),
)
QUICK = JOBS[:4]


@dataclass(frozen=True)
class Case:
    """A section that is left out, and what it is predicted from."""

    train: Mapping[str, AnnData]
    test: AnnData
    panel: pd.Index
    encoder: str
    truth: AnnData | None
    known: bool


def cases(folder: Path, encoder: str, n_genes: int, truth: Path | None) -> dict[str, Case]:
    cohort = read_cohort(folder, encoder=encoder)
    found = {}
    for fold in make_folds(patients_of(cohort), by="section"):
        train = {name: cohort[name] for name in fold.train}
        true = read_h5ad(truth / f"{fold.name}.h5ad") if truth else None
        panel, known = choose_panel(train, n_genes), bool(fold.shared_patients)
        found[fold.name] = Case(train, cohort[fold.name], panel, encoder, true, known)
    return found


# --- fits: scores ``[n_spots, n_genes]`` by method ---


def fit(name: str, loss: str, seed: int, case: Case) -> dict[str, np.ndarray]:
    if name in NETWORKS:
        return network(name, loss, seed, case)
    if (name, loss) == REFERENCE:
        model = strank.fit(case.train, encoder=case.encoder, genes=list(case.panel))
        return {name: np.asarray(model.predict(case.test).X)}
    for method in BASELINES:
        if name == method.name:
            predict = fit_method(method, case.train, case.panel, encoder=case.encoder)
            return {name: predict(case.test)}
    data = training_data(case.train, case.panel, case.encoder)
    spots = {"section": data.section, "offset": np.log(data.library_size), "group": data.group}
    probe = STRankRegressorCV(objective=loss).fit(data.features, data.counts, **spots)
    return {name: probe.predict(case.test.obsm[case.encoder])}


def network(name: str, loss: str, seed: int, case: Case) -> dict[str, np.ndarray]:
    both = name != "published" and loss == "list"
    model = strank.fit(
        case.train,
        head=NETWORKS[name] + "+linear" * both,
        loss=loss,
        recipe="published" if name == "published" else "default",
        validation=[min(case.train)] if name == "published" else None,
        encoder=case.encoder,
        genes=list(case.panel),
        seed=seed,
        machine=Machine(accelerator="cpu"),
    )
    alone = replace(model, head=model.head.heads[0]) if both else model
    models = {name: alone} | ({f"{name}+linear": model} if both else {})
    return {method: np.asarray(of.predict(case.test).X) for method, of in models.items()}


# --- measures ---


def judge(scores: np.ndarray, loss: str, case: Case) -> pd.DataFrame:
    """One row a gene: scc, gain and r; NaN for what is not defined."""
    table = score_section({"": scores}, case.test, case.panel)[["gene", "mean_counts", "scc"]]
    table["gain"] = table["r"] = np.nan
    depth = case.test.obs["library_size"].to_numpy()
    seen, measured = depth > 0, case.panel.isin(case.test.var_names)
    if loss in LOG_RATES:
        counts = case.test[seen, case.panel[measured]].X.toarray()
        table.loc[measured, "gain"] = gain(scores[seen][:, measured], counts, depth[seen])
    if case.truth is not None:
        table["r"] = correlation(scores, case.truth[case.test.obs_names, case.panel].X)
    return table


def correlation(scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    a, b = (v - v.mean(0) for v in (scores.astype(np.float64), truth.astype(np.float64)))
    norms = np.linalg.norm(a, axis=0) * np.linalg.norm(b, axis=0)
    r = (a * b).sum(0) / np.where(norms > 0, norms, 1.0)
    return np.where(np.ptp(truth, axis=0) > 0, r, np.nan)


def measure(method: str, loss: str, seed: int, section: str, case: Case) -> pd.DataFrame:
    wall, cpu = time.perf_counter(), time.process_time()
    scores = fit(method, loss, seed, case)
    spent = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    about = {"loss": loss, "seed": seed, "section": section}
    about |= {"patient": "known" if case.known else "new", **spent}
    tables = [judge(found, loss, case).assign(method=m, **about) for m, found in scores.items()]
    for name, table in zip(scores, tables, strict=True):
        means = ", ".join(f"{m} {table[m].mean():.3f}" for m in MEASURES)
        typer.echo(f"{name}, {loss}, seed {seed}, {section}: {means}; {spent['seconds']:.1f} s")
    return pd.concat(tables, ignore_index=True)


# --- tables ---


def per_fit(genes: pd.DataFrame) -> pd.DataFrame:
    columns = [*MEASURES, "seconds", "cpu_seconds"]
    return genes.groupby([*KEY, "patient"], sort=False)[columns].mean().reset_index()


def interval(difference: pd.DataFrame, seed: int = 0) -> tuple[float, float, float]:
    """Mean of a table sections by genes, and its bootstrap interval over genes."""
    total, n = difference.sum(0).to_numpy(), difference.notna().sum(0).to_numpy()
    if not n.sum():
        return np.nan, np.nan, np.nan
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(n), size=(2000, len(n)))
    means = total[drawn].sum(1) / n[drawn].sum(1)
    return total.sum() / n.sum(), *np.quantile(means, [0.025, 0.975])


def summary(genes: pd.DataFrame) -> pd.DataFrame:
    """One row a kind of patient, method and loss."""
    rows, reference = [], {}  # the exact list head comes first, of both kinds of patient
    for (patient, method, loss), mine in genes.groupby(["patient", "method", "loss"], sort=False):
        by_seed = per_fit(mine).groupby("seed")[[*MEASURES, "seconds", "cpu_seconds"]].mean()
        row = {"patient": patient, "method": method, "loss": loss, "seeds": len(by_seed)}
        for m in MEASURES:
            row |= {m: by_seed[m].mean(), f"{m} sd": by_seed[m].std()}
            wide = mine.pivot_table(m, "section", "gene", dropna=False)
            difference = wide - reference.setdefault((patient, m), wide)
            names = (f"{m} against exact", f"{m} low", f"{m} high")
            row |= dict(zip(names, interval(difference), strict=True))
        rows.append(row | by_seed[["seconds", "cpu_seconds"]].mean().to_dict())
    return pd.DataFrame(rows)


def shown(table: pd.DataFrame) -> str:
    """As text: a mean with its spread, a difference with its interval."""
    text = table[["patient", "method", "loss", "seeds"]].copy()
    for m in [m for m in MEASURES if table[m].notna().any()]:
        spread = table[f"{m} sd"].map(" ± {:.3f}".format).where(table[f"{m} sd"].notna(), "")
        text[m] = (table[m].map("{:.3f}".format) + spread).where(table[m].notna(), "")
        names = [f"{m} against exact", f"{m} low", f"{m} high"]
        text[names[0]] = [
            f"{d:+.3f} [{low:+.3f}, {high:+.3f}]" if high > low else ""
            for d, low, high in table[names].to_numpy()
        ]
    seconds = table[["seconds", "cpu_seconds"]].map("{:.2f}".format)
    return text.join(seconds).sort_values("patient", kind="stable").to_string(index=False)


def write(table: pd.DataFrame, path: Path) -> None:
    write_table(path, table, float_format="%.6g")


def main(
    folder: Annotated[Path, typer.Argument(metavar="COHORT", help="Cohort folder with features.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the tables.")],
    encoder: Annotated[str, typer.Option(help="Whose features.")] = "morphology",
    truth: Annotated[Path | None, typer.Option(help="Folder of true log rates.")] = None,
    n_genes: Annotated[int, typer.Option("--genes", help="Size of the panel.")] = 50,
    seeds: Annotated[int, typer.Option(min=1, help="Of every network.")] = 3,
    losses: Annotated[str, typer.Option(help="Of the networks; the others always run.")] = "all",
    quick: Annotated[bool, typer.Option("--quick", help="One seed, few methods.")] = False,
) -> None:
    """Heads and objectives beside the exact linear head, on sections left out."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "genes.csv"
    genes = pd.read_csv(path) if path.is_file() else pd.DataFrame(columns=KEY)
    done = set(genes[KEY].itertuples(index=False, name=None))
    found = cases(folder, encoder, n_genes, truth)
    for method, loss in (job.split(", ") for job in (QUICK if quick else JOBS)):
        seeded = method in NETWORKS
        if seeded and losses != "all" and loss not in losses.split(","):
            continue
        for seed in range(seeds if seeded and not quick else 1):
            for section, case in found.items():
                if (method, loss, seed, section) not in done:
                    table = measure(method, loss, seed, section, case)
                    genes = pd.concat([genes, table], ignore_index=True) if len(genes) else table
                    write(genes, path)
    table = summary(genes)
    write(per_fit(genes), out / "fits.csv")
    write(table, out / "summary.csv")
    typer.echo(f"\n{shown(table)}")


if __name__ == "__main__":
    typer.run(main)
