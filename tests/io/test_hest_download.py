"""HEST from a hub in its layout: only what is asked for, whole, and read by its readers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from strank.errors import InputError
from strank.io import download_hest
from strank.io.hest import TASKS

ADATA = bytes(range(256)) * 20


@pytest.fixture
def hub(hub_server):
    parts = {"adata/S1.h5ad": ADATA, "patches/S1.h5": b"\1" * 5000, "splits/train_0.csv": b"x"}
    task = {**parts, "splits/test_0.csv": b"y", "var_50genes.json": b'{"genes": []}'}
    hub_server.repos["MahmoodLab/hest-bench"] = {
        **{f"{name}/{path}": content for name in TASKS for path, content in task.items()},
        "fm_v1/ctranspath.pth": b"weights",
        "README.md": b"",
    }
    hub_server.repos["MahmoodLab/hest"] = {
        f"{part}/{name}{end}": f"{part} {name}".encode() * 300
        for name in ("TENX9", "TENX99", "MEND1")
        for part, end in {
            "st": ".h5ad",
            "wsis": ".tif",
            "patches": ".h5",
            "metadata": ".json",
            "transcripts": "_transcripts.parquet",
            "cellvit_seg": "_cellvit_seg.zip",
        }.items()
    } | {"HEST_v1_3_0.csv": b"id\n"}
    return hub_server


def names(folder: Path) -> set[str]:
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in files if path.parts[0] != ".cache"}


def test_tasks_come_whole_and_alone(hub, tmp_path):
    found = download_hest(tmp_path / "bench", tasks=["LUNG", "IDC"], revision="v1")
    assert found == [tmp_path / "bench/LUNG", tmp_path / "bench/IDC"]
    paths = ("adata/S1.h5ad", "patches/S1.h5", "splits/train_0.csv", "splits/test_0.csv")
    task = {*paths, "var_50genes.json"}
    assert names(tmp_path / "bench") == {f"{n}/{path}" for n in ("LUNG", "IDC") for path in task}
    assert (found[1] / "adata/S1.h5ad").read_bytes() == ADATA


def test_a_task_that_is_here_needs_no_network(hub, tmp_path, monkeypatch):
    download_hest(tmp_path / "bench", tasks=["IDC"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert download_hest(tmp_path / "bench", tasks=["IDC"]) == [tmp_path / "bench/IDC"]
    with pytest.raises(InputError, match="hest-bench: not, or not all of it, in the cache"):
        download_hest(tmp_path / "bench", tasks=["IDC", "LUNG"])


def test_samples_come_with_what_is_read_and_no_other(hub, tmp_path):
    assert download_hest(tmp_path / "hest", samples=["TENX9"]) == [tmp_path / "hest"]
    paths = {"st/TENX9.h5ad", "wsis/TENX9.tif", "patches/TENX9.h5", "metadata/TENX9.json"}
    assert names(tmp_path / "hest") == paths | {"HEST_v1_3_0.csv"}


def test_the_slides_can_be_left_out(hub, tmp_path):
    download_hest(tmp_path / "hest", samples=["TENX9"], parts=("st", "patches", "metadata"))
    assert names(tmp_path / "hest") == {
        *("st/TENX9.h5ad", "patches/TENX9.h5", "metadata/TENX9.json", "HEST_v1_3_0.csv")
    }


def test_the_disk_is_asked_first(hub, tmp_path, monkeypatch):
    """For what is still to come, and as often as it is said."""
    free = SimpleNamespace(free=9_999)
    monkeypatch.setattr("strank.files.shutil.disk_usage", lambda _: free)
    hub.repos["MahmoodLab/hest"]["st/TENX9.h5ad"] = bytes(4_000)
    hub.repos["MahmoodLab/hest"]["patches/TENX9.h5"] = bytes(6_000)
    what = {"samples": ["TENX9"], "parts": ("st", "patches")}
    with pytest.raises(InputError, match=r"hest: 0.0 GB are needed, and 0.0 GB are free; make roo"):
        download_hest(tmp_path / "hest", **what)
    assert not names(tmp_path / "hest")
    free.free = 10_003
    download_hest(tmp_path / "hest", **what)
    free.free = 0
    download_hest(tmp_path / "hest", **what)
    (tmp_path / "hest/st/TENX9.h5ad").unlink()
    free.free = 7_999
    with pytest.raises(InputError, match="GB are needed"):
        download_hest(tmp_path / "hest", **what, room=2)
    free.free = 8_000
    download_hest(tmp_path / "hest", **what, room=2)


@pytest.mark.parametrize("patched", ["wsis", "patches"])
def test_a_sample_without_patches_or_slide_is_no_error(hub, tmp_path, patched):
    hub.repos["MahmoodLab/hest"] = {
        path: content
        for path, content in hub.repos["MahmoodLab/hest"].items()
        if not path.startswith(patched)
    }
    download_hest(tmp_path, samples=["MEND1"])
    assert (tmp_path / "st/MEND1.h5ad").is_file()


def test_what_is_not_there_is_refused(hub, tmp_path):
    choices = "there are IDC, PRAD, PAAD, SKCM, COAD, READ, CCRCC, HCC, LUNG, LYMPH_IDC"
    with pytest.raises(InputError, match=f"^no task BRCA; {choices}$"):
        download_hest(tmp_path, tasks=["IDC", "BRCA"])
    with pytest.raises(InputError, match=r"MahmoodLab/hest: has no sample TENX1; .*HEST_v"):
        download_hest(tmp_path, samples=["TENX9", "TENX1"])
    with pytest.raises(InputError, match=r"^\*: not the id of a sample, such as TENX99$"):
        download_hest(tmp_path, samples=["*"])
    for both in ({}, {"tasks": ["IDC"], "samples": ["TENX9"]}):
        with pytest.raises(InputError, match=r"^give either `tasks` or `samples`$"):
            download_hest(tmp_path, **both)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file/out: cannot write there"):
        download_hest(tmp_path / "file/out", tasks=["IDC"])
