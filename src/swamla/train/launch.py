"""Which launch of torchrun trains in a folder, so that restarted processes resume their own run and no other."""

import json
import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from swamla import distributed
from swamla.errors import CorruptError
from swamla.files import read_json, write_text_atomically

FILE = "launch.json"


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What launch.json says.

    names: of torchrun on each machine. stopped: the run was asked to stop, and is saved.
    """

    names: tuple[str, ...]
    stopped: bool = False

    def write(self, run_dir: Path) -> None:
        """Make the folder this launch's; without torchrun it is nobody's."""
        if self.names:
            write_text_atomically(run_dir / FILE, json.dumps({"names": self.names, "stopped": self.stopped}) + "\n")
        else:
            (run_dir / FILE).unlink(missing_ok=True)


def this_launch() -> tuple[str, ...]:
    """The name of this launch on each of its machines; to be called by every rank."""
    return tuple(sorted(set(filter(None, distributed.gathered(_name())))))


def begun_by(names: Iterable[str], folders: Iterable[Path]) -> tuple[Path, Launch] | None:
    """The first of `folders` that holds a run of the launch with any of these names."""
    wanted = set(names)
    for folder in folders:
        launch = _read(folder)
        if launch is not None and wanted.intersection(launch.names) and (folder / "config.json").is_file():
            return folder, launch
    return None


def _name() -> str:
    """Of the folder that torchrun makes for itself and keeps as often as it starts its processes; "" without one.

    It is RUN-ID_RANDOM; below it there are a folder for each start and, in there, one for each process.
    """
    report = os.environ.get("TORCHELASTIC_ERROR_FILE", "")
    return f"{platform.node()}:{Path(report).parents[2]}" if len(Path(report).parents) > 2 else ""


def _read(folder: Path) -> Launch | None:
    try:
        plain = read_json(folder / FILE, inside=folder) if (folder / FILE).is_file() else {}
    except CorruptError:  # whoever's run it is, it is not known to be ours
        return None
    names = plain.get("names")
    if not isinstance(names, list):
        return None
    return Launch(names=tuple(map(str, names)), stopped=plain.get("stopped") is True)
