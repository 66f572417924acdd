"""adapt --budget: the steps that fit in a time, on a machine whose speed changes, and a resume that keeps the plan."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import time

import pytest
import torch
from adapt_configs import upstep_config

import upstep_fast
from upstep_fast.cli.commands import main
from upstep_fast.config.training import parse_seconds
from upstep_fast.errors import ConfigError, Interrupted, UpstepError
from upstep_fast.methods.schedules import learning_rate
from upstep_fast.report.run_record import read_config
from upstep_fast.runtime import started
from upstep_fast.train import budget
from upstep_fast.train import loop as trainer
from upstep_fast.train.budget import After, Budget, Cost
from upstep_fast.train.state import Plan

GIVEN = {"model": "demo", "data": ("x",), "out": "x"}
SPEEDS = {  # seconds of a step, from its number and the measured second
    "as measured": lambda step: 1.0,
    "twice as slow": lambda step: 2.0,
    "twice as fast": lambda step: 0.5,
    "another process from the middle on": lambda step: 1.0 if step < 100 else 2.0,
    "another process ends": lambda step: 2.0 if step < 60 else 1.0,
    "half of the steps are skipped": lambda step: 1.0 if step % 2 else 0.4,
    "a slow first step": lambda step: 9.0 if step == 0 else 1.0,
}


@pytest.mark.parametrize("speed", SPEEDS)
def test_the_time_is_kept_within_a_tenth_and_the_schedule_ends(monkeypatch: pytest.MonkeyPatch, speed: str):
    now, seconds = [0.0], SPEEDS[speed]
    monkeypatch.setattr(budget, "clock", lambda: now[0])
    cost = Cost(1.0, 0.5, After(verdict=64, whitening=500, report=200, batch=32, views=2))
    planned = cost.steps(200)
    assert planned + cost.end(planned) == pytest.approx(200, abs=1.5)
    limit, plan, step, positions = Budget(200.0, cost, planned), Plan.of(planned, 0), 0, []
    while step < plan.end:
        positions.append(plan.at(step))
        now[0] += seconds(step)
        step += 1
        plan = limit.replan(plan, step, {"forward_s": 0.5 * seconds(step)})
    load = seconds(step)
    total = now[0] + cost.end(planned, load if speed != "half of the steps are skipped" else 0.7)
    assert 180 <= total <= 220
    assert positions[0] == 0 and all(a < b for a, b in itertools.pairwise(positions))
    assert positions[-1] <= planned and plan.at(step) == pytest.approx(planned, rel=0.02)
    run = upstep_config(**GIVEN, steps=planned).optimization
    assert learning_rate(run, positions[-1]) < 0.01 * run.lr  # of cosine's end


def test_a_steady_machine_keeps_the_plan_as_it_was(monkeypatch: pytest.MonkeyPatch):
    now = iter(range(1000))
    monkeypatch.setattr(budget, "clock", lambda: float(next(now)))
    cost = Cost(1.0, 0.5, After(0, 0, 0, 32, 2))
    first = plan = Plan.of(cost.steps(100), 0)
    limit = Budget(100.0, cost, plan.planned)
    for step in range(1, 90):
        plan = limit.replan(plan, step, {})
    assert plan is first and plan.at(50) == 50.0


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("10min", 600), ("1.5h", 5400), (" 2 min ", 120)], ids=lambda v: str(v)
)
def test_a_time_has_a_unit(text, seconds):
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "0s", "-5min", "nan s", "inf h", "infh", "ten min", "5 d"])
def test_another_time_is_refused(text):
    with pytest.raises(ConfigError, match=r"^budget: got .*, must be a time with its unit, above 0: 90s, 10min or 2h$"):
        upstep_config(**GIVEN, budget=text)


@pytest.mark.parametrize("text", ["1e308s", "8761h", "1e9h"])
def test_more_than_a_year_is_refused(text):
    with pytest.raises(ConfigError, match=r"^budget: got .*, must be at most a year, 8760h$"):
        upstep_config(**GIVEN, budget=text)


@pytest.mark.parametrize(
    "other", [{"steps": 5}, {"epochs": 2.0}, {"judge_every": 5}, {"verify_resume": 2}], ids=lambda o: next(iter(o))
)
def test_what_a_budget_excludes_is_named(other):
    with pytest.raises(ConfigError, match=f"budget and {next(iter(other))}|{next(iter(other))} and budget"):
        upstep_config(**GIVEN, budget="1min", **other)


class Machine:
    """A clock that moves with the steps: a step of the run takes `seconds`, a measured one a second an image."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float = 8.0):
        self.now, real_step = 0.0, trainer.step

        def one_step(config, compute):
            times: list[float] = []

            def take_step() -> None:
                self.now += config.optimization.batch_size
                times.extend((config.optimization.batch_size / 2,) * 2)

            return take_step, times

        def step(*args, **options):
            self.now += seconds
            row = real_step(*args, **options)
            return row

        monkeypatch.setattr(budget, "one_step", one_step)
        monkeypatch.setattr(budget, "clock", lambda: self.now)
        monkeypatch.setattr(started, "began", lambda: 0.0)
        monkeypatch.setattr(trainer, "step", step)
        monkeypatch.setattr(budget.Budget, "_left", lambda b: b.ends - b.times[-1] - b.cost.end(b.planned))


@pytest.fixture
def options(options):
    return options | {"steps": None, "budget": "250s", "verdict": "off", "whitening": "off", "report_images": False}


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_is_planned_and_its_resume_keeps_the_plan(options, monkeypatch, tmp_path):
    batch = options["batch_size"]
    machine = Machine(monkeypatch, seconds=2.0 * batch)
    whole = upstep_fast.adapt(**options | {"out": tmp_path / "whole", "budget": f"{60 * batch}s"})
    planned = read_config(tmp_path / "whole")["steps"]
    assert "budget" not in read_config(tmp_path / "whole") and planned > 1.8 * whole.steps
    assert 54 * batch <= machine.now <= 61 * batch
    learned = [row["lr"] for row in rows(tmp_path / "whole")]
    assert learned[-1] < 0.05 * max(learned)

    machine.now = 0.0
    real, count = trainer.Budget.replan, [0]

    def stopping(self, plan, step, row):
        count[0] += 1
        if step == 15:
            raise KeyboardInterrupt
        return real(self, plan, step, row)

    monkeypatch.setattr(trainer.Budget, "replan", stopping)
    stopped = options | {"out": tmp_path / "stopped", "budget": f"{60 * batch}s", "checkpoint_every": 10}
    with pytest.raises((KeyboardInterrupt, Interrupted)):
        upstep_fast.adapt(**stopped)
    plan = json.loads(next((tmp_path / "stopped" / "checkpoints").glob("*10/manifest.json")).read_text())["state"][
        "plan"
    ]
    machine.now = 1e9  # the plan is kept, whatever the time
    resumed = upstep_fast.adapt(**stopped | {"resume": True})
    assert resumed.steps == plan[3]
    kept = Plan(*plan)
    run = upstep_config(**GIVEN, steps=plan[0], lr=options.get("lr", 1e-3)).optimization
    for row in rows(tmp_path / "stopped")[10:]:
        assert row["lr"] == pytest.approx(learning_rate(run, kept.at(row["step"])), rel=1e-6)
    again = [rows(tmp_path / name)[:10] for name in ("whole", "stopped")]
    assert [r["loss"] for r in again[0]] == [r["loss"] for r in again[1]]


def test_few_steps_train_the_last_blocks_and_too_few_are_refused(options, monkeypatch, tmp_path):
    Machine(monkeypatch)
    batch = options["batch_size"]
    upstep_fast.adapt(**options | {"out": tmp_path / "short", "budget": f"{25 * batch}s"})
    assert read_config(tmp_path / "short")["lora_blocks"] == 1  # of two
    with pytest.raises(ConfigError, match=r"^budget: 12 s leave time for \d steps? of .* give at least"):
        upstep_fast.adapt(**options | {"out": tmp_path / "none", "budget": "12s"})
    assert not (tmp_path / "none").exists()


def test_a_reduced_batch_is_still_said_and_another_number_of_blocks_is_refused(options, monkeypatch, tmp_path, caplog):
    machine = Machine(monkeypatch, seconds=24.0)
    run = options | {"out": tmp_path / "run", "batch_size": 64, "budget": "600s", "lora_blocks": 1}
    with caplog.at_level("INFO", "upstep_fast"):
        upstep_fast.adapt(**run)
    assert any("batch_size" in r.getMessage() and "64" in r.getMessage() for r in caplog.records)
    assert "INFO budget: 10 min: " in (tmp_path / "run" / "train.log").read_text()
    machine.now = 0.0
    with pytest.raises(UpstepError, match="lora_blocks"):
        upstep_fast.adapt(**run | {"resume": True, "lora_blocks": 2})


def test_what_does_not_fit_into_memory_is_one_line_and_a_used_folder_is_refused_before(options, monkeypatch, tmp_path):
    def no_memory(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(budget, "one_step", lambda *_: (no_memory, []))
    with pytest.raises(ConfigError, match=r"^budget: no memory for a step of \d+ images; lower --batch-size$"):
        upstep_fast.adapt(**options | {"out": tmp_path / "none"})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"^out: "):
        upstep_fast.adapt(**options | {"out": tmp_path / "other"})


def test_a_preset_and_the_file_of_a_run_leave_their_steps_to_the_budget(options, monkeypatch, tmp_path):
    machine = Machine(monkeypatch)
    args = ["--model", str(options["model"]), "--data", *map(str, [options["data"]]), "--device", "cpu", "--quiet"]
    batch = ["--batch-size", str(options["batch_size"]), "--lora-blocks", "1"]
    off = ["--verdict", "off", "--whitening", "off", "--no-report-images"]
    out = tmp_path / "run"
    command = ["adapt", *args, "--out", str(out), "--budget", "130s", "--preset", "fast", *batch, *off]
    with pytest.raises(SystemExit) as end:
        main(command)
    assert end.value.code == 0 and 10 <= read_config(out)["steps"] < 80
    machine.now = 0.0
    with pytest.raises(SystemExit) as end:
        main(["adapt", "--config", str(out / "config.toml"), "--budget", "130s", "--overwrite", "--quiet"])
    assert end.value.code == 0


def _spin(stop) -> None:
    while not stop.is_set():
        sum(range(10000))


@pytest.mark.long
@pytest.mark.parametrize("busy", [0, 2])
def test_a_real_run_ends_in_time_beside_other_processes(shared, tmp_path, busy):
    stop = multiprocessing.get_context("spawn").Event()
    others = [multiprocessing.get_context("spawn").Process(target=_spin, args=(stop,)) for _ in range(busy)]
    for each in others:
        each.start()
    torch.set_num_threads(1)
    try:
        began = time.monotonic()
        upstep_fast.adapt("demo", shared / "sign_digits_64.tar", tmp_path / "out", budget="100s", preset="fast")
        assert 90 <= time.monotonic() - began <= 110
    finally:
        stop.set()
        for each in others:
            each.join()
