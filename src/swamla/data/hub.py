"""Downloads: datasets of the Hugging Face hub, and tiny Shakespeare.

Files of a dataset are read by HTTP range requests, and not stored on disk. A revision is resolved once to a commit, so
that the text cannot change during a run. Access tokens are left to huggingface_hub, which finds them in the
environment.
"""

import hashlib
import io
import json
import os
import re
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal, cast

from swamla.data.config import DataConfig
from swamla.errors import ConfigError, CorruptError, DataError, HubDataError, MissingBackendError
from swamla.files import read_json, write_text_atomically

PREFIX = "hf:"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_READABLE = re.compile(r"\.(parquet|jsonl|ndjson|json|csv|tsv|txt)(\.gz|\.zst|\.xz|\.bz2)?$", re.IGNORECASE)
_QUERY = re.compile(r"\?\S*")  # the address of a redirected download has a signature
_BLOCK = 1 << 22

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
_TIMEOUT_SECONDS = 20
_BY_HAND = (
    "download that file elsewhere, then once: swamla prepare shakespeare-char --source FILE (or each time: --data FILE)"
)


@dataclass(frozen=True)
class HubFile:
    """A file of a dataset at a commit, with the interface of `reading.File`."""

    repo: str
    commit: str
    path: str
    size: int

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    @property
    def stem(self) -> str:
        return PurePosixPath(self.path).stem

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.path).suffix

    def __str__(self) -> str:
        return f"{PREFIX}{self.repo}@{self.commit[:12]}/{self.path}"

    def open(self, mode: Literal["rb"]) -> BinaryIO:
        """A seekable stream of its bytes, downloaded as they are read."""
        return io.BufferedReader(_Ranges(self), _BLOCK)


class _Ranges(io.RawIOBase):
    """A raw stream in which every read is a range request; huggingface_hub retries failed requests."""

    def __init__(self, file: HubFile) -> None:
        library = _library()
        self._file, self._at = file, 0
        self._url = library.hf_hub_url(file.repo, file.path, repo_type="dataset", revision=file.commit)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size}[whence]
        return self._at

    def readinto(self, target: Any) -> int:
        count = min(len(target), self._file.size - self._at)
        if count <= 0:
            return 0
        data = self._fetch(self._at, count)
        target[:count] = data
        self._at += count
        return count

    def _fetch(self, start: int, count: int) -> bytes:
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

        headers = {**build_hf_headers(), "Range": f"bytes={start}-{start + count - 1}"}
        try:
            response = http_backoff("GET", self._url, headers=headers, timeout=60)
            hf_raise_for_status(response)
        except Exception as error:  # the classes depend on the library's version
            raise OSError(reason(error)) from None
        data = response.content[start : start + count] if response.status_code == 200 else response.content
        if len(data) != count:
            raise OSError(f"requested bytes {start} to {start + count - 1}, received {len(data)} bytes")
        return data


@dataclass(frozen=True)
class HubListing:
    """The files of one split of a dataset. files: path, size and content hash of each."""

    repo: str
    commit: str
    files: tuple[tuple[str, int, str], ...]


def is_commit(revision: str) -> bool:
    """Whether a revision is a commit hash, which cannot change, unlike a branch or tag."""
    return bool(_COMMIT.fullmatch(revision))


def list_dataset(config: DataConfig, cache_dir: Path) -> HubListing:
    """The files that `config` asks for, in the order of their names. The listing of a commit is cached.

    Raises HubDataError if the dataset is missing or the hub unreachable, and ConfigError, listing the choices, for an
    unknown config or split.
    """
    repo = config.source.removeprefix(PREFIX)
    key = json.dumps([repo, config.hub_config, config.hub_split, config.hub_revision])
    kept = cache_dir / "sources" / f"hub-{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
    if is_commit(config.hub_revision) and kept.exists():
        data = read_json(kept, inside=kept.parent)
        try:
            return HubListing(data["repo"], data["commit"], tuple(tuple(file) for file in data["files"]))
        except (KeyError, TypeError) as error:
            raise CorruptError(f"{kept}: damaged ({error!r}); delete it to ask the hub again") from error
    listing = _ask(config, repo)
    if is_commit(config.hub_revision):
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(kept, json.dumps(listing.__dict__))
    return listing


def _ask(config: DataConfig, repo: str) -> HubListing:
    api = _library().HfApi()
    try:
        info = api.dataset_info(repo, revision=config.hub_revision or None)
        card = info.card_data.to_dict() if info.card_data else {}
        patterns = _patterns(config, card.get("configs") or [])
        folder = _folder_of(patterns)
        tree = api.list_repo_tree(repo, folder, recursive=True, revision=info.sha, repo_type="dataset")
        found = [item for item in tree if hasattr(item, "size") and _READABLE.search(item.path)]
    except ConfigError:
        raise
    except Exception as error:  # the classes depend on the library's version
        at = f" at revision {config.hub_revision!r}" if config.hub_revision else ""
        raise HubDataError(f"cannot list the dataset {repo!r}{at} on the hub ({reason(error)})") from None
    chosen = _chosen(config.hub_split, patterns, [item.path for item in found], by_card=bool(card.get("configs")))
    files = sorted(
        (item.path, item.size, item.lfs.sha256 if item.lfs else item.blob_id) for item in found if item.path in chosen
    )
    if not files:
        raise DataError(
            f"{config.source}: no parquet, jsonl or text file of split {config.hub_split!r}"
            + (f" under {', '.join(patterns)}" if patterns else "")
        )
    return HubListing(repo, info.sha, tuple(files))


def _patterns(config: DataConfig, configs: list[dict[str, Any]]) -> list[str]:
    """Glob patterns of the split's files, from the dataset's card; empty if it has none."""
    names = [each["config_name"] for each in configs]
    if not configs:
        return [f"{config.hub_config}/**", f"**/{config.hub_config}/**"] if config.hub_config else []
    default = [each["config_name"] for each in configs if each.get("default") or len(configs) == 1]
    name = config.hub_config or next(iter(default), "default")
    if name not in names:
        raise ConfigError("data.hub_config", config.hub_config, f"must be one of {_some(names)}")
    entry = configs[names.index(name)]
    files = entry.get("data_files", f"{entry['data_dir']}/**" if "data_dir" in entry else "**")
    by_split: dict[str, list[str]] = {}
    for each in files if isinstance(files, list) else [files]:
        split, paths = (each["split"], each["path"]) if isinstance(each, dict) else ("train", each)
        by_split.setdefault(split, []).extend(paths if isinstance(paths, list) else [paths])
    if config.hub_split not in by_split:
        raise ConfigError("data.hub_split", config.hub_split, f"must be one of {_some(list(by_split))}")
    return by_split[config.hub_split]


def _chosen(split: str, patterns: list[str], paths: list[str], *, by_card: bool) -> set[str]:
    """Paths that match a pattern. Without a card, only those with the split's name in the path, if any."""
    matching = {path for path in paths if not patterns or any(_glob(pattern).fullmatch(path) for pattern in patterns)}
    named = re.compile(rf"(^|[/_.-]){re.escape(split)}([/_.-]|$)")
    of_split = {path for path in matching if named.search(path)}
    return matching if by_card or (split == "train" and not of_split) else of_split


def _glob(pattern: str) -> re.Pattern[str]:
    parts = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    pieces = re.split(r"(\*\*/|\*\*|\*|\?)", pattern)
    return re.compile("".join(parts.get(piece, re.escape(piece)) for piece in pieces))


def _folder_of(patterns: Iterable[str]) -> str | None:
    """The folder that contains all possible matches; None for the whole repository."""
    folders = {re.split(r"[*?]", pattern)[0].rpartition("/")[0] for pattern in patterns}
    return (folders.pop() or None) if len(folders) == 1 else None


def _some(names: list[str]) -> str:
    return ", ".join(names[:20]) + (f" … ({len(names)} in all)" if len(names) > 20 else "")


def reason(error: Exception) -> str:
    """The first line of a library's error, without the query strings of addresses, which may be secret."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return _QUERY.sub("", line)


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingBackendError("data on the hub needs its library: pip install 'swamla[hub]'") from error
    return cast(Any, huggingface_hub)


def shakespeare(cache_dir: Path, url: str = SHAKESPEARE_URL) -> Path:
    """The path of tiny Shakespeare (1.1 MB), downloaded to the cache at first use. DataError if that fails."""
    path = _place(cache_dir)
    if path.exists():
        return path
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response:
            data = response.read()
    except (OSError, ValueError, HTTPException) as error:
        raise DataError(f"cannot download tiny Shakespeare from {url} ({error}); {_BY_HAND}") from error
    if not _is_shakespeare(data):
        raise DataError(f"{url}: the {len(data)} bytes received are not tiny Shakespeare; {_BY_HAND}")
    _keep(data, path)
    return path


def has_shakespeare(cache_dir: Path) -> bool:
    """Whether `shakespeare` needs no download."""
    return _place(cache_dir).exists()


def keep_shakespeare(cache_dir: Path, file: Path) -> bool:
    """Copy tiny Shakespeare to where `shakespeare` finds it; returns False, and does nothing, for any other file."""
    data = file.read_bytes() if file.is_file() else b""
    known = _is_shakespeare(data)
    if known:
        _keep(data, _place(cache_dir))
    return known


def _is_shakespeare(data: bytes) -> bool:
    return hashlib.sha256(data).hexdigest() == SHAKESPEARE_SHA256


def _place(cache_dir: Path) -> Path:
    return cache_dir / "sources" / "shakespeare.txt"


def _keep(data: bytes, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_suffix(f".{os.getpid()}")
    staged.write_bytes(data)
    staged.replace(path)
