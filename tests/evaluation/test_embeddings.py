"""Features and names as one commit: kills, full disks, odd names, broken models."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from upstep_fast import embed
from upstep_fast.cli.commands import main
from upstep_fast.errors import ConfigError, RunFailedError
from upstep_fast.evaluation import embeddings
from upstep_fast.model import backbone
from upstep_fast.runtime import commit

ORDERING = ("fsync", "replace", "unlink")  # what puts content on disk


def _terminated():
    """What SIGTERM does in a command, runtime/exit_signals.py."""
    raise KeyboardInterrupt


class Killed(BaseException):
    """In place of SIGKILL: nothing after it touches the disk."""


def killed_at(monkeypatch, point, act):
    """Run `act`; from the `point`-th call that orders the disk on, all of them raise. Return whether it got there."""
    calls = iter(range(10**6))
    with monkeypatch.context() as patch:
        for name in ORDERING:
            real = getattr(os, name)

            def counted(*args, real=real, **kwargs):
                if next(calls) >= point:
                    raise Killed
                return real(*args, **kwargs)

            patch.setattr(os, name, counted)
        patch.setattr(Path, "unlink", lambda self, missing_ok=False: _unlink(self, missing_ok))
        try:
            act()
        except Killed:
            return True
    return False


def _unlink(path, missing_ok):
    try:
        os.unlink(path)
    except FileNotFoundError:
        if not missing_ok:
            raise


@pytest.fixture
def features(monkeypatch):
    """Sets what the next embed of a folder finds: `rows` rows of the value `value`, without running a model."""

    def set_to(rows, value):
        x = torch.full((rows, 2, 48), float(value))
        x[:, :, 0] = torch.arange(rows)[:, None]
        monkeypatch.setattr(embeddings, "extract", lambda *_, **__: ({"base": x}, list(range(rows))))

    return set_to


def state(out):
    """The pair under its names: (rows, value, names), or None where a reader finds no pair."""
    kinds = {".safetensors": lambda: load_file(out)["features"].numpy(), ".npy": lambda: np.load(out)}
    names = out.with_suffix(".txt")
    if not out.exists() or (out.suffix == ".npy" and not names.exists()):
        return None
    x = kinds[out.suffix]()
    return len(x), float(x[0, 1]), len(names.read_text().splitlines()) if names.exists() else len(x)


def fitted(path):
    return load_file(path)["base.mean"].tolist() if path.exists() else None


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
@pytest.mark.parametrize("whitens", [False, True])
def test_a_kill_at_any_point_leaves_the_old_or_the_new(model, photos, features, monkeypatch, tmp_path, suffix, whitens):
    out, kept, seen = tmp_path / f"f{suffix}", tmp_path / "w", set()
    command = dict(model=model, data=photos, out=out, device="cpu", overwrite=True)
    command |= dict(fit_whitening=str(kept)) if whitens else {}
    features(5, 1)
    embed(**command)
    old = state(out), fitted(kept)
    features(6, 2)
    embed(**command)
    new = state(out), fitted(kept)
    assert old != new and old[0][2] == 5 and new[0][2] == 6
    for point in range(100):
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        features(5, 1)
        embed(**command)
        features(6, 2)
        reached = killed_at(monkeypatch, point, lambda: embed(**command))
        # a reader finds a pair, or sees that there is none; never a mixture
        assert state(out) in (None, old[0], new[0])
        with pytest.raises(ConfigError, match="exists"):  # the next command completes what was begun
            embed(**command | dict(overwrite=False))
        left = state(out), fitted(kept)
        assert left in (old, new)
        seen.add(left == new)
        if not reached:
            break
    assert seen == {True, False} and 3 <= point < 99
    assert not [path for path in tmp_path.iterdir() if ".tmp-" in path.name or ".commit-" in path.name]


def test_a_killed_write_of_other_files_is_refused_by_name(model, photos, features, monkeypatch, tmp_path):
    features(5, 1)
    command = dict(model=model, data=photos, out=tmp_path / "f.npy", device="cpu")
    monkeypatch.setattr(commit, "_complete", lambda *_: None)  # killed once the list is written
    embed(**command, fit_whitening=str(tmp_path / "w"))
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"out: a write of .*w, .*f.npy, .*f.txt was killed halfway; repeat"):
        embed(**command)
    # a list that a stranger made moves nothing
    (tmp_path / "mine").write_text("precious")
    for text in (f'[["{tmp_path}/mine", "{tmp_path}/f.npy"]]', "[1]", "{}", '[["a"]]'):
        (tmp_path / ".commit-f.txt.json").write_text(text)
        with pytest.raises(ConfigError, match="killed halfway"):
            embed(**command)
    assert (tmp_path / "mine").read_text() == "precious"


@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".parquet"])
def test_a_full_disk_leaves_the_old_files(model, photos, features, monkeypatch, capsys, tmp_path, suffix):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    out, args = tmp_path / f"f{suffix}", ["--model", model, "--data", photos, "--device", "cpu", "--overwrite"]
    features(5, 1)
    embed(model, photos, out, device="cpu", fit_whitening=str(tmp_path / "w"))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    features(6, 2)
    real = os.fsync
    for point in range(3):
        calls = iter(range(100))

        def full(descriptor):
            if next(calls) == point:  # noqa: B023
                raise OSError(errno.ENOSPC, "No space left on device")
            real(descriptor)

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(SystemExit) as stop:
            main(["embed", *map(str, args), "--out", str(out), "--fit-whitening", str(tmp_path / "w")])
        assert stop.value.code == RunFailedError.exit_code
        err = capsys.readouterr().err.strip().splitlines()
        assert "out: cannot write" in err[-1] and "No space left on device" in err[-1]
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_signal_leaves_no_temporary_files(model, photos, features, monkeypatch, tmp_path):
    """SIGTERM raises KeyboardInterrupt, here while the names are written."""
    features(5, 1)
    embed(model, photos, tmp_path / "f.npy", device="cpu")
    before = state(tmp_path / "f.npy")
    features(6, 2)
    real, calls = os.fsync, iter(range(100))

    def stopped(descriptor):
        if next(calls) == 1:
            _terminated()
        real(descriptor)

    monkeypatch.setattr(os, "fsync", stopped)
    with pytest.raises(SystemExit) as stop:
        main(f"embed --model {model} --data {photos} --out {tmp_path / 'f.npy'} --device cpu --overwrite".split())
    assert stop.value.code == 75 and state(tmp_path / "f.npy") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.npy", "f.txt"]


def test_an_unwritten_array_has_its_reason(model, photos, features, monkeypatch, tmp_path):
    """np.save reports a full disk without an error number."""

    def full(*_):
        raise OSError("240 requested and 17 written")

    features(5, 1)
    monkeypatch.setattr(np, "save", full)
    with pytest.raises(RunFailedError, match="240 requested and 17 written"):
        embed(model, photos, tmp_path / "f.npy", device="cpu")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["a\nb", "a\r\nb", "a\x85b", "a\u2028b", "a\x1cb", '"quoted', "plain", "é ~ 🦜", "\x1b[2J"]
)
def test_one_line_is_one_row(name):
    line = embeddings.name_line(name)
    assert len(f"{line}\n".splitlines()) == 1 and line.isprintable()
    assert (json.loads(line) if line.startswith('"') else line) == name
    assert line == name or not name.isprintable() or name.startswith('"')


def test_a_line_feed_in_a_file_name_keeps_the_rows(model, photos, tmp_path):
    (tmp_path / "in").mkdir()
    for path, name in zip(sorted(photos.iterdir())[:3], ("a.jpg", "b\nc\u2028d.jpg", "e.jpg"), strict=True):
        shutil.copy(path, tmp_path / "in" / name)
    embed(model, tmp_path / "in", tmp_path / "f.npy", device="cpu")
    lines = (tmp_path / "f.txt").read_text().splitlines()
    assert len(lines) == len(np.load(tmp_path / "f.npy")) == 3
    assert json.loads(lines[1]).endswith("b\nc\u2028d.jpg") and lines[2].endswith("/e.jpg")


def test_names_of_others_are_not_overwritten(model, photos, tmp_path):
    (tmp_path / "f.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"out: .*f.txt exists"):
        embed(model, photos, tmp_path / "f.npy", device="cpu")
    assert (tmp_path / "f.txt").read_text() == "mine"


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0])
def test_features_that_are_none_are_refused(model, photos, capsys, monkeypatch, tmp_path, value):
    """A planted model: the last norm has this scale, and no bias."""
    real = backbone.load_from

    def broken(config):
        base = real(config)
        with torch.no_grad():
            base.vit.norm.weight.fill_(value)
            base.vit.norm.bias.zero_()
        return base

    monkeypatch.setattr(backbone, "load_from", broken)
    with pytest.raises(SystemExit) as stop:
        main(f"embed --model {model} --data {photos} --out {tmp_path / 'f.npy'} --device cpu --precision fp32".split())
    err = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 1 and "the base model's features of" in err[-1] and "check its weights" in err[-1]
    assert not list(tmp_path.iterdir())
