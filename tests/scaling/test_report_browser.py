"""The report in headless Chromium, from disk, at phone and desktop width.

`SCALE_RAE_SCREENSHOTS=folder` leaves pictures of it there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scale_rae.scaling.reader import read_experiment
from scale_rae.scaling.report import write_report
from scale_rae.scaling.select import choose
from tests.helpers.browser import DESKTOP, PHONE, chromium, needs_chromium
from tests.helpers.made_experiment import write_experiment

sync_api: Any = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
pytestmark = needs_chromium
PROMPTS = 12


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium(sync_api) as browser:
        yield browser


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its last prompt lacks an image."""
    folder = write_experiment(tmp_path_factory.mktemp("report") / "2_scale", PROMPTS + 1, texts=("a very long " * 40,))
    (folder / f"{PROMPTS:05}" / "samples" / "00003.png").unlink()
    return folder


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, experiment: Path) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(experiment, path, None, None, 0.5, 192)
    return path


@pytest.fixture(params=[PHONE, DESKTOP], ids=["phone", "desktop"], scope="module")
def opened(request: pytest.FixtureRequest, browser: Any, report: Path) -> Iterator[Any]:
    context = browser.new_context(viewport=request.param)
    context.set_default_timeout(240_000)  # against hanging only
    page = context.new_page()
    asked: list[str] = []
    errors: list[str] = []
    address = report.as_uri()
    page.on("request", lambda r: None if r.url == address or r.url.startswith("data:") else asked.append(r.url))
    page.on("pageerror", lambda e: errors.append(str(e)))
    page.on("console", lambda m: errors.append(m.text) if m.type in ("error", "warning") else None)
    page.goto(address)
    yield page
    if folder := os.environ.get("SCALE_RAE_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"report-{request.param['width']}.png", full_page=True)
    context.close()
    assert asked == []
    assert errors == []


@pytest.fixture
def page(opened: Any) -> Iterator[Any]:
    """The report as it is when it is opened; opening it takes a second."""
    yield opened
    opened.evaluate("document.activeElement.blur()")
    opened.locator("#metric").select_option("combined")
    opened.locator("#show").select_option("all")
    opened.locator("#words").fill("")
    opened.evaluate("scrollTo(0, 0)")


def shown(page: Any) -> list[str]:
    """Numbers of the prompts to be seen."""
    return [n.strip() for n in page.locator(".prompt:not(.hidden) .number").all_text_contents()]


def test_fits_and_shows_every_image(page: Any) -> None:
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    first = page.locator(".prompt").first
    assert first.locator("img").count() == 8
    for image in first.locator(".image").all():
        box = image.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= page.viewport_size["width"]
    if page.viewport_size == DESKTOP:  # the charts are one row
        tops = page.evaluate(
            "[...document.querySelectorAll('.plot')].filter(e => e.offsetParent).map(e => e.offsetTop)"
        )
        assert len(tops) == 3
        assert len(set(tops)) == 1
    first.locator("summary").click()  # the table scrolls, the page does not
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_picture_enlarges_over_the_whole_window(page: Any) -> None:
    picture = page.locator(".prompt").nth(2).locator("img").first
    picture.scroll_into_view_if_needed()
    picture.click()
    box, window = picture.bounding_box(), page.viewport_size
    assert box["width"] == pytest.approx(0.88 * min(window.values()), abs=1)
    assert box["x"] + box["width"] / 2 == pytest.approx(window["width"] / 2, abs=10)
    for x in (box["x"] + 3, box["x"] + box["width"] - 3):
        for y in (box["y"] + 3, box["y"] + box["height"] - 3):  # its corners are to be seen
            assert page.evaluate("([x, y]) => document.elementFromPoint(x, y) === document.activeElement", [x, y])


def test_ranks_by_each_metric_and_marks_the_kept(page: Any, experiment: Path) -> None:
    for metric in ("combined", "image_reward", "prompt_loss"):
        page.locator("#metric").select_option(metric)
        selections = choose(read_experiment(experiment), metric, None, 0.5)
        for number, selection in enumerate(selections):
            section = page.locator(f".prompt[data-p='{number}']")
            order = [int(i) for i in section.locator(".image").evaluate_all("all => all.map(f => f.dataset.i)")]
            assert order == list(selection.ranking.order), (metric, number)
            kept = section.locator(".image.kept").evaluate_all("all => all.map(f => +f.dataset.i)")
            assert kept == list(selection.kept), (metric, number)
        assert page.locator(".curves:not(.hidden)").get_attribute("data-metric") == metric


def test_filters(page: Any, experiment: Path) -> None:
    selections = choose(read_experiment(experiment), "combined", None, 0.5)
    answers = [[s.prompt.answer(i) == "yes" for i in s.kept] for s in selections]
    names = [s.prompt.name for s in selections]
    incomplete = f"{PROMPTS:05}"
    page.locator("#metric").select_option("combined")
    expected = {
        "all": [*names, incomplete],
        "top": [n for n, yes in zip(names, answers, strict=True) if not yes[0]],
        "any": [n for n, yes in zip(names, answers, strict=True) if not all(yes)],
        "incomplete": [incomplete],
    }
    assert 0 < len(expected["any"]) < PROMPTS
    for choice, wanted in expected.items():
        page.locator("#show").select_option(choice)
        assert shown(page) == wanted, choice
        assert page.locator("#shown").inner_text() == f"{len(wanted)} of {PROMPTS + 1} shown"
    page.locator("#show").select_option("all")
    page.locator("#words").fill("VERY LONG")
    assert shown(page) == ["00000"]
