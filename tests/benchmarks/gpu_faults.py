"""Rows that go wrong, each in its way; their processes need not load torch."""

import os
import sys
import time
from collections.abc import Iterator

from benchmarks.gpu_running import Figures, Place, Row
from swamla.errors import MissingBackendError


def fine(place: Place) -> Iterator[Figures]:
    yield {"median_s": 1.0}


def raises(place: Place) -> Iterator[Figures]:
    yield {"median_s": 1.0}
    raise RuntimeError("many lines,\nthe last of which\nsays what happened\n")


def hangs(place: Place) -> Iterator[Figures]:
    yield {"median_s": 1.0}
    time.sleep(60)


def dies(place: Place) -> Iterator[Figures]:
    print("the device is gone", file=sys.stderr)
    os.abort()
    yield {}


def lacks(place: Place) -> Iterator[Figures]:
    raise MissingBackendError("needs what is not there: pip install it")
    yield {}


def wrong(place: Place) -> Iterator[Figures]:
    yield {"output_error": float("nan"), "passed": 0}


def uses_it(place: Place) -> Iterator[Figures]:
    yield {"median_s": 1.0, "uses": ["attention/flex", "delta rule/torch"]}


FAULTY = tuple(
    Row(name=name, table="training", run=run, needs=0.0, limit=0.4)
    for name, run in {"raises": raises, "hangs": hangs, "dies": dies, "lacks": lacks, "fine": fine}.items()
)
GATED = (
    Row(name="gate", table="gates", run=wrong, needs=0.0, vouches=("attention/flex",)),
    Row(name="timed", table="training", run=uses_it, needs=0.0),
)
