"""What the commands print with."""

import os
import shlex
import shutil
import sys
from typing import Any

import rich.console

from swamla.distributed import is_main


class Console(rich.console.Console):
    """rich's console, but a reader of our output who leaves early is `main`'s to answer, as everywhere else.

    Of several processes of a run only the main one's prints.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(quiet=not is_main(), **settings)

    def on_broken_pipe(self) -> None:
        """Called while a `BrokenPipeError` is handled: let it go on."""
        raise


def say(console: rich.console.Console, text: str) -> None:
    """Print text as it is: no markup, no wrapping, no highlighting."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def harmless(text: str) -> str:
    """Text without control characters: an untrained model may say anything, and the terminal would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


PLUGINS: list[str] = []  # files that --plugin named: a command that goes on needs them again


def program() -> str:
    """How this program was called, in a form that works again from this folder; with its plugins."""
    called = sys.argv[0]
    if os.path.basename(called) != "swamla":
        words = [os.path.relpath(sys.executable), "-m", "swamla"]
    else:
        on_path = shutil.which("swamla")
        words = ["swamla" if on_path and os.path.samefile(on_path, called) else os.path.relpath(called)]
    return shlex.join([*words, *(word for file in PLUGINS for word in ("--plugin", file))])
