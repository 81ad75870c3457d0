"""What every test relies on: no network, no shared cache, no CUDA test without a device."""

import os
from pathlib import Path

import pytest

import swamla

os.environ["PYTHONPATH"] = str(Path(swamla.__file__).parents[1])  # subprocesses test this checkout, installed or not
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.pop("COLUMNS", None)  # readline, which pytest imports, sets it for xdist's workers: output would be wrapped
os.environ["SWAMLA_MEASURE"] = "0"  # what a test computes by is not for a race to decide


@pytest.fixture(autouse=True)
def _private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepared data goes to the test's own folder: no test sees what another, or the user, left behind."""
    monkeypatch.setenv("SWAMLA_CACHE", str(tmp_path / "cache"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` skip, and say why, on machines without CUDA."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and this machine has none"))
