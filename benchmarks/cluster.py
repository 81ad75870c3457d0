"""What a step would hold, send and take on 64 and on 1,024 GPUs, on paper: python -m benchmarks.cluster

    python -m benchmarks.cluster --only "moe-1b, 64"    # plans whose name begins so
    python -m benchmarks.cluster --counted              # what the project's own code does, instead of reckoning it

What a rank holds and sends is reckoned, or counted under torch's fake process group (`cluster_counting.py`). Times are
arithmetic on it with the constants below: assumptions, none of them measured. No GPU and no network is needed.
"""

import argparse
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from math import ceil, log2
from multiprocessing import get_context

from benchmarks.cluster_counting import Counted, Plan, Sent, counted, planned
from benchmarks.markdown import table
from swamla.model import training_flops_per_token

PEAK = 989e12  # FLOP/s of an H100 in bf16
MFU = 0.40  # of it, that one GPU reaches alone
NVLINK = 450e9  # bytes a second that a GPU sends within its node
NETWORK = 50e9  # and to other nodes: 400 Gb/s
REACHED = 0.8  # of both, by large messages
NEAR_HOP, FAR_HOP = 2e-6, 10e-6  # seconds from one rank of a ring to the next, within a node and between nodes
HOST_WAIT = 0.2e-3  # seconds that the device idles in a layer whose host waits for the counts of an all-to-all

PLANS = (
    Plan(name="moe-1b", ranks=64, parallel="ddp", experts=8),
    Plan(name="moe-1b", ranks=64, parallel="fsdp"),
    Plan(name="moe-1b", ranks=64, parallel="fsdp", experts=8),
    Plan(name="moe-1b", ranks=1024, parallel="ddp", experts=8),
    Plan(name="moe-1b", ranks=1024, parallel="fsdp"),
    Plan(name="moe-1b", ranks=1024, parallel="hsdp", shards=8, experts=8),
    Plan(name="xl", ranks=64, parallel="fsdp", rows=4),
    Plan(name="xl", ranks=1024, parallel="fsdp", rows=4),
    Plan(name="xl", ranks=1024, parallel="hsdp", shards=8, rows=4),
    Plan(name="xl", ranks=1024, parallel="hsdp", shards=64, rows=4),
)


def seconds(sent: Sent) -> float:
    """Of a collective alone on the wires: bytes over bandwidth, and one hop after the other.

    A ring of whole nodes leaves a node by all its network cards at once. An all-reduce may go by a tree of nodes
    instead, as NCCL's do where that has fewer hops. In an all-to-all each rank sends to every other by its own card,
    all at the same time.
    """
    nodes = sent.ranks // sent.near
    if sent.kind == "all-to-all":
        far = sent.n_bytes * (sent.ranks - sent.near) / sent.ranks
        near = sent.wire_bytes - far
        return max(near / NVLINK, far / NETWORK) / REACHED + (FAR_HOP if nodes > 1 else NEAR_HOP)
    bandwidth = NVLINK if nodes == 1 else min(NVLINK, sent.near * NETWORK)
    far_hops = min(nodes, sent.ranks - 1) if nodes > 1 else 0
    latency = far_hops * FAR_HOP + (sent.ranks - 1 - far_hops) * NEAR_HOP
    if sent.kind == "all-reduce":
        tree = ceil(log2(nodes)) * FAR_HOP + (sent.near - 1) * NEAR_HOP
        latency = 2 * min(latency, tree)
    return sent.wire_bytes / bandwidth / REACHED + latency


@dataclass(frozen=True, kw_only=True)
class Expected:
    """Seconds of a step: computing, sending beside it, and sending that it waits for."""

    compute: float
    beside: float
    alone: float

    @property
    def step(self) -> float:
        """The longer of what goes on at once, and then the rest."""
        return max(self.compute, self.beside) + self.alone

    @property
    def mfu(self) -> float:
        """Of the peak."""
        return MFU * self.compute / self.step


def expected(plan: Plan, found: Counted) -> Expected:
    """How long the plan's step takes on paper.

    Sending hides behind computing, except the first all-gather, the last reduction, all-to-alls, and what comes after
    the backward pass.
    """
    flops = training_flops_per_token(plan.config, plan.length) * plan.tokens
    hidden = [one for one in found.sent if not one.after and one.kind != "all-to-all"]
    alone = [one for one in found.sent if one.after or one.kind == "all-to-all"]
    edges = hidden[:1] if hidden[0].kind == "all-gather" else []
    for kind in ("reduce-scatter", "all-reduce"):
        edges += [one for one in hidden if one.kind == kind][-1:]
    waits = HOST_WAIT * layers_that_wait(found.sent)
    return Expected(
        compute=flops / (MFU * PEAK),
        beside=sum(map(seconds, hidden)) - sum(map(seconds, edges)),
        alone=sum(map(seconds, alone)) + sum(map(seconds, edges)) + waits,
    )


def layers_that_wait(sent: Sequence[Sent]) -> int:
    """Layers with expert parallelism: five all-to-alls each, of counts, of rows there and back, and of gradients."""
    return sum(one.kind == "all-to-all" for one in sent) // 5


def memory_table(found: dict[Plan, Counted]) -> str:
    """What a rank holds, in GB."""
    names = list(next(iter(found.values())).memory)
    lines = [
        [str(plan), f"{plan.tokens:,}", *(_gb(one.memory[name]) for name in names), _gb(sum(one.memory.values()))]
        for plan, one in found.items()
    ]
    return table(["GB a rank", "tokens", *names, "sum"], lines)


def traffic_table(found: dict[Plan, Counted]) -> str:
    """What a rank sends in a step: how often, and GB."""
    kinds = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all")
    lines = [[str(plan), *(_messages(one.sent, kind) for kind in kinds)] for plan, one in found.items()]
    return table(["messages, GB a rank sends", *kinds], lines)


def _messages(sent: Sequence[Sent], kind: str) -> str:
    of_kind = [one for one in sent if one.kind == kind]
    return f"{len(of_kind)}, {_gb(sum(one.wire_bytes for one in of_kind))}" if of_kind else ""


def time_table(found: dict[Plan, Counted]) -> str:
    """What a step takes on paper, in ms."""
    lines = []
    for plan, one in found.items():
        time = expected(plan, one)
        rate = plan.tokens * plan.ranks / time.step
        milliseconds = [f"{1e3 * value:.0f}" for value in (time.compute, time.beside, time.alone, time.step)]
        batch = f"{plan.tokens * plan.ranks / 1e6:.1f} M"
        lines.append([str(plan), batch, *milliseconds, f"{time.mfu:.0%}", f"{rate / 1e6:.1f} M"])
    header = ["ms", "tokens a step", "compute", "sent beside it", "sent alone", "step", "MFU", "tokens/s"]
    return table(header, lines)


def _gb(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.3g}"


def _counted_apart(plans: Sequence[Plan]) -> dict[Plan, Counted]:
    """`counted`, each plan in a process of its own: DTensor remembers meshes of an earlier process group."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        return dict(zip(plans, pool.map(counted, plans), strict=True))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser("benchmarks.cluster", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="plans whose name begins so, e.g. 'moe-1b, 64'")
    parser.add_argument("--counted", action="store_true", help="take each step on fake tensors (minutes)")
    options = parser.parse_args(arguments)
    plans = [plan for plan in PLANS if str(plan).startswith(options.only)]
    if not plans:
        parser.error(f"--only: there are {'; '.join(map(str, PLANS))}")
    found = _counted_apart(plans) if options.counted else {plan: planned(plan) for plan in plans}
    print(memory_table(found), traffic_table(found), time_table(found), sep="\n\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
