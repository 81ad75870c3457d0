"""The process that pushes a folder to the Hugging Face Hub as one commit; `push.py` starts it as a script.

It shares only this folder with training, and only reads it, so that a hanging server or a crashing client does not
affect training. It ends itself after a time limit. It imports nothing from swamla, and so no torch, unless weights have
to be assembled first. The token is HF_TOKEN in the environment.

Arguments: the folder, the repository, "private" or "public" for a new repository, the commit message, the time limit in
seconds. Prints one line of JSON: {"commit": its hash, "url": the repository's} or {"error": the reason, in one line}.
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
    """Push the files of `folder` and delete older checkpoints from the repository."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    _complete(folder)
    api = HfApi(token=os.environ["HF_TOKEN"], library_name="swamla")
    _reach(api.endpoint)
    api.create_repo(repo_id, private=private, exist_ok=True)
    there = {file.rfilename for file in api.model_info(repo_id).siblings or ()}
    ours = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    old = sorted(name for name in there - ours.keys() if name.startswith(CHECKPOINTS))
    additions = [CommitOperationAdd(name, path) for name, path in ours.items()]
    api.preupload_lfs_files(repo_id, _once(additions))  # so that files with the same content are uploaded once
    deletions = [CommitOperationDelete(name, is_folder=False) for name in old]
    commit = api.create_commit(repo_id, [*additions, *deletions], commit_message=message)
    return {"commit": commit.oid, "url": str(commit.repo_url)}


def _complete(folder: Path) -> None:
    """Assemble the weights at the folder's root, unless training has linked them."""
    if not (folder / "model.safetensors").exists():
        sys.path.append(str(Path(__file__).resolve().parents[2]))  # swamla may not be installed
        from swamla.hub.staging import complete

        complete(folder)


def _once(additions: list[Any]) -> list[Any]:
    """The additions without further hard links to the same file."""
    seen: dict[tuple[int, int], Any] = {}
    for addition in additions:
        stat = os.stat(addition.path_or_fileobj)
        seen.setdefault((stat.st_dev, stat.st_ino), addition)
    return list(seen.values())


def _reach(endpoint: str) -> None:
    """Raise if the server does not answer: huggingface_hub would wait forever."""
    try:
        urllib.request.urlopen(endpoint, timeout=REACHABLE_SECONDS).close()
    except urllib.error.HTTPError as error:
        error.close()
        if error.code >= 500:
            raise


def main(arguments: list[str]) -> int:
    """Push, and print the result or the error as one line of JSON."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the training process handles them
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # keeps the client's output out of the answer
    folder, repo_id, visibility, message, seconds = arguments
    signal.alarm(int(float(seconds)) + 5)  # the default action ends even a hanging process
    os.nice(10)
    try:
        result = push(Path(folder), repo_id, visibility == "private", message)
    except BaseException as error:
        text = " ".join(str(error).split()) or "no reason given"
        result = {"error": f"{type(error).__name__}: {text}"[:300].replace(os.environ.get("HF_TOKEN") or "\0", "…")}
    answer.write(json.dumps(result) + "\n")
    answer.close()
    return int("error" in result)


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))  # without waiting for threads of huggingface_hub, which may hang
