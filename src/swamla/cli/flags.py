"""Parsing a command's flags with tyro: underscores, flat names, bare booleans, and every mistake one line."""

import contextlib
import io
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import tyro
from tyro.conf import Positional as Positional
from tyro.conf import UseAppendAction as Repeated

from swamla.config import did_you_mean
from swamla.errors import UsageError

T = TypeVar("T")

_BOX = re.compile(r"\x1b\[[0-9;]*m|[─━│┃╭╮╰╯╵╷├┤]")
_TITLES = re.compile(
    r"^ *(Parsing error|Value error|Missing argument|Unrecognized options|Invalid choice)\b", re.MULTILINE
)
# What other programs call things, too far from our names to be found by spelling.
_ALSO_CALLED = {
    "source": "data",
    "dataset": "data",
    "learning_rate": "lr",  # where the flags of the project before this one are not taken
    "max_iters": "steps",
    "out_dir": "output_dir",
}
_FOOTER = re.compile(r"(Argument helptext:|For full helptext).*", re.DOTALL)


def parse(
    cls: type[T], argv: Sequence[str], *, command: str, refusal: Callable[[str], str] = lambda name: ""
) -> tuple[T, frozenset[str]]:
    """Read `argv` into the dataclass `cls`; returns it and the names of the flags that were given.

    refusal: why a name that is no flag is none, where that can be said. Prints the help and leaves on --help. Raises
    `UsageError` for an unknown flag, one given twice, a missing or impossible value.
    """
    given = _check_names(cls, argv, refusal)
    # Colours in an error would have to be taken out again, and its lines be joined.
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            parsed = tyro.cli(cls, prog=f"swamla {command}", args=list(argv), use_underscores=True)
    except SystemExit as leave:
        if leave.code in (0, None):
            raise
        raise UsageError(_missing(cls, command, complaint.getvalue()) or _one_line(complaint.getvalue())) from None
    sys.stderr.write(complaint.getvalue())
    return parsed, given


def _check_names(cls: Any, argv: Sequence[str], refusal: Callable[[str], str]) -> frozenset[str]:
    """The names of the flags in `argv`, each known and none given twice."""
    markers = {name: getattr(hint, "__metadata__", ()) for name, hint in _annotations(cls).items()}
    flags = [name for name in markers if Positional not in markers[name]]
    paired = [name for name, hint in _annotations(cls).items() if _is_bool(hint) and not _is_switch(markers[name])]
    negations = {f"no_{name}": name for name in paired}
    given: set[str] = set()
    for token in argv:
        written = token.partition("=")[0]
        name = written.removeprefix("--").replace("-", "_")
        if not token.startswith("--") or name == "help":
            continue
        if name not in flags and name not in negations:
            raise UsageError(f"unknown flag {written}; {refusal(name) or _suggest(name, flags)}")
        name = negations.get(name, name)
        if name in given and Repeated not in markers[name]:
            raise UsageError(f"--{name} is given twice")
        given.add(name)
    return frozenset(given)


def _annotations(cls: Any) -> dict[str, Any]:
    """The annotation of every flag, those in groups included."""
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(cls, include_extras=True).items():
        bare = get_args(hint)[0] if get_origin(hint) is Annotated else hint
        found |= _annotations(bare) if is_dataclass(bare) else {name: hint}
    return found


def _is_bool(hint: Any) -> bool:
    return hint is bool or (get_origin(hint) is Annotated and get_args(hint)[0] is bool)


def _is_switch(markers: tuple[Any, ...]) -> bool:
    return tyro.conf.FlagCreatePairsOff in markers


def _suggest(name: str, flags: list[str]) -> str:
    if _ALSO_CALLED.get(name) in flags:
        return f"did you mean --{_ALSO_CALLED[name]}?"
    hint = did_you_mean(name, flags)
    return hint.replace('"', "--", 1).replace('"', "") if "mean" in hint else "--help lists all"


def _missing(cls: Any, command: str, complaint: str) -> str:
    """What to say when an argument without a default was not given; tyro would name its type. Empty otherwise."""
    required = [f.name.upper() for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
    if "Required options" not in complaint or not required:
        return ""
    return f"{' '.join(required)} is missing: swamla {command} {' '.join(required)} …; --help tells what it is"


def _one_line(text: str) -> str:
    """tyro's box without its frame, title and footer."""
    return " ".join(_FOOTER.sub("", _TITLES.sub("", _BOX.sub(" ", text), count=1)).split())
