"""The output folder: what it tells is what ran, at any moment, and it is this run's alone."""

import contextlib
import json
import os
import signal
import tomllib

import pytest
from photos import save_photos
from tally import tally

import upstep_fast
from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.config.files import from_options
from upstep_fast.data.sources.source import open_source
from upstep_fast.errors import ConfigError, Interrupted, RunFailedError
from upstep_fast.methods.upstep.upstep import UpStep
from upstep_fast.runtime import checkpoint
from upstep_fast.runtime import run_folder as output
from upstep_fast.runtime.device import resolve
from upstep_fast.train import adapt as adapting
from upstep_fast.train import validator


@pytest.fixture
def options(options):
    return options | {"gate": "none", "report_images": False, "memory_check": False}


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return save_photos(tmp_path_factory.mktemp("many"), 80)


def config(out, **more):
    return from_options(AdaptConfig, {"model": "m", "data": "d", "out": out, **more}, "adapt")


def at_step(monkeypatch, number, action):
    """Call `action` near the end of a step, counted from 0 over the steps that embed views."""
    real, count = UpStep.update_running_stats, iter(range(10**6))

    def remember(self, embedded):
        if next(count) == number:
            action()
        real(self, embedded)

    monkeypatch.setattr(UpStep, "update_running_stats", remember)


def fail():
    raise ZeroDivisionError


def told(out):
    values = tomllib.loads((out / "config.toml").read_text())
    return {name: value for table in values.values() if isinstance(table, dict) for name, value in table.items()}


def ended_early(options, monkeypatch, step=2):
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        at_step(patch, step, fail)
        upstep_fast.adapt(**options)


def test_a_resume_that_starts_anew_with_other_values_tells_them(options, monkeypatch, tmp_path):
    out = tmp_path / "out"
    ended_early(options, monkeypatch)
    (out / "judgement.jsonl").write_text('{"step": 2, "predicted_gain": 99.0}\n')
    (out / "bad_batches.json").write_text("[]")
    upstep_fast.adapt(**options | {"lr": 0.05, "seed": 7, "steps": 3}, resume=True)
    now = told(out)
    assert (now["lr"], now["seed"], now["steps"]) == (0.05, 7, 3)
    assert "3 of 3" in (out / "report.html").read_text()
    assert not (out / "bad_batches.json").exists() and not (out / "judgement.jsonl").exists()


def test_the_history_of_another_attempt_does_not_choose_the_adapter(options, many, monkeypatch, tmp_path):
    options |= {"data": many, "judge_every": 2}
    monkeypatch.setattr(validator, "predicted_gain", lambda scores: 50.0)
    ended_early(options, monkeypatch, step=3)
    monkeypatch.setattr(validator, "predicted_gain", lambda scores: 1.0)
    upstep_fast.adapt(**options | {"lr": 0.05}, resume=True)
    rows = [json.loads(line) for line in (tmp_path / "out" / "judgement.jsonl").read_text().splitlines()]
    assert [row["predicted_gain"] for row in rows] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "line", ['{"step": 2, "predicted_gain": NaN}', '{"step": 2}', "{", "[]", '{"step": "a"}', "[" * 10**5]
)
def test_a_damaged_history_is_refused_by_its_line(tmp_path, line):
    path = tmp_path / "judgement.jsonl"
    path.write_text('{"step": 1, "predicted_gain": 0.5}\n' + line + "\n")
    with pytest.raises(RunFailedError, match=r"judgement\.jsonl, line 2, is no validation .*delete the file") as error:
        validator._read(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "steps = ", "clip = inf\n"])
def test_a_broken_config_toml_is_replaced(options, tmp_path, content):
    upstep_fast.adapt(**options)
    (tmp_path / "out" / "config.toml").write_text(content)
    upstep_fast.adapt(**options, resume=True)
    assert told(tmp_path / "out")["steps"] == options["steps"]


def test_a_refused_resume_leaves_config_toml_as_it_was(options, tmp_path):
    upstep_fast.adapt(**options)
    before = (tmp_path / "out" / "config.toml").read_bytes()
    with pytest.raises(ConfigError, match="lr was"):
        upstep_fast.adapt(**options | {"lr": 0.5}, resume=True)
    assert (tmp_path / "out" / "config.toml").read_bytes() == before


@pytest.mark.parametrize(
    "wrong",
    [
        {"cuda_graphs": True},
        {"decode": "cuda"},
        {"lora_blocks": 99},
        {"img_size": 7},
        {"out": "a\udcff"},
        {"clip": float("inf")},
    ],
)
def test_a_refused_start_leaves_nothing_behind(options, tmp_path, wrong, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options |= {"out": tmp_path / "deep" / "out"}
    with pytest.raises(ConfigError) as error:
        upstep_fast.adapt(**options | wrong)
    assert "\n" not in str(error.value) and not (tmp_path / "deep").exists() and not os.path.lexists("a\udcff")


def test_a_refused_start_with_overwrite_keeps_the_old_run(options, tmp_path):
    out = tmp_path / "out"
    upstep_fast.adapt(**options)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="lora_blocks"):
        upstep_fast.adapt(**options | {"lora_blocks": 99}, overwrite=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


class Killed(BaseException):
    """Stands for a SIGKILL: no `except Exception` and no OSError handler sees it."""


@contextlib.contextmanager
def killed_at(point):
    """Raise before the `point`-th call that changes what is on disk, and before every later one."""
    calls = iter(range(10**6))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "replace", "unlink", "rmdir", "mkdir"):
            patch.setattr(os, name, _counted(getattr(os, name), calls, point))
        yield


def _counted(real, calls, point):
    def call(*args, **kwargs):
        if next(calls) >= point:  # a killed process makes no later call either
            raise Killed
        return real(*args, **kwargs)

    return call


def old_run(out):
    for name in (
        "checkpoints/step-00000003/manifest.json",
        "adapter/adapter_config.json",
        "metrics.jsonl",
        "train.log",
    ):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("old")
    (out / "config.toml").write_text("steps = 3\n")


@pytest.mark.parametrize("flag", ["overwrite", "resume"])
def test_an_overwrite_killed_at_any_moment_leaves_a_folder_that_is_accepted(tmp_path, flag):
    point, ended = 0, False
    while not ended:
        out = tmp_path / str(point)
        old_run(out)
        try:
            with killed_at(point), output.lock_run_folder(config(out, overwrite=True)):
                output.begin(config(out, overwrite=True), anew=True)
                ended = True
        except Killed:
            pass
        with output.lock_run_folder(config(out, **{flag: True})):
            output.begin(config(out, steps=9, **{flag: True}), anew=flag == "overwrite")
        assert told(out)["steps"] == 9
        if flag == "overwrite":
            assert sorted(path.name for path in out.rglob("*")) == ["checkpoints", "config.toml"]
        point += 1
    assert point > 8
    tally("kill points", f"--overwrite, then --{flag}", point)


def test_only_unfinished_files_of_our_own_are_removed(tmp_path):
    out = tmp_path / "out"
    old_run(out)
    (tmp_path / "elsewhere").mkdir()
    kept = [
        "photo.tmp-2024",
        ".tmp-notes",
        ".tmp-2024-photo.jpg",
        "x.tmp-1-config.toml",
        ".tmp-12",
        "checkpoints/.tmp-3-x",
    ]
    gone = [".tmp-77-config.toml", "adapter/.tmp-77-adapter_model.safetensors", "checkpoints/.tmp-latest-77"]
    for name in kept + gone:
        (out / name).write_text("x")
    for name in ("checkpoints/.tmp-9-77", "checkpoints/.tmp-old-step-00000003-77"):
        (out / name).mkdir()
    (out / "checkpoints/.tmp-5-77").symlink_to(tmp_path / "elsewhere")
    with output.lock_run_folder(config(out, resume=True)):
        output.begin(config(out, resume=True), anew=False)
    left = {str(path.relative_to(out)) for path in out.rglob("*") if ".tmp-" in path.name}
    assert left == {*kept, "checkpoints/.tmp-5-77"} and (tmp_path / "elsewhere").is_dir()


@pytest.mark.parametrize("name", ["run.lock", "train.log", "metrics.jsonl", "adapter", "checkpoints", "config.toml"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_outputs_that_are_links_or_pipes_are_refused(tmp_path, name, kind):
    out, target = tmp_path / "out", tmp_path / "target"
    old_run(out)
    target.write_text("mine")
    if (out / name).is_dir():
        (out / name).rename(tmp_path / "aside")
    (out / name).unlink(missing_ok=True)
    (out / name).symlink_to(target) if kind == "link" else os.mkfifo(out / name)
    with (
        pytest.raises(ConfigError, match=rf"{name} is a (link|pipe or device); .*remove it"),
        output.lock_run_folder(config(out, resume=True)),
    ):
        pass
    if name != "run.lock":  # --overwrite removes the link, not what it leads to
        with output.lock_run_folder(config(out, overwrite=True)):
            output.begin(config(out, overwrite=True), anew=True)
        assert not (out / name).is_symlink()
    assert target.read_text() == "mine"
    tally("hostile files", f"a {kind} in --out", 1)


def test_checkpoints_moved_to_another_disk_are_continued_there(tmp_path):
    out, disk = tmp_path / "out", tmp_path / "disk"
    old_run(out)
    (out / "checkpoints").rename(disk)
    (out / "checkpoints").symlink_to(disk, target_is_directory=True)
    (disk / ".tmp-5-77").mkdir()
    with output.lock_run_folder(config(out, resume=True)):
        output.begin(config(out, resume=True), anew=False)
        assert not (disk / ".tmp-5-77").exists()
        checkpoint.save(out / "checkpoints", 9, {"state": b"x"}, {})
    assert (out / "checkpoints").is_symlink() and checkpoint.newest(disk).step == 9
    with output.lock_run_folder(config(out, overwrite=True)):
        output.begin(config(out, overwrite=True), anew=True)
    assert not (out / "checkpoints").is_symlink() and checkpoint.newest(disk).step == 9


def test_a_folder_moved_away_stops_the_run_and_the_one_in_its_place_is_left_alone(options, monkeypatch, tmp_path):
    out, moved = tmp_path / "out", tmp_path / "moved"
    upstep_fast.adapt(**options | {"out": tmp_path / "whole"})

    def move():
        out.rename(moved)
        old_run(out)
        (out / "run.lock").write_text("of another run")

    with monkeypatch.context() as patch:
        at_step(patch, 4, move)
        with pytest.raises(
            RunFailedError, match=r"out: .* was moved, deleted or taken over.*--out at its new place"
        ) as e:
            upstep_fast.adapt(**options | {"checkpoint_every": 2})
    assert "\n" not in str(e.value)
    assert (out / "run.lock").read_text() == "of another run"
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["adapter", "checkpoints", "config.toml", "metrics.jsonl", "run.lock", "train.log"]
    )
    assert (out / "adapter" / "adapter_config.json").read_text() == "old"
    tally("kill points", "--out moved", 1)
    result = upstep_fast.adapt(**options | {"out": moved}, resume=True)
    name = "adapter_model.safetensors"
    assert (result.adapter / name).read_bytes() == (tmp_path / "whole" / "adapter" / name).read_bytes()


def test_a_lock_taken_over_stops_the_run_and_stays(options, monkeypatch, tmp_path):
    lock = tmp_path / "out" / "run.lock"

    def steal():
        lock.unlink()
        (tmp_path / "out" / "ballast").write_text("keeps the inode number from being used again")
        lock.write_text("of another run")

    at_step(monkeypatch, 2, steal)
    with pytest.raises(RunFailedError, match="taken over by another run"):
        upstep_fast.adapt(**options)
    assert lock.read_text() == "of another run"


def alphas(out):
    """lora_alpha of every adapter that can be read in the folder, by folder."""
    found = {}
    for path in out.rglob("adapter_config.json"):
        if ".tmp-" not in str(path):
            found[path.parent.relative_to(out).as_posix()] = json.loads(path.read_text())["lora_alpha"]
    return found


def _noting(real, note):
    def call(*args, **kwargs):
        note()
        return real(*args, **kwargs)

    return call


def watch(monkeypatch, out):
    """Collect `alphas` before every call that changes what is on disk: what a kill there would leave."""
    seen = []
    for name in ("fsync", "replace", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, _noting(getattr(os, name), lambda: seen.append(alphas(out))))
    return seen


def test_no_moment_finds_an_adapter_at_another_strength(options, monkeypatch, tmp_path):
    full = upstep_fast.adapt(**options | {"out": tmp_path / "full"})
    whole = alphas(full.adapter.parent)["adapter"]
    seen = watch(monkeypatch, tmp_path / "out")
    options |= {"strength": 0.5, "checkpoint_every": 2}
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        at_step(patch, 3, lambda: signal.raise_signal(signal.SIGTERM))
        upstep_fast.adapt(**options)
    assert alphas(tmp_path / "out").keys() >= {"adapter", "checkpoints/step-00000002"}
    upstep_fast.adapt(**options, resume=True)
    seen.append(alphas(tmp_path / "out"))
    assert len(seen) > 30 and {alpha for found in seen for alpha in found.values()} == {whole / 2}
    upstep_fast.adapt(**options | {"strength": 0.25}, resume=True)
    assert alphas(tmp_path / "out")["adapter"] == whole / 4 and told(tmp_path / "out")["strength"] == 0.25


def test_a_strength_chosen_at_the_end_is_never_seen_before_and_said_to_be_missing(
    options, many, monkeypatch, tmp_path, caplog
):
    options |= {"data": many, "judge_every": 3, "strength": "auto", "checkpoint_every": 2}
    gains = iter([1.0, 2.0, 1.0, 7.0, 6.0, 5.0])  # of two validations, and of the strengths 0.25, 0.5, 0.75, 1
    monkeypatch.setattr(validator, "predicted_gain", lambda scores: next(gains))
    with monkeypatch.context() as patch:
        seen = watch(patch, tmp_path / "out")
        upstep_fast.adapt(**options)
    ended = alphas(tmp_path / "out")
    assert ended["adapter"] == ended["best"] / 2
    assert {found["adapter"] for found in seen if "adapter" in found} <= {ended["adapter"]}
    monkeypatch.setattr(validator, "predicted_gain", lambda scores: 1.0)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        at_step(patch, 3, lambda: signal.raise_signal(signal.SIGTERM))
        upstep_fast.adapt(**options | {"out": tmp_path / "stopped"})
    assert "strength: auto is chosen at the end; " in caplog.text
    assert f"{tmp_path / 'stopped' / 'adapter'} is at full strength" in caplog.text


def test_a_run_that_diverges_is_said_to_by_its_validation(options, many, monkeypatch, tmp_path):
    options |= {"data": many, "judge_every": 2}
    monkeypatch.setattr(validator.Validator, "_features", lambda self, vit: self._views.flatten(2) * float("nan"))
    with pytest.raises(RunFailedError, match=r"judge: step 2: .*not finite, the run has diverged; lower --lr") as error:
        upstep_fast.adapt(**options)
    assert "\n" not in str(error.value)


def test_train_log_holds_what_was_said_before_it_was_opened(options, monkeypatch, tmp_path, caplog):
    caplog.set_level("INFO", logger="upstep_fast")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        at_step(patch, 3, lambda: signal.raise_signal(signal.SIGTERM))
        upstep_fast.adapt(**options)
    first = (tmp_path / "out" / "train.log").read_text()
    upstep_fast.adapt(**options, resume=True)
    second = (tmp_path / "out" / "train.log").read_text().removeprefix(first)
    assert "INFO upstep-fast " in first and "INFO upstep-fast " in second.splitlines()[0]
    assert "resume: continuing after step 4 of 6" in second


def test_the_progress_line_has_no_loss_before_a_step_with_an_update(options, monkeypatch, tmp_path):
    options |= {"gate": "alternate", "gate_rate": 0.5, "log_every": 1}
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        at_step(patch, 1, lambda: signal.raise_signal(signal.SIGTERM))
        upstep_fast.adapt(**options)
    upstep_fast.adapt(**options, resume=True)
    lines = [line for line in (tmp_path / "out" / "train.log").read_text().splitlines() if " images/s " in line]
    assert len(lines) == 6 and "loss -  center" in lines[3] and not any("nan" in line for line in lines)


def test_images_that_ranks_cannot_share_equally_are_said(monkeypatch, caplog, tmp_path):
    three = tmp_path / "three"
    three.mkdir()
    source = open_source(save_photos(three, 3))
    monkeypatch.setattr(adapting.distributed, "size", lambda: 2)
    with caplog.at_level("WARNING", logger="upstep_fast"):
        adapting._log_start({"batch_size": (256, 2), "queue": (9, 3)}, resolve("cpu", "fp32"), source)
    assert caplog.messages == [
        "batch_size: reduced from 256 to 2: the 3 images there are, in equal parts for 2 ranks",
        "queue: reduced from 9 to the 3 images there are",
    ]


def test_a_lock_that_cannot_be_removed_does_not_hide_how_the_run_ended(options, monkeypatch):
    real = os.unlink

    def unlink(path, *args, **kwargs):
        if str(path).endswith(output.LOCK):
            raise PermissionError(13, "Permission denied", str(path))
        real(path, *args, **kwargs)

    monkeypatch.setattr(os, "unlink", unlink)
    ended_early(options, monkeypatch)


def test_a_line_of_metrics_that_never_ends_is_not_read(options, monkeypatch, tmp_path, caplog):
    upstep_fast.adapt(**options | {"checkpoint_every": 3})
    path = tmp_path / "out" / "metrics.jsonl"
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0] + b" " * (1 << 22))
    monkeypatch.setattr("upstep_fast.report.metrics.MAX_ROW_BYTES", 1000)
    upstep_fast.adapt(**options, resume=True)
    assert "lacks the rows of steps 1 to 5" in caplog.text and path.stat().st_size < 1000
