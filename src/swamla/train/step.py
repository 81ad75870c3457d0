"""One optimizer step, as an algorithm box."""

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from swamla import distributed
from swamla.data.packing import Batch
from swamla.errors import DataError
from swamla.faults import fault
from swamla.model.compiling import begin_step
from swamla.model.ffns.ffn import Statistics
from swamla.ops.layout import Layout
from swamla.train.config import TrainConfig
from swamla.train.parallel.strategy import clip, seed_ranks
from swamla.train.precision import autocast
from swamla.train.state import TrainState


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """The result of a training step, over the batch of all ranks.

    loss: nats per token.  tokens: labels that carry loss.  statistics: those of the FFNs, summed.
    """

    loss: float
    grad_norm: float
    tokens: int
    statistics: Statistics

    @property
    def finite(self) -> bool:
        """False if the step was skipped: its loss or gradient norm is infinite or NaN."""
        return math.isfinite(self.grad_norm) and math.isfinite(self.loss)


def training_step(
    state: TrainState,
    batch: Batch,
    config: TrainConfig,
    lr: float,
    n_labels: int | None = None,
    progress: float = 1.0,
) -> StepResult:
    """One optimizer step on the mean loss over all labels of all ranks, however micro-batches divide them.

    batch: this rank's rows.  lr: of this step.  n_labels: the labels of all ranks, if they are known already.
    progress: of the run at the step's end, for what the optimizer changes with it.
    A step whose loss or gradient is not finite changes no weight. Raises `DataError` if no label carries loss.
    """
    model, strategy, ranks = state.model.train(), state.strategy, distributed.world_size()
    n_labels = round(distributed.sum_of(batch.n_labels)) if n_labels is None else n_labels
    rows = ranks * batch.tokens_BT.numel() // config.block_size
    if n_labels == 0:
        raise DataError(f"rows {state.sample} to {state.sample + rows - 1}: no label carries loss")
    state.optimizer.zero_grad()
    begin_step(config.compile)
    seed_ranks(config.seed, state.step)
    sums: Statistics = {}
    micro_batches = list(_micro_batches(batch, config.micro_batches(rows)))
    # Autocast keeps its casts of weights until the outermost context ends: one for all micro-batches.
    shares_casts = strategy.keeps_weights
    with autocast(state.precision, state.device) if shares_casts else nullcontext():
        for number, (tokens_BT, labels_BT, document_BT) in enumerate(micro_batches, 1):
            with strategy.micro_batch(last=number == len(micro_batches)):
                seq = Layout.from_documents(document_BT).to(state.device)
                with autocast(state.precision, state.device):
                    tokens_BT, labels_BT = (rows.to(state.device, non_blocking=True) for rows in (tokens_BT, labels_BT))
                    total, found = strategy.loss(tokens_BT, labels_BT, seq)
                extra = sum(value for name, value in found.items() if name.startswith("loss/"))
                loss = (total + extra) / n_labels * ranks  # times ranks, because gradients are averaged over them
                with autocast("fp32", state.device) if shares_casts else nullcontext():
                    loss.backward()
            for name, value in [("nats", total), *found.items()]:
                exact = value.detach().double() if value.is_floating_point() else value.detach()
                sums[name] = sums[name] + exact if name in sums else exact
            fault("accumulation" if number < len(micro_batches) else "step", state.step + 1)

    statistics = distributed.all_reduce_sum(sums)
    # The only wait for the device. The step is skipped, if need be, before any weight or state is changed.
    nats, norm = torch.stack([statistics.pop("nats").double(), strategy.gradient_norm().double()]).tolist()
    result = StepResult(loss=nats / n_labels, grad_norm=norm, tokens=n_labels, statistics=statistics)
    if result.finite:
        if config.grad_clip is not None:
            clip(strategy.gradients(), norm, config.grad_clip)
        state.optimizer.set_lr(lr)
        state.optimizer.set_progress(progress, state.step)
        state.optimizer.step()
        if not config.lora:  # what adapters are added to stays as it is, routers' biases included
            model.rebalance(statistics)
        if state.average is not None:
            state.average.update(state.updates + 1)
    return result


def _micro_batches(batch: Batch, count: int) -> "zip[tuple[torch.Tensor, ...]]":
    return zip(*(t.chunk(count) for t in (batch.tokens_BT, batch.labels_BT, batch.document_BT)), strict=True)
