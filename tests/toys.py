"""The toys of tests/plugins, each a file as a user would write it: registered for as long as a test needs them.

Files in $SWAMLA_TEST_PLUGINS are registered for good, and the tests of the contract try them: docs/own-parts.md.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from swamla.data.sources import Source
from swamla.model.block import FFNConfig, MixerConfig
from swamla.model.norm import NormConfig
from swamla.plugins import load_plugin
from swamla.registry import Registered, members_of, register
from swamla.tasks import Task
from swamla.train.optim import OptimizerConfig

FILES = sorted((Path(__file__).parent / "plugins").glob("toy_*.py"))
FAMILIES: tuple[type[Registered], ...] = (MixerConfig, FFNConfig, NormConfig, OptimizerConfig, Source, Task)
_CLASSES: list[type[Registered]] = []


def ours(family: type[Registered]) -> Mapping[str, type[Registered]]:
    """The members of a family that the package has itself."""
    return {kind: cls for kind, cls in members_of(family).items() if cls.__module__.startswith("swamla.")}


@contextmanager
def registered() -> Iterator[dict[str, type[Registered]]]:
    """The toys by kind, in their registries while it lasts: other tests find the registries as they are shipped."""
    before = {family: dict(members_of(family)) for family in FAMILIES}
    try:
        if _CLASSES:
            for cls in _CLASSES:
                register(cls)
        else:
            for file in FILES:
                load_plugin(file)
            _CLASSES.extend(
                cls for family in FAMILIES for kind, cls in members_of(family).items() if kind not in before[family]
            )
        yield {cls.kind: cls for cls in _CLASSES}
    finally:
        for family, members in before.items():
            family._members.clear()
            family._members.update(members)


with registered() as _toys:
    TOYS: dict[str, Any] = {**_toys}

for _file in filter(None, os.environ.get("SWAMLA_TEST_PLUGINS", "").split(os.pathsep)):
    load_plugin(Path(_file))


def plugged(family: type[Registered]) -> dict[str, Any]:
    """The examples of a family's members from $SWAMLA_TEST_PLUGINS, by kind."""
    return {kind: cls.example() for kind, cls in members_of(family).items() if not cls.__module__.startswith("swamla.")}
