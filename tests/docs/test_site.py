"""The site that `make docs` built: links, and how its pages fit, read, tab and print."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

SITE = Path(__file__).parents[2] / "docs/_build/html"
PAGES = sorted(
    path for path in SITE.rglob("*.html") if "_static" not in path.relative_to(SITE).parts
)
# One of each kind; what they are made of, all others are made of.
KINDS = (
    *("index", "api", "changelog", "data", "evaluation", "genindex", "search"),
    *("tutorials/paper", "tutorials/reading", "tutorials/sections"),
    *("generated/strank.fit", "generated/strank.losses.ListSTRankLoss"),
)

pytestmark = pytest.mark.skipif(not PAGES, reason="needs the site: make docs")


class Links(HTMLParser):
    """What a page leads to, and the places in it that may be led to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.to: set[str] = set()
        self.places = {"", "top"}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.to |= {given[name] for name in ("href", "src") if given.get(name)}
        self.places |= {given[name] for name in ("id", "name") if given.get(name)}


@pytest.fixture(scope="module")
def links() -> dict[Path, Links]:
    return {path: Links(path) for path in PAGES}


def test_every_link_within_the_site_leads_somewhere(links):
    assert len(links) > 100
    broken, n_links, outside = [], 0, set()
    for page, found in links.items():
        for link in found.to:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                outside.add(link)
                continue
            target = (page.parent / unquote(url.path)).resolve() if url.path else page
            n_links += 1
            places = links[target].places if target in links else {""}
            if not target.is_file() or unquote(url.fragment) not in places:
                broken.append(f"{page.relative_to(SITE)}: {link}")
    assert broken == []
    assert n_links > 3000
    # Whoever is online may look at these.
    (SITE.parent / "outside.txt").write_text("".join(f"{link}\n" for link in sorted(outside)))


@pytest.mark.slow
def test_every_page_fits_a_telephone_a_screen_and_paper(opened, page_checks):
    """Of what is made of docstrings, which are many and alike, every sixth."""
    page = opened(PAGES[0].as_uri())
    of_docstrings = [path for path in PAGES if path.parent.name == "generated"]
    found = {}
    for path in [path for path in PAGES if path not in of_docstrings] + of_docstrings[::6]:
        page.goto(path.as_uri())
        faults = [*page_checks["too_wide"](page), *page_checks["cut_on_paper"](page)]
        if faults:
            found[str(path.relative_to(SITE))] = faults
    assert found == {}


@pytest.mark.parametrize("name", KINDS)
def test_a_page_is_for_everyone_and_for_the_keyboard(opened, page_checks, name):
    page = opened((SITE / f"{name}.html").as_uri())
    assert [
        *page_checks["not_for_everyone"](page),
        *page_checks["out_of_reach"](page),
    ] == []


def test_formulas_are_drawn_without_a_script(opened):
    page = opened((SITE / "generated/strank.functional.list_loss.html").as_uri())
    formula = page.locator("math[display=block]").first
    assert formula.locator("mfrac").count() == 1
    assert formula.bounding_box()["height"] > 30
    assert page.locator("script[src*=mathjax]").count() == 0
