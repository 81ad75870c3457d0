"""Reports of a training step: metrics.jsonl, the console, completed epochs, and warnings about routers."""

from collections.abc import Iterator, Mapping

from swamla import distributed
from swamla.model.accounting import TrainingFlops
from swamla.train.config import RunConfig
from swamla.train.router_health import RouterHealth
from swamla.train.state import TrainState
from swamla.train.step import StepResult
from swamla.train.tracking.display import Display
from swamla.train.tracking.trackers import Records
from swamla.train.utilisation import peak_memory, peak_of


class Epochs:
    """Counts passes over each source; reports the first ten, then every tenth up to 100, every hundredth up to 1000 …

    lengths: labels in one pass over each source; empty if the sizes are unknown.
    """

    def __init__(self, lengths: Mapping[str, int]) -> None:
        self.lengths = dict(lengths)

    def seen(self, tokens: int) -> float | None:
        """Passes over the source with the most passes, after `tokens` labels; None if the sizes are unknown."""
        return max((tokens / length for length in self.lengths.values()), default=None)

    def describe(self, tokens: int) -> str:
        """The number of passes in `tokens` labels, as text; empty if the sizes are unknown."""
        seen = ", ".join(f"{tokens / length:.2f} epochs of {source}" for source, length in self.lengths.items())
        return f"{tokens:,} tokens, {seen}" if seen else ""

    def completed(self, before: int, now: int) -> Iterator[str]:
        """A line for each source of which a pass ended between `before` and `now` labels."""
        for source, length in self.lengths.items():
            passes = now // length
            if passes > before // length and passes % 10 ** (len(str(passes)) - 1) == 0:
                yield f"all of {source} ({length:,} tokens) was seen {passes} time{'s' * (passes > 1)}"


class StepLog:
    """Records and prints training steps. Speeds exclude evaluations and saves; the console averages about ten steps.

    bits_per_nat: bits per byte for a loss of one nat; None where bytes have no meaning.
    """

    def __init__(
        self,
        config: RunConfig,
        state: TrainState,
        metrics: Records,
        display: Display,
        bits_per_nat: float | None,
        epochs: Epochs,
    ) -> None:
        self.config, self.state, self.metrics, self.display = config, state, metrics, display
        self.bits_per_nat, self.epochs = bits_per_nat, epochs
        # On one rank, because it may be measured.
        self.peak = distributed.on_main(lambda: peak_of(state.device, state.precision))
        self.flops = TrainingFlops(config.model)
        self.router_health = RouterHealth()
        self.recent_tokens = self.recent_seconds = 0.0

    def write(self, result: StepResult, *, lr: float, flops: float, seconds: float) -> None:
        """Report the last step, which took `seconds` and `flops` on all ranks together."""
        state, seconds = self.state, max(seconds, 1e-9)
        values = {
            "loss": result.loss,
            **({} if self.bits_per_nat is None else {"bits_per_byte": result.loss * self.bits_per_nat}),
            "lr": lr,
            "grad_norm": result.grad_norm,
            "tokens": state.tokens,
            **({} if (epoch := self.epochs.seen(state.tokens)) is None else {"epoch": epoch}),
            "tokens_per_second": result.tokens / seconds,
            "mfu": flops / seconds / (self.peak.flops * distributed.world_size()),
            "peak_memory": peak_memory(state.device),
            "elapsed": state.seconds,
        }
        routers, warnings = self.router_health.watch(state.model, result.statistics)
        self.metrics.write(state.step, values | routers)
        for warning in warnings:
            self.display.say(warning)
        self.recent_tokens = 0.9 * self.recent_tokens + result.tokens
        self.recent_seconds = 0.9 * self.recent_seconds + seconds
        recent = self.recent_tokens / self.recent_seconds
        done = self.config.train.budget.progress(state.step, state.seconds)
        self.display.update(done, state.seconds, {"step": state.step, **values, "tokens_per_second": recent})
