"""Load balance of the routers: figures of every step, and a warning if an expert gets no tokens any more."""

from collections.abc import Mapping

import torch
from torch import Tensor

from swamla.model.language_model import LanguageModel

DEAD_AFTER = 50  # steps in a row without a token


class RouterHealth:
    """Counts idle steps of every expert. The counts are not saved: a resumed run starts at 0."""

    def __init__(self, dead_after: int = DEAD_AFTER) -> None:
        self.dead_after = dead_after
        self._idle_E: dict[str, Tensor] = {}  # steps in a row without a token, by layer

    def watch(self, model: LanguageModel, statistics: Mapping[str, Tensor]) -> tuple[dict[str, float], list[str]]:
        """Figures of a step by layer, from sums over the whole batch, and a warning for every layer that lost experts.

        "router/2/load_max_over_mean": tokens of the busiest expert of layer 2 over the mean; 1 is perfect balance.
        "router/2/idle_experts": experts without a token in this step; "dead_experts": in the last 50 steps.
        "router/2/entropy": entropy of the normalised scores in nats, mean over tokens; at most log(experts).
        "router/2/bias_range": largest minus smallest bias.
        """
        figures: dict[str, float] = {}
        warnings = []
        for layer in (name.removeprefix("load/") for name in statistics if name.startswith("load/")):
            load_E = statistics[f"load/{layer}"].cpu()
            idle_E = load_E == 0
            before_E = self._idle_E.get(layer, torch.zeros_like(load_E))
            self._idle_E[layer] = now_E = torch.where(idle_E, before_E + 1, 0)
            bias_E = model.blocks[int(layer)].ffn.balance()
            entropy = {}  # not every layer reports it
            if f"entropy/{layer}" in statistics:
                entropy = {"entropy": statistics[f"entropy/{layer}"].item() / statistics[f"tokens/{layer}"].item()}
            values = {
                "load_max_over_mean": load_E.max().item() / load_E.double().mean().item(),
                "idle_experts": idle_E.sum().item(),
                "dead_experts": (now_E >= self.dead_after).sum().item(),
                **entropy,
                **({} if bias_E is None else {"bias_range": (bias_E.max() - bias_E.min()).item()}),
            }
            figures |= {f"router/{layer}/{name}": value for name, value in values.items()}
            died = int((now_E == self.dead_after).sum())
            if died:
                warnings.append(
                    f"warning: layer {layer}: {died} of {len(load_E)} experts died, no token for {self.dead_after} "
                    f"steps ({values['dead_experts']} are dead now); a higher `bias_rate` may bring them back"
                )
        return figures, warnings
