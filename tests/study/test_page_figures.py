"""What report.html says of its figures: values computed by hand, words held to the code that they are about."""

import re
from dataclasses import replace
from html import unescape

import pytest

from swamla.config import to_plain
from swamla.interpret.repeats import LayerInduction, Repeats
from swamla.interpret.verdicts import induction_verdict
from swamla.model.ffns.dense import DenseConfig
from swamla.model.mixers.mixer import MixerConfig
from swamla.model.mixers.swa import SWAConfig
from swamla.study.caveats import differing_settings, leaves
from swamla.study.evidence import Curves
from swamla.study.page.compared import in_a_sentence, setting_words, settings_table
from swamla.study.page.report import report_html
from swamla.study.page.scores import SEARCH_RULE
from swamla.study.page.two_runs import _means
from swamla.study.page.weights import INDUCTION_RULE
from swamla.study.results import Results
from swamla.study.runs import Pace, next_rates
from swamla.train.racing import describe_cpu, describe_machine

from .helpers import arm_of
from .played import results_of


@pytest.fixture(scope="module")
def results() -> Results:
    return results_of(page=True)


def section(page: str, heading: str) -> str:
    return re.split(rf"<h2>{heading}[^<]*</h2>", page)[1].partition("<h2>")[0]


def rows_of(html: str) -> list[list[str]]:
    """Cells of all rows of all tables, as text."""
    rows = [re.findall("<td>(.*?)</td>", row) for row in re.findall(r"<tr[^>]*>(.*?)</tr>", html, re.DOTALL)]
    return [[unescape(re.sub("<[^>]+>", "", cell)).strip() for cell in row] for row in rows if row]


def with_evidence(results: Results, **changes) -> Results:
    assert results.evidence is not None
    return replace(results, evidence=replace(results.evidence, **changes))


# ---- what was compared ----------------------------------------------------------------------------------------------


def test_the_table_of_arms_has_the_spread_of_the_scores_the_speed_and_all_parameters(results: Results) -> None:
    scored = replace(results.arms[0], scores={1: 1.0, 2: 1.2, 3: 1.7})  # about their mean, 1.3: -.3, -.1 and .4
    table = section(report_html(replace(results, arms=(scored, *results.arms[1:]))), "What was compared")
    cells = next(row for row in rows_of(table) if row[0] == "mha")
    assert cells[-2:] == ["1.3000", "0.3606"], "the root of (.09 + .01 + .16) / 2, for two degrees of freedom"
    assert cells[5] == "1,280", "4 rows of 32 tokens in a tenth of a second"
    costs = results.study.arms[0].costs
    assert costs.total_parameters - costs.parameters == 257 * 32, "the embeddings, which are the output head's, too"
    assert cells[1:3] == [f"{costs.parameters:,}", f"{costs.total_parameters:,}"]
    assert "In all: with the embeddings, which are the output head&#x27;s, too. FLOPs: of matrix products" in table


def test_the_texts_are_counted_and_how_often_a_run_reads_the_training_text(results: Results) -> None:
    counts = {"train_documents": "40", "train_bytes": "19000", "train_tokens": "5120", "bytes_apart": "0"}
    data = results.study.data | counts | {"source": "stdlib", "tokenizer": "bpe:300"}
    found = replace(results, study=replace(results.study, data=data))
    rows = dict(row for row in rows_of(report_html(found)) if len(row) == 2)
    assert rows["training text"] == "40 documents, 19,000 bytes, 5,120 tokens; a run reads 0.5 times as many"
    assert rows["split"] == "5 % of documents, by a hash of their text, are held out"
    assert rows["held-out text"].endswith("different texts: a figure of one is not to be compared with the other's")
    assert rows["check"] == "bytes counted = bytes decoded (difference 0)"
    assert rows["text"].startswith("stdlib (Python's standard library: its .py files, without tests")
    assert rows["text"].endswith("; tokenizer bpe:300, trained on training text alone")
    apart = replace(found, study=replace(found.study, data=data | {"bytes_apart": "3", "train_documents": "1"}))
    rows = dict(row for row in rows_of(report_html(apart)) if len(row) == 2)
    assert rows["check"] == "bytes counted ≠ bytes decoded (difference 3)"
    assert "split" not in rows, "one document is cut"
    assert "training text" not in dict(row for row in rows_of(report_html(results)) if len(row) == 2), "not known"


def test_every_setting_of_every_arm_is_on_the_page(results: Results) -> None:
    rows = rows_of(section(report_html(results), "What was compared"))
    for config in (arm.config for arm in results.study.arms):
        for setting, value in leaves(to_plain(config)):
            words = "none" if value is None else setting_words(value) or "none"
            part, _, last = setting.rpartition(".")
            if setting.startswith("model.blocks."):
                block, *path = setting.removeprefix("model.blocks.").split(".")
                part, last = (f"{block}.{path[0]}", ".".join(path[1:])) if len(path) > 1 else (block, path[0])
            cells = [f", {cell}, " for row in rows if row[0] == part for cell in row[1:]]
            own = [cell for row in rows if row[0] == setting.removeprefix("model.") for cell in row[1:]]
            assert words in own or any(f", {last} {words}, " in cell for cell in cells), setting


def test_names_are_spelled_out_by_the_first_sentence_of_what_has_them(results: Results) -> None:
    page = report_html(results)
    rows = dict(row for row in rows_of(page.partition("<details>")[0]) if len(row) == 2)
    assert rows["mha"].startswith("Multi-head (arXiv 1706.03762)")
    assert rows["gdn"].endswith("linear attention with a decaying, error-correcting state matrix per head")
    assert rows["adamw"].startswith("AdamW (arXiv 1711.05101)")
    assert rows["positions"] == "rotary in mha; none of their own in gdn"
    assert rows["model"] == "width 32, 1 layer, a vocabulary of 257 ids, embeddings tied to the output head"
    assert "warm-up over 2 % of the steps, weight decay 0.1" in rows["training"]


def test_of_a_plugin_its_class_says_what_it_is_and_without_a_word_of_its_own_nothing_does() -> None:
    said, silent = (type("Toy", (SWAConfig,), {"kind": "toy", "__doc__": doc}) for doc in ("One. Two.", None))
    assert issubclass(said, MixerConfig)
    assert in_a_sentence(said) == "One"
    silent.__doc__ = "Toy(*, window: int = 1)"
    assert in_a_sentence(silent) == ""


def test_settings_of_many_arms_are_rows_that_say_which_arms_have_a_value() -> None:
    def config(hidden: int):
        arm = arm_of("mha").config
        block = replace(arm.model.blocks["mha"], ffn=DenseConfig(hidden=hidden))
        return replace(arm, model=replace(arm.model, blocks={"mha": block}))

    configs = {f"arm {number}": config(64 + 8 * (number % 2)) for number in range(6)}
    configs["other"] = arm_of("gdn").config
    drawn = settings_table(configs, differing_settings(configs), "Settings. –: an arm without that block.")
    assert re.findall("<th>(.*?)</th>", drawn) == ["setting", "value", "in"]
    assert ["mha.ffn", "kind dense, hidden 64", "arm 0, arm 2, arm 4"] in rows_of(drawn)
    assert ["mha.ffn", "kind dense, hidden 72", "arm 1, arm 3, arm 5"] in rows_of(drawn)
    assert "–" not in drawn
    few = dict(list(configs.items())[:4])
    assert re.findall("<th>(.*?)</th>", settings_table(few, differing_settings(few), "")) == ["setting", *few]


# ---- curves and rates -----------------------------------------------------------------------------------------------


def test_curves_stand_at_tokens_and_at_flops_and_say_how_many_steps_a_point_has(results: Results) -> None:
    tokens = [3.5 * 128, 10.5 * 128, 17.5 * 128]  # spans of 7 of 4 · 32 tokens each; a rest of 20 steps is left out
    losses = [3.0, 2.0, 1.0]
    drawn = [Curves(arm=arm, tokens=tokens, loss=(losses,) * 3, difference=([], [], [])) for arm in ("mha", "gdn")]
    arms = [
        replace(arm, costs=replace(arm.costs, flops=flops))
        for arm, flops in zip(results.study.arms, (1e6, 2e6), strict=True)
    ]
    found = with_evidence(replace(results, study=replace(results.study, arms=tuple(arms))), curves=tuple(drawn))
    shown = section(report_html(found), "How they learn")
    assert "A point is the mean over 7 steps, and stands at their middle; a rest of steps" in shown
    by_flops = shown.split("<svg")[2]
    assert "GFLOP of training so far" in by_flops
    assert "1 GFLOP is 10^9 of them" in shown
    across = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', by_flops)]
    left, right = across[0], across[-1]
    # The first tenth, a point, is left out: 1344 and 2240 tokens, so 1.344 and 2.24, 2.688 and 4.48 GFLOP.
    shares = [(x - left) / (right - left) for x in across]
    assert shares == pytest.approx([0.0, 0.896 / 3.136, 1.344 / 3.136, 1.0], abs=1e-3)
    tick = re.search(r'<text class="tick mid" x="([\d.]+)"[^>]*>3</text>', by_flops)
    assert tick is not None
    assert (float(tick[1]) - left) / (right - left) == pytest.approx((3 - 1.344) / 3.136, abs=1e-3)
    by_tokens = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', shown.split("<svg")[1])]
    assert by_tokens[:2] == by_tokens[2:], "both arms saw as many tokens"
    whole = with_evidence(
        results, curves=tuple(replace(each, tokens=[5 * 128.0, 15 * 128.0, 25 * 128.0]) for each in drawn)
    )
    assert "A point is the mean over 10 steps, and stands at their middle. " in section(report_html(whole), "How")


def test_a_rest_of_the_records_of_one_of_two_runs_joins_the_last_point() -> None:
    points = [(float(at), float(at)) for at in range(1, 122)]  # 60 points at most: threes, and a rest of one
    found = _means(points)
    assert found[:2] == [(2.0, 2.0), (5.0, 5.0)]
    assert found[-1] == (119.5, 119.5), "118 to 121"
    assert len(found) == 40
    assert (_means([]), _means(points[:1])) == ([], points[:1])


@pytest.mark.parametrize(
    ("tried", "best", "at_edge"),
    [
        ({0.001: 1.7, 0.01: 1.6, 0.1: 1.8}, 0.01, False),
        ({0.001: 1.7, 0.01: 1.6}, 0.01, True),
        ({0.001: 1.5, 0.01: 1.6}, 0.001, True),
        ({0.001: 1.7, 0.01: 1.6, 0.1: None}, 0.01, False),  # the next one diverged: nothing lies beyond
        ({0.001: None, 0.01: None}, None, False),
    ],
)
def test_an_arm_whose_best_rate_has_no_other_beyond_is_named(
    results: Results, tried: dict[float, float | None], best: float | None, at_edge: bool
) -> None:
    inner = replace(results.arms[0], sensitivity={0.001: 1.7, 0.01: 1.6, 0.1: 1.8}, lr=0.01)
    page = report_html(replace(results, arms=(inner, replace(results.arms[1], sensitivity=tried, lr=best))))
    assert ("The best rate of gdn stands at the edge of what was tried." in page) == at_edge
    assert ("No arm&#x27;s best" in page or "No arm's best rate stands at the edge" in page) != at_edge


def test_rates_are_searched_for_as_the_page_says(results: Results) -> None:
    assert f"Each arm tried {SEARCH_RULE}" in report_html(results)
    assert SEARCH_RULE.startswith("three rates √10 apart, the recipe's in the middle")
    assert next_rates({}) == (-2, 0, 2), "quarters of a factor of 10"
    scores = {-2: 3.0, 0: 2.0, 2: 1.0}
    assert next_rates(scores) == (4,), "one more √10 farther as long as the best stands at an edge"
    assert next_rates(scores | {4: 0.5}) == (6,)
    assert next_rates(scores | {4: 1.5}) == (1, 3), "then one on either side of the best, a fourth root of 10 away"
    assert next_rates(scores | {4: 1.5, 1: 0.1, 3: 2.0}) == ()


# ---- what the weights do --------------------------------------------------------------------------------------------


def test_losses_by_what_was_read_say_how_many_predictions_a_mark_has_and_what_a_rise_may_mean(results: Results) -> None:
    shown = unescape(section(report_html(results), "Loss by what was read"))
    assert 'data-tip="mha, 1 token read, 40 predictions: ' in shown
    assert 'data-tip="mha, 17–32 tokens read, 380 predictions: ' in shown
    assert "The first mark has 40 predictions, the last 380." in shown
    assert "a mixer that forgets does that, and so does one whose gain is at the first tokens" in shown
    assert "in nats a token" in shown


def repeats(accuracy: float, hit: float, cut: float, control: float) -> Repeats:
    layer = LayerInduction(
        previous=(0.0,), duplicate=(0.0,), induction=(0.0,), induction_conv=(0.0,), hit=(hit,), attribution=(0.0,),
        conv=1, cut=cut, cut_conv=cut, control=control,
    )  # fmt: skip
    return Repeats(accuracy=accuracy, chance=0.01, first_loss=5.0, second_loss=1.0, layers=(layer,))


def test_induction_is_judged_by_the_thresholds_that_the_page_gives(results: Results) -> None:
    shown = section(report_html(results), "Induction")
    assert INDUCTION_RULE in unescape(shown)
    figures = re.search(
        r"is (.*?) or more, .* rate of (.*?) or more, .* costs (.*?) nats .* most (.*?)% ", INDUCTION_RULE
    )
    below = re.search(r"accuracy is below (.*?), or (.*?) times", INDUCTION_RULE)
    assert figures is not None
    assert below is not None
    accuracy, hit, cut, share = map(float, figures.groups())
    control, little = share / 100 * cut, 1e-6
    assert induction_verdict(repeats(accuracy, hit, cut, control)).answer == "yes"
    for lower in ((little, 0, 0, 0), (0, little, 0, 0), (0, 0, little, 0), (0, 0, 0, -little)):
        values = (each - less for each, less in zip((accuracy, hit, cut, control), lower, strict=True))
        assert induction_verdict(repeats(*values)).answer == "partly"
    floor, times = map(float, below.groups())
    assert induction_verdict(repeats(floor - little, 0.0, 0.0, 0.0)).answer == "no"
    assert induction_verdict(repeats(floor, 0.0, 0.0, 0.0)).answer == "partly"
    guessed = replace(repeats(times * 0.2 - little, 0.0, 0.0, 0.0), chance=0.2)
    assert induction_verdict(guessed).answer == "no"
    assert "a guess among all 257 ids costs ln 257 = 5.5" in shown


# ---- time, and where the figures are from ---------------------------------------------------------------------------


def test_time_is_predicted_and_taken_by_all_runs_and_a_run_is_more_than_its_steps(results: Results) -> None:
    paces = (Pace(arm="mha", runs=3, predicted=60.0, took=100.0), Pace(arm="gdn", runs=2, predicted=120.0, took=150.0))
    study = replace(results.study, start_seconds=4.25, loop_seconds=0.0137, evaluation_seconds=1.5)
    shown = section(report_html(with_evidence(replace(results, study=study), paces=paces)), "Time")
    assert "All runs, one after the other: predicted 7 min, took 10 min, 1.43 times as long." in shown
    said = re.sub("<[^>]+>", "", shown)
    assert "its steps, 13.7 ms more for each of them (rows, records), 4.2 s to start and to save, and 1.5 s to" in said
    assert "if the study was run again on the same machine, with the same versions." in said


def test_the_state_of_generation_is_told_with_the_tokens_that_it_has(results: Results) -> None:
    heads = re.findall("<th>(.*?)</th>", section(report_html(results), "Time"))
    told = [re.sub("<[^>]+>", "", head) for head in heads if head.startswith("state")]
    assert told == ["state 32 read, 32 written", "state 128 read, 32 written"]


def test_origins_have_what_is_needed_to_do_it_again(results: Results) -> None:
    found = describe_machine()
    assert {"Python", "system"} <= found.keys()
    assert {name: found[name] for name in describe_cpu()} == {
        name: str(value) for name, value in describe_cpu().items()
    }
    page = report_html(replace(results, study=replace(results.study, machine={"Python": "3.11.7", "torch": "2"})))
    rows = dict(row for row in rows_of(page) if len(row) == 2)
    assert rows["machine"] == "Python 3.11.7, torch 2"
    assert rows["program"].endswith("; in a checkout of it: pip install '.[lab]'")
    assert "STUDY, its folder" in page
    assert "The fingerprint is the SHA-256 of all tokens" in page


def test_every_figure_has_a_name_for_who_hears_the_page(results: Results) -> None:
    drawn = re.findall("<svg[^>]*>", report_html(results))
    names = [re.findall('aria-label="([^"]+)"', each) for each in drawn]
    assert all(len(name) == 1 for name in names)
    assert ["loss, nats a token, by tokens of the document read: mha, gdn"] in names
