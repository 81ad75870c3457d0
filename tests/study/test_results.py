"""Results of a study: the verdict and its limits in words, and the same figures in all files and on the screen."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from swamla.model.mixers.mha import MHAConfig
from swamla.model.mixers.mixer import MixerConfig
from swamla.model.mixers.mla import MLAConfig
from swamla.model.mixers.swa import SWAConfig
from swamla.study.caveats import set_apart, trained_apart
from swamla.study.export import latex
from swamla.study.plan import Arm
from swamla.study.results import Results
from swamla.study.statistics import wilson
from swamla.train.optim.muon import MuonConfig

from .helpers import arm_of
from .played import results_of


def test_the_verdict_is_of_the_test_part_paired_by_seed() -> None:
    results = results_of(0.05)
    (found,) = results.comparisons
    assert found.differences == pytest.approx([0.048, 0.049, 0.05, 0.051, 0.052])
    assert results.verdict() == [found.words()]
    assert "gdn is worse than mha by 0.0500 bits per byte" in found.words()


def test_sensitivity_has_every_rate_that_was_tried_and_the_best_one_is_the_arms() -> None:
    one = results_of().arms[0]
    assert one.lr == 0.01
    assert list(one.sensitivity) == sorted(one.sensitivity) == [0.00316, 0.00562, 0.01, 0.0178, 0.0316]
    assert min(one.sensitivity, key=lambda lr: one.sensitivity[lr] or 0) == one.lr


def test_runs_that_diverged_are_named_and_counted_and_not_in_the_interval() -> None:
    results = results_of(fails=("gdn-lr0.01-seed3", "mha-lr0.0316"))
    gdn = results.arms[1]
    assert gdn.failed == ("gdn-lr0.01-seed3",)
    assert gdn.finished.mean == 0.8
    assert results.comparisons[0].seeds == (1, 2, 4, 5)
    assert "Of gdn, gdn-lr0.01-seed3 did not finish, and is in no interval." in results.verdict()
    search = "Of mha's search, mha-lr0.0316-seed0 did not finish, so no seed has that rate."
    assert search in results.verdict(), "no run of a search is in an interval"
    (said,) = (text for text in results.not_said() if "finished in both arms" in text)
    assert "favours an arm that loses some: of gdn the differences" in said
    assert not any("in both arms" in text for text in results_of(fails=("mha-lr0.0316",)).not_said())


@pytest.mark.parametrize("drops_tests", [False, True])
def test_seeds_of_a_rate_that_was_chosen_before_a_search_went_on_are_in_no_figure(drops_tests: bool) -> None:
    """A run of the search that failed is tried again and wins, so all seeds are trained anew at its rate."""
    now = results_of(0.05)
    chosen = {one.run: one for one in now.outcomes}
    old = {
        one.run.replace("lr0.01-", "lr0.0316-"): replace(one, run=one.run.replace("lr0.01-", "lr0.0316-"), rate=2)
        for one in now.outcomes
        if one.purpose == "seed" and one.arm == "gdn"
    }
    tests = [
        replace(test, run=test.run.replace("lr0.01-", "lr0.0316-"), bits_per_byte=9.0)
        for test in now.tests
        if test.arm == "gdn"
    ]
    lost = chosen | {"gdn-lr0.01-seed3": replace(chosen["gdn-lr0.01-seed3"], status="diverged", validation=None)}
    kept = [test for test in now.tests if test.run != "gdn-lr0.01-seed3"]
    found = Results.of(now.study, lost | old, kept if drops_tests else [*kept, *tests])
    assert found.comparisons[0].seeds == (1, 2, 4, 5)
    assert found.comparisons[0].differences == pytest.approx([0.048, 0.049, 0.051, 0.052])
    gdn = found.arms[1]
    assert (gdn.ended, gdn.lost, gdn.left_out) == (5, ("gdn-lr0.01-seed3",), tuple(old))
    assert gdn.finished.mean == 0.8
    told = " ".join(found.verdict())
    assert "gdn-lr0.0316-seed5 are in no figure: a run of its search was tried again, and another rate chosen." in told
    assert {test.run for test in found.tests} == {test.run for test in kept}


def test_seeds_that_diverged_are_seeds_that_did_not_learn() -> None:
    known = {"mha": (0.999,) * 5, "gdn": (0.999,) * 5}
    results = results_of(task=True, accuracies=known, fails=("gdn-lr0.01-seed2", "gdn-lr0.01-seed4"))
    assert results.arms[1].learned == wilson(3, 5)
    assert "and 3 of 5 seeds of gdn (95% interval of the share 23% to 88%)" in results.verdict()[0]


def test_an_arm_that_no_rate_trains_is_said_and_compared_with_nothing() -> None:
    results = results_of(fails=("gdn",))
    assert results.arms[1].lr is None
    assert "No learning rate trained gdn." in results.verdict()
    assert results.comparisons[0].kind == "undecided"
    assert "none" in results.table()[1][1]


def test_what_the_verdict_does_not_say_follows_from_the_study() -> None:
    undecided, decided = results_of(0.005, spread=0.02), results_of(0.05, rates="recipe")
    assert any(text.startswith("Undecided is no equivalence") for text in undecided.not_said())
    assert not any(text.startswith("Undecided") for text in decided.not_said())
    assert any("the recipe's learning rate" in text for text in decided.not_said())
    assert any("best of 5 or more" in text for text in undecided.not_said())
    assert any("trained for 2,560 tokens in rows of 32" in text for text in decided.not_said())


def test_where_some_seeds_learned_a_task_and_some_did_not_their_share_is_said_before_the_test_of_means() -> None:
    known, mixed, none = (0.999,) * 5, (0.995, 0.99, 0.4, 1.0, 0.42), (0.4, 0.41, 0.42, 0.43, 0.98)
    results = results_of(task=True, accuracies={"mha": known, "gdn": mixed})
    assert results.verdict()[0] == (
        "The task was learned (accuracy 0.99 or more) by 5 of 5 seeds of mha (95% interval of the share 57% to 100%) "
        "and 3 of 5 seeds of gdn (95% interval of the share 23% to 88%): where some seeds learn it and some do not, "
        f"these shares say more than means. {results.comparisons[0].words()}"
    )
    assert results.as_dict()["comparisons"][0]["words"] == results.verdict()[0]
    assert results_of(task=True, accuracies={"mha": mixed, "gdn": none}).verdict()[0].startswith("The task was learned")
    for accuracies in ({"mha": known, "gdn": none}, {"mha": none, "gdn": none}):
        clear = results_of(task=True, accuracies=accuracies)
        assert clear.verdict() == [clear.comparisons[0].words()]


def test_of_arms_matched_by_seconds_the_tokens_of_each_are_said() -> None:
    results = results_of(match="seconds")
    shorter = replace(results.study, arms=(results.study.arms[0], arm_of("gdn", steps=8)))
    said = replace(results, study=shorter).not_said()
    assert "trained for 1,024 to 2,560 tokens, in the time of the first arm's 2,560, in rows of 32" in said[0]
    assert not any("how they are trained" in text for text in said), "steps are what was matched"


def test_settings_that_mixers_of_two_arms_both_have_and_in_which_they_differ_are_named() -> None:
    study = results_of().study
    mha, gdn = study.arms

    def apart(mixer: MixerConfig, name: str = "b", conv: int = 0) -> dict[str, list[str]]:
        block = replace(mha.config.model.blocks["mha"], mixer=mixer, conv=conv)
        config = replace(mha.config, model=replace(mha.config.model, blocks={"mha": block}))
        return set_apart(replace(study, arms=(mha, replace(mha, name=name, config=config))))

    assert apart(SWAConfig(n_heads=2, window=8)) == {}, "a window is its own"
    assert apart(SWAConfig(n_heads=2, qk_norm="head")) == {"qk_norm head against none": ["b"]}
    assert apart(SWAConfig(n_heads=2, rope=None)) == {}, "positions are told by themselves"
    assert apart(MHAConfig(n_heads=2, qk_norm="head")) == {}, "of one kind: what the arm is compared for"
    assert apart(MLAConfig(n_heads=2, kv_lora_rank=8, gate="head"), conv=4) == {
        "conv 4 against 0, gate head against none": ["b"]
    }
    assert set_apart(study) == {"conv 4 against 0, gate silu against none": ["gdn"]}
    twice = replace(study, arms=(mha, gdn, replace(gdn, name="other")))
    assert set_apart(twice) == {"conv 4 against 0, gate silu against none": ["gdn", "other"]}
    said = replace(results_of(), study=twice).not_said()
    assert any("those of mha both have: gdn and other: conv 4 against 0, gate" in text for text in said)


def test_comparisons_are_numbers_in_their_file(tmp_path: Path) -> None:
    results = results_of(sizes={32: 0.05, 48: 0.01}, spread=0.003)
    results.write(tmp_path)
    with (tmp_path / "comparisons.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row, one in zip(rows, results.comparisons, strict=True):
        assert [float(row[name]) for name in ("difference", "low", "high")] == list(one.interval)
        assert (float(row["p"]), float(row["p_equivalence"])) == (one.p, one.p_equivalence)
        assert [float(row[name]) for name in ("p_alone", "p_equivalence_alone")] == list(one.alone)
        assert [float(row[f"seed {seed}"]) for seed in one.seeds] == list(one.differences)
    found = json.loads((tmp_path / "results.json").read_text())["comparisons"][0]
    assert (found["alone"]["p"], found["correlation"]) == (results.comparisons[0].alone[0], approx_one())
    assert "low & high & p &" in (tmp_path / "comparisons.tex").read_text()
    results_of(fails=("gdn",)).write(tmp_path)
    assert "nan" not in (tmp_path / "comparisons.csv").read_text()


def approx_one() -> object:
    """Scores of the played arms rise by seed alike."""
    return pytest.approx(1.0, abs=0.05)


def test_what_intervals_leave_out_is_said() -> None:
    said = " ".join(results_of().not_said())
    assert "chosen by one seed on other text than is scored: how another seed would have chosen is in no" in said
    assert "Student's t takes differences to be about normal, which 5 pairs cannot show." in said


def test_settings_of_training_and_positions_in_which_arms_differ_are_named() -> None:
    results = results_of()
    mha, gdn = results.study.arms
    assert trained_apart(results.study) == []

    def said(arm: Arm, **asked: str) -> list[str]:
        study = replace(results.study, arms=(mha, arm), asked=replace(results.study.asked, **asked))
        text = [text for text in replace(results, study=study).not_said() if "how they are trained" in text]
        assert (f"too: {', '.join(trained_apart(study))}. A difference may be" in " ".join(text)) == bool(text)
        return trained_apart(study)

    def train(**changes: object) -> Arm:
        return replace(gdn, config=replace(gdn.config, train=replace(gdn.config.train, **changes)))

    assert said(train(warmup=0.3, schedule="linear")) == ["train.warmup", "train.schedule"]
    assert said(train(lr=0.02)) == [], "each arm's rate is searched for"
    assert said(train(lr=0.02), rates="recipe") == ["train.lr"]
    assert said(train(optimizer=MuonConfig())) == ["train.optimizer"]
    learned = replace(gdn.config, model=replace(gdn.config.model, learned_positions=64))
    assert said(replace(gdn, config=learned)) == ["learned_positions"]
    for mixer, apart in ((MHAConfig(n_heads=2, rope=None), ["rope"]), (MLAConfig.example(), [])):
        block = replace(mha.config.model.blocks["mha"], mixer=mixer)
        model = replace(mha.config.model, blocks={"mha": block})
        assert said(replace(mha, name="b", config=replace(mha.config, model=model))) == apart


def test_the_files_have_the_figures_of_the_screen(tmp_path: Path) -> None:
    results = results_of(fails=("gdn-lr0.01-seed3",))
    files = results.write(tmp_path)
    assert {file.name for file in files} == {
        "results.json", "runs.csv", "arms.csv", "arms.tex", "comparisons.csv", "comparisons.tex",
    }  # fmt: skip
    heads, rows = results.table()
    with (tmp_path / "arms.csv").open() as file:
        assert list(csv.reader(file)) == [heads, *rows]
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["verdict"] == results.verdict()
    assert found["comparisons"][0]["differences"] == list(results.comparisons[0].differences)
    assert [arm["lr"] for arm in found["arms"]] == [0.01, 0.01]
    assert found["differing"]["model.pattern"] == {"mha": ["mha"], "gdn": ["gdn"]}
    with (tmp_path / "runs.csv").open() as file:
        runs = list(csv.DictReader(file))
    assert {run["run"]: run["test"] for run in runs if run["test"]} == {
        test.run: str(test.bits_per_byte) for test in results.tests
    }
    assert [run["status"] for run in runs].count("diverged") == 1


def test_what_json_lacks_becomes_null(tmp_path: Path) -> None:
    results_of(fails=("gdn",)).write(tmp_path)
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["comparisons"][0]["interval"] == [None, None, None]


def test_the_latex_is_a_table_whose_cells_are_escaped() -> None:
    assert latex(["a_1", "b"], [["50 %", "1 ± 2"]]) == (
        "\\begin{tabular}{lr}\n\\toprule\na\\_1 & b \\\\\n\\midrule\n50 \\% & 1 $\\pm$ 2 \\\\\n\\bottomrule\n"
        "\\end{tabular}\n"
    )


def test_of_several_sizes_every_comparison_is_said_with_its_width_and_then_what_becomes_of_it(tmp_path: Path) -> None:
    results = results_of(sizes={32: 0.05, 48: 0.01}, spread=0.003, fails=("gdn-w48-lr0.01-seed3",))
    small, large, trend, lost = results.verdict()
    assert small.startswith("At width 32, gdn is worse than mha by 0.0500 bits per byte")
    assert large.startswith("At width 48, gdn is worse than mha by 0.0092")
    assert trend.startswith("From width 32 to 48, the difference of gdn from mha fades: it went from +0.0")
    assert lost == "Of gdn@48, gdn-w48-lr0.01-seed3 did not finish, and is in no interval."
    assert {one.comparisons for one in results.comparisons} == {2}, "p is adjusted for all sizes"
    assert [one.reference for one in results.comparisons] == ["mha@32", "mha@48"]
    assert any(text.startswith("All sizes are trained for the same tokens") for text in results.not_said())
    assert any("about 10,336 and 23,184 parameters" in text for text in results.not_said())
    assert {file.name for file in results.write(tmp_path)} >= {"sizes.csv", "sizes.tex"}
    with (tmp_path / "sizes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["width"], row["n"], row["verdict"]) for row in rows] == [
        ("32", "5", "difference"), ("48", "4", "difference"), ("32 to 48", "4", "fades"),
    ]  # fmt: skip
    found = json.loads((tmp_path / "results.json").read_text())
    assert [one["kind"] for one in found["trends"]] == ["fades"]
    assert found["trends"][0]["words"] == trend
    assert found["study"]["asked"]["sizes"] == [32, 48]


def test_at_a_size_the_results_are_those_of_the_study_alone_but_for_the_adjustment() -> None:
    results = results_of(sizes={32: 0.05, 48: 0.01}, page=True)
    for size, found in results.sizes.items():
        assert [one.arm.name for one in found.arms] == ["mha", "gdn"]
        assert {one.arm for one in found.outcomes} == {one.arm for one in found.tests} == {"mha", "gdn"}
        assert all(f"-w{size}-" in one.run for one in found.outcomes)
        (alone,) = Results.of(found.study, {one.run: one for one in found.outcomes}, found.tests).comparisons
        (here,) = found.comparisons
        assert (here.interval, here.differences, here.seeds) == (alone.interval, alone.differences, alone.seeds)
        assert here.p >= alone.p
        assert found.evidence is not None
        assert found.evidence.caches.keys() == found.evidence.speed.keys() == {"mha", "gdn"}


def test_without_sizes_no_file_mentions_them(tmp_path: Path) -> None:
    files = results_of(page=True).write(tmp_path)
    assert not [file for file in files if file.name.startswith("sizes")]
    assert not {"sizes", "trends", "larger_seeds"} & set(json.loads((tmp_path / "results.json").read_text()))
    assert "larger_seeds" not in (tmp_path / "results.json").read_text()
