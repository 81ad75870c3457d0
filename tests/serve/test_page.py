"""The page in a real browser: it needs nothing but the server, streams, compares, and can be used without a mouse."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from swamla.inference.decoding import Decoder
from swamla.interpret.tracing import walk
from swamla.model.mixers.mha import MHA
from swamla.model.mixers.mixer import Mixer
from swamla.text import encode_prompt
from tests.browser import Browser, browser

from .helpers import GREEDY, TOKENIZER, alone, model_of
from .servers import Running, running
from .test_app import chatty, slowed

IDLE = "return document.getElementById('status').textContent.startsWith('Done')"
STOPPED = "return document.getElementById('status').textContent.startsWith('Stopped')"
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
def window() -> Iterator[Browser]:
    with browser(1200, 1000) as found:
        yield found


@pytest.fixture
def page(server: Running, window: Browser) -> Browser:
    window.resize(1200, 1000)
    window.open(server.url)
    window.wait("return document.getElementById('model-0').options.length")
    return window


def shoot(page: Browser, name: str) -> None:
    if SHOTS:
        (Path(SHOTS) / f"{name}.png").write_bytes(page.picture())


def test_two_models_write_side_by_side_what_the_library_writes(server: Running, page: Browser) -> None:
    for field, value in (("#prompt", "abc"), ("#temperature", "0"), ("#max_tokens", "40")):
        page.type(field, value)
    page.click("#write")
    page.wait(IDLE)
    hybrid, linear = page.run(TEXTS)
    for text, served in ((hybrid, server.served[0]), (linear, server.served[1])):
        model = served.engine.model
        assert text == "abc" + alone(model, encode_prompt(TOKENIZER, "abc"), 40)[0]
    figures = page.run("return document.querySelector('.figures').textContent")
    assert figures.startswith("40 tokens; ")
    assert "tokens/s; first token after" in figures
    assert "bytes; prompt 4 tokens" in figures
    shoot(page, "wide")
    outside = page.run("return performance.getEntriesByType('resource').map(each => new URL(each.name).origin)")
    assert set(outside) == {server.url}
    assert page.complaints() == []


def test_a_tokens_probabilities_are_shown_under_the_mouse_and_by_arrow_keys(page: Browser) -> None:
    page.type("#max_tokens", "12")
    page.type("#seed", "7")
    page.click("#write")
    page.wait(IDLE)
    caption = "return document.querySelector('.tokens caption')?.textContent"
    page.point_at(".token:nth-of-type(3)")
    assert page.wait(caption).startswith("Token 2 of 12: ")
    page.run("document.querySelector('.text').focus()")
    page.press("right")
    assert page.run(caption).startswith("Token 3 of 12: ")
    page.press("end")
    assert page.run(caption).startswith("Token 12 of 12: ")
    rows = page.run("return [...document.querySelectorAll('.side .tokens')][0].querySelectorAll('tr').length")
    assert 5 <= rows <= 6
    shoot(page, "token")


def test_everything_is_done_without_a_mouse(server: Running, page: Browser) -> None:
    page.run("document.getElementById('prompt').focus()")
    page.press("a", control=True)
    page.press(*"xyz")
    page.press("enter", control=True)
    page.wait(IDLE)
    assert all(text.startswith("xyz") and len(text) > 10 for text in page.run(TEXTS))
    reached = []
    page.run("document.getElementById('model-0').focus()")
    for _ in range(20):
        reached.append(page.run("return document.activeElement.id || document.activeElement.className || 'radio'"))
        page.press("tab")
    for control in ("model-1", "prompt", "temperature", "seed", "write", "clear", "shade", "text"):
        assert control in reached


def test_every_control_has_a_name_and_progress_is_told_to_screen_readers(page: Browser) -> None:
    nameless = page.run(
        "return [...document.querySelectorAll('input, select, textarea, button')]"
        ".filter(each => !(each.labels?.length || each.textContent.trim())).map(each => each.id)"
    )
    assert nameless == []
    roles = page.run("return [...document.querySelectorAll('[role], [aria-live]')].map(e => e.getAttribute('role'))")
    assert "status" in roles
    assert "alert" in roles
    assert page.run("return document.documentElement.lang") == "en"
    tree = page.run("return [...document.querySelectorAll('section')].map(e => e.getAttribute('aria-labelledby'))")
    assert tree == ["side-0", "side-1", "attention-name"]


ATTENTION = "document.getElementById('attention')"
READING = "return document.getElementById('reading').textContent"


def opened(page: Browser, prompt: str = "abc", tokens: str = "12") -> None:
    """Two answers, and the attention of the first."""
    for field, value in (("#prompt", prompt), ("#temperature", "0"), ("#max_tokens", tokens)):
        page.type(field, value)
    page.click("#write")
    page.wait(IDLE)
    page.click(".side .see")
    page.wait(f"return !{ATTENTION}.hidden && document.querySelectorAll('#reads .token').length")


def test_the_attention_of_an_answer_is_that_of_interpret(server: Running, page: Browser) -> None:
    opened(page)
    model = server.served[0].engine.model
    ids = encode_prompt(TOKENIZER, "abc")
    ids += Decoder(model).generate([ids], 12, sampling=GREEDY)[0]
    weights = [layer.mixer.weight_BHTS[0, :, -1] for layer in walk(model, torch.tensor([ids]))]
    assert page.run("return document.querySelectorAll('#reads .token').length") == len(ids) == 16
    layers = page.run("return [...document.getElementById('layer').options].map(each => each.textContent)")
    assert layers == ["0: gdn", "1: swa", "2: mla", "3: mha"]
    for layer, weight_HS in enumerate(weights):
        for head, weight_S in enumerate(weight_HS):
            page.choose("#layer", layer)
            page.choose("#head", head)
            told = page.run("return [...document.querySelectorAll('#strongest .number')].map(each => each.textContent)")
            strongest = sorted(weight_S.tolist(), key=abs, reverse=True)[:8]
            assert [float(each.replace("−", "-")) for each in told] == pytest.approx(strongest, rel=1e-2, abs=1e-6)
    shoot(page, "attention")


def test_a_token_under_the_mouse_tells_its_weight_and_signs_are_told_without_colour(page: Browser) -> None:
    opened(page)
    page.point_at("#reads .token:nth-of-type(3)")
    assert page.wait("return document.getElementById('edge').textContent").startswith("“")
    edge = page.run("return document.getElementById('edge').textContent")
    assert re.fullmatch(r"“.+” \(15\) reads “a” \(1\): [+−]\d.*", edge)
    negative = page.run("return [...document.querySelectorAll('#reads .minus')].map(e => e.style.background)")
    positive = page.run(
        "return [...document.querySelectorAll('#reads .token:not(.minus)')].map(e => e.style.background)"
    )
    assert negative
    assert all("--minus" in each for each in negative)
    assert not any("--minus" in each for each in positive)


def test_layer_head_and_token_are_chosen_by_keys(page: Browser) -> None:
    opened(page)
    assert page.run("return document.activeElement.id") == "layer"
    assert page.wait(READING).startswith("Layer 0 (gdn), head 0 of ")
    page.press("down")
    assert page.run(READING).startswith("Layer 1 (swa), head 0 of ")
    page.press("tab", "down")
    assert page.run(READING).startswith("Layer 1 (swa), head 1 of ")
    page.press("tab", "left")
    page.wait(f"{READING}.includes(' (14) reads most of ')")
    page.press("home")
    page.wait(f"{READING}.includes(': “⟨start⟩” (0) reads most of “⟨start⟩” (0), 1.00.')")
    assert page.run("return document.querySelectorAll('#reads .later').length") == 15
    assert page.complaints() == []


def test_the_side_whose_attention_is_shown_is_chosen_and_follows_its_next_answer(page: Browser) -> None:
    opened(page)
    title = "return document.getElementById('attention-name').textContent"
    pressed = "return [...document.querySelectorAll('.see')].map(each => each.getAttribute('aria-pressed'))"
    assert (page.run(title), page.run(pressed)) == ("Attention of hybrid", ["true", "false"])
    page.click(".side:nth-of-type(2) .see")
    page.wait(f"{title} === 'Attention of linear'".replace("return ", "return (", 1) + ")")
    assert page.run(pressed) == ["false", "true"]
    page.wait(f"{READING}.includes('(15) reads most of')")
    page.type("#max_tokens", "14")
    page.run("document.getElementById('status').textContent = ''")
    page.click("#write")
    page.wait(f"{READING}.includes('(17) reads most of')")
    assert page.run("return [...document.getElementById('layer').options].length") == 1
    page.click(".side:nth-of-type(2) .see")
    assert page.run(f"return {ATTENTION}.hidden")
    page.click(".side .see")
    page.wait(f"return !{ATTENTION}.hidden")
    page.click("#clear")
    assert page.run(f"return {ATTENTION}.hidden")


def test_text_on_the_deepest_colours_is_readable(page: Browser) -> None:
    opened(page)
    for scheme in ("light", "dark"):
        page.prefer(scheme)
        for sign in (1, -1):
            page.run("document.querySelector('#reads .token').style.background = colourOf(arguments[0])", sign)
            colours = page.run(
                "const css = getComputedStyle(document.querySelector('#reads .token'));"
                "const box = getComputedStyle(document.getElementById('reads'));"
                "return [css.color, css.backgroundColor, box.backgroundColor]"
            )
            text, over, below = ([float(part) for part in re.findall(r"[\d.]+", each)] for each in colours)
            mixed = [over[3] * a + (1 - over[3]) * b for a, b in zip(over[:3], below[:3], strict=True)]
            assert contrast(text[:3], mixed) > 4.5
        shoot(page, f"attention-{scheme}")
    page.prefer("light")


def contrast(one: list[float], other: list[float]) -> float:
    """The ratio of luminances of WCAG 2; texts need 4.5."""

    def luminance(colour: list[float]) -> float:
        parts = [part / 255 / 12.92 if part <= 10 else ((part / 255 + 0.055) / 1.055) ** 2.4 for part in colour]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_a_text_that_cannot_be_explained_is_an_error_on_the_page(
    page: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MHA, "explain", Mixer.explain)
    for field, value in (("#prompt", "abc"), ("#max_tokens", "5")):
        page.type(field, value)
    page.click("#write")
    page.wait(IDLE)
    page.click(".side .see")
    page.wait("return !document.getElementById('attention-error').hidden")
    assert "has no `explain`" in page.run("return document.getElementById('attention-error').textContent")


def test_escape_stops_and_frees_the_slots(server: Running, page: Browser) -> None:
    with slowed(server.engine):
        page.type("#max_tokens", "190")
        page.click("#write")
        page.wait("return document.querySelectorAll('.token').length > 3")
        before = server.engine.counters.cancelled
        page.press("escape")
        page.wait(STOPPED)
        server.wait_idle()
    assert server.engine.counters.cancelled == before + 1


@pytest.mark.parametrize("button", ["#clear", "#chat"])
def test_clearing_ends_what_is_being_written(server: Running, page: Browser, button: str) -> None:
    page.choose("#model-0", 2)
    page.choose("#model-1", 4)
    with slowed(server.served[2].engine), slowed(server.served[3].engine):
        page.type("#max_tokens", "150")
        page.click("#write")
        page.wait("return document.querySelectorAll('.token').length > 3")
        page.click(button)
        page.wait(STOPPED)
        server.wait_idle()
    assert page.run(TEXTS) == ["", ""]
    kept = "sides.flatMap(side => [...side.history, ...side.tokens, ...side.ids.answer])"
    assert page.run(f"return {kept}.length") == 0


def test_an_error_of_the_server_is_shown(page: Browser) -> None:
    page.type("#prompt", "a" * 300)
    page.click("#write")
    page.wait("return !document.querySelector('.error').hidden")
    assert "the prompt has 301 tokens" in page.run("return document.querySelector('.error').textContent")


def test_a_chat_goes_on_and_is_offered_where_there_is_a_template(server: Running, page: Browser) -> None:
    assert page.run("return document.getElementById('chat').disabled")
    page.choose("#model-0", 2)
    page.choose("#model-1", 4)  # where "none" comes first
    page.click("#chat")
    page.type("#max_tokens", "15")
    page.type("#temperature", "0")
    for message in ("Hello", "More"):
        page.type("#prompt", message)
        page.run("document.getElementById('status').textContent = ''")
        page.click("#write")
        page.wait(IDLE)
    said = page.run("return [...document.querySelectorAll('.side .said .who')].map(each => each.textContent)")
    assert said == ["You", "talker-1", "You", "talker-1", "You", "talker-2", "You", "talker-2"]
    box = "const box = document.querySelector('.side .text'); return "
    assert page.run(f"{box}box.scrollHeight > box.clientHeight")
    assert page.run(f"{box}box.scrollTop + box.clientHeight > box.scrollHeight - 30")
    shoot(page, "chat")


def test_a_message_that_is_refused_is_not_asked_again_with_the_next(page: Browser) -> None:
    page.choose("#model-0", 2)
    page.choose("#model-1", 4)
    page.click("#chat")
    page.type("#max_tokens", "5")
    for message, hidden in (("a" * 300, False), ("Hi", True)):
        page.type("#prompt", message)
        page.run("document.getElementById('status').textContent = ''")
        page.click("#write")
        page.wait(IDLE)
        assert page.run("return document.querySelector('.side .error').hidden") == hidden


def test_a_narrow_window_needs_no_sideways_scrolling(page: Browser) -> None:
    page.resize(500, 900)
    page.type("#prompt", "a_very_long_word_" * 8)
    page.type("#max_tokens", "40")
    page.click("#write")
    page.wait(IDLE)
    page.point_at(".token")
    page.click(".side .see")
    page.wait("return document.querySelectorAll('#reads .token').length")
    assert page.run("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
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
        assert len(window.run(TEXTS)) == 1
