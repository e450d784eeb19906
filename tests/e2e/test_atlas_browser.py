"""The atlas of features in a real browser, from a disk: 4,096 features, cards that load when they are opened, verdicts that export."""

import json
from pathlib import Path

import numpy as np
import pytest

from curation.sprites import jpeg
from pipelines.atlas_page import check_out, write_feature, write_index

NUM, PAGE = 4096, 48
HOSTILE = '<img src=x onerror="document.title=1"></script><script>document.title=2</script>'
DAMAGE = ("jpeg", "watermark", "interlace", "letterbox")
TOWER, WEIGHTS = "compact/1/feed", "abc123"


def made_up_card(feature: int, uids: list[str], rng: np.random.Generator) -> dict:
    """A card as `curation.atlas.cards` yields it, of a feature that answers to one kind of damage."""
    values = np.sort(rng.random(len(uids)))[::-1] * 2
    every = [[i, float(value)] for i, value in enumerate(values)]
    strips = {"strongest": every[:12], "upper": every[12:20], "middle": [], "lower": [], "above": every[4:12], "below": every[12:18]}
    families = [{"name": "clean", "role": "clean", "severity": 0, "num": 90, "share": 0.0, "upper": 0.03, "auroc": None}]
    for kind in DAMAGE:
        strong = 0.8 if kind == DAMAGE[feature % 4] else 0.05
        for severity in range(1, 6):
            share = strong * severity / 5
            one = {"name": kind, "role": "damage", "severity": severity, "num": 90, "share": share, "upper": share + 0.05}
            families.append(one | {"auroc": 0.5 + share / 2})
    families.append({"name": "motion_blur", "role": "style", "severity": 0, "num": 90, "share": 0.011, "upper": 0.05, "auroc": 0.5})
    counts = {name: rng.integers(0, 50, 40).tolist() for name in ("images", "clean", "damage", "style")}
    return {
        "feature": feature,
        "threshold": 1.0,
        "fires": 0.5,
        "rate": float(rng.random()) ** 4 if feature % 64 else 0.0,
        "above": 12,
        "num": len(uids),
        "largest": float(values[0]),
        "strips": strips,
        "histogram": {"low": -0.5, "high": 2.0, "counts": counts},
        "near": [[(feature + i) % NUM, 0.9 - i / 10] for i in range(1, 7)],
        "families": families,
        "match": {"feature": 7, "correlation": float(rng.random())},
        "row": {"tag": HOSTILE if feature == 1 else "agency mark", "verdict": "artifact", "reviewers": ""}
        if feature in (1, 2049)
        else None,
        "evidence": {"names": [f"word{feature % 97}"], "p": 1e-9} if feature % 2 else {},
    }


@pytest.fixture(scope="module")
def atlas(tmp_path_factory) -> Path:
    """4,096 features; 0 to 3 with pictures; the last one's card is missing."""
    folder, rng = check_out(str(tmp_path_factory.mktemp("atlas") / "page")), np.random.default_rng(0)
    uids = [f"folder/{HOSTILE}.jpg", *(f"folder/{i}.jpg" for i in range(1, 30))]
    pictures = {i: jpeg(np.full((96, 128, 3), 8 * i, np.uint8), 92) for i in range(30)}
    lines = []
    for feature in range(NUM):
        card = made_up_card(feature, uids, rng)
        details = [{"uid": uid, "heat": pictures[3], "crop": pictures[4]} for uid in uids[:3]]
        if feature < 4:
            lines.append(write_feature(card, uids, True, pictures, details, [("jpeg 3", 1.5, pictures[5])], folder))
            continue
        if feature == 2049:
            card["strips"]["below"] = []
        lines.append(write_feature(card, uids, False, {}, [], [], folder))
    (folder / "features" / f"{NUM - 1}.js").unlink()
    write_index(
        lines, {"model": "sae-here", "tower": TOWER, "weights": WEIGHTS, "other": "sae-other", "num_images": 30, "evaluation": {}}, folder
    )
    return folder


def opened(browser, atlas, place="", **options):
    """The page in a profile of its own, with lists of what it logged and what it asked for."""
    page = browser.new_context(accept_downloads=True, **options).new_page()
    page.logged, page.asked = [], []
    page.on("console", lambda message: page.logged.append(message.text))
    page.on("pageerror", lambda error: page.logged.append(str(error)))
    page.on("request", lambda request: page.asked.append(request.url) if request.url.startswith(("file:", "http")) else None)
    page.goto((atlas / "index.html").as_uri() + place)
    return page


@pytest.fixture
def page(browser, atlas):
    page = opened(browser, atlas)
    yield page
    assert page.logged == [], "something was written to the console"
    page.context.close()


def features(page) -> list[int]:
    return page.eval_on_selector_all("#grid .tile", "tiles => tiles.map(tile => Number(tile.dataset.feature))")


def test_the_list_opens_with_a_screenful_and_no_card(page, atlas):
    alive = NUM - NUM // 64
    assert page.inner_text("#status") == f"{alive:,} of {NUM:,} features"
    assert len(features(page)) <= 2 * PAGE and features(page)[:2] == [1, 2049], "proposals come first"
    assert all(url.startswith(atlas.as_uri()) for url in page.asked)
    assert not [url for url in page.asked if "/features/" in url and url.endswith(".js")]


def test_more_of_the_list_comes_as_one_scrolls(page):
    before = len(features(page))
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    page.wait_for_selector(f"#grid .tile:nth-child({before + 1})")
    assert len(set(features(page))) == len(features(page)) <= before + 2 * PAGE


def test_search_finds_names_damage_verdicts_and_numbers(page):
    page.fill("#search", "word13")
    expected = [f for f in range(NUM) if f % 97 == 13 and f % 2 and f % 64]
    assert page.inner_text("#status").startswith(f"{len(expected)} of") and sorted(features(page)) == expected
    page.fill("#search", "agency")
    assert features(page) == [2049]
    page.fill("#search", "#64")
    assert features(page) == [64], "a number finds a feature that never fires too"
    page.fill("#search", "watermark word13")
    assert sorted(features(page)) == [f for f in expected if f % 4 == 1]
    page.fill("#search", "nothing of the kind")
    assert features(page) == [] and "Clear the search" in page.inner_text("#status")


def test_search_of_thousands_takes_less_than_the_work_of_a_frame_or_two(page):
    """Counted in list items that are built, not in seconds: a keystroke builds one screenful, whatever the number of features."""
    count = "new MutationObserver(all => all.forEach(one => built += one.addedNodes.length))"
    built = f"window.built = 0; {count}.observe(document.getElementById('grid'), {{childList: true}})"
    page.evaluate(built)
    page.fill("#search", "word")
    page.wait_for_selector("#status:has-text('2,048')")
    assert 0 < page.evaluate("built") <= 2 * PAGE


def test_sorting_orders_the_whole_list(page):
    shown = json.loads(page.evaluate("JSON.stringify(ATLAS.columns)"))
    for value, column, sign in (("rate", "rate", -1), ("rare", "rate", 1), ("match", "match", -1), ("feature", "feature", 1)):
        page.select_option("#sort", value)
        alive = [i for i in range(NUM) if shown["rate"][i] > 0]
        expected = sorted(alive, key=lambda i: (sign * shown[column][i], i))
        assert features(page)[:PAGE] == expected[:PAGE], value
    page.select_option("#show", "proposals")
    assert sorted(features(page)) == [1, 2049]


def test_a_card_loads_when_it_is_opened_and_shows_its_pictures(page, atlas):
    page.click("#grid .tile[data-feature='1']")
    page.wait_for_selector("#card .strip")
    asked = [url.rpartition("/")[2] for url in page.asked if "/features/" in url]
    assert "1.js" in asked and {name for name in asked if name.endswith(".js")} <= {"1.js", "2049.js"}, "this one, and the next"
    titles = page.locator("#card h3").all_inner_texts()
    assert (
        titles[:3] == ["Strongest", "Upper quarter", "Damaged on purpose"]
        and "jpeg 3" in page.inner_text("#card")
        and "Just above the threshold 1" in titles
        and "Dose" in titles
    )
    assert page.locator("#card .strip.over .item").count() == 8 and page.locator("#card .strip.under .item").count() == 6
    backgrounds = page.eval_on_selector_all("#card .pic", "pics => pics.map(pic => getComputedStyle(pic).backgroundImage)")
    assert all("/features/1" in background for background in backgrounds) and len(backgrounds) > 30
    sizes = page.evaluate(
        """Promise.all(["1.jpg", "1-detail.jpg"].map(async name => {
        const image = new Image(); image.src = "features/" + name; await image.decode(); return image.naturalWidth; }))"""
    )
    assert min(sizes) > 300
    assert page.locator("#card svg").count() == 2 and page.locator("#card .panel td", has_text="motion blur").count() == 1


def test_a_picture_opens_large_and_arrows_walk_through_the_list(browser, atlas):
    page = opened(browser, atlas, "#1")
    page.wait_for_selector("#card .item button")
    page.locator("#card .item button").first.click()
    assert page.locator("dialog .pic").bounding_box()["width"] > 250
    page.keyboard.press("Escape")
    assert not page.locator("dialog").is_visible()
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("#card h2:has-text('2049')")
    assert "only codes" in page.inner_text("#card") and page.locator("#card .item").count() > 0
    page.keyboard.press("Escape")
    page.wait_for_selector("#grid .tile")
    assert page.logged == []
    page.context.close()


def test_hostile_names_are_text(browser, atlas):
    page = opened(browser, atlas, "#1")
    page.wait_for_selector("#card .strip")
    assert HOSTILE in page.inner_text("#card h2") and HOSTILE in page.locator("#card .uid").first.get_attribute("title")
    assert page.title().startswith(f"1 {HOSTILE}") and page.locator("[onerror]").count() == 0 and page.logged == []
    page.context.close()


def test_a_verdict_is_kept_and_exported_and_taken_back(browser, atlas, tmp_path):
    page = opened(browser, atlas, "#2049")
    page.wait_for_selector("#card .say")
    assert "removes nothing until somebody signs it" in page.inner_text("#card .say") and page.is_disabled("#export")
    page.click("[data-verdict=artifact]")
    page.fill("#card .say input", "agency stamp")
    page.evaluate("location.hash = '#3'")
    page.wait_for_selector("#card h2:text-matches('^3')")
    page.keyboard.press("2")
    page.wait_for_selector("[data-verdict=style][aria-pressed=true]")
    page.click("#export")
    assert "Give your name first" in page.inner_text("#status")
    page.fill("#reviewer", "Ada L.")
    page.reload()
    page.wait_for_selector("[data-verdict=style][aria-pressed=true]")
    assert page.input_value("#reviewer") == "Ada L." and page.inner_text("#export") == "Export 2 choices"
    with page.expect_download() as download:
        page.click("#export")
    assert download.value.suggested_filename == "sae-here-Ada-L..json"
    download.value.save_as(tmp_path / "choices.json")
    assert json.loads((tmp_path / "choices.json").read_text()) == {
        "kind": "k2 sae choices",
        "model": "sae-here",
        "tower": TOWER,
        "weights": WEIGHTS,
        "reviewer": "Ada L.",
        "choices": {
            "2049": {"verdict": "artifact", "tag": "agency stamp", "threshold": 1},
            "3": {"verdict": "style", "tag": "", "threshold": 1},
        },
    }
    page.click("[data-verdict=style]")
    page.wait_for_selector("#export:text-is('Export 1 choice')")
    page.evaluate("location.hash = ''")
    page.select_option("#show", "mine")
    assert features(page) == [2049] and "agency stamp" in page.inner_text("#grid")
    assert page.logged == []
    page.context.close()


def test_a_blind_reviewer_sees_no_name_before_deciding(browser, atlas):
    page = opened(browser, atlas)
    page.check("#blind")
    assert "agency mark" not in page.inner_text("#grid") and page.locator("#grid .chip").count() == 0
    page.evaluate("location.hash = '#2049'")
    page.wait_for_selector("#card .say")
    assert "agency mark" not in page.inner_text("#card") and page.input_value("#card .say input") == ""
    page.keyboard.press("1")
    page.wait_for_selector("[data-verdict=artifact][aria-pressed=true]")
    assert "agency mark" in page.inner_text("#card h2")
    page.context.close()


def test_a_card_that_is_missing_says_so(browser, atlas):
    page = opened(browser, atlas, f"#{NUM - 1}")
    page.wait_for_selector("#status.bad")
    assert f"features/{NUM - 1}.js is missing" in page.inner_text("#status")
    page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("place", ["", "#1"])
def test_a_phone_scrolls_down_only_and_has_contrast(browser, atlas, scheme, place):
    page = opened(browser, atlas, place, viewport={"width": 390, "height": 800}, color_scheme=scheme)
    page.wait_for_selector("#card .strip" if place else "#grid .tile")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    colours = page.evaluate("[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]")
    ((ink, *_), (paper, *_)) = ([int(value) for value in colour[4:-1].split(",")] for colour in colours)
    assert abs(ink - paper) > 180
    page.context.close()
