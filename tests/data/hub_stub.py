"""A hub on the loopback device: the requests of the real client for one dataset, answered from memory."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.loopback import answering

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """A dataset.  card: of its README.  fail: statuses that the next downloads are answered with.  seen: requests."""

    repo: str
    files: dict[str, bytes]
    card: dict[str, Any] = field(default_factory=dict)
    commit: str = COMMIT
    fail: list[int] = field(default_factory=list)
    seen: list[tuple[str, str]] = field(default_factory=list)
    url: str = ""

    def info(self) -> dict[str, Any]:
        return {"_id": "0", "id": self.repo, "sha": self.commit, "siblings": [], "cardData": self.card}

    def tree(self, folder: str) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for path, data in self.files.items()
            if not folder or path.startswith(f"{folder}/")
        ]


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """`hub` answers at `hub.url` until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.seen.append((path, self.headers.get("Range", "")))
            api, download = f"/api/datasets/{hub.repo}", f"/datasets/{hub.repo}/resolve/{hub.commit}/"
            if path in (api, f"{api}/revision/main", f"{api}/revision/{hub.commit}"):
                self.answer(200, json.dumps(hub.info()).encode())
            elif path.startswith(f"{api}/tree/{hub.commit}"):
                self.answer(
                    200, json.dumps(hub.tree(path.removeprefix(f"{api}/tree/{hub.commit}").strip("/"))).encode()
                )
            elif path.startswith(download) and path.removeprefix(download) in hub.files:
                self.download(hub.files[path.removeprefix(download)])
            else:
                self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        def download(self, data: bytes) -> None:
            if hub.fail:
                self.answer(hub.fail.pop(0), b"the hub is unwell")
                return
            first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            etag = f'"{hashlib.sha256(data).hexdigest()}"'
            headers = {"Content-Range": f"bytes {first}-{last}/{len(data)}", "ETag": etag}
            self.answer(206, data[first : last + 1], headers)

        def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with answering(Handler) as server:
        hub.url = server.url
        yield hub
