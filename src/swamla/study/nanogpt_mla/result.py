"""What the study found: figures of every mixer in every experiment over its seeds, and where the claim holds."""

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from swamla.interpret.sections import Verdict, as_plain
from swamla.interpret.verdicts import ACCURACY
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
        found["steps_to"] = {f"{level:g}": [row["steps_to"][f"{level:g}"] for row in rows] for level in LEVELS}
    values = {name: found[name] for name in (*names, "repeats_accuracy", "cut", "control")}
    return found | {"intervals": {name: interval(each) for name, each in values.items()}}


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
    grown = {(mixer, each["slug"]): _grown(data, each, mixer) for mixer in LATENT for each in repeats}
    answers = [_claim(repeats, grown), *grown.values(), _circuit(data, repeats), *_otherwise(data, repeats)]
    return [*answers, _time(data, repeats), *_on_text(data)]


def _claim(repeats: Rows, grown: Mapping[tuple[str, str], Verdict]) -> Verdict:
    """Whether the fork's claim holds, by the cases in which it can be tested."""
    cases: dict[str, list[str]] = {}
    budgets = False
    for mixer in LATENT:
        answers = {each["slug"]: grown[mixer, each["slug"]].answer for each in repeats}
        budgets |= "no" in answers.values() and len({"yes", "partly"} & {*answers.values()}) > 0
        for each in repeats:
            cases.setdefault(answers[each["slug"]], []).append(f"{mixer} after {each['steps']} steps")
    told = [
        f"{what} {', '.join(cases[answer])}."
        for answer, what in (
            ("no", "It holds for"),
            ("yes", "It does not hold for"),
            ("partly", "Some seeds only have such heads in"),
            ("figure", "It cannot be told, as no run of mha has such heads either, for"),
        )
        if answer in cases
    ]
    if budgets:
        told.append("So what is found depends on the budget: steps and rate.")
    text = f"The claim is that latent attention grows no induction heads. {' '.join(told)}"
    question, against = "Does the claim hold?", {"yes", "partly"} & cases.keys()
    if "no" not in cases and "yes" not in cases:
        return Verdict(question=question, answer="partly", short="unsettled", text=text)
    if "no" in cases and against:
        return Verdict(question=question, answer="partly", short="in part", text=text)
    return Verdict(question=question, answer="no" if against else "yes", short="no" if against else "yes", text=text)


def _grown(data: Mapping[str, Any], experiment: Mapping[str, Any], mixer: str) -> Verdict:
    """In how many seeds a mixer has induction heads: accuracy, hit rate and cut agree."""
    own, reference = (data["found"][experiment["slug"]][each] for each in (mixer, REFERENCE))
    count, seeds = own["grown"], len(own["seeds"])
    question = f"Heads in {mixer}, {experiment['steps']} steps?"
    if not seeds:
        return Verdict(question=question, answer="figure", short="no run", text="No run of it finished.")
    compared = next(each for each in data["comparisons"][experiment["slug"]] if each["mixer"] == mixer)
    text = (
        f"In {count} of {seeds} seeds{_rate(own)}, at {experiment['lr']:g}; mha in {reference['grown']} of "
        f"{len(reference['seeds'])}. Accuracy {values(own['accuracy'])}, mha {values(reference['accuracy'])}; "
        f"difference {_bounds(compared['interval'])}."
    )
    if count == seeds:
        return Verdict(question=question, answer="yes", short="yes", text=text)
    if count:
        return Verdict(question=question, answer="partly", short=f"{count} of {seeds}", text=text)
    if reference["grown"]:
        return Verdict(question=question, answer="no", short="no", text=text)
    return Verdict(question=question, answer="figure", short="nor has mha", text=text)


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
    """Whether those that have induction heads owe as much to them."""
    question = "Is it the same circuit?"
    parts, controls = [], [0.0]
    for mixer in MIXERS:
        cuts, hits = [], []
        for experiment in repeats:
            own = data["found"][experiment["slug"]][mixer]
            has = _has(data, experiment, mixer)
            cuts += [cut for cut, there in zip(own["cut"], has, strict=True) if there]
            hits += [hit for hit, there in zip(own["hit"], has, strict=True) if there]
            controls += [abs(each) for each, there in zip(own["control"], has, strict=True) if there]
        if cuts:
            parts.append(f"{mixer} {span(cuts)} nats (best head's hit rate {span(hits)})")
    if len(parts) < 2:
        return Verdict(
            question=question, answer="figure", short="unknown", text="Fewer than two of the mixers have such heads."
        )
    text = (
        f"Without exactly the induction edges of one layer the loss rises by: {', '.join(parts)}; without as many "
        f"other edges by {max(controls):.2f} at most. So all of these need attention to the token that followed before."
    )
    return Verdict(question=question, answer="yes", short="yes", text=text)


def _otherwise(data: Mapping[str, Any], repeats: Rows) -> list[Verdict]:
    """The models that answer without induction heads, if there are any, and whether these read behind the answer."""
    parts = []
    for each in repeats:
        for mixer, own in data["found"][each["slug"]].items():
            has = _has(data, each, mixer)
            answers = [accuracy >= ACCURACY and not there for accuracy, there in zip(own["accuracy"], has, strict=True)]
            late = [one for one, answered in zip(own["behind"], answers, strict=True) if answered]
            if late:
                where, hits, cuts = ([one[name] for one in late] for name in ("offset", "hit", "cut"))
                parts.append(
                    f"{mixer} after {each['steps']} steps in {len(late)} of {len(has)} seeds (best head's hit rate "
                    f"{span(where, digits=0)} behind {span(hits)}, cut {span(cuts)} nats)"
                )
    if not parts:
        return []
    text = (
        f"{'; '.join(parts)}: accuracy .5 or more, but no head's hit rate and cut agree. In brackets: what they owe to "
        "the tokens right behind those that followed before, where a lower layer can have put the answer."
    )
    return [Verdict(question="Answers without heads?", answer="yes", short="yes", text=text)]


def _has(data: Mapping[str, Any], experiment: Mapping[str, Any], mixer: str) -> list[bool]:
    rows = [row for row in data["runs"] if (row["experiment"], row["mixer"]) == (experiment["slug"], mixer)]
    return [row["induction"] == "yes" for row in sorted(rows, key=lambda row: row["seed"])]


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
