"""One optimizer step: the algorithm box."""

import math
from dataclasses import dataclass

import torch

from swamla.data.packing import Batch
from swamla.errors import DataError
from swamla.model.ffns.ffn import Statistics
from swamla.ops.layout import Layout
from swamla.train.compile import begin_step
from swamla.train.config import TrainConfig
from swamla.train.precision import autocast
from swamla.train.state import TrainState


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a training step found.

    loss: nats per token.  tokens: labels that carried loss.  statistics: of the FFNs, summed over the whole batch.
    """

    loss: float
    grad_norm: float
    tokens: int
    statistics: Statistics

    @property
    def finite(self) -> bool:
        """False when the step had to be skipped."""
        return math.isfinite(self.grad_norm) and math.isfinite(self.loss)


def training_step(state: TrainState, batch: Batch, config: TrainConfig, lr: float) -> StepResult:
    """One optimizer step on `batch`: the mean over all its labels, however they fall on the micro-batches.

    A step whose loss or gradient is not finite changes no weight.
    """
    model, device = state.model.train(), state.device
    if batch.n_labels == 0:
        raise DataError(f"rows {state.sample} to {state.sample + config.batch_size - 1}: no label carries loss")
    state.optimizer.zero_grad()
    begin_step(config.compile)
    nats = torch.zeros((), device=device)
    statistics: Statistics = {}
    for tokens_BT, labels_BT, document_BT in _micro_batches(batch, config.accumulation):
        seq = Layout.from_documents(document_BT).to(device)
        with autocast(state.precision, device):
            total, found = model.loss(tokens_BT.to(device), labels_BT.to(device), seq)
        extra = sum(value for name, value in found.items() if name.startswith("loss/"))
        ((total + extra) / batch.n_labels).backward()
        nats += total.detach()
        for name, value in found.items():
            statistics[name] = statistics.get(name, 0) + value.detach()

    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    loss = (nats / batch.n_labels).item()
    result = StepResult(loss=loss, grad_norm=norm.item(), tokens=batch.n_labels, statistics=statistics)
    if result.finite:
        if config.grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), config.grad_clip, norm)
        state.optimizer.set_lr(lr)
        state.optimizer.step()
        model.rebalance(statistics)
        if state.average is not None:
            state.average.update(state.updates + 1)
    return result


def _micro_batches(batch: Batch, count: int) -> "zip[tuple[torch.Tensor, ...]]":
    return zip(*(t.chunk(count) for t in (batch.tokens_BT, batch.labels_BT, batch.document_BT)), strict=True)
