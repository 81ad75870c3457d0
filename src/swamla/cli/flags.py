"""Command lines: a command's arguments are the fields of a dataclass, parsed by argparse.

A field is a flag of its own name, written with underscores or hyphens. Its annotation gives the type, and the class's
docstring the help ("name: text"). `overrides` adds flags generated from configs.
"""

import argparse
import re
import shutil
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from functools import cache
from types import MappingProxyType, NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin

from swamla.config import field_types, options_of
from swamla.errors import ConfigError, UsageError

T = TypeVar("T")
Apply = Callable[[dict[str, Any], Any], None]

# Names in other programs, e.g. the original project, that are spelled too differently from ours for a suggestion.
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
    "chat": "swamla chat RUN holds a conversation",
}
_WORD = re.compile(r"--[\w-]+(=.*)?", re.DOTALL)
WIDEST = 110


@dataclass(frozen=True, kw_only=True)
class Flag:
    """An argument of a command.

    default: shown in --help unless MISSING.  group: its heading there.  usual: whether --help shows it, or only
    --help all.  repeated: may be given several times; the values form a tuple.  bare: the value if none is given;
    `goes_with` then says whether the next word is its value.  switch: a boolean without a --no_ form.
    field: the dotted config field that it sets.  apply: writes the value into plain data; raises `UsageError` for a
    value that does not fit there.
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
    apply: Apply = lambda plain, value: None

    @property
    def takes_value(self) -> bool:
        """Whether it has a value: all but booleans."""
        return self.annotation is not bool


_parsed: dict[str, Flag] = {}  # the flags of the current command
_given: set[str] = set()  # those on its command line


def forget_parsed() -> None:
    """Forget the command line that was parsed last in this process."""
    _parsed.clear()
    _given.clear()


def parsed() -> tuple[Mapping[str, Flag], Collection[str]]:
    """The flags of the command line that was parsed last, and the names of those that it has."""
    return _parsed, _given


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
    """Parse `argv` into the dataclass `cls`; returns it and the values of all given flags, including `more`.

    refusal: the reason why a name is not a flag, or "". explain: maps the first positional word to flags with its
    defaults, and the end of the help. On --help prints the help and exits. Raises `UsageError` for an unknown flag, one
    given twice, a missing or invalid value; `ConfigError` for a value that a config refuses.
    """
    table = {flag.name: flag for flag in _arguments_of(cls)} | dict(more)
    _parsed.clear()
    _parsed.update(table)
    help_kind, argv = _asks_for_help(argv)
    if help_kind:
        defaults, epilog = explain(_first_word(argv, table))
        shown = _parser(cls, table | dict(defaults), command, everything=help_kind == "all", epilog=epilog)
        print(shown.format_help(), end="", flush=True)  # raises here on a closed pipe
        raise SystemExit(0)
    words = _checked(argv, table, refusal)
    try:
        parser = _parser(cls, table, command)
        given = vars(parser.parse_args(words) if "--" in words else parser.parse_intermixed_args(words))
    except argparse.ArgumentError as wrong:
        unfit = wrong.__context__
        if isinstance(unfit, _Unfit):
            raise unfit.error from None
        if wrong.argument_name is None:  # a word that is missing or unknown: before Python 3.13 `error` is called
            parser.error(wrong.message)
        raise UsageError(f"{wrong.argument_name}: {wrong.message}") from None
    given |= {name: tuple(given[name]) for name in given if table[name].repeated}
    own = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    arguments = cls(**{name: value for name, value in given.items() if name in own})
    return arguments, {name: value for name, value in given.items() if not table[name].positional}


def peek(
    argv: Sequence[str], *classes: type, more: Mapping[str, Flag] = MappingProxyType({})
) -> tuple[list[str], set[str]]:
    """The positional words of a command line, and the names of its flags, which may be those of several commands.

    Nothing of a line with mistakes, of which `parse` tells.
    """
    table = {flag.name: flag for cls in classes for flag in _arguments_of(cls)} | dict(more)
    _, rest = _asks_for_help(argv)
    try:
        words = _checked(rest, table, lambda name: "")
    except UsageError:
        return [], set()
    cut = words.index("--") if "--" in words else len(words)
    positional = [word for word in words[:cut] if not word.startswith("-")] + words[cut + 1 :]
    return positional, set(_given)


def _asks_for_help(argv: Sequence[str]) -> tuple[str, list[str]]:
    """ "usual" or "all" if help is asked for, else ""; and the other words."""
    for index, word in enumerate(argv):
        if word == "--":
            break
        if word in ("-h", "--help", "--help=all"):
            is_all = argv[index + 1 : index + 2] == ["all"]
            return "all" if is_all or "=" in word else "usual", [*argv[:index], *argv[index + 1 + is_all :]]
    return "", list(argv)


def _first_word(argv: Sequence[str], table: Mapping[str, Flag]) -> str:
    """The first positional word of a command line; "" if the line has mistakes."""
    try:
        words = _checked(argv, table, lambda name: "")
    except UsageError:
        return ""
    return next((word for word in words if not word.startswith("-")), "")


def _checked(argv: Sequence[str], table: Mapping[str, Flag], refusal: Callable[[str], str]) -> list[str]:
    """The words of a command line, with flags as `--name_with_underscores=value`.

    Raises `UsageError` for an unknown flag, and for one given twice.
    """
    known = {name: name for name, flag in table.items() if not flag.positional}
    known |= {f"no_{name}": name for name in known if _has_negation(table[name])}
    given = _given
    given.clear()
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
            next_word = value or (rest[0] if rest else "RECIPE")
            if name in table:  # a positional one
                raise UsageError(f"unknown flag {written}; {name.upper()} stands without a flag: {next_word}")
            reason = refusal(name) or _NO_FLAG.get(name, "").format(value=next_word) or _suggest(name, list(known))
            raise UsageError(f"unknown flag {written}; {reason}")
        flag = table[known[name]]
        if flag.name in given and not flag.repeated:
            raise UsageError(f"--{flag.name} is given twice")
        given.add(flag.name)
        is_followed = bool(rest) and rest[0] != "--" and not _WORD.fullmatch(rest[0])
        if flag.takes_value and not equals and is_followed and flag.goes_with(rest[0]):
            # Joined, so that argparse does not take a value for a flag: -1e-3, "- item".
            equals, value = "=", rest.pop(0)
        elif flag.bare is not None and not equals:
            equals, value = "=", flag.bare
        words.append(f"--{name}{equals}{value}")
    return words


def _suggest(name: str, flags: list[str]) -> str:
    others = {other: ours for other, ours in ALSO_CALLED.items() if ours in flags}
    close = get_close_matches(name, [*flags, *others, "help"], n=1)
    return f"did you mean --{others.get(close[0], close[0])}?" if close else "--help all lists them"


class _Parser(argparse.ArgumentParser):
    """argparse's parser, raising `UsageError`."""

    def error(self, message: str) -> Any:
        """Raise argparse's message with a hint to the help."""
        raise UsageError(f"{message}; {self.prog} --help tells more")


class _Switch(argparse.Action):
    """--NAME stores true, --no_NAME false."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Called by argparse for the flag."""
        setattr(namespace, self.dest, option_string != f"--no_{self.dest}")


def _parser(
    cls: Any, table: Mapping[str, Flag], command: str, *, everything: bool = False, epilog: str = ""
) -> _Parser:
    """The argparse parser of these flags. everything: its help shows every flag with its full text."""
    width = min(WIDEST, shutil.get_terminal_size().columns - 2)
    words = [_shown_as(flag) + " …" * flag.repeated for flag in table.values() if flag.positional]
    required = [flag.default is MISSING for flag in table.values() if flag.positional]
    usage = [word if needed else f"[{word}]" for word, needed in zip(words, required, strict=True)]
    always = textwrap.fill("Every command also takes --plugin FILE and --debug, see swamla --help.", width)
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
        text = _help(flag, everything) if everything or flag.usual else argparse.SUPPRESS
        _add(groups[flag.group], flag, text, both_forms=everything)
    return parser


def _add(group: Any, flag: Flag, text: str, *, both_forms: bool) -> None:
    """Add a flag to argparse. both_forms: the help shows both forms of a boolean, not only the one that changes it."""
    read = _reader(flag)
    if flag.positional:
        nargs = ("+" if flag.repeated else None) if flag.default is MISSING else "?"
        group.add_argument(flag.name, nargs=nargs, metavar=_shown_as(flag), type=read, help=text)
    elif flag.takes_value:
        group.add_argument(
            *([f"-{flag.short}"] if flag.short else []),
            f"--{flag.name}",
            action="append" if flag.repeated else "store",
            metavar=_shown_as(flag) if flag.bare is None else f"[{_shown_as(flag)}]",
            type=read,
            help=text,
        )
    else:
        for name in [flag.name, f"no_{flag.name}"] if _has_negation(flag) else [flag.name]:
            is_default = (name == flag.name) == (flag.default is True) and _has_negation(flag)
            shown = argparse.SUPPRESS if is_default and not both_forms else text
            group.add_argument(f"--{name}", dest=flag.name, action=_Switch, nargs=0, help=shown)


def _has_negation(flag: Flag) -> bool:
    return not flag.takes_value and not flag.switch


def _shown_as(flag: Flag) -> str:
    return flag.metavar or (flag.name.upper() if flag.positional else metavar(flag.annotation))


def _help(flag: Flag, everything: bool) -> str:
    """A flag's help, only the first sentence unless `everything`, and its default."""
    text = flag.help if everything or not flag.field else re.split(r"; |(?<!e\.g)\. |: ", flag.help)[0]
    default = flag.default
    if default is MISSING or default is None or isinstance(default, bool) or default in ("", ()):
        return text.replace("%", "%%")
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
    return f"{text} [{shown}]".replace("%", "%%")


def metavar(annotation: Any) -> str:
    """The placeholder of a value in --help: `N|none`, `cosine|linear`."""
    options = options_of(annotation)
    shown = "|".join(_metavar_of(option) for option in options if option is not NoneType)
    return f"{shown}|none" if NoneType in options and str not in options else shown


def _metavar_of(option: Any) -> str:
    if get_origin(option) is Literal:
        return "|".join(map(str, get_args(option)))
    if get_origin(option) is tuple:
        shown = ",".join("…" if item is Ellipsis else _metavar_of(item) for item in get_args(option))
        return f"{shown}|none" if Ellipsis in get_args(option) else shown
    return {int: "N", float: "X", str: "TEXT", bool: "true|false"}[option]


class _Unfit(argparse.ArgumentTypeError):
    """A word that is not a value of the flag, with the error to raise."""

    def __init__(self, error: ConfigError | UsageError) -> None:
        super().__init__(str(error))
        self.error = error


def _reader(flag: Flag) -> Callable[[str], Any]:
    """A function that converts a word to the flag's type."""
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
    """`text` as a value of one type. Raises `ValueError` if it is not one."""
    if get_origin(option) is Literal:
        return get_args(option)[[str(value) for value in get_args(option)].index(text)]
    if get_origin(option) is tuple:
        if Ellipsis in get_args(option) and text.lower() == "none":
            return []
        return [_value(item, get_args(option)[0]) for item in re.split(r"[,\s]+", text.strip())]
    return ("false", "true").index(text.lower()) == 1 if option is bool else option(text)


def _allowed(option: Any) -> str:
    if get_origin(option) is Literal:
        return f"one of {', '.join(map(str, get_args(option)))}"
    if get_origin(option) is tuple:
        example = ",".join(_EXAMPLES[item] for item in get_args(option) if item is not Ellipsis)
        return f"like {example}{', or none' if Ellipsis in get_args(option) else ''}"
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


@cache
def field_docs(cls: type) -> Mapping[str, str]:
    """Each field's help from the docstrings of a config and its bases.

    Reads `name: text` (or `name, name: text`) at the start of a line or sentence or after two spaces.
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
    return MappingProxyType(docs)
