"""`python -m tests.interop [NAME …]`: every mapping both ways, the largest differences written into docs/interop.md."""

import sys
import tempfile
from pathlib import Path

import transformers

from benchmarks.markdown import table
from swamla.interop import load_pretrained, read_architecture, save_pretrained
from tests.interop.cases import CASES, Case, compare

PAGE = Path(__file__).parents[2] / "docs" / "interop.md"
BEGIN, END = "<!-- table -->", "<!-- end of table -->"
TEXT = 200  # greedy ids
HEADS = ["model", "layers here", "in: logits", "gradients", "equal text", "out as", "logits", "gradients", "equal text"]


def row_of(name: str, case: Case) -> list[str]:
    """One line of the table."""
    theirs = case.model()
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder) / "first", Path(folder) / "second"
        theirs.save_pretrained(first)
        ours = load_pretrained(first)
        came = compare(ours, theirs, read_architecture(first), TEXT)
        written = save_pretrained(ours, second, to=case.to or read_architecture(first).kind)
        again = transformers.AutoModelForCausalLM.from_pretrained(second).eval()
        went = compare(ours, again, written, TEXT)
    shown = [[f"{each.logits:.0e}", f"{each.gradients:.0e}", f"{each.text}"] for each in (came, went)]
    return [name, " ".join(ours.config.pattern), *shown[0], written.kind, *shown[1]]


def main(names: list[str]) -> int:
    """Compare, print and, unless only some are named, write the page."""
    transformers.utils.logging.set_verbosity_error()
    rows = []
    for name in names or CASES:
        rows.append(row_of(name, CASES[name]))
        print("  ".join(rows[-1]), flush=True)
    if not names:
        page = PAGE.read_text(encoding="utf-8")
        before, after = page.partition(BEGIN)[0], page.partition(END)[2]
        made = f"{table(HEADS, rows)}\n\n`make interop`, transformers {transformers.__version__}."
        PAGE.write_text(f"{before}{BEGIN}\n\n{made}\n\n{END}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
