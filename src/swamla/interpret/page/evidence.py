"""The sections of a report, each a question with its evidence, drawn from the data of explain.json."""

from collections.abc import Callable
from html import escape

from swamla.interpret.page.parts import Data, Map, drawn_maps, legend, map_figure, name_of, signed, table, visible
from swamla.interpret.page.svg import BLUE, GREY, ORANGE, Line, bar_chart, heat_map, line_chart, number, shade
from swamla.interpret.verdicts import MATTERS

_PALE = 0.5  # of the deepest blue, on which black letters can be read, and which ink can print by the page
Section = tuple[str, str, str]  # heading, what it asks and how to read it, evidence


def _induction(data: Data) -> Section:
    repeats = data["repeats"]
    convolved = any(layer["conv"] > 1 for layer in repeats["layers"])
    maps = [
        Map("hit", "hit rate", "share of queries"),
        Map("attribution", "attribution", "of the right logit, −1 … 1", signed=True),
        Map("induction", "induction", "share of |weight|"),
        Map("duplicate", "same token before", "share of |weight|"),
        Map("previous", "previous token", "share of |weight|"),
    ]
    if convolved:
        maps.insert(1, Map("hit_conv", "hit rate, convolved", "share of queries"))
        maps.insert(4, Map("induction_conv", "induction, convolved", "share of |weight|"))
    lead = (
        "A random row is repeated: what followed a token before follows it again. A head that looks there, and is "
        "needed for it, does induction. A pattern alone deceives, so accuracy, hit rate and cut must agree."
    )
    losses = (
        f"<p>Accuracy on the second copy: <b>{number(repeats['accuracy'])}</b>, over {repeats['predictions']:,} "
        f"predictions; of a guess among the row's ids {number(repeats['chance'])}. "
        f"{_with_copies_of_another_length(data)}Loss on the first copy "
        f"<b>{repeats['first_loss']:.2f}</b>, on the second <b>{repeats['second_loss']:.2f}</b> nats a token.</p>"
    )
    carried = " Convolved: on that token and the next ones, into which a convolution carries it." if convolved else ""
    caption = (
        "Layer (row) × head (column), each map on one scale. Hit rate: how often the head's largest |weight| is on the "
        "token after the query's first occurrence. Attribution: what that token adds to the right logit through the "
        f"head, over the sum of |what all tokens add|. Induction: the share of |weight| on that token.{carried} Same "
        "token before: on the first occurrence itself. "
        """<span class="screen">A click on a cell shows the head's attention.</span>"""
    )
    body = losses + _cuts(data, convolved=convolved) + map_figure(data, "repeats", maps, caption)
    return "Induction, on random repeats", lead, body


def _with_copies_of_another_length(data: Data) -> str:
    other = data["repeats"]["other"]
    best = number(max(max(layer) for layer in other["hit_conv"]))
    accuracy, length = number(other["accuracy"]), other["length"]
    return f"With copies of {length} tokens accuracy {accuracy}, the best head's hit rate there {best}. "


def _cuts(data: Data, *, convolved: bool) -> str:
    """The table of cut effects, with a column for convolved values where there are any."""
    head = [("layer", ""), ("best hit rate", "share of queries"), ("attribution", "best head, −1 … 1"), ("cut", "nats")]
    head += [("cut, convolved", "nats")] * convolved + [("control", "nats")]
    rows = []
    for index, layer in enumerate(data["repeats"]["layers"]):
        row = [name_of(data, index), number(max(layer["hit"])), number(max(layer["attribution"])), signed(layer["cut"])]
        row += [signed(layer["cut_conv"]) if layer["conv"] > 1 else ""] * convolved + [signed(layer["control"])]
        rows.append(row)
    meaning = (
        "Cut: how much the second copy's loss rises when exactly the layer's induction edges are subtracted from its "
        "output. Control: the same for as many other edges; it should be near 0."
    )
    if convolved:
        meaning += " Convolved: the edges to all tokens into which a convolution carries the one that followed."
    return table(head, rows, meaning)


def attention(data: Data) -> Section:
    """Every head's weights on `texts`, which the script draws."""
    lead = (
        "Every head's weights, exactly as the model uses them: softmax probabilities, or the signed weights that the "
        "recurrence of a linear mixer implies. With the values, gates and output projections they add up to the "
        "mixer's output."
    )
    options = "".join(
        f'<option value="{index}">{escape(text["name"])}</option>' for index, text in enumerate(data["texts"])
    )
    body = f"""<figure id="explorer" tabindex="0" aria-label="attention of every head">
<div class="bar-of-choices"><label>text <select id="text">{options}</select></label>
<span id="status" aria-live="polite"></span>
<span class="note screen"><kbd>←</kbd> <kbd>→</kbd> head, <kbd>↑</kbd> <kbd>↓</kbd> layer, <kbd>,</kbd> <kbd>.</kbd>
token that reads; click here first</span></div>
<div class="view"><div><div class="axis">token that is read →</div><div class="square">
<div class="axis down">← token that reads</div><canvas id="matrix"></canvas><div id="line"></div></div>
<div class="colours"><span id="low"></span><canvas id="scale"></canvas><span id="high"></span>
<span id="kind"></span></div>
</div><div><div class="axis">all heads: a row a layer, a column a head</div><div id="thumbs"></div></div></div>
<div id="tokens" class="code"></div><p class="note" id="text-note"></p>
<figcaption>Left: the chosen head. The orange line is the token that reads; its weights colour the text below, where it
has a frame. Blue is positive, <b>red negative</b>; the depth of a colour is the root of |weight| over the largest of
the layer, so that small weights can be seen.<span class="screen"> Point at a cell or a token for its
weight.</span>{_brackets(data)}</figcaption>
</figure>"""
    return "The attention of every head", lead, body


def _brackets(data: Data) -> str:
    """What ids in brackets are, where one is drawn."""
    drawn = any(token.startswith("⟨") and token[1:-1].isdigit() for text in data["texts"] for token in text["tokens"])
    return " A number in ⟨ ⟩ is an id that is no text by itself, such as a part of a character." if drawn else ""


def _worth(data: Data) -> Section | None:
    worth = data["worth"]
    if worth is None:
        return None
    lead = (
        "Each head, mixer and FFN is left out in turn, and the layers above see what is missing. One head alone "
        "underestimates, because heads stand in for each other; a whole layer overestimates, because those above never "
        "saw such a stream."
    )
    rises = [rise for layer in worth["layers"] for rise in layer["heads"]]
    maps = [
        Map(
            "heads",
            "one head left out",
            "rise of the loss, nats",
            high=max(MATTERS, *map(abs, rises)),  # what is next to nothing is pale
            signed=min(rises) < -0.005,
        ),
    ]
    copying = [Map("copying", "copying", "−1 … 1, by the weights alone", signed=True)]
    bars = [
        (name_of(data, index), [("mixer", layer["mixer"], BLUE), ("FFN", layer["ffn"], ORANGE)])
        for index, layer in enumerate(worth["layers"])
    ]
    names = legend([("mixer left out", BLUE), ("FFN left out", ORANGE)], square=True)
    caption = (
        f"Rise of the loss in nats, over {worth['tokens']:,} tokens of text on which the whole model has "
        f"{worth['loss']:.3f}. Copying: whether a head, where it looks at a token, raises that token's own logit (1) "
        "or lowers it (−1)."
    )
    drawn = f"{names}{bar_chart(bars, x_label='rise of the loss, nats a token')}"
    both = drawn_maps(data, "worth", maps) + drawn_maps(data, "layers", copying)
    body = (
        f'<figure><div class="side"><div>{drawn}</div><div class="maps">{both}</div></div>'
        f"<figcaption>{caption}</figcaption></figure>"
    )
    return "What the loss owes to each head and layer", lead, body


def _patterns(data: Data) -> Section | None:
    patterns = data["patterns"]
    if patterns is None:
        return None
    farthest = max(context for layer in patterns["layers"] for context in layer["effective_context"])
    maps = [
        Map("previous", "previous token", "share of |weight|"),
        Map("sink", "first token (sink)", "share of |weight|"),
        Map("entropy", "entropy", "0: one token, 1: all alike"),
        Map("effective_context", "effective context", "tokens", high=float(farthest)),
    ]
    lead = (
        "Where the weights lie on text. A head that looks somewhere need not matter: the section above says what does."
    )
    caption = (
        f"Means over {patterns['tokens']:,} tokens in rows of {patterns['length']}. Effective context: the nearest "
        "tokens that hold nine tenths of the |weight| that is not on the first token."
    )
    return "What heads look at, on text", lead, map_figure(data, "patterns", maps, caption)


def _lens(data: Data) -> Section | None:
    guesses, lens = data["guesses"], data["lens"]
    read, follows = guesses["read"], guesses["follows"]
    names = ["embedding", *(name_of(data, index) for index in range(len(data["layers"])))]
    body = ""
    for name, tokens, probabilities in zip(names, guesses["tokens"], guesses["probability"], strict=True):
        cells = []
        for token, probability, right in zip(tokens, probabilities, follows, strict=True):
            weight = "font-weight:700;" if token == right else ""
            tip = escape(f"“{visible(token)}”, probability {number(probability)}")
            style = f"background:{shade(_PALE * probability)};{weight}"
            cells.append(f'<td class="code" style="{style}" data-tip="{tip}">{escape(visible(token))}</td>')
        body = f"<tr><td>{escape(name)}</td>{''.join(cells)}</tr>{body}"  # the last layer on top
    head = "".join(f'<th class="code">{escape(visible(token))}</th>' for token in read)
    foot = "".join(f'<td class="code">{escape(visible(token))}</td>' for token in follows)
    caption = (
        "The likeliest next token, read from the stream behind each layer (rows) at each token (columns); darker is "
        "more probable, bold is right. Last row: what follows."
    )
    grid = (
        f'<div class="scroll"><table class="lens"><caption>{caption}</caption><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{body}</tbody><tfoot><tr><td>follows</td>{foot}</tr></tfoot></table></div>"
    )
    lead = (
        "What the model would say if its upper layers did nothing: the final norm and the head read the stream behind "
        "each layer."
    )
    if lens is not None:
        line = Line(name="loss behind", points=list(enumerate(lens["loss"])))
        chart = line_chart(
            [line], x_label="stream behind", y_label="loss, nats a token", x_names=names, size=(700, 230)
        )
        told = f"The loss of these readings, over {lens['tokens']:,} tokens of text."
        grid = f"<figure>{chart}<figcaption>{told}</figcaption></figure>{grid}"
    return "Where the prediction is made: the logit lens", lead, grid


def _context(data: Data) -> Section | None:
    positions, needed = data["positions"], data["needed"]
    if positions is None:
        return None
    points = [
        ((first * last) ** 0.5, loss)
        for first, last, loss in zip(positions["first"], positions["last"], positions["loss"], strict=True)
    ]
    spans = [
        f"tokens {first}–{last}" if first < last else f"token {first}"
        for first, last in zip(positions["first"], positions["last"], strict=True)
    ]
    curve = Line(
        name="loss",
        points=points,
        tips=[f"{span}: {number(loss)} nats" for span, (_, loss) in zip(spans, points, strict=True)],
    )
    axis = "position in the document, tokens"
    left = line_chart([curve], x_label=axis, y_label="loss, nats a token", logarithmic=True)
    told = f"Loss by position, means over 1, 2, 3–4, 5–8 … of {sum(positions['tokens']):,} predictions."
    figures = f"<figure>{left}<figcaption>{told}</figcaption></figure>"
    if needed is not None:
        found = needed["found"]
        points = [(int(tokens), loss) for tokens, loss in found["losses"].items()]
        if found["longest"] not in dict(points):
            points.append((found["longest"], found["loss"]))
        points.sort()
        ends = [points[0][0], points[-1][0]]
        lines = [
            Line(
                name="loss",
                points=points,
                tips=[f"the last {tokens} tokens: {number(loss)} nats" for tokens, loss in points],
            ),
            Line(name="all", points=[(end, found["loss"]) for end in ends], colour=GREY, dashed=True, marks=False),
        ]
        right = line_chart(lines, x_label="last tokens that are read", y_label="loss, nats a token", logarithmic=True)
        told = (
            f"Loss when only the last tokens are read, over {needed['predictions']} predictions; dashed: all "
            f"{found['longest']} tokens. {found['tokens']} are within {found['within']} nats of it, as measured."
        )
        figures += f"<figure>{right}<figcaption>{told}</figcaption></figure>"
    lead = (
        "How the loss falls with what has been read, and how much of it is needed. Both axes of tokens are logarithmic."
    )
    return "Context: how it is used, and how much", lead, f'<div class="two">{figures}</div>'


def _routing(data: Data) -> Section | None:
    routing = data["routing"]
    if routing is None:
        return None
    known = [index for index, tokens in enumerate(routing["layers"][0]["tokens"]) if tokens]
    labels = [routing["classes"][index] for index in known]
    high = max(share for layer in routing["layers"] for row in layer["share"] for share in row)
    drawn = []
    for layer in routing["layers"]:
        rows = [layer["share"][index] for index in known]
        tips = [
            [f"layer {layer['layer']}, expert {expert}\n{label}: {number(share)}" for expert, share in enumerate(row)]
            for label, row in zip(labels, rows, strict=True)
        ]
        title = f"layer {layer['layer']}"
        drawn.append(f"<div><h3>{title}</h3>{heat_map(rows, labels, title=title, high=high, tips=tips)}</div>")
    counts = ", ".join(
        f"{name} {tokens:,}"
        for name, tokens in zip(routing["classes"], routing["layers"][0]["tokens"], strict=True)
        if tokens
    )
    caption = (
        f"Share of the choices of a class's tokens (row) that each expert (column) has. Tokens of each class: {counts}."
    )
    lead = (
        "Which experts each class of tokens goes to. Where rows look alike the router does not tell the classes apart."
    )
    return (
        "Experts, by class of token",
        lead,
        f'<figure><div class="maps">{"".join(drawn)}</div><figcaption>{caption}</figcaption></figure>',
    )


def _taps(data: Data) -> Section | None:
    rows = [
        (f"{name_of(data, index)}, {what}", shares)
        for index, layer in enumerate(data["layers"])
        for what, shares in layer["taps"].items()
    ]
    if not rows:
        return None
    labels, shares = zip(*rows, strict=True)
    width = max(map(len, shares))
    columns = ["t", *(f"t−{back}" for back in range(1, width))]
    tips = [
        [
            f"{label}\nx at {column}: {number(share)} of the filters' size"
            for column, share in zip(columns, row, strict=False)
        ]
        for label, row in rows
    ]
    drawn = heat_map(shares, labels, title="convolution taps", high=1.0, columns=columns, tips=tips)
    lead = (
        "A short convolution mixes each token with the few before it, so a layer that has one needs no head for the "
        "previous token: patterns of its heads are then shifted."
    )
    caption = "Mean |filter| over the channels, by how far back it reads, as a share of all taps." + (
        " Input: the convolution of what enters the mixer."
        if any("input" in each["taps"] for each in data["layers"])
        else ""
    )
    return "Convolutions", lead, f"<figure>{drawn}<figcaption>{caption}</figcaption></figure>"


SECTIONS: tuple[Callable[[Data], Section | None], ...] = (
    _induction,
    attention,
    _worth,
    _patterns,
    _lens,
    _context,
    _routing,
    _taps,
)
