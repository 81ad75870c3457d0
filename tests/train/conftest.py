"""One tiny dataset for all tests of training."""

import pytest

from swamla.data.dataset import Dataset

from .helpers import tiny_dataset


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Dataset:
    """Prepared once."""
    return tiny_dataset(tmp_path_factory.mktemp("tiny"))
