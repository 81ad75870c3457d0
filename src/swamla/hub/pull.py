"""Download a run from the Hugging Face Hub: its files at one commit, verified, as a run folder."""

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
_DATA = re.compile(r"(\w[\w-]*/)?\w[\w.-]*\.(safetensors|json)", re.ASCII)  # only such files are downloaded


@dataclass(frozen=True, kw_only=True)
class Pulled:
    """The origin of a downloaded run: repository, commit, and step of the newest checkpoint."""

    repo_id: str
    commit: str
    step: int


def pull(repo_id: str, run_dir: Path, *, revision: str = "") -> Pulled:
    """Download the run in a repository, at a branch, tag or commit (default: the newest), to the new folder `run_dir`.

    The commit is stored in resumed_from_hub.json. Downloads only the configuration, the metrics and the files that the
    checkpoints' manifests list, which must be safetensors or JSON. Raises `UsageError` if the repository is missing,
    unreachable or has no run, `CorruptError` if a file does not match its manifest; `run_dir` does not exist then.
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
        shutil.rmtree(staging / ".cache", ignore_errors=True)  # of huggingface_hub
        pulled = Pulled(repo_id=repo_id, commit=str(info.sha), step=step)
        write_text_atomically(staging / RECORD, json.dumps(asdict(pulled)) + "\n")
        staging.rename(run_dir)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return pulled


def _fetch_run(names: set[str], fetch: Callable[[str], Path], folder: Path, where: str) -> int:
    """Download a run's files and its checkpoints, verified by their manifests; returns the newest step."""
    manifests = sorted(name for name in names if _MANIFEST.fullmatch(name))
    if not manifests or not names.issuperset(_RUN_FILES):
        raise UsageError(f"{where}: has no run of swamla (no config.json, tokenizer.json or checkpoints)")
    for name in (*_RUN_FILES, *(name for name in _MORE_FILES if name in names)):
        fetch(name)
    step = 0
    for name in manifests:
        manifest = fetch(name)
        listed: dict[str, Any] = entry(read_json(manifest, inside=folder), "files", dict, file=manifest)
        for file in listed:
            path = name.replace("manifest.json", file)
            if not _DATA.fullmatch(file) or path not in names:
                raise CorruptError(f"{where}: {path}: missing, or not a safetensors or JSON file: refused")
            fetch(path)
        step = verify(manifest.parent)["step"]
    return step


@contextmanager
def _one_line(repo_id: str, revision: str) -> Iterator[None]:
    """Turn the client's errors into `UsageError` of one line."""
    from huggingface_hub import errors

    try:
        yield
    except errors.RepositoryNotFoundError as error:
        raise UsageError(
            f"{repo_id}: no such repository on the hub, or HF_TOKEN in the environment may not read it"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UsageError(f"{repo_id}: has no revision {revision!r}: give a branch, a tag or a commit") from error
    except Exception as error:  # including those of its HTTP library, which depend on the version
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"{repo_id}: cannot be downloaded from the hub ({type(error).__name__}: {reason})") from error
