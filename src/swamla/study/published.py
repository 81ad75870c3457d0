"""Published figures beside a study's own, each marked as comparable or not.

Its author may say that a row is not comparable, and has to say why. That it is comparable the study decides: only with
the same unit, the same data by its fingerprint, the same tokenizer and as many tokens of training.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from swamla.errors import require

TOKENS_APART = 0.01  # relative
SHORTEST = 12  # characters of a fingerprint that tell it
_SOURCE = re.compile(r"https?://\S+\.\S+|arXiv[: ]?\d{4}\.\d{4,5}(v\d+)?", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published figure, a table [[published]] of STUDY.toml.

    name: of the model.
    source: where it stands, a URL or "arXiv 2405.04434".
    value: the figure.
    unit: its unit, e.g. bits per byte.
    comparable: whether it says anything of this study's arms, as its author sees it.
    why: the reason, either way.
    parameters: of the model, without embeddings if that is known.
    tokens: of its training.
    data: what it was trained on and scored on.
    tokenizer: of its data.
    fingerprint: of its data, as a study's page has it, or its first 12 characters; papers have none.
    note: anything else that a reader should know.
    """

    name: str
    source: str
    value: float
    unit: str
    comparable: bool
    why: str
    parameters: int | None = None
    tokens: int | None = None
    data: str = ""
    tokenizer: str = ""
    fingerprint: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        require(bool(self.name.strip()), "name", self.name, "must name the model")
        is_source = _SOURCE.fullmatch(self.source.strip()) is not None
        require(is_source, "source", self.source, 'must be a URL, or such as "arXiv 2405.04434"')
        require(bool(self.unit.strip()), "unit", self.unit, "must say what the value is, e.g. bits per byte")
        require(bool(self.why.strip()), "why", self.why, "must say why the row is comparable, or why not")
        for name in ("parameters", "tokens"):
            count = self.__dict__[name]
            require(count is None or count > 0, name, count, "must be > 0, or left out")
        known = not self.fingerprint or re.fullmatch(rf"[0-9a-f]{{{SHORTEST},64}}", self.fingerprint) is not None
        allowed = f"must be hexadecimal, {SHORTEST} characters at least, as a study's page has it"
        require(known, "fingerprint", self.fingerprint, allowed)


@dataclass(frozen=True, kw_only=True)
class Marked:
    """A published row with the study's judgement. differences: what makes it incomparable; the author's word is apart.

    overruled: the author says that it is comparable, and the study that it is not.
    """

    row: Published
    differences: tuple[str, ...]

    @property
    def comparable(self) -> bool:
        """Whether both the author and the study say so."""
        return self.row.comparable and not self.differences

    @property
    def overruled(self) -> bool:
        """Whether the author claims what the study denies."""
        return self.row.comparable and bool(self.differences)


def marked(row: Published, *, unit: str, data: Mapping[str, str], tokens: int) -> Marked:
    """The row, judged against a study of this unit, data (`Study.data`) and training tokens of a run."""
    found = []
    if _folded(row.unit) != _folded(unit):
        found.append(f"another unit than {unit}")
    if not row.fingerprint:
        found.append("no fingerprint shows that its data is this study's, split alike")
    elif not data.get("fingerprint", "").startswith(row.fingerprint):
        found.append("other data, by its fingerprint")
    if "tokenizer" in data and _folded(row.tokenizer) != _folded(data["tokenizer"]):
        found.append(
            f"{'another tokenizer' if row.tokenizer else 'no word of the tokenizer'}, here {data['tokenizer']}"
        )
    if row.tokens is None:
        found.append("no word of its training tokens")
    elif abs(row.tokens / tokens - 1) > TOKENS_APART:
        times = row.tokens / tokens
        found.append(f"{times:,.{0 if times >= 10 else 2}f} times this study's tokens")
    return Marked(row=row, differences=tuple(found))


def _folded(words: str) -> str:
    return " ".join(words.lower().split())
