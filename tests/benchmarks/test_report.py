"""docs/performance.md is what the report makes of the last runs; targets are judged by figures alone."""

from copy import deepcopy
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.agreement import changes
from benchmarks.targets import Found, targets
from swamla.bench.results import Results, Row
from swamla.errors import CorruptError, SwamlaError, UsageError

TIME: Row = {"median_s": 1.0, "low_s": 0.98, "high_s": 1.04, "rounds": 5}


def trained(name: str, length: int, speed: float, ratio: float | None = 1.0) -> Row:
    figures: Row = {"tokens_per_s": speed, "ratio": ratio, "bf16_share": 0.5, "peak_bytes": 10**9}
    return {"name": name, "length": length, "rows": 4, "parameters": 12_000_000, **figures, **TIME}


def loss(name: str, peak: int, ratio: float) -> Row:
    what: Row = {"op": "head and cross-entropy", "length": 4096, "vocabulary": 50304, "dtype": "bf16 autocast"}
    return {"name": name, **what, "gradient_bytes": 10**8, "ratio": ratio, "peak_bytes": peak, **TIME}


def a_run() -> Results:
    machine = {
        "processor": "A Chip",
        "threads": 2,
        "memory_bytes": 16e9,
        "system": "Linux",
        "python": "3",
        "torch": "2",
    }
    ceilings = {"fp32_flops": 1e11, "bf16_flops": 8e11, "copy_bytes": 2e10}
    rows: dict[str, list[Row]] = {
        "ceilings": [{"name": "before", **ceilings}, {"name": "after", **ceilings}],
        "training": [
            trained("nanoGPT", 1024, 4000.0),
            trained("swa swa mla", 1024, 5000.0, 1.25),
            {"name": "gdn gdn mla", "length": 1024, "error": "RuntimeError: broken"},
            trained("nanoGPT", 4096, 2000.0),
            trained("swa swa mla", 4096, 3000.0, 1.5),
            {"name": "GPT-2", "length": 4096, "note": "not run: too slow"},
        ],
        "ops": [loss("PyTorch", 26 * 10**8, 1.0), loss("swamla", 2 * 10**8, 1.1)],
    }
    return Results(
        command="make bench", begun="2026-01-02T03:04:05+00:00", machine=machine, ceilings=ceilings, rows=rows
    )


def test_the_processor_stands_above_the_figures_with_its_instructions_where_they_are_known() -> None:
    run = a_run()
    assert block("ceilings", run).startswith("A Chip, 2 threads, ")
    run.machine["instructions"] = "AVX512 AMX"
    assert block("ceilings", run).startswith("A Chip, AVX512 AMX, 2 threads, ")


def block(name: str, *runs: Results) -> str:
    return report.rendered(runs or (a_run(),))[name]


def test_the_page_is_what_the_report_makes_of_the_last_runs() -> None:
    runs = [Results.load(file) for file in report.runs()[:2]]
    page = report.PAGE.read_text(encoding="utf-8")
    assert report.rewritten(page, runs) == page, "run: python -m benchmarks.report"


def test_a_run_changes_the_page_and_nothing_outside_of_its_blocks() -> None:
    page = report.PAGE.read_text(encoding="utf-8")
    changed = report.rewritten(page, [a_run()])
    assert changed != page
    assert changed != report.rewritten(page, [])
    assert report.rewritten(changed, []) == report.rewritten(page, [])


def test_names_stand_down_and_lengths_across() -> None:
    lines = block("training").splitlines()
    assert "| tokens of a row | 1,024 | 4,096 |" in lines
    assert "| `swa swa mla` | 5,000 (1.25×) | 3,000 (1.50×) |" in lines
    assert "| nanoGPT | 4,000 (1.00×) | 2,000 (1.00×) |" in lines


def test_what_failed_or_was_left_out_says_so_under_the_table() -> None:
    text = block("training")
    assert "| `gdn gdn mla` | failed | |" in text
    assert "| GPT-2 | | – |" in text
    assert "`gdn gdn mla` 1024: failed, RuntimeError: broken." in text
    assert "GPT-2 4096: not run: too slow." in text


def test_command_date_rounds_and_spread_stand_under_a_table() -> None:
    foot = " ".join(block("training").split())
    assert "`make bench`, 2026-01-02; rounds: 5; quartiles at most 4 % from the median" in foot


def test_a_table_that_was_not_measured_says_so() -> None:
    assert block("generation") == "Not part of this run."
    assert block("repeated") == "There is one run only."


def verdicts(results: Results) -> dict[str, list[str]]:
    return {target.what: target.cells(Found(results))[1:] for target in targets()}


def test_targets_are_met_missed_or_not_measured_by_the_figures() -> None:
    found = verdicts(a_run())
    assert found["`swa swa mla` against nanoGPT, training tokens/s at 1,024"] == ["≥ 1.1×", "1.25×", "met"]
    assert found["`swa swa mla` against nanoGPT, training tokens/s at 4,096"] == ["≥ 1.7×", "1.5×", "**not met**"]
    assert found["`gdn gdn mla` against nanoGPT, training tokens/s at 1,024"] == ["≥ 0.9×", "", "not measured"]


def test_a_ratio_to_another_baseline_is_no_ratio_to_nanogpt() -> None:
    results = a_run()
    results.rows["training"] = [row for row in results.rows["training"] if row["name"] != "nanoGPT"]
    assert verdicts(results)["`swa swa mla` against nanoGPT, training tokens/s at 1,024"][-1] == "not measured"


def test_the_memory_of_the_loss_is_judged_without_the_gradients_that_any_loss_returns() -> None:
    found = verdicts(a_run())
    what = "head and loss, vocabulary 50,304: peak memory beyond the gradients, "
    assert found[f"{what}of PyTorch's with all logits"] == ["≤ 12.5 %", "4 %", "met"]
    assert found[f"{what}of the logits in fp32"] == ["≤ 12.5 %", "12.1 %", "met"]


def test_linear_means_that_every_doubling_takes_twice_the_time() -> None:
    results = a_run()
    times = {2048: 1.0, 4096: 2.0, 8192: 4.0, 16384: 9.6, 32768: 19.2}
    results.rows["ops"] += [{**TIME, "name": f"{n} tokens", "median_s": seconds} for n, seconds in times.items()]
    what = "windowed attention from 2k to 32k: largest distance from twice the time per doubling"
    assert verdicts(results)[what] == ["≤ 15 %", "20 %", "**not met**"]


def test_two_runs_are_compared_median_by_median() -> None:
    before, last = a_run(), a_run()
    last.rows = deepcopy(last.rows)
    last.rows["training"][1]["median_s"] = 1.25
    last.rows["training"][4]["median_s"] = 0.95
    found = {row: round(change, 3) for table, row, change in changes(last, before) if table == "training"}
    assert found == {"nanoGPT 1024": 0, "`swa swa mla` 1024": 0.25, "nanoGPT 4096": 0, "`swa swa mla` 4096": -0.05}
    assert "Further apart than 10%: `swa swa mla` 1024 +25 %." in block("repeated", last, before)
    assert "All are within 10%." in block("repeated", before, before)


def unknown_table(results: Results) -> None:
    results.rows["weather"] = []


def unknown_row(results: Results) -> None:
    del results.rows["training"][0]["tokens_per_s"]


def trial(results: Results) -> None:
    results.command = 'make bench BENCH_ARGS="--quick"'


@pytest.mark.parametrize(
    ("spoil", "error", "says"),
    [
        (unknown_table, CorruptError, "weather"),
        (unknown_row, CorruptError, "tokens_per_s"),
        (trial, UsageError, "quick"),
    ],
)
def test_results_it_does_not_know_are_refused(spoil, error: type[SwamlaError], says: str) -> None:
    results = a_run()
    spoil(results)
    with pytest.raises(error, match=says):
        report.rendered([results])


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "cpu-2026-01-01.json"
    file.write_text('{"format": 2}')
    with pytest.raises(CorruptError, match="format 2"):
        Results.load(report.runs(tmp_path)[0])


def test_the_last_run_is_the_last_by_date_and_then_by_number(tmp_path: Path) -> None:
    names = ["cpu-2026-01-02.json", "cpu-2026-01-02-10.json", "cpu-2026-01-02-9.json", "cpu-2025-12-31-99.json"]
    for name in [*names, "gpu-2027-01-01.json", "notes.txt"]:
        (tmp_path / name).touch()
    assert [file.name for file in report.runs(tmp_path)] == [names[1], names[2], names[0], names[3]]


@pytest.mark.parametrize(
    "change", [lambda page: page.replace("<!-- ops -->", ""), lambda page: page + "<!-- more -->\n"]
)
def test_a_page_without_a_block_or_with_an_unknown_one_is_refused(change) -> None:
    with pytest.raises(UsageError, match="blocks"):
        report.rewritten(change(report.PAGE.read_text(encoding="utf-8")), [a_run()])


def test_a_block_that_does_not_end_is_refused() -> None:
    page = report.PAGE.read_text(encoding="utf-8").replace("<!-- end of ops -->", "")
    with pytest.raises(UsageError, match="ops"):
        report.rewritten(page, [a_run()])
