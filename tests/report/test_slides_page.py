"""The page of many slides: what its table says, names that must not run, and how it fits."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from strank.files import write_table
from strank.report import write_slides_page

EVIL = 'a <img src=x onerror=alert(1)> #1 100%"'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three slides: one odd, one that failed, one of a model that knows of no novelty."""
    folder = tmp_path_factory.mktemp("maps")
    told = "35 % of the tiles look unlike anything in training; <b>do not</b> trust this map"
    rows = [
        (EVIL, f"slides/{EVIL}.svs", 12345, 0.351, told, 12.5, ""),
        ("broken", "slides/broken.tif", None, None, "", 0.1, "slides/broken.tif: no such <image>"),
        ("NA", "slides/NA.tif", 40, None, "", 2.0, ""),
    ]
    columns = ["name", "slide", "n_tiles", "odd_share", "warnings", "seconds", "error"]
    table = pd.DataFrame(rows, columns=columns).astype({"n_tiles": "Int64"})
    write_table(folder / "slides.csv", table)
    for name in (EVIL, "NA"):
        (folder / name).mkdir()
        for made in ("tissue.png", "HLA%2FA%20%3Cb%3E.png"):
            image = np.full((300, 400, 3), [230, 190, 210], np.uint8)
            Image.fromarray(image).save(folder / name / made)
        (folder / name / "scores.h5ad").touch()
    (folder / EVIL / "scores.geojson").touch()
    write_slides_page(folder)
    return folder


def test_nothing_of_the_data_is_markup(folder):
    html = (folder / "index.html").read_text()
    assert "<img src=x" not in html
    assert "<b>" not in html
    assert "<image>" not in html
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", html)


def test_a_row_says_what_the_table_says_and_links_what_there_is(opened, folder):
    page = opened((folder / "index.html").as_uri())
    assert page.locator("h2").all_inner_texts() == [EVIL, "broken", "NA"]
    odd, broken, na = page.locator("article").all()
    assert odd.locator("dd").all_inner_texts() == ["12,345", "35 %", "12.5"]
    assert "<b>do not</b> trust" in odd.locator(".warning").inner_text()
    assert "no such <image>" in broken.locator(".error").inner_text()
    assert broken.locator("a, img, dl").count() == 0
    assert na.locator("dd").all_inner_texts() == ["40", "–", "2.0"]
    assert na.locator(".warning").count() == 0
    assert odd.locator("li").all_inner_texts() == ["scores", "QuPath", "HLA/A <b>"]
    assert na.locator("li").all_inner_texts() == ["scores", "HLA/A <b>"]
    seen = page.locator("img").evaluate_all("all => all.map(e => e.naturalWidth)")
    assert seen == [400, 400]
    # A link of a name with # and % leads to the file.
    page.get_by_role("link", name="HLA/A <b>").first.click()
    assert page.locator("img").evaluate("e => e.naturalWidth") == 400


def test_it_fits_a_telephone_a_screen_and_paper_and_is_for_everyone(opened, page_checks, folder):
    assert page_checks["faults"](opened((folder / "index.html").as_uri())) == []
