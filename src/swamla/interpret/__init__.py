"""Why a model says what it says: traces, and measures of what its layers and heads do."""

from typing import TYPE_CHECKING

from swamla.exports import lazy_exports

if TYPE_CHECKING:
    from swamla.interpret.ablation import ablated as ablated
    from swamla.interpret.ablation import cut_effects as cut_effects
    from swamla.interpret.attributing import attribution as attribution
    from swamla.interpret.attributing import copying as copying
    from swamla.interpret.context import behavioural_context as behavioural_context
    from swamla.interpret.context import in_context as in_context
    from swamla.interpret.context import loss_by_position as loss_by_position
    from swamla.interpret.explaining import Subject as Subject
    from swamla.interpret.explaining import explained as explained
    from swamla.interpret.lens import logit_lens as logit_lens
    from swamla.interpret.patterns import edge_scores as edge_scores
    from swamla.interpret.patterns import edges_between as edges_between
    from swamla.interpret.patterns import head_patterns as head_patterns
    from swamla.interpret.repeats import Repeats as Repeats
    from swamla.interpret.repeats import induction as induction
    from swamla.interpret.repeats import repeated_rows as repeated_rows
    from swamla.interpret.routing import load_by_class as load_by_class
    from swamla.interpret.sections import Explained as Explained
    from swamla.interpret.tracing import Trace as Trace
    from swamla.interpret.tracing import logits_without as logits_without
    from swamla.interpret.tracing import trace as trace
    from swamla.interpret.tracing import walk as walk
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
