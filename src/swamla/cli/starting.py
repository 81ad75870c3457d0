"""The first line of a command, printed before torch is imported, which takes seconds."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from typing import Any

from swamla.cli.outputs import discard, is_terminal
from swamla.distributed import is_main

ERASE = "\r\x1b[K"  # back to the line's start, and erase it


class _Announcer(MetaPathFinder):
    """Finds no module, but prints a line when the import of torch begins."""

    def __init__(self, line: str, *, transient: bool) -> None:
        self.line, self.transient, self.shown = line, transient, False

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> None:
        """Called by Python for every module that is not imported yet."""
        if name == "torch" and not self.shown:
            self.shown = True
            try:
                print(self.line, end="" if self.transient else "\n", file=sys.stderr, flush=True)
            except OSError:  # nobody reads stderr any more: the command ends as it would without this line
                discard(2)


@contextmanager
def announced(command: str) -> Iterator[None]:
    """Within this context the import of torch begins with a line on stderr, on the main rank only.

    A terminal erases it at the end; one that cannot, and a file, keep it. command: the module in `swamla.cli`.
    """
    line = f"swamla {command.replace('original', 'train')}: starting, loading torch …"
    announcer = _Announcer(line, transient=is_terminal(sys.stderr))
    if is_main():
        sys.meta_path.insert(0, announcer)
    try:
        yield
    finally:
        if is_main():
            sys.meta_path.remove(announcer)
        if announcer.shown and announcer.transient:
            print(ERASE, end="", file=sys.stderr, flush=True)
