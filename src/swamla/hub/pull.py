"""Taking up a run from the Hugging Face Hub: its files at one commit, checked, as a run's folder."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from swamla.checkpoint import verify
from swamla.errors import CorruptError, MissingBackendError, UsageError
from swamla.files import entry, read_json, write_text_atomically

RECORD = "resumed_from_hub.json"
_RUN_FILES = ("config.json", "tokenizer.json")
_MORE_FILES = ("metrics.jsonl", "checkpoints/best.json", "wandb/run_id")
_MANIFEST = re.compile(r"checkpoints/step-\d{8}/manifest\.json")
_DATA = re.compile(r"(\w[\w-]*/)?\w[\w.-]*\.(safetensors|json)", re.ASCII)  # all that is fetched, let alone read


@dataclass(frozen=True, kw_only=True)
class Pulled:
    """Where a run came from: the repository, its commit, and the step of the newest checkpoint there."""

    repo_id: str
    commit: str
    step: int


def pull(repo_id: str, run_dir: Path, *, revision: str = "") -> Pulled:
    """Make the new folder `run_dir` from the run in a repository, at a branch, tag or commit; by default its newest.

    Which commit that was is kept in resumed_from_hub.json. Only configuration, metrics and what the manifests of the
    checkpoints list is fetched, only as safetensors and JSON. Raises `UsageError` where there is no such repository,
    no run in it or no way to it, `CorruptError` where a file is not what its manifest says; then there is no folder.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise MissingBackendError("huggingface_hub is not installed: pip install 'swamla[hub]'") from error

    staging = run_dir.with_name(f".{run_dir.name}.from-hub")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        api = HfApi(token=os.environ.get("HF_TOKEN") or False, library_name="swamla")
        with _one_line(repo_id, revision):
            info = api.model_info(repo_id, revision=revision or None, timeout=30)
        names = {file.rfilename for file in info.siblings or ()}

        def fetch(name: str) -> Path:
            with _one_line(repo_id, revision):
                return Path(api.hf_hub_download(repo_id, name, revision=info.sha, local_dir=staging))

        step = _fetch_run(names, fetch, staging, f"{repo_id} at {info.sha}")
        shutil.rmtree(staging / ".cache", ignore_errors=True)  # the client's
        pulled = Pulled(repo_id=repo_id, commit=str(info.sha), step=step)
        write_text_atomically(staging / RECORD, json.dumps(asdict(pulled)) + "\n")
        staging.rename(run_dir)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return pulled


def _fetch_run(names: set[str], fetch: Callable[[str], Path], folder: Path, where: str) -> int:
    """Fetch a run's files and its checkpoints, each as its manifest has it; returns the newest's step."""
    manifests = sorted(name for name in names if _MANIFEST.fullmatch(name))
    if not manifests or not names.issuperset(_RUN_FILES):
        raise UsageError(f"{where}: holds no run of swamla (no config.json, tokenizer.json or checkpoints)")
    for name in (*_RUN_FILES, *(name for name in _MORE_FILES if name in names)):
        fetch(name)
    step = 0
    for name in manifests:
        manifest = fetch(name)
        listed: dict[str, Any] = entry(read_json(manifest, inside=folder), "files", dict, file=manifest)
        for file in listed:
            path = name.replace("manifest.json", file)
            if not _DATA.fullmatch(file) or path not in names:
                raise CorruptError(f"{where}: {path}: missing, or no safetensors or JSON file: refused")
            fetch(path)
        step = verify(manifest.parent)["step"]
    return step


@contextmanager
def _one_line(repo_id: str, revision: str) -> Iterator[None]:
    """The client's errors as one of ours."""
    from huggingface_hub import errors

    try:
        yield
    except errors.RepositoryNotFoundError as error:
        raise UsageError(
            f"{repo_id}: no such repository on the hub, or HF_TOKEN in the environment may not read it"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UsageError(f"{repo_id}: has no revision {revision!r}: give a branch, a tag or a commit") from error
    except Exception as error:  # its network library's too, which is another in each version
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"{repo_id}: cannot be fetched from the hub ({type(error).__name__}: {reason})") from error
