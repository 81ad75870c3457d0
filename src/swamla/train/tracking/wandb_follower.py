"""A process of its own that sends a run's metrics.jsonl to Weights & Biases; started as a script by `trackers`.

Training shares nothing with it but the file and a pipe, so whatever happens here (a server that hangs, an exit handler
that waits, a crash) costs training nothing. It follows the file, so nothing is queued and nothing lost: what could not
be sent at once is sent later, or lies in an offline run for `wandb sync`. It imports nothing of swamla, whose
import would bring torch.

Arguments: the run's folder, project, name ("" for none), run id, the trainer's process id. On stdin the trainer writes
its exit status when it ends; when it dies, the pipe just closes. On stdout: one line for each thing to tell the user.
"""

import http.client
import json
import netrc
import os
import select
import shutil
import signal
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

REACHABLE_SECONDS = 2.0  # an ordinary answer takes a tenth of that
START_SECONDS = 10.0
FINISH_SECONDS = 20.0
RETRY_SECONDS = 60.0  # what a server did not do it may do after so long
POLL_SECONDS = 0.5
NO_KEY = "no WANDB_API_KEY"
ASKED_OFFLINE = "WANDB_MODE"
DIED = 1  # the status of a trainer that could not tell its own

Tell = Callable[[str], None]


class Follower:
    """The records of a metrics file, as far as it is written."""

    def __init__(self, file: Path) -> None:
        self._stream = file.open("rb")
        self._rest = b""

    def rewind(self) -> None:
        """Begin again with the first record."""
        self._stream.seek(0)
        self._rest = b""

    def new(self) -> Iterator[dict[str, Any]]:
        """The records that came since the last call; a line that is not finished yet waits for the next."""
        *lines, self._rest = (self._rest + self._stream.read()).split(b"\n")
        for line in lines:
            yield json.loads(line)


class Sender:
    """One run at Weights & Biases, or its offline stand-in, and how it came to be which."""

    def __init__(self, wandb: Any, run_dir: Path, project: str, name: str, run_id: str, trainer: int) -> None:
        self.wandb = wandb
        self.folder = run_dir / "wandb"
        self.config = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
        self.project, self.name, self.run_id, self.trainer = project, name, run_id, trainer

    def start_online(self) -> tuple[Any, str]:
        """(the run, "") or (None, why it cannot be online)."""
        obstacle = _obstacle()
        if obstacle:
            return None, obstacle
        before = set(self.folder.iterdir())
        try:
            return self._init("online", resume="allow"), ""
        except Exception as error:
            self.wandb.teardown()  # which forgets the run id
            for path in set(self.folder.glob(f"run-*-{self.run_id}")) - before:
                shutil.rmtree(path)  # it holds nothing, and must not be sent in place of the run
            return None, _one_line(error)

    def start_offline(self) -> Any:
        """A run on the disk; it gets the whole history, so of several the newest holds all of them."""
        return self._init("offline")

    def _init(self, mode: Literal["online", "offline"], resume: Literal["allow"] | None = None) -> Any:
        return self.wandb.init(
            mode=mode,
            resume=resume,
            project=self.project,
            name=self.name or None,
            id=self.run_id,
            dir=str(self.folder.parent),
            config=self.config,
            settings=_settings(self.wandb, self.trainer),
        )


def follow(sender: Sender, records: Follower, tell: Tell) -> None:
    """Send records until the trainer ends, then what is left; where there was no way to send, try once more."""
    began = time.monotonic()
    run, obstacle = sender.start_online()
    online = run is not None
    if not online:
        run = sender.start_offline()
        failed = "" if obstacle in (NO_KEY, ASKED_OFFLINE) else "warning: "
        tell(f"{failed}Weights & Biases: offline ({obstacle}); to send it later: wandb sync {Path(run.dir).parent}")
    else:
        tell(f"Weights & Biases: {run.url}")
    status, first = None, run.step
    while status is None:
        status = _trainer_status()
        _log(run, records, first)
    _finish(run, status, tell)
    if not online and obstacle not in (NO_KEY, ASKED_OFFLINE) and time.monotonic() - began > RETRY_SECONDS:
        _once_more(sender, records, status, tell)


def _once_more(sender: Sender, records: Follower, status: int, tell: Tell) -> None:
    """Send the whole run now, if that is possible; that it was not is told already."""
    run, obstacle = sender.start_online()
    if obstacle:
        return
    records.rewind()
    _log(run, records, run.step)
    _finish(run, status, tell)
    tell(f"Weights & Biases: reached at the end: {run.url}")


def _settings(wandb: Any, trainer: int) -> Any:
    """Quiet, bounded in every wait, and nothing collected but what the run says and the machine's load."""
    return wandb.Settings(
        console="off",
        silent=True,
        disable_git=True,
        disable_code=True,
        disable_job_creation=True,
        x_disable_meta=True,
        x_save_requirements=False,
        x_stats_pid=trainer,
        init_timeout=START_SECONDS,
        login_timeout=START_SECONDS,
        finish_timeout=FINISH_SECONDS,
        finish_timeout_raises=True,
    )


def _obstacle() -> str:
    """Why a run cannot be online, "" where it can. wandb itself would wait 100 s to find out."""
    if os.environ.get("WANDB_MODE", "online") in ("offline", "dryrun"):
        return ASKED_OFFLINE
    url = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    host = urllib.parse.urlparse(url).hostname or url
    if not os.environ.get("WANDB_API_KEY") and not _known_to_netrc(host):
        return NO_KEY
    try:
        urllib.request.urlopen(url, timeout=REACHABLE_SECONDS).close()
    except urllib.error.HTTPError as error:
        error.close()
        return f"{host} answers {error.code}" if error.code >= 500 else ""
    except (OSError, http.client.HTTPException, ValueError) as error:
        return f"{host} does not answer: {_one_line(error)}"
    return ""


def _known_to_netrc(host: str) -> bool:
    """True after `wandb login`, which keeps its key there."""
    try:
        return netrc.netrc(os.environ.get("NETRC") or None).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _log(run: Any, records: Follower, first: int) -> None:
    """Log what is new; a run that is resumed knows the steps before `first`, which were the same."""
    for record in records.new():
        step = record.pop("step")
        if step >= first:
            run.log({k: v for k, v in record.items() if isinstance(v, int | float)}, step=step)


def _finish(run: Any, status: int, tell: Tell) -> None:
    try:
        run.finish(exit_code=status)
    except TimeoutError:
        tell(f"warning: Weights & Biases: not all was sent; to send it later: wandb sync {Path(run.dir).parent}")


def _trainer_status() -> int | None:
    """Wait a moment for the trainer's end: its exit status, or None while it goes on."""
    if not select.select([sys.stdin], [], [], POLL_SECONDS)[0]:
        return None
    text = sys.stdin.readline()
    return int(text) if text.strip() else DIED


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def main(arguments: list[str]) -> int:
    """Follow; whatever goes wrong is told in one line."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they mean the trainer, which then tells us
    pipe = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # whatever wandb prints stays out of the pipe

    def tell(text: str) -> None:
        try:
            pipe.write(text + "\n")
        except BrokenPipeError:  # the trainer died: there is nobody to tell
            return

    run_dir, project, name, run_id, trainer = arguments
    try:
        import wandb

        folder = Path(run_dir)
        follow(Sender(wandb, folder, project, name, run_id, int(trainer)), Follower(folder / "metrics.jsonl"), tell)
        wandb.teardown()
    except BaseException as error:
        tell(f"warning: Weights & Biases failed ({type(error).__name__}: {_one_line(error)}); training goes on")
        return 1
    return 0


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))  # wandb's exit handlers would wait for its servers again
