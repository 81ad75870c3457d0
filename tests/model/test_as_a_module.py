"""A language model is a module like any other: what one does first with a module works, and does what it says."""

import copy
import io
import json
import pickle
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from swamla.config import from_plain, to_plain
from swamla.inference.decoding import Decoder
from swamla.model.accounting import count_parameters
from swamla.model.language_model import LanguageModel, LanguageModelConfig
from tests.toys import registered

from .helpers import MIXERS, assert_close, build_model, hybrid_config, random_tokens

CONFIG = replace(hybrid_config(pattern=tuple(MIXERS), ffn="moe"), dropout=0.1)
TOKENS = random_tokens(2, 20)


@pytest.fixture
def model() -> LanguageModel:
    return build_model(CONFIG)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS)


def saved_and_loaded(model: LanguageModel) -> LanguageModel:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = CONFIG.build(seed=1)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


COPIES: dict[str, Callable[[LanguageModel], LanguageModel]] = {
    "copy.deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save of the state_dict": saved_and_loaded,
}


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_computes_the_same_and_shares_nothing(model: LanguageModel, way: str) -> None:
    copied = COPIES[way](model)
    assert torch.equal(logits(copied), logits(model))
    assert copied.head.weight is copied.embedding.weight
    assert not {p.data_ptr() for p in copied.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert copied.generate(TOKENS, 3).tolist() == model.generate(TOKENS, 3).tolist()


def test_its_config_is_pickled_copied_and_written_as_plain_data() -> None:
    with registered():
        from_json = from_plain(LanguageModelConfig, json.loads(json.dumps(to_plain(CONFIG))))
    for copied in (pickle.loads(pickle.dumps(CONFIG)), copy.deepcopy(CONFIG), from_json):
        assert copied == CONFIG
    assert count_parameters(CONFIG).total == sum(p.numel() for p in CONFIG.build().parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_in_another_dtype_it_computes_trains_and_generates(model: LanguageModel, dtype: torch.dtype) -> None:
    expected = logits(model)
    model = model.to(dtype)
    found = logits(model)
    assert found.dtype == dtype
    if dtype == torch.float64:
        assert_close(found.float(), expected, 1e-4)
    model.train()(TOKENS, labels=TOKENS).backward()
    used = [p for name, p in model.named_parameters() if "experts" not in name]
    assert all(p.grad is not None and p.grad.dtype == dtype and p.grad.isfinite().all() for p in used)
    assert model.generate(TOKENS, 3).shape == (2, 3)


def test_train_and_eval_reach_every_module_and_dropout_acts_in_training_only(model: LanguageModel) -> None:
    assert all(module.training for module in model.train().modules())
    assert not torch.equal(model(TOKENS), model(TOKENS))
    assert not any(module.training for module in model.eval().modules())
    assert torch.equal(model(TOKENS), model(TOKENS))


@pytest.mark.parametrize("frozen", ["embedding", "blocks", "blocks.0.mixer", "norm"])
def test_frozen_parts_get_no_gradient_and_the_others_do(model: LanguageModel, frozen: str) -> None:
    part = model.get_submodule(frozen).requires_grad_(False)
    still = {id(p) for p in part.parameters()}
    model(TOKENS, labels=TOKENS).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (id(parameter) in still), name


def test_hooks_see_the_parts_outputs_in_a_forward_pass(model: LanguageModel) -> None:
    seen = {}
    for name, module in model.named_modules():
        if name.endswith((".mixer", ".ffn", "norm")) or name == "blocks.0":  # latents have norms too
            module.register_forward_hook(lambda _, __, output, name=name: seen.update({name: output}))
    model(TOKENS)
    parts = {f"blocks.{n}.{part}" for n in range(CONFIG.depth) for part in ("mixer_norm", "mixer", "ffn_norm", "ffn")}
    assert seen.keys() >= {"norm", *parts}
    assert seen["blocks.0.mixer"].shape == seen["norm"].shape == (2, 20, 32)
    (x_BTD, statistics), ffn = seen["blocks.0"], seen["blocks.0.ffn"]
    assert x_BTD.shape == (2, 20, 32)
    assert ffn[1].keys() == statistics.keys() != set()


@pytest.mark.parametrize("what", ["attention", "ffn", "all"])
def test_activation_checkpointing_changes_no_gradient(model: LanguageModel, what: str) -> None:
    found = []
    for checkpointing in ("none", what):
        model.checkpoint_activations(checkpointing)  # type: ignore[arg-type]
        model.zero_grad()
        torch.manual_seed(0)
        model.train()(TOKENS, labels=TOKENS).backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_ddp_wraps_it(model: LanguageModel) -> None:
    expected = model.eval()(TOKENS, labels=TOKENS)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)  # experts without a token
        loss = wrapped(TOKENS, labels=TOKENS)
        loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(loss.detach(), expected.detach())


def test_an_optimizer_of_torchs_own_learns(model: LanguageModel) -> None:
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(TOKENS[:, :-1], labels=TOKENS[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


def test_under_autocast_logits_are_in_its_dtype_and_weights_stay(model: LanguageModel) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(TOKENS).dtype == torch.bfloat16
        model(TOKENS, labels=TOKENS).backward()
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_decoder_of_a_model_that_goes_on_learning_sees_its_new_weights(model: LanguageModel) -> None:
    decoder = Decoder(model)
    before = decoder.generate(TOKENS.tolist(), 4)
    with torch.no_grad():
        model.embedding.weight.neg_()
    assert decoder.generate(TOKENS.tolist(), 4) == model.generate(TOKENS, 4).tolist() != before
