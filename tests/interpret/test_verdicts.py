"""Verdicts are plain rules on figures, which they name."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from swamla.interpret import explaining
from swamla.interpret import verdicts as rules
from swamla.interpret.context import BehaviouralContext, InContext
from swamla.interpret.patterns import HeadPatterns
from swamla.interpret.repeats import LayerInduction, Period, Repeats
from swamla.interpret.routing import ClassLoad
from swamla.interpret.sections import Lens, Needed, Patterns, Routing
from swamla.interpret.verdicts import (
    apart,
    apart_by_chance,
    inducing_heads,
    induction_verdict,
    learned_verdict,
    lens_verdict,
    needed_verdict,
    patterns_verdict,
    routing_verdict,
)

LAYER = LayerInduction(
    previous=(0.1, 0.2),
    duplicate=(0.0, 0.0),
    induction=(0.8, 0.0),
    induction_conv=(0.8, 0.0),
    hit=(0.9, 0.0),
    attribution=(0.7, 0.0),
    conv=1,
    cut=2.0,
    cut_conv=2.0,
    control=0.01,
    hit_conv=(0.9, 0.0),
)
REPEATS = Repeats(
    accuracy=0.8,
    chance=0.02,
    first_loss=9.0,
    second_loss=2.0,
    layers=(replace(LAYER, hit=(0.0, 0.0), hit_conv=(0.0, 0.0)), LAYER),
)
SHORTER = Period(
    length=34, accuracy=0.7, chance=0.03, predictions=330, interval=(0.65, 0.75), hit_conv=((0.0, 0.0), (0.8, 0.0))
)


@pytest.mark.parametrize(
    ("share", "told"),
    [(0.0, "0"), (0.0012, ".001"), (0.00004, "4e-05"), (0.04, ".04"), (0.99, ".99"), (0.9988, ".9988"), (1.0, "1")],
)
def test_a_bound_of_an_interval_is_0_or_1_only_where_it_is(share: float, told: str) -> None:
    assert rules._bound(share) == told
    assert rules._bound(0.99999) == ".9999"


def test_a_head_does_induction_where_accuracy_hit_rate_and_cut_agree() -> None:
    found = induction_verdict(REPEATS)
    assert (found.answer, inducing_heads(REPEATS)) == ("yes", [(1, 0)])
    assert found.text == (
        "Induction: accuracy .80, second copy 2.00 against 9.00 nats. Hit rate and cut agree in layer 1, head 0 (hit "
        ".90; without its induction edges +2.00 nats, without as many others +0.01)."
    )


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        ({"hit": (0.1, 0.0), "hit_conv": (0.1, 0.0)}, "partly"),
        ({"cut_conv": 0.1}, "partly"),
        ({"control": 0.5}, "partly"),
        ({"hit": (0.1, 0.0), "conv": 4}, "yes"),  # of convolved values a hit on any of their tokens counts
        ({"hit": (0.1, 0.0), "conv": 4, "hit_conv": (0.1, 0.1)}, "partly"),  # however much |weight| is there
        ({"hit": (0.1, 0.0), "conv": 4, "hit_conv": ()}, "yes"),  # of older results, which have the share alone
        ({"hit": (0.1, 0.0), "conv": 4, "hit_conv": (), "induction_conv": (0.1, 0.1)}, "partly"),
        ({"hit": (0.1, 0.0), "hit_conv": ()}, "partly"),
    ],
)
def test_a_model_that_copies_has_such_a_head_only_where_its_measures_agree(change: dict, answer: str) -> None:
    found = induction_verdict(replace(REPEATS, layers=(replace(LAYER, **change),)))
    assert found.answer == answer
    assert ("none is said to do it" in found.text) == (answer == "partly")


def test_a_low_accuracy_is_no_induction_whatever_attribution_and_cut_say() -> None:
    """A layer of latent attention had an attribution of .31 and a cut of 1.3 nats at an accuracy of .10."""
    layers = (replace(LAYER, hit=(0.2, 0.1), hit_conv=(0.2, 0.1), cut=1.3, cut_conv=1.3),)
    found = induction_verdict(replace(REPEATS, accuracy=0.0, first_loss=9.65, second_loss=9.53, layers=layers))
    assert (found.answer, found.text) == ("no", "No induction: accuracy 0, second copy 9.53 against 9.65 nats.")
    assert induction_verdict(replace(REPEATS, accuracy=0.1, layers=layers)).answer == "partly"
    assert induction_verdict(replace(REPEATS, accuracy=0.05)).answer == "partly"  # a head does it, but does not suffice


def test_an_accuracy_that_guessing_among_a_few_ids_reaches_too_is_no_induction() -> None:
    """A model of nine ids that was never taught to copy had an accuracy of .11."""
    few = replace(REPEATS, accuracy=0.11, layers=(replace(LAYER, hit=(0.0, 0.0), hit_conv=(0.0, 0.0)),))
    assert induction_verdict(few).answer == "partly"
    assert induction_verdict(replace(few, chance=0.125)).answer == "no"


@pytest.mark.parametrize(
    ("accuracy", "interval", "heads", "short"),
    [
        (0.8, (0.7, 0.9), True, "yes"),
        (0.6, (0.4, 0.8), True, "unsettled"),
        (0.4, (0.2, 0.6), True, "unsettled"),
        (0.4, (0.3, 0.49), True, "partly"),
        (0.0, (0.0, 0.05), False, "no"),
        (0.05, (0.01, 0.2), False, "unsettled"),
        (0.15, (0.07, 0.3), False, "unsettled"),
        (0.2, (0.12, 0.3), False, "partly"),
        (0.6, (0.4, 0.8), False, "partly"),  # whatever it is, it is no induction and copies something
    ],
)
def test_an_answer_whose_interval_crosses_its_threshold_is_unsettled(
    accuracy: float, interval: tuple[float, float], heads: bool, short: str
) -> None:
    layers = REPEATS.layers if heads else REPEATS.layers[:1]
    found = induction_verdict(
        replace(REPEATS, accuracy=accuracy, interval=interval, predictions=98, layers=layers, second_loss=8.0)
    )
    assert found.short == short
    assert found.answer == ("partly" if short == "unsettled" else short)
    low, high = (rules._share(end) for end in interval)
    assert f"(95 % interval {low} to {high}, over 98 predictions)" in found.text
    assert found.text.startswith("Unsettled, too few rows to tell: ") == (short == "unsettled")


def test_a_model_that_copies_by_position_copies_at_one_length_only_and_does_no_induction() -> None:
    """Where rows of training repeat at one distance, a head may look as far back as that, whatever stands there."""
    both = replace(REPEATS, other=SHORTER)
    assert (induction_verdict(both).answer, inducing_heads(both)) == ("yes", [(1, 0)])
    assert "accuracy .80, .70 (.65 to .75) with copies of 34 tokens, second copy" in induction_verdict(both).text
    other = replace(SHORTER, accuracy=0.02, interval=(0.01, 0.05), hit_conv=((0.0, 0.0), (0.0, 0.0)))
    found = induction_verdict(replace(REPEATS, other=other))
    assert (found.answer, inducing_heads(replace(REPEATS, other=other))) == ("partly", [])
    assert found.text.startswith("With copies of one length only: accuracy .80, .02 (.01 to .05) with copies of 34")
    elsewhere = replace(SHORTER, hit_conv=((0.9, 0.0), (0.0, 0.9)))
    assert induction_verdict(replace(REPEATS, other=elsewhere)).answer == "partly"


IN_CONTEXT = InContext(score=-0.4, error=0.1, early=50, late=500, asked=500, span=25, documents=64, texts=64)


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        ({}, "yes"),
        ({"error": 0.3}, "partly"),
        ({"error": math.nan}, "partly"),
        ({"score": -0.05, "error": 0.01}, "no"),
        ({"score": -0.05, "error": 0.1}, "partly"),
        ({"score": 0.3}, "no"),
    ],
)
def test_in_context_learning_is_a_fall_of_a_tenth_of_a_nat_that_is_no_chance(change: dict, answer: str) -> None:
    found = learned_verdict(replace(IN_CONTEXT, **change))
    assert found.answer == answer
    assert ("too few to tell" in found.text) == (answer == "partly")
    assert "tokens 476–500 minus that of tokens 26–50" in found.text
    assert "no rows of 500" in learned_verdict(replace(IN_CONTEXT, late=127)).text


def test_the_prediction_is_there_behind_the_first_layer_with_nine_tenths_of_the_fall() -> None:
    assert lens_verdict(Lens(tokens=9, loss=(9.0, 5.0, 3.5, 3.0))).short == "layer 1"
    assert lens_verdict(Lens(tokens=9, loss=(9.0, 5.0, 3.7, 3.0))).short == "layer 2"
    assert lens_verdict(Lens(tokens=9, loss=(3.0, 2.9, 3.1))).short == "nowhere"
    assert lens_verdict(Lens(tokens=9, loss=(3.0, 2.98, 2.97))).short == "nowhere"  # next to no fall to share out


def test_heads_are_counted_by_what_has_half_of_their_weight() -> None:
    layer = HeadPatterns(previous=(0.6, 0.1), sink=(0.1, 0.5), entropy=(0.1, 0.1), effective_context=(3, 90))
    layers = (layer, replace(layer, effective_context=(7, 40)))
    text = patterns_verdict(Patterns(tokens=9, length=128, layers=layers)).text
    assert "Of 4 heads 2 have most of their |weight| on the document's first token and 2 on the previous" in text
    assert "within 3 to 90 tokens, in the median head 40" in text


def test_a_context_that_is_never_enough_is_told_as_all_of_it() -> None:
    found = BehaviouralContext(tokens=12, losses={12: 3.0}, loss=3.0, error=0.003, within=0.01, longest=100)
    text = needed_verdict(Needed(predictions=8, found=found)).text
    assert text == (
        "With the last 12 tokens only, the loss is within 0.01 nats of that with all 100 (the difference ± 0.003, one "
        "standard error; 3.00 nats, over 8 predictions)."
    )
    whole = Needed(predictions=8, found=replace(found, tokens=100))
    assert "Fewer than all 100 tokens cost" in needed_verdict(whole).text


@pytest.mark.parametrize(("error", "short"), [(0.009, "12 tokens"), (0.011, "unsettled"), (math.nan, "unsettled")])
def test_a_needed_context_is_unsettled_where_the_difference_is_not_known_as_well_as_it_must_be(error, short) -> None:
    found = BehaviouralContext(tokens=12, losses={12: 3.0}, loss=3.0, error=error, within=0.01, longest=100)
    verdict = needed_verdict(Needed(predictions=8, found=found))
    assert (verdict.short, "too few to tell" in verdict.text) == (short, short == "unsettled")
    told = "a single row, so without an error" if math.isnan(error) else f"± {error:.1g}, one standard error"
    assert told in verdict.text


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        (64, "over 64 rows."),
        (5, "over 64 rows of 5 texts."),
        (1, "over 64 rows of 1 text, taken as independent."),
    ],
)
def test_an_error_says_of_how_many_texts_its_rows_are_pieces(texts: int, told: str) -> None:
    assert learned_verdict(replace(IN_CONTEXT, texts=texts)).text.endswith(told)


def test_routers_that_treat_classes_alike_are_not_apart_and_those_that_split_them_are() -> None:
    alike, split = ((0.5, 0.5), (0.5, 0.5)), ((1.0, 0.0), (0.0, 1.0))
    assert apart(alike, (3, 9)) == 0
    assert apart(split, (5, 5)) == pytest.approx(0.5)
    # Mean shares are (.25, .75): three tokens are .75 away from them, nine .25.
    assert apart(split, (3, 9)) == pytest.approx((3 * 0.75 + 9 * 0.25) / 12)
    for share, answer in ((alike, "no"), (split, "yes"), (((0.7, 0.3), (0.4, 0.6)), "partly")):
        layers = (ClassLoad(layer=2, share=share, tokens=(500, 500)),)
        found = routing_verdict(Routing(tokens=1000, classes=("a", "b"), layers=layers))
        assert found.answer == answer


def test_the_guide_has_these_rules() -> None:
    """Each threshold stands in docs/explain.md as the code has it."""
    page = (Path(__file__).parents[2] / "docs" / "explain.md").read_text(encoding="utf-8")
    share = "{:g}".format
    for told in (
        f"accuracy on the second copy ≥ {share(rules.ACCURACY)[1:]}",
        f"whose hit rate is ≥ {share(rules.HIT)[1:]}",
        f"whose cut is ≥ {rules.CUT} nats",
        f"accuracy < {share(rules.NO_ACCURACY)[1:]} and no such head",
        f"< {rules.GUESSING:g} times that of a guess",
        f"falls by less than {rules.MATTERS} nats",
        f"*none* below {rules.MATTERS} nats",
        f"at least {-rules.LEARNED} nats",
        f"from {share(rules.APART)[1:]} of a router's choices",
        f"from {share(rules.SOMEWHAT)[1:]} *somewhat*",
        f"within {explaining.WITHIN} nats",
        f"up to token {explaining.LATE} is",
        f"that up to token {explaining.EARLY} ({explaining.EARLY // 2} tokens each)",
        f"up to {explaining.LONG} tokens",
    ):
        assert told in page
    assert (rules.CONTROL, rules.MOST, rules.NEAR, rules.ERRORS) == (0.1, 0.5, 0.1, 2)
    for told in ("at most a tenth", "from half of its", "nine tenths of the fall", "two standard errors"):
        assert told in page


def test_a_router_that_chooses_at_random_does_not_specialise_however_few_tokens_there_are() -> None:
    """A class of 85 tokens and 128 experts: .44 of its choices are others than those of all tokens, by chance."""
    generator = torch.Generator().manual_seed(0)
    for experts in (8, 64, 128):
        chosen_CN = torch.randint(experts, (6, 85), generator=generator)
        shares = [(torch.bincount(row_N, minlength=experts) / 85).tolist() for row_N in chosen_CN]
        assert apart_by_chance(shares, (85,) * 6) == pytest.approx(apart(shares, (85,) * 6), rel=0.25)
        load = ClassLoad(layer=0, share=tuple(map(tuple, shares)), tokens=(85,) * 6)
        routing = Routing(tokens=510, classes=tuple("abcdef"), layers=(load,))
        assert routing_verdict(routing).answer == "no"
