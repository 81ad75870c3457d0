"""What a study's verdict does not say, and the settings in which its arms differ."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from swamla.config import to_plain
from swamla.study.plan import Arm, Study
from swamla.study.statistics import Comparison
from swamla.train.config import RunConfig

POSITIONS = ("rope", "rope_dim")  # settings of mixers that say where a token stands
NO_CHOICE = ("kind", "plugin", "backend", "norm_eps")  # names and rounding: not what a mixer can do


def not_said(study: Study, comparisons: Sequence[Comparison], tried: int, lost: Sequence[str] = ()) -> list[str]:
    """What the verdict does not say. tried: the fewest learning rates that were tried in an arm.

    lost: arms of which seeds did not finish.
    """
    asked = study.asked
    rates = (
        f"Learning rates are the best of {tried} or more, chosen by one seed on other "
        f"{'rows than are' if study.task else 'text than is'} scored: how another seed would have chosen is in no "
        "interval. Other settings are the recipe's and suit no arm in particular."
        if asked.rates == "search"
        else "Every arm has the recipe's learning rate: a difference may be that of a rate that suits one better."
    )
    said = [
        f"It is about models of about {parameters(study)} parameters without embeddings, trained for {budget(study)} "
        f"in rows of {study.arms[0].config.train.block_size}: at other sizes, budgets and lengths, differences can "
        "fade or turn.",
        _same_data(study),
        rates,
        "Intervals are of one comparison alone; only p is adjusted for all, differences and equivalences each by "
        "themselves."
        if len(comparisons) > 1
        else "The margin decides what counts as equivalent: it was stated before the study ran.",
    ]
    if any(comparison.kind == "undecided" for comparison in comparisons):
        said.append("Undecided is no equivalence: the arms may differ by anything in the interval.")
    if pairs := max((len(one.seeds) for one in comparisons if len(one.seeds) > 1), default=0):
        said.append(f"Student's t takes differences to be about normal, which {pairs} pairs cannot show.")
    if lost:
        said.append(
            f"Only seeds that finished in both arms are paired, which favours an arm that loses some: of "
            f"{', '.join(lost)} the differences are those of the runs that went well."
        )
    if study.sizes:
        said.append(
            "All sizes are trained for the same tokens, so a larger model has fewer for each parameter; a trend is "
            "the change from the smallest width to the largest, and says nothing of what lies beyond."
        )
    if asked.match == "none":
        said.append("Arms are not matched: a difference may be that of their sizes.")
    if apart := set_apart(study):
        told = "; ".join(f"{' and '.join(labels)}: {text}" for text, labels in apart.items())
        said.append(
            f"Arms differ in settings that their mixers and those of {study.arms[0].label} both have: {told}. A "
            "difference may be that of these."
        )
    if names := trained_apart(study):
        said.append(
            f"Arms differ in how they are trained, too: {', '.join(names)}. A difference may be that of these "
            "settings, and not of what the arms are."
        )
    return said


def parameters(study: Study) -> str:
    """Those of the first arm, of several sizes at each: "10,336 and 41,152"."""
    references = [arm for arm in study.arms if study.reference_of(arm) is arm]
    *others, last = (f"{arm.costs.parameters:,}" for arm in references)
    return f"{', '.join(others)} and {last}" if others else last


def budget(study: Study) -> str:
    """The tokens that a run is trained for, in words; of arms matched by seconds each has its own."""
    tokens = [arm.steps * arm.config.train.batch_size * arm.config.train.block_size for arm in study.arms]
    if min(tokens) == max(tokens):
        return f"{tokens[0]:,} tokens"
    many = f"{min(tokens):,} to {max(tokens):,} tokens"
    return f"{many}, in the time of the first arm's {tokens[0]:,}," if study.asked.match == "seconds" else many


def _same_data(study: Study) -> str:
    source = study.data["source"]
    if study.task:
        differ = "Seeds differ in initial weights and in the rows of the task"
        return f"{differ}: of other tasks and sizes than {source}, and of text, it says nothing."
    differ = "Seeds differ in initial weights and in the order of the data, not in the text"
    return f"{differ}: of other text than {source} it says nothing."


def trained_apart(study: Study) -> list[str]:
    """Settings of training and of positions in which arms differ, but for those that the study itself gives them."""
    given = {"train.lr"} if study.asked.rates == "search" else set()
    if study.asked.match == "seconds":
        given |= {"train.steps", "train.save_interval"}
    training = (name for name in differing(study) if name.startswith("train.") and name not in given)
    positions = [_positions(arm) for arm in study.arms]
    apart = [
        name
        for name in ("learned_positions", *POSITIONS)
        if len({repr(found[name]) for found in positions if name in found}) > 1
    ]
    return [*dict.fromkeys(".".join(name.split(".")[:2]) for name in training), *apart]


def _positions(arm: Arm) -> dict[str, Any]:
    """What tells an arm's layers where a token stands; mixers that know no positions, such as gdn, have no say."""
    model = arm.config.model
    mixers = [to_plain(block.mixer) for block in model.layers]
    found = {name: sorted({repr(mixer[name]) for mixer in mixers if name in mixer}) for name in POSITIONS}
    return {"learned_positions": model.learned_positions} | {name: each for name, each in found.items() if each}


def set_apart(study: Study) -> dict[str, list[str]]:
    """Settings that an arm's mixers and the first arm's both have, and in which they differ, in words → arms.

    Of arms with other kinds of mixers: of the same kinds an arm's own settings are what it is compared for. Sizes that
    matching by state may change are none, nor positions, which are told by themselves.
    """
    found: dict[str, list[str]] = {}
    for arm in study.arms:
        own, others = (_mixer_settings(each) for each in (arm, study.reference_of(arm)))
        if own["kind"] == others["kind"]:
            continue
        names = [name for name in own if name in others and own[name] != others[name] and name not in NO_CHOICE]
        told = [
            f"{name} {_either(own[name] - others[name] or own[name])} against "
            f"{_either(others[name] - own[name] or others[name])}"
            for name in names
        ]
        if told and arm.label not in found.setdefault(", ".join(told), []):
            found[", ".join(told)].append(arm.label)
    return found


def _mixer_settings(arm: Arm) -> dict[str, set[str]]:
    """Setting → its values in an arm's layers; of a convolution that a mixer has itself its own."""
    model, found = arm.config.model, dict[str, set[str]]()
    for block in model.layers:
        kept = {name: value for name, value in to_plain(block).items() if name not in ("mixer", "ffn")}
        sizes = block.mixer.state_settings(model.width)
        for name, value in (kept | to_plain(block.mixer)).items():
            if name not in (*POSITIONS, *sizes):
                found.setdefault(name, set()).add(value if isinstance(value, str) else json.dumps(value))
    return found


def _either(values: set[str]) -> str:
    return " or ".join(sorted(values))


def differing(study: Study) -> dict[str, dict[str, Any]]:
    """Dotted setting → arm → its value, for those in which the arms differ; None where an arm has no such setting."""
    return differing_settings({arm.name: arm.config for arm in study.arms})


def differing_settings(configs: Mapping[str, RunConfig]) -> dict[str, dict[str, Any]]:
    """Dotted setting → name → its value, for those in which configs differ; None where one has no such setting."""
    of = {name: dict(leaves(to_plain(config))) for name, config in configs.items()}
    settings = dict.fromkeys(setting for found in of.values() for setting in found)
    values = {setting: {name: found.get(setting) for name, found in of.items()} for setting in settings}
    return {setting: found for setting, found in values.items() if len({repr(value) for value in found.values()}) > 1}


def leaves(plain: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted setting and value of all settings of a config in its plain form."""
    for name, value in plain.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value
