"""Decoding on a GPU: recorded graphs give the logits and the tokens of ordinary steps."""

import pytest
import torch

from swamla.inference.decoding import CudaGraphs, Decoder, EagerSteps, GraphSteps, compiled_step, prefill
from swamla.inference.sampling import Sampling
from tests.model.helpers import FFNS, MIXERS, assert_close, build_model, hybrid_config, random_tokens

pytestmark = pytest.mark.gpu

PROMPTS = [random_tokens(1, length, seed=length)[0].tolist() for length in (5, 23, 200)]


@pytest.mark.parametrize("kind", MIXERS)
@torch.inference_mode()
def test_graphs_give_the_logits_of_eager_steps(kind: str) -> None:
    model = build_model(hybrid_config(pattern=(kind, kind))).cuda().eval()
    states = [model.init_state(len(PROMPTS), 300) for _ in range(2)]
    for state in states:
        prefill(model, PROMPTS, state)
    eager, graph = EagerSteps(model, states[0]), GraphSteps(model, states[1], CudaGraphs())
    for step in range(100):  # over two sizes: 256 and what the state holds
        chosen = random_tokens(len(PROMPTS), 1, seed=step)[:, 0].tolist()
        assert_close(graph(chosen), eager(chosen), 1e-3, f"step {step}")


@pytest.mark.parametrize("ffn", FFNS)
@pytest.mark.parametrize("kind", MIXERS)
@torch.inference_mode()
def test_graphs_give_the_logits_of_the_steps_they_record(kind: str, ffn: str) -> None:
    """In bf16, where another order of sums would choose other experts."""
    model = build_model(hybrid_config(pattern=(kind, kind), ffn=ffn)).to("cuda", torch.bfloat16).eval()
    states = [model.init_state(len(PROMPTS), 300) for _ in range(2)]
    for state in states:
        prefill(model, PROMPTS, state)
    unrecorded = GraphSteps(model, states[0], lambda step: step)
    graph = GraphSteps(model, states[1], CudaGraphs())
    for step in range(100):
        chosen = random_tokens(len(PROMPTS), 1, seed=step)[:, 0].tolist()
        assert_close(graph(chosen).float(), unrecorded(chosen).float(), 1e-2, f"step {step}")


@pytest.mark.parametrize("kind", MIXERS)
@torch.inference_mode()
def test_graphs_of_compiled_steps_give_the_logits_of_eager_steps(kind: str) -> None:
    model = build_model(hybrid_config(pattern=(kind, kind))).cuda().eval()
    states = [model.init_state(len(PROMPTS), 300) for _ in range(2)]
    for state in states:
        prefill(model, PROMPTS, state)
    eager, graph = EagerSteps(model, states[0]), GraphSteps(model, states[1], CudaGraphs(), compiled_step())
    for step in range(100):
        chosen = random_tokens(len(PROMPTS), 1, seed=step)[:, 0].tolist()
        assert_close(graph(chosen), eager(chosen), 1e-3, f"step {step}")


def test_generation_by_graphs_draws_the_tokens_of_eager_generation() -> None:
    model = build_model(hybrid_config()).cuda().eval()
    expected = Decoder(model).generate(PROMPTS, 100, sampling=Sampling(temperature=0))
    assert Decoder(model, "graph").generate(PROMPTS, 100, sampling=Sampling(temperature=0)) == expected
    assert Decoder(model, "graph").generate(PROMPTS[:1], 100, sampling=Sampling(temperature=0))[0] == expected[0]


@torch.inference_mode()
def test_an_eager_step_of_one_token_does_not_wait_for_the_device() -> None:
    model = build_model(hybrid_config()).cuda().eval()
    state = model.init_state(len(PROMPTS), 210)
    prefill(model, PROMPTS, state)
    tokens = torch.ones(len(PROMPTS), 1, dtype=torch.int64, device="cuda")
    model.step(tokens, state)
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.step(tokens, state)
    finally:
        torch.cuda.set_sync_debug_mode("default")
