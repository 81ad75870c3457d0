"""docs/reliability.md is written by two commands, each of which leaves the other's part alone."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
RELIABILITY = ROOT / "docs" / "reliability.md"
MACHINES_HEADING = "## On other machines"


def replace_part(page: Path, heading: str, text: str) -> None:
    """Put `text` behind the line `heading` of `page`, which ends with it; it is added where it is missing."""
    before, _, _ = page.read_text(encoding="utf-8").partition(f"{heading}\n")
    page.write_text(f"{before.rstrip()}\n\n{heading}\n{text}", encoding="utf-8")


def replace_before(page: Path, heading: str, text: str) -> None:
    """Put `text` in front of the line `heading` of `page`; what begins there stays."""
    _, found, after = page.read_text(encoding="utf-8").partition(f"{heading}\n")
    page.write_text(f"{text.rstrip()}\n" + (f"\n{found}{after}" if found else ""), encoding="utf-8")
