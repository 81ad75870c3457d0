"""The page and the words of two runs: true to the figures, one file that loads nothing, harmless whatever it shows."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from swamla.data.shards import Split
from swamla.data.tokenizer import ByteTokenizer
from swamla.study.evidence import by_powers
from swamla.study.page.two_runs import report_html, write_report
from swamla.study.two_results import Compared, Side
from swamla.study.two_runs import document_differences, kind_differences, paired, shares, token_differences
from swamla.train.plot import Curve
from tests.browser import browser
from tests.interpret.test_page import Page

from .helpers import arm_of

HOSTILE = "<script>alert(1)</script>\"'&\x00\x1b</table><img src=http://x onerror=alert(2)>"
TEXTS = [f"{HOSTILE} {number} {'word ' * number}" for number in range(30)]
BYTES = ByteTokenizer()


def side_of(name: str, arm: str, **changed) -> Side:
    arm_ = arm_of(arm)
    points = [(step * 128.0, 5 - step / 10) for step in range(1, 21)]
    side = Side(
        name=name,
        folder=f"runs/{name}",
        step=20,
        config=arm_.config,
        costs=arm_.costs,
        tokens=2560,
        precision="fp32",
        block_size=32,
        data=HOSTILE,
        data_id="abc",
        tokenizer="byte",
        tokenizer_id="t",
        vocabulary=257,
        curve=Curve(name=name, training=points, held_out=points[-1:], lost=[]),
    )
    return replace(side, **changed)


def compared(shift: float = -0.3, *, names: tuple[str, str] = (HOSTILE, "b & c"), count: int = 30) -> Compared:
    """Two runs whose losses on these texts differ by about `shift` nats a token."""
    rng, documents = np.random.default_rng(0), [np.array(BYTES.encode(text), np.uint16) for text in TEXTS[:count]]
    split = Split(
        path=Path("x"),
        tokens=np.concatenate(documents),
        offsets=np.cumsum([0, *map(len, documents)]),
        byte_counts=np.array([len(text.encode()) for text in TEXTS[:count]]),
        vocab_size=257,
    )
    labels = split.n_tokens + split.n_documents
    first = rng.gamma(4, 0.5, labels)
    second = first + shift + 0.4 * rng.standard_normal(labels) * (shift != 0)
    starts = np.asarray(split.offsets[:-1]) + np.arange(count)
    bits = tuple(np.add.reduceat(each, starts) / np.log(2) for each in (first, second))
    counts = np.bincount(np.arange(labels) % 32)
    positions = [
        by_powers(torch.from_numpy(np.bincount(np.arange(labels) % 32, each)), torch.from_numpy(counts))
        for each in (first, second)
    ]
    return Compared(
        kind="text",
        first=side_of(names[0], "mha"),
        second=side_of(names[1], "gdn"),
        source=HOSTILE,
        part="the held-out part",
        score=paired(*bits, split.byte_counts),
        amounts_N=bits,
        weights_N=split.byte_counts,
        loss=(float(first.mean()), float(second.mean())),
        labels=(labels, labels),
        documents=document_differences(*bits, split.byte_counts, lambda number: TEXTS[number]),
        shares=tuple(shares(*bits, split.byte_counts)),
        positions=(positions[0], positions[1]),
        tokens=token_differences(first, second, split, BYTES.decode),
        kinds=kind_differences(first, second, split, BYTES.decode),
        curve_unit="loss, nats a token",
        notes=(f"a note {HOSTILE}",),
        command="swamla compare a b",
        version="0",
    )


@pytest.fixture(scope="module")
def found() -> Compared:
    return compared()


@pytest.fixture(scope="module")
def page(found: Compared) -> str:
    return report_html(found)


def test_hostile_names_and_texts_are_shown_and_do_nothing(page: str) -> None:
    parsed = Page(page)
    assert parsed.open == []
    assert [value for _, name, value in parsed.attributes if name in ("src", "href")] == ["data:,"]
    assert not [name for _, name, _ in parsed.attributes if name.startswith("on")]
    assert page.count("<script") == 1
    assert "<img" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_the_page_follows_a_readers_questions(page: str) -> None:
    headings = ["Question: ", "Found", "What this does not say", "What was compared", "Difference by document"]
    headings += ["Loss by position", "Tokens on which they differ most", "Training</h2>", "Where the figures are from"]
    places = [page.index(text) for text in headings]
    assert places == sorted(places)
    for tag, caption in (("table", "caption"), ("figure", "figcaption")):
        inner = re.findall(rf"<{tag}\b.*?</{tag}>", page, flags=re.DOTALL)
        assert inner
        assert all(f"<{caption}><b>" in each for each in inner)


def test_no_browser_finds_anything_wider_than_a_narrow_window(page: str, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(page, encoding="utf-8")
    with browser(900, 800) as window:
        window.open(file)
        wide = "return [...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll') && "
        wide += "e.getBoundingClientRect().right > innerWidth).map(e => e.outerHTML.slice(0, 90))"
        assert window.run(wide) == []
        assert window.run("return document.title").startswith("b & c against <script>")


def test_the_verdict_speaks_of_documents_and_not_of_seeds(found: Compared) -> None:
    said, figures = found.verdict()
    mean, low, high = found.score.difference
    assert found.answer == "better"
    assert f"b & c predicts this text better than {HOSTILE}, by {-mean:.4f} bits per byte" in said
    assert f"{low:+.4f} to {high:+.4f} over 30 documents" in said
    assert f"{found.score.second:.4f} bits per byte" in figures
    assert "not of seeds" in found.not_said()[0]
    assert "cannot be concluded" in found.not_said()[0]


def test_the_word_of_the_verdict_follows_from_the_interval() -> None:
    assert compared(0.3).answer == "worse"
    assert compared(0.0).answer == "alike"
    assert compared(-0.3, count=1).answer == "no interval"
    one = compared(-0.3)
    low_to_high = one.score.difference._replace(low=-1.0, high=0.2)
    assert replace(one, score=replace(one.score, difference=low_to_high)).answer == "not shown"
    task = replace(one, kind="task")  # of accuracy, less is worse
    assert task.answer == "worse"
    for each in (compared(0.0), compared(-0.3, count=1)):
        assert Page(report_html(each)).open == []


def test_other_tokenizers_rows_and_budgets_are_told(found: Compared) -> None:
    other = replace(found.second, tokenizer_id="u", block_size=64, tokens=5120)
    told = replace(found, second=other, tokens=None, kinds=None, positions=None)
    assert "different tokenizers" in report_html(told)
    assert any("Rows had 32 tokens" in text for text in told.not_said())
    assert any("2,560 and 5,120 tokens" in text for text in told.not_said())
    unknown = replace(
        found, second=replace(found.second, tokens=None, curve=Curve(name="", training=[], held_out=[], lost=[]))
    )
    assert "b &amp; c has no record of its training" in report_html(unknown)
    assert "<td>unknown</td>" in report_html(unknown)
    assert dict(row[::2] for row in unknown.table()[1])["tokens trained on"] == "unknown"


def test_files_have_the_figures_and_the_json_comes_last(found: Compared, tmp_path: Path) -> None:
    written = write_report(found, tmp_path)
    assert [file.name for file in written] == ["report.html", "documents.csv", "tokens.csv", "compared.json"]
    plain = json.loads((tmp_path / "compared.json").read_text())
    assert plain["score"]["first"] == found.score.first
    assert plain["differing"]["model.pattern"] == {HOSTILE: ["mha"], "b & c": ["gdn"]}
    with (tmp_path / "documents.csv").open() as file:
        rows = list(csv.reader(file))[1:]
    bits, size = sum(float(row[2]) for row in rows), sum(int(row[1]) for row in rows)
    assert bits / size == pytest.approx(found.score.first, rel=1e-12)
    assert len(plain["tokens"]["better"]) == 10
    assert plain["tokens"]["better"][0]["difference"] == pytest.approx(found.tokens[0][0].difference, rel=1e-5)
