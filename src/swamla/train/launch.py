"""Which launch of torchrun trains in a folder, so that restarted processes resume their own run."""

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
    """The content of launch.json.

    names: of this launch, one per machine.  stopped: the run was asked to stop, and has saved.
    """

    names: tuple[str, ...]
    stopped: bool = False

    def write(self, run_dir: Path) -> None:
        """Record the launch in the folder; without torchrun, remove the record."""
        if self.names:
            write_text_atomically(run_dir / FILE, json.dumps({"names": self.names, "stopped": self.stopped}) + "\n")
        else:
            (run_dir / FILE).unlink(missing_ok=True)


def this_launch() -> tuple[str, ...]:
    """The name of this launch on each of its machines. Every rank must call this."""
    return tuple(sorted(set(filter(None, distributed.gathered(_name())))))


def begun_by(names: Iterable[str], folders: Iterable[Path]) -> tuple[Path, Launch] | None:
    """The first of `folders` with a run that a launch of any of these names started, and its record."""
    wanted = set(names)
    for folder in folders:
        launch = _read(folder)
        if launch is not None and wanted.intersection(launch.names) and (folder / "config.json").is_file():
            return folder, launch
    return None


def _name() -> str:
    """A name for this launch on this machine: torchrun's log folder, which outlasts restarts; "" without torchrun.

    The folder is RUN-ID_RANDOM; in it are a folder for each start, and in that one for each process.
    """
    report = os.environ.get("TORCHELASTIC_ERROR_FILE", "")
    return f"{platform.node()}:{Path(report).parents[2]}" if len(Path(report).parents) > 2 else ""


def _read(folder: Path) -> Launch | None:
    try:
        plain = read_json(folder / FILE, inside=folder) if (folder / FILE).is_file() else {}
    except CorruptError:  # then it is not known to be this launch's
        return None
    names = plain.get("names")
    if not isinstance(names, list):
        return None
    return Launch(names=tuple(map(str, names)), stopped=plain.get("stopped") is True)
