"""Output to terminals, pipes and CI jobs: colors on terminals only, nothing but results with --quiet."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

FAST = "--steps 3 --batch-size 8 --prototypes 8 --head-hidden 32 --head-dim 16 --device cpu --precision fp32"
COLOR = re.compile(rb"\x1b\[[0-9;]*(?:3[0-7]|4[0-7]|9[0-7])[0-9;]*m")
ERASE = b"\x1b[2K"  # a line is drawn again: the bar moves
MESSAGES = ("INFO", "step 3/3")


@pytest.fixture
def adapt(model, photos, tmp_path):
    """Arguments of a short run with one log line per step."""
    return ["adapt", "--model", model, "--data", photos, "--out", tmp_path / "out", "--log-every", "1", *FAST.split()]


def environment(**more: str) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "CI", "COLUMNS")}
    return {**inherited, "OMP_NUM_THREADS": "1", "TERM": "xterm-256color", **more}


def command(*args) -> list[str]:
    return [sys.executable, "-m", "upstep_fast", *map(str, args)]


def on_pipes(cwd: Path, *args, **more: str) -> tuple[int, str, str]:
    done = subprocess.run(command(*args), cwd=cwd, env=environment(**more), capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


def on_a_terminal(cwd: Path, *args, **more: str) -> tuple[int, bytes]:
    """Return the exit code and the output of a command on a pseudo-terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command(*args), cwd=cwd, env=environment(**more), stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    seen = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux's way of saying that the other end is closed
            break
        if not part:
            break
        seen += part
    os.close(ours)
    return process.wait(timeout=120), seen


def test_a_pipe_gets_plain_lines(adapt, tmp_path):
    code, out, err = on_pipes(tmp_path, *adapt, FORCE_COLOR="1")
    assert code == 0 and "\x1b" not in out + err
    steps = [line for line in err.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in steps] == ["1/3", "2/3", "3/3"]
    assert "adapter:" in out and "step 1/3" not in out


def test_a_terminal_gets_colors_and_a_bar(adapt, tmp_path):
    code, seen = on_a_terminal(tmp_path, *adapt)
    assert code == 0 and COLOR.search(seen) and ERASE in seen
    assert b"step 3/3" not in seen


def test_no_color_keeps_the_bar_without_colors(adapt, tmp_path):
    code, seen = on_a_terminal(tmp_path, *adapt, NO_COLOR="1")
    assert code == 0 and not COLOR.search(seen) and ERASE in seen


def test_plain_on_a_terminal(adapt, tmp_path):
    code, seen = on_a_terminal(tmp_path, *adapt, "--plain")
    assert code == 0 and b"\x1b" not in seen and b"step 3/3" in seen


def test_quiet_leaves_results_and_the_log(adapt, tmp_path):
    code, out, err = on_pipes(tmp_path, "--quiet", *adapt)
    assert code == 0 and err == "" and "adapter:" in out
    log = (tmp_path / "out" / "train.log").read_text()
    assert all(message in log for message in MESSAGES)


def test_quiet_on_a_terminal_shows_no_bar(adapt, tmp_path):
    code, seen = on_a_terminal(tmp_path, *adapt, "--quiet")
    assert code == 0 and ERASE not in seen and b"adapter:" in seen


def test_quiet_does_not_hide_errors_and_warnings(adapt, tmp_path):
    (tmp_path / "empty").mkdir()
    code, _, err = on_pipes(tmp_path, "--quiet", *adapt, "--data", tmp_path / "empty")
    assert code == 3 and "empty" in err
    code, _, err = on_pipes(tmp_path, "--quiet", *adapt, "--batch-size", "1000")
    assert code == 0 and "batch_size: reduced from 1000 to the 24 images" in err and "INFO" not in err


def test_names_do_not_steer_a_terminal(tmp_path):
    code, seen = on_a_terminal(tmp_path, "adapt", "--config", "\x1b]0;title\x07\x1b[2J\x9b31m\nERROR forged.toml")
    assert code == 2 and rb"\x1b]0;title\x07\x1b[2J\x9b31m\nERROR forged.toml" in seen
    assert b"\x07" not in seen and b"\x1b]" not in seen and b"\x1b[2J" not in seen and b"\xc2\x9b" not in seen
    assert seen.count(b"\n") == 1


@pytest.mark.parametrize("args", [["adapt", "--help"], ["adapt", "--lr", "fast"]], ids=["help", "usage error"])
def test_help_and_usage_errors_follow_the_same_rules(tmp_path, args):
    code, seen = on_a_terminal(tmp_path, *args)
    assert code == (0 if "--help" in args else 2) and COLOR.search(seen)
    assert not COLOR.search(on_a_terminal(tmp_path, *args, NO_COLOR="1")[1])
    for flags, more in ((["--plain"], {}), ([], {"TERM": "dumb"})):
        assert b"\x1b" not in on_a_terminal(tmp_path, *args, *flags, **more)[1]
    assert "\x1b" not in "".join(on_pipes(tmp_path, *args)[1:])


def test_tables_are_markdown_in_pipes_and_never_cut(capsys, monkeypatch):
    from rich.table import Table

    from upstep_fast.runtime import terminal

    monkeypatch.setenv("COLUMNS", "40")
    table = Table("op", "why", title="what runs")
    table.add_row("lora_linear", "word " * 60 + "end")
    terminal.show(table)
    lines = capsys.readouterr().out.splitlines()
    title, head, rule, row = [line for line in lines if line.strip()]
    assert title.strip() == "what runs" and head.split("|")[1].strip() == "op" and set(rule) == {"|", "-"}
    assert row.rstrip(" |").endswith("end")
