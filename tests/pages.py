"""What is wrong with a page in a browser: on a telephone, for a reader, by keyboard, on paper."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import TimeoutError

TELEPHONE, SCREEN, PAPER = 390, 1280, 718  # A4 less its margins

_NAME = """const named = (e) =>
  `${[e.tagName.toLowerCase(), ...e.classList].join(".")}${e.id && "#" + e.id}` +
  ` "${e.textContent.trim().replace(/\\s+/g, " ").slice(0, 40)}"`;"""

_WIDE = """() => {
  const wide = document.documentElement.scrollWidth, most = document.documentElement.clientWidth;
  return wide > most ? [`${wide} px wide`] : [];
}"""

# What is made for the eyes of machines is a pixel wide.
_CUT = f"""() => {{
  {_NAME}
  return [...document.body.querySelectorAll("*")].filter((e) => {{
    const style = getComputedStyle(e);
    const across = style.overflowX !== "visible" && e.scrollWidth > e.clientWidth + 1;
    const down = style.overflowY !== "visible" && e.scrollHeight > e.clientHeight + 1;
    return e.clientWidth > 1 && e.checkVisibility() && (across || down);
  }}).map((e) => `${{named(e)}} is cut`);
}}"""

_WATCH = f"""() => {{
  {_NAME}
  const still = document.createElement("style");
  still.textContent = "* {{ transition: none !important; animation: none !important; }}";
  document.head.append(still);
  const seen = (e) => e.checkVisibility({{ visibilityProperty: true }}) && !e.closest("[inert]");
  const all = [...document.querySelectorAll("a[href], button, input, select, summary, [tabindex]")];
  const looks = (e) => {{
    const s = getComputedStyle(e);
    return [s.outline, s.boxShadow, s.borderColor, s.background, s.color, s.textDecoration].join();
  }};
  // Of radio buttons with one name, Tab reaches one.
  const wanted = all.filter((e) => e.tabIndex >= 0 && !e.disabled && e.type !== "radio" && seen(e));
  const before = new Map(all.map((e) => [e, looks(e)]));
  window.waiting = new Set(wanted);
  window.unseen = [];
  document.addEventListener("focusin", ({{ target }}) => {{
    window.waiting.delete(target);
    if (before.get(target) !== looks(target)) return;
    window.unseen.push(`${{named(target)}} does not show that it has the focus`);
  }});
  window.left = () => [...window.waiting].map((e) => `Tab does not reach ${{named(e)}}`);
  return wanted.length;
}}"""


def too_wide(page: Any) -> Iterator[str]:
    """Whether the page scrolls sideways."""
    for width in (TELEPHONE, SCREEN):
        page.set_viewport_size({"width": width, "height": 800})
        yield from (f"{fault} at {width} px" for fault in _width(page))


def _width(page: Any) -> list[str]:
    """Figures take a moment to follow the window."""
    with suppress(TimeoutError):
        page.wait_for_function(f"() => !({_WIDE})().length", timeout=2000)
    return page.evaluate(_WIDE)


def not_for_everyone(page: Any) -> Iterator[str]:
    """What axe calls serious or critical."""
    # Style sheets of a page that is a file cannot be fetched again.
    options = {"resultTypes": ["violations"], "preload": False}
    for found in Axe().run(page, options=options).response["violations"]:
        if found["impact"] in ("serious", "critical"):
            where = [str(node["target"][0]) for node in found["nodes"]]
            yield f"{found['id']}: {found['help']}: {where[:3]}"


def out_of_reach(page: Any) -> Iterator[str]:
    """What can be used, but not reached or not seen to be reached by Tab."""
    for _ in range(page.evaluate(_WATCH) + 2):
        page.keyboard.press("Tab")
    yield from page.evaluate("() => [...window.left(), ...window.unseen]")


def cut_on_paper(page: Any) -> Iterator[str]:
    """What printing leaves out since its place is too small."""
    page.set_viewport_size({"width": PAPER, "height": 1000})
    page.emulate_media(media="print")
    yield from (f"{fault} on paper" for fault in [*_width(page), *page.evaluate(_CUT)])
    page.emulate_media(media="screen")


def faults(page: Any) -> list[str]:
    """All of it."""
    found = [*too_wide(page), *not_for_everyone(page), *out_of_reach(page), *cut_on_paper(page)]
    return sorted(set(found))
