"""The table of gains: every arm is a legal run, differences are paired by seed, a stopped experiment goes on."""

import json
import shlex

import pytest

from benchmarks import gains
from benchmarks.gains import EXPERIMENTS, Experiment, interval, jobs_of, merged, report
from swamla.cli.flags import parse
from swamla.cli.overrides import flags
from swamla.cli.run_config import resolve
from swamla.cli.train import Arguments as Train

EXPERIMENT = Experiment(steps=7, widths=(64, 128), seeds=2, arms={"plain": "", "other": "--lr 1"})


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_arm_of_every_experiment_is_a_run_that_its_flags_change(name: str) -> None:
    experiment, found = EXPERIMENTS[name], {}
    for job in jobs_of(experiment):
        if job.seed == 0:
            _, given = parse(Train, [experiment.recipe, *shlex.split(job.flags)], command="swamla train", more=flags())
            found[job.key] = resolve(experiment.recipe, given).config
    assert len(found) == len(experiment.arms) * len(experiment.widths)
    assert len(set(map(str, found.values()))) == len(found)
    assert {config.model.width for config in found.values()} == set(experiment.widths)
    assert {config.train.steps for (arm, *_), config in found.items() if "--steps" not in experiment.arms[arm]} == {200}


def test_an_arms_own_flag_wins_over_the_bases_and_a_dash_takes_one_away() -> None:
    assert merged("--a 1 --b 2", "--a 3", "--b -") == "--a 3"


def test_an_interval_is_students_of_the_differences() -> None:
    # 1, 2, 3: mean 2, deviation 1; Student's .975 quantile at two degrees of freedom is 4.30265 (printed tables)
    assert interval([1.0, 2.0, 3.0]) == f"+2.0000 ± {4.30265 / 3**0.5:.4f}"
    assert interval([0.5]) == "+0.5000"
    assert interval([]) == ""


def test_the_table_has_the_first_arms_mean_and_differences_from_it_paired_by_seed() -> None:
    bits = {("plain", 64, 0): 2.0, ("plain", 64, 1): 4.0, ("other", 64, 0): 1.0, ("other", 64, 1): 3.0}
    rows = [{"arm": a, "width": w, "seed": s, "bits_per_byte": value} for (a, w, s), value in bits.items()]
    rows.append({"arm": "other", "width": 128, "seed": 0, "error": "out of memory"})
    lines = report(rows, EXPERIMENT).splitlines()
    assert lines[2:] == [
        "| plain | 3.0000 |  |".replace("  ", " "),
        "| other | -1.0000 ± 0.0000 |  |".replace("  ", " "),
    ]


def test_what_was_measured_is_not_run_again_and_a_failure_is_a_row(tmp_path, monkeypatch, capsys) -> None:
    ran = []

    def pretend(job, recipe):
        ran.append(job.key)
        row = {"arm": job.arm, "width": job.width, "seed": job.seed}
        return row | ({"error": "full"} if job.width == 128 else {"bits_per_byte": 1.0})

    monkeypatch.setattr(gains, "run", pretend)
    monkeypatch.setitem(gains.EXPERIMENTS, "gains", EXPERIMENT)
    out = tmp_path / "rows.jsonl"
    out.write_text(json.dumps({"arm": "plain", "width": 64, "seed": 0, "bits_per_byte": 3.0}) + "\n", encoding="utf-8")
    assert gains.main(["gains", "--output", str(out)]) == 0
    assert len(ran) == 7
    assert ("plain", 64, 0) not in ran
    assert gains.main(["gains", "--output", str(out)]) == 0
    assert len(ran) == 7
    assert "| plain | 2.0000 |" in capsys.readouterr().out


def test_a_run_is_trained_and_read_from_its_own_metrics(tmp_path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"The {n} of {n * n} is {n % 7}." for n in range(400)), encoding="utf-8")
    ends = "--steps 2 --max_minutes none --eval_seconds none --eval_tokens none --threads 1"
    small = "--width 16 --n_heads 1 --tokenizer byte --batch_size 2 --block_size 16"
    job = gains.Job(arm="plain", width=16, seed=0, flags=f"{small} {ends} --ngram_buckets none --data {text}")
    row = gains.run(job, "quickstart")
    assert row["tokens"] == 64
    assert 5 < row["bits_per_byte"] < 12
    failed = gains.run(gains.Job(arm="plain", width=16, seed=0, flags=f"{job.flags} --lr 0"), "quickstart")
    assert "lr" in failed["error"]
