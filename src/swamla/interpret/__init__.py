"""Why a model says what it says: traces, and measures of what its heads do."""

from typing import TYPE_CHECKING

from swamla.exports import lazy_exports

if TYPE_CHECKING:
    from swamla.interpret.repeats import Repeats as Repeats
    from swamla.interpret.repeats import induction as induction
    from swamla.interpret.tracing import Trace as Trace
    from swamla.interpret.tracing import trace as trace
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
