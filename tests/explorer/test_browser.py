"""The page in Chromium: opens, lassoes, searches by a dropped file, exports; skipped where there is no Chromium."""

from __future__ import annotations

import base64
import csv
import math
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from photos import blurred_noise

import upstep_fast
from upstep_fast.data.sources.source import open_source

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)

pytestmark = [
    pytest.mark.xdist_group("browser"),
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)"),
]
COUNT = 40
DROP = """([name, content]) => {
  const bytes = Uint8Array.from(atob(content), (c) => c.charCodeAt(0)), data = new DataTransfer();
  data.items.add(new File([bytes], name, { type: "image/png" }));
  const how = { dataTransfer: data, bubbles: true, cancelable: true };
  for (const kind of ["dragover", "drop"]) dispatchEvent(new DragEvent(kind, how));
}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root, generator = tmp_path_factory.mktemp("browser") / "photos", torch.Generator().manual_seed(0)
    for i in range(COUNT):
        to = root / "ab"[i % 2]
        to.mkdir(parents=True, exist_ok=True)
        blurred_noise(generator, 40, (1.0, 0.1, 0.1) if i % 2 else (0.1, 0.1, 1.0)).save(to / f"{i:02}.png")
    shutil.copy(root / "a" / "00.png", root / "a" / "copy of 00.png")
    (root / "b" / "01.png").rename(root / "b" / "<i>1 & 'x'.png")
    return root


@pytest.fixture(scope="module")
def explored(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("upstep_fast.explorer.maps.MIN_ROWS", COUNT + 2)  # PCA alone: UMAP takes a minute to compile
        page = upstep_fast.explore(upstep_fast.load("demo", device="cpu"), folder, clusters=2)
    yield page
    page.close()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        sandbox = [] if os.geteuid() else ["--no-sandbox"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield browser
        browser.close()


def until(page, test, seconds=30):
    """Wait for a truth in the page: not by wait_for_function, whose eval the page's policy forbids."""
    end = time.monotonic() + seconds
    while not page.evaluate(test):
        assert time.monotonic() < end, f"{test} ({page.inner_text('#state')})"
        time.sleep(0.05)


@pytest.fixture
def page(request, browser, explored):
    """The page, opened; its parameter: the end of the address."""
    context = browser.new_context(
        viewport={"width": 1200, "height": 760}, reduced_motion="reduce", accept_downloads=True
    )
    page = context.new_page()
    wrong = []
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(explored.url + getattr(request, "param", ""))
    until(page, "(globalThis.explorer?.page.values.length ?? 0) > 0 && explorer.scatters.adapted.drawn > 0")
    yield page
    context.close()
    refused = "status of 422"  # Chromium notes it; a test sends what is no image
    assert not [text for text in wrong if refused not in text], wrong


def lasso(page, side, shares=(0.5, 0.5), radius=0.3, modifiers=()):
    """Draw a circle on a map; return the points inside it as the page's own coordinates say."""
    box = page.locator(f"#map-{side} .overlay").bounding_box()
    x, y, r = shares[0] * box["width"], shares[1] * box["height"], radius * box["width"]
    page.keyboard.press("l")
    points = [(x + r * math.cos(a / 4), y + r * math.sin(a / 4)) for a in range(26)]
    page.mouse.move(box["x"] + points[0][0], box["y"] + points[0][1])
    page.mouse.down()
    for px, py in points:
        page.mouse.move(box["x"] + px, box["y"] + py)
    page.mouse.up()
    places = page.evaluate(f"Array.from({{length: {COUNT + 1}}}, (_, i) => explorer.scatters.{side}.place(i))")
    return {i for i, place in enumerate(places) if math.dist(place, (x, y)) < 0.97 * r}, {
        i for i, place in enumerate(places) if math.dist(place, (x, y)) < 1.03 * r
    }


@pytest.mark.parametrize("page", ["", "#webgl"], ids=["by the processor", "by WebGL"], indirect=True)
def test_a_lasso_selects_in_both_maps_and_is_exported(page, explored, tmp_path):
    inner, outer = lasso(page, "adapted")
    until(page, "explorer.page.selection !== null")
    chosen = page.evaluate("Array.from(explorer.page.selection)")
    assert inner <= set(chosen) <= outer and 2 < len(chosen) < COUNT
    assert page.evaluate("Array.from(explorer.scatters.base.selection)") == chosen
    until(page, f"document.querySelectorAll('#view-selection .tile').length === {len(chosen)}")
    with page.expect_download() as download:
        page.click("#export")
    download.value.save_as(tmp_path / "selection.csv")
    source = open_source(tmp_path / "selection.csv")
    names = explored.gallery.names
    assert [source.name(i) for i in range(len(source))] == [names[i] for i in chosen]
    with open(tmp_path / "selection.csv", newline="") as file:
        assert {row["label"] for row in csv.DictReader(file)} <= {"a", "b"}
    page.keyboard.press("Escape")
    assert page.evaluate("explorer.page.selection") is None


def test_a_dropped_file_finds_itself_before_and_after(page, folder, explored):
    path = folder / "b" / "03.png"
    page.evaluate(DROP, [path.name, base64.b64encode(path.read_bytes()).decode()])
    until(page, "document.querySelectorAll('#view-image .tile').length >= 24")
    first = page.locator("#nearest-base ~ div .tile, #nearest-adapted ~ div .tile")
    i = next(k for k, name in enumerate(explored.gallery.names) if name.endswith("b/03.png"))
    for side in ("base", "adapted"):
        tile = page.locator(f"#nearest-{side} + div .tile").first
        assert int(tile.get_attribute("data-index")) == i and tile.inner_text() == "1.000"
    assert first.count() >= 24
    page.evaluate(DROP, ["text.png", base64.b64encode(b"no image").decode()])
    until(page, "document.getElementById('state').classList.contains('error')")
    assert "cannot be used" in page.inner_text("#state")


def test_what_failed_stays_readable_while_a_map_is_computed(page, explored):
    explored.gallery.maps.state = "UMAP is being computed"
    try:
        page.reload()
        until(page, "document.getElementById('umap').textContent.includes('UMAP is being computed')")
        page.evaluate(DROP, ["text.png", base64.b64encode(b"no image").decode()])
        until(page, "document.getElementById('state').classList.contains('error')")
        with page.expect_response("**/api/state"):
            pass
        with page.expect_response("**/api/state"):  # the answer before this one has been shown
            pass
        assert "cannot be used" in page.inner_text("#state") and "UMAP" in page.inner_text("#umap")
    finally:
        explored.gallery.maps.state = ""


def test_without_a_server_a_click_says_so(browser, explored):
    page = browser.new_page(viewport={"width": 390, "height": 844})
    wrong = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(explored.url)
    until(page, "(globalThis.explorer?.page.values.length ?? 0) > 0")
    page.evaluate("explorer.select(Uint32Array.of(1))")
    page.route("**/api/neighbors/**", lambda route: route.abort())
    page.locator("#view-selection .tile").first.click()
    until(page, "document.getElementById('state').textContent.includes('does not answer')")
    assert page.locator("#state").bounding_box()["x"] + page.locator("#state").bounding_box()["width"] <= 390
    assert not wrong
    page.close()


def test_a_file_that_is_too_large_is_refused_by_its_size(page):
    page.evaluate("explorer.page.facts.maxUpload = 1 << 20")
    page.evaluate(DROP, ["large.png", base64.b64encode(bytes((1 << 20) + 1)).decode()])
    until(page, "document.getElementById('state').textContent.includes('larger than 1 MiB')")


def test_names_with_markup_are_text(page):
    page.fill("#find-text", "<i>1")
    page.keyboard.press("Enter")
    until(page, "explorer.page.selection?.length === 1")
    tile = page.locator("#view-selection .tile").first
    tile.click()
    until(page, "document.querySelector('#view-image .path')?.textContent.includes(\"<i>1 & 'x'.png\")")
    assert page.locator("#view-image i").count() == 0


def test_the_lists_hold_the_copy(page, explored):
    page.click("#tab-copies")
    until(page, "document.querySelector('#view-copies .tile')")
    indices = page.evaluate("[...document.querySelectorAll('#view-copies .tile')].map((t) => +t.dataset.index)")
    assert sorted(Path(explored.gallery.names[i]).name for i in indices) == ["00.png", "copy of 00.png"]


def test_the_keyboard_goes_from_image_to_image(page):
    page.focus("#map-adapted .overlay")
    page.keyboard.press("ArrowRight")
    until(page, "explorer.scatters.adapted.hovered >= 0")
    first = page.evaluate("explorer.scatters.adapted.hovered")
    page.keyboard.press("ArrowLeft")
    until(page, f"explorer.scatters.adapted.hovered !== {first}")
    assert page.evaluate("explorer.scatters.base.hovered === explorer.scatters.adapted.hovered")
    until(page, "document.getElementById('say').textContent.includes('.png')")
    page.keyboard.press("Enter")
    until(page, "document.querySelectorAll('#view-image .tile').length >= 24")


def test_on_a_phone_nothing_is_wider_than_the_screen(browser, explored):
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(explored.url)
    until(page, "(globalThis.explorer?.page.values.length ?? 0) > 0")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert not page.locator("#map-base").is_visible()
    page.click("#sides [data-side=base]")
    assert page.locator("#map-base").is_visible()
    page.close()
