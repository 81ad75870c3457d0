"""The one text that is fetched from the internet, for those who ask for it."""

import hashlib
import os
import urllib.request
from pathlib import Path

from swamla.errors import DataError

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
_TIMEOUT_SECONDS = 20


def shakespeare(cache_dir: Path, url: str = SHAKESPEARE_URL) -> Path:
    """The path of tiny Shakespeare (1.1 MB), downloaded into the cache at its first use. DataError if that fails."""
    path = cache_dir / "sources" / "shakespeare.txt"
    if path.exists():
        return path
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response:
            data = response.read()
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot download tiny Shakespeare from {url} ({error}); fetch that file elsewhere and pass --source FILE"
        ) from error
    if hashlib.sha256(data).hexdigest() != SHAKESPEARE_SHA256:
        raise DataError(f"{url}: {len(data)} bytes came that are not tiny Shakespeare; pass the text by --source FILE")
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_suffix(f".{os.getpid()}")
    staged.write_bytes(data)
    staged.replace(path)
    return path
