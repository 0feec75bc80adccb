"""The pages in a real browser. The words are written beforehand, everything else is the program's own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from minigpt4.models.generation import GenerateOptions
from minigpt4.web.command_line import V1, V2, build_page, free_port, serve
from minigpt4.web.limits import Limits
from tests.web_parts import Scripted, scripted_assistant

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium on the PATH to open the page in"),
]
HOST = "127.0.0.1"
FACE = Path(__file__).resolve().parent.parent / "minigpt4/web/examples/face_1.jpg"
BOXES = "I see <p>a face</p> {<15><14><85><84>} with <p>glasses</p> {<18><36><82><55>}, and no hat."
NOSE = "It is a <b>nose</b>."
DRAWN = "#chat .image-container img"
PATIENCE = 60_000  # milliseconds: machines that run tests may be busy


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def site(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, Scripted]]:
    """A page that is served, and its model. Parameters: demo, seconds between words."""
    demo, seconds = getattr(request, "param", (V2, 0.05))
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    assistant, model = scripted_assistant(BOXES, NOSE, seconds=seconds)
    page = build_page(demo, assistant, tmp_path / "files", Limits(max_megapixels=1), GenerateOptions(max_new_tokens=50))
    yield serve(page, HOST, free_port(HOST, None), Limits(), None, is_shared=False, waits=False), model
    page.blocks.close()


def opened(browser: Any, address: str, width: int = 1280) -> tuple[Any, list[str]]:
    """The page, ready, and a list of the other machines it asked for anything."""
    tab = browser.new_page(viewport={"width": width, "height": 820})
    tab.set_default_timeout(PATIENCE)
    strangers: list[str] = []

    def note(asked: Any) -> None:
        if not asked.url.startswith((address, "data:", "blob:")):
            strangers.append(asked.url)

    tab.on("request", note)
    tab.goto(address)
    tab.wait_for_selector("#question textarea")
    return tab, strangers


def upload(tab: Any, file: Path = FACE) -> None:
    tab.set_input_files("#picture input[type=file]", str(file))
    tab.wait_for_selector("#picture img")
    tab.wait_for_function("document.querySelector('#picture img').naturalWidth > 0")
    tab.wait_for_function("!document.querySelector('#picture .progress-text, #picture .meta-text')")


def ask(tab: Any, question: str) -> None:
    tab.fill("#question textarea", question)
    tab.press("#question textarea", "Enter")


def shot(tab: Any, name: str) -> None:
    """A picture of the page, for people who want to look at it: PAGE_SHOTS=folder."""
    if folder := os.environ.get("PAGE_SHOTS"):
        tab.wait_for_timeout(600)
        tab.screenshot(path=Path(folder) / f"{name}.png", full_page=name == "phone")


def test_a_question_is_answered_word_by_word_with_boxes_and_restart_clears(
    browser: Any, site: tuple[str, Scripted]
) -> None:
    address, model = site
    tab, strangers = opened(browser, address)
    shot(tab, "empty")
    upload(tab)
    ask(tab, "[grounding] describe this image in detail")
    tab.wait_for_function("/I see/.test(document.querySelector('#chat').innerText)")
    assert model.num_words < len(BOXES.split(" ")) or "hat" in tab.inner_text("#chat")
    tab.wait_for_selector(DRAWN)
    said = tab.inner_text("#chat")
    assert "I see a face with glasses, and no hat." in " ".join(said.split())
    named = tab.locator("#chat span[style*='background']")
    assert named.count() == 2 and named.first.inner_text() == "a face"
    shot(tab, "boxes")
    ask(tab, "sure?")
    tab.wait_for_function("/It is a <b>nose<.b>/.test(document.querySelector('#chat').innerText)")
    assert BOXES in model.asked[1]  # the model reads its answer again
    tab.click("#restart")
    tab.wait_for_function("!/It is a <b>nose<.b>/.test(document.querySelector('#chat').innerText)")
    tab.wait_for_selector("#picture img", state="detached")
    assert strangers == []


def test_a_box_dragged_over_the_picture_goes_with_identify(browser: Any, site: tuple[str, Scripted]) -> None:
    address, model = site
    tab, _ = opened(browser, address)
    upload(tab)
    tab.click("button:has-text('Identify')")
    tab.wait_for_function("document.querySelector('#question textarea').value.startsWith('[identify]')")
    ask_first = tab.locator("#send")
    ask_first.click()
    tab.wait_for_selector("#notice .error")
    assert "Drag a box over the picture first" in tab.inner_text("#notice")
    frame = tab.locator("#picture img").bounding_box()
    side = min(frame["width"], frame["height"])  # the picture is square, and shown whole
    left, top = frame["x"] + (frame["width"] - side) / 2, frame["y"] + (frame["height"] - side) / 2
    tab.mouse.move(left + 0.25 * side, top + 0.5 * side)
    tab.mouse.down()
    tab.mouse.move(left + 0.5 * side, top + 0.6 * side)
    tab.mouse.move(left + 0.75 * side, top + 0.8 * side)
    tab.mouse.up()
    assert tab.locator("#box textarea, #box input").first.input_value() == "{<25><50><75><80>}"
    shot(tab, "identify")
    ask_first.click()
    tab.wait_for_selector(DRAWN)
    assert "[identify] what is this {<25><50><75><80>}" in model.asked[0]


def test_a_bad_picture_and_an_empty_question_are_told_in_the_page(
    browser: Any, site: tuple[str, Scripted], tmp_path: Path
) -> None:
    tab, _ = opened(browser, site[0])
    tab.click("#send")
    tab.wait_for_selector("#notice .error")
    assert "Write a question first." in tab.inner_text("#notice")
    (tmp_path / "fake.png").write_bytes(b"not a picture")
    Image.new("L", (1200, 900)).save(tmp_path / "large.png")
    for name, text in (("fake.png", "not a picture that can be read"), ("large.png", "at most 1 megapixels")):
        tab.set_input_files("#picture input[type=file]", str(tmp_path / name))
        tab.wait_for_function(f"document.querySelector('#notice').innerText.includes('{text}')")


@pytest.mark.parametrize("site", [(V2, 0.5)], indirect=True)
def test_two_tabs_wait_for_each_other_and_a_closed_one_stops(browser: Any, site: tuple[str, Scripted]) -> None:
    address, model = site
    first, _ = opened(browser, address)
    second, _ = opened(browser, address)
    ask(first, "hello")
    first.wait_for_function("/I see/.test(document.querySelector('#chat').innerText)")
    ask(second, "and me?")
    second.wait_for_function("/Waiting: 1 question/.test(document.querySelector('#chat').innerText)")
    shot(second, "waiting")
    first.close()
    second.wait_for_function("/It is a <b>nose<.b>/.test(document.querySelector('#chat').innerText)")
    assert "hello" not in second.inner_text("#chat")
    assert model.num_words < len(BOXES.split(" ")) + len(NOSE.split(" "))


@pytest.mark.parametrize("site", [(V1, 0.0)], indirect=True)
def test_the_first_demo_has_beams_and_a_phone_shows_it_all(browser: Any, site: tuple[str, Scripted]) -> None:
    tab, strangers = opened(browser, site[0], width=390)
    upload(tab)
    ask(tab, "what?")
    tab.wait_for_selector(DRAWN)
    shot(tab, "phone")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    assert not tab.locator("#chat button[aria-label='Share']").is_visible()  # it would upload the picture
    tab.click("text=Settings")
    tab.wait_for_selector("text=Beams")
    assert tab.locator("#tasks").count() == 0 and strangers == []
