"""The number format of a run is chosen once, by what the machine has."""

import pytest
import torch

from swamla.errors import MissingBackendError
from swamla.train import precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(("fast", "chosen"), [(True, "bf16"), (False, "fp32")])
def test_auto_is_bf16_exactly_where_it_is_fast(monkeypatch, fast, chosen):
    monkeypatch.setattr(precision, "bf16_is_fast", lambda device: fast)
    assert precision.resolve_precision("auto", CPU) == chosen
    assert precision.resolve_precision("fp32", CPU) == "fp32"
    assert precision.resolve_precision("bf16", CPU) == "bf16"


@pytest.mark.parametrize(("chosen", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_autocast_computes_in_what_was_chosen(chosen, dtype):
    x = torch.ones(2, 2)
    with precision.autocast(chosen, CPU):
        assert (x @ x).dtype == dtype


def test_a_device_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert precision.resolve_device("auto") == CPU
    with pytest.raises(MissingBackendError, match="no CUDA device"):
        precision.resolve_device("cuda")
