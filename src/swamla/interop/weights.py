"""How one weight of ours is made of weights of another program, and back: `Rule`, and the kinds that occur."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One of our weights, and those of theirs that it is made of.

    ours: its name.  theirs: their names, none for a constant that they do not store.
    join: theirs → ours.  split: ours → theirs. Each undoes the other.
    cut_anywhere: their files cut the rows elsewhere, too, than `split` does; `join` puts them together all the same.
    """

    ours: str
    theirs: tuple[str, ...]
    join: Callable[[Sequence[Tensor]], Tensor]
    split: Callable[[Tensor], Sequence[Tensor]]
    cut_anywhere: bool = False


def same(ours: str, theirs: str) -> Rule:
    """The same tensor under another name."""
    return Rule(ours=ours, theirs=(theirs,), join=lambda found: found[0], split=lambda own: (own,))


def transposed(ours: str, theirs: str) -> Rule:
    """A matrix that they store transposed."""
    return Rule(ours=ours, theirs=(theirs,), join=lambda found: found[0].T, split=lambda own: (own.T,))


def shifted(ours: str, theirs: str, index: Sequence[int] | None = None) -> Rule:
    """A gain that they store less 1; element i of ours is element index[i] of theirs.

    Ours is in fp32 at least, because 1 + w in 16 bits loses what w holds.
    """
    order = slice(None) if index is None else torch.as_tensor(index)
    back = order if isinstance(order, slice) else order.argsort()
    return Rule(
        ours=ours,
        theirs=(theirs,),
        join=lambda found: found[0][order].to(torch.promote_types(found[0].dtype, torch.float32)) + 1,
        split=lambda own: ((own - 1)[back],),
    )


def scaled(ours: str, theirs: str, factor: float) -> Rule:
    """Theirs is ours times a factor. Ours is in fp32 at least unless that is exact: by a power of two."""
    exact = math.frexp(factor)[0] == 0.5

    def join(found: Sequence[Tensor]) -> Tensor:
        dtype = found[0].dtype
        return found[0].to(dtype if exact else torch.promote_types(dtype, torch.float32)) / factor

    return Rule(ours=ours, theirs=(theirs,), join=join, split=lambda own: (own * factor,))


def rows(ours: str, theirs: Mapping[str, int]) -> Rule:
    """A fused matrix (or bias): the rows of theirs, one after the other. theirs: name → number of rows."""
    sizes = list(theirs.values())
    return Rule(
        ours=ours,
        theirs=tuple(theirs),
        join=lambda found: torch.cat(tuple(found)),
        split=lambda own: own.split(sizes),
    )


def gathered(ours: str, theirs: Mapping[str, int], index: Sequence[int]) -> Rule:
    """Row i of ours is row index[i] of theirs, one after the other; rows that ours has not are 0 in theirs.

    theirs: name → number of rows.
    """
    sizes, order = list(theirs.values()), torch.as_tensor(index)

    def split(own: Tensor) -> Sequence[Tensor]:
        whole = own.new_zeros(sum(sizes), *own.shape[1:])
        return whole.index_copy(0, order.to(own.device), own).split(sizes)

    return Rule(ours=ours, theirs=tuple(theirs), join=lambda found: torch.cat(tuple(found))[order], split=split)


def reshaped(ours: str, theirs: str, own: Sequence[int], their: Sequence[int]) -> Rule:
    """The same numbers in another shape."""
    return Rule(
        ours=ours, theirs=(theirs,), join=lambda found: found[0].reshape(*own), split=lambda o: (o.reshape(*their),)
    )


def convolution(ours: str, theirs: Mapping[str, int], taps: int) -> Rule:
    """The filters of a depthwise convolution, (channels, taps) here, (channels, 1, taps) there. theirs: as for `rows`.

    transformers saves them in equal parts, whatever the numbers of channels.
    """
    sizes = list(theirs.values())
    return Rule(
        ours=ours,
        theirs=tuple(theirs),
        join=lambda found: torch.cat(tuple(found)).reshape(-1, taps),
        split=lambda own: own[:, None].split(sizes),
        cut_anywhere=True,
    )


def constant(ours: str, value: Tensor) -> Rule:
    """A weight that they do not store, because it is always `value`; another is not written: `equal_architecture`."""
    return Rule(ours=ours, theirs=(), join=lambda found: value.clone(), split=lambda own: ())


def stacked(ours: str, theirs: Sequence[Sequence[str]]) -> Rule:
    """Experts (E, inputs, outputs): for each expert the matrices (outputs, inputs) that stand side by side in ours."""
    beside = len(theirs[0])

    def join(found: Sequence[Tensor]) -> Tensor:
        experts = [found[first : first + beside] for first in range(0, len(found), beside)]
        return torch.stack([torch.cat(tuple(parts)).T for parts in experts])

    def split(own: Tensor) -> list[Tensor]:
        return [part for expert in own.mT for part in expert.chunk(beside)]

    return Rule(ours=ours, theirs=tuple(name for expert in theirs for name in expert), join=join, split=split)
