"""One tiny dataset for all tests of training."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from swamla.data.dataset import Dataset
from tests.toys import registered

from .helpers import tiny_dataset
from .hub_stub import CANARY, Hub, serving


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Dataset:
    """Prepared once."""
    return tiny_dataset(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def toys() -> Iterator[None]:
    """A resumed run reads its config.json: the toys' kinds have to be known, as with --plugin."""
    with registered():
        yield


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that the client, here and in other processes, takes for the real one; the token is a canary."""
    constants = pytest.importorskip("huggingface_hub.constants")
    with serving(Hub()) as found:
        for name, value in {
            "HF_ENDPOINT": found.url,
            "HF_TOKEN": CANARY,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",  # whose protocol is spoken by a closed library
        }.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        template = f"{found.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield found
