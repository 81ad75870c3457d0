"""Printing for all commands."""

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import rich.console

from swamla.cli.outputs import is_terminal
from swamla.cli.spelling import as_typed
from swamla.distributed import is_main
from swamla.train.tracking.display import fill, say


class Console(rich.console.Console):
    """rich's console, but leaves a closed pipe to `main`.

    Only the main rank prints. `is_interactive` is true for terminals that can erase a line, whatever FORCE_COLOR says.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(quiet=not is_main(), **settings)
        if "force_terminal" not in settings and "force_interactive" not in settings:
            self.is_interactive = is_terminal(self.file)
        if self.is_dumb_terminal and "width" not in settings:
            self.size = rich.console.ConsoleDimensions(*shutil.get_terminal_size())  # rich takes 80 columns

    def print(self, *objects: Any, **settings: Any) -> None:
        """Print; warnings and notes name settings by their flags."""
        first = objects[0] if objects else None
        if isinstance(first, str) and first.startswith(("warning: ", "note: ")):
            objects = (as_typed(first), *objects[1:])
        super().print(*objects, **settings)

    def on_broken_pipe(self) -> None:
        """Called while a `BrokenPipeError` is handled: re-raise it."""
        raise


def say_wrapped(console: rich.console.Console, text: str, *, label: str = "", indent: int = 0) -> None:
    """Print plain text behind `label`, wrapped at words to a terminal's width, with later lines indented."""
    say(console, fill(console, text, label=label, indent=indent))


def say_rows(console: rich.console.Console, rows: Sequence[tuple[str, str]]) -> None:
    """Print labels and their texts in two columns, the texts wrapped at words to a terminal's width."""
    width = max((len(label) for label, _ in rows), default=0)
    for label, text in rows:
        say_wrapped(console, text, label=f"{label:<{width}}  ", indent=width + 2)


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
