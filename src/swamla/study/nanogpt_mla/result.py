"""What the study found: figures of every mixer in every experiment over its seeds, and where the claim holds."""

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any, Literal

from swamla.interpret.sections import Verdict, as_plain
from swamla.interpret.verdicts import ACCURACY, CONTROL, CUT, HIT
from swamla.model.accounting import count_parameters
from swamla.study.nanogpt_mla.measured import LEVELS
from swamla.study.nanogpt_mla.plan import EXPERIMENTS, MIXERS, REFERENCE, Experiment, arm_name, mixer_of
from swamla.study.plan import Arm, Study
from swamla.study.runs import Outcome
from swamla.study.statistics import Axis, compare_all, t_interval, wilson

FORMAT = 1
LATENT = MIXERS[1:]
MARGINS = {"accuracy": 0.05, "bits per byte": 0.01}  # differences below are too small to matter
Rows = Sequence[Mapping[str, Any]]
Answer = Literal["yes", "partly", "no", "figure"]


def result(
    study: Study, outcomes: Mapping[str, Outcome], measured: Rows, *, prompts: Sequence[str], command: str
) -> dict[str, Any]:
    """All of it as JSON data, from which the page and the pictures are drawn."""
    groups = {
        experiment.slug: {mixer: _group(experiment, mixer, measured) for mixer in MIXERS} for experiment in EXPERIMENTS
    }
    found = {
        "format_version": FORMAT,
        "question": study.asked.question,
        "claim": study.asked.expectation,
        "command": command,
        "version": study.version,
        "commit": study.commit,
        "machine": study.machine,
        "seeds": study.asked.seeds,
        "data": {name: study.data[name] for name in ("source", "fingerprint")},
        "experiments": [_experiment(study, experiment) for experiment in EXPERIMENTS],
        "found": groups,
        "comparisons": {each.slug: _comparisons(each, measured) for each in EXPERIMENTS},
        "failed": [
            {"run": one.run, "status": one.status, "error": one.error}
            for one in outcomes.values()
            if one.status != "finished"
        ],
        "commands": [one.command for one in outcomes.values()],
        "prompts": list(prompts),
        "runs": list(measured),
    }
    plain: dict[str, Any] = as_plain(found)
    return plain | {"verdicts": as_plain(verdicts(plain)), "not_said": not_said(plain)}


def _experiment(study: Study, experiment: Experiment) -> dict[str, Any]:
    arms = [arm for arm in study.arms if arm.name in {arm_name(experiment, mixer) for mixer in MIXERS}]
    config = arms[0].config
    return {
        "slug": experiment.slug,
        "kind": experiment.kind,
        "title": experiment.title,
        "data": config.data.source,
        "steps": config.train.steps,
        "lr": config.train.lr,
        "seeds": study.seeds_of(arms[0]),
        "rows": config.train.batch_size,
        "length": config.train.block_size,
        "width": config.model.width,
        "layers": len(config.model.pattern),
        "sizes": {mixer_of(arm.name): _sizes(arm) for arm in arms},
    }


def _sizes(arm: Arm) -> dict[str, Any]:
    count = count_parameters(arm.config.model)
    return {
        "total": count.total,
        "active": count.active,
        "non_embedding": count.non_embedding,
        "mixers": count.by_component.get(mixer_of(arm.name), 0),
        "flops": arm.costs.flops,
        "state_bytes": arm.costs.state,
    }


def _of(measured: Rows, experiment: Experiment, mixer: str) -> Rows:
    rows = [row for row in measured if (row["experiment"], row["mixer"]) == (experiment.slug, mixer)]
    return sorted(rows, key=lambda row: row["seed"])


def _group(experiment: Experiment, mixer: str, measured: Rows) -> dict[str, Any]:
    """The figures of a mixer in an experiment: a value for each seed, and intervals over them."""
    rows = _of(measured, experiment, mixer)
    best = [_best_layer(row) for row in rows]
    grown = sum(row["induction"] == "yes" for row in rows)
    found: dict[str, Any] = {
        "seeds": [row["seed"] for row in rows],
        "grown": grown,
        "grown_rate": list(wilson(grown, len(rows))[1:]) if rows else None,
        "repeats_accuracy": [row["repeats"]["accuracy"] for row in rows],
        "second_loss": [row["repeats"]["second_loss"] for row in rows],
        "first_loss": [row["repeats"]["first_loss"] for row in rows],
        "cut": [layer["cut"] for layer in best],
        "control": [layer["control"] for layer in best],
        "hit": [max(layer["hit"]) for layer in best],
        "attribution": [max(layer["attribution"]) for layer in best],
        "layer": [row["repeats"]["layers"].index(layer) for row, layer in zip(rows, best, strict=True)],
        "seconds": [row["seconds"] for row in rows],
    }
    names = ("accuracy",) if experiment.kind == "repeats" else ("bits_per_byte", "loss")
    found |= {name: [row[name] for row in rows] for name in names}
    if experiment.kind == "repeats":
        found["behind"] = [row["behind"] for row in rows]
        found["late"] = [_reads_behind(row) for row in rows]
        found["steps_to"] = {f"{level:g}": [row["steps_to"][f"{level:g}"] for row in rows] for level in LEVELS}
    values = {name: found[name] for name in (*names, "repeats_accuracy", "cut", "control")}
    return found | {"intervals": {name: interval(each) for name, each in values.items()}}


def _reads_behind(row: Mapping[str, Any]) -> bool:
    """Whether a run without induction heads answers by heads that read behind the answer, by the same rules."""
    late = row["behind"]
    agree = late["hit"] >= HIT and late["cut"] >= CUT and abs(late["control"]) <= CONTROL * late["cut"]
    return row["induction"] != "yes" and row["repeats"]["accuracy"] >= ACCURACY and agree


def _best_layer(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The layer that owes most to its induction edges."""
    found: Mapping[str, Any] = max(row["repeats"]["layers"], key=lambda layer: layer["cut"])
    return found


def interval(values: Sequence[float]) -> list[float] | None:
    """Mean, low and high; None for fewer than two values, which say nothing of the spread."""
    return [float(each) for each in t_interval(values)] if len(values) > 1 else None


def _comparisons(experiment: Experiment, measured: Rows) -> list[dict[str, Any]]:
    """mla and latent against mha, paired by seed: accuracy of repeats, bits per byte of the text."""
    key = "accuracy" if experiment.kind == "repeats" else "bits_per_byte"
    name = key.replace("_", " ")
    axis = Axis(name=name, direction="higher" if key == "accuracy" else "lower", margin=MARGINS[name])
    scores = {mixer: {row["seed"]: row[key] for row in _of(measured, experiment, mixer)} for mixer in MIXERS}
    return [
        {
            "mixer": each.arm,
            "unit": name,
            "margin": axis.margin,
            "differences": list(each.differences),
            "interval": list(each.interval),
            "p": each.p,
            "kind": each.kind,
            "words": each.words(),
        }
        for each in compare_all(scores, REFERENCE, axis)
    ]


# ---- in words -------------------------------------------------------------------------------------------------------


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
    "behind": "To the letter alone it holds, since heads answer that read right behind what followed before, for",
    "untold": "It cannot be told, as no run of mha has such heads either, for",
}


def _state(own: Mapping[str, Any], reference: Mapping[str, Any]) -> str:
    """What is found of a mixer in a budget, one of `STATES`."""
    if own["grown"]:
        return "all" if own["grown"] == len(own["seeds"]) else "some"
    if any(own["late"]):
        return "behind"
    return "none" if own["seeds"] and reference["grown"] else "untold"


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
    if not seeds:
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
    }
    answer, short = answers[_state(own, reference)]
    return Verdict(question=question, answer=answer, short=short, text=text)


def _bounds(interval: Sequence[float | None]) -> str:
    """Of a mean, low and high, as JSON has them: None is infinite."""
    middle, low, high = interval
    if middle is None or low is None or high is None:
        return "unknown: fewer than two seeds of both"
    return f"{middle:+.3f} (95 % interval {low:+.3f} to {high:+.3f})"


def _rate(own: Mapping[str, Any]) -> str:
    low, high = own["grown_rate"] or (0.0, 1.0)
    return f" (95 % interval of the rate {low:.0%} to {high:.0%})"


def _circuit(data: Mapping[str, Any], repeats: Rows) -> Verdict:
    """Whether those that answer owe as much to the same edges."""
    question = "Is it the same circuit?"
    parts, behind, controls = [], [], [0.0]
    for mixer in MIXERS:
        rows = [row for each in repeats for row in _runs(data, each, mixer)]
        best = [_best_layer(row) for row in rows if row["induction"] == "yes"]
        late = [row["behind"] for row in rows if _reads_behind(row)]
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
            if other := sum(not _reads_behind(row) for row in answers):
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
    return [
        *(f"One seed of {title}: how far seeds differ is not measured there." for title in single),
        f"{n} seeds are few: the 95 % interval of a mean is ± {half:.1f} standard deviations wide, and {n} of {n} "
        f"seeds are a rate of {low:.0%} or more.",
        "Learning rates were fixed beforehand and are not the best of each arm: an arm may be slow because of its "
        "rate. `swamla compare` searches rates.",
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
