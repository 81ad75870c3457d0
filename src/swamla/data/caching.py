"""What the cache of prepared data holds, and the runs that were trained from it.

CACHE/data/NAME            a prepared dataset; CACHE/data/.stream-… are the units of a stream,
                           CACHE/data/.units-… those of a preparation that is not finished
CACHE/tokenizers/….json    the tokenizer of a mixture
CACHE/sources/…            downloaded text
CACHE/runs/….json          the folder of a run that was trained from this cache
"""

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from swamla.data.dataset import META
from swamla.data.shards import HELD_OUT_TEXT
from swamla.errors import SwamlaError
from swamla.files import read_json, write_text_atomically

_STREAM, _UNITS, _SAMPLE = ".stream-", ".units-", "-sample"


@dataclass(frozen=True, kw_only=True)
class Cached:
    """An entry of the cache. paths: all that belongs to it.  what: for people.  used: when it was last opened.

    fingerprint: of a prepared dataset, "" for anything else.  unfinished: a preparation that can be continued.
    """

    name: str
    paths: tuple[Path, ...]
    what: str
    used: float
    fingerprint: str = ""
    unfinished: bool = False


def mark_used(folder: Path) -> None:
    """Note that a prepared dataset is used now, in the time of its meta.json; a cache may be read-only."""
    with suppress(OSError):
        os.utime(folder / META)


def remember_run(cache: Path, run_dir: Path) -> None:
    """Note in the cache that a run was trained from it, so that its data is known to be needed."""
    folder = str(run_dir.resolve())
    file = cache / "runs" / f"{hashlib.sha256(folder.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}.json"
    with suppress(OSError):  # a cache may be read-only
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(file, json.dumps({"run": folder}) + "\n")


def remembered_runs(cache: Path) -> list[Path]:
    """The folders of the runs that were trained from the cache and exist; forgets the others."""
    found = []
    for file in sorted((cache / "runs").glob("*.json")):
        with suppress(SwamlaError, OSError):
            folder = Path(str(read_json(file, inside=cache).get("run", "")))
            if (folder / "config.json").is_file():
                found.append(folder)
            else:
                file.unlink()
    return found


def entries(cache: Path) -> list[Cached]:
    """What the cache holds, most recently used first."""
    data = cache / "data"
    found = [_dataset(folder.parent) for folder in data.glob(f"[!.]*/{META}")]
    found += [
        Cached(name=path.name, paths=(path,), what="an unfinished preparation", used=_newest(path), unfinished=True)
        for path in data.glob(f"{_UNITS}*")
    ]
    for folder, what in (("tokenizers", "the tokenizer of a mixture"), ("sources", "downloaded text")):
        for file in (cache / folder).glob("[!.]*"):
            found.append(Cached(name=file.name, paths=(file,), what=what, used=_newest(file)))
    return sorted(found, key=lambda one: (-one.used, one.name))


def held_out_hash(cache: Path, fingerprint: str) -> str | None:
    """The SHA-256 of the held-out text of the prepared data with this fingerprint; None if the cache has none."""
    for meta in (cache / "data").glob(f"[!.]*/{META}"):
        with suppress(SwamlaError, OSError, KeyError, TypeError):
            plain = read_json(meta, inside=meta.parent)
            if plain["fingerprint"] == fingerprint:
                return str(plain["files"][HELD_OUT_TEXT]["sha256"])
    return None


def _dataset(folder: Path) -> Cached:
    """A prepared dataset, with the units of its stream. What it is of is unknown if its meta.json is damaged."""
    stream = folder.with_name(f"{_STREAM}{folder.name.removesuffix(_SAMPLE)}")
    paths = (folder, stream) if folder.name.endswith(_SAMPLE) and stream.is_dir() else (folder,)
    try:
        meta = read_json(folder / META, inside=folder)
        what = f"{short_source(meta['source'])}, {short_source(meta['tokenizer']['spec'])}"
        fingerprint = str(meta["fingerprint"])
    except (SwamlaError, OSError, KeyError, TypeError):
        what, fingerprint = "damaged", ""
    return Cached(
        name=folder.name, paths=paths, what=what, used=(folder / META).stat().st_mtime, fingerprint=fingerprint
    )


def short_source(source: str) -> str:
    """The name of a source or a tokenizer for a table: of a path its last part, of a run's tokenizer the run too."""
    path = Path(source.removeprefix("files:"))
    if not path.is_absolute():
        return source
    return "/".join(path.parts[-2:]) if path.name == "tokenizer.json" else path.name


def _newest(path: Path) -> float:
    """The latest time of a file, or of what a folder holds."""
    return max(one.lstat().st_mtime for one in (path, *path.glob("*")))
