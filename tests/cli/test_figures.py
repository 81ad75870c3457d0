"""Figures that commands print, by other arithmetic than theirs."""

import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from swamla.cli import main, quickstart
from swamla.cli.console import Console
from swamla.cli.info_tables import short

TEXT = {
    "noise": random.Random(0).randbytes(50_000),
    "nothing, then noise": bytes(50_000) + random.Random(1).randbytes(50_000),
    "noise, then nothing": random.Random(2).randbytes(25_000) + bytes(75_000),
}
NOISE = {"noise": 1.0, "nothing, then noise": 0.5, "noise, then nothing": 0.25}  # the share that cannot be compressed


@pytest.mark.parametrize("name", TEXT)
def test_quickstart_weighs_whole_bytes_in_bits(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    quickstart._compare(Console(), "model", 1.2345, TEXT[name])
    shown = capsys.readouterr().out
    assert f"{len(TEXT[name]):,} bytes of held-out text" in shown
    figures = {row: float(re.search(rf"{row} +.? +([0-9.]+)", shown)[1]) for row in ("gzip -9", "xz -9e", "model")}
    assert figures["model"] == pytest.approx(1.2345, abs=6e-4)
    for compressor in ("gzip -9", "xz -9e"):
        assert 8 * NOISE[name] <= figures[compressor] <= 8 * NOISE[name] * 1.02
        program = [*compressor.split(), "-c"]
        if shutil.which(program[0]):
            size = len(subprocess.run(program, input=TEXT[name], capture_output=True, check=True).stdout)
            assert figures[compressor] == pytest.approx(8 * size / len(TEXT[name]), abs=0.01)


def test_numbers_are_told_with_the_prefix_they_have() -> None:
    told = {
        0: "0",
        999: "999",
        1234: "1.23 k",
        999_600: "1.00 M",
        213_018_624: "213.0 M",
        7.5e9: "7.50 G",
        2e12: "2.00 T",
    }
    assert {number: short(number) for number in told} == told
    assert short(1.5e9, "B") == "1.50 GB"


def test_info_shows_shares_and_ratios_of_its_own_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "small"]) == 0
    shown = capsys.readouterr().out
    total = int(re.search(r"total .*?([\d,]{9,})", shown)[1].replace(",", ""))
    shares = 0.0
    for name, count, share in re.findall(r"^.*?│ +(\S[a-z -]*?) +│[^│]*│ +([\d,]+) │ +([\d.]+)%", shown, re.MULTILINE):
        assert float(share) == pytest.approx(100 * int(count.replace(",", "")) / total, abs=0.051), name
        shares += float(share) if name not in ("total", "active", "non-embedding") else 0
    assert shares == pytest.approx(100, abs=0.5)


def test_prepare_prints_that_no_byte_is_unaccounted_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("Ein Satz über Äpfel, 苹果.\n" * 400, encoding="utf-8")
    text, cache = str(tmp_path / "text.txt"), str(tmp_path / "cache")
    assert main(["prepare", text, "--tokenizer", "bpe:300", "--cache_dir", cache]) == 0
    told = "held-out bytes counted minus bytes of the decoded tokens: 0"
    assert capsys.readouterr().out.splitlines()[-1] == told
