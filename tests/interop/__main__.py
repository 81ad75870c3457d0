"""`python -m tests.interop [NAME …]`: every mapping both ways, the largest differences written into docs/interop.md.

And every architecture of llama.cpp, where it is installed.
"""

import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import transformers

from benchmarks.markdown import table
from swamla.interop import load_pretrained, read_architecture, save_pretrained
from swamla.interop.gguf.saving import home_of
from tests.interop.cases import CASES, Case, compare
from tests.interop.llama_cpp import IN_LLAMA_CPP, MISSING, agreement, ours_of

PAGE = Path(__file__).parents[2] / "docs" / "interop.md"
BEGIN, END = "<!-- table -->", "<!-- end of table -->"
GGUF_BEGIN, GGUF_END = "<!-- gguf table -->", "<!-- end of gguf table -->"
GGUF_HEADS = ["model", "layers here", "in llama.cpp", "f32", "f16", "q8_0", "equal argmax of 24", "equal text"]
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


def gguf_row(name: str) -> list[str]:
    """One line of the table of llama.cpp: matrices and state in fp32, then in f16, then Q8_0."""
    ours = ours_of(IN_LLAMA_CPP[name])
    home = home_of(ours.config)
    exact, half, eighth = (
        agreement(ours, weights=weights, exact=weights == "f32") for weights in ("f32", "f16", "q8_0")
    )
    shown = [f"{each.log_probabilities:.0e}" for each in (exact, half, eighth)]
    return [
        name,
        " ".join(ours.config.pattern[:4]),
        home.name,
        *shown,
        f"{exact.argmax}",
        "yes" if exact.text else "no",
    ]


def main(names: list[str]) -> int:
    """Compare, print and, unless only some are named, write the page."""
    transformers.utils.logging.set_verbosity_error()
    chosen = [name for name in CASES if name in names or not names]
    rows = [shown(row_of(name, CASES[name])) for name in chosen]
    if not names:
        write(BEGIN, END, f"{table(HEADS, rows)}\n\n`make interop`, transformers {transformers.__version__}.")
    if MISSING:
        print(f"llama.cpp is left out: {MISSING}")
        return 0
    rows = [shown(gguf_row(name)) for name in IN_LLAMA_CPP if name in names or not names]
    if not names:
        versions = ", ".join(f"{each} {version(each)}" for each in ("gguf", "xllamacpp"))
        write(GGUF_BEGIN, GGUF_END, f"{table(GGUF_HEADS, rows)}\n\n`make interop`, {versions}.")
    return 0


def shown(row: list[str]) -> list[str]:
    """The row, printed."""
    print("  ".join(row), flush=True)
    return row


def write(begin: str, end: str, made: str) -> None:
    """Put a table between two marks of the page."""
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.partition(begin)[0], page.partition(end)[2]
    PAGE.write_text(f"{before}{begin}\n\n{made}\n\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
