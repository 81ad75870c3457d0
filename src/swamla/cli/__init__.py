"""The command line: a table of commands, each imported when it is chosen, and one place that reports errors.

Exit status: 0 done, 1 a bug in swamla, 2 bad input, 3 a corrupt artefact, 75 stopped by SIGTERM with the state saved,
130 stopped by Ctrl-C, 128 + n ended by signal n outside training. An error is one line on stderr, with advice on
further lines; --debug, anywhere on the line, shows the traceback instead.
"""

import os
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from swamla.cli.flags import WIDEST, forget_parsed
from swamla.cli.outputs import Ended, ended_by_signals, flush_outputs, open_outputs
from swamla.cli.starting import announced
from swamla.distributed import is_main, lost_a_rank
from swamla.errors import (
    ConfigError,
    FailedElsewhere,
    Interrupted,
    LeftAtOnce,
    SwamlaError,
    UsageError,
    is_out_of_memory,
)

COMMANDS = {
    "quickstart": "train a small hybrid model on this Python's own source files (about 3 minutes)",
    "train": "train a model: a recipe, and flags that change it",
    "sft": "fine-tune a model on conversations, all weights or adapters",
    "generate": "continue prompts with a trained model",
    "sample": "the same prompts continued by several models, side by side",
    "chat": "a conversation with a model that was tuned on conversations",
    "serve": "a server with OpenAI's API and a page, for one model or several",
    "evaluate": "held-out loss, perplexity and bits per byte of a trained model",
    "recall": "accuracy in a task over a grid of its sizes, beside the bytes of state",
    "explain": "what a model does with its context: heads, layers, losses, on one page (about a minute)",
    "export": "a trained model as a folder that other programs load",
    "import": "a model of transformers as a run",
    "runs": "the runs in a folder: data, progress, losses; runs rm removes some",
    "checkpoint": "the checkpoints of a run: list, verify, convert",
    "compare": "arms trained alike with several seeds, or two finished runs: what differs, with intervals",
    "reproduce": "a published comparison, trained anew: its page says where the claim holds (about 10 minutes)",
    "plot": "curves of several runs in one picture",
    "prepare": "tokenize data ahead of training",
    "cache": "prepared data: list it, with the runs that need it; remove it",
    "info": "the costs of a model, from its config alone: parameters, FLOPs, state, memory",
    "bench": "the speed of training, generation and data loading on this machine (about 2 minutes)",
    "doctor": "hardware and libraries of this machine, and a self-check of about ten seconds",
}
MODULES = {"import": "importing"}  # of commands whose name cannot be a module's
INTERRUPTED = 130
CLOSED_PIPE = 141  # what a shell reports for a program that SIGPIPE ended


def main(argv: Sequence[str] | None = None, command: str = "") -> int:
    """Run one command and return the exit status. command: its name, by default the first word."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    warnings.showwarning = _one_line_warning  # type: ignore[assignment]
    warnings.filterwarnings("ignore", category=SyntaxWarning)  # of the source of libraries
    open_outputs()
    forget_parsed()
    try:
        with ended_by_signals():
            others = _load_plugins(arguments)
            run = _main_of(command) if command else _dispatch
            status = run(others)
        flush_outputs()  # raises on a closed pipe here rather than when the interpreter exits
        return status
    except SystemExit:  # after --help
        raise
    except BaseException as error:  # some libraries raise errors that are no `Exception`
        if debug and not isinstance(error, BrokenPipeError):
            raise
        return _report(error)


def _report(error: BaseException) -> int:
    """Print the error in one line, then its notes; returns the exit status."""
    message, status = _explain(error)
    try:
        if message and _is_reported_here(error):
            where = "" if is_main() else f"rank {os.environ['RANK']}: "
            kind = (
                "" if isinstance(error, Interrupted | Ended | KeyboardInterrupt) else "error: "
            )  # asked for: no error
            print(f"swamla: {kind}{where}{message}", file=sys.stderr)
            for note in getattr(error, "__notes__", ()):
                print(f"swamla: {_as_typed(note)}", file=sys.stderr)
        flush_outputs()
    except OSError:  # the output is closed
        pass
    return status


def _is_reported_here(error: BaseException) -> bool:
    """On several ranks the main one reports errors; the others report only those that happened to them alone."""
    return is_main() or not isinstance(error, FailedElsewhere | Interrupted | UsageError | ConfigError)


def _load_plugins(arguments: list[str]) -> list[str]:
    """Import the files of --plugin, before a command reads configs or builds flags; returns all other arguments."""
    others: list[str] = []
    words = iter(arguments)
    for word in words:
        flag, equals, file = word.partition("=")
        if word == "--":
            return [*others, word, *words]
        if flag != "--plugin":
            others.append(word)
            continue
        file = file or ("" if equals else next(words, ""))
        if not file or file.startswith("--"):
            raise UsageError("--plugin needs a Python file, e.g. --plugin my_mixer.py")
        with announced(next((word for word in arguments if word in COMMANDS), "train")):
            from swamla.cli.console import PLUGINS
            from swamla.plugins import load_plugin

            load_plugin(Path(file))
        PLUGINS.append(file)
    return others


def _dispatch(arguments: list[str]) -> int:
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if command == "--version":
        from swamla.version import __version__

        print(f"swamla {__version__}")
        return 0
    if command not in COMMANDS:
        from swamla.config import did_you_mean

        raise UsageError(f"no command {command!r}; {did_you_mean(command, list(COMMANDS))}")
    return _main_of(command)(arguments[1:])


def _main_of(command: str) -> Callable[[list[str]], int]:
    """The function of a command, whose module is imported."""
    with announced(command):
        return import_module(f"swamla.cli.{MODULES.get(command, command)}").main


def _overview() -> str:
    width = max(40, min(WIDEST, shutil.get_terminal_size().columns - 1))
    more = (
        "swamla COMMAND --help shows a command's flags; swamla --version. Every command also takes --plugin FILE, "
        "which imports a Python file with mixers or sources of your own, and --debug, which shows tracebacks."
    )
    commands = [
        textwrap.fill(about, width, initial_indent=f"  {name:<11} ", subsequent_indent=" " * 14)
        for name, about in COMMANDS.items()
    ]
    what = textwrap.fill("Design, train, run and compare hybrid-attention language models.", width)
    return "\n".join(["usage: swamla COMMAND …", "", what, "", *commands, "", textwrap.fill(more, width)])


def _explain(error: BaseException) -> tuple[str, int]:
    """(one line for the user, exit status)."""
    match error:
        case ConfigError():
            from swamla.cli.spelling import error_as_typed

            return " ".join(error_as_typed(error).splitlines()), error.exit_status
        case SwamlaError() | Ended():
            return " ".join(_as_typed(str(error)).splitlines()), error.exit_status
        case LeftAtOnce():
            return str(error), error.exit_status
        case KeyboardInterrupt():
            return "interrupted", INTERRUPTED
        case BrokenPipeError():  # the reader closed the pipe, as in `swamla info … | head -1`
            return "", CLOSED_PIPE
        case OSError(filename=str() | bytes() | os.PathLike()):
            return f"{error.filename!s}: {error.strerror}", SwamlaError.exit_status
        case OSError(strerror=str()):
            return f"the system refuses to read or write: {error.strerror}", SwamlaError.exit_status
        case RuntimeError() if "home directory" in str(error):
            return "there is no home folder: set HOME, or SWAMLA_CACHE to a folder", SwamlaError.exit_status
    first_line = (str(error).splitlines() or [""])[0]
    if lost_a_rank(error):
        return f"another process of this run is gone, or did not answer in time: {first_line}", 1
    if is_out_of_memory(error):
        mend = _as_typed("; a smaller `batch_size`, more `accumulation` or a smaller `block_size` needs less")
        what = f"out of memory: {first_line}" if first_line else "out of memory"
        return what + (
            "" if "`" in mend else mend
        ), SwamlaError.exit_status  # a command that does not train has no flags
    return f"a bug in swamla: {type(error).__name__}: {first_line} (--debug shows the traceback)", 1


def _as_typed(message: str) -> str:
    """A message with the flags of the command for the settings that it names, see `swamla.cli.spelling`."""
    from swamla.cli.spelling import as_typed

    return as_typed(message)


def _one_line_warning(message: Warning | str, category: type[Warning], *_: object) -> None:
    if is_main():
        print(f"swamla: warning: {' '.join(_as_typed(str(message)).split())}", file=sys.stderr)
