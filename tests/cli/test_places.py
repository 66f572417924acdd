"""Places that cannot be written are refused in one line before a model is looked for, in every command that writes."""

from __future__ import annotations

import errno
import io
import os
import sys
from pathlib import Path

import pytest

from upstep_fast.cli.commands import COMMANDS, main
from upstep_fast.config.flat import paths
from upstep_fast.model import backbone, registry
from upstep_fast.runtime import atomic_file

# without those that only print or whose --out is checked below by another name
WRITING = {
    "adapt": ("out", "run"),
    "finetune": ("out", "run"),
    "predict": ("out", "predictions.csv"),
    "embed": ("out", "features.npy"),
    "curate": ("out", "curation"),
    "search": ("out", "similar.html"),
    "export": ("out", "exported"),
    "eval": ("json", "scores.json"),
    "bench": ("json", "times.json"),
    "demo": ("out", "demo"),
}


@pytest.fixture
def locked(tmp_path):
    """A folder in which nobody, not even root, may write."""
    if os.geteuid() == 0:
        if sys.platform != "linux":
            pytest.skip("no folder is closed to root")
        return Path("/sys/fs")
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    return folder


@pytest.fixture
def refused(model, photos, tmp_path, monkeypatch, capsys):
    """Run a command and return its line, the last of stderr; a look at the model fails the test."""
    for i, path in enumerate(sorted(photos.iterdir())):
        to = tmp_path / "labeled" / "ab"[i % 2]
        to.mkdir(parents=True, exist_ok=True)
        to.joinpath(path.name).symlink_to(path)
    for owner, name in ((registry, "find"), (backbone, "load")):
        monkeypatch.setattr(owner, name, lambda *_, **__: pytest.fail("the model was looked for"))

    def run(command: str, place: Path) -> str:
        flag, name = WRITING[command]
        args = [command, f"--{flag}", str(place / name)]
        if command not in ("demo", "predict", "curate", "search"):
            args += ["--model", model]
        if command not in ("demo", "bench", "export"):
            args += ["--data", str(tmp_path / "labeled")]
        if command in ("predict", "curate", "search"):
            args += ["--run", str(tmp_path)]
        if command == "search":
            args += ["--query", str(tmp_path / "labeled")]
        with pytest.raises(SystemExit) as stop:
            main(args)
        *logged, line = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and line.startswith(f"upstep-fast: {flag}: "), line
        assert str(place) in line and all(text.startswith("INFO ") for text in logged)
        return line

    return run


def test_the_sweep_has_every_command_that_writes():
    writing = {name for name, command in COMMANDS.items() if {"out", "json"} & set(paths(command.config()))}
    assert set(WRITING) == writing - {"report", "plan", "doctor"}  # of the last two --json prints


@pytest.mark.parametrize("command", WRITING)
def test_a_place_without_permission(refused, locked, command):
    line = refused(command, locked)
    assert "denied" in line or "not permitted" in line or "Read-only" in line


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize("command", WRITING)
def test_a_place_without_room(refused, monkeypatch, tmp_path, command, number):
    class Full(io.BytesIO):
        def __init__(self, path: Path, mode: str) -> None:
            path.touch()

        def write(self, content: object) -> int:
            raise OSError(number, os.strerror(number))

    (tmp_path / "place").mkdir()
    monkeypatch.setattr(atomic_file, "open", Full, raising=False)
    assert os.strerror(number) in refused(command, tmp_path / "place")
    assert not list((tmp_path / "place").iterdir())
