"""What measures say, in words. The rules are plain thresholds, the same in docs/explain.md."""

import math
from collections.abc import Sequence

from swamla.interpret.context import InContext
from swamla.interpret.repeats import LayerInduction, Repeats
from swamla.interpret.sections import Lens, Needed, Patterns, Positions, Routing, Verdict, Worth

ACCURACY = 0.5  # from here a model copies
HIT = 0.3  # from here a head looks where induction looks
CUT, CONTROL = 0.5, 0.1  # nats that the edges are worth at least, and the share of it that other edges may be worth
NO_ACCURACY = 0.1  # below, and where no head does it, nothing is copied
GUESSING = 2.0  # times the accuracy of a guess among a row's ids: nothing is copied below that either
MATTERS = 0.05  # nats: from here a mixer matters, and the layers gain something
LEARNED = -0.1  # nats: from here the loss falls within a document
ERRORS = 2.0  # standard errors by which a mean must be away from 0, or above LEARNED
MOST = 0.5  # of a head's |weights|: it is called after what has as much
NEAR = 0.1  # share of the loss's whole fall that may be missing where a prediction "is there"
APART, SOMEWHAT = 0.3, 0.1  # share of a router's choices that depend on the token's class


def verdicts(
    mixers: Sequence[str],
    *,
    repeats: Repeats,
    worth: Worth | None,
    patterns: Patterns | None,
    lens: Lens | None,
    positions: Positions | None,
    learned: InContext | None,
    needed: Needed | None,
    routing: Routing | None,
) -> tuple[Verdict, ...]:
    """The verdict on each question that was measured, in the page's order. mixers: the layers' kinds."""
    found = [induction_verdict(repeats)]
    if worth is not None:
        found.append(worth_verdict(worth, mixers))
    if patterns is not None:
        found.append(patterns_verdict(patterns))
    if lens is not None:
        found.append(lens_verdict(lens))
    if learned is not None:
        found.append(learned_verdict(learned))
    if needed is not None:
        found.append(needed_verdict(needed))
    if routing is not None:
        found.append(routing_verdict(routing))
    return tuple(found)


def inducing_heads(repeats: Repeats) -> list[tuple[int, int]]:
    """(layer, head) where hit rate and cut agree: it looks where induction looks, and the layer's edges are needed.

    Where values mix several tokens by a convolution, a hit is one on any of them, and the cut is that of all their
    edges. With copies of another length the head must look there, too.
    """
    found = []
    for index, layer in enumerate(repeats.layers):
        rates = [_looking(layer)] + ([] if repeats.other is None else [repeats.other.hit_conv[index]])
        if layer.cut_conv >= CUT and abs(layer.control) <= CONTROL * layer.cut_conv:
            found += [(index, head) for head, hits in enumerate(zip(*rates, strict=True)) if min(hits) >= HIT]
    return found


def _looking(layer: LayerInduction) -> Sequence[float]:
    """How often each head looks where induction looks; in results that have no such rate of convolved values, the
    share of |weight| there.
    """
    if layer.hit_conv:
        return layer.hit_conv
    return [max(each) for each in zip(layer.hit, layer.induction_conv, strict=True)] if layer.conv > 1 else layer.hit


def induction_verdict(repeats: Repeats) -> Verdict:
    """Whether the model copies what followed before, and which heads do it: only where the three measures agree.

    With copies of either length, where two were measured; unsettled where an interval of the accuracy has a threshold
    within.
    """
    question, heads = "Does it do induction?", inducing_heads(repeats)
    parts = [repeats] + ([] if repeats.other is None else [repeats.other])
    ends = [each.interval or (each.accuracy, each.accuracy) for each in parts]
    floors = [max(NO_ACCURACY, GUESSING * each.chance) for each in parts]
    copies = _surely([low >= ACCURACY for low, _ in ends], [high < ACCURACY for _, high in ends])
    nothing = _surely(
        [high < floor for (_, high), floor in zip(ends, floors, strict=True)],
        [low >= floor for (low, _), floor in zip(ends, floors, strict=True)],
    )
    losses = f"second copy {repeats.second_loss:.2f} against {repeats.first_loss:.2f} nats"
    figures = f"{_accuracy_in_words(repeats)}, {losses}"
    who = _heads_in_words(repeats, heads) or "No head's hit rate and cut agree, so none is said to do it."
    if nothing and not heads:
        return Verdict(question=question, answer="no", short="no", text=f"No induction: {figures}.")
    if copies and heads:
        return Verdict(question=question, answer="yes", short="yes", text=f"Induction: {figures}. {who}")
    if (copies if heads else nothing) is None:
        text = f"Unsettled, too few rows to tell: {figures}. {who}"
        return Verdict(question=question, answer="partly", short="unsettled", text=text)
    one_only = any(low >= ACCURACY for low, _ in ends) and any(high < ACCURACY for _, high in ends)
    what = "With copies of one length only" if one_only else "It copies" if copies else "In part"
    return Verdict(question=question, answer="partly", short="partly", text=f"{what}: {figures}. {who}")


def _surely(all_of: Sequence[bool], any_of: Sequence[bool]) -> bool | None:
    """True where each holds, False where one surely does not, None where it cannot be told."""
    return True if all(all_of) else False if any(any_of) else None


def _accuracy_in_words(repeats: Repeats) -> str:
    text = f"accuracy {_share(repeats.accuracy)}"
    if repeats.interval is not None:
        low, high = map(_bound, repeats.interval)
        text += f" (95 % interval {low} to {high}, over {_count(repeats.predictions, 'prediction')})"
    if repeats.other is not None:
        low, high = map(_bound, repeats.other.interval)
        text += f", {_share(repeats.other.accuracy)} ({low} to {high}) with copies of {repeats.other.length} tokens"
    return text


def _heads_in_words(repeats: Repeats, heads: Sequence[tuple[int, int]]) -> str:
    parts = []
    for index in sorted({layer for layer, _ in heads}):
        layer = repeats.layers[index]
        own = [head for found, head in heads if found == index]
        hits = ", ".join(_share(layer.hit[head]) for head in own)
        if layer.conv > 1:
            looking = _looking(layer)
            hits += f"; on the {layer.conv} tokens of a value {', '.join(_share(looking[head]) for head in own)}"
        parts.append(
            f"layer {index}, head{'s' * (len(own) > 1)} {', '.join(map(str, own))} (hit {hits}; without its induction "
            f"edges +{layer.cut_conv:.2f} nats, without as many others {_signed(layer.control)})"
        )
    return f"Hit rate and cut agree in {'; '.join(parts)}." if parts else ""


def _bound(share: float) -> str:
    """A bound of an interval, with digits enough near 0 and 1, where a rounded one would say that it is certain."""
    if 0 < share < 0.005:
        return f"{share:.1g}".removeprefix("0")
    if 0.995 <= share < 1:
        return f"{min(share, 0.9999):.4f}".removeprefix("0")
    return _share(share)


def _share(value: float) -> str:
    return "0" if round(value, 2) == 0 else f"{value:.2f}".removeprefix("0") if value < 0.995 else "1"


def worth_verdict(worth: Worth, mixers: Sequence[str]) -> Verdict:
    """Which mixer, which FFN and which head the loss owes most to."""
    mixer = max(range(len(mixers)), key=lambda index: worth.layers[index].mixer)
    ffn = max(range(len(mixers)), key=lambda index: worth.layers[index].ffn)
    heads = {(index, head): rise for index, layer in enumerate(worth.layers) for head, rise in enumerate(layer.heads)}
    (layer, head), rise = max(heads.items(), key=lambda each: each[1])
    text = (
        f"Without the mixer of layer {mixer} the loss of {worth.loss:.2f} nats changes by "
        f"{_signed(worth.layers[mixer].mixer)}, without the FFN of layer {ffn} by {_signed(worth.layers[ffn].ffn)}, "
        f"without one head by {_signed(rise)} at most (layer {layer}, head {head})."
    )
    question = "Which mixer matters most?"
    if worth.layers[mixer].mixer < MATTERS:
        return Verdict(question=question, answer="no", short="none does", text=text)
    return Verdict(question=question, answer="figure", short=f"layer {mixer}, {mixers[mixer]}", text=text)


def patterns_verdict(patterns: Patterns) -> Verdict:
    """How many heads have most of their weight on the document's first token, and on the previous one; how far they
    see.
    """
    heads = [
        (sink, previous, context)
        for layer in patterns.layers
        for sink, previous, context in zip(layer.sink, layer.previous, layer.effective_context, strict=True)
    ]
    sinks, previous = (sum(head[which] >= MOST for head in heads) for which in (0, 1))
    contexts = sorted(head[2] for head in heads)
    middle = contexts[len(contexts) // 2]
    text = (
        f"Of {len(heads)} heads {sinks} have most of their |weight| on the document's first token and {previous} on "
        f"the previous token. Nine tenths of what is not on the first lie within {contexts[0]} to {contexts[-1]} "
        f"tokens, in the median head {middle}, of rows of {patterns.length}."
    )
    return Verdict(
        question="Where do heads look?", answer="figure", short=f"within {_count(middle, 'token')}", text=text
    )


def lens_verdict(lens: Lens) -> Verdict:
    """Behind which layer the prediction is there: nine tenths of the loss's fall, if it falls at all."""
    question, first, final = "Where is the prediction made?", lens.loss[0], lens.loss[-1]
    figures = f"Read by the head at once, the embeddings give {first:.2f} nats, the last layer {final:.2f}"
    if final > first - MATTERS:
        return Verdict(
            question=question, answer="no", short="nowhere", text=f"{figures}: the layers gain next to nothing."
        )
    there = next(index for index, loss in enumerate(lens.loss) if loss - final <= NEAR * (first - final))
    text = f"{figures}; nine tenths of the way are done behind layer {there - 1} of 0 to {len(lens.loss) - 2}."
    return Verdict(question=question, answer="figure", short=f"layer {there - 1}", text=text)


def learned_verdict(learned: InContext) -> Verdict:
    """Whether the loss falls within a document, by more than chance."""
    known = math.isfinite(learned.error)
    spread = f" (± {learned.error:.2f}, one standard error)" if known else ""
    late, early = (f"{max(1, end - learned.span + 1)}–{end}" for end in (learned.late, learned.early))
    text = (
        f"The loss of tokens {late} minus that of tokens {early} is {_signed(learned.score)} nats{spread}, over "
        f"{_count(learned.documents, 'row')}"
    )
    if learned.texts < learned.documents:
        alone = ", taken as independent" if learned.texts == 1 else ""
        text += f" of {_count(learned.texts, 'text')}{alone}"
    if learned.late < learned.asked:
        text += f"; there are no rows of {learned.asked}"
    question = "Does it learn in context?"
    if known and learned.score <= LEARNED and learned.score <= -ERRORS * learned.error:
        return Verdict(question=question, answer="yes", short="yes", text=f"{text}.")
    if known and learned.score - ERRORS * learned.error > LEARNED:
        return Verdict(question=question, answer="no", short="no", text=f"{text}.")
    return Verdict(question=question, answer="partly", short="unsettled", text=f"{text}: too few to tell.")


def needed_verdict(needed: Needed) -> Verdict:
    """How many last tokens are as good as all, if the difference is known as well as that."""
    found = needed.found
    if found.tokens >= found.longest:
        text = f"Fewer than all {found.longest} tokens cost {found.within} nats or more"
    else:
        last = _count(found.tokens, "token")
        text = f"With the last {last} only, the loss is within {found.within} nats of that with all {found.longest}"
    question, short = "How much context does it need?", _count(found.tokens, "token")
    known = math.isfinite(found.error)
    error = f"± {found.error:.1g}, one standard error" if known else "of a single row, so without an error"
    text += f" (the difference {error}; {found.loss:.2f} nats, over {_count(needed.predictions, 'prediction')})"
    if known and found.error <= found.within:
        return Verdict(question=question, answer="figure", short=short, text=f"{text}.")
    return Verdict(question=question, answer="partly", short="unsettled", text=f"{text}: too few to tell.")


def routing_verdict(routing: Routing) -> Verdict:
    """Whether routers send classes of tokens to experts of their own."""
    found = {layer.layer: apart(layer.share, layer.tokens) for layer in routing.layers}
    layer, most = max(found.items(), key=lambda each: each[1])
    chance = max(apart_by_chance(each.share, each.tokens) for each in routing.layers if each.layer == layer)
    text = (
        f"{most:.0%} of the choices of layer {layer} depend on the token's class, {min(found.values()):.0%} where "
        f"least; so few tokens would give about {chance:.0%} by chance, which is left out of the answer."
    )
    question = "Do experts specialise?"
    most -= chance
    if most >= APART:
        return Verdict(question=question, answer="yes", short="yes", text=text)
    if most >= SOMEWHAT:
        return Verdict(question=question, answer="partly", short="somewhat", text=text)
    return Verdict(question=question, answer="no", short="no", text=text)


def apart(shares: Sequence[Sequence[float]], tokens: Sequence[int]) -> float:
    """What part of a router's choices depends on the token's class, in [0, 1).

    ½ Σ_e |share_ce − share_e|, mean over the classes c by their tokens; share_e is that of all tokens.
    """
    count = sum(tokens)
    by_expert = list(zip(*shares, strict=True))
    mean = [sum(share * n for share, n in zip(row, tokens, strict=True)) / count for row in by_expert]
    apart_of = [sum(abs(a - b) for a, b in zip(share, mean, strict=True)) / 2 for share in shares]
    return sum(each * n for each, n in zip(apart_of, tokens, strict=True)) / count


def apart_by_chance(shares: Sequence[Sequence[float]], tokens: Sequence[int]) -> float:
    """About what `apart` is of a router that treats all classes alike, for want of tokens.

    A share p of n choices deviates by √(2 p (1 − p) / (π n)) in the mean, as a normal variable of that variance. Each
    token counts as one choice: several make chance smaller.
    """
    count = sum(tokens)
    mean = [sum(s * n for s, n in zip(each, tokens, strict=True)) / count for each in zip(*shares, strict=True)]
    deviation = sum(math.sqrt(2 * p * (1 - p) / math.pi) for p in mean) / 2
    return sum(n / count * deviation / math.sqrt(n) for n in tokens if n)


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−").replace("−0.00", "+0.00")


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"
