"""loss.png: the run at a glance."""

from collections.abc import Sequence
from pathlib import Path

from swamla.train.tracking import read_metrics


def plot_losses(metrics_file: Path, picture: Path, *, title: str, bits_per_nat: float) -> None:
    """Draw training loss (each record faint, smoothed strong) and held-out loss over steps.

    bits_per_nat: factor from nats per token to bits per byte, for the axis on the right.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_metrics(metrics_file)
    training = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
    held_out = [(r["step"], r["held_out_loss"]) for r in records if r.get("held_out_loss") is not None]
    if not training:
        return
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, losses = zip(*training, strict=True)
    axes.plot(steps, losses, color="#4c72b0", alpha=0.22, linewidth=0.8)
    axes.plot(steps, smooth(losses), color="#4c72b0", linewidth=1.8, label="training (smoothed)")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="#dd8452", markersize=4, linewidth=1.4, label="held out")
    axes.set(title=title, xlabel="step", ylabel="loss (nats per token)")
    right = axes.secondary_yaxis("right", functions=(lambda y: y * bits_per_nat, lambda y: y * (1 / bits_per_nat)))
    right.set_ylabel("bits per byte")
    axes.grid(alpha=0.25)
    axes.spines[["top"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(picture)


def smooth(values: Sequence[float], share: float = 0.03) -> list[float]:
    """A running mean whose memory is `share` of the whole, without the lag towards the first value (as in Adam)."""
    beta = 1 - 1 / max(1.0, share * len(values))
    mean, weight, out = 0.0, 0.0, []
    for value in values:
        mean, weight = beta * mean + (1 - beta) * value, beta * weight + (1 - beta)
        out.append(mean / weight)
    return out
