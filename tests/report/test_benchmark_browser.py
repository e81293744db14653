"""The page of a benchmark in a real browser, opened as a file."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest

from strank.report import benchmark as benchmark_page
from strank.report.benchmark import data, parts, write_report

EVIL = "<img src=x onerror=alert(1)>"
TABLE = "#gene-table tbody tr"


@pytest.fixture(scope="module")
def url(benchmark_folder):
    return write_report(benchmark_folder.folder).path.as_uri()


@pytest.fixture
def page(opened, url):
    return opened(url)


def plotted(page, where, expression="data[0].marker.color"):
    return page.evaluate(f"document.getElementById('{where}').{expression}")


def column(page, number):
    cells = page.locator(f"{TABLE} > :nth-child({number})").all_inner_texts()
    return [cell.strip() for cell in cells]


def test_choosing_a_gene_section_and_method_changes_the_map(page, benchmark_folder):
    for section, fold, method, gene in [
        ("A1", "A", "linear, list", "G0"),
        ("B1", "B 1", "linear, list", "G2"),
        ("B1", "B 1", "mlp, <b>list</b>", EVIL),
    ]:
        page.get_by_label("Section", exact=True).select_option(label=section)
        page.get_by_label("Method", exact=True).select_option(method)
        page.get_by_label("Gene", exact=True).select_option(gene)
        adata = benchmark_folder.predictions["mine", fold, method]
        expected = adata[:, gene].X[:40, 0]
        expected = expected - expected.mean()
        found = np.array(plotted(page, "map-predicted"))
        np.testing.assert_allclose(found, expected, atol=np.abs(expected).max() / 200)
        assert gene in page.locator("#map-status").inner_text()
    assert plotted(page, "map-observed") != plotted(page, "map-predicted")
    source = plotted(page, "map-predicted", "layout.images[0].source")
    assert source.startswith("data:image/jpeg")
    page.get_by_label("Method", exact=True).select_option("shuffled")
    assert "no predictions are kept" in page.locator("#map-status").inner_text()


def test_a_gene_of_the_table_leads_to_its_map(page):
    page.get_by_label("Panel", exact=True).select_option("all")
    assert page.locator(TABLE).count() == 12
    assert page.locator(f"{TABLE} button").count() == 6
    page.get_by_role("button", name="G1", exact=True).click()
    assert page.locator("#map-gene").input_value() == "G1"
    assert page.locator("#map-gene").evaluate("e => e === document.activeElement")


def test_the_table_sorts_by_click_and_by_keyboard(page):
    page.get_by_label("Panel", exact=True).select_option("all")
    counts = page.get_by_role("button", name="Mean counts")
    header = page.locator("th[data-column=mean_counts]")
    counts.click()
    shown = [float(v) for v in column(page, 2)]
    assert header.get_attribute("aria-sort") == "descending"
    assert shown == sorted(shown, reverse=True)
    assert len(set(shown)) > 6
    counts.focus()
    page.keyboard.press("Enter")
    assert header.get_attribute("aria-sort") == "ascending"
    assert [float(v) for v in column(page, 2)] == sorted(shown)
    page.get_by_role("button", name="SCC", exact=True).focus()
    page.keyboard.press("Space")
    # What has no value comes last, whatever the order.
    assert column(page, 3)[-1] == "–"
    assert header.get_attribute("aria-sort") == "none"
    page.keyboard.press("Space")
    assert column(page, 3)[-1] == "–"
    assert page.locator("[aria-sort=ascending], [aria-sort=descending]").count() == 1


def test_searching_filters_genes(page):
    page.get_by_label("Panel", exact=True).select_option("all")
    page.get_by_label("Search").fill("g")
    assert page.locator("#search-status").inner_text() == "10 of 12 genes"
    page.get_by_label("Search").fill("a&")
    assert column(page, 1) == ["A&B"]
    page.get_by_label("Search").fill("nothing such")
    assert column(page, 1) == []
    page.get_by_label("Search").fill("")
    assert page.locator(TABLE).count() == 12


def test_names_are_text_everywhere(page):
    page.get_by_label("Gene", exact=True).select_option(EVIL)
    page.get_by_label("Method", exact=True).select_option("mlp, <b>list</b>")
    assert EVIL in column(page, 1)
    assert page.locator("img").count() == 0
    assert page.locator("main b, header b").count() == 0
    assert "<script>alert(3)</script>" in page.locator(".warnings").first.inner_text()
    # Plotly's own texts: names of methods beside dots, titles of maps, and what is told of a dot.
    assert "mlp, <b>list</b> " in page.locator("#board-plot .ytick").all_text_contents()
    assert page.locator("#map-predicted .gtitle").text_content() == "mlp, <b>list</b>"
    page.evaluate(
        """gene => {
          const div = document.getElementById("depth-plot");
          const trace = div.data.findIndex((t) => t.name?.includes("mlp"));
          const point = div.data[trace].hovertext.findIndex((text) => text.includes("onerror"));
          Plotly.Fx.hover(div, [{ curveNumber: trace, pointNumber: point }]);
        }""",
        EVIL,
    )
    assert EVIL in page.locator("#depth-plot .hoverlayer").text_content()


def test_another_score_changes_the_methods(page):
    def shown():
        rows = page.locator("#board-table tbody tr").all_inner_texts()
        return rows, plotted(page, "board-plot", "data.flatMap((t) => t.x)")

    assert page.get_by_label("Score", exact=True).input_value() == "depth_matched"
    first = shown()
    assert len(first[0]) == len(first[1]) == 6
    means = [float(row.split("\t")[1].split()[0]) for row in first[0]]
    best = next(row for row in first[0] if not row.startswith(("library size", "shuffled")))
    told = page.locator("#board-finding").inner_text()
    assert told.startswith(f"Best: {best.split(chr(9))[0].strip()}, ")
    assert "Library size alone" in told
    assert means == sorted(means, reverse=True)
    assert np.round(sorted(first[1], reverse=True), 3).tolist() == means
    page.get_by_label("Score", exact=True).select_option("lift")
    second = shown()
    assert first[0] != second[0]
    assert first[1] != second[1]
    assert "lift" in plotted(page, "depth-plot", "layout.yaxis.title.text")
    page.get_by_label("Encoder", exact=True).select_option("other")
    page.get_by_label("Patients", exact=True).select_option("known")
    assert shown()[1] != second[1]


def test_another_method_changes_its_plots(page):
    def named():
        return plotted(page, "depth-plot", "data.map((t) => t.name).filter(Boolean)")

    assert named() == ["library size", "linear, list"]
    assert page.locator("#calibration-table tbody tr").count() == 2
    page.get_by_label("Method", exact=True).select_option("mlp, poisson")
    assert page.locator("#calibration-finding").inner_text().startswith("mlp, poisson: slope")
    page.get_by_label("Method", exact=True).select_option("ridge")
    assert named() == ["library size", "ridge"]
    told = page.locator("#calibration-finding").inner_text()
    assert told.startswith("linear, list: slope")
    assert "ridge are no log rates" in told


def test_zooming_one_map_zooms_all_with_spots_of_true_size(page):
    def state(where):
        low, high = plotted(page, where, "layout.xaxis.range")
        return high - low, plotted(page, where, "data[0].marker.size")

    page.locator("#maps").scroll_into_view_if_needed()
    whole = state("map-predicted")
    box = page.locator("#map-image .nsewdrag").bounding_box()
    page.mouse.move(box["x"] + 20, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=4)
    page.mouse.up()
    page.wait_for_timeout(500)
    part = state("map-predicted")
    assert part[0] < 0.7 * whole[0]
    assert part[1] / whole[1] == pytest.approx(whole[0] / part[0], rel=1e-3)
    assert state("map-image")[0] == state("map-observed")[0] == part[0]
    page.mouse.dblclick(box["x"] + 20, box["y"] + 20)
    page.wait_for_timeout(500)
    assert state("map-predicted") == pytest.approx(whole)


def test_on_paper_everything_is_there_and_nothing_is_cut(page):
    page.emulate_media(media="print")
    assert not page.locator(".toolbar").is_visible()
    for part in ("leaderboard", "depth", "ceiling", "genes-table", "maps", "calibration"):
        assert page.locator(f"#{part} h2").is_visible()
    for where in ("board-plot", "map-predicted", "calibration-plot"):
        assert page.locator(f"#{where} .main-svg").first.is_visible()
    assert page.locator(TABLE).last.is_visible()
    assert page.locator(".scroll.tall").first.evaluate("e => e.scrollHeight <= e.clientHeight + 1")
    assert len(page.pdf()) > 50_000
    # Figures are as wide as their place again.
    page.emulate_media(media="screen")
    page.wait_for_function(
        """() => [...document.querySelectorAll(".plot")].every(
          (div) => Math.abs(div._fullLayout.width - div.clientWidth) < 2)"""
    )


def test_it_fits_a_telephone_a_screen_and_paper_and_is_for_everyone(page, page_checks):
    assert page_checks["faults"](page) == []


@pytest.mark.parametrize("width", [390, 800])
def test_figures_follow_the_width_of_the_window(opened, url, width):
    page = opened(url, width)
    page.set_viewport_size({"width": 1000, "height": 800})
    page.wait_for_function(
        """() => ["board-plot", "map-image"].every((id) => {
          const div = document.getElementById(id);
          return Math.abs(div._fullLayout.width - div.parentElement.clientWidth) < 3;
        })"""
    )


def test_everything_is_reached_by_keyboard_and_has_a_name(page):
    names = page.evaluate(
        """() => [...document.querySelectorAll("select, input, .scroll, thead button")].map((e) =>
          e.getAttribute("aria-label") ?? e.labels?.[0]?.innerText ?? e.innerText)"""
    )
    assert all(name.strip() for name in names)
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id"))
    wanted = {"score", "method", "genes", "encoder", "patients", "search", "map-section"}
    assert wanted | {"map-gene", "map-opacity"} <= reached


def test_the_browser_runs_no_other_script_and_asks_for_nothing(browser, url):
    context = browser.new_context()
    page, told = context.new_page(), []
    page.on("console", lambda message: told.append(message.text))
    page.goto(url)
    page.evaluate(
        """() => {
          const made = document.createElement("div");
          made.innerHTML = '<button id="other" onclick="window.wrong = true">x</button>';
          document.body.append(made);
          document.getElementById("other").click();
        }"""
    )
    assert page.evaluate("window.wrong") is None
    assert page.evaluate("fetch('https://example.org').then(() => 'sent', () => 'refused')") == (
        "refused"
    )
    assert all("Content Security Policy" in message for message in told)
    assert told
    context.close()


@pytest.fixture
def apart(benchmark_folder, tmp_path, monkeypatch):
    """A page whose genes and maps lie in files beside it; of maps, some genes each."""
    monkeypatch.setattr(parts, "_MOST", 5000)
    monkeypatch.setattr(data, "GENES", 4)
    monkeypatch.setattr(benchmark_page, "GENES", 4)
    folder = tmp_path / "a b#1"
    shutil.copytree(benchmark_folder.folder, folder)
    return write_report(folder)


def test_what_lies_beside_the_page_is_loaded_when_it_is_asked_for(opened, apart, benchmark_folder):
    page = opened(apart.path.as_uri())
    page.locator(TABLE).first.wait_for()
    page.wait_for_function("() => document.getElementById('map-predicted').data !== undefined")
    assert f"lie in {apart.files.name} beside this page" in page.locator(".notes").inner_text()
    loaded = "Object.keys(page.data.parts).sort()"
    assert page.evaluate(loaded) == ["genes-0", "map-1", "map-1-0"]
    page.get_by_label("Panel", exact=True).select_option("all")
    page.wait_for_function(f"() => document.querySelectorAll('{TABLE}').length === 12")
    page.get_by_label("Section", exact=True).select_option(label="B1")
    page.get_by_label("Gene", exact=True).select_option("G2")
    page.wait_for_function(
        "() => document.getElementById('map-status').textContent.startsWith('G2 in B1 (')"
    )
    assert len(page.evaluate(loaded)) == 7
    assert "map-3-1" in page.evaluate(loaded)
    expected = benchmark_folder.predictions["mine", "B 1", "linear, list"][:, "G2"].X[:, 0]
    expected = expected - expected.mean()
    found = np.array(plotted(page, "map-predicted"))
    np.testing.assert_allclose(found, expected, atol=np.abs(expected).max() / 200)
    assert not page.locator("#absent").is_visible()


def test_files_that_are_not_beside_the_page_are_told(browser, apart):
    shutil.rmtree(apart.files)
    context = browser.new_context()
    page = context.new_page()
    page.goto(apart.path.as_uri())
    page.locator("#absent").wait_for()
    told = page.locator("#absent").inner_text()
    assert re.match(r"report_files/.*\.js is not there, .*: keep report_files beside this p", told)
    assert "Best: " in page.locator("#board-finding").inner_text()
    # A page with files runs those, and still nothing from elsewhere.
    page.evaluate(
        """() => {
          const script = document.createElement("script");
          script.src = "https://example.org/x.js";
          script.onerror = () => { window.refused = true; };
          document.head.append(script);
          const inline = document.createElement("script");
          inline.textContent = "window.wrong = true";
          document.head.append(inline);
        }"""
    )
    page.wait_for_function("() => window.refused === true")
    assert page.evaluate("window.wrong") is None
    context.close()


def test_a_page_without_images_works(opened, benchmark_folder, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(benchmark_folder.folder, folder)
    text = (folder / "benchmark.json").read_text()
    (folder / "benchmark.json").write_text(text.replace(str(benchmark_folder.cohort), "/none"))
    page = opened(write_report(folder).path.as_uri())
    assert "No observed counts and no H&E" in page.locator(".notes").inner_text()
    assert len(plotted(page, "map-predicted")) == 40
    assert page.locator("#map-observed .gtitle").text_content() == "observed: no counts"
    assert not page.locator("#calibration").is_visible()
