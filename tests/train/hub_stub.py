"""A Hugging Face Hub on loopback: what the real client asks of it to push a commit and to fetch one."""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.loopback import Loopback, answering

CANARY = "hf_" + "canary" + 28 * "7"  # a token


@dataclass
class Hub:
    """Repositories by name, each a list of commits, each a dictionary of files.

    status: what every request to its API is answered with instead; 0: nothing is answered, for a minute.
    answered_late: whether a minute has passed for one of those.
    private: as repositories were asked to be.
    """

    url: str = ""
    status: int | None = None
    answered_late: bool = False
    repos: dict[str, list[dict[str, bytes]]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    uploads: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    seen: list[str] = field(default_factory=list)

    @staticmethod
    def commit_id(number: int) -> str:
        return hashlib.sha1(str(number).encode()).hexdigest()

    def files(self, repo: str, revision: str = "main") -> tuple[str, dict[str, bytes]] | None:
        """(commit, files) of a revision."""
        commits = self.repos[repo]
        if revision == "main":
            return self.commit_id(len(commits) - 1), commits[-1]
        found = [number for number in range(len(commits)) if self.commit_id(number) == revision]
        return (revision, commits[found[0]]) if found else None

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> str:
        """Apply a commit's operations."""
        files = dict(self.repos[repo][-1])
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise AssertionError(line["key"])
        self.repos[repo].append(files)
        return self.commit_id(len(self.repos[repo]) - 1)


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """`hub` answers at `hub.url` until the block ends."""
    with answering(type("Bound", (_Handler,), {"hub": hub})) as server:
        hub.url = server.url
        yield hub


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub
    server: Loopback

    def handle_any(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path).strip("/")
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        hub.seen.append(f"{self.command} /{path}")
        hub.tokens.add(self.headers.get("authorization", "").removeprefix("Bearer "))
        if hub.status == 0:
            hub.answered_late = self.server.hang()
            self.close_connection = True
            return
        if path == "":
            self.answer(200, {})
        elif hub.status:
            self.answer(hub.status, {"error": "the hub is unwell"})
        elif path == "api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            new = repo not in hub.repos
            if new:
                hub.repos[repo], hub.private[repo] = [{".gitattributes": b""}], asked.get("visibility") == "private"
            self.answer(200 if new else 409, {"url": f"{hub.url}/{repo}"})
        elif path == "api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif path.startswith("upload/"):
            name = path.removeprefix("upload/")
            assert hashlib.sha256(body).hexdigest() == name
            hub.objects[name] = body
            hub.uploads.append(name)
            self.answer(200, {})
        else:
            self.of_repo(path, body)

    def of_repo(self, path: str, body: bytes) -> None:
        hub = self.hub
        repo = next((name for name in hub.repos if f"{name}/" in f"{path}/" or f"{name}.git/" in path), None)
        if repo is None:
            self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return
        action, _, rest = path.partition(repo)[2].strip("/").partition("/")
        if action == "preupload":
            found = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self.answer(200, {"files": found})
        elif action == ".git":
            self.answer(200, {"transfer": "basic", "objects": [self.object(o) for o in json.loads(body)["objects"]]})
        elif action == "commit":
            commit = hub.commit(repo, [json.loads(line) for line in body.splitlines()])
            self.answer(200, {"commitOid": commit, "commitUrl": f"{hub.url}/{repo}/commit/{commit}", "hookOutput": ""})
        elif action in ("", "revision"):
            at = hub.files(repo, rest or "main")
            if at is None:
                self.answer(404, {"error": "no such revision"}, {"X-Error-Code": "RevisionNotFound"})
            else:
                siblings = [{"rfilename": name} for name in at[1]]
                self.answer(200, {"_id": "0", "id": repo, "sha": at[0], "siblings": siblings})
        elif action == "resolve":
            commit, _, name = rest.partition("/")
            self.file(commit, (hub.files(repo, commit) or ("", {}))[1].get(name))
        else:
            raise AssertionError(path)

    def object(self, asked: dict[str, Any]) -> dict[str, Any]:
        known = asked["oid"] in self.hub.objects
        upload = {"upload": {"href": f"{self.hub.url}/upload/{asked['oid']}"}}
        return asked if known else asked | {"actions": upload}

    def file(self, commit: str, data: bytes | None) -> None:
        if data is None:
            self.answer(404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        self.answer(200, data, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'})

    def answer(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def log_message(self, *_: object) -> None:
        """Say nothing."""
