"""The plan for a cluster: what is counted under a fake process group, and every line of arithmetic on it."""

import json
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cluster, cluster_counting
from benchmarks.cluster import Expected, expected, layers_that_wait, memory_table, seconds, time_table, traffic_table
from benchmarks.cluster_counting import BUCKET, Counted, Plan, Sent, balanced, counted, planned
from swamla.model import count_parameters
from swamla.model.accounting import parameter_specs
from swamla.train.parallel.build import build_model
from tests.train.ranks import on_ranks

TINY: dict[str, Any] = {"rows": 2, "length": 32, "quick": True}
FSDP = Plan(name="small", ranks=2, parallel="fsdp", **TINY)
PADDED = Plan(name="small", ranks=64, parallel="fsdp", **TINY)
HSDP = Plan(name="small", ranks=32, parallel="hsdp", shards=8, **TINY)
EXPERTS = Plan(name="moe-1b", ranks=16, parallel="fsdp", experts=2, **TINY)
REPLICAS = Plan(name="moe-1b", ranks=16, parallel="ddp", experts=4, **TINY)
LATENT, ACTIVATED, N_EXPERTS = 16, 2, 8  # of the tiny moe-1b, whose only layer with experts is the last of three
TOKENS = 2 * 32


@cache
def of(plan: Plan) -> Counted:
    return counted(plan)


def total(plan: Plan, kind: str) -> int:
    return sum(one.n_bytes for one in of(plan).sent if one.kind == kind)


def root_parameters(plan: Plan) -> int:
    """What no block has: the embedding, tied with the head, and the last norm."""
    return plan.config.width * (plan.config.vocab_size + 1)


def test_fsdp_gathers_a_block_twice_and_the_root_once_and_scatters_every_gradient_once() -> None:
    parameters, root = count_parameters(FSDP.config).total, root_parameters(FSDP)
    assert total(FSDP, "all-gather") == 4 * (2 * (parameters - root) + root)
    assert total(FSDP, "reduce-scatter") == 4 * parameters
    assert [one.kind for one in of(FSDP).sent].count("all-gather") == 2 * FSDP.config.depth + 1
    assert sum(one.wire_bytes for one in of(FSDP).sent if one.kind == "reduce-scatter") == 4 * parameters / 2


def test_a_parameter_of_fewer_rows_than_ranks_is_padded_to_a_row_for_each() -> None:
    padded = {spec.name: -(-spec.shape[0] // 64) * 64 * prod(spec.shape[1:]) for spec in parameter_specs(PADDED.config)}
    blocks = sum(numbers for name, numbers in padded.items() if name.startswith("blocks."))
    assert total(PADDED, "reduce-scatter") == 4 * sum(padded.values()) > 4 * count_parameters(PADDED.config).total
    assert total(PADDED, "all-gather") == 4 * (sum(padded.values()) + blocks)


def test_a_rank_holds_its_part_of_weights_gradients_and_moments() -> None:
    parameters, tensors = count_parameters(FSDP.config).total, len(parameter_specs(FSDP.config))
    memory = of(FSDP).memory
    assert memory["weights"] == memory["gradients"] == 4 * parameters / 2
    assert memory["AdamW"] == 8 * parameters / 2 + 4 * tensors
    matrices = sum(prod(s.shape) for s in parameter_specs(FSDP.config) if len(s.shape) > 1 and "blocks" in s.name)
    assert memory["bf16 copies"] == 2 * matrices


def test_what_is_gathered_at_once_is_the_root_two_blocks_and_the_gradients_of_the_largest() -> None:
    blocks = [
        sum(prod(s.shape) for s in parameter_specs(FSDP.config) if s.name.startswith(f"blocks.{n}.")) for n in range(3)
    ]
    root = root_parameters(FSDP)
    assert root > max(blocks)
    assert of(FSDP).memory["gathered"] == 4 * (root + 2 * max(blocks) + root)
    assert of(REPLICAS).memory["gathered"] == 0


def test_hsdp_reduces_its_shard_over_replicas_one_on_each_node() -> None:
    parameters = count_parameters(HSDP.config).total
    within = [one for one in of(HSDP).sent if one.kind in ("all-gather", "reduce-scatter")]
    across = [one for one in of(HSDP).sent if one.kind == "all-reduce" and not one.after]
    assert {(one.ranks, one.near) for one in within} == {(8, 8)}
    assert {(one.ranks, one.near) for one in across} == {(4, 1)}
    shards = [-(-spec.shape[0] // 8) * prod(spec.shape[1:]) for spec in parameter_specs(HSDP.config)]
    assert sum(one.n_bytes for one in across) == 4 * sum(shards) >= 4 * parameters / 8


def test_tokens_go_to_their_experts_and_back_and_their_gradients_too() -> None:
    counts, *rows = [one.n_bytes for one in of(EXPERTS).sent if one.kind == "all-to-all"]
    assert counts == 8 * N_EXPERTS
    assert rows == [2 * TOKENS * ACTIVATED * LATENT] * 4
    assert layers_that_wait(of(EXPERTS).sent) == 1
    assert {(one.ranks, one.near) for one in of(EXPERTS).sent if one.kind == "all-to-all"} == {(2, 2)}


@pytest.mark.parametrize("plan", [EXPERTS, REPLICAS])
def test_gradients_of_experts_are_summed_over_their_replicas_when_the_backward_pass_is_over(plan: Plan) -> None:
    experts = count_parameters(plan.config).by_component["experts"]
    summed = [one for one in of(plan).sent if one.after and one.ranks == 16 // plan.experts and one.n_bytes > 8]
    assert sum(one.n_bytes for one in summed) == 4 * experts / plan.experts
    assert {one.near for one in summed} == {8 // plan.experts}


def test_a_rank_holds_its_own_experts_and_with_ddp_all_of_the_rest() -> None:
    count = count_parameters(REPLICAS.config)
    experts = count.by_component["experts"]
    held = count.total - experts + experts // 4
    memory = of(REPLICAS).memory
    assert memory["weights"] == memory["gradients"] == 4 * held
    matrices = sum(prod(s.shape) for s in parameter_specs(REPLICAS.config) if len(s.shape) > 1 and "blocks" in s.name)
    assert memory["bf16 copies"] == 2 * (matrices - experts + experts // 4)
    assert total(REPLICAS, "all-reduce") == 4 * held + 8  # and the square of the experts' norm


def test_ddp_reduces_in_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    count = count_parameters(REPLICAS.config)
    gradients = 4 * (count.total - count.by_component["experts"])
    assert next(one.n_bytes for one in of(REPLICAS).sent if one.kind == "all-reduce") == gradients < BUCKET
    monkeypatch.setattr(cluster_counting, "BUCKET", 100_000)
    sizes = [one.n_bytes for one in counted(REPLICAS).sent if one.kind == "all-reduce" and not one.after]
    assert sizes == [100_000, gradients - 100_000]


@pytest.mark.parametrize("plan", [FSDP, PADDED, HSDP, EXPERTS, REPLICAS], ids=str)
def test_what_is_reckoned_is_what_the_code_does(plan: Plan) -> None:
    ours, theirs = planned(plan), of(plan)
    assert ours.memory == theirs.memory
    assert sorted(map(repr, ours.sent)) == sorted(map(repr, theirs.sent))
    for kind in ("all-gather", "reduce-scatter", "all-reduce"):  # the first and the last are what a step waits for
        one, other = ([sent for sent in found.sent if sent.kind == kind and not sent.after] for found in (ours, theirs))
        assert (one[:1], one[-1:]) == (other[:1], other[-1:])
    assert expected(plan, ours).step == pytest.approx(expected(plan, theirs).step)


def test_rows_are_shared_out_evenly() -> None:
    assert balanced(10, 4) == [3, 3, 2, 2]


def real_step(folder: Path) -> None:
    """The same step over gloo on real tensors: its collectives, as one rank saw them."""
    plan = Plan(name="moe-1b", ranks=2, parallel="fsdp", experts=2, **TINY)
    strategy = build_model(plan.config, train=plan.settings, device=torch.device("cpu"), prepare=lambda model: None)
    sent = cluster_counting._step(strategy, plan)
    seen = [[one.kind, 0 if one.kind == "all-to-all" else one.n_bytes, one.ranks, one.near, one.after] for one in sent]
    (folder / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(seen))


def test_real_ranks_send_what_the_fake_one_does(tmp_path: Path) -> None:
    on_ranks(2, real_step, tmp_path)
    fake = of(Plan(name="moe-1b", ranks=2, parallel="fsdp", experts=2, **TINY)).sent
    told = [[one.kind, 0 if one.kind == "all-to-all" else one.n_bytes, one.ranks, one.near, one.after] for one in fake]
    for rank in range(2):
        assert sorted(json.loads((tmp_path / f"{rank}.json").read_text())) == sorted(told)


@pytest.mark.parametrize(
    ("sent", "microseconds"),
    [
        # 7/8 of 360 MB at 360 GB/s, and 7 hops of 2 µs.
        (Sent(kind="all-gather", n_bytes=360_000_000, ranks=8, near=8), 875 + 14),
        # Two nodes' eight cards each together: 15/16 of 320 MB at 320 GB/s; 2 hops of 10 µs, 13 of 2.
        (Sent(kind="reduce-scatter", n_bytes=320_000_000, ranks=16, near=8), 937.5 + 20 + 26),
        # One card each: twice 3/4 of 40 MB at 40 GB/s, and twice the 2 hops of a tree, which a ring has 3 of.
        (Sent(kind="all-reduce", n_bytes=40_000_000, ranks=4, near=1), 1500 + 2 * 20),
        # 128 nodes: no bytes to speak of, twice 7 hops from node to node and 7 within.
        (Sent(kind="all-reduce", n_bytes=0, ranks=1024, near=8), 2 * (70 + 14)),
        (Sent(kind="all-gather", n_bytes=0, ranks=1024, near=8), 1280 + 2 * 895),
        # Within a node: half of 360 MB at 360 GB/s.
        (Sent(kind="all-to-all", n_bytes=360_000_000, ranks=2, near=2), 500 + 2),
        # Half stays on the node, half leaves by the rank's own card: of 40 MB 20 at 40 GB/s.
        (Sent(kind="all-to-all", n_bytes=40_000_000, ranks=16, near=8), 500 + 10),
    ],
)
def test_seconds_of_a_collective(sent: Sent, microseconds: float) -> None:
    assert seconds(sent) == pytest.approx(microseconds * 1e-6)


def test_the_first_gather_the_last_reduction_and_all_to_alls_are_waited_for_and_the_rest_is_hidden() -> None:
    gather, scatter, reduce = (
        Sent(kind=kind, n_bytes=360_000_000, ranks=8, near=8) for kind in ("all-gather", "reduce-scatter", "all-reduce")
    )
    norm = Sent(kind="all-reduce", n_bytes=360_000_000, ranks=8, near=8, after=True)
    there = [Sent(kind="all-to-all", n_bytes=360_000_000, ranks=8, near=8)] * 5
    found = Counted(memory={"weights": 10**9, "AdamW": 2 * 10**9}, sent=[gather] * 3 + there + [scatter, reduce, norm])
    plan = Plan(name="moe-1b", ranks=8, parallel="fsdp")
    time = expected(plan, found)
    one, twice, across = 889e-6, 2 * 889e-6, 877e-6
    assert time.beside == pytest.approx(2 * one)
    assert time.alone == pytest.approx(one + one + twice + twice + 5 * across + 0.2e-3)
    # 1.87 GFLOP a token by `swamla info`'s table between 1,024 and 4,096 tokens, 16,384 of them, at 395.6 TFLOP/s.
    assert time.compute == pytest.approx(16_384 * 1.85e9 / 395.6e12, rel=0.02)
    assert time.step == pytest.approx(time.compute + time.alone)
    assert time.mfu == pytest.approx(0.4 * time.compute / (time.compute + time.alone))
    cells = [cell.strip() for cell in time_table({plan: found}).splitlines()[2].split("|")]
    assert cells[1:3] == ["moe-1b, 8 × fsdp", "0.1 M"]
    assert cells[3] == f"{1e3 * time.compute:.0f}"
    assert cells[-2] == f"{131_072 / time.step / 1e6:.1f} M"
    assert memory_table({plan: found}).splitlines()[2] == "| moe-1b, 8 × fsdp | 16,384 | 1 | 2 | 3 |"
    # GB: 3 gathers of 0.315, one scatter, two reductions of 0.63, five all-to-alls.
    assert traffic_table({plan: found}).splitlines()[2] == (
        "| moe-1b, 8 × fsdp | 3, 0.945 | 1, 0.315 | 2, 1.26 | 5, 1.57 |"
    )


def test_where_sending_takes_longer_than_computing_a_step_takes_as_long_as_sending() -> None:
    assert Expected(compute=1.0, beside=3.0, alone=0.5).step == 3.5
    assert Expected(compute=1.0, beside=3.0, alone=1.0).mfu == pytest.approx(0.1)


def test_the_command_prints_the_plans_that_are_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "PLANS", (FSDP, REPLICAS))
    assert cluster.main(["--only", "moe"]) == 0
    said = capsys.readouterr().out
    assert cluster.main(["--only", "moe", "--counted"]) == 0
    assert capsys.readouterr().out == said
    assert said.count("| moe-1b, 16 × ddp, experts over 4 |") == 3
    assert "small" not in said
    with pytest.raises(SystemExit):
        cluster.main(["--only", "nothing"])
