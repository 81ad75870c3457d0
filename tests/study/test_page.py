"""report.html of a study: one file that loads nothing, equal for equal results, true to them, readable when narrow."""

import re
import tomllib
from dataclasses import replace
from html import escape, unescape
from pathlib import Path

import pytest

from swamla.config import from_plain
from swamla.study.page.intervals import Difference, interval_chart
from swamla.study.page.report import report_html, write_report
from swamla.study.page.sizes import size_chart
from swamla.study.plan import Asked
from swamla.study.published import Published
from swamla.study.results import Results
from swamla.study.statistics import Interval
from tests.browser import browser
from tests.interpret.test_page import NEVER_CLOSED, Page

from .helpers import arm_of
from .played import evidence_of, results_of

FAILS = ("gdn-lr0.01-seed3", "mha-lr0.0316")
NEVER_CLOSED.add("polygon")


@pytest.fixture(scope="module")
def results() -> Results:
    return results_of(page=True, fails=FAILS, question="Is <a> state & as good?", expectation="Hardly.")


@pytest.fixture(scope="module")
def page(results: Results) -> str:
    return report_html(results)


def without_clock(page: str) -> str:
    return re.sub(r'<span class="clock">.*?</span>', "", page)


def test_the_page_is_well_formed_and_links_to_nothing(page: str) -> None:
    parsed = Page(page)
    assert parsed.open == []
    assert [value for _, name, value in parsed.attributes if name in ("src", "href")] == ["data:,"]
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|https?://", page)
    assert "Is &lt;a&gt; state &amp; as good?" in page


def test_the_page_follows_a_readers_questions(page: str) -> None:
    texts = ["Question, stated before", "Expected before", "Found", "What this does not say"]
    headings = ["What was compared", "Differences, seed by seed", "How they learn", "learning rate</h2>"]
    headings += ["Loss by what was read", "Induction: ", "Memory of a sequence", "Time</h2>", "All runs"]
    places = [page.index(text) for text in (*texts, *headings)]
    assert places == sorted(places)


def test_where_no_question_was_stated_the_page_says_so() -> None:
    page = report_html(results_of())
    assert "No question was stated; asked by default: <i>Does gdn differ from mha?</i>" in page
    assert "Expected before: nothing was stated" in page
    assert "stated before the runs: <i>" not in page
    assert "question = " not in page


def test_every_table_and_figure_says_what_it_means_and_has_a_number(page: str) -> None:
    for tag, caption in (("table", "caption"), ("figure", "figcaption")):
        inner = re.findall(rf"<{tag}\b.*?</{tag}>", page, flags=re.DOTALL)
        assert inner
        assert all(f"<{caption}><b>" in each for each in inner)


def test_equal_results_give_an_equal_page_and_other_times_change_nothing_but_times(results: Results, page: str) -> None:
    assert (
        report_html(results_of(page=True, fails=FAILS, question="Is <a> state & as good?", expectation="Hardly."))
        == page
    )
    assert results.evidence is not None
    slow = {name: replace(speed, median=9.9, low=9.8, high=10.0) for name, speed in results.evidence.speed.items()}
    paces = tuple(replace(each, predicted=777.0, took=888.0) for each in results.evidence.paces)
    memory = dict.fromkeys(results.evidence.memory, 9 << 30)
    outcomes = tuple(replace(one, wall=99.0, seconds=98.0) for one in results.outcomes)
    decoding = {
        name: [replace(one, median=0.5, low=0.4, high=0.6, first=7.7) for one in ones]
        for name, ones in results.evidence.decoding.items()
    }
    evidence = replace(results.evidence, speed=slow, paces=paces, memory=memory, decoding=decoding)
    other = report_html(replace(results, evidence=evidence, outcomes=outcomes))
    assert other != page
    assert without_clock(other) == without_clock(page)
    assert not re.search(r"\b20\d\d-\d\d-\d\d\b", page), "no date"


def test_the_verdict_its_limits_and_the_scores_of_every_seed_are_on_the_page(results: Results, page: str) -> None:
    (found,) = results.comparisons
    assert escape(found.words()) in page
    assert '<span class="answer worse">worse</span>' in page
    for text in results.not_said():
        assert escape(text) in page
    for one in results.arms:
        for score in one.scores.values():
            assert f"{score:.4f}" in page
    assert "1.3580 <small>(+0.0480)</small>" in page


@pytest.mark.parametrize(
    ("difference", "spread", "margin", "short"),
    [
        (-0.05, 0.001, 0.01, "better"),
        (0.05, 0.001, 0.01, "worse"),
        (0.005, 0.001, 0.01, "little worse"),
        (0.0, 0.001, 0.01, "equivalent"),
        (0.005, 0.02, 0.01, "undecided"),
    ],
)
def test_the_verdict_in_a_word(difference: float, spread: float, margin: float, short: str) -> None:
    page = report_html(results_of(difference, spread=spread, margin=margin, page=True))
    (found,) = re.findall(r'<span class="answer \w+">(.*?)</span>', page)
    assert found == short


def test_runs_that_failed_come_first_with_their_error(page: str) -> None:
    rows = re.findall(r"<tr( class=\"lost\")?><td>([\w.-]+-seed\d)</td>", page)
    assert (
        [name for lost, name in rows if lost]
        == [name for _, name in rows[:2]]
        == [
            "mha-lr0.0316-seed0",
            "gdn-lr0.01-seed3",
        ]
    )
    assert len(rows) == 20
    assert "no finite gradient in 20 steps &lt;in a row&gt;" in page
    assert "20 runs, of which 2 did not finish" in page


def test_a_page_without_what_was_not_measured_has_no_section_of_it_and_an_arm_without_scores_is_told() -> None:
    bare = report_html(results_of())
    assert Page(bare).open == []
    headings = re.findall("<h2>(.*?)</h2>", bare)
    assert not {"How they learn", "Loss by what was read", "Time"} & set(headings)
    lost = report_html(results_of(fails=("gdn",), page=True))
    assert Page(lost).open == []
    assert "No learning rate trained gdn." in lost
    assert "no seed in common" in lost


def test_how_fast_each_arm_writes_is_beside_its_steps_and_of_an_older_folder_left_out() -> None:
    results = results_of(page=True)
    assert results.evidence is not None
    faster = [replace(one, median=0.001, low=0.0008, high=0.00125) for one in results.evidence.decoding["gdn"]]
    evidence = replace(results.evidence, decoding={**results.evidence.decoding, "gdn": faster})
    page = report_html(replace(results, evidence=evidence))
    (section,) = re.findall("<h2>Time</h2>.*?<h2>", page, re.DOTALL)
    assert "after 32 tokens" in section
    assert "after 128 tokens" in section
    assert '<span class="clock">500<small>400 – 526</small></span>' in section
    assert '<span class="clock">1,000 <small>(+100.0 %)</small><small>800 – 1,250</small></span>' in section
    old = replace(results, evidence=replace(results.evidence, decoding={}))
    assert "after 32 tokens" not in report_html(old)
    assert "decoding" not in old.as_dict()["evidence"]


def test_the_time_of_a_run_that_was_resumed_is_said_as_it_is_counted(page: str) -> None:
    # tests/study/test_kill.py: `wall` has the seconds of the training that it went on from
    assert "one that was stopped and resumed counts the training that it went on from, too." in page


def test_without_a_search_nothing_is_said_of_sensitivity() -> None:
    page = report_html(results_of(rates="recipe", page=True))
    assert "how sensitive it is to it was not measured" in page
    assert "Learning rates</h2>" in page


def test_of_a_task_accuracy_is_compared_where_more_is_better_beside_bytes_of_state() -> None:
    page = report_html(results_of(0.05, task=True, page=True))
    assert Page(page).open == []
    assert re.findall(r'<span class="answer \w+">(.*?)</span>', page) == ["better"]
    assert "difference from mha in accuracy (right is better)" in page
    assert "bits per byte" not in page
    assert "test part" not in page
    (section,) = re.findall("<h2>Recall against memory</h2>.*?<h2>", page, re.DOTALL)
    assert "4.0 KiB" in section
    assert "gdn, seed 3: 0.9950 (0.9910 – 0.9990), 1,024 answers" in section
    assert section.count("of the first 512 test rows, equal ones once") == 1, "of what the accuracy is"
    assert "0.99 or more on all 1,024 test rows" in section, "of what the verdict is"


def test_of_a_task_that_not_all_seeds_learned_their_number_is_told_before_the_test_of_means_and_in_the_table() -> None:
    results = results_of(task=True, page=True, accuracies={"mha": (0.999,) * 5, "gdn": (0.4, 0.5, 0.99, 0.999, 1.0)})
    page = report_html(results)
    (section,) = re.findall("<h2>Recall against memory</h2>.*?<h2>", page, re.DOTALL)
    assert section.count(">3 of 5 <small>(.23 – .88)</small>") == 1  # Wilson's, of three of five
    assert section.count(">5 of 5 <small>") == 1
    (verdict,) = re.findall(r"<dd>(The task was learned .*?)</dd>", page)
    assert unescape(verdict) == results.verdict()[0]


def test_seeds_that_did_not_finish_are_among_those_that_did_not_learn_and_the_table_of_arms_counts_them() -> None:
    known = {"mha": (0.999,) * 5, "gdn": (0.999,) * 5}
    page = report_html(results_of(task=True, page=True, accuracies=known, fails=("gdn-lr0.01-seed2",)))
    (section,) = re.findall("<h2>Recall against memory</h2>.*?<h2>", page, re.DOTALL)
    assert section.count(">4 of 5 <small>") == section.count(">5 of 5 <small>") == 1
    assert page.count("<td>4 of 5</td>") == 1


def test_the_table_of_seeds_tells_how_the_arms_scores_correlate_and_the_figure_that_intervals_are_single(
    page: str,
) -> None:
    assert "Correlation with mha over seeds: gdn +1.00." in page
    assert "Intervals are of one comparison alone." in page
    assert "Correlation" not in report_html(results_of(fails=("seed2", "seed3", "seed4", "seed5")))


def test_where_arms_have_other_steps_the_page_does_not_say_that_they_saw_the_same() -> None:
    results = results_of(match="seconds", page=True)
    shorter = replace(results.study, arms=(results.study.arms[0], arm_of("gdn", steps=8)))
    page = report_html(replace(results, study=shorter))
    assert "Every arm saw the same rows" not in page
    assert "began with the same rows in the same order, and saw them until the first arm's time was over" in page
    assert "8 to 20 steps of 4 rows of 32 tokens, by seconds: as long as the first arm" in page
    assert "Every arm saw the same rows in the same order." in report_html(results)


def test_programs_that_went_on_with_a_study_are_on_the_page(results: Results, page: str) -> None:
    assert "went on with" not in page
    other = replace(results.study, went_on=("swamla 9, commit abc-dirty",))
    assert "<td>went on with</td><td>swamla 9, commit abc-dirty</td>" in report_html(replace(results, study=other))


def test_the_study_file_on_the_page_asks_the_same() -> None:
    rows = [
        Published(name=name, source="arXiv 2405.04434", value=1.0, unit="bits", comparable=False, why='"so"')
        for name in ("a", "b")
    ]
    results = results_of(question='So "what"?', seeds=5, page=True, flags="--width 32")
    asked = results.study.asked
    for each in (asked, replace(asked, sizes=(32, 48), larger_seeds=3, published=tuple(rows))):
        page = report_html(replace(results, study=replace(results.study, asked=each)))
        shown = unescape(page.partition('<pre class="code">')[2].partition("\n\n# the whole study")[0])
        assert from_plain(Asked, tomllib.loads(shown)) == each


def test_an_interval_is_drawn_from_end_to_end_on_the_scale_of_the_margin_and_its_seeds() -> None:
    row = Difference(
        name="a",
        colour="#000",
        mean=0.02,
        low=-0.01,
        high=0.05,
        inner=(0.0, 0.04),
        seeds=[(0.01, "one"), (0.03, "two")],
    )
    drawn = interval_chart([row], margin=0.02, x_label="bits")
    band = re.search(r'<rect class="margin" x="([\d.]+)" width="([\d.]+)"', drawn)
    assert band is not None
    begin, width = map(float, band.groups())
    zero, pixels = begin + width / 2, width / 0.04  # a unit
    line = re.search(r'<line x1="([\d.]+)" x2="([\d.]+)" [^>]*stroke-width="2"', drawn)
    assert line is not None
    assert [(float(x) - zero) / pixels for x in line.groups()] == pytest.approx([-0.01, 0.05], abs=1e-3)
    circles = [(float(x) - zero) / pixels for x in re.findall(r'<circle cx="([\d.]+)"', drawn)]
    assert circles == pytest.approx([0.01, 0.03], abs=1e-3)
    assert "arrow" not in drawn


def test_an_interval_that_goes_on_has_arrows_and_does_not_hide_the_margin() -> None:
    wide = Difference(
        name="a", colour="#000", mean=0.02, low=-9.0, high=9.04, inner=(-3, 3.04), seeds=[(0.01, ""), (0.03, "")]
    )
    drawn = interval_chart([wide], margin=0.02, x_label="bits")
    assert drawn.count('class="arrow"') == 2
    band = re.search(r'<rect class="margin" x="[\d.]+" width="([\d.]+)"', drawn)
    assert band is not None
    assert float(band[1]) > 50
    single = replace(
        wide, low=float("-inf"), high=float("inf"), inner=(float("-inf"), float("inf")), seeds=[(0.02, "")]
    )
    assert interval_chart([single], margin=0.02, x_label="").count('class="arrow"') == 2


def test_the_files_beside_the_page_have_the_evidence(results: Results, tmp_path: Path) -> None:
    files = write_report(results, tmp_path)
    assert {"report.html", "results.json", "evidence.csv"} <= {file.name for file in files}
    rows = [line.split(",") for line in (tmp_path / "evidence.csv").read_text().splitlines()]
    evidence = evidence_of(results.study, list(results.tests))
    (loss,) = [row[4] for row in rows if row[:4] == ["loss", "gdn", "2", "16"]]
    assert float(loss) == next(one for one in evidence.measured if one.run == "gdn-lr0.01-seed2").positions.loss[4]
    (written,) = [row[4] for row in rows if row[:4] == ["seconds of a generated token", "gdn", "", "128"]]
    assert float(written) == 0.002
    (size,) = [row[4] for row in rows if row[:4] == ["state bytes", "mha", "", "1024"]]
    assert int(size) == evidence.caches["mha"][1024]


SIZES = {32: 0.05, 48: 0.03, 64: 0.005}


@pytest.fixture(scope="module")
def sized() -> Results:
    return results_of(page=True, fails=FAILS, sizes=SIZES, spread=0.003)


def test_of_several_sizes_the_page_begins_with_all_of_them_and_has_every_section_at_each(sized: Results) -> None:
    page = report_html(sized)
    assert Page(page).open == []
    headings = re.findall("<h2>(.*?)</h2>", page)
    assert headings == ["By size", *re.findall("<h2>(.*?)</h2>", report_html(results_of(page=True)))]
    at = re.findall(r'<h3 class="size">Width (\d+)</h3>', page)
    assert at == ["32", "48", "64"] * (len(at) // 3)
    assert len(at) // 3 == len(headings) - 3, "but in this section, and in those of time and of all runs"
    words = re.findall(r'<span class="answer \w+">(.*?)</span>', page)
    assert words == ["worse", "worse", "undecided", "fades"]
    for text in sized.verdict():
        assert escape(text) in page
    for found in sized.sizes.values():
        assert f"{found.study.arms[0].costs.parameters:,} parameters" in page
        for one in found.comparisons:
            assert f"<b>{one.interval.mean:+.4f}</b>" in page
    assert page.count("-w48-lr") >= 8, "all runs of all sizes are listed"


@pytest.mark.parametrize("fails", [("gdn-w48",), ("gdn",), ("seed2", "seed3", "seed4", "seed5")])
def test_a_size_without_scores_or_with_a_single_seed_is_told_and_drawn(fails: tuple[str, ...], tmp_path: Path) -> None:
    results = results_of(page=True, fails=fails, sizes={32: 0.05, 48: 0.03})
    page = report_html(results)
    assert Page(page).open == []
    assert ">undecided</span></dd><dd>From width 32 to 48, the difference of gdn from mha: undecided. It is" in page
    assert write_report(results, tmp_path)
    assert "nan" not in (tmp_path / "sizes.csv").read_text()
    assert not re.search(r"\b(nan|inf)\b", page)


def test_the_figure_of_sizes_has_every_interval_on_one_scale_over_the_logarithm_of_parameters() -> None:
    sizes = []
    for parameters, mean in ((1000, 0.05), (4000, 0.02), (16000, -0.01)):
        one = replace(results_of().comparisons[0], interval=Interval(mean, mean - 0.01, mean + 0.01))
        sizes.append((parameters, [("gdn", "#000", "there", one)]))
    drawn = size_chart(sizes, margin=0.01, y_label="bits")
    circles = [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', drawn)]
    (x1, y1), (x2, y2), (x3, y3) = circles
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2), "each is four times the last"
    unit = (y2 - y1) / 0.03
    assert y3 - y2 == pytest.approx(0.03 * unit, abs=0.2)
    ends = [tuple(map(float, each)) for each in re.findall(r'y1="([\d.]+)" y2="([\d.]+)" [^>]*stroke-width="2"', drawn)]
    for (_, y), (low, high) in zip(circles, ends, strict=True):
        assert (low - y, y - high) == pytest.approx((0.01 * unit, 0.01 * unit), abs=0.2)
    assert "arrow" not in drawn
    wide = replace(sizes[0][1][0][3], interval=Interval(0.05, -5.0, 5.1))
    assert size_chart([(1000, [("gdn", "#000", "there", wide)]), sizes[1]], margin=0.01, y_label="").count("arrow") == 2


# ---- in a browser
# -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [900, 1400])
@pytest.mark.parametrize("of", ["results", "sized"])
def test_in_a_browser_it_loads_without_a_complaint_fits_the_window_and_tells_what_the_pointer_is_at(
    width: int, of: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    write_report(request.getfixturevalue(of), tmp_path)
    with browser(width, 1000) as window:
        window.open(tmp_path / "report.html")
        assert window.misfits() == []
        window.point_at(".intervals circle")
        assert window.text("#tip") == ("gdn, seed 1: +0.0480" if of == "results" else "gdn, seed 1: +0.0560")
        window.point_at(".map rect")
        assert window.text("#tip").splitlines() == ["mha, layer 0 mha, head 0", "hit rate: .10"]
        out = """
        const frames = [...document.querySelectorAll('svg')];
        return frames.filter(svg => [...svg.querySelectorAll('text')].some(text => {
          const inner = text.getBoundingClientRect(), outer = svg.getBoundingClientRect();
          return inner.left < outer.left - 1 || inner.right > outer.right + 1 || inner.bottom > outer.bottom + 1;
        })).map(svg => svg.outerHTML.slice(0, 200));
        """
        assert window.run(out) == [], "no label is cut off"
