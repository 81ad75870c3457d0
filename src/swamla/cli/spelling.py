"""Messages in the command line's terms: `n_heads = 3` of a library's message is `--swa_n_heads 3` here.

Messages name settings as Python and recipes do: `name = value`, or a name alone in backquotes. What an error says is
allowed may also name a setting by its bare name, if that has an underscore.
"""

import re
import shlex
from collections.abc import Mapping

from swamla.cli.flags import Flag, parsed
from swamla.errors import ConfigError

_VALUE = r"\"[^\"]*\"|'[^']*'|[^\s,;:`()]*[^\s,;:.`()]"
_PLACE = r"\((?:--[^()]+|[^()]+\.(?:toml|json)(?::\d+)?)\)"
# In the text of an error that has another's, `lr = -1 (--lr)` says already where it was given, a file's line too.
_GIVEN = re.compile(rf"(?<![\w./-])`?((?:[a-z_*]+\.)*[a-z][a-z0-9_]*) = ((?>{_VALUE}))(?! {_PLACE})`?")
_QUOTED = re.compile(r"`((?:[a-z_*]+\.)*[a-z][a-z0-9_]*)`")
_BARE = re.compile(r"(?<![\w./`=-])((?:[a-z_*]+\.)*[a-z]+(?:_[a-z0-9]+)+)(?![\w(/.])")
_MOST = 3  # flags that are named where several have a setting of that name


def error_as_typed(error: ConfigError) -> str:
    """A refused setting, with flags; in a recipe it keeps the name that it has there."""
    allowed = as_typed(error.allowed, kind=error.kind, bare=True)
    flag = flag_of(error.field, error.kind)
    if error.origin or not flag:
        where = f" ({error.origin})" if error.origin else ""
        return f"{error.field} = {error.got!r}{where}: {allowed}"
    return f"{_with_value(flag, str(error.got))}: {allowed}"


def as_typed(text: str, *, kind: str = "", bare: bool = False) -> str:
    """`text` with flags of the current command for the settings that it names; what has no flag stays as it is.

    kind: of the mixer, FFN, norm or optimizer whose settings are named without it.  bare: names without quotes too.
    """

    def given(found: re.Match[str]) -> str:
        flag = flag_of(found[1], kind)
        return _with_value(flag, found[2].strip("\"'")) if flag else found[0]

    def named(found: re.Match[str]) -> str:
        return flag_of(found[1], kind) or found[0]

    text = _QUOTED.sub(named, _GIVEN.sub(given, text))
    return _BARE.sub(named, text) if bare else text


def flag_of(name: str, kind: str = "", table: Mapping[str, Flag] | None = None) -> str:
    """The flag of a setting, "" if the command has none: "--n_heads", or "--mha_moments or --swa_moments".

    Of several, those on the command line are meant if there are any.
    """
    table, given = (parsed()[0] if table is None else table), parsed()[1]
    last = name.rpartition(".")[2]
    if f"{kind}_{last}" in table:
        return f"--{kind}_{last}"
    flags = [flag.name for flag in table.values() if flag.field == name] or [last][: last in table]
    flags = flags or [flag.name for flag in table.values() if flag.field.rpartition(".")[2] == last]
    words = [flag.upper() if table[flag].positional else f"--{flag}" for flag in flags]
    meant = [word for word, flag in zip(words, flags, strict=True) if flag in given]
    words = meant or (words[:1] if words and table[flags[0]].positional else words)
    return " or ".join(words[:_MOST]) + " …" * (len(words) > _MOST)


def _with_value(flag: str, value: str) -> str:
    if value in ("True", "False"):
        return flag if value == "True" else flag.replace("--", "--no_", 1)
    return f"{flag} {'none' if value == 'None' else shlex.quote(value)}"
