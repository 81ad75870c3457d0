"""A process of its own that sends one folder to the Hugging Face Hub, as one commit; started as a script by `push`.

Training shares nothing with it but a folder that it only reads, so whatever happens here (a server that hangs or
refuses, a client that crashes) costs training nothing; it ends by itself when its time is over, whoever still waits.
It imports nothing of swamla, whose import would bring torch, but where weights are to be put together first. The token
is HF_TOKEN of the environment.

Arguments: the folder, the repository, "private" or "public" for one that is not there yet, the commit's message, the
seconds it may take. On stdout one line of JSON: {"commit": its hash, "url": where} or {"error": why not, in one line}.
"""

import json
import os
import signal
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

REACHABLE_SECONDS = 5.0
CHECKPOINTS = "checkpoints/"


def push(folder: Path, repo_id: str, private: bool, message: str) -> dict[str, str]:
    """Make the repository hold the files of `folder`, and no older checkpoints besides."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    _complete(folder)
    api = HfApi(token=os.environ["HF_TOKEN"], library_name="swamla")
    _reach(api.endpoint)
    api.create_repo(repo_id, private=private, exist_ok=True)
    there = {file.rfilename for file in api.model_info(repo_id).siblings or ()}
    ours = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    old = sorted(name for name in there - ours.keys() if name.startswith(CHECKPOINTS))
    additions = [CommitOperationAdd(name, path) for name, path in ours.items()]
    api.preupload_lfs_files(repo_id, _once(additions))  # so that of files with the same bytes the second is there
    deletions = [CommitOperationDelete(name, is_folder=False) for name in old]
    commit = api.create_commit(repo_id, [*additions, *deletions], commit_message=message)
    return {"commit": commit.oid, "url": str(commit.repo_url)}


def _complete(folder: Path) -> None:
    """Put together the weights at the folder's root, where training left that to us."""
    if not (folder / "model.safetensors").exists():
        sys.path.append(str(Path(__file__).resolve().parents[2]))  # where swamla was not installed, or moved
        from swamla.hub.staging import complete

        complete(folder)


def _once(additions: list[Any]) -> list[Any]:
    """Of files that are one file under several names, the first."""
    seen: dict[tuple[int, int], Any] = {}
    for addition in additions:
        stat = os.stat(addition.path_or_fileobj)
        seen.setdefault((stat.st_dev, stat.st_ino), addition)
    return list(seen.values())


def _reach(endpoint: str) -> None:
    """Raise where nobody answers: the client itself would wait without end."""
    try:
        urllib.request.urlopen(endpoint, timeout=REACHABLE_SECONDS).close()
    except urllib.error.HTTPError as error:
        error.close()
        if error.code >= 500:
            raise


def main(arguments: list[str]) -> int:
    """Push; whatever goes wrong is told in one line."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they mean the trainer, which then decides
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever the client prints stays out of the answer
    folder, repo_id, visibility, message, seconds = arguments
    signal.alarm(int(float(seconds)) + 5)  # its default action ends the process, wherever it hangs
    os.nice(10)
    try:
        told = push(Path(folder), repo_id, visibility == "private", message)
    except BaseException as error:
        text = " ".join(str(error).split()) or "no reason given"
        told = {"error": f"{type(error).__name__}: {text}"[:300].replace(os.environ.get("HF_TOKEN") or "\0", "…")}
    answer.write(json.dumps(told) + "\n")
    answer.close()
    return int("error" in told)


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))  # the client's threads may hang, and nobody waits for them
