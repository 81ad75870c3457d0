"""Which path of a CPU computes a run: raced once a machine, kept, stored with the run, and taken again on resume."""

import io
import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from swamla import distributed
from swamla.checkpoint import latest_checkpoint, load
from swamla.errors import Interrupted
from swamla.model.mixers.mha import MHAConfig
from swamla.ops.attention.trial import AttentionTrial
from swamla.train import precision, racing, train
from swamla.train.backends import fastest_paths, resolve_backends, usual_length
from swamla.train.precision import ProductsTrial, measured_precision, resolve_precision
from swamla.train.racing import winner
from swamla.train.run_folder import describe_machine

from .helpers import losses, model_of, run, tiny_config, tiny_dataset, weights
from .ranks import on_ranks
from .test_resume import stop_after

CPU = torch.device("cpu")
MODEL = model_of("mha", "swa", "gdn")


@pytest.fixture
def races(monkeypatch):
    """Every race from now on, as (what, length, dtype); "sdpa" takes `races.sdpa` times as long as "tiles".

    And fp32 `races.fp32` times as long as bf16, on a CPU that has both.
    """

    class Races(list):
        sdpa, fp32 = 0.5, 1.5
        rounds = 5

        def measure(self, trial, length, dtype, allowance):
            self.append((str(trial), length, dtype))
            takes = {"tiles": 1.0, "sdpa": self.sdpa, "bf16": 1.0, "fp32": self.fp32}
            return length, {path: [takes[path]] * self.rounds for path in trial.paths(dtype)}

    found = Races()
    monkeypatch.delenv("SWAMLA_MEASURE")
    monkeypatch.setattr(racing, "measure", found.measure)
    monkeypatch.setattr(precision, "has_bf16", lambda device: True)
    return found


@pytest.mark.parametrize(
    ("default", "challenger", "expected"),
    [
        ([10, 10, 10, 10], [5, 5, 5, 5], "sdpa"),
        ([10, 10, 10, 10], [9.6, 9.6, 9.6, 9.6], "tiles"),  # not clearly
        ([10, 10, 10, 10], [12, 12, 12, 12], "tiles"),
        ([10, 20, 30, 40], [8, 16, 24, 32], "sdpa"),  # a machine that slows down slows both
        ([10, 10, 10, 10], [5, 5, 11, 12], "tiles"),  # the rounds disagree
        ([10, 10, 10, 10], [5, 5, 5, 90], "sdpa"),  # one was disturbed
        ([10, 10], [5, 5], "tiles"),  # too few to tell
    ],
)
def test_a_challenger_has_to_win_clearly(default, challenger, expected):
    assert winner({"tiles": default, "sdpa": challenger}) == expected


def test_paths_take_turns_as_often_as_the_time_allows(monkeypatch):
    now, order = [0.0], []
    takes = {"tiles": 0.25, "sdpa": 0.125}

    def step(self, path, length, dtype, part=1):
        def run():
            order.append(path)
            now[0] += takes[path]

        return run

    monkeypatch.setattr(racing, "_clock", lambda: now[0])
    monkeypatch.setattr(AttentionTrial, "step", step)
    monkeypatch.setattr(AttentionTrial, "scores", lambda self, length, part: 1)
    trial = AttentionTrial(heads=1, key_heads=1, key=8, value=8)
    found = racing.measure(trial, 64, torch.bfloat16, allowance=2.2)
    # 5 · 0.375 s and 0.25 s fit into 2.2 s: a short round that warms up, a trial of the default, one round not counted.
    assert found == (64, {"tiles": [0.25] * 3, "sdpa": [0.125] * 3})
    assert order == ["tiles", "sdpa", "tiles", *["tiles", "sdpa"] * 4]
    assert now[0] <= 2.2


@pytest.mark.parametrize("speed", [1, 4, 10, 100, 1000])
def test_a_slow_machine_races_less_often_enough_within_the_time(monkeypatch, speed):
    """First fewer rows and heads, then shorter documents."""
    now, sizes = [0.0], []
    trial = AttentionTrial(heads=8, key_heads=8, key=8, value=8)

    def step(self, path, length, dtype, part=1):
        def run():
            sizes.append((length, part))
            now[0] += {"tiles": 2.0, "sdpa": 1.0}[path] * trial.scores(length, part) / 2**21 / speed

        return run

    monkeypatch.setattr(racing, "_clock", lambda: now[0])
    monkeypatch.setattr(AttentionTrial, "step", step)
    length, found = racing.measure(trial, 1024, torch.bfloat16, allowance=6.0)
    assert (length, sizes[-1]) == {
        1: (256, (256, 16)),
        4: (1024, (1024, 4)),
        10: (1024, (1024, 1)),
        100: (1024, (1024, 1)),
        1000: (1024, (1024, 1)),
    }[speed]
    assert len(found["tiles"]) >= racing.ENOUGH
    assert winner(found) == "sdpa"
    assert now[0] <= 6.0


@pytest.mark.parametrize("part", [1, 2, 8, 64])
@pytest.mark.parametrize("length", [64, 1024, 8192])
def test_a_part_of_a_trial_has_as_many_scores_as_it_says_and_two_heads_at_least(length, part, monkeypatch):
    trial = AttentionTrial(heads=8, key_heads=4, key=8, value=8, window=100)
    seen = []
    monkeypatch.setattr("swamla.ops.attention.trial.windowed_attention", lambda q, k, v, seq, **_: seen.append(q) or q)
    with pytest.raises(RuntimeError):  # keys have no gradient
        trial.step("sdpa", length, torch.float32, part)()
    batch, time, heads, _ = seen[0].shape
    assert time == length
    assert batch * heads * length * min(100, length) == trial.scores(length, part)
    assert heads >= 2


@pytest.mark.parametrize("window", [None, 100])
def test_a_trial_with_a_learned_sink_computes_its_gradient_too_and_is_a_choice_of_its_own(window):
    trial = AttentionTrial(heads=4, key_heads=2, key=8, value=8, window=window, sink_logit=True)
    assert str(trial) != str(replace(trial, sink_logit=False))
    by_path = [trial.step(path, 150, torch.float32)() for path in trial.paths(torch.float32)]
    assert [gradient.shape for gradient in by_path[0]][-1] == (4,)
    for mine, theirs in zip(*by_path, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["mha", "swa", "mla", "latent"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_default_is_what_auto_computes_unmeasured(name, dtype):
    """The first of a trial's paths, to the bit."""
    mixer = model_of(name).blocks[name].mixer
    trial = mixer.trial(16)
    by_auto, by_default = (trial.step(path, 96, dtype)() for path in ("torch", trial.paths(dtype)[0]))
    assert len(set(trial.paths(dtype))) == 2
    assert all(torch.equal(a, b) for a, b in zip(by_auto, by_default, strict=True))


def test_the_faster_path_is_chosen_kept_and_not_raced_again(races):
    chosen, told = fastest_paths(MODEL, CPU, "bf16", length=900)
    assert chosen == {"mha": "sdpa", "swa": "sdpa"}
    assert [length for _, length, _ in races] == [1024, 1024]
    assert "sdpa, 2.00 times as fast as tiles" in str(told[0])
    assert fastest_paths(MODEL, CPU, "bf16", length=1100) == (chosen, told)  # the same class of shapes
    assert len(races) == 2
    fastest_paths(MODEL, CPU, "fp32", length=1100)
    fastest_paths(MODEL, CPU, "bf16", length=4000)
    assert len(races) == 6
    assert races[-1][1] == 4096
    races.sdpa = 3.0
    assert fastest_paths(MODEL, CPU, "bf16", length=900)[0] == chosen
    racing.forget_choices()
    assert fastest_paths(MODEL, CPU, "bf16", length=900)[0] == {"mha": "tiles", "swa": "tiles"}


def test_another_machine_races_for_itself(races, monkeypatch):
    fastest_paths(MODEL, CPU, "bf16", length=64)
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA")  # this machine may be played by one already
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41" if limit == "AVX2" else "AVX2")
    fastest_paths(MODEL, CPU, "bf16", length=64)
    assert len(races) == 4
    monkeypatch.setattr(torch, "__version__", "9.9")
    fastest_paths(MODEL, CPU, "bf16", length=64)
    assert len(races) == 6


def test_what_a_config_names_and_what_cuda_computes_is_not_raced(races):
    named = replace(MODEL.blocks["mha"], mixer=MHAConfig(n_heads=2, backend="tiles"))
    model = replace(MODEL, blocks=MODEL.blocks | {"mha": named})
    assert fastest_paths(model, CPU, "bf16", length=64)[0] == {"swa": "sdpa"}
    assert fastest_paths(model, torch.device("cuda"), "bf16", length=64) == ({}, [])
    assert len(races) == 1


def test_a_race_that_decided_nothing_is_not_kept(races):
    races.rounds = racing.ENOUGH - 1
    chosen, told = fastest_paths(MODEL, CPU, "bf16", length=900)
    assert chosen == {"mha": "tiles", "swa": "tiles"}
    assert "too busy to tell" in str(told[0])
    races.rounds = 5
    assert fastest_paths(MODEL, CPU, "bf16", length=900)[0] == {"mha": "sdpa", "swa": "sdpa"}


def test_measuring_can_be_left_out(races, monkeypatch):
    monkeypatch.setenv("SWAMLA_MEASURE", "0")
    assert fastest_paths(MODEL, CPU, "bf16", length=64) == ({}, [])
    assert races == []


SOUND = {"what": "a", "length": 64, "raced": 64, "dtype": "float32", "chosen": "sdpa", "rounds": 5}
TIMES = {"sdpa": 1.0, "tiles": 2.0}
DAMAGED = [
    {"what": 1},
    None,
    *({**SOUND, "seconds": TIMES, name: wrong} for name, wrong in (("what", []), ("dtype", ["x"]), ("rounds", "5"))),
    *({**SOUND, "seconds": {**TIMES, "sdpa": wrong}} for wrong in (10**400, "1.0", -1.0, None)),
    {**SOUND, "seconds": []},
]


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"choices": 3}', json.dumps({"choices": DAMAGED}), "\0"])
def test_a_damaged_record_is_raced_again_and_mended(races, damage):
    fastest_paths(MODEL, CPU, "bf16", length=64)
    racing._file().write_text(damage)
    assert fastest_paths(MODEL, CPU, "bf16", length=64)[0] == {"mha": "sdpa", "swa": "sdpa"}
    assert len(races) == 4
    fastest_paths(MODEL, CPU, "bf16", length=64)
    assert len(races) == 4


def test_a_record_that_cannot_be_written_is_told_and_stops_nothing(races, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SWAMLA_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="cannot store which paths are fast here"):
        assert fastest_paths(MODEL, CPU, "bf16", length=64)[0] == {"mha": "sdpa", "swa": "sdpa"}


def test_a_real_race_leaves_the_random_generators_alone(monkeypatch):
    monkeypatch.delenv("SWAMLA_MEASURE")
    monkeypatch.setattr(racing, "SECONDS", 0.1)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    chosen, told = fastest_paths(MODEL, CPU, "fp32", length=64)
    assert torch.equal(torch.rand(3), expected)
    assert chosen.keys() == {"mha", "swa"}
    assert all(min(choice.seconds.values()) > 0 for choice in told)


def test_auto_is_the_precision_that_trains_faster_raced_once(races):
    assert (resolve_precision("auto", CPU), len(races)) == ("bf16", 1)
    races.fp32 = 0.5
    assert (resolve_precision("auto", CPU), len(races)) == ("bf16", 1)
    racing.forget_choices()
    assert (resolve_precision("auto", CPU), len(races)) == ("fp32", 2)
    assert "fp32, 2.00 times as fast as bf16" in str(measured_precision(CPU))
    assert [resolve_precision(asked, CPU) for asked in ("bf16", "fp32", "fp8")] == ["bf16", "fp32", "fp8"]
    assert len(races) == 2


def test_what_was_raced_before_can_be_asked_for_alone_and_only_a_verdict_counts(races):
    assert (resolve_precision("auto", CPU, race=False), races) == ("bf16", [])
    races.fp32 = 0.5
    assert resolve_precision("auto", CPU) == resolve_precision("auto", CPU, race=False) == "fp32"
    file = racing._file()
    kept = json.loads(file.read_text())
    for damage in ({"rounds": racing.ENOUGH - 1}, {"chosen": "x", "seconds": {"x": 1.0}}):
        file.write_text(json.dumps({**kept, "choices": [{**kept["choices"][0], **damage}]}))
        assert measured_precision(CPU, race=False) is None
    assert (resolve_precision("auto", CPU), len(races)) == ("fp32", 2)


@pytest.mark.parametrize("without", ["SWAMLA_MEASURE", "bf16 instructions", "a CPU"])
def test_precision_is_raced_only_where_there_is_a_choice(races, monkeypatch, without):
    if without == "SWAMLA_MEASURE":
        monkeypatch.setenv("SWAMLA_MEASURE", "0")
    monkeypatch.setattr(precision, "has_bf16", lambda device: without != "bf16 instructions")
    device = torch.device("cuda") if without == "a CPU" else CPU
    assert measured_precision(device) is None
    assert resolve_precision("auto", device) == ("fp32" if without == "bf16 instructions" else "bf16")
    assert races == []


@pytest.mark.parametrize("path", ["bf16", "fp32"])
def test_products_are_raced_in_what_they_say(path):
    """The gradients of a feed-forward layer, by another route; in bf16 not those of fp32."""
    trial = ProductsTrial(width=16)
    found = trial.step(path, 256, torch.float32, part=4)()
    dtype = torch.bfloat16 if path == "bf16" else torch.float32
    generator = torch.Generator().manual_seed(0)
    shapes = ((trial.scores(256, 4), 16), (64, 16), (16, 64))
    x, up, down = (torch.randn(s, generator=generator).requires_grad_() for s in shapes)
    upstream = torch.randn(shapes[0], generator=generator).to(dtype)
    hidden = x.to(dtype) @ up.to(dtype).T
    (hidden * hidden.sigmoid() @ down.to(dtype).T).backward(upstream)
    for mine, its in zip(found, (x.grad, up.grad, down.grad), strict=True):
        assert torch.linalg.norm(mine - its) <= (1e-5 if path == "fp32" else 1e-2) * torch.linalg.norm(its)
    assert (trial.paths(torch.float32)[0], len(x)) == ("bf16", 64)
    exact = trial.step("fp32", 256, torch.float32, part=4)()
    assert all(torch.equal(mine, its) == (path == "fp32") for mine, its in zip(found[1:], exact[1:], strict=True))


def test_the_first_race_of_a_process_imports_nothing_that_takes_seconds():
    """sympy, which `torch.autograd.grad` imports to compare shapes: a race would be over before it began."""
    code = (
        "import sys, torch\n"
        "from swamla.ops.attention.trial import AttentionTrial\n"
        "from swamla.train.precision import ProductsTrial\n"
        "before = set(sys.modules)\n"
        "AttentionTrial(heads=2, key_heads=2, key=8, value=8).step('tiles', 64, torch.float32)()\n"
        "AttentionTrial(heads=2, key_heads=2, key=8, value=8, window=16).step('sdpa', 64, torch.float32)()\n"
        "ProductsTrial(width=16).step('bf16', 64, torch.float32)()\n"
        "print(sorted({name.partition('.')[0] for name in set(sys.modules) - before}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "sympy" not in done.stdout


def test_a_resumed_run_keeps_its_precision_whatever_is_fast_now(races, tmp_path, dataset, monkeypatch):
    config = tiny_config(MODEL, steps=4, precision="auto")
    races.fp32 = 0.5
    whole = run(config, tmp_path / "whole", dataset)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Interrupted):
            run(config, tmp_path / "cut", dataset)
    races.fp32 = 3.0
    monkeypatch.setenv("SWAMLA_CACHE", str(tmp_path / "another machine"))
    resumed = run(config, tmp_path / "cut", dataset, resume=True)
    assert resumed.precision == whole.precision == "fp32"
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(weights(resumed).values(), weights(whole).values(), strict=True))
    assert run(config, tmp_path / "elsewhere", dataset).precision == "bf16"


def test_the_length_of_documents_is_that_which_a_token_meets(dataset):
    from swamla.ops.layout import Layout

    documents = dataset.rows(32, 0).batch(0, 32).document_BT
    seen = [length for count, length in Layout.from_documents(documents).runs for _ in range(count * length)]
    assert usual_length(dataset, 32) == round(sum(seen) / len(seen))


def test_a_run_tells_stores_and_computes_by_what_was_chosen(races, tmp_path, dataset):
    out = io.StringIO()
    config, console = tiny_config(MODEL, steps=1), Console(file=out, width=300)
    state = train(config, tmp_path / "run", dataset=dataset, console=console, verbose=True)
    assert state.paths == {"mha": "sdpa", "swa": "sdpa"}
    assert "attention: sdpa, delta rule: torch\n" in out.getvalue()
    assert "attention window 8 + 2, 2 heads, width 8" in out.getvalue()
    assert [block.mixer.config.backend for block in state.model.blocks] == ["sdpa", "sdpa", "auto"]
    saved = latest_checkpoint(tmp_path / "run" / "checkpoints").state
    assert saved["paths"] == state.paths
    assert saved["machine"] == describe_machine(CPU)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert {block["mixer"]["backend"] for block in config["model"]["blocks"].values()} == {"auto"}
    model, _ = load(tmp_path / "run")
    assert [block.mixer.config.backend for block in model.blocks] == ["sdpa", "sdpa", "auto"]


def test_a_resumed_run_takes_its_own_paths_whatever_is_fast_now(races, tmp_path, dataset, monkeypatch):
    config = tiny_config(MODEL, steps=4)
    whole = run(config, tmp_path / "whole", dataset)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Interrupted):
            run(config, tmp_path / "cut", dataset)
    races.sdpa = 3.0
    monkeypatch.setenv("SWAMLA_CACHE", str(tmp_path / "another machine"))
    raced = len(races)
    resumed = run(config, tmp_path / "cut", dataset, resume=True)
    assert len(races) == raced
    assert resumed.paths == whole.paths == {"mha": "sdpa", "swa": "sdpa"}
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(weights(resumed).values(), weights(whole).values(), strict=True))


def test_a_checkpoint_of_before_paths_were_stored_goes_on_as_it_was(races, tmp_path, dataset, monkeypatch):
    from swamla.train.state import TrainState

    plain = TrainState.plain
    monkeypatch.setenv("SWAMLA_MEASURE", "0")
    monkeypatch.setattr(
        TrainState, "plain", lambda self: {k: v for k, v in plain(self).items() if k not in ("paths", "machine")}
    )
    run(tiny_config(MODEL, steps=2), tmp_path / "run", dataset)
    monkeypatch.delenv("SWAMLA_MEASURE")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed = run(tiny_config(MODEL, steps=3), tmp_path / "run", dataset, resume=True)
    assert (races, resumed.paths) == ([], {})
    assert resolve_backends(resumed.model.config, CPU, "fp32")["attention"] == "torch"


def race_and_train(folder):
    """On each rank: every rank's own races would have another winner."""
    os.environ.pop("SWAMLA_MEASURE", None)
    os.environ["SWAMLA_CACHE"] = str(folder / f"cache of {distributed.rank()}")
    main = distributed.rank() == 0

    def measure(trial, length, dtype, allowance):
        assert main, "only the main rank races"
        return length, {path: [0.5 if path == "sdpa" else 1.0] * 5 for path in trial.paths(dtype)}

    racing.measure = measure
    state = run(tiny_config(MODEL, steps=1), folder / "run", tiny_dataset(folder))
    assert state.paths == {"mha": "sdpa", "swa": "sdpa"}
    assert [block.mixer.config.backend for block in state.model.blocks] == ["sdpa", "sdpa", "auto"]


def test_the_main_rank_races_and_all_compute_by_what_it_found(tmp_path):
    tiny_dataset(tmp_path)
    on_ranks(2, race_and_train, tmp_path)


ELSEWHERE = {
    "processor": "Another Chip (family 1 model 2)",
    "instructions": "AVX2 ONEDNN_MAX_CPU_ISA=AVX2",
    "threads": 77,
    "torch": "1.0",
    "device": "Another Card",
    "processes": 5,
}


def test_what_may_differ_is_all_that_is_recorded():
    assert ELSEWHERE.keys() == describe_machine(CPU).keys()


@pytest.mark.parametrize("part", ELSEWHERE)
def test_going_on_on_another_machine_is_told_in_one_line(tmp_path, dataset, monkeypatch, part):
    here = describe_machine(CPU)
    monkeypatch.setattr("swamla.train.run_folder.describe_machine", lambda device: {**here, part: ELSEWHERE[part]})
    run(tiny_config(steps=1), tmp_path / "run", dataset)
    monkeypatch.undo()
    with pytest.warns(UserWarning, match="may differ in its last bits") as told:
        run(tiny_config(steps=2), tmp_path / "run", dataset, resume=True)
    (line,) = [str(warning.message) for warning in told]
    assert line.startswith(f"resumed with {part} {here[part]}, before {ELSEWHERE[part]}: ")


def test_going_on_on_the_same_machine_is_not_told(tmp_path, dataset):
    run(tiny_config(steps=1), tmp_path / "run", dataset)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(tiny_config(steps=2), tmp_path / "run", dataset, resume=True)
