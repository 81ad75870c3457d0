"""The logit lens is the final norm and the head applied to each layer's stream."""

import pytest
import torch

from swamla.interpret import logit_lens
from swamla.interpret.tracing import layout_of
from swamla.model.language_model import NO_LABEL
from tests.interpret.models import AROUND, build, hybrid, two_rows
from tests.model.helpers import random_tokens


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("around", AROUND)
@torch.no_grad()
def test_each_layers_stream_is_read_by_the_final_norm_and_the_head(around: str, norm: str) -> None:
    model, tokens = build("gdn", "mla", "swa", around=around, norm=norm, logit_cap=4.0), random_tokens(2, 20)
    seq, _ = two_rows()
    found = logit_lens(model, tokens, seq=seq, top=3)
    streams: list[torch.Tensor] = []
    model.body(model.embed(tokens), seq, tokens, inputs=streams)
    labels = torch.full((2, 20), NO_LABEL)
    for row, ends in enumerate([(8, 9, 17), (4, 19)]):
        for t in range(max(ends)):
            if t not in ends and seq.document_BT[row, t + 1] >= 0:
                labels[row, t] = tokens[row, t + 1]
    for index, stream in enumerate(streams):
        logits = 4.0 * torch.tanh(model.head(model.norm(stream)) / 4.0)
        log_p = logits.log_softmax(-1)
        losses = [-log_p[b, t, labels[b, t]] for b in range(2) for t in range(20) if labels[b, t] != NO_LABEL]
        assert found.loss[index] == pytest.approx((sum(losses) / len(losses)).item())
        assert torch.equal(found.top_LBTK[index], logits.argsort(dim=-1, descending=True)[..., :3])
        torch.testing.assert_close(
            found.probability_LBTK[index], log_p.exp().float().gather(2, found.top_LBTK[index]), rtol=1e-5, atol=1e-7
        )
    assert len(found.loss) == len(streams) + 1
    assert found.loss[-1] == pytest.approx((model.loss(tokens, labels, seq)[0] / (labels != NO_LABEL).sum()).item())


def test_embeddings_of_ngrams_are_in_the_stream_that_their_layer_reads() -> None:
    model, tokens = hybrid(), random_tokens(1, 12)
    found = logit_lens(model, tokens)
    streams: list[torch.Tensor] = []
    with torch.no_grad():
        model.body(model.embed(tokens), layout_of(tokens, None), tokens, inputs=streams)
        for index, stream in enumerate(streams):
            assert torch.equal(found.top_LBTK[index, ..., 0], model.logits(model.head_input(stream)).argmax(-1))


def test_a_model_whose_mixers_cannot_be_taken_apart_has_a_lens() -> None:
    model, tokens = build("toy"), random_tokens(2, 9)
    with torch.no_grad():
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])[0].item() / 16
    assert logit_lens(model, tokens).loss[-1] == pytest.approx(loss)
