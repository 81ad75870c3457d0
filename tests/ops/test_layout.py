"""The layout of packed rows: positions, runs, and what is shared between layers."""

import pytest
import torch

from swamla.ops.layout import PADDING, Layout


def from_rows(*rows):
    return Layout.from_documents(torch.tensor(rows))


def test_positions_restart_at_each_document_and_each_row():
    seq = from_rows([4, 4, 4, 7, 7, 9], [9, 9, 2, 2, 2, 2])
    assert seq.position_BT.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 0, 1, 2, 3]]
    assert seq.position_BT.dtype == torch.int64


def test_an_id_that_comes_back_begins_a_new_document():
    assert from_rows([0, 0, 1, 0, 0]).position_BT.tolist() == [[0, 1, 0, 0, 1]]


def test_runs_join_equal_neighbours_across_rows_in_order():
    assert from_rows([0, 0, 1, 1, 2, 3], [3, 4, 4, 5, 5, 5]).runs == ((2, 2), (3, 1), (1, 2), (1, 3))


@pytest.mark.parametrize("seed", range(20))
def test_runs_cover_every_token_once_and_rebuild_the_positions(seed):
    generator = torch.Generator().manual_seed(seed)
    document_BT = (torch.rand(3, 40, generator=generator) < 0.2).long().cumsum(dim=1)
    document_BT[1, 30:] = PADDING
    seq = Layout.from_documents(document_BT)
    lengths = [length for count, length in seq.runs for _ in range(count)]
    assert sum(lengths) == document_BT.numel()
    assert [p for n in lengths for p in range(n)] == seq.position_BT.flatten().tolist()
    assert all(a != b for (_, a), (_, b) in zip(seq.runs, seq.runs[1:], strict=False))


def test_a_layout_goes_to_a_gpu_from_pinned_memory_and_without_waiting(monkeypatch):
    """A copy from other memory would wait for all that the GPU has to do: here it stands in for a GPU."""
    sent, pinned = [], []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self.clone()) or pinned[-1])
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **options: sent.append((self, args, options)) or self)
    from_rows([0, 0, 1], [2, 3, 3]).to("cuda:0")
    assert len(sent) == 2
    for tensor, args, options in sent:
        assert any(tensor is each for each in pinned)
        assert (args, options) == (("cuda:0",), {"non_blocking": True})
    sent.clear()
    from_rows([0, 0, 1], [2, 3, 3]).to("cpu")
    assert [options for _, _, options in sent] == [{}, {}]


def test_a_layout_of_equal_rows_goes_to_a_gpu(monkeypatch):
    """Pinning, as torch does it: into memory of the same strides, to which a tensor made by `expand` is not copied."""

    def pin_memory(self):
        storage = torch.UntypedStorage(self.untyped_storage().nbytes())
        return torch.empty(0, dtype=self.dtype).set_(storage, 0, self.size(), self.stride()).copy_(self)

    sent = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **options: sent.append(self) or self)
    for seq in (Layout.from_documents(torch.tensor([0, 0, 1]).expand(4, -1)), Layout.one_document_per_row(4, 3)):
        sent.clear()
        seq.to("cuda:0")
        for there, here in zip(sent, (seq.document_BT, seq.position_BT), strict=True):
            assert torch.equal(there, here)


def test_padding_is_a_run_like_any_other():
    seq = from_rows([0, 0, PADDING, PADDING], [PADDING] * 4)
    assert seq.runs == ((2, 2), (1, 4))
    assert not seq.whole_rows


def test_rows_of_one_document_each_are_whole():
    for seq in (from_rows([0, 0, 0], [0, 0, 0]), from_rows([5, 5, 5], [6, 6, 6])):
        assert seq.whole_rows
        assert seq.runs == ((2, 3),)
    assert not from_rows([0, 0, 1], [0, 0, 0]).whole_rows


def test_one_document_per_row_is_the_layout_of_equal_ids():
    made, derived = Layout.one_document_per_row(2, 3), from_rows([0, 0, 0], [0, 0, 0])
    assert torch.equal(made.document_BT, derived.document_BT)
    assert torch.equal(made.position_BT, derived.position_BT)
    assert made.runs == derived.runs
    assert made.shape == derived.shape == (2, 3)


@pytest.mark.parametrize(("batch", "time"), [(0, 5), (2, 0)])
def test_no_tokens_make_no_runs(batch, time):
    seq = Layout.one_document_per_row(batch, time)
    assert (seq.shape, seq.runs) == ((batch, time), ())


def test_new_tokens_continue_the_positions_of_those_held():
    valid_BT = torch.tensor([[True, True, True], [True, False, False]])
    seq = Layout.continuing(torch.tensor([5, 0]), valid_BT)
    assert seq.position_BT[valid_BT].tolist() == [5, 6, 7, 0]
    assert ((seq.document_BT == PADDING) == ~valid_BT).all()


def test_a_table_is_made_once_and_kept_by_its_key():
    seq = from_rows([0, 0, 1])
    made = []

    def make():
        made.append(object())
        return made[-1]

    assert seq.table("a", make) is seq.table("a", make)
    assert len(made) == 1
    assert seq.table("b", make) is not seq.table("a", make)
    assert len(made) == 2


def test_a_layout_moved_to_a_device_keeps_its_documents_and_no_table():
    seq = from_rows([0, 0, 1])
    here = seq.table("device", lambda: "here")
    moved = seq.to("meta")
    assert moved.document_BT.device.type == moved.position_BT.device.type == "meta"
    assert (moved.runs, moved.shape) == (seq.runs, seq.shape)
    assert moved.table("device", lambda: "there") != here
