"""The study's page: one file without links, drawn from the data of result.json alone."""

from collections.abc import Sequence
from html import escape
from typing import Any

from swamla.interpret.page.evidence import Section, attention
from swamla.interpret.page.html import document, section_parts, verdict_list
from swamla.interpret.page.parts import Data, legend, table
from swamla.interpret.page.svg import BLUE, GREEN, ORANGE, Line, heat_map, line_chart, number
from swamla.study.nanogpt_mla.measured import BEHIND
from swamla.study.nanogpt_mla.plan import MIXERS
from swamla.study.nanogpt_mla.words import values

COLOURS = dict(zip(MIXERS, (BLUE, ORANGE, GREEN), strict=True))
MAPS = (
    ("hit", "hit rate", "share of queries", False),
    ("attribution", "attribution", "of the right logit, −1 … 1", True),
    ("induction", "induction", "share of weight", False),
    ("previous", "previous token", "share of weight", False),
)


def page(data: Data) -> str:
    """The page, whose script draws the attention of the first seed's models of repeats."""
    drawn = explorer_data(data)
    sections = [
        _what_was_compared(data),
        *(_repeats(data, each) for each in data["experiments"] if each["kind"] == "repeats"),
        attention(drawn) if drawn["texts"] else None,
        *(_text(data, each) for each in data["experiments"] if each["kind"] == "text"),
        _how(data),
    ]
    parts = [*_opening(data), *(part for each in sections for part in section_parts(each))]
    return document("nanoGPT-MLA: does latent attention grow induction heads?", parts, drawn)


def explorer_data(data: Data) -> dict[str, Any]:
    """What the script reads: texts with every head's weights; layers, which are of another mixer in every text."""
    titles = {each["slug"]: each for each in data["experiments"]}
    runs = [row for row in data["runs"] if "drawn" in row and row["seed"] == _first_seed(data)]
    runs.sort(key=lambda row: -titles[row["experiment"]]["steps"])  # the longest budget first
    texts = [
        row["drawn"]
        | {"name": f"{row['mixer']}, {titles[row['experiment']]['steps']} steps, seed {row['seed']}: a held-out row"}
        for row in runs
    ]
    depth = len(texts[0]["layers"]) if texts else 0
    layers = [{"mixer": "attention", "signed": False} for _ in range(depth)]
    return {"layers": layers, "texts": texts, "shown": {"layer": max(0, depth - 1), "head": 0}}


def _first_seed(data: Data) -> int:
    return min((row["seed"] for row in data["runs"]), default=0)


def _opening(data: Data) -> list[str]:
    notes = "".join(f"<li>{escape(note)}</li>" for note in data["not_said"])
    return [
        '<p class="kicker">swamla reproduce nanogpt-mla</p>',
        f"<h1>{escape(data['question'])}</h1>",
        f'<div class="box long"><p class="question">Claim: <i>{escape(data["claim"])}</i></p>',
        verdict_list(data["verdicts"]),
        f'<p class="note">What this does not say:</p><ul class="note">{notes}</ul></div>',
    ]


def _what_was_compared(data: Data) -> Section:
    head = [
        ("trained on", ""),
        ("mixer", ""),
        ("parameters", "total"),
        ("active", "of a token"),
        ("without embeddings", ""),
        ("in mixers", ""),
        ("training", "kFLOPs a token"),
        ("state", "bytes of a row"),
    ]
    rows = [
        (
            each["title"],
            mixer,
            *(f"{size[name]:,}" for name in ("total", "active", "non_embedding", "mixers")),
            f"{size['flops'] / 1e3:,.0f}",
            f"{size['state_bytes']:,}",
        )
        for each in data["experiments"]
        for mixer, size in each["sizes"].items()
    ]
    budgets = "; ".join(
        f"{each['title']}: {each['steps']} steps of {each['rows']} rows of {each['length']}, rate {each['lr']:g}, "
        f"{each['layers']} layers of width {each['width']}, {_seeds(each['seeds'])}, {each['data']}"
        for each in data["experiments"]
    )
    lead = (
        "Three mixers, equal in all else: width, layers, heads, learned positions as in GPT-2, rows in the same order, "
        "schedule, seeds. mha is GPT-2's attention, latent the fork's own (keys and values from one latent without "
        "positions), mla that of DeepSeek-V2, which has a rotary part besides. Random repeats are learned by two "
        "layers of attention alone (recipe toy-induction), characters by GPT-2's blocks: LayerNorm, GELU, a tied head."
    )
    return "What was compared", lead, table(head, rows, f"Counts are exact. {budgets}.")


def _repeats(data: Data, experiment: Data) -> Section:
    found = data["found"][experiment["slug"]]
    learned = table(
        [
            ("mixer", ""),
            ("has heads", "seeds (rate, 95 % interval)"),
            ("accuracy", "mean ± ½ interval"),
            ("accuracy", "by seed"),
            *((f"steps to {level.removeprefix('0')}", "by seed") for level in found[MIXERS[0]]["steps_to"]),
        ],
        [
            (
                mixer,
                _grown(own),
                values(own["accuracy"]),
                _list(own["accuracy"]),
                *(
                    " · ".join("–" if step is None else str(step) for step in own["steps_to"][level])
                    for level in own["steps_to"]
                ),
            )
            for mixer, own in found.items()
        ],
        "Accuracy: of held-out rows by which nothing was chosen. Steps: the first evaluation at or above the accuracy; "
        "– if none. A mixer has heads where accuracy (.5), hit rate (.3) and cut (.5 nats, ten times its control) "
        "agree.",
    )
    circuit = table(
        [
            ("mixer", ""),
            ("cut", "nats, by seed"),
            ("control", "nats, by seed"),
            ("hit rate", "best head"),
            ("attribution", "best head"),
            ("hit behind", "best head"),
            ("cut behind", "nats, by seed"),
        ],
        [
            (
                mixer,
                _list(own["cut"]),
                _list(own["control"]),
                _list(own["hit"]),
                _list(own["attribution"]),
                _list([each["hit"] for each in own["behind"]]),
                _list([each["cut"] for each in own["behind"]]),
            )
            for mixer, own in found.items()
        ],
        "By seed, of the layer that owes most to its induction edges, which lead from a query to the tokens that "
        "followed the same token before. Cut: rise of the loss when exactly these are subtracted from the layer's "
        "output; control: the same for as many other edges of the same queries. Hit rate: how often a head's largest "
        f"weight is on one of them. Behind: the same of the edges one, two or up to {BEHIND} tokens behind, whichever "
        "cut is largest.",
    )
    lead = (
        f"Rows of {experiment['data']}: different ids, the first of which never come again; then pieces of the others "
        "in any order. After a token the model must say what followed it the last time, wherever that comes again. "
        f"{experiment['steps']} steps at {experiment['lr']:g}."
    )
    body = (
        _curves(data, experiment, "held-out accuracy")
        + learned
        + _compared(data, experiment)
        + circuit
        + _maps(data, experiment)
    )
    return f"{experiment['title'].capitalize()}: {experiment['steps']} steps at {experiment['lr']:g}", lead, body


def _grown(own: Data) -> str:
    """In how many seeds there are heads, and the interval of that rate."""
    low, high = own["grown_rate"] or (0.0, 1.0)
    return f"{own['grown']} of {len(own['seeds'])} ({low:.0%} – {high:.0%})"


def _compared(data: Data, experiment: Data) -> str:
    """The differences from mha in sentences."""
    return "".join(f"<p>{escape(each['words'])}</p>" for each in data["comparisons"][experiment["slug"]])


def _list(found: Sequence[float]) -> str:
    """Shares and nats of two decimals, as papers print them: .57 · −.05 · 1.00."""
    rounded = [round(each, 2) for each in found]
    return " · ".join("−" * (each < 0) + f"{abs(each):.2f}".removeprefix("0") for each in rounded)


def _curves(data: Data, experiment: Data, label: str) -> str:
    lines = [
        Line(
            name=f"{row['mixer']}, seed {row['seed']}, step",
            points=list(zip(row["curve"]["steps"], row["curve"]["score"], strict=True)),
            colour=COLOURS[row["mixer"]],
            dashed=False,
        )
        for row in data["runs"]
        if row["experiment"] == experiment["slug"] and row["curve"]["steps"]
    ]
    if not lines:
        return ""
    names = legend([(mixer, COLOURS[mixer]) for mixer in MIXERS])
    chart = line_chart(lines, x_label="step", y_label=label, size=(760, 290))
    told = f"{label.capitalize()} during training, a line a seed; point at a mark for its seed and value."
    return f"<figure>{names}{chart}<figcaption>{told}</figcaption></figure>"


def _maps(data: Data, experiment: Data) -> str:
    """Maps layer × head of every mixer, of the first seed."""
    rows = [row for row in data["runs"] if row["experiment"] == experiment["slug"] and row["seed"] == _first_seed(data)]
    drawn = []
    for field, title, unit, both in MAPS:
        for row in rows:
            layers = row["repeats"]["layers"]
            cells = [layer[field] for layer in layers]
            tips = [
                [
                    f"{row['mixer']}, layer {index}, head {head}\n{title}: {number(value)}"
                    for head, value in enumerate(each)
                ]
                for index, each in enumerate(cells)
            ]
            labels = [f"layer {index}" for index in range(len(layers))]
            svg = heat_map(cells, labels, title=f"{row['mixer']}, {title}", high=1.0, signed=both, tips=tips)
            drawn.append(f'<div><h3>{row["mixer"]}: {escape(title)}</h3><p class="note">{escape(unit)}</p>{svg}</div>')
    columns = f"grid-template-columns:repeat({len(rows)},max-content)"
    told = (
        f"Layer (row) × head (column), seed {_first_seed(data)}, each measure on one scale. Hit rate: how often the "
        "head's largest weight is on a token that followed the query before. Attribution: what those tokens add to the "
        "right logit through the head, over the sum of |what all tokens add|."
    )
    if not rows:
        return ""
    maps = f'<div class="maps" style="{columns}">{"".join(drawn)}</div>'
    return f"<figure>{maps}<figcaption>{told}</figcaption></figure>"


def _text(data: Data, experiment: Data) -> Section:
    found = data["found"][experiment["slug"]]
    several = experiment["seeds"] > 1
    learned = table(
        [
            ("mixer", ""),
            *([("bits per byte", "mean ± ½ interval")] if several else []),
            ("bits per byte", "by seed"),
            ("nats a token", "by seed"),
        ],
        [
            (
                mixer,
                *([values(own["bits_per_byte"])] if several else []),
                *(" · ".join(f"{each:.3f}" for each in own[name]) for name in ("bits_per_byte", "loss")),
            )
            for mixer, own in found.items()
        ],
        "Bits per byte of held-out text, at the last step.",
    )
    circuit = table(
        [
            ("mixer", ""),
            ("has heads", "seeds"),
            ("accuracy", "by seed"),
            ("first copy", "nats, by seed"),
            ("second copy", "nats, by seed"),
            ("cut", "nats, by seed"),
            ("control", "nats, by seed"),
        ],
        [
            (
                mixer,
                f"{own['grown']} of {len(own['seeds'])}",
                *(_list(own[name]) for name in ("repeats_accuracy", "first_loss", "second_loss")),
                _list(own["cut"]),
                _list(own["control"]),
            )
            for mixer, own in found.items()
        ],
        "On random characters of the text's vocabulary, twice in a row: a model that does induction predicts the "
        "second copy.",
    )
    lead = (
        f"nanoGPT's settings for a CPU on {data['data']['source']}: {experiment['layers']} layers of width "
        f"{experiment['width']}; {experiment['steps']} steps at {experiment['lr']:g}, {_seeds(experiment['seeds'])}."
    )
    body = _curves(data, experiment, "held-out nats a token") + learned + _compared(data, experiment) + circuit
    return "Characters of a text", lead, body + _maps(data, experiment) + _samples(data, experiment)


def _samples(data: Data, experiment: Data) -> str:
    rows = [row for row in data["runs"] if row["experiment"] == experiment["slug"] and row["seed"] == _first_seed(data)]
    if not rows:
        return ""
    head = "".join(f'<th style="text-align:left">{escape(row["mixer"])}</th>' for row in rows)
    style = "white-space:pre-wrap;text-align:left;vertical-align:top;min-width:17em"
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="code" style="{style}"><b>{escape(prompt)}</b>{escape(row["samples"][index])}</td>'
            for row in rows
        )
        + "</tr>"
        for index, prompt in enumerate(data["prompts"])
    )
    told = (
        f"Samples side by side: prompts (bold) are held-out text, and row i of a batch draws with seed i at "
        f"temperature 0.8 in every model, of seed {_first_seed(data)}."
    )
    return (
        f'<div class="scroll"><table><caption>{told}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody>'
        "</table></div>"
    )


def _seeds(number: int) -> str:
    return "one seed" if number == 1 else f"{number} seeds"


def _how(data: Data) -> Section:
    seconds = sum(row["seconds"] for row in data["runs"])
    rows = [
        ("command", data["command"]),
        ("program", f"swamla {data['version']}{', commit ' + data['commit'][:12] if data['commit'] else ''}"),
        *([("went on with", "; ".join(data["went_on"]))] if "went_on" in data else []),
        ("text", f"{data['data']['source']}, fingerprint {data['data']['fingerprint'][:16]}"),
        ("machine", ", ".join(f"{name} {value}" for name, value in data["machine"].items())),
        ("training", f"{seconds / 60:.1f} minutes of all runs together, one thread each"),
        ("failed runs", "; ".join(f"{each['run']}: {each['error']}" for each in data["failed"]) or "none"),
    ]
    body = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows)
    commands = "\n".join(data["commands"])
    return (
        "How to get the same",
        "Every run is an ordinary one: it can be resumed, explained and scored as any other.",
        f'<div class="scroll"><table class="words"><caption>The same command goes on where the study was stopped.'
        f"</caption><tbody>{body}</tbody></table></div><details><summary>commands of all runs</summary>"
        f'<pre class="code">{escape(commands)}</pre></details>',
    )
