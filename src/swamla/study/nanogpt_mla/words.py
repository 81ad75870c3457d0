"""What the study found, in words: whether the claim holds, for whom and when, and what that does not say."""

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any, Literal

from swamla.interpret.sections import Verdict
from swamla.interpret.verdicts import ACCURACY
from swamla.study.nanogpt_mla.measured import LEVELS, Rows, best_layer, reads_behind
from swamla.study.nanogpt_mla.plan import MIXERS, REFERENCE
from swamla.study.statistics import t_interval, wilson

LATENT = MIXERS[1:]
Answer = Literal["yes", "partly", "no", "figure"]


def verdicts(data: Mapping[str, Any]) -> list[Verdict]:
    """The answers, the claim first. data: a result without its verdicts."""
    repeats = [each for each in data["experiments"] if each["kind"] == "repeats"]
    grown = [_grown(data, each, mixer) for mixer in LATENT for each in repeats]
    answers = [_claim(data, repeats), *grown, _circuit(data, repeats), *_otherwise(data, repeats)]
    return [*answers, _time(data, repeats), *_on_text(data)]


STATES = {
    "none": "It holds for",
    "all": "It does not hold for",
    "some": "Some seeds only have such heads in",
    "behind": "It holds to the letter only, as the heads that answer read right behind what followed before, for",
    "untold": "It cannot be told, as no run of mha has such heads either, for",
    "alone": "It cannot be told, as no run of mha finished, for",
    "unfinished": "No run finished of",
}


def _state(own: Mapping[str, Any], reference: Mapping[str, Any]) -> str:
    """What is found of a mixer in a budget, one of `STATES`."""
    if not own["seeds"]:
        return "unfinished"
    if own["grown"]:
        return "all" if own["grown"] == len(own["seeds"]) else "some"
    if any(own["late"]):
        return "behind"
    if not reference["seeds"]:
        return "alone"
    return "none" if reference["grown"] else "untold"


def _claim(data: Mapping[str, Any], repeats: Rows) -> Verdict:
    """Whether the fork's claim holds, by the cases in which it can be tested."""
    cases: dict[str, list[str]] = {}
    budgets = False
    for mixer in LATENT:
        found = [_state(*(data["found"][each["slug"]][one] for one in (mixer, REFERENCE))) for each in repeats]
        budgets |= "none" in found and bool({"all", "some", "behind"} & {*found})
        for each, state in zip(repeats, found, strict=True):
            cases.setdefault(state, []).append(f"{mixer} after {each['steps']} steps")
    told = [f"{words} {', '.join(cases[state])}." for state, words in STATES.items() if state in cases]
    if budgets:
        told.append("So what is found depends on the budget: steps and rate.")
    text = f"The claim is that latent attention grows no induction heads. {' '.join(told)}"
    question, against = "Does the claim hold?", {"all", "some"} & cases.keys()
    if "behind" in cases or ("none" in cases and against):
        return Verdict(question=question, answer="partly", short="in part", text=text)
    if not against and "none" not in cases:
        return Verdict(question=question, answer="partly", short="unsettled", text=text)
    return Verdict(question=question, answer="no" if against else "yes", short="no" if against else "yes", text=text)


def _grown(data: Mapping[str, Any], experiment: Mapping[str, Any], mixer: str) -> Verdict:
    """In how many seeds a mixer has induction heads: accuracy, hit rate and cut agree."""
    own, reference = (data["found"][experiment["slug"]][each] for each in (mixer, REFERENCE))
    count, seeds, late = own["grown"], len(own["seeds"]), sum(own["late"])
    question = f"Heads in {mixer}, {experiment['steps']} steps?"
    state = _state(own, reference)
    if state == "unfinished":
        return Verdict(question=question, answer="figure", short="no run", text="No run of it finished.")
    compared = next(each for each in data["comparisons"][experiment["slug"]] if each["mixer"] == mixer)
    behind = f" In {late} of {seeds} seeds heads answer that read right behind what followed before." if late else ""
    text = (
        f"In {count} of {seeds} seeds{_rate(own)}, at {experiment['lr']:g}; mha in {reference['grown']} of "
        f"{len(reference['seeds'])}.{behind} Accuracy {values(own['accuracy'])}, mha {values(reference['accuracy'])}; "
        f"difference {_bounds(compared['interval'])}."
    )
    answers: dict[str, tuple[Answer, str]] = {
        "all": ("yes", "yes"),
        "some": ("partly", f"{count} of {seeds}"),
        "behind": ("partly", "read behind"),
        "none": ("no", "no"),
        "untold": ("figure", "nor has mha"),
        "alone": ("figure", "no run of mha"),
    }
    answer, short = answers[state]
    return Verdict(question=question, answer=answer, short=short, text=text)


def _bounds(interval: Sequence[float | None]) -> str:
    """Of a mean, low and high, as JSON has them: None is infinite."""
    middle, low, high = interval
    if middle is None or low is None or high is None:
        return "unknown: fewer than two seeds of both"
    return f"{middle:+.3f} (95 % interval {low:+.3f} to {high:+.3f})".replace("-", "−")


def _rate(own: Mapping[str, Any]) -> str:
    low, high = own["grown_rate"] or (0.0, 1.0)
    return f" (95 % interval of the rate {low:.0%} to {high:.0%})"


def _circuit(data: Mapping[str, Any], repeats: Rows) -> Verdict:
    """Whether those that answer owe as much to the same edges."""
    question = "Is it the same circuit?"
    parts, behind, controls = [], [], [0.0]
    for mixer in MIXERS:
        rows = [row for each in repeats for row in _runs(data, each, mixer)]
        best = [best_layer(row) for row in rows if row["induction"] == "yes"]
        late = [row["behind"] for row in rows if reads_behind(row)]
        controls += [abs(each["control"]) for each in (*best, *late)]
        if best:
            hits, cuts = [max(layer["hit"]) for layer in best], [layer["cut"] for layer in best]
            parts.append(f"{mixer} {span(cuts)} nats (best head's hit rate {span(hits)})")
        if late:
            hits, cuts, offsets = ([each[name] for each in late] for name in ("hit", "cut", "offset"))
            behind.append(f"{mixer} {span(cuts)} nats (best head's hit rate {span(hits)}, {span(offsets, 0)} behind)")
    if len(parts) + len(behind) < 2:
        text = "Fewer than two of the mixers have heads that answer."
        return Verdict(question=question, answer="figure", short="unknown", text=text)
    told = []
    if parts:
        told.append(
            f"Without exactly the edges of one layer to what followed before the loss rises by: {', '.join(parts)}."
        )
    if behind:
        told.append(
            "Without exactly those to the tokens right behind that, where a lower layer has put the answer, by: "
            f"{', '.join(behind)}."
        )
    told.append(f"Without as many other edges by {max(controls):.2f} at most.")
    answer: Answer = "yes" if not behind or not parts else "partly" if len(parts) > 1 else "no"
    short = "in part" if answer == "partly" else answer
    return Verdict(question=question, answer=answer, short=short, text=" ".join(told))


def _otherwise(data: Mapping[str, Any], repeats: Rows) -> list[Verdict]:
    """The models that answer by none of both, if there are any."""
    parts = []
    for each in repeats:
        for mixer in MIXERS:
            rows = _runs(data, each, mixer)
            answers = [row for row in rows if row["repeats"]["accuracy"] >= ACCURACY and row["induction"] != "yes"]
            if other := sum(not reads_behind(row) for row in answers):
                parts.append(f"{mixer} after {each['steps']} steps in {other} of {len(rows)} seeds")
    if not parts:
        return []
    text = (
        f"{'; '.join(parts)}: accuracy .5 or more, but no head's hit rate and cut agree, neither of what followed "
        "before nor of the tokens right behind it. How these answer is not shown here."
    )
    return [Verdict(question="Answers otherwise?", answer="yes", short="yes", text=text)]


def _runs(data: Mapping[str, Any], experiment: Mapping[str, Any], mixer: str) -> Rows:
    return [row for row in data["runs"] if (row["experiment"], row["mixer"]) == (experiment["slug"], mixer)]


def _time(data: Mapping[str, Any], repeats: Rows) -> Verdict:
    """Steps to the levels of accuracy, in every budget."""
    sentences = []
    for each in repeats:
        for level in map("{:g}".format, LEVELS):
            parts = []
            for mixer in MIXERS:
                steps = data["found"][each["slug"]][mixer]["steps_to"][level]
                reached = [step for step in steps if step is not None]
                missing = f" ({len(steps) - len(reached)} of {len(steps)} never)" if len(reached) < len(steps) else ""
                parts.append(f"{mixer} {span(reached, digits=0)}{missing}" if reached else f"{mixer} never")
            sentences.append(f"To {level.removeprefix('0')} at {each['lr']:g}, of {each['steps']}: {', '.join(parts)}.")
    return Verdict(question="How long does it take?", answer="figure", short="steps", text=" ".join(sentences))


def _on_text(data: Mapping[str, Any]) -> list[Verdict]:
    experiment = next(each for each in data["experiments"] if each["kind"] == "text")
    found = data["found"][experiment["slug"]]
    bits = ", ".join(f"{mixer} {values(found[mixer]['bits_per_byte'])}" for mixer in MIXERS)
    compared = data["comparisons"][experiment["slug"]]
    kinds = {each["kind"] for each in compared}
    short = kinds.pop() if len(kinds) == 1 else "see text"
    words = " ".join(each["words"] for each in compared)
    heads = ", ".join(f"{mixer} {found[mixer]['grown']} of {len(found[mixer]['seeds'])}" for mixer in MIXERS)
    accuracy = ", ".join(f"{mixer} {values(found[mixer]['repeats_accuracy'])}" for mixer in MIXERS)
    return [
        Verdict(
            question="Another loss on text?",
            answer="figure",
            short=short,
            text=f"Bits per byte of held-out text: {bits}. {words}",
        ),
        Verdict(
            question="Heads in models of text?",
            answer="figure",
            short="seeds",
            text=f"Seeds whose model copies random characters with heads that agree: {heads}; accuracy on the second "
            f"copy {accuracy}.",
        ),
    ]


def not_said(data: Mapping[str, Any]) -> list[str]:
    """What the verdicts do not say."""
    n, single = data["seeds"], [each["title"] for each in data["experiments"] if each["seeds"] == 1]
    any_values = [float(seed) for seed in range(n)]  # the width in deviations depends on their number alone
    half = (t_interval(any_values).high - mean(any_values)) / stdev(any_values)
    low = wilson(n, n).low
    longest = max(each["steps"] for each in data["experiments"] if each["kind"] == "repeats")
    many = {each["mixer"] for found in data["comparisons"].values() for each in found}
    margins = {each["unit"]: each["margin"] for found in data["comparisons"].values() for each in found}
    lost = [each["run"] for each in data["failed"]]
    told = ", ".join(f"{margin:g} in {unit}" for unit, margin in margins.items())
    return [
        f"p is adjusted by Holm over the {len(many)} mixers of a budget alone: that one of all budgets has a small p "
        "by chance is likelier than it says.",
        f"Margins of what is too small to matter are the program's: {told}; the one in study.json is not used.",
        *(
            [f"Runs that did not finish are in no figure, nor in the number of seeds: {', '.join(lost)}."]
            if lost
            else []
        ),
        *(f"One seed of {title}: how far seeds differ is not measured there." for title in single),
        f"{n} seeds are few: the 95 % interval of a mean is ± {half:.1f} standard deviations wide, and {n} of {n} "
        f"seeds are a rate of {low:.0%} or more.",
        f"What is not there after {longest} steps may come later.",
        "Learning rates were fixed beforehand and are not the best of each arm: an arm may be slow because of its "
        "rate. The command swamla compare searches rates.",
        "Arms are equal in width, layers, heads, learned positions, rows and schedule, not in parameters (see the "
        "table).",
        "The models of random repeats are two layers of attention alone, whose size of rows was chosen by what mha "
        "learns, before the other mixers were run.",
        "Nothing here is measured at the size of GPT-2.",
    ]


def values(found: Sequence[float], digits: int = 3) -> str:
    """Mean and half the interval, or the value of an only seed."""
    if not found:
        return "none"
    if len(found) == 1:
        return f"{found[0]:.{digits}f} (one seed)"
    middle, low, _ = t_interval(found)
    return f"{middle:.{digits}f} ± {middle - low:.{digits}f}"


def span(found: Sequence[float], digits: int = 2) -> str:
    """The smallest and the largest: "4.6–5.7"."""
    low, high = f"{min(found):.{digits}f}", f"{max(found):.{digits}f}"
    return low if low == high else f"{low}–{high}"
