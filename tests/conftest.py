"""What all tests share: where the reference data is, and small sections made from nothing."""

from __future__ import annotations

import re
import runpy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from PIL import Image
from scipy import sparse

from strank.cli import console
from strank.cohort.contract import SectionInfo, make_section

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Take files with slow tests first, lest one core waits for another at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def _shared(part: str) -> Path:
    folder = SHARED / part
    if not folder.is_dir():
        pytest.skip(f"needs {part}, which is not part of the project ({folder} is absent)")
    return folder


@pytest.fixture(scope="session")
def documented() -> dict[str, tuple[set[str], bool]]:
    """Of each command the keys that docs/command-line.md tells, and whether there may be more."""
    text = (Path(__file__).parents[1] / "docs/command-line.md").read_text(encoding="utf-8")
    rows = text.partition("| command | keys |")[2].partition("\n\n")[0].splitlines()[2:]
    found = {}
    for row in rows:
        _, command, keys, _ = row.split("|")
        # Files, options and values stand between backquotes, too.
        names = set(re.findall(r"`([a-z]\w+)`", keys)) - {"null"}
        found[command.split("`")[1]] = names, "what `" in keys
    return found


@pytest.fixture(scope="session", autouse=True)
def every_summary_is_as_documented(documented) -> Iterator[None]:
    """Hold all JSON that any test's commands make, printed or not, to docs/command-line.md."""

    def check(results: dict[str, Any], outputs: Any) -> dict[str, Any]:
        summary = summarize(results, outputs)
        first = ["schema", "strank_version", "command", "warnings", "outputs"]
        assert list(summary)[:5] == first
        called = summary["command"]
        keys, more = documented.get(called) or documented[called.split()[0]]
        found = set(summary) - set(first)
        assert keys <= found if more else keys == found, (called, keys ^ found)
        assert all(Path(path).exists() for path in summary["outputs"])
        return summary

    summarize = console.summarize
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(console, "summarize", check)
        yield


@pytest.fixture(scope="session")
def her2st() -> Path:
    return _shared("data/her2st")


@pytest.fixture(scope="session")
def reference() -> Path:
    return _shared("reference")


@pytest.fixture(scope="session")
def section_of() -> Callable[..., AnnData]:
    """Make a section with features of an encoder called "mine" and counts that follow them."""

    def make(
        name: str = "A1", *, patient: str = "A", n_spots: int = 30, n_genes: int = 6, seed: int = 0
    ) -> AnnData:
        rng = np.random.default_rng([seed, *name.encode()])
        features = rng.normal(size=(n_spots, 3))
        slopes = np.random.default_rng(99).normal(size=(3, n_genes)) * 0.5
        depth = rng.lognormal(0, 0.3, size=(n_spots, 1))
        counts = rng.poisson(depth * 10 * np.exp(features @ slopes))
        spots = pd.DataFrame(
            rng.uniform(0, 500, size=(n_spots, 2)),
            columns=["x", "y"],
            index=[f"{i}x{i}" for i in range(n_spots)],
        )
        info = SectionInfo(
            f"/none/{name}.jpg", "0" * 64, 0.7, 100.0, 200.0, "ST", {"reader": "test"}
        )
        adata = make_section(
            sparse.csr_matrix(counts),
            spots=spots,
            genes=pd.Index([f"G{i}" for i in range(n_genes)]),
            section=name,
            patient=patient,
            info=info,
        )
        adata.obsm["mine"] = features.astype(np.float32)
        adata.uns["mine"] = {"name": "mine", "version": "1", "fields": [], "n_features": 3}
        return adata

    return make


@pytest.fixture
def cohort(section_of: Callable[..., AnnData]) -> dict[str, AnnData]:
    return {name: section_of(name, patient=name[0]) for name in ("A1", "A2", "B1", "C1")}


@pytest.fixture
def st_folder(tmp_path: Path) -> Path:
    """Two tiny sections of two patients in the ST layout: 5 x 5 spots, 300 x 280 px."""
    folder = tmp_path / "st"
    for number, name in enumerate(["A1", "B1"]):
        rng = np.random.default_rng(number)
        y, x = np.mgrid[2:7, 3:8].reshape(2, -1)
        spots = pd.DataFrame({"x": x, "y": y, "new_x": x + 0.01, "new_y": y - 0.01})
        spots = spots.assign(pixel_x=45.0 * x - 95, pixel_y=45.0 * y - 75, selected=1)
        counts = pd.DataFrame(
            rng.poisson(4, size=(25, 8)),
            index=[f"{a}x{b}" for a, b in zip(x, y, strict=True)],
            columns=[f"GENE{i}" for i in range(8)],
        )
        for kind in ("images", "counts", "spots"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
        pixels = np.full((280, 300, 3), 240, np.uint8)
        pixels[10:200, 20:240] = rng.integers(60, 220, size=(190, 220, 3))
        Image.fromarray(pixels).save(folder / "images" / f"{name}.jpg")
        counts.to_csv(folder / "counts" / f"{name}.tsv.gz", sep="\t")
        spots.to_csv(folder / "spots" / f"{name}_selection.tsv", sep="\t", index=False)
    return folder


@pytest.fixture
def hub_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Give a hub on localhost, asked by huggingface_hub instead of the real one; see hub_server.py.

    Its client has an empty cache, a token of its own, and no patience.
    """
    from huggingface_hub import constants

    serve = runpy.run_path(str(Path(__file__).with_name("hub_server.py")))["serve"]
    with serve() as hub:
        template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        facts = {"ENDPOINT": hub.address, "HUGGINGFACE_CO_URL_TEMPLATE": template}
        facts |= {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_TOKEN_PATH": str(tmp_path / "token")}
        facts |= {"HF_HUB_DISABLE_XET": True, "HF_HUB_OFFLINE": False, "HF_HUB_ETAG_TIMEOUT": 1}
        facts |= {"HF_HUB_DOWNLOAD_TIMEOUT": 1, "DOWNLOAD_CHUNK_SIZE": 50_000}
        for name, value in facts.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr("strank.hub._TIMEOUT", 1)
        monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
        yield hub


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if CHROMIUM is None:
        pytest.skip("needs chromium on the PATH")
    with playwright.sync_playwright() as driver:
        launched = driver.chromium.launch(
            executable_path=CHROMIUM, args=[*FLAGS, "--disable-component-update"]
        )
        yield launched
        launched.close()


@pytest.fixture
def opened(browser):
    """Open pages; at the end none may have failed, asked for anything elsewhere, or spoken."""
    told, contexts = [], []

    def open_page(url, width=1280):
        context = browser.new_context(viewport={"width": width, "height": 800})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: told.append(message.text) if ours(message) else None)
        page.on("pageerror", lambda error: told.append(str(error)))
        page.on("request", lambda request: told.append(request.url) if elsewhere(request) else None)
        page.on("dialog", lambda dialog: (told.append(dialog.message), dialog.dismiss()))
        page.goto(url)
        return page

    def ours(message):  # the theme of the site tells what it does
        return not message.text.startswith("[PST]")

    def elsewhere(request):
        return not request.url.startswith(("file:", "data:", "blob:"))

    yield open_page
    for context in contexts:
        context.close()
    assert told == []


@pytest.fixture(scope="session")
def page_checks() -> dict[str, Any]:
    """What looks for faults of a page; see pages.py."""
    pytest.importorskip("axe_playwright_python", reason="needs axe-playwright-python")
    return runpy.run_path(str(Path(__file__).with_name("pages.py")))
