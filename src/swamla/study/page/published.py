"""Published figures beside the study's own, each marked as comparable or not."""

import statistics
from html import escape

from swamla.study.page.parts import Section, name_of, table
from swamla.study.published import Marked
from swamla.study.results import Results


def published_rows(results: Results) -> Section | None:
    """The table, the study's own arms first."""
    rows_of = results.published()
    if not rows_of:
        return None
    study = results.study
    rows, looks = [], []
    for index, one in enumerate(results.arms):
        mean = f"<b>{statistics.fmean(one.scores.values()):.4f}</b>" if one.scores else "none"
        what = f"{name_of(results, index)}<small>of this study</small>"
        trained = one.arm.config.train
        tokens = one.arm.steps * trained.batch_size * trained.block_size
        value = f"{mean}<small>{escape(study.axis.name)}</small>"
        rows.append([what, value, _size(one.arm.costs.parameters, tokens), "", ""])
        looks.append("")
    for each in rows_of:
        row = each.row
        data = ", ".join(text for text in (row.data, row.tokenizer) if text)
        rows.append(
            [
                f"<b>{escape(row.name)}</b><small>{escape(row.source)}</small>",
                f"{row.value:,.6g}<small>{escape(row.unit)}</small>",
                _size(row.parameters, row.tokens),
                _mark(each),
                f"{_reasons(each)}{f'<br>Data: {escape(data)}.' if data else ''}"
                f"{f'<br>{escape(row.note)}' if row.note else ''}",
            ]
        )
        looks.append("" if each.comparable else "apart")
    comparable = sum(each.comparable for each in rows_of)
    lead = (
        f"What others have published, of which {comparable or 'none'} of {len(rows_of)} "
        f"{'is' if comparable < 2 else 'are'} comparable with this study. No interval and no verdict above rests on "
        "these: they are single figures, of other programs."
    )
    meaning = (
        "A row is comparable if its author says so and it has this study's unit, its data by the fingerprint, its "
        "tokenizer, and its tokens of training within 1 %. Parameters do not decide it: compare them. Grey: not "
        "comparable."
    )
    head = ["model|where", "value|unit", "parameters|tokens of training", "comparable", "why, or why not"]
    return "Published figures", lead, table(head, rows, meaning, "stacked published", looks)


def _size(parameters: int | None, tokens: int | None) -> str:
    own, seen = ("–" if count is None else f"{count:,}" for count in (parameters, tokens))
    return f"{own}<small>{seen}</small>"


def _mark(one: Marked) -> str:
    look, word = ("yes", "yes") if one.comparable else ("no", "no")
    return f'<span class="answer {look}">{word}</span>'


def _reasons(one: Marked) -> str:
    said, found = one.row.why.strip().rstrip("."), "; ".join(one.differences)
    if one.overruled:
        text = f"{found}. (Claimed to be comparable: {said}.)"
    else:
        text = f"{said}.{f' Also: {found}.' if found else ''}"
    return escape(text[0].upper() + text[1:])
