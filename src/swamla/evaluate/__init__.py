"""How well a model predicts text it never saw."""

from swamla.evaluate.held_out import Evaluation, evaluate, evaluate_split

__all__ = ["Evaluation", "evaluate", "evaluate_split"]
