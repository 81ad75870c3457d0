"""A separate process that sends a run's metrics.jsonl to Weights & Biases; `trackers` starts it as a script.

It shares only the file and a pipe with training, so that a hanging server, a slow exit handler or a crash cannot affect
training. It follows the file, so nothing is queued or lost: records that cannot be sent at once are sent later, or are
written to an offline run for `wandb sync`. It imports nothing from swamla, which would import torch.

Arguments: the run's folder, project, name ("" for none), run id, the trainer's process id. The trainer writes its exit
status to stdin when it ends; if it dies, the pipe closes. Each line on stdout is a message to the user.
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

REACHABLE_SECONDS = 2.0  # ten times an ordinary answer
START_SECONDS = 10.0
FINISH_SECONDS = 20.0
RETRY_SECONDS = 60.0  # retry at the end only if the run lasted longer
POLL_SECONDS = 0.5
NO_KEY = "no WANDB_API_KEY"
ASKED_OFFLINE = "WANDB_MODE"
DIED = 1  # the status of a trainer that died without sending one

Tell = Callable[[str], None]


class Follower:
    """Reads the records of a metrics file as it grows."""

    def __init__(self, file: Path) -> None:
        self._stream = file.open("rb")
        self._rest = b""

    def rewind(self) -> None:
        """Start again with the first record."""
        self._stream.seek(0)
        self._rest = b""

    def new(self) -> Iterator[dict[str, Any]]:
        """The records since the last call; an unfinished line is left for the next call."""
        *lines, self._rest = (self._rest + self._stream.read()).split(b"\n")
        for line in lines:
            yield json.loads(line)


class Sender:
    """Starts the run at Weights & Biases, online or offline."""

    def __init__(self, wandb: Any, run_dir: Path, project: str, name: str, run_id: str, trainer: int) -> None:
        self.wandb = wandb
        self.folder = run_dir / "wandb"
        self.config = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
        self.project, self.name, self.run_id, self.trainer = project, name, run_id, trainer

    def start_online(self) -> tuple[Any, str]:
        """(the run, ""), or (None, why it cannot be online)."""
        obstacle = _obstacle()
        if obstacle:
            return None, obstacle
        before = set(self.folder.iterdir())
        try:
            return self._init("online", resume="allow"), ""
        except Exception as error:
            self.wandb.teardown()  # resets the run id
            for path in set(self.folder.glob(f"run-*-{self.run_id}")) - before:
                shutil.rmtree(path)  # empty; `wandb sync` must not send it in place of the run
            return None, _one_line(error)

    def start_offline(self) -> Any:
        """An offline run. It gets the whole history, so the newest of several offline runs is complete."""
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
    """Send records until the trainer ends, then the rest. If the run was offline, try to send it once more."""
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
        _retry(sender, records, status, tell)


def _retry(sender: Sender, records: Follower, status: int, tell: Tell) -> None:
    """Send the whole run now if the server is reachable; if not, the user has been told before."""
    run, obstacle = sender.start_online()
    if obstacle:
        return
    records.rewind()
    _log(run, records, run.step)
    _finish(run, status, tell)
    tell(f"Weights & Biases: reached at the end: {run.url}")


def _settings(wandb: Any, trainer: int) -> Any:
    """Settings without output, with bounded waits, that collect only the run's records and the machine's load."""
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
    """Why the run cannot be online, "" if it can. wandb itself would wait 100 s to find out."""
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
    """True if netrc has a key for the host, as after `wandb login`."""
    try:
        return netrc.netrc(os.environ.get("NETRC") or None).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _log(run: Any, records: Follower, first: int) -> None:
    """Log new records from step `first` on; the server has the earlier ones of a resumed run."""
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
    """Wait briefly for the trainer's end: its exit status, or None while it runs."""
    if not select.select([sys.stdin], [], [], POLL_SECONDS)[0]:
        return None
    text = sys.stdin.readline()
    return int(text) if text.strip() else DIED


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def main(arguments: list[str]) -> int:
    """Follow the run; report any failure in one line."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # for the trainer, which then sends its exit status
    pipe = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # keeps wandb's output out of the pipe

    def tell(text: str) -> None:
        try:
            pipe.write(text + "\n")
        except BrokenPipeError:  # the trainer died
            return

    run_dir, project, name, run_id, trainer = arguments
    try:
        import wandb

        folder = Path(run_dir)
        follow(Sender(wandb, folder, project, name, run_id, int(trainer)), Follower(folder / "metrics.jsonl"), tell)
        wandb.teardown()
    except BaseException as error:
        tell(f"warning: Weights & Biases failed ({type(error).__name__}: {_one_line(error)}); training continues")
        return 1
    return 0


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))  # skips wandb's exit handlers, which would wait for its servers again
