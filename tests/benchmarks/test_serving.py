"""The table of docs/serving.md: its figures are those measured, and the newest file's."""

from pathlib import Path
from typing import Any

from benchmarks.serving import number_of, our_name, page, prompts

ROW = {"name": "swamla serve", "streams": 16, "tokens_per_s": 386.6, "low_tokens_per_s": 371.2, "tokens": 960}
MORE = {"high_tokens_per_s": 478.9, "cpu_tokens_per_s": 1020.7, "first_median_s": 0.1316, "first_p95_s": 1.2889}


def cells(results: dict[str, Any]) -> list[list[str]]:
    lines = page({"tables": {"serving": [results]}}).splitlines()
    return [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]


def test_a_row_has_its_rates_by_the_second_and_its_waits_in_milliseconds() -> None:
    head, _, row = cells(ROW | MORE)
    expected = {
        "server": "swamla serve",
        "streams": "16",
        "tokens/s": "387",
        "lowest to highest": "371 to 479",
        "tokens per second of CPU": "1021",
        "first token, median": "132 ms",
        "95th percentile": "1289 ms",
    }
    assert dict(zip(head, row, strict=True)) == expected


def test_what_failed_is_a_row_with_its_reason() -> None:
    head, _, row = cells({"name": "another", "error": "does not start: x"})
    assert row == ["another", "", "failed", "does not start: x", "", "", ""]
    assert len(head) == len(row)


def test_the_newest_file_is_the_latest_of_the_latest_day() -> None:
    days = ["2026-11-29", "2026-11-29-2", "2026-11-29-10", "2026-12-01", "2026-12-01-2"]
    files = [Path(f"results/serving-{day}.json") for day in days]
    assert sorted([*files[2:], *files[:2]], key=number_of) == files


def test_servers_are_named_by_what_sets_them_apart() -> None:
    runs = [Path("a"), Path("b")]
    assert our_name(runs[:1], "eager") == "swamla serve"
    assert our_name(runs, "int8") == "swamla serve, 2 models, int8"


def test_prompts_are_all_different_and_of_the_length_asked_for() -> None:
    first, second = prompts(8, 100, 0), prompts(8, 100, 8)
    assert len({*first, *second}) == 16
    assert {len(prompt) for prompt in (*first, *second)} == {100}
