"""Synthetic tasks that ask one thing of a model: recall, copying, counting brackets, tracking a state.

    from swamla.tasks import examples, parse
    task = parse("mqar?pairs=8&length=64")
    rows = examples(task, seed=0, indices=range(32))          # rows.tokens_BT, rows.labels_BT

A row is a pure function of the task, a seed and an index, and labels stand only where the answer can be derived.
"""

from typing import TYPE_CHECKING

from swamla.exports import lazy_exports

if TYPE_CHECKING:
    from swamla.tasks.task import HELD_OUT as HELD_OUT
    from swamla.tasks.task import IGNORED as IGNORED
    from swamla.tasks.task import PREFIX as PREFIX
    from swamla.tasks.task import RULES as RULES
    from swamla.tasks.task import Draws as Draws
    from swamla.tasks.task import Example as Example
    from swamla.tasks.task import Examples as Examples
    from swamla.tasks.task import Task as Task
    from swamla.tasks.task import examples as examples
    from swamla.tasks.task import is_held_out as is_held_out
    from swamla.tasks.task import parse as parse
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
