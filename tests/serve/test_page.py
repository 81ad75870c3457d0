"""The page in a real browser: it needs nothing but the server, streams, compares, and can be used without a mouse."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from swamla.text import encode_prompt

from .browser import CHROMIUM, DRIVER, MISSING, Browser, browser
from .helpers import TOKENIZER, alone, model_of
from .servers import Running, running
from .test_app import chatty

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason=MISSING)
IDLE = "return document.getElementById('status').textContent.startsWith('Done')"
TEXTS = "return [...document.querySelectorAll('.side:not([hidden]) .text')].map(each => each.textContent)"
SHOTS = os.environ.get("SWAMLA_SCREENSHOTS", "")  # a folder for screenshots, to look at


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    talks = chatty()
    names = [("hybrid", model_of(), TOKENIZER), ("linear", model_of("gdn", seed=1), TOKENIZER)]
    names += [(f"talker-{n}", model_of("gdn", seed=n, tokenizer=talks), talks) for n in (1, 2)]
    with running(names) as found:
        yield found


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture
def page(server: Running, window: Browser) -> Browser:
    window.resize(1200, 1000)
    window.open(server.url)
    window.wait("return document.getElementById('model-0').options.length")
    return window


def shoot(page: Browser, name: str) -> None:
    if SHOTS:
        page.screenshot(Path(SHOTS) / f"{name}.png")


def test_two_models_write_side_by_side_what_the_library_writes(server: Running, page: Browser) -> None:
    for field, value in (("#prompt", "abc"), ("#temperature", "0"), ("#max_tokens", "40")):
        page.type(field, value)
    page.click("#write")
    page.wait(IDLE)
    hybrid, linear = page.js(TEXTS)
    for text, served in ((hybrid, server.served[0]), (linear, server.served[1])):
        model = served.engine.model
        assert text == "abc" + alone(model, encode_prompt(TOKENIZER, "abc"), 40)[0]
    figures = page.js("return document.querySelector('.figures').textContent")
    assert figures.startswith("40 tokens; ")
    assert "tokens/s; first token after" in figures
    assert "bytes; prompt 4 tokens" in figures
    shoot(page, "wide")
    outside = page.js("return performance.getEntriesByType('resource').map(each => new URL(each.name).origin)")
    assert set(outside) == {server.url}
    assert page.console() == []


def test_a_tokens_probabilities_are_shown_under_the_mouse_and_by_arrow_keys(page: Browser) -> None:
    page.type("#max_tokens", "12")
    page.type("#seed", "7")
    page.click("#write")
    page.wait(IDLE)
    caption = "return document.querySelector('.tokens caption')?.textContent"
    page.hover(".token:nth-of-type(3)")
    assert page.wait(caption).startswith("Token 2 of 12: ")
    page.js("document.querySelector('.text').focus()")
    page.press("right")
    assert page.js(caption).startswith("Token 3 of 12: ")
    page.press("end")
    assert page.js(caption).startswith("Token 12 of 12: ")
    rows = page.js("return [...document.querySelectorAll('.side .tokens')][0].querySelectorAll('tr').length")
    assert 5 <= rows <= 6
    shoot(page, "token")


def test_everything_is_done_without_a_mouse(server: Running, page: Browser) -> None:
    page.js("document.getElementById('prompt').focus()")
    page.press_with_control("a")
    page.press(*"xyz")
    page.press_with_control("enter")
    page.wait(IDLE)
    assert all(text.startswith("xyz") and len(text) > 10 for text in page.js(TEXTS))
    reached = []
    page.js("document.getElementById('model-0').focus()")
    for _ in range(20):
        reached.append(page.js("return document.activeElement.id || document.activeElement.className || 'radio'"))
        page.press("tab")
    for control in ("model-1", "prompt", "temperature", "seed", "write", "clear", "shade", "text"):
        assert control in reached


def test_every_control_has_a_name_and_progress_is_told_to_screen_readers(page: Browser) -> None:
    nameless = page.js(
        "return [...document.querySelectorAll('input, select, textarea, button')]"
        ".filter(each => !(each.labels?.length || each.textContent.trim())).map(each => each.id)"
    )
    assert nameless == []
    roles = page.js("return [...document.querySelectorAll('[role], [aria-live]')].map(e => e.getAttribute('role'))")
    assert "status" in roles
    assert "alert" in roles
    assert page.js("return document.documentElement.lang") == "en"
    tree = page.js("return [...document.querySelectorAll('section')].map(e => e.getAttribute('aria-labelledby'))")
    assert tree == ["side-0", "side-1"]


def test_escape_stops_and_frees_the_slots(server: Running, page: Browser) -> None:
    step = server.engine.slots.step
    server.engine.slots.step = lambda tokens: (__import__("time").sleep(0.05), step(tokens))[1]  # type: ignore[method-assign]
    try:
        page.type("#max_tokens", "190")
        page.click("#write")
        page.wait("return document.querySelectorAll('.token').length > 3")
        page.press("escape")
        page.wait("return document.getElementById('status').textContent.startsWith('Stopped')")
        server.wait_idle()
    finally:
        server.engine.slots.step = step  # type: ignore[method-assign]


def test_an_error_of_the_server_is_shown(page: Browser) -> None:
    page.type("#prompt", "a" * 300)
    page.click("#write")
    page.wait("return !document.querySelector('.error').hidden")
    assert "the prompt has 301 tokens" in page.js("return document.querySelector('.error').textContent")


def test_a_chat_goes_on_and_is_offered_where_there_is_a_template(server: Running, page: Browser) -> None:
    assert page.js("return document.getElementById('chat').disabled")
    for number in (0, 1):
        page.js(
            f"const s = document.getElementById('model-{number}'); s.value = 'talker-{number + 1}';"
            "s.dispatchEvent(new Event('change'))"
        )
    page.click("#chat")
    page.type("#max_tokens", "15")
    page.type("#temperature", "0")
    for message in ("Hello", "More"):
        page.type("#prompt", message)
        page.js("document.getElementById('status').textContent = ''")
        page.click("#write")
        page.wait(IDLE)
    said = page.js("return [...document.querySelectorAll('.side .said .who')].map(each => each.textContent)")
    assert said == ["You", "talker-1", "You", "talker-1", "You", "talker-2", "You", "talker-2"]
    shoot(page, "chat")


def test_a_narrow_window_needs_no_sideways_scrolling(page: Browser) -> None:
    page.resize(500, 900)
    page.type("#prompt", "a_very_long_word_" * 8)
    page.type("#max_tokens", "40")
    page.click("#write")
    page.wait(IDLE)
    page.hover(".token")
    assert page.js("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    shoot(page, "narrow")


def test_a_server_with_a_key_is_asked_with_it(window: Browser) -> None:
    with running([("locked", model_of("gdn"), TOKENIZER)], key="k") as server:
        window.resize(1200, 1000)
        window.open(server.url)
        window.wait("return !document.getElementById('key-field').hidden")
        window.type("#key", "k\ue004")  # and tab
        window.wait("return document.getElementById('model-0').value === 'locked'")
        window.type("#max_tokens", "5")
        window.click("#write")
        window.wait(IDLE)
        assert len(window.js(TEXTS)) == 1
