"""Every architecture of transformers that is mapped: the same function, gradients and text, in and out.

In fp64, because some random models are so sensitive that two right fp32 results differ by more than 1e-5; transformers
keeps tables and the delta rule in fp32 even then.
"""

import pytest
import torch

from swamla.errors import UsageError
from swamla.interop import Architecture, equal_architecture, load_pretrained, read_architecture, save_pretrained
from swamla.interop.folder import Weights
from swamla.model.accounting import count_parameters
from swamla.registry import members_of
from tests.interop.cases import CASES, compare, tokens

TOLERANCE, DOUBLE = 1e-5, torch.float64


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """A case, its model of transformers, and the folder it was saved to."""
    found, folder = CASES[request.param], tmp_path_factory.mktemp("theirs")
    model = found.model()
    model.save_pretrained(folder)
    return found, model.double(), folder


def test_every_architecture_has_a_case() -> None:
    import transformers

    kinds = {getattr(transformers, case.config).model_type for case in CASES.values()}
    theirs = {kind for kind, each in members_of(Architecture).items() if not each.has_every_model}
    assert kinds == theirs  # our own is compared in test_transformers.py


@pytest.mark.parametrize("kind", ["kimi_linear", "bailing_hybrid", "deepseek_v3", "llama", "qwen3_5"])
@torch.no_grad()
def test_a_written_folder_computes_the_same_by_eager_attention(kind, tmp_path) -> None:
    """Which divides the heads of queries by those of keys."""
    from transformers import AutoModelForCausalLM

    CASES[kind].model().save_pretrained(tmp_path / "theirs")
    ours = load_pretrained(tmp_path / "theirs")
    save_pretrained(ours, tmp_path / "out", to=read_architecture(tmp_path / "theirs").kind)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").double()
    if hasattr(again.config, "num_experts_per_tok"):
        again.set_experts_implementation("eager")
    ids = tokens(2, 9)
    expected = ours.double()(ids)
    assert (again(ids).logits - expected).abs().max() <= TOLERANCE * expected.abs().max().clamp(min=1)


def test_what_transformers_saved_is_the_same_function_here(case) -> None:
    _, theirs, folder = case
    found = compare(load_pretrained(folder, dtype=DOUBLE), theirs, read_architecture(folder), 20)
    assert found.logits <= TOLERANCE
    assert found.gradients <= 10 * TOLERANCE
    assert found.text == 20


def test_what_is_written_again_is_the_same_model_in_transformers(case, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    found, _, folder = case
    ours = load_pretrained(folder)
    kind = found.to or read_architecture(folder).kind
    written = save_pretrained(ours, tmp_path / "out", to=kind)
    assert written.kind == kind
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    if hasattr(again.config, "num_experts_per_tok"):
        again.set_experts_implementation("eager")
    compared = compare(ours.double(), again.eval().double(), written, 5)
    assert compared.logits <= TOLERANCE
    assert compared.gradients <= 10 * TOLERANCE
    if found.to is None:
        first, second = (dict(Weights(where, written)) for where in (folder, tmp_path / "out"))
        assert first.keys() == second.keys()
        for name, tensor in first.items():  # to the bit, but for gains that are stored less 1
            one_ulp = 2**-23 if tensor.ndim == 1 else 0.0
            if "_conv1d" in name:  # transformers cuts these into equal parts
                continue
            torch.testing.assert_close(second[name], tensor, rtol=0, atol=one_ulp, msg=name)


def test_it_has_as_many_parameters_as_in_transformers(case) -> None:
    found, theirs, folder = case
    config = read_architecture(folder).language_model()
    zeros = config.depth * config.width if found.config == "Qwen2Config" else 0  # ours has biases of the output, too
    assert count_parameters(config).total == sum(p.numel() for p in theirs.parameters()) + zeros


@pytest.mark.parametrize("kind", members_of(Architecture))
def test_each_rule_undoes_itself_and_together_they_fill_every_weight(kind: str) -> None:
    architecture = members_of(Architecture)[kind].example()
    config = architecture.language_model()
    own = config.build(seed=0).state_dict()
    rules = list(architecture.rules())
    named = [rule.ours for rule in rules]
    assert len(named) == len(set(named))
    assert {*named, *(["head.weight"] if config.tied_head else [])} == set(own)
    for rule in rules:
        torch.testing.assert_close(rule.join(rule.split(own[rule.ours])), own[rule.ours], msg=rule.ours)


@pytest.mark.parametrize("kind", members_of(Architecture))
def test_the_example_is_the_architecture_of_its_own_model(kind: str) -> None:
    architecture = members_of(Architecture)[kind].example()
    if kind == "qwen2":
        with pytest.raises(UsageError, match="queries, keys and values only"):
            equal_architecture(architecture.language_model(), kind)
        return
    found = equal_architecture(architecture.language_model(), kind)
    assert found.language_model() == architecture.language_model()
