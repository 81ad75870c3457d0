"""Held-out loss, perplexity and bits per byte; recall in tasks."""

from typing import TYPE_CHECKING

from swamla.exports import lazy_exports

if TYPE_CHECKING:
    from swamla.evaluate.held_out import Answers as Answers
    from swamla.evaluate.held_out import Evaluation as Evaluation
    from swamla.evaluate.held_out import bytes_apart as bytes_apart
    from swamla.evaluate.held_out import evaluate as evaluate
    from swamla.evaluate.held_out import evaluate_answers as evaluate_answers
    from swamla.evaluate.held_out import evaluate_split as evaluate_split
    from swamla.evaluate.held_out import part_of as part_of
    from swamla.evaluate.held_out import validation as validation
    from swamla.evaluate.recall_grid import Recall as Recall
    from swamla.evaluate.recall_grid import recall as recall
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
