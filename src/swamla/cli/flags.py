"""Command lines: a command's arguments are the fields of a dataclass, read and explained by argparse.

A field is a flag of its own name, written with underscores or hyphens; its annotation says how text becomes its value,
and the class's docstring what it is for ("name: text"). Flags that configs give rise to, see `overrides`, stand beside
those of the command.
"""

import argparse
import re
import shutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from types import MappingProxyType, NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin

from swamla.config import field_types, options_of
from swamla.errors import ConfigError, UsageError

T = TypeVar("T")
Put = Callable[[dict[str, Any], Any], None]

# What other programs call things, the project before this one among them: too far from our names for their spelling.
ALSO_CALLED = {
    "source": "data",
    "dataset": "data",
    "out_dir": "output_dir",
    "learning_rate": "lr",
    "max_iters": "steps",
    "warmup_iters": "warmup",
    "optimizer_type": "optimizer",
    "tokenizer_name": "tokenizer",
    "gradient_accumulation_steps": "accumulation",
    "gradient_checkpointing": "checkpointing",
    "use_gated_deltanet": "local_mixer",
    "use_fp8": "precision",
    "use_ema": "ema",
    "num_workers": "workers",
    "resume_from": "resume",
}
_NO_FLAG = {
    "size": "a recipe has no flag of its own: swamla train {value}",
    "hf_token": "the token is read from HF_TOKEN in the environment, so that it is stored nowhere",
}
_WORD = re.compile(r"--[\w-]+(=.*)?", re.DOTALL)
WIDEST = 110


@dataclass(frozen=True, kw_only=True)
class Flag:
    """An argument of a command.

    default: shown in --help, but for MISSING.  group: its heading there.  usual: whether --help shows it, or only
    --help all.  repeated: given any number of times, its values a tuple.  bare: the value of a flag that may stand
    without one; then `goes_with` tells whether the word behind it is its value.  switch: a boolean that is only ever
    given as it is, without a --no_ form.
    field: what it changes in a config, dotted.  put: writes the value into plain data, where it belongs; raises
    `UsageError` for one that makes no sense there.
    """

    name: str
    annotation: Any
    help: str
    default: Any = field(default_factory=lambda: MISSING)
    group: str = "flags"
    usual: bool = True
    positional: bool = False
    repeated: bool = False
    metavar: str = ""
    short: str = ""
    bare: str | None = None
    goes_with: Callable[[str], bool] = lambda word: True
    switch: bool = False
    field: str = ""
    put: Put = lambda plain, value: None

    @property
    def takes_value(self) -> bool:
        """Whether there is more to it than being given."""
        return self.annotation is not bool


def argument(default: Any = MISSING, /, **settings: Any) -> Any:
    """A field of a command's dataclass, with settings of `Flag`."""
    return field(default=default, metadata=settings)


def parse(
    cls: type[T],
    argv: Sequence[str],
    *,
    command: str,
    more: Mapping[str, Flag] = MappingProxyType({}),
    refusal: Callable[[str], str] = lambda name: "",
    explain: Callable[[str], tuple[Mapping[str, Flag], str]] = lambda word: ({}, ""),
) -> tuple[T, dict[str, Any]]:
    """Read `argv` into the dataclass `cls`; returns it, and the value of every flag that was given, of `more` too.

    refusal: why a name that is no flag is none, where that can be said. explain: of the first word that is no flag, the
    flags with their defaults, and what ends the help. Prints the help and leaves on --help. Raises `UsageError` for an
    unknown flag, one given twice, a missing or impossible value; `ConfigError` for a value that a config cannot have.
    """
    table = {flag.name: flag for flag in _arguments_of(cls)} | dict(more)
    level, argv = _asks_for_help(argv)
    if level:
        defaults, epilog = explain(_first_word(argv, table))
        shown = _parser(cls, table | dict(defaults), command, everything=level == "all", epilog=epilog)
        print(shown.format_help(), end="", flush=True)  # a closed pipe is found here
        raise SystemExit(0)
    words = _checked(argv, table, refusal)
    try:
        parser = _parser(cls, table, command)
        given = vars(parser.parse_args(words) if "--" in words else parser.parse_intermixed_args(words))
    except argparse.ArgumentError as wrong:
        unfit = wrong.__context__
        raise (
            unfit.error if isinstance(unfit, _Unfit) else UsageError(f"{wrong.argument_name}: {wrong.message}")
        ) from None
    given |= {name: tuple(given[name]) for name in given if table[name].repeated}
    own = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    arguments = cls(**{name: value for name, value in given.items() if name in own})
    return arguments, {name: value for name, value in given.items() if not table[name].positional}


def _asks_for_help(argv: Sequence[str]) -> tuple[str, list[str]]:
    """ "usual" or "all" where the help is wanted, else nothing; and the other words."""
    for index, word in enumerate(argv):
        if word == "--":
            break
        if word in ("-h", "--help", "--help=all"):
            is_all = argv[index + 1 : index + 2] == ["all"]
            return "all" if is_all or "=" in word else "usual", [*argv[:index], *argv[index + 1 + is_all :]]
    return "", list(argv)


def _first_word(argv: Sequence[str], table: Mapping[str, Flag]) -> str:
    """The first word of a command line that is neither flag nor value; nothing where there are mistakes."""
    try:
        words = _checked(argv, table, lambda name: "")
    except UsageError:
        return ""
    return next((word for word in words if not word.startswith("-")), "")


def _checked(argv: Sequence[str], table: Mapping[str, Flag], refusal: Callable[[str], str]) -> list[str]:
    """The words of a command line, flags with underscores and each in one word with its value.

    Raises `UsageError` for an unknown flag, and for one given twice.
    """
    known = {name: name for name, flag in table.items() if not flag.positional}
    known |= {f"no_{name}": name for name in known if _has_negation(table[name])}
    given: set[str] = set()
    words: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*words, word, *rest]
        if not _WORD.fullmatch(word):
            words.append(word)
            continue
        written, equals, value = word.partition("=")
        name = written.removeprefix("--").replace("-", "_")
        if name not in known:
            behind = value or (rest[0] if rest else "RECIPE")
            reason = refusal(name) or _NO_FLAG.get(name, "").format(value=behind) or _suggest(name, list(known))
            raise UsageError(f"unknown flag {written}; {reason}")
        flag = table[known[name]]
        if flag.name in given and not flag.repeated:
            raise UsageError(f"--{flag.name} is given twice")
        given.add(flag.name)
        is_followed = bool(rest) and rest[0] != "--" and not _WORD.fullmatch(rest[0])
        if flag.takes_value and not equals and is_followed and flag.goes_with(rest[0]):
            equals, value = "=", rest.pop(0)  # in one word argparse takes a value for no flag: -1e-3, "- item"
        elif flag.bare is not None and not equals:
            equals, value = "=", flag.bare
        words.append(f"--{name}{equals}{value}")
    return words


def _suggest(name: str, flags: list[str]) -> str:
    others = {other: ours for other, ours in ALSO_CALLED.items() if ours in flags}
    close = get_close_matches(name, [*flags, *others, "help"], n=1)
    return f"did you mean --{others.get(close[0], close[0])}?" if close else "--help all lists them"


class _Parser(argparse.ArgumentParser):
    """argparse's, whose errors are ours."""

    def error(self, message: str) -> Any:
        """What argparse has to say, and where to read on."""
        raise UsageError(f"{message}; {self.prog} --help tells more")


class _Switch(argparse.Action):
    """--NAME stores true, --no_NAME false."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Called by argparse where the flag stands."""
        setattr(namespace, self.dest, option_string != f"--no_{self.dest}")


def _parser(
    cls: Any, table: Mapping[str, Flag], command: str, *, everything: bool = False, epilog: str = ""
) -> _Parser:
    """argparse's parser of these flags. everything: its help shows every flag, and all there is to say of it."""
    width = min(WIDEST, shutil.get_terminal_size().columns - 2)
    words = [_shown_as(flag) + " …" * flag.repeated for flag in table.values() if flag.positional]
    required = [flag.default is MISSING for flag in table.values() if flag.positional]
    usage = [word if needed else f"[{word}]" for word, needed in zip(words, required, strict=True)]
    always = "Every command also takes --plugin FILE and --debug, see swamla --help."
    parser = _Parser(
        prog=command,
        usage=" ".join([command, *usage, "[FLAGS]"]),
        description=textwrap.fill(" ".join((cls.__doc__ or "").partition("\n\n")[0].split()), width),
        epilog=f"{epilog}\n{always}".strip(),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=27, width=width),
        argument_default=argparse.SUPPRESS,
        add_help=False,
        allow_abbrev=False,
        exit_on_error=False,
    )
    groups: dict[str, Any] = {}
    for flag in table.values():
        if flag.group not in groups:
            groups[flag.group] = parser.add_argument_group(flag.group)
        told = _help(flag, everything) if everything or flag.usual else argparse.SUPPRESS
        _add(groups[flag.group], flag, told, both_forms=everything)
    return parser


def _add(group: Any, flag: Flag, told: str, *, both_forms: bool) -> None:
    """Make a flag known to argparse. both_forms: of a boolean the help shows --no_NAME too, or else what changes it."""
    read = _reader(flag)
    if flag.positional:
        nargs = ("+" if flag.repeated else None) if flag.default is MISSING else "?"
        group.add_argument(flag.name, nargs=nargs, metavar=_shown_as(flag), type=read, help=told)
    elif flag.takes_value:
        group.add_argument(
            *([f"-{flag.short}"] if flag.short else []),
            f"--{flag.name}",
            action="append" if flag.repeated else "store",
            metavar=_shown_as(flag) if flag.bare is None else f"[{_shown_as(flag)}]",
            type=read,
            help=told,
        )
    else:
        for name in [flag.name, f"no_{flag.name}"] if _has_negation(flag) else [flag.name]:
            is_default = (name == flag.name) == (flag.default is True) and _has_negation(flag)
            shown = argparse.SUPPRESS if is_default and not both_forms else told
            group.add_argument(f"--{name}", dest=flag.name, action=_Switch, nargs=0, help=shown)


def _has_negation(flag: Flag) -> bool:
    return not flag.takes_value and not flag.switch


def _shown_as(flag: Flag) -> str:
    return flag.metavar or (flag.name.upper() if flag.positional else metavar(flag.annotation))


def _help(flag: Flag, everything: bool) -> str:
    """What a flag is for, its first sentence alone unless everything is wanted, and its default."""
    told = flag.help if everything or not flag.field else re.split(r"; |(?<!e\.g)\. |: ", flag.help)[0]
    default = flag.default
    if default is MISSING or default is None or isinstance(default, bool) or default in ("", ()):
        return told.replace("%", "%%")
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
    return f"{told} [{shown}]".replace("%", "%%")


def metavar(annotation: Any) -> str:
    """What --help shows in a value's place: `N|none`, `cosine|linear`."""
    options = options_of(annotation)
    shown = "|".join(_metavar_of(option) for option in options if option is not NoneType)
    return f"{shown}|none" if NoneType in options and str not in options else shown


def _metavar_of(option: Any) -> str:
    if get_origin(option) is Literal:
        return "|".join(map(str, get_args(option)))
    if get_origin(option) is tuple:
        return ",".join("…" if item is Ellipsis else _metavar_of(item) for item in get_args(option))
    return {int: "N", float: "X", str: "TEXT", bool: "true|false"}[option]


class _Unfit(argparse.ArgumentTypeError):
    """A word that is no value of a flag, with the error that says so."""

    def __init__(self, error: ConfigError | UsageError) -> None:
        super().__init__(str(error))
        self.error = error


def _reader(flag: Flag) -> Callable[[str], Any]:
    """What makes a value of a flag's type of a word."""
    options = [option for option in options_of(flag.annotation) if option is not NoneType]
    none = len(options) < len(options_of(flag.annotation)) and str not in options

    def read(text: str) -> Any:
        if none and text.lower() == "none":
            return None
        for option in options:
            try:
                return _value(text, option)
            except ValueError:
                continue
        allowed = f"must be {' or '.join([*map(_allowed, options), *(['none'] if none else [])])}"
        if flag.field:
            raise _Unfit(ConfigError(flag.field, text, allowed, f"--{flag.name}"))
        raise _Unfit(UsageError(f"--{flag.name} {text or repr(text)}: {allowed}"))

    return read


def _value(text: str, option: Any) -> Any:
    """`text` as a value of one type; ValueError where it is none."""
    if get_origin(option) is Literal:
        return get_args(option)[[str(value) for value in get_args(option)].index(text)]
    if get_origin(option) is tuple:
        return [_value(item, get_args(option)[0]) for item in re.split(r"[,\s]+", text.strip())]
    return ("false", "true").index(text.lower()) == 1 if option is bool else option(text)


def _allowed(option: Any) -> str:
    if get_origin(option) is Literal:
        return f"one of {', '.join(map(str, get_args(option)))}"
    if get_origin(option) is tuple:
        return f"like {','.join(_EXAMPLES[item] for item in get_args(option) if item is not Ellipsis)}"
    return {int: "a whole number", float: "a number", bool: "true or false"}[option]


_EXAMPLES = {int: "8", float: "0.9", str: "a"}


def _arguments_of(cls: Any) -> list[Flag]:
    """The fields of a command's dataclass."""
    types, docs = field_types(cls), field_docs(cls)
    return [
        Flag(
            **{"name": f.name, "annotation": types[f.name], "help": docs.get(f.name, ""), "default": f.default}
            | dict(f.metadata)
        )
        for f in fields(cls)
    ]


def field_docs(cls: type) -> dict[str, str]:
    """What the docstrings of a config and its bases say about each field, for --help.

    `name: text` (of several names: with commas) at the start of a line or sentence or after two spaces.
    """
    names = "|".join(f.name for f in fields(cls))
    label = re.compile(rf"(?:^ *|  |\. )((?:{names})(?:, (?:{names}))*): ", re.MULTILINE)
    docs: dict[str, str] = {}
    for base in cls.__mro__:
        text = (base.__doc__ or "") if hasattr(base, "__dataclass_fields__") else ""
        labels = list(label.finditer(text))
        ends = [following.start() for following in labels[1:]] + [len(text)]
        for found, end in zip(labels, ends[: len(labels)], strict=True):
            said = " ".join(text[found.end() : end].split("\n\n")[0].split()).rstrip(".")
            docs = dict.fromkeys(found[1].split(", "), said) | docs
    return docs
