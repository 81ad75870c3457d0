"""A benchmark that is broken off keeps every row it had."""

import json
from pathlib import Path

import pytest

from swamla.bench.results import Results, in_bytes, in_rate, in_seconds, readable
from swamla.errors import CorruptError


def results(file: Path | None, said: list[str]) -> Results:
    return Results(
        command="bench",
        machine={"cores": 2},
        ceilings={"fp32_flops": 1e11, "copy_bytes": 1e10},
        file=file,
        say=said.append,
    )


def test_the_file_is_whole_json_after_every_row(tmp_path: Path) -> None:
    file, said = tmp_path / "found.json", []
    found = results(file, said)
    for number in range(3):
        found.add("training", {"name": "tiny", "length": 256 * number, "tokens_per_s": 10.0})
        data = json.loads(file.read_text())
        assert [row["length"] for row in data["tables"]["training"]] == [256 * n for n in range(number + 1)]
    assert data.keys() == {"format", "command", "begun", "seconds", "machine", "ceilings", "tables"}
    assert (data["format"], data["command"], data["machine"]) == (1, "bench", {"cores": 2})
    assert len(said) == 3


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    found = results(file, [])
    found.add("decode", {"name": "tiny", "state_bytes": 5, "note": None})
    assert Results.load(file).plain() == found.plain()


def test_a_row_that_failed_says_why_on_one_line(tmp_path: Path) -> None:
    file, said = tmp_path / "found.json", []
    results(file, said).failed("training", "huge", MemoryError("not\nenough"))
    [row] = json.loads(file.read_text())["tables"]["training"]
    assert row == {"name": "huge", "error": "MemoryError: not enough"}
    assert said == ["training  huge  error MemoryError: not enough"]


def test_a_figure_that_is_no_number_is_refused_and_the_file_stays_whole(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    found = results(file, [])
    found.add("training", {"tokens_per_s": 1.0})
    with pytest.raises(ValueError, match="Out of range"):
        found.add("training", {"tokens_per_s": float("nan")})
    found.add("training", {"tokens_per_s": 2.0})
    assert json.loads(file.read_text())["tables"]["training"] == [{"tokens_per_s": 1.0}, {"tokens_per_s": 2.0}]


@pytest.mark.parametrize(
    "text", ["no json", "[]", '{"format": 9}', '{"format": 1, "seconds": "long"}', '{"format": 1}']
)
def test_anything_else_is_refused_as_damaged(tmp_path: Path, text: str) -> None:
    file = tmp_path / "found.json"
    file.write_text(text)
    with pytest.raises(CorruptError, match=r"found\.json"):
        Results.load(file)


def test_a_row_reads_with_units() -> None:
    row = {"name": "tiny", "length": 1024, "median_s": 0.7241, "tokens_per_s": 5654.2, "peak_bytes": 123456789}
    assert readable("training", row | {"matmul_share": 0.4, "error": None}) == (
        "training  tiny  length 1,024  median 724 ms  tokens 5,654/s  peak 123 MB  matmul 40.0%"
    )


def test_figures_keep_three_digits_at_any_size() -> None:
    assert [in_seconds(s) for s in (2e-6, 0.5, 1.234, 1234.0)] == ["2 µs", "500 ms", "1.23 s", "1,234 s"]
    assert [in_bytes(n) for n in (12, 1536, 2.5e9)] == ["12 B", "1.54 kB", "2.5 GB"]
    assert [in_rate(r) for r in (0.123, 99.5, 12345.6)] == ["0.123/s", "99.5/s", "12,346/s"]
