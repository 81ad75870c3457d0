"""Published figures: validated in one line, judged by the study and not by their author, shown and marked."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from swamla.cli.compare import Arguments, _asked
from swamla.cli.flags import parse
from swamla.config import from_plain
from swamla.errors import ConfigError, UsageError
from swamla.study.folder import begin, opened
from swamla.study.page.report import report_html, write_report
from swamla.study.plan import Asked, Study
from swamla.study.published import Published, marked
from swamla.study.results import Results
from tests.interpret.test_page import Page

from .helpers import study_of
from .played import results_of

DATA = {"source": "text", "tokenizer": "byte", "fingerprint": "0123456789abcdef" * 4}
SAME = Published(
    name="theirs",
    source="https://example.org/paper",
    value=1.31,
    unit="Bits per  byte",
    comparable=True,
    why="the same study on another machine.",
    parameters=10_000,
    tokens=2_570,
    data="text",
    tokenizer="byte",
    fingerprint="0123456789abcdef",
)
OTHER = replace(SAME, name="GPT <2>", source="arXiv 2405.04434", comparable=False, why="words of another language")


def judged(row: Published):
    return marked(row, unit="bits per byte", data=DATA, tokens=2560)


def test_a_row_of_this_unit_data_tokenizer_and_budget_is_comparable_if_its_author_says_so() -> None:
    assert judged(SAME).comparable
    assert judged(SAME).differences == ()
    assert not judged(replace(SAME, comparable=False)).comparable
    assert not judged(replace(SAME, comparable=False)).overruled


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"unit": "nats a token"}, "another unit than bits per byte"),
        ({"fingerprint": "f" * 12}, "other data, by its fingerprint"),
        ({"fingerprint": ""}, "no fingerprint shows that its data is this study's, split alike"),
        ({"tokenizer": "gpt2"}, "another tokenizer, here byte"),
        ({"tokenizer": ""}, "no word of the tokenizer, here byte"),
        ({"tokens": 2_600}, "1.02 times this study's tokens"),
        ({"tokens": 1_280}, "0.50 times this study's tokens"),
        ({"tokens": 9_000_000_000}, "3,515,625 times this study's tokens"),
        ({"tokens": None}, "no word of its training tokens"),
    ],
)
def test_the_author_cannot_claim_what_the_study_denies(change: dict, says: str) -> None:
    one = judged(replace(SAME, **change))
    assert not one.comparable
    assert one.overruled
    assert one.differences == (says,)


def test_the_rows_of_a_task_have_no_tokenizer_to_differ_in() -> None:
    of_task = {name: value for name, value in DATA.items() if name != "tokenizer"}
    row = replace(SAME, unit="accuracy", tokenizer="")
    assert marked(row, unit="accuracy", data=of_task, tokens=2560).comparable


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": " "}, r"published\[0\].name = ' ' \(FILE\): must name the model"),
        ({"source": "a friend"}, r'published\[0\].source = \'a friend\' \(FILE\): must be a URL, or such as "arXiv'),
        ({"unit": ""}, r"published\[0\].unit = '' \(FILE\): must say what the value is"),
        ({"why": ""}, r"published\[0\].why = '' \(FILE\): must say why the row is comparable, or why not"),
        ({"tokens": 0}, r"published\[0\].tokens = 0 \(FILE\): must be > 0, or left out"),
        ({"value": "low"}, r"published\[0\].value = 'low' \(FILE\): must be a number"),
        ({"comparable": "yes"}, r"published\[0\].comparable = 'yes' \(FILE\): must be true or false"),
        ({"fingerprint": "0123"}, r"published\[0\].fingerprint = '0123' \(FILE\): must be hexadecimal, 12 characters"),
        ({"lr": 1}, r"published\[0\].lr = 1 \(FILE\): no such setting"),
    ],
)
def test_what_is_wrong_with_a_row_is_one_line_that_names_the_row_and_the_file(
    change: dict, says: str, tmp_path: Path
) -> None:
    row = {name: value for name, value in vars(SAME).items() if value not in (None, "")} | change
    text = "\n".join(f"{name} = {json.dumps(value)}" for name, value in row.items())
    file = tmp_path / "study.toml"
    file.write_text(f'[arms]\nmha = ""\ngdn = ""\n[[published]]\n{text}\n')
    with pytest.raises(ConfigError, match=says.replace("FILE", re.escape(str(file)))) as raised:
        _asked(*parse(Arguments, [str(file)], command="swamla compare"))
    assert "\n" not in str(raised.value)


def test_a_row_needs_its_source_and_its_judgement_and_a_name_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    file.write_text('[arms]\nmha = ""\ngdn = ""\n[[published]]\nname = "a"\nvalue = 1\nunit = "bits"\nwhy = "x"\n')
    with pytest.raises(ConfigError, match=r"published\[0\].source = None .*: must be given"):
        _asked(*parse(Arguments, [str(file)], command="swamla compare"))
    with pytest.raises(ConfigError, match="published = 'theirs': is the name of two rows"):
        Asked(arms={"a": "", "b": ""}, published=(SAME, SAME))


def played(*rows: Published) -> Results:
    results = results_of(page=True, published=rows)
    return replace(results, study=replace(results.study, data=results.study.data | DATA))


def test_the_page_has_the_rows_under_the_results_marked_and_with_the_reasons(tmp_path: Path) -> None:
    claimed = replace(SAME, name="claimed", fingerprint="f" * 12, unit="loss", note="a note")
    results = played(SAME, OTHER, claimed)
    page = report_html(results)
    assert Page(page).open == []
    assert [value for _, name, value in Page(page).attributes if name in ("src", "href")] == ["data:,"]
    headings = re.findall("<h2>(.*?)</h2>", page)
    assert headings[headings.index("Published figures") - 1] == "Differences, seed by seed"
    (section,) = re.findall("<h2>Published figures</h2>.*?<h2>", page, re.DOTALL)
    assert "1 of 3 is comparable with this study" in section
    rows = re.findall("<tr.*?</tr>", section)
    assert [re.findall(r'<span class="answer \w+">(\w+)</span>', row) for row in rows] == [
        [], [], [], ["yes"], ["no"], ["no"],
    ]  # fmt: skip
    assert "The same study on another machine." in rows[3]
    assert "https://example.org/paper" in rows[3]
    assert "GPT &lt;2&gt;" in rows[4]
    assert "Words of another language." in rows[4]
    assert "Another unit than bits per byte; other data, by its fingerprint. (Claimed to be comparable: " in rows[5]
    assert "a note" in rows[5]
    assert {file.name for file in write_report(results, tmp_path)} >= {"published.csv"}
    found = json.loads((tmp_path / "results.json").read_text())["published"]
    assert [(row["name"], row["comparable"], row["claimed"]) for row in found] == [
        ("theirs", True, True), ("GPT <2>", False, False), ("claimed", False, True),
    ]  # fmt: skip


def test_a_study_without_rows_has_no_section_of_them_and_is_written_as_before(tmp_path: Path) -> None:
    results = results_of(page=True)
    assert "Published" not in report_html(results)
    assert "published" not in results.as_dict()
    assert "published" not in results.study.as_plain()["asked"]
    assert not [file for file in results.write(tmp_path) if "published" in file.name]


def test_rows_may_be_added_to_a_study_that_has_run_and_nothing_else(tmp_path: Path) -> None:
    study = study_of()
    begin(tmp_path / "study", study)
    (tmp_path / "study" / "runs").mkdir()
    with_rows = replace(study.asked, published=(SAME, OTHER))
    found = opened(tmp_path / "study", with_rows)
    assert found == replace(study, asked=with_rows)
    assert opened(tmp_path / "study") == found, "it is written"
    assert from_plain(Study, found.as_plain()) == found
    with pytest.raises(UsageError, match="holds another study, whose seeds is 2, not 3"):
        opened(tmp_path / "study", replace(with_rows, seeds=3))
