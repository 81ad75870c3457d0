"""Requests that no honest client sends, drawn from a seed: broken JSON, wrong types, huge and slow bodies, vanishing.

    python -m tests.serve.hostile runs/quickstart --requests 10000    # a server of its own; memory before and after
    python -m tests.serve.hostile                                     # of a tiny model, made here

First come a few large honest requests, so that what grows later is no memory of a first use. Each attack returns what
it did and the status that it got, 0 for a connection that ended without one. A server has to answer every one with a
status below 500, and to go on as before. The exit status is 1, and the last line says why, if an answer was above 499,
a slot was lost, memory grew by more than 2 % after the first tenth, or schemathesis or the server failed.
"""

import argparse
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.test_readme import TINY

PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/explain")
VALID: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "ab", "max_tokens": 4, "temperature": 0.5, "n": 1, "logprobs": 1, "echo": False},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "ab"}], "max_tokens": 4, "top_p": 0.5},
    "/v1/explain": {"prompt": "ab", "token": 1},
}
LARGE: list[tuple[str, dict[str, Any]]] = [  # what honest requests may take of memory that a process keeps
    ("/v1/completions", {"prompt": "a" * 3000, "max_tokens": 20, "logprobs": 20, "echo": True}),
    ("/v1/completions", {"prompt": "𝄞" * 50, "max_tokens": 20, "logprobs": 20, "echo": True}),
    ("/v1/completions", {"prompt": ["a"] * 64, "max_tokens": 20, "logprobs": 20}),
    ("/v1/completions", {"prompt": "a", "max_tokens": 20, "n": 16}),
    ("/v1/explain", {"prompt": "𝄞" * 50}),
    ("/v1/explain", {"prompt": [1] * 512}),
]
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 99, 2**31, 2**63, 10**40, 0.0, -0.5, 1e-320, 1e308, "", "x", "\0", "\ud800",
    [], [[]], [1], [[1, 2], ["a"]], ["a", 1], [-1], [10**9], {}, {"a": {}}, [None] * 300, "a" * 5000, ["\udfff"],
    [True], "𝄞" * 50,
]  # fmt: skip
BROKEN = [
    b"", b"{", b"}", b"[]", b"null", b"7", b'"x"', b"\xff\xfe", b'{"prompt": "\xc3"}', b"{'prompt': 1}", b'{"prompt":}',
    b'{"temperature": NaN}', b'{"temperature": -Infinity}', b'{"n": 1e999}', b'{"seed": ' + b"7" * 5000 + b"}",
    b"[" * 50_000, b'{"a":' * 20_000, b'{"prompt": "a"} trailing', b"\x00" * 64, b'{"prompt": "\\ud83d"}',
]  # fmt: skip
TENTHS = 10
GROWTH = 0.02  # of memory, from the first tenth to the last, that is no leak
SLOW = 50  # slow bodies that are open at once
Attack = tuple[str, int]


class Attacker:
    """Sends one attack after the other to a port of this machine."""

    def __init__(self, port: int, seed: int, patience: float = 30.0) -> None:
        self.port, self.random, self.patience = port, random.Random(seed), patience
        self._slow: deque[socket.socket] = deque()
        self.kinds: dict[str, Callable[[], int]] = {
            "broken JSON": self.broken_json,
            "wrong values": self.wrong_values,
            "unknown settings": self.unknown_settings,
            "bytes that are no HTTP": self.no_http,
            "a huge body": self.huge_body,
            "a body that stops": self.body_that_stops,
            "a slow body": self.slow_body,
            "a client that leaves": self.client_that_leaves,
            "wrong headers": self.wrong_headers,
            "other paths": self.other_paths,
        }

    def attack(self) -> Attack:
        """One attack."""
        kind = self.random.choice(list(self.kinds))
        return kind, self.kinds[kind]()

    def broken_json(self) -> int:
        path = self.random.choice(PATHS)
        if self.random.random() < 0.5:
            return self.post(path, self.random.choice(BROKEN))
        raw = bytearray(json.dumps(VALID[path]).encode())
        for _ in range(self.random.randint(1, 4)):
            raw[self.random.randrange(len(raw))] = self.random.randrange(256)
        return self.post(path, bytes(raw))

    def wrong_values(self) -> int:
        path = self.random.choice(PATHS)
        body = dict(VALID[path])
        known = [
            *body,
            "stop",
            "stream",
            "seed",
            "top_k",
            "top_p",
            "stream_options",
            "model",
            "best_of",
            "user",
            "token",
            "return_token_ids",
        ]
        for name in self.random.sample(known, self.random.randint(1, 3)):
            body[name] = self.random.choice(VALUES)
        return self.post(path, json.dumps(body).encode())

    def unknown_settings(self) -> int:
        path = self.random.choice(PATHS)
        name = "".join(chr(self.random.choice([0, 10, 97, 0x7F, 0xD800, 0x1D11E])) for _ in range(5))
        return self.post(path, json.dumps({**VALID[path], name: self.random.choice(VALUES)}).encode())

    def no_http(self) -> int:
        length = self.random.choice([1, 20, 500, 70_000])
        return self._send(self.random.randbytes(length) + b"\r\n\r\n")

    def huge_body(self) -> int:
        size = self.random.choice([(1 << 20) + 1, 1 << 21])
        if self.random.random() < 0.5:
            return self.post(PATHS[0], b" " * size)
        return self._send(self._head(PATHS[0], 10**12) + b"{")

    def body_that_stops(self) -> int:
        return self._send(self._head(PATHS[0], 1000) + b'{"prompt": "a', leave=True)

    def slow_body(self) -> int:
        """Begin a body, and add a byte to all that were begun before; the status of the oldest once there are many."""
        client = socket.create_connection(("127.0.0.1", self.port), timeout=self.patience)
        client.sendall(self._head(PATHS[0], 1000) + b'{"prompt": "a')
        for each in self._slow:
            with contextlib.suppress(OSError):  # it has its answer
                each.sendall(b" ")
        self._slow.append(client)
        return self._slow_answer() if len(self._slow) > SLOW else 0

    def _slow_answer(self) -> int:
        with self._slow.popleft() as client:
            try:
                return _status(client.recv(64))
            except ConnectionError:  # a byte that came after the answer resets the connection
                return 0

    def wait_for_slow(self) -> list[int]:
        """The statuses of all slow bodies that have none yet."""
        return [self._slow_answer() for _ in range(len(self._slow))]

    def client_that_leaves(self) -> int:
        body = json.dumps({"prompt": "a", "max_tokens": 100, "stream": self.random.random() < 0.7}).encode()
        return self._send(self._head(PATHS[0], len(body)) + body, leave=True)

    def wrong_headers(self) -> int:
        lines = self.random.choice(
            [
                b"content-length: -5",
                b"content-length: 99999999999999999999",
                b"content-length: 3\r\ncontent-length: 4",
                b"transfer-encoding: chunked\r\ncontent-length: 2",
                b"transfer-encoding: gzip",
                b"content-type: \xff\xfe",
                b"host: evil.example",
                b"x: " + b"y" * 20_000,
                b"upgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-key: a\r\nsec-websocket-version: 13",
                b"expect: 200-maybe",
            ]
        )
        return self._send(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n" + lines + b"\r\n\r\n{}")

    def other_paths(self) -> int:
        path = self.random.choice(
            ["/..%2f..%2fetc/passwd", "/%00", "/v1/models/%ff", "/" + "a" * 9000, "*", "//", "/v1/"]
        )
        method = self.random.choice(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE", "BREW"])
        return self._send(f"{method} {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\n\r\n".encode())

    def post(self, path: str, body: bytes) -> int:
        """The status of a request with this body."""
        return self._send(self._head(path, len(body)) + body)

    @staticmethod
    def _head(path: str, length: int) -> bytes:
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        return f"{head}content-length: {length}\r\n\r\n".encode()

    def _send(self, raw: bytes, *, leave: bool = False) -> int:
        """The status of the response; 0 where there is none. leave: close the connection without reading it."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=self.patience) as client:
            try:
                client.sendall(raw)
                if leave:
                    return 0
                client.shutdown(socket.SHUT_WR) if self.random.random() < 0.1 else None
                line = client.recv(64)
            except TimeoutError:
                raise
            except OSError:  # it has closed the connection while it was written to
                return 0
        return _status(line)


def _status(line: bytes) -> int:
    return int(line.split()[1]) if line.startswith(b"HTTP/1.1 ") else 0


def resident(pid: int) -> int:
    """Bytes of memory of a process (Linux)."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def faults(
    statuses: Mapping[Attack, int], idle: bool, memory: Sequence[int], schemathesis: int, server: int | None
) -> list[str]:
    """What must not come of it, in words. memory: bytes after each tenth.  schemathesis, server: exit statuses."""
    high = sorted({status for _, status in statuses if status >= 500})
    growth = memory[-1] / memory[0] - 1
    found = {
        f"answers of {', '.join(map(str, high))}": bool(high),
        "slots were lost": not idle,
        f"memory grew by {growth:.1%}": growth > GROWTH,
        f"schemathesis found something: exit status {schemathesis}": schemathesis != 0,
        f"the server ended with status {server}" if server is not None else "the server did not end": server != 0,
    }
    return [words for words, is_so in found.items() if is_so]


def tiny_run(folder: Path) -> str:
    """A run of one step on a few bytes."""
    (folder / "text.txt").write_text("import os\n" * 200)
    data = ["--data", f"{folder}/text.txt", "--tokenizer", "byte", "--cache_dir", f"{folder}/cache"]
    words = ["train", "quickstart", *TINY.split(), *data, "--output_dir", f"{folder}/run"]
    subprocess.run([sys.executable, "-m", "swamla", *words], check=True, stdout=subprocess.DEVNULL)
    return f"{folder}/run"


def main() -> int:
    """Attack a server in a process of its own and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--schemathesis", type=int, default=0, help="examples of each operation by schemathesis, too")
    arguments = parser.parse_args()
    if arguments.requests < TENTHS:
        parser.error(f"--requests {arguments.requests}: must be >= {TENTHS}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    examined, idle, ended = 0, False, None
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as output:
        run = arguments.run or tiny_run(Path(folder))
        command = [sys.executable, "-m", "swamla", "serve", run, "--port", f"{port}"]
        server = subprocess.Popen([*command, "--prefix_cache", "16"], stdout=output, stderr=output)
        try:
            while server.poll() is None and not _answers(port):
                time.sleep(0.2)
            attacker, statuses, memory = Attacker(port, arguments.seed), Counter[Attack](), []
            for path, body in LARGE:
                print(f"{path}: {attacker.post(path, json.dumps(body).encode())}")
            before = resident(server.pid)
            for _ in range(TENTHS):
                for _ in range(arguments.requests // TENTHS):
                    statuses[attacker.attack()] += 1
                memory.append(resident(server.pid))
            statuses.update(("a slow body", status) for status in attacker.wait_for_slow())
            idle = _is_idle(port)
            for (kind, status), count in sorted(statuses.items()):
                print(f"{kind:<24} {status or 'no answer':<10} {count:>6}")
            sizes = " ".join(f"{size / 1e6:.1f}" for size in [before, *memory])
            print(f"slots all free: {idle}; MB before and after each tenth: {sizes}")
            if arguments.schemathesis:
                done = schemathesis(f"http://127.0.0.1:{port}", arguments.schemathesis)
                print(done.stdout[-3000:])
                examined, idle = done.returncode, idle and _is_idle(port)
        finally:
            server.terminate()
            try:
                ended = server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
            print(f"exit status {ended}")
            output.seek(0)
            print(output.read().decode()[-2000:])
    wrong = faults(statuses, idle, memory, examined, ended)
    print(f"FAILED: {'; '.join(wrong)}" if wrong else "nothing failed")
    return int(bool(wrong))


def schemathesis(url: str, examples: int) -> subprocess.CompletedProcess[str]:
    """Requests that schemathesis makes of the OpenAPI document, right and wrong ones."""
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    checks += ",negative_data_rejection"
    words = ["run", f"{url}/openapi.json", "--checks", checks, "--max-examples", f"{examples}", "--seed", "1"]
    words += ["--generation-database", "none", "--phases", "examples,fuzzing", "--no-color"]
    return subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", *words], capture_output=True, text=True, check=False, timeout=3600
    )


def _answers(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10).status == 200
    except OSError:
        return False


def _is_idle(port: int) -> bool:
    for _ in range(100):
        models = json.loads(urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10).read())["models"]
        if all(each["active"] == each["waiting"] == 0 for each in models.values()):
            return True
        time.sleep(0.1)
    return False


if __name__ == "__main__":
    sys.exit(main())
