"""Each tab end to end in headless Chromium, on one server.

`SCALE_RAE_SCREENSHOTS=folder` leaves pictures of the page there; docs/demo-*.png are some of them.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from scale_rae.demo.listening import bind
from scale_rae.demo.shared_model import SharedModel
from scale_rae.demo.streams import Emitter
from scale_rae.opening import OpenedModel
from scale_rae.options import ModelChoice
from tests.demo.conftest import needs_gradio
from tests.helpers.browser import DESKTOP, PHONE, chromium, needs_chromium
from tests.helpers.late import Late
from tests.helpers.png import png_of_size

sync_api: Any = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")

demo, server, widgets = (Late(f"scale_rae.demo.{name}") for name in ("page", "server", "widgets"))
pytestmark = [needs_chromium, needs_gradio]
PATIENCE = 120_000  # ms, against hanging only
sync_api.expect.set_options(timeout=PATIENCE)
TABS = ["Draw", "Look", "Best of N", "Latent"]
SCREENSHOTS = os.environ.get("SCALE_RAE_SCREENSHOTS")
STEPS, FEW = (60, 60) if SCREENSHOTS else (12, 3)
Hold = Callable[[str], threading.Event]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("demo")
    choice = ModelChoice("shapes", device="cpu")
    shown = folder / "page"
    shared = SharedModel(OpenedModel(choice, decoder=True), choice, folder, shown / "drawn")
    running = server.launch(demo.build(shared, shown), bind("127.0.0.1", None), shown)
    yield running.url
    running.close()


@pytest.fixture
def hold(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hold]:
    """Work waits, once it has shown a progress that the pattern matches, for the event that is returned.

    So the page has all the time that it needs, and drawing need not take long.
    """
    emit, events = Emitter.__call__, list[threading.Event]()

    def hold(progress: str) -> threading.Event:
        events.append(event := threading.Event())

        def emit_and_wait(self: Emitter[Any], value: Any) -> None:
            emit(self, value)
            if re.search(progress, getattr(value, "text", "") or getattr(value, "progress", "")):
                event.wait(PATIENCE / 1000)

        monkeypatch.setattr(Emitter, "__call__", emit_and_wait)
        return event

    yield hold
    for event in events:
        event.set()


@pytest.fixture(scope="module")
def windows() -> Iterator[Any]:
    """Where windows are opened. They share what they keep of the page's scripts, which take seconds to fetch and compile."""
    with chromium(sync_api) as browser, browser.new_context() as context:
        context.set_default_timeout(PATIENCE)
        yield context


class Visitor:
    """One browser window on the page; `asked` are the addresses of other hosts it asked for, `errors` what went wrong."""

    def __init__(self, windows: Any, url: str, size: dict[str, int], scheme: str = "light") -> None:
        self.page = windows.new_page()
        self.page.add_init_script("localStorage.clear()")  # nothing but scripts is kept from others
        self.page.set_viewport_size(size)
        self.page.emulate_media(color_scheme=scheme)
        self.asked: list[str] = []
        self.errors: list[str] = []
        self.excused = ""  # a pattern of errors that may be
        self.page.on(
            "request", lambda r: None if r.url.startswith((url, "data:", "blob:")) else self.asked.append(r.url)
        )
        self.page.on("pageerror", lambda e: self.errors.append(str(e)))
        self.page.on("response", lambda r: self.errors.append(f"{r.status} {r.url}") if r.status >= 400 else None)
        self.page.goto(url)
        self.get("draw-go").wait_for()

    def get(self, name: str, inside: str = "") -> Any:
        return self.page.locator(f"#{name} {inside}".strip())

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name, exact=True).click()

    def write(self, name: str, text: str) -> None:
        self.get(name, ":is(textarea, input)").first.fill(text)

    def set(self, prefix: str, **values: int) -> None:
        if not self.get(f"{prefix}-seed").is_visible():
            self.get(f"{prefix}-how-to-draw", "button").first.click()
            self.get(f"{prefix}-seed").wait_for()
            self.page.wait_for_timeout(300)  # the fields take their defaults once they are shown
        for name, value in values.items():
            field = self.get(f"{prefix}-{name}", "input[type=number]")
            field.fill(str(value))
            field.press("Tab")
            sync_api.expect(field).to_have_value(str(value))

    def pictures(self, name: str) -> Any:
        return self.get(name, "button:has(img)")

    def draw(self, prompt: str = "a red circle", images: int = 1, steps: int = FEW, seed: int = 42) -> None:
        self.write("draw-prompt", prompt)
        self.set("draw", images=images, steps=steps)
        self.write("draw-seed", str(seed))
        self.get("draw-go").click()

    def drawn(self) -> None:
        self.get("draw-files").wait_for()

    def ask(self, prefix: str, question: str, number: int = 1) -> str:
        """The answer to the `number`th question."""
        field = self.get(f"{prefix}-question", ":is(textarea, input)")
        answer = self.get(f"{prefix}-chat", "[data-testid=bot]").nth(number - 1)
        self.write(f"{prefix}-question", question)
        patience = time.monotonic() + PATIENCE / 1000
        while True:  # a question sent while the one before is answered stays in the field, to be sent again
            if field.input_value():
                field.press("Enter")
            try:
                answer.wait_for(timeout=1000)
                break
            except sync_api.TimeoutError:
                if time.monotonic() > patience:
                    raise
        sync_api.expect(field).to_have_value("")
        return str(answer.inner_text()).strip()

    def toast(self) -> str:
        toast = self.page.get_by_test_id("toast-body")
        toast.first.wait_for()
        return str(toast.first.inner_text())

    def luminance(self) -> float:
        """Of the page's background, 0 to 255."""
        color = self.page.evaluate("getComputedStyle(document.body).backgroundColor.match(/[0-9.]+/g).slice(0, 3)")
        return sum(map(float, color)) / 3

    def picture_of_page(self, name: str) -> None:
        if SCREENSHOTS:
            self.page.mouse.move(0, 0)
            self.page.wait_for_timeout(500)
            self.page.screenshot(path=Path(SCREENSHOTS) / f"demo-{name}.png", full_page=True)


@pytest.fixture
def visit(windows: Any, url: str) -> Iterator[Any]:
    visitors: list[Visitor] = []

    def visit(size: dict[str, int] = DESKTOP, scheme: str = "light") -> Visitor:
        visitors.append(Visitor(windows, url, size, scheme))
        return visitors[-1]

    yield visit
    for visitor in visitors:
        visitor.page.close()
        assert visitor.asked == []  # nothing from other hosts
        assert [error for error in visitor.errors if not re.fullmatch(visitor.excused, error)] == []


def test_draw(visit: Any, hold: Hold) -> None:
    visitor = visit()
    half = hold(f"Step {STEPS // 2} of")
    visitor.draw(images=2, steps=STEPS)
    visitor.get("draw-status", "[role=progressbar][aria-valuenow]:not([aria-valuenow='0'])").wait_for()
    assert visitor.pictures("draw-gallery").count() == 2  # forming
    visitor.picture_of_page("forming")
    assert not visitor.get("draw-files").is_visible()
    half.set()
    visitor.drawn()
    assert "2 drawn in" in visitor.get("draw-status").inner_text()
    assert "Image 1 of 2 · seed 42" in visitor.get("draw-seed-shown").inner_text()
    command = visitor.get("draw-command").inner_text()
    assert "--seed 42" in " ".join(command.split())
    visitor.picture_of_page("draw")

    visitor.pictures("draw-gallery").nth(1).click()
    sync_api.expect(visitor.get("draw-seed-shown")).to_contain_text("Image 2 of 2")
    seed = int(re.findall(r"\d+", visitor.get("draw-seed-shown").inner_text())[-1])
    assert seed > 2**53
    links = visitor.get("draw-files", "a[download]")
    taken = {}
    for i in range(links.count()):
        with visitor.page.expect_download() as download:
            links.nth(i).click()
        taken[Path(download.value.suggested_filename).suffix] = download.value.path()
    assert json.loads(Path(taken[".json"]).read_text())["image_seeds"] == [seed]
    assert torch.load(taken[".pt"], weights_only=True).dim() == 2
    assert Image.open(taken[".png"]).text["image_seed"] == str(seed)

    before = visitor.get("draw-seed", ":is(textarea, input)").input_value()
    visitor.get("draw-new-seed").click()
    sync_api.expect(visitor.get("draw-seed", ":is(textarea, input)")).not_to_have_value(before)


def test_look(visit: Any, tmp_path: Path) -> None:
    visitor = visit()
    visitor.draw()
    visitor.drawn()
    visitor.tab("Look")
    visitor.pictures("look-gallery").first.click()
    sync_api.expect(visitor.get("look-source")).to_contain_text("read as it is (seed 42)")
    assert visitor.ask("look", "Describe this image.")
    assert visitor.ask("look", "How many objects are there?", 2)
    assert visitor.get("look-chat", "[data-testid=user]").count() == 2
    visitor.picture_of_page("look")

    visitor.get("look-picture", "button:is([aria-label*=lear], [aria-label*=emove], [title*=lear])").first.click()
    sync_api.expect(visitor.get("look-chat", ".message")).to_have_count(0)
    sync_api.expect(visitor.get("look-source")).to_contain_text("Drop a picture")

    # A question at the moment when a stream of results ends is answered.
    # The page reads that a stream ends only once the server has answered its next event, or has had the time to.
    visitor.page.evaluate(
        """() => {
            const fetched = window.fetch;
            let asked, answered;
            const asking = new Promise(done => { asked = done; }), answering = new Promise(done => { answered = done; });
            window.late = 0;
            window.fetch = async (request, options) => {
                const url = String(request.url ?? request);
                if (url.includes("queue/join") && window.late) {
                    asked();
                    const response = await fetched(request, options);
                    setTimeout(answered, 100);
                    return response;
                }
                const response = await fetched(request, options);
                if (!url.includes("queue/data") || window.late) return response;
                const late = new TransformStream({ async transform(chunk, out) {
                    const text = new TextDecoder().decode(chunk), end = text.indexOf('data: {"msg":"close_stream"');
                    if (end < 0) return out.enqueue(chunk);
                    out.enqueue(new TextEncoder().encode(text.slice(0, end)));
                    window.late += 1;
                    await asking;
                    await Promise.race([answering, new Promise(done => setTimeout(done, 500))]);
                    out.enqueue(new TextEncoder().encode(text.slice(end)));
                }});
                return new Response(response.body.pipeThrough(late), response);
            };
        }"""
    )
    own = tmp_path / "own.png"
    Image.new("RGB", (90, 60), "blue").save(own)
    visitor.get("look-picture", "input[type=file]").set_input_files(own)
    sync_api.expect(visitor.get("look-source")).to_contain_text("through the encoder")
    visitor.page.wait_for_function("window.late === 1")
    assert visitor.ask("look", "Describe this image.")


def test_files_that_are_no_pictures_are_named(visit: Any, tmp_path: Path) -> None:
    visitor = visit()
    visitor.tab("Look")
    kinds = {"not an image": b"no picture", "damaged": png_of_size(90, 60), "pixels": png_of_size(30_000, 30_000)}
    for i, (reason, content) in enumerate(kinds.items()):
        file = tmp_path / f"bad{i}.png"
        file.write_bytes(content)
        visitor.get("look-picture", "input[type=file]").set_input_files(file)
        toast = visitor.page.get_by_test_id("toast-body").filter(has_text=file.stem)
        sync_api.expect(toast).to_contain_text(reason)
        assert str(tmp_path) not in toast.inner_text()
        # And the tab is as it was.
        sync_api.expect(visitor.get("look-picture", "img")).to_have_count(0)
        sync_api.expect(visitor.get("look-source")).to_contain_text("Drop a picture")
        titles = visitor.page.get_by_text("Error", exact=True).filter(visible=True)
        sync_api.expect(titles).to_have_count(1)  # the toast's
        visitor.page.get_by_test_id("toast-close").click()
        sync_api.expect(visitor.page.get_by_test_id("toast-body")).to_have_count(0)
    # The previews, which the page asks for at once, come or are gone with the files.
    visitor.excused = r"404 \S+/bad\d\.png"


def test_best_of_n(visit: Any, hold: Hold) -> None:
    visitor = visit()
    two = hold("2 of 4 drawn and judged")
    visitor.tab("Best of N")
    visitor.write("best-prompt", "a red circle and a blue square")
    visitor.set("best", images=4, steps=STEPS, keep=2)
    visitor.get("best-go").click()
    cards = visitor.get("best-board", "li")
    cards.first.wait_for()
    assert cards.count() == 2  # live: those there are
    two.set()
    visitor.get("best-files").wait_for()
    sync_api.expect(cards).to_have_count(4)
    assert [c.get_attribute("class") for c in cards.all()] == ["kept", "kept", "dropped", "dropped"]
    assert all("last image kept" in c.locator(".why").inner_text() for c in cards.all()[2:])
    assert all("reward" in c.inner_text() and "prompt loss" in c.inner_text() for c in cards.all())
    assert visitor.get("best-files", "a[download]").count() == 6
    small = cards.first.locator("img").bounding_box()["width"]
    cards.first.locator("img").click()
    assert cards.first.locator("img").bounding_box()["width"] > 4 * small
    visitor.page.evaluate("document.activeElement.blur()")
    cards.first.locator("summary").click()
    assert "scale-rae t2i" in cards.first.locator("code").inner_text()
    cards.first.locator("summary").click()
    visitor.picture_of_page("best")
    visitor.tab("Look")
    assert visitor.pictures("look-gallery").count() == 4


def test_latent(visit: Any, tmp_path: Path, shared: SharedModel) -> None:
    steps = shared.draw("a green star", widgets.sampling(1, 1.0, 3, "euler", "1"))
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            drawing = stop.value.images[0]
            break
    visitor = visit()
    visitor.tab("Latent")
    upload = visitor.get("latent-file", "input[type=file]")
    upload.set_input_files(drawing.latent_file)
    visitor.get("latent-picture", "img").wait_for()
    assert "64 tokens of" in visitor.get("latent-loaded").inner_text()
    assert visitor.ask("latent", "Describe this image.")
    visitor.picture_of_page("latent")
    visitor.page.get_by_role("tab", name="Continue", exact=True).click()
    visitor.write("latent-prompt", "Can you generate a photo of a red circle?")
    visitor.get("latent-go").click()
    sync_api.expect(visitor.get("latent-status")).to_contain_text("”")

    visitor.get("latent-file", "button:is([aria-label*=lear], [aria-label*=emove], [title*=lear])").first.click()
    sync_api.expect(visitor.get("latent-loaded")).to_contain_text("Drop a latent")
    bad = tmp_path / "bad.pt"
    bad.write_text("no latent")
    visitor.get("latent-file", "input[type=file]").set_input_files(bad)
    said = visitor.toast()
    assert "bad.pt: " in said.lower()
    assert "not a file that torch.save wrote" in said
    assert str(tmp_path) not in said
    assert "Traceback" not in said
    sync_api.expect(visitor.get("latent-loaded")).to_contain_text("Drop a latent")
    sync_api.expect(visitor.get("latent-loaded")).not_to_contain_text("Error")
    sync_api.expect(visitor.get("latent-file")).not_to_contain_text("bad.pt")


def test_errors_are_sentences_and_nothing_is_lost(visit: Any) -> None:
    visitor = visit()
    visitor.draw("   ")
    error = visitor.get("draw-status", "[role=alert]")
    sync_api.expect(error).to_have_text("Write a prompt first: what is to be drawn?")
    visitor.draw("a red circle left of a <blue> star")
    sync_api.expect(error).to_contain_text("The model answered without drawing")
    visitor.page.wait_for_timeout(1000)
    assert error.is_visible()  # it stays
    visitor.draw("a <red> circle and a blue square")  # text is text
    visitor.drawn()
    assert error.count() == 0
    assert "<red>" in visitor.get("draw-command").inner_text()


def test_a_second_visitor_queues_and_the_first_can_stop(visit: Any, hold: Hold) -> None:
    first, second = visit(), visit(PHONE, "dark")
    begun = hold("Step 1 of 12")
    first.draw(images=4, steps=12)
    first.get("draw-status", "[role=progressbar][aria-valuenow]:not([aria-valuenow='0'])").wait_for()
    second.draw()
    waiting = second.get("draw-status").get_by_text("queue")
    waiting.wait_for()
    assert waiting.evaluate("e => getComputedStyle(e.parentElement).overflow") == "visible"  # else it is cut to nothing
    second.picture_of_page("queue")
    second.get("draw-stop").click()
    sync_api.expect(second.get("draw-status")).to_have_text("Stopped.")
    sync_api.expect(second.get("draw-status")).not_to_contain_text("Error")
    second.get("draw-go").click()
    waiting.wait_for()
    assert not second.get("draw-files").is_visible()
    first.get("draw-stop").click()
    sync_api.expect(first.get("draw-status")).to_contain_text("Stopped")
    begun.set()
    second.drawn()
    assert not first.get("draw-files").is_visible()
    sync_api.expect(first.get("draw-status")).to_have_text("Stopped.")  # it stays
    second.picture_of_page("phone-dark")
    assert second.luminance() < 128


def test_the_first_screen(visit: Any) -> None:
    for scheme in ("light", "dark"):
        visitor = visit({"width": 1280, "height": 800}, scheme)
        words = visitor.page.locator(".hero .more")
        for i in range(words.count()):  # white on indigo, in both schemes
            color = words.nth(i).evaluate("e => getComputedStyle(e).color")
            assert min(int(c) for c in re.findall(r"\d+", color)[:3]) > 200, color
        pale = visitor.page.locator(".what .said").first.evaluate("e => getComputedStyle(e).color")
        distance = abs(sum(int(c) for c in re.findall(r"\d+", pale)[:3]) / 3 - visitor.luminance())
        assert distance > 120, pale
        for name, lowest in {"Draw": "draw-gallery", "Look": "look-question", "Best of N": "best-go"}.items():
            visitor.tab(name)
            visitor.get(lowest).wait_for()
            box = visitor.get(lowest).bounding_box()
            assert box["y"] + box["height"] < 800, name


def test_by_keyboard(visit: Any) -> None:
    visitor = visit()
    keys = visitor.page.keyboard

    def reach(test: str) -> None:
        for _ in range(60):
            if visitor.page.evaluate(f"(() => {{ const e = document.activeElement; return {test}; }})()"):
                return
            keys.press("Tab")
        raise AssertionError(f"not reached by Tab: {test}")

    visitor.set("draw", steps=3, images=1)
    visitor.page.evaluate("document.activeElement.blur()")
    reach("e.closest('#draw-prompt') && e.tagName === 'TEXTAREA'")
    keys.type("a red circle")
    reach("e.closest('#draw-go') !== null")
    keys.press("Enter")
    visitor.drawn()
    reach("e.closest('#draw-gallery') && e.querySelector('img')")
    keys.press("Enter")
    visitor.page.evaluate("document.activeElement.blur(); window.scrollTo(0, 0)")
    visitor.page.get_by_role("tab", name="Draw", exact=True).focus()
    reach("e.getAttribute('role') === 'tab' && e.innerText.trim() === 'Look'")
    keys.press("Enter")
    visitor.get("look-question").wait_for()


def test_fits_a_phone(visit: Any) -> None:
    visitor = visit(PHONE)
    visitor.draw(images=4)
    visitor.get("draw-how-to-draw", "button").first.click()  # folds it, as it is at first
    visitor.drawn()
    visitor.page.evaluate("window.scrollTo(0, 0)")
    visitor.picture_of_page("phone-light")
    assert visitor.get("draw-prompt").bounding_box()["width"] > PHONE["width"] - 30
    first = visitor.get("draw-gallery", "img").first.bounding_box()
    assert first["y"] + first["height"] < PHONE["height"]
    visitor.get("draw-go").click()
    visitor.page.wait_for_function("scrollY > 50")  # to the pictures
    visitor.drawn()
    for name in TABS:
        visitor.tab(name)
        visitor.page.wait_for_timeout(150)
        width = visitor.page.evaluate("document.documentElement.scrollWidth")
        assert width <= PHONE["width"], name
        cut = visitor.page.evaluate(
            """[...document.querySelectorAll('button, input, textarea, .said')].filter(e => e.offsetParent
               && e.type !== 'file' && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 200))"""
        )
        assert cut == [], name
    visitor.tab("Draw")
    assert visitor.luminance() > 128
