"""Tokens per second and time to the first token of `swamla serve`, at 1, 4 and 16 streams, beside `transformers serve`.

    python -m benchmarks.serving runs/quickstart                       # about five minutes of two cores
    python -m benchmarks.serving runs/quickstart --beside transformers # needs pip install 'transformers[serving]' too
    python -m benchmarks.serving runs/quickstart --decoding eager,int8 # our server twice
    python -m benchmarks.serving runs/a runs/b                         # also both at once, half of the streams each
    python -m benchmarks.serving --table                               # only print what was measured last

Every stream is a connection of its own that asks for one text after another, streamed, until its share is done; prompts
are pieces of this repository's own source, all different. A server is warmed up by one text of each number of streams.
Tokens are those that the server's usage counts; the rate is all tokens by the time from the first request to the last
answer, prompts included; by the seconds that the server's threads computed it depends less on who else uses the
machine. First tokens are of all rounds together. The other server gets the run exported as the class of
`swamla.interop.transformers`, with a chat template that passes the text on, because it answers conversations only.
"""

import argparse
import http.client
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks.markdown import table
from swamla.bench.results import Results
from swamla.process import processor

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]
STREAMS = (1, 4, 16)
PASS_ON = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
START_SECONDS = 120
RATES = ("tokens_per_s", "cpu_tokens_per_s")


@dataclass(frozen=True)
class Target:
    """A server. models: streams ask them in turns.  chat: it answers conversations only.  pid: of its process."""

    name: str
    port: int
    models: tuple[str, ...]
    chat: bool
    pid: int

    def cpu_seconds(self) -> float:
        """Seconds that its threads have computed (Linux)."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Answer:
    """One text: seconds to its first piece, and its tokens."""

    first: float
    tokens: int


def prompts(count: int, characters: int, begin: int) -> list[str]:
    """Pieces of source text, all different."""
    text = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "src").rglob("*.py")))
    return [text[(begin + index) * characters :][:characters] for index in range(count)]


def ask(target: Target, model: str, prompt: str, tokens: int) -> Answer:
    """Stream one text. Raises `RuntimeError` for an answer that is an error."""
    body: dict[str, Any] = {"model": model, "max_tokens": tokens, "temperature": 1.0, "seed": 1, "stream": True}
    if target.chat:
        body["messages"] = [{"role": "user", "content": prompt}]
    else:
        body |= {"prompt": prompt, "stream_options": {"include_usage": True}}
    connection = http.client.HTTPConnection("localhost", target.port, timeout=600)
    begun, first, pieces, counted = time.perf_counter(), 0.0, 0, 0
    path = "/v1/chat/completions" if target.chat else "/v1/completions"
    connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"{target.name}: {response.status} {response.read(300)!r}")
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line.removeprefix(b"data: "))
        if "error" in event:
            raise RuntimeError(f"{target.name}: {event['error']}")
        counted = (event.get("usage") or {}).get("completion_tokens", counted)
        choices = event.get("choices") or []
        if any(choice.get("text") or (choice.get("delta") or {}).get("content") for choice in choices):
            first = first or time.perf_counter() - begun
            pieces += 1
    connection.close()
    return Answer(first or time.perf_counter() - begun, counted or pieces)


def load(target: Target, streams: int, each: int, tokens: int, begin: int) -> dict[str, Any]:
    """All streams at once, each with `each` texts: the figures of a row."""
    asked = prompts(streams * each, 400, begin)
    answers: list[Answer] = []
    errors: list[BaseException] = []

    def stream(index: int) -> None:
        model = target.models[index % len(target.models)]
        try:
            answers.extend([ask(target, model, prompt, tokens) for prompt in asked[index::streams]])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=stream, args=(index,)) for index in range(streams)]
    begun, computed = time.perf_counter(), target.cpu_seconds()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds, computed = time.perf_counter() - begun, target.cpu_seconds() - computed
    if errors:
        raise errors[0]
    written = sum(answer.tokens for answer in answers)
    return {
        "tokens_per_s": written / seconds,
        "cpu_tokens_per_s": written / max(computed, 0.01),
        "firsts_s": [answer.first for answer in answers],
        "tokens": written,
    }


@contextmanager
def started(name: str, command: list[str], models: tuple[str, ...], port: int, *, chat: bool) -> Iterator[Target]:
    """A server in a process of its own, until the context ends."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        try:
            until = time.monotonic() + START_SECONDS
            while not _listens(port):
                if process.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    raise RuntimeError(f"{name} does not start: {log.read().decode().strip()[-300:]}")
                time.sleep(0.2)
            yield Target(name, port, models, chat, process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def ours(runs: list[Path], decoding: str) -> Iterator[Target]:
    """`swamla serve` of one or several runs."""
    port = _free_port()
    folders = [run.resolve() for run in runs]
    command = [sys.executable, "-m", "swamla", "serve", *map(str, folders), "--port", f"{port}"]
    command += ["--prefix_cache", "0", "--decoding", decoding]
    with started(our_name(runs, decoding), command, tuple(each.name for each in folders), port, chat=False) as target:
        yield target


def our_name(runs: list[Path], decoding: str) -> str:
    """What our server's rows are called."""
    more = [f"{len(runs)} models"] if len(runs) > 1 else []
    return ", ".join(["swamla serve", *more, *([decoding] if decoding != "eager" else [])])


@contextmanager
def transformers(run: Path, continuous: bool) -> Iterator[Target]:
    """`transformers serve` on the exported run; with its continuous batching, or one text after the other."""
    port = _free_port()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "model"
        export = [sys.executable, "-m", "swamla", "export", str(run.resolve()), str(out), "--to", "swamla"]
        subprocess.run(export, check=True, cwd=ROOT, capture_output=True)
        (out / "chat_template.jinja").write_text(PASS_ON)
        # It looks for the class in transformers itself, by name.
        start = "import swamla.interop.transformers as ours, transformers; "
        start += "transformers.SwamlaForCausalLM = ours.SwamlaForCausalLM; "
        start += "from transformers.cli.transformers import main; main()"
        command = [sys.executable, "-c", start, "serve", str(out), "--port", f"{port}", "--device", "cpu"]
        command += ["--trust-remote-code", "--continuous-batching" if continuous else "--no-continuous-batching"]
        name = "transformers serve" + (", continuous batching" if continuous else "")
        with started(name, command, (str(out),), port, chat=True) as target:
            yield target


def measure(target: Target, results: Results, each: int, tokens: int, rounds: int) -> None:
    """Rows for every number of streams: the medians of some rounds."""
    for streams in STREAMS:
        try:
            load(target, streams, 1, tokens, 0)
            found = [load(target, streams, each, tokens, 40 + 40 * number) for number in range(rounds)]
        except Exception as error:
            results.failed("serving", f"{target.name}, {streams} streams", f"{error}"[:160])
            continue
        row = {key: median(one[key] for one in found) for key in RATES}
        firsts = [seconds for one in found for seconds in one["firsts_s"]]
        row |= {"first_median_s": median(firsts), "first_p95_s": quantiles(firsts, n=20, method="inclusive")[-1]}
        lowest, highest = (edge(one["tokens_per_s"] for one in found) for edge in (min, max))
        row |= {"low_tokens_per_s": lowest, "high_tokens_per_s": highest, "tokens": sum(one["tokens"] for one in found)}
        results.add("serving", {"name": target.name, "streams": streams, **row})


def page(results: dict[str, Any]) -> str:
    """The table of docs/serving.md."""
    head = [
        "server",
        "streams",
        "tokens/s",
        "lowest to highest",
        "tokens per second of CPU",
        "first token, median",
        "95th percentile",
    ]
    lines = []
    for row in results["tables"]["serving"]:
        if "error" in row:
            lines.append([row["name"], "", "failed", row["error"][:200], "", "", ""])
            continue
        rates = f"{row['low_tokens_per_s']:.0f} to {row['high_tokens_per_s']:.0f}"
        first = [f"{row[key] * 1000:.0f} ms" for key in ("first_median_s", "first_p95_s")]
        lines.append(
            [
                row["name"],
                f"{row['streams']}",
                f"{row['tokens_per_s']:.0f}",
                rates,
                f"{row['cpu_tokens_per_s']:.0f}",
                *first,
            ]
        )
    return table(head, lines)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--beside", choices=["none", "transformers"], default="none")
    parser.add_argument("--decoding", default="eager", help="of swamla serve: eager, int8, or both: eager,int8")
    parser.add_argument("--texts", type=int, default=3, help="texts of each stream in a round")
    parser.add_argument("--tokens", type=int, default=100, help="of each text")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        print(page(json.loads(max(RESULTS.glob("serving-*.json"), key=number_of).read_text())))
        return
    if not arguments.runs:
        parser.error("the run's folder is missing")
    file = new_file()
    machine: dict[str, object] = {"processor": processor(), "cores": os.cpu_count()}
    results = Results(command=" ".join(sys.argv[1:]), machine=machine, file=file)
    first, several = arguments.runs[:1], [arguments.runs] if len(arguments.runs) > 1 else []
    servers = {
        our_name(runs, decoding): partial(ours, runs, decoding)
        for runs in (first, *several)
        for decoding in arguments.decoding.split(",")
    }
    if arguments.beside == "transformers":
        servers["transformers serve"] = partial(transformers, first[0], False)
        servers["transformers serve, continuous batching"] = partial(transformers, first[0], True)
    for name, server in servers.items():
        try:
            with server() as target:
                measure(target, results, arguments.texts, arguments.tokens, arguments.rounds)
        except Exception as error:
            results.failed("serving", name, error)
    print(page(results.plain()))


def new_file() -> Path:
    """Where results go: a file of this day that is not there yet."""
    day = f"serving-{datetime.now(UTC):%Y-%m-%d}"
    names = (f"{day}{f'-{number}' if number > 1 else ''}.json" for number in itertools.count(1))
    return next(RESULTS / name for name in names if not (RESULTS / name).exists())


def number_of(file: Path) -> tuple[str, int]:
    """The day of a file of results, and which of that day it is."""
    _, year, month, day, *number = file.stem.split("-")
    return f"{year}-{month}-{day}", int(number[0]) if number else 1


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("localhost", port), timeout=1).close()
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main()
