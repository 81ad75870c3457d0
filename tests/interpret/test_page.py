"""report.html: one file that loads nothing, shows explain.json's figures to pointer and keys, and fits narrow
windows.
"""

import copy
import io
import json
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from matplotlib.image import imread

from swamla.data.tokenizer import IdTokenizer
from swamla.interpret.explaining import Subject, explained
from swamla.interpret.page.figures import FIGURES
from swamla.interpret.page.html import report_html
from swamla.interpret.page.report import write_report
from swamla.interpret.page.svg import Line, bar_chart, heat_map, line_chart, number, shade, shade_signed, short, ticks
from tests.browser import browser
from tests.interpret.models import VOCABULARY, hybrid
from tests.model.helpers import random_tokens

NEVER_CLOSED = {"meta", "link", "br", "rect", "line", "circle", "polyline"}


class Page(HTMLParser):
    """The tags of a page: whether they nest, their attributes, and their texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.ids: dict[str, str] = {}
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in NEVER_CLOSED:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.append((self.open[-1], data))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The report of a hybrid with experts, on a text."""
    rows = random_tokens(4, 40, seed=5)
    ids = range(VOCABULARY - 1)
    subject = Subject(name="<b>bold & odd</b>", ids=ids, rows_BT=rows, text=rows[0].tolist(), source="a </script> text")
    folder = tmp_path_factory.mktemp("report")
    write_report(explained(hybrid(ffn="moe"), IdTokenizer(VOCABULARY - 1), subject), folder)
    return folder


@pytest.fixture(scope="module")
def data(report):
    return json.loads((report / "explain.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(report):
    return (report / "report.html").read_text(encoding="utf-8")


def test_the_page_is_well_formed_has_the_data_of_explain_json_and_links_to_nothing(page, data) -> None:
    parsed = Page(page)
    assert parsed.open == []
    (held,) = [text for tag, text in parsed.texts if tag == "script" and text.startswith('{"format_version"')]
    assert json.loads(held) == data
    links = [value for _, name, value in parsed.attributes if name in ("src", "href")]
    assert links == ["data:,"]
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|https?://", page)


def test_names_and_texts_cannot_become_markup(page) -> None:
    assert "<b>bold" not in page
    assert page.count("</script>") == 2


def test_the_question_comes_first_then_the_verdicts_then_the_evidence(page, data) -> None:
    places = [
        page.index(text) for text in ("Question:", data["verdicts"][0]["text"], "Table 1.", "Figure 1.", "Figure 2.")
    ]
    assert places == sorted(places)
    for verdict in data["verdicts"]:
        assert verdict["text"].replace("'", "&#x27;") in page


def test_every_table_and_figure_says_what_it_means(page) -> None:
    for tag, caption in (("table", "caption"), ("figure", "figcaption")):
        inner = re.findall(rf"<{tag}\b.*?</{tag}>", page, flags=re.DOTALL)
        assert inner
        assert all(f"<{caption}><b>" in each for each in inner)


def test_the_report_has_pictures_of_what_was_measured_and_only_of_that(report, data, tmp_path) -> None:
    assert {path.name for path in report.glob("*.png")} == set(FIGURES)
    for name in FIGURES:
        picture = imread(report / name)
        assert picture[..., :3].std() > 0.01, name  # something is drawn
    found = explained(hybrid(), IdTokenizer(VOCABULARY - 1), Subject(name="a", ids=range(9)))
    for name in FIGURES:
        (tmp_path / name).touch()
    write_report(found, tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {"induction.png", "attention.png"}


def test_a_page_without_text_has_no_section_of_it() -> None:
    found = explained(hybrid(), IdTokenizer(VOCABULARY - 1), Subject(name="a", ids=range(9), notes=("No text.",)))
    page = report_html(found.plain())
    assert Page(page).open == []
    headings = re.findall("<h2>(.*?)</h2>", page)
    assert headings[:2] == ["Induction, on random repeats", "The attention of every head"]
    assert [name for name in headings if "logit lens" in name or name == "Convolutions"] == headings[2:]
    assert "No text." in page


def luminance(colour: str) -> float:
    red, green, blue = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_more_is_darker_and_signs_differ_in_hue() -> None:
    plain = [luminance(shade(step / 10)) for step in range(11)]
    assert plain == sorted(plain, reverse=True)
    assert shade(0) == shade_signed(0) == "#ffffff"
    for share in (0.1, 0.5, 1.0):
        red, _, blue = (int(shade_signed(-share)[at : at + 2], 16) for at in (1, 3, 5))
        assert red > blue + 10 * share
        red, _, blue = (int(shade_signed(share)[at : at + 2], 16) for at in (1, 3, 5))
        assert blue > red + 10 * share
        assert luminance(shade_signed(-share)) == pytest.approx(luminance(shade_signed(share)), abs=0.08)
    assert shade(7) == shade(1)


@pytest.mark.parametrize(
    ("value", "text", "narrow"),
    [
        (0.571, ".57", ".57"),
        (-0.25, "−.25", "−.25"),
        (2.218, "2.22", "2.2"),
        (13.13, "13.1", "13"),
        (1240.0, "1,240", "1240"),
        (0.0, "0", "0"),
        (1.0, "1", "1"),
        (0.0004, "0", "0"),
        (-0.004, "0", "0"),
        (None, "–", "–"),
    ],
)
def test_figures_are_printed_as_papers_do(value, text: str, narrow: str) -> None:
    assert (number(value), short(value)) == (text, narrow)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-0.3, 0.7), (3.41, 21.2), (5, 5), (0, 1e-4), (-1240, 88)])
def test_ticks_are_few_and_enclose_what_is_drawn(low: float, high: float) -> None:
    found = ticks(low, high)
    assert found[0] <= low <= high <= found[-1]
    assert 2 <= len(found) <= 8
    steps = {round(b - a, 9) for a, b in pairwise(found)}
    assert len(steps) == 1


@pytest.mark.parametrize("logarithmic", [False, True])
def test_names_of_ticks_are_within_the_chart_also_at_its_end(logarithmic: bool) -> None:
    line = Line(name="run", points=[(1, 0.1), (2**15 if logarithmic else 200_000, 0.9)])
    chart = line_chart([line], x_label="step", y_label="accuracy", logarithmic=logarithmic, size=(400, 250))
    names = re.findall(r'class="tick mid" x="([\d.]+)"[^>]*>([^<]+)<', chart)
    assert len(names[-1][1]) >= 6
    for x, name in names:
        assert float(x) + 3.3 * len(name) <= 400, name


def test_a_map_has_a_cell_for_every_head_in_its_place_and_colour() -> None:
    drawn = heat_map([[0.0, 1.0], [0.5]], ["0 mha", "1 gdn"], title="hits", high=1.0, place=("repeats", "hit", "share"))
    first, second = re.findall(r'<g data-row="\d">(.*?)</g>', re.sub(' style="[^"]*"', "", drawn))
    assert re.findall('fill="(#.{6})"', first) == [shade(0), shade(1)]
    assert re.findall('fill="(#.{6})"', second) == [shade(0.5)]
    wide = heat_map([[0.5] * 40], ["0 mha"], title="hits", high=1.0)
    assert "<text" not in re.sub(' style="[^"]*"', "", wide).partition('<g data-row="0">')[2].partition("</g>")[0]


def test_bars_are_as_long_as_their_values_on_either_side_of_zero() -> None:
    drawn = bar_chart([("a", [("x", 0.2, "#000000")]), ("b", [("x", -0.1, "#000000")])], x_label="nats")
    bars = [
        (float(x), float(width)) for x, width in re.findall(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', drawn)
    ]
    assert bars[0][1] == pytest.approx(2 * bars[1][1], abs=0.2)
    assert bars[1][0] + bars[1][1] == pytest.approx(bars[0][0], abs=0.2)
    assert 'data-tip="b, x: −0.100 nats"' in drawn


def test_the_last_mark_of_bars_is_within_the_drawing() -> None:
    drawn = bar_chart([("a", [("x", 0.0055, "#000000")])], x_label="nats", width=470)
    ends = [float(x) + 3.3 * len(text) for x, text in re.findall(r'tick mid" x="([\d.]+)"[^>]*>([^<]+)<', drawn)]
    assert len(ends) > 2
    assert max(ends) <= 470


# ---- in a browser ---------------------------------------------------------------------------------------------------

# What sticks out of the window, of the element that holds it, or, of a drawing's words, out of the drawing.
STICKS_OUT = """
const main = document.querySelector("main").getBoundingClientRect(), found = [];
const told = each => `${each.tagName} ${each.getAttribute("class")} ${each.textContent.slice(0, 40)}`;
for (const each of document.querySelectorAll("main *")) {
  const box = each.getBoundingClientRect();
  if (box.width && (box.left < main.left - 1 || box.right > main.right + 1)) found.push(told(each));
}
for (const each of document.querySelectorAll("svg text")) {
  const box = each.getBoundingClientRect(), drawing = each.ownerSVGElement.getBoundingClientRect();
  if (box.left < drawing.left - 1 || box.right > drawing.right + 1 || box.bottom > drawing.bottom + 1 ||
      box.top < drawing.top - 1)
    found.push("in the drawing: " + told(each));
}
for (const each of document.querySelectorAll(".scroll, #tokens, .box, figure, td, th"))
  if (each.scrollWidth > each.clientWidth + 1 && !each.matches(".lens td")) found.push("cut: " + told(each));
return found;
"""
A4 = {"width": 695, "height": 1024}  # pixels of a sheet less its margins


@pytest.fixture(scope="module", params=[1280, 900])
def window(request, report):
    with browser(request.param, 1000) as opened:
        opened.open(report / "report.html")
        yield opened


@pytest.fixture
def paper(window):
    window.media("print", **A4)
    yield window
    window.media("", 0, 0)


def test_the_page_loads_without_a_request_or_a_complaint_and_nothing_sticks_out(window) -> None:
    assert window.complaints() == []
    assert window.run("return performance.getEntriesByType('resource').length") == 0
    assert window.run("return document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    assert window.run(STICKS_OUT) == []


def test_a_printed_page_cuts_no_table_and_no_figure(paper) -> None:
    assert paper.run(STICKS_OUT) == []
    whole = "[getComputedStyle(each).breakInside, each.getBoundingClientRect().height]"
    kept = paper.run(f"return [...document.querySelectorAll('figure, .box, .scroll')].map(each => {whole})")
    assert len(kept) > 9
    for rule, height in kept:
        assert rule == "avoid"
        assert height < A4["height"]
    printed = paper.printed()
    assert printed.startswith(b"%PDF")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", printed)) <= 9


def test_a_printed_page_takes_little_ink(paper) -> None:
    brightness = imread(io.BytesIO(paper.picture()))[..., :3].mean(axis=-1)
    assert (brightness < 0.5).mean() < 0.04
    assert brightness.mean() > 0.93
    assert (brightness == 1).mean() > 0.6  # the ground is the paper's


def test_what_pointing_tells_is_printed_or_said_to_be_on_screen_only(paper, data) -> None:
    shown = "return [...document.querySelectorAll(arguments[0])].map(each => getComputedStyle(each).display)"
    assert set(paper.run(shown, ".screen, #tip")) == {"none"}
    assert paper.run(shown, ".paper") == ["block"]
    (note,) = paper.run("return [...document.querySelectorAll('.paper')].map(each => each.innerText)")
    told = {
        "circle": "a curve's marks",
        ".lens td": "probabilities of guesses",
        ".map rect": "figures of cells too narrow",
        "#tokens span": "losses of tokens",
        "#matrix": "weights between two tokens",
        ".chart rect": None,  # its figure stands beside it
    }
    assert [words for words in told.values() if words and words not in note] == []
    stray = "return [...document.querySelectorAll('[data-tip]')].filter(each => !each.matches(arguments[0])).length"
    assert paper.run(stray, ", ".join(told)) == 0
    texts = "return [...document.querySelectorAll(arguments[0])].map(each => each.textContent)"
    rises = [layer[part] for layer in data["worth"]["layers"] for part in ("mixer", "ffn")]
    assert paper.run(texts, ".rise") == [f"{rise:+.3f}".replace("-", "−") for rise in rises]
    hits = [hit for layer in data["repeats"]["layers"] for hit in layer["hit"]]
    assert paper.run(texts, "[data-field=hit] g[data-row] text") == [short(hit) for hit in hits]


@pytest.fixture(scope="module")
def large(data, tmp_path_factory):
    """The page of a model of 16 layers and 32 heads a layer: of the small one's layers and heads, again and again."""

    def heads(layer):
        return {name: 8 * value if isinstance(value, list) else value for name, value in layer.items()}

    data = copy.deepcopy(data)
    for section in ("repeats", "worth", "patterns"):
        data[section]["layers"] = [heads(layer) for layer in 4 * data[section]["layers"]]
    data["layers"] = [
        layer | {"heads": 8 * layer["heads"], "copying": 8 * layer["copying"]} for layer in 4 * data["layers"]
    ]
    for text in data["texts"]:
        text["layers"] = [heads(layer) for layer in 4 * text["layers"]]
    for table, name in (("lens", "loss"), ("guesses", "tokens"), ("guesses", "probability")):
        first, *others = data[table][name]
        data[table][name] = [first, *4 * others]
    page = tmp_path_factory.mktemp("large") / "report.html"
    page.write_text(report_html(data), encoding="utf-8")
    return page


def test_a_page_of_many_layers_and_heads_fits_as_well_on_screen_and_on_paper(window, large, report) -> None:
    window.open(large)
    assert window.run(STICKS_OUT) == []
    assert window.run("return document.querySelectorAll('[data-field=hit] rect').length") > 16 * 16
    window.media("print", **A4)
    assert window.run(STICKS_OUT) == []
    window.media("", 0, 0)
    assert window.complaints() == []
    window.open(report / "report.html")


def test_a_screen_shows_no_note_for_paper(window) -> None:
    assert window.run("return getComputedStyle(document.querySelector('.paper')).display") == "none"
    assert "A click on a cell" in window.text("figcaption .screen")


def test_pointing_at_a_cell_of_a_map_tells_layer_head_and_figure(window, data) -> None:
    window.point_at('[data-field="hit"] g[data-row="1"] rect:nth-of-type(2)')
    hit = data["repeats"]["layers"][1]["hit"][1]
    assert window.text("#tip").splitlines() == ["layer 1 (swa), head 1", f"hit rate: {hit:.4g} (share of queries)"]


def test_pointing_at_a_token_or_a_weight_tells_both_tokens_and_the_signed_weight(window, data) -> None:
    window.point_at("#explorer #thumbs canvas", click=True)
    window.point_at("#tokens span:nth-child(4)")
    text, shown = data["texts"][0], window.text("#tip")
    assert f"“{text['tokens'][39]}” (39) reads “{text['tokens'][3]}” (3)" in shown
    head = text["layers"][0]["heads"][0]
    weight = head["weights"][39][3] * head["unit"]
    told = re.search(r"weight ([+−]?)([\d.e-]+)", shown)
    assert float(told[2]) == pytest.approx(abs(weight), rel=0.1)
    assert told[1] == ("−" if weight < 0 else "+" if weight > 0 else "")
    window.point_at("#matrix", x=-100, y=100)
    query, source = map(int, re.findall(r"\((\d+)\)", window.text("#tip")))
    assert (source, query) == (9, 30)  # of 40 tokens on 380 pixels


def test_arrow_keys_move_through_layers_and_heads_and_stop_at_the_ends(window, data) -> None:
    window.point_at("#explorer #thumbs canvas", click=True)
    before = window.run("return scrollY")
    assert window.text("#status").startswith("layer 0 (gdn), head 0 ")
    window.press("right")
    assert window.text("#status").startswith("layer 0 (gdn), head 1 ")
    window.press("down", "down", "down")
    last = data["layers"][3]
    assert window.text("#status").startswith(f"layer 3 ({last['mixer']}), head 1 ")
    window.press(*["down"] * 5, *["right"] * 20)
    assert window.text("#status").startswith(f"layer 3 ({last['mixer']}), head {last['heads'] - 1} ")
    window.press(*["up"] * 9, *["left"] * 20, ",")
    assert window.text("#status").startswith("layer 0 (gdn), head 0 of 0–")
    assert "token 38 of 0–39" in window.text("#status")
    assert window.run("return scrollY") == before  # the page stays where it is
    assert window.complaints() == []


def test_a_click_on_a_map_shows_that_head_and_negative_weights_are_red(window, data) -> None:
    window.point_at('[data-field="hit"] g[data-row="0"] rect:nth-of-type(1)', click=True)
    assert window.text("#status").startswith("layer 0 (gdn), head 0 ")
    head = data["texts"][0]["layers"][0]["heads"][0]["weights"]
    numbers = {(query, source): number for query, row in enumerate(head) for source, number in enumerate(row)}
    at = "document.getElementById('matrix').getContext('2d').getImageData(arguments[1], arguments[0], 1, 1).data"
    pixel = f"return [...{at}]"
    for place in (min(numbers, key=numbers.__getitem__), max(numbers, key=numbers.__getitem__)):
        red, _, blue, _ = window.run(pixel, *place)
        assert (red > blue) == (numbers[place] < 0)


def test_the_other_text_can_be_chosen(window, data) -> None:
    window.run("const choice = document.getElementById('text'); choice.value = '1'; choice.onchange()")
    assert len(data["texts"][1]["tokens"]) == 25
    assert window.run("return document.querySelectorAll('#tokens span').length") == 25
    assert "what followed it before" in window.text("#text-note")
