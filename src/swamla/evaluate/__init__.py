"""How well a model predicts text it never saw."""

from swamla.evaluate.held_out import Evaluation, bytes_apart, evaluate, evaluate_split

__all__ = ["Evaluation", "bytes_apart", "evaluate", "evaluate_split"]
