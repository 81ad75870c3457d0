"""`swamla doctor`: what it says of this machine is true, it needs no network, and a wrong result fails."""

import json
import socket
import tomllib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from swamla.cli import main, self_check
from swamla.cli.doctor import OPTIONAL
from swamla.cli.self_check import Wrong, compare, run_checks
from swamla.ops.attention.trial import AttentionTrial

CPU = torch.device("cpu")


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> dict:
    """What `swamla doctor --json` says where there is no network."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the doctor reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert main(["doctor", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_it_describes_this_machine_and_every_check_passes(told: dict) -> None:
    assert told["environment"]["torch"] == torch.__version__
    assert told["auto"]["precision"] in ("fp32", "bf16")
    assert set(told["auto"]["backends"]) == {"attention", "channelwise delta rule", "delta rule", "experts"}
    assert told["storage"]["here_free_bytes"] > 0
    assert [check["name"] for check in told["checks"] if not check["ok"]] == []
    assert len(told["checks"]) == 12
    assert told["ok"] is True


def test_every_backend_is_there_or_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("swamla.train.precision.has_bf16", lambda device: True)
    monkeypatch.setattr(self_check, "_checks", list)
    monkeypatch.setattr("swamla.cli.doctor.resolve_device", lambda asked: CPU)
    assert main(["doctor", "--json"]) == 0
    backends = json.loads(capsys.readouterr().out)["backends"]
    assert set(backends) == {"gdn", "kda", "latent", "mha", "mla", "swa", "moe", "latent_moe"}
    for kind, found in backends.items():
        assert found["reference"] == found["torch"] == "", kind
    assert "cudnn" not in backends["swa"]
    assert backends["mha"]["cudnn"].startswith("needs a CUDA device")
    assert backends["mha"]["flash"].startswith(("needs a CUDA device", "needs flash-attn: pip install"))
    assert backends["gdn"]["fla"].startswith(("needs a CUDA device", "needs flash-linear-attention: pip install"))
    assert main(["doctor"]) == 0
    shown = [line.partition("backends ")[2].strip() for line in capsys.readouterr().out.splitlines()]
    assert len([line for line in shown if line]) == 4  # kinds with the same backends share a line
    assert "kda, latent_moe, moe: reference, torch" in shown
    windowed = "swa: reference, torch, tiles, sdpa; not flex (needs a CUDA device), flash (needs "
    assert any(line.startswith(windowed) for line in shown)
    assert any(line.startswith("latent, mha, mla: reference, torch, tiles, sdpa; not flex") for line in shown)


def test_it_shows_what_was_raced_with_the_times_and_can_race_anew(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    races = []

    def measure(trial: AttentionTrial, length: int, dtype: torch.dtype, allowance: float) -> tuple[int, dict]:
        races.append(trial)
        return length, {path: [0.001 if path in ("sdpa", "fp32") else 0.004] * 5 for path in trial.paths(dtype)}

    monkeypatch.delenv("SWAMLA_MEASURE")
    monkeypatch.setattr("swamla.train.racing.measure", measure)
    monkeypatch.setattr("swamla.train.precision.has_bf16", lambda device: True)
    monkeypatch.setattr(self_check, "_checks", list)
    monkeypatch.setattr("swamla.cli.doctor.resolve_device", lambda asked: CPU)
    for arguments, raced in ((["doctor"], 5), (["doctor"], 5), (["doctor", "--measure"], 10)):
        assert main(arguments) == 0
        shown = capsys.readouterr().out
        assert len(races) == raced
        assert shown.count(": sdpa 1 ms, tiles 4 ms (5 rounds)\n") == 4
        assert shown.count(", casts included: fp32 1 ms, bf16 4 ms (5 rounds)\n") == 1
    assert main(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["paths"]
    assert {(choice["length"], choice["chosen"]) for choice in told} == {(512, "sdpa"), (2048, "fp32"), (4096, "sdpa")}


def test_every_optional_library_is_named_with_the_extra_that_brings_it() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = {name: needs for name, needs in project["optional-dependencies"].items() if name != "dev"}
    brings = {need.partition(">")[0]: extra for extra, needs in extras.items() for need in needs}
    assert brings.items() >= OPTIONAL.items()


def broken(device: torch.device) -> str:
    raise RuntimeError("no such instruction\nand a long story")


def test_a_check_that_fails_is_a_cross_and_exit_status_1_and_stops_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(self_check, "_checks", lambda: [("one", broken), ("two", lambda device: "fine")])
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "✗ one                 RuntimeError: no such instruction\n✓ two                 fine\n" in shown
    assert "1 of 2 checks failed" in shown
    assert main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


def test_checks_leave_the_random_generator_as_it_was() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert all(outcome.ok for outcome in run_checks(CPU))
    assert torch.equal(torch.rand(3), expected)


class WrongGradient(torch.autograd.Function):
    """Doubles its input and says that it tripled it."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return 2 * x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return 3 * gradient


def test_a_wrong_output_a_wrong_gradient_and_no_number_at_all_are_found() -> None:
    x = torch.randn(4, 5)
    assert "reference, gradients included" in compare(lambda x: 2 * x, lambda x: x + x, [x], 1e-6)
    for wrong in (lambda x: 2.1 * x, WrongGradient.apply, lambda x: x * float("nan")):
        with pytest.raises(Wrong, match="differ from the reference by"):
            compare(wrong, lambda x: x + x, [x], 1e-3)


def test_a_model_that_does_not_learn_or_steps_otherwise_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "FALL", 0.01)
    found = {outcome.name: outcome for outcome in run_checks(CPU)}
    assert not found["training"].ok
    assert "must fall" in found["training"].detail
    monkeypatch.setattr(self_check, "TOLERANCE", {"cpu": 1e-12})
    found = {outcome.name: outcome for outcome in run_checks(CPU)}
    assert not found["step by step"].ok
    assert not found["causal attention"].ok
