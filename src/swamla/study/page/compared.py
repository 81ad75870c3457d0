"""What was compared: the arms' costs and scores, what they have alike, and in which settings they differ."""

import inspect
import json
import re
import statistics
import sys
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from html import escape
from typing import Any

from swamla.config import to_plain
from swamla.data.shards import rule_for_many
from swamla.data.sources import Source
from swamla.registry import Registered, members_of
from swamla.study.caveats import leaves
from swamla.study.page.parts import Section, against, clock, name_of, table
from swamla.study.plan import Study
from swamla.study.results import Results
from swamla.train import RunConfig

COLUMNS = 5  # arms up to which settings have a column for each; of more a row says which arms have a value


def compared(results: Results) -> Section:
    """The arms, matched."""
    study, evidence = results.study, results.evidence
    first = study.arms[0]
    length = first.costs.length
    head = ["arm", "parameters|no embeddings", "parameters|in all", "FLOPs|a token, training"]
    head.append(f"state|{length:,} tokens, fp32")
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
                f"{costs.total_parameters:,}",
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
    tied = {arm.config.model.tied_head for arm in study.arms}
    output = "which are the output head's, too" if tied == {True} else "and with an output head of its own"
    meaning = (
        "The first arm is what all others are compared with; in grey, how much more or less an arm has. Counts are "
        f"exact, from the configs. In all: with the embeddings{f', {output}' * (len(tied) == 1)}. FLOPs: of matrix "
        f"products, with those of the output head, in documents of {length:,} tokens, forward and backward; shorter "
        "documents in a row take fewer. State: what is kept of one sequence."
    )
    if evidence and evidence.speed:
        meaning += " Speed: training steps of all arms timed in turns when all runs had ended, the median."
    if evidence and evidence.memory:
        meaning += " Memory: the most that one of an arm's runs had (of its process on a CPU, of tensors on a GPU)."
    if not study.task:
        meaning += " Bits per byte: the loss of all tokens of the part, in bits, over the bytes of its text in UTF-8."
    how = f"Matched by <b>{escape(study.asked.match)}</b>. " if study.asked.match != "none" else "Not matched. "
    searched = (
        f"searched for on seed 0, by the {study.choosing[0]}, as told at the rates below."
        if study.asked.rates == "search"
        else "the recipe's."
    )
    lead = (
        f"{how}{_rows_seen(study)} Its learning rate was {searched} Then it was trained "
        f"with fresh seeds, and scored once on the {study.scored}, when all runs had ended."
    )
    body = table(head, rows, meaning, "stacked")
    if matched:
        body += f'<p class="note">{"<br>".join(matched)}</p>'
    return (
        "What was compared",
        lead,
        body + _alike(results) + _settings(results) + _names(results) + _all_settings(results),
    )


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
        ("task" if study.task else "text", _source(data)),
        *_texts(study),
        (
            "budget of a run",
            f"{' to '.join(f'{n:,}' for n in steps[:: max(1, len(steps) - 1)])} steps of {train.batch_size} rows of "
            f"{train.block_size} tokens{apart or ', each arm its own' * (len(steps) > 1)}",
        ),
        ("seeds", f"1 to {seeds} in every arm; a seed sets initial weights and the order of the data"),
        *_training(results),
        ("precision, threads", f"{train.precision}, {study.asked.threads} a run"),
    ]
    body = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows)
    caption = "What all arms have alike; all their settings are below, and in study.json."
    return f'<div class="scroll"><table class="words"><caption>{caption}</caption><tbody>{body}</tbody></table></div>'


def _source(data: Mapping[str, str]) -> str:
    """What the data is, and its tokenizer."""
    known = members_of(Source).get(data["source"])
    what = f"{data['source']}{f' ({in_a_sentence(known)})' if known else ''}"
    if "tokenizer" not in data:
        return what
    trained = ", trained on training text alone" if data["tokenizer"].startswith("bpe:") else ""
    return f"{what}; tokenizer {data['tokenizer']}{trained}"


def _texts(study: Study) -> list[tuple[str, str]]:
    """The parts of a text; the rows of a task are endless. Studies of earlier versions have counted less."""
    data, first = study.data, study.arms[0]
    if "test_bytes" not in data:
        return []
    rows = []
    if "train_tokens" in data:
        documents, size, tokens = (int(data[f"train_{what}"]) for what in ("documents", "bytes", "tokens"))
        seen = first.steps * first.config.train.batch_size * first.config.train.block_size
        many = f"{documents:,} document{'s' * (documents != 1)}, {size:,} bytes, {tokens:,} tokens"
        rows.append(
            (
                "training text",
                f"{many}; a run{' of the first arm' * _apart(study)} reads {seen / tokens:.2g} times as many",
            )
        )
        if documents > 1:
            rows.append(("split", f"{rule_for_many(first.config.data.held_out_fraction)}, are held out"))
    choices, test = (f"{int(data[name]):,} bytes" for name in ("validation_bytes", "test_bytes"))
    parts = f"{choices} for choices (validation part), {test} read once, at the end (test part)"
    rows.append(("held-out text", f"{parts}; different texts: a figure of one is not to be compared with the other's"))
    if "bytes_apart" in data:
        apart = int(data["bytes_apart"])
        rows.append(("check", f"bytes counted {'=' if not apart else '≠'} bytes decoded (difference {apart:,})"))
    return rows


def _apart(study: Study) -> bool:
    return len({arm.steps for arm in study.arms}) > 1


def _training(results: Results) -> list[tuple[str, str]]:
    """What the arms are and how they are trained, in words, as far as all have it alike."""
    first = results.study.arms[0].config
    model, train = first.model, first.train
    share = f"{100 * train.warmup:g} % of the steps" if train.warmup < 1 else f"{train.warmup:g} steps"
    shape = {
        "model.width": f"width {model.width:,}",
        "model.pattern": f"{len(model.pattern)} layer{'s' * (len(model.pattern) != 1)}",
        "model.vocab_size": f"a vocabulary of {model.vocab_size:,} ids",
        "model.tied_head": "embeddings tied to the output head" if model.tied_head else "an output head of its own",
    }
    if len({len(arm.config.model.pattern) for arm in results.study.arms}) > 1:
        del shape["model.pattern"]
    how = {
        "train.optimizer.kind": f"optimizer {train.optimizer.kind}",
        "train.schedule": f"schedule {train.schedule}",
        "train.warmup": f"warm-up over {share}",
        "train.weight_decay": f"weight decay {train.weight_decay:g}",
        "train.grad_clip": f"gradients clipped at norm {train.grad_clip:g}" if train.grad_clip else "no clipping",
    }
    apart = results.differing.keys() - {"model.pattern"}
    return [
        ("model", ", ".join(text for name, text in shape.items() if name not in apart)),
        ("positions", _positions(results)),
        ("training", ", ".join(text for name, text in how.items() if name not in apart)),
    ]


def _positions(results: Results) -> str:
    """Where layers know from where a token stands."""
    models = [arm.config.model for arm in results.study.arms]
    mixers = {block.mixer.kind: to_plain(block.mixer) for model in models for block in model.layers}
    rotary = [kind for kind, plain in mixers.items() if plain.get("rope")]
    others = [kind for kind in mixers if kind not in rotary]
    said = [f"rotary in {', '.join(rotary)}"] * bool(rotary) + [f"none of their own in {', '.join(others)}"] * bool(
        others
    )
    learned = sorted({model.learned_positions for model in models} - {0})
    return "; ".join([*said, *(f"learned ones, {count:,}" for count in learned)])


def _settings(results: Results) -> str:
    return settings_table(
        {arm.name: arm.config for arm in results.study.arms},
        results.differing,
        "Settings in which arms differ, after matching, but for those that every arm which has them leaves at their "
        "default. –: an arm without that block.",
    )


def _names(results: Results) -> str:
    """What the names on the page stand for, by the docstrings of what has them."""
    configs = [arm.config for arm in results.study.arms]
    blocks = [block for config in configs for block in config.model.layers]
    parts = [*(block.mixer for block in blocks), *(block.ffn for block in blocks)]
    parts += [*(config.model.norm for config in configs), *(config.train.optimizer for config in configs)]
    kinds: list[type[Registered]] = [*dict.fromkeys(map(type, parts))]
    rows = [[f"<b>{cls.kind}</b>", escape(said)] for cls in kinds if (said := in_a_sentence(cls))]
    used = dict.fromkeys(backend for block in blocks if (backend := to_plain(block.mixer).get("backend")))
    rows += [
        [
            f"recipe {escape(results.study.asked.recipe)}",
            "settings that every arm begins with, which flags and matching change",
        ],
        [
            f"backend {escape(', '.join(used))}",
            "which of several equivalent programs computes a mixer: speed, and rounding",
        ],
    ]
    return table(["name", "what it is"], rows, "What names stand for.", "words")


def in_a_sentence(cls: type[Registered]) -> str:
    """The first sentence of what a kind's file says, if it has one of its name, or its class; "" without any."""
    own = cls.__module__.rpartition(".")[2] == cls.kind
    said = inspect.getdoc(sys.modules[cls.__module__] if own else cls) or ""
    if said.startswith(f"{cls.__name__}("):  # what a dataclass says by itself
        return ""
    found = re.match(r".*?[.](?=\s+[A-Z]|$)", " ".join(said.partition("\n\n")[0].split()))
    return found[0].removesuffix(".") if found else ""


def _all_settings(results: Results) -> str:
    """All settings that the table of differing ones leaves out."""
    configs = {arm.name: arm.config for arm in results.study.arms}
    told = told_settings(configs, results.differing)
    grouped: dict[str, list[str]] = {}
    for setting, value in (each for config in configs.values() for each in leaves(to_plain(config))):
        parent, _, last = setting.rpartition(".")
        group, last = _place(setting) if setting.startswith("model.blocks.") else (parent, last)
        words = f"{last} {'none' if value is None else setting_words(value) or 'none'}"
        if setting not in told and words not in grouped.setdefault(group, []):
            grouped[group].append(words)
    rows = [[escape(group), escape(", ".join(words))] for group, words in grouped.items() if words]
    meaning = (
        "Settings that all arms have alike, of a block all arms that have it. lr is where the search begins, seed "
        "the one of the search. Each is explained in the program's source and by swamla train --help."
    )
    return (
        f"<details><summary>All other settings</summary>{table(['part', 'settings'], rows, meaning, 'words')}</details>"
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
    if len(configs) <= COLUMNS:
        return table(["setting", *configs], rows, meaning, "words")
    listed = []
    for group, *each in rows:
        by_value: dict[str, list[str]] = {}
        for name, cell in zip(configs, each, strict=True):
            by_value.setdefault(cell, []).append(escape(name))
        listed += [[group, cell, ", ".join(names)] for cell, names in by_value.items() if cell != "–"]
    return table(["setting", "value", "in"], listed, meaning.replace(" –: an arm without that block.", ""), "words")


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
