"""Printing for all commands."""

import os
import shlex
import shutil
import sys
from typing import Any

import rich.console

from swamla.distributed import is_main


class Console(rich.console.Console):
    """rich's console, but leaves a closed pipe to `main`.

    Only the main rank prints.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(quiet=not is_main(), **settings)

    def on_broken_pipe(self) -> None:
        """Called while a `BrokenPipeError` is handled: re-raise it."""
        raise


def say(console: rich.console.Console, text: str) -> None:
    """Print plain text: no markup, no wrapping, no highlighting."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def harmless(text: str) -> str:
    """Replace control characters, which a model may generate and a terminal would execute."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


PLUGINS: list[str] = []  # files of --plugin, repeated in suggested commands


def program() -> str:
    """A command that calls this program again from this folder, with its plugins."""
    called = sys.argv[0]
    if os.path.basename(called) != "swamla":
        words = [os.path.relpath(sys.executable), "-m", "swamla"]
    else:
        on_path = shutil.which("swamla")
        words = ["swamla" if on_path and os.path.samefile(on_path, called) else os.path.relpath(called)]
    return shlex.join([*words, *(word for file in PLUGINS for word in ("--plugin", file))])
