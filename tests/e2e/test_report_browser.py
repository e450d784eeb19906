"""The report in a real browser: whole, silent on the network, deaf to hostile text, readable without scripts and on a phone."""

import shutil
from pathlib import Path

import pytest
from small_run import HOSTILE, HOSTILE_NAME, small_run

from pipelines.report import render, report


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    run = small_run(tmp_path_factory.mktemp("report"))
    assert report(str(run)) == 0
    return run


def opened(browser, run, **options):
    """The page of a run, with lists of what it logged and what it asked the network for."""
    page = browser.new_page(**options)
    page.logged, page.asked = [], []
    page.on("console", lambda message: page.logged.append(message.text))
    page.on("pageerror", lambda error: page.logged.append(str(error)))
    page.on("request", lambda request: page.asked.append(request.url) if not request.url.startswith("data:") else None)
    page.goto((run / "report.html").as_uri())
    return page


@pytest.fixture
def page(browser, run):
    page = opened(browser, run)
    yield page
    page.close()


def test_the_page_loads_without_errors_and_asks_the_network_for_nothing(page):
    assert page.logged == [] and [url.rpartition("/")[2] for url in page.asked] == ["report.html"]


def test_every_picture_is_shown_and_has_a_text(page):
    assert page.evaluate("document.images.length") > 60
    page.evaluate("for (const image of document.images) image.loading = 'eager'")
    page.evaluate("Promise.all([...document.images].map(image => image.decode()))")
    assert page.evaluate("[...document.images].filter(image => !(image.naturalWidth > 0)).length") == 0
    assert page.evaluate("[...document.images].filter(image => !image.alt).length") == 0


def test_hostile_captions_and_file_names_are_text(page):
    text = page.inner_text("main")
    assert HOSTILE in text and HOSTILE_NAME in text.replace("\n", "")
    assert page.title() == "run: report of a K2 data engine run"
    assert page.locator("[onerror]").count() == 0 and page.locator("script").count() == 1 and page.locator("img[src='x']").count() == 0


def test_a_picture_opens_large_and_closes_by_key(page):
    page.locator("#rules .zoom").first.click()
    large = page.locator("dialog img")
    assert large.is_visible() and large.evaluate("image => image.naturalWidth") > 0
    page.keyboard.press("Escape")
    assert not large.is_visible()


def test_contents_lead_to_every_section(page):
    targets = page.eval_on_selector_all("nav a", "links => links.map(link => link.hash.slice(1))")
    sections = page.eval_on_selector_all("main section", "sections => sections.map(section => section.id)")
    assert targets == sections
    assert sections == ["funnel", "planted", "rules", "scores", "duplicates", "broken", "packed", "training", "made-by"]
    broken_links = "[...document.links].filter(link => !document.getElementById(link.hash.slice(1))).length"
    assert page.evaluate(broken_links) == 0 and page.locator("h1").count() == 1


def test_it_reads_the_same_without_scripts(browser, run, page):
    silent = opened(browser, run, java_script_enabled=False)
    assert silent.inner_text("body") == page.inner_text("body")
    silent.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_scrolls_down_only_and_has_contrast(browser, run, scheme):
    page = opened(browser, run, viewport={"width": 360, "height": 740}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    colours = page.evaluate("[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]")
    dark, light = sorted(luminance(colour) for colour in colours)
    assert (light + 0.05) / (dark + 0.05) > 7  # WCAG AAA
    page.close()


def luminance(colour: str) -> float:
    """Relative luminance of rgb(r, g, b), WCAG 2."""
    channels = [int(value) / 255 for value in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_numbers_are_those_of_the_run(page):
    tiles = dict(line.split("\n")[::-1] for line in page.locator(".tiles li").all_inner_texts())
    assert tiles["images"] == "17" and tiles["broken"] == "1" and tiles["training steps of k2-nano"] == "40"
    phases = page.locator("#training tbody tr").all_inner_texts()
    assert [row.split("\t")[:4] for row in phases] == [["256", "30", "120", "60"], ["512", "10", "40", "20"]]


def test_the_same_run_gives_the_same_page(run):
    assert render(str(run)) == render(str(run)) == (run / "report.html").read_text()


def test_annotations_alone_make_a_page(browser, run, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(run / "annotations" / "basics", bare / "annotations" / "basics")
    assert report(str(bare)) == 0
    page = opened(browser, bare)
    assert page.eval_on_selector_all("main section", "all => all.map(section => section.id)") == ["broken", "made-by"]
    assert page.logged == []
    page.close()


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="k2 annotate"):
        report(str(tmp_path))
