"""`swamla cache`: list the prepared data that runs were trained from, and remove some."""

import json
import textwrap
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from swamla.cli.asking import confirmed, remove, size_of
from swamla.cli.console import Console, say
from swamla.cli.flags import argument, parse
from swamla.cli.info_tables import short
from swamla.cli.running import checked
from swamla.cli.runs import age
from swamla.config import did_you_mean
from swamla.data.caching import Cached, entries, remembered_runs
from swamla.data.config import DataConfig, default_cache_dir
from swamla.data.sources import is_path, open_source
from swamla.errors import SwamlaError, UsageError
from swamla.train.changes import config_of
from swamla.train.claims import is_running
from swamla.train.run_folder import identity_of_run

HELP = """usage: swamla cache list
       swamla cache rm NAME …

list      what the cache of prepared data holds:
          size, last use, the runs that need it
rm        remove some of it, after asking; data that
          a run needs only with --force

Each takes --cache_dir and --help."""
_AT_WORK = 600  # seconds after its last write in which an unfinished preparation may still be at work


@dataclass(frozen=True, kw_only=True)
class List:
    """What the cache of prepared data holds, most recently used first.

    A run needs its prepared data to be resumed and evaluated, also after the raw files are gone. Known are the runs
    that were trained from this cache, and those in the folder runs.

    cache_dir: the cache; by default $SWAMLA_CACHE, else ~/.cache/swamla.
    json: print a JSON list.
    """

    cache_dir: str = argument("", metavar="FOLDER")
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class Remove:
    """Remove entries of the cache of prepared data, after asking.

    names: as `swamla cache list` shows them.
    cache_dir: the cache; by default $SWAMLA_CACHE, else ~/.cache/swamla.
    yes: do not ask.
    force: also what a run needs.
    """

    names: tuple[str, ...] = argument(annotation=str, positional=True, repeated=True)
    cache_dir: str = argument("", metavar="FOLDER")
    yes: bool = argument(False, switch=True)
    force: bool = argument(False, switch=True)


def main(argv: list[str]) -> int:
    """Run the action that the first word names."""
    actions = {"list": _list, "rm": _remove}
    action = argv[0] if argv else "--help"
    if action in ("-h", "--help"):
        print(HELP)
        return 0
    if action not in actions:
        raise UsageError(f"swamla cache {action}: {did_you_mean(action, list(actions))}")
    return actions[action](argv[1:])


def _list(argv: list[str]) -> int:
    arguments, _ = parse(List, argv, command="swamla cache list")
    cache, console = _cache(arguments.cache_dir), Console()
    found, needs = entries(cache), _needs(cache)
    if arguments.json:
        print(json.dumps([_plain(one, needs.get(one.fingerprint, [])) for one in found]))
        return 0
    if not found:
        say(console, f"nothing in {cache}")
        return 0
    for one in found:
        say(console, _described(one, needs.get(one.fingerprint, []), time.time(), console.width))
    say(console, f"{short(sum(map(_size, found)), 'B')} in {cache}")
    return 0


def _remove(argv: list[str]) -> int:
    """Remove the named entries, all or, if one of them cannot be, none."""
    arguments, _ = parse(Remove, argv, command="swamla cache rm")
    if not arguments.names:
        raise UsageError("NAMES is missing: swamla cache rm NAME … removes entries; swamla cache list lists them")
    cache, console = _cache(arguments.cache_dir), Console()
    known, needs = {one.name: one for one in entries(cache)}, _needs(cache)
    chosen: list[Cached] = []
    lost: list[str] = []
    for name in dict.fromkeys(arguments.names):
        if name not in known:
            advice = did_you_mean(name, list(known)) if known else f"nothing is in {cache}"
            raise UsageError(f"{name}: not in the cache; {advice}")
        chosen.append(known[name])
        lost += _loss(known[name], needs.get(known[name].fingerprint, []), force=arguments.force)
    for line in lost:
        say(console, line)
    told = [f"{one.name} ({short(_size(one), 'B')})" for one in chosen]
    if not confirmed(f"Remove {', '.join(told)}?", yes=arguments.yes):
        say(console, "nothing was removed")
        return 0
    for one, what in zip(chosen, told, strict=True):
        for path in one.paths:
            remove(path)
        say(console, f"removed {what}")
    return 0


def _loss(one: Cached, runs: list[Path], *, force: bool) -> list[str]:
    """What is lost with an entry, a line each. Raises `UsageError` if that needs `force`, or a run is being trained."""
    for path in one.paths:
        if path.is_symlink():
            raise UsageError(
                f"{path}: is a link to {path.resolve()}, which cache rm does not follow; remove it yourself"
            )
    if busy := [run for run in runs if is_running(run)]:
        raise UsageError(f"{one.name}: {_names(busy)} is being trained from it: wait for it, or stop it first")
    if one.unfinished and not force and time.time() - one.used < _AT_WORK:
        raise UsageError(f"{one.name}: a preparation wrote to it less than ten minutes ago; --force removes it")
    lost = [_loss_of(run, one) for run in runs]
    if lost and not force:
        raise UsageError(f"{one.name}: needed by {_names(runs)}: {lost[0]}; --force removes it")
    return lost


def _loss_of(run: Path, one: Cached) -> str:
    """What becomes of a run without this entry: its data is prepared again, if its raw files are as they were."""
    name = _names([run])
    try:
        known, config = identity_of_run(run), config_of(run).data
        pairs = zip(config.sources, known or [], strict=True)
        config, identity = next((c, each) for c, each in pairs if each["fingerprint"] == one.fingerprint)
    except (SwamlaError, OSError, ValueError, StopIteration):
        return f"without it {name} may not be resumed or evaluated"
    if is_path(config.source) and not _is_as_it_was(config, identity["raw"]):
        return (
            f"without it {name} can never be resumed or evaluated on its held-out text again, because {config.source} "
            "is gone or was changed"
        )
    return f"without it {name} has to prepare {config.source} again to be resumed or evaluated"


def _is_as_it_was(config: DataConfig, raw: str) -> bool:
    """Whether the raw files are those that the data was prepared from."""
    try:
        return open_source(config, config.cache).digest() == raw
    except (SwamlaError, OSError):
        return False


def _needs(cache: Path) -> dict[str, list[Path]]:
    """Fingerprint → the runs that need the data: of those trained from this cache, and those in runs/."""
    here = [path for path in sorted(Path("runs").glob("*")) if (path / "config.json").is_file()]
    runs = {path.resolve(): path for path in [*remembered_runs(cache), *here]}
    needs: dict[str, list[Path]] = {}
    for run in runs.values():
        try:
            identity = identity_of_run(run) or []
        except (SwamlaError, OSError):  # a damaged run cannot be resumed anyway
            continue
        for each in identity:
            needs.setdefault(each["fingerprint"], []).append(run)
    return needs


def _cache(cache_dir: str) -> Path:
    return checked(cache_dir).expanduser() if cache_dir else default_cache_dir()


def _size(one: Cached) -> int:
    return sum(map(size_of, one.paths))


def _names(runs: Iterable[Path]) -> str:
    """Runs as a user would name them: relative to this folder where they are in it."""
    here = Path.cwd()
    return ", ".join(str(run.relative_to(here) if run.is_relative_to(here) else run) for run in runs)


def _plain(one: Cached, runs: list[Path]) -> dict[str, object]:
    used = datetime.fromtimestamp(one.used).astimezone().isoformat()
    paths = [str(path) for path in one.paths]
    needed_by = [str(run.resolve()) for run in runs]
    return {"name": one.name, "paths": paths, "what": one.what, "bytes": _size(one), "used": used, "runs": needed_by}


def _described(one: Cached, runs: list[Path], now: float, width: int) -> str:
    """An entry, its name on a line of its own, so that it is whole on a narrow terminal too."""
    used = age(now, one.used)
    what = f"{one.what}; {short(_size(one), 'B')}, used {used if used == 'now' else f'{used} ago'}"
    if one.fingerprint:
        what += f"; needed by {_names(runs)}" if runs else "; needed by no run that is known"
    indented = textwrap.fill(what, width, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    return f"{one.name}\n{indented}"
