"""Faults of the process and the disk: after each the newest checkpoint is intact and the run resumes exactly."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapt_configs import upstep_config
from tally import tally

import upstep_fast
from upstep_fast.errors import ConfigError, Interrupted, RunFailedError
from upstep_fast.methods.upstep.upstep import UpStep
from upstep_fast.runtime import checkpoint
from upstep_fast.runtime import run_folder as output
from upstep_fast.train import loop as trainer
from upstep_fast.train import resume

RUNNER = Path(__file__).with_name("kill_runner.py")


@pytest.fixture
def options(options):
    return options | dict(
        data=str(options["data"]), out=str(options["out"]), steps=10, checkpoint_every=3, strength=0.5
    )


def one_line(error):
    return "\n" not in str(error.value) and len(str(error.value)) < 500


def on_each_step(monkeypatch, action):
    """Calls action(number of the step, from 0) near the end of every step."""
    real, count = UpStep.update_running_stats, iter(range(10**6))

    def remember(self, embedded):
        action(next(count))
        real(self, embedded)

    monkeypatch.setattr(UpStep, "update_running_stats", remember)


def kill(options, tmp_path, *, random, points, seed=0):
    """Results of tests/train/kill_runner.py, by kill."""
    job = tmp_path / "job.json"
    job.write_text(json.dumps({"options": options, "seed": seed, "random": random, "points": list(points)}))
    done = subprocess.run(
        [sys.executable, RUNNER, job],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-8000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_kills(rows, every):
    for row in rows:
        assert row["killed"] or row["ended"] == 0, row
        assert row["resumed"] == 0 and row["same"] and not row["left_over"], row
        # at half strength, alpha is half the rank of the fused q, k and v (3 r): never is a stronger adapter found
        assert set(row["alphas"]) <= {3} and row["told"] in (2, False), row
        lost = row["steps_done"] - row["checkpoint"]
        # one interval, and the steps made during the write of the next checkpoint: at most another, then it is awaited
        assert 0 <= lost <= 2 * every, row
    return [row["steps_done"] - row["checkpoint"] for row in rows if row["killed"]]


def report_kills(record_property, name, lost):
    record_property(name, len(lost))
    tally("kill points", "a run", len(lost))
    record_property("lost_steps_max", max(lost))
    record_property("lost_steps_sum", sum(lost))


# each save makes about ten of the calls counted; these lie in the first, the one that first prunes, and after the last
POINTS = (0, 4, 6, 7, 8, 22, 24, 28)


@pytest.mark.timeout(900)
def test_ten_kills_at_random_and_some_in_the_middle_of_a_save(options, tmp_path, record_property):
    rows = kill(options, tmp_path, random=10, points=POINTS)
    lost = check_kills(rows, options["checkpoint_every"])
    assert sum(row["killed"] for row in rows) >= 15
    assert any(row["half_written"] for row in rows), "no kill fell into a save: the points are stale"
    report_kills(record_property, "kills", lost)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(10))  # a time limit then costs one part, not all
def test_two_hundred_kills_at_random(options, tmp_path, record_property, part):
    rows = kill(options, tmp_path, random=22, points=(), seed=1 + part)
    lost = check_kills(rows, options["checkpoint_every"])
    assert len(lost) >= 20
    report_kills(record_property, "kills", lost)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_kill_at_every_point_of_every_save(options, tmp_path, record_property):
    rows = kill(options, tmp_path, random=0, points=range(80))
    assert not rows[-1]["killed"], "there are more points than were tried"
    report_kills(record_property, "kills", check_kills(rows, options["checkpoint_every"]))


def fail(monkeypatch, name, number, times=1):
    """Lets os.NAME fail with this errno from its fifth call on, so often."""
    real, calls = getattr(os, name), iter(range(10**6))

    def failing(*args, **kwargs):
        if 5 <= next(calls) < 5 + times:
            raise OSError(number, os.strerror(number))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, name, failing)


@pytest.mark.parametrize("name", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize("times", [1, 10**6])
def test_a_disk_that_refuses_a_save(options, tmp_path, monkeypatch, name, number, times, record_property):
    upstep_fast.adapt(**options | {"out": str(tmp_path / "whole")})
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        fail(patch, name, number, times)
        with pytest.raises(RunFailedError, match=rf"{os.strerror(number)}.*--resume") as error:
            upstep_fast.adapt(**options)
    assert one_line(error) and error.value.exit_code == 1
    assert not [path.name for path in out.rglob("*") if ".tmp-" in path.name or path.name == "run.lock"]
    checkpoint.newest(out / "checkpoints")
    upstep_fast.adapt(**options, resume=True)
    for file in ("checkpoints/step-00000010/state.safetensors", "adapter/adapter_model.safetensors"):
        assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    record_property("disk_faults", 1)


def full_at(monkeypatch, step):
    """The disk is full in the middle of the checkpoint of this step."""
    real = checkpoint._write

    def write(path, data):
        if path.parent.name.startswith(f".tmp-{step}-"):
            real(path, data[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path, data)

    monkeypatch.setattr(checkpoint, "_write", write)


@pytest.mark.parametrize(("step", "left"), [(3, []), (6, [3]), (9, [3, 6]), (10, [6, 9])])
def test_a_full_disk_keeps_the_checkpoints_before(options, tmp_path, monkeypatch, step, left):
    full_at(monkeypatch, step)
    with pytest.raises(RunFailedError, match=rf"cannot write .*\.tmp-{step}-.*No space left"):
        upstep_fast.adapt(**options)
    folder = tmp_path / "out" / "checkpoints"
    # the run may have got as far as the next save before it trained of this one's failure, and no further
    assert sorted(p.name for p in folder.glob("*-*")) == [f"step-{s:08d}" for s in left]


def test_an_interrupt_whose_checkpoint_cannot_be_written_says_so(options, tmp_path, monkeypatch):
    full_at(monkeypatch, 5)
    on_each_step(monkeypatch, lambda step: signal.raise_signal(signal.SIGTERM) if step == 4 else None)
    with pytest.raises(RunFailedError, match="No space left"):
        upstep_fast.adapt(**options)
    assert checkpoint.newest(tmp_path / "out" / "checkpoints").step == 3


LIMITED = """
import resource, sys
from upstep_fast import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
cli.main(sys.argv[1:])
"""


def test_a_file_size_limit_of_the_system(options, tmp_path):
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "-c", LIMITED, "adapt", *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "File too large" in done.stderr.strip().splitlines()[-1], done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out" / "checkpoints").iterdir())
    upstep_fast.adapt(**options, resume=True)


def test_the_folder_of_checkpoints_vanishes(options, tmp_path, monkeypatch):
    folder = tmp_path / "out" / "checkpoints"
    with monkeypatch.context() as patch:
        on_each_step(patch, lambda step: folder.rename(tmp_path / "elsewhere") if step == 4 else None)
        with pytest.raises(RunFailedError, match=r"cannot write .*checkpoints.*No such file") as error:
            upstep_fast.adapt(**options)
    assert one_line(error)
    upstep_fast.adapt(**options, resume=True)


def test_an_output_folder_that_cannot_be_made(options, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ConfigError, match=r"out: cannot write to .*Not a directory") as error:
        upstep_fast.adapt(**options | {"out": str(tmp_path / "file" / "out")})
    assert one_line(error) and error.value.exit_code == 2


@pytest.mark.parametrize("where", ["mkdir", "open"])
def test_a_read_only_output_folder_is_refused_at_the_start(options, tmp_path, monkeypatch, where):
    (tmp_path / "out").mkdir()

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    target = Path if where == "mkdir" else os
    monkeypatch.setattr(target, where, refuse if where == "mkdir" else _refuse_locks(refuse))
    with pytest.raises(ConfigError, match="Read-only file system"):
        upstep_fast.adapt(**options)


def _refuse_locks(refuse):
    real = os.open
    return lambda path, *rest, **more: (refuse if str(path).endswith(output.LOCK) else real)(path, *rest, **more)


def test_a_second_run_on_one_folder_refuses_and_names_the_first(options, tmp_path, monkeypatch):
    seen = []

    def second(step):
        if step == 2:
            before = (tmp_path / "out" / "metrics.jsonl").read_bytes()
            for more in ({}, {"resume": True}, {"overwrite": True}):
                with pytest.raises(ConfigError, match=rf"in use by process {os.getpid()} on ") as error:
                    upstep_fast.adapt(**options, **more)
                seen.append(one_line(error))
            assert (tmp_path / "out" / "metrics.jsonl").read_bytes() == before

    on_each_step(monkeypatch, second)
    upstep_fast.adapt(**options)
    assert seen == [True, True, True] and not (tmp_path / "out" / "run.lock").exists()


def test_a_folder_is_free_again_after_a_failed_run(options, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(UpStep, "loss", lambda self, *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            upstep_fast.adapt(**options)
    assert not (tmp_path / "out" / "run.lock").exists()
    upstep_fast.adapt(**options, resume=True)


@pytest.mark.parametrize("content", ['{"pid": 99999999, "host": "gone"}', "", "{", "[]", '{"pid": "x"}', "\x00" * 9000])
def test_the_lock_of_a_dead_process_is_taken_over(options, tmp_path, caplog, content):
    out = tmp_path / "out"
    out.mkdir()
    (out / "run.lock").write_text(content)
    config = upstep_config(**options | {"data": ("d",)})
    with caplog.at_level("WARNING", logger="upstep_fast"), output.lock_run_folder(config):
        assert json.loads((out / "run.lock").read_text())["pid"] == os.getpid()
    assert ("taken over" in caplog.text) == bool(content)
    assert ("process 99999999 on 'gone'" in caplog.text) == ("99999999" in content)
    assert not (out / "run.lock").exists()


def test_many_processes_that_race_for_one_lock(options, tmp_path):
    """Never two at once, though each removes the file when it leaves."""
    script = (
        "import sys, time, upstep_fast.runtime.run_folder as o\n"
        "from pathlib import Path\n"
        "out, held = Path(sys.argv[1]), 0\n"
        "end = time.monotonic() + 2\n"
        "while time.monotonic() < end:\n"
        "    try:\n"
        "        with o._locked(out):\n"
        "            fd = (out / 'inside').open('x'); time.sleep(0.0005); (out / 'inside').unlink(); held += 1\n"
        "    except o.ConfigError: pass\n"
        "print(held)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    racers = [
        subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    ends = [racer.communicate(timeout=60) for racer in racers]
    assert all(racer.returncode == 0 for racer in racers), ends  # FileExistsError: two were inside at once
    assert sum(int(out) for out, _ in ends) > 3


# open at every step; the count of memory would compute one more
EVERY_STEP = {"gate": "none", "memory_check": False}


def poison(monkeypatch, what, bad):
    """Makes the loss, a gradient or the embedding of the given steps NaN."""
    calls = iter(range(10**6))
    if what == "loss":
        real = UpStep.loss
        monkeypatch.setattr(UpStep, "loss", lambda self, *a: real(self, *a) * (math.nan if next(calls) in bad else 1))
    elif what == "gradient":
        real = UpStep.loss

        def loss(self, *args):
            value = real(self, *args)
            if next(calls) in bad:
                value.register_hook(lambda gradient: gradient * math.inf)
            return value

        monkeypatch.setattr(UpStep, "loss", loss)
    else:
        real = UpStep.views

        def views(*args):
            value = real(*args)
            return replace(value, pixels=value.pixels * (math.nan if next(calls) in bad else 1))

        monkeypatch.setattr(UpStep, "views", views)


@pytest.mark.parametrize("what", ["loss", "gradient", "images"])
@pytest.mark.parametrize("layout", ["symmetric", "asymmetric"])
def test_a_step_that_is_not_finite_changes_nothing(options, monkeypatch, tmp_path, what, layout, record_property):
    seen = []
    real = trainer.step

    def snapshot(state):
        method = state.method
        names = dict(method.named_parameters()) | dict(method.named_buffers())
        moments = {f"{i}.{k}": v for i, s in enumerate(state.optimizer.state.values()) for k, v in s.items()}
        return {name: tensor.detach().clone() for name, tensor in (names | moments).items()}

    def spy(state, *rest):
        before = snapshot(state)
        row = real(state, *rest)
        after = snapshot(state)
        moved = {name for name in after if name not in before or not torch.equal(before[name], after[name])}
        seen.append((row, moved))  # the row is filled in by the next step
        return row

    monkeypatch.setattr(trainer, "step", spy)
    poison(monkeypatch, what, {2, 3, 6})
    upstep_fast.adapt(**options, **EVERY_STEP, layout=layout)
    assert [at for at, (row, _) in enumerate(seen) if row["bad"]] == [2, 3, 6]
    for row, moved in seen:
        bad = row["bad"]
        trained = {name for name in moved if not name.startswith("running_")}
        assert bool(trained) == (bad is None)
        # the center of a step whose loss alone is bad is as good as a skipped step's
        assert bool(moved) == (bad is None or what != "images")
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["bad"]] == [2, 3, 6]
    record_property("number_faults", 3)


@pytest.mark.parametrize("what", ["loss", "gradient", "images"])
def test_three_in_a_row_end_the_run_with_the_images_named(
    options, monkeypatch, tmp_path, photos, what, record_property
):
    poison(monkeypatch, what, {1, 2, 4, 5, 6})
    with pytest.raises(RunFailedError, match=r"step 6: .* 3 steps in a row.*bad_batches\.json") as error:
        upstep_fast.adapt(**options, **EVERY_STEP)
    assert one_line(error) and error.value.exit_code == 1
    batches = json.loads((tmp_path / "out" / "bad_batches.json").read_text())
    assert [batch["step"] for batch in batches] == [4, 5, 6]
    every = {str(path) for path in photos.iterdir()}
    assert all(len(batch["images"]) == 8 and set(batch["images"]) <= every for batch in batches)
    assert len(set().union(*(batch["images"] for batch in batches))) > 8
    # the checkpoint from before is what a resume finds
    assert checkpoint.newest(tmp_path / "out" / "checkpoints").step == 6
    record_property("number_faults", 1)


def test_a_streak_of_bad_steps_survives_a_stop(options, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        poison(patch, "loss", {3, 4})
        on_each_step(patch, lambda step: signal.raise_signal(signal.SIGTERM) if step == 4 else None)
        with pytest.raises(Interrupted):
            upstep_fast.adapt(**options, **EVERY_STEP)
    poison(monkeypatch, "loss", {0})
    with pytest.raises(RunFailedError, match="step 5: the loss is nan, 3 steps in a row"):
        upstep_fast.adapt(**options, **EVERY_STEP, resume=True)


def test_a_signal_during_a_save_is_not_lost(options, monkeypatch, tmp_path):
    real = resume.save

    def save(state, *rest):
        if state.step == 3:
            signal.raise_signal(signal.SIGTERM)
        return real(state, *rest)

    monkeypatch.setattr(resume, "save", save)
    with pytest.raises(Interrupted, match="after 4 of 10"):
        upstep_fast.adapt(**options)
    assert checkpoint.newest(tmp_path / "out" / "checkpoints").step == 4


def test_the_run_continues_while_a_checkpoint_is_written(options, monkeypatch, tmp_path):
    """The write of step 3 ends only after step 5 has begun; what it holds is the state after step 3 all the same."""
    upstep_fast.adapt(**options | {"out": str(tmp_path / "plain"), "steps": 10})
    begun, kept = threading.Event(), {}
    on_each_step(monkeypatch, lambda step: begun.set() if step == 4 else None)
    real = checkpoint.save

    def slow(folder, step, files, *rest):
        assert begun.wait(60)
        kept[step] = dict(files)
        return real(folder, step, files, *rest)

    monkeypatch.setattr(checkpoint, "save", slow)
    upstep_fast.adapt(**options)
    monkeypatch.undo()
    monkeypatch.setattr(
        checkpoint, "save", lambda f, s, files, *rest: (kept[s] == files or 1 / 0, real(f, s, files, *rest))
    )
    upstep_fast.adapt(**options, overwrite=True)
    assert sorted(kept) == [3, 6, 9, 10]


def test_a_signal_at_the_last_step_leaves_the_adapter_and_a_run_to_complete(options, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        on_each_step(patch, lambda step: signal.raise_signal(signal.SIGTERM) if step == 9 else None)
        with pytest.raises(Interrupted, match="stopped after all 10 steps, before the verdict; the adapter is written"):
            upstep_fast.adapt(**options)
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    assert upstep_fast.adapt(**options, resume=True).steps == 10


def test_stopping_takes_one_step(options, monkeypatch, tmp_path):
    sent = []

    def action(step):
        time.sleep(0.05)
        if step == 4:
            sent.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGINT)

    on_each_step(monkeypatch, action)
    with pytest.raises(Interrupted, match="after 5 of"):
        upstep_fast.adapt(**options)
    assert time.monotonic() - sent[0] < 5
