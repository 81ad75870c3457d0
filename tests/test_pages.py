"""Two commands write one page."""

from pathlib import Path

from .machines import MACHINES, Result, _line, _part, lines_of
from .pages import MACHINES_HEADING, replace_before, replace_part

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


def test_a_machine_that_is_played_again_replaces_its_own_line_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# First\n\n| AMX | of another table |\n")
    one, two = MACHINES[0], MACHINES[3]
    lines = {machine.name: _line(Result(machine=machine, passed=7)) for machine in (two, one)}
    replace_part(page, MACHINES_HEADING, _part(lines))
    assert lines_of(page) == lines
    again = {one.name: _line(Result(machine=one, passed=8, failed=1))}
    replace_part(page, MACHINES_HEADING, _part(lines_of(page) | again))
    assert lines_of(page) == {one.name: again[one.name], two.name: lines[two.name]}
    assert list(lines_of(page)) == [one.name, two.name]
    assert "8 passed, 1 failed" in page.read_text()
