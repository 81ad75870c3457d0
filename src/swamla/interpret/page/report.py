"""Write a report: a folder with report.html, its figures as PNG, and explain.json."""

import json
from pathlib import Path

from swamla.files import write_text_atomically
from swamla.interpret.page.figures import write_figures
from swamla.interpret.page.html import report_html
from swamla.interpret.sections import Explained

REPORT_HTML, REPORT_JSON = "report.html", "explain.json"


def write_report(explained: Explained, folder: Path) -> None:
    """Write the report's files to a folder, which is made; files of an earlier report are replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    data = explained.plain()
    write_figures(data, folder)
    write_text_atomically(folder / REPORT_HTML, report_html(data))
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    write_text_atomically(folder / REPORT_JSON, text + "\n")  # last: it marks a whole report
