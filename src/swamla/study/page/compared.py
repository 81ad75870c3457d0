"""What was compared: the arms' costs and scores, what they have alike, and in which settings they differ."""

import json
import statistics
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from html import escape
from typing import Any

from swamla.study.page.parts import Section, against, clock, name_of, table
from swamla.study.plan import Study
from swamla.study.results import Results
from swamla.train import RunConfig


def compared(results: Results) -> Section:
    """The arms, matched."""
    study, evidence = results.study, results.evidence
    first = study.arms[0]
    length = first.costs.length
    head = ["arm", "parameters|without embeddings", "FLOPs|a token, training", f"state|at {length:,} tokens, fp32"]
    head += ["speed|tokens a second", "memory|of a run", "learning rate|of its seeds", "seeds"]
    head += [f"{study.axis.name}|{study.scored.partition(' of ')[0]}", "sd|over seeds"]
    rows = []
    for index, one in enumerate(results.arms):
        costs, base = one.arm.costs, first.costs
        speed = evidence.speed.get(one.arm.name) if evidence else None
        memory = evidence.memory.get(one.arm.name) if evidence else None
        a_step = one.arm.config.train.batch_size * one.arm.config.train.block_size
        scores = list(one.scores.values())
        rows.append(
            [
                name_of(results, index),
                f"{costs.parameters:,}{against(costs.parameters, base.parameters, index)}",
                f"{costs.flops / 1e6:.2f} M{against(costs.flops, base.flops, index)}",
                f"{costs.state / 1024:,.1f} KiB{against(costs.state, base.state, index)}",
                clock(f"{a_step / speed.median:,.0f}" if speed else "–"),
                clock(f"{memory / 2**20:,.0f} MiB" if memory else "–"),
                "none" if one.lr is None else f"{one.lr:g}",
                str(one.ended) if len(scores) == one.ended else f"{len(scores)} of {one.ended}",
                f"<b>{statistics.fmean(scores):.4f}</b>" if scores else "none",
                f"{statistics.stdev(scores):.4f}" if len(scores) > 1 else "–",
            ]
        )
    matched = [f"<b>{escape(arm.name)}</b>: {escape(arm.matched)}" for arm in study.arms if arm.matched]
    meaning = (
        "The first arm is what all others are compared with; in grey, how much more or less an arm has. Counts are "
        "exact, from the configs."
    )
    if evidence and evidence.speed:
        meaning += " Speed: training steps of all arms timed in turns when all runs had ended, the median."
    how = f"Matched by <b>{escape(study.asked.match)}</b>. " if study.asked.match != "none" else "Not matched. "
    searched = (
        f"searched for on seed 0, by the {study.choosing[0]}" if study.asked.rates == "search" else "the recipe's"
    )
    lead = (
        f"{how}{_rows_seen(study)} Its learning rate was {searched}; then it was trained "
        f"with fresh seeds, and scored once on the {study.scored}, when all runs had ended."
    )
    body = table(head, rows, meaning, "stacked")
    if matched:
        body += f'<p class="note">{"<br>".join(matched)}</p>'
    return "What was compared", lead, body + _alike(results) + _settings(results)


def _rows_seen(study: Study) -> str:
    """Whether all arms saw the same; those with fewer steps saw the beginning of it."""
    if len({arm.steps for arm in study.arms}) == 1:
        return "Every arm saw the same rows in the same order."
    until = "the first arm's time was over" if study.asked.match == "seconds" else "its own steps were done"
    return f"Every arm began with the same rows in the same order, and saw them until {until}, so not all saw as many."


def _alike(results: Results) -> str:
    """What all arms have alike."""
    study = results.study
    data, train = study.data, study.arms[0].config.train
    steps, seeds = sorted({arm.steps for arm in study.arms}), max(map(study.seeds_of, study.arms))
    apart = f", by seconds: as long as the first arm's {study.arms[0].steps:,} took" * (study.asked.match == "seconds")
    rows = [
        (
            "task" if study.task else "text",
            f"{data['source']}, tokenizer {data['tokenizer']}" if "tokenizer" in data else data["source"],
        ),
        *_held_out(data),
        (
            "budget of a run",
            f"{' to '.join(f'{n:,}' for n in steps[:: max(1, len(steps) - 1)])} steps of {train.batch_size} rows of "
            f"{train.block_size} tokens{apart or ', each arm its own' * (len(steps) > 1)}",
        ),
        ("seeds", f"1 to {seeds} in every arm; a seed sets initial weights and the order of the data"),
        ("precision, threads", f"{train.precision}, {study.asked.threads} a run"),
    ]
    body = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows)
    caption = "What all arms have alike; everything else is in study.json."
    return f'<div class="scroll"><table class="words"><caption>{caption}</caption><tbody>{body}</tbody></table></div>'


def _held_out(data: Mapping[str, str]) -> list[tuple[str, str]]:
    """The parts of a text; the rows of a task are endless."""
    if "test_bytes" not in data:
        return []
    choices, test = (f"{int(data[name]):,} bytes" for name in ("validation_bytes", "test_bytes"))
    rows = [("held-out text", f"{choices} for choices, {test} read once, at the end (test part)")]
    if "bytes_apart" in data:  # studies of earlier versions did not count them
        rows.append(("counted bytes less decoded ones", f"{int(data['bytes_apart']):,}"))
    return rows


def _settings(results: Results) -> str:
    return settings_table(
        {arm.name: arm.config for arm in results.study.arms},
        results.differing,
        "Settings in which arms differ, after matching, but for those that every arm which has them leaves at their "
        "default. –: an arm without that block.",
    )


def settings_table(configs: Mapping[str, RunConfig], differing: Mapping[str, Mapping[str, Any]], meaning: str) -> str:
    """Settings that differ; those of one block's mixer, of its FFN, and all others of a block in one row each."""
    grouped: dict[str, dict[str, list[str]]] = {}
    for setting, values in told_settings(configs, differing).items():
        group, last = _place(setting)
        cells = grouped.setdefault(group, {name: [] for name in configs})
        for name in configs:
            if values.get(name) is not None:
                cells[name].append(f"{last} {setting_words(values[name])}".strip())
    rows = [
        [escape(group), *(escape(", ".join(cells[name])) or "–" for name in configs)]
        for group, cells in sorted(grouped.items(), key=lambda each: "." in each[0])  # those of blocks come last
    ]
    return table(["setting", *configs], rows, meaning, "words")


def told_settings(
    configs: Mapping[str, RunConfig], differing: Mapping[str, Mapping[str, Any]]
) -> dict[str, Mapping[str, Any]]:
    """Those of the settings that differ which some config has, and not at its default."""
    return {
        setting: values
        for setting, values in differing.items()
        if not all(_is_default(configs[name], setting) for name in configs if values.get(name) is not None)
    }


def _is_default(config: RunConfig, path: str) -> bool:
    """Whether a setting has its default; what has none, or a name of the study's own, has not."""
    parent: Any = config
    *way, last = path.split(".")
    for word in way:
        parent = parent[word] if isinstance(parent, Mapping) else getattr(parent, word)
    own = {field.name: field for field in fields(parent)} if is_dataclass(parent) else {}
    if last not in own:
        return False  # such as a kind
    default, factory = own[last].default, own[last].default_factory
    value = getattr(parent, last)
    return value == (factory() if factory is not MISSING else default)


def _place(name: str) -> tuple[str, str]:
    """A setting's row and its name there: ("swa.mixer", "window") for "model.blocks.swa.mixer.window"."""
    words = name.removeprefix("model.").split(".")
    if words[0] != "blocks":
        return ".".join(words), ""
    deep = 3 if len(words) > 3 else 2
    return ".".join(words[1:deep]), ".".join(words[deep:])


def setting_words(value: Any) -> str:
    """A value as one reads it."""
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple) and all(isinstance(each, str) for each in value):
        return " ".join(value)
    return json.dumps(value, ensure_ascii=False)
