"""How many passes over its text a run has made."""

from collections.abc import Iterator, Mapping


class Epochs:
    """Passes over each source, told as they are completed: all of the first ten, then every tenth, every hundredth …

    lengths: positions that carry loss in a pass over each source.
    """

    def __init__(self, lengths: Mapping[str, int]) -> None:
        self.lengths = dict(lengths)

    def seen(self, tokens: int) -> float | None:
        """Passes over the source that was seen most often, after so many tokens; None where the size is unknown."""
        return max((tokens / length for length in self.lengths.values()), default=None)

    def describe(self, tokens: int) -> str:
        """How many passes so many tokens are, as text; empty where the size is unknown."""
        seen = ", ".join(f"{tokens / length:.2f} epochs of {source}" for source, length in self.lengths.items())
        return f"{tokens:,} tokens, {seen}" if seen else ""

    def completed(self, before: int, now: int) -> Iterator[str]:
        """A line for each source of which a pass ended between two numbers of tokens."""
        for source, length in self.lengths.items():
            passes = now // length
            if passes > before // length and passes % 10 ** (len(str(passes)) - 1) == 0:
                yield f"all of {source} ({length:,} tokens) was seen {passes} time{'s' * (passes > 1)}"
