"""µP, the maximal update parametrization (arXiv 2203.03466, table 8; 2310.17813): how a parameter follows the width.

Hyperparameters that are good at a base width stay good at others. Which dimensions grow with the width is seen from the
same config at the base width. Embeddings, tied or not, and the head keep their learning rate and initial weights.
"""

from collections.abc import Sequence
from typing import NamedTuple

Shape = Sequence[int]


class Fans(NamedTuple):
    """Inputs and outputs of a matrix."""

    inputs: int
    outputs: int


def fans(shape: Shape) -> Fans:
    """Of the matrix of a linear layer, (outputs, inputs), or of experts, (experts, inputs, outputs)."""
    return Fans(shape[1], shape[0]) if len(shape) == 2 else Fans(shape[1], shape[2])


def initial_scale(shape: Shape, base: Shape) -> float:
    """The factor of the standard deviation of a matrix inside the blocks: (1 / √inputs) · min(1, √(outputs / inputs)).

    So that of hidden weights falls as 1 / √inputs, that of a matrix with a fixed number of outputs as 1 / inputs.
    """
    if len(shape) < 2:
        return 1.0
    now, then = (f.inputs**-0.5 * min(1.0, (f.outputs / f.inputs) ** 0.5) for f in (fans(shape), fans(base)))
    return now / then


def adam_multiple(shape: Shape, base: Shape) -> float:
    """The learning rate of a matrix inside the blocks, relative to the base, where every weight moves equally far."""
    return fans(base).inputs / fans(shape).inputs


def muon_multiple(shape: Shape, base: Shape) -> float:
    """The same for Muon, whose updates have the spectral norm 0.2·√max(inputs, outputs).

    The spectral condition (arXiv 2310.17813, condition 1) asks for √(outputs / inputs).
    """
    now, then = ((f.outputs / f.inputs / max(f)) ** 0.5 for f in (fans(shape), fans(base)))
    return now / then
