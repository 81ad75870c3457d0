"""peft's adapters and trl's trainer on the exported class: what they train decodes, merges and is what `sft` trains."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import swamla
from swamla.cli import main
from swamla.data.chat import template_of
from swamla.data.tokenizer import ByteTokenizer
from swamla.errors import UsageError
from swamla.interop import load_pretrained, save_pretrained
from swamla.interop.transformers import SwamlaForCausalLM
from swamla.model.ffns.moe import MoEConfig
from tests.model.helpers import FFNS, MIXERS, assert_close, build_model, hybrid_config

from .helpers import LONG, SHORT, ids, of, padded, pair

CASES = {**{kind: (kind, "dense") for kind in MIXERS}, **{f"ffn {kind}": ("swa", kind) for kind in FFNS}}


def adapted_by_peft(model: SwamlaForCausalLM, *, begun: bool = True) -> Any:
    """Adapters on all linear layers but the head, and on experts; begun: no longer at their initial values."""
    peft = pytest.importorskip("peft", reason="peft is not installed: `make interop` has it")
    torch.manual_seed(0)
    experts = [name for name, parameter in model.named_parameters() if parameter.ndim == 3]
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM", r=3, lora_alpha=3, target_modules="all-linear", target_parameters=experts or None
    )
    adapted = peft.get_peft_model(model, settings).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if begun and "lora_B" in name:
                parameter.normal_(std=0.1)
    return adapted


def model_of(case: str) -> SwamlaForCausalLM:
    mixer, ffn = CASES[case]
    return pair(hybrid_config(pattern=(mixer, "gdn"), ffn=ffn))[1]


def plain_weights(adapted: Any) -> Mapping[str, Tensor]:
    return {name: tensor.clone() for name, tensor in adapted.named_parameters() if "lora_" not in name}


@pytest.mark.parametrize("case", CASES)
def test_peft_adapts_every_projection_and_expert_and_decodes_merges_and_loads_them_alike(
    case: str, tmp_path: Path
) -> None:
    theirs = model_of(case)
    names = {name for name, each in theirs.named_modules() if isinstance(each, nn.Linear)} - {"model.head"}
    names |= {name.rpartition(".")[0] for name, parameter in theirs.named_parameters() if parameter.ndim == 3}
    adapted, (tokens, mask) = adapted_by_peft(theirs), padded(ids(LONG, SHORT), "left")
    found = {
        name.removeprefix("base_model.model.") for name, each in adapted.named_modules() if hasattr(each, "lora_A")
    }
    assert {name.removesuffix(".base_layer") for name in found} == names
    with torch.no_grad():
        expected = adapted(tokens, attention_mask=mask, use_cache=False).logits[mask.bool()]
        with adapted.disable_adapter():
            before = adapted(tokens, attention_mask=mask, use_cache=False).logits[mask.bool()]
        assert (expected - before).abs().max() > 1e-2
        cache, pieces = None, []
        for end in (4, *range(5, LONG + 1)):
            start = 0 if cache is None else end - 1
            step = adapted(tokens[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
            cache, pieces = step.past_key_values, [*pieces, step.logits]
        assert_close(torch.cat(pieces, dim=1)[mask.bool()], expected, 1e-5, "with a cache")
        adapted.save_pretrained(tmp_path / "adapters")
        merged = adapted.merge_and_unload()
        assert_close(merged(tokens, attention_mask=mask, use_cache=False).logits[mask.bool()], expected, 1e-5, "merged")
    merged.save_pretrained(tmp_path / "merged")
    ours = load_pretrained(tmp_path / "merged")  # what `swamla import` and `--init_from` read
    with torch.no_grad():
        assert_close(ours(tokens[:1]), merged(tokens[:1], use_cache=False).logits, 1e-5, "read again")
        peft = pytest.importorskip("peft")
        again = peft.PeftModel.from_pretrained(model_of(case), tmp_path / "adapters").eval()
        assert_close(again(tokens, attention_mask=mask, use_cache=False).logits[mask.bool()], expected, 1e-5, "loaded")


@pytest.mark.parametrize("case", ["gdn", "mla", "ffn moe"])
def test_adapters_of_peft_learn_and_nothing_else_moves(case: str) -> None:
    adapted, tokens = adapted_by_peft(model_of(case), begun=False).train(), torch.stack(ids(LONG, LONG))
    before, losses = plain_weights(adapted), []
    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=1e-2, weight_decay=0.1)
    for _ in range(12):
        loss = adapted(tokens, labels=tokens).loss
        loss.backward()
        assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    after = plain_weights(adapted)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def conversation(word: str) -> dict[str, Any]:
    """Several turns, letters of several bytes, line ends, spaces where an answer begins and ends."""
    said = [
        ("system", "Be brïef."),
        ("user", f"say {word}"),
        ("assistant", f" <{word}>\n"),
        ("user", "again\n\nplease"),
        ("assistant", f"{word}\n  {word} "),
    ]
    return {"messages": [{"role": role, "content": content} for role, content in said]}


CONVERSATIONS = [conversation(word) for word in ("ab", "cd", "efgh", "ij", "kl", "mnop", "qr", "st")]


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported folder of a run that `sft` tuned for one step."""
    place = tmp_path_factory.mktemp("trl")
    (place / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CONVERSATIONS))
    save_pretrained(
        build_model(replace(hybrid_config(pattern=("gdn", "mla")), vocab_size=257, ngram_buckets=())),
        place / "base",
        to="swamla",
        tokenizer=ByteTokenizer(),
    )
    settings = ("--steps", "1", "--batch_size", "2", "--block_size", "160", "--precision", "fp32")
    data = ("--data", str(place / "chat.jsonl"), "--output_dir", str(place / "run"), "--eval_interval", "none")
    assert main(["sft", str(place / "base"), *data, *settings]) == 0
    assert main(["export", str(place / "run"), str(place / "out"), "--to", "swamla"]) == 0
    return place


def trl_trainer(folder: Path, model: Any, rows: list[dict[str, Any]], out: Path, **settings: Any) -> Any:
    """trl's SFTTrainer over the rows; loss on the assistant's answers, as the exported template marks them."""
    trl = pytest.importorskip("trl", reason="trl is not installed: `make interop` has it")
    from datasets import Dataset

    usual = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_length": 256}
    config = trl.SFTConfig(
        output_dir=str(out),
        assistant_only_loss=True,
        use_cpu=True,
        bf16=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        **usual | settings,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return trl.SFTTrainer(model, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def test_trl_learns_the_tokens_that_sft_learns_and_computes_the_models_loss(chat_folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(chat_folder / "out")
    trainer = trl_trainer(chat_folder / "out", model, CONVERSATIONS, tmp_path)
    ours, tokenizer = swamla.load(chat_folder / "run")
    template, total, count = template_of(tokenizer), 0.0, 0
    for row, found in zip(CONVERSATIONS, trainer.train_dataset, strict=True):
        expected = template.conversation(row["messages"])
        assert found["input_ids"] == [tokenizer.eos_id, *expected.ids]
        learned = [i if is_learned else -100 for i, is_learned in zip(expected.ids, expected.learned, strict=True)]
        assert found["labels"] == [-100, *learned]
        with torch.no_grad():
            total += float(
                ours.loss(torch.tensor([[tokenizer.eos_id, *expected.ids[:-1]]]), torch.tensor([learned]))[0]
            )
        count += sum(expected.learned)
    batch = trainer.data_collator(list(trainer.train_dataset))
    with torch.no_grad():
        assert trainer.compute_loss(model.eval(), dict(batch)).item() == pytest.approx(total / count, rel=1e-5)
        assert model(**batch).loss.item() == pytest.approx(total / count, rel=1e-5)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert losses[1] < losses[0]


def test_trl_packs_conversations_that_do_not_see_each_other_and_trains_adapters(
    chat_folder: Path, tmp_path: Path
) -> None:
    adapted = adapted_by_peft(AutoModelForCausalLM.from_pretrained(chat_folder / "out"))
    trainer = trl_trainer(chat_folder / "out", adapted, CONVERSATIONS, tmp_path, packing=True)
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert "position_ids" in batch
    alone = trl_trainer(chat_folder / "out", adapted, CONVERSATIONS, tmp_path)
    whole = alone.data_collator(list(alone.train_dataset))
    with torch.no_grad():
        adapted.eval()
        packed, separate = (each.compute_loss(adapted, dict(b)) for each, b in ((trainer, batch), (alone, whole)))
        assert packed.item() == pytest.approx(separate.item(), rel=1e-5)
    before = plain_weights(adapted)
    trainer.train()
    after = plain_weights(adapted)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_the_model_without_its_head_gives_what_the_head_reads_and_refuses_what_it_cannot_do() -> None:
    ours, theirs = pair()
    tokens, mask = padded(ids(LONG, SHORT), "left")
    with torch.no_grad():
        hidden = theirs.base_model(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
        logits = theirs(tokens, attention_mask=mask, use_cache=False).logits
        cap = theirs.config.final_logit_softcapping
        assert cap == ours.config.logit_cap
        assert_close(cap * torch.tanh(theirs.get_output_embeddings()(hidden) / cap), logits, 1e-6)
        assert torch.equal(theirs.model(tokens[:1]), ours(tokens[:1]))
    with pytest.raises(UsageError, match="use_cache is given: must be left out"):
        theirs.base_model(input_ids=tokens, use_cache=True)
    with pytest.raises(UsageError, match="give either input_ids or inputs_embeds"):
        theirs.base_model()
    with pytest.raises(TypeError, match="'wrong'"):
        theirs.base_model(input_ids=tokens, wrong=1)
    (block,) = hybrid_config(pattern=("swa",), ffn="moe").blocks.values()
    assert isinstance(block.ffn, MoEConfig)
    balanced = replace(block, ffn=replace(block.ffn, aux_loss=0.01))
    routed = of(build_model(replace(hybrid_config(pattern=("swa",)), blocks={"swa": balanced})).train())
    with pytest.raises(UsageError, match="`aux_loss` and `z_loss`: they must be 0"):
        routed.base_model(input_ids=tokens, attention_mask=mask)
    routed.eval().base_model(input_ids=tokens, attention_mask=mask)
