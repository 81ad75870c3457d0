"""What the study found: figures of every mixer in every experiment over its seeds."""

from collections.abc import Mapping, Sequence
from typing import Any

from swamla.interpret.sections import as_plain
from swamla.model.accounting import count_parameters
from swamla.study.nanogpt_mla.measured import LEVELS, Rows, best_layer, reads_behind
from swamla.study.nanogpt_mla.plan import EXPERIMENTS, MIXERS, REFERENCE, Experiment, arm_name, mixer_of
from swamla.study.nanogpt_mla.words import not_said, verdicts
from swamla.study.plan import Arm, Study
from swamla.study.runs import Outcome
from swamla.study.statistics import Axis, compare_all, t_interval, wilson

FORMAT = 1
MARGINS = {"accuracy": 0.05, "bits per byte": 0.01}  # differences below are too small to matter


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
        **({"went_on": list(study.went_on)} if study.went_on else {}),
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
    best = [best_layer(row) for row in rows]
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
        found["late"] = [reads_behind(row) for row in rows]
        found["steps_to"] = {f"{level:g}": [row["steps_to"][f"{level:g}"] for row in rows] for level in LEVELS}
    values = {name: found[name] for name in (*names, "repeats_accuracy", "cut", "control")}
    return found | {"intervals": {name: interval(each) for name, each in values.items()}}


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
