"""What `swamla compare RUN RUN` found: both runs' costs and figures, the verdict in words, JSON and CSV."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from swamla.config import to_plain
from swamla.data.caching import short_source
from swamla.files import write_text_atomically
from swamla.interpret.sections import Positions, as_plain
from swamla.study.caveats import differing_settings
from swamla.study.export import as_csv, finite
from swamla.study.matching import Costs
from swamla.study.two_runs import DocumentDifference, KindDifference, Paired, TokenDifference
from swamla.train.config import RunConfig
from swamla.train.plot import Curve

FORMAT = 1
COMPARED = "compared.json"
FEW = 20.0  # documents of equal weight, below which an interval is said to rest on few
SIMILAR = 0.95  # the share of the documents that count, above which they are not said to differ in size

Both = tuple[Any, Any]
Kind = Literal["text", "task"]


@dataclass(frozen=True, kw_only=True)
class Side:
    """A run. step: of its checkpoint.  tokens: trained on until then, None if unknown, as of an imported model.

    last: the step of its last checkpoint, where the one compared is the best of its evaluations.
    block_size: of the rows it was scored in; costs are at that length.  data, tokenizer: the source and the tokenizer
    of its training, tokenizer_id and data_id their fingerprints, "" if unknown.  vocabulary: ids of the tokenizer.
    began: whose weights it began with, "" if its own.  imported: of its config only the model is its own.  curve: of
    its training, in `Compared.curve_unit`.
    """

    name: str
    folder: str
    step: int
    config: RunConfig
    costs: Costs
    tokens: int | None
    precision: str
    block_size: int
    data: str
    data_id: str
    tokenizer: str
    tokenizer_id: str
    vocabulary: int
    began: str = ""
    imported: bool = False
    last: int | None = None
    curve: Curve = field(default_factory=lambda: Curve(name="", training=[], held_out=[], lost=[]))

    @property
    def training_flops(self) -> float | None:
        """Floating-point operations of its training, counted from the config."""
        return None if self.tokens is None else self.tokens * self.costs.flops


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Two runs. kind: what they were scored on.  source, part: which documents.  score: of bits per byte, or accuracy.

    amounts_N: (first, second) for each document: bits of a text, right answers in a row of a task.  weights_N: bytes,
    or labels.  loss: nats a label of each run.  labels: predictions of each.  positions, tokens, kinds: only where
    both read the same tokens.  apart: bytes counted minus bytes of decoded tokens.  notes: what to know of it.
    """

    kind: Kind
    first: Side
    second: Side
    source: str
    part: str
    score: Paired
    amounts_N: Both
    weights_N: Any
    loss: tuple[float, float]
    labels: tuple[int, int]
    documents: tuple[tuple[DocumentDifference, ...], tuple[DocumentDifference, ...]]
    curve_unit: str
    shares: tuple[tuple[float, float], ...] = ()
    positions: tuple[Positions, Positions] | None = None
    tokens: tuple[tuple[TokenDifference, ...], tuple[TokenDifference, ...]] | None = None
    kinds: tuple[tuple[KindDifference, ...], tuple[KindDifference, ...]] | None = None
    apart: int = 0
    notes: tuple[str, ...] = ()
    command: str = ""
    version: str = ""

    @property
    def sides(self) -> tuple[Side, Side]:
        """Both runs."""
        return self.first, self.second

    @property
    def unit(self) -> str:
        """Of the score."""
        return "bits per byte" if self.kind == "text" else "accuracy"

    @property
    def _prediction(self) -> str:
        return "a token" if self.kind == "text" else "an answer"

    @property
    def what(self) -> str:
        """What is drawn by the bootstrap, in the plural."""
        return "documents" if self.kind == "text" else "rows"

    @property
    def same_tokens(self) -> bool:
        """Whether both have the same tokenizer."""
        return self.first.tokenizer_id == self.second.tokenizer_id

    @property
    def configs(self) -> dict[str, RunConfig]:
        """The runs' configs by their names."""
        return {side.name: side.config for side in self.sides}

    @property
    def differing(self) -> dict[str, dict[str, Any]]:
        """Dotted setting → run → value, for those in which the configs differ; of an imported run those of models."""
        found = differing_settings(self.configs)
        if not any(side.imported for side in self.sides):
            return found
        return {setting: values for setting, values in found.items() if setting.startswith("model.")}

    @property
    def whole_rows(self) -> dict[str, int] | None:
        """Of a task: rows of which both runs, only the first, only the second, or neither has every answer right."""
        if self.kind == "text":
            return None
        first, second = (right == self.weights_N for right in self.amounts_N)
        both, neither = int((first & second).sum()), int((~first & ~second).sum())
        return {
            "both": both,
            "first": int(first.sum()) - both,
            "second": int(second.sum()) - both,
            "neither": neither,
        }

    @property
    def answer(self) -> Literal["better", "worse", "not shown", "alike", "no interval"]:
        """Of the second run against the first."""
        mean, low, _ = self.score.difference
        if self.score.lower == self.score.higher == 0:
            return "alike"
        if not math.isfinite(low):
            return "no interval"
        if not self.score.shown:
            return "not shown"
        return "better" if (mean < 0) == (self.kind == "text") else "worse"

    def verdict(self) -> list[str]:
        """What was found, in sentences."""
        first, second = self.first.name, self.second.name
        mean, low, high = (float(value) for value in self.score.difference)
        count = f"{self.score.count:,} {self.what if self.score.count > 1 else self.what[:-1]}"
        interval = f"95 % bootstrap interval of the difference {low:+.4f} to {high:+.4f} over {count}"
        does = f"predicts {'this text' if self.kind == 'text' else 'these answers'}"
        unit = self.unit if self.kind == "text" else f"in {self.unit}"
        said = {
            "better": f"{second} {does} better than {first}, by {abs(mean):.4f} {unit} ({interval}).",
            "worse": f"{second} {does} worse than {first}, by {abs(mean):.4f} {unit} ({interval}).",
            "not shown": f"No difference was shown between {second} and {first}: {mean:+.4f} {unit} ({interval}).",
            "alike": f"{second} and {first} have the same figure in each of {count}.",
            "no interval": f"{second} and {first} differ by {mean:+.4f} {unit} on one document, which has no "
            "interval: it takes more documents.",
        }[self.answer]
        figures = f"{first} {self.score.first:.4f}, {second} {self.score.second:.4f} {self.unit}"
        better, worse = self.score.lower, self.score.higher
        if self.kind == "task":
            better, worse = worse, better
        split = f"{second} is better in {better:,} of {self.score.count:,} {self.what}, worse in {worse:,}."
        return [said, f"{figures}. {split}" if self.score.count > 1 else f"{figures}."]

    def not_said(self) -> list[str]:
        """What the verdict does not say."""
        paired = (
            f"The interval is of {self.what} like these, drawn anew with both runs' figures; it is not of seeds. Two "
            "runs are one seed each: that one architecture, or one setting, is better than the other cannot be "
            "concluded. swamla compare ARM ARM trains several seeds of each."
        )
        others = (
            "Of texts of another kind it says nothing."
            if self.kind == "text"
            else "Of other sizes of the task it says nothing."
        )
        said = [paired, others]
        if self.score.count > 1 and self.score.effective < FEW:
            few = f"The interval rests on few {self.what}, {self.score.count:,}"
            if self.score.effective < SIMILAR * self.score.count:
                few += f", which differ in size and tell as much as {self.score.effective:.1f} of equal size"
            said.append(f"{few}: it can be too narrow.")
        if self.first.block_size != self.second.block_size and self.kind == "text":
            said.append(
                f"Rows had {self.first.block_size:,} tokens for {self.first.name} and {self.second.block_size:,} for "
                f"{self.second.name}, as in training: who has longer rows knows more of the text before "
                "(a `block_size` may be given for both)."
            )
        tokens = self.first.tokens, self.second.tokens
        if None not in tokens and tokens[0] != tokens[1]:
            said.append(
                f"They were trained for {tokens[0]:,} and {tokens[1]:,} tokens: the difference may be that of their "
                "training."
            )
        said += [
            f"Of {side.name}, step {side.step:,} is compared, the best of its evaluations by held-out loss, and not "
            f"its last, {side.last:,}: where that loss is of this text, a run that was evaluated more often gains by "
            "the choice (with `checkpoint` latest nothing is chosen)."
            for side in self.sides
            if self.kind == "text" and side.last not in (None, side.step)
        ]
        return [*said, *self.notes]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Heads and rows for the screen."""
        heads = ["", *(side.name for side in self.sides)]

        def row(name: str, of: Callable[[Side], str | None]) -> list[str]:
            return [name, *(of(side) or "unknown" for side in self.sides)]

        scores = dict(zip((side.name for side in self.sides), (self.score.first, self.score.second), strict=True))
        losses = dict(zip((side.name for side in self.sides), self.loss, strict=True))
        rows = [
            row(self.unit, lambda side: f"{scores[side.name]:.4f}"),
            row(f"nats {self._prediction}", lambda side: f"{losses[side.name]:.4f}"),
            row("parameters", lambda side: f"{side.costs.total_parameters:,}"),
            row("without embeddings", lambda side: f"{side.costs.parameters:,}"),
            row("tokens trained on", lambda side: None if side.tokens is None else f"{side.tokens:,}"),
            row("training FLOPs", lambda side: f"{side.training_flops:.3g}" if side.training_flops else None),
            row("state bytes, fp32", lambda side: f"{side.costs.state:,} at {side.block_size:,}"),
            row("checkpoint", lambda side: f"step {side.step:,}, {side.precision}"),
            row("data", lambda side: _identified(short_source(side.data), side.data_id)),
            row("tokenizer", lambda side: _identified(side.tokenizer, side.tokenizer_id)),
        ]
        return heads, rows

    def as_dict(self) -> dict[str, Any]:
        """All of it but the single documents, for JSON."""
        extremes = {"documents": self.documents, "tokens": self.tokens, "kinds": self.kinds}
        return {
            "format": FORMAT,
            "version": self.version,
            "command": self.command,
            "kind": self.kind,
            "unit": self.unit,
            "source": self.source,
            "part": self.part,
            "verdict": self.verdict(),
            "not_said": self.not_said(),
            "answer": self.answer,
            "runs": [_side(side) for side in self.sides],
            "differing": self.differing,
            "score": finite(asdict(self.score)),
            "loss": list(self.loss),
            "labels": list(self.labels),
            "bytes": int(self.weights_N.sum()) if self.kind == "text" else None,
            "bytes_apart": self.apart if self.kind == "text" else None,
            "whole_rows": self.whole_rows,
            "shares": [list(point) for point in self.shares],
            "positions": [as_plain(asdict(one)) for one in self.positions] if self.positions else None,
            "curves": {"unit": self.curve_unit, "runs": [as_plain(asdict(side.curve)) for side in self.sides]},
        } | {
            name: None if both is None else {"better": _plain(both[0]), "worse": _plain(both[1])}
            for name, both in extremes.items()
        }

    def write(self, folder: Path) -> list[Path]:
        """Write documents.csv (or rows.csv), tokens.csv where tokens are the same, and compared.json; returns them."""
        first, second = self.first.name, self.second.name
        weight, amount = ("bytes", "bits") if self.kind == "text" else ("answers", "right")
        rows = [
            [number, int(size), float(one), float(other)]
            for number, (size, one, other) in enumerate(zip(self.weights_N, *self.amounts_N, strict=True))
        ]
        texts = {
            f"{self.what}.csv": as_csv([self.what[:-1], weight, *(f"{amount} {n}" for n in (first, second))], rows)
        }
        if self.tokens is not None:
            heads = ["document", "position", "before", "token", "after", f"nats {first}", f"nats {second}"]
            texts["tokens.csv"] = as_csv(
                heads,
                [
                    [each.document, each.position, each.before, each.token, each.after, each.first, each.second]
                    for one in self.tokens
                    for each in one
                ],
            )
        plain = json.dumps(self.as_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        texts[COMPARED] = plain + "\n"  # last: it marks a whole report
        for name, text in texts.items():
            write_text_atomically(folder / name, text)
        return [folder / name for name in texts]


def _identified(name: str, fingerprint: str) -> str:
    return f"{name} ({fingerprint[:12]})" if fingerprint else name


def _side(side: Side) -> Mapping[str, Any]:
    return {
        "name": side.name,
        "folder": side.folder,
        "step": side.step,
        "tokens": side.tokens,
        "training_flops": side.training_flops,
        "precision": side.precision,
        "block_size": side.block_size,
        "data": side.data,
        "data_fingerprint": side.data_id,
        "tokenizer": side.tokenizer,
        "tokenizer_fingerprint": side.tokenizer_id,
        "vocabulary": side.vocabulary,
        "began_with": side.began,
        "costs": asdict(side.costs),
        "config": to_plain(side.config),
    }


def _plain(found: tuple[Any, ...]) -> list[Any]:
    """With the difference, and for a kind of tokens the total, which are not fields."""
    more = ("difference", "total")
    return [
        as_plain(asdict(each) | {name: getattr(each, name) for name in more if hasattr(each, name)}) for each in found
    ]
