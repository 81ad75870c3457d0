"""Datasets of the hub, through its real client and a server on the loopback device."""

import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from swamla.data.config import DataConfig
from swamla.data.dataset import Dataset
from swamla.data.hub import _chosen, _patterns, reason
from swamla.data.preparing import prepare
from swamla.errors import ConfigError

from .hub_stub import COMMIT, Hub, serving

pytest.importorskip("huggingface_hub")

REPO = "HuggingFaceFW/fineweb-edu"
CONFIG = "CC-MAIN-2024-10"
CANARY = "hf_" + "Canary0" * 5
CARD = {
    "configs": [
        {"config_name": "default", "data_files": [{"split": "train", "path": "data/*/*"}]},
        {"config_name": "CC-MAIN-2013-20", "data_files": [{"split": "train", "path": "data/CC-MAIN-2013-20/*"}]},
        {"config_name": CONFIG, "data_files": [{"split": "train", "path": f"data/{CONFIG}/*"}]},
    ]
}


def texts(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(["web", "été", "edu", "page"], k=draw.randint(5, 90))) for _ in range(count)]


def parquet(rows: list[str], column: str = "text") -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"id": range(len(rows)), column: rows, "url": ["u"] * len(rows)}), sink, row_group_size=10)
    return sink.getvalue()


def jsonl(rows: list[str]) -> bytes:
    return "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()


FILES = {
    "README.md": b"# made up",
    f"data/{CONFIG}/000_00000.parquet": parquet(texts(150, 1)),
    f"data/{CONFIG}/000_00001.parquet": parquet(texts(150, 2)),
    f"data/{CONFIG}/000_00002.jsonl": jsonl(texts(150, 3)),
    f"data/{CONFIG}/000_00003.json.zst": zstandard.compress(jsonl(texts(20, 4))),
    "data/CC-MAIN-2013-20/000_00000.parquet": parquet(["another crawl"] * 10),
}
SCRIPT = """
import json, sys
from swamla.data import sources
from swamla.data.config import DataConfig
from swamla.data.preparing import Part, prepare, prepare_part
from swamla.errors import SwamlaError
sources.UNIT_BYTES = 8000
settings = json.loads(sys.argv[1])
part = settings.pop("part", "")
try:
    config = DataConfig(**settings)
    dataset = prepare_part(config, Part.parse(part), workers=1).dataset if part else prepare(config, workers=2)
    print(dataset.path)
except SwamlaError as error:
    print(f"{type(error).__name__} {error}")
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving(Hub(REPO, dict(FILES), CARD)) as hub:
        yield hub


def prepared(hub: Hub, tmp_path: Path, **settings: str) -> str:
    """What a fresh process that talks to this hub makes, or says."""
    defaults = {"source": f"hf:{REPO}", "hub_config": CONFIG, "tokenizer": "byte", "cache_dir": str(tmp_path / "c")}
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": CANARY}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", SCRIPT, json.dumps({**defaults, "held_out_fraction": 0.2, **settings})]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert CANARY not in done.stdout + done.stderr
    return done.stdout.strip().splitlines()[-1] if done.stdout else done.stderr


def test_a_config_of_a_dataset_has_the_tokens_of_its_files_read_locally(hub: Hub, tmp_path: Path) -> None:
    dataset = Dataset.open(prepared(hub, tmp_path))
    local = tmp_path / f"data/{CONFIG}"
    local.mkdir(parents=True)
    for path, data in FILES.items():
        if CONFIG in path:
            (tmp_path / path.replace(".json.zst", ".jsonl.zst")).write_bytes(data)
    assert dataset.train.n_documents + dataset.held_out.n_documents == 470
    here = prepare(DataConfig(source=str(local), tokenizer="byte", held_out_fraction=0.2))
    assert documents(here) == documents(dataset)
    assert dataset.meta["source"] == f"hf:{REPO} (config {CONFIG}, split train, commit {COMMIT})"
    assert not any("README" in path or "2013" in path for path, _ in hub.seen)
    assert all(span for path, span in hub.seen if "/resolve/" in path)


def documents(dataset: Dataset) -> list[bytes]:
    """All documents, in some order, whichever split they are in."""
    splits = (dataset.train, dataset.held_out)
    return sorted(split.document(i).tobytes() for split in splits for i in range(split.n_documents))


def test_a_pinned_dataset_needs_the_hub_no_more_once_it_is_prepared(hub: Hub, tmp_path: Path) -> None:
    first = prepared(hub, tmp_path, hub_revision=COMMIT)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 5
    assert not any(CANARY.encode() in path.read_bytes() for path in written)
    hub.seen.clear()
    assert prepared(hub, tmp_path, hub_revision=COMMIT) == first
    assert hub.seen == []
    assert prepared(hub, tmp_path) == first  # what is newest has the same files


def test_parts_need_a_pinned_revision_and_make_the_same_dataset(hub: Hub, tmp_path: Path) -> None:
    whole = prepared(hub, tmp_path)
    refused = prepared(hub, tmp_path, part="1/2", cache_dir=str(tmp_path / "p"))
    assert refused.startswith(
        "ConfigError data.hub_revision = '': parts start at different times and need one fixed commit; now hf:"
    )
    assert COMMIT in refused
    for part in ("1/2", "2/2"):
        last = prepared(hub, tmp_path, part=part, hub_revision=COMMIT, cache_dir=str(tmp_path / "p"))
    assert Dataset.open(last).fingerprint == Dataset.open(whole).fingerprint


def test_a_hub_that_is_unwell_for_a_moment_is_asked_again(hub: Hub, tmp_path: Path) -> None:
    hub.fail = [503, 500]
    assert Dataset.open(prepared(hub, tmp_path)).train.n_documents > 300


def test_a_file_that_the_hub_withholds_is_one_line_that_names_it(hub: Hub, tmp_path: Path) -> None:
    hub.fail = [403] * 100
    said = prepared(hub, tmp_path)
    assert said.startswith(f"DataError hf:{REPO}@{COMMIT[:12]}/data/{CONFIG}/000_0000")
    assert "cannot be read (" in said
    assert "403" in said


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"source": "hf:no/such"}, "DataError cannot list the dataset 'no/such' on the hub ("),
        ({"hub_revision": "v9"}, f"DataError cannot list the dataset '{REPO}' at revision 'v9' on the hub ("),
        ({"hub_config": "CC-MAIN-1999"}, "ConfigError data.hub_config = 'CC-MAIN-1999': must be one of default, CC-"),
        ({"hub_split": "test"}, "ConfigError data.hub_split = 'test': must be one of train"),
        ({"text_column": "body"}, "no column 'body'; it has 'id', 'text', 'url' (choose by `text_column`)"),
    ],
)
def test_what_the_hub_has_not_is_one_line(hub: Hub, tmp_path: Path, settings: dict[str, str], said: str) -> None:
    assert said in prepared(hub, tmp_path, **settings)


def test_damaged_files_of_the_hub_are_named(hub: Hub, tmp_path: Path) -> None:
    name = f"data/{CONFIG}/000_00001.parquet"
    hub.files[name] = hub.files[name][:-50]
    assert f"hf:{REPO}@{COMMIT[:12]}/{name}: truncated or damaged parquet (" in prepared(hub, tmp_path)


def chosen(files: list[str], configs: list[dict] | None = None, **settings: str) -> list[str]:
    config = DataConfig(source="hf:a/b", **settings)  # type: ignore[arg-type]
    patterns = _patterns(config, configs or [])
    return sorted(_chosen(config.hub_split, patterns, files, by_card=bool(configs)))


def test_without_a_card_files_are_told_by_folder_and_split() -> None:
    files = ["a/train-0.parquet", "a/test-0.parquet", "b/train/0.parquet", "data/a/train/1.parquet", "c.jsonl"]
    assert chosen(files, hub_config="a") == ["a/train-0.parquet", "data/a/train/1.parquet"]
    assert chosen(files, hub_config="a", hub_split="test") == ["a/test-0.parquet"]
    assert chosen(files) == ["a/train-0.parquet", "b/train/0.parquet", "data/a/train/1.parquet"]
    assert chosen(["x.jsonl", "y.jsonl"]) == ["x.jsonl", "y.jsonl"]
    assert chosen(["x.jsonl"], hub_split="test") == []


@pytest.mark.parametrize(
    ("data_files", "expected"),
    [
        ("*.parquet", ["0.parquet"]),
        (["d/*.parquet", "0.parquet"], ["0.parquet", "d/1.parquet"]),
        ([{"split": "train", "path": ["d/**"]}, {"split": "x", "path": "*"}], ["d/1.parquet", "d/e/2.parquet"]),
        ("**/*.parquet", ["0.parquet", "d/1.parquet", "d/e/2.parquet"]),
        ("d/?.parquet", ["d/1.parquet"]),
    ],
)
def test_a_cards_patterns_match_as_globs_do(data_files: object, expected: list[str]) -> None:
    files = ["0.parquet", "d/1.parquet", "d/e/2.parquet"]
    assert chosen(files, [{"config_name": "only", "data_files": data_files}]) == expected


def test_signed_addresses_are_cut_out_of_messages() -> None:
    error = OSError("403 Forbidden for url 'https://cdn/x?X-Amz-Signature=secret'\nmore")
    assert reason(error) == "403 Forbidden for url 'https://cdn/x"


@pytest.mark.parametrize(
    "settings",
    [{"source": "hf:one"}, {"source": "hf:a/b/c"}, {"hub_config": "x"}, {"source": "hf:a/b", "hub_split": ""}],
)
def test_hub_settings_that_cannot_be_are_refused(settings: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=next(reversed(settings))):
        DataConfig(**settings)  # type: ignore[arg-type]
