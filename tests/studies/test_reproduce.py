"""The paper's tasks on HEST: from its files to the table, killed and gone on with, and refusals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from scipy.stats import spearmanr
from typer.testing import CliRunner

from strank.cli import app
from strank.cohort.contract import patients_of
from strank.cohort.store import read_cohort
from strank.encoders.base import Field
from strank.errors import InputError
from strank.evaluation.paper_tasks import PAPER_TASKS
from strank.evaluation.protocol import PRESETS
from strank.fitting.method import fit
from strank.neural.recipe import RECIPES
from strank.reproduce import hest
from strank.studies.reproduce.task_data import import_task, task_samples, unknown_patients

UM, SIDE, PITCH = 0.25, 224, 100.0
N_GENES = 290
# Of a task in turns: so many patients.
PATIENTS = {"IDC": 4, "PRAD": 2, "PAAD": 3, "COAD": 2, "READ": 1, "ccRCC": 24, "IDC-L": 2}


class Colour:
    """Mean colour, and its square: enough for what the samples below hold."""

    name, version, fields = "colour", "1", (Field(112.0, 224),)
    feature_names = ("r", "g", "b", "r2", "g2", "b2")

    def encode(self, patches):
        mean = patches[0].mean((1, 2), dtype=np.float32) / 255
        return np.concatenate([mean, mean**2], axis=1)


def write_sample(folder: Path, name: str, *, patient: str | None, n_spots: int, **changed) -> None:
    """As HEST stores it: spots in another order than patches, some without one, a poor one."""
    rng = np.random.default_rng([*name.encode()])
    side = int(np.ceil(n_spots**0.5))
    where = np.stack(np.divmod(np.arange(n_spots), side), axis=1)[:, ::-1]
    centres = 1000.0 + where * PITCH / UM
    state = np.sin(where[:, 0] + rng.uniform(0, 6)) + 0.3 * rng.normal(size=n_spots)
    genes = [f"G{i}" for i in range(N_GENES)] + ["MT-CO1", "NegControlProbe_1"]
    of_genes = np.random.default_rng(0)
    level, slope = of_genes.uniform(1.2, 3, len(genes)), of_genes.normal(0, 0.4, len(genes))
    depth = rng.lognormal(0, 0.3, n_spots)
    depth[:1] = 0.02
    counts = rng.poisson(depth[:, None] * np.exp(level + state[:, None] * slope))
    counts[1, genes.index("MT-CO1")] = counts[1].sum()
    kept = ~np.isin(genes, changed.get("absent", ()))
    genes = [f"other-{g}" if g in changed.get("renamed", ()) else g for g in genes]
    spots = [f"{name}-{i}" for i in range(n_spots)]
    for part in ("st", "patches", "metadata"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    scales = {"spot_diameter_fullres": 55 / UM, "tissue_downscaled_fullres_scalef": 0.1}
    anndata.AnnData(
        sparse.csr_matrix(counts[:, kept].astype(np.float32)),
        obs=pd.DataFrame({"array_row": where[:, 1]}, index=spots),
        var=pd.DataFrame(index=np.array(genes)[kept]),
        obsm={"spatial": centres},
        uns={"spatial": {"ST": {"images": {}, "scalefactors": scales}}},
    ).write_h5ad(folder / f"st/{name}.h5ad")
    order = rng.permutation(n_spots - 1)
    shade = np.array([165, 80, 150]) + state[order, None] * [20, -10, 4]
    pixels = changed.get("pixels", SIDE)
    texture = rng.normal(0, 10, (len(order), pixels // 16, pixels // 16, 1))
    img = np.repeat(np.repeat(shade[:, None, None] + texture, 16, axis=1), 16, axis=2)
    with h5py.File(folder / f"patches/{name}.h5", "w") as file:
        file.create_dataset("img", data=np.clip(img, 0, 230).astype(np.uint8), compression="lzf")
        source = changed.get("um", 0.5) * pixels / UM
        file["coords"] = (centres[order] - source / 2).astype(int)
        file["barcode"] = np.array(spots, dtype="S")[order, None]
        file["coords"].attrs.update({"patch_size_src": source, "pixel_size": UM})
    facts = {"id": name, "pixel_size_um_estimated": UM, "patient": patient, "dataset_title": "T"}
    facts |= {"st_technology": "Visium", "spot_diameter": 55.0, "inter_spot_dist": PITCH}
    (folder / f"metadata/{name}.json").write_text(json.dumps(facts))


def write_tasks(folder: Path, *tasks: str, n_spots: int = 16, **changed) -> Path:
    """All samples of some tasks; the first of a task has no patient, and lacks a gene."""
    for task in tasks:
        for number, name in enumerate(PAPER_TASKS[task].samples):
            patient = f"Patient {number % PATIENTS[task]} of {task}"
            of_first = {"absent": ["G7"]} if number == 0 else {}
            write_sample(folder, name, patient=patient, n_spots=n_spots, **of_first, **changed)
    return folder


@pytest.fixture(scope="module")
def paad(tmp_path_factory) -> Path:
    """A folder with the samples of one task, and beside it a run of it, ``out``."""
    folder = write_tasks(tmp_path_factory.mktemp("one") / "hest", "PAAD")
    hest(folder.parent / "out", folder, tasks=["PAAD"], encoder=Colour(), quick=True)
    return folder


def files(folder: Path) -> dict[str, int]:
    """What took work, and when it was written."""
    parts = ("*/cohort/**/*", "*/*/predictions/**/*", "*/*.csv")
    found = {path for part in parts for path in folder.glob(part) if path.is_file()}
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in sorted(found)}


def test_numbers_are_those_of_a_fit_by_hand(paad):
    task, out = PAPER_TASKS["PAAD"], paad.parent / "out"
    table = pd.read_csv(out / "table.csv").set_index("method")
    protocol = PRESETS["paper-PAAD"]
    cohort = protocol.filtered(read_cohort(out / "PAAD/cohort", encoder="colour"))
    # A spot without a patch, one of few genes and a mitochondrial one are gone.
    assert [section.n_obs for section in cohort.values()] == [13, 13, 13]
    assert cohort[task.samples[0]].n_vars == N_GENES
    panel = protocol.choose_panel(cohort, task.fold, 50)
    assert "G7" not in panel
    development = {name: cohort[name] for name in task.fold.development}
    given = {"encoder": "colour", "genes": list(panel)}
    test = cohort[task.test]
    counts = test[:, panel].X.toarray()
    target = np.log1p(1e4 * counts / counts.sum(1, keepdims=True))

    def scc(model):
        scores = np.asarray(model.predict(test).X)
        return np.mean([spearmanr(scores[:, g], target[:, g])[0] for g in range(50)])

    assert table.loc["linear, list", "scc"] == pytest.approx(scc(fit(development, **given)))
    assert table.loc["linear, list", "scc"] > 0.3
    how = {"recipe": "published-quick", "validation": [task.validation], "seed": 0}
    for loss in ("list", "mse"):
        model = fit(development, loss=loss, **how, **given)
        found = table.loc[f"linear, {loss}, published-quick"]
        assert found["scc"] == pytest.approx(scc(model), abs=1e-5)
        assert found["paper"] == task.scc[loss]
    summary = pd.read_csv(out / "PAAD/leak-free/summary.csv").set_index(["method", "score"])
    for score in ("depth_matched", "lift", "deviance", "slope"):
        expected = summary.loc[("ridge", score), ["mean", "low", "high"]].astype(float)
        found = table.loc["ridge", [score, f"{score}_low", f"{score}_high"]]
        np.testing.assert_allclose(found.astype(float), expected, rtol=1e-4)


def test_what_is_done_is_not_done_again(paad, monkeypatch):
    out = paad.parent / "out"
    before, table = files(out), (out / "table.csv").read_text()
    assert len(before) > 30
    monkeypatch.setattr("strank.studies.benchmark.runner.run_cell", pytest.fail)
    monkeypatch.setattr("strank.studies.benchmark.runner.score_task", pytest.fail)
    again = hest(out, paad, tasks=["PAAD"], encoder=Colour(), quick=True)
    assert files(out) == before
    assert again.page.read_text()
    assert (out / "table.csv").read_text() == table
    known = ["strank_version", "encoder", "seeds", "library_size", "quick", "samples"]
    assert list(again.facts) == [*known, "unknown_patients", "tasks"]
    assert again.facts["tasks"]["PAAD"]["leak-free"]["failed"] == []
    with pytest.raises(InputError, match=r"out: reproduction of another seeds, quick; choose"):
        hest(out, paad, tasks=["PAAD"], encoder=Colour())


def test_the_page_holds_all_it_needs_and_marks_a_first_look(paad):
    html = (paad.parent / "out/index.html").read_text()
    assert "A first look, not the study" in html
    assert "the numbers cannot agree" in html
    assert not re.search(r"(src|href)=(?!\"data:image/png;base64,)", html)
    for text in ("0.343", "TENX126", "linear, list, published-quick", "Calibration slope"):
        assert text in html
    assert "<script" not in html
    assert (paad.parent / "out/table.md").read_text().startswith("A first look, not the study")


def test_a_patient_that_is_not_known_counts_as_one_of_its_own(tmp_path):
    task = PAPER_TASKS["PAAD"]
    folder = write_tasks(tmp_path / "hest", "PAAD", n_spots=9)
    write_sample(folder, task.samples[1], patient=float("nan"), n_spots=9)
    samples = task_samples([task], folder, tmp_path)
    assert unknown_patients(samples) == [task.samples[1]]
    import_task(task, samples, tmp_path / "cohort", lambda _: None)
    patients = patients_of(read_cohort(tmp_path / "cohort"))
    assert patients[task.samples[1]] == task.samples[1]
    assert patients[task.samples[0]] == "Patient 0 of PAAD (T)"


def test_samples_come_from_the_hub_without_slides_if_there_is_room(
    hub_server, tmp_path, monkeypatch
):
    task, folder = PAPER_TASKS["PAAD"], write_tasks(tmp_path / "here", "PAAD", n_spots=9)
    there = {path.relative_to(folder): path for path in folder.rglob("*.*")}
    repo = {name.as_posix(): path.read_bytes() for name, path in there.items()}
    repo |= {"HEST_v1_3_0.csv": b"id\n", f"wsis/{task.test}.tif": bytes(10**6)}
    hub_server.repos["MahmoodLab/hest"] = repo
    size = sum(path.stat().st_size for path in there.values())
    free = SimpleNamespace(free=2 * size)
    monkeypatch.setattr("strank.files.shutil.disk_usage", lambda _: free)
    with pytest.raises(InputError, match=r"out/hest: 0.0 GB are needed, and 0.0 GB are free"):
        task_samples([task], None, tmp_path / "out")
    free.free = 3 * size
    samples = task_samples([task], None, tmp_path / "out")
    assert sorted(samples) == sorted(task.samples)
    assert not (tmp_path / "out/hest/wsis").exists()
    assert all(sample.patches.is_file() for sample in samples.values())
    free.free = size // 2
    with pytest.raises(InputError, match=r"cohort: .* GB are needed"):
        import_task(task, samples, tmp_path / "cohort", lambda _: None)


def refused(folder: Path, message: str, **given) -> None:
    out = folder.parent / "out"
    with pytest.raises(InputError, match=message):
        hest(out, folder, **{"tasks": ["PAAD"], "encoder": Colour(), "quick": True, **given})
    assert not list(out.glob("PAAD/published"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("absent", r"^sample TENX126 of task PAAD: .*hest/st/TENX126.h5ad is not there; get it wi"),
        ("no image", r"^sample TENX126 of task PAAD: neither .*patches/TENX126.h5 nor .*wsis/TENX"),
        ("pixels", r"TENX126 .*patches/TENX126.h5 has patches of 112 pixels of 0.5 µm; those of H"),
        ("um", r"TENX126 .*patches/TENX126.h5 has patches of 224 pixels of 1 µm; those of HEST, w"),
        (
            "spots",
            r"^sample TENX126: no barcode stands in both .*/TENX126.h5 and .*/TENX126.h5ad",
        ),
        ("genes", r"^task PAAD: the filter leaves 40 genes .* TENX126 \(.*TENX126.h5ad\) lacks"),
        ("few", r"^task PAAD, .*hest/st/TENX126.h5ad: section TENX126: nothing is left"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path, wrong, message):
    folder = write_tasks(tmp_path / "hest", "PAAD", n_spots=9)
    how: dict = {"patient": "P", "n_spots": 9}
    if wrong == "absent":
        (folder / "st/TENX126.h5ad").unlink()
    elif wrong == "no image":
        (folder / "patches/TENX126.h5").unlink()
    elif wrong == "spots":
        with h5py.File(folder / "patches/TENX126.h5", "r+") as file:
            file["barcode"][:] = np.array([f"p{i}" for i in range(8)], dtype="S")[:, None]
    else:
        other = [f"G{i}" for i in range(40, N_GENES)]
        changed = {"pixels": {"pixels": 112}, "um": {"um": 1.0}, "genes": {"renamed": other}}
        changed["few"] = {"absent": other}
        write_sample(folder, "TENX126", **how, **changed[wrong])
    refused(folder, message)


def test_what_is_asked_for_wrongly_is_refused(paad, tmp_path):
    for given, message in [
        ({"tasks": ["PAD"]}, r"^no task 'PAD'; choose one of IDC, .*did you mean PRAD"),
        ({"tasks": "PAAD"}, r"^`tasks` is a list of names; got 'PAAD'$"),
        ({"tasks": []}, r"^`tasks` names none; there are IDC, PRAD"),
        ({"seeds": 0}, r"^`seeds` must be at least 1; got 0$"),
        ({"encoder": "conhc"}, r"^no encoder 'conhc'; did you mean 'conch'"),
        ({"tasks": ["IDC"]}, r"^sample TENX95 of task IDC: "),
    ]:
        (tmp_path / "hest").mkdir(exist_ok=True)
        with pytest.raises(InputError, match=message):
            hest(tmp_path / "out", paad, **{"tasks": ["PAAD"], "encoder": Colour(), **given})
        assert not (tmp_path / "out").exists()


def test_conch_that_is_not_granted_says_how_to_get_it(hub_server, paad, tmp_path):
    gated = {"X-Error-Code": "GatedRepo"}
    hub_server.fail["MahmoodLab/conch"] = (403, gated)
    found = CliRunner().invoke(
        app, ["reproduce", "hest", "--data", str(paad), "-o", str(tmp_path / "out")]
    )
    assert found.exit_code == 2
    for text in (
        "MahmoodLab/conch: gated (403): accept its licence at https://huggingface.co/MahmoodLab/co",
        "log in with `hf auth login`",
        "give the file as --weights (conch-224: licence CC-BY-NC-ND-4.0",
        "or take another --encoder: morphology needs no weights",
    ):
        assert text in found.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_without_repeating(paad, tmp_path):
    """Each time what there is has been kept, and the end is that of a run that nothing stopped."""
    (tmp_path / "colours_of_a_test.py").write_text(
        f"import runpy\nColour = runpy.run_path({__file__!r})['Colour']\n"
    )
    out = tmp_path / "out"
    command = [sys.executable, "-m", "strank", "reproduce", "hest", "--data", str(paad), "--quick"]
    command += ["--tasks", "PAAD", "--encoder", "colours_of_a_test:Colour", "-o", str(out)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    start = partial(subprocess.Popen, env=environment, stderr=subprocess.DEVNULL)
    held: dict[str, int] = {}
    for part, number in [
        ("PAAD/cohort/T*.h5ad", 2),
        ("PAAD/published/predictions/**/*.h5ad", 4),
        ("PAAD/published.csv", 1),
    ]:
        with start([*command, "--jobs", "1"], stdout=subprocess.DEVNULL) as process:
            while len(list(out.glob(part))) < number:
                assert process.poll() is None
                time.sleep(0.02)
            process.send_signal(signal.SIGKILL)
        now = {k: v for k, v in files(out).items() if not Path(k).name.startswith(".")}
        assert held.items() <= now.items()
        held = now
    done = subprocess.run([*command, "--json"], env=environment, stdout=subprocess.PIPE, check=True)
    assert held.items() <= files(out).items()
    expected = paad.parent / "out/table.csv"
    pd.testing.assert_frame_equal(
        pd.read_csv(out / "table.csv"), pd.read_csv(expected), rtol=1e-4, atol=1e-5
    )
    assert len(json.loads(done.stdout)["rows"]) == len(pd.read_csv(expected))


@pytest.mark.slow
def test_seven_tasks_from_files_to_the_table(tmp_path, monkeypatch):
    """The two large tasks with six of their samples, and networks of a few epochs."""
    for name in ("PRAD", "ccRCC"):
        task = replace(PAPER_TASKS[name], samples=PAPER_TASKS[name].samples[:6])
        monkeypatch.setitem(PAPER_TASKS, name, task)
        smaller = replace(PRESETS[f"paper-{name}"], folds=(task.fold,))
        monkeypatch.setitem(PRESETS, f"paper-{name}", smaller)
    for name in ("published-quick", "quick"):
        monkeypatch.setitem(RECIPES, name, replace(RECIPES[name], max_epochs=5))
    folder = write_tasks(tmp_path / "hest", *PAPER_TASKS, n_spots=12)
    found = hest(tmp_path / "out", folder, encoder=Colour(), quick=True)
    table = found.table.set_index(["task", "method"])
    assert list(dict.fromkeys(found.table["task"])) == [*PAPER_TASKS, "mean"]
    for name, task in PAPER_TASKS.items():
        rows = table.loc[name]
        assert not found.facts["tasks"][name]["published"]["failed"]
        for loss, scc in task.scc.items():
            row = rows.loc[f"linear, {loss}, published-quick"]
            assert row["paper"] == scc
            assert np.isfinite(row["scc"])
        assert np.isfinite(rows.loc[["linear, list", "ridge", "mlp, list, quick"], "scc"]).all()
        if PATIENTS[name] == 1:
            assert (rows["leak_free"] == "not possible: one patient").all()
        else:
            assert np.isfinite(
                rows.loc["linear, list", ["depth_matched", "slope"]].astype(float)
            ).all()
            assert not found.facts["tasks"][name]["leak-free"]["failed"]
    assert table.loc["READ", "paper"].notna().sum() == 7
    of_list = table.xs("linear, list, published-quick", level="method")
    np.testing.assert_allclose(of_list["scc"].iloc[:-1].mean(), of_list["scc"].iloc[-1])
    # As Table 2 prints it.
    assert round(of_list.loc["mean", "paper"], 3) == 0.345
    # Without leaks READ has nothing, so there is no mean of all.
    assert np.isnan(of_list.loc["mean", "depth_matched"])
    assert "not possible: one patient" in found.page.read_text()
    assert any(
        "PRAD" in w or "patient" in w for w in found.facts["tasks"]["PRAD"]["published"]["warnings"]
    )
