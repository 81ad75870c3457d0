"""Two commands write one page."""

from pathlib import Path

from .pages import replace_before, replace_part

HEADING = "## Second"


def test_neither_part_of_a_page_is_touched_by_writing_the_other(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# First\n\nold\n")
    replace_part(page, HEADING, "\nsecond\n")
    replace_before(page, HEADING, "# First\n\nnew")
    assert page.read_text() == "# First\n\nnew\n\n## Second\n\nsecond\n"
    replace_part(page, HEADING, "\nthird\n")
    replace_part(page, HEADING, "\nthird\n")
    assert page.read_text() == "# First\n\nnew\n\n## Second\n\nthird\n"
