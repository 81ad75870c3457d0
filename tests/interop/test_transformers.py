"""A model in transformers' form computes what it computes in ours, however transformers calls it."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DataCollatorWithFlattening, DynamicCache

from swamla.errors import UsageError
from swamla.interop.transformers import SwamlaCache, SwamlaForCausalLM
from swamla.model.block import Block
from swamla.model.ffns.moe import MoEConfig
from swamla.model.ffns.none import NoFFNConfig
from swamla.model.language_model import LanguageModelConfig
from swamla.ops.layout import Layout
from tests.model.helpers import FFNS, MIXERS, NORMS, assert_close, build_model, gradients_of, hybrid_config

from .helpers import LENGTHS, LONG, MIDDLE, SHORT, ids, of, padded, pair, without_ngrams

CONFIGS: dict[str, LanguageModelConfig] = {
    "every mixer": hybrid_config(),
    **{kind: hybrid_config(pattern=(kind, kind)) for kind in MIXERS},
    **{kind: hybrid_config(pattern=("swa", "gdn"), ffn=kind) for kind in FFNS},
    **{kind: replace(hybrid_config(pattern=("swa", "mha")), norm=norm) for kind, norm in NORMS.items()},
    "learned positions": replace(hybrid_config(), learned_positions=40),
    "untied": replace(hybrid_config(), tied_head=False),
    "convolutions": replace(
        hybrid_config(),
        blocks={name: replace(block, conv=3) for name, block in hybrid_config().blocks.items()},
    ),
    "no FFN, norms behind": replace(
        hybrid_config(),
        blocks={
            name: replace(block, ffn=NoFFNConfig(), norm_place="post") for name, block in hybrid_config().blocks.items()
        },
    ),
    "µP": replace(hybrid_config(), mup_base_width=16),
    "dropout": replace(hybrid_config(), dropout=0.3),
}
every_config = pytest.mark.parametrize("name", CONFIGS)
every_mixer = pytest.mark.parametrize("kind", MIXERS)
every_side = pytest.mark.parametrize("side", ["left", "right", "both"])
with_and_without_cache = pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])


def greedy(model: SwamlaForCausalLM, tokens: Tensor, count: int = 12, **settings: object) -> list[list[int]]:
    """The new ids of every row."""
    chosen = {"max_new_tokens": count, "do_sample": False} | settings
    return model.generate(tokens, **chosen)[:, tokens.shape[1] :].tolist()


# ── one pass ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@every_config
@torch.no_grad()
def test_logits_are_those_of_the_language_model_with_a_cache_and_without(name: str) -> None:
    ours, theirs = pair(CONFIGS[name])
    tokens = torch.stack(ids(LONG, LONG))
    expected = ours(tokens)
    assert_close(theirs(tokens, use_cache=False).logits, expected, 1e-5)
    whole = theirs(tokens)
    assert_close(whole.logits, expected, 1e-5)
    assert whole.past_key_values.get_seq_length() == LONG
    cache, pieces = None, []
    for piece in tokens.split([SHORT, 1, 1, LONG - SHORT - 2], dim=1):
        output = theirs(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    assert_close(torch.cat(pieces, dim=1), expected, 1e-5)


@every_config
def test_the_loss_and_its_gradients_are_those_of_the_language_model(name: str) -> None:
    ours = build_model(replace(CONFIGS[name], dropout=0.0)).train()
    theirs = of(ours)
    tokens = torch.stack(ids(LONG, LONG))
    expected = ours(tokens[:, :-1], labels=tokens[:, 1:])
    expected.backward()
    output = theirs(tokens, labels=tokens)
    output.loss.backward()
    assert output.past_key_values is None
    assert_close(output.loss, expected, 1e-5)
    wanted = gradients_of(ours)
    for parameter, gradient in gradients_of(theirs.model).items():
        assert_close(gradient, wanted[parameter], 1e-4, parameter)


@every_mixer
@every_side
@with_and_without_cache
@torch.no_grad()
def test_padding_on_any_side_changes_no_token_and_repeats_the_token_before_it(
    kind: str, side: str, use_cache: bool
) -> None:
    ours, theirs = pair(hybrid_config(pattern=(kind, "gdn")))
    texts = ids(*LENGTHS)
    tokens, mask = padded(texts, side)
    logits = theirs(tokens, attention_mask=mask, use_cache=use_cache).logits
    for row, text in enumerate(texts):
        alone = ours(text[None])[0]
        assert_close(logits[row][mask[row].bool()], alone, 1e-5, f"row {row}")
        before = (mask[row].cumsum(0) - 1).clamp(min=0)
        assert_close(logits[row], alone[before], 1e-5, f"row {row}, padding")


@every_side
def test_padding_changes_no_gradient(side: str) -> None:
    ours = build_model(hybrid_config()).train()
    theirs, texts = of(ours), ids(*LENGTHS)
    total = sum(ours.loss(text[None, :-1], text[None, 1:])[0] for text in texts)
    total.backward()
    tokens, mask = padded(texts, side)
    labels = tokens.masked_fill(mask == 0, -100)
    if side == "both":  # padding between two tokens: transformers' shift would leave out the second one's label
        shifted = torch.full_like(tokens, -100)
        for row, text in enumerate(texts):
            shifted[row, mask[row].nonzero().flatten()[:-1]] = text[1:]
        loss = theirs(tokens, attention_mask=mask, shift_labels=shifted, num_items_in_batch=1).loss
    else:
        loss = theirs(tokens, attention_mask=mask, labels=labels, num_items_in_batch=1).loss
    loss.backward()
    assert_close(loss, total, 1e-5)
    wanted = gradients_of(ours)
    for name, gradient in gradients_of(theirs.model).items():
        assert_close(gradient, wanted[name], 1e-4, name)


@every_mixer
def test_documents_that_are_packed_in_a_row_are_documents_of_their_own(kind: str) -> None:
    ours = build_model(hybrid_config(pattern=(kind, "swa"))).train()
    theirs, texts = of(ours), ids(*LENGTHS)
    total = sum(ours.loss(text[None, :-1], text[None, 1:])[0] for text in texts)
    total.backward()
    wanted, count = gradients_of(ours), sum(len(text) - 1 for text in texts)
    for extra in ({}, {"return_flash_attn_kwargs": True}):
        collator = DataCollatorWithFlattening(return_position_ids=not extra, **extra)
        batch = collator([{"input_ids": text.tolist()} for text in texts])
        batch.pop("attention_mask", None)
        theirs.zero_grad()
        loss = theirs(**batch).loss
        loss.backward()
        assert_close(loss * count, total, 1e-5)
        for name, gradient in gradients_of(theirs.model).items():
            assert_close(gradient * count, wanted[name], 1e-4, name)


@torch.no_grad()
def test_packed_rows_with_padding_are_the_documents_alone() -> None:
    ours, theirs = pair()
    a, b, c = ids(*LENGTHS)
    rows = [torch.cat((b, c)), a]
    tokens, mask = padded(rows, "left")
    positions = torch.zeros_like(tokens)
    positions[0, -len(rows[0]) :] = torch.cat((torch.arange(SHORT), torch.arange(MIDDLE)))
    positions[1, -LONG:] = torch.arange(LONG)
    logits = theirs(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
    assert_close(logits[0, -MIDDLE:], ours(c[None])[0], 1e-5)
    assert_close(logits[0, -MIDDLE - SHORT : -MIDDLE], ours(b[None])[0], 1e-5)
    assert_close(logits[1, -LONG:], ours(a[None])[0], 1e-5)


@torch.no_grad()
def test_embeddings_in_place_of_ids_give_the_same_logits_and_the_same_text() -> None:
    _, theirs = pair(without_ngrams(learned_positions=60))
    tokens, mask = padded(ids(*LENGTHS), "left")
    embedded = theirs.get_input_embeddings()(tokens)
    for use_cache in (True, False):
        found = theirs(inputs_embeds=embedded, attention_mask=mask, use_cache=use_cache).logits
        assert_close(found, theirs(tokens, attention_mask=mask).logits, 1e-5)
        settings = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False, "use_cache": use_cache}
        text = theirs.generate(tokens, **settings)[:, tokens.shape[1] :]
        assert torch.equal(theirs.generate(inputs_embeds=embedded, **settings), text)


@with_and_without_cache
@torch.no_grad()
def test_hidden_states_are_every_layers_input_and_the_heads(use_cache: bool) -> None:
    ours, theirs = pair()
    (text,) = ids(LONG)
    tokens, mask = torch.cat((torch.zeros(2, dtype=torch.int64), text))[None], torch.ones(1, LONG + 2)
    mask[0, :2] = 0
    states = theirs(tokens, attention_mask=mask, use_cache=use_cache, output_hidden_states=True).hidden_states
    inputs: list[Tensor] = []
    seq = Layout.one_document_per_row(1, LONG)
    last, _ = ours.body(ours.embed(text[None]), seq, text[None], inputs=inputs)
    assert len(states) == ours.config.depth + 1
    for found, expected in zip(states, [*inputs, last], strict=True):
        assert_close(found[:, 2:], expected, 1e-5)


def test_hidden_states_have_gradients() -> None:
    _, theirs = pair()
    output = theirs(torch.stack(ids(MIDDLE)), output_hidden_states=True)
    for state in output.hidden_states:
        state.retain_grad()
    output.logits.sum().backward()
    assert all(state.grad.abs().max() > 0 for state in output.hidden_states)


@torch.no_grad()
def test_logits_to_keep_are_the_last_or_the_chosen_ones_and_outputs_can_be_a_tuple() -> None:
    _, theirs = pair()
    tokens = torch.stack(ids(LONG, LONG))
    logits = theirs(tokens).logits
    assert torch.equal(theirs(tokens, logits_to_keep=3).logits, logits[:, -3:])
    chosen = torch.tensor([4, 1])
    assert torch.equal(theirs(tokens, logits_to_keep=chosen).logits, logits[:, chosen])
    assert torch.equal(theirs(tokens, use_cache=False, return_dict=False)[0], theirs(tokens, use_cache=False).logits)


def test_labels_are_shifted_here_and_the_mean_is_over_what_is_counted() -> None:
    _, theirs = pair()
    tokens = torch.stack(ids(LONG, LONG))
    labels = tokens.clone()
    labels[0, :9] = -100
    logits = theirs(tokens).logits
    nll = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    count = int((labels[:, 1:] != -100).sum())
    assert_close(theirs(tokens, labels=labels).loss, nll.sum() / count, 1e-6)
    assert_close(theirs(tokens, labels=labels, num_items_in_batch=7).loss, nll.sum() / 7, 1e-6)
    assert_close(theirs(tokens, labels=labels, num_items_in_batch=torch.tensor(7)).loss, nll.sum() / 7, 1e-6)
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    assert_close(theirs(tokens, shift_labels=shifted).loss, nll.sum() / count, 1e-6)


@pytest.mark.parametrize("counted", [None, 5])
def test_the_routers_losses_are_added_in_training_alone(counted: int | None) -> None:
    config = hybrid_config(pattern=("swa", "gdn"), ffn="moe")
    ffn = MoEConfig(n_experts=4, n_activated=2, expert_hidden=16, aux_loss=0.3, z_loss=0.2)
    blocks = {name: replace(block, ffn=ffn) for name, block in config.blocks.items()}
    ours = build_model(replace(config, blocks=blocks)).train()
    theirs, tokens = of(ours), torch.stack(ids(LONG, LONG))
    nll, statistics = ours.loss(tokens, F.pad(tokens[:, 1:], (0, 1), value=-100))
    routers = sum(value for name, value in statistics.items() if name.startswith("loss/"))
    count = counted or tokens[:, 1:].numel()
    assert routers > 1
    found = theirs(tokens, labels=tokens, num_items_in_batch=counted)
    assert_close(found.loss, (nll + routers) / count, 1e-5)
    (nll + routers).backward()
    found.loss.backward()
    wanted = gradients_of(ours)
    for name, gradient in gradients_of(theirs.model).items():
        assert_close(gradient * count, wanted[name], 1e-4, name)
    assert_close(theirs.eval()(tokens, labels=tokens, num_items_in_batch=counted).loss, nll / count, 1e-5)


# ── generation ───────────────────────────────────────────────────────────────────────────────────────────────────────


@every_config
def test_greedy_text_is_that_of_the_language_model_batched_and_padded_on_either_side(name: str) -> None:
    ours, theirs = pair(CONFIGS[name])
    texts = ids(*LENGTHS)
    alone = [ours.generate(text, 12, temperature=0.0).tolist() for text in texts]
    for side in ("left", "right"):
        tokens, mask = padded(texts, side)
        assert greedy(theirs, tokens, attention_mask=mask) == alone
    assert greedy(theirs, tokens, attention_mask=mask, use_cache=False) == alone


def test_a_text_that_ends_at_stop_strings_takes_a_tokenizer() -> None:
    _, theirs = pair()
    tokens = torch.stack(ids(SHORT))
    assert greedy(theirs, tokens, tokenizer=object()) == greedy(theirs, tokens)


@every_mixer
def test_beams_are_the_same_with_a_cache_and_without(kind: str) -> None:
    _, theirs = pair(hybrid_config(pattern=(kind, "gdn")))
    tokens, mask = padded(ids(*LENGTHS), "left")
    beams = {"num_beams": 3, "num_return_sequences": 2, "attention_mask": mask}
    found = theirs.generate(tokens, max_new_tokens=9, do_sample=False, **beams)
    assert torch.equal(found, theirs.generate(tokens, max_new_tokens=9, do_sample=False, use_cache=False, **beams))
    assert not torch.equal(found[0], found[1])


def test_samples_of_one_seed_are_the_same_and_those_of_another_are_not() -> None:
    _, theirs = pair()
    tokens = torch.stack(ids(SHORT))

    def sampled(seed: int, **settings: object) -> list[list[int]]:
        torch.manual_seed(seed)
        return greedy(theirs, tokens, do_sample=True, num_return_sequences=3, **settings)

    assert sampled(0) == sampled(0)
    assert sampled(0) != sampled(1)
    assert sampled(0, top_k=1) == greedy(theirs, tokens) * 3


@every_mixer
def test_a_text_continued_from_its_cache_is_the_text_written_at_once(kind: str) -> None:
    _, theirs = pair(hybrid_config(pattern=(kind, "gdn")))
    tokens, mask = padded(ids(*LENGTHS), "left")
    settings = {"do_sample": False, "return_dict_in_generate": True}
    first = theirs.generate(tokens, attention_mask=mask, max_new_tokens=7, **settings)
    assert first.past_key_values.get_seq_length() == first.sequences.shape[1] - 1
    seen = F.pad(mask, (0, 7), value=1)
    cache = first.past_key_values.snapshot()
    for past in (first.past_key_values, cache):
        more = theirs.generate(first.sequences, attention_mask=seen, past_key_values=past, max_new_tokens=8, **settings)
        assert more.sequences[:, tokens.shape[1] :].tolist() == greedy(theirs, tokens, 15, attention_mask=mask)


def test_a_prompt_read_in_chunks_is_the_prompt_read_at_once() -> None:
    _, theirs = pair()
    tokens, mask = padded(ids(*LENGTHS), "left")
    assert greedy(theirs, tokens, attention_mask=mask, prefill_chunk_size=4) == greedy(
        theirs, tokens, attention_mask=mask
    )


@torch.no_grad()
def test_a_cache_grows_to_the_learned_positions_and_no_further() -> None:
    ours, theirs = pair(replace(hybrid_config(), learned_positions=LONG))
    (text,) = ids(LONG)
    expected, cache = ours(text[None]), SwamlaCache()
    for time in range(LONG):
        found = theirs(text[None, time : time + 1], past_key_values=cache).logits
        assert_close(found[:, 0], expected[:, time], 1e-5)
    assert cache.state is not None
    assert cache.state.max_len == LONG
    with pytest.raises(UsageError, match="24 tokens are more than the model's 23 learned positions"):
        theirs(text[None, :1], past_key_values=cache)


@torch.no_grad()
def test_a_cache_is_reset_repeated_and_asked_as_transformers_does() -> None:
    _, theirs = pair()
    a, b = (torch.stack(ids(MIDDLE, MIDDLE, seed=seed)) for seed in (1, 2))
    cache = SwamlaCache()
    assert (cache.batch_size, len(cache), cache.is_initialized, cache.get_max_length()) == (-1, 0, False, -1)
    first = theirs(a, past_key_values=cache).logits
    assert (cache.batch_size, len(cache), cache.is_initialized) == (2, 4, True)
    cache.batch_repeat_interleave(2)
    found = theirs(b.repeat_interleave(2, dim=0), past_key_values=cache).logits
    assert_close(found, theirs(torch.cat((a, b), dim=1)).logits[:, MIDDLE:].repeat_interleave(2, dim=0), 1e-5)
    cache.reset()
    assert torch.equal(theirs(a, past_key_values=cache).logits, first)
    assert not cache.is_croppable
    with pytest.raises(UsageError, match=r"cannot be cropped: take a snapshot\(\)"):
        cache.crop(-1)


# ── training ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_gradient_checkpointing_recomputes_every_block_and_changes_no_gradient(
    use_reentrant: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    whole = Block.whole
    monkeypatch.setattr(Block, "whole", lambda self, x, seq: (calls.append(1), whole(self, x, seq))[1])
    _, theirs = pair(replace(hybrid_config(), dropout=0.2))
    theirs.train()
    tokens, mask = padded(ids(*LENGTHS), "left")

    def run() -> tuple[int, dict[str, Tensor]]:
        calls.clear()
        theirs.zero_grad()
        torch.manual_seed(0)  # of dropout
        theirs(tokens, attention_mask=mask, labels=tokens).loss.backward()
        return len(calls), {name: gradient.clone() for name, gradient in gradients_of(theirs.model).items()}

    depth = theirs.model.config.depth
    count, expected = run()
    assert count == depth
    theirs.gradient_checkpointing_enable(None if use_reentrant is None else {"use_reentrant": use_reentrant})
    count, found = run()
    assert count == 2 * depth
    for name, gradient in found.items():
        assert_close(gradient, expected[name], 1e-5, name)
    theirs.gradient_checkpointing_disable()
    assert run()[0] == depth


def test_reentrant_checkpointing_that_would_lose_the_routers_gradients_is_refused() -> None:
    config = hybrid_config(pattern=("swa",), ffn="moe")
    ffn = MoEConfig(n_experts=4, n_activated=2, expert_hidden=16, aux_loss=0.3)
    theirs = of(build_model(replace(config, blocks={"swa": replace(config.blocks["swa"], ffn=ffn)})).train())
    tokens = torch.stack(ids(MIDDLE))
    theirs.gradient_checkpointing_enable({"use_reentrant": False})
    theirs(tokens, labels=tokens).loss.backward()
    theirs.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(UsageError, match="use_reentrant = True loses the gradients of the routers' losses"):
        theirs(tokens, labels=tokens)


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────

TOKENS = torch.ones(2, 4, dtype=torch.int64)
REFUSED = [
    ("no input", {}, "give either input_ids or inputs_embeds"),
    ("two inputs", {"input_ids": TOKENS, "inputs_embeds": torch.zeros(2, 4, 32)}, "give either"),
    ("an id", {"input_ids": TOKENS * 31}, "token 31 is outside the vocabulary of 31"),
    ("embeddings and n-grams", {"inputs_embeds": torch.zeros(2, 4, 32)}, "embeddings are given without ids"),
    ("a wide mask", {"attention_mask": torch.ones(2, 5)}, r"attention_mask.shape = \(2, 5\): must be \(batch, time\)"),
    ("a 4-D mask", {"attention_mask": torch.ones(2, 1, 4, 4)}, r"attention_mask.shape = \(2, 1, 4, 4\): must be"),
    ("positions", {"position_ids": torch.arange(3)[None]}, r"position_ids.shape = \(1, 3\): must be"),
    ("a jump", {"position_ids": torch.tensor([[0, 1, 5, 6]])}, "position_ids jump to 5: must go up by 1, or back to 0"),
    ("a late start", {"position_ids": torch.arange(3, 7)[None]}, "position_ids jump to 3"),
    ("rows of documents", {"cu_seq_lens_q": torch.tensor([0, 2, 4])}, "cu_seq_lens_q end at 4: must be for one row"),
    ("documents cached", {"position_ids": torch.tensor([[0, 1, 0, 1]]), "use_cache": True}, "cannot be continued"),
    ("attentions", {"output_attentions": True}, "attention weights are never held"),
    ("another cache", {"past_key_values": DynamicCache()}, "past_key_values is a DynamicCache: must be a SwamlaCache"),
]


@pytest.mark.parametrize(("given", "message"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_what_contradicts_itself_is_refused(given: dict[str, object], message: str) -> None:
    _, theirs = pair()
    with pytest.raises(UsageError, match=message):
        theirs(
            **(given if {"input_ids", "inputs_embeds"} & given.keys() or not given else {"input_ids": TOKENS} | given)
        )


@torch.no_grad()
def test_other_rows_than_the_caches_and_other_caches_are_refused() -> None:
    _, theirs = pair()
    cache = theirs(TOKENS).past_key_values
    with pytest.raises(UsageError, match="past_key_values hold 2 rows: must be as many as given, 1"):
        theirs(TOKENS[:1], past_key_values=cache)
    with pytest.raises(UsageError, match="cache_implementation = 'static': must be left out"):
        theirs.generate(TOKENS, cache_implementation="static", max_new_tokens=2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'atention_mask'"):
        theirs(TOKENS, atention_mask=TOKENS)


def test_transformers_server_is_told_that_continuous_batching_is_not_for_this_class() -> None:
    """Its pages hold keys and values; so it answers one request after the other, and says so."""
    serving = pytest.importorskip("transformers.cli.serving.utils", reason="a version without `transformers serve`")
    _, theirs = pair()
    state = serving.GenerationState(continuous_batching=True)
    assert not state.use_continuous_batching(theirs, serving.Modality.LLM)
    with pytest.raises(AttributeError, match="init_continuous_batching"):
        theirs.generate_batch([[1, 2, 3]])
