"""The toys of tests/plugins are registered here: a config in transformers' form names its parts by kind."""

from collections.abc import Iterator

import pytest

from tests.toys import registered


@pytest.fixture(autouse=True)
def _toys() -> Iterator[None]:
    with registered():
        yield
