"""The one text that is fetched from the internet, for those who ask for it."""

import hashlib
import os
import urllib.request
from http.client import HTTPException
from pathlib import Path

from swamla.errors import DataError

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
_TIMEOUT_SECONDS = 20
_BY_HAND = (
    "fetch that file elsewhere, then once: swamla prepare shakespeare-char --source FILE (or each time: --data FILE)"
)


def shakespeare(cache_dir: Path, url: str = SHAKESPEARE_URL) -> Path:
    """The path of tiny Shakespeare (1.1 MB), downloaded into the cache at its first use. DataError if that fails."""
    path = _place(cache_dir)
    if path.exists():
        return path
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response:
            data = response.read()
    except (OSError, ValueError, HTTPException) as error:
        raise DataError(f"cannot download tiny Shakespeare from {url} ({error}); {_BY_HAND}") from error
    if not _is_shakespeare(data):
        raise DataError(f"{url}: {len(data)} bytes came that are not tiny Shakespeare; {_BY_HAND}")
    _keep(data, path)
    return path


def keep_shakespeare(cache_dir: Path, file: Path) -> bool:
    """Put a copy of tiny Shakespeare where `shakespeare` finds it; False, and nothing done, for any other file."""
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
