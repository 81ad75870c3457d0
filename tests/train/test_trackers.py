"""Trackers tell what metrics.jsonl has, go on after a crash, and cannot disturb a run whatever happens to them."""

import http.server
import io
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from swamla.cli import main
from swamla.errors import MissingBackendError
from swamla.model.accounting import training_flops_per_token
from swamla.train import train
from swamla.train.tracking import trackers, wandb_follower
from swamla.train.tracking.metrics import read_metrics
from swamla.train.tracking.trackers import TensorBoard
from swamla.train.utilisation import peak_memory, peak_of
from tests.loopback import Loopback, answering
from tests.waiting import PATIENCE, running, until

from .helpers import held_out, losses, run, tiny_config, weights

CANARY = "canary" + 34 * "7"

FAKE_WANDB = """
import json, os, time
FAULT = os.environ.get("FAKE_FAULT", "")
def note(*what):
    with open(os.environ["FAKE_LOG"], "a") as file:
        file.write(json.dumps(what) + "\\n")
def at(place):
    if FAULT == place:
        raise RuntimeError("broken " + place)
    if FAULT == "hang at " + place:
        time.sleep(1000)
        note("woke")
at("import")
Settings = dict
def teardown():
    note("teardown")
class Run:
    url = "https://example.org/run"
    step = int(os.environ.get("FAKE_STEP", 0))
    def __init__(self, folder):
        self.dir = folder + "/wandb/offline-run-1/files"
    def log(self, values, step):
        at("log")
        note("log", step, values)
    def finish(self, exit_code):
        at("finish")
        note("finish", exit_code)
def init(mode, id, dir, resume, **settings):
    note("init", mode, id, resume)
    at("init")
    at("init " + mode)
    return Run(dir)
"""


@pytest.fixture(autouse=True)
def _no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting, key or login of the user's reaches a test."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package `wandb` that notes its calls in the file returned and fails where FAKE_FAULT says."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "wandb.py").write_text(FAKE_WANDB)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'fake'}{os.pathsep}{os.environ['PYTHONPATH']}")
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "calls.jsonl"))
    return tmp_path / "calls.jsonl"


def calls(log: Path) -> list[list[Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


class Stub(http.server.BaseHTTPRequestHandler):
    """Answers every request with `status`; 0: never."""

    server: Loopback
    status = 0

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("content-length") or 0))
        if self.status == 0:
            self.server.hang()
            return
        self.send_response(self.status)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    do_GET = do_POST = do_PUT = answer

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Stub]]:
    """A server on loopback in the place of W&B's; what it answers is the test's choice."""
    chosen = type("Chosen", (Stub,), {})
    with answering(chosen) as loopback:
        monkeypatch.setenv("WANDB_BASE_URL", loopback.url)
        monkeypatch.setenv("WANDB_API_KEY", CANARY)
        yield chosen


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, dataset):
    """The tiny run without trackers: (losses, weights)."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    state = run(tiny_config(), folder, dataset)
    return losses(folder), weights(state)


def shown(config, folder: Path, dataset, **options: Any) -> tuple[list[str], dict[str, torch.Tensor]]:
    """What a run prints about trackers, and the weights it ends with."""
    out = io.StringIO()
    state = train(config, folder, dataset=dataset, console=Console(file=out), **options)
    return [line for line in out.getvalue().splitlines() if "& Biases" in line or "TensorBoard" in line], weights(state)


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize(
    "fault", ["import", "init", "log", "finish", "hang at import", "hang at init", "hang at log", "hang at finish"]
)
def test_a_broken_tracker_costs_one_warning_and_no_bit_of_the_run(
    fault, fake, dataset, tmp_path, undisturbed, monkeypatch
):
    monkeypatch.setenv("FAKE_FAULT", fault)
    monkeypatch.setattr(trackers, "END_SECONDS", 1.0 if "hang" in fault else 20.0)
    lines, found = shown(tiny_config(wandb_project="p"), tmp_path / "run", dataset)
    assert len([line for line in lines if line.startswith("warning: ")]) == 1, lines
    expected_losses, expected = undisturbed
    assert losses(tmp_path / "run") == expected_losses
    assert same(found, expected)
    log = Path(os.environ["FAKE_LOG"])
    assert not log.exists() or "woke" not in log.read_text()  # nobody waited for what hangs


@pytest.mark.parametrize(("status", "reason"), [(500, "answers 500"), (0, "does not answer")])
def test_a_server_that_fails_or_hangs_leaves_an_offline_run(
    status, reason, server, fake, dataset, tmp_path, undisturbed
):
    server.status = status
    lines, found = shown(tiny_config(wandb_project="p"), tmp_path / "run", dataset)
    (line,) = lines
    assert line.startswith("warning: Weights & Biases: offline (")
    assert reason in line
    assert [call[:2] for call in calls(fake) if call[0] == "init"] == [["init", "offline"]]
    assert [call[1] for call in calls(fake) if call[0] == "log"] == [1, 2, 3, 4, 5, 6]
    assert same(found, undisturbed[1])


def test_the_real_wandb_refused_with_401_leaves_an_offline_run_and_no_key_in_any_file(
    server, dataset, tmp_path, undisturbed, monkeypatch
):
    server.status = 401
    monkeypatch.setattr(trackers, "END_SECONDS", PATIENCE)  # wandb itself takes long on a busy machine
    folder = tmp_path / "run"
    lines, found = shown(tiny_config(wandb_project="p", wandb_run_name="n"), folder, dataset)
    (line,) = lines
    assert line.startswith("warning: Weights & Biases: offline (")
    assert "401" in line
    assert same(found, undisturbed[1])
    (offline,) = (folder / "wandb").glob("*run-2*")
    assert offline.name.startswith("offline-run-")
    ((_, name, history),) = wandb_files(folder)
    assert name == "n"
    assert [step for step, _ in history] == [1, 2, 3, 4, 5, 6]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []


def wandb_files(folder: Path) -> list[tuple[str, str, list[tuple[int, dict[str, str]]]]]:
    """(run id, name, [(step, {key: JSON})]) of each offline run in a run's folder, oldest first."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for file in sorted((folder / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        run_id = name = ""
        history = []
        for data in leveldb_records(file.read_bytes()):
            record = Record.FromString(data)
            if record.HasField("run"):
                run_id, name = record.run.run_id, record.run.display_name
            if record.HasField("history"):
                values = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                history.append((int(values["_step"]), values))
        found.append((run_id, name, history))
    return found


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log with a 7-byte head: blocks of 32 KiB, pieces of crc, length and kind."""
    place, whole = 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        if place + 7 + length > len(data):
            return  # it is being written
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # all of a record, or its last piece
            yield whole
            whole = b""


def test_a_run_killed_and_resumed_is_one_offline_run_whose_steps_rise(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("".join(f"line {i} and its square {i * i}\n" for i in range(300)))
    flags = (
        "--data text.txt --tokenizer byte --cache_dir cache --pattern swa --width 16 --n_heads 2 --batch_size 2 "
        "--block_size 32 --max_minutes none --eval_seconds none --eval_interval none --save_interval 10 --threads 1"
    )
    command = f"train quickstart {flags} --steps 100000 --output_dir run --wandb_project p"
    with running([sys.executable, "-m", "swamla", *shlex.split(command)], stdout=subprocess.DEVNULL) as trainer:
        until(lambda: any(Path("run/wandb").glob("offline-run-*")) and len(losses(Path("run"))) > 30)
        trainer.send_signal(signal.SIGKILL)
    before = len(losses(Path("run")))
    last = before // 10 * 10 + 20
    # The follower outlives the trainer, for a moment.
    until(lambda: [len(history) for _, _, history in wandb_files(Path("run"))] == [before])
    assert main(["train", "--resume", "run", "--steps", str(last)]) == 0
    (first_id, _, first), (second_id, _, second) = wandb_files(Path("run"))
    assert first_id == second_id == Path("run/wandb/run_id").read_text()
    assert [step for step, _ in first] == list(range(1, before + 1))
    assert [step for step, _ in second] == list(range(1, last + 1))
    assert [json.loads(values["loss"]) for _, values in second] == [loss for _, loss in losses(Path("run"))]


def test_a_resumed_online_run_keeps_its_id_and_gets_the_steps_it_lacks(server, fake, dataset, tmp_path, monkeypatch):
    server.status = 404  # an answer: the server is there
    config = tiny_config(wandb_project="p", eval_interval=3, schedule="constant")
    lines, _ = shown(config, tmp_path / "run", dataset, evaluate=held_out(dataset))
    assert lines == ["Weights & Biases: https://example.org/run"]
    monkeypatch.setenv("FAKE_STEP", "5")  # what a server answers that has seen steps 0 to 4
    shown(replace(config, train=replace(config.train, steps=8)), tmp_path / "run", dataset, resume=True)
    found = calls(fake)
    ids = {call[2] for call in found if call[0] == "init"}
    assert ids == {(tmp_path / "run/wandb/run_id").read_text()}
    assert [call[1:2] + call[3:] for call in found if call[0] == "init"] == [["online", "allow"]] * 2
    begun_again = [call[0] for call in found].index("init", 1)
    assert [call[1] for call in found[:begun_again] if call[0] == "log"] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert [call[1] for call in found[begun_again:] if call[0] == "log"] == [5, 6, 6, 7, 8]
    logged = [call[2] for call in found[:begun_again] if call[0] == "log"]
    assert "held_out_perplexity" in logged[3]
    assert {"loss", "bits_per_byte", "lr", "grad_norm", "tokens_per_second", "mfu", "peak_memory"} <= logged[0].keys()


@pytest.mark.parametrize(("raises", "status"), [(False, 0), (True, 1)])
def test_the_tracker_is_told_how_the_run_ended(raises, status, fake, dataset, tmp_path):
    def score(model):
        if raises:
            raise RuntimeError("a bug")
        return {"loss": 1.0}

    try:
        shown(tiny_config(wandb_project="p", steps=1), tmp_path / "run", dataset, evaluate=score)
    except RuntimeError:
        assert raises
    assert ["finish", status] in calls(fake)


def test_a_server_that_comes_back_gets_the_whole_run_at_the_end(tmp_path, monkeypatch):
    class Run:
        step, url, dir = 0, "https://example.org/run", "wandb/offline-run-1/files"

        def __init__(self) -> None:
            self.logged: list[int] = []

        def log(self, values: dict[str, float], step: int) -> None:
            self.logged.append(step)

        def finish(self, exit_code: int) -> None:
            self.logged.append(-exit_code)

    class Sender:
        answers = iter([(None, "down"), (online := Run(), "")])
        offline = Run()

        def start_online(self):
            return next(self.answers)

        def start_offline(self):
            return self.offline

    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": null}\n{"st')
    monkeypatch.setattr(wandb_follower, "RETRY_SECONDS", -1.0)
    monkeypatch.setattr(wandb_follower, "_trainer_status", lambda: 7)
    said: list[str] = []
    wandb_follower.follow(Sender(), wandb_follower.Follower(file), said.append)
    assert Sender.offline.logged == Sender.online.logged == [1, 2, -7]
    assert [line.startswith("warning") for line in said] == [True, False]


def test_wandb_switched_off_by_its_own_variable_is_not_even_started(fake, dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert shown(tiny_config(wandb_project="p", steps=1), tmp_path / "run", dataset)[0] == []
    assert not fake.exists()


@pytest.mark.parametrize(
    ("settings", "package"), [({"tensorboard": True}, "tensorboard"), ({"wandb_project": "p"}, "wandb")]
)
def test_a_tracker_that_is_not_installed_is_named_before_anything_is_written(
    settings, package, dataset, tmp_path, monkeypatch
):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingBackendError, match=rf"{package} is not installed: pip install 'swamla\[tracking\]'"):
        run(tiny_config(**settings), tmp_path / "run", dataset)
    assert not (tmp_path / "run").exists()


def test_tensorboard_has_every_number_of_the_metrics_once_also_after_a_crash(dataset, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "run"
    run(tiny_config(tensorboard=True, steps=4, schedule="constant"), folder, dataset, evaluate=held_out(dataset))
    crashed = TensorBoard(folder / "tensorboard", first_step=5)
    crashed.write(5, {"loss": 99.0})  # a step after the last checkpoint, lost with the crash
    crashed.close()
    longer = tiny_config(tensorboard=True, steps=6, schedule="constant")
    run(longer, folder, dataset, evaluate=held_out(dataset), resume=True)
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    expected: dict[str, list[tuple[int, float]]] = {}
    for record in read_metrics(folder / "metrics.jsonl"):
        for name, value in record.items():
            if name != "step":
                expected.setdefault(name, []).append((record["step"], pytest.approx(value, rel=1e-6)))
    assert {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]} == expected
    assert {"loss", "held_out_perplexity", "held_out_bits_per_byte", "mfu", "peak_memory"} <= expected.keys()


@pytest.mark.parametrize("place", ["__init__", "add_scalar", "flush", "close"])
def test_a_failing_tensorboard_costs_one_warning_and_no_bit_of_the_run(
    place, dataset, tmp_path, undisturbed, monkeypatch
):
    def fails(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(f"torch.utils.tensorboard.SummaryWriter.{place}", fails)
    lines, found = shown(tiny_config(tensorboard=True), tmp_path / "run", dataset)
    assert lines == ["warning: TensorBoard failed (OSError: disk full); training continues without it"]
    assert same(found, undisturbed[1])


def test_mfu_is_the_models_flops_over_the_named_peak(dataset, tmp_path):
    out = io.StringIO()
    config = tiny_config(steps=2, block_size=300)
    state = train(config, tmp_path / "run", dataset=dataset, console=Console(file=out, width=200), verbose=True)
    peak = peak_of(state.device, state.precision)
    assert f"mfu is relative to {peak.name}" in out.getvalue()
    assert "float32" in peak.name
    model, loader = state.model.config, dataset.rows(300, 0)
    for record in read_metrics(tmp_path / "run/metrics.jsonl"):
        documents = loader.batch(4 * (record["step"] - 1), 4).document_BT.tolist()
        lengths = [len(list(group)) for row in documents for _, group in groupby(row)]
        assert sum(lengths) == 4 * 300
        assert len(lengths) > 4  # some documents end within a row
        flops = sum(length * training_flops_per_token(model, length) for length in lengths)
        seconds = 4 * 300 / record["tokens_per_second"]
        assert record["mfu"] == pytest.approx(flops / seconds / peak.flops)
        assert 0 < record["mfu"] < 1
        assert record["peak_memory"] > 50e6  # a process with torch in it


@pytest.mark.parametrize(
    ("device_name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GH200 480GB", 989),
    ],
)
def test_the_peak_of_a_known_device_is_its_data_sheets_and_says_so(device_name, tflops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: device_name)
    peak = peak_of(torch.device("cuda"), "bf16")
    assert peak.flops == tflops * 1e12
    assert peak.name == f"{tflops} TFLOP/s, {device_name} bf16 dense"


@pytest.mark.gpu
def test_on_cuda_memory_is_what_tensors_took() -> None:
    device = torch.device("cuda")
    before = torch.cuda.memory_allocated(device)
    kept = torch.empty(1 << 26, dtype=torch.uint8, device=device)
    assert peak_memory(device) >= before + kept.numel()
    assert peak_of(device, "bf16").flops > 1e12
