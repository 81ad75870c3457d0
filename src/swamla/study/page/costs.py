"""What the arms cost: the memory of a sequence, time, and all runs with their commands."""

import json
import re
import shlex
from html import escape
from pathlib import Path

from swamla.interpret.page.svg import Line, line_chart
from swamla.study.decoding import prompt_lengths
from swamla.study.page.parts import Section, against, bytes_of, clock, colour_of, legend_of, name_of, table
from swamla.study.plan import Asked
from swamla.study.results import Results
from swamla.study.runs import Run, command, duration
from swamla.version import __version__

SHOWN_LENGTHS = (128, 512, 2048, 8192, 32768)  # of caches in the table


def memory(results: Results) -> Section | None:
    """Bytes of one sequence's state by its length."""
    if results.evidence is None:
        return None
    caches = results.evidence.caches
    lines = []
    for name, sizes in caches.items():
        tips = [f"{name}, {length:,} tokens: {bytes_of(size)}" for length, size in sizes.items()]
        points = [(float(length), size / 1024) for length, size in sizes.items() if size]
        if points:
            lines.append(Line(name=name, points=points, colour=colour_of(results, name), tips=tips, radius=2.5))
    lengths = [length for length in SHOWN_LENGTHS if all(length in sizes for sizes in caches.values())]
    rows = [
        [name_of(results, index), *(bytes_of(caches[arm.name][length]) for length in lengths)]
        for index, arm in enumerate(results.study.arms)
    ]
    told = "KiB that one sequence keeps while it is continued, in fp32, by its length; both axes are logarithmic."
    lead = (
        "What each arm keeps of a sequence while it writes on, counted from the config. What has a fixed size, such as "
        "the ring of a window or the matrix of a recurrent mixer, is there in full from the first token. Lengths "
        "beyond the rows of training say what it would cost, not that the model is any good there."
    )
    figure = ""
    if lines:
        lengths_drawn = sorted({int(length) for line in lines for length, _ in line.points})
        names = [(float(length), f"{length:,}") for length in lengths_drawn[::2]]
        drawn = line_chart(
            lines, x_label="tokens", y_label="KiB", x_ticks=names, logarithmic=True, log_y=True, size=(700, 280)
        )
        figure = f"<figure>{drawn}<figcaption>{told}</figcaption></figure>"
    meaning = "Bytes of one sequence's state in fp32."
    body = legend_of(results) + figure + table(["arm", *(f"{length:,}|tokens" for length in lengths)], rows, meaning)
    return "Memory of a sequence", lead, body


def time_taken(results: Results) -> Section | None:
    """Predicted and real times."""
    evidence = results.evidence
    if evidence is None or not evidence.paces:
        return None
    rows = []
    index_of = {arm.name: index for index, arm in enumerate(results.study.arms)}
    for pace in evidence.paces:
        speed = evidence.speed.get(pace.arm)
        step = f"{1000 * speed.median:.1f}" if speed else "–"
        spread = f" <small>({1000 * speed.low:.1f} – {1000 * speed.high:.1f})</small>" if speed else ""
        planned = results.study.arm(pace.arm).seconds_per_step
        rows.append(
            [
                name_of(results, index_of[pace.arm]),
                clock(f"{1000 * planned:.1f}"),
                clock(step + spread),
                clock(f"{pace.predicted:.0f} s"),
                clock(f"{pace.took:.0f} s"),
                str(pace.runs),
            ]
        )
    predicted, took = (
        sum(getattr(pace, field) * pace.runs for pace in evidence.paces) for field in ("predicted", "took")
    )
    head = ["arm", "a step, planned|ms", "a step, at the end|ms (quartiles)", "a run, predicted", "a run, took", "runs"]
    meaning = (
        "Planned: timed before the study. At the end: steps of all arms in turns, so that a machine whose speed "
        "drifts is the same to all. Runs took as long as the process that ended them; one that was stopped and "
        "resumed counts the training that it went on from, too."
    )
    times = f", {took / predicted:.2f} times as long" if predicted else ""
    total = f"All runs, one after the other: predicted {duration(predicted)}, took {duration(took)}{times}."
    lead = (
        "Seconds are of the machine below, with whatever else it did. Beside speed and memory in the table of arms "
        "they are the only figures of this page that would differ if the study was run again on the same machine, with "
        "the same versions."
    )
    body = f'<p>{clock(total)}</p>{table(head, rows, meaning)}<p class="note">{_in_a_run(results)}</p>'
    return "Time", lead, body + _generation(results)


def _in_a_run(results: Results) -> str:
    """What the prediction of a run is made of, beside its planned steps."""
    study = results.study
    each = clock(f"{1000 * study.loop_seconds:.1f} ms")
    start, evaluation = (clock(f"{seconds:.1f} s") for seconds in (study.start_seconds, study.evaluation_seconds))
    return (
        f"A run was predicted to take its steps, {each} more for each of them (rows, records), {start} to start and to "
        f"save, and {evaluation} to evaluate, longer in an arm whose steps take longer."
    )


def _generation(results: Results) -> str:
    """How fast each arm writes, beside what it keeps meanwhile; empty if it was not measured."""
    found = results.evidence.decoding if results.evidence else {}
    if not found:
        return ""
    prompts, new = [one.prompt for one in next(iter(found.values()))], prompt_lengths(results.study)[1]
    rows = []
    for index, arm in enumerate(results.study.arms):
        base = found[results.study.reference_of(arm).name]
        row = [name_of(results, index)]
        for one, other in zip(found[arm.name], base, strict=True):
            quartiles = f"{1 / one.high:,.0f} – {1 / one.low:,.0f}"
            than = against(1 / one.median, 1 / other.median, int(one is not other))
            row.append(clock(f"{1 / one.median:,.0f}{than}<small>{quartiles}</small>"))
            row.append(clock(f"{1000 * one.first:,.1f} ms"))
            row.append(bytes_of(one.state))
        rows.append(row)
    head = ["arm"]
    for prompt in prompts:
        head += [f"tokens a second|after {prompt:,} tokens", f"first token|of {prompt:,} read"]
        head.append(f"state|{prompt:,} read, {new:,} written")
    meaning = (
        "Generation of one sequence, token by token, as swamla generate does it, in fp32 and greedily: the median, in "
        "grey how much faster or slower than the first arm, and quartiles. First token: the prompt is read at once. "
        "State: bytes in fp32 of the tensors that are kept when all of that is read and written. All arms in turns, "
        "with untrained weights, on which the speed does not depend."
    )
    return table(head, rows, meaning, "stacked")


def all_runs(results: Results) -> Section:
    """Every run, those that failed first, and where the figures are from."""
    study = results.study
    tests = {test.run: test.score for test in results.tests}
    left_out = [run for one in results.arms for run in one.left_out]
    order = [arm.name for arm in study.arms]
    ended = sorted(
        results.outcomes,
        key=lambda one: (one.status == "finished", order.index(one.arm), one.purpose, one.lr, one.seed),
    )
    head = ["run", "for", "learning rate", "seed", "ended", "steps", "validation", "test", "seconds"]
    rows, looks = [], []
    for one in ended:
        error = f"<br><small>{escape(one.error)}</small>" if one.error else ""
        rows.append(
            [
                escape(one.run),
                "the rate" if one.purpose == "rate" else "nothing" if one.run in left_out else "the verdict",
                f"{one.lr:g}",
                str(one.seed),
                f"{one.status}{error}",
                f"{one.steps:,}",
                "none" if one.validation is None else f"{one.validation:.4f}",
                f"{tests[one.run]:.4f}" if one.run in tests else "",
                clock(f"{one.wall:.0f}"),
            ]
        )
        looks.append("" if one.status == "finished" else "lost")
    lost = sum(map(bool, looks))
    told = f"of which {lost} did not finish; these come first" if lost else "all of which finished"
    lead = (
        f"{len(ended)} runs, {told}. Runs that diverge or fail are results: they are in no interval, and their seed is "
        "left out of the pairs. runs.csv has the command of each."
    )
    unit = study.choosing[1]
    meaning = f"All runs. Validation: {unit} on the {study.choosing[0]}; test: {study.axis.name} on the {study.scored}."
    return "All runs", lead, table(head, rows, meaning, "runs", looks) + _commands(results)


def _study_file(asked: Asked) -> list[str]:
    """A study.toml that asks the same; strings of JSON are strings of TOML."""
    plain = asked.as_plain()
    arms, rows = plain.pop("arms"), plain.pop("published", [])
    stated = {name: value for name, value in plain.items() if value or name not in ("question", "expectation")}
    said = [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in stated.items() if value is not None]
    named = [f"{_key(name)} = {json.dumps(flags, ensure_ascii=False)}" for name, flags in arms.items()]
    tables = []
    for row in rows:
        kept = {name: value for name, value in row.items() if value not in (None, "")}
        tables += [
            "",
            "[[published]]",
            *(f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in kept.items()),
        ]
    return ["# study.toml", *said, "", "[arms]", *named, *tables]


def _key(name: str) -> str:
    return name if re.fullmatch("[A-Za-z0-9_-]+", name) else json.dumps(name, ensure_ascii=False)


def _commands(results: Results) -> str:
    """The study's file, one command of each arm, and where all of it is from."""
    study = results.study
    lines = [*_study_file(study.asked), "", "# the whole study; from STUDY, its folder, the page alone"]
    lines += ["swamla compare study.toml", "swamla compare STUDY --report", "", "# one run of each arm, by hand"]
    for one in results.arms:
        lr = one.lr if one.lr is not None else one.arm.lr(0)
        run = Run(arm=one.arm.name, slug=one.arm.slug, purpose="seed", rate=0, lr=lr, seed=1)
        lines.append(shlex.join(["swamla", *command(study, Path("STUDY"), run)]))
    rows = [
        ("program", f"{study.program}; in a checkout of it: pip install '.[lab]'"),
        *([("went on with", "; ".join(study.went_on))] if study.went_on else []),
        ("data", f"{study.data['source']}, fingerprint {study.data.get('fingerprint') or 'unknown'}"),
        ("machine", ", ".join(f"{name} {value}" for name, value in study.machine.items()) or "unknown"),
        *([("plugins", ", ".join(study.plugins))] if study.plugins else []),
        *([("page by", f"swamla {__version__}")] if __version__ != study.version else []),
        (
            "files",
            "study.json (everything resolved), results.json; runs, arms, comparisons, evidence (.csv, .tex), runs/",
        ),
    ]
    body = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows)
    caption = "Where the figures are from." + (
        ""
        if study.task
        else " The fingerprint is the SHA-256 of all tokens, of what is held out, and of the order of rows."
    )
    return (
        f'<pre class="code">{escape(chr(10).join(lines))}</pre>'
        f'<div class="scroll"><table class="words"><caption>{caption}</caption><tbody>{body}</tbody></table></div>'
    )
