"""`swamla serve RUN [RUN …]`: an OpenAI-compatible server and a page to try models on."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from swamla.checkpoint import load
from swamla.cli.console import Console, say
from swamla.cli.flags import argument, parse
from swamla.cli.generate import rounded_decoding
from swamla.cli.running import run_folder
from swamla.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Serve trained models by OpenAI's API, and a page at the same address. Ctrl-C and SIGTERM let it finish first.

    run: the folders of the runs; requests name a model by its folder's name.
    host: the address to listen on; 127.0.0.1 is reached from this machine only, 0.0.0.0 from any.
    port: 0 for a free one.
    slots: sequences of a model that are decoded together; each has a state.
    queue: requests that may wait for a slot; more are refused with 429.
    max_length: tokens of a prompt and its answer; at most a model's learned positions.
    prefix_cache: MiB of states of a model that prompts with the same beginning share; 0 for none.
    api_key_env: an environment variable with the key that requests must have.
    max_seconds: a request that has no answer by then fails.
    drain: seconds that requests under way have when the server is told to stop.
    decoding: int8: tokens after the first by weights rounded to 8 bits, on a CPU and for at most 16 slots, which is
        faster and changes the results; auto: int8 for a run whose weights are rounded, else eager.
    checkpoint: best, latest, or a step.
    """

    run: tuple[str, ...] = argument(annotation=str, positional=True, repeated=True)
    host: str = "127.0.0.1"
    port: int = 8000
    slots: int = 16
    queue: int = 64
    max_length: int = 4096
    prefix_cache: int = 256
    api_key_env: str = ""
    max_seconds: float = 600.0
    drain: float = 30.0
    decoding: Literal["auto", "eager", "int8"] = "auto"
    checkpoint: str = "best"


def main(argv: list[str]) -> int:
    """Serve until a signal."""
    arguments, _ = parse(Arguments, argv, command="swamla serve")
    _check(arguments)
    from swamla.serve.app import Limits
    from swamla.serve.server import bound_socket, make_server, named_engines

    key = _key(arguments.api_key_env)
    folders = [run_folder(run) for run in arguments.run]
    loaded = [load(folder, arguments.checkpoint) for folder in folders]
    served, worker = named_engines(
        [(name, *each) for name, each in zip(_names(folders), loaded, strict=True)],
        slots=arguments.slots,
        queue=arguments.queue,
        limit=arguments.max_length,
        cache_bytes=arguments.prefix_cache << 20,
        decoding=lambda model: (
            rounded_decoding(model, arguments.slots) if arguments.decoding == "auto" else arguments.decoding
        ),
    )
    limits = Limits(seconds=arguments.max_seconds)
    server = make_server(served, worker, host=arguments.host, key=key, limits=limits, drain=arguments.drain)
    listening = bound_socket(arguments.host, arguments.port)
    port = listening.getsockname()[1]
    shown = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    console = Console()
    say(console, f"{', '.join(each.name for each in served)} at http://{shown}:{port}/ (API: http://{shown}:{port}/v1)")
    if not key and arguments.host not in ("127.0.0.1", "localhost", "::1"):
        say(console, "anyone who reaches this address can use it: --api_key_env NAME asks for a key")
    worker.start()
    try:
        server.run(sockets=[listening])
    finally:
        worker.close()
    return 0


def _check(arguments: Arguments) -> None:
    """Raise `UsageError` for a flag out of range whose setting has another name in the library."""
    for name in ("max_seconds", "drain"):
        if not 0 < getattr(arguments, name) < math.inf:
            raise UsageError(f"--{name} {getattr(arguments, name)}: must be > 0 and finite, e.g. 30")
    if arguments.max_length < 2:
        raise UsageError(f"--max_length {arguments.max_length}: must be > 1, e.g. 4096")
    if arguments.prefix_cache < 0:
        raise UsageError(f"--prefix_cache {arguments.prefix_cache}: must be >= 0 (0: no cache)")


def _key(variable: str) -> str:
    """The key in an environment variable; "" if none is named."""
    if not variable:
        return ""
    key = os.environ.get(variable, "")
    if not key or not key.isascii() or not key.isprintable():
        raise UsageError(f"--api_key_env {variable}: the variable must hold a key, of printable ASCII")
    return key


def _names(folders: list[Path]) -> list[str]:
    """The folders' names; their whole paths where two have the same name."""
    names = [folder.resolve().name for folder in folders]
    return [str(folder) if names.count(name) > 1 else name for folder, name in zip(folders, names, strict=True)]
