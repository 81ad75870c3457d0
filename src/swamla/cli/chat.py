"""`swamla chat RUN`: a conversation in the terminal."""

import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

from swamla.checkpoint import load
from swamla.cli.console import harmless
from swamla.cli.flags import argument, parse
from swamla.cli.generate import rounded_decoding, sampling_of
from swamla.cli.running import run_folder
from swamla.data.chat import Chatml
from swamla.errors import SwamlaError, UsageError
from swamla.inference.sampling import Sampling
from swamla.serve.chat import asked_ids, chat_template, require_template
from swamla.serve.engine import Engine
from swamla.serve.requests import Event, Failed, Request, TooLong, Written
from swamla.signal_notice import handled

HELP = "/new begins another conversation, /quit or Ctrl-D leaves, Ctrl-C stops an answer."


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Talk with a model that was tuned on conversations: its tokenizer has the special ids of ChatML.

    run: the run's folder.
    system: what the model is told before the conversation.
    max_new_tokens: of an answer.
    max_length: tokens of the whole conversation; at most the model's learned positions.
    temperature: below 1 more certain, above 1 more varied, 0 the same as --greedy.
    top_k: sample from the k likeliest tokens only; 0 for all.
    top_p: sample from the likeliest tokens that together have this probability.
    seed: the same seed and messages give the same answers.
    greedy: always take the likeliest token.
    checkpoint: best, latest, or a step.
    """

    run: str = argument(positional=True)
    system: str = ""
    max_new_tokens: int = 256
    max_length: int = 4096
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    greedy: bool = False
    checkpoint: str = "best"


def main(argv: list[str]) -> int:
    """Converse until the end of the input. The status is that of a bug if an answer failed by one."""
    arguments, given = parse(Arguments, argv, command="swamla chat")
    if arguments.max_new_tokens < 1:
        raise UsageError(f"--max_new_tokens {arguments.max_new_tokens}: must be > 0, e.g. 256")
    if arguments.max_length < 2:
        raise UsageError(f"--max_length {arguments.max_length}: must be > 1, e.g. 4096")
    sampling = sampling_of(arguments, given)
    model, tokenizer = load(run_folder(arguments.run), arguments.checkpoint)
    template = require_template(chat_template(tokenizer), arguments.run)
    decoding = rounded_decoding(model, 1)
    engine = Engine(model, tokenizer, slots=1, limit=arguments.max_length, decoding=decoding)
    talk = Conversation(engine, template, sampling, arguments.system, arguments.max_new_tokens)
    if sys.stdin.isatty():
        print(HELP)
    for message in _messages():
        if message == "/quit":
            break
        if message == "/new":
            talk.begin()
        elif message.startswith("/"):
            print(HELP)
        else:
            talk.answer(message)
    return int(talk.failed)


class Conversation:
    """Messages so far; each answer is written as it comes. What both sides said is read from the cache of prefixes.

    failed: whether the engine failed in an answer.
    """

    failed = False

    def __init__(self, engine: Engine, template: Chatml, sampling: Sampling, system: str, max_new_tokens: int) -> None:
        self.engine, self.template, self.sampling = engine, template, sampling
        self.system, self.max_new_tokens = system, max_new_tokens
        self.begin()

    def begin(self) -> None:
        """Forget what was said."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def answer(self, message: str) -> None:
        """Print the answer to a message. One that does not fit, is no text, or meets a bug, is not kept."""
        asked = [*self.messages, {"role": "user", "content": message}]
        pieces: list[str] = []
        failures: list[str] = []

        def hear(event: Event) -> None:
            if isinstance(event, Written):
                pieces.append(event.piece.text)
                sys.stdout.write(harmless(event.piece.text) if sys.stdout.isatty() else event.piece.text)
                sys.stdout.flush()
            elif isinstance(event, Failed):
                failures.append(event.message)

        try:
            tokens, marks = asked_ids(self.template, asked)
            room = max(1, min(self.max_new_tokens, self.engine.limit - len(tokens) + 1))
            ends = (self.template.stop_id,)
            job = self.engine.submit(
                Request(tokens=tokens, max_new_tokens=room, sampling=self.sampling, ends=ends, marks=marks), hear
            )
        except TooLong as error:
            print(f"swamla: {error}: /new begins another conversation", file=sys.stderr)
            return
        except SwamlaError as error:
            print(f"swamla: {error}", file=sys.stderr)
            return

        def stop(number: int, frame: FrameType | None) -> None:
            """Ctrl-C ends the answer between two rounds, so that the engine can go on; a second one the program."""
            if job.cancelled:
                raise KeyboardInterrupt
            job.cancel()

        with handled(stop, signal.SIGINT):
            while self.engine.step():
                pass
        print()
        if failures:
            self.failed = True
            print(f"swamla: error: a bug in swamla: {failures[0]}; the message is not kept", file=sys.stderr)
            return
        self.messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]


def _messages() -> Iterator[str]:
    """Lines of the input that are not empty."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield line.strip()
